//! Guest memory: the table of regions that the front-end shares with us.
//!
//! A table never changes. Adding or removing a region makes a new table that shares the mappings
//! of the old one; workers take it between batches, and requests in flight keep the table they
//! started with, so what the kernel may still write to stays mapped.
//!
//! ```text
//! guest address ──► Region { guest_addr, size, front_end_addr } ──► host pointer
//! front-end address (rings) ──────────────┘                        inside an Arc<Mapping>
//! ```
//!
//! Invariants:
//! * Regions do not overlap in guest addresses, and none wraps around the address space.
//! * A pointer is handed out only for a range that lies inside a region as a whole, or, for
//!   [`GuestMemory::translate`], inside several that follow each other without a gap.
//! * Nothing reads a region's content here.

#![allow(unsafe_code)]

use std::fs::File;
use std::sync::Arc;

use super::dirty_log::DirtyLog;
use super::mapping::Mapping;
use super::sigbus;
use crate::error::{Error, ErrorKind, Result};
use crate::io::BufferOwner;

/// Most regions in a table, as announced by GET_MAX_MEM_SLOTS (what rust-vmm and libvhost-user
/// offer too).
pub const MAX_MEMORY_SLOTS: usize = 509;

/// Most memory in a table: more than any guest has, and a part of the address space that leaves other
/// front-ends theirs. Holes in a file cost its sender nothing.
const MAX_MEMORY: u64 = 16 << 40;

/// A region as a front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Where the front-end has it in its own address space; rings are addressed by this.
    pub front_end_addr: u64,
    /// Where in the file it starts.
    pub mmap_offset: u64,
}

/// A region and where we have it.
#[derive(Clone, Debug)]
struct Region {
    start: u64,
    size: u64,
    /// Pointer to the byte at `start`, inside `mapping`.
    host: *mut u8,
    front_end: u64,
    mapping: Arc<Mapping>,
}

/// The range lies outside of guest memory, as a whole or in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len:#x} bytes at {addr:#x} are not in guest memory")]
pub struct Unmapped {
    /// First address asked for.
    pub addr: u64,
    /// Number of bytes asked for.
    pub len: u64,
}

/// The region that a translation hit last: most of a guest's buffers are in one region. Only a
/// hint; a stale one costs a search, nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegionCache(usize);

/// An immutable table of mapped regions. See the module's documentation.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest address.
    regions: Vec<Region>,
}

// SAFETY: the pointers lead into mappings that the table keeps alive and that are shared with
// other processes anyway; no reference to their content is formed.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

/// Regions stay mapped as long as the table lives.
impl BufferOwner for GuestMemory {}

impl Region {
    /// The host pointer of `len` bytes at `addr`, if they lie inside.
    #[inline]
    fn find(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let offset = addr.wrapping_sub(self.start);
        // Written so that nothing overflows: offset < size first.
        (offset < self.size && len <= self.size - offset)
            .then(|| self.host.wrapping_add(offset as usize))
    }

    fn end(&self) -> u64 {
        self.start + self.size
    }
}

impl GuestMemory {
    /// A table without regions.
    pub fn new() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::default())
    }

    /// A table of all these regions (SET_MEM_TABLE). The files are closed.
    pub fn from_regions(
        regions: impl IntoIterator<Item = (MemoryRegion, File)>,
    ) -> Result<Arc<GuestMemory>> {
        let mut table = GuestMemory::default();
        for (region, file) in regions {
            table.insert(&region, file)?;
        }
        Ok(Arc::new(table))
    }

    /// This table and one more region (ADD_MEM_REG), sharing the mappings. The file is closed.
    ///
    /// Refused: an empty region, one that wraps around, reaches past the end of its file or
    /// overlaps another in guest addresses, one too many, and too much memory in sum. Front-end addresses may overlap, as
    /// aliases of one memory do.
    pub fn with_region(&self, region: &MemoryRegion, file: File) -> Result<Arc<GuestMemory>> {
        let mut table = GuestMemory { regions: self.regions.clone() };
        table.insert(region, file)?;
        Ok(Arc::new(table))
    }

    /// This table without the region of that guest address, size and front-end address
    /// (REM_MEM_REG; the offset does not count).
    pub fn without_region(&self, region: &MemoryRegion) -> Result<Arc<GuestMemory>> {
        let matches = |r: &Region| {
            r.start == region.guest_addr
                && r.size == region.size
                && r.front_end == region.front_end_addr
        };
        let Some(index) = self.regions.iter().position(matches) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("no memory region of {:#x} bytes at {:#x}", region.size, region.guest_addr),
            ));
        };
        let mut regions = self.regions.clone();
        regions.remove(index);
        Ok(Arc::new(GuestMemory { regions }))
    }

    fn insert(&mut self, region: &MemoryRegion, file: File) -> Result<()> {
        let what = format!("memory region at {:#x}", region.guest_addr);
        if self.regions.len() >= MAX_MEMORY_SLOTS {
            return Err(Error::invalid(format!(
                "{what}: there are {MAX_MEMORY_SLOTS} regions already"
            )));
        }
        let wraps = |addr: u64| addr.checked_add(region.size).is_none();
        if wraps(region.guest_addr) || wraps(region.front_end_addr) {
            return Err(Error::invalid(format!(
                "{what}: {:#x} bytes wrap around the address space",
                region.size
            )));
        }
        let total: u64 = self.regions.iter().map(|r| r.size).sum();
        if total.saturating_add(region.size) > MAX_MEMORY {
            return Err(Error::invalid(format!(
                "{what}: with its {:#x} bytes the guest would have more than the {} TiB of memory \
                 that vublk maps for one",
                region.size,
                MAX_MEMORY >> 40
            )));
        }
        let index = self.regions.partition_point(|r| r.start < region.guest_addr);
        let before = index.checked_sub(1).map(|i| &self.regions[i]);
        let overlaps = before.is_some_and(|r| r.end() > region.guest_addr)
            || self.regions.get(index).is_some_and(|r| r.start < region.guest_addr + region.size);
        if overlaps {
            return Err(Error::invalid(format!("{what}: overlaps another region")));
        }
        let mapping = Mapping::new(&file, region.mmap_offset, region.size, &what)?;
        let region = Region {
            start: region.guest_addr,
            size: region.size,
            host: mapping.as_ptr(),
            front_end: region.front_end_addr,
            mapping: Arc::new(mapping),
        };
        self.regions.insert(index, region);
        Ok(())
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there are no regions.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Appends the host memory of `len` bytes at guest address `addr` to `out`: one `iovec`, or
    /// several where the range crosses from one region to the next. Nothing is appended for no
    /// bytes. After an error `out` may hold a part of the range.
    #[inline]
    pub fn translate(
        &self,
        addr: u64,
        len: u32,
        cache: &mut RegionCache,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped> {
        if let Some(region) = self.regions.get(cache.0)
            && let Some(host) = region.find(addr, len.into())
        {
            if len != 0 {
                out.push(libc::iovec { iov_base: host.cast(), iov_len: len as usize });
            }
            return Ok(());
        }
        self.translate_searching(addr, len.into(), cache, out)
    }

    /// The translation when the cached region does not hold the whole range.
    #[cold]
    fn translate_searching(
        &self,
        addr: u64,
        len: u64,
        cache: &mut RegionCache,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped> {
        let unmapped = Unmapped { addr, len };
        let (mut at, mut rest) = (addr, len);
        while rest != 0 {
            let index = self.index_of(at).ok_or(unmapped)?;
            let region = &self.regions[index];
            let here = rest.min(region.end() - at);
            let host = region.find(at, here).ok_or(unmapped)?;
            out.push(libc::iovec { iov_base: host.cast(), iov_len: here as usize });
            cache.0 = index;
            at += here;
            rest -= here;
        }
        Ok(())
    }

    /// The region that holds guest address `addr`.
    fn index_of(&self, addr: u64) -> Option<usize> {
        let index = self.regions.partition_point(|r| r.start <= addr).checked_sub(1)?;
        (addr < self.regions[index].end()).then_some(index)
    }

    /// The host pointer of `len` bytes at guest address `addr`, if one region holds them all.
    #[inline]
    pub fn host_ptr(&self, addr: u64, len: u64, cache: &mut RegionCache) -> Option<*mut u8> {
        if let Some(region) = self.regions.get(cache.0)
            && let Some(host) = region.find(addr, len)
        {
            return Some(host);
        }
        let index = self.index_of(addr)?;
        cache.0 = index;
        self.regions[index].find(addr, len)
    }

    /// The host pointer of `len` bytes at `addr` of the front-end's address space (where rings
    /// are), if one region holds them all.
    pub fn front_end_ptr(&self, addr: u64, len: u64) -> Result<*mut u8, Unmapped> {
        self.front_end_offset(addr, len)
            .map(|(region, offset)| region.host.wrapping_add(offset as usize))
            .ok_or(Unmapped { addr, len })
    }

    /// The guest address of what the front-end has at `addr`, if one region holds all `len` bytes.
    pub fn front_end_to_guest(&self, addr: u64, len: u64) -> Option<u64> {
        self.front_end_offset(addr, len).map(|(region, offset)| region.start + offset)
    }

    fn front_end_offset(&self, addr: u64, len: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = addr.checked_sub(region.front_end)?;
            (offset < region.size && len <= region.size - offset).then_some((region, offset))
        })
    }

    /// The guest address of host memory that a translation gave out; `None` if it is not ours.
    pub fn guest_addr(&self, host: *const u8, len: usize) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = (host as usize).checked_sub(region.host as usize)? as u64;
            (offset < region.size && len as u64 <= region.size - offset)
                .then_some(region.start + offset)
        })
    }

    /// Marks the first `len` bytes of `iovs`, memory of this table that was written, in `log`.
    pub fn mark_dirty(&self, iovs: &[libc::iovec], mut len: u64, log: &DirtyLog) {
        for iov in iovs {
            let here = len.min(iov.iov_len as u64);
            if here == 0 {
                break;
            }
            if let Some(addr) = self.guest_addr(iov.iov_base.cast(), here as usize) {
                log.mark(addr, here);
            }
            len -= here;
        }
    }

    /// Whether the file behind a region was truncated: the guest's memory is gone in part, and
    /// the device must stop. One load while no mapping of the process ever broke.
    #[inline]
    pub fn is_broken(&self) -> bool {
        sigbus::faults() != 0 && self.regions.iter().any(|r| r.mapping.is_broken())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::mapping::tests::memfd;

    const K: u64 = 4096;

    /// A region of `pages` pages at page `at`, seen 0x7f00_0000 higher by the front-end.
    fn region(at: u64, pages: u64) -> MemoryRegion {
        MemoryRegion {
            guest_addr: at * K,
            size: pages * K,
            front_end_addr: at * K + 0x7f00_0000,
            mmap_offset: 0,
        }
    }

    /// Pages 1-2, 3-4 and 8-9.
    fn three_regions() -> Arc<GuestMemory> {
        GuestMemory::from_regions(
            [region(3, 2), region(8, 2), region(1, 2)].map(|r| (r, memfd(r.size))),
        )
        .unwrap()
    }

    fn lens(memory: &GuestMemory, addr: u64, len: u32) -> Result<Vec<usize>, Unmapped> {
        let mut out = Vec::new();
        memory.translate(addr, len, &mut RegionCache::default(), &mut out)?;
        for iov in &out {
            let guest = memory.guest_addr(iov.iov_base.cast(), iov.iov_len).unwrap();
            assert!(guest >= addr && guest + iov.iov_len as u64 <= addr + u64::from(len));
        }
        Ok(out.iter().map(|iov| iov.iov_len).collect())
    }

    #[test]
    fn ranges_cross_adjacent_regions_only() {
        let memory = three_regions();
        assert_eq!(lens(&memory, K, 10).unwrap(), [10]);
        assert_eq!(lens(&memory, 2 * K, 2 * K as u32).unwrap(), [4096, 4096]);
        assert_eq!(lens(&memory, K, 4 * K as u32).unwrap(), [8192, 8192]);
        assert_eq!(lens(&memory, 5 * K - 1, 1).unwrap(), [1]);
        for (addr, len) in [(0, 1), (K - 1, 2), (5 * K - 1, 2), (5 * K, 1), (10 * K - 1, 2)] {
            assert_eq!(lens(&memory, addr, len), Err(Unmapped { addr, len: len.into() }));
        }
        assert!(lens(&memory, u64::MAX, u32::MAX).is_err());
        assert!(lens(&memory, K, u32::MAX).is_err());
        assert_eq!(lens(&memory, K, 0).unwrap(), [0; 0]);
    }

    #[test]
    fn a_stale_cache_is_only_slow() {
        let memory = three_regions();
        let mut cache = RegionCache(77);
        let mut out = Vec::new();
        memory.translate(8 * K, 100, &mut cache, &mut out).unwrap();
        assert_eq!(cache.0, 2);
        memory.translate(K, 100, &mut cache, &mut out).unwrap();
        assert_eq!(cache.0, 0);
        assert_eq!(out.len(), 2);
    }

    #[test]
    fn tables_share_mappings_and_outlive_removal() {
        let memory = three_regions();
        let more = memory.with_region(&region(5, 1), memfd(K)).unwrap();
        assert_eq!((memory.len(), more.len()), (3, 4));
        assert!(Arc::ptr_eq(&memory.regions[0].mapping, &more.regions[0].mapping));
        let less = more.without_region(&region(1, 2)).unwrap();
        assert!(lens(&less, K, 1).is_err());
        assert!(lens(&more, K, 1).is_ok());
        assert_eq!(lens(&less, 3 * K, 3 * K as u32).unwrap(), [8192, 4096]);
        let err = less.without_region(&region(1, 2)).unwrap_err();
        assert_eq!(err.to_string(), "no memory region of 0x2000 bytes at 0x1000");
    }

    #[test]
    fn bad_regions_are_refused() {
        let memory = three_regions();
        let refusal = |r: MemoryRegion, file_size| {
            memory.with_region(&r, memfd(file_size)).unwrap_err().to_string()
        };
        for (at, pages) in [(0, 2), (1, 1), (2, 2), (4, 10), (9, 1), (0, 100)] {
            assert!(refusal(region(at, pages), pages * K).ends_with("overlaps another region"));
        }
        assert!(refusal(region(20, 0), K).ends_with("size is zero"));
        assert!(refusal(region(20, 2), K).ends_with("of a file of only 0x1000 bytes"));
        let wrapping = MemoryRegion { guest_addr: u64::MAX - K + 2, ..region(0, 1) };
        assert!(refusal(wrapping, K).ends_with("wrap around the address space"));
        let wrapping = MemoryRegion { front_end_addr: u64::MAX - K + 2, ..region(20, 1) };
        assert!(refusal(wrapping, K).ends_with("wrap around the address space"));
    }

    /// The address space is the process's, and other front-ends need some of it, too.
    #[test]
    fn a_table_is_not_larger_than_any_guest() {
        let file = memfd(16 << 40);
        let region = |at, size| MemoryRegion { size, ..region(at, 1) };
        let most = GuestMemory::new()
            .with_region(&region(0, (16 << 40) - K), file.try_clone().unwrap())
            .unwrap();
        let err = most.with_region(&region(16 << 30, 2 * K), file.try_clone().unwrap());
        let err = err.unwrap_err().to_string();
        assert!(err.contains("more than the 16 TiB"), "{err}");
        let most = most.with_region(&region(16 << 30, K), file.try_clone().unwrap()).unwrap();
        assert!(most.with_region(&region(17 << 30, K), file).is_err());
    }

    #[test]
    fn there_are_509_slots() {
        let file = memfd(K);
        let mut memory = GuestMemory::from_regions(
            (0..508).map(|i| (region(2 * i, 1), file.try_clone().unwrap())),
        )
        .unwrap();
        memory = memory.with_region(&region(2000, 1), file.try_clone().unwrap()).unwrap();
        assert_eq!(memory.len(), MAX_MEMORY_SLOTS);
        let err = memory.with_region(&region(3000, 1), file).unwrap_err();
        assert!(err.to_string().ends_with("there are 509 regions already"));
    }

    #[test]
    fn front_end_addresses_stay_inside_one_region() {
        let memory = three_regions();
        let base = 0x7f00_0000;
        assert_eq!(memory.front_end_to_guest(base + K + 5, 10), Some(K + 5));
        let ptr = memory.front_end_ptr(base + K + 5, 10).unwrap();
        assert_eq!(memory.guest_addr(ptr, 10), Some(K + 5));
        assert!(memory.front_end_ptr(base + 3 * K - 1, 2).is_err());
        assert!(memory.front_end_ptr(base, 1).is_err());
        assert!(memory.front_end_ptr(u64::MAX, u64::MAX).is_err());
    }

    #[test]
    fn truncation_shows() {
        let file = memfd(2 * K);
        let memory =
            GuestMemory::from_regions([(region(0, 2), file.try_clone().unwrap())]).unwrap();
        let whole = three_regions();
        assert!(!memory.is_broken());
        file.set_len(0).unwrap();
        let ptr = memory.host_ptr(100, 1, &mut RegionCache::default()).unwrap();
        // SAFETY: mapped; SIGBUS is handled.
        assert_eq!(unsafe { ptr.read_volatile() }, 0);
        assert!(memory.is_broken());
        assert!(!whole.is_broken());
    }

    #[test]
    fn written_memory_is_marked_by_guest_address() {
        use std::os::unix::fs::FileExt;
        let memory = three_regions();
        let file = memfd(4);
        let log = DirtyLog::new(file.try_clone().unwrap(), 0, 4).unwrap();
        let mut iovs = Vec::new();
        let mut cache = RegionCache::default();
        memory.translate(2 * K, 2 * K as u32, &mut cache, &mut iovs).unwrap();
        memory.translate(9 * K, K as u32, &mut cache, &mut iovs).unwrap();
        memory.mark_dirty(&iovs, 2 * K, &log);
        let mut map = [0; 4];
        file.read_exact_at(&mut map, 0).unwrap();
        assert_eq!(u32::from_le_bytes(map), 0b1100);
        memory.mark_dirty(&iovs, 2 * K + 1, &log);
        file.read_exact_at(&mut map, 0).unwrap();
        assert_eq!(u32::from_le_bytes(map), 0b10_0000_1100);
    }
}
