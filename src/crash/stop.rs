//! The operator's wish to end: looked at between states, and waited for beside a checker that runs.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Once asked for, what is under way ends: a checker is killed, and its state has no verdict. May be
/// asked for by any thread.
#[derive(Debug)]
pub struct Stop {
    is_asked: AtomicBool,
    /// Readable once it is asked for.
    event: OwnedFd,
}

impl Stop {
    /// Not asked for yet.
    pub fn new() -> Result<Stop> {
        let event = eventfd(0, EventfdFlags::CLOEXEC).context(|| "eventfd")?;
        Ok(Stop { is_asked: AtomicBool::new(false), event })
    }

    /// Asks for it.
    pub fn ask(&self) {
        self.is_asked.store(true, Ordering::Release);
        // An eventfd has room for this.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Whether it was asked for.
    pub fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::Acquire)
    }

    /// What to wait for.
    pub(super) fn poll(&self) -> PollFd<'_> {
        PollFd::new(&self.event, PollFlags::IN)
    }
}

/// The error of what was ended by it.
pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::Cancelled, "ended by a signal")
}
