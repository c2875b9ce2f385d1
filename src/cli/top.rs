//! `vublk top`: what each disk of a running process does now.
//!
//! Two looks at the counts, an interval apart, give rates; the difference of two histograms gives
//! the percentiles of that interval. The process pays for a look only when one is taken.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::qmp::connection::Connection;
use crate::cli::qmp::human;
use crate::cli::{DONE, output};
use crate::error::{Error, Result};

/// Watch the disks of a running vublk: rates, latencies, requests in flight, jobs
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// The control socket (`serve --control`)
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    /// Print one interval and end
    #[arg(long)]
    once: bool,
    /// One line of JSON for each interval
    #[arg(long)]
    json: bool,
}

fn parse_interval(text: &str) -> Result<Duration> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    let seconds = seconds.ok_or_else(|| Error::invalid("an interval has 0.1 to 3600 seconds"))?;
    Ok(Duration::from_secs_f64(seconds))
}

/// Shows until interrupted, or once.
pub fn run(args: &TopArgs) -> Result<u8> {
    let mut connection = Connection::open(&args.socket)?;
    let is_screen = !args.once && !args.json && std::io::stdout().is_terminal();
    let mut before = Look::take(&mut connection)?;
    loop {
        std::thread::sleep(args.interval);
        let now = Look::take(&mut connection)?;
        let disks: Vec<_> = now.disks_since(&before).collect();
        let jobs = connection.execute("query-jobs", Value::Null)?;
        let text = if args.json {
            format!("{}\n", json!({"disks": disks, "jobs": jobs}))
        } else {
            page(&disks, &jobs)
        };
        if is_screen {
            // Home, the page with each line's rest wiped, then what is below it.
            let page = text.replace('\n', "\x1b[K\n");
            output::print_or_end(&format!("\x1b[H{page}\x1b[J"))?;
        } else {
            output::print_or_end(&text)?;
        }
        if args.once {
            return Ok(DONE);
        }
        // A line between two looks, for those who read a file.
        if !is_screen && !args.json {
            let _ = writeln!(std::io::stdout());
        }
        before = now;
    }
}

/// The counts of a moment.
struct Look {
    clock_ns: u64,
    exports: BTreeMap<String, Value>,
}

impl Look {
    fn take(connection: &mut Connection) -> Result<Look> {
        let metrics = connection.execute("x-vublk-metrics", Value::Null)?;
        let exports = metrics["exports"].as_array().cloned().unwrap_or_default();
        let named = |export: Value| Some((export["id"].as_str()?.to_string(), export));
        Ok(Look {
            clock_ns: metrics["clock-ns"].as_u64().unwrap_or(0),
            exports: exports.into_iter().filter_map(named).collect(),
        })
    }

    /// What each disk has done since an earlier look.
    fn disks_since<'a>(&'a self, before: &'a Look) -> impl Iterator<Item = Value> + 'a {
        let seconds = self.clock_ns.saturating_sub(before.clock_ns).max(1) as f64 / 1e9;
        self.exports.iter().map(move |(id, now)| {
            // Without an earlier look, what it has done since its start.
            let then = before.exports.get(id).unwrap_or(&Value::Null);
            let count = |name: &str| {
                let of = |look: &Value| look[name].as_u64().unwrap_or(0);
                of(now).saturating_sub(of(then))
            };
            let rate = |name: &str| (count(name) as f64 / seconds * 10.0).round() / 10.0;
            let latency = |name: &str| Latency::between(&then[name], &now[name]).to_value();
            json!({
                "id": id,
                "node-name": now["node-name"],
                "connected": now["connected"],
                "in-flight": now["in-flight"],
                "reads-per-second": rate("reads"),
                "writes-per-second": rate("writes"),
                "flushes-per-second": rate("flushes"),
                "bytes-read-per-second": rate("bytes-read"),
                "bytes-written-per-second": rate("bytes-written"),
                "errors": count("errors"),
                "read-latency": latency("read-latency"),
                "write-latency": latency("write-latency"),
                "flush-latency": latency("flush-latency"),
            })
        })
    }
}

/// Times of an interval: how many requests were below which time.
struct Latency(BTreeMap<u64, u64>);

impl Latency {
    fn between(then: &Value, now: &Value) -> Latency {
        let buckets = |look: &Value| -> Vec<(u64, u64)> {
            let buckets = look["buckets"].as_array().into_iter().flatten();
            buckets.filter_map(|b| Some((b["below-ns"].as_u64()?, b["count"].as_u64()?))).collect()
        };
        let mut times = BTreeMap::from_iter(buckets(now));
        for (below, count) in buckets(then) {
            if let Some(left) = times.get_mut(&below) {
                *left = left.saturating_sub(count);
            }
        }
        Latency(times)
    }

    /// The time that so many of 100 requests did not exceed.
    fn percentile(&self, percent: u64) -> Option<u64> {
        let count: u64 = self.0.values().sum();
        let wanted = (count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        self.0.iter().find_map(|(below, count)| {
            seen += count;
            (seen >= wanted).then_some(*below)
        })
    }

    /// Null where nothing was timed.
    fn to_value(&self) -> Value {
        match (self.percentile(50), self.percentile(99)) {
            (Some(p50), Some(p99)) => json!({"p50-ns": p50, "p99-ns": p99}),
            _ => Value::Null,
        }
    }
}

/// The columns of disks; all but the name are numbers.
const DISK: [&str; 13] = [
    "disk",
    "in flight",
    "read/s",
    "MiB/s",
    "p50",
    "p99",
    "write/s",
    "MiB/s",
    "p50",
    "p99",
    "flush/s",
    "p99",
    "errors",
];

/// All that is shown of an interval.
fn page(disks: &[Value], jobs: &Value) -> String {
    let columns = DISK.map(|title| (title, title != "disk"));
    let mut text = match disks {
        [] => "no disks\n".to_string(),
        disks => human::table(&columns, &disks.iter().map(disk_row).collect::<Vec<_>>()),
    };
    let jobs: Vec<_> = jobs.as_array().into_iter().flatten().map(job_row).collect();
    if !jobs.is_empty() {
        let columns = [("job", false), ("type", false), ("status", false), ("done", true)];
        text += "\n";
        text += &human::table(&columns, &jobs);
    }
    text
}

fn disk_row(disk: &Value) -> Vec<String> {
    let number = |name: &str| disk[name].as_f64().unwrap_or(0.0);
    let rate = |name: &str| format!("{:.0}", number(name));
    let mib = |name: &str| format!("{:.1}", number(name) / f64::from(1 << 20));
    let time = |kind: &str, percentile: &str| match disk[kind][percentile].as_u64() {
        Some(ns) => duration(ns),
        None => "-".to_string(),
    };
    vec![
        human::shown(&disk["id"]),
        disk["in-flight"].to_string(),
        rate("reads-per-second"),
        mib("bytes-read-per-second"),
        time("read-latency", "p50-ns"),
        time("read-latency", "p99-ns"),
        rate("writes-per-second"),
        mib("bytes-written-per-second"),
        time("write-latency", "p50-ns"),
        time("write-latency", "p99-ns"),
        rate("flushes-per-second"),
        time("flush-latency", "p99-ns"),
        disk["errors"].to_string(),
    ]
}

fn job_row(job: &Value) -> Vec<String> {
    let total = job["total-progress"].as_f64().unwrap_or(0.0);
    let current = job["current-progress"].as_f64().unwrap_or(0.0);
    let done = if total > 0.0 { format!("{:.1} %", current * 100.0 / total) } else { "-".into() };
    vec![human::shown(&job["id"]), human::shown(&job["type"]), human::shown(&job["status"]), done]
}

/// A time for people, with two or three digits.
fn duration(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{:.1}us", ns as f64 / 1e3),
        10_000..1_000_000 => format!("{:.0}us", ns as f64 / 1e3),
        1_000_000..10_000_000 => format!("{:.1}ms", ns as f64 / 1e6),
        10_000_000..1_000_000_000 => format!("{:.0}ms", ns as f64 / 1e6),
        _ => format!("{:.1}s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(clock_ns: u64, reads: u64, buckets: Value) -> Look {
        let export = json!({"id": "d", "in-flight": 3, "reads": reads, "bytes-read": reads << 20,
                            "read-latency": {"buckets": buckets}});
        Look { clock_ns, exports: BTreeMap::from([("d".to_string(), export)]) }
    }

    #[test]
    fn rates_and_percentiles_are_those_of_the_interval() {
        let before = look(1_000_000_000, 1000, json!([{"below-ns": 100, "count": 50}]));
        let buckets = json!([{"below-ns": 100, "count": 50}, {"below-ns": 2000, "count": 90},
                             {"below-ns": 5_000_000, "count": 10}]);
        let after = look(3_000_000_000, 1500, buckets);
        let disks: Vec<_> = after.disks_since(&before).collect();
        assert_eq!(disks[0]["reads-per-second"], 250.0);
        assert_eq!(disks[0]["read-latency"], json!({"p50-ns": 2000, "p99-ns": 5_000_000}));
        assert_eq!(disks[0]["write-latency"], Value::Null);
        let page = page(&disks, &json!([]));
        let lines: Vec<_> = page.lines().collect();
        let words: Vec<_> = lines[1].split_whitespace().collect();
        assert_eq!(words[..6], ["d", "3", "250", "250.0", "2.0us", "5.0ms"]);
        assert!(lines.iter().all(|line| line.len() < 100), "{page}");
    }

    #[test]
    fn jobs_are_shown_without_disks() {
        let job = json!({"id": "j", "type": "create", "status": "running",
                         "current-progress": 1, "total-progress": 4});
        let lines: Vec<_> = page(&[], &json!([job])).lines().map(String::from).collect();
        assert_eq!(lines[0], "no disks");
        assert_eq!(
            lines[3].split_whitespace().collect::<Vec<_>>(),
            ["j", "create", "running", "25.0", "%"]
        );
        assert_eq!(page(&[], &json!([])), "no disks\n");
    }

    #[test]
    fn intervals_have_bounds() {
        assert_eq!(parse_interval("0.5").unwrap(), Duration::from_millis(500));
        for text in ["0", "x", "-1", "NaN", "1e9"] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }
}
