//! libvhdi, the second opinion on what QEMU does not know of VHDX: parents, and 4096-byte sectors.
//! `integration/setup libvhdi` puts it below `target/integration`; where it is missing, that is said.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A Python that has libvhdi.
fn python() -> Option<PathBuf> {
    let dir = match std::env::var_os("VUBLK_INTEGRATION_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/integration"),
    };
    let python = dir.join("libvhdi/bin/python3");
    let works = Command::new(&python).args(["-c", "import pyvhdi"]).output();
    if works.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    super::skip("libvhdi is not there (integration/setup libvhdi)");
    None
}

/// What libvhdi says of an image (whose parents it is given, nearest first): size and SHA-256.
pub fn reads(dir: &Path, images: &[&str]) -> Option<(u64, String)> {
    let text = convert(dir, images, "/dev/null")?;
    let (size, sum) = text.trim().split_once(' ').unwrap();
    Some((size.parse().unwrap(), sum.to_string()))
}

/// The content that libvhdi finds in an image (whose parents it is given, nearest first).
pub fn content(dir: &Path, images: &[&str]) -> Option<Vec<u8>> {
    const OUT: &str = "libvhdi.raw";
    convert(dir, images, OUT)?;
    Some(std::fs::read(dir.join(OUT)).unwrap())
}

/// Has libvhdi write the content of an image to a file, and say its size and SHA-256.
fn convert(dir: &Path, images: &[&str], out: &str) -> Option<String> {
    const SCRIPT: &str = "
import sys, hashlib, pyvhdi
out, paths = sys.argv[1], sys.argv[2:]
files = [pyvhdi.file() for _ in paths]
for file, path in zip(files, paths):
    file.open(path)
for child, parent in zip(files, files[1:]):
    assert child.parent_identifier == parent.identifier, 'another parent'
    child.set_parent(parent)
top, sum, left = files[0], hashlib.sha256(), files[0].media_size
with open(out, 'wb') as out:
    while left:
        sum.update(piece := top.read_buffer(min(left, 1 << 20)))
        out.write(piece)
        left -= len(piece)
print(top.media_size, sum.hexdigest())
";
    let python = python()?;
    let args = [&["-c", SCRIPT, out], images].concat();
    Some(super::tool_ok(dir, python.to_str().unwrap(), &args))
}
