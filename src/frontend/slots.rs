//! Requests laid out beforehand, for a load generator that must not be the bottleneck.
//!
//! Each slot owns its descriptors, its header and status (on one cache line) and its data buffer.
//! Submitting again costs a few stores: type and sector into the header, the head into the
//! available ring. Nothing is allocated and, as long as a slot repeats the same type of request,
//! no descriptor is touched.

#![allow(unsafe_code)]

use std::sync::Arc;

use super::memory::{Memory, Region};
use super::request::{HEADER_LEN, ID_LEN, Layout, STATUS_UNTOUCHED, kind};
use super::ring::{DESC_INDIRECT, DESC_LEN, Descriptor, Ring, chain};
use crate::error::{Error, Result};
use crate::units::{MIB, align_up};

/// Types of requests that slots can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// Reads the data buffer.
    Read = 0,
    /// Writes the data buffer.
    Write = 1,
    /// Flushes.
    Flush = 2,
    /// Reads the serial number into the data buffer.
    GetId = 3,
}

impl SlotKind {
    /// All of them, in the order of their numbers.
    const ALL: [SlotKind; 4] = [SlotKind::Read, SlotKind::Write, SlotKind::Flush, SlotKind::GetId];

    /// The type in the header.
    fn kind(self) -> u32 {
        match self {
            SlotKind::Read => kind::IN,
            SlotKind::Write => kind::OUT,
            SlotKind::Flush => kind::FLUSH,
            SlotKind::GetId => kind::GET_ID,
        }
    }
}

/// How slots are cut into descriptors.
#[derive(Clone, Copy, Debug)]
pub struct SlotShape {
    /// Number of slots.
    pub count: u16,
    /// Bytes of each data buffer.
    pub data: u32,
    /// Most bytes of one data descriptor.
    pub segment: u32,
    /// Whether chains go into indirect tables.
    pub indirect: bool,
}

impl SlotShape {
    /// Descriptors of the longest chain.
    fn chain_len(&self) -> u64 {
        2 + u64::from(self.data.max(1)).div_ceil(u64::from(self.segment.max(1)))
    }

    /// Descriptors of the ring that all slots together need.
    pub fn ring_descriptors(&self) -> u64 {
        u64::from(self.count) * if self.indirect { 1 } else { self.chain_len() }
    }

    /// Bytes of guest memory for header, status and tables of one slot.
    fn control_len(&self) -> u64 {
        let tables = if self.indirect { 4 * DESC_LEN * self.chain_len() } else { 0 };
        (64 + tables).next_multiple_of(64)
    }

    /// Bytes from one data buffer to the next.
    fn data_stride(&self) -> u64 {
        u64::from(self.data.max(ID_LEN)).next_multiple_of(4096)
    }

    /// Alignment of the data buffers: to their own size up to that of a huge page, so that large
    /// buffers do not straddle more of those than they must.
    fn data_align(&self) -> u64 {
        self.data_stride().next_power_of_two().min(2 * MIB)
    }

    /// Bytes of guest memory that all slots together need, from an address that is a multiple of
    /// a page.
    pub fn memory(&self) -> u64 {
        let control = u64::from(self.count) * self.control_len();
        control.next_multiple_of(4096)
            + self.data_align()
            + u64::from(self.count) * self.data_stride()
    }
}

/// One slot.
#[derive(Debug)]
struct Slot {
    /// Header and, right behind it, the status byte.
    control: *mut u8,
    /// The data buffer.
    data: *mut u8,
    /// First descriptor in the ring.
    first: u16,
    /// Descriptors of each type of request: what to write into the ring from `first` on.
    descriptors: [Vec<Descriptor>; 4],
    /// Type whose descriptors are in the ring.
    current: Option<SlotKind>,
    /// Whether the device has it.
    submitted: bool,
}

/// The slots of one ring.
#[derive(Debug)]
pub struct Slots {
    /// How they are cut.
    shape: SlotShape,
    /// Keeps the buffers mapped.
    _region: Arc<Region>,
    /// The slots.
    slots: Vec<Slot>,
}

// SAFETY: the pointers lead into a region that `_region` keeps mapped; `Slots` moves to another
// thread as a whole.
unsafe impl Send for Slots {}

impl Slots {
    /// Lays slots into guest memory at `base`, a multiple of a page, and takes the descriptors
    /// they need from `ring`, which must be empty.
    pub fn new(memory: &Memory, base: u64, ring: &Ring, shape: SlotShape) -> Result<Self> {
        if shape.ring_descriptors() > u64::from(ring.size()) {
            return Err(Error::invalid(format!(
                "{} requests need {} descriptors, the ring has {}",
                shape.count,
                shape.ring_descriptors(),
                ring.size()
            )));
        }
        let base = align_up(base, 4096).ok_or_else(|| Error::invalid("no such address"))?;
        let region = memory.region_of(base, shape.memory())?.clone();
        let control_len = shape.control_len();
        let data_base =
            (base + u64::from(shape.count) * control_len).next_multiple_of(shape.data_align());
        let mut slots = Vec::with_capacity(usize::from(shape.count));
        for index in 0..u64::from(shape.count) {
            let control = base + index * control_len;
            let data = data_base + index * shape.data_stride();
            let first = index * if shape.indirect { 1 } else { shape.chain_len() };
            let mut descriptors = [const { Vec::new() }; 4];
            for kind in SlotKind::ALL {
                let chain = slot_chain(shape, kind, control, data, first as u16);
                descriptors[kind as usize] = if shape.indirect {
                    let table = control + 64 + kind as u64 * DESC_LEN * shape.chain_len();
                    let bytes: Vec<u8> = chain.iter().flat_map(|d| d.to_bytes()).collect();
                    memory.write(table, &bytes)?;
                    let (len, flags) = (bytes.len() as u32, DESC_INDIRECT);
                    vec![Descriptor { addr: table, len, flags, next: 0 }]
                } else {
                    chain
                };
            }
            let outside = || Error::invalid("slot outside of its region");
            slots.push(Slot {
                control: region.pointer(control, 64).ok_or_else(outside)?,
                data: region.pointer(data, shape.data_stride()).ok_or_else(outside)?,
                first: first as u16,
                descriptors,
                current: None,
                submitted: false,
            });
        }
        Ok(Slots { shape, _region: region, slots })
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Prepares a slot and pushes its head into the ring; the caller publishes.
    ///
    /// Panics if the device still has the slot.
    pub fn submit(&mut self, ring: &mut Ring, index: usize, kind: SlotKind, sector: u64) {
        let slot = &mut self.slots[index];
        assert!(!slot.submitted, "slot {index} is in flight");
        // SAFETY: the control line is 64 bytes of mapped memory aligned to 64, and the device
        // does not own it before the head is published.
        unsafe {
            slot.control.cast::<u32>().write_volatile(kind.kind().to_le());
            slot.control.add(8).cast::<u64>().write_volatile(sector.to_le());
            slot.control.add(HEADER_LEN as usize).write_volatile(STATUS_UNTOUCHED);
        }
        if slot.current != Some(kind) {
            for (i, descriptor) in slot.descriptors[kind as usize].iter().enumerate() {
                ring.write_descriptor(slot.first + i as u16, *descriptor);
            }
            slot.current = Some(kind);
        }
        slot.submitted = true;
        ring.push(slot.first);
    }

    /// The slot whose head a used element names, taken back from the device with its status. An
    /// error if that slot is not in flight.
    #[inline]
    pub fn complete(&mut self, id: u32) -> Result<(usize, u8)> {
        let index = if self.shape.indirect {
            id as usize
        } else {
            let chain_len = self.shape.chain_len() as usize;
            let index = id as usize / chain_len;
            if index * chain_len == id as usize { index } else { usize::MAX }
        };
        match self.slots.get_mut(index) {
            Some(slot) if slot.submitted => {
                slot.submitted = false;
                // SAFETY: the byte is mapped, and the device has given it back.
                let status = unsafe { slot.control.add(HEADER_LEN as usize).read_volatile() };
                Ok((index, status))
            }
            _ => Err(Error::corrupt(format!(
                "the back-end completed head {id}, which is not in flight"
            ))),
        }
    }

    /// Copies into the data buffer of a slot, up to its length.
    pub fn write_data(&mut self, index: usize, bytes: &[u8]) {
        let slot = &self.slots[index];
        let len = bytes.len().min(self.shape.data as usize);
        // SAFETY: the buffer is mapped with at least `shape.data` bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.data, len) };
    }

    /// Copies out of the data buffer of a slot, up to its length.
    pub fn read_data(&self, index: usize, into: &mut [u8]) {
        let slot = &self.slots[index];
        let len = into.len().min(self.shape.data as usize);
        // SAFETY: the buffer is mapped with at least `shape.data` bytes.
        unsafe { std::ptr::copy_nonoverlapping(slot.data, into.as_mut_ptr(), len) };
    }
}

/// The chain of one type of request.
fn slot_chain(
    shape: SlotShape,
    kind: SlotKind,
    control: u64,
    data: u64,
    first: u16,
) -> Vec<Descriptor> {
    // Indirect tables are numbered from 0.
    let first = if shape.indirect { 0 } else { first };
    let layout = Layout { segment: shape.segment, ..Layout::default() };
    let status = control + u64::from(HEADER_LEN);
    let data_len = match kind {
        SlotKind::Read | SlotKind::Write => shape.data,
        SlotKind::Flush => 0,
        SlotKind::GetId => ID_LEN,
    };
    let mut segments = layout.cut(control, HEADER_LEN, status, 1);
    let status = segments.pop().expect("a layout has a status");
    // The data lies apart from header and status; cut it as a readable stream of its own.
    let cut = Layout { readable: Vec::new(), ..layout };
    let mut pieces = cut.cut(data, data_len, 0, 0);
    pieces.iter_mut().for_each(|p| p.writable = kind != SlotKind::Write);
    segments.append(&mut pieces);
    segments.push(status);
    chain(&segments, first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::memory::Pages;
    use crate::frontend::ring::RingLayout;

    #[test]
    fn slots_are_reused_and_double_completions_found() {
        for indirect in [false, true] {
            let memory = Memory::with_region(0, 1 << 20, Pages::Small).unwrap();
            let mut ring = Ring::new(&memory, 0, RingLayout::contiguous(0, 64)).unwrap();
            let shape = SlotShape { count: 8, data: 8192, segment: 4096, indirect };
            let base = ring.layout().end();
            let mut slots = Slots::new(&memory, base, &ring, shape).unwrap();
            slots.submit(&mut ring, 2, SlotKind::Write, 7);
            let head = if indirect { 2 } else { 2 * 4 };
            let pushed = memory.read_vec(ring.layout().available + 4, 2).unwrap();
            assert_eq!(u32::from(pushed[0]), head);
            assert_eq!(slots.complete(head).unwrap(), (2, STATUS_UNTOUCHED));
            assert!(slots.complete(head).is_err());
            assert!(slots.complete(9999).is_err());
            slots.submit(&mut ring, 2, SlotKind::Flush, 0);
            assert_eq!(slots.complete(head).unwrap().0, 2);
            slots.write_data(2, &[5; 10]);
            let mut back = [0; 10];
            slots.read_data(2, &mut back);
            assert_eq!(back, [5; 10]);
        }
    }

    #[test]
    fn too_many_slots_for_the_ring_are_refused() {
        let memory = Memory::with_region(0, 1 << 20, Pages::Small).unwrap();
        let ring = Ring::new(&memory, 0, RingLayout::contiguous(0, 16)).unwrap();
        let shape = SlotShape { count: 8, data: 512, segment: u32::MAX, indirect: false };
        assert!(Slots::new(&memory, ring.layout().end(), &ring, shape).is_err());
    }
}
