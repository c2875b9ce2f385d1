//! `x-vublk-fault-set`, `-clear` and `x-vublk-query-faults`: a disk that misbehaves while its guest
//! runs.

use std::sync::Arc;

use super::prelude::*;
use crate::block::Root;
use crate::control::faults::{self, FaultOptions, Faulty};
use crate::control::qapi::Flat;
use crate::io::block_on;

qapi! {
    /// Which disk, and its faults.
    pub struct FaultSet {
        /// The export, or the node: a fault filter, or what one is to be put before.
        pub device: String,
        /// All its faults; those that it had are gone.
        pub faults: Flat<FaultOptions>,
    }
}
qapi! {
    /// Which disk.
    pub struct FaultClear {
        /// The export, or the node.
        pub device: String,
    }
}
qapi! {
    /// What a fault filter has done.
    pub struct FaultInfo {
        /// Its node.
        pub node_name: String,
        /// The node below.
        pub file: String,
        /// Requests that failed.
        pub errors: u64,
        /// Requests that had to wait.
        pub delays: u64,
        /// Flushes, and writes that were to be durable, that were not.
        pub flush_lies: u64,
        /// Writes of which a part reached the disk at once.
        pub tears: u64,
        /// Bytes that a kill would lose now.
        pub bytes_at_risk: u64,
        /// Whether writes are refused because of an earlier failure.
        pub poisoned: bool,
    }
}

pub struct XVublkFaultSet;

impl MainCommand for XVublkFaultSet {
    const NAME: &'static str = "x-vublk-fault-set";
    const DOC: &'static str =
        "Makes a disk misbehave: errors, delays, flushes that lie, lost writes.";
    type Arguments = FaultSet;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: FaultSet) -> QmpResult<Nothing> {
        let settings = arguments.faults.read()?;
        let disks = daemon.disks_mut();
        let graph = Arc::clone(disks.graph());
        let node = disks.find_any(&arguments.device)?;
        if let Some(faulty) = disks.faults.of(&node) {
            faults::change(&graph, &faulty, settings)?;
            return Ok(Nothing {});
        }
        let roots: Vec<Root> = (disks.exports.iter().map(|served| served.root().clone()))
            .filter(|root| root.node().is_same(&node))
            .collect();
        if roots.is_empty() {
            return Err(QmpError::generic(format!(
                "node '{}' is not served, so there is nobody to misbehave to; add a node before it \
                 (blockdev-add driver=fault) and serve that",
                node.name()
            )));
        }
        let filter = disks.faults.make(None, &node, settings);
        disks.layers.add_filter(filter.clone(), false)?;
        let moved = faults::move_roots(&graph, &roots, &node, &filter);
        // It goes if nobody uses it.
        disks.collect();
        moved?;
        tracing::warn!("faults are injected before node '{}'", node.name());
        Ok(Nothing {})
    }
}

pub struct XVublkFaultClear;

impl MainCommand for XVublkFaultClear {
    const NAME: &'static str = "x-vublk-fault-clear";
    const DOC: &'static str = "Ends the faults of a disk, and what its failed flushes have led to.";
    type Arguments = FaultClear;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: FaultClear) -> QmpResult<Nothing> {
        let disks = daemon.disks_mut();
        let graph = Arc::clone(disks.graph());
        let node = disks.find_any(&arguments.device)?;
        // The node below a filter means that filter, too.
        let is_meant = |faulty: &&Faulty| {
            faulty.node.is_same(&node)
                || (!graph.is_explicit(&faulty.node) && faulty.filter.below().is_same(&node))
        };
        let Some(faulty) = disks.faults.all().iter().find(is_meant).cloned() else {
            return Err(QmpError::generic(format!(
                "node '{}' has no faults (x-vublk-fault-set gives it some)",
                node.name()
            )));
        };
        faults::change(&graph, &faulty, crate::filters::fault::Settings::default())?;
        if graph.is_explicit(&faulty.node) {
            return Ok(Nothing {});
        }
        let below = faulty.filter.below();
        let roots: Vec<Root> =
            (graph.roots().into_iter()).filter(|root| root.node().is_same(&faulty.node)).collect();
        let moved = faults::move_roots(&graph, &roots, &faulty.node, &below);
        disks.collect();
        moved?;
        // Lies are made good.
        if !below.limits().read_only {
            block_on(below.flush())?;
        }
        tracing::info!("no faults are injected any more before node '{}'", below.name());
        Ok(Nothing {})
    }
}

pub struct QueryFaults;

impl MainCommand for QueryFaults {
    const NAME: &'static str = "x-vublk-query-faults";
    const DOC: &'static str = "Tells what fault filters have done.";
    type Arguments = Nothing;
    type Returns = Vec<FaultInfo>;

    fn run(daemon: &mut Daemon, _: Nothing) -> QmpResult<Vec<FaultInfo>> {
        let row = |faulty: &Faulty| {
            let done = faulty.filter.injected();
            FaultInfo {
                node_name: faulty.node.name().to_string(),
                file: faulty.filter.below().name().to_string(),
                errors: done.errors,
                delays: done.delays,
                flush_lies: done.lies,
                tears: done.tears,
                bytes_at_risk: faulty.filter.at_risk(),
                poisoned: faulty.node.is_poisoned(),
            }
        };
        Ok(daemon.disks().faults.all().iter().map(row).collect())
    }
}
