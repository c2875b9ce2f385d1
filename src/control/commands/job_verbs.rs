//! `job-pause`, `job-resume`, …: what can be asked of any job by its name.

use super::prelude::*;
use crate::jobs::{Verb, VerbError};

qapi! {
    /// A job.
    pub struct JobId {
        /// Its name.
        pub id: String,
    }
}

/// The errors of `job-*`.
fn refusal(err: VerbError) -> QmpError {
    QmpError::generic(match err {
        VerbError::NotFound => "Job not found".to_string(),
        VerbError::Refused(desc) => desc,
    })
}

macro_rules! verb {
    ($command:ident, $name:literal, $verb:expr, $doc:literal) => {
        pub struct $command;

        impl QuickCommand for $command {
            const NAME: &'static str = $name;
            const DOC: &'static str = $doc;
            type Arguments = JobId;
            type Returns = Nothing;

            fn run(shared: &Shared, arguments: JobId) -> QmpResult<Nothing> {
                shared.jobs().apply(&arguments.id, $verb).map_err(refusal)?;
                Ok(Nothing {})
            }
        }
    };
}

verb!(JobPause, "job-pause", Verb::Pause, "Has a job rest.");
verb!(JobResume, "job-resume", Verb::Resume, "Has a job that rests go on.");
verb!(JobCancel, "job-cancel", Verb::Cancel, "Ends a job; what it did does not count.");
verb!(JobComplete, "job-complete", Verb::Complete, "Ends a job that is ready.");
verb!(JobDismiss, "job-dismiss", Verb::Dismiss, "Forgets a job that is over.");

pub struct JobFinalize;

impl MainCommand for JobFinalize {
    const NAME: &'static str = "job-finalize";
    const DOC: &'static str =
        "Puts in force what a job has done; it is over when this is answered.";
    type Arguments = JobId;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: JobId) -> QmpResult<Nothing> {
        daemon.finalize_job(&arguments.id).map_err(refusal)?;
        Ok(Nothing {})
    }
}
