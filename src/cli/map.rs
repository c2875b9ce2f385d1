//! `vublk map`: where an image's data lies.
//!
//! One entry for each run that lies together, through the whole chain of backing files. The JSON
//! is `qemu-img map`'s, with QEMU's `filename` added where `offset` is: it says which file of the
//! chain the offset is in.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::block::{BlockStatus, Node, StatusKind};
use crate::cli::options::{Output, ReadArgs};
use crate::cli::size::parse_size;
use crate::cli::{DONE, output};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images;
use crate::io::block_on;
use crate::units::ByteRange;

/// Show where an image's data lies
#[derive(Debug, Args)]
pub struct MapArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Start at this offset of the disk
    #[arg(short, long, value_name = "OFFSET", default_value = "0")]
    start_offset: String,
    /// Stop after this many bytes
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// A run of the disk; QEMU's MapEntry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct MapEntry {
    start: u64,
    length: u64,
    /// How many backing files down it was found.
    depth: u32,
    /// Whether any file of the chain holds or states it.
    present: bool,
    /// Whether it reads as zeros.
    zero: bool,
    /// Whether it takes space.
    data: bool,
    compressed: bool,
    /// Where it lies in the file, if it lies there as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    /// The file.
    #[serde(skip_serializing_if = "Option::is_none")]
    filename: Option<String>,
}

impl MapEntry {
    fn new(status: BlockStatus) -> MapEntry {
        let (offset, filename) = match status.host {
            Some((name, offset)) => (Some(offset), Some(name)),
            None => (None, None),
        };
        MapEntry {
            start: status.range.offset,
            length: status.range.len,
            depth: status.depth,
            present: status.kind != StatusKind::Unallocated,
            // What nobody in the chain holds reads as zeros.
            zero: status.kind != StatusKind::Data,
            data: status.kind == StatusKind::Data,
            compressed: status.compressed,
            offset,
            filename,
        }
    }

    /// Whether `next` continues this run.
    fn continues(&self, next: &MapEntry) -> bool {
        let same = |e: &MapEntry| (e.depth, e.present, e.zero, e.data, e.compressed);
        same(self) == same(next)
            && self.start + self.length == next.start
            && self.filename == next.filename
            && match (self.offset, next.offset) {
                (Some(here), Some(there)) => here.checked_add(self.length) == Some(there),
                (None, None) => true,
                _ => false,
            }
    }
}

pub fn run(args: &MapArgs) -> Result<u8> {
    let start = parse_size(&args.start_offset).context(|| "--start-offset")?;
    let length = match &args.max_length {
        Some(text) => parse_size(text).context(|| "--max-length")?,
        None => u64::MAX,
    };
    let image = images::open(&args.read.request(&args.file))?;
    let size = image.node.size();
    if start > size {
        return Err(Error::new(
            ErrorKind::OutOfRange,
            format!("{}: --start-offset {start} lies beyond its {size} bytes", image.name()),
        ));
    }
    let range = ByteRange::between(start, start.saturating_add(length).min(size));
    let mut printer = Printer { output: args.output, any: false };
    printer.begin()?;
    block_on(walk(&image.node, range, &mut printer))
        .context(|| format!("{}: finding out what is allocated", image.name()))?;
    printer.end()?;
    Ok(DONE)
}

/// Prints the runs of `range`, each as long as it goes.
async fn walk(node: &Node, range: ByteRange, printer: &mut Printer) -> Result<()> {
    let mut pending: Option<MapEntry> = None;
    let mut offset = range.offset;
    while offset < range.end() {
        let rest = ByteRange::between(offset, range.end());
        let status = node.block_status_deep(rest).await?;
        offset = status.range.end();
        let entry = MapEntry::new(status);
        match &mut pending {
            Some(last) if last.continues(&entry) => last.length += entry.length,
            _ => {
                if let Some(done) = pending.replace(entry) {
                    printer.entry(&done)?;
                }
            }
        }
    }
    match pending {
        Some(last) => printer.entry(&last),
        None => Ok(()),
    }
}

/// Prints entries as they are found: a map may have millions.
struct Printer {
    output: Output,
    /// Whether an entry was printed already.
    any: bool,
}

impl Printer {
    fn begin(&self) -> Result<()> {
        match self.output {
            Output::Human => output::print_or_end(&format!(
                "{:<16}{:<16}{:<16}{}\n",
                "Offset", "Length", "Mapped to", "File"
            )),
            Output::Json => output::print_or_end("["),
        }
    }

    fn entry(&mut self, entry: &MapEntry) -> Result<()> {
        let first = !std::mem::replace(&mut self.any, true);
        match self.output {
            Output::Json => {
                let json = serde_json::to_string(entry).map_err(std::io::Error::from)?;
                output::print_or_end(&format!("{}{json}", if first { "" } else { ",\n" }))
            }
            Output::Human if !entry.data => Ok(()),
            Output::Human => {
                let place = match entry.offset {
                    Some(0) => "0".to_string(),
                    Some(offset) => format!("{offset:#x}"),
                    None => "compressed".to_string(),
                };
                let start =
                    if entry.start == 0 { "0".into() } else { format!("{:#x}", entry.start) };
                output::print_or_end(&format!(
                    "{start:<16}{:<16}{place:<16}{}\n",
                    format!("{:#x}", entry.length),
                    entry.filename.as_deref().unwrap_or_default(),
                ))
            }
        }
    }

    fn end(&self) -> Result<()> {
        match self.output {
            Output::Human => Ok(()),
            Output::Json => output::print_or_end("]\n"),
        }
    }
}
