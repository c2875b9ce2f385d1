//! `block-stream` and `block-commit` while a guest writes, and what is left on disk after them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

mod common;

use common::guest::{Guest, SECTOR, sector, words};
use common::{Backend, Qmp, Random, Setup, ok};
use serde_json::{Value, json};
use vublk::frontend::{Personality, SessionOptions};

const DISK: u64 = (6 << 20) + 7 * SECTOR;
const QUEUES: u16 = 2;

/// What the base holds.
fn base_word(at: u64) -> u64 {
    0xba5e_0000_0000_0000 | at
}

/// A daemon with one disk, an overlay over a base that is full of data, and a control socket.
struct Host {
    backend: Backend,
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
}

impl Host {
    /// `disk` of format `top`, on `base` of format `below`.
    fn start(top: &'static str, below: &str) -> Host {
        let dir = tempfile::Builder::new().prefix("vublk-jobs-").tempdir().unwrap();
        let state = tempfile::Builder::new().prefix("vublk-jobs-").tempdir_in("/dev/shm").unwrap();
        let data: Vec<u8> = (0..DISK / SECTOR).flat_map(|at| sector(base_word(at))).collect();
        std::fs::write(dir.path().join("base"), data).unwrap();
        if below != "raw" {
            ok(dir.path(), &["convert", "-q", "-f", "raw", "-O", below, "base", "converted"]);
            std::fs::rename(dir.path().join("converted"), dir.path().join("base")).unwrap();
        }
        ok(dir.path(), &["create", "-q", "-f", top, "-b", "base", "-F", below, "disk"]);
        let mut host = Host { backend: Setup::new(&[]).prepare(), dir, state };
        host.backend = host.setup(top, "disk").start();
        host
    }

    fn setup(&self, format: &'static str, image: &str) -> Setup {
        let (state, control) = (self.state.path().to_str().unwrap(), self.path("control.sock"));
        let args = ["--state-dir", state, "--control", control.to_str().unwrap()];
        Setup::new(&args).format(format, &self.path(image))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("control.sock"))
    }

    fn guest(&self, name: &str) -> Guest {
        let options = SessionOptions::new(Personality::Qemu).queues(QUEUES);
        let disk = self.backend.open(options);
        Guest::new(disk, Random::new(name), (0..DISK / SECTOR).map(base_word))
    }

    /// Ends it in order; nothing may be kept any more.
    fn stop(&mut self, guest: &mut Guest) {
        guest.disk.stop().unwrap();
        assert!(self.backend.terminate().success(), "{}", self.backend.log());
        let left: Vec<_> = std::fs::read_dir(self.state.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Demands that an image is the guest's disk, and sound.
    fn is_disk(&self, guest: &Guest, format: &str, image: &str) {
        if format != "raw" {
            ok(self.dir.path(), &["check", "-f", format, image]);
        }
        ok(self.dir.path(), &["convert", "-q", "-f", format, "-O", "raw", image, "out"]);
        let content = words(&std::fs::read(self.path("out")).unwrap());
        assert_eq!(content.len() as u64, DISK / SECTOR);
        for (at, word) in content.into_iter().enumerate() {
            assert_eq!(word, guest.now(at), "sector {at} of {image}");
        }
    }

    fn snapshot(&self, qmp: &mut Qmp, name: &str, format: &str) {
        let file = self.path(name);
        let arguments = json!({"device": "disk", "snapshot-file": file, "format": format});
        qmp.ok("blockdev-snapshot-sync", arguments);
    }
}

/// Has the guest write for as long as `work` takes.
fn while_writing<T>(guest: &mut Guest, work: impl FnOnce() -> T) -> T {
    let stop = Arc::new(AtomicBool::new(false));
    let result = std::thread::scope(|scope| {
        let stopped = Arc::clone(&stop);
        let guest = &mut *guest;
        let worker = scope.spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                guest.work(Duration::from_millis(5));
            }
        });
        /// Also if `work` panics, or the guest would write for ever.
        struct Stop(Arc<AtomicBool>);
        impl Drop for Stop {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let guard = Stop(stop);
        let result = work();
        drop(guard);
        worker.join().unwrap();
        result
    });
    guest.settle();
    result
}

/// The events of a job up to and with this one: states as they are, others by their names.
fn until(qmp: &mut Qmp, last: &str) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let event = qmp.next_event();
        let name = event["event"].as_str().unwrap();
        let said = match name {
            "JOB_STATUS_CHANGE" => event["data"]["status"].as_str().unwrap().to_string(),
            _ if name.starts_with("BLOCK_JOB") => name.to_string(),
            _ => continue,
        };
        if said == "BLOCK_JOB_COMPLETED" {
            assert_eq!(event["data"]["error"], Value::Null, "{event}");
        }
        all.push(said.clone());
        if said == last {
            return all;
        }
    }
}

/// Runs a job that ends by itself.
fn run(qmp: &mut Qmp, command: &str, arguments: Value) {
    qmp.ok(command, arguments);
    assert_eq!(
        until(qmp, "null"),
        ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    );
}

/// Commits the active layer and has the guest go over.
fn run_active(qmp: &mut Qmp, arguments: Value) {
    qmp.ok("block-commit", arguments);
    assert_eq!(until(qmp, "BLOCK_JOB_READY"), ["created", "running", "ready", "BLOCK_JOB_READY"]);
    std::thread::sleep(Duration::from_millis(150));
    qmp.ok("block-job-complete", json!({"device": "disk"}));
    assert_eq!(
        until(qmp, "null"),
        ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    );
}

/// The drivers of the nodes that are there, without those for files.
fn drivers(qmp: &mut Qmp) -> Vec<String> {
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let drivers = nodes.as_array().unwrap().iter().map(|node| node["drv"].as_str().unwrap());
    drivers.filter(|drv| *drv != "file").map(String::from).collect()
}

#[test]
fn an_add_cow_disk_is_streamed_until_its_raw_file_stands_alone() {
    let mut host = Host::start("add-cow", "raw");
    let mut guest = host.guest("an_add_cow_disk_is_streamed");
    let mut qmp = host.qmp();
    guest.work(Duration::from_millis(50));
    while_writing(&mut guest, || run(&mut qmp, "block-stream", json!({"device": "disk"})));
    assert_eq!(drivers(&mut qmp), ["raw"]);
    while_writing(&mut guest, || std::thread::sleep(Duration::from_millis(50)));
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, "raw", "disk.raw");
    // The add-cow file is still the same disk, and needs no base; but it is not given to a guest.
    std::fs::remove_file(host.path("base")).unwrap();
    host.is_disk(&guest, "add-cow", "disk");
    let mut old = host.setup("add-cow", "disk").prepare();
    old.spawn();
    assert!(!old.wait_end().success());
    assert!(old.log().contains("goes on in"), "{}", old.log());
}

fn active(top: &'static str, below: &'static str) {
    let mut host = Host::start(top, below);
    let mut guest = host.guest(&format!("active, {top} on {below}"));
    let mut qmp = host.qmp();
    guest.work(Duration::from_millis(50));
    while_writing(&mut guest, || run_active(&mut qmp, json!({"device": "disk"})));
    while_writing(&mut guest, || std::thread::sleep(Duration::from_millis(50)));
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, below, "base");
    host.backend = host.setup(below, "base").start();
    guest.replace(host.backend.open(SessionOptions::new(Personality::Qemu).queues(QUEUES)));
    host.stop(&mut guest);
    let mut old = host.setup(top, "disk").prepare();
    old.spawn();
    assert!(!old.wait_end().success());
    assert!(old.log().contains("goes on in"), "{}", old.log());
}

#[test]
fn the_active_layer_is_committed_to_raw() {
    active("add-cow", "raw");
    active("qcow2", "raw");
}

#[test]
fn the_active_layer_is_committed_to_other_formats() {
    active("add-cow", "qcow2");
    active("add-cow", "vhdx");
    active("qcow2", "qcow2");
}
