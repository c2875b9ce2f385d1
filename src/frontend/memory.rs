//! Guest memory as a front-end shares it: regions, each one a memfd of its own.
//!
//! A [`Region`] has three addresses: where the guest sees it (`guest_addr`), where this process
//! has mapped it (`user_addr`, used on the wire for ring addresses) and the offset in its memfd
//! (always 0). [`Memory`] is the set of regions; hot-add and hot-remove change the set while rings
//! that live in other regions go on. The [`Arena`] hands out buffers in it.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::units::{MIB, align_up};

/// Which pages of the host hold guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// The host's base pages.
    #[default]
    Small,
    /// Huge pages of 2 MiB, which the host must have set aside (`vm.nr_hugepages`).
    Huge,
}

/// A shared mapping of a file, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    /// First byte.
    pointer: NonNull<u8>,
    /// Bytes mapped.
    len: usize,
}

// SAFETY: the mapping is plain shared memory, which any thread may touch; the methods that touch
// it go through raw pointers and promise no ordering.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, readable and writable.
    pub(super) fn new(fd: BorrowedFd<'_>, offset: u64, len: u64, populate: bool) -> Result<Self> {
        let size = usize::try_from(len).map_err(|_| Error::invalid("mapping too large"))?;
        let mut flags = MapFlags::SHARED;
        if populate {
            flags |= MapFlags::POPULATE;
        }
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; it is
        // unmapped in `drop` only, and every access checks its bounds.
        let pointer = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                fd,
                offset,
            )
        }
        .context(|| format!("cannot map {len} bytes of shared memory"))?;
        let pointer = NonNull::new(pointer.cast()).ok_or_else(|| Error::invalid("mapping at 0"))?;
        Ok(Mapping { pointer, len: size })
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Address of the first byte.
    pub(super) fn address(&self) -> u64 {
        self.pointer.as_ptr() as u64
    }

    /// The place of `len` bytes at `offset`, if they are inside.
    pub(super) fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // In bounds, so the offset fits.
        (end <= self.len()).then(|| self.pointer.as_ptr().wrapping_add(offset as usize))
    }

    /// Copies bytes out; the caller sees zeros where the range is outside.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, into.len() as u64) else {
            return false;
        };
        // SAFETY: `at` checked that the source is mapped; `into` is ours alone. The peer may
        // write meanwhile, which tears bytes and nothing else.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies bytes in.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(to) = self.at(offset, bytes.len() as u64) else {
            return false;
        };
        // SAFETY: as in `read`, with the destination mapped.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new`, and nothing borrows from it any more: regions
        // that hand out pointers are kept alive by an `Arc` next to each pointer.
        let _ = unsafe { rustix::mm::munmap(self.pointer.as_ptr().cast(), self.len) };
    }
}

/// Makes an anonymous shared file of `len` bytes.
pub(super) fn shared_file(name: &str, len: u64, pages: Pages) -> Result<OwnedFd> {
    let mut flags = MemfdFlags::CLOEXEC;
    if pages == Pages::Huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let fd = rustix::fs::memfd_create(name, flags).context(|| "cannot make a shared file")?;
    rustix::fs::ftruncate(&fd, len).context(|| format!("cannot grow shared memory to {len}"))?;
    Ok(fd)
}

/// One region of guest memory.
#[derive(Debug)]
pub struct Region {
    /// The memory itself.
    file: OwnedFd,
    /// Where this process sees it.
    mapping: Mapping,
    /// Where the guest sees it.
    guest_addr: u64,
}

impl Region {
    /// Makes a region of `len` bytes that the guest sees at `guest_addr`.
    ///
    /// With huge pages the length is rounded up to whole pages.
    pub fn new(guest_addr: u64, len: u64, pages: Pages) -> Result<Self> {
        let align = if pages == Pages::Huge { 2 * MIB } else { 4096 };
        let len = align_up(len, align).ok_or_else(|| Error::invalid("region too large"))?;
        if guest_addr.checked_add(len).is_none() {
            return Err(Error::invalid("region ends beyond the guest's address space"));
        }
        let file = shared_file("guest-memory", len, pages)?;
        let mapping = Mapping::new(file.as_fd(), 0, len, pages == Pages::Huge);
        let mapping = match pages {
            Pages::Small => mapping,
            Pages::Huge => mapping.context(
                || "no huge pages to be had (raise vm.nr_hugepages, or go without huge pages)",
            ),
        }?;
        Ok(Region { file, mapping, guest_addr })
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// First address the guest sees.
    pub fn guest_addr(&self) -> u64 {
        self.guest_addr
    }

    /// First address this process sees; the wire's "user address".
    pub fn user_addr(&self) -> u64 {
        self.mapping.address()
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// Where this process sees `len` bytes at a guest address; `None` if any is outside.
    pub fn pointer(&self, guest_addr: u64, len: u64) -> Option<*mut u8> {
        self.mapping.at(guest_addr.checked_sub(self.guest_addr)?, len)
    }

    /// Shrinks the file under both processes, as a hostile front-end might: touching what was cut
    /// off is SIGBUS from now on, here as well.
    pub fn truncate(&self, len: u64) -> Result<()> {
        Ok(rustix::fs::ftruncate(&self.file, len)?)
    }
}

/// The regions a guest has.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// In the order they were added.
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// A guest without memory.
    pub fn new() -> Self {
        Memory::default()
    }

    /// A guest with one region.
    pub fn with_region(guest_addr: u64, len: u64, pages: Pages) -> Result<Self> {
        let mut memory = Memory::new();
        memory.add(Region::new(guest_addr, len, pages)?)?;
        Ok(memory)
    }

    /// Adds a region. The back-end must be told by a message of its own.
    pub fn add(&mut self, region: Region) -> Result<Arc<Region>> {
        let end = region.guest_addr + region.size();
        let overlap =
            |r: &Arc<Region>| region.guest_addr < r.guest_addr + r.size() && r.guest_addr < end;
        if self.regions.iter().any(overlap) {
            return Err(Error::invalid("region overlaps one that is there"));
        }
        let region = Arc::new(region);
        self.regions.push(region.clone());
        Ok(region)
    }

    /// Takes the region that begins at `guest_addr` out of the set. It stays mapped as long as
    /// somebody holds it.
    pub fn remove(&mut self, guest_addr: u64) -> Option<Arc<Region>> {
        let at = self.regions.iter().position(|r| r.guest_addr == guest_addr)?;
        Some(self.regions.remove(at))
    }

    /// The regions, in the order they were added.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// One past the highest guest address.
    pub fn end(&self) -> u64 {
        self.regions.iter().map(|r| r.guest_addr + r.size()).max().unwrap_or(0)
    }

    /// The region that holds all of `len` bytes at `guest_addr`.
    pub fn region_of(&self, guest_addr: u64, len: u64) -> Result<&Arc<Region>> {
        self.regions.iter().find(|r| r.pointer(guest_addr, len).is_some()).ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfRange,
                format!("{len} bytes at guest address {guest_addr:#x} are not in guest memory"),
            )
        })
    }

    /// Copies bytes into guest memory.
    pub fn write(&self, guest_addr: u64, bytes: &[u8]) -> Result<()> {
        let region = self.region_of(guest_addr, bytes.len() as u64)?;
        region.mapping.write(guest_addr - region.guest_addr, bytes);
        Ok(())
    }

    /// Copies bytes out of guest memory.
    pub fn read(&self, guest_addr: u64, into: &mut [u8]) -> Result<()> {
        let region = self.region_of(guest_addr, into.len() as u64)?;
        region.mapping.read(guest_addr - region.guest_addr, into);
        Ok(())
    }

    /// Copies `len` bytes of guest memory into a vector.
    pub fn read_vec(&self, guest_addr: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read(guest_addr, &mut bytes)?;
        Ok(bytes)
    }
}

/// Hands out buffers of a stretch of guest memory.
///
/// Sizes are rounded up to a power of two of at least 64 bytes and aligned to themselves (to a
/// page at most), so that data buffers suit direct I/O. Buffers given back are handed out again
/// to requests of the same rounded size.
#[derive(Debug)]
pub struct Arena {
    /// Next byte never handed out.
    next: u64,
    /// End of the stretch.
    end: u64,
    /// Buffers given back, by rounded size.
    free: HashMap<u64, Vec<u64>>,
}

impl Arena {
    /// An arena of the guest addresses from `start` to `end`.
    pub fn new(start: u64, end: u64) -> Self {
        Arena { next: start, end, free: HashMap::new() }
    }

    /// The size that a buffer of `len` bytes really takes.
    fn class(len: u64) -> u64 {
        len.max(64).next_power_of_two()
    }

    /// A buffer of at least `len` bytes.
    pub fn alloc(&mut self, len: u64) -> Result<u64> {
        let class = Arena::class(len);
        if let Some(addr) = self.free.get_mut(&class).and_then(Vec::pop) {
            return Ok(addr);
        }
        let start = align_up(self.next, class.min(4096));
        let end = start.and_then(|s| s.checked_add(class)).filter(|end| *end <= self.end);
        let (Some(start), Some(end)) = (start, end) else {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("guest memory has no {len} bytes left for a buffer"),
            ));
        };
        self.next = end;
        Ok(start)
    }

    /// A run of whole pages that is never given back.
    pub fn alloc_pages(&mut self, len: u64) -> Result<u64> {
        let start = align_up(self.next, 4096);
        let end = start.and_then(|s| align_up(s.checked_add(len)?, 4096));
        match (start, end.filter(|end| *end <= self.end)) {
            (Some(start), Some(end)) => {
                self.next = end;
                Ok(start)
            }
            _ => {
                Err(Error::new(ErrorKind::NoSpace, format!("guest memory has no {len} bytes left")))
            }
        }
    }

    /// Gives a buffer of `len` bytes back.
    pub fn free(&mut self, addr: u64, len: u64) {
        self.free.entry(Arena::class(len)).or_default().push(addr);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_bounds_hold() {
        let mut memory = Memory::with_region(0x10_0000, 8192, Pages::Small).unwrap();
        memory.write(0x10_0000 + 8190, &[1, 2]).unwrap();
        assert_eq!(memory.read_vec(0x10_0000 + 8190, 2).unwrap(), [1, 2]);
        assert!(memory.write(0x10_0000 + 8191, &[1, 2]).is_err());
        assert!(memory.write(0xf_ffff, &[1]).is_err());
        assert!(memory.read_vec(u64::MAX, 2).is_err());
        assert!(memory.add(Region::new(0x10_1000, 4096, Pages::Small).unwrap()).is_err());
        memory.add(Region::new(0x20_0000, 4096, Pages::Small).unwrap()).unwrap();
        assert_eq!(memory.end(), 0x20_1000);
        assert!(memory.remove(0x20_0000).is_some());
        assert!(memory.write(0x20_0000, &[1]).is_err());
    }

    #[test]
    fn arena_reuses_what_came_back() {
        let mut arena = Arena::new(0x1000, 0x4000);
        let a = arena.alloc(4096).unwrap();
        let b = arena.alloc(16).unwrap();
        assert!(a.is_multiple_of(4096));
        assert_ne!(a, b);
        assert!(arena.alloc(0x4000).is_err());
        arena.free(a, 4096);
        assert_eq!(arena.alloc(4000).unwrap(), a);
    }
}
