//! Features and the config space.

use super::*;

#[test]
fn features_that_were_not_offered_are_refused_and_nothing_else() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    // NOTIFICATION_DATA, RING_RESET, ACCESS_PLATFORM, IN_ORDER, RING_PACKED, SIZE_MAX [6, 7, 12].
    for bit in [38, 40, 33, 35, 34, 1] {
        assert!(!fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | 1 << bit]), &[]), "bit {bit}");
    }
    // STATUS, PAGEFAULT and whatever comes after [1].
    for bit in [16, 8, 40] {
        let bits = features::protocol_features().bits() | 1 << bit;
        assert!(!fe.accepts(R::SET_PROTOCOL_FEATURES, &longs(&[bits]), &[]), "bit {bit}");
    }
    assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
}

#[test]
fn set_features_and_log_all_stop_no_ring() {
    let fe = FrontEnd::new(2);
    fe.run(2);
    let log = memfd_create("log", 4096, false).unwrap();
    let base = longs(&[4096, 0]);
    fe.tell(R::SET_LOG_BASE, &base, &[log.as_fd()]);
    assert_eq!(fe.answer(R::SET_LOG_BASE).0, base);
    assert_eq!(fe.calls(), [], "no log before LOG_ALL");
    for _ in 0..2 {
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]));
    }
    assert_eq!(fe.calls(), [Call::DirtyLog(true)]);
    // QEMU says for each live ring where its used ring is to be marked.
    for (log, told) in [(Some(0x2000), 0x2000), (None, 0x2000), (Some(0x5000), 0x5000)] {
        assert!(fe.accepts(R::SET_VRING_ADDR, &areas(0, log), &[]));
        assert_eq!(fe.calls(), [Call::SetLogUsed(0, Some(told))]);
    }
    assert!(fe.accepts(R::SET_FEATURES, &longs(&[FEATURES]), &[]));
    assert_eq!(fe.calls(), [Call::DirtyLog(false)]);
    assert_eq!(fe.rings.live(), [0, 1]);
}

#[test]
fn without_protocol_features_rings_start_enabled() {
    let fe = FrontEnd::new(2);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]);
    fe.set_ring(0, 0);
    fe.sync();
    assert!(fe.rings.live().is_empty());
    fe.tell(R::SET_FEATURES, &longs(&[VERSION_1 | FLUSH]), &[]);
    fe.sync();
    assert_eq!(fe.rings.live(), [0], "a ring that was set up before");
    fe.set_ring(1, 0);
    fe.sync();
    assert_eq!(fe.rings.live(), [0, 1], "and one after");
}

#[test]
fn a_ring_that_cannot_start_keeps_no_other_one_from_being_enabled() {
    let fe = FrontEnd::new(3);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]);
    fe.set_ring(0, 0);
    // The first one lies outside of memory.
    let mut outside = areas(0, None);
    outside[8..16].copy_from_slice(&(BASE + MEMORY).to_ne_bytes());
    fe.tell(R::SET_VRING_ADDR, &outside, &[]);
    fe.set_ring(1, 0);
    fe.tell(R::SET_FEATURES, &longs(&[VERSION_1 | FLUSH]), &[]);
    fe.set_ring(2, 0);
    fe.sync();
    assert_eq!(fe.rings.live(), [1, 2]);
    fe.tell(R::SET_VRING_ADDR, &areas(0, None), &[]);
    fe.sync();
    assert_eq!(fe.rings.live(), [0, 1, 2]);
}

#[test]
fn durability_follows_flush_and_the_write_cache() {
    let fe = FrontEnd::new(1);
    fe.run(1);
    let set = |features: u64| {
        assert!(fe.accepts(
            R::SET_FEATURES,
            &longs(&[VERSION_1 | PROTOCOL_FEATURES | features]),
            &[]
        ));
        fe.calls()
    };
    assert_eq!(set(0), [Call::WriteThrough(true)]);
    assert_eq!(set(FLUSH), [Call::WriteThrough(false)]);
    assert_eq!(set(FLUSH | CONFIG_WCE), []);
    assert!(fe.set_config(32, &[0]));
    assert_eq!(fe.calls(), [Call::Writeback(false), Call::WriteThrough(true)]);
    assert!(fe.set_config(0x120, &[1]));
    assert_eq!(fe.calls(), [Call::Writeback(true), Call::WriteThrough(false)]);
    // Without CONFIG_WCE the byte means nothing.
    assert!(fe.set_config(32, &[0]));
    fe.calls();
    assert_eq!(set(FLUSH), [Call::WriteThrough(false)]);
}

#[test]
fn config_reads_are_as_long_as_asked() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    for size in [1, 8, 36, 57, 60, 64, 256, 0xf00] {
        for offset in [0, 0x100] {
            let bytes = fe.config(offset, size);
            assert_eq!(bytes.len(), size as usize);
            if size >= 8 {
                assert_eq!(bytes[..8], 2048u64.to_le_bytes());
            }
        }
    }
}

#[test]
fn config_writes_other_than_the_cache_mode_are_refused_without_an_end() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    for (offset, bytes) in [(0, &[1u8][..]), (32, &[1, 0]), (33, &[0]), (32, &[7]), (0xf00, &[0])] {
        assert!(!fe.set_config(offset, bytes), "{bytes:?} at {offset}");
    }
    assert_eq!(fe.calls(), []);
    assert!(fe.set_config(32, &[1]));
    fe.rings.features.fetch_and(!CONFIG_WCE, Ordering::SeqCst);
    assert!(!fe.set_config(32, &[1]));
}

#[test]
fn a_change_of_size_is_told_while_rings_run_and_not_before() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    let channel = fe.channel();
    fe.config(0, 57);
    fe.device.notify_config_change();
    assert_eq!(changes(&channel), 0);
    fe.add_memory();
    fe.set_ring(0, 0);
    assert!(fe.enable(0, true));
    assert_eq!(changes(&channel), 1);
    // From another thread, while the message thread is in a drain [16].
    let (entered, in_drain) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let released = std::sync::Mutex::new(released);
    *fe.rings.on_stop.lock().unwrap() = Some(Box::new(move |_| {
        entered.send(()).unwrap();
        released.lock().unwrap().recv().unwrap();
    }));
    fe.tell(R::GET_VRING_BASE, &words(&[0, 0]), &[]);
    in_drain.recv().unwrap();
    fe.device.notify_config_change();
    assert_eq!(changes(&channel), 1);
    release.send(()).unwrap();
    fe.answer(R::GET_VRING_BASE);
    // Stopped: remembered again, unless the front-end reads it itself.
    fe.device.notify_config_change();
    fe.config(0, 57);
    *fe.rings.on_stop.lock().unwrap() = None;
    fe.set_ring(0, 0);
    fe.sync();
    assert_eq!(fe.rings.live(), [0]);
    assert_eq!(changes(&channel), 0);
}
