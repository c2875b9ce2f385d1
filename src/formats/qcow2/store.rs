//! What imago sees as its storage: the image's metadata, held back until a checkpoint.
//!
//! imago writes its tables whenever its caches say so, ordered by nothing but the order of the
//! writes. A disk keeps no such order across a power cut, so nothing that imago writes goes to the
//! file at once. It goes to an *overlay* in memory, which imago reads back from; the
//! [checkpoint](super::checkpoint) takes a consistent state out of it and writes that in phases
//! with barriers between them.
//!
//! ```text
//! imago ──write──► overlay: granule → current bytes, bytes on disk ──checkpoint──► file
//!   ▲                 │ else                                                        │
//!   └──────read───────┴─────────────────────────◄───────────────────────────────────┘
//! ```
//!
//! This also makes imago's borrowed buffers safe: they are copied while the future is polled, and
//! the kernel never sees them.
//!
//! `settle_writes`, which imago calls before it gives freed clusters back to its allocator, waits
//! for payload writes that dropped futures left under way. And it refuses (imago then leaks the
//! clusters, which `qemu-img check -r leaks` finds) while the state on disk may still refer to what
//! is being freed: reused before the next checkpoint, such a cluster would show other data after a
//! power cut.
//!
//! Invariants:
//! * A dirty granule stays in the overlay until a checkpoint that contains it is complete.
//! * A granule's `base` is what the file holds, if it is known.
//! * Payload never lies under a dirty granule: who takes a cluster for payload calls
//!   [`Store::forget`] first.

// imago's trait has unsafe methods; nothing unsafe is done in them.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, Storage};

use super::disk::{ALL, Disk, read_bytes};
use super::header::field;
use crate::error::{Error, Result};
use crate::units::{ByteRange, align_down};

/// How much unchanged metadata is remembered at most, in bytes.
const MAX_CLEAN: u64 = 16 << 20;

/// The content of a granule.
pub type Bytes = Arc<[u8]>;

/// imago's storage. Cheap to clone; clones are the same.
#[derive(Clone)]
pub struct Store {
    inner: Arc<StoreInner>,
}

struct StoreInner {
    disk: Arc<Disk>,
    helper: CommonStorageHelper,
    /// Unit of the overlay in bytes: a power of two, at least a sector and at most a cluster.
    granule: u64,
    cluster_size: u64,
    /// Whether a new image is made, so that what the file holds counts for nothing.
    is_new: bool,
    overlay: Mutex<Overlay>,
    hazards: Hazards,
    /// What the header says of the backing file, if that is not what imago read from it.
    backing_field: Mutex<Option<[u8; field::BACKING_LEN]>>,
}

/// Counts what makes reuse of freed clusters unsafe until the next checkpoint.
#[derive(Debug, Default)]
struct Hazards {
    seen: AtomicU64,
    over: AtomicU64,
}

#[derive(Default)]
struct Overlay {
    granules: BTreeMap<u64, Granule>,
    dirty_bytes: u64,
    clean_bytes: u64,
    /// Counts evictions, so that a read from the file can tell that it may be too old.
    evictions: u64,
}

struct Granule {
    data: Bytes,
    /// What the file holds, if that is known and something else.
    base: Option<Bytes>,
    dirty: bool,
}

thread_local! {
    /// Set while somebody asks imago a question that must be answered from memory.
    static MEMORY_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with all reads from the file refused on this thread.
pub fn from_memory_only<T>(f: impl FnOnce() -> T) -> T {
    MEMORY_ONLY.set(true);
    let out = f();
    MEMORY_ONLY.set(false);
    out
}

/// An error of ours as imago carries it.
pub fn to_io(err: Error) -> io::Error {
    match err.errno() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(err.to_string()),
    }
}

impl Overlay {
    /// Puts new content of a granule in place.
    fn put(&mut self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        match self.granules.get_mut(&offset) {
            Some(granule) if *granule.data == *data => {}
            Some(granule) => {
                let old = std::mem::replace(&mut granule.data, data.into());
                if !granule.dirty {
                    granule.dirty = true;
                    granule.base = Some(old);
                    self.dirty_bytes += len;
                    self.clean_bytes -= len;
                }
            }
            None => {
                let granule = Granule { data: data.into(), base: None, dirty: true };
                self.granules.insert(offset, granule);
                self.dirty_bytes += len;
            }
        }
    }

    /// Remembers what the file holds, unless something newer is known.
    fn remember(&mut self, offset: u64, data: &[u8]) {
        if self.granules.contains_key(&offset) {
            return;
        }
        if self.clean_bytes >= MAX_CLEAN {
            self.granules.retain(|_, granule| granule.dirty);
            self.clean_bytes = 0;
            self.evictions += 1;
        }
        self.granules.insert(offset, Granule { data: data.into(), base: None, dirty: false });
        self.clean_bytes += data.len() as u64;
    }
}

impl Store {
    /// Over the image that the file holds.
    pub fn new(disk: Arc<Disk>, cluster_size: u64) -> Store {
        Store::with(disk, cluster_size, false)
    }

    /// For a new image, as over an empty file, whatever this one holds.
    pub fn for_new(disk: Arc<Disk>, cluster_size: u64) -> Store {
        Store::with(disk, cluster_size, true)
    }

    fn with(disk: Arc<Disk>, cluster_size: u64, is_new: bool) -> Store {
        let granule = disk.file().alignment().request.clamp(512, cluster_size.min(4096));
        Store {
            inner: Arc::new(StoreInner {
                disk,
                helper: CommonStorageHelper::default(),
                granule,
                cluster_size,
                is_new,
                overlay: Mutex::default(),
                hazards: Hazards::default(),
                backing_field: Mutex::default(),
            }),
        }
    }

    pub fn disk(&self) -> &Arc<Disk> {
        &self.inner.disk
    }

    /// Unit of the overlay, in bytes.
    pub fn granule(&self) -> u64 {
        self.inner.granule
    }

    /// Where the last granule that is known ends.
    pub fn end(&self) -> u64 {
        let overlay = self.inner.overlay.lock().unwrap();
        overlay.granules.keys().next_back().map_or(0, |at| at + self.inner.granule)
    }

    /// How much waits for a checkpoint, in bytes.
    pub fn dirty_bytes(&self) -> u64 {
        self.inner.overlay.lock().unwrap().dirty_bytes
    }

    /// The bytes at `offset` as imago sees them.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let granule = self.inner.granule;
        let whole =
            offset.is_multiple_of(self.inner.cluster_size) && len as u64 == self.inner.cluster_size;
        loop {
            let mut out = vec![0; len];
            let evictions = {
                let overlay = self.inner.overlay.lock().unwrap();
                if overlay.copy_to(offset, &mut out, granule) {
                    return Ok(out);
                }
                overlay.evictions
            };
            if MEMORY_ONLY.get() {
                return Err(Error::new(crate::ErrorKind::Busy, "metadata is not in memory"));
            }
            let mut out = match self.inner.is_new {
                true => vec![0; len],
                false => read_bytes(&**self.inner.disk.file(), offset, len).await?,
            };
            let mut overlay = self.inner.overlay.lock().unwrap();
            if overlay.evictions != evictions {
                // What was read may be older than what a checkpoint wrote meanwhile.
                continue;
            }
            if whole {
                // A table: imago will write it back with a few entries changed.
                for (i, bytes) in out.chunks_exact(granule as usize).enumerate() {
                    overlay.remember(offset + i as u64 * granule, bytes);
                }
            }
            overlay.copy_to(offset, &mut out, granule);
            return Ok(out);
        }
    }

    /// Changes the bytes at `offset` in the overlay.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let granule = self.inner.granule;
        let end = offset + bytes.len() as u64;
        loop {
            // Granules that are changed in part must be known in whole.
            for at in [align_down(offset, granule), align_down(end, granule)] {
                let partial = (at < offset || at + granule > end || at == 0) && at < end;
                if partial {
                    let old = self.read(at, granule as usize).await?;
                    self.inner.overlay.lock().unwrap().remember(at, &old);
                }
            }
            if self.merge(offset, bytes) {
                return Ok(());
            }
            // Evicted in between by somebody else: once more.
        }
    }

    /// From now on the header says this of the backing file, whatever imago writes there.
    pub async fn set_backing_field(&self, bytes: [u8; field::BACKING_LEN]) -> Result<()> {
        *self.inner.backing_field.lock().unwrap() = Some(bytes);
        self.write(field::BACKING as u64, &bytes).await
    }

    /// Puts bytes into granules; false if one that is changed in part is not in memory.
    fn merge(&self, offset: u64, bytes: &[u8]) -> bool {
        let granule = self.inner.granule;
        let end = offset + bytes.len() as u64;
        let mut overlay = self.inner.overlay.lock().unwrap();
        let mut at = align_down(offset, granule);
        while at < end {
            let from = at.max(offset);
            let to = (at + granule).min(end);
            let part = &bytes[(from - offset) as usize..(to - offset) as usize];
            let backing = match at {
                0 => *self.inner.backing_field.lock().unwrap(),
                _ => None,
            };
            if part.len() as u64 == granule && backing.is_none() {
                overlay.put(at, part);
            } else {
                let Some(old) = overlay.granules.get(&at) else { return false };
                let mut new = old.data.to_vec();
                new[(from - at) as usize..(to - at) as usize].copy_from_slice(part);
                if let Some(backing) = backing {
                    new[field::BACKING..][..field::BACKING_LEN].copy_from_slice(&backing);
                }
                let pointers = field::L1_OFFSET..field::REFTABLE_END;
                if at == 0 && new[pointers.clone()] != old.data[pointers] {
                    // A table moved: the header on disk still points to the old one.
                    self.announce_hazard();
                }
                overlay.put(at, &new);
            }
            at += granule;
        }
        true
    }

    /// Drops what the overlay holds of a range that becomes payload. Whole granules only.
    pub fn forget(&self, range: ByteRange) {
        let mut overlay = self.inner.overlay.lock().unwrap();
        let gone: Vec<u64> = overlay
            .granules
            .range(range.offset..range.end())
            .filter(|(at, _)| **at + self.inner.granule <= range.end())
            .map(|(at, _)| *at)
            .collect();
        for at in gone {
            let Some(granule) = overlay.granules.remove(&at) else { continue };
            match granule.dirty {
                true => overlay.dirty_bytes -= self.inner.granule,
                false => overlay.clean_bytes -= self.inner.granule,
            }
        }
    }

    /// All granules that differ from the file, with what the file holds if that is known.
    pub fn dirty(&self) -> Vec<(u64, Bytes, Option<Bytes>)> {
        let overlay = self.inner.overlay.lock().unwrap();
        let dirty = overlay.granules.iter().filter(|(_, granule)| granule.dirty);
        dirty.map(|(at, granule)| (*at, granule.data.clone(), granule.base.clone())).collect()
    }

    /// These contents are in the file now, durably.
    pub fn written(&self, blocks: &[(u64, Bytes)]) {
        let mut overlay = self.inner.overlay.lock().unwrap();
        for (at, data) in blocks {
            let Some(granule) = overlay.granules.get_mut(at) else { continue };
            if !granule.dirty {
                continue;
            }
            if Arc::ptr_eq(&granule.data, data) {
                granule.dirty = false;
                granule.base = None;
                overlay.dirty_bytes -= data.len() as u64;
                overlay.clean_bytes += data.len() as u64;
            } else {
                granule.base = Some(data.clone());
            }
        }
    }

    /// From now on until a checkpoint that starts later, freed clusters may not be reused.
    pub fn announce_hazard(&self) {
        self.inner.hazards.seen.fetch_add(1, Ordering::SeqCst);
    }

    /// How many hazards were announced so far.
    pub fn hazards_seen(&self) -> u64 {
        self.inner.hazards.seen.load(Ordering::SeqCst)
    }

    /// A checkpoint that started when [`Store::hazards_seen`] was this is complete.
    pub fn hazards_over(&self, seen: u64) {
        self.inner.hazards.over.fetch_max(seen, Ordering::SeqCst);
    }

    fn is_hazardous(&self) -> bool {
        self.hazards_seen() != self.inner.hazards.over.load(Ordering::SeqCst)
    }
}

impl Overlay {
    /// Copies what is here over `out`; whether that is all of it.
    fn copy_to(&self, offset: u64, out: &mut [u8], granule: u64) -> bool {
        let end = offset + out.len() as u64;
        let first = align_down(offset, granule);
        let mut found = 0;
        for (at, block) in self.granules.range(first..end) {
            let from = (*at).max(offset);
            let to = (at + granule).min(end);
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&block.data[(from - at) as usize..(to - at) as usize]);
            found += to - from;
        }
        found == out.len() as u64
    }
}

impl Storage for Store {
    fn size(&self) -> io::Result<u64> {
        let len = match self.inner.is_new {
            true => 0,
            false => self.inner.disk.len().map_err(to_io)?,
        };
        Ok(len.max(self.end()))
    }

    async unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let bytes = self.read(offset, bufv.len() as usize).await.map_err(to_io)?;
        bufv.copy_from_slice(&bytes);
        Ok(())
    }

    async unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; bufv.len() as usize];
        bufv.copy_into_slice(&mut bytes);
        Store::write(self, offset, &bytes).await.map_err(to_io)
    }

    /// imago zeroes only the part of the last cluster that lies behind the end of the disk.
    async unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        Store::write(self, offset, &vec![0; length as usize]).await.map_err(to_io)
    }

    async unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        Store::write(self, offset, &vec![0; length as usize]).await.map_err(to_io)
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    async fn settle_writes(&self) -> io::Result<()> {
        if self.is_hazardous() {
            return Err(io::Error::other(
                "the image on disk still refers to them; 'qemu-img check -r leaks' reclaims them",
            ));
        }
        self.inner.disk.payload.settle(ALL).await;
        Ok(())
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.inner.helper
    }

    async fn resize(&self, _new_size: u64, _prealloc_mode: PreallocateMode) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.inner.disk.file().name())
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.inner.disk.file().name())
    }
}
