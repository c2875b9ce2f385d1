//! `query-blockstats`: what was done on the disks that are served, or on all nodes.

// QEMU has names with underscores, which a doubled one stands for.
#![allow(non_snake_case)]

use std::sync::atomic::Ordering;

use super::prelude::*;
use crate::block::Node;
use crate::device::exports::Served;

qapi! {
    /// Of what.
    pub struct QueryBlockstatsArguments {
        /// Of all nodes, instead of what is served.
        pub query_nodes: Option<bool>,
    }
}
qapi! {
    /// Counts since the export started, or the node was added.
    pub struct BlockDeviceStats {
        /// Bytes read.
        pub rd__bytes: u64,
        /// Bytes written.
        pub wr__bytes: u64,
        /// Reads.
        pub rd__operations: u64,
        /// Writes.
        pub wr__operations: u64,
        /// Flushes.
        pub flush__operations: u64,
        /// Requests that ended with an error.
        pub x_vublk_errors: u64,
        /// All requests; of an export only.
        pub x_vublk_requests: Option<u64>,
        /// Kicks that woke a worker; of an export only.
        pub x_vublk_kicks: Option<u64>,
        /// Interrupts sent to the guest; of an export only.
        pub x_vublk_interrupts: Option<u64>,
    }
}
qapi! {
    /// Of an export or a node.
    pub struct BlockStats {
        /// The export's name.
        pub device: Option<String>,
        /// The node it stands on.
        pub node_name: Option<String>,
        /// The counts.
        pub stats: BlockDeviceStats,
    }
}

pub struct QueryBlockstats;

impl MainCommand for QueryBlockstats {
    const NAME: &'static str = "query-blockstats";
    const DOC: &'static str = "Tells what was done on each disk.";
    type Arguments = QueryBlockstatsArguments;
    type Returns = Vec<BlockStats>;

    fn run(daemon: &mut Daemon, arguments: QueryBlockstatsArguments) -> QmpResult<Vec<BlockStats>> {
        let disks = daemon.disks();
        if arguments.query_nodes == Some(true) {
            return Ok(disks.graph().nodes().iter().map(of_node).collect());
        }
        Ok(disks.exports.iter().map(of_export).collect())
    }
}

fn of_export(served: &Served) -> BlockStats {
    let totals = served.export().totals();
    let get = |name: &str| totals.iter().find(|(n, _)| *n == name).map_or(0, |(_, count)| *count);
    BlockStats {
        device: Some(served.id().to_string()),
        node_name: Some(served.root().node().name().to_string()),
        stats: BlockDeviceStats {
            rd__bytes: get("bytes_read"),
            wr__bytes: get("bytes_written"),
            rd__operations: get("reads"),
            wr__operations: get("writes"),
            flush__operations: get("flushes"),
            x_vublk_errors: get("errors"),
            x_vublk_requests: Some(get("requests")),
            x_vublk_kicks: Some(get("kicks")),
            x_vublk_interrupts: Some(get("interrupts")),
        },
    }
}

/// Requests on the planned path do not pass the node and are counted by their export.
fn of_node(node: &Node) -> BlockStats {
    let counters = node.counters();
    BlockStats {
        device: None,
        node_name: Some(node.name().to_string()),
        stats: BlockDeviceStats {
            rd__bytes: counters.bytes_read.load(Ordering::Relaxed),
            wr__bytes: counters.bytes_written.load(Ordering::Relaxed),
            rd__operations: counters.reads.load(Ordering::Relaxed),
            wr__operations: counters.writes.load(Ordering::Relaxed),
            flush__operations: counters.flushes.load(Ordering::Relaxed),
            x_vublk_errors: counters.errors.load(Ordering::Relaxed),
            x_vublk_requests: None,
            x_vublk_kicks: None,
            x_vublk_interrupts: None,
        },
    }
}
