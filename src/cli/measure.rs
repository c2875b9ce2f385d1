//! `vublk measure`: how much space an image would take.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::block::{Node, StatusKind};
use crate::cli::options::{Output, ReadArgs, is_help, options_help, parse_options, take_option};
use crate::cli::size::parse_size;
use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::formats::addcow::layout::file_len;
use crate::formats::qcow2::{self, CreateOptions};
use crate::formats::vhdx;
use crate::images::{self, ImageFormat};
use crate::io::block_on;
use crate::units::{ByteRange, SECTOR_SIZE, align_down};

/// Calculate how large a new image would be
#[derive(Debug, Args)]
pub struct MeasureArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", value_name = "FORMAT", default_value = "raw")]
    target_format: ImageFormat,
    /// Options of the target's format that matter for its size, key=value,key=value; -o help lists them
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Calculate for an empty disk of this size
    #[arg(short, long, value_name = "SIZE", conflicts_with = "file")]
    size: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Calculate for this image's content
    #[arg(value_name = "FILE", required_unless_present_any = ["size", "options"])]
    file: Option<PathBuf>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    /// Bytes that the file will have.
    required: u64,
    /// Bytes that it may grow to.
    fully_allocated: u64,
}

pub fn run(args: &MeasureArgs) -> Result<u8> {
    let format = args.target_format;
    if is_help(&args.options) {
        output::print(&options_help(format, |name| matters(format, name)))?;
        return Ok(DONE);
    }
    let mut options = parse_options(&args.options)?;
    if let Some((name, _)) = options.iter().find(|(name, _)| !matters(format, name)) {
        return Err(Error::invalid(format!(
            "option '{name}' does not change the size of {format} images"
        )));
    }
    let is_vhdx = format == ImageFormat::Vhdx;
    let of_vhdx = if is_vhdx { std::mem::take(&mut options) } else { Vec::new() };
    let cluster_size = take_option(&mut options, "cluster_size");
    let refcount_bits = take_option(&mut options, "refcount_bits");
    let image = match &args.file {
        Some(file) => Some(images::open(&args.read.request(file))?),
        None => None,
    };
    let size = match (&args.size, &image) {
        (Some(text), _) => parse_size(text)?,
        (None, Some(image)) => image.node.size(),
        (None, None) => return Err(Error::invalid("give a FILE or --size SIZE")),
    };
    images::create::check_size(size)?;
    let measured = match format {
        // What is made has whole sectors.
        ImageFormat::Raw => {
            let size = size.next_multiple_of(SECTOR_SIZE);
            Measured { required: size, fully_allocated: size }
        }
        ImageFormat::Qcow2 => {
            let mut options = CreateOptions::new(size);
            if let Some(text) = cluster_size {
                options.cluster_size = parse_size(&text).context(|| "-o cluster_size")?;
            }
            if let Some(text) = refcount_bits {
                options.refcount_bits = text
                    .parse()
                    .map_err(|_| Error::invalid(format!("-o refcount_bits: '{text}'")))?;
            }
            let fully_allocated = qcow2::measure::fully_allocated(&options)?;
            let all = size.next_multiple_of(options.cluster_size);
            let data = match &image {
                Some(image) => block_on(data_clusters(&image.node, options.cluster_size))
                    .context(|| format!("{}: finding out what is allocated", image.name()))?,
                None => 0,
            };
            Measured { required: fully_allocated - all + data, fully_allocated }
        }
        ImageFormat::Vhdx => {
            let options = images::create::vhdx::options_of(size, &of_vhdx, None, None)?;
            let measured = vhdx::create::measure(&options)?;
            let data = match &image {
                Some(image) if !options.is_fixed => {
                    block_on(data_clusters(&image.node, options.block_size))
                        .context(|| format!("{}: finding out what is allocated", image.name()))?
                }
                _ => 0,
            };
            Measured { required: measured.empty + data, fully_allocated: measured.full }
        }
        // Both files: the bitmap, and the image file with a hole where nothing was written.
        ImageFormat::AddCow => {
            let all = size.next_multiple_of(SECTOR_SIZE);
            let metadata = file_len(all);
            let data = match &image {
                Some(image) => block_on(data_clusters(&image.node, SECTOR_SIZE))
                    .context(|| format!("{}: finding out what is allocated", image.name()))?,
                None => 0,
            };
            Measured { required: metadata + data, fully_allocated: metadata + all }
        }
        other => {
            return Err(Error::unsupported(format!("{other} images cannot be measured here")));
        }
    };
    match args.output {
        Output::Json => output::print_json(&measured)?,
        Output::Human => output::print(&format!(
            "required size: {}\nfully allocated size: {}\n",
            measured.required, measured.fully_allocated
        ))?,
    }
    Ok(DONE)
}

/// Whether an option may be given, because it can change the size.
fn matters(format: ImageFormat, name: &str) -> bool {
    match format {
        ImageFormat::Qcow2 => matches!(name, "cluster_size" | "refcount_bits"),
        ImageFormat::Vhdx => !matches!(name, "size" | "backing_file" | "backing_fmt"),
        _ => false,
    }
}

/// How many bytes of clusters hold some data of a disk.
async fn data_clusters(node: &Node, cluster_size: u64) -> Result<u64> {
    let (mut data, mut offset) = (0, 0);
    while offset < node.size() {
        let status = node.block_status_deep(ByteRange::between(offset, node.size())).await?;
        offset = status.range.end();
        if status.kind == StatusKind::Data {
            // All of the cluster that it ends in goes with it.
            offset = offset.next_multiple_of(cluster_size);
            data += offset - align_down(status.range.offset, cluster_size);
        }
    }
    Ok(data)
}
