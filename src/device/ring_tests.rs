//! Rings and chains against somebody else's idea of them: `virtio-queue` for the ring, a plain
//! walker for chains, and a guest that changes what we are reading.

#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::{Chain, MAX_IOVECS};
use super::features::{EVENT_IDX, INDIRECT_DESC};
use super::mapping::tests::memfd;
use super::memory::{GuestMemory, MemoryRegion};
use super::request::{Kind, Limits, MAX_DATA_LEN, Parsed, Request, Status};
use super::ring::{Ring, RingConfig};
use super::testing::{BASE, Guest, INDIRECT, LEN, NEXT, SECOND, WRITE, guest_ranges};

// ---- the ring ----

/// One step of a guest or of the device.
#[derive(Clone, Copy, Debug)]
enum Step {
    Offer,
    Pop,
    Complete(usize, u32),
    Publish,
    /// Wants an interrupt this far from the used index.
    UsedEvent(i8),
    Enable,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Offer),
        4 => Just(Step::Pop),
        4 => (any::<usize>(), any::<u32>()).prop_map(|(which, len)| Step::Complete(which, len)),
        2 => Just(Step::Publish),
        1 => (-10i8..10).prop_map(Step::UsedEvent),
        1 => Just(Step::Enable),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_ring_does_what_virtio_queue_does(
        log_size in 0u32..5,
        start in any::<u16>(),
        steps in prop::collection::vec(step(), 0..250),
    ) {
        let size = 1u16 << log_size;
        let mut guest = Guest::new(size);
        let other = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(BASE), LEN as usize)]).unwrap();
        let put = |guest: &Guest, addr, value: u16| {
            guest.write_u16(addr, value);
            other.write_slice(&value.to_le_bytes(), GuestAddress(addr)).unwrap();
        };
        put(&guest, guest.avail_addr() + 2, start);
        put(&guest, guest.used_addr() + 2, start);
        guest.avail_idx = start;
        let config = RingConfig { base: start, ..guest.config(EVENT_IDX) };
        let (mut ring, _) = Ring::new(config).unwrap();
        let mut queue = Queue::new(16).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(guest.desc_addr() as u32), Some(0));
        queue.set_avail_ring_address(Some(guest.avail_addr() as u32), Some(0));
        queue.set_used_ring_address(Some(guest.used_addr() as u32), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        queue.set_next_avail(start);
        queue.set_next_used(start);
        queue.enable_notification(&other).unwrap();

        let mut free: Vec<u16> = (0..size).collect();
        let (mut popped, mut pending) = (Vec::new(), Vec::new());
        let mut first = true;
        for step in steps {
            match step {
                Step::Offer => {
                    if let Some(head) = free.pop() {
                        let slot = u64::from(guest.avail_idx % size);
                        let avail = guest.avail_addr();
                        guest.offer(head);
                        put(&guest, avail + 4 + 2 * slot, head);
                        put(&guest, avail + 2, guest.avail_idx);
                    }
                }
                Step::Pop => {
                    let ours = ring.pop().map(Result::unwrap);
                    let theirs = queue.pop_descriptor_chain(&other).map(|c| c.head_index());
                    prop_assert_eq!(ours, theirs);
                    popped.extend(ours);
                }
                Step::Complete(which, len) => {
                    if !popped.is_empty() {
                        let head = popped.swap_remove(which % popped.len());
                        ring.complete(head, len);
                        queue.add_used(&other, head, len).unwrap();
                        pending.push(head);
                    }
                }
                Step::Publish => {
                    let ours = ring.publish();
                    // An empty batch asks for nothing, the first one always for an interrupt.
                    if !pending.is_empty() {
                        let theirs = queue.needs_notification(&other).unwrap();
                        prop_assert_eq!(ours, theirs || first);
                        first = false;
                    }
                    free.append(&mut pending);
                    let used = (0..4 + 8 * u64::from(size)).map(|at| guest.used_addr() + at);
                    for addr in used {
                        let theirs: u8 = other.read_obj(GuestAddress(addr)).unwrap();
                        prop_assert_eq!(guest.read::<1>(addr)[0], theirs, "used ring at {:#x}", addr);
                    }
                }
                Step::UsedEvent(delta) => {
                    let event = ring.used_idx().wrapping_add_signed(delta.into());
                    put(&guest, guest.avail_addr() + 4 + 2 * u64::from(size), event);
                }
                Step::Enable => {
                    let theirs = queue.enable_notification(&other).unwrap();
                    prop_assert_eq!(ring.enable_notifications(), theirs);
                    let event = GuestAddress(guest.used_addr() + 4 + 8 * u64::from(size));
                    prop_assert_eq!(guest.avail_event(), other.read_obj::<u16>(event).unwrap());
                }
            }
            prop_assert_eq!(ring.last_avail(), queue.next_avail());
        }
    }
}

// ---- chains ----

const SIZE: u16 = 16;
const TABLE: u64 = BASE + 0x1_0000;
const TABLE_LEN: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A descriptor at `index` of a table of `len`: right for the most part.
fn descriptor(index: usize, len: usize) -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![
        6 => (0..LEN).prop_map(|at| BASE + at),
        2 => (0..LEN).prop_map(|at| SECOND + at),
        2 => (0..2000u64).prop_map(|at| SECOND - at),
        1 => (0..2000u64).prop_map(|at| SECOND + LEN - at),
        1 => any::<u64>(),
    ];
    let length = prop_oneof![8 => 0..3000u32, 1 => Just(0), 1 => any::<u32>()];
    let flags = prop_oneof![
        8 => Just(NEXT),
        4 => Just(NEXT | WRITE),
        2 => Just(WRITE),
        1 => Just(0),
        2 => Just(INDIRECT),
        1 => 0..8u16,
    ];
    let next = prop_oneof![
        12 => Just(((index + 1) % len) as u16),
        2 => 0..len as u16,
        1 => any::<u16>(),
    ];
    let table = prop_oneof![6 => Just(16 * TABLE_LEN as u32), 2 => 0..200u32];
    (addr, length, flags, next, table, 0..8u8).prop_map(
        |(addr, len, flags, next, table, where_)| {
            // Indirect tables are where ours is, or nowhere: nothing else is known to the reference.
            match flags & INDIRECT != 0 {
                true if where_ == 0 => Desc { addr: 0x10, len: 128, flags, next },
                true => Desc { addr: TABLE, len: table.min(16 * TABLE_LEN as u32), flags, next },
                false => Desc { addr, len, flags, next },
            }
        },
    )
}

fn descriptors(len: usize) -> impl Strategy<Value = Vec<Desc>> {
    (0..len).map(|index| descriptor(index, len)).collect::<Vec<_>>()
}

/// Readable and writable ranges by guest address.
type Ranges = (Vec<(u64, usize)>, Vec<(u64, usize)>);

/// What a chain means, straight from the specification; `None` if it is wrong.
fn reference(ring: &[Desc], indirect: &[Desc], head: u16, allowed: bool) -> Option<Ranges> {
    let (mut readable, mut writable) = Ranges::default();
    let mut table = ring;
    let mut index = usize::from(head);
    let mut visited = vec![false; table.len()];
    let mut nested = false;
    loop {
        let mut desc = *table.get(index)?;
        if desc.flags & INDIRECT != 0 {
            let entries = desc.len as usize / 16;
            let fine = allowed
                && !nested
                && desc.flags & NEXT == 0
                && entries > 0
                && desc.len % 16 == 0
                && desc.addr == TABLE;
            if !fine {
                return None;
            }
            nested = true;
            table = &indirect[..entries];
            index = 0;
            visited = vec![false; entries];
            desc = table[0];
            if desc.flags & INDIRECT != 0 {
                return None;
            }
        }
        if std::mem::replace(&mut visited[index], true) {
            return None;
        }
        let to = if desc.flags & WRITE != 0 {
            &mut writable
        } else if writable.is_empty() {
            &mut readable
        } else {
            return None;
        };
        if desc.len != 0 {
            let end = desc.addr.checked_add(desc.len.into())?;
            if desc.addr < BASE || end > SECOND + LEN {
                return None;
            }
            let cut = end.min(SECOND).max(desc.addr);
            to.extend(
                [(desc.addr, (cut - desc.addr) as usize), (cut, (end - cut) as usize)]
                    .into_iter()
                    .filter(|(_, len)| *len != 0),
            );
        }
        if desc.flags & NEXT == 0 {
            return Some((readable, writable));
        }
        index = desc.next.into();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn chains_mean_what_the_specification_says(
        ring_table in descriptors(SIZE.into()),
        indirect in descriptors(TABLE_LEN),
        head in 0..SIZE,
        allowed in prop::bool::weighted(0.9),
    ) {
        // One with a writable part of no bytes before a readable one is a matter of taste.
        let mut ring_table = ring_table;
        let mut indirect = indirect;
        for desc in ring_table.iter_mut().chain(&mut indirect) {
            if desc.flags & WRITE != 0 && desc.len == 0 && desc.flags & INDIRECT == 0 {
                desc.len = 1;
            }
        }
        let mut guest = Guest::new(SIZE);
        for (index, d) in ring_table.iter().enumerate() {
            guest.desc(index as u16, d.addr, d.len, d.flags, d.next);
        }
        for (index, d) in indirect.iter().enumerate() {
            guest.desc_in(TABLE, index as u16, d.addr, d.len, d.flags, d.next);
        }
        let features = EVENT_IDX | if allowed { INDIRECT_DESC } else { 0 };
        let mut ring = Ring::new(guest.config(features)).unwrap().0;
        guest.offer(head);
        let popped = ring.pop().unwrap().unwrap();
        let mut chain = Chain::new();
        let walked = ring.walk(popped, &mut chain);
        match reference(&ring_table, &indirect, head, allowed) {
            Some((readable, writable)) => {
                prop_assert_eq!(walked, Ok(()));
                prop_assert_eq!(guest_ranges(&guest.memory, chain.readable()), readable);
                prop_assert_eq!(guest_ranges(&guest.memory, chain.writable()), writable);
            }
            None => {
                prop_assert!(walked.is_err());
                prop_assert!(chain.readable().is_empty() && chain.writable_len() <= 1);
            }
        }
    }
}

// ---- limits ----

/// A region large enough to be named often.
const BIG: u64 = 4 << 20;

/// A ring in such a region, with an indirect table that `parts` fill, and what becomes of it.
fn big_request(kind: u32, parts: &[(u64, u32, bool)]) -> (bool, Parsed, Request, Arc<GuestMemory>) {
    use std::os::unix::fs::FileExt;
    let file = memfd(BIG);
    let region = MemoryRegion { guest_addr: BASE, size: BIG, front_end_addr: BASE, mmap_offset: 0 };
    let descriptor = |addr: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        bytes
    };
    let header = BASE + 0x8000;
    file.write_all_at(&kind.to_le_bytes(), 0x8000).unwrap();
    let mut all = vec![(header, 16, false)];
    all.extend_from_slice(parts);
    all.push((header + 0x100, 1, true));
    let mut table = Vec::new();
    for (i, (addr, len, writable)) in all.iter().enumerate() {
        let next = if i + 1 < all.len() { NEXT } else { 0 };
        let flags = next | if *writable { WRITE } else { 0 };
        table.extend(descriptor(*addr, *len, flags, i as u16 + 1));
    }
    file.write_all_at(&table, 0x10_000).unwrap();
    file.write_all_at(&descriptor(BASE + 0x10_000, table.len() as u32, INDIRECT, 0), 0).unwrap();
    file.write_all_at(&1u16.to_le_bytes(), 0x1002).unwrap();
    let memory = GuestMemory::from_regions([(region, file)]).unwrap();
    let (mut ring, _) = Ring::new(RingConfig {
        size: 16,
        desc_addr: BASE,
        avail_addr: BASE + 0x1000,
        used_addr: BASE + 0x2000,
        base: 0,
        features: INDIRECT_DESC,
        memory: Arc::clone(&memory),
        dirty_log: None,
        log_used_addr: None,
        inflight: None,
    })
    .unwrap();
    let head = ring.pop().unwrap().unwrap();
    let mut chain = Chain::new();
    let walked = ring.walk(head, &mut chain).is_ok();
    let mut request = Request::new();
    // SAFETY: the memory is returned with the request.
    let parsed = unsafe { request.parse(&chain, &Limits::new(1 << 40, 512, false, 0)) };
    (walked, parsed, request, memory)
}

#[test]
fn the_largest_requests_pass_and_larger_ones_fail() {
    let full = (MAX_DATA_LEN / BIG) as usize;
    let rest = (MAX_DATA_LEN % BIG) as u32;
    for (kind, writable) in [(0, true), (1, false)] {
        let mut parts = vec![(BASE, BIG as u32, writable); full];
        parts.push((BASE, rest, writable));
        let (walked, parsed, request, _memory) = big_request(kind, &parts);
        assert!(walked);
        assert_eq!(parsed, Parsed::Submit);
        assert_eq!(request.data_len, MAX_DATA_LEN);
        if writable {
            assert_eq!(request.kind, Kind::Read { offset: 0 });
            // SAFETY: the memory is still mapped.
            assert_eq!(unsafe { request.finish(Status::Ok) }, MAX_DATA_LEN as u32 + 1);
        }
        parts.push((BASE, 512, writable));
        let (walked, parsed, request, _memory) = big_request(kind, &parts);
        assert!(walked);
        assert_eq!(parsed, Parsed::Done(Status::IoErr));
        assert!(request.data.is_empty());
        // As many descriptors as there may be, and one more.
        let parts = vec![(BASE + 0x2_0000, 512, writable); MAX_IOVECS - 2];
        let (walked, parsed, request, _memory) = big_request(kind, &parts);
        assert!(walked);
        assert_eq!(parsed, Parsed::Submit);
        assert_eq!(request.data.len(), MAX_IOVECS - 2);
        let parts = vec![(BASE + 0x2_0000, 512, writable); MAX_IOVECS - 1];
        let (walked, parsed, ..) = big_request(kind, &parts);
        assert!(!walked);
        assert_eq!(parsed, Parsed::Done(Status::IoErr));
    }
}

#[test]
fn ranges_that_cross_regions_count_twice() {
    let mut guest = Guest::new(1024);
    for (parts, fits) in [(511, true), (512, true), (513, false)] {
        let chain: Vec<_> = (0..parts).map(|_| (SECOND - 256, 512u32, true)).collect();
        guest.chain(0, &chain);
        let mut ring = guest.ring(true);
        guest.avail_idx = 0;
        guest.write_u16(guest.avail_addr() + 2, 0);
        guest.offer(0);
        let head = ring.pop().unwrap().unwrap();
        let mut walked = Chain::new();
        assert_eq!(ring.walk(head, &mut walked).is_ok(), fits, "{parts} parts");
        assert_eq!(walked.writable().len(), if fits { 2 * parts } else { 1 });
    }
}

// ---- a guest that changes its mind ----

#[test]
fn what_changes_under_our_eyes_stays_in_memory() {
    let mut guest = Guest::new(64);
    let mut ring = guest.ring(true);
    let over = Arc::new(AtomicBool::new(false));
    let scribbler = {
        let over = Arc::clone(&over);
        let files = guest.files.each_ref().map(|file| file.try_clone().unwrap());
        let memory = super::testing::map(&files);
        std::thread::spawn(move || {
            // Through a mapping of its own, as a guest does, in single words.
            let table = memory.host_ptr(BASE, 64 * 16, &mut Default::default()).unwrap();
            let indirect = memory.host_ptr(TABLE, 64 * 16, &mut Default::default()).unwrap();
            let mut seed = 1u64;
            let mut random = |n: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) % n
            };
            while !over.load(Ordering::Relaxed) {
                let base = if random(2) == 0 { table } else { indirect };
                let addr = match random(8) {
                    0 => random(u64::MAX),
                    1 => TABLE,
                    2 => SECOND - random(600),
                    _ => BASE + random(2 * LEN),
                };
                let flags = [NEXT, NEXT | WRITE, WRITE, 0, INDIRECT][random(5) as usize];
                let len = [16, 512, 1, 64, 3000][random(5) as usize];
                let rest = len | u64::from(flags) << 32 | random(70) << 48;
                // SAFETY: both tables have 64 entries, mapped and aligned.
                unsafe {
                    let entry = base.add(16 * random(64) as usize).cast::<u64>();
                    std::sync::atomic::AtomicU64::from_ptr(entry).store(addr, Ordering::Relaxed);
                    std::sync::atomic::AtomicU64::from_ptr(entry.add(1))
                        .store(rest, Ordering::Relaxed);
                }
            }
        })
    };
    let mut chain = Chain::new();
    let mut request = Request::new();
    let limits = Limits::new(1 << 30, 512, false, u64::MAX);
    let memory = Arc::clone(&guest.memory);
    for round in 0..100_000u32 {
        guest.offer((round % 64) as u16);
        match ring.pop() {
            Some(Ok(head)) => {
                super::fuzzing::serve(&mut ring, head, &mut chain, &mut request, &memory, &limits);
                let _interrupt = ring.publish();
            }
            // A status or a used element has hit the ring's own indices.
            _ => {
                ring = {
                    guest.avail_idx = 0;
                    guest.write_u16(guest.avail_addr() + 2, 0);
                    guest.ring(true)
                };
            }
        }
    }
    over.store(true, Ordering::Relaxed);
    scribbler.join().unwrap();
}
