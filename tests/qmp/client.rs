//! A client that sends any bytes.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common;

pub struct Qmp {
    stream: UnixStream,
    input: Vec<u8>,
}

impl Qmp {
    /// Connects, and sends nothing.
    #[track_caller]
    pub fn connect(path: &Path) -> Qmp {
        let stream = UnixStream::connect(path).expect("a control socket");
        Qmp { stream, input: Vec::new() }
    }

    /// Connects and ends the negotiation.
    #[track_caller]
    pub fn negotiated(path: &Path) -> Qmp {
        let mut qmp = Qmp::connect(path);
        assert!(qmp.read().get("QMP").is_some());
        qmp.ok(r#"{"execute": "qmp_capabilities"}"#);
        qmp
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("a connection");
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next message.
    #[track_caller]
    pub fn read(&mut self) -> Value {
        self.read_until(common::soon()).expect("a message in time")
    }

    /// The next message, if one comes in time.
    #[track_caller]
    pub fn read_within(&mut self, time: Duration) -> Option<Value> {
        self.read_until(Instant::now() + time)
    }

    #[track_caller]
    fn read_until(&mut self, deadline: Instant) -> Option<Value> {
        loop {
            if let Some(end) = self.input.windows(2).position(|pair| pair == b"\r\n") {
                let line: Vec<_> = self.input.drain(..end + 2).collect();
                return Some(serde_json::from_slice(&line).expect("JSON on one line"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.stream.set_read_timeout(Some(left)).expect("a timeout");
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => panic!("the connection was closed"),
                Ok(n) => self.input.extend_from_slice(&bytes[..n]),
                Err(err) => match err.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => panic!("{err}"),
                },
            }
        }
    }

    /// Whether the other side closes the connection, with nothing more to read.
    pub fn is_closed(&mut self) -> bool {
        self.stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        matches!(self.stream.read(&mut [0]), Ok(0)) && self.input.is_empty()
    }

    /// Sends a command and returns its answer, with the events that came before it dropped.
    #[track_caller]
    pub fn ask(&mut self, command: impl AsRef<str>) -> Value {
        self.send(command.as_ref());
        loop {
            let message = self.read();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    #[track_caller]
    pub fn ok(&mut self, command: impl AsRef<str>) -> Value {
        let mut answer = self.ask(command.as_ref());
        assert!(answer.get("return").is_some(), "{}: {answer}", command.as_ref());
        answer["return"].take()
    }

    /// The error of a command that has to fail.
    #[track_caller]
    pub fn error(&mut self, command: &str) -> (String, String) {
        let answer = self.ask(command);
        let text = |name: &str| answer["error"][name].as_str().expect("an error").to_string();
        (text("class"), text("desc"))
    }

    /// Waits for an event of this name and returns its data.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let mut message = self.read();
            if message["event"] == name {
                let time = &message["timestamp"];
                assert!(time["seconds"].is_u64() && time["microseconds"].is_u64(), "{message}");
                return message["data"].take();
            }
        }
    }
}
