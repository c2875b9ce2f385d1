//! Recording that begins, is marked and ends under a running guest, by the control socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

mod common;

use common::{Host, fails, ok};
use vublk::frontend::{Personality, Request, SessionOptions};

const DISK: u64 = 1 << 20;

#[test]
fn recording_starts_and_stops_under_a_running_guest() {
    let mut host = Host::with_disk("raw", DISK);
    let mut qmp = host.qmp();
    let mut disk = host.backend.open(SessionOptions::new(Personality::Qemu));
    let d = host.dir.path();
    let device = "disk";
    let log = d.join("w.log").to_str().unwrap().to_string();

    // The guest writes all the time, each block once, one after the other.
    let stop = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&stop);
    let guest = std::thread::spawn(move || {
        let mut count = 0u64;
        while !over.load(Ordering::Relaxed) {
            let byte = 1 + (count % 250) as u8;
            let request = Request::write(count % (DISK / 4096) * 4096, vec![byte; 4096]);
            disk.execute(0, &request).unwrap().ok().unwrap();
            count += 1;
        }
        disk.execute(0, &Request::flush()).unwrap().ok().unwrap();
        disk.stop().unwrap();
        count
    });
    let err = qmp.run("x-vublk-log-mark", json!({"device": device, "mark": "x"})).unwrap_err();
    assert!(err.contains("is not being recorded"), "{err}");
    qmp.run("x-vublk-log-start", json!({"device": device, "log": log})).unwrap();
    let err = qmp.run("x-vublk-log-start", json!({"device": device, "log": log})).unwrap_err();
    assert!(err.contains("is being recorded in") && err.contains("already"), "{err}");
    // A snapshot would lead the writes past the log.
    let overlay = d.join("overlay.qcow2").to_str().unwrap().to_string();
    let snapshot = json!({"device": device, "snapshot-file": overlay, "format": "qcow2"});
    let err = qmp.run("blockdev-snapshot-sync", snapshot).unwrap_err();
    assert!(err.contains("the write log") && err.contains("w.log"), "{err}");
    for mark in ["one", "two"] {
        std::thread::sleep(std::time::Duration::from_millis(100));
        qmp.run("x-vublk-log-mark", json!({"device": device, "mark": mark})).unwrap();
    }
    ok(d, &["log", "mark", "--device", device, "control.sock", "three"]);
    // It may be read while it grows.
    ok(d, &["log", "verify", "w.log"]);
    std::thread::sleep(std::time::Duration::from_millis(100));
    qmp.run("x-vublk-log-stop", json!({"device": device})).unwrap();
    let size = std::fs::metadata(d.join("w.log")).unwrap().len();
    std::thread::sleep(std::time::Duration::from_millis(100));
    stop.store(true, Ordering::Relaxed);
    let count = guest.join().unwrap();
    assert!(count > 100, "{count} writes");
    assert_eq!(std::fs::metadata(d.join("w.log")).unwrap().len(), size, "it went on growing");
    let err = fails(d, &["log", "mark", "--device", device, "control.sock", "four"], 1);
    assert!(err.starts_with("control.sock: ") && err.contains("is not being recorded"), "{err}");
    assert!(host.backend.terminate().success());

    ok(d, &["log", "verify", "w.log"]);
    let list = ok(d, &["log", "list", "--output", "json", "w.log"]);
    let entries: Vec<Value> = serde_json::from_str(&list).unwrap();
    let marks: Vec<_> = entries.iter().filter_map(|entry| entry["mark"].as_str()).collect();
    assert_eq!(marks, ["one", "two", "three", "dm-log-writes-end"]);
    // No write is missing in between: the guest's go round.
    let blocks: Vec<u64> = entries
        .iter()
        .filter(|entry| entry["flags"].as_array().unwrap().is_empty())
        .map(|entry| entry["sector"].as_u64().unwrap() / 8)
        .collect();
    assert!(blocks.len() > 10, "{} writes in the log", blocks.len());
    for pair in blocks.windows(2) {
        assert_eq!(pair[1], (pair[0] + 1) % (DISK / 4096));
    }
}

/// A log that nobody will find, or that has lost what it counts, is none.
#[test]
fn a_log_that_is_taken_away_while_it_is_recorded_is_not_passed_off_as_one() {
    let mut host = Host::with_disk("raw", DISK);
    let mut qmp = host.qmp();
    let mut disk = host.backend.open(SessionOptions::new(Personality::Qemu));
    let (device, log) = ("disk", host.path("w.log"));
    let start = json!({"device": device, "log": log.to_str().unwrap(), "log-overwrite": true});
    let mark = json!({"device": device, "mark": "here"});

    qmp.run("x-vublk-log-start", start.clone()).unwrap();
    disk.write(0, 0, &[1; 65536]).unwrap();
    disk.flush(0).unwrap();
    std::fs::remove_file(&log).unwrap();
    // The guest is not to blame.
    disk.write(0, 0, &[2; 512]).unwrap();
    disk.flush(0).unwrap();
    let err = qmp.run("x-vublk-log-mark", mark.clone()).unwrap_err();
    assert!(err.contains("w.log: was removed while it is recorded"), "{err}");
    let err = qmp.run("x-vublk-log-stop", json!({"device": device})).unwrap_err();
    assert!(err.contains("w.log: was removed while it is recorded"), "{err}");

    for len in [0, 30000] {
        qmp.run("x-vublk-log-start", start.clone()).unwrap();
        disk.write(0, 0, &[1; 65536]).unwrap();
        disk.write(0, 0, &[2; 512]).unwrap();
        disk.flush(0).unwrap();
        qmp.run("x-vublk-log-mark", mark.clone()).unwrap();
        std::fs::File::options().write(true).open(&log).unwrap().set_len(len).unwrap();
        let err = qmp.run("x-vublk-log-mark", mark.clone()).unwrap_err();
        assert!(err.contains("w.log: was truncated or written to by others"), "{err}");
        qmp.run("x-vublk-log-stop", json!({"device": device})).unwrap_err();
    }
    disk.write(0, 0, &[3; 512]).unwrap();
    disk.flush(0).unwrap();
    drop(disk);
    assert!(host.backend.terminate().success());
}

/// A log goes on only where the disk is what it ends with, and a guest may write at any time: also
/// while recording begins.
#[test]
fn a_log_that_goes_on_misses_no_write() {
    let mut host = Host::with_disk("raw", DISK);
    let mut qmp = host.qmp();
    let mut disk = host.backend.open(SessionOptions::new(Personality::Qemu));
    let d = host.dir.path().to_path_buf();
    let log = d.join("w.log").to_str().unwrap().to_string();
    let mut random = common::Random::new("a log that goes on");
    let device = json!({"device": "disk"});
    let start = |overwrite| json!({"device": "disk", "log": log, "log-overwrite": overwrite});
    let begin = |qmp: &mut common::Qmp| {
        std::fs::copy(d.join("disk"), d.join("base")).unwrap();
        qmp.run("x-vublk-log-start", start(true)).unwrap();
    };
    begin(&mut qmp);
    let (mut went_on, mut refused) = (0, 0);
    for round in 0..300u64 {
        qmp.run("x-vublk-log-stop", device.clone()).unwrap();
        let pause = std::time::Duration::from_micros(random.below(3000));
        let guest = std::thread::spawn(move || {
            std::thread::sleep(pause);
            let at = round % (DISK / 512) * 512;
            disk.write(0, at, &[1 + (round % 250) as u8; 512]).unwrap();
            disk
        });
        let started = qmp.run("x-vublk-log-start", start(false));
        disk = guest.join().unwrap();
        match started {
            Ok(_) => went_on += 1,
            Err(err) => {
                assert!(err.contains("was changed"), "{err}");
                refused += 1;
                begin(&mut qmp);
            }
        }
        qmp.run("x-vublk-log-mark", json!({"device": "disk", "mark": "check"})).unwrap();
        std::fs::copy(d.join("base"), d.join("replayed")).unwrap();
        ok(&d, &["log", "replay", "w.log", "--replay", "replayed", "-f", "raw"]);
        let [one, other] = ["disk", "replayed"].map(|name| std::fs::read(d.join(name)).unwrap());
        assert!(one == other, "round {round}: the log misses a write ({went_on}, {refused})");
    }
    eprintln!("{went_on} went on, {refused} were refused");
    drop(disk);
    assert!(host.backend.terminate().success());
}
