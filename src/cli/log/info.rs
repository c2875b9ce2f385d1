//! `vublk log info`: what a log holds, in numbers.

use clap::Args;
use serde_json::json;

use crate::cli::log::source::LogFileArgs;
use crate::cli::options::Output;
use crate::cli::size::human_size;
use crate::cli::{DONE, output};
use crate::error::Result;
use crate::io::block_on;
use crate::write_log::{Flags, Kind, Log};

/// Show what a log holds, in numbers; every entry is checked on the way
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    log: LogFileArgs,
}

/// Counts over all entries.
#[derive(Debug, Default)]
struct Totals {
    writes: u64,
    written_bytes: u64,
    discards: u64,
    discarded_bytes: u64,
    /// Entries with the flag; some carry data, too.
    flushes: u64,
    fua: u64,
    marks: u64,
    /// One past the last byte of the disk that is touched.
    disk_bytes: u64,
    /// Log bytes up to the end of the last entry.
    used_bytes: u64,
}

pub fn run(args: &InfoArgs) -> Result<u8> {
    let log = args.log.open()?;
    let totals = block_on(count(&log))?;
    match args.output {
        Output::Human => output::print(&human(&log, &totals))?,
        Output::Json => output::print_json(&json!({
            "filename": log.name(),
            "version": 1,
            "sector-size": log.sector_size(),
            "entries": log.entries(),
            "file-bytes": log.file_len(),
            "used-bytes": totals.used_bytes,
            "writes": totals.writes,
            "written-bytes": totals.written_bytes,
            "discards": totals.discards,
            "discarded-bytes": totals.discarded_bytes,
            "flushes": totals.flushes,
            "fua": totals.fua,
            "marks": totals.marks,
            "disk-bytes": totals.disk_bytes,
        }))?,
    }
    Ok(DONE)
}

async fn count(log: &Log) -> Result<Totals> {
    let mut totals = Totals { used_bytes: log.sector_size(), ..Totals::default() };
    let mut walk = log.walk();
    while let Some(entry) = walk.next().await? {
        match entry.kind() {
            Kind::Write => {
                totals.writes += 1;
                totals.written_bytes = totals.written_bytes.saturating_add(entry.target.len);
            }
            Kind::Discard => {
                totals.discards += 1;
                totals.discarded_bytes = totals.discarded_bytes.saturating_add(entry.target.len);
            }
            Kind::Mark => totals.marks += 1,
            Kind::Flush => {}
        }
        totals.flushes += u64::from(entry.is_flush());
        totals.fua += u64::from(entry.flags.has(Flags::FUA));
        if !entry.target.is_empty() {
            totals.disk_bytes = totals.disk_bytes.max(entry.target.end());
        }
        totals.used_bytes = entry.end_position();
    }
    Ok(totals)
}

fn human(log: &Log, totals: &Totals) -> String {
    let size = |bytes: u64| format!("{} ({bytes} bytes)", human_size(bytes));
    [
        format!("log: {}", log.name()),
        "format: dm-log-writes version 1".into(),
        format!("sector size: {} bytes", log.sector_size()),
        format!("entries: {}", log.entries()),
        format!("    writes: {}, {}", totals.writes, size(totals.written_bytes)),
        format!("    discards: {}, {}", totals.discards, size(totals.discarded_bytes)),
        format!("    flushes: {}", totals.flushes),
        format!("    FUA: {}", totals.fua),
        format!("    marks: {}", totals.marks),
        format!("log size: {} of {}", size(totals.used_bytes), size(log.file_len())),
        format!("disk: at least {}", size(totals.disk_bytes)),
    ]
    .join("\n")
        + "\n"
}
