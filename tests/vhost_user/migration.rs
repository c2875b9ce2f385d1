//! The migration log: every page that the device writes is marked, whoever writes it.

use std::collections::BTreeSet;

use vublk::frontend::personality::{cloud_hypervisor_start_log, qemu_start_log, qemu_stop_log};
use vublk::frontend::{DirtyLog, Personality, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, soon};
use crate::model::Model;

/// Runs load while the log is swapped, and demands a mark for each page written.
fn every_page_is_marked(name: &str, args: &[&str], personality: Personality) {
    let mut random = Random::new(name);
    let backend = Backend::start(args);
    backend.scribble(0, &random.bytes(4 << 20));
    let session = backend.open(SessionOptions::new(personality).queues(2));
    let end = session.memory.end();
    let mut model = Model::new(backend.content(), 512);
    let mut driver = Driver::new(session, Cut::Random, random.clone());
    // Before the log begins nothing can be marked, and whatever flies then may be.
    model.load(&mut driver, &mut random, 60).unwrap();
    let mut log = DirtyLog::new(end).unwrap();
    let start = |driver: &mut Driver, log: &DirtyLog| match personality {
        Personality::CloudHypervisor => cloud_hypervisor_start_log(&mut driver.session, log),
        _ => qemu_start_log(&mut driver.session, log),
    };
    start(&mut driver, &log).unwrap();
    // QEMU's messages are not acknowledged; an answer says that they are done.
    driver.session.client.get_features().unwrap();
    model.drain(&mut driver).unwrap();
    log.take();
    let mut marked = BTreeSet::new();
    let mut total = 0;
    for round in 0..30 {
        driver.cut = if round % 2 == 0 { Cut::Random } else { Cut::Plain };
        let mut written = BTreeSet::new();
        model.load(&mut driver, &mut random, 100).unwrap();
        if round % 3 == 1 {
            // Under load: what completes later goes to the new one.
            let new = DirtyLog::new(end).unwrap();
            driver.session.client.set_log_base(&new).unwrap();
            marked.extend(log.take());
            let old = std::mem::replace(&mut log, new);
            model.load(&mut driver, &mut random, 100).unwrap();
            let deadline = soon();
            for queue in 0..2 {
                while !driver.flights[queue].is_empty() {
                    let done = driver.take(queue, deadline).unwrap();
                    written.extend(done.pages.iter().copied());
                    written.insert(driver.session.rings[queue].layout().used);
                    model.done(&done).unwrap();
                }
            }
            assert!(old.take().is_empty(), "the old log was written after the swap");
        } else {
            let deadline = soon();
            for queue in 0..2 {
                while !driver.flights[queue].is_empty() {
                    let done = driver.take(queue, deadline).unwrap();
                    written.extend(done.pages.iter().copied());
                    written.insert(driver.session.rings[queue].layout().used);
                    model.done(&done).unwrap();
                }
            }
        }
        marked.extend(log.take());
        for page in &written {
            assert!(marked.contains(page), "{name}, round {round}: {page:#x} is not marked");
        }
        total += written.len();
        // Not everything: a log that is full says nothing.
        assert!(marked.len() < written.len() + 20, "{} of {}", marked.len(), written.len());
        marked.clear();
    }
    assert!(total > 500, "{total} pages");
    if personality == Personality::Qemu {
        qemu_stop_log(&mut driver.session).unwrap();
        driver.session.client.get_features().unwrap();
        log.take();
        model.run(&mut driver, &mut random, 50, 30).unwrap();
        assert!(log.take().is_empty(), "the log is written after its end");
    }
    model.compare(&backend.content());
}

#[test]
fn marks_through_the_page_cache() {
    every_page_is_marked("log", &[], Personality::Qemu);
}

#[test]
fn marks_what_the_kernel_writes() {
    every_page_is_marked("log direct", &["--cache", "none"], Personality::CloudHypervisor);
}

#[test]
fn marks_with_a_thread_pool() {
    every_page_is_marked("log threads", &["--aio", "threads"], Personality::Qemu);
}
