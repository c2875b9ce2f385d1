//! Black box tests of `vublk log`.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use vublk::units::ByteRange;
use vublk::write_log::{Flags, LogBuilder};

/// The program under test, in `dir`, with quiet logs.
fn vublk(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.current_dir(dir).env_remove("VUBLK_LOG");
    command.args(["--log-level", "error"]).args(args).output().unwrap()
}

/// Runs it, demands success, and returns what it printed.
fn ok(dir: &Path, args: &[&str]) -> String {
    let output = vublk(dir, args);
    assert!(output.status.success(), "vublk {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs it, demands this exit code, and returns the one line on stderr.
fn fails(dir: &Path, args: &[&str], code: i32) -> String {
    let output = vublk(dir, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "vublk {args:?}: {stderr}");
    let line = stderr.strip_suffix('\n').unwrap_or_else(|| panic!("vublk {args:?}: {stderr:?}"));
    assert!(line.starts_with("vublk: ") && !line.contains('\n'), "vublk {args:?}: {stderr}");
    line["vublk: ".len()..].to_string()
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// A directory with the worked example of the format's description as `ex.log`.
fn example() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let log = LogBuilder::new(512)
        .mark("start")
        .write(3 * 512, &[0xab; 512])
        .discard(ByteRange { offset: 8 * 512, len: 1024 })
        .flush()
        .entry(Flags::FUA.and(Flags::METADATA), 4 * 512, &[0xcd; 512])
        .mark("dm-log-writes-end")
        .finish();
    std::fs::write(dir.path().join("ex.log"), log).unwrap();
    dir
}

#[test]
fn info_counts_what_a_log_holds() {
    let dir = example();
    let info = json_of(&ok(dir.path(), &["log", "info", "--output", "json", "ex.log"]));
    assert_eq!(
        info,
        json!({
            "filename": "ex.log", "version": 1, "sector-size": 512, "entries": 6,
            "file-bytes": 4608, "used-bytes": 4608, "writes": 2, "written-bytes": 1024,
            "discards": 1, "discarded-bytes": 1024, "flushes": 1, "fua": 1, "marks": 2,
            "disk-bytes": 5120,
        })
    );
    let text = ok(dir.path(), &["log", "info", "--log", "ex.log"]);
    for line in ["log: ex.log", "sector size: 512 bytes", "entries: 6", "    marks: 2"] {
        assert!(text.lines().any(|l| l == line), "{text}");
    }
}

#[test]
fn list_shows_entries() {
    let dir = example();
    let text = ok(dir.path(), &["log", "list", "ex.log"]);
    let expected = "\
entry   log sector       sector  sectors  flags
0                1            0        0  MARK start
1                2            3        1  NONE
2                4            8        2  DISCARD
3                5            0        0  FLUSH
4                6            4        1  FUA|METADATA
5                8            0        0  MARK dm-log-writes-end
";
    assert_eq!(text, expected);
    let list = ["log", "list", "--output", "json", "ex.log"];
    let all = json_of(&ok(dir.path(), &list));
    assert_eq!(all.as_array().unwrap().len(), 6);
    assert_eq!(
        all[4],
        json!({"entry": 4, "log-sector": 6, "sector": 4, "sectors": 1, "flags": ["FUA", "METADATA"]})
    );
    let part = [&list[..], &["--start-mark", "start", "--next-flush"]].concat();
    let numbers: Vec<_> = json_of(&ok(dir.path(), &part))
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["entry"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [1, 2, 3]);
    let marks = json_of(&ok(dir.path(), &[&list[..], &["--marks"]].concat()));
    assert_eq!(marks[1]["mark"], "dm-log-writes-end");
    std::fs::write(dir.path().join("empty.log"), LogBuilder::new(4096).finish()).unwrap();
    let none = ok(dir.path(), &["log", "list", "--output", "json", "empty.log"]);
    assert_eq!(json_of(&none), json!([]));
}

#[test]
fn find_prints_what_replay_log_prints() {
    let dir = example();
    let find = |args: &[&str]| ok(dir.path(), &[&["log", "find", "ex.log"], args].concat());
    assert_eq!(find(&["--end-mark", "start"]), "0@2\n");
    assert_eq!(find(&["--next-flush"]), "3@6\n");
    assert_eq!(find(&["--next-fua"]), "4@8\n");
    assert_eq!(find(&["--end-mark", "dm-log-writes-end"]), "5@9\n");
    assert_eq!(find(&["--limit", "2"]), "1@4\n");
    assert_eq!(find(&["--next-flush", "--start-entry", "3"]), "3@6\n");
    let found = json_of(&find(&["--next-fua", "--output", "json"]));
    assert_eq!(found, json!({"entry": 4, "next-log-sector": 8, "stopped-by": "fua"}));
    let not_found =
        |args: &[&str]| fails(dir.path(), &[&["log", "find", "ex.log"], args].concat(), 1);
    let err = not_found(&["--end-mark", "star"]);
    assert_eq!(err, "ex.log: no mark 'star' in what was searched (list shows the marks)");
    let err = not_found(&[]);
    assert_eq!(err, "ex.log: nothing found from the given start to the end of the log");
    let err = not_found(&["--start-entry", "6", "--next-flush"]);
    assert!(err.contains("invalid entry number 6"), "{err}");
}

#[test]
fn what_is_no_log_is_refused() {
    let dir = example();
    std::fs::write(dir.path().join("zeros"), [0; 4096]).unwrap();
    let err = fails(dir.path(), &["log", "info", "zeros"], 1);
    assert!(err.starts_with("zeros: not a dm-log-writes log"), "{err}");
    let err = fails(dir.path(), &["log", "list", "gone.log"], 1);
    assert_eq!(err, "gone.log: No such file or directory");
    let output = vublk(dir.path(), &["log", "info"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    // The example with a header that is not padded.
    let mut bytes = std::fs::read(dir.path().join("ex.log")).unwrap();
    bytes[0x420] = 1;
    std::fs::write(dir.path().join("bad.log"), bytes).unwrap();
    let err = fails(dir.path(), &["log", "info", "bad.log"], 1);
    assert_eq!(err, "bad.log: entry 1: its header is not padded with zeros");
}
