//! `query-jobs`: all jobs, in short.

use super::prelude::*;
use crate::control::job_events::{JobStatus, JobType};

qapi! {
    /// A job.
    pub struct JobInfo {
        /// Its name.
        pub id: String,
        /// What it does.
        pub r#type: JobType,
        /// Where it is in its life.
        pub status: JobStatus,
        /// How far it is.
        pub current_progress: u64,
        /// How far it has to go.
        pub total_progress: u64,
        /// Why it failed.
        pub error: Option<String>,
    }
}

pub struct QueryJobs;

impl QuickCommand for QueryJobs {
    const NAME: &'static str = "query-jobs";
    const DOC: &'static str = "Lists all jobs.";
    type Arguments = Nothing;
    type Returns = Vec<JobInfo>;

    fn run(shared: &Shared, _: Nothing) -> QmpResult<Vec<JobInfo>> {
        let jobs = shared.jobs().query().into_iter().map(|job| JobInfo {
            id: job.id,
            r#type: job.kind.into(),
            status: job.status.into(),
            current_progress: job.current,
            total_progress: job.total,
            error: job.error,
        });
        Ok(jobs.collect())
    }
}
