//! Areas shared with a back-end for recovery and for migration.
//!
//! [`Inflight`] is the back-end's record of requests it has taken and not yet completed. The
//! front-end only keeps it and hands it back after a reconnect; tests look into it.
//! [`DirtyLog`] is the bitmap, one bit for each page of 4096 bytes, in which a back-end marks the
//! guest memory it wrote while a migration copies it.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use super::memory::{Mapping, Pages, shared_file};
use crate::error::{Error, Result, ResultExt};
use crate::units::align_up;

/// Bytes of the header of each queue's record.
const HEADER_LEN: u64 = 16;
/// Bytes of each descriptor's entry.
const ENTRY_LEN: u64 = 16;

/// Header of one queue's record in the in-flight area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightHeader {
    /// Feature flags, 0 so far.
    pub features: u64,
    /// 0 while fresh, 1 once a back-end initialised it.
    pub version: u16,
    /// Number of entries.
    pub desc_num: u16,
    /// Head that completed last.
    pub last_batch_head: u16,
    /// Used index up to which entries have been cleared.
    pub used_idx: u16,
}

/// Entry of one descriptor in the in-flight area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightEntry {
    /// Whether the request with this head was taken and not completed.
    pub inflight: bool,
    /// Next head of the batch.
    pub next: u16,
    /// Order in which it was taken.
    pub counter: u64,
}

/// The in-flight area, as a front-end keeps it.
#[derive(Debug)]
pub struct Inflight {
    /// The memory, to be handed over again at a reconnect.
    fd: OwnedFd,
    /// Bytes of it.
    size: u64,
    /// Where in the file it begins.
    offset: u64,
    /// Queues it has room for.
    queues: u16,
    /// Entries for each queue.
    queue_size: u16,
    /// Our view.
    mapping: Mapping,
}

impl Inflight {
    /// Maps an area that a back-end made (or a test).
    pub fn new(fd: OwnedFd, size: u64, offset: u64, queues: u16, queue_size: u16) -> Result<Self> {
        let len = rustix::fs::fstat(&fd)?.st_size as u64;
        if offset.checked_add(size).is_none_or(|end| end > len) || size == 0 {
            return Err(Error::corrupt(format!(
                "in-flight area of {size} bytes at {offset} in a file of {len}"
            )));
        }
        // A mapping begins at a page, the area need not.
        if !offset.is_multiple_of(4096) {
            return Err(Error::corrupt(format!(
                "in-flight area begins at {offset}, not at a page"
            )));
        }
        let mapping = Mapping::new(fd.as_fd(), offset, size, false).context(|| "in-flight area")?;
        Ok(Inflight { fd, size, offset, queues, queue_size, mapping })
    }

    /// A zeroed area of the front-end's own making.
    pub fn fresh(queues: u16, queue_size: u16) -> Result<Self> {
        let size = Inflight::queue_bytes(queue_size) * u64::from(queues);
        let fd = shared_file("inflight", size, Pages::Small)?;
        Inflight::new(fd, size, 0, queues, queue_size)
    }

    /// Bytes that one queue takes.
    fn queue_bytes(queue_size: u16) -> u64 {
        let bytes = HEADER_LEN + ENTRY_LEN * u64::from(queue_size);
        align_up(bytes, 64).expect("a few megabytes at most")
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes of the area.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it begins in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Queues it has room for.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Entries for each queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// `N` bytes of the area, zero where it ends early.
    fn bytes<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.mapping.read(offset, &mut bytes);
        bytes
    }

    /// The header of a queue's record.
    pub fn header(&self, queue: u16) -> InflightHeader {
        let at = Inflight::queue_bytes(self.queue_size) * u64::from(queue);
        InflightHeader {
            features: u64::from_ne_bytes(self.bytes(at)),
            version: u16::from_ne_bytes(self.bytes(at + 8)),
            desc_num: u16::from_ne_bytes(self.bytes(at + 10)),
            last_batch_head: u16::from_ne_bytes(self.bytes(at + 12)),
            used_idx: u16::from_ne_bytes(self.bytes(at + 14)),
        }
    }

    /// The entry of a queue's descriptor.
    pub fn entry(&self, queue: u16, head: u16) -> InflightEntry {
        let at = Inflight::queue_bytes(self.queue_size) * u64::from(queue)
            + HEADER_LEN
            + ENTRY_LEN * u64::from(head);
        InflightEntry {
            inflight: self.bytes::<1>(at)[0] != 0,
            next: u16::from_ne_bytes(self.bytes(at + 6)),
            counter: u64::from_ne_bytes(self.bytes(at + 8)),
        }
    }

    /// Heads a queue has in flight, in the order they were taken.
    pub fn inflight_heads(&self, queue: u16) -> Vec<u16> {
        let mut heads: Vec<(u64, u16)> = (0..self.queue_size)
            .map(|head| (self.entry(queue, head), head))
            .filter(|(entry, _)| entry.inflight)
            .map(|(entry, head)| (entry.counter, head))
            .collect();
        heads.sort_unstable();
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// Writes any bytes into the area, as a hostile front-end would.
    pub fn scribble(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.mapping.write(offset, bytes) {
            Ok(())
        } else {
            Err(Error::invalid("outside of the in-flight area"))
        }
    }
}

/// The bitmap of guest pages that a back-end wrote to.
#[derive(Debug)]
pub struct DirtyLog {
    /// The memory.
    fd: OwnedFd,
    /// Our view.
    mapping: Mapping,
}

impl DirtyLog {
    /// Bytes of guest memory that one bit stands for.
    pub const PAGE: u64 = 4096;

    /// A clean log for guest addresses below `end`.
    pub fn new(end: u64) -> Result<Self> {
        let bytes = align_up(end.div_ceil(DirtyLog::PAGE).div_ceil(8), 4096)
            .ok_or_else(|| Error::invalid("guest memory too large for a log"))?;
        let fd = shared_file("dirty-log", bytes.max(4096), Pages::Small)?;
        let mapping = Mapping::new(fd.as_fd(), 0, bytes.max(4096), false)?;
        Ok(DirtyLog { fd, mapping })
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes of the log.
    pub fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// The byte that holds the bit of page number `page`.
    fn byte(&self, page: u64) -> Option<&AtomicU8> {
        let byte = self.mapping.at(page / 8, 1)?;
        // SAFETY: `at` checked that the byte is mapped, the mapping lives as long as `self`, and
        // both processes touch it by atomic operations only.
        Some(unsafe { AtomicU8::from_ptr(byte) })
    }

    /// Whether the page that holds `guest_addr` was written.
    pub fn is_dirty(&self, guest_addr: u64) -> bool {
        let page = guest_addr / DirtyLog::PAGE;
        self.byte(page).is_some_and(|b| b.load(Ordering::SeqCst) & (1 << (page % 8)) != 0)
    }

    /// The pages written since the last call (their first guest addresses), and cleans the log.
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for index in 0..self.size() {
            let Some(byte) = self.byte(index * 8) else { break };
            if byte.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let bits = byte.swap(0, Ordering::SeqCst);
            for bit in (0..8).filter(|bit| bits & (1 << bit) != 0) {
                pages.push((index * 8 + bit) * DirtyLog::PAGE);
            }
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_come_in_the_order_they_were_taken() {
        let area = Inflight::fresh(2, 8).unwrap();
        // 16 + 8 * 16 = 144, rounded to 192: the second queue begins there.
        let at = |head: u64| 192 + 16 + head * 16;
        area.scribble(192 + 8, &[1, 0]).unwrap();
        area.scribble(at(3), &[1]).unwrap();
        area.scribble(at(3) + 8, &[9]).unwrap();
        area.scribble(at(5), &[1]).unwrap();
        area.scribble(at(5) + 8, &[4]).unwrap();
        assert_eq!(area.inflight_heads(1), [5, 3]);
        assert_eq!(area.inflight_heads(0), [] as [u16; 0]);
        assert_eq!(area.header(1).version, 1);
        assert!(area.scribble(384, &[0]).is_err());
    }

    #[test]
    fn taking_the_log_cleans_it() {
        let log = DirtyLog::new(1 << 20).unwrap();
        assert!(log.take().is_empty());
        log.byte(9).unwrap().fetch_or(1 << 1, Ordering::SeqCst);
        assert!(log.is_dirty(9 * 4096 + 5));
        assert_eq!(log.take(), [9 * 4096]);
        assert!(!log.is_dirty(9 * 4096));
    }
}
