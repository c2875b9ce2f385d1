//! The exact sequences of QEMU, Cloud Hypervisor, Firecracker and the `vhost` crate.

use super::*;

/// The trace of QEMU with SeaBIOS: connect, machine reset, start, stop, start with another driver.
#[test]
fn qemu_from_firmware_to_os() {
    let fe = FrontEnd::new(2);
    // Connect. SET_OWNER is the seventh message [3].
    let offered = long(&fe.ask(R::GET_FEATURES, &[]));
    let protocol = fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    assert_eq!(long(&protocol), features::protocol_features().bits());
    fe.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
    assert_eq!(long(&fe.ask(R::GET_QUEUE_NUM, &[])), 2);
    assert_eq!(long(&fe.ask(R::GET_MAX_MEM_SLOTS, &[])), 509);
    let channel = fe.channel();
    fe.tell(R::SET_OWNER, &[], &[]);
    assert_eq!(long(&fe.ask(R::GET_FEATURES, &[])), offered);
    for queue in 0..2 {
        fe.tell(R::SET_VRING_CALL, &longs(&[queue]), &[event().as_fd()]);
        fe.tell(R::SET_VRING_ERR, &longs(&[queue]), &[event().as_fd()]);
    }
    assert_eq!(fe.config(0, 57).len(), 57);
    // Machine reset, before any SET_FEATURES, without NEED_REPLY [23].
    fe.tell(R::RESET_DEVICE, &[], &[]);
    fe.tell(R::RESET_DEVICE, &[], &[]);
    // SeaBIOS starts the disk: no FLUSH, no EVENT_IDX.
    let seabios = 0x1_4000_0044;
    let start = |features: u64, region: &Region, add_memory: bool| {
        fe.tell(R::SET_FEATURES, &longs(&[features]), &[]);
        assert!(fe.set_inflight(region));
        fe.tell(R::SET_VRING_CALL, &longs(&[0]), &[event().as_fd()]);
        fe.tell(R::SET_FEATURES, &longs(&[features]), &[]);
        if add_memory {
            fe.add_memory();
        }
        fe.set_ring(0, 0);
    };
    let region = fe.get_inflight(TWO_OF_128);
    start(seabios, &region, true);
    assert!(fe.rings.live().is_empty(), "not enabled yet");
    // ENABLE for all queues, though SeaBIOS never set up queue 1 [18].
    assert!(fe.enable(0, true));
    assert!(fe.enable(1, true));
    assert_eq!(fe.rings.live(), [0]);
    fe.rings.with_ring(0, |ring| {
        assert!(ring.call.is_some() && ring.err.is_some() && ring.kick.is_some());
        assert!(ring.inflight.is_some() && ring.dirty_log.is_none());
        assert_eq!(ring.features, seabios);
    });
    let calls = fe.calls();
    assert!(matches!(
        calls[..],
        [
            Call::DirtyLog(false),
            Call::DirtyLog(false),
            Call::Memory(1),
            Call::Session(Session::New(_)),
            Call::WriteThrough(true),
            Call::Start { index: 0, size: 128, base: 0 },
        ]
    ));
    // Stop: ENABLE(0) for all, GET_VRING_BASE for what ran.
    fe.rings.set_popped(17);
    assert!(fe.enable(0, false) && fe.enable(1, false));
    assert_eq!(fe.vring_base(0), 17);
    assert_eq!(fe.calls(), [Call::Stop(0)]);
    // Guest reset, and the OS with another region and other features [24].
    fe.tell(R::RESET_DEVICE, &[], &[]);
    let region = fe.get_inflight(TWO_OF_128);
    start(FEATURES, &region, false);
    fe.set_ring(1, 0);
    assert!(fe.enable(0, true) && fe.enable(1, true));
    assert_eq!(fe.rings.live(), [0, 1]);
    let calls = fe.calls();
    assert_eq!(starts(&calls), [(0, 0), (1, 0)]);
    assert!(calls.contains(&Call::WriteThrough(false)));
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::New(_)))));
    // It had read the config space: nothing to tell.
    assert_eq!(changes(&channel), 0);
    let rings = fe.rings.clone();
    assert_eq!(fe.leave().unwrap(), Ended::FrontEndLeft);
    assert_eq!(
        rings.take_calls(),
        [Call::Stop(0), Call::Stop(1), Call::Memory(0), Call::DirtyLog(false), Call::Disconnected]
    );
}

/// QEMU with `reconnect`: no GET_CONFIG, no GET_INFLIGHT_FD, its kept region, BASE from used index.
#[test]
fn qemu_reconnects() {
    let fe = FrontEnd::new(1);
    fe.negotiate(FEATURES);
    fe.config(0, 57);
    let region = fe.get_inflight((1, 128));
    assert!(fe.set_inflight(&region));
    fe.add_memory();
    fe.set_ring(0, 0);
    assert!(fe.enable(0, true));
    let calls = fe.calls();
    let Some(Call::Session(Session::New(nonce))) =
        calls.iter().find(|call| matches!(call, Call::Session(_)))
    else {
        panic!("{calls:?}");
    };
    let (device, rings) = (fe.device.clone(), fe.rings.clone());
    fe.leave().unwrap();

    // Same size: nothing to tell. Another size: told once rings run [40].
    for (capacity, told) in [(1 << 20, 0), (2 << 20, 1), (2 << 20, 1)] {
        rings.set_capacity(capacity);
        let fe = FrontEnd::connect(&device, &rings);
        fe.negotiate(FEATURES);
        let channel = fe.channel();
        assert!(fe.set_inflight(&region));
        fe.add_memory();
        fe.set_ring(0, 40);
        fe.sync();
        assert_eq!(changes(&channel), 0, "not before rings run");
        rings.take_calls();
        assert!(fe.enable(0, true));
        let calls = fe.calls();
        assert_eq!(calls[0], Call::Session(Session::Returned(*nonce)));
        assert_eq!(starts(&calls), [(0, 40)]);
        // A front-end that was told and did not look is told again by the next connection.
        assert_eq!(changes(&channel), told);
        fe.leave().unwrap();
    }

    // A new process knows nothing of what was told.
    let rings = MockRings::new(1);
    let fe = FrontEnd::connect(&Device::new("test", rings.clone()), &rings);
    fe.negotiate(FEATURES);
    let channel = fe.channel();
    assert!(fe.set_inflight(&region));
    fe.add_memory();
    fe.set_ring(0, 40);
    assert!(fe.enable(0, true));
    assert_eq!(changes(&channel), 1);
    assert!(rings.take_calls().contains(&Call::Session(Session::Returned(*nonce))));
}

/// Cloud Hypervisor: memory as a table, NUM of all rings first, the channel last; pause, snapshot,
/// restore [17, 21, 22].
#[test]
fn cloud_hypervisor() {
    let fe = FrontEnd::new(2);
    fe.tell(R::SET_OWNER, &[], &[]);
    let offered = long(&fe.ask(R::GET_FEATURES, &[]));
    let protocol = fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    fe.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
    assert_eq!(long(&fe.ask(R::GET_QUEUE_NUM, &[])), 2);
    // Versions up to 50 count the config space from 0x100.
    assert_eq!(fe.config(0x100, 60), fe.config(0, 60));
    let features = FEATURES | CONFIG_WCE;
    assert_eq!(features & !offered, 0);
    let start = |fe: &FrontEnd, region: &Region, base: u32| {
        assert!(fe.accepts(R::SET_FEATURES, &longs(&[features]), &[]));
        let mut table = words(&[1, 0]);
        table.extend(longs(&[0, MEMORY, BASE, 0]));
        assert!(fe.accepts(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]));
        for queue in 0..2 {
            assert!(fe.accepts(R::SET_VRING_NUM, &words(&[queue, 128]), &[]));
        }
        assert!(fe.set_inflight(region));
        for queue in 0..2u32 {
            let index = longs(&[queue.into()]);
            assert!(fe.accepts(R::SET_VRING_ADDR, &areas(queue, None), &[]));
            assert!(fe.accepts(R::SET_VRING_BASE, &words(&[queue, base]), &[]));
            assert!(fe.accepts(R::SET_VRING_CALL, &index, &[event().as_fd()]));
            assert!(fe.accepts(R::SET_VRING_KICK, &index, &[event().as_fd()]));
        }
        assert!(fe.enable(0, true) && fe.enable(1, true));
        assert_eq!(fe.rings.live(), [0, 1]);
    };
    let region = fe.get_inflight(TWO_OF_128);
    start(&fe, &region, 0);
    let channel = fe.channel();
    assert_eq!(changes(&channel), 0);
    fe.rings.take_calls();
    // Pause and resume: positions are kept.
    fe.rings.set_popped(9);
    assert!(fe.enable(0, false) && fe.enable(1, false));
    assert!(fe.rings.live().is_empty());
    assert!(fe.enable(0, true) && fe.enable(1, true));
    let calls = fe.calls();
    assert_eq!(starts(&calls), [(0, 9), (1, 9)]);
    assert!(!calls.iter().any(|call| matches!(call, Call::Session(_))), "the same session");
    // A running device is not saved.
    let (read, write) = std::io::pipe().unwrap();
    fe.tell(R::SET_DEVICE_STATE_FD, &words(&[0, 0]), &[write.as_fd()]);
    assert_eq!(long(&fe.answer(R::SET_DEVICE_STATE_FD).0), 0x101);
    // Snapshot.
    *fe.rings.identity.lock().unwrap() =
        DiskIdentity { content: Some([5; 4]), ..DiskIdentity::default() };
    assert!(fe.set_config(32, &[0]));
    assert!(fe.enable(0, false) && fe.enable(1, false));
    assert_eq!((fe.vring_base(0), fe.vring_base(1)), (18, 18));
    fe.tell(R::SET_DEVICE_STATE_FD, &words(&[0, 0]), &[write.as_fd()]);
    assert_eq!(long(&fe.answer(R::SET_DEVICE_STATE_FD).0), 0x100);
    drop(write);
    let mut blob = Vec::new();
    File::from(OwnedFd::from(read)).read_to_end(&mut blob).unwrap();
    assert_eq!(long(&fe.ask(R::CHECK_DEVICE_STATE, &[])), 0);
    let saved = DeviceState::from_bytes(&blob).unwrap().unwrap();
    assert!(!saved.writeback);
    assert_eq!(saved.identity.content, Some([5; 4]));
    fe.leave().unwrap();

    // Restore, before SET_FEATURES and memory. The pipe is filled after our answer.
    let restore = |blob: &[u8], identity: DiskIdentity| {
        let fe = FrontEnd::new(2);
        *fe.rings.identity.lock().unwrap() = identity;
        fe.ask(R::GET_FEATURES, &[]);
        let (read, mut write) = std::io::pipe().unwrap();
        fe.tell(R::SET_DEVICE_STATE_FD, &words(&[1, 0]), &[read.as_fd()]);
        assert_eq!(long(&fe.answer(R::SET_DEVICE_STATE_FD).0), 0x100);
        write.write_all(blob).unwrap();
        drop(write);
        let result = long(&fe.ask(R::CHECK_DEVICE_STATE, &[]));
        (fe, result)
    };
    let (fe, result) = restore(&blob, saved.identity);
    assert_eq!(result, 0);
    assert_eq!(fe.calls(), [Call::Writeback(false)]);
    let protocol = fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    fe.tell(R::SET_PROTOCOL_FEATURES, &protocol, &[]);
    assert_eq!(fe.config(32, 1), [0]);
    let region = fe.get_inflight(TWO_OF_128);
    start(&fe, &region, 18);
    assert!(fe.calls().contains(&Call::WriteThrough(true)));
    // An empty state is legal; one of another disk, or broken, is not.
    assert_eq!(restore(&[], saved.identity).1, 0);
    let other = DiskIdentity { content: Some([6; 4]), ..saved.identity };
    assert_eq!(restore(&blob, other).1, 1);
    assert_eq!(restore(&blob[..20], saved.identity).1, 1);
    // Asked without a transfer, there is nothing to complain about.
    assert_eq!(long(&fe.ask(R::CHECK_DEVICE_STATE, &[])), 0);
}

/// Firecracker: CONFIG only, no acks, and each ring enabled as it is set up.
#[test]
fn firecracker() {
    let fe = FrontEnd::new(1);
    fe.tell(R::SET_OWNER, &[], &[]);
    fe.ask(R::GET_FEATURES, &[]);
    fe.ask(R::GET_PROTOCOL_FEATURES, &[]);
    fe.tell(R::SET_PROTOCOL_FEATURES, &longs(&[1 << 9]), &[]);
    let features = VERSION_1 | PROTOCOL_FEATURES | features::EVENT_IDX;
    fe.tell(R::SET_FEATURES, &longs(&[features]), &[]);
    assert_eq!(fe.config(0, 60).len(), 60);
    let mut table = words(&[1, 0]);
    table.extend(longs(&[0, MEMORY, BASE, 0]));
    fe.tell(R::SET_MEM_TABLE, &table, &[fe.memory.as_fd()]);
    fe.tell(R::SET_VRING_NUM, &words(&[0, 256]), &[]);
    fe.tell(R::SET_VRING_ADDR, &areas(0, None), &[]);
    fe.tell(R::SET_VRING_BASE, &words(&[0, 0]), &[]);
    fe.tell(R::SET_VRING_CALL, &longs(&[0]), &[event().as_fd()]);
    fe.tell(R::SET_VRING_KICK, &longs(&[0]), &[event().as_fd()]);
    fe.tell(R::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    assert_eq!(
        fe.calls(),
        [
            Call::Memory(1),
            Call::Session(Session::Anonymous),
            // Its default cache type negotiates no FLUSH [15].
            Call::WriteThrough(true),
            Call::Start { index: 0, size: 256, base: 0 }
        ]
    );
    // A change of size has no way to it, and disturbs nothing.
    fe.device.notify_config_change();
    fe.sync();
    assert_eq!(fe.leave().unwrap(), Ended::FrontEndLeft);
}

/// The front-end half of the `vhost` crate, as Cloud Hypervisor and Firecracker use it.
#[test]
fn front_end_of_the_vhost_crate() {
    use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
    use vhost::vhost_user::{Frontend, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
    use vmm_sys_util::eventfd::EventFd;

    let fe = FrontEnd::new(1);
    let mut front = Frontend::from_stream(fe.socket.try_clone().unwrap(), 1);
    front.set_owner().unwrap();
    front.get_features().unwrap();
    let protocol = front.get_protocol_features().unwrap();
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(FEATURES).unwrap();
    assert_eq!(front.get_queue_num().unwrap(), 1);
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    let (_, config) = front.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    front.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert!(front.set_config(33, VhostUserConfigFlags::WRITABLE, &[0]).is_err());
    let memory = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: BASE,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&fe.memory),
    };
    front.add_mem_region(&memory).unwrap();
    front.set_vring_num(0, 128).unwrap();
    let config = VringConfigData {
        queue_max_size: 256,
        queue_size: 128,
        flags: 0,
        desc_table_addr: BASE,
        used_ring_addr: BASE + 0x2000,
        avail_ring_addr: BASE + 0x1000,
        log_addr: None,
    };
    front.set_vring_addr(0, &config).unwrap();
    front.set_vring_base(0, 3).unwrap();
    let event = EventFd::new(0).unwrap();
    front.set_vring_call(0, &event).unwrap();
    front.set_vring_kick(0, &event).unwrap();
    front.set_vring_enable(0, true).unwrap();
    assert_eq!(fe.rings.live(), [0]);
    assert_eq!(front.get_vring_base(0).unwrap(), 3);
    assert!(fe.rings.live().is_empty());
    front.remove_mem_region(&memory).unwrap();
    front.reset_device().unwrap();
}

/// A real QEMU with SeaBIOS, as far as a disk that never answers gets it: start, change of size,
/// death of the back-end and reconnection, pause, reset.
#[test]
fn real_qemu() {
    use crate::device::server::{Server, ServerSocket};
    use std::process::{Command, Stdio};

    if !Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
    {
        assert!(std::env::var_os("VUBLK_REQUIRE_GUESTS").is_none(), "no qemu-system-x86_64");
        eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let start = |capacity: u64| {
        let rings = MockRings::new(2);
        rings.set_capacity(capacity);
        let device = Device::new("disk", rings.clone());
        let socket = ServerSocket::bind(&path, None).unwrap();
        (Server::start(socket, device.clone()).unwrap(), device, rings)
    };
    let wait = |what: &str, ready: &dyn Fn() -> bool| {
        for _ in 0..1500 {
            if ready() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("waited in vain for {what}");
    };
    let (server, device, rings) = start(1 << 20);
    /// Leaves no QEMU behind, whatever fails.
    struct Killed(std::process::Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-M", "q35,memory-backend=mem", "-m", "128", "-display", "none", "-nodefaults"])
        .args(["-object", "memory-backend-memfd,id=mem,size=128M,share=on", "-qmp", "stdio"])
        .args(["-chardev", &format!("socket,id=c,path={},reconnect-ms=100", path.display())])
        .args(["-device", "vhost-user-blk-pci,chardev=c,num-queues=2,bootindex=1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut qemu = Killed(qemu);
    let mut stdin = qemu.0.stdin.take().unwrap();
    let mut qmp = |command: &str| writeln!(stdin, "{{\"execute\":\"{command}\"}}").unwrap();
    qmp("qmp_capabilities");
    wait("SeaBIOS", &|| rings.live() == [0]);
    let calls = rings.take_calls();
    println!("start: {calls:?}");
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::New(_)))));
    rings.with_ring(0, |ring| assert!(ring.inflight.is_some() && ring.call.is_some()));
    // A change of size: QEMU comes and looks.
    std::thread::sleep(Duration::from_millis(300));
    rings.set_capacity(3 << 20);
    device.notify_config_change();
    wait("GET_CONFIG", &|| device.told_capacity() == Some(3 << 11));
    assert_eq!(rings.live(), [0], "and the ring runs on");
    // Pause and go on.
    rings.set_popped(1);
    qmp("stop");
    wait("the pause", &|| rings.live().is_empty());
    qmp("cont");
    wait("going on", &|| rings.live() == [0]);
    println!("pause: {:?}", rings.take_calls());
    // Another process takes over.
    server.stop();
    let (server, device, rings) = start(4 << 20);
    wait("the reconnection", &|| rings.live() == [0]);
    wait("GET_CONFIG", &|| device.told_capacity() == Some(4 << 11));
    let calls = rings.take_calls();
    println!("reconnect: {calls:?}");
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::Returned(_)))));
    // Reset: everything from the beginning, with a new region.
    qmp("system_reset");
    wait("the end of the ring", &|| rings.live().is_empty());
    wait("SeaBIOS again", &|| rings.live() == [0]);
    let calls = rings.take_calls();
    println!("reset: {calls:?}");
    assert!(calls.iter().any(|call| matches!(call, Call::Session(Session::New(_)))));
    qmp("quit");
    assert!(qemu.0.wait().unwrap().success());
    wait("the end", &|| rings.take_calls().contains(&Call::Disconnected));
    server.stop();
}
