//! The driver's side of a split virtqueue.
//!
//! ```text
//!   add_chain ─► descriptor table      push ─► available ring      publish ─► available index
//!                                                                     │
//!   take_used ◄─ used ring ◄──── back-end ◄──── kick_if_wanted ◄──────┘
//!       ▲
//!   wait_used: announce interest, look once more, sleep on the call eventfd
//! ```
//!
//! The steps are separate so that a load generator can publish many requests by one index store
//! and at most one kick, and so that a test can break any of them. Kicks sent and interrupts
//! received are counted.
//!
//! # Notifications
//!
//! With EVENT_IDX the back-end names the available index at which it wants to be kicked, and we
//! name the used index at which we want an interrupt; without, each side has a "do not disturb"
//! flag. Either way a full fence lies between our index store and our look at the other's wish,
//! and between the announcement of ours and the last look at the used index: the other side has
//! the same fences, so at least one of the two sees the other.
//!
//! # Invariants
//!
//! * The addresses of the three parts are inside one region, which the ring keeps mapped.
//! * Numbers that come from shared memory (used ids, indices) are returned as found: callers check
//!   them before they index with them.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::memory::{Memory, Region};
use super::{timed_out, wait_for};
use crate::error::{Error, ErrorKind, Result};

/// Another descriptor follows.
pub const DESC_NEXT: u16 = 1;
/// The device writes to it.
pub const DESC_WRITE: u16 = 2;
/// It is a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;
/// In the used ring's flags: no kicks, please.
const USED_NO_NOTIFY: u16 = 1;
/// In the available ring's flags: no interrupts, please.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Bytes of a descriptor.
pub const DESC_LEN: u64 = 16;
/// What [`Waker::wake`] adds to the call eventfd: far above any number of interrupts.
const WAKE: u64 = 1 << 32;

/// One descriptor, as it lies in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// [`DESC_NEXT`], [`DESC_WRITE`], [`DESC_INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor, with [`DESC_NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// The bytes in memory.
    pub fn to_bytes(self) -> [u8; DESC_LEN as usize] {
        let mut bytes = [0; DESC_LEN as usize];
        bytes[0..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes to it.
    pub writable: bool,
}

/// The descriptors of a table that holds `segments` one after the other from index `first`.
pub fn chain(segments: &[Segment], first: u16) -> Vec<Descriptor> {
    let last = segments.len().saturating_sub(1);
    let describe = |(i, segment): (usize, &Segment)| Descriptor {
        addr: segment.addr,
        len: segment.len,
        flags: if segment.writable { DESC_WRITE } else { 0 } | if i < last { DESC_NEXT } else { 0 },
        next: if i < last { first.wrapping_add(i as u16 + 1) } else { 0 },
    };
    segments.iter().enumerate().map(describe).collect()
}

/// What the back-end reports of a chain it is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedElement {
    /// Head of the chain, as found: not checked.
    pub id: u32,
    /// Bytes the device wrote.
    pub len: u32,
}

/// Where the parts of a ring lie, in guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// The descriptor table, aligned to 16.
    pub descriptors: u64,
    /// The available ring, aligned to 2.
    pub available: u64,
    /// The used ring, aligned to 4.
    pub used: u64,
}

impl RingLayout {
    /// The three parts one after the other from `base`, the used ring on a page of its own.
    pub fn contiguous(base: u64, size: u16) -> Self {
        let descriptors = base.next_multiple_of(4096);
        let available = descriptors + DESC_LEN * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4096);
        RingLayout { size, descriptors, available, used }
    }

    /// One past the last byte of the used ring.
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }
}

/// Kicks and interrupts of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    /// Kicks sent.
    pub kicks: u64,
    /// Interrupts that the back-end sent (not wake-ups: two interrupts may wake once).
    pub interrupts: u64,
    /// Sleeps of the driver that ended by an interrupt.
    pub wakeups: u64,
}

/// The driver's side of one split virtqueue.
#[derive(Debug)]
pub struct Ring {
    /// Number of the queue.
    index: u16,
    /// Where it lies.
    layout: RingLayout,
    /// Keeps the three pointers below mapped.
    region: Arc<Region>,
    /// Our view of the descriptor table.
    descriptors: *mut u8,
    /// Our view of the available ring.
    available: *mut u8,
    /// Our view of the used ring.
    used: *mut u8,
    /// Whether EVENT_IDX is in use.
    event_idx: bool,
    /// Available index after the last pushed head; published or not.
    next_available: u16,
    /// Available index the last time a kick was considered.
    considered: u16,
    /// Used index up to which elements were taken.
    next_used: u16,
    /// Descriptors not in a chain.
    free: Vec<u16>,
    /// For each head of a chain made by `add_chain`: its descriptors, head first.
    chains: Vec<Vec<u16>>,
    /// Driver to device.
    kick: Arc<OwnedFd>,
    /// Device to driver.
    call: Arc<OwnedFd>,
    /// Device's complaint about the ring.
    err: Arc<OwnedFd>,
    /// Counted so far.
    counters: RingCounters,
}

// SAFETY: the pointers lead into `region`, which is shared memory and stays mapped; the ring is
// moved to another thread as a whole and is not `Sync`.
unsafe impl Send for Ring {}

impl Ring {
    /// Lays an empty ring into guest memory.
    pub fn new(memory: &Memory, index: u16, layout: RingLayout) -> Result<Self> {
        let RingLayout { size, descriptors, available, used } = layout;
        if size == 0 || !size.is_power_of_two() || size > 1 << 15 {
            return Err(Error::invalid(format!("ring size {size} is not a power of two")));
        }
        let aligned = |address: u64, align| address.is_multiple_of(align);
        if !aligned(descriptors, 16) || !aligned(available, 2) || !aligned(used, 4) {
            return Err(Error::invalid(format!("ring parts are misaligned: {layout:x?}")));
        }
        let n = u64::from(size);
        let region = memory.region_of(descriptors, DESC_LEN * n)?.clone();
        let outside =
            || Error::new(ErrorKind::OutOfRange, "the parts of a ring must lie in one region");
        let descriptors = region.pointer(descriptors, DESC_LEN * n).ok_or_else(outside)?;
        let available = region.pointer(available, 6 + 2 * n).ok_or_else(outside)?;
        let used = region.pointer(used, 6 + 8 * n).ok_or_else(outside)?;
        let event = |flags| Ok::<_, Error>(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | flags)?));
        let mut ring = Ring {
            index,
            layout,
            region,
            descriptors,
            available,
            used,
            event_idx: false,
            next_available: 0,
            considered: 0,
            next_used: 0,
            free: Vec::new(),
            chains: vec![Vec::new(); usize::from(size)],
            kick: event(EventfdFlags::NONBLOCK)?,
            // Blocking: a load generator sleeps in a plain read of it.
            call: event(EventfdFlags::empty())?,
            err: event(EventfdFlags::NONBLOCK)?,
            counters: RingCounters::default(),
        };
        ring.reset();
        Ok(ring)
    }

    /// Empties the ring, as a driver does after a device reset: memory zeroed, indices at 0.
    pub fn reset(&mut self) {
        let n = u64::from(self.layout.size);
        let parts =
            [(self.descriptors, DESC_LEN * n), (self.available, 6 + 2 * n), (self.used, 6 + 8 * n)];
        for (part, len) in parts {
            // SAFETY: `new` checked that the part is mapped with this length.
            unsafe { std::ptr::write_bytes(part, 0, len as usize) };
        }
        self.next_available = 0;
        self.considered = 0;
        self.next_used = 0;
        self.free = (0..self.layout.size).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
    }

    /// A second view of this ring: same memory, same eventfds, bookkeeping as of now.
    ///
    /// For a control thread that has to tell a new back-end about a ring while another thread
    /// drives it. The view must not push, take or wait.
    pub fn view(&self) -> Ring {
        Ring {
            index: self.index,
            layout: self.layout,
            region: self.region.clone(),
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            event_idx: self.event_idx,
            next_available: self.next_available,
            considered: self.considered,
            next_used: self.next_used,
            free: Vec::new(),
            chains: Vec::new(),
            kick: self.kick.clone(),
            call: self.call.clone(),
            err: self.err.clone(),
            counters: self.counters,
        }
    }

    /// Number of the queue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Where the ring lies.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The parts' addresses in this process: descriptors, available, used. This is what goes over
    /// the wire.
    pub fn user_addresses(&self) -> (u64, u64, u64) {
        (self.descriptors as u64, self.available as u64, self.used as u64)
    }

    /// Whether notifications are suppressed by index; to be set as negotiated, before the start.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.event_idx = event_idx;
    }

    /// The eventfd by which we notify the device.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The eventfd by which the device interrupts us.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The eventfd by which the device reports a broken ring.
    pub fn err_fd(&self) -> BorrowedFd<'_> {
        self.err.as_fd()
    }

    /// Counted so far.
    pub fn counters(&self) -> RingCounters {
        self.counters
    }

    /// Next index of the available ring that will be filled.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Next index of the used ring that will be read.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Descriptors that are free.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// A 16-bit word of the available or used ring.
    fn word(&self, part: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: callers name words inside of the parts that `new` checked, at even offsets of
        // parts aligned to 2; the region lives as long as `self`, and both processes use such
        // words only as whole words.
        unsafe { AtomicU16::from_ptr(part.add(offset).cast()) }
    }

    /// Offset of used_event in the available ring.
    fn used_event(&self) -> usize {
        4 + 2 * usize::from(self.layout.size)
    }

    /// Offset of avail_event in the used ring.
    fn avail_event(&self) -> usize {
        4 + 8 * usize::from(self.layout.size)
    }

    /// Writes one descriptor of the table, whatever it says. Panics if there is no such index.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        assert!(index < self.layout.size, "descriptor {index} of {}", self.layout.size);
        let bytes = descriptor.to_bytes();
        // SAFETY: the index was checked, so the 16 bytes are inside of the table.
        unsafe {
            let to = self.descriptors.add(usize::from(index) * bytes.len());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Takes a descriptor out of the free ones, for callers that lay their own chains.
    pub fn take_descriptor(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Lays a chain of descriptors into the table and returns its head. Nothing is published.
    pub fn add_chain(&mut self, segments: &[Segment]) -> Result<u16> {
        if segments.is_empty() || segments.len() > self.free.len() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("{} descriptors wanted, {} free", segments.len(), self.free.len()),
            ));
        }
        let taken: Vec<u16> = self.free.split_off(self.free.len() - segments.len());
        for (i, mut descriptor) in chain(segments, 0).into_iter().enumerate() {
            descriptor.next = taken.get(i + 1).copied().unwrap_or(0);
            self.write_descriptor(taken[i], descriptor);
        }
        let head = taken[0];
        self.chains[usize::from(head)] = taken;
        Ok(head)
    }

    /// Lays one descriptor that points to an indirect table of `count` descriptors.
    pub fn add_indirect(&mut self, table: u64, count: u16) -> Result<u16> {
        let head = self.add_chain(&[Segment {
            addr: table,
            len: u32::from(count) * DESC_LEN as u32,
            writable: false,
        }])?;
        self.write_descriptor(
            head,
            Descriptor {
                addr: table,
                len: u32::from(count) * DESC_LEN as u32,
                flags: DESC_INDIRECT,
                next: 0,
            },
        );
        Ok(head)
    }

    /// Frees the descriptors of a chain that [`Ring::add_chain`] laid. False if `head` is no head.
    pub fn free_chain(&mut self, head: u32) -> bool {
        let Some(chain) = self.chains.get_mut(head as usize).filter(|c| !c.is_empty()) else {
            return false;
        };
        self.free.append(chain);
        true
    }

    /// Puts a head into the available ring; the device does not see it before
    /// [`Ring::publish`]. Any number goes.
    pub fn push(&mut self, head: u16) {
        let slot = self.next_available & (self.layout.size - 1);
        self.word(self.available, 4 + 2 * usize::from(slot)).store(head.to_le(), Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows everything pushed to the device.
    pub fn publish(&mut self) {
        self.word(self.available, 2).store(self.next_available.to_le(), Ordering::Release);
    }

    /// Stores any available index, as a hostile driver would.
    pub fn force_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.publish();
    }

    /// Whether the device wants to be told of what was published since the last call.
    pub fn kick_wanted(&mut self) -> bool {
        let (old, new) = (self.considered, self.next_available);
        self.considered = new;
        if old == new {
            return false;
        }
        // The index store must be visible before we look at the device's wish.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event =
                u16::from_le(self.word(self.used, self.avail_event()).load(Ordering::Relaxed));
            passed(event, old, new)
        } else {
            let flags = u16::from_le(self.word(self.used, 0).load(Ordering::Relaxed));
            flags & USED_NO_NOTIFY == 0
        }
    }

    /// Kicks if the device wants it. Says whether it did.
    pub fn kick_if_wanted(&mut self) -> Result<bool> {
        let wanted = self.kick_wanted();
        if wanted {
            self.kick()?;
        }
        Ok(wanted)
    }

    /// Kicks, wanted or not.
    pub fn kick(&mut self) -> Result<()> {
        self.counters.kicks += 1;
        match rustix::io::write(&*self.kick, &1u64.to_ne_bytes()) {
            // The counter is full: the device has been told often enough.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// The available index, as the device sees it.
    pub fn available_index(&self) -> u16 {
        u16::from_le(self.word(self.available, 2).load(Ordering::Acquire))
    }

    /// The device's used index.
    pub fn used_index(&self) -> u16 {
        u16::from_le(self.word(self.used, 2).load(Ordering::Acquire))
    }

    /// Whether a used element waits.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// Takes the next used element, if there is one.
    pub fn take_used(&mut self) -> Option<UsedElement> {
        if !self.has_used() {
            return None;
        }
        let element = self.used_at(self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
        Some(element)
    }

    /// Takes the next used element, which the caller knows to be below an index from
    /// [`Ring::used_index`].
    pub fn take_used_below(&mut self, index: u16) -> Option<UsedElement> {
        if self.next_used == index {
            return None;
        }
        let element = self.used_at(self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
        Some(element)
    }

    /// The used element at an index.
    pub fn used_at(&self, index: u16) -> UsedElement {
        let slot = usize::from(index & (self.layout.size - 1));
        // SAFETY: the slot was reduced to the ring's size, so its 8 bytes are inside of the part;
        // the part is aligned to 4.
        let (id, len) = unsafe {
            let at = self.used.add(4 + 8 * slot).cast::<u32>();
            (at.read_volatile(), at.add(1).read_volatile())
        };
        UsedElement { id: u32::from_le(id), len: u32::from_le(len) }
    }

    /// Asks for an interrupt at the next used element. False if one waits already: then there may
    /// be none, and the caller must not sleep.
    pub fn want_interrupt(&mut self) -> bool {
        if self.event_idx {
            self.word(self.available, self.used_event())
                .store(self.next_used.to_le(), Ordering::Relaxed);
        } else {
            self.word(self.available, 0).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the last look.
        fence(Ordering::SeqCst);
        !self.has_used()
    }

    /// Asks for no more interrupts. With EVENT_IDX there is nothing to do: the event stays behind.
    pub fn refuse_interrupts(&mut self) {
        if !self.event_idx {
            self.word(self.available, 0).store(AVAIL_NO_INTERRUPT.to_le(), Ordering::Relaxed);
        }
    }

    /// Waits until a used element is there.
    pub fn wait_used(&mut self, deadline: Instant) -> Result<()> {
        while self.want_interrupt() {
            wait_for(&*self.call, PollFlags::IN, deadline, "a completion")?;
            self.read_call()?;
        }
        Ok(())
    }

    /// Sleeps in one system call until the device interrupts or a [`Waker`] wakes; false if it was
    /// the waker. Callers arrange for a waker to fire at their deadline.
    pub fn sleep(&mut self) -> Result<bool> {
        Ok(self.read_call()? & !(WAKE - 1) == 0)
    }

    /// Reads the call eventfd, and counts the interrupts in it.
    fn read_call(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        loop {
            match rustix::io::read(&*self.call, &mut bytes) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                // The flag belongs to the description that both sides share, and some back-ends
                // (qemu-storage-daemon) set it. All back-ends should meet a driver that sleeps
                // alike, by one system call, so it is taken away again.
                Err(Errno::AGAIN) => {
                    let flags = rustix::fs::fcntl_getfl(&*self.call)?;
                    rustix::fs::fcntl_setfl(&*self.call, flags - OFlags::NONBLOCK)?;
                }
                Err(err) => return Err(err.into()),
            }
        }
        let value = u64::from_ne_bytes(bytes);
        self.counters.interrupts += value & (WAKE - 1);
        self.counters.wakeups += u64::from(value & (WAKE - 1) != 0);
        Ok(value)
    }

    /// Counts interrupts that came unawaited, without sleeping.
    pub fn drain_interrupts(&mut self) -> Result<()> {
        match wait_for(&*self.call, PollFlags::IN, Instant::now(), "an interrupt") {
            Ok(()) => self.read_call().map(|_| ()),
            Err(err) if err.errno() == Some(libc::ETIMEDOUT) => Ok(()),
            Err(err) => Err(err),
        }
    }

    /// Waits for the device to report the ring as broken.
    pub fn wait_broken(&self, deadline: Instant) -> Result<()> {
        wait_for(&*self.err, PollFlags::IN, deadline, "the device to report a broken ring").map_err(
            |err| match err.errno() {
                Some(libc::ETIMEDOUT) => timed_out("the device to report a broken ring"),
                _ => err,
            },
        )
    }

    /// Something by which another thread ends [`Ring::sleep`].
    pub fn waker(&self) -> Waker {
        Waker { call: self.call.clone() }
    }

    /// The region that holds the ring.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

/// Ends the sleep of a ring's driver.
#[derive(Clone, Debug)]
pub struct Waker {
    /// The ring's call eventfd.
    call: Arc<OwnedFd>,
}

impl Waker {
    /// Wakes the driver, now or when it next sleeps.
    pub fn wake(&self) -> Result<()> {
        rustix::io::write(&*self.call, &WAKE.to_ne_bytes())?;
        Ok(())
    }
}

/// Whether an index that went from `old` to `new` passed `event`.
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::memory::Pages;
    use std::time::Duration;

    fn ring(size: u16) -> (Memory, Ring) {
        let memory = Memory::with_region(0x1000, 1 << 20, Pages::Small).unwrap();
        let ring = Ring::new(&memory, 0, RingLayout::contiguous(0x1000, size)).unwrap();
        (memory, ring)
    }

    /// Plays the device: completes `count` elements from used index `from`.
    fn complete(memory: &Memory, layout: RingLayout, from: u16, ids: &[u32]) {
        for (i, id) in ids.iter().enumerate() {
            let slot = u64::from(from.wrapping_add(i as u16) % layout.size);
            memory.write(layout.used + 4 + 8 * slot, &id.to_le_bytes()).unwrap();
            memory.write(layout.used + 8 + 8 * slot, &7u32.to_le_bytes()).unwrap();
        }
        let index = from.wrapping_add(ids.len() as u16);
        memory.write(layout.used + 2, &index.to_le_bytes()).unwrap();
    }

    #[test]
    fn chains_are_linked_and_freed() {
        let (memory, mut ring) = ring(4);
        let segment = |addr, writable| Segment { addr, len: 16, writable };
        let head =
            ring.add_chain(&[segment(1, false), segment(2, true), segment(3, true)]).unwrap();
        assert!(ring.add_chain(&[segment(1, false), segment(2, true)]).is_err());
        let table = ring.layout().descriptors;
        let (mut at, mut addrs, mut flags) = (head, vec![], vec![]);
        loop {
            let bytes = memory.read_vec(table + 16 * u64::from(at), 16).unwrap();
            addrs.push(bytes[0]);
            flags.push(bytes[12]);
            if u16::from(bytes[12]) & DESC_NEXT == 0 {
                break;
            }
            at = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
        assert_eq!(addrs, [1, 2, 3]);
        assert_eq!(flags, [1, 3, 2]);
        assert!(ring.free_chain(u32::from(head)));
        assert!(!ring.free_chain(u32::from(head)));
        assert!(!ring.free_chain(70000));
        assert_eq!(ring.free_descriptors(), 4);
    }

    #[test]
    fn pushed_heads_show_up_at_publication() {
        let (memory, mut ring) = ring(4);
        let layout = ring.layout();
        ring.push(3);
        ring.push(1);
        assert_eq!(memory.read_vec(layout.available + 2, 2).unwrap(), [0, 0]);
        ring.publish();
        assert_eq!(memory.read_vec(layout.available + 2, 6).unwrap(), [2, 0, 3, 0, 1, 0]);
    }

    #[test]
    fn kicks_follow_the_flag_without_event_idx() {
        let (memory, mut ring) = ring(4);
        ring.push(0);
        ring.publish();
        assert!(ring.kick_wanted());
        assert!(!ring.kick_wanted(), "nothing new");
        memory.write(ring.layout().used, &[1]).unwrap();
        ring.push(0);
        ring.publish();
        assert!(!ring.kick_if_wanted().unwrap());
        assert_eq!(ring.counters().kicks, 0);
    }

    #[test]
    fn kicks_follow_the_index_with_event_idx() {
        let (memory, mut ring) = ring(4);
        ring.set_event_idx(true);
        let event = ring.layout().used + 4 + 8 * 4;
        let publish = |ring: &mut Ring, count: u16| {
            (0..count).for_each(|_| ring.push(0));
            ring.publish();
            ring.kick_wanted()
        };
        assert!(publish(&mut ring, 1), "event 0 is passed by index 1");
        assert!(!publish(&mut ring, 2), "event 0 lies behind");
        memory.write(event, &[4]).unwrap();
        assert!(!publish(&mut ring, 1), "index 4 reaches event 4 but does not pass it");
        assert!(publish(&mut ring, 3), "index 7 passes it in the middle of a batch");
        // Across the wrap of the index.
        ring.force_available_index(0xfffe);
        ring.kick_wanted();
        memory.write(event, &0xffffu16.to_le_bytes()).unwrap();
        assert!(!publish(&mut ring, 1));
        assert!(publish(&mut ring, 1));
    }

    #[test]
    fn used_elements_come_in_order_across_the_wrap() {
        let (memory, mut ring) = ring(4);
        let layout = ring.layout();
        assert_eq!(ring.take_used(), None);
        complete(&memory, layout, 0, &[2, 9, 1]);
        assert_eq!(ring.take_used(), Some(UsedElement { id: 2, len: 7 }));
        assert_eq!(ring.take_used().unwrap().id, 9);
        assert_eq!(ring.take_used().unwrap().id, 1);
        assert_eq!(ring.take_used(), None);
        complete(&memory, layout, 3, &[3, 0]);
        assert_eq!(ring.take_used().unwrap().id, 3);
        assert_eq!(ring.take_used().unwrap().id, 0);
        assert!(ring.want_interrupt());
        ring.set_event_idx(true);
        assert!(ring.want_interrupt());
        let event = memory.read_vec(layout.available + 4 + 8, 2).unwrap();
        assert_eq!(event, [5, 0]);
    }

    #[test]
    fn waits_count_interrupts_and_keep_deadlines() {
        let (memory, mut ring) = ring(4);
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(ring.wait_used(soon).unwrap_err().errno(), Some(libc::ETIMEDOUT));
        rustix::io::write(ring.call_fd(), &3u64.to_ne_bytes()).unwrap();
        assert!(ring.sleep().unwrap());
        assert_eq!(ring.counters().interrupts, 3);
        assert_eq!(ring.counters().wakeups, 1);
        ring.waker().wake().unwrap();
        assert!(!ring.sleep().unwrap());
        assert_eq!(ring.counters().interrupts, 3);
        // A back-end that makes the descriptor non-blocking does not make the driver spin.
        rustix::fs::fcntl_setfl(ring.call_fd(), OFlags::NONBLOCK).unwrap();
        let waker = ring.waker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.wake().unwrap();
        });
        assert!(!ring.sleep().unwrap());
        thread.join().unwrap();
        // A used element that is there already needs no interrupt.
        complete(&memory, ring.layout(), 0, &[1]);
        ring.wait_used(Instant::now()).unwrap();
        ring.drain_interrupts().unwrap();
    }
}
