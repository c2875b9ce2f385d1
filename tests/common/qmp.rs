//! A small client of the control socket: one command at a time, events kept aside.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

/// An open connection past the negotiation.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Events that came and nobody has asked for.
    pub events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, as soon as somebody listens, and negotiates.
    pub fn connect(path: &Path) -> Qmp {
        let deadline = super::soon();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(err) => assert!(Instant::now() < deadline, "no control socket: {err}"),
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        let mut qmp = Qmp::new(stream);
        let greeting = qmp.read();
        qmp.greet(greeting);
        qmp
    }

    /// Connects and negotiates; `None` if nobody listens, or the connection is closed or forgotten
    /// before that. QEMU greets twice who comes while its monitor is being set up.
    pub fn try_connect(path: &Path) -> Option<Qmp> {
        let mut qmp = Qmp::new(UnixStream::connect(path).ok()?);
        qmp.timeout(5);
        let greeting = qmp.try_read()?;
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        let negotiate = json!({"execute": "qmp_capabilities"}).to_string() + "\n";
        qmp.reader.get_mut().write_all(negotiate.as_bytes()).ok()?;
        let answer = qmp.try_read()?;
        assert!(answer.get("return").or(answer.get("QMP")).is_some(), "{answer}");
        qmp.timeout(60);
        answer.get("return").is_some().then_some(qmp)
    }

    /// The next message; `None` if none comes.
    fn try_read(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).ok().filter(|len| *len > 0)?;
        Some(serde_json::from_str(&line).expect("JSON"))
    }

    fn timeout(&self, seconds: u64) {
        let timeout = Some(std::time::Duration::from_secs(seconds));
        self.reader.get_ref().set_read_timeout(timeout).unwrap();
    }

    fn new(stream: UnixStream) -> Qmp {
        let qmp = Qmp { reader: BufReader::new(stream), events: VecDeque::new() };
        qmp.timeout(60);
        qmp
    }

    fn greet(&mut self, greeting: Value) {
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        self.ok("qmp_capabilities", json!({}));
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("an answer");
        assert!(!line.is_empty(), "the connection is closed");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Sends a command and waits for nothing.
    pub fn send(&mut self, command: &str, arguments: &Value) {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.reader.get_mut().write_all(line.as_bytes()).expect("somebody listens");
    }

    /// Runs a command: what it returns, or the sentence of its error.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.send(command, &arguments);
        loop {
            let mut answer = self.read();
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().expect("a sentence").to_string());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        match self.run(command, arguments.clone()) {
            Ok(value) => value,
            Err(err) => panic!("{command} {arguments}: {err}"),
        }
    }

    /// Runs a command that must fail; its sentence.
    #[track_caller]
    pub fn fails(&mut self, command: &str, arguments: Value) -> String {
        match self.run(command, arguments.clone()) {
            Ok(value) => panic!("{command} {arguments} succeeded: {value}"),
            Err(err) => err,
        }
    }

    /// The next event.
    pub fn next_event(&mut self) -> Value {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(),
            };
            if event.get("event").is_some() {
                return event;
            }
        }
    }

    /// The next event of this name; earlier ones are dropped.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(),
            };
            if event["event"] == name {
                return event["data"].clone();
            }
        }
    }

    /// Takes snapshots of an export's disk, one on the other: new qcow2 files in `dir`, whose nodes are
    /// called as they are.
    pub fn take_snapshots(&mut self, device: &str, dir: &Path, names: &[&str]) {
        for name in names {
            let snapshot = json!({"device": device, "snapshot-file": dir.join(name),
                                  "snapshot-node-name": name});
            self.ok("blockdev-snapshot-sync", snapshot);
        }
    }

    /// Completes the one job as soon as it is ready, and waits for its end.
    pub fn complete_job(&mut self) {
        let ready = |qmp: &mut Qmp| {
            let jobs = qmp.ok("query-jobs", json!({}));
            (jobs[0]["status"] == "ready").then(|| jobs[0]["id"].clone())
        };
        let mut id = None;
        super::wait_until("the job is ready", || {
            id = ready(self);
            id.is_some()
        });
        self.ok("job-complete", json!({"id": id}));
        self.wait_for_jobs();
    }

    /// Waits until there is no job any more.
    pub fn wait_for_jobs(&mut self) {
        super::wait_until("the end of the job", || self.ok("query-jobs", json!({})) == json!([]));
    }
}
