//! Directories that live as long as a test.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Two directories: one for images, on the disk the project is built on, and one for sockets,
/// whose paths must stay short (107 bytes at most).
pub struct Scratch {
    images: tempfile::TempDir,
    sockets: tempfile::TempDir,
}

impl Scratch {
    /// Makes both directories.
    pub fn new() -> Scratch {
        Scratch {
            images: tempfile::Builder::new()
                .prefix("guest-")
                .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
                .expect("a directory for images"),
            sockets: tempfile::Builder::new()
                .prefix("vublk-")
                .tempdir()
                .expect("a directory for sockets"),
        }
    }

    /// A path among the images.
    pub fn file(&self, name: &str) -> PathBuf {
        self.images.path().join(name)
    }

    /// A path among the sockets.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// Makes a raw image of `size` bytes that takes no space.
    pub fn raw(&self, name: &str, size: u64) -> PathBuf {
        let path = self.file(name);
        File::create(&path).and_then(|file| file.set_len(size)).expect("a sparse image");
        path
    }

    /// Makes a qcow2 image of `size` bytes, by QEMU's own tool.
    pub fn qcow2(&self, name: &str, size: u64) -> PathBuf {
        let path = self.file(name);
        super::run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), &size.to_string()]);
        path
    }

    /// Makes an add-cow image (and its image file beside it) over a raw one.
    pub fn add_cow(&self, name: &str, backing: &Path) -> PathBuf {
        let path = self.file(name);
        let options = ["-q", "-f", "add-cow", "-b", text(backing), "-F", "raw"];
        super::vublk(&[&["create"], &options[..], &[text(&path)]].concat());
        path
    }
}

/// A path as text. All paths here are made by us.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The space a file takes on the host, in bytes.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).expect("an image").blocks() * 512
}

/// Overwrites a range of a file with bytes that do not compress and do not repeat.
pub fn fill_with_noise(path: &Path, offset: u64, length: u64) {
    use std::os::unix::fs::FileExt as _;
    let mut noise = vec![0; length as usize];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut noise)).expect("noise");
    let file = File::options().write(true).open(path).expect("the image");
    file.write_all_at(&noise, offset).expect("the image can be written");
}
