//! `vublk reset`: makes an overlay read as its backing file again.

use std::path::PathBuf;

use clap::Args;

use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, ImageFormat, OpenRequest, frozen};
use crate::io::block_on;

/// Forget all that was written to an overlay: it reads as its backing file again
#[derive(Debug, Args)]
pub struct ResetArgs {
    /// Format of the overlay; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// Allow images to pull in files from below DIR; their own directory is always allowed
    #[arg(long = "allow-dir", value_name = "DIR")]
    allow_dirs: Vec<PathBuf>,
    /// Give the space of what was written back to the host, too, instead of keeping it for what
    /// will be written; takes as long as the host needs for that
    #[arg(long)]
    discard: bool,
    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The overlay
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub fn run(args: &ResetArgs) -> Result<u8> {
    let request = OpenRequest::write(&args.file).format(args.format).allow_dirs(&args.allow_dirs);
    let image = images::open(&request)?;
    if image.format != ImageFormat::AddCow {
        return Err(Error::unsupported(format!(
            "{}: is {}, and only add-cow images can be reset; make a new overlay of its backing file \
             instead (vublk create -b)",
            image.name(),
            image.format
        )));
    }
    // Whoever stands on it would lose what it shows of it.
    frozen::check_not_frozen(&image.file, &args.allow_dirs)?;
    block_on(async {
        image.node.driver().make_empty(args.discard).await?;
        image.node.close().await
    })
    .context(|| format!("resetting {}", image.name()))?;
    if !args.quiet {
        output::print("Image reset.\n")?;
    }
    Ok(DONE)
}
