//! The same bytes to us and to qemu-storage-daemon: the same answers.

use std::collections::BTreeMap;
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

/// Commands with something wrong in their arguments, or in what those name.
const BAD_COMMANDS: &[(&str, &str)] = &[
    ("transaction", r#"{}"#),
    ("transaction", r#"{"actions": {}}"#),
    ("transaction", r#"{"actions": [1]}"#),
    ("transaction", r#"{"actions": [{}]}"#),
    ("transaction", r#"{"actions": [{"type": 1}]}"#),
    ("transaction", r#"{"actions": [{"type": "nope", "data": {}}]}"#),
    ("transaction", r#"{"actions": [{"type": "abort"}]}"#),
    ("transaction", r#"{"actions": [{"type": "abort", "data": 1}]}"#),
    ("transaction", r#"{"actions": [{"type": "abort", "data": {"x": 1}}]}"#),
    ("transaction", r#"{"actions": [{"type": "abort", "data": {}, "x": 1}]}"#),
    ("transaction", r#"{"actions": [{"type": "abort", "data": {}}]}"#),
    ("transaction", r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {}}]}"#),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"device": 1, "snapshot-file": "x"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"snapshot-file": 1}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"snapshot-file": "x", "mode": "nope"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"snapshot-file": "x", "mode": 1}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"snapshot-file": "x", "nope": 1}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"snapshot-file": "x"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"device": "d", "node-name": "n", "snapshot-file": "x"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"device": "nope", "snapshot-file": "x"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot-sync", "data": {"node-name": "nope", "snapshot-file": "x"}}]}"#,
    ),
    ("transaction", r#"{"actions": [{"type": "blockdev-snapshot", "data": {"node": "a"}}]}"#),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "b"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot", "data": {"node": [], "overlay": "b"}}]}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "abort", "data": {}}, {"type": "blockdev-snapshot", "data": {"node": "a"}}]}"#,
    ),
    ("transaction", r#"{"actions": [], "properties": 1}"#),
    ("transaction", r#"{"actions": [], "properties": {"completion-mode": "nope"}}"#),
    (
        "transaction",
        r#"{"actions": [{"type": "blockdev-snapshot", "data": {"node": "x", "overlay": "y"}}],
            "properties": {"completion-mode": "grouped"}}"#,
    ),
    (
        "transaction",
        r#"{"actions": [{"type": "abort", "data": {}}], "properties": {"completion-mode": "grouped"}}"#,
    ),
    ("transaction", r#"{"actions": [], "properties": {"x": 1}}"#),
    ("transaction", r#"{"actions": [], "x": 1}"#),
    ("blockdev-add", r#"{}"#),
    ("blockdev-add", r#"{"driver": "nope", "node-name": "n"}"#),
    ("blockdev-add", r#"{"driver": 1, "node-name": "n"}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n"}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "file": 1}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "file": {}}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "file": {"driver": "file"}}"#),
    (
        "blockdev-add",
        r#"{"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": 1}}"#,
    ),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "file": {"driver": "nope"}}"#),
    (
        "blockdev-add",
        r#"{"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "x", "nope": 1}}"#,
    ),
    (
        "blockdev-add",
        r#"{"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "x", "cache": {"direct": 1}}}"#,
    ),
    (
        "blockdev-add",
        r#"{"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "x", "cache": 1}}"#,
    ),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "file": "nope"}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "file": null}"#),
    ("blockdev-add", r#"{"driver": "qcow2", "node-name": "n", "file": "x", "backing": 1}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "discard": "nope", "file": "x"}"#),
    ("blockdev-add", r#"{"driver": "raw", "node-name": "n", "read-only": "on", "file": "x"}"#),
    ("blockdev-add", r#"{"driver": "file", "node-name": "0n", "filename": "/tmp"}"#),
    ("blockdev-add", r#"{"driver": "file", "node-name": "n", "filename": "/nonexistent/x"}"#),
    ("blockdev-create", r#"{"job-id": "j"}"#),
    ("blockdev-create", r#"{"job-id": "j", "options": {}}"#),
    ("blockdev-create", r#"{"job-id": "j", "options": {"driver": "nope"}}"#),
    ("blockdev-create", r#"{"job-id": "j", "options": {"driver": "qcow2"}}"#),
    ("blockdev-create", r#"{"job-id": "j", "options": {"driver": "qcow2", "file": "x"}}"#),
    (
        "blockdev-create",
        r#"{"job-id": "j", "options": {"driver": "qcow2", "file": "x", "size": "1"}}"#,
    ),
    (
        "blockdev-create",
        r#"{"job-id": "j", "options": {"driver": "qcow2", "file": "x", "size": 1, "nope": 1}}"#,
    ),
    (
        "blockdev-create",
        r#"{"job-id": "0j", "options": {"driver": "file", "filename": "x", "size": 1}}"#,
    ),
    ("block-export-add", r#"{}"#),
    ("block-export-add", r#"{"type": "nope", "id": "e"}"#),
    ("block-export-add", r#"{"type": "vhost-user-blk", "id": "e"}"#),
    ("block-export-add", r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n"}"#),
    (
        "block-export-add",
        r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix"}}"#,
    ),
    (
        "block-export-add",
        r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "nope"}}"#,
    ),
    ("block-export-add", r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {}}"#),
    (
        "block-export-add",
        r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": 1}}"#,
    ),
    (
        "block-export-add",
        r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": "s"}}"#,
    ),
    (
        "block-export-add",
        r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": "s"}, "num-queues": -1}"#,
    ),
    (
        "block-export-add",
        r#"{"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": "s"}, "num-queues": 70000}"#,
    ),
    ("block-export-del", r#"{"id": "e", "mode": "nope"}"#),
    ("block-stream", r#"{"device": "x", "on-error": "nope"}"#),
    ("block-stream", r#"{"device": "x"}"#),
    ("block-stream", r#"{"device": "x", "job-id": "j"}"#),
    ("block-stream", r#"{"device": "x", "speed": "1"}"#),
    ("block-commit", r#"{"device": "x", "on-error": "auto"}"#),
    ("block-commit", r#"{"device": "x", "job-id": "j"}"#),
    ("block_resize", r#"{"device": "x"}"#),
    ("block_resize", r#"{"size": 1}"#),
    ("block_resize", r#"{"device": "x", "size": -1}"#),
    ("block_resize", r#"{"node-name": "x", "size": 1024}"#),
    ("blockdev-reopen", r#"{}"#),
    ("blockdev-reopen", r#"{"options": [{}]}"#),
    ("blockdev-reopen", r#"{"options": [{"driver": "raw"}]}"#),
    ("blockdev-reopen", r#"{"options": [{"driver": "raw", "node-name": "x", "file": "y"}]}"#),
    ("blockdev-reopen", r#"{"options": [{"driver": "raw", "file": {"driver": "file"}}]}"#),
    ("blockdev-reopen", r#"{"options": 1}"#),
    ("blockdev-snapshot-sync", r#"{"snapshot-file": "x"}"#),
    ("blockdev-snapshot-sync", r#"{"device": "x"}"#),
    ("blockdev-snapshot", r#"{"node": "x"}"#),
    ("query-named-block-nodes", r#"{"flat": 1}"#),
    ("query-blockstats", r#"{"query-nodes": "x"}"#),
    ("job-complete", r#"{"id": "x"}"#),
    ("block-job-complete", r#"{"device": "x"}"#),
    ("block-job-set-speed", r#"{"device": "x"}"#),
    ("qmp_capabilities", r#"{"enable": ["nope"]}"#),
];

#[test]
fn bad_commands_are_refused_in_qemus_words() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut qsd) = Qsd::start(dir.path()) else { return };
    let served = Served::start(&[]);
    let commands: Vec<_> = BAD_COMMANDS
        .iter()
        .map(|(command, arguments)| {
            format!("{{\"execute\": \"{command}\", \"arguments\": {arguments}}}")
        })
        .collect();
    let all = commands.join("\n");
    let theirs = answers(qsd.socket(), all.as_bytes(), true);
    let ours = answers(&served.control, all.as_bytes(), true);
    for ((command, ours), theirs) in commands.iter().zip(&ours).zip(&theirs) {
        assert!(theirs["error"]["desc"].is_string(), "{command}: {theirs}");
        assert_eq!(ours, theirs, "{command}");
    }
    assert_eq!(ours.len(), theirs.len());
}

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

/// What QEMU's schema says is always in an answer is in ours: clients that are generated from it rely on
/// that.
#[test]
fn no_answer_lacks_what_qemu_always_gives() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut qsd) = Qsd::start(dir.path()) else { return };
    let served = Served::start(&[]);
    let schema = |answer: &Value| -> BTreeMap<String, Value> {
        let entries = answer["return"].as_array().unwrap().iter();
        entries.map(|entry| (entry["name"].as_str().unwrap().to_string(), entry.clone())).collect()
    };
    let question = br#"{"execute": "query-qmp-schema"}"#;
    let theirs = schema(&answers(qsd.socket(), question, true)[0]);
    let ours = schema(&answers(&served.control, question, true)[0]);
    let mut missing = Vec::new();
    let commands = theirs.values().filter(|entry| entry["meta-type"] == "command");
    for command in commands.filter(|command| ours.contains_key(command["name"].as_str().unwrap())) {
        let name = command["name"].as_str().unwrap();
        let types = (&command["ret-type"], &ours[name]["ret-type"]);
        compare_members(name, (&theirs, types.0), (&ours, types.1), &mut missing);
    }
    // Of these there are never any.
    missing.retain(|place| !place.starts_with("query-blockstats: stats: timed_stats: "));
    assert_eq!(missing, [""; 0]);
}

/// Adds to `missing` the members that `theirs` always has and `ours` has not, or not always.
fn compare_members(
    place: &str,
    (their_schema, theirs): (&BTreeMap<String, Value>, &Value),
    (our_schema, ours): (&BTreeMap<String, Value>, &Value),
    missing: &mut Vec<String>,
) {
    let find = |schema: &BTreeMap<String, Value>, name: &Value| {
        schema.get(name.as_str().unwrap_or_default()).cloned().unwrap_or_default()
    };
    let (their_type, our_type) = (find(their_schema, theirs), find(our_schema, ours));
    if their_type["meta-type"] == "array" {
        let types = (&their_type["element-type"], &our_type["element-type"]);
        return compare_members(place, (their_schema, types.0), (our_schema, types.1), missing);
    }
    // What is any value by our schema may be all that QEMU's is.
    if their_type["meta-type"] != "object" || our_type["meta-type"] != "object" {
        return;
    }
    for member in their_type["members"].as_array().into_iter().flatten() {
        let place = format!("{place}: {}", member["name"].as_str().unwrap());
        let is_optional = |member: &Value| member.get("default").is_some();
        let mut our_members = our_type["members"].as_array().into_iter().flatten();
        match our_members.find(|our| our["name"] == member["name"]) {
            // Inside of what both may leave out, what is there has to be whole.
            Some(our) if is_optional(member) || !is_optional(our) => {
                // A type may hold itself.
                if place.matches(':').count() < 8 {
                    let types = (&member["type"], &our["type"]);
                    compare_members(
                        &place,
                        (their_schema, types.0),
                        (our_schema, types.1),
                        missing,
                    );
                }
            }
            None if is_optional(member) => {}
            _ => missing.push(place),
        }
    }
}
