//! What serve says when it starts.

use std::fs::File;
use std::process::Command;

use crate::common::{fails, ok};

/// A process that ends with the test, whatever happens.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_served_chain_is_told_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "base", "1M"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    let log = File::create(d.join("log")).unwrap();
    let mut child = Ended(
        Command::new(env!("CARGO_BIN_EXE_vublk"))
            .args(["serve", "-f", "qcow2", "--socket-path", "s", "--pidfile", "pid", "top"])
            .current_dir(d)
            .env_remove("VUBLK_LOG")
            .stderr(log)
            .spawn()
            .unwrap(),
    );
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !d.join("pid").exists() {
        assert!(std::time::Instant::now() < deadline, "it does not start");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // All of the chain is locked.
    for name in ["top", "mid", "base"] {
        let line = fails(d, &["resize", "-f", "raw", name, "+1M"], 1);
        assert!(line.contains("does not share the right"), "{line}");
    }
    ok(d, &["map", "mid"]);
    let pid = rustix::process::Pid::from_child(&child.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.0.wait().unwrap().success());
    let log = std::fs::read_to_string(d.join("log")).unwrap();
    for line in [
        ": serving top (qcow2, 1048576 bytes, read-write,",
        ":   over mid (qcow2, 1048576 bytes)",
        ":   over base (raw, 1048576 bytes)",
    ] {
        assert!(log.contains(line), "{log}");
    }
    assert!(!log.contains("imago"), "{log}");
}
