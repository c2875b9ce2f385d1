//! `block-commit`: pushes layers down into one below them, as a job.

use std::path::Path;

use super::block_stream::{BlockdevOnError, check_filter_name, job_spec};
use super::prelude::*;
use crate::block::Node;
use crate::block::graph::Parent;
use crate::control::Class;
use crate::jobs::commit::{CommitRequest, start};
use crate::jobs::{JobKind, chain};

qapi! {
    /// Arguments of `block-commit`.
    pub struct BlockCommitArguments {
        /// Name of the job; the device's if absent.
        pub job_id: Option<String>,
        /// The export, or the node where its guest writes.
        pub device: String,
        /// The layer that gets the content; the lowest of the chain if absent.
        pub base_node: Option<String>,
        /// The same, by its file.
        pub base: Option<String>,
        /// The topmost layer that is committed; if absent the active one, and the job has to be
        /// completed.
        pub top_node: Option<String>,
        /// The same, by its file.
        pub top: Option<String>,
        /// How the overlays of the top are to name the base in their headers.
        pub backing_file: Option<String>,
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

pub struct BlockCommit;

impl MainCommand for BlockCommit {
    const NAME: &'static str = "block-commit";
    const DOC: &'static str = "Pushes layers of a disk down into one below them, as a job.";
    type Arguments = BlockCommitArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockCommitArguments) -> QmpResult<Nothing> {
        let disks = daemon.disks();
        let name = Some(arguments.device.as_str());
        let device = disks.find_image(name, name).map_err(|_| {
            QmpError::new(Class::DeviceNotFound, format!("Device '{}' not found", arguments.device))
        })?;
        let exclusive =
            |a: &Option<String>, b: &Option<String>, name: &str| match a.is_some() && b.is_some() {
                true => Err(QmpError::generic(format!(
                    "'{name}-node' and '{name}' are mutually exclusive"
                ))),
                false => Ok(()),
            };
        exclusive(&arguments.base_node, &arguments.base, "base")?;
        exclusive(&arguments.top_node, &arguments.top, "top")?;
        let top = top(daemon, &arguments, &device)?;
        let base = base(daemon, &arguments, &top)?;
        if base.is_same(&top) {
            return Err(QmpError::generic("cannot commit an image into itself"));
        }
        if chain::between(&top, Some(&base)).is_none() {
            return Err(not_in_chain(&base));
        }
        let is_active = top.is_same(&device);
        if is_active && arguments.backing_file.is_some() {
            return Err(QmpError::generic(
                "'backing-file' specified, but 'top' is the active layer",
            ));
        }
        check_filter_name(daemon, arguments.filter_node_name.as_deref(), "")?;
        let mut spec = job_spec(
            daemon,
            JobKind::Commit,
            arguments.job_id,
            &arguments.device,
            arguments.speed,
        )?;
        spec.auto_finalize = arguments.auto_finalize.unwrap_or(spec.auto_finalize);
        spec.auto_dismiss = arguments.auto_dismiss.unwrap_or(spec.auto_dismiss);
        if is_active {
            check_root(daemon, &top)?;
        }
        let request = CommitRequest {
            top,
            base,
            is_active,
            backing_file: arguments.backing_file,
            on_error: arguments.on_error.map_or_else(Default::default, Into::into),
            filter_name: arguments.filter_node_name,
        };
        let jobs = daemon.jobs().clone();
        start(&jobs, &mut daemon.disks_mut().layers, request, spec)?;
        Ok(Nothing {})
    }
}

fn not_in_chain(node: &Node) -> QmpError {
    QmpError::generic(format!("'{}' is not in this backing file chain", node.name()))
}

/// The topmost layer that is committed.
fn top(daemon: &Daemon, arguments: &BlockCommitArguments, device: &Node) -> QmpResult<Node> {
    let disks = daemon.disks();
    if let Some(name) = &arguments.top_node {
        let node = disks.find_image(None, Some(name))?;
        return match chain::between(device, Some(&node)) {
            Some(_) => Ok(node),
            None => Err(not_in_chain(&node)),
        };
    }
    let Some(file) = &arguments.top else { return Ok(device.clone()) };
    let found = disks.layers.find_in_chain(device, Path::new(file));
    found.ok_or_else(|| QmpError::generic(format!("Top image file {file} not found")))
}

/// The layer that gets the content.
fn base(daemon: &Daemon, arguments: &BlockCommitArguments, top: &Node) -> QmpResult<Node> {
    let disks = daemon.disks();
    if let Some(name) = &arguments.base_node {
        return disks.find(None, Some(name));
    }
    if let Some(file) = &arguments.base {
        let below = top.backing();
        let found = below.and_then(|below| disks.layers.find_in_chain(&below, Path::new(file)));
        return found
            .ok_or_else(|| QmpError::generic(format!("Can't find '{file}' in the backing chain")));
    }
    let bottom = std::iter::successors(Some(top.clone()), Node::backing).last();
    Ok(bottom.unwrap_or_else(|| top.clone()))
}

/// The active layer has no layers above it.
fn check_root(daemon: &Daemon, top: &Node) -> QmpResult<()> {
    let graph = daemon.disks().graph();
    let is_overlay = |parent: &Parent| matches!(parent, Parent::Node(node, "backing") if chain::is_used(graph, node));
    match graph.parents(top).iter().any(is_overlay) {
        true => Err(QmpError::generic("Need a root block node")),
        false => Ok(()),
    }
}
