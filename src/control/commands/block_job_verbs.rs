//! `block-job-pause`, `block-job-cancel`, …: the older commands for jobs that work on disks. They
//! know no other jobs, call a job a device, and have an error class of their own.

use super::prelude::*;
use crate::control::Class;
use crate::jobs::{Verb, VerbError};

qapi! {
    /// A block job.
    pub struct BlockJobDevice {
        /// Its name. (That of the device, where nobody gave it one.)
        pub device: String,
    }
}

qapi! {
    /// A block job, as the newer of these commands call it.
    pub struct BlockJobId {
        /// Its name.
        pub id: String,
    }
}

qapi! {
    /// Arguments of `block-job-cancel`.
    pub struct BlockJobCancelArguments {
        /// The job.
        pub device: String,
        /// Cancel it even if it is ready, and even if it is paused.
        pub force: Option<bool>,
    }
}

qapi! {
    /// Arguments of `block-job-set-speed`.
    pub struct BlockJobSetSpeedArguments {
        /// The job.
        pub device: String,
        /// Bytes in a second; 0 is no limit.
        pub speed: i64,
    }
}

/// The block job of this name.
fn block_job<'a>(shared: &Shared, id: &'a str) -> QmpResult<&'a str> {
    match shared.jobs().kind(id) {
        Some(kind) if kind.is_block_job() => Ok(id),
        _ => Err(refusal(id, VerbError::NotFound)),
    }
}

fn refusal(id: &str, err: VerbError) -> QmpError {
    match err {
        VerbError::NotFound => {
            QmpError::new(Class::DeviceNotActive, format!("Block job '{id}' not found"))
        }
        VerbError::Refused(desc) => QmpError::generic(desc),
    }
}

macro_rules! verb {
    ($command:ident($arguments:ident.$id:ident), $name:literal, $verb:expr, $doc:literal) => {
        pub struct $command;

        impl QuickCommand for $command {
            const NAME: &'static str = $name;
            const DOC: &'static str = $doc;
            type Arguments = $arguments;
            type Returns = Nothing;

            fn run(shared: &Shared, arguments: $arguments) -> QmpResult<Nothing> {
                let id = block_job(shared, &arguments.$id)?;
                shared.jobs().apply(id, $verb).map_err(|err| refusal(id, err))?;
                Ok(Nothing {})
            }
        }
    };
}

verb!(
    BlockJobPause(BlockJobDevice.device),
    "block-job-pause",
    Verb::Pause,
    "Has a block job rest."
);
verb!(
    BlockJobResume(BlockJobDevice.device),
    "block-job-resume",
    Verb::Resume,
    "Has a block job that rests, or that an error has stopped, go on."
);
verb!(
    BlockJobComplete(BlockJobDevice.device),
    "block-job-complete",
    Verb::Complete,
    "Ends a block job that is ready; the guest goes over to the copy."
);
verb!(
    BlockJobDismiss(BlockJobId.id),
    "block-job-dismiss",
    Verb::Dismiss,
    "Forgets a block job that is over."
);

pub struct BlockJobFinalize;

impl MainCommand for BlockJobFinalize {
    const NAME: &'static str = "block-job-finalize";
    const DOC: &'static str =
        "Puts in force what a block job has done; it is over when this is answered.";
    type Arguments = BlockJobId;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockJobId) -> QmpResult<Nothing> {
        let id = block_job(daemon.shared(), &arguments.id)?;
        daemon.finalize_job(id).map_err(|err| refusal(id, err))?;
        Ok(Nothing {})
    }
}

pub struct BlockJobCancel;

impl QuickCommand for BlockJobCancel {
    const NAME: &'static str = "block-job-cancel";
    const DOC: &'static str = "Ends a block job; one that is ready leaves a good copy behind.";
    type Arguments = BlockJobCancelArguments;
    type Returns = Nothing;

    fn run(shared: &Shared, arguments: BlockJobCancelArguments) -> QmpResult<Nothing> {
        let id = block_job(shared, &arguments.device)?;
        let result = match arguments.force {
            Some(true) => shared.jobs().apply(id, Verb::Cancel),
            _ => shared.jobs().cancel_gently(id),
        };
        result.map_err(|err| refusal(id, err))?;
        Ok(Nothing {})
    }
}

pub struct BlockJobSetSpeed;

impl QuickCommand for BlockJobSetSpeed {
    const NAME: &'static str = "block-job-set-speed";
    const DOC: &'static str = "Limits the speed of a block job.";
    type Arguments = BlockJobSetSpeedArguments;
    type Returns = Nothing;

    fn run(shared: &Shared, arguments: BlockJobSetSpeedArguments) -> QmpResult<Nothing> {
        let id = block_job(shared, &arguments.device)?;
        let speed = u64::try_from(arguments.speed)
            .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
        shared.jobs().set_speed(id, speed).map_err(|err| refusal(id, err))?;
        Ok(Nothing {})
    }
}
