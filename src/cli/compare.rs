//! `vublk compare`: whether two images have the same content.

use std::cell::Cell;
use std::path::PathBuf;

use clap::Args;

use crate::block::{Node, StatusKind};
use crate::cli::lanes::Lanes;
use crate::cli::options::{Output, SharingArgs, StateArgs};
use crate::cli::progress::{Progress, ProgressArgs};
use crate::cli::{DONE, output, report};
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, Image, ImageFormat, OpenRequest};
use crate::io::{AlignedBuf, block_on};
use crate::units::{ByteRange, MIB, align_down};

/// The images differ.
const DIFFERENT: u8 = 1;
/// An image could not be opened.
const CANNOT_OPEN: u8 = 2;
/// What is allocated could not be found out.
const CANNOT_MAP: u8 = 3;
/// An image could not be read.
const CANNOT_READ: u8 = 4;

/// How much is compared at a time.
const CHUNK: u64 = MIB;
/// How many chunks are in flight.
const LANES: usize = 4;

/// Compare the content of two images (exit code: 0 same, 1 different, 2 and more: error)
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Format of the first image; guessed from its first bytes if not given
    #[arg(short = 'f', long = "a-format", value_name = "FORMAT")]
    format1: Option<ImageFormat>,
    /// Format of the second image
    #[arg(short = 'F', long = "b-format", value_name = "FORMAT")]
    format2: Option<ImageFormat>,
    /// Sizes and what is allocated must be the same, too
    #[arg(short, long)]
    strict: bool,
    /// Compare what is left of damaged images (vhdx); what is missing is told and counts as zeros
    #[arg(long)]
    salvage: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    sharing: SharingArgs,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print; JSON has "identical" and, where they differ, "offset" and "reason"
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// The first image
    #[arg(value_name = "FILE1")]
    file1: PathBuf,
    /// The second image
    #[arg(value_name = "FILE2")]
    file2: PathBuf,
}

/// Why two images are not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Difference {
    /// Their sizes (strict only).
    Size,
    /// One holds data here, the other nothing (strict only).
    Status(u64),
    /// The first byte that differs.
    Content(u64),
}

pub fn run(args: &CompareArgs) -> Result<u8> {
    let state = args.state.state_of();
    let request1 = OpenRequest { state, ..args.sharing.request(&args.file1, args.format1) };
    let request2 = args.sharing.request(&args.file2, args.format2);
    let images = open_both(args.salvage, request1, request2);
    let (image1, image2) = match images {
        Ok(images) => images,
        Err(err) => {
            report(&err);
            return Ok(CANNOT_OPEN);
        }
    };
    let (size1, size2) = (image1.node.size(), image2.node.size());
    let progress = Progress::new(args.progress, "comparing", size1.max(size2));
    let comparison = Comparison {
        one: &image1.node,
        other: &image2.node,
        strict: args.strict,
        progress: &progress,
        first: Cell::new(u64::MAX),
    };
    let outcome = block_on(comparison.run());
    progress.finish();
    match outcome {
        Ok(difference) => answer(args, size1 != size2, difference),
        Err((code, err)) => {
            report(&err);
            Ok(code)
        }
    }
}

/// Opens both. To be salvaged are those that can be: usually one is damaged, and the other a backup in
/// any format.
fn open_both(
    salvage: bool,
    mut request1: OpenRequest,
    mut request2: OpenRequest,
) -> Result<(Image, Image)> {
    if salvage {
        let is_vhdx = |request: &OpenRequest| -> Result<bool> {
            Ok(images::format_of(request)? == ImageFormat::Vhdx)
        };
        (request1.salvage, request2.salvage) = match (is_vhdx(&request1)?, is_vhdx(&request2)?) {
            // Refused, as by other commands.
            (false, false) => (true, true),
            some => some,
        };
    }
    Ok((images::open(&request1)?, images::open(&request2)?))
}

/// Prints the outcome.
fn answer(args: &CompareArgs, sizes_differ: bool, difference: Option<Difference>) -> Result<u8> {
    let (text, reason, offset) = match difference {
        None => ("Images are identical.\n".to_string(), None, None),
        Some(Difference::Size) => {
            ("Strict mode: Image size mismatch!\n".to_string(), Some("size"), None)
        }
        Some(Difference::Status(at)) => (
            format!("Strict mode: Offset {at} block status mismatch!\n"),
            Some("allocation"),
            Some(at),
        ),
        Some(Difference::Content(at)) => {
            (format!("Content mismatch at offset {at}!\n"), Some("content"), Some(at))
        }
    };
    match args.output {
        _ if args.quiet => {}
        Output::Human => {
            if sizes_differ && !args.strict {
                output::print("Warning: Image size mismatch!\n")?;
            }
            output::print(&text)?;
        }
        Output::Json => {
            let mut json = serde_json::json!({ "identical": difference.is_none() });
            json["size-mismatch"] = sizes_differ.into();
            if let Some(reason) = reason {
                json["reason"] = reason.into();
            }
            if let Some(offset) = offset {
                json["offset"] = offset.into();
            }
            output::print_json(&json)?;
        }
    }
    Ok(if difference.is_some() { DIFFERENT } else { DONE })
}

/// A comparison under way.
struct Comparison<'a> {
    one: &'a Node,
    other: &'a Node,
    strict: bool,
    progress: &'a Progress,
    /// Lowest offset found to differ so far.
    first: Cell<u64>,
}

/// A run of one of the two disks. Beyond its end a disk reads as zeros.
#[derive(Clone, Copy)]
struct Run {
    len: u64,
    has_data: bool,
}

impl Comparison<'_> {
    /// Finds the first difference. Failures come with the exit code for them.
    async fn run(&self) -> Result<Option<Difference>, (u8, Error)> {
        let (size1, size2) = (self.one.size(), self.other.size());
        if self.strict && size1 != size2 {
            return Ok(Some(Difference::Size));
        }
        let mut lanes = Lanes::new(LANES);
        let mut status_differs = None;
        let mut failed = Ok(());
        let mut offset = 0;
        let end = size1.max(size2);
        // Chunks start in order, so once one differs nothing after it matters, and everything
        // before it is in flight already.
        while offset < end && self.first.get() == u64::MAX && failed.is_ok() {
            let runs = async {
                let run1 = run_at(self.one, offset, end).await?;
                Ok((run1, run_at(self.other, offset, end).await?))
            };
            let (run1, run2) = match runs.await {
                Ok(runs) => runs,
                Err(err) => {
                    failed = Err((CANNOT_MAP, err));
                    break;
                }
            };
            let mut len = run1.len.min(run2.len);
            if self.strict && run1.has_data != run2.has_data {
                status_differs = Some(offset);
                break;
            }
            if run1.has_data || run2.has_data {
                len = len.min(CHUNK);
                let chunk = self.chunk(ByteRange { offset, len }, run1, run2);
                failed = lanes.push(chunk).await.map_err(|err| (CANNOT_READ, err));
            }
            self.progress.advance(len);
            offset += len;
        }
        let drained = lanes.drain().await.map_err(|err| (CANNOT_READ, err));
        // A difference that was found stands, even if something else failed.
        match self.first.get() {
            u64::MAX => failed.and(drained).map(|()| status_differs.map(Difference::Status)),
            at => Ok(Some(Difference::Content(at))),
        }
    }

    /// Compares one chunk and notes the first byte that differs.
    async fn chunk(&self, range: ByteRange, run1: Run, run2: Run) -> Result<()> {
        let bytes1 = read(self.one, range, run1).await?;
        let bytes2 = read(self.other, range, run2).await?;
        if bytes1 != bytes2 {
            let at = bytes1.iter().zip(&bytes2).take_while(|(a, b)| a == b).count();
            self.first.set(self.first.get().min(range.offset + at as u64));
        }
        Ok(())
    }
}

/// What is at `offset` of a disk, and how far that goes (at most to `end`).
async fn run_at(node: &Node, offset: u64, end: u64) -> Result<Run> {
    let size = node.size();
    if offset >= size {
        return Ok(Run { len: end - offset, has_data: false });
    }
    let status = node
        .block_status_deep(ByteRange::between(offset, size))
        .await
        .context(|| format!("node {}: finding out what is allocated at {offset}", node.name()))?;
    Ok(Run { len: status.range.len, has_data: status.kind == StatusKind::Data })
}

/// Reads a chunk; what has no data is zeros without a read.
async fn read(node: &Node, range: ByteRange, run: Run) -> Result<Vec<u8>> {
    if !run.has_data {
        return Ok(vec![0; range.len as usize]);
    }
    // The other disk's runs need not keep to this one's alignment.
    let limits = node.limits();
    let start = align_down(range.offset, limits.request_alignment);
    let end = range.end().next_multiple_of(limits.request_alignment).min(limits.size);
    let mut buf = AlignedBuf::zeroed((end - start) as usize, limits.memory_alignment.max(512));
    node.read(start, buf.buffers())
        .await
        .context(|| format!("node {}: reading {range}", node.name()))?;
    let skip = (range.offset - start) as usize;
    Ok(buf.as_slice()[skip..skip + range.len as usize].to_vec())
}
