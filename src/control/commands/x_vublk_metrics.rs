//! `x-vublk-metrics`: what a live view needs of each disk that is served.

use super::prelude::*;
use crate::device::exports::Served;
use crate::device::latency::Times;

qapi! {
    /// How many timed requests took less than this, and not less than the bucket before says.
    pub struct LatencyBucket {
        /// The end of the bucket, in nanoseconds.
        pub below_ns: u64,
        /// How many.
        pub count: u64,
    }
}
qapi! {
    /// Times of the requests of one kind. One in sixteen is timed.
    pub struct LatencyInfo {
        /// How many requests were timed.
        pub count: u64,
        /// Their times together, in nanoseconds.
        pub total_ns: u64,
        /// What half of them did not exceed, in nanoseconds.
        pub p50_ns: u64,
        /// What 99 % of them did not exceed, in nanoseconds.
        pub p99_ns: u64,
        /// All of them; buckets without any are left out.
        pub buckets: Vec<LatencyBucket>,
    }
}
qapi! {
    /// Of an export. All counts are since its start.
    pub struct ExportMetrics {
        /// The export's name.
        pub id: String,
        /// The node it stands on.
        pub node_name: String,
        /// Whether a front-end is connected.
        pub connected: bool,
        /// Requests in flight now.
        pub in_flight: u64,
        /// Requests completed.
        pub requests: u64,
        /// Of these, reads.
        pub reads: u64,
        /// Of these, writes.
        pub writes: u64,
        /// Of these, flushes.
        pub flushes: u64,
        /// Bytes read.
        pub bytes_read: u64,
        /// Bytes written.
        pub bytes_written: u64,
        /// Requests that ended with an error.
        pub errors: u64,
        /// Kicks that woke a worker.
        pub kicks: u64,
        /// Interrupts sent to the guest.
        pub interrupts: u64,
        /// Times a worker entered the kernel.
        pub enters: u64,
        /// How long reads take.
        pub read_latency: LatencyInfo,
        /// How long writes take.
        pub write_latency: LatencyInfo,
        /// How long flushes take.
        pub flush_latency: LatencyInfo,
    }
}
qapi! {
    /// Answer of `x-vublk-metrics`.
    pub struct Metrics {
        /// A clock that never goes back, in nanoseconds; for rates.
        pub clock_ns: u64,
        /// Each export.
        pub exports: Vec<ExportMetrics>,
    }
}

pub struct QueryMetrics;

impl MainCommand for QueryMetrics {
    const NAME: &'static str = "x-vublk-metrics";
    const DOC: &'static str = "Tells rates, latencies and requests in flight of each export.";
    type Arguments = Nothing;
    type Returns = Metrics;

    fn run(daemon: &mut Daemon, _: Nothing) -> QmpResult<Metrics> {
        let exports = daemon.disks().exports.iter().map(of_export).collect();
        let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let clock_ns = clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64;
        Ok(Metrics { clock_ns, exports })
    }
}

fn of_export(served: &Served) -> ExportMetrics {
    let totals = served.export().totals();
    let [reads, writes, flushes] = served.export().times();
    ExportMetrics {
        id: served.id().to_string(),
        node_name: served.root().node().name().to_string(),
        connected: served.is_connected(),
        in_flight: served.export().in_flight(),
        requests: totals.requests,
        reads: totals.reads,
        writes: totals.writes,
        flushes: totals.flushes,
        bytes_read: totals.bytes_read,
        bytes_written: totals.bytes_written,
        errors: totals.errors,
        kicks: totals.kicks,
        interrupts: totals.interrupts,
        enters: totals.enters,
        read_latency: latency(&reads),
        write_latency: latency(&writes),
        flush_latency: latency(&flushes),
    }
}

fn latency(times: &Times) -> LatencyInfo {
    let ns = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let bucket = |(end, count)| LatencyBucket { below_ns: ns(end), count };
    LatencyInfo {
        count: times.count(),
        total_ns: ns(times.total()),
        p50_ns: ns(times.permille(500)),
        p99_ns: ns(times.permille(990)),
        buckets: times.buckets().map(bucket).collect(),
    }
}
