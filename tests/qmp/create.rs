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

#[test]
fn differencing_images_in_one_step_and_on_nodes() {
    let served = Served::start(&[]);
    let mut qmp = served.client();
    let dir = served.control.parent().unwrap();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let data: Vec<u8> = (0..3u32 << 20).map(|at| (at >> 9) as u8).collect();
    std::fs::write(dir.join("base.raw"), &data).unwrap();
    common::ok(dir, &["convert", "-q", "-f", "raw", "-O", "vhdx", "base.raw", "base.vhdx"]);
    let wanted = |file: Value| {
        json!({"driver": "vhdx", "file": file, "size": data.len(), "block-size": 1 << 20,
               "backing-file": "base.vhdx", "backing-fmt": "vhdx"})
    };
    let one_step = wanted(json!({"driver": "file", "filename": path("one.vhdx")}));
    assert_eq!(trace(&mut qmp, &create(&one_step), "concluded"), TRACE);
    qmp.ok(DISMISS);
    let file = json!({"driver": "file", "filename": path("two.vhdx"), "size": 0});
    assert_eq!(trace(&mut qmp, &create(&file), "concluded"), TRACE);
    qmp.ok(DISMISS);
    let node = json!({"driver": "file", "node-name": "f", "filename": path("two.vhdx")});
    qmp.ok(json!({"execute": "blockdev-add", "arguments": node}).to_string());
    assert_eq!(trace(&mut qmp, &create(&wanted(json!("f"))), "concluded"), TRACE);
    qmp.ok(DISMISS);
    qmp.ok(r#"{"execute": "blockdev-del", "arguments": {"node-name": "f"}}"#);
    for name in ["one.vhdx", "two.vhdx"] {
        let info = common::ok(dir, &["info", "--output=json", name]);
        let info: Value = serde_json::from_str(&info).unwrap();
        let details = &info["format-specific"]["data"];
        assert_eq!(
            (&info["backing-filename"], &details["type"]),
            (&json!("base.vhdx"), &json!("differencing"))
        );
        assert_eq!(details["parent-locator"]["relative_path"], ".\\base.vhdx");
        assert_eq!(details["parent-locator"]["absolute_win32_path"], path("base.vhdx"));
        common::ok(dir, &["convert", "-q", "-f", "vhdx", "-O", "raw", name, "out.raw"]);
        assert!(std::fs::read(dir.join("out.raw")).unwrap() == data, "{name}");
        // It knows the parent again. What it reads is not compared: where an image has no sector
        // bitmap yet, libvhdi takes the file's first bytes for one.
        if let Some((len, _)) = common::libvhdi::reads(dir, &[name, "base.vhdx"]) {
            assert_eq!(len, data.len() as u64);
        }
    }
    // A parent of another format, or none of which the format is said, is refused with the way out.
    let refused = |qmp: &mut Qmp, options: &[(&str, Value)], words: &str| {
        let mut wanted = wanted(json!({"driver": "file", "filename": path("no.vhdx")}));
        for (key, value) in options {
            match value {
                Value::Null => drop(wanted.as_object_mut().unwrap().remove(*key)),
                value => wanted[*key] = value.clone(),
            }
        }
        trace(qmp, &create(&wanted), "concluded");
        let jobs = qmp.ok(r#"{"execute": "query-jobs"}"#);
        let error = jobs[0]["error"].as_str().unwrap();
        assert!(error.contains(words), "{error}");
        assert_eq!(jobs[0]["current-progress"], 1);
        qmp.ok(DISMISS);
        assert!(!dir.join("no.vhdx").exists());
    };
    refused(&mut qmp, &[("backing-fmt", json!("raw"))], "can stand on VHDX images only");
    refused(&mut qmp, &[("backing-fmt", Value::Null)], "without its format");
    refused(&mut qmp, &[("backing-file", json!("nothing.vhdx"))], "nothing.vhdx");
}

/// Has somebody else look at an image.
fn check(path: &str, format: &str) {
    let Ok(output) = Command::new("qemu-img").args(["info", "-f", format, path]).output() else {
        return common::skip("qemu-img is not installed");
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("64 MiB"), "{path}: {text}");
}
