//! The states of a job and what is possible in each: QEMU's tables.
//!
//! ```text
//! created ─► running ─► [ready] ─► waiting ─► pending ─► concluded ─► null
//!     │       │   ▲      │   ▲        │          │           ▲
//!     │       ▼   │      ▼   │        │          │           │
//!     │      paused     standby       │          │           │
//!     └──────────────► aborting ◄─────┴──────────┴───────────┘
//! ```

use std::fmt;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not started yet.
    Created,
    /// At work.
    Running,
    /// At rest, by request, on its way from running.
    Paused,
    /// In step with the guest; goes on until it is told how to end.
    Ready,
    /// At rest, by request, on its way from ready.
    Standby,
    /// Done; others of its group are not.
    Waiting,
    /// Done, and what it did is not in force yet.
    Pending,
    /// What it did is being undone.
    Aborting,
    /// Over; stays to be asked for its result.
    Concluded,
    /// Gone.
    Null,
}

impl Status {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// Whether a job may go from here to `next`.
    pub fn may_become(self, next: Status) -> bool {
        use Status::*;
        match self {
            Created => matches!(next, Running | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => matches!(next, Running),
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => matches!(next, Ready),
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Aborting | Concluded),
            Aborting => matches!(next, Aborting | Concluded),
            Concluded => matches!(next, Null),
            Null => false,
        }
    }

    /// Whether it has not ended its work.
    pub fn is_at_work(self) -> bool {
        use Status::*;
        matches!(self, Created | Running | Paused | Ready | Standby)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What an operator can ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// End it; what it did does not count.
    Cancel,
    /// Rest.
    Pause,
    /// Go on.
    Resume,
    /// Limit its speed.
    SetSpeed,
    /// End it now that it is ready.
    Complete,
    /// Put what it did in force.
    Finalize,
    /// Forget it.
    Dismiss,
    /// Change its settings.
    Change,
}

impl Verb {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Change => "change",
        }
    }

    /// Whether a job in this state can be asked for it.
    pub fn is_allowed(self, status: Status) -> bool {
        use Status::*;
        match self {
            Verb::Cancel => status.is_at_work() || matches!(status, Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => status.is_at_work(),
            // While it rests, it notes that for later.
            Verb::Complete => matches!(status, Ready | Standby),
            Verb::Finalize => status == Pending,
            Verb::Dismiss => status == Concluded,
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
