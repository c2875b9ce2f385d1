//! Which format a file has, by its first bytes.
//!
//! Guessing is a danger with raw disks: what a guest writes to its first sector decides what the
//! file is taken for next time. So everything that anybody's probe looks at lies in the first
//! [`HEAD_LEN`] bytes, and [`crate::filters::GuessGuard`] uses this very function to refuse writes
//! that would change the answer. For that to hold, a magic must lie inside one 512-byte sector
//! (the smallest write of a guest), and the answer may depend on nothing else.

use crate::images::ImageFormat;

/// How much of a file is looked at: one sector, as QEMU does.
pub const HEAD_LEN: usize = 512;

/// Bytes at a fixed place that give a format away.
struct Magic {
    format: ImageFormat,
    offset: usize,
    bytes: &'static [u8],
}

const MAGICS: &[Magic] = &[
    Magic { format: ImageFormat::Qcow2, offset: 0, bytes: b"QFI\xfb\0\0\0\x02" },
    Magic { format: ImageFormat::Qcow2, offset: 0, bytes: b"QFI\xfb\0\0\0\x03" },
    // Any other version of qcow: an old one, or one yet to come.
    Magic { format: ImageFormat::Qcow, offset: 0, bytes: b"QFI\xfb" },
    Magic { format: ImageFormat::Vhdx, offset: 0, bytes: b"vhdxfile" },
    Magic { format: ImageFormat::AddCow, offset: 0, bytes: b"ADD_COW\xff" },
    Magic { format: ImageFormat::WriteLog, offset: 0, bytes: b"rhswfsj\0" },
    Magic { format: ImageFormat::Vmdk, offset: 0, bytes: b"KDMV" },
    Magic { format: ImageFormat::Vmdk, offset: 0, bytes: b"COWD" },
    Magic { format: ImageFormat::Vmdk, offset: 0, bytes: b"SEsparse" },
    Magic { format: ImageFormat::Vmdk, offset: 0, bytes: &0xcafe_babe_u64.to_le_bytes() },
    Magic { format: ImageFormat::Vdi, offset: 0x40, bytes: b"\x7f\x10\xda\xbe" },
    Magic { format: ImageFormat::Vpc, offset: 0, bytes: b"conectix" },
    Magic { format: ImageFormat::Qed, offset: 0, bytes: b"QED\0" },
    Magic { format: ImageFormat::Luks, offset: 0, bytes: b"LUKS\xba\xbe" },
    Magic { format: ImageFormat::Parallels, offset: 0, bytes: b"WithoutFreeSpace" },
    Magic { format: ImageFormat::Parallels, offset: 0, bytes: b"WithouFreSpacExt" },
    Magic { format: ImageFormat::Bochs, offset: 0, bytes: b"Bochs Virtual HD Image" },
    Magic { format: ImageFormat::Cloop, offset: 0, bytes: b"#!/bin/sh\n#V2.0 Format\n" },
];

/// The format that the first bytes of a file (up to [`HEAD_LEN`] of them count) give away; `None`
/// if there is no sign of any, which leaves raw.
pub fn by_magic(head: &[u8]) -> Option<ImageFormat> {
    let head = &head[..head.len().min(HEAD_LEN)];
    let found = MAGICS
        .iter()
        .find(|magic| head.get(magic.offset..).is_some_and(|at| at.starts_with(magic.bytes)));
    match found {
        Some(magic) => Some(magic.format),
        None if looks_like_vmdk_descriptor(head) => Some(ImageFormat::Vmdk),
        None if looks_like_qbm(head) => Some(ImageFormat::Qbm),
        None => None,
    }
}

/// A VMDK descriptor: text whose first line that is neither blank nor a comment says
/// `version=1` (2, 3), or that announces itself.
fn looks_like_vmdk_descriptor(head: &[u8]) -> bool {
    if head.starts_with(b"# Disk DescriptorFile") {
        return true;
    }
    for line in head.split(|b| *b == b'\n') {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        return matches!(line, b"version=1" | b"version=2" | b"version=3");
    }
    false
}

/// A QBM descriptor: a JSON object whose key is "QBM". Where the sector ends before that is
/// decided, the answer is yes: the rest could come with a later write.
fn looks_like_qbm(head: &[u8]) -> bool {
    let Some(object) = head.trim_ascii_start().strip_prefix(b"{") else { return false };
    let key = object.trim_ascii_start();
    let undecided = head.len() == HEAD_LEN && key.len() < b"\"QBM".len();
    // A backslash starts an escape, which can spell the key in other ways.
    undecided || key.starts_with(b"\"QBM") || key.starts_with(b"\"\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sector that starts with these bytes.
    fn sector(start: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD_LEN];
        head[..start.len()].copy_from_slice(start);
        head
    }

    #[test]
    fn each_magic_is_found_and_lies_in_the_head() {
        for magic in MAGICS {
            assert!(magic.offset + magic.bytes.len() <= HEAD_LEN);
            let mut head = vec![0x55; HEAD_LEN];
            head[magic.offset..][..magic.bytes.len()].copy_from_slice(magic.bytes);
            assert_eq!(by_magic(&head), Some(magic.format), "{:?}", magic.bytes);
        }
    }

    #[test]
    fn boot_sectors_and_short_files_are_raw() {
        assert_eq!(by_magic(&sector(b"\xeb\x63\x90")), None);
        assert_eq!(by_magic(&sector(b"")), None);
        assert_eq!(by_magic(b""), None);
        assert_eq!(by_magic(b"QF"), None);
        assert_eq!(by_magic(&sector(b"# a script\necho version=1\n")), None);
    }

    #[test]
    fn texts_are_recognised() {
        assert_eq!(
            by_magic(&sector(b"# Disk DescriptorFile\nversion=1\n")),
            Some(ImageFormat::Vmdk)
        );
        assert_eq!(by_magic(&sector(b"#x\n\n  version=1\r\n")), Some(ImageFormat::Vmdk));
        assert_eq!(by_magic(b" \n{ \"QBM\": {} }"), Some(ImageFormat::Qbm));
        assert_eq!(by_magic(b"{\"\\u0051BM\": {}}"), Some(ImageFormat::Qbm));
        assert_eq!(by_magic(b"{\"name\": 1}"), None);
    }

    #[test]
    fn an_object_that_could_still_become_qbm_counts() {
        let mut head = vec![b' '; HEAD_LEN];
        head[3] = b'{';
        assert_eq!(by_magic(&head), Some(ImageFormat::Qbm));
        assert_eq!(by_magic(b"{ "), None);
    }
}
