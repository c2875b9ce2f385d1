//! Memory regions, the in-flight region and the log of dirty pages.

use super::*;

#[test]
fn regions_come_and_go_while_rings_run() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    let more = memfd_create("hotplug", MEMORY, false).unwrap();
    let hotplug = region(4 * MEMORY, MEMORY, 0);
    assert!(fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]));
    assert!(!fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]), "there is one already");
    // REM_MEM_REG may carry a file [29].
    assert!(fe.accepts(R::REM_MEM_REG, &hotplug, &[more.as_fd()]));
    assert!(!fe.accepts(R::REM_MEM_REG, &hotplug, &[]), "it is gone");
    let calls = fe.calls();
    assert_eq!(
        calls,
        [
            Call::Memory(2),
            Call::SetLogUsed(0, Some(0x2000)),
            Call::Memory(1),
            Call::SetLogUsed(0, Some(0x2000))
        ],
        "the ring was not disturbed"
    );
    // The table as a whole, with the ring's memory at another guest address.
    let mut table = words(&[1, 0]);
    table.extend(longs(&[2 * MEMORY, MEMORY, BASE, 0]));
    assert!(fe.accepts(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]));
    assert_eq!(fe.calls(), [Call::Memory(1), Call::SetLogUsed(0, Some(2 * MEMORY + 0x2000))]);
}

#[test]
fn a_ring_whose_memory_goes_is_stopped_first_and_comes_back_with_it() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    fe.add_memory();
    // Ring 1 lies in a region of its own.
    fe.set_ring(0, 0);
    fe.tell(R::SET_VRING_NUM, &words(&[1, 64]), &[]);
    let at = BASE + 4 * MEMORY;
    let mut body = words(&[1, 0]);
    body.extend(longs(&[at, at + 0x2000, at + 0x1000, 0]));
    fe.tell(R::SET_VRING_ADDR, &body, &[]);
    fe.tell(R::SET_VRING_KICK, &longs(&[1]), &[event().as_fd()]);
    let more = memfd_create("hotplug", MEMORY, false).unwrap();
    let hotplug = region(4 * MEMORY, MEMORY, 0);
    assert!(fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]));
    assert!(fe.enable(0, true) && fe.enable(1, true));
    fe.rings.take_calls();
    fe.rings.set_popped(6);
    assert!(fe.accepts(R::REM_MEM_REG, &hotplug, &[]));
    let calls = fe.calls();
    assert_eq!(calls[..2], [Call::Stop(1), Call::Memory(1)]);
    assert_eq!(fe.rings.live(), [0]);
    assert!(fe.accepts(R::ADD_MEM_REG, &hotplug, &[more.as_fd()]));
    assert_eq!(starts(&fe.calls()), [(1, 6)]);
}

#[test]
fn regions_that_lie_are_refused_without_an_end() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let file = [fe.memory.as_fd()];
    assert!(!fe.accepts(R::ADD_MEM_REG, &region(0, MEMORY + 1, 0), &file), "larger than its file");
    assert!(!fe.accepts(R::ADD_MEM_REG, &region(0, MEMORY, 4096), &file), "past its end");
    let mut table = words(&[2, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0, 0x1000, 0x1000, BASE + MEMORY, 0]));
    let files = [fe.memory.as_fd(), fe.memory.as_fd()];
    assert!(!fe.accepts(R::SET_MEM_TABLE, &table, &files), "overlap");
    assert_eq!(fe.calls(), []);
    // The slots that were announced can be had, and no more.
    for slot in 0..509 {
        let body = region(slot * 0x2000, 0x1000, 0);
        assert!(fe.accepts(R::ADD_MEM_REG, &body, &file), "slot {slot}");
    }
    assert!(!fe.accepts(R::ADD_MEM_REG, &region(MEMORY * 64, 0x1000, 0), &file));
}

#[test]
fn regions_without_a_file_end_the_connection_with_a_reason() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[]);
    fe.ended_with("no memory shared by the front-end");
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.tell(R::ADD_MEM_REG, &region(0, MEMORY, 0), &[]);
    fe.ended_with("no memory shared by the front-end");
}

#[test]
fn sessions_follow_the_region() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.add_memory();
    let session = |fe: &FrontEnd| {
        fe.set_ring(0, 0);
        assert!(fe.enable(0, true));
        fe.vring_base(0);
        let calls = fe.calls();
        calls.iter().find_map(|call| match call {
            Call::Session(session) => Some(*session),
            _ => None,
        })
    };
    assert_eq!(session(&fe), Some(Session::Anonymous));
    let first = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&first));
    let Some(Session::New(nonce)) = session(&fe) else { panic!() };
    // The same region again, as QEMU gives it at each start: the same session.
    assert!(fe.set_inflight(&first));
    assert_eq!(session(&fe), None);
    // A new one after a guest reset.
    let second = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&second));
    assert!(matches!(session(&fe), Some(Session::New(other)) if other != nonce));
    // Another back-end's region has no nonce.
    let foreign =
        Region { file: memfd_create("foreign", 1 << 16, false).unwrap(), size: 1 << 16, ..second };
    assert!(fe.set_inflight(&foreign));
    assert_eq!(session(&fe), Some(Session::Anonymous));
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();
    let fe = FrontEnd::connect(&device, &rings);
    fe.negotiate(FEATURES);
    fe.add_memory();
    assert!(fe.set_inflight(&first));
    assert_eq!(session(&fe), Some(Session::Returned(nonce)));
}

/// A session begins by settling what another one has left, which nobody may add to meanwhile.
#[test]
fn a_session_does_not_begin_under_rings_of_another() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    fe.add_memory();
    let first = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&first));
    for index in 0..2 {
        fe.set_ring(index, 0);
    }
    assert!(fe.enable(0, true));
    let second = fe.get_inflight(TWO_OF_128);
    fe.calls();
    // It was only asked for.
    assert!(fe.enable(1, true) && fe.enable(1, false));
    assert!(matches!(fe.calls()[..], [Call::Start { .. }, Call::Stop(1)]));
    assert!(fe.set_inflight(&second));
    assert!(!fe.enable(1, true));
    assert_eq!((fe.calls(), fe.rings.live()), (vec![], vec![0]));
    assert!(fe.enable(0, false) && fe.enable(1, true) && fe.enable(0, true));
    assert_eq!(fe.rings.live(), [0, 1]);
    assert!(matches!(fe.calls()[..], [Call::Stop(0), Call::Session(Session::New(_)), ..]));
}

/// One that could not begin may have ended the one before it, which has left something by then.
#[test]
fn a_session_is_taken_up_again_after_another_was_refused() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.add_memory();
    let first = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&first));
    fe.set_ring(0, 0);
    assert!(fe.enable(0, true) && fe.enable(0, false));
    let (queues, size) = TWO_OF_128;
    let other = InflightRegion::create(queues, size).unwrap();
    let other = Region { file: other.file, size: other.mmap_size, dimensions: TWO_OF_128 };
    assert!(fe.set_inflight(&other));
    fe.rings.refuse_session.store(true, Ordering::SeqCst);
    assert!(!fe.enable(0, true));
    fe.rings.refuse_session.store(false, Ordering::SeqCst);
    assert!(fe.set_inflight(&first));
    fe.calls();
    assert!(fe.enable(0, true));
    assert!(matches!(fe.calls()[..], [Call::Session(Session::Returned(_)), Call::Start { .. }]));
}

/// A guest that has switched the write cache off sends no FLUSH; a process that takes over has to
/// know, and no front-end repeats it.
#[test]
fn the_write_cache_mode_comes_back_with_the_region_and_with_nothing_else() {
    let features = FEATURES | CONFIG_WCE;
    let start = |fe: &FrontEnd, region: &Region| {
        fe.negotiate(features);
        fe.add_memory();
        assert!(fe.set_inflight(region));
        fe.set_ring(0, 0);
        assert!(fe.enable(0, true));
    };
    let fe = FrontEnd::new(1);
    fe.negotiate(features);
    let region = fe.get_inflight((1, 128));
    start(&fe, &region);
    assert!(fe.calls().contains(&Call::WriteThrough(false)));
    assert!(fe.set_config(32, &[0]));
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();
    // Another process, the same guest; whether or not the front-end looks at the config space.
    for looks in [false, true] {
        let fe = FrontEnd::new(1);
        if looks {
            fe.negotiate(features);
            assert_eq!(fe.config(32, 1), [1]);
        }
        start(&fe, &region);
        let calls = fe.calls();
        assert!(calls.contains(&Call::Writeback(false)), "{calls:?}");
        assert!(calls.contains(&Call::WriteThrough(true)), "{calls:?}");
    }
    // The same process, a new guest, which reads the config space first.
    rings.take_calls();
    let fe = FrontEnd::connect(&device, &rings);
    fe.negotiate(features);
    assert_eq!(fe.config(32, 1), [1]);
    let new = fe.get_inflight((1, 128));
    start(&fe, &new);
    let calls = fe.calls();
    assert!(calls.contains(&Call::WriteThrough(false)), "{calls:?}");
    // Reading later changes nothing.
    assert!(fe.set_config(32, &[0]));
    assert_eq!(fe.config(32, 1), [0]);
    // What this connection has set goes before what a region remembers.
    let fe = FrontEnd::new(1);
    fe.negotiate(features);
    assert!(fe.set_config(32, &[1]));
    start(&fe, &region);
    assert!(!fe.calls().contains(&Call::Writeback(false)));
}

/// The process may be killed in the drain and the flush that switching the cache off takes. The guest
/// must not come back to a cache that it believes to be off, and one that is on too long costs nothing
/// but time.
#[test]
fn the_write_cache_is_noted_as_off_before_the_flush_and_as_on_after() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES | CONFIG_WCE);
    fe.add_memory();
    let region = fe.get_inflight((1, 128));
    assert!(fe.set_inflight(&region));
    fe.set_ring(0, 0);
    assert!(fe.enable(0, true));
    let file = region.file.try_clone().unwrap();
    let view = InflightRegion::from_front_end(file, region.size, 0, 1, 128).unwrap();
    assert_eq!(view.write_cache(), Some(true));
    let (told, seen) = mpsc::channel();
    let told = std::sync::Mutex::new(told);
    *fe.rings.on_write_through.lock().unwrap() = Some(Box::new({
        let view = Arc::clone(&view);
        move |on| told.lock().unwrap().send((on, view.write_cache())).unwrap()
    }));
    assert!(fe.set_config(32, &[0]));
    assert_eq!(seen.try_recv(), Ok((true, Some(false))));
    assert!(fe.set_config(32, &[1]));
    assert_eq!(seen.try_recv(), Ok((false, Some(false))));
    assert_eq!(view.write_cache(), Some(true));
}

#[test]
fn inflight_regions_that_do_not_fit() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    fe.add_memory();
    // What cannot be made is answered with none, and none can be set.
    let none = fe.get_inflight((65, 128));
    assert_eq!(none.size, 0);
    assert!(fe.set_inflight(&none));
    // Larger than its file, smaller than its queues.
    let region = fe.get_inflight(TWO_OF_128);
    let file = memfd_create("short", 4096, false).unwrap();
    assert!(!fe.set_inflight(&Region { file, ..fe.get_inflight(TWO_OF_128) }));
    assert!(!fe.set_inflight(&Region { size: 64, ..fe.get_inflight(TWO_OF_128) }));
    assert!(fe.set_inflight(&region));
    // A ring larger than its part does not start; one outside of the region does, untracked.
    let small = fe.get_inflight((1, 64));
    assert!(fe.set_inflight(&small));
    fe.set_ring(0, 0);
    assert!(!fe.enable(0, true));
    fe.set_ring(1, 0);
    assert!(!fe.enable(1, true), "128 is more than 64");
    fe.tell(R::SET_VRING_NUM, &words(&[1, 64]), &[]);
    fe.sync();
    assert_eq!(fe.rings.live(), [1]);
    fe.rings.with_ring(1, |ring| assert!(ring.inflight.is_none()));
}

/// Each iteration of Cloud Hypervisor brings a new log and reads the old one after our answer [42].
#[test]
fn the_log_is_swapped_before_the_answer() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]));
    assert!(!fe.rings.mark(0, 1));
    let logs = [0, 1].map(|_| memfd_create("log", 4096, false).unwrap());
    let base = longs(&[4096, 0]);
    for (log, page) in logs.iter().zip([0u64, 1]) {
        fe.tell(R::SET_LOG_BASE, &base, &[log.as_fd()]);
        assert_eq!(fe.answer(R::SET_LOG_BASE).0, base);
        assert!(fe.rings.mark(page * 4096, 1));
    }
    for (log, bits) in logs.iter().zip([1, 2]) {
        let mut byte = [0];
        log.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [bits]);
    }
    assert_eq!(fe.rings.live(), [0]);
    // A ring that starts now starts with the log.
    assert!(fe.enable(0, false) && fe.enable(0, true));
    fe.rings.with_ring(0, |ring| assert!(ring.dirty_log.is_some()));
}

#[test]
fn a_log_that_cannot_be_mapped_ends_the_connection() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    let log = memfd_create("log", 100, false).unwrap();
    fe.tell(R::SET_LOG_BASE, &longs(&[4096, 0]), &[log.as_fd()]);
    fe.ended_with("SET_LOG_BASE: the migration would miss pages");
}
