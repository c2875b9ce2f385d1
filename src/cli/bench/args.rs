//! The options of `vublk bench`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::frontend::{Pages, Personality};
use crate::units::SECTOR_SIZE;

/// Which requests to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mix {
    /// Random reads.
    #[default]
    Randread,
    /// Random writes.
    Randwrite,
    /// Random reads and writes, see `--read-percent`.
    Randrw,
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Requests for the serial number: the transport alone, no storage.
    GetId,
}

/// Whose protocol sequences to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontEnd {
    /// QEMU.
    #[default]
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker (one queue, no indirect descriptors).
    Firecracker,
}

impl From<FrontEnd> for Personality {
    fn from(front_end: FrontEnd) -> Self {
        match front_end {
            FrontEnd::Qemu => Personality::Qemu,
            FrontEnd::CloudHypervisor => Personality::CloudHypervisor,
            FrontEnd::Firecracker => Personality::Firecracker,
        }
    }
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table.
    #[default]
    Human,
    /// One JSON object.
    Json,
}

/// Load generator for any vhost-user-blk back-end.
///
/// Plays a virtual machine's part on the back-end's socket, sends requests, and reports IOPS,
/// latency and what the back-end process spent on each. Writing modes destroy what is on the disk.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Socket of the back-end
    #[arg(long, value_name = "PATH", required_unless_present = "machine")]
    pub socket_path: Option<PathBuf>,

    /// Measure no back-end, but what this machine takes for a system call and for waking a thread
    #[arg(long, conflicts_with_all = ["socket_path", "start"])]
    pub machine: bool,

    /// Requests to send
    #[arg(long, value_enum, default_value_t, value_name = "MIX")]
    pub rw: Mix,

    /// Share of reads in randrw, in percent
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub read_percent: u8,

    /// Send a flush after each N writes of a queue (0: never)
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub flush_every: u32,

    /// Bytes of each request
    #[arg(long, default_value = "4k", value_name = "SIZE", value_parser = parse_size_u32)]
    pub block_size: u32,

    /// Distance of the blocks of that size that are touched, from start to start (default: they
    /// lie side by side)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub stride: Option<u64>,

    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub iodepth: u16,

    /// Queues, each with a thread of its own
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Descriptors of each queue
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub queue_size: u16,

    /// First byte of the disk to touch
    #[arg(long, default_value = "0", value_name = "SIZE", value_parser = parse_size)]
    pub offset: u64,

    /// How many bytes from there to touch (default: up to the end)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub range: Option<u64>,

    /// Seconds to measure (0: connect and report only)
    #[arg(long, default_value = "5", value_name = "SECONDS", value_parser = parse_seconds)]
    pub duration: Duration,

    /// Measure this many requests in all, instead of a duration
    #[arg(long, value_name = "N")]
    pub requests: Option<u64>,

    /// With sequential requests: touch each block of the range once and measure that, from the first
    /// request on (no ramp, whatever the duration)
    #[arg(long, conflicts_with = "requests")]
    pub once: bool,

    /// Seconds of load before measuring
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = parse_seconds)]
    pub ramp: Duration,

    /// Most completions handled before their slots are submitted again
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub batch: u16,

    /// CPUs to pin the queues' threads to, in turn: 0,1
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub cpu: Vec<usize>,

    /// Put guest memory into huge pages
    #[arg(long)]
    pub huge_pages: bool,

    /// Most bytes of one data descriptor
    #[arg(long, default_value = "4g", value_name = "SIZE", value_parser = parse_size_u32)]
    pub segment: u32,

    /// Do without indirect descriptor tables
    #[arg(long)]
    pub no_indirect: bool,

    /// Do without EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,

    /// Whose protocol sequences to use
    #[arg(long, value_enum, default_value_t, value_name = "VMM")]
    pub personality: FrontEnd,

    /// Write blocks that name their place and generation, check each read, and read everything
    /// back at the end
    #[arg(long)]
    pub verify: bool,

    /// When the back-end goes away under load, wait so many seconds for the next one on the same
    /// socket and carry on with the requests in flight (needs in-flight tracking, or depth 1)
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub reconnect: Option<Duration>,

    /// Seed of the random sequence
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,

    /// Process to account for (default: the one that listens on the socket)
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,

    /// Before the load, watch the idle back-end for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub idle: Option<Duration>,

    /// Start the back-end by this command (split at blanks, quotes understood), stop it at the end
    #[arg(long, value_name = "COMMAND")]
    pub start: Option<String>,

    /// With --start: start and stop it N times and report only the time to the socket and to the
    /// first completed read
    #[arg(long, default_value_t = 0, value_name = "N", requires = "start")]
    pub start_rounds: u32,

    /// Seconds to wait for the back-end, and for any request
    #[arg(long, default_value = "10", value_name = "SECONDS", value_parser = parse_seconds)]
    pub timeout: Duration,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    pub output: Output,
}

impl BenchArgs {
    /// Socket of the back-end.
    pub fn socket(&self) -> &Path {
        self.socket_path.as_deref().expect("the command line demands it")
    }

    /// Whether anything is written.
    pub fn writes(&self) -> bool {
        match self.rw {
            Mix::Randwrite | Mix::Write => true,
            Mix::Randrw => self.read_percent < 100,
            Mix::Randread | Mix::Read | Mix::GetId => false,
        }
    }

    /// Whether blocks are touched in order.
    pub fn is_sequential(&self) -> bool {
        matches!(self.rw, Mix::Read | Mix::Write)
    }

    /// Distance of blocks.
    pub fn stride(&self) -> u64 {
        self.stride.unwrap_or(u64::from(self.block_size))
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> Pages {
        if self.huge_pages { Pages::Huge } else { Pages::Small }
    }

    /// Refuses what makes no sense together.
    pub fn check(&self) -> Result<()> {
        let block = u64::from(self.block_size);
        if block == 0 || !block.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::invalid(format!("--block-size {block} is no multiple of 512")));
        }
        if !self.offset.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::invalid(format!("--offset {} is no multiple of 512", self.offset)));
        }
        if !self.queue_size.is_power_of_two() {
            return Err(Error::invalid(format!(
                "--queue-size {} is not a power of two",
                self.queue_size
            )));
        }
        let stride = self.stride();
        if stride < block || !stride.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::invalid(format!(
                "--stride {stride} is less than a block or no multiple of 512"
            )));
        }
        if self.once && !self.is_sequential() {
            return Err(Error::invalid("--once needs a sequential mix, read or write"));
        }
        if self.verify && !self.writes() {
            return Err(Error::invalid("--verify checks what it wrote: it needs a writing mix"));
        }
        if self.timeout.is_zero() {
            return Err(Error::invalid("--timeout must be more than 0"));
        }
        Ok(())
    }
}

/// A size with an optional suffix of 1024s.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().trim_end_matches("ib") {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err("a size is a number with k, m, g or t behind it".into()),
    };
    let number: u64 = digits.parse().map_err(|_| "a size begins with a number".to_string())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size is too large".into())
}

/// A size of at most 32 bits; larger ones are capped.
fn parse_size_u32(text: &str) -> Result<u32, String> {
    Ok(u32::try_from(parse_size(text)?).unwrap_or(u32::MAX))
}

/// A time in seconds, fractions allowed.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a time is a number of seconds".to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|err| err.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            args: BenchArgs,
        }
        let check = |line: &str| {
            let words = ["bench", "--socket-path", "none"].into_iter().chain(line.split(' '));
            <Command as clap::Parser>::parse_from(words).args.check().map_err(|err| err.to_string())
        };
        assert_eq!(check("--rw write --stride 32m --once"), Ok(()));
        assert!(check("--rw randwrite --once").unwrap_err().contains("--once needs"));
        assert!(check("--stride 2k").unwrap_err().contains("less than a block"));
        assert!(check("--stride 4100").unwrap_err().contains("multiple of 512"));
        assert!(check("--rw randread --verify").unwrap_err().contains("--verify"));
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("512"), Ok(512));
        assert!(parse_size("k").is_err());
        assert!(parse_size("4x").is_err());
        assert!(parse_size("99999999t").is_err());
        assert_eq!(parse_size_u32("4g"), Ok(u32::MAX));
    }
}
