//! `vublk resize`: changes the size of a disk.

use std::path::PathBuf;

use clap::Args;

use crate::block::Gate;
use crate::cli::size::SizeChange;
use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::images::resize::Offline;
use crate::images::{self, ImageFormat, OpenRequest, frozen};
use crate::io::block_on;

/// Change the size of a disk that nobody uses
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Format of the image; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// Allow the disk to become smaller, which loses what lies beyond the new end
    #[arg(long)]
    shrink: bool,
    /// Allow images to pull in files from below DIR; their own directory is always allowed
    #[arg(long = "allow-dir", value_name = "DIR")]
    allow_dirs: Vec<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The new size, or with + or - by how much to grow or shrink (K, M, G, T, P, E multiply by
    /// powers of 1024)
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: SizeChange,
}

pub fn run(args: &ResizeArgs) -> Result<u8> {
    let request = OpenRequest::write(&args.file).format(args.format).allow_dirs(&args.allow_dirs);
    let new = match Offline::open(&request)? {
        Some(image) => {
            let new = wanted(args, image.name(), image.size)?;
            image.resize(new)?;
            tracing::warn!(
                "{}: images that stand on it, if there are any, refuse it from now on",
                image.name()
            );
            new
        }
        None => resize_node(args, &request)?,
    };
    if new % 512 != 0 {
        tracing::warn!(
            "{}: {new} bytes are not a multiple of 512; a guest cannot use it so",
            args.file.display()
        );
    }
    if !args.quiet {
        output::print("Image resized.\n")?;
    }
    Ok(DONE)
}

/// The size that is asked for.
fn wanted(args: &ResizeArgs, name: &str, old: u64) -> Result<u64> {
    let new = args.size.apply(old).context(|| name.to_string())?;
    images::create::check_size(new).context(|| name.to_string())?;
    if new < old && !args.shrink {
        return Err(Error::invalid(format!(
            "{name}: {new} bytes are less than the {old} it has, and what lies beyond would be \
             lost; use --shrink if that is meant"
        )));
    }
    if new == 0 {
        return Err(Error::invalid(format!("{name}: a disk needs at least one block")));
    }
    Ok(new)
}

/// Resizes an image through its node, and returns the new size.
fn resize_node(args: &ResizeArgs, request: &OpenRequest) -> Result<u64> {
    let image = images::open(request)?;
    let name = image.name();
    frozen::check_not_frozen(&image.file, &request.allow_dirs)?;
    let new = wanted(args, name, image.node.size())?;
    block_on(async {
        // Nobody else uses this node.
        let quiesced = Gate::new().quiesce();
        image.node.resize(new, &quiesced).await?;
        image.node.flush().await?;
        image.node.close().await
    })
    .context(|| format!("{name}: resizing it to {new} bytes"))?;
    Ok(new)
}
