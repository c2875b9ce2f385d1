//! Clients of others, unmodified: the library `qemu.qmp` and its shell, from PyPI.
//! `integration/setup python` installs them.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::Served;
use crate::common;

/// A program of the Python environment, if it was made.
fn program(name: &str) -> Option<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let made = std::env::var_os("VUBLK_INTEGRATION_DIR")
        .map_or_else(|| target.join("integration"), PathBuf::from);
    let program = made.join("python/bin").join(name);
    if !program.exists() {
        common::skip("no qemu.qmp; integration/setup python installs it");
        return None;
    }
    Some(program)
}

#[test]
fn the_library_drives_us() {
    let Some(python) = program("python") else { return };
    let mut served = Served::start(&["--name", "vm"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp/session.py");
    let output = Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .arg(python)
        .args([script.as_ref(), served.control.as_os_str()])
        .output()
        .expect("python runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(served.backend.wait_end().success(), "it was told to quit");
}

#[test]
fn the_shell_drives_us() {
    let Some(shell) = program("qmp-shell") else { return };
    let mut served = Served::start(&[]);
    let mut child = Command::new("timeout")
        .args(["-s", "KILL", "60"])
        .arg(shell)
        .arg(&served.control)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the shell runs");
    let lines = "query-status\njob-pause id=zz\nblock_resize node-name=image size=33554432\n\
                 block-stream device=nope job-id=j\nblock-commit device=nope\n\
                 query-block\nquery-named-block-nodes\nquit\n";
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in [
        "\"running\": true",
        "Job not found",
        "\"virtual-size\": 33554432",
        "Cannot find device='nope' nor node-name='nope'",
        "Device 'nope' not found",
    ] {
        assert!(text.contains(expected), "no {expected} in {text}");
    }
    assert!(served.backend.wait_end().success(), "it was told to quit");
}
