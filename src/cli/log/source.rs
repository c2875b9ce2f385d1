//! Options that all commands on logs share: which log, and which part of it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::error::Result;
use crate::io::{HostFile, OpenOptions, block_on};
use crate::write_log::{Log, Start, Stop};

/// Which log.
#[derive(Clone, Debug, Args)]
#[group(id = "which_log", required = true, multiple = false)]
pub struct LogFileArgs {
    /// The log, as replay-log has the option
    #[arg(long = "log", value_name = "LOG")]
    option: Option<PathBuf>,
    /// The log: a file or a block device
    #[arg(value_name = "LOG")]
    file: Option<PathBuf>,
}

impl LogFileArgs {
    /// Opens it. Nothing is locked: what the superblock counts does not change any more, even while
    /// a guest's writes are still being added.
    pub fn open(&self) -> Result<Log> {
        let path = self.option.as_ref().or(self.file.as_ref()).expect("clap demands one");
        let file = HostFile::open(path, OpenOptions::default())?;
        block_on(Log::open(Arc::new(file)))
    }
}

/// Which part.
#[derive(Clone, Debug, Args)]
pub struct PartArgs {
    /// Begin with entry N; they count from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    start_entry: u64,
    /// Begin just after the first mark TEXT; wins over --start-entry
    #[arg(long, value_name = "TEXT")]
    start_mark: Option<String>,
    /// Stop after the first mark TEXT
    #[arg(long, value_name = "TEXT")]
    end_mark: Option<String>,
    /// Stop after the first flush (as in replay-log not looked at with --end-mark)
    #[arg(long)]
    next_flush: bool,
    /// Stop after the first FUA write (as in replay-log not looked at with --end-mark)
    #[arg(long)]
    next_fua: bool,
    /// Stop after N entries; 0 is no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: u64,
}

impl PartArgs {
    /// Where it begins.
    pub fn start(&self) -> Start {
        match &self.start_mark {
            Some(mark) => Start::AfterMark(mark.clone()),
            None => Start::Entry(self.start_entry),
        }
    }

    /// Where it ends.
    pub fn stop(&self) -> Stop {
        Stop {
            limit: self.limit,
            end_mark: self.end_mark.clone(),
            next_flush: self.next_flush,
            next_fua: self.next_fua,
        }
    }
}
