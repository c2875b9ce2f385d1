//! `x-vublk-log-start`, `-stop` and `-mark`: recording a guest's writes while it runs.

use super::prelude::*;
use crate::control::qapi::Flat;
use crate::control::recordings::LogOptions;
use crate::images::recording::{RecordOptions, RecordRequest};
use crate::units::SECTOR_SIZE;

qapi! {
    /// What is recorded, and where.
    pub struct LogStart {
        /// The export, or the node.
        pub device: String,
        /// The log: a file, made if need be, or a block device.
        pub log: String,
        /// How it is kept.
        pub options: Flat<LogOptions>,
    }
}
qapi! {
    /// What is recorded.
    pub struct LogStop {
        /// The export, or the node.
        pub device: String,
    }
}
qapi! {
    /// A mark.
    pub struct LogMark {
        /// The export, or the node, that is recorded.
        pub device: String,
        /// Its text.
        pub mark: String,
    }
}

pub struct XVublkLogStart;

impl MainCommand for XVublkLogStart {
    const NAME: &'static str = "x-vublk-log-start";
    const DOC: &'static str = "Records every write of a guest in a log, in dm-log-writes format.";
    type Arguments = LogStart;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: LogStart) -> QmpResult<Nothing> {
        let settings = arguments.options.read()?;
        let disks = daemon.disks_mut();
        let node = disks.find_any(&arguments.device)?;
        // Below filters: a flush that lies is not to be in the log.
        let image = disks.image_below(&node)?;
        let graph = std::sync::Arc::clone(disks.graph());
        let on_it =
            disks.exports.iter().filter(|served| graph.reaches(&served.root().node(), &image.node));
        // The smallest blocks that any guest of it may write.
        let blocks = on_it.map(|served| u64::from(served.export().options.block_size)).min();
        let request = RecordRequest {
            log: arguments.log.into(),
            cache: image.cache,
            lock_wait: std::time::Duration::ZERO,
            options: RecordOptions {
                sidecar: arguments.options.log_sidecar.clone().map(Into::into),
                locking: image.locking,
                state_dir: disks.layers.state_dir().clone(),
                block_size: Some(blocks.unwrap_or(SECTOR_SIZE)),
                settings,
            },
        };
        disks.recordings.start(&graph, &image, &request)?;
        Ok(Nothing {})
    }
}

pub struct XVublkLogStop;

impl MainCommand for XVublkLogStop {
    const NAME: &'static str = "x-vublk-log-stop";
    const DOC: &'static str = "Ends the recording of a guest's writes.";
    type Arguments = LogStop;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: LogStop) -> QmpResult<Nothing> {
        let disks = daemon.disks_mut();
        let node = disks.find_any(&arguments.device)?;
        let node = disks.recorded(&node)?;
        let graph = std::sync::Arc::clone(disks.graph());
        disks.recordings.stop(&graph, &node)?;
        Ok(Nothing {})
    }
}

pub struct XVublkLogMark;

impl MainCommand for XVublkLogMark {
    const NAME: &'static str = "x-vublk-log-mark";
    const DOC: &'static str = "Gives a name to the present end of a log that is being recorded.";
    type Arguments = LogMark;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: LogMark) -> QmpResult<Nothing> {
        let disks = daemon.disks();
        let node = disks.find_any(&arguments.device)?;
        let node = disks.recorded(&node)?;
        disks.recordings.mark(&node, &arguments.mark)?;
        Ok(Nothing {})
    }
}
