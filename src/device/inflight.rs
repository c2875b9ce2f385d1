//! The in-flight region: which requests we owe the guest, in memory that outlives us.
//!
//! The front-end asks for the region once (GET_INFLIGHT_FD), keeps its file, and gives it to every
//! back-end it connects to (SET_INFLIGHT_FD). Before a request is worked on its head is marked
//! here, and the mark is taken off after its used element was published. A process that starts
//! after `kill -9` finds what was marked and does it again.
//!
//! ```text
//! ┌─ queue 0, rounded up to 64 bytes ─────────────┬─ queue 1 ─┬ ┄ ┬─ next page: our own tail ──┐
//! │ features u64 · version u16 · desc_num u16     │           │   │ magic · version · queues · │
//! │ last_batch_head u16 · used_idx u16            │           │   │ queue size · session nonce │
//! │ desc_num × { inflight u8 · 5 unused ·         │           │   │ · write cache · kept       │
//! │              next u16 · counter u64 }         │           │   └────────────────────────────┘
//! └───────────────────────────────────────────────┴───────────┘
//! ```
//!
//! The steps, in this order, each a store that a death may follow:
//!
//! * take: the entry's counter, then its flag;
//! * complete: the entry's `next` is the old `last_batch_head`, then `last_batch_head` the entry;
//! * publish: the ring's used index (the ring does that), the flags of the batch, `used_idx`.
//!
//! Recovery: if the ring's used index is ahead of `used_idx`, the last batch was published but its
//! flags may still be set; as many entries as it is ahead are cleared along the `next` chain. What
//! is flagged then is owed, in the order of the counters, and the ring had been read up to its used
//! index plus their number.
//!
//! The tail is ours alone: it carries a nonce by which a new process finds what its predecessor
//! kept for this guest elsewhere (design rule 7), whether anything was, so that its loss is noticed,
//! and the write cache's mode, which no front-end repeats. A region of another back-end has none.
//!
//! Invariants:
//! * All of it can be written by the front-end at any time: each index is bounded before use, each
//!   walk by a count, and every access is atomic.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence};

use super::features::{MAX_QUEUE_SIZE, MAX_QUEUES};
use super::mapping::{Mapping, memfd_create};
use crate::error::{Error, Result};

/// Size of a queue's header and of each entry.
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// The version that the protocol defines; 0 is a region nobody has used yet.
const VERSION: u16 = 1;

// Offsets in a queue's header ...
const AT_VERSION: usize = 8;
const AT_DESC_NUM: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_IDX: usize = 14;
// ... and in an entry.
const AT_INFLIGHT: usize = 0;
const AT_NEXT: usize = 6;
const AT_COUNTER: usize = 8;

/// Where the tail starts is a multiple of this, whatever the host's pages.
const TAIL_ALIGN: u64 = 4096;
/// Length of the tail; most of it is zero, for what may come.
const TAIL_LEN: u64 = 4096;
/// The tail: magic, version u32, number of queues u16, queue size u16, nonce u128.
const TAIL_MAGIC: [u8; 8] = *b"vublk-if";
const TAIL_VERSION: u32 = 1;
const TAIL_USED: usize = 32;
/// Behind it, the bytes of the tail that change: whether the guest has the write cache on (2) or
/// off (1), 0 until that was noted ...
const AT_WRITE_CACHE: usize = TAIL_USED;
/// ... and whether completed writes may be in a [`Keep`](crate::block::Keep) only (1) or not (0).
const AT_KEPT: usize = TAIL_USED + 1;

/// Called after each store that a death may follow; tests look at the memory there.
#[cfg(test)]
pub(crate) use self::tests::step;
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn step() {}

/// Length of one queue's part.
fn queue_len(queue_size: u16) -> u64 {
    (HEADER as u64 + ENTRY as u64 * u64::from(queue_size)).next_multiple_of(64)
}

/// Length of all queues' parts.
fn queues_len(num_queues: u16, queue_size: u16) -> u64 {
    queue_len(queue_size) * u64::from(num_queues)
}

/// Where the tail is.
fn tail_offset(num_queues: u16, queue_size: u16) -> u64 {
    queues_len(num_queues, queue_size).next_multiple_of(TAIL_ALIGN)
}

/// Whether a region for these can be made at all.
fn check_dimensions(num_queues: u16, queue_size: u16) -> Result<()> {
    if num_queues == 0 || num_queues > MAX_QUEUES {
        return Err(Error::invalid(format!(
            "in-flight region for {num_queues} queues (1 to {MAX_QUEUES} are possible)"
        )));
    }
    if queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
        return Err(Error::invalid(format!(
            "in-flight region for rings of {queue_size} (1 to {MAX_QUEUE_SIZE} are possible)"
        )));
    }
    Ok(())
}

/// A new region, to be given to the front-end.
#[derive(Debug)]
pub struct NewInflight {
    /// The memfd; its size cannot be changed.
    pub file: File,
    /// Length to announce. The offset is 0.
    pub mmap_size: u64,
    /// The nonce in the tail.
    pub session_nonce: u128,
}

/// A region that the front-end gave us.
#[derive(Debug)]
pub struct InflightRegion {
    mapping: Mapping,
    num_queues: u16,
    queue_size: u16,
    session_nonce: Option<u128>,
}

impl InflightRegion {
    /// Makes a fresh region with a new session nonce (GET_INFLIGHT_FD). It is not mapped: the
    /// front-end gives it back with SET_INFLIGHT_FD.
    pub fn create(num_queues: u16, queue_size: u16) -> Result<NewInflight> {
        check_dimensions(num_queues, queue_size)?;
        let tail = tail_offset(num_queues, queue_size);
        let mmap_size = tail + TAIL_LEN;
        let file = memfd_create("vublk-inflight", mmap_size, true)?;
        let session_nonce = random_nonce()?;
        let mut bytes = [0; TAIL_USED];
        bytes[..8].copy_from_slice(&TAIL_MAGIC);
        bytes[8..12].copy_from_slice(&TAIL_VERSION.to_le_bytes());
        bytes[12..14].copy_from_slice(&num_queues.to_le_bytes());
        bytes[14..16].copy_from_slice(&queue_size.to_le_bytes());
        bytes[16..32].copy_from_slice(&session_nonce.to_le_bytes());
        file.write_all_at(&bytes, tail)?;
        Ok(NewInflight { file, mmap_size, session_nonce })
    }

    /// Maps the region of a SET_INFLIGHT_FD message; the file is closed.
    pub fn from_front_end(
        file: File,
        mmap_size: u64,
        mmap_offset: u64,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Arc<InflightRegion>> {
        check_dimensions(num_queues, queue_size)?;
        let needed = queues_len(num_queues, queue_size);
        if mmap_size < needed {
            return Err(Error::invalid(format!(
                "in-flight region of {mmap_size} bytes, {num_queues} queues of {queue_size} need {needed}"
            )));
        }
        // The atomics below need it; the protocol's 64-byte parts suggest it.
        if !mmap_offset.is_multiple_of(16) {
            return Err(Error::invalid(format!("in-flight region at odd offset {mmap_offset:#x}")));
        }
        let tail = tail_offset(num_queues, queue_size);
        // No more than we use, so that a huge claim costs nothing.
        let len = if mmap_size >= tail + TAIL_LEN { tail + TAIL_LEN } else { needed };
        let mapping = Mapping::new(&file, mmap_offset, len, "in-flight region")?;
        let mut region = InflightRegion { mapping, num_queues, queue_size, session_nonce: None };
        if len > needed {
            region.session_nonce = region.read_tail(tail as usize);
        }
        Ok(Arc::new(region))
    }

    /// The nonce, if the tail is one of ours for these dimensions.
    fn read_tail(&self, at: usize) -> Option<u128> {
        let mut bytes = [0; TAIL_USED];
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: the tail lies inside the mapping (`from_front_end`).
            *byte = unsafe { self.mapping.as_ptr().add(at + i).read_volatile() };
        }
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
        let version = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let ours = bytes[..8] == TAIL_MAGIC
            && version == TAIL_VERSION
            && half(12) == self.num_queues
            && half(14) == self.queue_size;
        ours.then(|| u128::from_le_bytes(bytes[16..32].try_into().expect("16 bytes")))
    }

    /// The session this region belongs to, if it was made by us (this or an earlier process).
    pub fn session_nonce(&self) -> Option<u128> {
        self.session_nonce
    }

    /// The write cache mode that was noted last; `None` if none was, or the tail is not ours.
    ///
    /// A guest that has switched the cache off sends no FLUSH any more, and a front-end that
    /// reconnects does not tell the process after us. So it is kept here.
    pub fn write_cache(&self) -> Option<bool> {
        match self.tail_byte(AT_WRITE_CACHE)?.load(Ordering::Acquire) {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// Notes the write cache mode, if the tail is ours.
    pub fn note_write_cache(&self, on: bool) {
        if let Some(byte) = self.tail_byte(AT_WRITE_CACHE) {
            byte.store(1 + u8::from(on), Ordering::Release);
        }
    }

    /// Whether completed writes of the session may be nowhere but in the keep of the process
    /// before. Who does not find that keep has lost them.
    pub fn is_kept(&self) -> bool {
        self.tail_byte(AT_KEPT).is_some_and(|byte| byte.load(Ordering::Acquire) != 0)
    }

    /// Notes whether they may be, if the tail is ours. To be set before the first request of a
    /// session completes, and taken back only when all that has completed is durable.
    pub fn note_kept(&self, kept: bool) {
        if let Some(byte) = self.tail_byte(AT_KEPT) {
            byte.store(kept.into(), Ordering::Release);
        }
    }

    /// A byte of the tail that changes, if the tail is ours.
    fn tail_byte(&self, at: usize) -> Option<&AtomicU8> {
        self.session_nonce?;
        debug_assert!(at < TAIL_LEN as usize);
        let at = tail_offset(self.num_queues, self.queue_size) as usize + at;
        // SAFETY: a region with a nonce is mapped with its tail (`from_front_end`); the memory is
        // shared, so it is reached as an atomic.
        Some(unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(at)) })
    }

    /// Whether any queue was in use before: the region comes from an earlier start of the device.
    pub fn is_recovery(&self) -> bool {
        (0..self.num_queues).any(|index| self.queue_at(index).version() != 0)
    }

    /// Number of queues.
    pub fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// Entries of each queue: the largest ring it can serve.
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Whether the region's file was truncated.
    pub fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }

    /// The part of one queue, if there is such a queue. At most one ring may use it at a time.
    pub fn queue(self: &Arc<Self>, index: u16) -> Option<InflightQueue> {
        (index < self.num_queues).then(|| {
            let mut queue = self.queue_at(index);
            queue.region = Some(Arc::clone(self));
            queue
        })
    }

    /// The same without keeping the region alive: for use within the region's own methods.
    fn queue_at(&self, index: u16) -> InflightQueue {
        assert!(index < self.num_queues);
        let offset = queue_len(self.queue_size) as usize * usize::from(index);
        InflightQueue {
            base: self.mapping.as_ptr().wrapping_add(offset),
            entries: self.queue_size,
            counter: 0,
            region: None,
        }
    }
}

/// 16 random bytes from the kernel.
fn random_nonce() -> Result<u128> {
    let mut bytes = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n != bytes.len() as isize {
        return Err(Error::from(std::io::Error::last_os_error()).context("no random numbers"));
    }
    Ok(u128::from_le_bytes(bytes))
}

/// Why a ring cannot be recovered from its in-flight region. The requests in flight are lost; the
/// device must be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// The region was written by a back-end that knows more than we do.
    #[error("in-flight region has version {0}, only {VERSION} is known")]
    Version(u16),
    /// The ring is larger than the region has entries.
    #[error("ring of {ring} entries, in-flight region of {region}")]
    TooSmall {
        /// Size of the ring.
        ring: u16,
        /// Entries in the region.
        region: u16,
    },
    /// The last batch was longer than the ring, or leads outside of it.
    #[error(
        "in-flight region is corrupt: used index {used}, recorded {recorded}, batch head {head}"
    )]
    Batch {
        /// The ring's used index.
        used: u16,
        /// The used index recorded in the region.
        recorded: u16,
        /// Where the walk along the batch went wrong.
        head: u16,
    },
}

/// What a ring starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The next available index to read.
    pub last_avail: u16,
    /// Heads to do again, oldest first.
    pub heads: Vec<u16>,
}

/// One queue's part of the region, used by that queue's ring.
#[derive(Debug)]
pub struct InflightQueue {
    /// The queue's header.
    base: *mut u8,
    /// Entries that follow it.
    entries: u16,
    /// Counter of the last request taken.
    counter: u64,
    /// Keeps `base` mapped; `None` only inside of the region's own methods.
    region: Option<Arc<InflightRegion>>,
}

// SAFETY: `region` keeps the memory mapped, and all of it is accessed by atomics.
unsafe impl Send for InflightQueue {}

impl InflightQueue {
    fn half(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= HEADER + ENTRY * usize::from(self.entries));
        // SAFETY: inside the queue's part (all callers use constants of the header, or `entry`),
        // which is mapped while `self` lives, and aligned as the part starts at a multiple of 16.
        unsafe { AtomicU16::from_ptr(self.base.add(offset).cast()) }
    }

    /// Offset of the entry of `head`.
    ///
    /// # Panics
    /// If there is no such entry: a bug of ours, heads are bounded before they get here.
    #[inline]
    fn entry(&self, head: u16) -> usize {
        assert!(head < self.entries);
        HEADER + ENTRY * usize::from(head)
    }

    #[inline]
    fn flag(&self, head: u16) -> &AtomicU8 {
        let entry = self.entry(head);
        // SAFETY: `entry` is inside the queue's part.
        unsafe { AtomicU8::from_ptr(self.base.add(entry + AT_INFLIGHT)) }
    }

    #[inline]
    fn counter_of(&self, head: u16) -> &AtomicU64 {
        let entry = self.entry(head);
        // SAFETY: `entry` is inside the queue's part, and a multiple of 16.
        unsafe { AtomicU64::from_ptr(self.base.add(entry + AT_COUNTER).cast()) }
    }

    fn version(&self) -> u16 {
        self.half(AT_VERSION).load(Ordering::Acquire)
    }

    /// Brings the region and a ring together when the ring starts: `used_idx` is the ring's used
    /// index, `base` what the front-end says is the next available index (ignored unless the
    /// region is fresh), `ring_size` the size of the ring.
    pub fn start(
        &mut self,
        used_idx: u16,
        base: u16,
        ring_size: u16,
    ) -> Result<Recovered, InflightError> {
        if ring_size > self.entries {
            return Err(InflightError::TooSmall { ring: ring_size, region: self.entries });
        }
        match self.version() {
            0 => {
                // The used index first: a next recovery must not take what the ring did before
                // for a batch of ours.
                self.half(AT_USED_IDX).store(used_idx, Ordering::Release);
                self.half(AT_DESC_NUM).store(self.entries, Ordering::Release);
                self.half(AT_VERSION).store(VERSION, Ordering::Release);
                step();
                Ok(Recovered { last_avail: base, heads: Vec::new() })
            }
            VERSION => self.recover(used_idx, ring_size),
            version => Err(InflightError::Version(version)),
        }
    }

    fn recover(&mut self, used: u16, ring_size: u16) -> Result<Recovered, InflightError> {
        let recorded = self.half(AT_USED_IDX).load(Ordering::Acquire);
        let batch = used.wrapping_sub(recorded);
        // Nothing flagged means nothing owed, whatever the rest says: the ring was drained, and
        // perhaps set up anew by the guest meanwhile.
        if batch != 0 && self.flagged().next().is_some() {
            let mut head = self.half(AT_LAST_BATCH_HEAD).load(Ordering::Acquire);
            if batch > ring_size {
                return Err(InflightError::Batch { used, recorded, head });
            }
            for _ in 0..batch {
                if head >= ring_size {
                    return Err(InflightError::Batch { used, recorded, head });
                }
                self.flag(head).store(0, Ordering::Release);
                step();
                head = self.half(self.entry(head) + AT_NEXT).load(Ordering::Acquire);
            }
        }
        self.half(AT_USED_IDX).store(used, Ordering::Release);
        step();
        let mut owed: Vec<(u64, u16)> = self
            .flagged()
            .map(|head| (self.counter_of(head).load(Ordering::Acquire), head))
            .collect();
        if let Some((_, head)) = owed.iter().find(|(_, head)| *head >= ring_size) {
            return Err(InflightError::Batch { used, recorded, head: *head });
        }
        owed.sort_unstable();
        self.counter = owed.last().map_or(0, |(counter, _)| *counter);
        let last_avail = used.wrapping_add(owed.len() as u16);
        Ok(Recovered { last_avail, heads: owed.into_iter().map(|(_, head)| head).collect() })
    }

    /// The heads whose flags are set.
    fn flagged(&self) -> impl Iterator<Item = u16> {
        (0..self.entries).filter(|head| self.flag(*head).load(Ordering::Acquire) != 0)
    }

    /// Marks a head as taken, before anything of its request is done.
    #[inline]
    pub(crate) fn take(&mut self, head: u16) {
        self.counter = self.counter.wrapping_add(1);
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        step();
        self.flag(head).store(1, Ordering::Release);
        step();
    }

    /// Links a head, whose used element is written but not published, into the batch.
    #[inline]
    pub(crate) fn link(&self, head: u16) {
        let last = self.half(AT_LAST_BATCH_HEAD).load(Ordering::Relaxed);
        self.half(self.entry(head) + AT_NEXT).store(last, Ordering::Relaxed);
        step();
        self.half(AT_LAST_BATCH_HEAD).store(head, Ordering::Release);
        step();
    }

    /// Clears the batch's flags after the ring's used index was stored.
    #[inline]
    pub(crate) fn published(&self, heads: &[u16], used_idx: u16) {
        // The kernel lets a killed thread die between two instructions, so the order of the
        // instructions is all that counts; on other architectures the release stores keep it too.
        compiler_fence(Ordering::SeqCst);
        for head in heads {
            self.flag(*head).store(0, Ordering::Release);
            step();
        }
        self.half(AT_USED_IDX).store(used_idx, Ordering::Release);
        step();
    }

    /// Whether the region's file was truncated.
    pub fn is_broken(&self) -> bool {
        self.region.as_ref().is_some_and(|region| region.is_broken())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;

    use super::*;

    thread_local! {
        /// What to do after each store.
        static ON_STEP: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    /// Calls the closure set by [`on_each_step`], if any.
    pub(crate) fn step() {
        let Some(mut f) = ON_STEP.with_borrow_mut(Option::take) else { return };
        f();
        ON_STEP.with_borrow_mut(|slot| *slot = Some(f));
    }

    /// Runs `body` with `f` called after each store to shared memory by this thread.
    pub(crate) fn on_each_step(f: impl FnMut() + 'static, body: impl FnOnce()) {
        ON_STEP.with_borrow_mut(|slot| *slot = Some(Box::new(f)));
        body();
        ON_STEP.with_borrow_mut(|slot| *slot = None);
    }

    fn region(num_queues: u16, queue_size: u16) -> (File, Arc<InflightRegion>) {
        let new = InflightRegion::create(num_queues, queue_size).unwrap();
        let file = new.file.try_clone().unwrap();
        let region =
            InflightRegion::from_front_end(new.file, new.mmap_size, 0, num_queues, queue_size)
                .unwrap();
        (file, region)
    }

    #[test]
    fn the_layout_is_the_protocols() {
        assert_eq!(queue_len(128), 2112);
        assert_eq!(queue_len(1), 64);
        assert_eq!(queue_len(3), 64);
        assert_eq!(queue_len(4), 128);
        let (file, region) = region(2, 4);
        let mut queue = region.queue(1).unwrap();
        queue.start(7, 3, 4).unwrap();
        queue.take(2);
        queue.link(2);
        let mut bytes = [0; 128];
        file.read_exact_at(&mut bytes, 128).unwrap();
        assert_eq!(bytes[8..16], [1, 0, 4, 0, 2, 0, 7, 0]);
        assert_eq!(bytes[16 + 32..16 + 48], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        queue.published(&[2], 8);
        file.read_exact_at(&mut bytes, 128).unwrap();
        assert_eq!((bytes[14], bytes[48]), (8, 0));
        assert!(region.queue(2).is_none());
        assert!(region.is_recovery());
    }

    #[test]
    fn the_tail_names_the_session() {
        let new = InflightRegion::create(64, 1024).unwrap();
        let open = |queues, size, mmap_size| {
            InflightRegion::from_front_end(
                new.file.try_clone().unwrap(),
                mmap_size,
                0,
                queues,
                size,
            )
        };
        let region = open(64, 1024, new.mmap_size).unwrap();
        assert_eq!(region.session_nonce(), Some(new.session_nonce));
        assert!(!region.is_recovery());
        assert_eq!(open(64, 1024, new.mmap_size - 1).unwrap().session_nonce(), None);
        assert_eq!(open(63, 1024, new.mmap_size).unwrap().session_nonce(), None);
        let other = InflightRegion::create(64, 1024).unwrap();
        assert_ne!(other.session_nonce, new.session_nonce);
    }

    #[test]
    fn what_the_tail_notes_is_there_for_the_next_process() {
        let new = InflightRegion::create(1, 8).unwrap();
        let open = |len| {
            let file = new.file.try_clone().unwrap();
            InflightRegion::from_front_end(file, len, 0, 1, 8).unwrap()
        };
        let region = open(new.mmap_size);
        assert_eq!((region.write_cache(), region.is_kept()), (None, false));
        region.note_kept(true);
        assert_eq!((region.write_cache(), open(new.mmap_size).is_kept()), (None, true));
        region.note_write_cache(false);
        region.note_kept(false);
        let again = open(new.mmap_size);
        assert_eq!((again.write_cache(), again.is_kept()), (Some(false), false));
        // The region of another back-end has no place for notes.
        let foreign = open(192);
        foreign.note_kept(true);
        foreign.note_write_cache(true);
        assert_eq!((foreign.write_cache(), foreign.is_kept()), (None, false));
        assert_eq!(region.write_cache(), Some(false));
    }

    #[test]
    fn bad_regions_are_refused() {
        let file = memfd_create("vublk-test", 4096, false).unwrap();
        let open = |size, offset, queues, entries| {
            InflightRegion::from_front_end(file.try_clone().unwrap(), size, offset, queues, entries)
                .map(|_| ())
                .map_err(|err| err.to_string())
        };
        assert_eq!(open(4096, 0, 1, 128), Ok(()));
        assert_eq!(open(2112, 4096 - 2112, 1, 128), Ok(()));
        assert!(open(2112, 4096 - 2096, 1, 128).unwrap_err().contains("of a file of only"));
        assert!(open(4096, 1, 1, 128).unwrap_err().contains("odd offset"));
        assert!(open(4096, u64::MAX - 15, 1, 128).unwrap_err().contains("overflows"));
        assert!(open(4096, 0, 2, 128).unwrap_err().contains("need 4224"));
        assert!(open(u64::MAX, 0, 2, 128).unwrap_err().contains("of a file of only"));
        assert!(open(4096, 0, 0, 128).unwrap_err().contains("0 queues"));
        assert!(open(4096, 0, 65, 1).unwrap_err().contains("65 queues"));
        assert!(open(4096, 0, 1, 0).unwrap_err().contains("rings of 0"));
        assert!(open(4096, 0, 1, 1025).unwrap_err().contains("rings of 1025"));
        assert!(InflightRegion::create(0, 128).is_err());
        assert!(InflightRegion::create(1, 0).is_err());
    }

    #[test]
    fn a_region_of_garbage_is_bounded() {
        use proptest::prelude::*;
        proptest!(|(bytes in prop::collection::vec(any::<u8>(), 16 + 16 * 8), used: u16)| {
            let file = memfd_create("vublk-test", 192, false).unwrap();
            let mut bytes = bytes.clone();
            bytes[9] = 0;
            bytes[8] &= 1;
            file.write_all_at(&bytes, 0).unwrap();
            let region = InflightRegion::from_front_end(file, 192, 0, 1, 8).unwrap();
            if let Ok(recovered) = region.queue(0).unwrap().start(used, 5, 4) {
                prop_assert!(recovered.heads.len() <= 4);
                prop_assert!(recovered.heads.iter().all(|head| *head < 4));
            }
        });
    }

    #[test]
    fn a_published_batch_is_not_done_again() {
        let (_file, region) = region(1, 8);
        let mut queue = region.queue(0).unwrap();
        queue.start(100, 100, 8).unwrap();
        for head in [3, 1, 4, 5] {
            queue.take(head);
        }
        // Two are completed and published, and we die before anything is cleared.
        queue.link(1);
        queue.link(5);
        drop(queue);
        let mut queue = region.queue(0).unwrap();
        let recovered = queue.start(102, 0, 8).unwrap();
        assert_eq!(recovered, Recovered { last_avail: 104, heads: vec![3, 4] });
        // A second death right away changes nothing.
        let again = region.queue(0).unwrap().start(102, 0, 8).unwrap();
        assert_eq!(again, recovered);
        // New requests come after those in the order.
        queue.take(0);
        assert_eq!(region.queue(0).unwrap().start(102, 0, 8).unwrap().heads, [3, 4, 0]);
    }

    #[test]
    fn a_recovered_batch_is_not_cleared_once_more() {
        let (_file, region) = region(1, 8);
        let mut queue = region.queue(0).unwrap();
        queue.start(100, 100, 8).unwrap();
        queue.take(3);
        queue.take(1);
        // Published, and dead before the flag is cleared.
        queue.link(3);
        let mut queue = region.queue(0).unwrap();
        assert_eq!(queue.start(101, 0, 8).unwrap().heads, [1]);
        // The guest uses the same head again, and we die again before anything is published.
        queue.take(3);
        assert_eq!(region.queue(0).unwrap().start(101, 0, 8).unwrap().heads, [1, 3]);
    }

    #[test]
    fn batches_that_lead_outside_of_the_ring_are_refused() {
        let (file, region) = region(1, 8);
        let mut queue = region.queue(0).unwrap();
        queue.start(0, 0, 4).unwrap();
        queue.take(2);
        queue.link(2);
        let refused = |used| {
            let err = region.queue(0).unwrap().start(used, 0, 4).unwrap_err();
            assert!(matches!(err, InflightError::Batch { .. }), "{err}");
        };
        // Longer than the ring; and a head, then a link, that is in the region but not in the ring.
        refused(5);
        let put = |at: usize| file.write_all_at(&6u16.to_le_bytes(), at as u64).unwrap();
        put(HEADER + 2 * ENTRY + AT_NEXT);
        refused(2);
        queue.take(2);
        put(AT_LAST_BATCH_HEAD);
        refused(1);
    }

    #[test]
    fn a_fresh_region_on_a_used_ring_clears_nothing() {
        // spdk#3766: used_idx left at 0 makes the next recovery clear entry 0's flag.
        let (_file, region) = region(1, 8);
        let mut queue = region.queue(0).unwrap();
        assert_eq!(queue.start(5, 5, 8).unwrap().last_avail, 5);
        queue.take(0);
        let recovered = region.queue(0).unwrap().start(5, 6, 8).unwrap();
        assert_eq!(recovered, Recovered { last_avail: 6, heads: vec![0] });
    }

    #[test]
    fn a_drained_region_goes_with_a_ring_set_up_anew() {
        let (_file, region) = region(1, 8);
        let mut queue = region.queue(0).unwrap();
        queue.start(0, 0, 8).unwrap();
        queue.take(0);
        queue.link(0);
        queue.published(&[0], 1000);
        let recovered = region.queue(0).unwrap().start(0, 0, 8).unwrap();
        assert_eq!(recovered, Recovered { last_avail: 0, heads: vec![] });
        assert!(matches!(
            region.queue(0).unwrap().start(0, 0, 16),
            Err(InflightError::TooSmall { ring: 16, region: 8 })
        ));
    }
}
