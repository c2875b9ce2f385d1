//! The message sequences of real front-ends, and what must hold at each stop.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vublk::frontend::client::feature;
use vublk::frontend::personality::{
    cloud_hypervisor_pause, cloud_hypervisor_resume, enable_all, qemu_reset, qemu_start, qemu_stop,
    stop_rings,
};
use vublk::frontend::{Client, Personality, Request, Ring, RingLayout, Session, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, Setup};
use crate::model::Model;

/// The used indices of all queues do not move, and all of memory stays as it is.
fn assert_quiet(session: &Session) {
    let used =
        |session: &Session| -> Vec<u16> { session.rings.iter().map(Ring::used_index).collect() };
    let region = session.memory.regions()[0].clone();
    let snapshot = || session.memory.read_vec(region.guest_addr(), 8 << 20).unwrap();
    let (before, memory) = (used(session), snapshot());
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(used(session), before, "the used index moves after the stop");
    assert!(snapshot() == memory, "guest memory is written after the stop");
}

/// Stops the queues under load in some way, checks that all is quiet and drained, goes on.
fn stops_drain(
    name: &str,
    args: &[&str],
    personality: Personality,
    stop: impl Fn(&mut Session),
    start: impl Fn(&mut Session),
) {
    let mut random = Random::new(name);
    let backend = Backend::start(args);
    let session = backend.open(SessionOptions::new(personality).queues(2));
    let mut driver = Driver::new(session, Cut::Random, random.clone());
    let mut model = Model::new(backend.content(), 512);
    for _ in 0..15 {
        for _ in 0..4 {
            model.load(&mut driver, &mut random, 200).unwrap();
        }
        stop(&mut driver.session);
        assert_quiet(&driver.session);
        if let Some(area) = &driver.session.inflight {
            assert!(area.inflight_heads(0).is_empty(), "stopped with requests in flight");
            assert!(area.inflight_heads(1).is_empty(), "stopped with requests in flight");
        }
        // Requests that come now wait.
        model.load(&mut driver, &mut random, 220).unwrap();
        assert_quiet(&driver.session);
        start(&mut driver.session);
        model.reap(&mut driver).unwrap();
    }
    model.drain(&mut driver).unwrap();
    model.compare(&backend.content());
}

#[test]
fn disabling_drains_before_the_answer() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads", "--threads", "1"]] {
        stops_drain(
            "ch pause",
            args,
            Personality::CloudHypervisor,
            |session| cloud_hypervisor_pause(session).unwrap(),
            |session| cloud_hypervisor_resume(session).unwrap(),
        );
    }
}

#[test]
fn asking_for_the_base_drains_before_the_answer() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads"]] {
        stops_drain(
            "qemu stop",
            args,
            Personality::Qemu,
            |session| {
                // Without the disabling that comes first.
                stop_rings(session).unwrap();
                for (ring, base) in session.rings.iter().zip(&session.bases) {
                    assert_eq!(ring.used_index(), *base, "popped, but not completed");
                }
            },
            |session| {
                for (ring, base) in session.rings.iter().zip(&session.bases) {
                    let index = u32::from(ring.index());
                    session.client.set_vring_base(index, u32::from(*base)).unwrap();
                    session.client.set_vring_call(index, Some(ring.call_fd())).unwrap();
                    session.client.set_vring_kick(index, Some(ring.kick_fd())).unwrap();
                }
            },
        );
    }
}

#[test]
fn qemu_stops_and_continues_under_load() {
    stops_drain(
        "qemu stop and cont",
        &[],
        Personality::Qemu,
        |session| {
            qemu_stop(session).unwrap();
            // Memory messages are not all acknowledged.
            session.client.get_features().unwrap();
        },
        |session| qemu_start(session).unwrap(),
    );
}

#[test]
fn all_three_front_ends_get_a_disk() {
    let backend = Backend::start(&["--serial", "disk-7"]);
    for personality in [Personality::Qemu, Personality::CloudHypervisor, Personality::Firecracker] {
        let mut options = SessionOptions::new(personality);
        options.queue_size = if personality == Personality::Firecracker { 256 } else { 128 };
        let mut session = backend.open(options);
        assert_eq!(session.config.bytes(), crate::common::backend::DISK);
        session.write(0, 4096, &[8; 4096]).unwrap();
        assert_eq!(session.read(0, 4096, 4096).unwrap(), [8; 4096], "{personality:?}");
        assert_eq!(session.serial(0).unwrap(), "disk-7");
        if session.features() & feature::FLUSH != 0 {
            session.flush(0).unwrap();
        }
        if personality != Personality::Firecracker {
            session.stop().unwrap();
            session.start().unwrap();
            assert_eq!(session.read(0, 4096, 4096).unwrap(), [8; 4096]);
        }
    }
}

#[test]
fn firmware_first_then_the_operating_system() {
    let backend = Backend::start(&[]);
    // SeaBIOS: no event index, no indirect tables, no flush; only queue 0, but all are enabled.
    let mut options = SessionOptions::new(Personality::Qemu).queues(2);
    let all = options.features;
    options.features =
        feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::BLK_SIZE | feature::SEG_MAX;
    let mut session = Session::connect(&backend.socket, options).unwrap();
    qemu_reset(&mut session).unwrap();
    qemu_reset(&mut session).unwrap();
    let second = session.rings.pop().unwrap();
    let base = session.bases.pop().unwrap();
    session.start().unwrap();
    session.client.set_vring_enable(1, true).unwrap();
    session.write(0, 0, &[1; 512]).unwrap();
    enable_all(&mut session, false).unwrap();
    session.client.set_vring_enable(1, false).unwrap();
    stop_rings(&mut session).unwrap();
    // A ring that never ran may be asked for as well.
    assert_eq!(session.client.get_vring_base(1).unwrap(), 0);
    qemu_reset(&mut session).unwrap();
    for region in session.memory.regions() {
        session.client.rem_mem_reg(region).unwrap();
    }
    // Linux: other features, a ring of another size at another place.
    session.options.features = all;
    session.rings.push(second);
    session.bases.push(base);
    let at = session.arena.alloc_pages(64 << 10).unwrap();
    session.rings[0] = Ring::new(&session.memory, 0, RingLayout::contiguous(at, 64)).unwrap();
    session.client.set_vring_err(0, Some(session.rings[0].err_fd())).unwrap();
    session.start().unwrap();
    assert_eq!(session.read(0, 0, 512).unwrap(), [1; 512]);
    session.write(1, 512, &[2; 512]).unwrap();
    assert_eq!(session.read(0, 512, 512).unwrap(), [2; 512]);
}

#[test]
fn a_kick_that_a_dead_backend_took_is_not_missed() {
    let mut backend = Backend::start(&[]);
    let mut session = backend.qemu();
    session.write(0, 0, &[1; 512]).unwrap();
    backend.kill();
    let head = session.submit(0, &Request::read(0, 512)).unwrap();
    // Somebody has read the kick and died.
    let mut count = [0; 8];
    rustix::io::read(session.rings[0].kick_fd(), &mut count).unwrap();
    backend.spawn();
    session.reconnect().unwrap();
    let done = session.wait_head(0, head, session.deadline()).unwrap();
    assert_eq!(done.ok().unwrap(), [1; 512]);
}

#[test]
fn call_descriptors_can_be_replaced_and_left_out() {
    let backend = Backend::start(&[]);
    let mut session = backend.qemu();
    session.client.set_vring_call(0, None).unwrap();
    let head = session.submit(0, &Request::read(0, 512)).unwrap();
    let deadline = crate::common::soon();
    while !session.rings[0].has_used() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    session.wait_head(0, head, deadline).unwrap();
    session.client.set_vring_call(0, Some(session.rings[0].call_fd())).unwrap();
    session.write(0, 0, &[1; 512]).unwrap();
    // A driver that never kicks: the device polls.
    stop_rings(&mut session).unwrap();
    let ring = &session.rings[0];
    session.client.set_vring_base(0, session.bases[0].into()).unwrap();
    session.client.set_vring_call(0, Some(ring.call_fd())).unwrap();
    session.client.set_vring_kick(0, None).unwrap();
    session.prepare(0, &Request::read(0, 512), &Default::default()).unwrap();
    session.rings[0].publish();
    let done = session.wait(0, crate::common::soon()).unwrap();
    assert_eq!(done.ok().unwrap(), [1; 512]);
}

/// Saves the state of a device whose queues are stopped.
fn save(client: &Client) -> Vec<u8> {
    let (mut from, to) = std::io::pipe().unwrap();
    assert!(client.set_device_state(false, to.as_fd()).unwrap().is_none());
    drop(to);
    let mut state = Vec::new();
    from.read_to_end(&mut state).unwrap();
    client.check_device_state().unwrap();
    state
}

/// Loads a state; the pipe is filled after the answer to the first message.
fn load(client: &Client, state: &[u8]) -> vublk::error::Result<()> {
    let (from, mut to) = std::io::pipe().unwrap();
    client.set_device_state(true, from.as_fd())?;
    drop(from);
    to.write_all(state).unwrap();
    drop(to);
    client.check_device_state()
}

#[test]
fn cloud_hypervisor_snapshots_and_restores() {
    let backend = Backend::start(&[]);
    let mut session = backend.open(SessionOptions::new(Personality::CloudHypervisor));
    session.write(0, 0, &[1; 512]).unwrap();
    assert!(session.client.set_device_state(false, std::io::pipe().unwrap().1.as_fd()).is_err());
    cloud_hypervisor_pause(&mut session).unwrap();
    stop_rings(&mut session).unwrap();
    let state = save(&session.client);
    assert!(!state.is_empty());
    drop(session);
    // Restore: the state comes before features and memory.
    let options = SessionOptions::new(Personality::CloudHypervisor);
    for (blob, good) in [
        (state.clone(), true),
        (Vec::new(), true),
        (state[..state.len() - 1].to_vec(), false),
        (vec![0x5a; 64], false),
    ] {
        let mut session = Session::connect(&backend.socket, options.clone()).unwrap();
        assert_eq!(load(&session.client, &blob).is_ok(), good, "{}", backend.log());
        session.start().unwrap();
        assert_eq!(session.read(0, 0, 512).unwrap(), [1; 512]);
    }
}

/// The state of a device goes with the disk as it was when it was saved, whatever file that is in.
#[test]
fn a_state_is_restored_on_the_disk_it_was_saved_with() {
    let options = SessionOptions::new(Personality::CloudHypervisor);
    let backend = Backend::start(&["--serial", "db0"]);
    let mut session = backend.open(options.clone());
    session.write(0, 1024, &[7; 512]).unwrap();
    cloud_hypervisor_pause(&mut session).unwrap();
    stop_rings(&mut session).unwrap();
    let state = save(&session.client);
    drop(session);
    let restore = |backend: &Backend| {
        let session = Session::connect(&backend.socket, options.clone()).unwrap();
        load(&session.client, &state)
    };

    // A copy will do, by another path.
    let copy = backend.dir.path().join("copy.raw");
    std::fs::copy(&backend.image, &copy).unwrap();
    restore(&Setup::new(&["--serial", "db0"]).image(&copy).start()).unwrap();
    // Another serial number, another size, or the same disk at another time, will not.
    for (other, why) in [
        (Setup::new(&["--serial", "db1"]).image(&copy).start(), "its serial number was 'db0'"),
        (Setup::new(&["--serial", "db0"]).size(8 << 20).start(), "it had 32768 sectors"),
        (Setup::new(&["--serial", "db0"]).start(), "the content is not what it was"),
    ] {
        restore(&other).unwrap_err();
        other.wait_log(why);
    }
    let mut session = backend.open(options.clone());
    session.write(0, 1024, &[8; 512]).unwrap();
    session.stop().unwrap();
    drop(session);
    restore(&backend).unwrap_err();
    backend.wait_log("the content is not what it was");
    let mut session = backend.open(options.clone());
    session.write(0, 1024, &[7; 512]).unwrap();
    session.stop().unwrap();
    drop(session);
    restore(&backend).unwrap();
}
