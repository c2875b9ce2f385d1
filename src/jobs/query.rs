//! What can be asked of a job.

use super::job::JobKind;
use super::state::Status;

/// Whether errors have stopped the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No.
    #[default]
    Ok,
    /// Yes, some error.
    Failed,
    /// Yes, want of space.
    NoSpace,
}

impl IoStatus {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

/// A job as of now.
#[derive(Clone, Debug)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Where it is in its life.
    pub status: Status,
    /// How far it is, of [`total`](JobInfo::total). Bytes, for all but the shortest jobs.
    pub current: u64,
    /// How far it has to go, as far as that is known.
    pub total: u64,
    /// Bytes in a second; 0 is no limit.
    pub speed: u64,
    /// Whether it issues requests at the moment.
    pub busy: bool,
    /// Whether the operator or an error has asked it to rest.
    pub paused: bool,
    /// Whether it waits to be completed.
    pub ready: bool,
    /// Whether an error has stopped it.
    pub io_status: IoStatus,
    /// Whether it is put in force without being asked.
    pub auto_finalize: bool,
    /// Whether it is forgotten without being asked.
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// What only some kinds of jobs tell.
    pub details: Details,
}

/// What only some kinds of jobs tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// For a mirror: whether each write of the guest waits for the copy.
    pub actively_synced: Option<bool>,
}
