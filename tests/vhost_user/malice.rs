//! Guests and front-ends that mean harm. The process lives, the other queue goes on, and the one
//! at fault either fails the request or is reported as broken by its error descriptor.

use std::time::{Duration, Instant};

use vublk::frontend::client::{Client, feature};
use vublk::frontend::request::{STATUS_IOERR, STATUS_OK, STATUS_UNSUPP, STATUS_UNTOUCHED, kind};
use vublk::frontend::ring::{DESC_INDIRECT, DESC_LEN, DESC_NEXT, DESC_WRITE};
use vublk::frontend::wire::{self, Payload, id};
use vublk::frontend::{
    Descriptor, Inflight, Memory, Pages, Personality, Region, Session, SessionOptions, Wire,
};

use crate::common::{Backend, Random, soon};
use crate::hand::{Hand, assert_serves, assert_silent, lay, open, push, run};

/// Queue 1 works.
fn assert_other_queue_serves(session: &mut Session) {
    session.write(1, 8192, &[5; 512]).unwrap();
    assert_eq!(session.read(1, 8192, 512).unwrap(), [5; 512]);
}

/// A descriptor.
fn d(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { addr, len, flags, next }
}

#[test]
fn chains_that_lie_fail_alone() {
    let mut backend = Backend::start(&[]);
    backend.scribble(0, &[7; 8192]);
    let (mut session, hand) = open(&backend);
    let outside = session.memory.end() + (1 << 30);
    let last_page = session.memory.end() - 4096;
    let [header, data, status] = hand.read_chain();
    let mut cases: Vec<(&str, Vec<Descriptor>)> = vec![
        ("a loop", vec![header, d(hand.data, 512, DESC_NEXT | DESC_WRITE, 1), status]),
        ("a loop to the head", vec![header, d(hand.data, 512, DESC_NEXT | DESC_WRITE, 0)]),
        ("a next outside the table", vec![d(hand.header, 16, DESC_NEXT, 60000)]),
        ("data outside memory", vec![header, d(outside, 4096, DESC_NEXT | DESC_WRITE, 2), status]),
        (
            "data at the end of addresses",
            vec![header, d(u64::MAX - 100, 4096, DESC_NEXT | DESC_WRITE, 2), status],
        ),
        (
            "data longer than memory",
            vec![header, d(hand.data, u32::MAX, DESC_NEXT | DESC_WRITE, 2), status],
        ),
        (
            "data across the end of memory",
            vec![header, d(last_page, 8192, DESC_NEXT | DESC_WRITE, 2), status],
        ),
        ("a header outside memory", vec![d(outside, 16, DESC_NEXT, 1), data, status]),
        ("a short header", vec![d(hand.header, 15, DESC_NEXT, 1), data, status]),
        ("a status outside memory", vec![header, data, d(outside, 1, DESC_WRITE, 0)]),
        ("no status", vec![d(hand.header, 16, 0, 0)]),
        ("nothing at all", vec![d(hand.header, 0, 0, 0)]),
        (
            "readable after writable",
            vec![d(hand.status, 1, DESC_NEXT | DESC_WRITE, 1), d(hand.header, 16, 0, 0)],
        ),
        ("an indirect table of nothing", vec![d(hand.table, 0, DESC_INDIRECT, 0)]),
        ("an indirect table of 24 bytes", vec![d(hand.table, 24, DESC_INDIRECT, 0)]),
        ("an indirect table outside memory", vec![d(outside, 48, DESC_INDIRECT, 0)]),
        ("a huge indirect table", vec![d(hand.table, !15, DESC_INDIRECT, 0)]),
        (
            "an indirect table with a successor",
            vec![d(hand.table, 48, DESC_INDIRECT | DESC_NEXT, 1), status],
        ),
        (
            "an indirect table that is the ring's",
            vec![d(session.rings[0].layout().descriptors, 16 * 128, DESC_INDIRECT, 0)],
        ),
    ];
    // The table holds an indirect descriptor again, pointing to itself.
    let nested = d(hand.table, 48, DESC_INDIRECT, 0);
    session.memory.write(hand.table, &nested.to_bytes()).unwrap();
    cases.push(("nested indirect tables", vec![d(hand.table, 16, DESC_INDIRECT, 0)]));
    for (what, chain) in cases {
        hand.fill(&session, kind::IN, 0);
        session.memory.write(hand.data, &[0xdd; 8192]).unwrap();
        lay(&session, &chain);
        let used = run(&mut session, 0);
        assert_eq!(used.id, 0, "{what}");
        assert!(used.len <= 1, "{what}: {} bytes announced", used.len);
        let status = hand.status_byte(&session);
        let told = if used.len == 1 { STATUS_IOERR } else { STATUS_UNTOUCHED };
        // Whatever could not be told leaves the status alone.
        assert_eq!(status, told, "{what}");
        let intact = [0xdd; 8192];
        assert_eq!(session.memory.read_vec(hand.data, 8192).unwrap(), intact, "{what}");
        assert_other_queue_serves(&mut session);
        assert_serves(&mut session, &hand);
        backend.assert_lives();
    }
    assert!(backend.log().contains("bad descriptor chain"), "{}", backend.log());
}

#[test]
fn readable_descriptors_are_never_written_and_empty_ones_are_skipped() {
    let backend = Backend::start(&[]);
    backend.scribble(0, &[7; 4096]);
    let (mut session, hand) = open(&backend);
    // A read into a buffer that the device may only read.
    hand.fill(&session, kind::IN, 0);
    session.memory.write(hand.data, &[0xdd; 4096]).unwrap();
    let [header, _, status] = hand.read_chain();
    lay(&session, &[header, d(hand.data, 4096, DESC_NEXT, 2), status]);
    assert_eq!(run(&mut session, 0).len, 1);
    assert_eq!(session.memory.read_vec(hand.data, 4096).unwrap(), [0xdd; 4096]);
    // A serial into no buffer, and into a short one.
    hand.fill(&session, kind::GET_ID, 0);
    lay(&session, &[d(hand.header, 16, DESC_NEXT, 2), status, status]);
    run(&mut session, 0);
    assert_ne!(hand.status_byte(&session), STATUS_UNTOUCHED);
    hand.fill(&session, kind::GET_ID, 0);
    lay(&session, &[header, d(hand.data, 3, DESC_NEXT | DESC_WRITE, 2), status]);
    assert_eq!(run(&mut session, 0).len, 4);
    assert_eq!(session.memory.read_vec(hand.data, 4).unwrap(), b"vub\xdd");
    // A write of nothing, and one with writable data only: neither changes the disk.
    hand.fill(&session, kind::OUT, 0);
    lay(&session, &[d(hand.header, 16, DESC_NEXT, 2), status, status]);
    run(&mut session, 0);
    hand.fill(&session, kind::OUT, 0);
    lay(&session, &hand.read_chain());
    run(&mut session, 0);
    assert_eq!(backend.content()[..4096], [7; 4096]);
    // Descriptors of no bytes, wherever they point.
    hand.fill(&session, kind::IN, 0);
    lay(
        &session,
        &[
            d(0, 0, DESC_NEXT, 1),
            d(hand.header, 16, DESC_NEXT, 2),
            d(u64::MAX, 0, DESC_NEXT | DESC_WRITE, 3),
            d(hand.data, 512, DESC_NEXT | DESC_WRITE, 4),
            d(hand.status, 1, DESC_NEXT | DESC_WRITE, 5),
            d(5, 0, DESC_WRITE, 0),
        ],
    );
    let used = run(&mut session, 0);
    assert_eq!((used.len, hand.status_byte(&session)), (513, STATUS_OK), "{}", backend.log());
    assert_eq!(session.memory.read_vec(hand.data, 512).unwrap(), [7; 512]);
}

#[test]
fn an_indirect_table_needs_the_feature() {
    let backend = Backend::start(&[]);
    let mut options = SessionOptions::new(Personality::Qemu).queues(2);
    options.features &= !feature::INDIRECT_DESC;
    let mut session = backend.open(options);
    let hand = Hand::new(&mut session);
    hand.fill(&session, kind::IN, 0);
    let bytes: Vec<u8> = hand.read_chain().into_iter().flat_map(|d| d.to_bytes()).collect();
    session.memory.write(hand.table, &bytes).unwrap();
    lay(&session, &[d(hand.table, 3 * DESC_LEN as u32, DESC_INDIRECT, 0)]);
    assert_eq!(run(&mut session, 0).len, 0);
    assert_eq!(hand.status_byte(&session), STATUS_UNTOUCHED);
    assert_serves(&mut session, &hand);
}

#[test]
fn requests_off_the_disk_or_of_no_kind_fail() {
    let backend = Backend::start(&["--block-size", "4096"]);
    let (mut session, hand) = open(&backend);
    let end = crate::common::backend::DISK / 512;
    for (request, sector, status) in [
        (kind::IN, end, STATUS_IOERR),
        (kind::IN, end - 1, STATUS_IOERR),
        (kind::IN, u64::MAX, STATUS_IOERR),
        (kind::IN, 1 << 55, STATUS_IOERR),
        (kind::IN, 1, STATUS_IOERR),
        (2, 0, STATUS_UNSUPP),
        (99, 0, STATUS_UNSUPP),
        (u32::MAX, 0, STATUS_UNSUPP),
        (kind::IN, 8, STATUS_OK),
    ] {
        hand.fill(&session, request, sector);
        lay(&session, &hand.read_chain());
        run(&mut session, 0);
        assert_eq!(hand.status_byte(&session), status, "type {request} at {sector}");
    }
}

/// Does something that breaks queue 0, and expects to be told so by its error descriptor.
fn breaks(what: &str, act: impl FnOnce(&mut Session, &Hand)) {
    let mut backend = Backend::start(&[]);
    let (mut session, hand) = open(&backend);
    assert_serves(&mut session, &hand);
    act(&mut session, &hand);
    let broken = session.rings[0].wait_broken(soon());
    broken.unwrap_or_else(|err| panic!("{what}: {err}\n{}", backend.log()));
    assert_silent(&mut session);
    assert_other_queue_serves(&mut session);
    backend.wait_log("the queue is broken");
    // The front-end stops the queues, and the guest resets the device: all is well again.
    session.stop().unwrap();
    session.reset_rings();
    session.inflight = None;
    session.start().unwrap();
    assert_serves(&mut session, &hand);
    backend.assert_lives();
}

#[test]
fn a_head_that_is_still_in_flight_breaks_its_queue() {
    breaks("a head used twice", |session, hand| {
        hand.fill(session, kind::IN, 0);
        lay(session, &hand.read_chain());
        push(session, &[0, 0]);
        // What is in flight completes, once.
        session.rings[0].wait_used(soon()).unwrap();
    });
}

#[test]
fn an_index_that_runs_ahead_breaks_its_queue() {
    breaks("an index ahead", |session, _| {
        let ring = &mut session.rings[0];
        let index = ring.available_index().wrapping_add(ring.size() + 1);
        ring.force_available_index(index);
        ring.kick().unwrap();
    });
}

#[test]
fn an_index_that_goes_back_breaks_its_queue() {
    breaks("an index that goes back", |session, _| {
        let ring = &mut session.rings[0];
        let index = ring.available_index().wrapping_sub(1);
        ring.force_available_index(index);
        ring.kick().unwrap();
    });
}

#[test]
fn a_head_outside_the_ring_breaks_its_queue() {
    breaks("no such head", |session, _| push(session, &[128]));
}

#[test]
fn random_rings_harm_nobody_else() {
    let mut random = Random::new("random rings");
    let mut backend = Backend::start(&[]);
    let mut session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
    let layout = session.rings[0].layout();
    for _ in 0..40 {
        for index in 0..128 {
            let mut descriptor = d(random.next(), random.next() as u32, random.next() as u16, 0);
            descriptor.next = random.below(140) as u16;
            if !random.one_in(4) {
                // Queue 1 and its buffers lie elsewhere.
                descriptor.addr = session.memory.end() - (1 + random.below(1 << 20));
                descriptor.len = random.below(9000) as u32;
                descriptor.flags = random.below(8) as u16;
            }
            session.rings[0].write_descriptor(index, descriptor);
        }
        let heads: Vec<u16> = (0..20).map(|_| random.below(128) as u16).collect();
        push(&mut session, &heads);
        assert_other_queue_serves(&mut session);
        if random.one_in(3) {
            session.memory.write(layout.available + 2, &random.bytes(2)).unwrap();
            session.rings[0].kick().unwrap();
        }
        session.stop().unwrap();
        session.reset_rings();
        session.inflight = None;
        session.start().unwrap();
    }
    backend.assert_lives();
}

#[test]
fn memory_that_loses_its_file_breaks_only_its_own_client() {
    for (args, what) in [
        (&[] as &[&str], "page cache"),
        (&["--cache", "none"], "direct"),
        (&["--aio", "threads"], "threads"),
    ] {
        let mut backend = Backend::start(args);
        let (mut session, hand) = open(&backend);
        session.client.set_acknowledge(true);
        let ring_page = session.rings[0].layout().descriptors;
        let added = session.memory.end() + (64 << 20);
        session.hot_add(added, 1 << 20).unwrap();
        let region = session.memory.region_of(added, 1).unwrap().clone();
        // First the memory of a buffer only.
        assert_serves(&mut session, &hand);
        region.truncate(0).unwrap();
        hand.fill(&session, kind::IN, 0);
        let [header, data, status] = hand.read_chain();
        lay(&session, &[header, Descriptor { addr: added, ..data }, status]);
        push(&mut session, &[0]);
        // The request may end well (read into the hole), badly, or not at all with the queue.
        let deadline = std::time::Instant::now() + Duration::from_millis(200);
        let _ = session.rings[0].wait_used(deadline);
        backend.assert_lives();
        // Then the memory of the rings.
        let ring_region = session.memory.region_of(ring_page, 1).unwrap().clone();
        let kicks: Vec<_> =
            session.rings.iter().map(|ring| ring.kick_fd().try_clone_to_owned().unwrap()).collect();
        ring_region.truncate(0).unwrap();
        for kick in &kicks {
            rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
        }
        let broken = session.rings[0].wait_broken(soon());
        broken.unwrap_or_else(|err| panic!("{what}: {err}\n{}", backend.log()));
        backend.assert_lives();
        backend.wait_log("truncated");
        drop(session);
        let mut next = backend.qemu();
        next.write(0, 0, &[3; 512]).unwrap();
        assert_eq!(next.read(0, 0, 512).unwrap(), [3; 512], "{what}");
        backend.assert_lives();
    }
}

#[test]
fn an_inflight_area_or_log_that_loses_its_file_is_survived() {
    let mut backend = Backend::start(&[]);
    for log in [false, true] {
        let options = SessionOptions::new(Personality::Qemu).queues(2);
        let mut session = Session::connect(&backend.socket, options).unwrap();
        // Of the front-end's own making: the back-end's cannot be truncated.
        session.inflight = Some(Inflight::fresh(2, 128).unwrap());
        session.start().unwrap();
        let hand = Hand::new(&mut session);
        let bitmap = vublk::frontend::DirtyLog::new(session.memory.end()).unwrap();
        if log {
            vublk::frontend::personality::qemu_start_log(&mut session, &bitmap).unwrap();
            rustix::fs::ftruncate(bitmap.fd(), 0).unwrap();
        } else {
            let made = session.client.get_inflight(2, 128).unwrap();
            assert!(rustix::fs::ftruncate(made.fd(), 0).is_err());
            rustix::fs::ftruncate(session.inflight.as_ref().unwrap().fd(), 0).unwrap();
        }
        hand.fill(&session, kind::IN, 0);
        lay(&session, &hand.read_chain());
        push(&mut session, &[0]);
        push(&mut session, &[0]);
        session.rings[0].wait_broken(soon()).unwrap();
        backend.assert_lives();
        drop(session);
        backend.qemu().write(0, 0, &[1; 512]).unwrap();
    }
}

#[test]
fn garbage_on_the_socket_ends_at_most_its_own_connection() {
    let mut random = Random::new("garbage");
    let mut backend = Backend::start(&[]);
    let scrap = wire::header(0, 0, 0);
    // Not the connection itself: it would stay open for as long as the back-end keeps the file.
    let strange = Region::new(0, 4096, Pages::Small).unwrap();
    for round in 0..150 {
        let wire = Wire::connect_retry(&backend.socket, Duration::from_millis(1), soon()).unwrap();
        let mut bytes = Vec::new();
        let messages = 1 + random.below(4);
        for _ in 0..messages {
            let request =
                if random.one_in(5) { random.next() as u32 } else { random.below(50) as u32 };
            let flags = if random.one_in(4) {
                random.next() as u32
            } else {
                1 | (8 * random.below(2) as u32)
            };
            let len = [0, 4, 8, 12, 20, 32, 40, 56, 200, 4096][random.below(10) as usize];
            let announced = if random.one_in(4) { random.next() as u32 } else { len as u32 };
            bytes.extend_from_slice(&wire::header(request, flags, announced));
            bytes.extend(random.bytes(len));
        }
        // Perhaps in the middle of a message.
        if random.one_in(2) {
            bytes.truncate(1 + random.below(bytes.len() as u64) as usize);
        }
        let fds = vec![strange.fd(); random.below(4) as usize];
        // The back-end may have hung up before the end.
        let _ = wire.send_bytes(&bytes, &fds, soon());
        drop(wire);
        if round % 10 == 0 {
            backend.assert_lives();
        }
    }
    // Half a header, and then silence: whoever comes next waits until that one has gone.
    let idler = Wire::connect(&backend.socket).unwrap();
    idler.send_bytes(&scrap[..5], &[], soon()).unwrap();
    drop(idler);
    let mut session = backend.qemu();
    session.write(0, 0, &[9; 512]).unwrap();
    backend.assert_lives();
}

#[test]
fn messages_with_wrong_numbers_are_refused_and_the_connection_goes_on() {
    let backend = Backend::start(&["--num-queues", "1"]);
    let mut options = SessionOptions::new(Personality::Qemu).queues(2);
    options.timeout = Duration::from_secs(5);
    let err = Session::open(&backend.socket, options).unwrap_err().to_string();
    assert!(err.contains("serves 1 queues") || format!("{err:?}").contains("negotiate"), "{err}");
    let mut session = backend.qemu();
    let client = &mut session.client;
    client.set_acknowledge(true);
    assert_eq!(client.get_queue_num().unwrap(), 1);
    // More queues than are served.
    assert!(client.set_vring_num(1, 128).is_err());
    assert!(client.set_vring_enable(1, true).is_err());
    assert!(client.set_vring_num(u32::MAX, 128).is_err());
    assert_eq!(client.get_vring_base(7).unwrap(), 0);
    // A queue of no size, and changes to one that runs.
    for size in [0, 3, 2048, u32::MAX] {
        assert!(client.set_vring_num(0, size).is_err(), "size {size}");
    }
    assert!(client.set_vring_base(0, 5).is_err());
    assert!(client.set_vring_addr(0, 0, 0, 0, None).is_err());
    // Configuration space: only the cache byte can be written.
    assert!(client.set_config(0, &[0; 8]).is_err());
    assert!(client.set_config(32, &[1, 0]).is_err());
    // Memory that is not there, overlaps, or is larger than its file.
    let strange = Region::new(1 << 40, 4096, Pages::Small).unwrap();
    assert!(client.rem_mem_reg(&strange).is_err());
    let overlapping = Region::new(options_base(), 4096, Pages::Small).unwrap();
    assert!(client.add_mem_reg(&overlapping).is_err());
    strange.truncate(0).unwrap();
    assert!(client.add_mem_reg(&strange).is_err());
    let lying = Payload::new().u64(0).u64(u64::MAX - 4095).u64(8192).u64(0).u64(0).build();
    assert!(client.command_acknowledged(id::ADD_MEM_REG, &lying, &[strange.fd()]).is_err());
    // Features that were not offered.
    assert!(
        client.command_acknowledged(id::SET_FEATURES, &(1u64 << 40).to_ne_bytes(), &[]).is_err()
    );
    // An in-flight area that ends before it should.
    let small = Inflight::fresh(1, 128).unwrap();
    rustix::fs::ftruncate(small.fd(), 64).unwrap();
    assert!(client.set_inflight(&small).is_err());
    session.write(0, 0, &[4; 512]).unwrap();
    assert_eq!(session.read(0, 0, 512).unwrap(), [4; 512]);
}

/// Where a session's first region begins.
fn options_base() -> u64 {
    SessionOptions::default().guest_addr
}

#[test]
fn no_memory_shared_is_said_clearly() {
    let backend = Backend::start(&[]);
    let mut session =
        Session::connect(&backend.socket, SessionOptions::new(Personality::CloudHypervisor))
            .unwrap();
    // Like a VMM whose memory is private: no table at all, then one of no regions.
    let memory = std::mem::replace(&mut session.memory, Memory::new());
    let features = session.client.offered() & session.options.features;
    session.client.set_features(features).unwrap();
    let ring = &session.rings[0];
    session.client.set_vring_num(0, 128).unwrap();
    session.client.set_ring_addr(ring, false).unwrap();
    session.client.set_vring_kick(0, Some(ring.kick_fd())).unwrap();
    let err = session.client.set_vring_enable(0, true).unwrap_err();
    assert!(err.to_string().contains("refused"), "{err}");
    backend.wait_log("no memory shared by the front-end");
    backend.wait_log("share=on");
    // It is not too late.
    session.client.set_mem_table(&memory).unwrap();
    session.client.set_vring_call(0, Some(session.rings[0].call_fd())).unwrap();
    session.client.set_vring_enable(0, true).unwrap();
    session.memory = memory;
    session.rings[0].set_event_idx(true);
    session.write(0, 0, &[1; 512]).unwrap();
}

#[test]
fn memory_that_is_not_what_the_guest_has_is_guessed_from_its_kicks() {
    const HINT: &str = "share=on";
    let backend = Backend::start(&[]);
    // A front-end kicks a queue itself when it starts; that is no sign of anything.
    let mut session = backend.qemu();
    session.rings[0].kick().unwrap();
    session.write(0, 0, &[1; 512]).unwrap();
    for _ in 0..3 {
        session.rings[0].kick().unwrap();
        session.write(0, 0, &[1; 512]).unwrap();
    }
    drop(session);
    assert!(!backend.log().contains(HINT), "{}", backend.log());
    // QEMU hands over the file of a memory-backend without share=on as well, but its guest writes to
    // a private copy: kicks come, and the ring stays as it was made.
    let mut session = backend.qemu();
    let deadline = session.deadline();
    while !backend.log().contains(HINT) {
        assert!(Instant::now() < deadline, "{}", backend.log());
        session.rings[0].kick().unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    // It is a guess, and changes nothing.
    session.write(0, 0, &[2; 512]).unwrap();
}

#[test]
fn damaged_inflight_areas_are_refused_or_bounded() {
    let mut random = Random::new("damaged in-flight");
    let mut backend = Backend::start(&[]);
    for _ in 0..40 {
        let mut session = backend.qemu();
        session.write(0, 0, &[1; 512]).unwrap();
        session.stop().unwrap();
        drop(std::mem::replace(
            &mut session.client,
            Client::connect(&backend.socket, Duration::from_secs(10)).unwrap(),
        ));
        let area = session.inflight.as_ref().unwrap();
        for _ in 0..1 + random.below(20) {
            // The version stays, or nothing else would be looked at.
            let at = [0, 1, 12, 13, 14, 15, 16 + random.below(128 * 16)][random.below(7) as usize];
            area.scribble(at, &random.bytes(1)).unwrap();
        }
        // Either side may refuse; what must not happen is that the process dies.
        let _ = session.options.personality.reconnect(&mut session);
        drop(session);
        backend.assert_lives();
    }
    let mut session = backend.qemu();
    assert!(session.read(0, 0, 512).is_ok());
}
