//! `blockdev-create`, the job that every client can see from its beginning to its dismissal.

use std::process::Command;

use serde_json::{Value, json};

use crate::Served;
use crate::client::Qmp;
use crate::common;

/// Starts a job and returns the states it goes through, up to `last`, with its name in each.
fn trace(qmp: &mut Qmp, command: &Value, last: &str) -> Vec<String> {
    qmp.send(command.to_string());
    let mut states = Vec::new();
    let mut is_answered = false;
    // The first events may come before or after the answer.
    while !is_answered || states.last().is_none_or(|state| state != last) {
        let message = qmp.read();
        assert!(message.get("error").is_none(), "{command}: {message}");
        if message["event"] == "JOB_STATUS_CHANGE" {
            assert_eq!(message["data"]["id"], "j");
            states.push(message["data"]["status"].as_str().unwrap().to_string());
        } else {
            assert!(message.get("return").is_some(), "no other event is due: {message}");
            is_answered = true;
        }
    }
    states
}

fn create(options: &Value) -> Value {
    json!({"execute": "blockdev-create", "arguments": {"job-id": "j", "options": options}})
}

const DISMISS: &str = r#"{"execute": "job-dismiss", "arguments": {"id": "j"}}"#;
const TRACE: [&str; 5] = ["created", "running", "waiting", "pending", "concluded"];

#[test]
fn the_trace_of_qemu() {
    let served = Served::start(&[]);
    let mut qmp = served.client();
    let path = |name: &str| served.control.with_file_name(name).to_str().unwrap().to_string();
    let file = json!({"driver": "file", "filename": path("x.raw"), "size": 1 << 20});
    assert_eq!(trace(&mut qmp, &create(&file), "concluded"), TRACE);
    let jobs = qmp.ok(r#"{"execute": "query-jobs"}"#);
    let concluded = json!([{"id": "j", "type": "create", "status": "concluded",
                            "current-progress": 1, "total-progress": 1}]);
    assert_eq!(jobs, concluded);
    assert_eq!(qmp.ok(r#"{"execute": "query-block-jobs"}"#), json!([]));
    let not_ready = "Job 'j' in state 'concluded' cannot accept command verb 'finalize'";
    let finalize = DISMISS.replace("dismiss", "finalize");
    assert_eq!(qmp.error(&finalize), ("GenericError".into(), not_ready.into()));
    assert_eq!(qmp.error(&create(&file).to_string()).1, "Job ID 'j' already in use");
    assert_eq!(trace(&mut qmp, &serde_json::from_str(DISMISS).unwrap(), "null"), ["null"]);
    assert_eq!(qmp.error(DISMISS).1, "Job not found");
    assert_eq!(std::fs::metadata(path("x.raw")).unwrap().len(), 1 << 20);
    // One that fails says so in the list.
    let nowhere = json!({"driver": "file", "filename": path("no/such"), "size": 512});
    let failed = trace(&mut qmp, &create(&nowhere), "concluded");
    assert_eq!(failed, ["created", "running", "aborting", "concluded"]);
    let jobs = qmp.ok(r#"{"execute": "query-jobs"}"#);
    assert!(jobs[0]["error"].as_str().unwrap().contains("No such file"), "{jobs}");
    qmp.ok(DISMISS);
    // Of two clients one asks and both are told.
    let mut other = served.client();
    trace(
        &mut qmp,
        &create(&json!({"driver": "file", "filename": path("y"), "size": 512})),
        TRACE[4],
    );
    assert_eq!(other.event("JOB_STATUS_CHANGE"), json!({"id": "j", "status": "created"}));
}

#[test]
fn images_on_nodes_and_in_one_step() {
    let served = Served::start(&[]);
    let mut qmp = served.client();
    let path = |name: &str| served.control.with_file_name(name).to_str().unwrap().to_string();
    for format in ["qcow2", "vhdx"] {
        let name = path(&format!("two-steps.{format}"));
        let file = json!({"driver": "file", "filename": name, "size": 4096});
        assert_eq!(trace(&mut qmp, &create(&file), "concluded"), TRACE);
        qmp.ok(DISMISS);
        let node = json!({"driver": "file", "node-name": "f", "filename": name});
        qmp.ok(json!({"execute": "blockdev-add", "arguments": node}).to_string());
        let image = json!({"driver": format, "file": "f", "size": 64 << 20});
        assert_eq!(trace(&mut qmp, &create(&image), "concluded"), TRACE);
        let jobs = qmp.ok(r#"{"execute": "query-jobs"}"#);
        assert_eq!(jobs[0].get("error"), None, "{jobs}");
        qmp.ok(DISMISS);
        qmp.ok(r#"{"execute": "blockdev-del", "arguments": {"node-name": "f"}}"#);
        check(&name, format);
        let name = path(&format!("one-step.{format}"));
        let file = json!({"driver": "file", "filename": name});
        let image = json!({"driver": format, "file": file, "size": 64 << 20});
        assert_eq!(trace(&mut qmp, &create(&image), "concluded"), TRACE);
        qmp.ok(DISMISS);
        check(&name, format);
    }
    let image = json!({"driver": "qcow2", "file": "image", "size": 64 << 20});
    let (_, desc) = qmp.error(&create(&image).to_string());
    assert!(desc.contains("Node 'image' is in use by"), "{desc}");
    // Nothing is left over.
    let names = std::fs::read_dir(served.control.parent().unwrap()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_str().unwrap().starts_with('.')), "{names:?}");
}

/// Has somebody else look at an image.
fn check(path: &str, format: &str) {
    let Ok(output) = Command::new("qemu-img").args(["info", "-f", format, path]).output() else {
        return common::skip("qemu-img is not installed");
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("64 MiB"), "{path}: {text}");
}
