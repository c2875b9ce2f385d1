//! `kill -9` under load: the next process takes up what was in flight.

use std::time::Duration;

use vublk::frontend::{Personality, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random};
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
    kill_under_load("qemu", &[], Personality::Qemu, 3, 24);
}

#[test]
fn kills_under_cloud_hypervisor() {
    kill_under_load("ch", &[], Personality::CloudHypervisor, 2, 20);
}

#[test]
fn kills_with_direct_io() {
    kill_under_load("direct", &["--cache", "none"], Personality::Qemu, 2, 20);
}

#[test]
fn kills_with_a_thread_pool_and_one_worker() {
    let args = ["--aio", "threads", "--threads", "1"];
    kill_under_load("threads", &args, Personality::CloudHypervisor, 2, 20);
}
