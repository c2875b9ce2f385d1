//! Stream and commit: the same commands to us and to qemu-storage-daemon, on chains of the same content,
//! give the same refusals and the same events.

use std::path::Path;

use serde_json::{Value, json};

use crate::Served;
use crate::client::Qmp;
use crate::common::{Qsd, tool_ok};

/// base ◄ mid ◄ top ◄ top2: raw, and qcow2 with something in each.
fn make(dir: &Path) {
    std::fs::write(dir.join("base"), vec![9; 4 << 20]).unwrap();
    for (below, format, image) in
        [("base", "raw", "mid"), ("mid", "qcow2", "top"), ("top", "qcow2", "top2")]
    {
        let create = ["create", "-q", "-f", "qcow2", "-b", below, "-F", format, image];
        tool_ok(dir, "qemu-img", &create);
    }
    for (image, write) in [
        ("mid", "write -P 1 0 128k"),
        ("top", "write -P 2 64k 128k"),
        ("top2", "write -P 3 1M 64k"),
    ] {
        tool_ok(dir, "qemu-io", &["-f", "qcow2", "-c", write, image]);
    }
}

/// A client, with the events that came so far.
struct Client {
    qmp: Qmp,
    events: Vec<Value>,
}

impl Client {
    /// With the chain in `dir` added, node by node.
    fn start(socket: &Path, dir: &Path) -> Client {
        let mut client = Client { qmp: Qmp::negotiated(socket), events: Vec::new() };
        let mut below = None;
        for (node, driver) in
            [("base", "raw"), ("mid", "qcow2"), ("top", "qcow2"), ("top2", "qcow2")]
        {
            let file = json!({
                "driver": "file", "node-name": format!("f-{node}"), "filename": dir.join(node),
            });
            let mut options = json!({"driver": driver, "node-name": node, "file": file});
            if let Some(below) = below {
                options["backing"] = below;
            }
            below = Some(options);
        }
        client.ok("blockdev-add", below.unwrap());
        client
    }

    fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.qmp.send(line);
        loop {
            let message = self.qmp.read();
            if message.get("event").is_none() {
                return message;
            }
            self.note(message);
        }
    }

    #[track_caller]
    fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.run(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    fn note(&mut self, mut event: Value) {
        // A job of QEMU's rests whenever the graph is looked at.
        let status = event["data"]["status"].as_str();
        let is_rest = matches!(status, Some("paused" | "standby"));
        let goes_on = status == Some("running") && self.events.len() > 1;
        if !is_rest && !goes_on {
            self.events.push(json!([event["event"].take(), event["data"].take()]));
        }
    }

    /// All events so far, up to and with this one.
    fn until(&mut self, name: &str, status: Option<&str>) -> Vec<Value> {
        let is_it = |event: &Value| {
            event[0] == name && status.is_none_or(|status| event[1]["status"] == status)
        };
        while !self.events.iter().any(is_it) {
            let event = self.qmp.read();
            self.note(event);
        }
        let end = self.events.iter().position(is_it).unwrap() + 1;
        self.events.drain(..end).collect()
    }
}

/// Both of them, on chains of their own.
struct Both {
    _qsd: Qsd,
    _served: Served,
    _dirs: [tempfile::TempDir; 2],
    theirs: Client,
    ours: Client,
}

impl Both {
    fn start() -> Option<Both> {
        let dirs = [0, 1].map(|_| tempfile::Builder::new().prefix("vublk-").tempdir().unwrap());
        let mut qsd = Qsd::start(dirs[0].path())?;
        let served = Served::start(&[]);
        dirs.iter().for_each(|dir| make(dir.path()));
        let theirs = Client::start(qsd.socket(), dirs[0].path());
        let ours = Client::start(&served.control, dirs[1].path());
        Some(Both { _qsd: qsd, _served: served, _dirs: dirs, theirs, ours })
    }

    /// Demands the same answer.
    #[track_caller]
    fn same(&mut self, command: &str, arguments: Value) {
        let theirs = self.theirs.run(command, arguments.clone());
        let ours = self.ours.run(command, arguments.clone());
        assert_eq!(ours, theirs, "{command} {arguments}");
    }

    /// Demands the same events.
    #[track_caller]
    fn same_until(&mut self, name: &str, status: Option<&str>) {
        let theirs = self.theirs.until(name, status);
        let ours = self.ours.until(name, status);
        assert_eq!(ours, theirs);
    }

    fn same_to_the_end(&mut self) {
        self.same_until("JOB_STATUS_CHANGE", Some("null"));
    }
}

#[test]
fn stream_and_commit_refuse_what_qemu_refuses() {
    let Some(mut both) = Both::start() else { return };
    let stream = [
        json!({"device": "x"}),
        json!({"device": "top2"}),
        json!({"device": "top2", "job-id": "j", "base": "x"}),
        json!({"device": "top2", "job-id": "j", "base": "base", "base-node": "base"}),
        json!({"device": "top2", "job-id": "j", "base": "base", "bottom": "top"}),
        json!({"device": "top2", "job-id": "j", "bottom": "top", "base-node": "base"}),
        json!({"device": "top2", "job-id": "j", "base-node": "zz"}),
        json!({"device": "top2", "job-id": "j", "base-node": "top2"}),
        json!({"device": "top2", "job-id": "j", "base-node": "f-top2"}),
        json!({"device": "top2", "job-id": "j", "bottom": "zz"}),
        json!({"device": "top2", "job-id": "j", "bottom": "f-top2"}),
        json!({"device": "top2", "job-id": "j", "backing-file": "b"}),
        json!({"device": "top2", "job-id": "j", "on-error": "x"}),
        json!({"device": "top2", "job-id": "j", "filter-node-name": "base"}),
        json!({"device": "top2", "job-id": "j", "filter-node-name": "#1"}),
        json!({"device": "top2", "job-id": "1"}),
        json!({"device": "top2", "job-id": "j", "speed": "fast"}),
        json!({"job-id": "j"}),
    ];
    for arguments in stream {
        both.same("block-stream", arguments);
    }
    let commit = [
        json!({"device": "x"}),
        json!({"device": "top2"}),
        json!({"device": "top2", "job-id": "j", "base": "x"}),
        json!({"device": "top2", "job-id": "j", "base": "base", "base-node": "base"}),
        json!({"device": "top2", "job-id": "j", "top": "top", "top-node": "top"}),
        json!({"device": "top2", "job-id": "j", "base-node": "zz"}),
        json!({"device": "top2", "job-id": "j", "top-node": "zz"}),
        json!({"device": "top2", "job-id": "j", "top": "zz"}),
        json!({"device": "top2", "job-id": "j", "base-node": "top2"}),
        json!({"device": "top2", "job-id": "j", "base-node": "f-top2"}),
        json!({"device": "top2", "job-id": "j", "top-node": "f-top2"}),
        json!({"device": "top2", "job-id": "j", "base-node": "top", "top-node": "mid"}),
        json!({"device": "top2", "job-id": "j", "base-node": "mid", "top-node": "mid"}),
        json!({"device": "top2", "job-id": "j", "backing-file": "b"}),
        json!({"device": "top2", "job-id": "j", "top-node": "base"}),
        json!({"device": "top2", "job-id": "j", "filter-node-name": "base"}),
    ];
    for arguments in commit {
        both.same("block-commit", arguments);
    }
    // While one is at work.
    let slow = json!({"device": "top2", "job-id": "j", "speed": 1, "auto-dismiss": false});
    both.same("block-stream", slow);
    both.same_until("JOB_STATUS_CHANGE", Some("running"));
    both.same("block-stream", json!({"device": "top2", "job-id": "k"}));
    both.same("block-stream", json!({"device": "top2", "job-id": "j"}));
    both.same("block_resize", json!({"node-name": "top2", "size": 8 << 20}));
    both.same("job-complete", json!({"id": "j"}));
    both.same("job-finalize", json!({"id": "j"}));
    both.same("job-dismiss", json!({"id": "j"}));
    both.same("job-resume", json!({"id": "j"}));
    both.same("job-cancel", json!({"id": "j"}));
    let until = ("JOB_STATUS_CHANGE", Some("concluded"));
    let names = |events: Vec<Value>| -> Vec<Value> {
        // How far it was is chance.
        events.into_iter().map(|event| json!([event[0], event[1]["status"]])).collect()
    };
    let theirs = names(both.theirs.until(until.0, until.1));
    assert_eq!(names(both.ours.until(until.0, until.1)), theirs);
    both.same("job-dismiss", json!({"id": "j"}));
    both.same_to_the_end();
}

#[test]
fn stream_and_commit_have_the_events_that_qemu_has() {
    let Some(mut both) = Both::start() else { return };
    // Below the top.
    both.same(
        "block-commit",
        json!({
            "device": "top2", "job-id": "j", "top-node": "top", "base-node": "mid",
        }),
    );
    both.same_to_the_end();
    // A stream that is finalized and dismissed by hand.
    both.same(
        "block-stream",
        json!({
            "device": "top2", "job-id": "j", "base-node": "base", "auto-finalize": false,
            "auto-dismiss": false,
        }),
    );
    both.same_until("BLOCK_JOB_PENDING", None);
    both.same("query-jobs", json!({}));
    // It is over when this is answered.
    both.same("block-job-finalize", json!({"id": "j"}));
    both.same("query-block-jobs", json!({}));
    both.same("job-dismiss", json!({"id": "j"}));
    both.same_to_the_end();
    // The active layer: cancelled by force, left, and completed.
    for end in ["job-cancel", "block-job-cancel", "block-job-complete"] {
        both.same("block-commit", json!({"device": "top2", "job-id": "j"}));
        both.same_until("BLOCK_JOB_READY", None);
        both.same("query-block-jobs", json!({}));
        let key = if end == "job-cancel" { "id" } else { "device" };
        both.same(end, json!({key: "j"}));
        both.same_to_the_end();
    }
    // What is left.
    let names = |nodes: Value| -> Vec<String> {
        let nodes = nodes.as_array().unwrap().iter();
        let row = |node: &Value| format!("{} {}", node["node-name"], node["drv"]);
        let mut names: Vec<_> = nodes.map(row).filter(|row| row.contains("top2")).collect();
        names.sort();
        names
    };
    let flat = json!({"flat": true});
    let theirs = names(both.theirs.ok("query-named-block-nodes", flat.clone()));
    assert_eq!(names(both.ours.ok("query-named-block-nodes", flat)), theirs);
    for dir in &both._dirs {
        assert_eq!(std::fs::read(dir.path().join("base")).unwrap(), content());
    }
}

/// What the disk holds.
fn content() -> Vec<u8> {
    let mut content = vec![9; 4 << 20];
    content[..64 << 10].fill(1);
    content[64 << 10..192 << 10].fill(2);
    content[1 << 20..(1 << 20) + (64 << 10)].fill(3);
    content
}
