//! Writing cpio archives in the "new ASCII" form that Linux unpacks as an initramfs.
//!
//! Archives concatenate: the kernel unpacks one after the other, so a test adds its job to the base
//! initramfs without rebuilding it. Each archive begins at a multiple of four bytes.

/// An archive in memory.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a regular file. `path` has no leading slash; its directory must exist in the guest.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        const REGULAR: u32 = 0o100_000;
        self.entry(path, REGULAR | mode, content);
    }

    /// Ends the archive and returns its bytes, a multiple of 512.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of less than 4 GiB");
        let name_size = path.len() as u32 + 1;
        // Magic, then thirteen fields of eight hexadecimal digits: inode, mode, uid, gid, links,
        // mtime, size, device major and minor, special major and minor, name size, check.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
