//! `query-block-jobs`: the jobs that work on disks, at length.

use super::prelude::*;
use crate::control::job_events::{JobStatus, JobType};
use crate::jobs::IoStatus;

qapi! {
    /// Whether errors have stopped a job.
    pub enum BlockDeviceIoStatus { Ok = "ok", Failed = "failed", Nospace = "nospace" }
}

qapi! {
    /// A block job.
    pub struct BlockJobInfo {
        /// What it does.
        pub r#type: JobType,
        /// Its name.
        pub device: String,
        /// How far it has to go.
        pub len: u64,
        /// How far it is.
        pub offset: u64,
        /// Whether it issues requests at the moment.
        pub busy: bool,
        /// Whether it was asked to rest.
        pub paused: bool,
        /// Its speed limit in bytes in a second; 0 is none.
        pub speed: u64,
        /// Whether an error has stopped it.
        pub io_status: BlockDeviceIoStatus,
        /// Whether it can be completed.
        pub ready: bool,
        /// Where it is in its life.
        pub status: JobStatus,
        /// Whether it is put in force without being asked.
        pub auto_finalize: bool,
        /// Whether it is forgotten without being asked.
        pub auto_dismiss: bool,
        /// Why it failed.
        pub error: Option<String>,
        /// For a mirror: whether each write of the guest waits for the copy.
        pub actively_synced: Option<bool>,
    }
}

pub struct QueryBlockJobs;

impl QuickCommand for QueryBlockJobs {
    const NAME: &'static str = "query-block-jobs";
    const DOC: &'static str = "Lists the jobs that work on disks.";
    type Arguments = Nothing;
    type Returns = Vec<BlockJobInfo>;

    fn run(shared: &Shared, _: Nothing) -> QmpResult<Vec<BlockJobInfo>> {
        let jobs = shared.jobs().query().into_iter().filter(|job| job.kind.is_block_job());
        let info = |job: crate::jobs::JobInfo| BlockJobInfo {
            r#type: job.kind.into(),
            device: job.id,
            len: job.total,
            offset: job.current,
            busy: job.busy,
            paused: job.paused,
            speed: job.speed,
            io_status: match job.io_status {
                IoStatus::Ok => BlockDeviceIoStatus::Ok,
                IoStatus::Failed => BlockDeviceIoStatus::Failed,
                IoStatus::NoSpace => BlockDeviceIoStatus::Nospace,
            },
            ready: job.ready,
            status: job.status.into(),
            auto_finalize: job.auto_finalize,
            auto_dismiss: job.auto_dismiss,
            error: job.error,
            actively_synced: job.details.actively_synced,
        };
        Ok(jobs.map(info).collect())
    }
}
