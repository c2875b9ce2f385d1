//! What a job does about a read or write that failed.

use crate::error::{Error, ErrorKind};

/// What the operator wants to happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// End the job with the error.
    #[default]
    Report,
    /// Go on without what could not be copied. A commit comes back to it until it can be; a stream
    /// fails in the end, and all is as it was.
    Ignore,
    /// Pause the job where space has run out, else end it.
    Enospc,
    /// Pause the job; resumed, it tries again.
    Stop,
}

/// What failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A read.
    Read,
    /// A write.
    Write,
}

impl Operation {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Action {
    /// The job ends with the error.
    Report,
    /// The job goes on as if it had not happened.
    Ignore,
    /// The job is paused; when it has its next turn, it is to try again.
    Stop,
}

impl Action {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Action::Report => "report",
            Action::Ignore => "ignore",
            Action::Stop => "stop",
        }
    }
}

impl OnError {
    /// What to do about this error.
    pub(super) fn action(self, err: &Error) -> Action {
        match self {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc if err.kind() == ErrorKind::NoSpace => Action::Stop,
            OnError::Enospc => Action::Report,
        }
    }
}
