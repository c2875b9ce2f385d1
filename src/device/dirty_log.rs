//! The migration log: one bit for each page of guest memory that we, or the kernel for us, wrote.
//!
//! While a guest is migrated its front-end shares a bitmap (SET_LOG_BASE), fetches and clears it
//! again and again, and copies the pages whose bits were set. A bit is set *after* the page was
//! written: set before, it could be fetched before the write and the write would be lost.

#![allow(unsafe_code)]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::mapping::Mapping;
use crate::error::Result;

/// Size of the page that one bit stands for, fixed by the protocol.
pub const LOG_PAGE_SIZE: u64 = 4096;

/// As much of a bitmap as is mapped: 52 bits of guest address. Holes in a file cost its sender nothing,
/// and the address space is the process's.
const MAX_LOG: u64 = 1 << (52 - 12 - 3);

/// A front-end's dirty bitmap.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    /// Whether a page was written that the bitmap has no bit for.
    falls_short: AtomicBool,
}

impl DirtyLog {
    /// Maps the bitmap of a SET_LOG_BASE message; the file is closed.
    pub fn new(file: File, offset: u64, size: u64) -> Result<Arc<DirtyLog>> {
        let mapping = Mapping::new(&file, offset, size.min(MAX_LOG), "dirty log")?;
        Ok(Arc::new(DirtyLog { mapping, falls_short: AtomicBool::new(false) }))
    }

    /// Marks the pages of `len` bytes at guest address `gpa`, which were written before. Pages
    /// past the end of the bitmap are left out, and told of once: the front-end promised a bitmap that
    /// covers its memory, and loses only its own pages if it lied.
    pub fn mark(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = gpa / LOG_PAGE_SIZE;
        let last = gpa.saturating_add(len - 1) / LOG_PAGE_SIZE;
        let bytes = self.mapping.len() as u64;
        if last / 8 >= bytes && !self.falls_short.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the front-end's dirty log ends with page {} of the guest's memory, and page {last} \
                 was written, too; a migration that goes by this log loses what was written there: \
                 cancel it",
                (bytes * 8).saturating_sub(1)
            );
        }
        let Some(last_byte) = bytes.checked_sub(1) else { return };
        let end_byte = (last / 8).min(last_byte);
        for byte in first / 8..=end_byte {
            let mut bits = u8::MAX;
            if byte == first / 8 {
                bits &= u8::MAX << (first % 8);
            }
            if byte == last / 8 {
                bits &= u8::MAX >> (7 - last % 8);
            }
            // SAFETY: `byte` is at most `last_byte`, inside the mapping.
            let cell = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(byte as usize)) };
            // Always a read-modify-write, even if the bit seems to be set: it orders our write to
            // the page before a fetch that clears the bit.
            cell.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Whether a page was written that the bitmap has no bit for.
    pub fn falls_short(&self) -> bool {
        self.falls_short.load(Ordering::Relaxed)
    }

    /// Whether the bitmap's file was truncated.
    pub fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::device::mapping::tests::memfd;

    /// The pages marked after `marks`, in a bitmap of `bytes` bytes.
    fn marked(bytes: u64, marks: &[(u64, u64)]) -> Vec<u64> {
        let file = memfd(bytes + 8);
        let log = DirtyLog::new(file.try_clone().unwrap(), 8, bytes).unwrap();
        marks.iter().for_each(|(gpa, len)| log.mark(*gpa, *len));
        let mut map = vec![0; bytes as usize + 8];
        file.read_exact_at(&mut map, 0).unwrap();
        assert_eq!(map[..8], [0; 8], "marked before the start");
        (0..bytes * 8).filter(|page| map[8 + *page as usize / 8] & 1 << (page % 8) != 0).collect()
    }

    #[test]
    fn marks_the_pages_touched() {
        assert_eq!(marked(4, &[(0, 1)]), [0]);
        assert_eq!(marked(4, &[(4095, 2)]), [0, 1]);
        assert_eq!(marked(4, &[(7 * 4096, 4097)]), [7, 8]);
        assert_eq!(marked(4, &[(3 * 4096, 0)]), [0; 0]);
        assert_eq!(marked(4, &[(5 * 4096, 20 * 4096)]), (5..25).collect::<Vec<_>>());
        assert_eq!(marked(4, &[(4096, 4096), (31 * 4096, 1)]), [1, 31]);
    }

    #[test]
    fn stays_inside_the_bitmap() {
        assert_eq!(marked(2, &[(15 * 4096, 1 << 40)]), [15]);
        assert_eq!(marked(2, &[(16 * 4096, 1)]), [0; 0]);
        assert_eq!(marked(2, &[(u64::MAX, u64::MAX)]), [0; 0]);
        assert_eq!(marked(2, &[(0, u64::MAX)]), (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn a_page_without_a_bit_is_noticed() {
        let log = DirtyLog::new(memfd(2), 0, 2).unwrap();
        log.mark(0, 16 * 4096);
        assert!(!log.falls_short());
        log.mark(15 * 4096, 4097);
        assert!(log.falls_short());
    }
}
