//! `vublk qmp` and `vublk top`, the clients that come with us.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::Served;
use crate::common;

fn vublk(command: &str, socket: &Path, words: &[&str]) -> Output {
    let mut vublk = Command::new(env!("CARGO_BIN_EXE_vublk"));
    vublk.arg(command).arg(socket).args(words).env_remove("VUBLK_LOG");
    vublk.output().expect("it runs")
}

#[track_caller]
fn ok(command: &str, socket: &Path, words: &[&str]) -> String {
    let output = vublk(command, socket, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {error}");
    String::from_utf8(output.stdout).expect("text")
}

#[track_caller]
fn refused(socket: &Path, words: &[&str]) -> String {
    let output = vublk("qmp", socket, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    String::from_utf8(output.stderr).expect("text")
}

#[test]
fn commands_from_the_command_line() {
    let mut served = Served::start(&[]);
    let socket = served.control.clone();
    let qmp = |words: &[&str]| ok("qmp", &socket, words);
    assert_eq!(qmp(&["query-status"]), "running: yes\nstatus: running\n");
    let json: Value = serde_json::from_str(&qmp(&["query-status", "--json"])).unwrap();
    assert_eq!(json["running"], true);
    let list = qmp(&[]);
    assert!(list.lines().any(|line| line == "job-pause id=…"), "{list}");
    assert!(list.contains("\nblock-job-cancel device=… [force=…]\n"), "{list}");
    // A size with a unit, where the schema wants a number; a name that looks like one.
    assert_eq!(qmp(&["block_resize", "node-name=image", "size=32M"]), "");
    assert_eq!(served.backend.content().len(), 32 << 20);
    assert_eq!(refused(&socket, &["job-pause", "id=1"]), "vublk: Job not found\n");
    assert_eq!(
        refused(&socket, &["block-job-cancel", "device=x", "force=on"]),
        "vublk: Block job 'x' not found\n"
    );
    assert_eq!(
        refused(&socket, &["block-job-cancel", "device=x", "force=perhaps"]),
        "vublk: Invalid parameter type for 'force', expected: boolean\n"
    );
    assert_eq!(refused(&socket, &["job-pause", "x"]), "vublk: argument x: key=value is expected\n");
    // Who has typed it is told how it goes.
    let usage = "block_resize [device=…] [node-name=…] size=… [x-vublk-shrink=…]";
    assert_eq!(
        refused(&socket, &["block_resize", "device=disk"]),
        format!("vublk: Parameter 'size' is missing ({usage})\n")
    );
    assert_eq!(
        refused(&socket, &["query-status", "x=1"]),
        "vublk: Parameter 'x' is unexpected (query-status)\n"
    );
    assert_eq!(
        refused(&socket, &["query-statsu"]),
        format!(
            "vublk: The command query-statsu has not been found (vublk qmp {} lists what there is)\n",
            socket.display()
        )
    );
    assert!(refused(&socket, &["query-status", "--wait"]).contains("which job?"));
    assert!(refused(Path::new("/nonexistent"), &["quit"]).contains("No such file or directory"));
    assert_eq!(qmp(&["quit"]), "");
    assert!(served.backend.wait_end().success());
}

#[test]
fn top_shows_what_is_done() {
    let served = Served::start(&[]);
    let socket = served.control.clone();
    let idle: Value =
        serde_json::from_str(&ok("top", &socket, &["--once", "--json", "--interval", "0.1"]))
            .unwrap();
    let disk = &idle["disks"][0];
    assert_eq!((&disk["id"], &disk["connected"]), (&"disk".into(), &false.into()), "{idle}");
    assert_eq!(disk["reads-per-second"], 0.0);
    assert_eq!(disk["read-latency"], Value::Null);
    let mut load = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["bench", "--rw", "randrw", "--flush-every", "2", "--duration", "60"])
        .arg("--socket-path")
        .arg(&served.backend.socket)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a load");
    let busy = common::soon();
    loop {
        let text = ok("top", &socket, &["--once", "--json", "--interval", "0.5"]);
        let look: Value = serde_json::from_str(&text).unwrap();
        if is_all_timed(&look["disks"][0]) {
            break;
        }
        assert!(Instant::now() < busy, "{look}");
    }
    let page = ok("top", &socket, &["--once", "--interval", "0.2"]);
    assert!(page.lines().nth(1).unwrap().starts_with("disk "), "{page}");
    load.kill().expect("a child");
    load.wait().expect("a child");
}

/// Whether a disk is seen to read, write and flush, with plausible times.
fn is_all_timed(disk: &Value) -> bool {
    let rate = |name: &str| disk[name].as_f64().is_some_and(|rate| rate > 0.0);
    let time = |name: &str| {
        let of = |percentile: &str| disk[name][percentile].as_u64().unwrap_or(0);
        of("p50-ns") > 0 && of("p99-ns") >= of("p50-ns")
    };
    ["reads", "writes", "flushes"].iter().all(|what| rate(&format!("{what}-per-second")))
        && ["read", "write", "flush"].iter().all(|what| time(&format!("{what}-latency")))
        && disk["connected"] == true
}
