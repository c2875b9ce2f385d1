//! `block-stream`: fills a layer from those below it, as a job.

use std::path::Path;

use super::prelude::*;
use crate::block::Node;
use crate::jobs::stream::{StreamRequest, start};
use crate::jobs::{JobKind, OnError, Spec, chain};

qapi! {
    /// What a job does about a read or write that fails.
    pub enum BlockdevOnError {
        Report = "report",
        Ignore = "ignore",
        Enospc = "enospc",
        Stop = "stop",
        Auto = "auto",
    }
}

impl From<BlockdevOnError> for OnError {
    fn from(value: BlockdevOnError) -> OnError {
        match value {
            // There is no device whose setting could be taken.
            BlockdevOnError::Report | BlockdevOnError::Auto => OnError::Report,
            BlockdevOnError::Ignore => OnError::Ignore,
            BlockdevOnError::Enospc => OnError::Enospc,
            BlockdevOnError::Stop => OnError::Stop,
        }
    }
}

qapi! {
    /// Arguments of `block-stream`.
    pub struct BlockStreamArguments {
        /// Name of the job; the device's if absent.
        pub job_id: Option<String>,
        /// The export, or the node that is filled.
        pub device: String,
        /// The layer that it stands on in the end, by its file; on nothing if absent.
        pub base: Option<String>,
        /// The same, by its node.
        pub base_node: Option<String>,
        /// How the node is to name the base in its header.
        pub backing_file: Option<String>,
        /// The last layer that is copied, in place of the one below it.
        pub bottom: Option<String>,
        /// Bytes in a second; 0 is no limit.
        pub speed: Option<i64>,
        /// What happens when a read or write fails.
        pub on_error: Option<BlockdevOnError>,
        /// A name for the node by which the job is seen.
        pub filter_node_name: Option<String>,
        /// Whether the job is put in force without being asked.
        pub auto_finalize: Option<bool>,
        /// Whether the job is forgotten without being asked.
        pub auto_dismiss: Option<bool>,
    }
}

pub struct BlockStream;

impl MainCommand for BlockStream {
    const NAME: &'static str = "block-stream";
    const DOC: &'static str = "Fills a layer of a disk from those below it, as a job.";
    type Arguments = BlockStreamArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockStreamArguments) -> QmpResult<Nothing> {
        let given = [
            ("base", arguments.base.is_some()),
            ("bottom", arguments.bottom.is_some()),
            ("base-node", arguments.base_node.is_some()),
        ];
        for (a, b) in [(0, 2), (0, 1), (1, 2)] {
            if given[a].1 && given[b].1 {
                return Err(QmpError::generic(format!(
                    "'{}' and '{}' cannot be specified at the same time",
                    given[a].0, given[b].0
                )));
            }
        }
        let device = Some(arguments.device.as_str());
        let top = daemon.disks().find_image(device, device)?;
        let base = base(daemon, &arguments, &top)?;
        if base.is_none() && arguments.backing_file.is_some() {
            return Err(QmpError::generic(
                "backing file specified, but streaming the entire chain",
            ));
        }
        let mut spec = job_spec(
            daemon,
            JobKind::Stream,
            arguments.job_id,
            &arguments.device,
            arguments.speed,
        )?;
        let prefix = "Could not create node: ";
        check_filter_name(daemon, arguments.filter_node_name.as_deref(), prefix)?;
        spec.auto_finalize = arguments.auto_finalize.unwrap_or(spec.auto_finalize);
        spec.auto_dismiss = arguments.auto_dismiss.unwrap_or(spec.auto_dismiss);
        let request = StreamRequest {
            top,
            base,
            backing_file: arguments.backing_file,
            on_error: arguments.on_error.map_or_else(Default::default, Into::into),
            filter_name: arguments.filter_node_name,
        };
        let jobs = daemon.jobs().clone();
        start(&jobs, &mut daemon.disks_mut().layers, request, spec)?;
        Ok(Nothing {})
    }
}

/// What the node is to stand on in the end.
fn base(daemon: &Daemon, arguments: &BlockStreamArguments, top: &Node) -> QmpResult<Option<Node>> {
    let disks = daemon.disks();
    let device = &arguments.device;
    if let Some(file) = &arguments.base {
        let below = top.backing();
        let found = below.and_then(|below| disks.layers.find_in_chain(&below, Path::new(file)));
        return found
            .map(Some)
            .ok_or_else(|| QmpError::generic(format!("Can't find '{file}' in the backing chain")));
    }
    if let Some(name) = &arguments.base_node {
        let node = disks.find(None, Some(name))?;
        if node.is_same(top) || chain::between(top, Some(&node)).is_none() {
            return Err(QmpError::generic(format!(
                "Node '{name}' is not a backing image of '{device}'"
            )));
        }
        return Ok(Some(node));
    }
    if let Some(name) = &arguments.bottom {
        let node = disks.find(None, Some(name))?;
        if chain::between(top, Some(&node)).is_none() {
            return Err(QmpError::generic(format!(
                "Node '{name}' is not in a chain starting from '{device}'"
            )));
        }
        return Ok(node.backing());
    }
    Ok(None)
}

/// The settings that jobs on disks have in common. Where nobody named the job, it has the name of its
/// export; a node is none.
pub(super) fn job_spec(
    daemon: &Daemon,
    kind: JobKind,
    job_id: Option<String>,
    device: &str,
    speed: Option<i64>,
) -> QmpResult<Spec> {
    let id = match job_id {
        Some(id) => id,
        None if daemon.disks().exports.get(device).is_some() => device.to_string(),
        None => String::new(),
    };
    let speed = u64::try_from(speed.unwrap_or(0))
        .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
    Ok(Spec { speed, ..Spec::new(id, kind) })
}

/// Checks the name of the node by which a job is to be seen.
pub(super) fn check_filter_name(
    daemon: &Daemon,
    name: Option<&str>,
    prefix: &str,
) -> QmpResult<()> {
    let Some(name) = name else { return Ok(()) };
    let checked = daemon.disks().graph().check_name(name);
    checked.map_err(|err| QmpError::generic(format!("{prefix}{err}")))
}
