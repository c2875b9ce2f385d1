use super::super::testing::{BASE, FRONT_END, Guest, LEN};
use super::*;
use crate::device::mapping::tests::memfd;
use crate::device::memory::MemoryRegion;

fn pop_all(ring: &mut Ring) -> Vec<u16> {
    std::iter::from_fn(|| ring.pop()).map(Result::unwrap).collect()
}

#[test]
fn heads_go_round() {
    let mut guest = Guest::new(4);
    let mut ring = guest.ring(false);
    for round in 0..40_000u32 {
        guest.offer(3);
        guest.offer(1);
        assert_eq!(pop_all(&mut ring), [3, 1]);
        assert_eq!(ring.in_flight(), 2);
        ring.complete(1, round);
        assert!(ring.has_pending_used());
        assert_eq!(guest.used_idx(), (2 * round) as u16, "not visible yet");
        ring.complete(3, 7);
        assert!(ring.publish());
        assert!(!ring.has_pending_used());
        assert_eq!(guest.used_idx(), (2 * round + 2) as u16);
        assert_eq!(guest.used((2 * round) as u16), (1, round));
        assert_eq!(guest.used((2 * round + 1) as u16), (3, 7));
    }
    assert_eq!(ring.last_avail(), 80_000u32 as u16);
    assert_eq!(ring.used_idx(), 80_000u32 as u16);
    assert!(!ring.publish(), "nothing to publish");
}

#[test]
fn the_guests_index_is_read_once_a_batch() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(false);
    guest.offer(0);
    guest.offer(1);
    assert_eq!(ring.pop(), Some(Ok(0)));
    // An index that goes mad is not seen before the batch is through.
    guest.write_u16(guest.avail_addr() + 2, 0x7000);
    assert_eq!(ring.pop(), Some(Ok(1)));
    assert_eq!(ring.pop(), Some(Err(RingError::RunAhead { avail: 0x7000, next: 2 })));
    assert_eq!(ring.pop(), None);
    assert!(ring.broken().is_some());
    // What is in flight still completes.
    ring.complete(0, 1);
    assert!(ring.publish());
    assert_eq!(guest.used_idx(), 1);
    assert!(!ring.enable_notifications());
}

#[test]
fn bad_heads_break_the_ring() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(false);
    guest.offer(8);
    assert_eq!(ring.pop(), Some(Err(RingError::NoSuchHead { head: 8, size: 8 })));
    assert_eq!(ring.pop(), None);
    assert_eq!(ring.in_flight(), 0);

    let mut guest = Guest::new(8);
    let mut ring = guest.ring(false);
    guest.offer(5);
    guest.offer(5);
    assert_eq!(ring.pop(), Some(Ok(5)));
    assert_eq!(ring.pop(), Some(Err(RingError::HeadInFlight(5))));
    assert_eq!(ring.last_avail(), 1);

    // Reuse is right only after the guest can have seen the completion.
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(false);
    guest.offer(5);
    assert_eq!(ring.pop(), Some(Ok(5)));
    ring.complete(5, 0);
    guest.offer(5);
    assert_eq!(ring.pop(), Some(Err(RingError::HeadInFlight(5))));
}

#[test]
#[should_panic(expected = "head 5 completed twice")]
fn completing_twice_is_our_bug() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(false);
    guest.offer(5);
    assert_eq!(ring.pop(), Some(Ok(5)));
    ring.complete(5, 0);
    ring.complete(5, 0);
}

/// Pops and completes `n` requests, and publishes them as one batch.
fn batch(guest: &mut Guest, ring: &mut Ring, n: u16) -> bool {
    for head in 0..n {
        guest.offer(head);
        assert_eq!(ring.pop(), Some(Ok(head)));
        ring.complete(head, 0);
    }
    ring.publish()
}

#[test]
fn interrupts_by_flag() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(false);
    guest.set_avail_flags(1);
    assert!(batch(&mut guest, &mut ring, 1), "the first one always");
    assert!(!batch(&mut guest, &mut ring, 1));
    guest.set_avail_flags(0);
    assert!(batch(&mut guest, &mut ring, 1));
}

#[test]
fn interrupts_by_index() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(true);
    batch(&mut guest, &mut ring, 1);
    guest.set_avail_flags(1); // Means nothing with EVENT_IDX.
    guest.set_used_event(3);
    assert!(!batch(&mut guest, &mut ring, 2)); // 1 → 3
    assert!(batch(&mut guest, &mut ring, 1)); // 3 → 4: element 3 was used
    assert!(!batch(&mut guest, &mut ring, 5)); // 4 → 9
    guest.set_used_event(10);
    assert!(batch(&mut guest, &mut ring, 8)); // 9 → 17
    guest.set_used_event(16);
    assert!(!batch(&mut guest, &mut ring, 1)); // 17 → 18
}

#[test]
fn kicks_by_flag() {
    let mut guest = Guest::new(8);
    // A dead predecessor left kicks disabled.
    guest.write_u16(guest.used_addr(), 1);
    let mut ring = guest.ring(false);
    assert_eq!(guest.used_flags(), 0);
    ring.disable_notifications();
    assert_eq!(guest.used_flags(), 1);
    assert!(!ring.enable_notifications());
    assert_eq!(guest.used_flags(), 0);
    guest.offer(0);
    assert!(ring.enable_notifications(), "something came meanwhile");
    assert_eq!(ring.pop(), Some(Ok(0)));
    assert!(!ring.enable_notifications());
}

#[test]
fn kicks_by_index() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(true);
    guest.offer(0);
    guest.offer(1);
    assert_eq!(pop_all(&mut ring), [0, 1]);
    ring.disable_notifications();
    assert_eq!((guest.avail_event(), guest.used_flags()), (0, 0));
    assert!(!ring.enable_notifications());
    assert_eq!(guest.avail_event(), 2);
}

#[test]
fn bad_rings_do_not_start() {
    let guest = Guest::new(8);
    let try_with = |change: &dyn Fn(&mut RingConfig)| {
        let mut config = guest.config(EVENT_IDX);
        change(&mut config);
        Ring::new(config).map(|_| ()).map_err(|err| err.to_string())
    };
    assert_eq!(try_with(&|_| ()), Ok(()));
    for size in [0, 3, 2048, u16::MAX] {
        assert!(try_with(&|c| c.size = size).unwrap_err().starts_with("ring of"));
    }
    assert!(try_with(&|c| c.desc_addr += 8).unwrap_err().contains("not aligned to 16"));
    assert!(try_with(&|c| c.avail_addr += 1).unwrap_err().contains("not aligned to 2"));
    assert!(try_with(&|c| c.used_addr += 2).unwrap_err().contains("not aligned to 4"));
    assert!(try_with(&|c| c.desc_addr = 0).unwrap_err().starts_with("descriptor table: "));
    assert!(try_with(&|c| c.avail_addr = u64::MAX - 1).is_err());
    // The end of the ring must be in the region, with the event index if there is one.
    let last = BASE + FRONT_END + LEN - (4 + 8 * 8);
    assert!(try_with(&|c| c.used_addr = last).unwrap_err().starts_with("used ring: "));
    let fits = |c: &mut RingConfig| {
        c.used_addr = last;
        c.features = 0;
    };
    assert_eq!(try_with(&fits), Ok(()));
}

#[test]
fn a_new_table_is_taken_or_breaks_the_ring() {
    let mut guest = Guest::new(8);
    let mut ring = guest.ring(true);
    let far =
        MemoryRegion { guest_addr: 1 << 40, size: 4096, front_end_addr: 1 << 41, mmap_offset: 0 };
    let more = guest.memory.with_region(&far, memfd(4096)).unwrap();
    ring.set_memory(Arc::clone(&more)).unwrap();
    guest.offer(2);
    assert_eq!(ring.pop(), Some(Ok(2)));
    assert!(Arc::ptr_eq(ring.memory(), &more));
    let only_far = GuestMemory::from_regions([(far, memfd(4096))]).unwrap();
    assert!(matches!(ring.set_memory(only_far), Err(RingError::Unmapped { .. })));
    guest.offer(3);
    assert_eq!(ring.pop(), None);
    ring.complete(2, 0);
    assert!(ring.publish());
}

#[test]
fn writes_to_the_used_ring_are_logged() {
    use std::os::unix::fs::FileExt;
    let mut guest = Guest::new(1024); // The rings fill several pages.
    let log_file = memfd(4096);
    let log = DirtyLog::new(log_file.try_clone().unwrap(), 0, 4096).unwrap();
    let mut config = guest.config(EVENT_IDX);
    config.dirty_log = Some(log);
    config.log_used_addr = Some(guest.used_addr());
    let (mut ring, _) = Ring::new(config).unwrap();
    let marked = || {
        let mut map = [0u8; 4096];
        log_file.read_exact_at(&mut map, 0).unwrap();
        log_file.write_all_at(&[0; 4096], 0).unwrap();
        (0..32768u64).filter(|p| map[*p as usize / 8] & 1 << (p % 8) != 0).collect::<Vec<_>>()
    };
    let page = |offset: u64| (guest.used_addr() + offset) / 4096;
    let (start, event) = (page(0), page(4 + 8 * 1024));
    assert_eq!(marked(), [event], "from the start");
    guest.offer(0);
    ring.pop().unwrap().unwrap();
    ring.complete(0, 1);
    let _interrupt = ring.publish();
    assert_eq!(marked(), [start]);
    ring.enable_notifications();
    assert_eq!(marked(), [event]);
    ring.set_dirty_log(None, None);
    ring.enable_notifications();
    assert!(marked().is_empty());
}

/// What the guest knows: the heads it offered, in order, and what we completed, in order.
#[derive(Default)]
struct Model {
    offered: Vec<u16>,
    /// Indices into `offered`.
    completed: Vec<usize>,
}

/// Index that all counters start at, so that they wrap around soon.
const START: u16 = 65_530;

/// Copies of memory as a process that dies now leaves it.
struct Remains {
    files: [std::fs::File; 2],
    inflight: std::fs::File,
}

fn copy(file: &std::fs::File) -> std::fs::File {
    use std::os::unix::fs::FileExt;
    let len = file.metadata().unwrap().len();
    let mut bytes = vec![0; len.min(8192) as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let copy = memfd(len);
    copy.write_all_at(&bytes, 0).unwrap();
    copy
}

impl Remains {
    fn new(files: &[std::fs::File; 2], inflight: &std::fs::File) -> Remains {
        Remains { files: [copy(&files[0]), memfd(LEN)], inflight: copy(inflight) }
    }

    /// Starts a ring on them, like the process after us.
    fn start(&self, size: u16) -> (Ring, Vec<u16>) {
        let mut guest = Guest::new(size);
        guest.memory = crate::device::testing::map(&self.files);
        let mut config = guest.config(EVENT_IDX);
        config.inflight = Some(queue_of(&self.inflight, size));
        config.base = 0x4242; // Ignored.
        Ring::new(config).unwrap()
    }

    /// Recovers, and checks that exactly what the guest waits for is done, in order.
    fn check(&self, size: u16, model: &Model) {
        let (mut ring, resubmit) = self.start(size);
        let published = usize::from(ring.used_idx().wrapping_sub(START));
        let mut owed: Vec<usize> = (0..model.offered.len())
            .filter(|index| !model.completed[..published].contains(index))
            .collect();
        let next = usize::from(ring.last_avail().wrapping_sub(START));
        assert_eq!(resubmit.len(), usize::from(ring.in_flight()));
        let read_before: Vec<usize> = owed.iter().copied().filter(|i| *i < next).collect();
        let want: Vec<u16> = read_before.iter().map(|i| model.offered[*i]).collect();
        assert_eq!(resubmit, want, "in the order they were offered");
        owed.retain(|i| *i >= next);
        let rest = pop_all(&mut ring);
        let want: Vec<u16> = owed.iter().map(|i| model.offered[*i]).collect();
        assert_eq!(rest, want);
        // All of them can be completed.
        for head in resubmit.into_iter().chain(rest) {
            ring.complete(head, 0);
        }
        let _interrupt = ring.publish();
        let done = usize::from(ring.used_idx().wrapping_sub(START));
        assert_eq!(done, model.offered.len());
    }
}

fn queue_of(file: &std::fs::File, size: u16) -> InflightQueue {
    let len = file.metadata().unwrap().len();
    let file = file.try_clone().unwrap();
    let region = crate::device::inflight::InflightRegion::from_front_end(file, len, 0, 1, size);
    region.unwrap().queue(0).unwrap()
}

#[test]
fn dying_at_any_store_loses_and_repeats_nothing() {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use crate::device::inflight::InflightRegion;
    use crate::device::inflight::tests::on_each_step;

    const SIZE: u16 = 4;
    let mut guest = Guest::new(SIZE);
    for addr in [guest.avail_addr(), guest.used_addr()] {
        guest.write_u16(addr + 2, START);
    }
    guest.avail_idx = START;
    let inflight = InflightRegion::create(1, SIZE).unwrap().file;
    let model = Rc::new(RefCell::new(Model::default()));
    let deaths = Rc::new(Cell::new(0));

    let at_each_step = {
        let (model, deaths) = (Rc::clone(&model), Rc::clone(&deaths));
        let files = guest.files.each_ref().map(|f| f.try_clone().unwrap());
        let inflight = inflight.try_clone().unwrap();
        move || {
            deaths.set(deaths.get() + 1);
            let remains = Rc::new(Remains::new(&files, &inflight));
            // The process after us dies at each store of its recovery, too.
            let again = {
                let (remains, model) = (Rc::clone(&remains), Rc::clone(&model));
                move || {
                    Remains::new(&remains.files, &remains.inflight).check(SIZE, &model.borrow());
                }
            };
            on_each_step(again, || drop(remains.start(SIZE)));
            remains.check(SIZE, &model.borrow());
        }
    };

    on_each_step(at_each_step, || {
        let mut config = guest.config(EVENT_IDX);
        config.base = START;
        config.inflight = Some(queue_of(&inflight, SIZE));
        let (mut ring, resubmit) = Ring::new(config).unwrap();
        assert!(resubmit.is_empty());
        // A fixed sequence of pseudo-random choices.
        let mut seed = 1u32;
        let mut choose = |n: usize| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 16) as usize % n
        };
        let mut free: Vec<u16> = (0..SIZE).collect();
        let mut popped: Vec<u16> = Vec::new();
        let mut pending: Vec<u16> = Vec::new();
        for _ in 0..400 {
            match choose(4) {
                0 if !free.is_empty() => {
                    let head = free.swap_remove(choose(free.len()));
                    model.borrow_mut().offered.push(head);
                    guest.offer(head);
                }
                1 => popped.extend(ring.pop().map(Result::unwrap)),
                2 if !popped.is_empty() => {
                    let head = popped.swap_remove(choose(popped.len()));
                    let mut m = model.borrow_mut();
                    let index = m.offered.iter().rposition(|h| *h == head).unwrap();
                    m.completed.push(index);
                    drop(m);
                    ring.complete(head, 0);
                    pending.push(head);
                }
                3 => {
                    let _interrupt = ring.publish();
                    free.append(&mut pending);
                }
                _ => {}
            }
        }
    });
    assert!(deaths.get() > 300, "{} deaths", deaths.get());
}
