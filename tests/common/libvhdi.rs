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
    const SCRIPT: &str = "
import sys, hashlib, pyvhdi
files = [pyvhdi.file() for _ in sys.argv[1:]]
for file, path in zip(files, sys.argv[1:]):
    file.open(path)
for child, parent in zip(files, files[1:]):
    assert child.parent_identifier == parent.identifier, 'another parent'
    child.set_parent(parent)
top, sum, left = files[0], hashlib.sha256(), files[0].media_size
while left:
    sum.update(piece := top.read_buffer(min(left, 1 << 20)))
    left -= len(piece)
print(top.media_size, sum.hexdigest())
";
    let python = python()?;
    let mut args = vec!["-c", SCRIPT];
    args.extend(images);
    let text = super::tool_ok(dir, python.to_str().unwrap(), &args);
    let (size, sum) = text.trim().split_once(' ').unwrap();
    Some((size.parse().unwrap(), sum.to_string()))
}
