//! The same bytes to us and to qemu-storage-daemon: the same answers.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::Served;
use crate::client::Qmp;
use crate::common::Qsd;

/// What comes back for these bytes, up to the answer to a last command that marks the end.
fn answers(path: &Path, bytes: &[u8], negotiate: bool) -> Vec<Value> {
    let mut qmp = if negotiate { Qmp::negotiated(path) } else { Qmp::connect(path) };
    if !negotiate {
        qmp.read();
    }
    qmp.send(bytes);
    // A byte that resets both, one that ends the recovery of both, and a mark.
    qmp.send(b"\xff\n{\"execute\": \"end\", \"id\": \"end\"}");
    let mut all = Vec::new();
    loop {
        let message = qmp.read();
        if message["id"] == "end" {
            break;
        }
        all.push(message);
    }
    // One of QEMU's monitors has one client at a time: wait until it has seen us leave.
    qmp.stream().shutdown(std::net::Shutdown::Both).expect("a connection");
    qmp.stream().set_read_timeout(Some(Duration::from_millis(10))).expect("a timeout");
    let _ = (&mut qmp.stream()).read(&mut [0]);
    all
}

const CASES: &[&[u8]] = &[
    b"bad\n",
    b"{bad}\n",
    b"{\"a\":bad}\n",
    b"{\"a\" 1}",
    b"{\"a\":1 \"b\"}",
    b"[1 2]",
    b"[1,]",
    b"{\"a\":1,\"a\":2}",
    b"{\"a\":1]",
    b"]",
    b",",
    b":",
    b"{,}",
    b"{:1}",
    b"{1:2}",
    b"{\"execute\":\"x\",}",
    b"\"\\x\"",
    b"\"\\u12g4\"",
    b"\"\\ud800\"",
    b"\"\\ud83d\\ude00\"",
    b"\"\xc3\x28\"",
    b"01 \n",
    b"-\n",
    b"- 1\n",
    b"1.\n",
    b"1e\n",
    b"1.5e3\n",
    b"+1\n",
    b".5\n",
    b"a1\n",
    b"TRUE\n",
    b"true false\n",
    b"%d\n",
    b"\xff",
    b"@@@\n{\"execute\":\"x\"}",
    b"\"abc\n{\"execute\":\"x\"}",
    b"{'a':[\"x\xff{\"execute\":\"x\"}",
    b"HELLO WORLD\r\n{\"execute\":\"x\"}",
    b"/* */{\"execute\":\"x\"}",
    b"{\"a\":1}\x01{\"execute\":\"x\"}",
    b"{}",
    b"[]",
    b"12\n",
    b"null\n",
    b"{'execute':'x'}",
    b"{\"execute\":\"x\"}{\"execute\":\"y\"}",
    b"{\"execute\":1}",
    b"{\"exec\":\"x\"}",
    b"{\"exec-oob\":\"x\"}",
    b"{\"execute\":\"x\",\"arguments\":[]}",
    b"{\"execute\":\"x\",\"foo\":1}",
    b"{\"execute\":\"x\",\"id\":{\"a\":[1,2.5]}}",
    b"{\"execute\":\"x\",\"id\":null}",
    b"{\"id\":5}",
    b"{\"id\":5,\"execute\":\"x\",\"arguments\":1}",
    b"{\"execute\":\"query-version\",\"arguments\":{\"x\":1}}",
    b"{\"execute\":\"qmp_capabilities\"}",
    b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[]}}",
    b"{\"execute\":\"query-jobs\"}",
    b"{\"execute\":\"query-block-jobs\"}",
    b"{\"execute\":\"block-job-pause\"}",
    b"{\"execute\":\"block-job-pause\",\"arguments\":{\"device\":1}}",
    b"{\"execute\":\"block-job-pause\",\"arguments\":{\"device\":\"zz\"}}",
    b"{\"execute\":\"block-job-cancel\",\"arguments\":{\"device\":\"zz\",\"force\":1}}",
    b"{\"execute\":\"block-job-cancel\",\"arguments\":{\"device\":\"zz\",\"force\":null}}",
    b"{\"execute\":\"block-job-finalize\",\"arguments\":{\"id\":\"zz\"}}",
    b"{\"execute\":\"block-job-set-speed\",\"arguments\":{\"device\":\"zz\",\"speed\":-1}}",
    b"{\"execute\":\"block-job-set-speed\",\"arguments\":{\"device\":\"zz\",\"speed\":\"1\"}}",
    b"{\"execute\":\"block-job-set-speed\",\"arguments\":{\"device\":\"zz\",\"speed\":1.5}}",
    b"{\"execute\":\"job-pause\",\"arguments\":{\"id\":\"zz\"}}",
    b"{\"execute\":\"job-dismiss\",\"arguments\":{}}",
    b"{\"execute\":\"blockdev-del\",\"arguments\":{\"node-name\":\"nope\"}}",
    b"{\"execute\":\"block-export-del\",\"arguments\":{\"id\":\"nope\"}}",
    b"{\"execute\":\"query-block-exports\",\"arguments\":{\"a\":{}}}",
];

#[test]
fn the_same_answers_as_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut qsd) = Qsd::start(dir.path()) else { return };
    let served = Served::start(&[]);
    for case in CASES {
        for negotiate in [true, false] {
            let theirs = answers(qsd.socket(), case, negotiate);
            let ours = answers(&served.control, case, negotiate);
            let shown = case.escape_ascii();
            assert_eq!(ours, theirs, "{shown}, negotiated: {negotiate}");
        }
    }
}

#[test]
fn nesting_ends_where_qemu_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut qsd) = Qsd::start(dir.path()) else { return };
    let served = Served::start(&[]);
    for depth in [1024, 1025] {
        let nested = ["[".repeat(depth), "]".repeat(depth)].concat();
        let theirs = answers(qsd.socket(), nested.as_bytes(), true);
        let ours = answers(&served.control, nested.as_bytes(), true);
        assert_eq!(ours[0], theirs[0], "depth {depth}");
    }
}
