//! `blockdev-reopen`, and what else changes how a file is used.

use serde_json::{Value, json};

use crate::Served;
use crate::common::Qmp;

/// Adds a raw image of this name in a file, with more options for the file; its node is `file-NAME`.
fn add(qmp: &mut Qmp, served: &Served, name: &str, read_only: bool, more: Value) -> Value {
    let path = served.dir.path().join(name);
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let mut file = json!({"driver": "file", "node-name": format!("file-{name}"), "filename": path});
    file.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    qmp.ok("blockdev-add", file.clone());
    let raw = json!({"driver": "raw", "node-name": name, "file": format!("file-{name}"),
                     "read-only": read_only});
    qmp.ok("blockdev-add", raw);
    file
}

fn with(options: &Value, name: &str, value: Value) -> Value {
    let mut options = options.clone();
    options[name] = value;
    options
}

fn reopen(options: &[&Value]) -> Value {
    json!({"options": options})
}

/// Which of the nodes are read-only.
fn read_only(qmp: &mut Qmp, names: &[&str]) -> Vec<bool> {
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let is_read_only = |name: &&str| {
        let mut nodes = nodes.as_array().unwrap().iter();
        nodes.find(|node| node["node-name"] == **name).unwrap()["ro"].as_bool().unwrap()
    };
    names.iter().map(is_read_only).collect()
}

#[test]
fn options_that_cannot_change_are_refused() {
    let mut served = Served::start(&[]);
    let mut qmp = Qmp::connect(&served.control);
    let file = add(&mut qmp, &served, "a", false, json!({}));
    let unlocked = add(&mut qmp, &served, "b", false, json!({"locking": "off"}));
    let shared = json!({"read-only": true, "force-share": true});
    let shared = add(&mut qmp, &served, "c", true, shared);
    let cannot = |option: &str| format!("Cannot change the option '{option}'");
    for (options, expected) in [
        (with(&file, "locking", json!("off")), cannot("locking")),
        (with(&unlocked, "locking", json!("on")), cannot("locking")),
        (with(&shared, "force-share", json!(false)), cannot("force-share")),
        (
            with(&shared, "read-only", json!(false)),
            "force-share=on can only be used with read-only images".into(),
        ),
        (
            json!({"driver": "raw", "node-name": "a", "file": "file-a", "force-share": true}),
            "force-share belongs to the file: give it to the node below (file.force-share=on)"
                .into(),
        ),
    ] {
        assert_eq!(qmp.fails("blockdev-reopen", reopen(&[&options])), expected, "{options}");
    }
    for same in [&file, &with(&file, "locking", json!("on")), &unlocked, &shared] {
        qmp.ok("blockdev-reopen", reopen(&[same]));
    }
    served.assert_well();
}

/// What the operator has said of a file holds for the image in it, whoever wants to write that.
#[test]
fn a_file_that_is_read_only_is_not_written() {
    let mut served = Served::start(&[]);
    let mut qmp = Qmp::connect(&served.control);
    let file = add(&mut qmp, &served, "a", true, json!({"read-only": true}));
    let image = json!({"driver": "raw", "node-name": "a", "file": "file-a"});
    let refused = "Block node is read-only: 'file-a'";
    assert_eq!(qmp.fails("blockdev-reopen", reopen(&[&image])), refused);
    qmp.ok("blockdev-reopen", reopen(&[&with(&image, "auto-read-only", json!(true))]));
    assert_eq!(qmp.fails("block-stream", json!({"job-id": "j", "device": "a"})), refused);
    let overlay = served.dir.path().join("overlay");
    let snapshot = json!({"node-name": "a", "snapshot-file": overlay, "snapshot-node-name": "top"});
    qmp.ok("blockdev-snapshot-sync", snapshot);
    assert_eq!(qmp.fails("block-commit", json!({"job-id": "j", "device": "top"})), refused);
    assert_eq!(read_only(&mut qmp, &["a", "file-a"]), [true, true]);
    // Nobody but the operator changes that; and it does not matter which of the two he names first.
    let file = with(&file, "read-only", json!(false));
    qmp.ok("blockdev-reopen", reopen(&[&image, &file]));
    assert_eq!(read_only(&mut qmp, &["a", "file-a"]), [false, false]);
    let file = with(&file, "read-only", json!(true));
    qmp.ok("blockdev-reopen", reopen(&[&file, &with(&image, "read-only", json!(true))]));
    assert_eq!(qmp.fails("blockdev-reopen", reopen(&[&image])), refused);
    // A change that is taken back takes that back, too.
    let free = with(&file, "read-only", json!(false));
    let wrong = json!({"driver": "raw", "node-name": "a", "file": "x"});
    qmp.fails("blockdev-reopen", reopen(&[&free, &wrong]));
    assert_eq!(qmp.fails("blockdev-reopen", reopen(&[&image])), refused);
    served.assert_well();
}

/// A job that has to write to a layer at its end is told at its start that it may not.
#[test]
fn a_job_does_not_begin_what_it_may_not_end() {
    let mut served = Served::start(&[]);
    let mut qmp = Qmp::connect(&served.control);
    add(&mut qmp, &served, "base", false, json!({}));
    for (below, name) in [("base", "mid"), ("mid", "over"), ("over", "top")] {
        let file = served.dir.path().join(name);
        let overlay =
            json!({"node-name": below, "snapshot-file": file, "snapshot-node-name": name});
        qmp.ok("blockdev-snapshot-sync", overlay);
    }
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let over = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "over").unwrap();
    let mut children = over["children"].as_array().unwrap().iter();
    let file = &children.find(|child| child["child"] == "file").unwrap()["node-name"];
    let file = json!({"driver": "file", "node-name": file, "filename": over["file"],
                      "read-only": true});
    qmp.ok("blockdev-reopen", reopen(&[&file]));
    let commit = json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base"});
    let err = qmp.fails("block-commit", commit.clone());
    assert!(err.starts_with("Block node is read-only: '#block"), "{err}");
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    qmp.ok("blockdev-reopen", reopen(&[&with(&file, "read-only", json!(false))]));
    qmp.ok("block-commit", commit);
    assert_eq!(qmp.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    served.assert_well();
}

/// A file that nobody but readers has locked is not written because a job or an operator wants to.
#[test]
fn what_is_shared_with_writers_is_only_read() {
    let mut served = Served::start(&[]);
    let mut qmp = Qmp::connect(&served.control);
    let path = served.dir.path().join("a");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let file = json!({"driver": "file", "node-name": "f", "filename": path, "force-share": true});
    let image = json!({"driver": "raw", "node-name": "a", "file": file, "read-only": true});
    qmp.ok("blockdev-add", image);
    let image = json!({"driver": "raw", "node-name": "a", "file": "f"});
    let err = qmp.fails("blockdev-reopen", reopen(&[&image]));
    assert!(err.ends_with("force-share=on can only be used with read-only images"), "{err}");
    served.assert_well();
}
