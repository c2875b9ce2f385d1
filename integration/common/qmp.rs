//! A small client of a control socket, QEMU's or vublk's: one command at a time, events kept aside.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// An open connection past the capabilities handshake.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, trying until `end`, and negotiates.
    pub fn connect(path: &Path, end: Instant) -> Qmp {
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => {
                    assert!(Instant::now() < end, "no control socket: {error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        let mut qmp = Qmp { reader: BufReader::new(stream), events: VecDeque::new() };
        let greeting = qmp.read(end);
        assert!(greeting.get("QMP").is_some(), "not a greeting: {greeting}");
        qmp.run("qmp_capabilities", json!({}), end);
        qmp
    }

    /// Runs a command and returns its result; panics on an error.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value, end: Instant) -> Value {
        let mut answer = self.ask(command, arguments, end);
        assert!(answer.get("error").is_none(), "{command}: {}", answer["error"]);
        answer["return"].take()
    }

    /// Runs a command that must fail, and returns why it did.
    #[track_caller]
    pub fn fails(&mut self, command: &str, arguments: Value, end: Instant) -> String {
        let answer = self.ask(command, arguments, end);
        let why = answer["error"]["desc"].as_str();
        why.unwrap_or_else(|| panic!("{command} went well: {answer}")).to_owned()
    }

    fn ask(&mut self, command: &str, arguments: Value, end: Instant) -> Value {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes()).expect("somebody listens");
        loop {
            let answer = self.read(end);
            if answer.get("event").is_none() {
                return answer;
            }
            self.events.push_back(answer);
        }
    }

    /// Waits for an event of this name for which `wanted` is true, and returns its data. Earlier
    /// events are dropped.
    pub fn await_event(
        &mut self,
        name: &str,
        end: Instant,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        loop {
            let mut event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(end),
            };
            if event["event"] == name && wanted(&event["data"]) {
                return event["data"].take();
            }
        }
    }

    /// Waits for an event of one of these names, and returns its name. Earlier events are dropped.
    pub fn await_any<'a>(&mut self, names: &[&'a str], end: Instant) -> &'a str {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read(end),
            };
            if let Some(name) = names.iter().find(|name| event["event"] == **name) {
                return name;
            }
        }
    }

    fn read(&mut self, end: Instant) -> Value {
        let mut line = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the control socket was silent until the deadline");
            self.reader.get_ref().set_read_timeout(Some(left)).expect("a timeout can be set");
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => panic!("the control socket was closed"),
                Ok(_) if line.ends_with(b"\n") => break,
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => panic!("control socket: {error}"),
                },
            }
        }
        serde_json::from_slice(&line).expect("JSON")
    }
}
