//! The `fault` filter as guests see it, from the outside: errors, delays, flushes that lie, and
//! what a kill leaves.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

mod common;

use common::{Qmp, Setup, ok, vublk};
use vublk::frontend::{Personality, Request, Session, SessionOptions};

/// Size of the disk in bytes.
const DISK: u64 = 1 << 20;

/// A served raw disk of zeros in a directory of its own.
struct Bed {
    dir: tempfile::TempDir,
    backend: common::Backend,
}

impl Bed {
    fn new(options: &[&str]) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(DISK).unwrap();
        let in_dir = |option: &&str| option.replace("DIR", dir.path().to_str().unwrap());
        let options: Vec<_> = options.iter().map(in_dir).collect();
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let backend = Setup::new(&options).image(&image).start();
        Bed { dir, backend }
    }

    fn open(&mut self) -> Session {
        self.backend.open(SessionOptions::new(Personality::Qemu))
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&self.dir.path().join("control.sock"))
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("disk.raw")).unwrap()
    }
}

const CONTROL: [&str; 2] = ["--control", "DIR/control.sock"];

fn works(disk: &mut Session, request: &Request) -> bool {
    disk.execute(0, request).unwrap().ok().is_ok()
}

fn write(at: u64, byte: u8) -> Request {
    Request::write(at, vec![byte; 4096])
}

#[test]
fn injected_errors_reach_the_guest_and_nobody_dies() {
    let mut bed = Bed::new(&CONTROL);
    let (mut disk, mut qmp) = (bed.open(), bed.qmp());
    assert!(works(&mut disk, &write(0, 1)));
    let faults = json!([
        {"iotype": "write", "offset": 65536, "length": 4096},
        {"iotype": "read", "offset": 131072, "after": 2, "once": true},
        {"iotype": "flush", "after": 1, "errno": 28},
    ]);
    qmp.ok("x-vublk-fault-set", json!({"device": "disk", "inject-error": faults}));
    assert!(!works(&mut disk, &write(65536, 2)));
    assert!(works(&mut disk, &write(65536 + 4096, 2)), "just behind it");
    let read = Request::read(131_072, 4096);
    let reads: Vec<bool> = (0..4).map(|_| works(&mut disk, &read)).collect();
    assert_eq!(reads, [true, true, false, true]);
    let event = qmp.event("BLOCK_IO_ERROR");
    assert_eq!((&event["device"], &event["operation"]), (&json!("disk"), &json!("write")));
    assert_eq!(event["qom-path"], "", "QEMU's clients expect one");
    assert!(works(&mut disk, &Request::flush()));
    // A failed flush: what it lost is unknown, so nothing is written any more.
    assert!(!works(&mut disk, &Request::flush()));
    assert!(!works(&mut disk, &write(0, 3)) && !works(&mut disk, &Request::flush()));
    assert!(works(&mut disk, &Request::read(0, 4096)));
    let known = qmp.ok("x-vublk-query-faults", json!({}));
    assert_eq!((&known[0]["errors"], &known[0]["poisoned"]), (&json!(3), &json!(true)));
    assert_eq!(known[0]["file"], "image");
    // The disk itself had nothing to do with it.
    qmp.ok("x-vublk-fault-clear", json!({"device": "disk"}));
    assert!(works(&mut disk, &write(0, 3)) && works(&mut disk, &Request::flush()));
    assert_eq!(qmp.ok("x-vublk-query-faults", json!({})), json!([]));
    let err = qmp.fails("x-vublk-fault-clear", json!({"device": "disk"}));
    assert!(err.contains("node 'image' has no faults"), "{err}");
    drop(disk);
    assert!(bed.backend.terminate().success());
    assert_eq!((bed.image()[0], bed.image()[65536]), (3, 0));
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let bed = Bed::new(&CONTROL);
    let mut qmp = bed.qmp();
    for (faults, words) in [
        (json!({"inject-error": [{"errno": 0}]}), "Parameter 'errno' expects"),
        (json!({"inject-error": [{"one-in": 0}]}), "Parameter 'one-in' expects at least 1"),
        (json!({"inject-error": [{"length": 0}]}), "Parameter 'length' expects"),
        (json!({"inject-error": [{"iotype": "trim"}]}), "does not accept value 'trim'"),
        (json!({"inject-delay": [{}]}), "Parameter 'inject-delay[0].delay-us' is missing"),
        (
            json!({"inject-delay": [{"delay-us": 5, "delay-max-us": 4}]}),
            "Parameter 'delay-max-us' expects at least delay-us",
        ),
        (json!({"inject-delay": [{"delay-us": 4_000_000_000u64}]}), "(an hour)"),
        (json!({"volatile-cache": {"size": 1u64 << 40}}), "'volatile-cache.size' expects at most"),
        (json!({"flush": "lie"}), "Parameter 'flush' is unexpected"),
    ] {
        let mut arguments = faults.clone();
        arguments["device"] = "disk".into();
        let err = qmp.fails("x-vublk-fault-set", arguments);
        assert!(err.contains(words), "{faults}: {err}");
    }
    let err = qmp.fails("x-vublk-fault-set", json!({"device": "nope"}));
    assert!(err.contains("Cannot find device='nope'"), "{err}");
    let dir = bed.dir.path();
    let args = ["serve", "--socket-path", "x.sock", "--fault", "flush-lies-one-in=x", "y.raw"];
    let output = vublk(dir, &args);
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.contains("--fault flush-lies-one-in=x: Parameter 'flush-lies-one-in'"), "{err}");
}

/// A delayed write of one queue does not keep another queue, or the same one, from going on.
#[test]
fn a_delay_keeps_only_its_own_request_waiting() {
    let bed = Bed::new(&CONTROL);
    let options = SessionOptions::new(Personality::Qemu).queues(2);
    let mut disk = bed.backend.open(options);
    let mut qmp = bed.qmp();
    let delay = Duration::from_millis(1500);
    let slow = json!([{"iotype": "write", "offset": 0, "length": 4096,
                       "delay-us": delay.as_micros() as u64}]);
    qmp.ok("x-vublk-fault-set", json!({"device": "disk", "inject-delay": slow}));
    let started = Instant::now();
    let slow_one = disk.submit(0, &write(0, 1)).unwrap();
    for i in 1..50 {
        for queue in 0..2 {
            let request = if i % 2 == 0 { write(i * 4096, 2) } else { Request::read(0, 4096) };
            disk.execute(queue, &request).unwrap().ok().unwrap();
        }
    }
    assert!(started.elapsed() < delay, "98 requests took {:?}", started.elapsed());
    disk.wait_head(0, slow_one, common::soon()).unwrap().ok().unwrap();
    assert!(started.elapsed() >= delay);
}

#[test]
fn a_log_does_not_hear_of_flushes_that_lie() {
    let log = "DIR/w.log";
    let mut bed = Bed::new(&[
        "--log-writes",
        log,
        "--fault",
        "flush-lies-one-in=2,seed=7",
        CONTROL[0],
        CONTROL[1],
    ]);
    let (mut disk, mut qmp) = (bed.open(), bed.qmp());
    for i in 0..40 {
        assert!(works(&mut disk, &write(i * 4096, 1)) && works(&mut disk, &Request::flush()));
    }
    qmp.ok("x-vublk-log-mark", json!({"device": "disk", "mark": "half"}));
    let lies = qmp.ok("x-vublk-query-faults", json!({}))[0]["flush-lies"].as_u64().unwrap();
    drop(disk);
    assert!(bed.backend.terminate().success());
    let list = ok(bed.dir.path(), &["log", "list", "--output", "json", "w.log"]);
    let entries: Vec<Value> = serde_json::from_str(&list).unwrap();
    let count = |flag: &str| {
        let flagged = |entry: &&Value| entry["flags"].as_array().unwrap().contains(&flag.into());
        entries.iter().filter(flagged).count() as u64
    };
    let writes = entries.iter().filter(|entry| entry["sectors"] == 8).count();
    assert_eq!(writes, 40, "all writes are in it");
    assert!((8..32).contains(&lies), "{lies} of 40");
    // The device flushes when its guest has left, which may be a lie, too.
    let flushes = count("FLUSH");
    assert!((40 - lies..=42 - lies).contains(&flushes), "{flushes} flushes, {lies} of 40 lied");
    assert_eq!(count("MARK"), 2);
}

/// The same when the log is started later than the faults.
#[test]
fn a_log_that_is_started_later_stands_below_the_faults() {
    let mut bed = Bed::new(&CONTROL);
    let (mut disk, mut qmp) = (bed.open(), bed.qmp());
    qmp.ok("x-vublk-fault-set", json!({"device": "disk", "flush-lies-one-in": 1}));
    let log = bed.dir.path().join("w.log").to_str().unwrap().to_string();
    qmp.ok("x-vublk-log-start", json!({"device": "disk", "log": log}));
    assert!(works(&mut disk, &write(0, 1)) && works(&mut disk, &Request::flush()));
    // A snapshot would go between log and image.
    let snapshot = json!({"device": "disk", "snapshot-file": "o.qcow2", "format": "qcow2"});
    let err = qmp.fails("blockdev-snapshot-sync", snapshot);
    assert!(err.starts_with("Node 'image' is busy: ") && err.contains("w.log"), "{err}");
    qmp.ok("x-vublk-log-stop", json!({"device": "disk"}));
    let list = ok(bed.dir.path(), &["log", "list", "--output", "json", "w.log"]);
    let entries: Vec<Value> = serde_json::from_str(&list).unwrap();
    let flags: Vec<_> = entries.iter().map(|entry| entry["flags"].to_string()).collect();
    assert_eq!(flags, ["[]", "[\"MARK\"]"]);
}

fn is_there(image: &[u8], block: usize, byte: u8) -> bool {
    image[block * 4096..][..4096].iter().all(|b| *b == byte)
}

#[test]
fn a_kill_leaves_what_was_flushed_and_dice_decide_about_the_rest() {
    let faults = "volatile-cache.survive-one-in=3,volatile-cache.tear-one-in=3,seed=5";
    let mut bed = Bed::new(&["--fault", faults]);
    let mut disk = bed.open();
    for block in 0..20 {
        assert!(works(&mut disk, &write(block * 4096, 1)));
    }
    assert!(works(&mut disk, &Request::flush()));
    for block in 0..40 {
        assert!(works(&mut disk, &write(block * 4096, 2)));
    }
    let read = disk.execute(0, &Request::read(0, 40 * 4096)).unwrap();
    assert!(read.data.iter().all(|byte| *byte == 2), "the guest sees what it wrote");
    bed.backend.kill();
    let image = bed.image();
    let whole = (0..40).filter(|block| is_there(&image, *block, 2)).count();
    let lost = (0..20).filter(|block| is_there(&image, *block, 1)).count()
        + (20..40).filter(|block| is_there(&image, *block, 0)).count();
    assert!(whole > 3 && lost > 3 && whole + lost < 38, "{whole} whole, {lost} lost");
}

#[test]
fn ending_in_order_loses_nothing() {
    let mut bed = Bed::new(&["--fault", "volatile-cache.size=1M"]);
    let mut disk = bed.open();
    for block in 0..40 {
        assert!(works(&mut disk, &write(block * 4096, 2)));
    }
    assert!(bed.image().iter().all(|byte| *byte == 0), "nothing was flushed");
    drop(disk);
    assert!(bed.backend.terminate().success());
    assert!((0..40).all(|block| is_there(&bed.image(), block, 2)));
}

#[test]
fn a_node_of_its_own_is_added_reopened_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> String { dir.path().join(name).to_str().unwrap().into() };
    std::fs::File::create(path("a.raw")).unwrap().set_len(DISK).unwrap();
    let blockdevs = [
        format!("file,node-name=f,filename={}", path("a.raw")),
        "raw,node-name=image,file=f".into(),
        "fault,node-name=bad,file=image,inject-error.0.iotype=write,inject-error.0.offset=512k"
            .into(),
    ];
    let export = format!(
        "vhost-user-blk,id=e0,node-name=bad,writable=on,addr.type=unix,addr.path={}",
        path("e0.sock")
    );
    let control = path("control.sock");
    let mut args = vec!["--export", &export, "--control", &control];
    blockdevs.iter().for_each(|text| args.extend(["--blockdev", text]));
    let mut backend = Setup::new(&args).many().start();
    let mut qmp = Qmp::connect(Path::new(&control));
    let connect = || {
        let options = SessionOptions::new(Personality::Qemu);
        Session::open(Path::new(&path("e0.sock")), options).unwrap()
    };
    let mut disk = connect();
    assert!(works(&mut disk, &write(0, 1)) && !works(&mut disk, &write(1 << 19, 1)));
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    let bad = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "bad").unwrap();
    assert_eq!((&bad["drv"], &bad["file"]), (&json!("fault"), &json!(path("a.raw"))));
    assert_eq!(bad["children"], json!([{"child": "file", "node-name": "image"}]));

    let reopen = |file: &str, more: Value| {
        let mut options = json!({"driver": "fault", "node-name": "bad", "file": file});
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"options": [options]})
    };
    let err = qmp.fails("blockdev-reopen", reopen("f", json!({})));
    assert_eq!(err, "Cannot change the option 'file'");
    qmp.ok("blockdev-reopen", reopen("image", json!({"inject-error": [{"iotype": "read"}]})));
    assert!(works(&mut disk, &write(1 << 19, 1)) && !works(&mut disk, &Request::read(0, 512)));
    qmp.ok("x-vublk-fault-clear", json!({"device": "e0"}));
    assert!(works(&mut disk, &Request::read(0, 512)));

    // A disk changes its size through its filter.
    qmp.ok("block_resize", json!({"device": "e0", "size": 2 * DISK}));
    assert!(works(&mut disk, &write(2 * DISK - 4096, 7)));
    assert_eq!(std::fs::metadata(path("a.raw")).unwrap().len(), 2 * DISK);

    let err = qmp.fails("blockdev-del", json!({"node-name": "image"}));
    assert_eq!(err, "Node image is in use: node 'bad' (file)");
    drop(disk);
    qmp.ok("block-export-del", json!({"id": "e0", "mode": "hard"}));
    let err = qmp.fails("x-vublk-fault-set", json!({"device": "image"}));
    assert!(err.contains("node 'image' is not served"), "{err}");
    for node in ["bad", "image", "f"] {
        qmp.ok("blockdev-del", json!({"node-name": node}));
    }
    assert_eq!(qmp.ok("x-vublk-query-faults", json!({})), json!([]));
    assert!(backend.terminate().success());
}
