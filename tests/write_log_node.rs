//! `blklogwrites` as a node of its own, by `--blockdev` and `blockdev-add`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

mod common;

use common::{Backend, Qmp, Setup, ok};
use vublk::frontend::{Personality, Request, Session, SessionOptions};

/// Size of the disk in bytes.
const DISK: u64 = 8 << 20;

/// A directory with an image and an empty log.
struct Bed {
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
    format: &'static str,
}

impl Bed {
    fn new(format: &'static str) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(dir.path().join("w.log")).unwrap();
        ok(dir.path(), &["create", "-q", "-f", format, "disk", &DISK.to_string()]);
        std::fs::copy(dir.path().join("disk"), dir.path().join("base")).unwrap();
        let state = tempfile::Builder::new().prefix("vublk-log-").tempdir_in("/dev/shm").unwrap();
        Bed { dir, state, format }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_string()
    }

    /// Serves node `d0`, the image, with a control socket; and what `more` says.
    fn serve(&self, more: &[String]) -> Backend {
        let (format, disk) = (self.format, self.path("disk"));
        let image =
            format!("{format},node-name=d0,discard=unmap,file.driver=file,file.filename={disk}");
        let state = self.state.path().to_str().unwrap();
        let control = self.path("control.sock");
        let mut args = vec!["--control", &control, "--state-dir", state, "--blockdev", &image];
        args.extend(more.iter().map(String::as_str));
        Setup::new(&args).many().start()
    }

    /// The options that add log node `l0` on `d0`, and serve it.
    fn logged(&self, options: &str, block_size: u64) -> [String; 4] {
        let (log, socket) = (self.path("w.log"), self.path("e0.sock"));
        let node = format!(
            "blklogwrites,node-name=l0,file=d0,discard=unmap,log.driver=file,log.filename={log}{options}"
        );
        let export = format!(
            "vhost-user-blk,id=e0,node-name=l0,writable=on,logical-block-size={block_size},\
             addr.type=unix,addr.path={socket}"
        );
        ["--blockdev".into(), node, "--export".into(), export]
    }

    fn connect(&self) -> Session {
        Session::open(Path::new(&self.path("e0.sock")), SessionOptions::new(Personality::Qemu))
            .unwrap()
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(&PathBuf::from(self.path("control.sock")))
    }

    /// Replays the log to a copy of the image as it was, and compares that with the image.
    fn check_replay(&self) {
        let d = self.dir.path();
        let verified = ok(d, &["log", "verify", "--output", "json", "w.log"]);
        let verified: Value = serde_json::from_str(&verified).unwrap();
        assert_eq!((&verified["damage"], &verified["notes"]), (&json!([]), &json!([])));
        assert_eq!(verified["entries-with-record"], verified["counted-entries"]);
        std::fs::copy(d.join("base"), d.join("copy")).unwrap();
        ok(d, &["log", "replay", "w.log", "-f", self.format, "--replay", "copy"]);
        ok(d, &["compare", "-f", self.format, "-F", self.format, "copy", "disk"]);
    }

    fn marks(&self) -> Vec<String> {
        let list = ok(self.dir.path(), &["log", "list", "--marks", "--output", "json", "w.log"]);
        let list: Vec<Value> = serde_json::from_str(&list).unwrap();
        list.iter().map(|entry| entry["mark"].as_str().unwrap().to_string()).collect()
    }
}

/// Writes, zeros, a discard and flushes; `round` makes the data another one.
fn work(disk: &mut Session, round: u8) {
    for request in [
        Request::write(4096, vec![round; 8192]),
        Request::write(u64::from(round) << 20, vec![round; 65536]),
        Request::write_zeroes(&[(65536, 32768)], true),
        Request::flush(),
        Request::discard(&[(4096, 4096)]),
        Request::write(8192, vec![round + 100; 4096]),
        Request::flush(),
        Request::write(12288, vec![round + 50; 4096]),
    ] {
        disk.execute(0, &request).unwrap().ok().unwrap();
    }
}

#[test]
fn what_a_guest_writes_is_in_the_log_across_kills_and_restarts() {
    for (format, options, block_size) in [
        ("raw", "", 512),
        ("vhdx", ",log-sector-size=4k,log-order=completion", 4096),
        ("qcow2", "", 4096),
        ("add-cow", "", 512),
    ] {
        let bed = Bed::new(format);
        let more = bed.logged(options, block_size);
        let mut backend = bed.serve(&more);
        let mut disk = bed.connect();
        work(&mut disk, 1);
        let nodes = bed.qmp().ok("query-named-block-nodes", json!({}));
        let log = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "l0").unwrap();
        assert_eq!((&log["drv"], &log["file"]), (&json!("blklogwrites"), &json!(bed.path("disk"))));
        // New space that was not flushed: another guest will come, and the log has it.
        let unflushed = Request::write(5 << 20, vec![77; 65536]);
        disk.execute(0, &unflushed).unwrap().ok().unwrap();
        backend.kill();
        drop(disk);
        // The same command goes on with it.
        backend.spawn();
        let mut disk = bed.connect();
        work(&mut disk, 2);
        disk.stop().unwrap();
        assert!(backend.terminate().success());
        bed.check_replay();
        // An end in order changes a VHDX, but not what the log knows of it.
        backend.spawn();
        let mut disk = bed.connect();
        work(&mut disk, 3);
        disk.stop().unwrap();
        assert!(backend.terminate().success());
        assert_eq!(bed.marks(), ["dm-log-writes-end"; 2]);
        bed.check_replay();
    }
}

/// What `blockdev-add` takes for a log node.
fn node(bed: &Bed, options: Value) -> Value {
    let mut node = json!({"driver": "blklogwrites", "node-name": "l0", "file": "d0",
        "log": {"driver": "file", "filename": bed.path("w.log")}});
    node.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    node
}

#[test]
fn a_log_node_comes_and_goes_by_qmp() {
    let bed = Bed::new("vhdx");
    let mut backend = bed.serve(&[]);
    let mut qmp = bed.qmp();
    let export = |node: &str, more: Value| {
        let mut export = json!({"type": "vhost-user-blk", "id": "e0", "node-name": node,
            "writable": true, "addr": {"type": "unix", "path": bed.path("e0.sock")}});
        export.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        export
    };
    for round in [1, 2] {
        qmp.ok("blockdev-add", node(&bed, json!({"discard": "unmap"})));
        // Nobody else may write to what is recorded, or change the graph below the log.
        let err = qmp.fails("block-export-add", export("d0", json!({})));
        assert!(err.contains("in use by the write log") && err.contains("w.log"), "{err}");
        let err = qmp.fails("block_resize", json!({"node-name": "d0", "size": 2 * DISK}));
        assert!(err.contains("in use by the write log"), "{err}");
        let err = qmp.fails("block_resize", json!({"node-name": "l0", "size": 2 * DISK}));
        assert!(err.contains("node 'd0' is being recorded"), "{err}");
        let err = qmp.fails("blockdev-del", json!({"node-name": "d0"}));
        assert!(err.contains("node 'l0' (file)"), "{err}");

        qmp.ok("block-export-add", export("l0", json!({})));
        let mut disk = bed.connect();
        work(&mut disk, round);
        qmp.ok("x-vublk-log-mark", json!({"device": "e0", "mark": format!("round {round}")}));
        let err = qmp.fails("x-vublk-log-stop", json!({"device": "e0"}));
        assert!(err.contains("blockdev-del node-name=l0"), "{err}");
        disk.stop().unwrap();
        drop(disk);
        qmp.ok("block-export-del", json!({"id": "e0", "mode": "hard"}));
        qmp.event("BLOCK_EXPORT_DELETED");
        qmp.ok("blockdev-del", json!({"node-name": "l0"}));
        let err = qmp.fails("x-vublk-log-mark", json!({"device": "d0", "mark": "late"}));
        assert!(err.contains("is not being recorded"), "{err}");
    }
    assert_eq!(bed.marks(), ["round 1", "dm-log-writes-end", "round 2", "dm-log-writes-end"]);
    // With nothing recorded, the disk is anybody's again.
    qmp.ok("block-export-add", export("d0", json!({})));
    assert!(backend.terminate().success());
    bed.check_replay();
}

#[test]
fn what_cannot_be_right_is_refused_by_name() {
    let bed = Bed::new("raw");
    let mut backend = bed.serve(&[]);
    let mut qmp = bed.qmp();
    std::fs::write(bed.path("text"), "no log of anything at all").unwrap();
    let file = |name: &str| json!({"driver": "file", "filename": bed.path(name)});
    for (options, words) in [
        (json!({"log-append": true, "log-sector-size": 512}), "are mutually exclusive"),
        (json!({"log-append": true, "log-overwrite": true}), "are mutually exclusive"),
        (json!({"log-super-update-interval": 0}), "'log-super-update-interval' expects at least 1"),
        (json!({"log-sector-size": 1000}), "invalid log sector size 1000"),
        (json!({"log-order": "any"}), "does not accept value 'any'"),
        (json!({"log": "d0"}), "node 'd0' is not a file: a log must be one"),
        (json!({"log": file("none")}), "No such file"),
        (json!({"log": file("text")}), "neither empty nor a log"),
        (
            json!({"log": {"driver": "file", "filename": bed.path("w.log"), "read-only": true}}),
            "Block node is read-only",
        ),
        (
            json!({"file": {"driver": "raw", "read-only": true, "file": file("base")}}),
            "is not written to, so there is nothing to record",
        ),
        (json!({"read-only": true}), "'read-only' belongs to the node below"),
        (json!({"log-flavour": "x"}), "Parameter 'log-flavour' is unexpected"),
    ] {
        let err = qmp.fails("blockdev-add", node(&bed, options.clone()));
        assert!(err.contains(words), "{options}: {err}");
    }
    assert_eq!(std::fs::metadata(bed.path("w.log")).unwrap().len(), 0, "a refusal wrote to it");
    // Nothing is left of what was refused.
    let nodes = qmp.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().unwrap().len(), 2, "{nodes}");

    qmp.ok("blockdev-add", node(&bed, json!({"log-sector-size": 4096})));
    let mut export = json!({"type": "vhost-user-blk", "id": "e0", "node-name": "l0",
        "writable": true, "addr": {"type": "unix", "path": bed.path("e0.sock")}});
    let err = qmp.fails("block-export-add", export.clone());
    let larger = "log sectors of 4096 bytes are larger than the guest's blocks of 512; use \
                  logical-block-size=4096, or a log with smaller sectors";
    assert_eq!(err, format!("{}: {larger}", bed.path("w.log")));
    export["logical-block-size"] = 4096.into();
    qmp.ok("block-export-add", export);
    let mut second = node(&bed, json!({}));
    second["node-name"] = "l1".into();
    let err = qmp.fails("blockdev-add", second);
    assert!(err.contains("Node d0 is in use"), "{err}");
    assert!(backend.terminate().success());
}

/// Whatever lies between a guest and what is recorded, and however that began.
#[test]
fn a_guest_whose_blocks_are_smaller_than_log_sectors_is_told_so_when_it_is_attached() {
    let bed = Bed::new("raw");
    let mut backend = bed.serve(&[]);
    let mut qmp = bed.qmp();
    let export = |node: &str, size: u32| {
        json!({"type": "vhost-user-blk", "id": "e0", "node-name": node, "writable": true,
            "logical-block-size": size, "addr": {"type": "unix", "path": bed.path("e0.sock")}})
    };
    let fault = |file: &str| json!({"driver": "fault", "node-name": "f0", "file": file});
    let larger = |log: &str, block: u32| {
        format!(
            "{}: log sectors of 4096 bytes are larger than the guest's blocks of {block}; use \
                 logical-block-size=4096, or a log with smaller sectors",
            bed.path(log)
        )
    };
    qmp.ok("blockdev-add", node(&bed, json!({"log-sector-size": 4096})));
    qmp.ok("blockdev-add", fault("l0"));
    assert_eq!(qmp.fails("block-export-add", export("f0", 512)), larger("w.log", 512));
    qmp.ok("blockdev-del", json!({"node-name": "f0"}));
    qmp.ok("blockdev-del", json!({"node-name": "l0"}));

    // No guest has such blocks.
    std::fs::File::create(bed.path("huge.log")).unwrap();
    let huge = json!({"log-sector-size": 65536, "log": {"driver": "file", "filename": bed.path("huge.log")}});
    qmp.ok("blockdev-add", node(&bed, huge));
    let err = qmp.fails("block-export-add", export("l0", 4096));
    let words = "log sectors of 65536 bytes are larger than the guest's blocks of 4096; use a log with \
                 smaller sectors";
    assert_eq!(err, format!("{}: {words}", bed.path("huge.log")));
    qmp.ok("blockdev-del", json!({"node-name": "l0"}));

    // Begun under a guest with larger blocks.
    qmp.ok("blockdev-add", fault("d0"));
    qmp.ok("block-export-add", export("f0", 4096));
    let start = json!({"device": "e0", "log": bed.path("live.log"), "log-sector-size": 4096});
    qmp.ok("x-vublk-log-start", start);
    qmp.ok("block-export-del", json!({"id": "e0"}));
    assert_eq!(qmp.fails("block-export-add", export("f0", 512)), larger("live.log", 512));
    qmp.ok("block-export-add", export("f0", 4096));
    assert!(backend.terminate().success());
}
