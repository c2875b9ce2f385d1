//! The guest's side of a ring, small and straightforward, for unit tests.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::features::{EVENT_IDX, INDIRECT_DESC};
use super::mapping::tests::memfd;
use super::memory::{GuestMemory, MemoryRegion};
use super::ring::{Ring, RingConfig};

/// Guest address of the first region, which holds the rings and the data.
pub(crate) const BASE: u64 = 0x10_0000;
/// Length of that region.
pub(crate) const LEN: u64 = 0x4_0000;
/// The second region follows the first, with other host memory behind it.
pub(crate) const SECOND: u64 = BASE + LEN;
/// What the front-end adds to guest addresses.
pub(crate) const FRONT_END: u64 = 0x7f00_0000_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A guest with one ring.
pub(crate) struct Guest {
    /// The files behind the regions, to look at memory without the device's mappings.
    pub files: [File; 2],
    pub memory: Arc<GuestMemory>,
    pub size: u16,
    /// The next available index to write.
    pub avail_idx: u16,
}

impl Guest {
    pub fn new(size: u16) -> Guest {
        let files = [memfd(LEN), memfd(LEN)];
        let memory = map(&files);
        Guest { files, memory, size, avail_idx: 0 }
    }

    pub fn desc_addr(&self) -> u64 {
        BASE
    }

    pub fn avail_addr(&self) -> u64 {
        BASE + 16 * u64::from(self.size)
    }

    pub fn used_addr(&self) -> u64 {
        (self.avail_addr() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The first address after the ring.
    pub fn free_addr(&self) -> u64 {
        (self.used_addr() + 6 + 8 * u64::from(self.size)).next_multiple_of(4096)
    }

    pub fn config(&self, features: u64) -> RingConfig {
        RingConfig {
            size: self.size,
            desc_addr: self.desc_addr() + FRONT_END,
            avail_addr: self.avail_addr() + FRONT_END,
            used_addr: self.used_addr() + FRONT_END,
            base: 0,
            features,
            memory: Arc::clone(&self.memory),
            dirty_log: None,
            log_used_addr: None,
            inflight: None,
        }
    }

    /// A ring with indirect descriptors, with or without EVENT_IDX.
    pub fn ring(&self, event_idx: bool) -> Ring {
        let features = INDIRECT_DESC | if event_idx { EVENT_IDX } else { 0 };
        Ring::new(self.config(features)).unwrap().0
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let (file, offset) = if addr >= SECOND {
            (&self.files[1], addr - SECOND)
        } else {
            (&self.files[0], addr - BASE)
        };
        file.write_all_at(bytes, offset).unwrap();
    }

    pub fn read<const N: usize>(&self, addr: u64) -> [u8; N] {
        let (file, offset) = if addr >= SECOND {
            (&self.files[1], addr - SECOND)
        } else {
            (&self.files[0], addr - BASE)
        };
        let mut bytes = [0; N];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    pub fn read_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.read(addr))
    }

    pub fn write_u16(&self, addr: u64, value: u16) {
        self.write(addr, &value.to_le_bytes());
    }

    /// Writes a descriptor into the table at `table`.
    pub fn desc_in(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    /// Writes a descriptor into the ring's table.
    pub fn desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_in(self.desc_addr(), index, addr, len, flags, next);
    }

    /// Writes a whole chain from descriptor `head` on: (address, length, writable).
    pub fn chain(&self, head: u16, parts: &[(u64, u32, bool)]) {
        for (i, (addr, len, writable)) in parts.iter().enumerate() {
            let index = head + i as u16;
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            self.desc(index, *addr, *len, more | if *writable { WRITE } else { 0 }, index + 1);
        }
    }

    /// Makes a head available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.write_u16(self.avail_addr() + 4 + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.write_u16(self.avail_addr() + 2, self.avail_idx);
    }

    pub fn used_idx(&self) -> u16 {
        self.read_u16(self.used_addr() + 2)
    }

    /// The used element for index `idx`: head and length.
    pub fn used(&self, idx: u16) -> (u32, u32) {
        let at = self.used_addr() + 4 + 8 * u64::from(idx % self.size);
        let word = u64::from_le_bytes(self.read(at));
        (word as u32, (word >> 32) as u32)
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.write_u16(self.avail_addr(), flags);
    }

    pub fn set_used_event(&self, idx: u16) {
        self.write_u16(self.avail_addr() + 4 + 2 * u64::from(self.size), idx);
    }

    pub fn used_flags(&self) -> u16 {
        self.read_u16(self.used_addr())
    }

    pub fn avail_event(&self) -> u16 {
        self.read_u16(self.used_addr() + 4 + 8 * u64::from(self.size))
    }
}

/// Maps both files as guest memory.
pub(crate) fn map(files: &[File; 2]) -> Arc<GuestMemory> {
    let region = |guest_addr| MemoryRegion {
        guest_addr,
        size: LEN,
        front_end_addr: guest_addr + FRONT_END,
        mmap_offset: 0,
    };
    GuestMemory::from_regions([
        (region(BASE), files[0].try_clone().unwrap()),
        (region(SECOND), files[1].try_clone().unwrap()),
    ])
    .unwrap()
}

/// The ranges of `iovs` by guest address.
pub(crate) fn guest_ranges(memory: &GuestMemory, iovs: &[libc::iovec]) -> Vec<(u64, usize)> {
    iovs.iter()
        .map(|iov| (memory.guest_addr(iov.iov_base.cast(), iov.iov_len).unwrap(), iov.iov_len))
        .collect()
}
