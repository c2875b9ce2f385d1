//! The options of `serve` that record the guest's writes, named as those of QEMU's `blklogwrites`,
//! and that make the disk misbehave.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::control::faults::FaultOptions;
use crate::control::keyval;
use crate::error::{Error, Result};
use crate::filters::fault;
use crate::filters::write_log::open::DEFAULT_INTERVAL;
use crate::filters::write_log::{Existing, Order, Settings};
use crate::images::OpenRequest;
use crate::images::recording::{RecordOptions, RecordRequest};
use crate::units::parse_size;

/// Where flushes stand in a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogOrder {
    /// Before every write that had not completed when the flush was submitted
    #[default]
    Strict,
    /// Before every write that had not completed when the flush had ended, as in QEMU
    Completion,
}

/// What sizes there are is for the log to say.
fn parse_sector_size(text: &str) -> std::result::Result<u32, String> {
    let size = parse_size(text).map_err(|err| err.to_string())?;
    u32::try_from(size).map_err(|_| "a power of two from 512 to 64K is expected".into())
}

/// Recording.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Recording of writes, and faults")]
pub struct RecordingArgs {
    /// Record every write, discard and flush in this file or block device (dm-log-writes format;
    /// see `vublk log`). A log of this image is continued, any other is refused
    #[arg(long, value_name = "LOG", conflicts_with_all = ["blockdevs", "exports"])]
    pub log_writes: Option<PathBuf>,
    /// Size of the log's sectors; the guest's blocks must not be smaller. A power of two from 512
    /// to 64K, 512 if not given
    #[arg(long, value_name = "SIZE", requires = "log_writes", conflicts_with = "log_append",
          value_parser = parse_sector_size)]
    log_sector_size: Option<u32>,
    /// Add to the log whatever image it was of
    #[arg(long, requires = "log_writes", conflicts_with = "log_overwrite")]
    log_append: bool,
    /// Start the log anew; the file's space is used again
    #[arg(long, requires = "log_writes")]
    log_overwrite: bool,
    /// Count entries in the log's superblock at least every N of them, not only when the guest
    /// flushes
    #[arg(long, value_name = "N", requires = "log_writes", default_value_t = DEFAULT_INTERVAL,
          value_parser = clap::value_parser!(u64).range(1..))]
    log_super_update_interval: u64,
    /// Where flushes stand among the writes in flight
    #[arg(long, value_enum, value_name = "ORDER", requires = "log_writes", default_value_t)]
    log_order: LogOrder,
    /// The log's sidecar, which tells vublk which image it is of and how far it is whole;
    /// LOG.sidecar if not given
    #[arg(long, value_name = "FILE", requires = "log_writes")]
    log_sidecar: Option<PathBuf>,
    /// Make the disk misbehave, as the driver `fault` of --blockdev does: inject-error.0.iotype=…,
    /// inject-delay.0.delay-us=…, flush-lies-one-in=N, volatile-cache.tear-one-in=N, seed=N. The
    /// log, if there is one, does not hear of flushes that lie
    #[arg(long, value_name = "OPTIONS", conflicts_with_all = ["blockdevs", "exports"])]
    fault: Option<String>,
}

impl RecordingArgs {
    /// How the disk misbehaves, if it does.
    ///
    /// # Errors
    /// Names the option.
    pub fn fault(&self) -> Result<Option<fault::Settings>> {
        let Some(text) = &self.fault else { return Ok(None) };
        let settings = keyval::parse::<FaultOptions>(text, None).and_then(|faults| faults.read());
        let named = |err| Error::from(err).context(format!("--fault {text}"));
        settings.map(Some).map_err(named)
    }

    /// What is asked for, if anything is: of an image that is opened as `image` says, for a guest with
    /// blocks of `block_size` bytes.
    pub fn request(&self, image: &OpenRequest, block_size: u64) -> Option<RecordRequest> {
        let log = self.log_writes.clone()?;
        let existing = match (self.log_append, self.log_overwrite) {
            (true, _) => Existing::Append,
            (_, true) => Existing::Overwrite,
            _ => Existing::Continue,
        };
        let settings = Settings {
            sector_size: self.log_sector_size,
            existing,
            interval: self.log_super_update_interval,
            order: match self.log_order {
                LogOrder::Strict => Order::Strict,
                LogOrder::Completion => Order::Completion,
            },
        };
        let options = RecordOptions {
            sidecar: self.log_sidecar.clone(),
            locking: image.locking,
            state_dir: image.state_dir.clone(),
            block_size: Some(block_size),
            settings,
        };
        Some(RecordRequest { log, cache: image.cache, lock_wait: image.lock_wait, options })
    }
}
