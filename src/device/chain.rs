//! Walks a descriptor chain into host memory ranges.
//!
//! A chain is a list of descriptors in the ring's table, perhaps ending in one that points to an
//! indirect table where the list goes on. Each names a range of guest memory that we read, or,
//! after those, one that we write. [`Chain`] takes them as two lists of `iovec`s; both are reused
//! from request to request.
//!
//! ```text
//! head ─► [desc R] ─► [desc R] ─► [desc W] ─► [desc W]        readable: R R    writable: W W
//! head ─► [desc R] ─► [indirect] ─► table: [desc R] ─► [desc W]
//! ```
//!
//! Invariants:
//! * Each descriptor is read once, into a copy that the guest cannot change any more.
//! * A walk ends: it takes at most as many steps as its table has entries, and at most
//!   [`MAX_DESCRIPTORS`].
//! * What the lists hold lies in guest memory. After an error they hold nothing but, at most, the
//!   chain's last writable byte, so that the request can still be told that it failed.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::features::MAX_QUEUE_SIZE;
use super::memory::{GuestMemory, RegionCache, Unmapped};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Size of a descriptor in memory.
pub(crate) const DESCRIPTOR: usize = 16;

/// Longest chain: what the largest ring can hold. An indirect table may be longer than its ring,
/// but not than this.
pub const MAX_DESCRIPTORS: u32 = MAX_QUEUE_SIZE as u32;
/// Most ranges in either list, which is what one system call takes. Only a range that crosses from
/// one memory region to the next makes more ranges than descriptors.
pub const MAX_IOVECS: usize = 1024;

/// What is wrong with a chain. The request fails; the ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A range is not in guest memory.
    #[error("descriptor chain: {0}")]
    Unmapped(#[from] Unmapped),
    /// A descriptor's successor is outside of the table.
    #[error("descriptor chain leads to entry {index} of a table of {len}")]
    BadIndex {
        /// The entry asked for.
        index: u16,
        /// Number of entries.
        len: u32,
    },
    /// The chain runs in a circle, or is longer than a chain can be.
    #[error("descriptor chain does not end within {0} entries")]
    Endless(u32),
    /// A readable descriptor follows a writable one.
    #[error("descriptor chain has a readable part after a writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor although the feature was not negotiated.
    #[error("indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// An indirect descriptor within an indirect table, or one with a successor.
    #[error("indirect descriptor where none may be")]
    IndirectMisplaced,
    /// An indirect table whose length is no multiple of a descriptor's, or nothing.
    #[error("indirect table of {0} bytes")]
    IndirectLength(u32),
    /// More than [`MAX_IOVECS`] ranges.
    #[error("descriptor chain of more than {MAX_IOVECS} ranges")]
    TooManyRanges,
}

/// A descriptor, copied.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A table of descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Table {
    /// `len` entries at a host pointer.
    Host {
        /// The first entry.
        ptr: *const u8,
        /// Number of entries.
        len: u32,
    },
    /// `len` entries at a guest address, not all of them in one region.
    Scattered {
        /// The first entry.
        addr: u64,
        /// Number of entries.
        len: u32,
    },
}

impl Table {
    /// The indirect table that `desc` points to.
    fn indirect(
        desc: &Descriptor,
        memory: &GuestMemory,
        cache: &mut RegionCache,
    ) -> Result<Table, ChainError> {
        if desc.len == 0 || !(desc.len as usize).is_multiple_of(DESCRIPTOR) {
            return Err(ChainError::IndirectLength(desc.len));
        }
        let len = desc.len / DESCRIPTOR as u32;
        Ok(match memory.host_ptr(desc.addr, desc.len.into(), cache) {
            Some(ptr) => Table::Host { ptr, len },
            None => Table::Scattered { addr: desc.addr, len },
        })
    }

    fn len(&self) -> u32 {
        match self {
            Table::Host { len, .. } | Table::Scattered { len, .. } => *len,
        }
    }

    /// Copies one descriptor out of the table.
    ///
    /// # Safety
    /// A [`Table::Host`] must point to that many descriptors of memory that is mapped.
    #[inline]
    unsafe fn read(
        &self,
        index: u16,
        memory: &GuestMemory,
        cache: &mut RegionCache,
    ) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.len() {
            return Err(ChainError::BadIndex { index, len: self.len() });
        }
        let offset = DESCRIPTOR * usize::from(index);
        let ptr = match *self {
            // SAFETY: `index` is below `len`.
            Table::Host { ptr, .. } => unsafe { ptr.add(offset) },
            Table::Scattered { addr, .. } => {
                let addr = addr.wrapping_add(offset as u64);
                let len = DESCRIPTOR as u64;
                memory.host_ptr(addr, len, cache).ok_or(Unmapped { addr, len })?
            }
        };
        // SAFETY: 16 bytes at `ptr` are mapped, by the caller's promise or by `host_ptr`.
        let [addr, rest] = unsafe { read_two(ptr) };
        Ok(Descriptor {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}

/// Reads 16 bytes of shared memory as two little-endian words, each byte once.
///
/// # Safety
/// The bytes must be mapped.
#[inline]
pub(crate) unsafe fn read_two(ptr: *const u8) -> [u64; 2] {
    if (ptr as usize).is_multiple_of(8) {
        // SAFETY: mapped and aligned; all accesses of ours to shared memory are atomic or volatile.
        unsafe {
            [
                AtomicU64::from_ptr(ptr.cast_mut().cast()).load(Ordering::Relaxed),
                AtomicU64::from_ptr(ptr.cast_mut().add(8).cast()).load(Ordering::Relaxed),
            ]
        }
    } else {
        let mut bytes = [0; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: mapped.
            *byte = unsafe { ptr.add(i).read_volatile() };
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        [word(0), word(8)]
    }
}

/// The host memory of one request. Reused; see the module's documentation.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<libc::iovec>,
    writable: Vec<libc::iovec>,
    readable_len: u64,
    writable_len: u64,
}

// SAFETY: a list of pointers to guest memory; whoever follows them must keep that memory mapped,
// on whichever thread.
unsafe impl Send for Chain {}

impl Chain {
    /// An empty chain with room for common requests.
    pub fn new() -> Chain {
        Chain {
            readable: Vec::with_capacity(64),
            writable: Vec::with_capacity(64),
            readable_len: 0,
            writable_len: 0,
        }
    }

    /// What the guest gives us to read.
    #[inline]
    pub fn readable(&self) -> &[libc::iovec] {
        &self.readable
    }

    /// What the guest gives us to write.
    #[inline]
    pub fn writable(&self) -> &[libc::iovec] {
        &self.writable
    }

    /// Bytes in [`Chain::readable`].
    #[inline]
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes in [`Chain::writable`].
    #[inline]
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    #[inline]
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
    }

    /// Fills the chain with what is found at `head` of `table`.
    ///
    /// # Safety
    /// `table` must point to descriptors of memory that is mapped.
    #[inline]
    pub(crate) unsafe fn walk(
        &mut self,
        table: Table,
        head: u16,
        indirect: bool,
        memory: &GuestMemory,
        cache: &mut RegionCache,
    ) -> Result<(), ChainError> {
        self.clear();
        // SAFETY: as promised by the caller.
        let result = unsafe { self.collect(table, head, indirect, memory, cache) };
        if result.is_err() {
            self.clear();
            // SAFETY: as promised by the caller.
            unsafe { self.salvage(table, head, indirect, memory, cache) };
        }
        result
    }

    /// Adds up the chain until its end or the first error.
    ///
    /// # Safety
    /// As [`Chain::walk`].
    #[inline]
    unsafe fn collect(
        &mut self,
        table: Table,
        head: u16,
        indirect: bool,
        memory: &GuestMemory,
        cache: &mut RegionCache,
    ) -> Result<(), ChainError> {
        let mut writing = false;
        let mut steps = Steps::new(table, head, indirect);
        // SAFETY: as promised by the caller.
        while let Some(desc) = unsafe { steps.next(memory, cache) }? {
            if desc.flags & WRITE != 0 {
                writing = true;
                memory.translate(desc.addr, desc.len, cache, &mut self.writable)?;
                self.writable_len += u64::from(desc.len);
            } else {
                if writing {
                    return Err(ChainError::ReadableAfterWritable);
                }
                memory.translate(desc.addr, desc.len, cache, &mut self.readable)?;
                self.readable_len += u64::from(desc.len);
            }
            if self.writable.len().max(self.readable.len()) > MAX_IOVECS {
                return Err(ChainError::TooManyRanges);
            }
        }
        Ok(())
    }

    /// After an error: looks for the last writable byte, which is where the status goes.
    ///
    /// # Safety
    /// As [`Chain::walk`].
    #[cold]
    unsafe fn salvage(
        &mut self,
        table: Table,
        head: u16,
        indirect: bool,
        memory: &GuestMemory,
        cache: &mut RegionCache,
    ) {
        let mut last = None;
        let mut steps = Steps::new(table, head, indirect);
        loop {
            // SAFETY: as promised by the caller.
            match unsafe { steps.next(memory, cache) } {
                Ok(Some(desc)) if desc.flags & WRITE != 0 && desc.len != 0 => {
                    last = desc.addr.checked_add(u64::from(desc.len) - 1);
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                // Its end is unknown, and so is the last byte.
                Err(_) => return,
            }
        }
        if let Some(addr) = last
            && memory.translate(addr, 1, cache, &mut self.writable).is_ok()
        {
            self.writable_len = 1;
        }
    }
}

/// The descriptors of a chain one by one, indirect tables entered, bounded.
struct Steps {
    table: Table,
    /// The next entry; `None` at the end.
    next: Option<u16>,
    /// Descriptors that may still come from this table.
    left: u32,
    /// Whether an indirect descriptor may (still) come.
    indirect: Result<(), ChainError>,
}

impl Steps {
    #[inline]
    fn new(table: Table, head: u16, indirect: bool) -> Steps {
        let indirect = if indirect { Ok(()) } else { Err(ChainError::IndirectNotNegotiated) };
        Steps { table, next: Some(head), left: table.len().min(MAX_DESCRIPTORS), indirect }
    }

    /// The next descriptor that names a range, or `None` at the chain's end.
    ///
    /// # Safety
    /// As [`Chain::walk`].
    #[inline]
    unsafe fn next(
        &mut self,
        memory: &GuestMemory,
        cache: &mut RegionCache,
    ) -> Result<Option<Descriptor>, ChainError> {
        let Some(index) = self.next else { return Ok(None) };
        // SAFETY: a host table is the caller's, or was found in memory by `Table::indirect`.
        let mut desc = unsafe { self.table.read(index, memory, cache) }?;
        if desc.flags & INDIRECT != 0 {
            self.indirect?;
            if desc.flags & NEXT != 0 {
                return Err(ChainError::IndirectMisplaced);
            }
            self.indirect = Err(ChainError::IndirectMisplaced);
            self.table = Table::indirect(&desc, memory, cache)?;
            self.left = self.table.len().min(MAX_DESCRIPTORS);
            // SAFETY: as above.
            desc = unsafe { self.table.read(0, memory, cache) }?;
            if desc.flags & INDIRECT != 0 {
                return Err(ChainError::IndirectMisplaced);
            }
        }
        if self.left == 0 {
            return Err(ChainError::Endless(self.table.len().min(MAX_DESCRIPTORS)));
        }
        self.left -= 1;
        self.next = (desc.flags & NEXT != 0).then_some(desc.next);
        Ok(Some(desc))
    }
}
