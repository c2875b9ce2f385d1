//! What `vublk bench` prints: one table, or one JSON object with the same figures.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::args::{BenchArgs, Mix, Output};
use super::load::{Outcome, Spent};
use super::start::Round;
use crate::error::{Error, Result};
use crate::frontend::Session;
use crate::units::MIB;

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    /// Mean.
    pub mean: f64,
    /// Half are faster.
    pub p50: f64,
    /// 99 % are faster.
    pub p99: f64,
    /// 99.9 % are faster.
    pub p99_9: f64,
    /// The slowest.
    pub max: f64,
}

impl Latency {
    /// Reads the figures off a histogram of nanoseconds.
    fn new(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Latency {
            mean: histogram.mean() / 1e3,
            p50: at(0.5),
            p99: at(0.99),
            p99_9: at(0.999),
            max: histogram.max() as f64 / 1e3,
        }
    }
}

/// What the load achieved.
#[derive(Clone, Debug, Serialize)]
pub struct Load {
    /// Measured time in seconds.
    pub seconds: f64,
    /// Requests completed.
    pub requests: u64,
    /// Requests per second.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_second: f64,
    /// Latencies in microseconds.
    pub latency_us: Latency,
    /// Kicks per request.
    pub kicks_per_request: f64,
    /// Interrupts per request.
    pub interrupts_per_request: f64,
    /// CPU time of this process per request, in microseconds.
    pub own_cpu_us_per_request: f64,
    /// Requests that failed.
    pub errors: u64,
    /// Blocks checked, with --verify.
    pub checked: u64,
    /// Blocks found wrong.
    pub mismatches: u64,
    /// What was wrong, the first few.
    pub described: Vec<String>,
    /// Milliseconds of each outage, with --reconnect.
    pub outages_ms: Vec<f64>,
}

/// What the back-end process spent: under all of the load, or since the last outage.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Backend {
    /// Which process.
    pub pid: u32,
    /// For how long it was watched.
    pub seconds: f64,
    /// CPU time per request, in microseconds.
    pub cpu_us_per_request: f64,
    /// CPUs it kept busy.
    pub cpus: f64,
    /// Context switches per request.
    pub switches_per_request: f64,
    /// Threads at the end.
    pub threads: u64,
    /// Resident memory under load, in bytes.
    pub rss: u64,
    /// The same less shared guest memory.
    pub rss_less_guest: u64,
    /// Private memory under load, in bytes.
    pub private: u64,
}

impl Backend {
    /// The difference of two samples, over the requests in between.
    pub fn new(spent: &Spent) -> Self {
        let Spent { before, after, footprint: memory, .. } = spent;
        let requests = spent.requests.max(1) as f64;
        let cpu = after.cpu.saturating_sub(before.cpu);
        let seconds = spent.elapsed.max(Duration::from_nanos(1)).as_secs_f64();
        Backend {
            pid: spent.pid,
            seconds,
            cpu_us_per_request: cpu.as_secs_f64() * 1e6 / requests,
            cpus: cpu.as_secs_f64() / seconds,
            switches_per_request: after.switches.saturating_sub(before.switches) as f64 / requests,
            threads: after.threads,
            rss: memory.rss,
            rss_less_guest: memory.own(),
            private: memory.private,
        }
    }
}

/// What the idle back-end did.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Idle {
    /// How long it was watched.
    pub seconds: f64,
    /// CPU time in that time, in microseconds.
    pub cpu_us: f64,
    /// Context switches in that time.
    pub switches: u64,
    /// Threads.
    pub threads: u64,
    /// Resident memory in bytes.
    pub rss: u64,
    /// Private memory in bytes.
    pub private: u64,
}

/// Everything that is reported of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Requests sent.
    pub rw: Mix,
    /// Bytes of each.
    pub block_size: u32,
    /// Requests in flight on each queue.
    pub iodepth: u16,
    /// Queues.
    pub queues: u16,
    /// Size of the disk in bytes.
    pub disk: u64,
    /// Feature bits in use.
    pub features: u64,
    /// Process accounted for.
    pub pid: Option<u32>,
    /// Milliseconds from exec to the socket, if it was started here.
    pub start_ms: Option<f64>,
    /// The idle back-end, if it was watched.
    pub idle: Option<Idle>,
    /// The load, if there was one.
    pub load: Option<Load>,
    /// What the back-end spent under load.
    pub backend: Option<Backend>,
}

impl Report {
    /// A report of a run that has only connected so far.
    pub fn new(args: &BenchArgs, session: &Session, pid: Option<u32>) -> Self {
        Report {
            rw: args.rw,
            block_size: args.block_size,
            iodepth: args.iodepth,
            queues: args.queues,
            disk: session.config.bytes(),
            features: session.features(),
            pid,
            start_ms: None,
            idle: None,
            load: None,
            backend: None,
        }
    }

    /// Adds what the load achieved.
    pub fn add_load(&mut self, args: &BenchArgs, outcome: &Outcome) {
        let seconds = outcome.elapsed.max(Duration::from_nanos(1)).as_secs_f64();
        let requests = outcome.requests.max(1) as f64;
        self.load = Some(Load {
            seconds,
            requests: outcome.requests,
            iops: outcome.requests as f64 / seconds,
            mb_per_second: outcome.bytes as f64 / seconds / 1e6,
            latency_us: Latency::new(&outcome.latency),
            kicks_per_request: outcome.kicks as f64 / requests,
            interrupts_per_request: outcome.interrupts as f64 / requests,
            own_cpu_us_per_request: outcome.own_cpu.as_secs_f64() * 1e6 / requests,
            errors: outcome.errors,
            checked: if args.verify { outcome.checked } else { 0 },
            mismatches: outcome.mismatches,
            described: outcome.described.clone(),
            outages_ms: outcome.outages.iter().map(|time| time.as_secs_f64() * 1e3).collect(),
        });
    }

    /// Requests that failed or returned wrong data.
    pub fn failures(&self) -> u64 {
        self.load.as_ref().map_or(0, |load| load.errors + load.mismatches)
    }

    /// The report as one JSON object.
    pub fn json(&self) -> Result<String> {
        to_json(self)
    }

    /// The report as a table.
    pub fn table(&self) -> String {
        let mut rows: Vec<(&str, String)> = Vec::new();
        let name = clap::ValueEnum::to_possible_value(&self.rw);
        rows.push((
            "load",
            format!(
                "{} of {} bytes, depth {}, {} queue{}",
                name.as_ref().map_or("?", |name| name.get_name()),
                self.block_size,
                self.iodepth,
                self.queues,
                if self.queues == 1 { "" } else { "s" }
            ),
        ));
        if let Some(ms) = self.start_ms {
            rows.push(("start", format!("{ms:.2} ms to the socket")));
        }
        if let Some(idle) = self.idle {
            rows.push((
                "idle",
                format!(
                    "{:.0} us CPU and {} switches in {:.1} s, {} threads, RSS {:.2} MiB, \
                     private {:.2} MiB",
                    idle.cpu_us,
                    idle.switches,
                    idle.seconds,
                    idle.threads,
                    mib(idle.rss),
                    mib(idle.private)
                ),
            ));
        }
        if let Some(load) = &self.load {
            rows.push(("requests", format!("{} in {:.2} s", load.requests, load.seconds)));
            rows.push((
                "throughput",
                format!("{:.0} IOPS, {:.1} MB/s", load.iops, load.mb_per_second),
            ));
            let l = load.latency_us;
            rows.push((
                "latency",
                format!(
                    "mean {:.1} us, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
                    l.mean, l.p50, l.p99, l.p99_9, l.max
                ),
            ));
            rows.push((
                "per request",
                format!(
                    "{:.4} kicks, {:.4} interrupts, {:.3} us of our CPU",
                    load.kicks_per_request,
                    load.interrupts_per_request,
                    load.own_cpu_us_per_request
                ),
            ));
            if load.checked > 0 {
                rows.push((
                    "verified",
                    format!("{} blocks, {} wrong", load.checked, load.mismatches),
                ));
            }
            if !load.outages_ms.is_empty() {
                let longest = load.outages_ms.iter().copied().fold(0.0, f64::max);
                let count = load.outages_ms.len();
                rows.push(("reconnects", format!("{count}, the longest took {longest:.1} ms")));
            }
            if load.errors > 0 {
                rows.push(("errors", load.errors.to_string()));
            }
            rows.extend(load.described.iter().map(|text| ("", text.clone())));
        }
        if let Some(backend) = self.backend {
            rows.push((
                "back-end",
                format!(
                    "{:.3} us CPU and {:.4} switches per request, {:.2} CPUs, {} threads{}",
                    backend.cpu_us_per_request,
                    backend.switches_per_request,
                    backend.cpus,
                    backend.threads,
                    match &self.load {
                        Some(load) if !load.outages_ms.is_empty() =>
                            format!(" (the last {:.2} s, process {})", backend.seconds, backend.pid),
                        _ => String::new(),
                    }
                ),
            ));
            rows.push((
                "its memory",
                format!(
                    "RSS {:.2} MiB, less guest memory {:.2} MiB, private {:.2} MiB",
                    mib(backend.rss),
                    mib(backend.rss_less_guest),
                    mib(backend.private)
                ),
            ));
        }
        render(&rows)
    }
}

/// Bytes as mebibytes.
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// Aligns the rows of a table.
fn render(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "{name:width$}  {value}");
        text
    })
}

/// Any report as JSON.
fn to_json(report: &impl Serialize) -> Result<String> {
    serde_json::to_string(report).map_err(|err| Error::invalid(format!("cannot print: {err}")))
}

/// Times of many starts.
#[derive(Debug, Serialize)]
struct Starts {
    /// Number of starts.
    rounds: usize,
    /// Median time from exec to the socket, in milliseconds.
    socket_ms: f64,
    /// Median time from exec to the first completed read, in milliseconds.
    first_read_ms: f64,
    /// All times to the socket.
    all_socket_ms: Vec<f64>,
    /// All times to the first read.
    all_first_read_ms: Vec<f64>,
}

/// The median of some times.
fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Prints what many starts took.
pub fn print_start(args: &BenchArgs, rounds: &[Round]) -> Result<()> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let socket: Vec<f64> = rounds.iter().map(|r| ms(r.socket)).collect();
    let first_read: Vec<f64> = rounds.iter().map(|r| ms(r.first_read)).collect();
    let starts = Starts {
        rounds: rounds.len(),
        socket_ms: median(&socket),
        first_read_ms: median(&first_read),
        all_socket_ms: socket,
        all_first_read_ms: first_read,
    };
    match args.output {
        Output::Json => println!("{}", to_json(&starts)?),
        Output::Human => print!(
            "{}",
            render(&[
                ("starts", starts.rounds.to_string()),
                ("to the socket", format!("{:.2} ms (median)", starts.socket_ms)),
                ("to the first read", format!("{:.2} ms (median)", starts.first_read_ms)),
            ])
        ),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_few() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
    }
}
