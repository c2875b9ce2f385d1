//! `vublk commit`: pushes what an overlay holds down into a layer below it.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::block::open_gate::directory_of;
use crate::block::{Gate, Graph, Node};
use crate::cli::progress::{Progress, ProgressArgs};
use crate::cli::{DONE, output};
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, CacheMode, ImageFormat, Layers, OpenRequest, StateDir, frozen};
use crate::io::{File, block_on};
use crate::jobs::layer_copy::{Copier, CopyDown};
use crate::jobs::{chain, commit};
use crate::units::ByteRange;

/// Write what an overlay holds to the image below it
#[derive(Debug, Args)]
pub struct CommitArgs {
    /// Format of the overlay; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    format: Option<ImageFormat>,
    /// How the images are cached: writeback, none, or unsafe (no flush)
    #[arg(
        short = 't',
        long = "cache",
        value_name = "MODE",
        default_value_t,
        hide_possible_values = true
    )]
    cache: CacheMode,
    /// The layer to write to, as `info --backing-chain` names it, or the image above it; the one right
    /// below if not given.
    /// The overlay is not emptied then
    #[arg(short = 'b', long = "base", value_name = "BASE")]
    base: Option<PathBuf>,
    /// Do not empty the overlay afterwards: it is to be removed. If a live snapshot made it, the disk goes
    /// on in the base
    #[arg(short = 'd', long = "drop")]
    keep: bool,
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

pub fn run(args: &CommitArgs) -> Result<u8> {
    let request = OpenRequest::write(&args.file)
        .format(args.format)
        .cache(args.cache)
        .allow_dirs(&args.allow_dirs);
    let image = images::open(&request)?;
    let (top, name) = (image.node.clone(), image.name().to_string());
    if top.backing().is_none() {
        return Err(without_backing(&name));
    }
    let empties = !args.keep && args.base.is_none();
    if empties && image.format != ImageFormat::AddCow {
        return Err(Error::unsupported(format!(
            "{name}: {} images are not emptied here; say -d to leave it as it is",
            image.format
        )));
    }
    let mut layers = Layers::new(Graph::new(), args.allow_dirs.clone(), StateDir::None);
    layers.add_format(image, None, true)?;
    let base = find_base(&layers, &top, args.base.as_deref(), &name)?;
    // Nobody else uses these nodes.
    let quiesced = Gate::new().quiesce();
    let nodes = chain::between(&top, Some(&base)).unwrap_or_default();
    commit::check_is_ours(&layers, &nodes).context(|| format!("committing {name}"))?;
    let commit = |layers: &mut Layers| -> Result<()> {
        chain::open_base(layers, &nodes, &quiesced)?;
        block_on(async {
            copy(args, &top, &base).await?;
            base.flush().await
        })?;
        chain::follow(layers, &nodes, false, &quiesced)?;
        if args.keep {
            leave(layers, &nodes);
        }
        Ok(())
    };
    let base_name = layers.file_of(&base).map_or("its base".into(), |file| file.name().to_string());
    commit(&mut layers)
        .context(|| format!("committing {name} (which is as it was) to {base_name}"))?;
    if empties {
        block_on(top.driver().make_empty(true))
            .context(|| format!("{name}: has been committed to {base_name}, but not emptied"))?;
    }
    layers.close_all()?;
    if !args.quiet {
        output::print("Image committed.\n")?;
    }
    Ok(DONE)
}

/// Has the disk go on in the base, if a snapshot had frozen that below one of the layers that it holds
/// now, for the overlay is to be removed: as after a commit while the disk is served.
fn leave(layers: &Layers, nodes: &[Node]) {
    let files: Vec<_> = nodes.iter().filter_map(|node| layers.file_of(node)).collect();
    let [top, .., base] = files[..] else { return };
    if files.iter().any(|overlay| frozen::is_frozen_below(base, overlay.path())) {
        frozen::move_down(top, base);
    }
}

async fn copy(args: &CommitArgs, top: &Node, base: &Node) -> Result<()> {
    let progress = Progress::new(args.progress, "committing", top.size());
    let copy = CopyDown::new(top, base);
    let mut offset = 0;
    while offset < top.size() {
        let step = copy.step(ByteRange::between(offset, top.size())).await?;
        offset += step.done;
        progress.advance(step.done);
    }
    progress.finish();
    Ok(())
}

fn without_backing(name: &str) -> Error {
    Error::invalid(format!("{name}: Image does not have a backing file"))
}

/// The layer that is written to.
fn find_base(layers: &Layers, top: &Node, named: Option<&Path>, name: &str) -> Result<Node> {
    let chain: Vec<Node> = std::iter::successors(top.backing(), Node::backing).collect();
    let Some(named) = named else {
        return chain.first().cloned().ok_or_else(|| without_backing(name));
    };
    let at = |path: &Path| layers.find_in_chain(chain.first()?, path);
    // As it is called from here, or else by the image above it.
    let by_image = |above: &Node| at(&directory_of(layers.file_of(above)?.path()).join(named));
    let found = at(named).or_else(|| std::iter::once(top).chain(&chain).find_map(by_image));
    found.ok_or_else(|| {
        Error::invalid(format!(
            "{name}: Did not find '{}' in the backing chain of '{name}'",
            named.display()
        ))
    })
}
