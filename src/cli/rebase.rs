//! `vublk rebase`: puts an overlay on another backing file.
//!
//! The disk stays as it is: where the two backing files differ and the overlay holds nothing, what
//! the old one has is copied into the overlay first, and made durable before the header names the
//! new one. With `-u` only the header is changed, for backing files that were moved or converted. The marks
//! that snapshots have left on backing files ([`frozen`]) follow the header.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::block::{Node, StatusKind, open_gate};
use crate::cli::progress::{Progress, ProgressArgs};
use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, Image, ImageFormat, OpenRequest, frozen};
use crate::io::{AlignedBuf, HostFile, OpenOptions, block_on};
use crate::jobs::layer_copy::CHUNK;
use crate::jobs::marks::{Joins, Marks, Others};
use crate::units::{ByteRange, align_down, align_up};

/// The backing files are compared in pieces of this many bytes.
const PIECE: usize = 4096;

/// Put an overlay on another backing file
#[derive(Debug, Args)]
pub struct RebaseArgs {
    /// Format of the overlay; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// The new backing file, as it is to be named in the image (relative to the image's directory);
    /// empty for none
    #[arg(short = 'b', long = "backing", value_name = "FILE")]
    backing: String,
    /// Format of the new backing file
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT")]
    backing_format: Option<ImageFormat>,
    /// Change the name only and compare nothing: the content of the disk changes if the backing
    /// files differ
    #[arg(short = 'u', long = "unsafe")]
    unchecked: bool,
    /// Allow images to pull in files from below DIR; their own directory is always allowed
    #[arg(long = "allow-dir", value_name = "DIR")]
    allow_dirs: Vec<PathBuf>,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The overlay
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub fn run(args: &RebaseArgs) -> Result<u8> {
    let new = (!args.backing.is_empty()).then_some(args.backing.as_str());
    if new.is_some() && args.backing_format.is_none() {
        return Err(Error::invalid(format!(
            "{}: the backing file {} is given without its format; say it with -F",
            args.file.display(),
            args.backing
        )));
    }
    let mut request =
        OpenRequest::write(&args.file).format(args.format).allow_dirs(&args.allow_dirs);
    request.backing = !args.unchecked;
    let mut image = images::open(&request)?;
    let old = files_below(&image, &request);
    let name = image.name().to_string();
    if !matches!(image.format, ImageFormat::AddCow | ImageFormat::Qcow2) {
        return Err(Error::unsupported(format!(
            "{name}: is {}, and only add-cow and qcow2 images can be put on another backing file",
            image.format
        )));
    }
    let is_live = !args.unchecked || image.format == ImageFormat::Qcow2;
    if args.unchecked && is_live {
        // Its header is changed by its driver, which was not asked for so far.
        drop(image);
        request.backing = true;
        image = images::open_alone(&request)?;
    }
    images::check_new_backing(&image, new, args.backing_format)?;
    if let Some(new) = new {
        check_no_loop(&image, new)?;
    }
    let mut new_file = None;
    if !args.unchecked {
        let open = |new| images::open_backing_of(&image, new, args.backing_format, &request);
        let below = new.map(open).transpose()?;
        new_file = below.as_ref().map(|image| Arc::clone(&image.file));
        let below = below.as_ref().map(|image| &image.node);
        block_on(keep_content(args, &image.node, below))
            .context(|| format!("{name}: copying what the new backing file does not have"))?;
    } else if let Some(new) = new {
        new_file = images::named_file(&image, new, &request.allow_dirs).map(Arc::new);
    }
    let marks = marks(image.file.path(), &old, new_file);
    let announced = marks.announce();
    images::set_backing(&image, new, args.backing_format).inspect_err(|_| announced.keep())?;
    if is_live {
        block_on(image.node.close())?;
    }
    announced.renew();
    if !args.quiet {
        output::print("Image rebased.\n")?;
    }
    Ok(DONE)
}

/// The files that the image stands on, the upper ones first. Where it was not put on them, the one that it
/// names.
fn files_below(image: &Image, request: &OpenRequest) -> Vec<Arc<HostFile>> {
    let below = std::iter::successors(image.backing.as_deref(), |image| image.backing.as_deref());
    let files: Vec<_> = below.map(|image| Arc::clone(&image.file)).collect();
    if !files.is_empty() {
        return files;
    }
    let details = image.node.driver().details();
    let named = details["backing-filename"].as_str();
    named
        .and_then(|name| images::named_file(image, name, &request.allow_dirs))
        .map(Arc::new)
        .into_iter()
        .collect()
}

/// The marks of snapshots that change: the old backing file is not needed any more, and the new one is, where
/// a snapshot has frozen either for this disk.
fn marks(top: &Path, old: &[Arc<HostFile>], new: Option<Arc<HostFile>>) -> Marks {
    let leaves = old.first().filter(|file| frozen::is_frozen_below(file, top)).cloned();
    let identity = |file: &HostFile| file.identity().ok();
    if let (Some(old), Some(new)) = (old.first(), &new)
        && identity(old) == identity(new)
    {
        return Marks::default();
    }
    let stands_on = |new: &HostFile| {
        let layer = old.iter().find(|layer| frozen::is_frozen_below(new, layer.path()));
        layer.map(|layer| Others::Left(layer.path().into()))
    };
    let joins = new.and_then(|file| {
        let others = stands_on(&file).or(leaves.is_some().then_some(Others::Stay));
        others.map(|others| Joins { file, others })
    });
    Marks { overlays: vec![top.into()], leaves, is_live: false, joins }
}

/// Refuses a backing file that is a file of the overlay itself, under whatever name: nobody could ever
/// open that.
fn check_no_loop(image: &Image, new: &str) -> Result<()> {
    let path = open_gate::combine(image.file.path(), new);
    // One that is not there yet is none of them.
    let Ok(new) = HostFile::open(&path, OpenOptions::default()).and_then(|file| file.identity())
    else {
        return Ok(());
    };
    if image.file.identity()? == new {
        return Err(Error::invalid(format!(
            "{}: an image cannot be its own backing file",
            image.name()
        )));
    }
    match &image.image_file {
        Some(data) if data.identity()? == new => Err(Error::invalid(format!(
            "{}: {} is its image file, and cannot be its backing file as well",
            image.name(),
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// Copies into the overlay what only its old backing has, and makes it durable.
async fn keep_content(args: &RebaseArgs, top: &Node, below: Option<&Node>) -> Result<()> {
    let progress = Progress::new(args.progress, "rebasing", top.size());
    let mut offset = 0;
    while offset < top.size() {
        let status = top.block_status(ByteRange::between(offset, top.size())).await?;
        let mut run = status.range;
        if status.kind == StatusKind::Unallocated {
            // Of a large disk most is nothing, which takes no time.
            let zeros = zeros_at(Some(top), run).await?.min(zeros_at(below, run).await?);
            run.len = if zeros > 0 { zeros } else { run.len.min(CHUNK) };
            if zeros == 0 {
                compare_and_copy(top, below, run).await?;
            }
        }
        offset = run.end();
        progress.advance(run.len);
    }
    progress.finish();
    top.flush().await
}

/// How much from the start of a range on is known to read as zeros, in bytes: at the end of an image, or
/// without one, all.
async fn zeros_at(node: Option<&Node>, range: ByteRange) -> Result<u64> {
    let Some(node) = node else { return Ok(range.len) };
    let inside = range.intersect(&ByteRange { offset: 0, len: node.size() });
    if inside.is_empty() {
        return Ok(range.len);
    }
    let status = node.block_status_deep(inside).await?;
    Ok(if status.kind == StatusKind::Data { 0 } else { status.range.len })
}

/// What has to be read or written of a node, which takes whole units, to get at a range of it.
fn units_around(node: &Node, range: ByteRange) -> ByteRange {
    let (unit, size) = (node.limits().request_alignment, node.size());
    let end = align_up(range.end(), unit).map_or(size, |end| end.min(size));
    ByteRange::between(align_down(range.offset, unit), end)
}

async fn compare_and_copy(top: &Node, below: Option<&Node>, run: ByteRange) -> Result<()> {
    let run = units_around(top, run);
    let old = AlignedBuf::zeroed(run.len as usize, 4096);
    top.read(run.offset, old.buffers()).await?;
    let mut new = vec![0; run.len as usize];
    if let Some(below) = below {
        let inside = run.intersect(&ByteRange { offset: 0, len: below.size() });
        if !inside.is_empty() {
            let whole = units_around(below, inside);
            let mut buf = AlignedBuf::zeroed(whole.len as usize, 4096);
            below.read(whole.offset, buf.buffers()).await?;
            let skip = (run.offset - whole.offset) as usize;
            new[..inside.len as usize]
                .copy_from_slice(&buf.as_slice()[skip..][..inside.len as usize]);
        }
    }
    let piece = PIECE.max(top.limits().request_alignment as usize);
    let bytes = old.to_vec();
    let pieces = bytes.chunks(piece).zip(new.chunks(piece)).enumerate();
    for (i, (was, _)) in pieces.filter(|(_, (was, will_be))| was != will_be) {
        let at = (i * piece) as u64;
        let data = old.buffers().slice(at, was.len() as u64);
        top.write(run.offset + at, data, false).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use clap::Parser;

    use super::*;
    use crate::images::frozen::tests::die_after;
    use crate::images::{CreateRequest, Locking};

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: RebaseArgs,
    }

    /// What the overlay stands on is not given to a guest for writing, and what it has left is.
    #[test]
    fn marks_tell_what_the_overlay_stands_on_wherever_a_rebase_is_killed() {
        let (mut before, mut over) = (0, 0);
        for after in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            let make = |name: &str, format, backing: Option<&str>| {
                images::create(&CreateRequest {
                    size: Some(1 << 20),
                    backing: backing.map(String::from),
                    backing_format: backing.map(|_| ImageFormat::Raw),
                    ..CreateRequest::new(path(name), format)
                })
                .unwrap();
            };
            make("old", ImageFormat::Raw, None);
            make("new", ImageFormat::Raw, None);
            make("top", ImageFormat::AddCow, Some("old"));
            let file = |name: &str| HostFile::open(&path(name), OpenOptions::default()).unwrap();
            frozen::mark(&file("old"), &path("top"));
            let top = path("top");
            let words = ["rebase", "-q", "-b", "new", "-F", "raw", top.to_str().unwrap()];
            let Command { args } = Command::parse_from(words);
            die_after(Some(after));
            let done = catch_unwind(AssertUnwindSafe(|| run(&args)));
            die_after(None);
            let request = OpenRequest::read(&top).locking(Locking::Off);
            let image = images::open(&request).unwrap();
            let below = image.backing.as_ref().unwrap().file.path().to_path_buf();
            let (needed, free) = match below == path("new") {
                true => ("new", "old"),
                false => ("old", "new"),
            };
            frozen::check(&file(needed), &[]).unwrap_err();
            frozen::check(&file(free), &[]).unwrap_or_else(|err| panic!("{after}: {err}"));
            *(if needed == "old" { &mut before } else { &mut over }) += 1;
            if let Ok(done) = done {
                done.unwrap();
                break;
            }
        }
        assert!(before > 1 && over > 1, "{before} kills before, {over} after");
    }
}
