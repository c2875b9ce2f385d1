//! `block-stream` and `block-commit` while a guest writes, and what is left on disk after them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

mod common;

use common::guest::{Guest, SECTOR, words};
use common::host::base_word;
use common::{Host, Qmp, Random, ok};
use serde_json::{Value, json};
use vublk::frontend::{Personality, SessionOptions};

const DISK: u64 = (6 << 20) + 7 * SECTOR;

/// A daemon with `disk` of format `top`, on `base` of format `below`.
fn start(top: &'static str, below: &str) -> Host {
    let mut host = Host::with_base(DISK);
    let dir = host.dir.path();
    if below != "raw" {
        ok(dir, &["convert", "-q", "-f", "raw", "-O", below, "base", "converted"]);
        std::fs::rename(dir.join("converted"), dir.join("base")).unwrap();
    }
    ok(dir, &["create", "-q", "-f", top, "-b", "base", "-F", below, "disk"]);
    host.backend = host.setup(top, "disk", &[]).start();
    host
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

/// The drivers of the guest's chain, from the top. (Nodes that the operator made stay when they have
/// left it.)
fn drivers(qmp: &mut Qmp) -> Vec<String> {
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let driver = |name: String| {
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name);
        node.unwrap()["drv"].as_str().unwrap().to_string()
    };
    chain(qmp).into_iter().map(driver).collect()
}

#[test]
fn an_add_cow_disk_is_streamed_until_its_raw_file_stands_alone() {
    let mut host = start("add-cow", "raw");
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
    let mut old = host.setup("add-cow", "disk", &[]).prepare();
    old.spawn();
    assert!(!old.wait_end().success());
    assert!(old.log().contains("goes on in"), "{}", old.log());
}

fn active(top: &'static str, below: &'static str) {
    let mut host = start(top, below);
    let mut guest = host.guest(&format!("active, {top} on {below}"));
    let mut qmp = host.qmp();
    guest.work(Duration::from_millis(50));
    while_writing(&mut guest, || run_active(&mut qmp, json!({"device": "disk"})));
    while_writing(&mut guest, || std::thread::sleep(Duration::from_millis(50)));
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, below, "base");
    host.backend = host.setup(below, "base", &[]).start();
    guest.replace(host.backend.open(SessionOptions::new(Personality::Qemu).queues(2)));
    host.stop(&mut guest);
    let mut old = host.setup(top, "disk", &[]).prepare();
    old.spawn();
    assert_eq!(old.wait_end().code(), Some(78), "{}", old.log());
    assert!(old.log().contains("goes on in"), "{}", old.log());
}

/// The command line of before would give a guest that lives on a disk without what it wrote since.
#[test]
fn an_image_that_a_job_took_out_from_below_a_snapshot_is_not_served() {
    let mut host = start("qcow2", "raw");
    let mut guest = host.guest("an_image_that_a_job_took_out_from_below_a_snapshot");
    let mut qmp = host.qmp();
    guest.work(Duration::from_millis(10));
    host.snapshot(&mut qmp, "a", "qcow2");
    guest.work(Duration::from_millis(10));
    host.snapshot(&mut qmp, "b", "qcow2");
    while_writing(&mut guest, || {
        let (top, base) = (host.path("a"), host.path("disk"));
        run(&mut qmp, "block-commit", json!({"device": "disk", "top": top, "base": base}));
        run(&mut qmp, "block-stream", json!({"device": "disk"}));
    });
    host.backend.kill();
    for old in ["a", "disk"] {
        let mut old = host.setup("qcow2", old, &[]).prepare();
        old.spawn();
        assert!(!old.wait_end().success());
        let goes_on = format!("goes on in {};", host.path("b").display());
        assert!(old.log().contains(&goes_on), "{}", old.log());
    }
    host.backend = host.setup("qcow2", "b", &[]).start();
    guest.disk.path = host.backend.socket.clone();
    guest.disk.reconnect().unwrap();
    guest.verify();
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success());
    // Who wants to go back to it gives up what came after.
    std::fs::remove_file(host.path("b")).unwrap();
    host.backend = host.setup("qcow2", "disk", &[]).start();
    drop(host.qmp());
    assert!(host.backend.terminate().success());
}

/// The node of an image, by its file.
fn node_of(qmp: &mut Qmp, host: &Host, file: &str) -> String {
    let path = host.path(file).display().to_string();
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let is_it = |node: &&Value| node["file"] == path && node["drv"] != "file";
    let found = nodes.as_array().unwrap().iter().find(is_it);
    let found = found.unwrap_or_else(|| panic!("no node of {path} in {nodes}"));
    found["node-name"].as_str().unwrap().to_string()
}

/// What an image names as its backing file.
fn names(host: &Host, image: &str) -> Option<String> {
    let info = ok(host.dir.path(), &["info", "-U", "--output=json", image]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let name = info["backing-filename"].as_str()?;
    Some(Path::new(name).file_name().unwrap().to_str().unwrap().to_string())
}

/// base ◄ disk ◄ a ◄ b ◄ c, and a guest that has written between the snapshots.
fn tall(name: &str) -> (Host, Qmp, Guest) {
    let host = start("add-cow", "raw");
    let mut guest = host.guest(name);
    let mut qmp = host.qmp();
    for overlay in ["a", "b", "c"] {
        guest.work(Duration::from_millis(30));
        host.snapshot(&mut qmp, overlay, "add-cow");
    }
    guest.work(Duration::from_millis(30));
    (host, qmp, guest)
}

#[test]
fn layers_below_the_top_are_committed() {
    let (mut host, mut qmp, mut guest) = tall("layers_below_the_top_are_committed");
    let (disk, b) = (node_of(&mut qmp, &host, "disk"), node_of(&mut qmp, &host, "b"));
    while_writing(&mut guest, || {
        let arguments = json!({"device": "disk", "top-node": b, "base-node": disk});
        run(&mut qmp, "block-commit", arguments);
    });
    assert_eq!(drivers(&mut qmp), ["add-cow", "add-cow", "raw"]);
    assert_eq!(names(&host, "c").as_deref(), Some("disk"));
    guest.verify();
    while_writing(&mut guest, || {
        let (top, base) = (host.path("disk"), host.path("base"));
        run(&mut qmp, "block-commit", json!({"device": "disk", "top": top, "base": base}));
    });
    assert_eq!(drivers(&mut qmp), ["add-cow", "raw"]);
    assert_eq!(names(&host, "c").as_deref(), Some("base"));
    guest.verify();
    while_writing(&mut guest, || run_active(&mut qmp, json!({"device": "disk"})));
    assert_eq!(drivers(&mut qmp), ["raw"]);
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, "raw", "base");
}

/// What the base holds behind the end of a shorter layer was hidden by that layer, and stays hidden.
#[test]
fn a_layer_shorter_than_its_base_is_committed() {
    const SHORT: u64 = (1 << 20) + SECTOR;
    let mut host = Host::with_base(DISK);
    let dir = host.dir.path();
    let (short, long) = (SHORT.to_string(), DISK.to_string());
    ok(dir, &["create", "-q", "-f", "add-cow", "-b", "base", "-F", "raw", "mid", &short]);
    ok(dir, &["create", "-q", "-f", "add-cow", "-b", "mid", "-F", "add-cow", "disk", &long]);
    host.backend = host.setup("add-cow", "disk", &[]).start();
    let mut guest = host.backend.open(SessionOptions::new(Personality::Qemu));
    let mut qmp = host.qmp();
    let behind = (DISK - SHORT) as usize;
    let start = guest.read(0, 0, SHORT as u32).unwrap();
    assert!(guest.read(0, SHORT, behind as u32).unwrap() == vec![0; behind]);
    let (top, base) = (host.path("mid"), host.path("base"));
    run(&mut qmp, "block-commit", json!({"device": "disk", "top": top, "base": base}));
    assert!(guest.read(0, SHORT, behind as u32).unwrap() == vec![0; behind]);
    assert!(guest.read(0, 0, SHORT as u32).unwrap() == start);
}

#[test]
fn a_layer_is_streamed_down_to_a_base() {
    let (mut host, mut qmp, mut guest) = tall("a_layer_is_streamed_down_to_a_base");
    let (disk, b) = (node_of(&mut qmp, &host, "disk"), node_of(&mut qmp, &host, "b"));
    // One that is frozen, below the guest's.
    while_writing(&mut guest, || {
        let arguments = json!({"device": b, "base-node": disk, "job-id": "j"});
        run(&mut qmp, "block-stream", arguments);
    });
    assert_eq!(names(&host, "b").as_deref(), Some("disk"));
    assert_eq!(drivers(&mut qmp), ["add-cow", "add-cow", "add-cow", "raw"]);
    guest.verify();
    // And the guest's: first to what is named by the last layer that goes.
    while_writing(&mut guest, || {
        run(&mut qmp, "block-stream", json!({"device": "disk", "bottom": b}));
    });
    assert_eq!(names(&host, "c").as_deref(), Some("disk"));
    while_writing(&mut guest, || {
        let base = host.path("base");
        run(&mut qmp, "block-stream", json!({"device": "disk", "base": base}));
    });
    assert_eq!(names(&host, "c").as_deref(), Some("base"));
    guest.verify();
    while_writing(&mut guest, || run(&mut qmp, "block-stream", json!({"device": "disk"})));
    assert_eq!(drivers(&mut qmp), ["raw"]);
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, "raw", "c.raw");
    let base = std::fs::read(host.path("base")).unwrap();
    assert_eq!(words(&base), (0..DISK / SECTOR).map(base_word).collect::<Vec<_>>());
}

/// Found out before anything is copied, and not after hours.
#[test]
fn a_stream_to_a_top_without_room_for_a_name_is_refused() {
    let mut host = Host::with_base(DISK);
    let dir = host.dir.path();
    ok(dir, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "disk"]);
    let small = ["-o", "cluster_size=512", "-b", "disk", "-F", "qcow2", "top"];
    ok(dir, &[&["create", "-q", "-f", "qcow2"][..], &small].concat());
    host.backend = host.setup("qcow2", "top", &[]).start();
    let mut qmp = host.qmp();
    let nowhere = "x".repeat(800);
    let arguments = |name: &str| json!({"device": "disk", "job-id": "j", "base": host.path("base"), "backing-file": name});
    let err = qmp.fails("block-stream", arguments(&nowhere));
    assert!(err.contains("top: its header has no room for another backing file name"), "{err}");
    assert_eq!(qmp.ok("query-block-jobs", json!({})), json!([]));
    run(&mut qmp, "block-stream", arguments("base"));
    assert_eq!(names(&host, "top").as_deref(), Some("base"));
}

#[test]
fn jobs_are_told_what_to_do() {
    let (mut host, mut qmp, mut guest) = tall("jobs_are_told_what_to_do");
    let slow = json!({"device": "disk", "speed": 65536, "auto-dismiss": false});
    for command in ["block-stream", "block-commit"] {
        qmp.ok(command, slow.clone());
        assert_eq!(until(&mut qmp, "running"), ["created", "running"]);
        let jobs = qmp.ok("query-block-jobs", json!({}));
        assert_eq!(jobs[0]["type"], command["block-".len()..]);
        assert_eq!((&jobs[0]["speed"], &jobs[0]["device"]), (&json!(65536), &json!("disk")));
        // Nobody else touches what it works on.
        let busy = |node: &str| {
            format!("Node '{node}' is busy: block device is in use by block job: {}", &command[6..])
        };
        let c = node_of(&mut qmp, &host, "c");
        let again = json!({"device": "disk", "job-id": "other"});
        assert_eq!(qmp.fails("block-stream", again), busy(&c));
        let snapshot = json!({"device": "disk", "snapshot-file": host.path("d")});
        assert_eq!(qmp.fails("blockdev-snapshot-sync", snapshot), busy(&c));
        assert_eq!(qmp.fails("block_resize", json!({"device": "disk", "size": 1 << 24})), busy(&c));
        while_writing(&mut guest, || {
            qmp.ok("job-pause", json!({"id": "disk"}));
            assert_eq!(until(&mut qmp, "paused"), ["paused"]);
            let at = qmp.ok("query-jobs", json!({}))[0]["current-progress"].clone();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(qmp.ok("query-jobs", json!({}))[0]["current-progress"], at);
            qmp.ok("job-resume", json!({"id": "disk"}));
            assert_eq!(until(&mut qmp, "running"), ["running"]);
            qmp.ok("block-job-cancel", json!({"device": "disk"}));
        });
        assert_eq!(until(&mut qmp, "concluded"), ["aborting", "BLOCK_JOB_CANCELLED", "concluded"]);
        qmp.ok("job-dismiss", json!({"id": "disk"}));
        until(&mut qmp, "null");
        assert_eq!(drivers(&mut qmp).len(), 5, "the chain is as it was");
        guest.verify();
    }
    // Without a limit, and put in force when asked.
    qmp.ok("block-commit", json!({"device": "disk", "auto-finalize": false, "job-id": "j"}));
    until(&mut qmp, "BLOCK_JOB_READY");
    while_writing(&mut guest, || std::thread::sleep(Duration::from_millis(50)));
    qmp.ok("job-complete", json!({"id": "j"}));
    assert_eq!(until(&mut qmp, "BLOCK_JOB_PENDING"), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
    // The guest goes on meanwhile, and what it writes goes along.
    while_writing(&mut guest, || std::thread::sleep(Duration::from_millis(50)));
    qmp.ok("job-finalize", json!({"id": "j"}));
    assert_eq!(until(&mut qmp, "null"), ["BLOCK_JOB_COMPLETED", "concluded", "null"]);
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, "raw", "base");
}

/// The node by which a job is seen has the name that was asked for, as long as the job lasts.
#[test]
fn a_job_is_seen_under_the_name_of_its_filter() {
    let (mut host, mut qmp, mut guest) = tall("a_job_is_seen_under_the_name_of_its_filter");
    let drv = |qmp: &mut Qmp| {
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "jf").cloned();
        node.map_or(Value::Null, |node| node["drv"].clone())
    };
    let (disk, b) = (node_of(&mut qmp, &host, "disk"), node_of(&mut qmp, &host, "b"));
    let slow = json!({"device": "disk", "job-id": "j", "filter-node-name": "jf", "speed": 65536});
    let mut below = slow.clone();
    (below["top-node"], below["base-node"]) = (b.into(), disk.into());
    for (command, arguments, driver) in [
        ("block-stream", &slow, "copy-on-read"),
        ("block-commit", &slow, "mirror_top"),
        ("block-commit", &below, "commit_top"),
    ] {
        qmp.ok(command, arguments.clone());
        until(&mut qmp, "running");
        assert_eq!(drv(&mut qmp), driver);
        let err = qmp.fails("blockdev-del", json!({"node-name": "jf"}));
        assert!(err.starts_with("Node jf is in use: block job: "), "{err}");
        let duplicate = json!({"device": "disk", "job-id": "k", "filter-node-name": "jf"});
        assert!(qmp.fails(command, duplicate).contains("Duplicate nodes with node-name='jf'"));
        qmp.ok("job-cancel", json!({"id": "j"}));
        until(&mut qmp, "null");
        assert_eq!(drv(&mut qmp), Value::Null);
    }
    let filter = json!({"device": "disk", "filter-node-name": "jf"});
    // A start that is refused leaves nothing: somebody else reads the base.
    let reader = vublk::images::open(&vublk::images::OpenRequest::read(host.path("base"))).unwrap();
    assert!(qmp.fails("block-commit", filter.clone()).contains("base"));
    assert_eq!(drv(&mut qmp), Value::Null);
    drop(reader);
    while_writing(&mut guest, || run_active(&mut qmp, filter));
    assert_eq!(drv(&mut qmp), Value::Null);
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, "raw", "base");
}

/// A commit of the active layer that ends without the guest's going over.
#[test]
fn a_ready_commit_can_be_left() {
    let (mut host, mut qmp, mut guest) = tall("a_ready_commit_can_be_left");
    for force in [false, true] {
        qmp.ok("block-commit", json!({"device": "disk"}));
        while_writing(&mut guest, || until(&mut qmp, "BLOCK_JOB_READY"));
        while_writing(&mut guest, || {
            qmp.ok("block-job-cancel", json!({"device": "disk", "force": force}));
            let end = until(&mut qmp, "null");
            match force {
                true => {
                    assert_eq!(end, ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
                }
                false => assert_eq!(end[2], "BLOCK_JOB_COMPLETED"),
            }
        });
        guest.verify();
        assert_eq!(drivers(&mut qmp).len(), 5);
    }
    host.stop(&mut guest);
    host.is_disk(&guest, "add-cow", "c");
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
    active("vhdx", "vhdx");
}

/// A guest whose machine is started, or started again, while the job runs.
#[test]
fn a_guest_comes_while_a_job_runs() {
    for top in ["add-cow", "qcow2", "vhdx"] {
        let below = if top == "vhdx" { "vhdx" } else { "raw" };
        let mut host = start(top, below);
        let mut qmp = host.qmp();
        qmp.ok("block-commit", json!({"device": "disk"}));
        until(&mut qmp, "BLOCK_JOB_READY");
        let mut guest = host.guest(&format!("a guest comes to a commit of {top}"));
        guest.work(Duration::from_millis(20));
        qmp.ok("block-job-complete", json!({"device": "disk"}));
        while_writing(&mut guest, || until(&mut qmp, "null"));
        guest.verify();
        host.stop(&mut guest);
        host.is_disk(&guest, below, "base");
    }
    for top in ["add-cow", "qcow2"] {
        let mut host = start(top, "raw");
        let mut qmp = host.qmp();
        qmp.ok("block-stream", json!({"device": "disk", "speed": 65536}));
        until(&mut qmp, "running");
        let mut guest = host.guest(&format!("a guest comes to a stream of {top}"));
        guest.work(Duration::from_millis(20));
        qmp.ok("block-job-set-speed", json!({"device": "disk", "speed": 0}));
        while_writing(&mut guest, || until(&mut qmp, "null"));
        guest.verify();
        host.stop(&mut guest);
        host.is_disk(&guest, top, "disk");
    }
}

/// What is served after a kill: the same as before, or what that says its disk has gone on in.
struct Served {
    image: PathBuf,
    format: &'static str,
    /// The formats of overlays and of the image below them all.
    formats: (&'static str, &'static str),
}

impl Served {
    /// As an operator does it: the same command again, and what the refusal says if there is one.
    fn restart(&mut self, host: &mut Host) {
        loop {
            let mut again = host.setup(self.format, &self.image, &[]).prepare();
            again.spawn();
            let refusal = "goes on in ";
            common::wait_until("an answer", || {
                again.log().contains("serving ") || again.log().contains(refusal) || !again.lives()
            });
            let log = again.log();
            let Some((_, rest)) = log.split_once(refusal) else {
                assert!(log.contains("serving "), "{log}");
                host.backend = again;
                return;
            };
            self.image = PathBuf::from(rest.split_once(';').unwrap().0);
            let name = self.image.file_name().unwrap().to_str().unwrap();
            self.format = match name {
                "base" => self.formats.1,
                name if name.ends_with(".raw") => "raw",
                _ => self.formats.0,
            };
            assert!(!again.wait_end().success());
        }
    }
}

/// Kills the daemon at any point of jobs, with a guest that lives on.
fn killed(command: &str, top: &'static str, below: &'static str, rounds: u32) {
    let name = format!("killed_in_the_middle_of_a_{command}_{top}_{below}");
    let name = name.as_str();
    let mut host = start(top, below);
    let mut guest = host.guest(name);
    let mut served = Served { image: host.path("disk"), format: top, formats: (top, below) };
    let mut random = Random::new(name);
    let mut over = 0;
    for round in 0..rounds {
        let mut qmp = host.qmp();
        if chain(&mut qmp).len() == 1 {
            let overlay = format!("k{round}");
            guest.work(Duration::from_millis(10));
            host.snapshot(&mut qmp, &overlay, top);
            served = Served { image: host.path(&overlay), format: top, ..served };
        }
        let before = served.image.clone();
        guest.work(Duration::from_millis(10));
        while_writing_until_killed(&mut guest, &mut host, |host| {
            let start = std::time::Instant::now();
            let end = Duration::from_micros(random.below(20_000 + 30_000 * u64::from(round % 6)));
            qmp.send(command, &json!({"device": "disk", "job-id": "j"}));
            while start.elapsed() < end {
                if command == "block-commit" {
                    // Refused until it is ready.
                    qmp.send("block-job-complete", &json!({"device": "j"}));
                }
                std::thread::sleep(Duration::from_micros(random.below(4000)));
            }
            host.backend.kill();
        });
        served.restart(&mut host);
        over += u32::from(served.image != before);
        guest.disk.path = host.backend.socket.clone();
        guest.disk.reconnect().unwrap_or_else(|err| {
            panic!("round {round}, {}: {err}\n{}", served.image.display(), host.backend.log())
        });
        guest.settle();
        guest.verify();
        let image = served.image.display().to_string();
        ok(host.dir.path(), &["info", "-U", "-f", served.format, "--backing-chain", &image]);
        if served.format == "add-cow" {
            ok(host.dir.path(), &["check", "-U", "-f", "add-cow", &image]);
        }
    }
    eprintln!("{name}: {over} of {rounds} kills were after the point of no return");
    guest.disk.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());
    let image = served.image.to_str().unwrap();
    host.is_disk_of_killed(&guest, served.format, image);
}

/// Has the guest write until `work`, which kills its daemon, is done.
fn while_writing_until_killed(guest: &mut Guest, host: &mut Host, work: impl FnOnce(&mut Host)) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                guest.work(Duration::from_millis(1));
            }
        });
        work(host);
        stop.store(true, Ordering::SeqCst);
        worker.join().unwrap();
    });
}

#[test]
fn killed_in_the_middle_of_a_commit() {
    killed("block-commit", "add-cow", "raw", 24);
    killed("block-commit", "vhdx", "vhdx", 24);
    killed("block-commit", "qcow2", "qcow2", 12);
}

#[test]
fn killed_in_the_middle_of_a_stream() {
    killed("block-stream", "add-cow", "raw", 24);
    killed("block-stream", "vhdx", "vhdx", 12);
    killed("block-stream", "qcow2", "qcow2", 12);
}

/// Chains that grow and shrink at random under a guest, with jobs that are paused, cancelled and left
/// at any time.
#[test]
fn random_chains() {
    let mut host = start("add-cow", "raw");
    let mut guest = host.guest("random_chains");
    let mut qmp = host.qmp();
    let mut random = Random::new("random_chains, jobs");
    let mut done = [0; 3];
    for step in 0..60 {
        let chain = chain(&mut qmp);
        if chain.len() < 2 || (chain.len() < 5 && random.one_in(3)) {
            guest.work(Duration::from_millis(3));
            host.snapshot(&mut qmp, &format!("r{step}"), "add-cow");
            done[0] += 1;
            continue;
        }
        let upper = random.below(chain.len() as u64 - 1) as usize;
        let lower = upper + 1 + random.below((chain.len() - upper - 1) as u64) as usize;
        let is_active = upper == 0;
        let (command, mut arguments) = match random.below(2) {
            0 => {
                let base = &chain[lower];
                (
                    "block-commit",
                    json!({"device": "disk", "top-node": chain[upper], "base-node": base}),
                )
            }
            // Now and then all of it.
            _ if lower == chain.len() - 1 && random.one_in(2) => {
                ("block-stream", json!({"device": chain[upper]}))
            }
            _ => ("block-stream", json!({"device": chain[upper], "base-node": chain[lower]})),
        };
        arguments["job-id"] = "j".into();
        arguments["speed"] = [0, 0, 4 << 20][random.below(3) as usize].into();
        while_writing(&mut guest, || {
            qmp.ok(command, arguments);
            for _ in 0..random.below(4) {
                std::thread::sleep(Duration::from_micros(random.below(10_000)));
                // All of these may come too late.
                let _ = match random.below(5) {
                    0 => qmp.run("job-pause", json!({"id": "j"})),
                    1 => qmp.run("job-resume", json!({"id": "j"})),
                    2 => qmp.run("job-cancel", json!({"id": "j"})),
                    3 => qmp.run("block-job-cancel", json!({"device": "j"})),
                    _ => qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0})),
                };
            }
            let _ = qmp.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
            let _ = qmp.run("job-resume", json!({"id": "j"}));
            loop {
                let event = qmp.next_event();
                match (event["event"].as_str().unwrap(), event["data"]["status"].as_str()) {
                    ("BLOCK_JOB_READY", _) if command == "block-commit" && is_active => {
                        let _ = qmp.run("block-job-complete", json!({"device": "j"}));
                    }
                    // It was ready while it rested.
                    (_, Some("ready")) => {
                        let _ = qmp.run("block-job-complete", json!({"device": "j"}));
                    }
                    ("BLOCK_JOB_COMPLETED", _) => {
                        assert_eq!(event["data"]["error"], Value::Null, "{event}");
                        done[1] += 1;
                    }
                    ("BLOCK_JOB_CANCELLED", _) => done[2] += 1,
                    (_, Some("null")) => return,
                    _ => {}
                }
            }
        });
        guest.verify();
    }
    eprintln!("{} snapshots, {} jobs, {} of them cancelled", done[0], done[1] + done[2], done[2]);
    while chain(&mut qmp).len() > 1 {
        run(&mut qmp, "block-stream", json!({"device": "disk"}));
    }
    // The last step may have left requests in flight.
    guest.settle();
    guest.verify();
    host.stop(&mut guest);
}

/// The nodes of the disk, from the guest's down.
fn chain(qmp: &mut Qmp) -> Vec<String> {
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap();
    let mut name = qmp.ok("query-block", json!({}))[0]["inserted"]["node-name"].clone();
    let mut chain = Vec::new();
    while let Some(node) = nodes.iter().find(|node| node["node-name"] == name) {
        chain.push(name.as_str().unwrap().to_string());
        let below = node["children"].as_array().unwrap().iter().find(|c| c["child"] == "backing");
        name = below.map_or(Value::Null, |below| below["node-name"].clone());
    }
    chain
}
