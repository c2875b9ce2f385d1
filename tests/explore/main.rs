//! `vublk log explore` as a black box: planted bugs, a file system made by mke2fs, kill and resume.

#[path = "../common/mod.rs"]
mod common;
mod ends;
mod guest;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{fails, ok, tool_ok, vublk};
use serde_json::Value;
use vublk::write_log::LogBuilder;

const SIZE: usize = 1 << 20;

/// A base of zeros and a log; epoch after epoch, 6 writes of 4 KiB, each in a place of its own.
fn small_disk(dir: &Path, epochs: u8) {
    std::fs::write(dir.join("base.img"), vec![0; SIZE]).unwrap();
    let mut log = LogBuilder::new(512).mark("start");
    for epoch in 0..epochs {
        for write in 0..6 {
            log = log.write(write * 4096, &[epoch * 10 + write as u8 + 1; 4096]);
        }
        log = log.flush();
    }
    std::fs::write(dir.join("w.log"), log.mark("end").finish()).unwrap();
}

/// A checker in shell: the bug is that write 5 of epoch 1 is there and write 2
/// of epoch 0 is still there.
const PLANTED: &str = "test \"$(head -c 16385 {} | tail -c 1 | od -An -tu1)\" != '  15' || \
                       test \"$(head -c 4097 {} | tail -c 1 | od -An -tu1)\" != '   2'";

fn explore(dir: &Path, check: &str, more: &[&str]) -> (Option<i32>, Value) {
    let args = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--output", "json"];
    let args = [&args[..], &["--check", check], more].concat();
    let output = vublk(dir, &args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let json =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|err| panic!("{err}: {stderr}"));
    (output.status.code(), json)
}

#[test]
fn a_planted_bug_is_found_shrunk_and_reproduced() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 3);
    let (code, report) = explore(dir.path(), PLANTED, &["--results", "r.json", "--check-alike"]);
    assert_eq!(code, Some(1));
    assert_eq!(report["finished"], true);
    // And what the last flush has left, with nothing after it.
    assert_eq!(report["states"], 3 * 64 + 1);
    // Nothing of an epoch is all of the one before, after the first.
    assert_eq!(report["duplicates"], 3);
    assert_eq!(report["checked"], 3 * 64 - 2);
    assert_eq!(report["failed"], 16, "of 64 subsets, those with the one and without the other");
    let failure = &report["failures"][0];
    // Entry 0 is a mark, 7 a flush; 8 to 13 are the writes of epoch 1.
    assert_eq!(failure["state"], "E9:s=0111");
    assert_eq!((&failure["dropped"], &failure["torn"]), (&1.into(), &0.into()));
    assert_eq!(failure["writes"][1]["fate"], "dropped");
    assert_eq!(failure["writes"][5]["fate"], "after the cut");
    assert_eq!(failure["mark-before"], "start (entry 0)");
    assert_eq!(failure["mark-after"], "end (entry 22)");

    let again = failure["reproduce"].as_str().unwrap().strip_prefix("vublk ").unwrap();
    let shell = |line: &str| {
        let line = format!("{} {line}", env!("CARGO_BIN_EXE_vublk"));
        Command::new("sh").args(["-c", &line]).current_dir(dir.path()).output().unwrap()
    };
    let output = shell(again);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, "E9:s=0111: the checker exited with 1\n");
    let good = shell(&again.replace("E9:s=0111", "E9:s=1111"));
    assert_eq!(good.status.code(), Some(0), "{}", String::from_utf8_lossy(&good.stderr));

    let junit = ok(dir.path(), &["log", "report", "r.json", "--output", "junit"]);
    assert!(junit.contains("failures=\"1\"") && junit.contains("E9:s=0111"), "{junit}");
    let text = ok(dir.path(), &["log", "report", "r.json"]);
    assert!(text.contains("193 of 193 states") && text.contains("1 dropped, 0 torn"), "{text}");
    let base = std::fs::read(dir.path().join("base.img")).unwrap();
    assert!(base.iter().all(|byte| *byte == 0), "the base is never written to");
}

#[test]
fn a_checker_may_write_and_the_next_state_is_fresh() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 2);
    // Fails where it finds what an earlier one has left.
    let check = "test \"$(tail -c 512 {} | head -c 4)\" != left && \
                 printf left | dd of={} bs=1 seek=1048064 conv=notrunc 2>/dev/null && \
                 test \"$(tail -c 512 {} | head -c 4)\" = left && test $(stat -c %s {}) = 1048576";
    let (code, report) = explore(dir.path(), check, &["--check-alike"]);
    assert_eq!((code, &report["failed"]), (Some(0), &0.into()), "{report}");
    assert_eq!(report["checked"], 127);
}

/// The checker of [`PLANTED`] looks at two of an epoch's six writes, which leaves four disks to check.
#[test]
fn states_that_differ_where_nobody_looks_are_checked_once() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 2);
    let look =
        |at: u32| format!("dd if={{}} bs=4096 skip={at} count=1 2>/dev/null | od -An -tu1 -N1");
    let planted = format!("test $({}) != 15 || test $({}) != 2", look(4), look(1));
    let (code, report) = explore(dir.path(), &planted, &["-j", "1"]);
    assert_eq!((code, &report["states"]), (Some(1), &129.into()), "{report}");
    assert_eq!(report["failures"][0]["state"], "E9:s=0111", "{report}");
    if Path::new("/dev/fuse").exists() {
        // All that fail are looked at, and one for each way in which the others look.
        assert_eq!((&report["checked"], &report["failed"]), (&(4 + 16).into(), &16.into()));
        assert_eq!(report["alike"], 127 - 20, "{report}");
    }
    let (_, report) = explore(dir.path(), &planted, &["--check-alike"]);
    assert_eq!((&report["checked"], &report["alike"]), (&127.into(), &0.into()), "{report}");
    // Who is told the name of the state may look at it in other ways.
    let (_, report) = explore(dir.path(), "test -n {state} -a -e {}", &["-j", "1"]);
    assert_eq!((&report["checked"], &report["alike"]), (&127.into(), &0.into()), "{report}");
    let args = ["log", "explore", "w.log", "--base", "base.img", "--check", "true {}", "-j", "1"];
    let text = ok(dir.path(), &args);
    let all = "129 of 129 states: 2 checked, 2 duplicates, 125 alike, 0 failed";
    assert!(text.contains(all) || !Path::new("/dev/fuse").exists(), "{text}");
}

#[test]
fn an_exploration_goes_on_after_a_kill_and_after_ctrl_c() {
    use rustix::process::{Pid, Signal, kill_process};
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 4);
    let check = format!("sleep 0.02; {PLANTED}");
    let args =
        ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--results", "r.json"];
    for signal in [Signal::KILL, Signal::INT] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vublk"))
            .args(args)
            .args(["--check", &check])
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let done = || -> u64 {
            let bytes = std::fs::read(dir.path().join("r.json")).unwrap_or_default();
            serde_json::from_slice(&bytes).map_or(0, |r: Value| r["done"].as_u64().unwrap())
        };
        let (before, deadline) = (done(), Instant::now() + Duration::from_secs(120));
        while done() <= before {
            assert!(Instant::now() < deadline, "no progress");
            std::thread::sleep(Duration::from_millis(20));
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = child.wait().unwrap();
        if signal == Signal::INT {
            assert_eq!(status.code(), Some(1), "not finished");
        }
    }
    let before = ok(dir.path(), &["log", "report", "r.json", "--output", "json"]);
    let before: Value = serde_json::from_str(&before).unwrap();
    assert!(before["finished"] == false && before["done"].as_u64().unwrap() > 0, "{before}");
    let (code, report) = explore(dir.path(), &check, &["--results", "r.json"]);
    assert_eq!((code, &report["finished"]), (Some(1), &true.into()));
    assert_eq!((&report["done"], &report["states"]), (&257.into(), &257.into()));
    assert_eq!(report["failures"][0]["state"], "E9:s=0111");
    // Those in hand when the first was killed are checked twice, and none is left out.
    let answered = report["checked"].as_u64().unwrap() + report["alike"].as_u64().unwrap();
    assert_eq!((answered, &report["duplicates"]), (253, &4.into()), "{report}");

    let error = fails(dir.path(), &[&args[..], &["--check", "true {}"]].concat(), 1);
    assert!(error.contains("r.json: holds the results of another exploration"), "{error}");
}

/// An exploration in a directory, whose checker has begun something that does not end.
fn hanging(dir: &Path, check: &str, more: &[&str]) -> std::process::Child {
    let args =
        ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--timeout", "100000"];
    let child = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args([&args[..], &["--check", check], more].concat())
        .current_dir(dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    common::wait_until("a checker that hangs", || dir.join("hangs").exists());
    child
}

/// Ends it as Ctrl-C does; returns its exit code.
fn interrupt(mut child: std::process::Child) -> Option<i32> {
    use rustix::process::{Pid, Signal, kill_process};
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    common::wait_until("its end", || child.try_wait().unwrap().is_some());
    child.wait().unwrap().code()
}

/// Whether the process whose number is in this file runs. (A dead one may wait for whoever inherited it.)
fn runs(pid: &Path) -> bool {
    let pid = std::fs::read_to_string(pid).unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn ctrl_c_ends_a_checker_that_runs_and_what_was_found_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.img"), vec![0; SIZE]).unwrap();
    let log = LogBuilder::new(512).write(0, &[b'x'; 512]).write(4096, &[b'y'; 512]);
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    // The second of four states is not good, and the third hangs, with a child of its own.
    let count = "echo {} >>runs; test -e free || test $(wc -l <runs) -lt 3 || \
                 { sleep 100000 & echo $! >pid; touch hangs; wait; }; \
                 test \"$(head -c 1 {})\" != x";
    let options = ["--results", "r.json", "-j", "1", "--check-alike", "--timeout", "100000"];
    let child = hanging(d, count, &options[..5]);
    assert_eq!(interrupt(child), Some(1));
    common::wait_until("the end of the checker's child", || !runs(&d.join("pid")));
    let kept: Value = serde_json::from_slice(&std::fs::read(d.join("r.json")).unwrap()).unwrap();
    assert_eq!((&kept["finished"], &kept["done"]), (&false.into(), &2.into()), "{kept}");
    assert_eq!((&kept["failed"], &kept["failures"][0]["shrunk"]), (&1.into(), &false.into()));
    let junit = ok(d, &["log", "report", "r.json", "--output", "junit"]);
    assert!(junit.contains("not finished: 2 of 4") && junit.contains("errors=\"1\""), "{junit}");
    std::fs::write(d.join("free"), "").unwrap();
    let (code, report) = explore(d, count, &options);
    assert_eq!((code, &report["finished"], &report["failed"]), (Some(1), &true.into(), &2.into()));
    assert_eq!(report["failures"][0]["state"], "E1");
}

#[test]
fn ctrl_c_ends_shrinking_and_the_same_command_goes_on_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.img"), vec![0; SIZE]).unwrap();
    let log = LogBuilder::new(512).write(0, &[b'x'; 512]);
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    // There are two states; who is checked a third time is looked at more closely.
    let check = "echo {} >>runs; test -e free || test $(wc -l <runs) -lt 3 || \
                 { touch hangs; exec sleep 100000; }; test \"$(head -c 1 {})\" != x";
    let options = ["--results", "r.json", "-j", "1", "--check-alike", "--timeout", "100000"];
    assert_eq!(interrupt(hanging(d, check, &options[..5])), Some(1));
    let kept: Value = serde_json::from_slice(&std::fs::read(d.join("r.json")).unwrap()).unwrap();
    assert_eq!((&kept["finished"], &kept["done"]), (&false.into(), &2.into()), "{kept}");
    std::fs::write(d.join("free"), "").unwrap();
    let (_, report) = explore(d, check, &options);
    assert_eq!((&report["finished"], &report["checked"]), (&true.into(), &2.into()), "{report}");
    assert_eq!(report["failures"][0]["shrunk"], true);
}

#[test]
fn ctrl_c_ends_the_check_of_one_state() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    let child = hanging(dir.path(), "touch hangs; exec sleep 100000 <{}", &["--state", "E1"]);
    assert_eq!(interrupt(child), Some(1));
}

/// Else it would still have the file in which the next state is shown.
#[test]
fn what_a_checker_leaves_running_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    let check = "sleep 100000 <{} & echo $! >pid";
    let args = ["log", "explore", "w.log", "--base", "base.img", "--state", "E1", "--check", check];
    ok(dir.path(), &args);
    common::wait_until("the end of the checker's child", || !runs(&dir.path().join("pid")));
}

/// Nor has what is no member of its process group any more.
#[test]
fn daemons_that_a_checker_leaves_are_ended_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    // Each one has a child, and its parent has ended before. Those of another worker go on.
    let daemon = "sh -c 'sleep 100000 & echo $! >child; echo $$ >apart; wait'";
    let check = format!(
        "mkdir -p $(basename {{}}); cd $(basename {{}}); for file in apart child; do \
         test ! -e $file || ! test -e /proc/$(cat $file) || exit 1; done; rm -f apart; \
         (setsid {daemon} <{{}} &); until test -s apart; do sleep 0.01; done; \
         test -e /proc/$(cat apart)"
    );
    let (code, report) = explore(d, &check, &["-j", "2", "--check-alike"]);
    assert_eq!((code, &report["failed"]), (Some(0), &0.into()), "{report}");
    for worker in ["0.img", "1.img"] {
        assert!(["apart", "child"].iter().all(|pid| !runs(&d.join(worker).join(pid))), "{worker}");
    }
}

#[test]
fn signals_reach_a_checker() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    // By the shell alone: what it starts has a mask of its own.
    let check = "test -e {} && while read -r name value; do test $name != SigBlk: || break; done \
                 < /proc/self/status && test $value = 0000000000000000";
    let (code, report) = explore(dir.path(), check, &[]);
    assert_eq!(code, Some(0), "{report}");
}

#[test]
fn a_damaged_sidecar_costs_no_report() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 2);
    std::fs::write(d.join("w.log.sidecar"), vec![0x55; 8192]).unwrap();
    let (code, report) = explore(d, PLANTED, &["--results", "r.json"]);
    assert_eq!((code, &report["failures"][0]["state"]), (Some(1), &"E9:s=0111".into()), "{report}");
    assert_eq!(report["without-order"], "w.log.sidecar: not the sidecar of a log");
    let text = ok(d, &["log", "report", "r.json"]);
    assert!(text.contains("the order of requests is not told: w.log.sidecar: not the"), "{text}");
}

/// The path of a state's file is one word, wherever files for a while are made.
#[test]
fn a_path_with_spaces_is_one_word() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    std::fs::create_dir(d.join("it's a place")).unwrap();
    let check = "test $(head -c 1 {} | wc -c) = 1";
    let output = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--check", check])
        .current_dir(d)
        .env("TMPDIR", d.join("it's a place"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A mark promises what a flush has made durable. The disk may be the same before and after it, and
/// yet right before and wrong after.
#[test]
fn a_checker_is_told_the_last_mark() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.img"), vec![0; SIZE]).unwrap();
    let log = LogBuilder::new(512).mark("made").write(0, &[b'1'; 512]).flush().mark("it's 1");
    let log = log.write(0, &[b'2'; 512]).write(512, &[b'9'; 512]).flush().mark("it's 2");
    let log = log.write(4096, &[b'x'; 512]).mark("dm-log-writes-end");
    std::fs::write(dir.path().join("w.log"), log.finish()).unwrap();

    let (code, report) = explore(dir.path(), "echo {mark} >>told; test -e {}", &["--check-alike"]);
    assert_eq!((code, &report["states"]), (Some(0), &8.into()));
    // Two disks are there twice, but not with the same mark.
    assert_eq!(report["duplicates"], 0);
    let told = std::fs::read_to_string(dir.path().join("told")).unwrap();
    let count = |mark: &str| told.lines().filter(|line| *line == mark).count();
    assert_eq!((count("made"), count("it's 1"), count("it's 2")), (2, 4, 2), "{told}");

    // The flush before "it's 1" lies, as if it had been logged too early.
    let oracle = "m={mark}; test made = \"$m\" || test 9 = $(head -c 513 {} | tail -c 1) || \
                  test \"it's $(head -c 1 {})\" = \"$m\"";
    let (code, report) = explore(dir.path(), oracle, &["--start-mark", "it's 1"]);
    assert_eq!((code, &report["states"], &report["failed"]), (Some(1), &6.into(), &1.into()));
    let failure = &report["failures"][0];
    assert_eq!(failure["state"], "E5", "the epoch just after the mark is part of it");
    assert_eq!(failure["mark-before"], "it's 1 (entry 3)");
    assert_eq!(failure["mark-after"], "it's 2 (entry 7)");
}

/// Nothing follows the last flush, and what it promised is looked at all the same.
#[test]
fn what_the_last_flush_has_left_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.img"), vec![0; SIZE]).unwrap();
    let log = LogBuilder::new(512).write(0, &[b'x'; 512]).flush().mark("synced");
    std::fs::write(dir.path().join("w.log"), log.finish()).unwrap();
    for states in ["flush", "reorder"] {
        let check = "test \"$(head -c 1 {})\" != x || test {mark} != synced";
        let (code, report) = explore(dir.path(), check, &["--states", states]);
        assert_eq!((code, &report["failed"]), (Some(1), &1.into()), "{report}");
        let failure = &report["failures"][0];
        assert_eq!(
            (&failure["state"], &failure["mark-before"]),
            (&"E2".into(), &"synced (entry 2)".into())
        );
    }
    let (code, report) = explore(dir.path(), "test -e {}", &["--limit", "1"]);
    assert_eq!((code, &report["states"]), (Some(0), &2.into()), "{report}");
}

/// The mark says that the flush is done, and that is just what is to be looked at.
#[test]
fn what_a_flush_has_left_just_before_the_last_mark_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.img"), vec![0; SIZE]).unwrap();
    let log = LogBuilder::new(512).write(0, &[b'x'; 512]).flush().mark("synced");
    let log = log.write(0, &[b'y'; 512]).flush().mark("end");
    std::fs::write(dir.path().join("w.log"), log.finish()).unwrap();
    for (states, count) in [("flush", 2), ("reorder", 3)] {
        let check = "test \"$(head -c 1 {})\" != x || test {mark} != synced";
        let (code, report) =
            explore(dir.path(), check, &["--states", states, "--end-mark", "synced"]);
        assert_eq!((code, &report["states"]), (Some(1), &count.into()), "{report}");
        let failure = &report["failures"][0];
        assert_eq!((&report["failed"], &failure["state"]), (&1.into(), &"E2".into()), "{report}");
    }
}

/// What comes after the mark has not happened: neither a write of the same epoch nor another mark.
#[test]
fn nothing_after_the_end_mark_is_part_of_a_state() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.img"), vec![0; SIZE]).unwrap();
    let log = LogBuilder::new(512).write(0, &[b'x'; 512]).flush().mark("synced");
    let log = log.write(0, &[b'y'; 512]).write(4096, &[b'z'; 512]).mark("half");
    let log = log.write(8192, &[b'q'; 512]).mark("later").flush().write(0, &[b'r'; 512]);
    std::fs::write(dir.path().join("w.log"), log.finish()).unwrap();
    let check = "echo {mark} >>told; test \"$(head -c 8193 {} | tail -c 1)\" != q";
    let end = ["--end-mark", "half", "--check-alike"];
    let (code, report) = explore(dir.path(), check, &end);
    assert_eq!((code, &report["states"]), (Some(0), &(2 + 4).into()), "{report}");
    let told = std::fs::read_to_string(dir.path().join("told")).unwrap();
    let count = |mark: &str| told.lines().filter(|line| *line == mark).count();
    assert_eq!((count("synced"), count("half"), count("later")), (0, 4, 0), "{told}");

    // With a mark that was made later, the same disk is good; so the command must not see that one.
    let check = "test {mark} != half || test \"$(head -c 1 {})\" = y";
    let (code, report) = explore(dir.path(), check, &end);
    assert_eq!((code, &report["failed"]), (Some(1), &2.into()), "{report}");
    let failure = &report["failures"][0];
    assert_eq!(
        (&failure["mark-before"], &failure["mark-after"]),
        (&"synced (entry 2)".into(), &"half (entry 5)".into())
    );
    assert_eq!(failure["writes"].as_array().unwrap().len(), 2, "{failure}");
    let again = failure["reproduce"].as_str().unwrap().strip_prefix("vublk ").unwrap();
    let line = format!("{} {again}", env!("CARGO_BIN_EXE_vublk"));
    let output = Command::new("sh").args(["-c", &line]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "E2: the checker exited with 1\n");
}

/// The power fails after the mark: what was flushed by then is there, and FUA writes are, but for the
/// others of the epoch it does not matter on which side of the mark they are.
#[test]
fn a_start_mark_within_an_epoch_begins_with_what_is_not_flushed_yet() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.img"), vec![0; SIZE]).unwrap();
    let fua = vublk::write_log::Flags::FUA;
    let log = LogBuilder::new(512).write(0, &[b'0'; 512]).mark("early").flush();
    let log = log.write(0, &[b'p'; 1024]).entry(fua, 4096, &[b'f'; 1024]).mark("half");
    let log = log.write(8192, &[b'q'; 1024]).flush().write(0, &[b'r'; 512]).flush();
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    let states = |mark: &str, options: &[&str]| -> Vec<String> {
        let _ = std::fs::remove_file(d.join("told"));
        let more = [&["-j", "1", "--check-alike", "--start-mark", mark], options].concat();
        let (code, report) = explore(d, "echo {state} {mark} >>told; test -e {}", &more);
        assert_eq!((code, &report["finished"]), (Some(0), &true.into()), "{report}");
        let told = std::fs::read_to_string(d.join("told")).unwrap();
        let checked = told.lines().count() as u64 + report["duplicates"].as_u64().unwrap();
        assert_eq!(report["states"], checked, "{report}");
        told.lines().map(String::from).collect()
    };
    let without_epoch = ["E8:s=1 half", "E10 half"];
    let subsets = ["E3:s=010 half", "E3:s=110 half", "E3:s=011 half", "E3:s=111 half"];
    assert_eq!(states("half", &[]), [&subsets[..], &without_epoch[..1]].concat());
    assert_eq!(
        states("half", &["--states", "flush"]),
        ["E3:s=010 half", "E8:s=0 half", "E10 half"]
    );
    let torn = states("half", &["--states", "torn"]);
    let torn_in = |bits: &str| torn.iter().filter(|name| name.contains(bits)).count();
    // Of the plain writes, the one that is torn is the last one, or all others are there, too.
    assert_eq!((torn_in("s=110,torn=1"), torn_in("s=111,torn=1")), (2, 2), "{torn:?}");
    assert_eq!((torn_in("s=111,torn=3"), torn_in(",torn=2")), (2, 0), "{torn:?}");
    // A larger epoch: every chosen set has what was promised before the mark.
    let chosen = states("half", &["--all-subsets", "2", "--samples", "20"]);
    let epoch: Vec<_> = chosen.iter().filter(|name| name.starts_with("E3:")).collect();
    assert_eq!(epoch.len(), 4, "{chosen:?}");
    assert!(epoch.iter().all(|name| name.as_bytes()[6] == b'1'), "{chosen:?}");
    // Just before the flush, so all of the epoch may be missing.
    assert_eq!(states("early", &["--states", "flush"])[0], "E0:s=0 early");

    // The bug: the write after the mark without the one before it.
    let check = "test \"$(head -c 8193 {} | tail -c 1)\" != q || test \"$(head -c 1 {})\" != 0";
    let part = ["--start-mark", "half", "--results", "r.json"];
    let (_, stopped) = explore(d, check, &[&part[..], &["--stop-after", "1", "-j", "1"]].concat());
    assert_eq!((&stopped["finished"], &stopped["states"]), (&false.into(), &7.into()), "{stopped}");
    let (code, report) = explore(d, check, &part);
    assert_eq!((code, &report["states"], &report["done"]), (Some(1), &7.into(), &7.into()));
    let failure = &report["failures"][0];
    // Not smaller: that the FUA write is there was promised.
    assert_eq!((&report["failed"], &failure["state"]), (&1.into(), &"E3:s=011".into()));
    let again = failure["reproduce"].as_str().unwrap().strip_prefix("vublk ").unwrap();
    let line = format!("{} {again}", env!("CARGO_BIN_EXE_vublk"));
    let output = Command::new("sh").args(["-c", &line]).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "E3:s=011: the checker exited with 1\n");
}

/// A write is torn between the sectors of the disk it was written to, and those are the log's.
#[test]
fn no_sector_of_the_log_is_torn_unless_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.img"), vec![0; SIZE]).unwrap();
    let states = |sector_size: u32, more: &[&str]| -> Vec<String> {
        let log = LogBuilder::new(sector_size).write(0, &[1; 8192]);
        std::fs::write(dir.path().join("w.log"), log.finish()).unwrap();
        let _ = std::fs::remove_file(dir.path().join("told"));
        let check = "echo {state} >>told; test -e {}";
        let (code, report) =
            explore(dir.path(), check, &[&["--states", "torn", "-j", "1"], more].concat());
        assert_eq!(code, Some(0), "{report}");
        let told = std::fs::read_to_string(dir.path().join("told")).unwrap();
        told.lines().map(|line| line.replace("E0:s=1,torn=1@", "")).collect()
    };
    let at_512 = ["512", "-512", "7680", "-7680"];
    let at_4096 = ["4096", "-4096"];
    assert_eq!(states(512, &[]), [&["E0:s=0"], &at_512[..], &at_4096].concat());
    assert_eq!(states(4096, &[]), [&["E0:s=0"], &at_4096[..]].concat());
    assert_eq!(states(1024, &[])[1..5], ["1024", "-1024", "7168", "-7168"]);
    let both = states(4096, &["--torn-at", "512,4096"]);
    assert_eq!(both, [&["E0:s=0"], &at_512[..], &at_4096].concat());
    let torn = ["log", "explore", "w.log", "--base", "base.img", "--torn-at"];
    let error = fails(dir.path(), &[&torn[..], &["512"]].concat(), 1);
    assert!(error.contains("--torn-at wants --states torn"), "{error}");
    let output = vublk(dir.path(), &[&torn[..], &["100"]].concat());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("a power of two from 512"), "{error}");
}

/// The disk has sectors of 4096 bytes, and the log has those or, as QEMU can, smaller ones.
#[test]
fn states_of_a_disk_with_large_sectors_are_whole_in_files_and_copies() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("fives"), vec![5; SIZE]).unwrap();
    let vhdx = ["convert", "-f", "raw", "-O", "vhdx", "-o", "logical_sector_size=4096"];
    ok(d, &[&vhdx[..], &["fives", "base.img"]].concat());
    // Which byte each sector of the first three blocks has, and that direct reads say the same.
    std::fs::write(
        d.join("look"),
        "for at in $(seq 0 512 12287); do dd if=$1 bs=512 skip=$((at / 512)) count=1 2>/dev/null | \
         od -An -tu1 -N1; done | tr -d ' \\n' >sectors && test $(wc -c <sectors) = 24 && \
         dd if=$1 bs=4096 iflag=$2 2>/dev/null | cmp - $1 && echo $3 $(cat sectors) >>told",
    )
    .unwrap();
    for (sector_size, torn, count) in [(4096, "512,4096", 16), (512, "512", 4)] {
        let log = LogBuilder::new(sector_size);
        let log = match sector_size {
            4096 => log.write(0, &[1; 4096]).write(4096, &[2; 8192]),
            _ => log.write(512, &[1; 1024]),
        };
        std::fs::write(d.join("w.log"), log.flush().finish()).unwrap();
        let args = ["log", "explore", "w.log", "--base", "base.img", "-j", "1", "--check-alike"];
        let how = ["--states", "torn", "--torn-at", torn, "--check"];
        let mut told = Vec::new();
        let by_fuse = if Path::new("/dev/fuse").exists() { "direct" } else { "fullblock" };
        for (fuse, flag) in [(true, by_fuse), (false, "fullblock")] {
            let _ = std::fs::remove_file(d.join("told"));
            let check = format!("sh look {{}} {flag} {{state}}");
            let args = [&args[..], &how, &[&check]].concat();
            let output = match fuse {
                true => vublk(d, &args),
                false => {
                    let Some(mut command) = unprivileged(d) else { return };
                    command.args(&args).output().unwrap()
                }
            };
            let text = String::from_utf8_lossy(&output.stdout);
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}{error}");
            told.push(std::fs::read_to_string(d.join("told")).unwrap());
        }
        assert_eq!(told[0], told[1], "by FUSE, and as a copy");
        let lines: Vec<_> = told[0].lines().collect();
        assert_eq!(lines.len(), count, "{lines:?}");
        let expected = match sector_size {
            4096 => "E0:s=10,torn=1@512 155555555555555555555555",
            _ => "E0:s=1,torn=1@-512 551555555555555555555555",
        };
        assert!(lines.contains(&expected), "{lines:?}");
    }
}

/// A killed exploration goes, mount and all, while its checker still has a disk with changes in the
/// kernel's cache.
#[test]
fn a_killed_exploration_leaves_nothing_behind() {
    if !Path::new("/dev/fuse").exists() {
        common::skip("no FUSE here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    let check = "exec 3<>{} && printf changed >&3 && touch begun && exec sleep 1";
    let args = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--check", check];
    let mut child = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(args)
        .current_dir(d)
        .env("TMPDIR", d)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    common::wait_until("a checker", || d.join("begun").exists());
    child.kill().unwrap();
    common::wait_until("its end", || child.try_wait().unwrap().is_some());
    // By their names: nobody answers who asks for more.
    let is_there = || !names_with("vublk-states-", d).is_empty();
    assert!(is_there());
    // The next one takes the mount away.
    let again = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--check", "true {}"])
        .current_dir(d)
        .env("TMPDIR", d)
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(!is_there());
}

/// What is in a directory and has a name that begins so.
fn names_with(prefix: &str, dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    names
}

/// A process that is killed when this is dropped.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Process numbers say nothing of who lives: each of these explorations has number 1, in a namespace of
/// its own, and the host has one with that number, too.
#[test]
fn mounts_of_the_dead_are_taken_away_and_no_others() {
    let probe = Command::new("unshare").args(["--pid", "--fork", "true"]).output();
    if !Path::new("/dev/fuse").exists() || !probe.is_ok_and(|output| output.status.success()) {
        common::skip("no FUSE, or no process namespaces here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    let explore = |check: &str| {
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--kill-child", env!("CARGO_BIN_EXE_vublk")])
            .args(["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "-j", "1"])
            .args(["--check", check])
            .current_dir(d)
            .env("TMPDIR", d)
            .stdout(Stdio::null());
        command
    };
    let start = || {
        let _ = std::fs::remove_file(d.join("path"));
        let child = explore("echo {} >new; mv new path; exec sleep 100000").spawn().unwrap();
        let child = Killed(child);
        common::wait_until("a checker that hangs", || d.join("path").exists());
        let path = std::fs::read_to_string(d.join("path")).unwrap();
        (child, Path::new(path.trim()).to_path_buf())
    };
    let mounts = || names_with("vublk-states-", d);
    let (killed, path) = start();
    let dead = mounts();
    let (living, shown) = start();
    assert_ne!(path, shown);
    drop(killed);
    common::wait_until("the end of its mount", || std::fs::read(&path).is_err());
    assert!(explore("test -e {}").status().unwrap().success());
    let left = mounts();
    assert!(left.len() == 1 && left != dead, "{dead:?}, and then {left:?}");
    assert_eq!(std::fs::read(&shown).unwrap().len(), SIZE, "the living one is shown no more");
    drop(living);
    common::wait_until("the end of its mount", || std::fs::read(&shown).is_err());
    assert!(explore("test -e {}").status().unwrap().success());
    assert_eq!(mounts(), [""; 0]);
}

/// vublk where FUSE is not to be had: mounting takes rights that it gives up. `None` if the host does
/// not let it.
fn unprivileged(dir: &Path) -> Option<Command> {
    let probe = Command::new("unshare").args(["--user", "--map-root-user", "true"]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        common::skip("no user namespaces here");
        return None;
    }
    std::fs::create_dir_all(dir.join("tmp")).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", env!("CARGO_BIN_EXE_vublk")])
        .current_dir(dir)
        .env("TMPDIR", dir.join("tmp"));
    Some(command)
}

/// `vublk log explore` there.
fn without_fuse(dir: &Path, check: &str) -> Option<Command> {
    let mut command = unprivileged(dir)?;
    command
        .args(["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "-j", "1"])
        .args(["--check", check])
        .stdout(Stdio::null());
    Some(command)
}

/// A disk is nobody else's business.
#[test]
fn copies_are_for_their_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    let check = "stat -c %a {} $(dirname {}) >modes";
    let Some(mut command) = without_fuse(dir.path(), check) else { return };
    assert!(command.status().unwrap().success());
    assert_eq!(std::fs::read_to_string(dir.path().join("modes")).unwrap(), "600\n700\n");
    assert_eq!(std::fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0, "something is left");

    small_disk(dir.path(), 3);
    let mut command = without_fuse(dir.path(), PLANTED).unwrap();
    let output = command.args(["--output", "json"]).stdout(Stdio::piped()).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["checked"], &report["failed"]), (&190.into(), &16.into()), "{report}");
}

#[test]
fn copies_that_a_killed_exploration_has_left_are_removed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    let copies = || -> Vec<_> {
        let entries = std::fs::read_dir(d.join("tmp")).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let hang = "echo {} >path; touch hangs; exec sleep 100000";
    let start = || {
        let _ = std::fs::remove_file(d.join("hangs"));
        let child = without_fuse(d, hang).map(|mut command| command.spawn().unwrap());
        if child.is_some() {
            common::wait_until("a checker that hangs", || d.join("hangs").exists());
        }
        child
    };
    let Some(mut killed) = start() else { return };
    let left = copies();
    assert_eq!(left.len(), 1, "{left:?}");
    let Some(mut living) = start() else { return };
    killed.kill().unwrap();
    killed.wait().unwrap();
    let dead: Vec<_> = left;
    let alive: Vec<_> = copies().into_iter().filter(|name| !dead.contains(name)).collect();
    assert_eq!(alive.len(), 1);
    // Not ours, although it has such a name: everybody may look at it.
    let foreign = format!("vublk-copies-{}", "0".repeat(32));
    std::fs::create_dir(d.join("tmp").join(&foreign)).unwrap();
    assert!(without_fuse(d, "test -e {}").unwrap().status().unwrap().success());
    assert_eq!(copies(), [foreign.clone(), alive[0].clone()]);
    living.kill().unwrap();
    living.wait().unwrap();
    assert!(without_fuse(d, "test -e {}").unwrap().status().unwrap().success());
    assert_eq!(copies(), [foreign]);
}

/// Neither the shell, nor what it has begun, nor what has left its group.
#[test]
fn a_killed_exploration_takes_its_checker_along() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    let check = "echo $$ >shell; sleep 100000 & echo $! >child; setsid sleep 100000 & echo $! >apart; \
                 touch hangs; wait; test -e {}";
    let mut child = hanging(d, check, &["--state", "E1"]);
    let all = ["shell", "child", "apart"].map(|name| d.join(name));
    assert!(all.iter().all(|pid| runs(pid)));
    child.kill().unwrap();
    child.wait().unwrap();
    common::wait_until("the end of all that the checker is", || !all.iter().any(|pid| runs(pid)));
}

#[test]
fn results_of_another_log_are_not_taken_for_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    let explore = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--results", "r"];
    ok(d, &[&explore[..], &["--check", "true {}"]].concat());
    ok(d, &[&explore[..], &["--check", "true {}"]].concat());
    let error = fails(d, &[&explore[..], &["--check", "true {}", "--check-alike"]].concat(), 1);
    assert!(error.contains("holds the results of another exploration ("), "{error}");
    small_disk(d, 1);
    let error = fails(d, &[&explore[..], &["--check", "true {}"]].concat(), 1);
    assert!(error.contains("as log or base were changed since"), "{error}");
}

/// A report that claims more than was done would pass for a good one.
#[test]
fn results_that_do_not_add_up_are_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    small_disk(d, 1);
    let check = "test ! -e fail || test \"$(head -c 1 {} | od -An -tu1)\" = '   0'";
    let run = |more: &[&str]| {
        let explore = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw"];
        vublk(d, &[&explore[..], &["--results", "r.json", "--check", check], more].concat())
    };
    std::fs::write(d.join("fail"), "").unwrap();
    assert_eq!(run(&["--stop-after", "1", "-j", "1"]).status.code(), Some(1));
    let kept: Value = serde_json::from_slice(&std::fs::read(d.join("r.json")).unwrap()).unwrap();
    assert_eq!(kept["states"], 65);
    let done = kept["done"].as_u64().unwrap();
    for (field, value) in [
        ("done", 65.into()),
        ("done", u64::MAX.into()),
        ("done", (done - 1).into()),
        ("checked", u64::MAX.into()),
        ("failed", 66.into()),
        ("states", 3.into()),
        ("finished", true.into()),
    ] {
        let mut damaged = kept.clone();
        damaged[field] = value;
        std::fs::write(d.join("r.json"), damaged.to_string()).unwrap();
        let output = run(&[]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("r.json: its numbers do not add up"), "{damaged}: {output:?}");
    }
    std::fs::write(d.join("r.json"), kept.to_string()).unwrap();
    assert_eq!(run(&[]).status.code(), Some(1));
}

/// What is told as the smallest failing state has failed twice.
#[test]
fn a_checker_that_changes_its_mind_while_it_is_asked_for_less_is_flaky() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    // Fails as often as `most` says, in all states but one without anything.
    let check = "printf x >>runs; test \"$(head -c 20481 {} | tail -c 1 | od -An -tu1)\" = '   0' || \
                 test \"$(stat -c %s runs)\" -gt \"$(cat most)\"";
    let run = |most: u64| {
        std::fs::write(dir.path().join("most"), most.to_string()).unwrap();
        std::fs::write(dir.path().join("runs"), "").unwrap();
        let (code, report) = explore(dir.path(), check, &["--check-alike", "-j", "1"]);
        assert_eq!(code, Some(1));
        (report, std::fs::metadata(dir.path().join("runs")).unwrap().len())
    };
    let (report, runs) = run(1000);
    let failure = &report["failures"][0];
    assert_eq!((&failure["flaky"], &failure["shrunk"]), (&false.into(), &true.into()));
    let (report, _) = run(runs - 1);
    let failure = &report["failures"][0];
    assert_eq!((&failure["flaky"], &failure["shrunk"]), (&true.into(), &false.into()));
    assert_eq!(failure["state"], failure["found-as"]);
    let again = failure["reproduce"].as_str().unwrap();
    assert!(again.ends_with(failure["found-as"].as_str().unwrap()), "{again}");
}

#[test]
fn what_cannot_be_explored_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    let explore = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw"];
    let with = |more: &[&str]| fails(dir.path(), &[&explore[..], more].concat(), 1);
    let error = with(&["--check", "/no/such/checker {}"]);
    assert!(error.contains("the checker cannot be run: /no/such/checker /"), "{error}");
    let error = with(&["--check", "true {}", "--state", "E99"]);
    assert!(error.contains("E99: the log has 9 entries only"), "{error}");
    let error = with(&["--start-entry", "100", "--check", "false {}"]);
    assert!(error.contains("has no states in what the options choose"), "{error}");
    if Path::new("/dev/fuse").exists() {
        let error = with(&["--check", "printf x >>{}; true", "-j", "1"]);
        assert!(error.contains("state E0:s=000000: the checker wrote past the end"), "{error}");
    }
    let error = with(&["--start-mark", "nowhere"]);
    assert!(error.contains("no mark 'nowhere' in what was searched"), "{error}");
    // There is one, but not behind the start.
    let error = with(&["--start-mark", "end", "--end-mark", "start"]);
    assert!(error.contains("no mark 'start' in what was searched"), "{error}");
    std::fs::write(dir.path().join("base.img"), vec![0; 8192]).unwrap();
    let error = with(&[]);
    assert!(error.contains("entry 3 writes past the end of the disk"), "{error}");
}

/// The blocks that writing a file changes, as one epoch: an ext4 that does without a journal's
/// order. The checker sees that, and the state with all of them is clean.
#[test]
fn a_file_system_without_order_is_caught_by_the_ext4_checker() {
    for tool in ["mke2fs", "debugfs", "e2fsck"] {
        if Command::new(tool).arg("-V").output().is_err() {
            common::skip(&format!("{tool} is not installed"));
            return;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("base.img"), vec![0; 8 << 20]).unwrap();
    std::fs::write(dir.join("file"), "content").unwrap();
    tool_ok(dir, "mke2fs", &["-q", "-t", "ext4", "-b", "4096", "base.img"]);
    std::fs::copy(dir.join("base.img"), dir.join("after.img")).unwrap();
    tool_ok(dir, "debugfs", &["-w", "-R", "write file file", "after.img"]);
    let before = std::fs::read(dir.join("base.img")).unwrap();
    let after = std::fs::read(dir.join("after.img")).unwrap();
    let mut log = LogBuilder::new(512);
    for (i, (old, new)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
        if old != new {
            log = log.write(i as u64 * 4096, new);
        }
    }
    let writes = log.entries();
    std::fs::write(dir.join("w.log"), log.flush().write(0, &after[..4096]).finish()).unwrap();
    let (code, report) = explore(dir, "ext4", &["--states", "flush"]);
    assert_eq!((code, &report["failed"]), (Some(0), &0.into()), "{report}");
    let (code, report) = explore(dir, "ext4", &[]);
    assert_eq!(code, Some(1), "{writes} writes: {report}");
    let failure = &report["failures"][0];
    assert!(failure["dropped"].as_u64().unwrap() <= 1, "{failure}");
    let printed = failure["output"].as_str().unwrap();
    assert!(printed.contains("base.img") || printed.contains(".img"), "{printed}");
}

/// A guest without a write cache: its writes are durable when they complete. Of two that it waits for
/// together, a power cut can leave either one; what it submits afterwards needs both.
#[test]
fn writes_in_flight_together_may_be_there_without_each_other_where_nothing_is_cached() {
    use vublk::frontend::{Personality, Request, SessionOptions};
    let byte = |block: u8, op: &str| {
        let at = u32::from(block) * 4096 + 1;
        format!("test $(head -c {at} {{}} | tail -c 1 | od -An -tu1) {op} {}", block + 1)
    };
    // Whether they were is the machine's to say; with two submitted at once they nearly always are.
    for _ in 0..50 {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        for name in ["disk.img", "base.img"] {
            std::fs::write(d.join(name), vec![0; SIZE]).unwrap();
        }
        let log = d.join("w.log").to_str().unwrap().to_string();
        let args = ["--cache", "writethrough", "--log-writes", &log];
        let mut backend = common::Setup::new(&args).image(&d.join("disk.img")).start();
        let mut guest = backend.open(SessionOptions::new(Personality::Qemu));
        let write = |block: u8| Request::write(u64::from(block) * 4096, vec![block + 1; 4096]);
        let both = [write(0), write(1)].map(|write| guest.submit(0, &write).unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        for head in both {
            guest.wait_head(0, head, deadline).unwrap().ok().unwrap();
        }
        guest.write(0, 2 * 4096, &[3; 4096]).unwrap();
        drop(guest);
        assert!(backend.terminate().success());

        // The third one without both of the others is nothing that a power cut leaves.
        let check = format!("{} || ({} && {})", byte(2, "!="), byte(0, "="), byte(1, "="));
        let (code, report) = explore(d, &check, &[]);
        assert_eq!(code, Some(0), "{report}");
        // The one that was logged second without the first.
        let (code, report) = explore(d, "test {state} != E0:s=010", &[]);
        // And the last of them again, after the flush with which the device is left.
        if code == Some(1) {
            assert_eq!(report["states"], 6, "any of the two, or all three: {report}");
            return;
        }
        assert_eq!((code, &report["states"]), (Some(0), &5.into()), "{report}");
    }
    panic!("no two writes were in flight together");
}

/// A log that vublk has recorded: the report tells in which order the guilty writes came and went,
/// and what it says to paste gives the failing disk to a guest, from any directory.
#[test]
fn the_order_of_requests_is_told_and_a_state_is_served_as_printed() {
    use vublk::frontend::{Personality, Session, SessionOptions};
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("disk.img"), vec![0; SIZE]).unwrap();
    std::fs::write(d.join("base.img"), vec![0; SIZE]).unwrap();
    let log = d.join("w.log").to_str().unwrap().to_string();
    let mut backend =
        common::Setup::new(&["--log-writes", &log]).image(&d.join("disk.img")).start();
    let mut guest = backend.open(SessionOptions::new(Personality::Qemu));
    for block in 0..3u8 {
        guest.write(0, u64::from(block) * 4096, &[block + 1; 4096]).unwrap();
    }
    guest.flush(0).unwrap();
    drop(guest);
    assert!(backend.terminate().success());

    // The bug: the third write without the first.
    let check = "test \"$(head -c 8193 {} | tail -c 1 | od -An -tu1)\" != '   3' || \
                 test \"$(head -c 1 {} | od -An -tu1)\" = '   1'";
    let (code, report) = explore(d, check, &[]);
    assert_eq!(code, Some(1));
    let failure = &report["failures"][0];
    assert_eq!((&failure["dropped"], &failure["state"]), (&1.into(), &"E0:s=011".into()));
    // One after the other: submitted, completed, submitted, completed …
    let rows = failure["writes"].as_array().unwrap();
    let times: Vec<u64> = rows
        .iter()
        .flat_map(|row| [row["order"][0].as_u64().unwrap(), row["order"][1].as_u64().unwrap()])
        .collect();
    assert!(times.len() == 6 && times.is_sorted_by(|a, b| a < b), "{times:?}");
    assert!(rows.iter().all(|row| row["queue"] == 0), "{rows:?}");
    let text = {
        let args = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw", "--check", check];
        String::from_utf8(vublk(d, &args).stdout).unwrap()
    };
    assert!(text.contains("queue submitted completed"), "{text}");

    let serve = text.lines().find_map(|line| line.trim().strip_prefix("serve: vublk ")).unwrap();
    assert!(serve.ends_with(" --state E0:s=011"), "{serve}");
    let socket = d.join("crash.sock");
    let line = format!("exec {} {serve}", env!("CARGO_BIN_EXE_vublk"));
    let line = line.replace("/tmp/crash.sock", socket.to_str().unwrap());
    let mut child = Command::new("sh")
        .args(["-c", &line])
        .current_dir("/")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut guest = Session::open(&socket, SessionOptions::new(Personality::Qemu)).unwrap();
    for (block, byte) in [(0, 0), (1, 2), (2, 3), (3, 0)] {
        assert_eq!(guest.read(0, block * 4096, 4096).unwrap(), [byte; 4096]);
    }
    drop(guest);
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(child.wait().unwrap().success());
}
