//! `vublk measure`: how much space an image would take.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::cli::options::{Output, ReadArgs};
use crate::cli::size::parse_size;
use crate::cli::{DONE, output};
use crate::error::{Error, Result};
use crate::formats::{self, ImageFormat};

/// Calculate how large a new image would be
#[derive(Debug, Args)]
pub struct MeasureArgs {
    #[command(flatten)]
    read: ReadArgs,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", value_name = "FORMAT", default_value = "raw")]
    target_format: ImageFormat,
    /// Calculate for an empty disk of this size
    #[arg(short, long, value_name = "SIZE", conflicts_with = "file")]
    size: Option<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Calculate for this image's content
    #[arg(value_name = "FILE", required_unless_present = "size")]
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
    let size = match (&args.size, &args.file) {
        (Some(text), _) => parse_size(text)?,
        (None, Some(file)) => formats::open(&args.read.request(file))?.node.size(),
        (None, None) => return Err(Error::invalid("give a FILE or --size SIZE")),
    };
    let measured = match args.target_format {
        ImageFormat::Raw => Measured { required: size, fully_allocated: size },
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
