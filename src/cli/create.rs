//! `vublk create`: makes a new image.

use std::path::PathBuf;

use clap::Args;

use crate::cli::options::{is_help, options_help, parse_options, take_option};
use crate::cli::size::parse_size;
use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, CreateRequest, ImageFormat};

/// Create an image; an existing file that nobody uses is overwritten
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Format of the new image
    #[arg(short = 'f', long = "format", value_name = "FORMAT", default_value = "raw")]
    format: ImageFormat,
    /// Options of the format, key=value,key=value; -o help lists them
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Backing file, as it is to be named in the new image (relative to the image's directory)
    #[arg(short = 'b', long = "backing", value_name = "FILE")]
    backing: Option<String>,
    /// Format of the backing file
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT", requires = "backing")]
    backing_format: Option<ImageFormat>,
    /// Do not look at the backing file; a size must be given then
    #[arg(short = 'u', long = "backing-unsafe")]
    backing_unsafe: bool,
    /// Allow the backing file to pull in files from below DIR; its own directory is always allowed
    #[arg(long = "allow-dir", value_name = "DIR")]
    allow_dirs: Vec<PathBuf>,
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The new image
    #[arg(value_name = "FILE", required_unless_present = "options")]
    file: Option<PathBuf>,
    /// Size of the disk (K, M, G, T, P, E multiply by powers of 1024); that of the backing file if
    /// not given
    size: Option<String>,
}

pub fn run(args: &CreateArgs) -> Result<u8> {
    if is_help(&args.options) {
        output::print(&options_help(args.format, |_| true))?;
        return Ok(DONE);
    }
    let path = args.file.clone().ok_or_else(|| Error::invalid("which file is to be created?"))?;
    let mut options = parse_options(&args.options)?;
    let size = match (&args.size, take_option(&mut options, "size")) {
        (Some(_), Some(_)) => {
            return Err(Error::invalid(
                "the size is given twice, as an argument and with -o size=",
            ));
        }
        (Some(text), None) => Some(parse_size(text)?),
        (None, Some(text)) => Some(parse_size(&text).context(|| "-o size")?),
        (None, None) => None,
    };
    let created = images::create(&CreateRequest {
        path: path.clone(),
        format: args.format,
        size,
        options,
        backing: args.backing.clone(),
        backing_format: args.backing_format,
        backing_unchecked: args.backing_unsafe,
        allow_dirs: args.allow_dirs.clone(),
    })?;
    if !args.quiet {
        let options: Vec<_> = created.options.iter().map(|(k, v)| format!(" {k}={v}")).collect();
        let line =
            format!("Formatting '{}', fmt={}{}\n", path.display(), args.format, options.concat());
        output::print(&line)?;
    }
    Ok(DONE)
}
