//! Random requests in random descriptors on several queues, against the model.

use vublk::frontend::client::feature;
use vublk::frontend::{Personality, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, skip};
use crate::model::Model;

/// Features that a run goes without.
#[derive(Clone, Copy)]
struct Without(u64);

/// Runs the model against `vublk serve` with these options, and compares the image at the end.
fn run(name: &str, args: &[&str], block: usize, requests: u64, without: Without) {
    let mut random = Random::new(name);
    let mut backend = Backend::start(args);
    backend.scribble(0, &random.bytes(1 << 20));
    let mut options = SessionOptions::new(Personality::Qemu).queues(3);
    options.features &= !without.0;
    let session = backend.open(options);
    let mut model = Model::new(backend.content(), block);
    let mut driver = Driver::new(session, Cut::Random, random.clone());
    for cut in [Cut::Random, Cut::Plain, Cut::Random] {
        driver.cut = cut;
        if let Err(err) = model.run(&mut driver, &mut random, requests / 3, 96) {
            panic!("{name}: {err}");
        }
    }
    driver.session.stop().unwrap();
    model.compare(&backend.content());
    drop(driver);
    assert!(backend.terminate().success(), "{}", backend.log());
    let log = backend.log();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

#[test]
fn model_through_the_page_cache() {
    run("cached", &[], 512, 9000, Without(0));
}

#[test]
fn model_with_direct_io_from_unaligned_memory() {
    run("direct", &["--cache", "none"], 512, 4500, Without(0));
}

#[test]
fn model_with_direct_io_and_large_blocks() {
    run("direct 4096", &["--cache", "none", "--block-size", "4096"], 4096, 3600, Without(0));
}

#[test]
fn model_with_a_thread_pool() {
    run("threads", &["--aio", "threads"], 512, 6000, Without(0));
}

#[test]
fn model_with_a_thread_pool_and_direct_io() {
    run("direct threads", &["--aio", "threads", "--cache", "none"], 512, 3600, Without(0));
}

#[test]
fn model_with_one_worker_for_all_queues() {
    run("one worker", &["--threads", "1"], 512, 6000, Without(0));
}

#[test]
fn model_with_large_blocks() {
    run("4096", &["--block-size", "4096"], 4096, 6000, Without(0));
}

#[test]
fn model_with_polling() {
    run("polling", &["--poll-us", "50"], 512, 4500, Without(0));
}

#[test]
fn model_without_event_index_and_indirect_tables() {
    run("plain ring", &[], 512, 4500, Without(feature::EVENT_IDX | feature::INDIRECT_DESC));
    run("no indirect", &[], 512, 3000, Without(feature::INDIRECT_DESC));
}

#[test]
fn model_without_flush() {
    // Every write is durable before it completes.
    run("no flush", &[], 512, 1800, Without(feature::FLUSH | feature::EVENT_IDX));
}

#[test]
fn model_on_tmpfs() {
    if !std::path::Path::new("/dev/shm").is_dir() {
        return skip("no /dev/shm");
    }
    let mut random = Random::new("tmpfs");
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let backend = crate::common::Setup::new(&[]).image(&image).start();
    let session = backend.open(SessionOptions::new(Personality::CloudHypervisor).queues(2));
    let mut model = Model::new(backend.content(), 512);
    let mut driver = Driver::new(session, Cut::Random, random.clone());
    model.run(&mut driver, &mut random, 1500, 96).unwrap();
    model.compare(&backend.content());
}
