//! Guest memory in many regions, which come and go while requests fly.

use vublk::frontend::client::protocol;
use vublk::frontend::request::{STATUS_OK, STATUS_UNTOUCHED, header, kind};
use vublk::frontend::{Pages, Personality, Region, Segment, Session, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, soon};
use crate::model::Model;

/// Bytes of each extra region.
const REGION: u64 = 64 << 10;

/// Bytes to or from guest memory, across regions.
fn write(session: &Session, addr: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        session.memory.write(addr + i as u64, &[*byte]).unwrap();
    }
}

fn read(session: &Session, addr: u64, len: u64) -> Vec<u8> {
    (0..len).map(|i| session.memory.read_vec(addr + i, 1).unwrap()[0]).collect()
}

/// Does a request whose header, data and status lie at these addresses.
fn request(
    session: &mut Session,
    kind: u32,
    sector: u64,
    header_at: u64,
    data: (u64, u32),
    status: u64,
) -> u8 {
    write(session, header_at, &header(kind, sector));
    write(session, status, &[STATUS_UNTOUCHED]);
    let segment = |addr, len, writable| Segment { addr, len, writable };
    let chain = [
        segment(header_at, 16, false),
        segment(data.0, data.1, kind == kind::IN),
        segment(status, 1, true),
    ];
    let ring = &mut session.rings[0];
    let head = ring.add_chain(&chain).unwrap();
    ring.push(head);
    ring.publish();
    ring.kick_if_wanted().unwrap();
    ring.wait_used(soon()).unwrap();
    let used = ring.take_used().unwrap();
    assert!(ring.free_chain(used.id));
    read(session, status, 1)[0]
}

#[test]
fn requests_span_adjacent_regions() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads", "--cache", "none"]] {
        let backend = Backend::start(args);
        let content = Random::new("span").bytes(1 << 20);
        backend.scribble(0, &content);
        let mut session = backend.qemu();
        session.client.set_acknowledge(true);
        let base = session.memory.end() + (1 << 30);
        // In an order that is not that of the guest's addresses, so that they are not adjacent
        // for us or for the back-end.
        for i in [3, 0, 2, 1u64] {
            session.hot_add(base + i * REGION, REGION).unwrap();
        }
        // One descriptor over all four regions; header and status over edges too.
        let data = (base + 100, (3 * REGION + 512) as u32);
        let edge = base + 2 * REGION - 7;
        let control = session.arena.alloc(4096).unwrap();
        let status = request(&mut session, kind::IN, 2, control, data, control + 100);
        assert_eq!(status, STATUS_OK, "{}", backend.log());
        let got = read(&session, data.0, data.1.into());
        assert!(got == content[1024..1024 + data.1 as usize], "read across regions");
        // Written elsewhere from where it is now.
        let status = request(&mut session, kind::OUT, 1024, control, data, control + 100);
        assert_eq!(status, STATUS_OK);
        assert!(backend.content()[1024 * 512..][..data.1 as usize] == got, "write across regions");
        let page = (control + 512, 512);
        let status = request(&mut session, kind::IN, 0, edge, page, base + REGION);
        assert_eq!(status, STATUS_OK);
        assert_eq!(read(&session, page.0, 512), content[..512]);
        // A gap is not memory.
        session.hot_remove(base + REGION).unwrap();
        let status = request(&mut session, kind::IN, 0, control, data, control + 100);
        assert_ne!(status, STATUS_OK);
    }
}

#[test]
fn as_many_regions_as_promised() {
    let mut backend = Backend::start(&[]);
    let mut session = backend.qemu();
    let slots = session.client.get_max_mem_slots().unwrap();
    assert!(slots >= 32, "{slots} slots");
    let base = 1u64 << 40;
    session.client.set_acknowledge(true);
    for i in 0..slots - 1 {
        session.hot_add(base + i * 8192, 4096).unwrap();
    }
    assert!(session.hot_add(base + slots * 8192, 4096).is_err(), "more regions than promised");
    let control = session.arena.alloc(4096).unwrap();
    for i in [0, slots / 2, slots - 2] {
        let data = (base + i * 8192, 4096);
        assert_eq!(request(&mut session, kind::IN, 0, control, data, control + 64), STATUS_OK);
    }
    // The files are closed once they are mapped.
    let files = std::fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap().count();
    assert!(files < 40, "{files} files are open");
    backend.assert_lives();
}

#[test]
fn regions_come_and_go_while_requests_fly() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads"]] {
        let mut random = Random::new("hotplug");
        let backend = Backend::start(args);
        let mut session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
        session.client.set_acknowledge(true);
        let end = session.memory.end();
        let mut driver = Driver::new(session, Cut::Random, random.clone());
        let mut model = Model::new(backend.content(), 512);
        for round in 0..40u64 {
            model.load(&mut driver, &mut random, 100).unwrap();
            let at = end + REGION * (1 + round % 7);
            driver.session.hot_add(at, REGION).unwrap();
            model.load(&mut driver, &mut random, 100).unwrap();
            // A read into the new region, which is taken away while it may be in flight.
            let held = driver.session.memory.region_of(at, 1).unwrap().clone();
            driver.session.hot_remove(at).unwrap();
            drop(held);
            model.reap(&mut driver).unwrap();
        }
        model.drain(&mut driver).unwrap();
        model.compare(&backend.content());
    }
}

#[test]
fn a_region_taken_away_still_gets_what_is_in_flight() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads"]] {
        let backend = Backend::start(args);
        backend.scribble(0, &[7; 1 << 20]);
        let mut session = backend.qemu();
        session.client.set_acknowledge(true);
        let base = session.memory.end() + REGION;
        for _ in 0..30 {
            session.hot_add(base, 1 << 20).unwrap();
            let region = session.memory.region_of(base, 1).unwrap().clone();
            let mut heads = Vec::new();
            for i in 0..8u64 {
                let at = base + i * 65536;
                session.memory.write(at, &header(kind::IN, 0)).unwrap();
                let segment = |addr, len, writable| Segment { addr, len, writable };
                let chain = [segment(at, 16, false), segment(at + 4096, 32769, true)];
                let head = session.rings[0].add_chain(&chain).unwrap();
                session.rings[0].push(head);
                heads.push(head);
            }
            session.rings[0].publish();
            session.rings[0].kick_if_wanted().unwrap();
            session.hot_remove(base).unwrap();
            // Each was popped before, and has its data, or after, and was told nothing.
            for _ in &heads {
                session.rings[0].wait_used(soon()).unwrap();
                let used = session.rings[0].take_used().unwrap();
                let i = heads.iter().position(|head| u32::from(*head) == used.id).unwrap() as u64;
                assert!(session.rings[0].free_chain(used.id));
                assert!(matches!(used.len, 0 | 32769), "{} bytes", used.len);
                if used.len > 0 {
                    let at = region.pointer(base + i * 65536 + 4096, 32769).unwrap();
                    #[allow(unsafe_code)]
                    // SAFETY: `pointer` checked the range, and `region` keeps it mapped.
                    let got = unsafe { std::slice::from_raw_parts(at, 32769) };
                    assert!(got[..32768].iter().all(|b| *b == 7) && got[32768] == STATUS_OK);
                }
            }
        }
        session.write(0, 0, &[1; 512]).unwrap();
    }
}

#[test]
fn the_whole_table_is_replaced_under_load() {
    let mut random = Random::new("table");
    let backend = Backend::start(&[]);
    let session = backend.open(SessionOptions::new(Personality::CloudHypervisor).queues(2));
    assert!(session.client.has_protocol(protocol::REPLY_ACK));
    let end = session.memory.end();
    let mut driver = Driver::new(session, Cut::Random, random.clone());
    let mut model = Model::new(backend.content(), 512);
    for round in 0..60u64 {
        model.load(&mut driver, &mut random, 100).unwrap();
        let session = &mut driver.session;
        if round % 2 == 0 {
            session.memory.add(Region::new(end + REGION, REGION, Pages::Small).unwrap()).unwrap();
        } else {
            session.memory.remove(end + REGION).unwrap();
        }
        session.client.set_mem_table(&session.memory).unwrap();
        model.reap(&mut driver).unwrap();
    }
    model.drain(&mut driver).unwrap();
    // A table without the rings stops them; they go on where they were once they are back.
    let memory = driver.session.memory.clone();
    let mut other = vublk::frontend::Memory::new();
    other.add(Region::new(1 << 40, REGION, Pages::Small).unwrap()).unwrap();
    driver.session.client.set_mem_table(&other).unwrap();
    model.load(&mut driver, &mut random, 50).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(model.reap(&mut driver).unwrap(), 0, "queues without memory");
    driver.session.client.set_mem_table(&memory).unwrap();
    model.drain(&mut driver).unwrap();
    model.compare(&backend.content());
}
