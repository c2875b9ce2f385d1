//! What serve says when it starts.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::common::{LoopDevice, Qmp, Setup, fails, ok, tool_ok, wait_until};

/// A process that ends with the test, whatever happens.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program, serving on the socket "s" in `dir`.
fn served(dir: &Path, args: &[&str], log: Stdio) -> Ended {
    let child = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["serve", "--socket-path", "s", "--pidfile", "pid"])
        .args(args)
        .current_dir(dir)
        .env_remove("VUBLK_LOG")
        .stderr(log)
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !dir.join("pid").exists() {
        assert!(std::time::Instant::now() < deadline, "it does not start");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ended(child)
}

#[test]
fn a_served_chain_is_told_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "base", "1M"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    let log = File::create(d.join("log")).unwrap();
    let mut child = served(d, &["-f", "qcow2", "top"], log.into());
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

/// A qcow2 image that is served as raw is a small disk with a strange content, and the guest that
/// writes to it destroys the image.
#[test]
fn a_format_that_is_probably_wrong_is_doubted() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "qcow2", "q", "1M"]);
    ok(d, &["create", "-q", "plain", "1M"]);
    let log_of = |args: &[&str]| {
        let log = File::create(d.join("log")).unwrap();
        drop(served(d, args, log.into()));
        std::fs::remove_file(d.join("pid")).unwrap();
        std::fs::read_to_string(d.join("log")).unwrap()
    };
    let log = log_of(&["-f", "raw", "q"]);
    assert!(log.contains("WARN") && log.contains("q: looks like qcow2"), "{log}");
    for args in [&["-f", "raw", "plain"][..], &["-f", "qcow2", "q"], &["-f", "raw", "-r", "q"]] {
        let log = log_of(args);
        assert!(!log.contains("WARN"), "{args:?}: {log}");
    }
}

/// Systemd starts a service that has died again, but not one whose start would fail again.
#[test]
fn the_exit_code_tells_whether_another_start_may_succeed() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "disk", "1M"]);
    let _child = served(d, &["-f", "raw", "disk"], Stdio::null());
    let serve = |args: &[&str], code| {
        fails(d, &[&["serve", "--socket-path", "other"], args].concat(), code)
    };
    let line = serve(&["-f", "raw", "disk"], 1);
    assert!(line.contains("disk"), "another process has locked it: {line}");
    serve(&["-f", "raw", "missing"], 78);
    ok(d, &["create", "-q", "plain", "1M"]);
    serve(&["-f", "qcow2", "plain"], 78);
    serve(&["--allow-dir", "missing", "-f", "raw", "plain"], 78);
    // What is no socket does not become one.
    let line = fails(d, &["serve", "--socket-path", "plain", "-f", "raw", "plain"], 78);
    assert!(line.ends_with("remove it, or listen elsewhere"), "{line}");
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/vublk@.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    // 2 is what the parser of options ends with.
    assert!(unit.lines().any(|line| line == "RestartPreventExitStatus=2 78"));
}

/// The host opens such a device for writing all the same, and then refuses each write.
#[test]
fn a_device_that_cannot_be_written_to_is_not_served_as_if_it_could() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    File::create(d.join("backing")).unwrap().set_len(1 << 20).unwrap();
    let Some(device) = LoopDevice::read_only(&d.join("backing")) else { return };
    let line = fails(d, &["serve", "--socket-path", "s", "-f", "raw", device.name()], 78);
    assert_eq!(line, format!("{}: is a read-only block device", device.name()));
    let control = d.join("control");
    let name = device.name();
    let node = |more| format!("driver=host_device,node-name=disk,filename={name},{more}");
    let options = node("auto-read-only=on");
    let args = ["--control", control.to_str().unwrap(), "--blockdev", &options];
    let backend = Setup::new(&args).many().start();
    let nodes = Qmp::connect(&control).ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["ro"], true, "{nodes}\n{}", backend.log());
    drop(backend);
    let backend = Setup::new(&["--read-only"]).image(device.path()).start();
    assert_eq!(backend.qemu().read(0, 0, 512).unwrap(), [0; 512]);
}

/// What changes the size of a device is the host's; what makes it known is said.
#[test]
fn a_device_that_has_grown_is_looked_at_on_sighup() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let Some(device) = LoopDevice::new(&d.join("backing"), 1 << 20) else { return };
    let control = d.join("control");
    let args = ["--control", control.to_str().unwrap()];
    let mut backend = Setup::new(&args).image(device.path()).start();
    let mut qmp = Qmp::connect(&control);
    let file = File::options().write(true).open(d.join("backing")).unwrap();
    file.set_len(2 << 20).unwrap();
    tool_ok(d, "losetup", &["-c", device.name()]);
    let err = qmp.fails("block_resize", json!({"device": "disk", "size": 3 << 20}));
    assert!(err.contains("send SIGHUP to the process that serves it"), "{err}");
    backend.signal(rustix::process::Signal::HUP);
    wait_until("the size of the device", || {
        let nodes = qmp.ok("query-named-block-nodes", json!({}));
        let image = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "image");
        image.unwrap()["image"]["virtual-size"] == 2 << 20
    });
    // Or whoever knows the size says it.
    file.set_len(3 << 20).unwrap();
    tool_ok(d, "losetup", &["-c", device.name()]);
    qmp.ok("block_resize", json!({"device": "disk", "size": 3 << 20}));
    assert!(backend.terminate().success());
    ok(d, &["resize", "-q", "-f", "raw", device.name(), "3M"]);
    let err = fails(d, &["resize", "-q", "-f", "raw", device.name(), "4M"], 1);
    assert!(err.contains("the size of a block device cannot be changed from here"), "{err}");
}
