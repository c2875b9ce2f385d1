//! `vublk log explore --guest`, asked of a guest that is no machine: two sessions of our own.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::common::{self, soon, vublk};
use crate::small_disk;
use serde_json::Value;
use vublk::frontend::{Personality, Session, SessionOptions};
use vublk::write_log::LogBuilder;

/// Where the guest answers.
const ANSWER: u64 = 4096;

/// An exploration that asks a guest.
struct Explorer(Child);

impl Explorer {
    fn start(dir: &Path, more: &[&str]) -> Explorer {
        let child = Command::new(env!("CARGO_BIN_EXE_vublk"))
            .args(["log", "explore", "w.log", "--base", "base.img", "-f", "raw"])
            .args(["--guest", "vu.sock", "--output", "json"])
            .args(more)
            .current_dir(dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Explorer(child)
    }

    /// Its exit code, what it printed, and what it complained of.
    fn end(mut self) -> (Option<i32>, Value, String) {
        let deadline = soon();
        while self.0.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < deadline, "the exploration does not end");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let read = |from: &mut dyn std::io::Read| {
            let mut text = String::new();
            from.read_to_string(&mut text).unwrap();
            text
        };
        let stdout = read(self.0.stdout.as_mut().unwrap());
        let stderr = read(self.0.stderr.as_mut().unwrap());
        let code = self.0.wait().unwrap().code();
        (code, serde_json::from_str(&stdout).unwrap_or_default(), stderr)
    }
}

impl Drop for Explorer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest with both disks.
struct Guest {
    disk: Session,
    mailbox: Session,
}

/// A question.
struct Question {
    number: u64,
    state: String,
    mark: String,
}

impl Guest {
    /// Starts, and says so.
    fn start(dir: &Path) -> Guest {
        let open = |name: &str| {
            let (path, deadline) = (dir.join(name), soon());
            loop {
                match Session::open(&path, SessionOptions::new(Personality::Qemu)) {
                    Ok(session) => return session,
                    Err(err) => assert!(std::time::Instant::now() < deadline, "{name}: {err}"),
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        };
        let (disk, mailbox) = (open("vu.sock"), open("vu.sock.mailbox"));
        let mut guest = Guest { disk, mailbox };
        guest.say("ready");
        guest
    }

    fn say(&mut self, text: &str) {
        let mut sector = text.as_bytes().to_vec();
        sector.resize(4096, 0);
        self.mailbox.write(0, ANSWER, &sector).unwrap();
    }

    /// The next question; `None` at the end.
    fn hear(&mut self) -> Option<Question> {
        loop {
            let text = String::from_utf8(self.mailbox.read(0, 0, 4096).unwrap()).unwrap();
            let mut words = text.trim_end_matches('\0').trim_end().splitn(4, ' ');
            match words.next().unwrap() {
                "wait" => {}
                "end" => return None,
                what => {
                    assert_eq!(what, "check", "{text}");
                    let number = words.next().unwrap().parse().unwrap();
                    let mut word = || words.next().unwrap_or_default().to_string();
                    return Some(Question { number, state: word(), mark: word() });
                }
            }
        }
    }

    /// Answers until the end: nothing is wrong, or what is. Returns the states it was asked about.
    fn answer(&mut self, mut check: impl FnMut(&mut Session, &Question) -> String) -> Vec<String> {
        let mut asked = Vec::new();
        while let Some(question) = self.hear() {
            let wrong = check(&mut self.disk, &question);
            let verdict = if wrong.is_empty() { "good".into() } else { format!("bad {wrong}") };
            self.say(&format!("{} {verdict}", question.number));
            asked.push(question.state);
        }
        asked
    }
}

#[test]
fn a_guest_finds_a_planted_bug() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 3);
    let explorer = Explorer::start(dir.path(), &[]);
    let asked = Guest::start(dir.path()).answer(|disk, question| {
        assert!(["start", "end"].contains(&&*question.mark), "{}", question.mark);
        // What was written to the state before is gone.
        assert_eq!(disk.read(0, 1 << 19, 512).unwrap(), [0; 512], "{}", question.state);
        disk.write(0, 1 << 19, &[7; 512]).unwrap();
        let mut byte = |at| disk.read(0, at, 512).unwrap()[0];
        if byte(16384) == 15 && byte(4096) == 2 {
            "15 and 2\nare there".into()
        } else {
            String::new()
        }
    });
    let (code, report, stderr) = explorer.end();
    assert_eq!(code, Some(1), "{stderr}");
    assert_eq!((&report["states"], &report["failed"]), (&(3 * 64 + 1).into(), &16.into()));
    let failure = &report["failures"][0];
    assert_eq!(failure["state"], "E9:s=0111");
    assert_eq!(failure["verdict"], "the guest says: 15 and 2");
    assert_eq!(failure["output"], "are there");
    assert_eq!((&failure["shrunk"], &failure["flaky"]), (&true.into(), &false.into()));
    let again = failure["reproduce"].as_str().unwrap();
    assert!(again.contains("--guest 'vu.sock' --state E9:s=0111"), "{again}");
    assert!(asked.len() > 190, "{}", asked.len());

    // And again, as it says.
    let explorer = Explorer::start(dir.path(), &["--state", "E9:s=0111"]);
    let asked = Guest::start(dir.path()).answer(|_, _| "still bad".into());
    let (code, report, stderr) = explorer.end();
    assert_eq!((code, asked.len()), (Some(1), 1), "{stderr}");
    assert_eq!(report["state"], "E9:s=0111");
    assert_eq!(report["verdict"], "the guest says: still bad");
}

#[test]
fn a_guest_that_starts_anew_has_found_a_bad_state() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 2);
    let explorer = Explorer::start(dir.path(), &["--states", "flush"]);
    let mut guest = Guest::start(dir.path());
    let crashed = guest.hear().unwrap().state;
    drop(guest);
    let asked = Guest::start(dir.path()).answer(|_, _| String::new());
    let (code, report, stderr) = explorer.end();
    assert_eq!((code, &report["failed"]), (Some(1), &1.into()), "{stderr}");
    let failure = &report["failures"][0];
    assert_eq!(failure["verdict"], "the guest started anew before it answered");
    assert_eq!((&failure["found-as"], &failure["flaky"]), (&"E0".into(), &true.into()));
    assert_eq!(crashed, "E0");
    // The others, and that one again.
    assert_eq!(asked, ["E8", "E15", "E0"]);
}

#[test]
fn an_exploration_without_a_guest_goes_on_once_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 2);
    let args = ["--states", "flush", "--results", "r.json"];
    let explorer = Explorer::start(dir.path(), &[&args[..], &["--timeout", "3"]].concat());
    let mut guest = Guest::start(dir.path());
    let first = guest.hear().unwrap();
    guest.say(&format!("{} good", first.number));
    // It leaves with a question.
    guest.hear().unwrap();
    drop(guest);
    let (code, _, stderr) = explorer.end();
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("no guest was ready for state E15"), "{stderr}");

    let explorer = Explorer::start(dir.path(), &args);
    let asked = Guest::start(dir.path()).answer(|_, _| String::new());
    let (code, report, stderr) = explorer.end();
    assert_eq!(code, Some(1), "{stderr}");
    assert_eq!((&report["checked"], &report["failed"]), (&3.into(), &1.into()), "{report}");
    assert_eq!(report["failures"][0]["verdict"], "the guest gave no answer in 3 seconds");
    // The last one, and what had no answer once more.
    assert_eq!(asked, ["E15", "E8"]);
}

/// What the guest of then wrote may be where only such blocks lead: a partition table, a file system of
/// 4096-byte sectors.
#[test]
fn a_guest_is_shown_blocks_as_large_as_those_that_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.img"), vec![0; 1 << 20]).unwrap();
    let log = LogBuilder::new(4096).write(0, &[7; 8192]);
    std::fs::write(d.join("w.log"), log.finish()).unwrap();
    for (more, size, named) in [
        (&[][..], 4096, ""),
        (&["--block-size", "512"], 512, " --block-size 512"),
        (&["--state", "E1"], 4096, ""),
    ] {
        let explorer = Explorer::start(d, more);
        let mut guest = Guest::start(d);
        assert_eq!(guest.disk.config.blk_size, size);
        guest.answer(|disk, _| match disk.read(0, 4096, 4096).unwrap()[0] {
            7 => "written".into(),
            _ => String::new(),
        });
        let (code, report, stderr) = explorer.end();
        assert_eq!(code, Some(1), "{stderr}");
        if let Some(failure) = report["failures"].get(0) {
            let line = |what: &str| failure[what].as_str().unwrap();
            let again = format!("--guest 'vu.sock'{named} --state E1");
            assert!(line("reproduce").ends_with(&again), "{failure}");
            let shown =
                if size == 4096 { " --block-size 4096 --state E1" } else { "raw --state E1" };
            assert!(line("serve").ends_with(shown), "{failure}");
        }
    }
    let args = ["log", "explore", "w.log", "--base", "base.img", "--block-size", "512"];
    let output = vublk(d, &args);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--guest <SOCKET>"));
}

#[test]
fn guests_and_commands_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    small_disk(dir.path(), 1);
    let explore = ["log", "explore", "w.log", "--base", "base.img", "-f", "raw"];
    for (more, words) in [
        (&["--guest", "vu.sock", "--check", "ext4"][..], "cannot be used with"),
        (&["--guest", "vu.sock", "-j", "2"], "cannot be used with"),
        (&["--state", "E0"], "--check, or --guest"),
        (&["--guest", "no/such/vu.sock"], "no/such"),
    ] {
        let output = vublk(dir.path(), &[&explore[..], more].concat());
        assert!(!output.status.success(), "{more:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(words), "{more:?}: {stderr}");
    }
    // Nobody comes: Ctrl-C ends it.
    let explorer = Explorer::start(dir.path(), &[]);
    common::wait_until("a socket", || dir.path().join("vu.sock.mailbox").exists());
    let pid = rustix::process::Pid::from_child(&explorer.0);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let (code, _, stderr) = explorer.end();
    assert_eq!(code, Some(1));
    assert_eq!(stderr, "waiting for a guest on vu.sock and vu.sock.mailbox\n");
    assert!(!dir.path().join("vu.sock").exists(), "a socket is left behind");
}
