//! What `block-stream` and `block-commit` do about reads and writes that fail: events, states and
//! content, as qemu-storage-daemon has them.

use std::path::{Path, PathBuf};

mod common;

use common::{Backend, Qmp, Qsd, Setup, ok};
use serde_json::{Value, json};
use vublk::frontend::{Personality, Request, Session, SessionOptions};

const DISK: usize = 4 << 20;
/// What the top holds itself.
const HELD: std::ops::Range<usize> = 1 << 20..2 << 20;
const SECTOR: usize = 512;

/// A job, and where the base fails: where the job reads it, or writes it.
#[derive(Clone, Copy)]
struct Case {
    command: &'static str,
    policy: &'static str,
    errno: u64,
}

impl Case {
    fn fails(&self) -> (&'static str, usize) {
        match self.command {
            "block-stream" => ("read", 100 * SECTOR),
            _ => ("write", HELD.start + 100 * SECTOR),
        }
    }

    fn io_status(&self) -> &'static str {
        if self.errno == 28 { "nospace" } else { "failed" }
    }
}

/// `base` full of ones, and `top` on it.
fn images(dir: &Path, format: &str) {
    std::fs::write(dir.join("base"), vec![1; DISK]).unwrap();
    ok(dir, &["create", "-q", "-f", format, "-b", "base", "-F", "raw", "top"]);
}

/// One of the two daemons, with the node `top` on `base`, which fails once.
struct Daemon {
    qmp: Qmp,
    dir: tempfile::TempDir,
    _qemu: Option<Qsd>,
    ours: Option<Backend>,
}

/// What the guest has written to the top.
fn write_top(dir: &Path) {
    common::tool_ok(dir, "qemu-io", &["-c", "write -q -P 2 1M 1M", "top"]);
}

impl Daemon {
    fn qemu(case: Case) -> Daemon {
        let dir = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
        images(dir.path(), "qcow2");
        write_top(dir.path());
        let mut qemu = Qsd::start(dir.path()).expect("it was there a moment ago");
        let mut qmp = qemu.connect();
        let (op, at) = case.fails();
        let error = json!([{"event": "none", "iotype": op, "errno": case.errno, "once": true,
                            "sector": at / SECTOR}]);
        for node in [
            json!({"driver": "blkdebug", "node-name": "bad", "inject-error": error,
                   "image": {"driver": "file", "filename": dir.path().join("base")}}),
            json!({"driver": "raw", "node-name": "base", "file": "bad"}),
            json!({"driver": "qcow2", "node-name": "top", "backing": "base",
                   "file": {"driver": "file", "filename": dir.path().join("top")}}),
        ] {
            qmp.ok("blockdev-add", node);
        }
        Daemon { qmp, dir, _qemu: Some(qemu), ours: None }
    }

    fn ours(case: Case, format: &str) -> Daemon {
        let dir = tempfile::Builder::new().prefix("vublk-").tempdir().unwrap();
        images(dir.path(), format);
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (op, at) = case.fails();
        let nodes = [
            json!({"driver": "raw", "node-name": "image", "read-only": true,
                   "file": {"driver": "file", "filename": path("base")}}),
            json!({"driver": "fault", "node-name": "base", "file": "image"}),
            json!({"driver": format, "node-name": "top", "backing": "base",
                   "file": {"driver": "file", "filename": path("top")}}),
        ];
        let nodes: Vec<_> = nodes.iter().map(Value::to_string).collect();
        let export = format!(
            "vhost-user-blk,id=disk,node-name=top,writable=on,addr.type=unix,addr.path={}",
            path("disk.sock")
        );
        let control = path("qmp.sock");
        let mut args = vec!["--export", &export, "--control", &control];
        nodes.iter().for_each(|node| args.extend(["--blockdev", node]));
        let ours = Setup::new(&args).many().start();
        let mut qmp = Qmp::connect(Path::new(&control));
        let daemon_socket = PathBuf::from(path("disk.sock"));
        let mut guest = session(&daemon_socket);
        let data = vec![2; HELD.len()];
        guest.execute(0, &Request::write(HELD.start as u64, data)).unwrap().ok().unwrap();
        drop(guest);
        let error = json!([{"iotype": op, "errno": case.errno, "once": true, "offset": at,
                            "length": SECTOR}]);
        qmp.ok("x-vublk-fault-set", json!({"device": "base", "inject-error": error}));
        Daemon { qmp, dir, _qemu: None, ours: Some(ours) }
    }

    /// Runs the job to its end; if it stops, has it go on.
    fn run(&mut self, case: Case) -> Vec<String> {
        let mut arguments = json!({"device": "top", "job-id": "j", "on-error": case.policy});
        if case.command == "block-commit" {
            arguments["base-node"] = "base".into();
        }
        self.qmp.ok(case.command, arguments);
        let mut all: Vec<String> = Vec::new();
        let mut is_paused_in_passing = false;
        loop {
            let event = self.qmp.next_event();
            let data = &event["data"];
            let said = match event["event"].as_str().unwrap() {
                "JOB_STATUS_CHANGE" => data["status"].as_str().unwrap().to_string(),
                "BLOCK_JOB_ERROR" => {
                    assert_eq!(data["device"], "j");
                    format!("error: {}, {}", data["operation"], data["action"]).replace('"', "")
                }
                "BLOCK_JOB_COMPLETED" => {
                    let is_whole = data["offset"] == data["len"];
                    let errno = std::io::Error::from_raw_os_error(case.errno as i32).to_string();
                    let cause = errno.split(" (").next().unwrap();
                    let failed = data["error"].as_str().map(|err| err.contains(cause));
                    format!("completed, whole: {is_whole}, failed so: {failed:?}")
                }
                name if name.starts_with("BLOCK_JOB") => name.to_string(),
                _ => continue,
            };
            match said.as_str() {
                // For a moment, as QEMU does for changes of the graph: no error has stopped it.
                "paused" if !all.last().is_some_and(|last| last.ends_with(", stop")) => {
                    is_paused_in_passing = true;
                    continue;
                }
                "running" if std::mem::take(&mut is_paused_in_passing) => continue,
                "paused" => {
                    let jobs = self.qmp.ok("query-block-jobs", json!({}));
                    assert_eq!(jobs[0]["io-status"], case.io_status());
                    assert_eq!(
                        (&jobs[0]["paused"], &jobs[0]["busy"]),
                        (&true.into(), &false.into())
                    );
                    let at = jobs[0]["offset"].clone();
                    all.push(format!("paused at {at}"));
                    self.qmp.ok("job-resume", json!({"id": "j"}));
                    continue;
                }
                "BLOCK_JOB_READY" => {
                    let jobs = self.qmp.ok("query-block-jobs", json!({}));
                    assert_eq!(jobs[0]["io-status"], "ok");
                    self.qmp.ok("job-complete", json!({"id": "j"}));
                }
                _ => {}
            }
            let is_over = said == "null";
            all.push(said);
            if is_over {
                return all;
            }
        }
    }
}

fn session(socket: &Path) -> Session {
    Session::open(socket, SessionOptions::new(Personality::Qemu)).unwrap()
}

/// What the disk is, whatever has become of the job.
fn disk() -> Vec<u8> {
    let mut disk = vec![1; DISK];
    disk[HELD].fill(2);
    disk
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for command in ["block-stream", "block-commit"] {
        for policy in ["report", "ignore", "stop", "enospc"] {
            for errno in [5, 28] {
                cases.push(Case { command, policy, errno });
            }
        }
    }
    cases
}

/// The same events of all policies, and a disk that is what it was.
#[test]
fn errors_end_or_stop_jobs_as_in_qemu() {
    if !common::have("qemu-storage-daemon") || !common::have("qemu-io") {
        return common::skip("qemu-storage-daemon or qemu-io is not installed");
    }
    for case in cases() {
        let Case { command, policy, errno } = case;
        let theirs = Daemon::qemu(case).run(case);
        // A stop is seen where each happens to be: they copy pieces of other sizes.
        let without_places = |all: &[String]| -> Vec<String> {
            let cut = |said: &String| match said.starts_with("paused at") {
                true => "paused".to_string(),
                false => said.clone(),
            };
            all.iter().map(cut).collect()
        };
        for format in ["qcow2", "add-cow"] {
            let shown = format!("{command} of {format}, on-error {policy}, errno {errno}");
            let mut daemon = Daemon::ours(case, format);
            let ours = daemon.run(case);
            assert_eq!(without_places(&ours), without_places(&theirs), "{shown}");
            let failed = ours.iter().any(|said| said.contains("failed so: Some(true)"));
            let nodes = daemon.qmp.ok("query-named-block-nodes", json!({}));
            let served = daemon.qmp.ok("query-block", json!({}));
            let served = &served[0]["inserted"]["node-name"];
            let top = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "top");
            let below = top.unwrap()["children"].as_array().unwrap().len();
            match (failed, command) {
                (true, _) => assert_eq!((served, below), (&json!("top"), 2), "{shown}"),
                (false, "block-stream") => {
                    assert_eq!((served, below), (&json!("top"), 1), "{shown}")
                }
                (false, _) => assert_eq!(served, "base", "{shown}"),
            }
            // Whoever failed can be run again.
            if failed {
                let again = daemon.run(case);
                assert!(!again.iter().any(|said| said.contains("error")), "{shown}: {again:?}");
            }
            let mut guest = session(&daemon.dir.path().join("disk.sock"));
            for at in (0..DISK).step_by(1 << 20) {
                let read = guest.execute(0, &Request::read(at as u64, 1 << 20)).unwrap();
                assert!(read.data == disk()[at..][..1 << 20], "{shown}: from {at} on");
            }
            drop(guest);
            assert!(daemon.ours.take().unwrap().terminate().success(), "{shown}");
        }
    }
}

/// A commit of a layer below the top comes back to what it had to leave out, as QEMU's does.
#[test]
fn a_commit_that_ignores_errors_tries_again() {
    let case = Case { command: "block-commit", policy: "ignore", errno: 5 };
    let mut daemon = Daemon::ours(case, "qcow2");
    let overlay = daemon.dir.path().join("overlay");
    let snapshot = json!({"device": "disk", "snapshot-file": overlay, "format": "qcow2"});
    daemon.qmp.ok("blockdev-snapshot-sync", snapshot);
    let arguments = json!({"device": "disk", "top-node": "top", "job-id": "j",
                           "base-node": "base", "on-error": "ignore"});
    daemon.qmp.ok("block-commit", arguments);
    let mut errors = 0;
    loop {
        let event = daemon.qmp.next_event();
        match event["event"].as_str().unwrap() {
            "BLOCK_JOB_ERROR" => errors += 1,
            "BLOCK_JOB_COMPLETED" => {
                assert_eq!(event["data"]["error"], Value::Null);
                assert_eq!(event["data"]["offset"], event["data"]["len"]);
                break;
            }
            _ => {}
        }
    }
    assert_eq!(errors, 1);
    let mut guest = session(&daemon.dir.path().join("disk.sock"));
    let read = guest.execute(0, &Request::read(HELD.start as u64, HELD.len() as u32)).unwrap();
    assert!(read.data.iter().all(|byte| *byte == 2));
    drop(guest);
    assert!(daemon.ours.take().unwrap().terminate().success());
    assert!(std::fs::read(daemon.dir.path().join("base")).unwrap() == disk());
}
