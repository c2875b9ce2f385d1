//! One front-end after the other on one listening socket.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use vublk::frontend::{Client, Personality, Session, SessionOptions};

use crate::common::driver::Cut;
use crate::common::{Backend, Driver, Random, soon};
use crate::model::Model;

/// Identity of the socket's file.
fn inode(backend: &Backend) -> u64 {
    std::fs::metadata(&backend.socket).unwrap().ino()
}

#[test]
fn the_next_client_is_served_on_the_same_socket() {
    let mut backend = Backend::start(&[]);
    backend.qemu();
    let socket = inode(&backend);
    let kinds = [Personality::Qemu, Personality::CloudHypervisor, Personality::Firecracker];
    for round in 0..12u8 {
        let mut session = backend.open(SessionOptions::new(kinds[usize::from(round) % 3]));
        if round > 0 {
            assert_eq!(session.read(0, 512, 512).unwrap(), [round - 1; 512]);
        }
        session.write(0, 512, &[round; 512]).unwrap();
        if round % 2 == 0 && round % 3 != 2 {
            session.stop().unwrap();
        }
    }
    assert_eq!(inode(&backend), socket, "the socket was made anew");
    // Somebody who only looks whether we are there leaves no trace in the log.
    let lines = backend.log().lines().count();
    drop(Client::connect(&backend.socket, Duration::from_secs(1)).unwrap());
    backend.qemu();
    assert!(backend.log().lines().count() <= lines + 3, "{}", backend.log());
    backend.assert_lives();
}

#[test]
fn a_second_client_waits_for_the_first_to_leave() {
    let backend = Backend::start(&[]);
    let mut first = backend.qemu();
    let mut second = Client::connect(&backend.socket, Duration::from_millis(150)).unwrap();
    let err = second.get_features().unwrap_err();
    assert_eq!(err.errno(), Some(libc::ETIMEDOUT), "{err}");
    first.write(0, 0, &[6; 512]).unwrap();
    drop(first);
    // The question is in the socket already.
    let answer = second.wire().recv(soon()).unwrap();
    assert_eq!(answer.request, 1);
    let mut session =
        Session::negotiate(second, &backend.socket, SessionOptions::default()).unwrap();
    session.client.set_timeout(Duration::from_secs(10));
    session.start().unwrap();
    assert_eq!(session.read(0, 0, 512).unwrap(), [6; 512]);
}

#[test]
fn a_client_that_vanishes_under_load_leaves_its_memory_alone() {
    for args in [&[] as &[&str], &["--cache", "none"], &["--aio", "threads"]] {
        let mut random = Random::new("vanish");
        let mut backend = Backend::start(args);
        for _ in 0..12 {
            let session = backend.open(SessionOptions::new(Personality::Qemu).queues(2));
            let mut driver = Driver::new(session, Cut::Random, random.clone());
            let mut model = Model::new(vec![0; 16 << 20], 512);
            for _ in 0..20 {
                model.load(&mut driver, &mut random, 200).unwrap();
            }
            // The connection ends, the memory stays.
            let gone = std::mem::replace(
                &mut driver.session.client,
                Client::connect(&backend.socket, Duration::from_secs(10)).unwrap(),
            );
            drop(gone);
            // Whoever is answered comes after the one before has been drained.
            driver.session.client.get_features().unwrap();
            let used: Vec<u16> = driver.session.rings.iter().map(|r| r.used_index()).collect();
            let memory = driver.session.memory.region_of(16 << 20, 1).unwrap().clone();
            let before = driver.session.memory.read_vec(memory.guest_addr(), 64 << 20).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            let after = driver.session.memory.read_vec(memory.guest_addr(), 64 << 20).unwrap();
            assert!(before == after, "memory of a client that has left was written");
            for (ring, used) in driver.session.rings.iter().zip(used) {
                assert_eq!(ring.used_index(), used);
            }
            // What had completed is whole, on both queues.
            while driver.try_take(0).unwrap().is_some() {}
            while driver.try_take(1).unwrap().is_some() {}
            random = Random::new("vanish again");
        }
        backend.assert_lives();
        let log = backend.log();
        assert!(!log.contains("ERROR") && !log.contains("panic"), "{log}");
    }
}

#[test]
fn an_idle_backend_without_a_client_has_no_worker_threads() {
    let backend = Backend::start(&[]);
    let mut session = backend.open(SessionOptions::new(Personality::Qemu).queues(4));
    session.write(3, 0, &[1; 512]).unwrap();
    let workers = || {
        std::fs::read_dir(format!("/proc/{}/task", backend.pid()))
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.starts_with("vublk-q"))
            .count()
    };
    assert_eq!(workers(), 4);
    drop(session);
    let deadline = Instant::now() + Duration::from_secs(10);
    while workers() > 0 {
        assert!(Instant::now() < deadline, "workers of a client that has left");
        std::thread::sleep(Duration::from_millis(2));
    }
}
