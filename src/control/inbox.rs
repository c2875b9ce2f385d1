//! What other threads tell the control thread: replies and events, in one order.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use super::qapi::QmpResult;
use crate::error::{Result, ResultExt};

/// Something for the control thread.
#[derive(Debug)]
pub enum Note {
    /// An event for every negotiated client, as it goes over the wire.
    Event(String),
    /// The result of what the main thread did for a client.
    Reply {
        /// Whose request it was.
        client: u64,
        /// The request's own mark.
        id: Option<Value>,
        /// What came of it.
        result: QmpResult<Value>,
    },
    /// Write what is left to write, and end.
    Stop,
}

/// The mailbox of the control thread.
#[derive(Debug)]
pub struct Inbox {
    notes: Mutex<Vec<Note>>,
    /// Readable when there are notes, or when the thread is to look at the time again.
    wake: OwnedFd,
    /// Whether anybody reads: without a control socket nothing is left here.
    open: AtomicBool,
}

impl Inbox {
    /// An inbox that nobody reads yet.
    pub fn new() -> Result<Inbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Inbox {
            notes: Mutex::default(),
            wake: wake.context(|| "eventfd")?,
            open: AtomicBool::new(false),
        })
    }

    /// From now on somebody reads, or nobody does.
    pub fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::Release);
    }

    /// Whether somebody reads.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Leaves a note.
    pub fn leave(&self, note: Note) {
        if self.is_open() {
            self.notes.lock().unwrap().push(note);
            self.wake();
        }
    }

    /// Makes the control thread look up.
    pub fn wake(&self) {
        // Fails only where it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Takes all notes.
    pub fn take(&self) -> Vec<Note> {
        let mut count = [0; 8];
        // Emptied before the notes are taken: who leaves one later makes it readable again.
        let _ = rustix::io::read(&self.wake, &mut count);
        std::mem::take(&mut *self.notes.lock().unwrap())
    }

    /// Readable when there is something to take.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
