//! `query-blockstats`: what was done on the disks that are served, or on all nodes.

// QEMU has names with underscores, which a doubled one stands for.
#![allow(non_snake_case)]

use std::sync::atomic::Ordering;

use super::prelude::*;
use crate::block::Node;
use crate::device::exports::Served;
use crate::device::latency::Times;

qapi! {
    /// Of what.
    pub struct QueryBlockstatsArguments {
        /// Of all nodes, instead of what is served.
        pub query_nodes: Option<bool>,
    }
}
qapi! {
    /// Latencies within an interval. There are none, as nobody can ask for intervals.
    pub struct BlockDeviceTimedStats {
        /// The interval's length in seconds.
        pub interval_length: u64,
    }
}
qapi! {
    /// Counts since the export started, or the node was added. Of a node, requests that need no task are
    /// not counted, and failures in one sum.
    #[derive(Default)]
    pub struct BlockDeviceStats {
        /// Bytes read.
        pub rd__bytes: u64,
        /// Bytes written.
        pub wr__bytes: u64,
        /// There are no zones: 0, as all that is said of them.
        pub zone__append__bytes: u64,
        /// Bytes discarded.
        pub unmap__bytes: u64,
        /// Reads that succeeded.
        pub rd__operations: u64,
        /// Writes that succeeded.
        pub wr__operations: u64,
        /// 0.
        pub zone__append__operations: u64,
        /// Flushes that succeeded.
        pub flush__operations: u64,
        /// Discards that succeeded.
        pub unmap__operations: u64,
        /// How long reads took, in nanoseconds: as long as the timed ones in the mean (one request in 16).
        pub rd__total__time__ns: u64,
        /// The same of writes.
        pub wr__total__time__ns: u64,
        /// 0.
        pub zone__append__total__time__ns: u64,
        /// The same of flushes.
        pub flush__total__time__ns: u64,
        /// Discards are not timed: 0.
        pub unmap__total__time__ns: u64,
        /// Where the write ended that reached farthest is not recorded: 0.
        pub wr__highest__offset: u64,
        /// What is written in one call is counted request by request: 0.
        pub rd__merged: u64,
        /// 0.
        pub wr__merged: u64,
        /// 0.
        pub zone__append__merged: u64,
        /// 0.
        pub unmap__merged: u64,
        /// Reads that failed.
        pub failed__rd__operations: u64,
        /// Writes that failed.
        pub failed__wr__operations: u64,
        /// 0.
        pub failed__zone__append__operations: u64,
        /// Flushes that failed.
        pub failed__flush__operations: u64,
        /// Discards that failed.
        pub failed__unmap__operations: u64,
        /// Invalid requests are among those that failed: 0.
        pub invalid__rd__operations: u64,
        /// 0.
        pub invalid__wr__operations: u64,
        /// 0.
        pub invalid__zone__append__operations: u64,
        /// 0.
        pub invalid__flush__operations: u64,
        /// 0.
        pub invalid__unmap__operations: u64,
        /// Whether invalid requests count for times: of an export they do.
        pub account__invalid: bool,
        /// Whether failed requests count for times: of an export they do.
        pub account__failed: bool,
        /// Empty.
        pub timed__stats: Vec<BlockDeviceTimedStats>,
        /// Requests that ended with an error, of all kinds.
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
    let [reads, writes, flushes] = served.export().times();
    BlockStats {
        device: Some(served.id().to_string()),
        node_name: Some(served.root().node().name().to_string()),
        stats: BlockDeviceStats {
            rd__bytes: totals.bytes_read,
            wr__bytes: totals.bytes_written,
            unmap__bytes: totals.bytes_discarded,
            rd__operations: totals.reads.saturating_sub(totals.failed_reads),
            wr__operations: totals.writes.saturating_sub(totals.failed_writes),
            flush__operations: totals.flushes.saturating_sub(totals.failed_flushes),
            unmap__operations: totals.discards.saturating_sub(totals.failed_discards),
            rd__total__time__ns: total_time(totals.reads, &reads),
            wr__total__time__ns: total_time(totals.writes, &writes),
            flush__total__time__ns: total_time(totals.flushes, &flushes),
            failed__rd__operations: totals.failed_reads,
            failed__wr__operations: totals.failed_writes,
            failed__flush__operations: totals.failed_flushes,
            failed__unmap__operations: totals.failed_discards,
            account__invalid: true,
            account__failed: true,
            x_vublk_errors: totals.errors,
            x_vublk_requests: Some(totals.requests),
            x_vublk_kicks: Some(totals.kicks),
            x_vublk_interrupts: Some(totals.interrupts),
            ..BlockDeviceStats::default()
        },
    }
}

/// The time of `count` requests, of which some were timed.
fn total_time(count: u64, timed: &Times) -> u64 {
    let mean = timed.total().as_nanos().checked_div(u128::from(timed.count()));
    let total = mean.unwrap_or(0).saturating_mul(u128::from(count));
    i64::try_from(total).unwrap_or(i64::MAX) as u64
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
            ..BlockDeviceStats::default()
        },
    }
}
