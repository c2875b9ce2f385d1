//! `vublk bench` against a back-end that is killed.

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::common::{Backend, Qmp, Setup, wait_until};

/// Starts `vublk bench --reconnect`, which writes, and reads back in the end.
fn bench(backend: &Backend, seconds: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.args(["bench", "--rw", "randwrite", "--verify", "--ramp", "0", "--iodepth", "4"]);
    command.args(["--duration", seconds, "--reconnect", "60", "--timeout", "60", "--queues", "2"]);
    command.args(["--output", "json", "--socket-path"]).arg(&backend.socket);
    command.stdout(Stdio::piped()).spawn().unwrap()
}

fn report(bench: Child) -> Value {
    let output = bench.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["load"]["mismatches"], 0, "{text}");
    assert!(report["load"]["checked"].as_u64().unwrap() > 0, "{text}");
    report
}

/// How many of one kind of request the guest's disk has had; none while nobody can be asked.
fn count(backend: &Backend, what: &str) -> u64 {
    let Some(mut qmp) = Qmp::try_connect(&backend.dir.path().join("qmp.sock")) else { return 0 };
    qmp.ok("query-blockstats", json!({}))[0]["stats"][what].as_u64().unwrap()
}

fn start() -> Backend {
    // Where the process runs, which is the directory of the test.
    Setup::new(&["--control", "qmp.sock"]).prelude("cd \"$DIR\"").start()
}

#[test]
fn bench_tells_of_the_process_that_came_last() {
    let mut backend = start();
    let bench = bench(&backend, "3");
    wait_until("writes", || count(&backend, "wr_operations") > 0);
    backend.kill();
    std::thread::sleep(std::time::Duration::from_millis(300));
    backend.spawn();
    let report = report(bench);
    assert_eq!(report["load"]["outages_ms"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(report["backend"]["pid"], backend.pid(), "{report}");
    assert_eq!(report["pid"], backend.pid(), "{report}");
    let watched = report["backend"]["seconds"].as_f64().unwrap();
    assert!(watched < report["load"]["seconds"].as_f64().unwrap() - 0.3, "{report}");
    assert!(backend.terminate().success());
}

#[test]
fn bench_reads_back_across_a_kill() {
    let mut backend = start();
    let bench = bench(&backend, "1");
    // It reads only when it has ended to write.
    wait_until("reads", || count(&backend, "rd_operations") > 0);
    backend.kill();
    backend.spawn();
    let report = report(bench);
    assert_eq!(report["load"]["outages_ms"].as_array().unwrap().len(), 1, "{report}");
    assert!(backend.terminate().success());
}
