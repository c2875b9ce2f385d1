//! When a ring lives, and how it stops.

use super::*;

/// All orders of NUM, BASE, ADDR, KICK, ENABLE and memory: live with the last of them [17].
#[test]
fn a_ring_lives_when_everything_is_there_in_any_order() {
    fn permutations(items: &[usize]) -> Vec<Vec<usize>> {
        if items.is_empty() {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for (at, item) in items.iter().enumerate() {
            let mut rest = items.to_vec();
            rest.remove(at);
            for mut tail in permutations(&rest) {
                tail.insert(0, *item);
                all.push(tail);
            }
        }
        all
    }
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let kick = event();
    for order in permutations(&[0, 1, 2, 3, 4]) {
        for (n, step) in order.iter().enumerate() {
            assert!(fe.rings.live().is_empty(), "{order:?}: live before step {n}");
            match step {
                0 => fe.tell(R::SET_VRING_NUM, &words(&[0, 64]), &[]),
                1 => fe.tell(R::SET_VRING_ADDR, &areas(0, None), &[]),
                2 => fe.tell(R::SET_VRING_KICK, &longs(&[0]), &[kick.as_fd()]),
                3 => fe.tell(R::SET_VRING_ENABLE, &words(&[0, 1]), &[]),
                _ => fe.add_memory(),
            }
            fe.sync();
        }
        assert_eq!(fe.rings.live(), [0], "{order:?}");
        // Back to the beginning; memory is the only thing that a reset leaves.
        fe.tell(R::RESET_DEVICE, &[], &[]);
        assert!(fe.accepts(R::REM_MEM_REG, &region(0, MEMORY, 0), &[]));
        assert!(fe.rings.live().is_empty());
        // Its features went too; the ring started in between took what was there.
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
    }
}

#[test]
fn numbers_that_make_no_ring_are_refused_without_an_end() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    for size in [0, 3, 100, 2048, 65536, u32::MAX] {
        assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[0, size]), &[]), "size {size}");
    }
    for size in [1, 2, 1024] {
        assert!(fe.accepts(R::SET_VRING_NUM, &words(&[0, size]), &[]), "size {size}");
    }
    assert!(!fe.accepts(R::SET_VRING_BASE, &words(&[0, 0x1_0000]), &[]));
    // More queues asked for than served.
    for index in [2, 64, 255, u32::MAX] {
        assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[index, 64]), &[]));
        assert!(!fe.accepts(R::SET_VRING_BASE, &words(&[index, 0]), &[]));
        assert!(!fe.accepts(R::SET_VRING_ENABLE, &words(&[index, 1]), &[]));
        assert!(!fe.accepts(R::SET_VRING_ADDR, &areas(index, None), &[]));
        assert_eq!(fe.vring_base(index), 0, "answered, as there is no way to refuse");
    }
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        assert!(!fe.accepts(request, &longs(&[2]), &[event().as_fd()]));
        // What is no notifier.
        assert!(!fe.accepts(request, &longs(&[0]), &[fe.memory.as_fd()]));
        assert!(!fe.accepts(request, &longs(&[0]), &[File::open("/dev/zero").unwrap().as_fd()]));
    }
    assert_eq!(fe.calls(), []);
}

#[test]
fn base_of_a_ring_that_never_ran() {
    let fe = FrontEnd::new(2);
    fe.negotiate(FEATURES);
    assert_eq!(fe.vring_base(1), 0);
    assert!(fe.accepts(R::SET_VRING_BASE, &words(&[1, 77]), &[]));
    assert_eq!(fe.vring_base(1), 77);
    assert_eq!(fe.calls(), []);
}

/// The answer means that memory is quiet: it comes after the drain [20, 21].
#[test]
fn stop_and_disable_are_answered_after_the_drain() {
    for request in [R::GET_VRING_BASE, R::SET_VRING_ENABLE] {
        let fe = FrontEnd::new(1);
        fe.run(1);
        let (release, released) = mpsc::channel::<()>();
        let released = std::sync::Mutex::new(released);
        *fe.rings.on_stop.lock().unwrap() = Some(Box::new(move |_| {
            released.lock().unwrap().recv().unwrap();
        }));
        send_message(&fe.socket, request as u32, 9, &words(&[0, 0]), &[]).unwrap();
        fe.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let early = (&fe.socket).read(&mut [0]);
        assert!(early.is_err(), "{request:?} answered before the drain");
        fe.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        release.send(()).unwrap();
        fe.answer(request);
        assert!(fe.rings.live().is_empty());
    }
}

#[test]
fn get_vring_base_forgets_kick_and_call() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    fe.rings.set_popped(5);
    assert_eq!(fe.vring_base(0), 5);
    // Enabled still; it waits for a kick.
    assert!(fe.enable(0, true));
    assert!(fe.rings.live().is_empty());
    assert!(fe.accepts(R::SET_VRING_KICK, &longs(&[0]), &[event().as_fd()]));
    assert_eq!(starts(&fe.calls()), [(0, 5)], "goes on where it was");
    fe.rings.with_ring(0, |ring| assert!(ring.call.is_none()));
}

#[test]
fn notifiers_come_go_and_stay_away() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    for (value, present) in [(0, true), (0, true), (0x100, false), (0, true)] {
        let event = event();
        let files = [event.as_fd()];
        let files = if present { &files[..] } else { &[] };
        assert!(fe.accepts(R::SET_VRING_CALL, &longs(&[value]), files));
        assert!(fe.accepts(R::SET_VRING_ERR, &longs(&[value]), files));
        assert_eq!(fe.calls(), [Call::SetCall(0, present), Call::SetErr(0, present)]);
    }
    // A new kick for a live ring: drained, and on with it. No kick: polled.
    fe.rings.set_popped(3);
    assert!(fe.accepts(R::SET_VRING_KICK, &longs(&[0x100]), &[]));
    assert_eq!(fe.calls(), [Call::Stop(0), Call::Start { index: 0, size: 128, base: 3 }]);
    fe.rings.with_ring(0, |ring| assert!(ring.kick.is_none() && ring.call.is_some()));
    // Notifiers survive a pause.
    assert!(fe.enable(0, false) && fe.enable(0, true));
    fe.rings.with_ring(0, |ring| assert!(ring.call.is_some() && ring.err.is_some()));
}

#[test]
fn a_live_ring_keeps_size_base_and_addresses() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    assert!(!fe.accepts(R::SET_VRING_NUM, &words(&[0, 64]), &[]));
    assert!(fe.accepts(R::SET_VRING_NUM, &words(&[0, 128]), &[]));
    assert!(!fe.accepts(R::SET_VRING_BASE, &words(&[0, 1]), &[]));
    let mut elsewhere = areas(0, None);
    elsewhere[9] ^= 0x10;
    assert!(!fe.accepts(R::SET_VRING_ADDR, &elsewhere, &[]));
    assert_eq!(fe.calls(), []);
}

#[test]
fn a_ring_that_cannot_start_is_refused_and_tried_again() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    // No memory shared by the front-end.
    fe.set_ring(0, 0);
    assert!(!fe.enable(0, true));
    fe.add_memory();
    assert_eq!(fe.rings.live(), [0], "memory was all it lacked");
    assert!(fe.enable(0, false));
    fe.rings.take_calls();
    // Refused by the workers, as a ring and as a session.
    fe.rings.refuse_start.store(true, Ordering::SeqCst);
    assert!(!fe.enable(0, true));
    fe.rings.refuse_start.store(false, Ordering::SeqCst);
    assert!(fe.enable(0, true));
    assert!(fe.enable(0, false));
    let region = fe.get_inflight(TWO_OF_128);
    assert!(fe.set_inflight(&region));
    fe.rings.refuse_session.store(true, Ordering::SeqCst);
    assert!(!fe.enable(0, true));
    fe.rings.refuse_session.store(false, Ordering::SeqCst);
    assert!(fe.enable(0, true));
    // Addresses outside of memory.
    assert!(fe.enable(0, false));
    let mut outside = areas(0, None);
    outside[8..16].copy_from_slice(&(BASE + MEMORY - 16).to_ne_bytes());
    assert!(!fe.accepts(R::SET_VRING_ADDR, &outside, &[]) || !fe.enable(0, true));
    assert!(fe.rings.live().is_empty());
}

#[test]
fn reset_at_any_time() {
    for request in [R::RESET_DEVICE, R::RESET_OWNER] {
        let fe = FrontEnd::new(2);
        fe.run(2);
        assert!(fe.accepts(R::SET_VRING_ERR, &longs(&[0]), &[event().as_fd()]));
        fe.rings.take_calls();
        assert!(fe.accepts(request, &[], &[]));
        assert!(fe.accepts(request, &[], &[]));
        let calls = fe.calls();
        assert_eq!(calls[..2], [Call::Stop(0), Call::Stop(1)]);
        // Nothing of the rings is left but ERR; memory is, as QEMU does not send it again.
        assert!(fe.enable(0, true));
        assert!(fe.rings.live().is_empty());
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
        fe.set_ring(0, 0);
        fe.sync();
        assert_eq!(fe.rings.live(), [0]);
        fe.rings.with_ring(0, |ring| {
            assert!(ring.err.is_some());
            assert_eq!((ring.base, ring.features), (0, FEATURES));
        });
    }
}

/// A used ring that ends with the memory: the two bytes of the event index are behind it, and are there
/// only for a guest that negotiated them.
#[test]
fn a_ring_at_the_end_of_memory_needs_no_event_index_that_was_not_negotiated() {
    for (event_idx, starts) in [(0, true), (features::EVENT_IDX, false)] {
        let fe = FrontEnd::new(1);
        fe.negotiate(FEATURES | event_idx);
        fe.add_memory();
        fe.set_ring(0, 0);
        let mut at_the_end = words(&[0, 0]);
        let used = BASE + MEMORY - (4 + 8 * 128);
        at_the_end.extend(longs(&[BASE, used, BASE + 0x1000, 0]));
        assert!(fe.accepts(R::SET_VRING_ADDR, &at_the_end, &[]));
        assert_eq!(fe.enable(0, true), starts);
        if starts {
            fe.rings.with_ring(0, |ring| assert_eq!(ring.log_used, Some(used - BASE)));
            // The table changes under it.
            let more = memfd_create("more", MEMORY, false).unwrap();
            assert!(fe.accepts(R::ADD_MEM_REG, &region(4 * MEMORY, MEMORY, 0), &[more.as_fd()]));
            assert_eq!(fe.rings.live(), [0]);
        }
    }
}
