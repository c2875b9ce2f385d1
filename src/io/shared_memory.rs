//! A file on tmpfs as memory: stores instead of system calls.
//!
//! What is stored is in the file at once, for every process that reads it, and stays there when
//! this one is killed. For files that are ours alone: nobody truncates them while they are mapped.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FallocateFlags;

use crate::error::{Error, Result};

/// A shared, writable mapping of a file from its start on.
///
/// Before bytes are stored, [`SharedMemory::reserve`] must have made sure that the host has memory
/// for them; a store to a page that cannot be had would kill the process.
pub struct SharedMemory {
    base: NonNull<u8>,
    /// Length of the mapping, in bytes.
    len: usize,
}

// SAFETY: the mapping belongs to this value; stores to it are the owner's to order.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; `&SharedMemory` gives out no references to the memory. Two threads that copy
// to the same bytes at once are excluded by the one owner, who serialises calls of `copy_in`.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps the first `len` bytes of `file`, making it that long. The caller must be the only one
    /// to change the file's length while this lives, and must not do so.
    pub fn map(file: &File, len: u64) -> Result<SharedMemory> {
        rustix::fs::ftruncate(file, len)?;
        let size = usize::try_from(len).map_err(|_| Error::from_errno(libc::ENOMEM))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        let base = NonNull::new(base.cast()).expect("mmap returned null");
        Ok(SharedMemory { base, len: size })
    }

    /// Makes the host set memory aside for a part of the file.
    pub fn reserve(file: &File, offset: u64, len: u64) -> Result<()> {
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    /// Copies bytes to the memory.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len() as u64).expect("end overflows");
        assert!(end <= self.len as u64, "{end} is beyond the {} bytes mapped", self.len);
        // SAFETY: inside of the mapping, which no Rust reference points into.
        unsafe {
            let to = self.base.as_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Stores a word (little-endian) at a multiple of eight bytes, after everything that was
    /// copied or stored before.
    ///
    /// # Panics
    /// If it does not lie inside, or is not aligned.
    pub fn store(&self, offset: u64, value: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len as u64, "word at {offset}");
        // SAFETY: inside of the mapping and aligned, as mappings start at a page.
        let word = unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset as usize).cast()) };
        word.store(value.to_le(), Ordering::Release);
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn stores_are_in_the_file() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let memory = SharedMemory::map(&file, 8192).unwrap();
        SharedMemory::reserve(&file, 0, 8192).unwrap();
        memory.copy_in(4090, b"across pages");
        memory.store(8184, 0x0102);
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes[4090..4102], b"across pages");
        assert_eq!(&bytes[8184..], [2, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "beyond the 4096 bytes")]
    fn stores_stay_inside() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        SharedMemory::map(&file, 4096).unwrap().copy_in(4095, b"ab");
    }
}
