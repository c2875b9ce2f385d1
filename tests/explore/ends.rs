//! Explorations that do not come to their end, and checkers that make more of their file than a disk.

use std::path::Path;

use serde_json::Value;
use vublk::write_log::LogBuilder;

use crate::common::vublk;
use crate::{SIZE, without_fuse};

/// Two states of which the second is not good.
fn one_write(d: &Path) {
    std::fs::write(d.join("base.img"), vec![0; SIZE]).unwrap();
    std::fs::write(d.join("w.log"), LogBuilder::new(512).write(0, &[b'x'; 512]).finish()).unwrap();
}

const EXPLORE: [&str; 9] =
    ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "-j", "1"];
/// The write must not be there.
const IS_MISSING: &str = "test \"$(head -c 1 {})\" != x";

/// What was found may have taken hours.
#[test]
fn what_was_found_before_an_error_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    one_write(d);
    // Who is checked a third time is looked at more closely.
    let check = format!("echo {{}} >>runs; test $(wc -l <runs) -lt 3 || exit 127; {IS_MISSING}");
    let output = vublk(d, &[&EXPLORE[..], &["--check", &check, "--output", "json"]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("the checker cannot be run"), "{stderr}");
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["finished"], &report["failed"]), (&false.into(), &1.into()), "{report}");
    assert_eq!(report["failures"][0]["state"], "E1");
    // Nothing was found yet.
    let never = [&EXPLORE[..], &["--check", "exit 127 # {}", "--output", "json"]].concat();
    assert!(vublk(d, &never).stdout.is_empty());
}

#[test]
fn what_was_found_is_told_where_it_cannot_be_kept() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    one_write(d);
    // In the way of the results.
    std::fs::create_dir(d.join("r.json.new")).unwrap();
    let options = ["--check", IS_MISSING, "--results", "r.json", "--output", "json"];
    let output = vublk(d, &[&EXPLORE[..], &options].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("r.json: Is a directory"), "{stderr}");
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["failed"], 1, "{report}");
}

/// A state that is kept by another name is what it was, and no state is written into another file.
#[test]
fn copies_are_files_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    one_write(d);
    let kept = |state: &str| std::fs::read(d.join("tmp").join(state)).unwrap();
    let check = "ln {} \"$TMPDIR/{state}\"";
    let Some(mut command) = without_fuse(d, check) else { return };
    assert!(command.status().unwrap().success());
    assert_eq!((kept("E0:s=0")[0], kept("E0:s=1")[0]), (0, b'x'));
    assert_eq!(kept("E0:s=1").len(), SIZE);

    std::fs::write(d.join("tmp/other"), "other").unwrap();
    let check = "ln -sf \"$TMPDIR/other\" {}";
    assert!(without_fuse(d, check).unwrap().status().unwrap().success());
    assert_eq!(kept("other"), b"other");
}
