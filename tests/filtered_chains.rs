//! Snapshots and jobs on disks with a filter before them: the filter stays where it is, and chains
//! change below it.

use std::path::Path;
use std::time::Duration;

mod common;

use common::guest::{SECTOR, sector};
use common::host::base_word;
use common::{Host, Qmp, Random, ok};
use serde_json::{Value, json};
use vublk::frontend::{Personality, Request, SessionOptions};

const DISK: u64 = 4 << 20;

/// A daemon with `disk`, on a base if it is not raw, and a filter before it.
fn start(format: &'static str, faults: &str) -> Host {
    let mut host = Host::with_base(DISK);
    let dir = host.dir.path();
    match format {
        "raw" => std::fs::rename(dir.join("base"), dir.join("disk")).unwrap(),
        _ => drop(ok(dir, &["create", "-q", "-f", format, "-b", "base", "-F", "raw", "disk"])),
    }
    host.backend = host.setup(format, "disk", &["--fault", faults]).start();
    host
}

/// What is served, from the top: drivers, and the file of each.
fn chain(qmp: &mut Qmp) -> Vec<(String, String)> {
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let nodes = nodes.as_array().unwrap();
    let served = qmp.ok("query-block", json!({}));
    let mut name = served[0]["inserted"]["node-name"].clone();
    let mut chain = Vec::new();
    while let Some(node) = nodes.iter().find(|node| node["node-name"] == name) {
        let driver = node["drv"].as_str().unwrap().to_string();
        let file = Path::new(node["file"].as_str().unwrap()).file_name().unwrap().to_str().unwrap();
        let next = if driver == "fault" { "file" } else { "backing" };
        chain.push((driver, file.to_string()));
        let below = node["children"].as_array().unwrap().iter().find(|c| c["child"] == next);
        name = below.map_or(Value::Null, |below| below["node-name"].clone());
    }
    chain
}

fn shown(chain: &[(String, String)]) -> Vec<String> {
    chain.iter().map(|(driver, file)| format!("{driver} {file}")).collect()
}

fn ended(qmp: &mut Qmp) {
    loop {
        let event = qmp.next_event();
        match event["event"].as_str().unwrap() {
            "BLOCK_JOB_READY" => {
                qmp.ok("job-complete", json!({"id": "j"}));
            }
            "BLOCK_JOB_COMPLETED" => {
                assert_eq!(event["data"]["error"], Value::Null, "{event}");
            }
            "JOB_STATUS_CHANGE" if event["data"]["status"] == "null" => return,
            _ => {}
        }
    }
}

#[test]
fn chains_grow_and_shrink_below_a_filter() {
    for format in ["add-cow", "qcow2"] {
        let mut host = start(format, "inject-delay.0.delay-us=0,inject-delay.0.one-in=50");
        let mut guest = host.guest("chains_grow_and_shrink_below_a_filter");
        let mut qmp = host.qmp();
        guest.work(Duration::from_millis(20));
        guest.settle();
        let at_snapshot: Vec<_> = (0..(DISK / SECTOR) as usize).map(|at| guest.now(at)).collect();
        host.snapshot(&mut qmp, "a", format);
        let of = |driver: &str, file: &str| format!("{driver} {file}");
        let chain_with = |files: &[&str]| -> Vec<String> {
            let mut all = vec![of("fault", files[0])];
            all.extend(files.iter().map(|file| match *file {
                "base" => of("raw", "base"),
                file => of(format, file),
            }));
            all
        };
        assert_eq!(shown(&chain(&mut qmp)), chain_with(&["a", "disk", "base"]));
        guest.work(Duration::from_millis(20));
        guest.settle();
        guest.verify();
        assert!(host.content(format, "disk") == at_snapshot, "the snapshot is what it was");
        host.snapshot(&mut qmp, "b", format);
        guest.work(Duration::from_millis(20));
        // A layer below the top, then all of it, and then up again.
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        let is = |file: &str, node: &Value| {
            node["drv"] == format && node["file"].as_str().unwrap().ends_with(file)
        };
        let find = |file| nodes.as_array().unwrap().iter().find(|node| is(file, node)).unwrap();
        let (a, disk) = (find("/a")["node-name"].clone(), find("/disk")["node-name"].clone());
        let commit = json!({"device": "disk", "job-id": "j", "top-node": a, "base-node": disk});
        qmp.ok("block-commit", commit);
        guest.work(Duration::from_millis(20));
        ended(&mut qmp);
        assert_eq!(shown(&chain(&mut qmp)), chain_with(&["b", "disk", "base"]));
        guest.settle();
        guest.verify();
        qmp.ok("block-commit", json!({"device": "disk", "job-id": "j"}));
        guest.work(Duration::from_millis(20));
        ended(&mut qmp);
        assert_eq!(shown(&chain(&mut qmp)), chain_with(&["base"]));
        guest.settle();
        guest.verify();
        host.snapshot(&mut qmp, "c", format);
        guest.work(Duration::from_millis(20));
        qmp.ok("block-stream", json!({"device": "disk", "job-id": "j"}));
        guest.work(Duration::from_millis(20));
        ended(&mut qmp);
        let alone = if format == "add-cow" { "raw c.raw" } else { "qcow2 c" };
        assert_eq!(shown(&chain(&mut qmp))[1..], [alone]);
        guest.settle();
        guest.verify();
        // Its faults are still those of the disk.
        assert!(qmp.ok("x-vublk-query-faults", json!({}))[0]["delays"].as_u64().unwrap() > 0);
        qmp.ok("x-vublk-fault-clear", json!({"device": "disk"}));
        guest.work(Duration::from_millis(5));
        guest.settle();
        guest.verify();
        host.stop(&mut guest);
        let (driver, file) = alone.split_once(' ').unwrap();
        host.is_disk(&guest, driver, file);
    }
}

/// What a volatile cache keeps from the disk is part of its snapshot.
#[test]
fn a_snapshot_has_what_the_filter_kept_from_the_disk() {
    let mut host = start("raw", "volatile-cache.size=64M");
    let mut disk = host.backend.open(SessionOptions::new(Personality::Qemu));
    let mut qmp = host.qmp();
    let mut random = Random::new("a_snapshot_has_what_the_filter_kept");
    let mut model: Vec<u64> = (0..DISK / SECTOR).map(base_word).collect();
    let mut write = |model: &mut Vec<u64>, word: u64| {
        let (start, len) = (random.below(DISK / SECTOR - 16), 1 + random.below(16));
        let data = sector(word).repeat(len as usize);
        disk.execute(0, &Request::write(start * SECTOR, data)).unwrap().ok().unwrap();
        model[start as usize..][..len as usize].fill(word);
    };
    (1..100).for_each(|word| write(&mut model, word));
    assert_ne!(qmp.ok("x-vublk-query-faults", json!({}))[0]["bytes-at-risk"], 0);
    host.snapshot(&mut qmp, "a", "qcow2");
    let at_snapshot = model.clone();
    assert!(host.content("raw", "disk") == at_snapshot);
    (100..200).for_each(|word| write(&mut model, word));
    disk.stop().unwrap();
    assert!(host.backend.terminate().success(), "{}", host.backend.log());
    assert!(host.content("raw", "disk") == at_snapshot);
    assert!(host.content("qcow2", "a") == model);
}

/// The guest's session goes on in the overlay below the filter.
#[test]
fn killed_after_a_snapshot_below_a_filter_nothing_completed_is_lost() {
    for format in ["add-cow", "qcow2"] {
        let faults = "inject-delay.0.delay-us=0,inject-delay.0.one-in=50";
        let mut host = start(format, faults);
        let mut guest = host.guest("killed_after_a_snapshot_below_a_filter");
        for round in 0..4 {
            let mut qmp = host.qmp();
            let name = format!("k{round}");
            guest.work(Duration::from_millis(10));
            host.snapshot(&mut qmp, &name, format);
            guest.work(Duration::from_millis(10));
            host.backend.kill();
            host.backend = host.setup(format, &name, &["--fault", faults]).start();
            guest.disk.path = host.backend.socket.clone();
            guest.disk.reconnect().unwrap();
            guest.settle();
            guest.verify();
        }
        // What was kept of the frozen layers stays, without records, until the host's next start.
        guest.disk.stop().unwrap();
        assert!(host.backend.terminate().success(), "{}", host.backend.log());
        host.is_disk_of_killed(&guest, format, "k3");
    }
}

/// A transaction that fails leaves the filter on the disk that it was on.
#[test]
fn an_undone_snapshot_leaves_the_filter_where_it_was() {
    let mut host = start("qcow2", "inject-delay.0.delay-us=0,inject-delay.0.one-in=50");
    let mut guest = host.guest("an_undone_snapshot_leaves_the_filter");
    let mut qmp = host.qmp();
    guest.work(Duration::from_millis(10));
    let before = chain(&mut qmp);
    let file = host.path("a");
    let action = json!({"type": "blockdev-snapshot-sync",
                        "data": {"device": "disk", "snapshot-file": file, "format": "qcow2"}});
    let actions = json!({"actions": [action, {"type": "abort", "data": {}}]});
    let err = qmp.fails("transaction", actions);
    assert_eq!(err, "Transaction aborted using Abort action");
    assert_eq!(chain(&mut qmp), before);
    assert!(!file.exists());
    guest.work(Duration::from_millis(10));
    guest.settle();
    guest.verify();
    host.stop(&mut guest);
    host.is_disk(&guest, "qcow2", "disk");
}
