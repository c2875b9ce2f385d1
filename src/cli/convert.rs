//! `vublk convert`: copies an image's content to a new image of any format.
//!
//! ```text
//! block status of the source ──► runs of data and of nothing
//!     data:    chunks of 1 MiB, several in flight:  read ──► look for zeros ──► write
//!     nothing: skipped where the target is known to be zero, else made zero there
//! ```
//!
//! Holes stay holes, and zeros that were stored become holes (`-S 0` stores everything instead).
//! The order of writes does not matter, because nothing reads the target before the flush at the
//! end; so `-W` changes nothing and is accepted for compatibility.

use std::path::PathBuf;

use clap::Args;

use crate::block::{Node, StatusKind};
use crate::cli::lanes::Lanes;
use crate::cli::options::{
    SharingArgs, StateArgs, is_help, options_help, parse_options, take_option,
};
use crate::cli::progress::{Progress, ProgressArgs};
use crate::cli::size::parse_size;
use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, CacheMode, CreateRequest, Image, ImageFormat, OpenRequest, frozen};
use crate::io::{AlignedBuf, File as _, HostFile, HostKind, OpenOptions, block_on};
use crate::jobs::layer_copy::{Held, held_above};
use crate::units::{ByteRange, MIB, SECTOR_SIZE, align_down, align_up};

/// How much is copied at a time.
const CHUNK: u64 = MIB;
/// Zeros shorter than this are stored, unless `-S` says otherwise: as qemu-img.
const SPARSE_SIZE: u64 = 4096;

/// Copy an image to another, converting the format; unused space stays unused
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Format of the source; guessed from its first bytes if not given
    #[arg(short = 'f', long = "source-format", value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// Format of the target
    #[arg(short = 'O', long = "target-format", value_name = "FORMAT", default_value = "raw")]
    target_format: ImageFormat,
    /// Options of the target's format, key=value,key=value; -o help lists them
    #[arg(short = 'o', long = "target-options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Make the target an overlay of this backing file, and copy only what the layers of the source
    /// above it hold. One that the source does not stand on must read as the source's backing file does
    #[arg(short = 'B', long = "backing", value_name = "FILE")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT", requires = "backing")]
    backing_format: Option<ImageFormat>,
    /// Write to an existing target of at least the source's size
    #[arg(short = 'n', long, conflicts_with_all = ["options", "backing"])]
    no_create: bool,
    /// The existing target is known to read as zeros
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Zeros of at least this length become holes in the target; 0 stores everything
    #[arg(short = 'S', long, value_name = "SIZE")]
    sparse_size: Option<String>,
    /// How the host caches the source
    #[arg(short = 'T', long, value_name = "MODE", default_value_t)]
    source_cache: CacheMode,
    /// How the host caches the target; with unsafe it is not flushed at the end
    #[arg(short = 't', long, value_name = "MODE", default_value_t)]
    target_cache: CacheMode,
    /// How many pieces are copied at a time
    #[arg(short = 'm', long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u8).range(1..=16))]
    parallel: u8,
    /// Copy what is left of a damaged image (vhdx); what is missing is told and reads as zeros
    #[arg(long)]
    salvage: bool,
    /// Write out of order (always done)
    #[arg(short = 'W', long)]
    oob_writes: bool,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    sharing: SharingArgs,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The image to copy
    #[arg(value_name = "SOURCE", required_unless_present = "options")]
    source: Option<PathBuf>,
    /// The image to write: a file or a block device
    #[arg(value_name = "TARGET", required_unless_present = "options")]
    target: Option<PathBuf>,
}

pub fn run(args: &ConvertArgs) -> Result<u8> {
    if is_help(&args.options) {
        output::print(&options_help(args.target_format, |_| true))?;
        return Ok(DONE);
    }
    let (Some(source_path), Some(target_path)) = (&args.source, &args.target) else {
        return Err(Error::invalid("give a SOURCE and a TARGET"));
    };
    let sparse_size = match &args.sparse_size {
        Some(text) => parse_size(text).context(|| "-S")?,
        None => SPARSE_SIZE,
    };
    let request = args.sharing.request(source_path, args.format).cache(args.source_cache);
    let state = args.state.state_of();
    let source = images::open(&OpenRequest { salvage: args.salvage, state, ..request })?;
    refuse_same_file(&source, target_path)?;
    let target = open_target(args, &source, target_path)?;
    let copy = Copy::new(args, &source, &target, sparse_size)?;
    block_on(copy.run()).context(|| {
        format!("converting {} to {} (which is incomplete)", source.name(), target.name())
    })?;
    copy.progress.finish();
    Ok(DONE)
}

/// A file that is its own target, or that the source stands on, would be emptied before it is read: under
/// whatever name, be it that of a loop device, or of a disk that the source is a partition of.
fn refuse_same_file(source: &Image, target: &std::path::Path) -> Result<()> {
    // A target that cannot be opened is not there yet, or the next step says why.
    let Ok(target) = HostFile::open(target, OpenOptions::default()) else { return Ok(()) };
    for image in std::iter::successors(Some(source), |image| image.backing.as_deref()) {
        for file in [Some(&image.file), image.image_file.as_ref()].into_iter().flatten() {
            if !images::shares_storage(file, &target)? {
                continue;
            }
            let (name, is_same) = (source.name(), file.identity()? == target.identity()?);
            return Err(Error::invalid(match (std::ptr::eq(image, source), is_same) {
                (true, true) => format!("{name}: source and target are the same file"),
                (true, false) => format!(
                    "{}: is what the source {name} is made of, or made of it, and cannot be its target",
                    target.name()
                ),
                (false, _) => format!(
                    "{}: is what the source {name} stands on, and cannot be its target",
                    target.name()
                ),
            }));
        }
    }
    Ok(())
}

/// Makes the target, unless it is to exist already, and opens it.
fn open_target(args: &ConvertArgs, source: &Image, path: &std::path::Path) -> Result<Image> {
    let size = source.node.size();
    let request = OpenRequest::write(path)
        .format(Some(args.target_format))
        .cache(args.target_cache)
        .allow_dirs(&args.sharing.allow_dirs);
    if !args.no_create {
        let mut options = parse_options(&args.options)?;
        let size = match take_option(&mut options, "size") {
            Some(text) => parse_size(&text).context(|| "-o size")?.max(size),
            None => size,
        };
        let create = CreateRequest {
            size: Some(size),
            options,
            backing: args.backing.clone(),
            backing_format: args.backing_format,
            allow_dirs: request.allow_dirs.clone(),
            ..CreateRequest::new(path, args.target_format)
        };
        let align = images::create::check_openable(&create, &request)?.request;
        let is_raw = args.target_format == ImageFormat::Raw;
        check_end(source, if is_raw { align } else { 1 }, size.next_multiple_of(SECTOR_SIZE))?;
        images::create(&create)?;
    }
    let target = images::open(&request)?;
    if args.no_create {
        frozen::check_not_frozen(&target.file, &request.allow_dirs)?;
    }
    if target.node.size() < size {
        return Err(Error::invalid(format!(
            "{}: has {} bytes, and the source {size}; make it larger (vublk resize) first",
            target.name(),
            target.node.size()
        )));
    }
    Ok(target)
}

/// Refuses a source with a tail that direct I/O does not take, on one side or the other. One that is
/// shorter than the target's unit is completed by what the target has there, if there is room.
fn check_end(source: &Image, target_align: u64, target_size: u64) -> Result<()> {
    let from = source.node.limits();
    let is_whole = from.size.is_multiple_of(from.request_alignment);
    let is_room = align_up(from.size, target_align).is_some_and(|end| end <= target_size);
    let (unit, way_out) = match (is_whole, is_room) {
        (true, true) => return Ok(()),
        (false, true) => (from.request_alignment, "-T writeback"),
        (true, false) => (target_align, "-t writeback"),
        (false, false) => (from.request_alignment.max(target_align), "-T writeback -t writeback"),
    };
    Err(Error::unsupported(format!(
        "{}: its size of {} bytes is not a multiple of the {unit} that direct I/O takes here; use \
         {way_out}",
        source.name(),
        from.size,
    )))
}

/// What happens to a run of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Read it and write what is not zero.
    Copy,
    /// Make it zero in the target.
    Zero,
    /// Nothing: the target reads the same already.
    Skip,
}

/// A copy under way.
struct Copy<'a> {
    source: &'a Node,
    target: &'a Node,
    /// Whether the target reads as zeros where nothing was written yet.
    target_is_zero: bool,
    /// Whether the target may hold something behind the end of the source.
    target_existed: bool,
    /// Whether the target shows its backing file where nothing is written.
    target_has_backing: bool,
    /// The node of the source's chain that reads as the target's backing file: what no layer above it
    /// holds is left to that.
    common_base: Option<Node>,
    /// Zeros of this length become holes; 0 stores everything.
    sparse_size: u64,
    /// What requests to both sides must be multiples of, but for the source's end.
    align: u64,
    /// Zeros are looked for in units of this: less would not become a hole in the target.
    granule: u64,
    /// Alignment of buffers that suits both sides.
    memory_align: usize,
    lanes: usize,
    flush: bool,
    progress: Progress,
}

impl<'a> Copy<'a> {
    fn new(
        args: &ConvertArgs,
        source: &'a Image,
        target: &'a Image,
        sparse_size: u64,
    ) -> Result<Self> {
        let (from, to) = (source.node.limits(), target.node.limits());
        let align = from.request_alignment.max(to.request_alignment);
        check_end(source, to.request_alignment, to.size)?;
        let unit = match target.format {
            ImageFormat::Raw => sparse_size.min(SPARSE_SIZE).next_power_of_two(),
            // Less than a cluster does not become a hole.
            _ => to.optimal_io.clamp(SPARSE_SIZE, CHUNK),
        };
        let target_has_backing =
            args.backing.is_some() || (!args.no_create && target.node.backing().is_some());
        let created_zero = !args.no_create && target.file.kind() == HostKind::Regular;
        Ok(Copy {
            source: &source.node,
            target: &target.node,
            target_is_zero: created_zero || args.target_is_zero,
            target_existed: args.no_create,
            target_has_backing,
            common_base: if target_has_backing { common_base(source, target)? } else { None },
            sparse_size,
            align,
            granule: unit.max(512).max(align),
            memory_align: from.memory_alignment.max(to.memory_alignment).max(4096),
            lanes: usize::from(args.parallel),
            flush: !args.target_cache.ignores_flush(),
            progress: Progress::new(args.progress, "converting", from.size),
        })
    }

    async fn run(&self) -> Result<()> {
        let mut lanes = Lanes::new(self.lanes);
        let copied = self.start_all(&mut lanes).await;
        // Even after a failure nothing may be in flight when the files are closed.
        let drained = lanes.drain().await;
        copied.and(drained)?;
        if self.flush {
            self.target.flush().await.context(|| "flushing")?;
        }
        self.target.close().await.context(|| "closing")
    }

    async fn start_all<'c>(&'c self, lanes: &mut Lanes<'c>) -> Result<()> {
        let size = self.source.size();
        let mut offset = 0;
        while offset < size {
            let (run, work) = self.next_run(ByteRange::between(offset, size)).await?;
            offset = run.end();
            match work {
                Work::Skip => self.progress.advance(run.len),
                Work::Zero => lanes.push(self.zero(run)).await?,
                Work::Copy => {
                    for chunk in chunks(run) {
                        lanes.push(self.copy(chunk)).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The next run of the source and what to do with it. Runs keep to the alignment: a unit that
    /// holds some data is data.
    async fn next_run(&self, rest: ByteRange) -> Result<(ByteRange, Work)> {
        let context = || format!("finding out what is allocated at {}", rest.offset);
        let (run, held) = match &self.common_base {
            Some(base) => held_above(self.source, Some(base), rest).await.context(context)?,
            None => {
                let status = self.source.block_status_deep(rest).await.context(context)?;
                let is_data = status.kind == StatusKind::Data;
                (status.range, if is_data { Held::Data } else { Held::Zero })
            }
        };
        let work = match held {
            Held::Data => Work::Copy,
            Held::Nothing => Work::Skip,
            Held::Zero if self.sparse_size == 0 => Work::Copy,
            Held::Zero if self.target_is_zero && !self.target_has_backing => Work::Skip,
            Held::Zero => Work::Zero,
        };
        let end = run.end().min(rest.end());
        let unit_end = align_down(end, self.align);
        let end = match work {
            _ if end == rest.end() => end,
            Work::Copy => align_up(end, self.align).unwrap_or(end).min(rest.end()),
            _ if unit_end > rest.offset => unit_end,
            // Less than a unit of nothing, with something else after it.
            _ => {
                let unit = ByteRange { offset: rest.offset, len: self.align.min(rest.len) };
                return Ok((unit, Work::Copy));
            }
        };
        Ok((ByteRange::between(rest.offset, end), work))
    }

    /// Copies one chunk.
    async fn copy(&self, chunk: ByteRange) -> Result<()> {
        let whole = self.in_target(chunk);
        let mut buf = AlignedBuf::zeroed(whole.len as usize, self.memory_align);
        if self.ends_within_a_unit(chunk) {
            let last = ByteRange::between(align_down(chunk.end(), self.align), whole.end());
            let bytes = buf.buffers();
            self.target
                .read(last.offset, bytes.slice(last.offset - chunk.offset, last.len))
                .await
                .context(|| format!("reading {last} of the target"))?;
            let sectors = chunk.len.next_multiple_of(SECTOR_SIZE);
            bytes.slice(chunk.len, sectors - chunk.len).fill_zero();
        }
        self.source
            .read(chunk.offset, buf.buffers().slice(0, chunk.len))
            .await
            .context(|| format!("reading {chunk} of the source"))?;
        let pieces = match self.sparse_size {
            0 => vec![Piece { range: ByteRange { offset: 0, len: whole.len }, is_zero: false }],
            min => find_zeros(buf.as_slice(), self.granule as usize, min.min(CHUNK)),
        };
        for piece in pieces {
            let range = ByteRange { offset: chunk.offset + piece.range.offset, ..piece.range };
            if !piece.is_zero {
                let data = buf.buffers().slice(piece.range.offset, piece.range.len);
                self.target
                    .write(range.offset, data, false)
                    .await
                    .context(|| format!("writing {range} of the target"))?;
            } else if !self.target_is_zero || self.target_has_backing {
                self.make_zero(range).await?;
            }
        }
        self.progress.advance(chunk.len);
        Ok(())
    }

    async fn zero(&self, mut range: ByteRange) -> Result<()> {
        if self.ends_within_a_unit(range) {
            let whole_units = align_down(range.end(), self.align).max(range.offset);
            self.copy(ByteRange::between(whole_units, range.end())).await?;
            range = ByteRange::between(range.offset, whole_units);
        }
        self.make_zero(range).await?;
        self.progress.advance(range.len);
        Ok(())
    }

    /// Whether the target holds something of its own in the unit in which the source ends. A source has
    /// whole sectors.
    fn ends_within_a_unit(&self, range: ByteRange) -> bool {
        let sectors = range.end().next_multiple_of(SECTOR_SIZE);
        self.target_existed && self.in_target(range).end() > sectors
    }

    /// The range with what the target's unit demands beyond the end of the source.
    fn in_target(&self, range: ByteRange) -> ByteRange {
        match range.end() == self.source.size() {
            true => ByteRange::between(range.offset, range.end().next_multiple_of(self.align)),
            false => range,
        }
    }

    async fn make_zero(&self, range: ByteRange) -> Result<()> {
        let range = self.in_target(range);
        (self.target.write_zeroes(range, true).await)
            .context(|| format!("writing zeros, {range} of the target"))
    }
}

/// The node below the top of the source that reads as the target's backing file: that file itself, if the
/// source stands on it. Another one is to read as the source's own backing file does.
fn common_base(source: &Image, target: &Image) -> Result<Option<Node>> {
    // A state is no file: many may be of one log.
    let is_file = |image: &&Image| image.format != ImageFormat::CrashState;
    if let Some(named) = target.backing.as_deref().filter(is_file) {
        let identity = named.file.identity()?;
        let chain =
            std::iter::successors(source.backing.as_deref(), |image| image.backing.as_deref());
        for image in chain.filter(|image| image.format == named.format) {
            if image.file.identity()? == identity {
                return Ok(Some(image.node.clone()));
            }
        }
    }
    Ok(source.node.backing())
}

/// Cuts a run into chunks that end at multiples of the chunk's size.
fn chunks(run: ByteRange) -> impl Iterator<Item = ByteRange> {
    let mut offset = run.offset;
    std::iter::from_fn(move || {
        let end = (align_down(offset, CHUNK) + CHUNK).min(run.end());
        let chunk = ByteRange::between(offset, end);
        offset = end;
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// A part of a chunk, all zeros or not.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    range: ByteRange,
    is_zero: bool,
}

/// Cuts bytes into pieces of data and pieces of zeros: whole granules, at least `min` bytes long.
fn find_zeros(bytes: &[u8], granule: usize, min: u64) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (i, part) in bytes.chunks(granule).enumerate() {
        let is_zero = is_zero(part);
        let len = part.len() as u64;
        match pieces.last_mut() {
            Some(last) if last.is_zero == is_zero => last.range.len += len,
            _ => {
                let range = ByteRange { offset: (i * granule) as u64, len };
                pieces.push(Piece { range, is_zero });
            }
        }
    }
    if pieces.iter().any(|piece| piece.is_zero && piece.range.len < min) {
        let mut merged: Vec<Piece> = Vec::new();
        for mut piece in pieces {
            // A tail of the disk that is shorter than asked for is still all zeros to its end,
            // but nobody can know here: it is stored.
            piece.is_zero &= piece.range.len >= min;
            match merged.last_mut() {
                Some(last) if !last.is_zero && !piece.is_zero => last.range.len += piece.range.len,
                _ => merged.push(piece),
            }
        }
        pieces = merged;
    }
    pieces
}

/// Whether all bytes are zero. Most data shows its first non-zero byte early.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|w| w.iter().fold(0, |all, b| all | b) == 0) && rest.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_a_run_and_end_at_multiples() {
        let run = ByteRange { offset: CHUNK - 1, len: 2 * CHUNK };
        let cut: Vec<_> = chunks(run).collect();
        assert_eq!(cut.iter().map(|c| c.len).collect::<Vec<_>>(), [1, CHUNK, CHUNK - 1]);
        assert!(cut.windows(2).all(|pair| pair[0].end() == pair[1].offset));
        assert_eq!(chunks(ByteRange { offset: 5, len: 0 }).count(), 0);
    }

    /// The pieces as a text: `D` and `z` for each granule of four bytes.
    fn picture(bytes: &[u8], min: u64) -> String {
        let piece = |p: Piece| {
            let letter = if p.is_zero { "z" } else { "D" };
            letter.repeat(p.range.len.div_ceil(4) as usize)
        };
        find_zeros(bytes, 4, min).into_iter().map(piece).collect()
    }

    #[test]
    fn zeros_are_found_in_granules() {
        let bytes = [[1; 4], [0; 4], [0; 4], [0, 0, 1, 0], [0; 4]].concat();
        assert_eq!(picture(&bytes, 4), "DzzDz");
        assert_eq!(picture(&bytes, 8), "DzzDD");
        assert_eq!(picture(&bytes, 12), "DDDDD");
        assert_eq!(picture(&[0; 6], 4), "zz");
        assert_eq!(picture(&[], 4), "");
    }

    #[test]
    fn zeros_are_told_from_data() {
        assert!(is_zero(&[0; 1000]));
        for at in [0, 63, 64, 511, 999] {
            let mut bytes = [0; 1000];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }
}
