//! What clients are told of jobs, in the words of the wire.

use super::events::{Event, Events};
use crate::jobs::{Action, Figures, JobEvent, JobKind, Operation, Status};

crate::qapi! {
    /// What a job does.
    pub enum JobType {
        Commit = "commit",
        Stream = "stream",
        Mirror = "mirror",
        Backup = "backup",
        Create = "create",
    }
}

impl From<JobKind> for JobType {
    fn from(kind: JobKind) -> JobType {
        match kind {
            JobKind::Commit => JobType::Commit,
            JobKind::Stream => JobType::Stream,
            JobKind::Mirror => JobType::Mirror,
            JobKind::Backup => JobType::Backup,
            JobKind::Create => JobType::Create,
        }
    }
}

crate::qapi! {
    /// Where a job is in its life.
    pub enum JobStatus {
        Undefined = "undefined",
        Created = "created",
        Running = "running",
        Paused = "paused",
        Ready = "ready",
        Standby = "standby",
        Waiting = "waiting",
        Pending = "pending",
        Aborting = "aborting",
        Concluded = "concluded",
        Null = "null",
    }
}

impl From<Status> for JobStatus {
    fn from(status: Status) -> JobStatus {
        match status {
            Status::Created => JobStatus::Created,
            Status::Running => JobStatus::Running,
            Status::Paused => JobStatus::Paused,
            Status::Ready => JobStatus::Ready,
            Status::Standby => JobStatus::Standby,
            Status::Waiting => JobStatus::Waiting,
            Status::Pending => JobStatus::Pending,
            Status::Aborting => JobStatus::Aborting,
            Status::Concluded => JobStatus::Concluded,
            Status::Null => JobStatus::Null,
        }
    }
}

crate::qapi! {
    /// What failed.
    pub enum IoOperationType { Read = "read", Write = "write" }
}

crate::qapi! {
    /// What is done about an error.
    pub enum BlockErrorAction { Ignore = "ignore", Report = "report", Stop = "stop" }
}

crate::qapi! {
    /// A job has changed its state.
    pub struct JobStatusChange {
        /// The job.
        pub id: String,
        /// Its state.
        pub status: JobStatus,
    }
}

impl Event for JobStatusChange {
    const NAME: &'static str = "JOB_STATUS_CHANGE";
}

crate::qapi! {
    /// A block job can be completed.
    pub struct BlockJobReady {
        /// What it does.
        pub r#type: JobType,
        /// The job.
        pub device: String,
        /// How far it has to go.
        pub len: u64,
        /// How far it is.
        pub offset: u64,
        /// Its speed limit.
        pub speed: u64,
    }
}

impl Event for BlockJobReady {
    const NAME: &'static str = "BLOCK_JOB_READY";
}

crate::qapi! {
    /// A block job was cancelled.
    pub struct BlockJobCancelled {
        /// What it does.
        pub r#type: JobType,
        /// The job.
        pub device: String,
        /// How far it had to go.
        pub len: u64,
        /// How far it was.
        pub offset: u64,
        /// Its speed limit.
        pub speed: u64,
    }
}

impl Event for BlockJobCancelled {
    const NAME: &'static str = "BLOCK_JOB_CANCELLED";
}

crate::qapi! {
    /// A block job has ended, well or with an error.
    pub struct BlockJobCompleted {
        /// What it does.
        pub r#type: JobType,
        /// The job.
        pub device: String,
        /// How far it had to go.
        pub len: u64,
        /// How far it was.
        pub offset: u64,
        /// Its speed limit.
        pub speed: u64,
        /// Why it failed.
        pub error: Option<String>,
    }
}

impl Event for BlockJobCompleted {
    const NAME: &'static str = "BLOCK_JOB_COMPLETED";
}

crate::qapi! {
    /// A block job waits to be finalized.
    pub struct BlockJobPending {
        /// What it does.
        pub r#type: JobType,
        /// The job.
        pub id: String,
    }
}

impl Event for BlockJobPending {
    const NAME: &'static str = "BLOCK_JOB_PENDING";
}

crate::qapi! {
    /// A read or write of a block job has failed.
    pub struct BlockJobError {
        /// The job.
        pub device: String,
        /// What failed.
        pub operation: IoOperationType,
        /// What is done about it.
        pub action: BlockErrorAction,
    }
}

impl Event for BlockJobError {
    const NAME: &'static str = "BLOCK_JOB_ERROR";
}

/// Tells clients what has happened.
pub(super) fn emit(events: &Events, event: &JobEvent) {
    match event.clone() {
        JobEvent::Status { id, status } => {
            events.emit(&JobStatusChange { id, status: status.into() });
        }
        JobEvent::Ready(Figures { id, kind, total, current, speed }) => {
            events.emit(&BlockJobReady {
                r#type: kind.into(),
                device: id,
                len: total,
                offset: current,
                speed,
            })
        }
        JobEvent::Cancelled(Figures { id, kind, total, current, speed }) => {
            events.emit(&BlockJobCancelled {
                r#type: kind.into(),
                device: id,
                len: total,
                offset: current,
                speed,
            });
        }
        JobEvent::Completed(Figures { id, kind, total, current, speed }, error) => {
            events.emit(&BlockJobCompleted {
                r#type: kind.into(),
                device: id,
                len: total,
                offset: current,
                speed,
                error,
            });
        }
        JobEvent::Pending { id, kind } => {
            events.emit(&BlockJobPending { r#type: kind.into(), id });
        }
        JobEvent::Error { id, operation, action } => events.emit(&BlockJobError {
            device: id,
            operation: match operation {
                Operation::Read => IoOperationType::Read,
                Operation::Write => IoOperationType::Write,
            },
            action: match action {
                Action::Report => BlockErrorAction::Report,
                Action::Ignore => BlockErrorAction::Ignore,
                Action::Stop => BlockErrorAction::Stop,
            },
        }),
    }
}
