//! `vublk log find`: the number of an entry, by a mark, a flush or a FUA write.

use clap::Args;
use serde_json::json;

use crate::cli::log::source::{LogFileArgs, PartArgs};
use crate::cli::options::Output;
use crate::cli::{DONE, output};
use crate::error::{Error, ErrorKind, Result};
use crate::io::block_on;
use crate::write_log::{Entry, Log, Stopped};

/// Find an entry by a mark, a flush or a FUA write; prints ENTRY@SECTOR, where the log goes on
/// behind it (exit code 1 if there is none)
#[derive(Debug, Args)]
pub struct FindArgs {
    #[command(flatten)]
    part: PartArgs,
    /// How to print; JSON has "entry", "next-log-sector" and "stopped-by"
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    log: LogFileArgs,
}

pub fn run(args: &FindArgs) -> Result<u8> {
    let log = args.log.open()?;
    find_and_print(&log, &args.part, args.output)
}

/// The whole command, for an open log.
pub fn find_and_print(log: &Log, part: &PartArgs, how: Output) -> Result<u8> {
    let (entry, why) = block_on(find(log, part))?;
    match how {
        Output::Human => output::print(&format!("{}@{}\n", entry.number, entry.end_sector()))?,
        Output::Json => output::print_json(&json!({
            "entry": entry.number,
            "next-log-sector": entry.end_sector(),
            "stopped-by": why.name(),
        }))?,
    }
    Ok(DONE)
}

async fn find(log: &Log, part: &PartArgs) -> Result<(Entry, Stopped)> {
    let mut walk = log.walk_from(&part.start()).await?;
    let stop = part.stop();
    let mut count = 0;
    while let Some(entry) = walk.next().await? {
        count += 1;
        if let Some(why) = stop.at(&entry, walk.mark(), count) {
            return Ok((entry, why));
        }
    }
    match &stop.end_mark {
        Some(mark) => Err(log.no_mark(mark)),
        None => Err(Error::new(
            ErrorKind::NotFound,
            format!("{}: nothing found from the given start to the end of the log", log.name()),
        )),
    }
}
