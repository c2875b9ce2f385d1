//! The device's side of a split virtqueue.
//!
//! One worker owns a ring; nothing here locks, waits or allocates per request. Heads come out with
//! [`Ring::pop`], their descriptors with [`Ring::walk`], results go in with [`Ring::complete`] and
//! become visible to the guest all at once with [`Ring::publish`]:
//!
//! ```text
//!             avail.idx read once a batch            used.idx stored once a batch
//! guest ─► avail ring ─► pop ─► walk ─► … I/O … ─► complete ─► complete ─► publish ─► interrupt?
//!                         │                           │                      │
//!                 in-flight: take               in-flight: link       in-flight: clear
//! ```
//!
//! A worker that runs out of work calls [`Ring::enable_notifications`], and sleeps only if that
//! says that nothing came meanwhile.
//!
//! When a ring starts, kick it once (requests may wait whose kick the dead predecessor took) and
//! interrupt the guest once (the predecessor may have published without).
//!
//! Invariants:
//! * Every index read from shared memory is masked or compared before use; every access is atomic.
//! * A head is given out once until it was completed and published. A guest that reuses one, names
//!   one that does not exist, or lets its index run ahead has a broken ring: nothing is given out
//!   any more, what is in flight still completes.
//! * A used element is written before the index that shows it.
//! * Whatever is written to the used ring is marked in the migration log, if there is one.

#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{Chain, ChainError, DESCRIPTOR, Table};
use super::dirty_log::DirtyLog;
use super::features::{EVENT_IDX, INDIRECT_DESC, MAX_QUEUE_SIZE};
use super::inflight::{InflightError, InflightQueue, step};
use super::memory::{GuestMemory, RegionCache, Unmapped};
use crate::error::{Error, ErrorKind};

#[cfg(target_endian = "big")]
compile_error!("rings and the in-flight region are read as little-endian, in place");

// Offsets in the rings.
const AT_FLAGS: usize = 0;
const AT_IDX: usize = 2;
const AT_ELEMENTS: usize = 4;
/// Size of an element of the used ring.
const USED_ELEMENT: usize = 8;

/// What a ring is made from.
#[derive(Debug)]
pub struct RingConfig {
    /// Number of entries: a power of two up to [`MAX_QUEUE_SIZE`].
    pub size: u16,
    /// The descriptor table, in the front-end's address space like the next two.
    pub desc_addr: u64,
    /// The available ring.
    pub avail_addr: u64,
    /// The used ring.
    pub used_addr: u64,
    /// The next available index to read, as in SET_VRING_BASE. Ignored if `inflight` knows better.
    pub base: u16,
    /// The virtio features that were negotiated.
    pub features: u64,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The migration log, while the guest is migrated.
    pub dirty_log: Option<Arc<DirtyLog>>,
    /// Guest address of the used ring, if writes to it are to be logged (VHOST_VRING_F_LOG).
    pub log_used_addr: Option<u64>,
    /// The queue's part of the in-flight region.
    pub inflight: Option<InflightQueue>,
}

/// Why a ring cannot start, or cannot go on until the device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is not a power of two, or too large.
    #[error("ring of {0} entries (a power of two up to {MAX_QUEUE_SIZE} is possible)")]
    Size(u16),
    /// A part of the ring is not in guest memory.
    #[error("{part}: {source}")]
    Unmapped {
        /// Which part.
        part: &'static str,
        /// Where it should be.
        source: Unmapped,
    },
    /// A part of the ring is not aligned as virtio demands.
    #[error("{part} at {addr:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which part.
        part: &'static str,
        /// Where it is.
        addr: u64,
        /// What it must be a multiple of.
        align: usize,
    },
    /// The file of the memory that the ring lives in was truncated.
    #[error("guest memory is gone")]
    MemoryGone,
    /// What the in-flight region says cannot be.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The guest made more available than the ring can hold.
    #[error("available index {avail} is more than the ring's size ahead of {next}")]
    RunAhead {
        /// The guest's index.
        avail: u16,
        /// The next one we would read.
        next: u16,
    },
    /// The guest made a descriptor available that does not exist.
    #[error("available head {head} in a ring of {size}")]
    NoSuchHead {
        /// The head.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// The guest made a head available while its last request was in flight.
    #[error("available head {0} is still in flight")]
    HeadInFlight(u16),
}

impl From<RingError> for Error {
    fn from(err: RingError) -> Error {
        Error::new(ErrorKind::Corrupt, err.to_string())
    }
}

/// Where a head is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Head {
    /// With the guest.
    Idle,
    /// Popped.
    InFlight,
    /// Completed, but not published.
    Completed,
}

/// The device's side of a virtqueue. See the module's documentation.
pub struct Ring {
    /// The descriptor table, available ring and used ring, kept mapped by `memory`.
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    size: u16,
    /// The next available index to read.
    next_avail: u16,
    /// The guest's available index when it was last read.
    avail_seen: u16,
    /// The next used index to write.
    next_used: u16,
    /// The used index that the guest sees.
    published: u16,
    /// Heads popped and not completed.
    in_flight: u16,
    event_idx: bool,
    indirect: bool,
    /// Whether the guest's wish for interrupts is to be ignored once: it may have missed ours.
    first_publish: bool,
    /// Whether the guest was asked not to kick (without EVENT_IDX).
    kicks_off: bool,
    /// Why nothing is given out any more.
    broken: Option<RingError>,
    /// The state of each head.
    heads: Box<[Head]>,
    /// Heads completed since the last publication.
    batch: Vec<u16>,
    inflight: Option<InflightQueue>,
    cache: RegionCache,
    memory: Arc<GuestMemory>,
    dirty_log: Option<Arc<DirtyLog>>,
    log_used_addr: Option<u64>,
    /// Front-end addresses, to translate again when the memory table changes.
    desc_addr: u64,
    avail_addr: u64,
    used_addr: u64,
}

// SAFETY: the pointers lead into `memory`, which is shared with other processes anyway; all
// accesses are atomic.
unsafe impl Send for Ring {}

/// Host pointers of a ring's parts.
struct Parts {
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
}

/// Loads a half-word of the ring.
///
/// # Safety
/// Mapped and aligned.
#[inline]
unsafe fn load(ptr: *mut u8, order: Ordering) -> u16 {
    // SAFETY: as promised by the caller.
    unsafe { AtomicU16::from_ptr(ptr.cast()) }.load(order)
}

/// Stores a half-word of the ring.
///
/// # Safety
/// Mapped and aligned.
#[inline]
unsafe fn store(ptr: *mut u8, value: u16, order: Ordering) {
    // SAFETY: as promised by the caller.
    unsafe { AtomicU16::from_ptr(ptr.cast()) }.store(value, order);
}

impl Ring {
    /// Starts a ring. Also returns the heads that an earlier process left in flight, oldest first:
    /// they count as popped, and are to be walked and done again before anything else (a write is
    /// then executed twice, which changes nothing on a disk).
    ///
    /// Kicks are enabled.
    pub fn new(config: RingConfig) -> Result<(Ring, Vec<u16>), RingError> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(size));
        }
        let event_idx = config.features & EVENT_IDX != 0;
        let mut ring = Ring {
            desc: std::ptr::null_mut(),
            avail: std::ptr::null_mut(),
            used: std::ptr::null_mut(),
            size,
            next_avail: config.base,
            avail_seen: config.base,
            next_used: 0,
            published: 0,
            in_flight: 0,
            event_idx,
            indirect: config.features & INDIRECT_DESC != 0,
            first_publish: true,
            kicks_off: false,
            broken: None,
            heads: vec![Head::Idle; size.into()].into(),
            batch: Vec::with_capacity(size.into()),
            inflight: config.inflight,
            cache: RegionCache::default(),
            memory: config.memory,
            dirty_log: config.dirty_log,
            log_used_addr: config.log_used_addr,
            desc_addr: config.desc_addr,
            avail_addr: config.avail_addr,
            used_addr: config.used_addr,
        };
        let parts = ring.translate(&ring.memory)?;
        ring.set_parts(parts);
        // SAFETY: the used ring was just translated.
        let used_idx = unsafe { load(ring.used.add(AT_IDX), Ordering::Acquire) };
        ring.next_used = used_idx;
        ring.published = used_idx;
        let mut resubmit = Vec::new();
        if let Some(queue) = &mut ring.inflight {
            let recovered = queue.start(used_idx, config.base, size)?;
            ring.next_avail = recovered.last_avail;
            ring.avail_seen = recovered.last_avail;
            resubmit = recovered.heads;
            for head in &resubmit {
                ring.heads[usize::from(*head)] = Head::InFlight;
            }
            ring.in_flight = resubmit.len() as u16;
        }
        ring.kicks_off = true;
        ring.enable_notifications();
        Ok((ring, resubmit))
    }

    /// Finds the ring's parts in `memory`.
    fn translate(&self, memory: &GuestMemory) -> Result<Parts, RingError> {
        let size = usize::from(self.size);
        // The event index is there only if it was negotiated; rings at the end of memory count on
        // that.
        let event = if self.event_idx { 2 } else { 0 };
        let find = |part, addr, len: usize, align| {
            let ptr = memory
                .front_end_ptr(addr, len as u64)
                .map_err(|source| RingError::Unmapped { part, source })?;
            if !(ptr as usize).is_multiple_of(align) {
                return Err(RingError::Misaligned { part, addr, align });
            }
            Ok(ptr)
        };
        Ok(Parts {
            desc: find("descriptor table", self.desc_addr, DESCRIPTOR * size, 16)?,
            avail: find("available ring", self.avail_addr, AT_ELEMENTS + 2 * size + event, 2)?,
            used: find("used ring", self.used_addr, AT_ELEMENTS + USED_ELEMENT * size + event, 4)?,
        })
    }

    fn set_parts(&mut self, parts: Parts) {
        self.desc = parts.desc;
        self.avail = parts.avail;
        self.used = parts.used;
    }

    /// Takes a new memory table, in which the ring must be where it was in the front-end's address
    /// space. On failure the ring is broken, and keeps the old table.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), RingError> {
        let parts = self.translate(&memory).map_err(|err| self.break_with(err))?;
        self.set_parts(parts);
        self.memory = memory;
        self.cache = RegionCache::default();
        Ok(())
    }

    /// The memory table that chains are translated by. Requests keep it until they are done.
    #[inline]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Starts, changes or ends migration logging, with the guest address of the used ring if
    /// writes to it are to be logged.
    pub fn set_dirty_log(&mut self, log: Option<Arc<DirtyLog>>, log_used_addr: Option<u64>) {
        self.dirty_log = log;
        self.log_used_addr = log_used_addr;
    }

    /// The migration log, to mark what a request wrote before it is completed.
    #[inline]
    pub fn dirty_log(&self) -> Option<&Arc<DirtyLog>> {
        self.dirty_log.as_ref()
    }

    /// Number of entries.
    #[inline]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The next available index to read: what GET_VRING_BASE answers.
    #[inline]
    pub fn last_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index that the guest sees.
    #[inline]
    pub fn used_idx(&self) -> u16 {
        self.published
    }

    /// Heads popped and not completed.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Why nothing is given out any more, if so.
    #[inline]
    pub fn broken(&self) -> Option<RingError> {
        self.broken
    }

    /// Whether a mapping that the ring lives in lost its file: the device must stop.
    #[inline]
    pub fn is_memory_broken(&self) -> bool {
        super::sigbus::faults() != 0
            && (self.memory.is_broken()
                || self.inflight.as_ref().is_some_and(InflightQueue::is_broken)
                || self.dirty_log.as_ref().is_some_and(|log| log.is_broken()))
    }

    #[cold]
    fn break_with(&mut self, err: RingError) -> RingError {
        self.broken = Some(err);
        self.avail_seen = self.next_avail;
        err
    }

    /// Reads the guest's available index; true if there is something to pop.
    #[inline]
    fn look(&mut self) -> Result<bool, RingError> {
        if self.broken.is_some() {
            return Ok(false);
        }
        // SAFETY: the available ring is mapped and aligned. Acquire: what the index shows was
        // written before it.
        let avail = unsafe { load(self.avail.add(AT_IDX), Ordering::Acquire) };
        let next = self.next_avail;
        if avail.wrapping_sub(next) > self.size {
            return Err(self.break_with(RingError::RunAhead { avail, next }));
        }
        self.avail_seen = avail;
        Ok(avail != next)
    }

    /// Whether the guest has made something available that was not taken. Unlike
    /// [`Ring::enable_notifications`] it changes nothing.
    #[inline]
    pub fn has_available(&self) -> bool {
        // SAFETY: the available ring is mapped and aligned.
        let avail = unsafe { load(self.avail.add(AT_IDX), Ordering::Relaxed) };
        self.broken.is_none() && avail != self.next_avail
    }

    /// Gives nothing out any more: the memory that the ring lives in is gone.
    pub fn retire(&mut self) {
        if self.broken.is_none() {
            self.break_with(RingError::MemoryGone);
        }
    }

    /// Takes the next available head. `None` if there is none now; an error once, when the ring
    /// breaks, and `None` from then on.
    ///
    /// The guest's index is read only when all of what it showed last time was taken.
    #[inline]
    pub fn pop(&mut self) -> Option<Result<u16, RingError>> {
        if self.next_avail == self.avail_seen {
            match self.look() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(err) => return Some(Err(err)),
            }
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        // SAFETY: `slot` is below the ring's size.
        let head = unsafe { load(self.avail.add(AT_ELEMENTS + 2 * slot), Ordering::Relaxed) };
        match self.heads.get_mut(usize::from(head)) {
            Some(state @ Head::Idle) => *state = Head::InFlight,
            Some(_) => return Some(Err(self.break_with(RingError::HeadInFlight(head)))),
            None => {
                let err = RingError::NoSuchHead { head, size: self.size };
                return Some(Err(self.break_with(err)));
            }
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        if let Some(queue) = &mut self.inflight {
            queue.take(head);
        }
        Some(Ok(head))
    }

    /// Fills `chain` with the memory ranges of a popped head. After an error the chain holds at
    /// most its last writable byte: parsing it fails the request as it should, and the ring goes
    /// on.
    #[inline]
    pub fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let table = Table::Host { ptr: self.desc, len: self.size.into() };
        // SAFETY: the table has `size` entries in memory that `self.memory` keeps mapped.
        unsafe { chain.walk(table, head, self.indirect, &self.memory, &mut self.cache) }
    }

    /// Puts a popped head into the used ring, with the number of bytes written for it. The guest
    /// sees it after the next [`Ring::publish`].
    ///
    /// # Panics
    /// If the head is not in flight: each is completed exactly once.
    #[inline]
    pub fn complete(&mut self, head: u16, len: u32) {
        let state = &mut self.heads[usize::from(head)];
        assert_eq!(*state, Head::InFlight, "head {head} completed twice");
        *state = Head::Completed;
        self.in_flight -= 1;
        let slot = usize::from(self.next_used & (self.size - 1));
        let offset = AT_ELEMENTS + USED_ELEMENT * slot;
        // SAFETY: `slot` is below the ring's size, the used ring is aligned to 4 bytes.
        unsafe {
            let element = self.used.add(offset).cast::<u32>();
            AtomicU32::from_ptr(element).store(head.into(), Ordering::Relaxed);
            AtomicU32::from_ptr(element.add(1)).store(len, Ordering::Relaxed);
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.batch.push(head);
        if let Some(queue) = &self.inflight {
            queue.link(head);
        }
        self.log_used(offset, USED_ELEMENT);
    }

    /// Whether something was completed and not published.
    #[inline]
    pub fn has_pending_used(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Shows the guest all that was completed, and returns whether it wants an interrupt.
    #[inline]
    #[must_use = "the guest waits for the interrupt"]
    pub fn publish(&mut self) -> bool {
        if self.batch.is_empty() {
            return false;
        }
        let (old, new) = (self.published, self.next_used);
        // SAFETY: the used ring is mapped and aligned. Release: elements, data and status before
        // the index that shows them, and the in-flight region's links too.
        unsafe { store(self.used.add(AT_IDX), new, Ordering::Release) };
        step();
        self.published = new;
        if let Some(queue) = &self.inflight {
            queue.published(&self.batch, new);
        }
        for head in self.batch.drain(..) {
            self.heads[usize::from(head)] = Head::Idle;
        }
        self.log_used(AT_IDX, 2);
        self.wants_interrupt(old, new)
    }

    /// Whether the guest wants an interrupt for used indices from `old` to before `new`.
    #[inline]
    fn wants_interrupt(&mut self, old: u16, new: u16) -> bool {
        if std::mem::take(&mut self.first_publish) {
            return true;
        }
        // The index must be visible before the guest's wish is read: the guest does the opposite,
        // and one of us sees the other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = AT_ELEMENTS + 2 * usize::from(self.size);
            // SAFETY: with EVENT_IDX the available ring was translated with the event index.
            let event = unsafe { load(self.avail.add(at), Ordering::Relaxed) };
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            // SAFETY: the available ring is mapped and aligned.
            let flags = unsafe { load(self.avail.add(AT_FLAGS), Ordering::Relaxed) };
            flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    /// Asks the guest not to kick, as we are looking anyway. With EVENT_IDX there is nothing to
    /// do: the guest kicks only when it passes the index last asked for.
    #[inline]
    pub fn disable_notifications(&mut self) {
        if !self.event_idx && !self.kicks_off {
            self.kicks_off = true;
            // SAFETY: the used ring is mapped and aligned.
            unsafe {
                store(self.used.add(AT_FLAGS), VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed)
            };
            self.log_used(AT_FLAGS, 2);
        }
    }

    /// Asks the guest for a kick when it makes something available. True if something is there
    /// already: then the kick may not come, and the ring must be looked at again.
    #[inline]
    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            let at = AT_ELEMENTS + USED_ELEMENT * usize::from(self.size);
            // SAFETY: with EVENT_IDX the used ring was translated with the event index.
            unsafe { store(self.used.add(at), self.next_avail, Ordering::Relaxed) };
            self.log_used(at, 2);
        } else if self.kicks_off {
            self.kicks_off = false;
            // SAFETY: the used ring is mapped and aligned.
            unsafe { store(self.used.add(AT_FLAGS), 0, Ordering::Relaxed) };
            self.log_used(AT_FLAGS, 2);
        }
        // Our wish must be visible before the index is read: the guest does the opposite.
        fence(Ordering::SeqCst);
        // A ring that breaks now says so at the next `pop`: `true` leads there.
        self.broken.is_none() && {
            // SAFETY: the available ring is mapped and aligned.
            let avail = unsafe { load(self.avail.add(AT_IDX), Ordering::Relaxed) };
            avail != self.next_avail
        }
    }

    /// Whether the ring is as it was made: nothing was ever made available in it.
    #[inline]
    pub fn is_untouched(&self) -> bool {
        // SAFETY: the available ring is mapped and aligned.
        self.next_avail == 0 && unsafe { load(self.avail.add(AT_IDX), Ordering::Relaxed) } == 0
    }

    /// Marks a write to the used ring in the migration log.
    #[inline]
    fn log_used(&self, offset: usize, len: usize) {
        if let (Some(log), Some(addr)) = (&self.dirty_log, self.log_used_addr) {
            log.mark(addr.saturating_add(offset as u64), len as u64);
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("size", &self.size)
            .field("next_avail", &self.next_avail)
            .field("published", &self.published)
            .field("in_flight", &self.in_flight)
            .field("pending", &self.batch.len())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
