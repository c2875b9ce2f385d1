//! `kill -9` under load: the next process takes up what was in flight.

use std::time::Duration;

use vublk::frontend::request::STATUS_OK;
use vublk::frontend::{Personality, Request, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, soon, wait_until};
use crate::model::Model;

/// Kills the back-end `kills` times under load and checks that nothing acknowledged is lost and
/// that every request completes once.
fn kill_under_load(name: &str, args: &[&str], personality: Personality, queues: u16, kills: u32) {
    let mut random = Random::new(name);
    let mut backend = Backend::start(args);
    let session = backend.open(SessionOptions::new(personality).queues(queues));
    // A small part of the disk, so that a write that is done late hits what came after it.
    let mut model = Model::new(backend.content(), 512).hot(256 << 10, 16 << 10);
    let mut driver = Driver::new(session, Cut::Random, random.clone());
    let mut taken_up = 0;
    for round in 0..kills {
        driver.cut = if round % 2 == 0 { Cut::Random } else { Cut::Plain };
        let before = model.completed;
        let requests = 1 + random.below(150);
        let outcome = (|| {
            while model.completed < before + requests {
                model.load(&mut driver, &mut random, 100)?;
                model.reap(&mut driver)?;
            }
            // So that there is something to be interrupted.
            model.load(&mut driver, &mut random, 100)
        })();
        outcome.unwrap_or_else(|err| panic!("{name}, before kill {round}: {err}"));
        std::thread::sleep(Duration::from_micros(random.below(400)));
        backend.kill();
        let area = driver.session.inflight.as_ref().expect("in-flight tracking");
        let heads: usize = (0..queues).map(|queue| area.inflight_heads(queue).len()).sum();
        taken_up += heads;
        // The guest does not know yet.
        model.load(&mut driver, &mut random, 110).unwrap();
        backend.spawn();
        let outcome = driver.session.reconnect();
        outcome.unwrap_or_else(|err| panic!("{name}, after kill {round}: {err}"));
        if round % 5 == 4 {
            let outcome = model.drain(&mut driver);
            outcome.unwrap_or_else(|err| panic!("{name}, drain after kill {round}: {err}"));
        }
    }
    let outcome = model.drain(&mut driver);
    outcome.unwrap_or_else(|err| panic!("{name}, at the end: {err}"));
    let area = driver.session.inflight.as_ref().expect("in-flight tracking");
    driver.session.client.get_vring_base(0).unwrap();
    assert!(area.inflight_heads(0).is_empty());
    assert!(taken_up > 0, "no kill hit a request in flight");
    model.compare(&backend.content());
}

#[test]
fn kills_under_qemu() {
    kill_under_load("qemu", &[], Personality::Qemu, 3, 40);
}

#[test]
fn kills_under_cloud_hypervisor() {
    kill_under_load("ch", &[], Personality::CloudHypervisor, 2, 30);
}

#[test]
fn kills_with_direct_io() {
    kill_under_load("direct", &["--cache", "none"], Personality::Qemu, 2, 30);
}

#[test]
fn kills_with_a_thread_pool_and_one_worker() {
    let args = ["--aio", "threads", "--threads", "1"];
    kill_under_load("threads", &args, Personality::CloudHypervisor, 2, 30);
}

#[test]
fn a_batch_that_was_published_but_not_cleared_is_not_done_again() {
    for (personality, cleared) in [
        (Personality::Qemu, 0),
        (Personality::CloudHypervisor, 0),
        (Personality::Qemu, 1),
        (Personality::CloudHypervisor, 2),
    ] {
        let mut backend = Backend::start(&[]);
        let mut session = backend.open(SessionOptions::new(personality));
        session.write(0, 0, &[1; 4096]).unwrap();
        backend.kill();
        let used = session.rings[0].used_index();
        let write = |i: u64| Request::write(512 * i, vec![9; 512]);
        let heads: Vec<u16> = (0..4).map(|i| session.submit(0, &write(i)).unwrap()).collect();
        // As a process leaves it that has taken all four, completed the second and the fourth, shown
        // them to the guest, and died before (or while) it cleared their flags.
        let area = session.inflight.as_ref().unwrap();
        let at = |head: u16| 16 + 16 * u64::from(head);
        for (i, head) in heads.iter().enumerate() {
            area.scribble(at(*head) + 8, &(100 + i as u64).to_ne_bytes()).unwrap();
            area.scribble(at(*head), &[1]).unwrap();
        }
        let last = area.header(0).last_batch_head;
        area.scribble(at(heads[1]) + 6, &last.to_ne_bytes()).unwrap();
        area.scribble(at(heads[3]) + 6, &heads[1].to_ne_bytes()).unwrap();
        area.scribble(12, &heads[3].to_ne_bytes()).unwrap();
        for head in [heads[1], heads[3]].iter().take(cleared) {
            area.scribble(at(*head), &[0]).unwrap();
        }
        let ring = session.rings[0].layout();
        for (i, head) in [heads[1], heads[3]].into_iter().enumerate() {
            let slot = u64::from(used.wrapping_add(i as u16) % ring.size);
            let element = [u32::from(head).to_le_bytes(), 1u32.to_le_bytes()].concat();
            session.memory.write(ring.used + 4 + 8 * slot, &element).unwrap();
            let buffers = session.buffers(0, head).unwrap();
            session.memory.write(buffers.into, &[STATUS_OK]).unwrap();
        }
        let published = used.wrapping_add(2).to_le_bytes();
        session.memory.write(ring.used + 2, &published).unwrap();
        backend.spawn();
        session.reconnect().unwrap();
        let mut done: Vec<u16> =
            (0..4).map(|_| session.wait(0, soon()).unwrap()).map(|done| done.head).collect();
        assert_eq!(done[..2], [heads[1], heads[3]]);
        done.sort_unstable();
        let mut sorted = heads.clone();
        sorted.sort_unstable();
        assert_eq!(done, sorted, "each completes once");
        // The two that were only said to be done were not done again, so their sectors are as before.
        for (i, byte) in [9, 1, 9, 1].into_iter().enumerate() {
            let got = session.read(0, 512 * i as u64, 512).unwrap();
            assert_eq!(got, [byte; 512], "sector {i}, {personality:?}, {cleared} cleared");
        }
        // The flags are cleared after the used index is stored.
        let area = session.inflight.as_ref().unwrap();
        wait_until("an empty in-flight area", || area.inflight_heads(0).is_empty());
        assert!(!session.rings[0].has_used());
    }
}
