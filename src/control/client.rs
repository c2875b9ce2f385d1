//! One connection: what has come in and what is to go out.
//!
//! ```text
//! socket ─► input ─► framer ─► requests ─► (the server runs them, one at a time)
//! socket ◄─ output ◄────────── replies, events
//! ```
//!
//! Bounds: at most `MAX_REQUESTS` requests wait, and while so many do, or while more than
//! `MAX_UNREAD_REPLIES` bytes have not been fetched, nothing is read or run for this client.
//! Events do not wait for anybody: beyond `MAX_UNREAD_EVENTS` bytes they are dropped, counted, and
//! once the client reads again, an event says so.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::commands::{Capabilities, Capability, version};
use super::events::{EventsLost, line};
use super::json::Framer;
use super::qapi::{At, Qapi, QmpResult, object_from_value};
use super::request::{Call, Request};

/// The most requests that wait.
const MAX_REQUESTS: usize = 8;
/// Bytes of output beyond which no request is run.
pub(super) const MAX_UNREAD_REPLIES: usize = 256 << 10;
/// Bytes of output beyond which no event is added.
const MAX_UNREAD_EVENTS: usize = 1 << 20;
/// How much is read at a time.
const READ_SIZE: usize = 64 << 10;

/// See the module's text.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    framer: Framer,
    /// Read, from `input_at` on not yet framed.
    input: Vec<u8>,
    input_at: usize,
    /// Whether the client will send nothing more.
    input_ended: bool,
    requests: VecDeque<Request>,
    /// Whether the main thread is busy with a request of this client.
    waiting: bool,
    /// To be sent, from `sent` on.
    output: Vec<u8>,
    sent: usize,
    /// Events that were dropped since the client last read everything.
    events_lost: u64,
    /// Whether the negotiation is over.
    negotiated: bool,
    /// Whether it chose to use `exec-oob`.
    oob: bool,
}

impl Client {
    /// A new connection; it is greeted.
    pub fn new(stream: UnixStream) -> Client {
        let mut client = Client {
            stream,
            framer: Framer::default(),
            input: Vec::new(),
            input_at: 0,
            input_ended: false,
            requests: VecDeque::new(),
            waiting: false,
            output: Vec::new(),
            sent: 0,
            events_lost: 0,
            negotiated: false,
            oob: false,
        };
        let greeting = json!({"version": version().to_value(), "capabilities": Capability::WORDS});
        client.send(&json!({"QMP": greeting}).to_string());
        client
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether there is room for what the client may send.
    pub fn wants_input(&self) -> bool {
        !self.input_ended && self.requests.len() < MAX_REQUESTS && self.has_room()
    }

    /// Whether something is to be sent.
    pub fn wants_output(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Whether it has left and nothing more is owed to it.
    pub fn is_done(&self) -> bool {
        self.input_ended && self.requests.is_empty() && !self.waiting && !self.wants_output()
    }

    fn has_room(&self) -> bool {
        self.output.len() - self.sent <= MAX_UNREAD_REPLIES
    }

    /// Reads what has arrived.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn receive(&mut self) -> std::io::Result<()> {
        if !self.wants_input() {
            return Ok(());
        }
        if self.input_at == self.input.len() {
            self.input.resize(READ_SIZE, 0);
            self.input_at = 0;
            let read = self.stream.read(&mut self.input);
            self.input.truncate(*read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => {
                    self.input_ended = true;
                    let message = self.framer.finish();
                    self.add(message);
                }
                Ok(_) => {}
                Err(err) if is_transient(&err) => {}
                Err(err) => return Err(err),
            }
        }
        self.frame();
        Ok(())
    }

    /// The client has closed the connection: drops what it is owed, and reads what is left of what
    /// it had sent.
    pub fn receive_rest(&mut self) {
        self.output = Vec::new();
        self.sent = 0;
        // What has arrived can still be read, and then comes an end.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        while self.wants_input() {
            match self.receive() {
                Ok(()) => {}
                // Once, because we had not been read to the end.
                Err(err) if err.kind() == ErrorKind::ConnectionReset => {}
                Err(_) => self.input_ended = true,
            }
        }
    }

    /// Makes requests of what was read, as far as they find a place.
    fn frame(&mut self) {
        while self.input_at < self.input.len() && self.requests.len() < MAX_REQUESTS {
            let (used, message) = self.framer.push(&self.input[self.input_at..]);
            self.input_at += used;
            self.add(message);
        }
        if self.input_at == self.input.len() {
            // An idle client costs no buffer.
            self.input = Vec::new();
            self.input_at = 0;
        }
    }

    fn add(&mut self, message: Option<Result<Value, String>>) {
        self.requests.extend(message.map(|message| Request::new(message, self.oob)));
    }

    /// The next request to be run, in order; those out of band come first.
    pub fn next_request(&mut self) -> Option<Request> {
        let request = self.requests.remove(self.next_index()?);
        self.frame();
        request
    }

    /// Whether there is one.
    pub fn has_next_request(&self) -> bool {
        self.next_index().is_some()
    }

    fn next_index(&self) -> Option<usize> {
        if !self.has_room() {
            return None;
        }
        let urgent = self.requests.iter().position(Request::is_out_of_band);
        urgent.or((!self.waiting && !self.requests.is_empty()).then_some(0))
    }

    /// The main thread has begun to work for this client.
    pub fn set_waiting(&mut self) {
        self.waiting = true;
    }

    /// The main thread has an answer.
    pub fn answered(&mut self) {
        self.waiting = false;
    }

    /// Whether the negotiation is over.
    pub fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Ends the negotiation.
    pub fn negotiate(&mut self, call: Call) -> QmpResult<Value> {
        let arguments: Capabilities = object_from_value(Value::Object(call.arguments), &At::ROOT)?;
        self.negotiated = true;
        self.oob = arguments.enable.unwrap_or_default().contains(&Capability::Oob);
        Ok(json!({}))
    }

    /// Queues the answer to a request.
    pub fn reply(&mut self, id: Option<Value>, result: QmpResult<Value>) {
        let mut answer = match result {
            Ok(value) => json!({"return": value}),
            Err(err) => json!({"error": err.to_value()}),
        };
        if let Some(id) = id {
            answer["id"] = id;
        }
        self.send(&answer.to_string());
    }

    /// Queues an event, unless too much is unread.
    pub fn event(&mut self, line: &str) {
        if !self.negotiated {
            return;
        }
        if self.events_lost > 0 || self.output.len() - self.sent > MAX_UNREAD_EVENTS {
            self.events_lost += 1;
            return;
        }
        self.send(line);
    }

    fn send(&mut self, line: &str) {
        self.output.extend_from_slice(line.as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }

    /// Sends as much as the client takes now.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn transmit(&mut self) -> std::io::Result<()> {
        while self.wants_output() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(err) if err.kind() == ErrorKind::WouldBlock => {
                    // What was sent does not pile up before what was not.
                    if self.sent > READ_SIZE {
                        self.output.drain(..self.sent);
                        self.sent = 0;
                    }
                    return Ok(());
                }
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
            if !self.wants_output() {
                self.output = Vec::new();
                self.sent = 0;
                let count = std::mem::take(&mut self.events_lost);
                if count > 0 {
                    self.send(&line(&EventsLost { count }));
                }
            }
        }
        Ok(())
    }
}

fn is_transient(err: &std::io::Error) -> bool {
    matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
