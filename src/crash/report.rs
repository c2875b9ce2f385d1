//! What an exploration has found so far: kept in a file, so that it can be continued and shown.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use quick_junit::{NonSuccessKind, Property, TestCase, TestCaseStatus, TestSuite};
use serde::{Deserialize, Serialize};

use crate::crash::history::History;
use crate::crash::name::{Kept, StateName};
use crate::error::{Error, Result, ResultExt};
use crate::io::block_on;
use crate::terminal::printable;
use crate::write_log::Kind;
use crate::write_log::sidecar::Sidecar;

/// Version of the file, and of the order of the states.
const VERSION: u32 = 3;

/// What is explored. Only an exploration of the same can be continued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Subject {
    /// The log's file.
    pub log: String,
    /// How many entries it had.
    pub entries: u64,
    /// The image as it was when logging began.
    pub base: String,
    /// The size of that disk in bytes.
    pub size: u64,
    /// The checker; empty if states are only counted.
    pub check: String,
    /// Which states, and the options they depend on.
    pub options: String,
    /// When log and base were last changed, in nanoseconds since 1970.
    #[serde(default)]
    pub changed: (i64, i64),
}

/// See the [module](self).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    version: u32,
    /// What is explored.
    #[serde(flatten)]
    pub subject: Subject,
    /// How many states there are, duplicates included.
    pub states: u64,
    /// All states before this one, in their order, are done.
    pub done: u64,
    /// How many were checked.
    pub checked: u64,
    /// How many were the same disk as another one.
    pub duplicates: u64,
    /// How many differed from a checked one only where the checker did not look.
    #[serde(default)]
    pub alike: u64,
    /// How many were not good.
    pub failed: u64,
    /// Time spent, in seconds.
    pub seconds: f64,
    /// Whether all states are done.
    pub finished: bool,
    /// Why the failures do not say in which order requests came and went, although the log has a
    /// sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_order: Option<String>,
    /// The first failure of each of the first few epochs that have any.
    pub failures: Vec<Failure>,
}

/// A state that is not good.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failure {
    /// Its name, after shrinking if that is done.
    pub state: String,
    /// The name of the state that was found first.
    pub found_as: String,
    /// Whether it was shrunk.
    pub shrunk: bool,
    /// Writes that are missing although a later one is there.
    pub dropped: u64,
    /// Writes that are there in part.
    pub torn: u64,
    /// How the checker ended.
    pub verdict: String,
    /// The end of what it printed.
    pub output: String,
    /// Whether it failed only once out of twice.
    pub flaky: bool,
    /// The writes of the epoch.
    pub writes: Vec<Row>,
    /// The last mark before the first write that is dropped or torn, or before the last write that is
    /// there.
    pub mark_before: Option<String>,
    /// The first mark after the last write that is there.
    pub mark_after: Option<String>,
    /// The command that does it again.
    pub reproduce: String,
    /// The command that serves the state to a guest.
    #[serde(default)]
    pub serve: String,
}

/// A write of the guilty epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// The number of its entry.
    pub entry: u64,
    /// Where on the disk, in sectors of 512 bytes.
    pub sector: u64,
    /// How long, in bytes.
    pub bytes: u64,
    /// `write`, `discard`, and what else the log says of it.
    pub kind: String,
    /// What became of it: `present`, `dropped` (missing, and a later one is there), `torn (first
    /// 512)`, or `after the cut`.
    pub fate: String,
    /// When its request was submitted, and when it was on the disk, in the order of all requests, if
    /// the log's sidecar tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<(u64, u64)>,
    /// The queue that it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u16>,
}

impl Failure {
    /// Describes a state that has a bit for each write of its epoch.
    pub fn new(history: &History, name: &StateName, verdict: &str) -> Failure {
        let epoch = history.window(name.prefix);
        let shortest = history.shortest(&epoch, name).to_string();
        let last = name.applied.iter().rposition(|applied| *applied);
        let mut writes = Vec::new();
        for (i, number) in epoch.writes.iter().enumerate() {
            let entry = history.entry(*number);
            let fate = match (name.applied[i], name.tear(i)) {
                (true, None) => "present".into(),
                (true, Some(Kept::First(len))) => format!("torn (first {len})"),
                (true, Some(Kept::Last(len))) => format!("torn (last {len})"),
                (false, _) if last.is_some_and(|last| i < last) => "dropped".into(),
                (false, _) => "after the cut".into(),
            };
            let kind = match entry.kind() {
                Kind::Discard => "discard".to_string(),
                _ if entry.flags.0 == 0 => "write".to_string(),
                _ => format!("write {}", entry.flags),
            };
            let (sector, bytes) = (entry.target.offset / 512, entry.target.len);
            writes.push(Row {
                entry: *number,
                sector,
                bytes,
                kind,
                fate,
                order: None,
                queue: None,
            });
        }
        let mark = |mark: Option<&(u64, crate::write_log::Mark)>| {
            mark.map(|(number, mark)| format!("{mark} (entry {number})"))
        };
        // The marks around the first fault, or around the cut if there is none. (A mark just after a
        // flush is before the writes of the epoch, and what the flush made true.)
        let first = epoch.writes.first().map_or(epoch.end, |number| *number);
        let cut = last.map_or(first, |last| epoch.writes[last]);
        let fault = writes.iter().find(|row| row.fate == "dropped" || row.fate.starts_with("torn"));
        let fault = fault.map_or(cut, |row| row.entry);
        Failure {
            state: shortest.clone(),
            found_as: shortest,
            shrunk: false,
            dropped: writes.iter().filter(|row| row.fate == "dropped").count() as u64,
            torn: name.torn.len() as u64,
            verdict: verdict.into(),
            output: String::new(),
            flaky: false,
            writes,
            mark_before: mark(history.index().mark_before(fault)),
            mark_after: mark(history.index().mark_after(cut)),
            reproduce: String::new(),
            serve: String::new(),
        }
    }

    /// Adds what the log's sidecar knows of the writes, as far as its records are those of the log's
    /// entries.
    pub fn add_order(&mut self, history: &History, sidecar: &mut Sidecar) -> Result<()> {
        for row in &mut self.writes {
            let entry = history.entry(row.entry);
            let record = block_on(sidecar.record(row.entry))?;
            let Some(record) = record.filter(|record| record.log_sector == entry.log_sector())
            else {
                continue;
            };
            row.order = Some((record.submitted, record.completed));
            row.queue = record.queue;
        }
        Ok(())
    }

    fn write_text(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "{}: {}", self.state, printable(&self.verdict))?;
        if self.found_as != self.state {
            writeln!(text, "  found as {}", self.found_as)?;
        }
        let shrunk = if self.shrunk { "" } else { " (not shrunk)" };
        writeln!(text, "  {} dropped, {} torn{shrunk}", self.dropped, self.torn)?;
        if self.flaky {
            writeln!(text, "  FLAKY: the same state passed when it was checked again")?;
        }
        for (which, mark) in [("before", &self.mark_before), ("after", &self.mark_after)] {
            if let Some(mark) = mark {
                writeln!(text, "  mark {which}: {}", printable(mark))?;
            }
        }
        let is_ordered = self.writes.iter().any(|row| row.order.is_some());
        write!(text, "  {:>10} {:>14} {:>10}  ", "entry", "sector of 512", "bytes")?;
        if is_ordered {
            write!(text, "{:>5} {:>9} {:>9}  ", "queue", "submitted", "completed")?;
        }
        writeln!(text, "{:<14} fate", "kind")?;
        for row in &self.writes {
            let Row { entry, sector, bytes, kind, fate, order, queue } = row;
            write!(text, "  {entry:>10} {sector:>14} {bytes:>10}  ")?;
            let known = |number: Option<u64>| number.map_or("-".into(), |n| n.to_string());
            if is_ordered {
                let queue = known(queue.map(u64::from));
                let (submitted, completed) = (order.map(|o| o.0), order.map(|o| o.1));
                write!(text, "{queue:>5} {:>9} {:>9}  ", known(submitted), known(completed))?;
            }
            writeln!(text, "{kind:<14} {fate}")?;
        }
        for line in self.output.lines() {
            writeln!(text, "  | {}", printable(line))?;
        }
        writeln!(text, "  again: {}", self.reproduce)?;
        writeln!(text, "  serve: {}", self.serve)
    }
}

impl Report {
    /// Nothing found yet.
    pub fn new(subject: Subject) -> Report {
        Report {
            version: VERSION,
            subject,
            states: 0,
            done: 0,
            checked: 0,
            duplicates: 0,
            alike: 0,
            failed: 0,
            seconds: 0.0,
            finished: false,
            without_order: None,
            failures: Vec::new(),
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Report> {
        let name = || path.display().to_string();
        let bytes = std::fs::read(path).context(name)?;
        let report: Report = serde_json::from_slice(&bytes).map_err(|err| {
            Error::corrupt(format!("{}: not the results of an exploration: {err}", name()))
        })?;
        if report.version != VERSION {
            let version = report.version;
            return Err(Error::unsupported(format!(
                "{}: results of version {version}, and this vublk goes through the states in the \
                 order of version {VERSION}; give another file, or remove it",
                name()
            )));
        }
        Ok(report)
    }

    /// Whether its numbers can be those of an exploration of so many states.
    pub fn adds_up(&self, states: u64) -> bool {
        let told =
            self.checked.checked_add(self.duplicates).and_then(|n| n.checked_add(self.alike));
        let is_told = match self.subject.check.is_empty() {
            true => told.is_some_and(|told| told <= self.done),
            false => told == Some(self.done),
        };
        self.states == states
            && self.done <= states
            && is_told
            && self.failed <= self.checked
            && (self.done == states || !self.finished)
    }

    /// Writes it; a reader finds the old one or the new one, whatever happens meanwhile.
    ///
    /// # Errors
    /// Names the file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let name = || path.display().to_string();
        let mut bytes = serde_json::to_vec_pretty(self).map_err(std::io::Error::from)?;
        bytes.push(b'\n');
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let write = || {
            // Of somebody who was killed; and a link that somebody put there is not followed.
            match std::fs::remove_file(&new) {
                Err(err) if err.kind() != std::io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
            let mut file = std::fs::File::create_new(&new)?;
            file.write_all(&bytes)?;
            // A rename may be on the disk before the data is.
            file.sync_data()?;
            std::fs::rename(&new, path)
        };
        write().inspect_err(|_| drop(std::fs::remove_file(&new))).context(name)
    }

    /// States per second, duplicates included.
    pub fn covered_per_second(&self) -> f64 {
        self.done as f64 / self.seconds.max(0.001)
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let end = if self.finished { "" } else { " (not finished)" };
        let checked = self.checked as f64 / self.seconds.max(0.001);
        let _ = writeln!(
            text,
            "{} of {} states{end}: {} checked, {} duplicates, {} alike, {} failed; {:.1} s, {:.0} \
             states/s, \
             {checked:.0} checked/s",
            self.done,
            self.states,
            self.checked,
            self.duplicates,
            self.alike,
            self.failed,
            self.seconds,
            self.covered_per_second(),
        );
        if let Some(why) = &self.without_order {
            let _ = writeln!(text, "the order of requests is not told: {why}");
        }
        for failure in &self.failures {
            text.push('\n');
            let _ = failure.write_text(&mut text);
        }
        text
    }

    /// For continuous integration.
    ///
    /// # Errors
    /// None that can be helped.
    pub fn to_junit(&self) -> Result<String> {
        let check = for_xml(&self.subject.check);
        let mut suite = TestSuite::new(for_xml(&self.subject.log));
        for (name, number) in [
            ("states", self.states),
            ("done", self.done),
            ("checked", self.checked),
            ("duplicates", self.duplicates),
            ("alike", self.alike),
            ("failed", self.failed),
        ] {
            suite.add_property(Property::new(name, number.to_string()));
        }
        for failure in &self.failures {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            let mut text = String::new();
            let _ = failure.write_text(&mut text);
            status.set_message(for_xml(&failure.verdict)).set_description(for_xml(&text));
            let mut case = TestCase::new(failure.state.clone(), status);
            case.set_classname(check.clone());
            suite.add_test_case(case);
        }
        if !self.finished {
            // Nobody may take what was not looked at for good.
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            let message = format!("not finished: {} of {} states are done", self.done, self.states);
            status.set_message(message);
            let mut case = TestCase::new("all states", status);
            case.set_classname(check.clone());
            suite.add_test_case(case);
        } else if self.failures.is_empty() {
            let mut case = TestCase::new("all states", TestCaseStatus::success());
            case.set_classname(check.clone());
            suite.add_test_case(case);
        }
        let mut report = quick_junit::Report::new("vublk log explore");
        report.add_test_suite(suite);
        report.to_string().map_err(|err| Error::invalid(format!("JUnit: {err}")))
    }
}

/// A text without the two characters that XML does not have and that nobody else takes out.
fn for_xml(text: &str) -> String {
    text.replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> Subject {
        Subject {
            log: "w\u{ffff}.log".into(),
            entries: 0,
            base: String::new(),
            size: 0,
            check: "c\u{fffe}\u{1}".into(),
            options: String::new(),
            changed: (0, 0),
        }
    }

    #[test]
    fn what_cannot_be_kept_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("r.json"), dir.path().join("r.json.new"));
        std::fs::create_dir(&path).unwrap();
        let err = Report::new(subject()).save(&path).unwrap_err().to_string();
        assert!(err.contains("r.json: Is a directory"), "{err}");
        assert!(!new.exists());
    }

    #[test]
    fn a_link_that_somebody_has_put_in_the_way_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("r.json"), dir.path().join("victim"));
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("r.json.new")).unwrap();
        Report::new(subject()).save(&path).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert!(path.symlink_metadata().unwrap().is_file());
        Report::load(&path).unwrap();
    }

    #[test]
    fn nothing_that_a_checker_prints_is_a_command_to_the_terminal() {
        let failure = serde_json::json!({
            "state": "E0", "found-as": "E0", "shrunk": true, "dropped": 0, "torn": 0, "flaky": false,
            "verdict": "bad", "output": "one\n\u{1b}]0;two\u{7}\tthree", "writes": [],
            "mark-before": "m\nE1: good", "mark-after": null, "reproduce": "again",
        });
        let mut report = Report::new(subject());
        report.failures.push(serde_json::from_value(failure).unwrap());
        let text = report.to_text();
        assert!(text.chars().all(|c| "\n\t".contains(c) || !c.is_control()), "{text:?}");
        assert!(text.contains("  | one\n  | \\u{1b}]0;two\\u{7}\tthree\n"), "{text}");
        assert!(!text.lines().any(|line| line == "E1: good"), "{text}");
    }

    /// XML 1.0 has most control characters in no form, and neither U+FFFE nor U+FFFF.
    #[test]
    fn whatever_a_mark_and_a_checker_say_is_xml() {
        let failure = serde_json::json!({
            "state": "E0", "found-as": "E0", "shrunk": true, "dropped": 0, "torn": 0, "flaky": false,
            "verdict": "bad\u{fffe}]]>&<\"", "output": "\u{1b}[31m\u{ffff}\u{0}", "writes": [],
            "mark-before": "m\u{ffff}", "mark-after": null, "reproduce": "",
        });
        let mut report = Report::new(subject());
        report.failures.push(serde_json::from_value(failure).unwrap());
        for finished in [false, true] {
            report.finished = finished;
            let text = report.to_junit().unwrap();
            let is_xml = |c: char| {
                "\t\n\r".contains(c) || (c >= ' ' && !['\u{fffe}', '\u{ffff}'].contains(&c))
            };
            assert!(text.chars().all(is_xml), "{text:?}");
            assert!(text.contains("m\u{fffd}"), "{text}");
        }
    }
}
