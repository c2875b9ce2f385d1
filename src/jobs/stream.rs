//! `block-stream`: fills a layer from those below it, while the guest goes on, so that it needs them no
//! more.
//!
//! ```text
//! guest ──► top ──► mid ──► base          what mid holds is copied up into top
//! guest ──► top ──────────► base          then top stands on base; without a base it stands alone
//! ```
//!
//! What is copied into is what the guest writes to: each piece is copied while the guest cannot
//! write to it, and what the guest has written stays ([`Intercept`]).
//!
//! An add-cow layer that needs nothing below it any more is dropped with its backing: the raw file
//! that has its data is the disk ([`Layers::stand_alone`]).
//!
//! # Crashes
//!
//! Copies show nothing new, so until the end whoever opens the chain reads the same. At the end the
//! top is flushed, with all that was copied; then its header names what it stands on from now on;
//! then the graph follows. Either name shows the same disk. The marks that snapshots have left on layers
//! below the top ([`frozen`]) change after its header, and have a note before it: so whoever finds them
//! when the process was killed in between knows what they should be.

use std::sync::{Arc, Mutex};

use super::layer_copy::FillUp;
use super::marks::{Joins, Marks, Others};
use super::pace::Pace;
use super::{Body, Context, Ending, JobKind, Jobs, OnError, Spec, chain};
use crate::block::{Node, Quiesced, Root};
use crate::error::Result;
use crate::filters::Intercept;
use crate::images::{Access, ImageFormat, Layers, frozen};
use crate::io::{Fut, HostFile, block_on};
use crate::units::ByteRange;

/// What to stream.
#[derive(Debug)]
pub struct StreamRequest {
    /// The layer that is filled.
    pub top: Node,
    /// The layer that it stands on in the end; `None` if on nothing.
    pub base: Option<Node>,
    /// How the top is to name the base; its path if absent.
    pub backing_file: Option<String>,
    /// What happens when a read or write fails.
    pub on_error: OnError,
    /// The name of the node by which the job is to be seen.
    pub filter_name: Option<String>,
}

/// The job.
struct Stream {
    top: Node,
    base: Option<Node>,
    root: Root,
    on_error: OnError,
    backing_file: Option<String>,
    /// What the top was opened for before.
    top_access: Access,
    /// Whether the top is an add-cow layer that is to be dropped.
    drops_top: bool,
    /// In front of the top, as long as it is there.
    intercept: Mutex<Option<Arc<Intercept>>>,
}

/// Starts a stream. `spec` says what is not special about it.
///
/// # Errors
/// If a node is in use by somebody who is in the way, the top cannot be written, or it cannot be
/// made to name the base. Everything is as it was then.
pub fn start(jobs: &Jobs, layers: &mut Layers, request: StreamRequest, spec: Spec) -> Result<()> {
    let StreamRequest { top, base, backing_file, on_error, filter_name } = request;
    let graph = Arc::clone(layers.graph());
    let nodes = chain::between(&top, base.as_ref()).unwrap_or_default();
    let mut holds = chain::hold(JobKind::Stream, &nodes, &[])?;
    jobs.check_id(&spec.id)?;
    nodes.iter().try_for_each(Node::check_guest_is_back)?;
    let image = chain::image_of(layers, &top)?;
    if top.backing().is_some() {
        let name = match (&base, &backing_file) {
            (Some(_), Some(name)) => Some(name.clone()),
            (Some(base), None) => Some(chain::name_of(layers, base)?),
            (None, _) => None,
        };
        chain::check_renaming(layers, &top, name.as_deref().zip(base.as_ref()))?;
        if let (Some(base), Some(name)) = (&base, &backing_file) {
            chain::check_leads_to(layers, &top, name, base)?;
        }
    }
    let root = Root::new(format!("job '{}'", spec.id), top.clone());
    graph.add_root(&root)?;
    let shown = chain::show(layers, JobKind::Stream, "copy-on-read", filter_name, &top);
    let quiesced = graph.quiesce(std::slice::from_ref(&top));
    let opened = shown.and_then(|shown| {
        holds.extend(shown);
        layers.set_access(&top, Access::Write, &quiesced)
    });
    let intercept = opened.is_ok().then(|| chain::intercept(&top, &quiesced));
    graph.resume(quiesced);
    if let Err(err) = opened {
        graph.remove_root(&root);
        drop(holds);
        layers.collect();
        return Err(err);
    }
    let body = Stream {
        drops_top: base.is_none() && image.format == ImageFormat::AddCow,
        top,
        base,
        root: root.clone(),
        on_error,
        backing_file,
        top_access: image.access,
        intercept: Mutex::new(intercept),
    };
    jobs.start(Spec { roots: vec![root], holds, ..spec }, body)
}

impl Stream {
    /// Takes the filter away, if it is there.
    fn release(&self, quiesced: &Quiesced) {
        if let Some(intercept) = self.intercept.lock().unwrap().take() {
            chain::release(&self.top, &intercept, quiesced);
        }
    }

    fn restore_access(&self, layers: &mut Layers, quiesced: &Quiesced) {
        if let Err(err) = layers.set_access(&self.top, self.top_access, quiesced) {
            tracing::error!("node '{}' is not opened as it was before: {err}", self.top.name());
        }
    }

    /// Has the top's header name what it stands on from now on. What was copied is durable.
    fn rename(&self, layers: &mut Layers) -> Result<()> {
        let (name, format) = match &self.base {
            None => (None, None),
            Some(base) => {
                let name = match &self.backing_file {
                    Some(name) => name.clone(),
                    None => chain::name_of(layers, base)?,
                };
                (Some(name), Some(chain::image_of(layers, base)?.format))
            }
        };
        chain::rename_backing(layers, &self.top, name.as_deref(), format)
    }

    /// The files of the layers that the top stands on, down to the base.
    fn files_below(&self, layers: &Layers) -> Vec<Arc<HostFile>> {
        let nodes = chain::between(&self.top, self.base.as_ref()).unwrap_or_default();
        let images = nodes.iter().skip(1).filter_map(|node| layers.of(node));
        images.map(|layer| Arc::clone(&layer.image.file)).collect()
    }

    /// The marks of snapshots that change once the top stands on the base. A dropped layer that another
    /// one stands on keeps its mark: that one needs it. The last dropped one needs the base.
    fn marks(&self, layers: &Layers, top: &HostFile) -> Marks {
        let below = self.files_below(layers);
        let (base, dropped) = match (&self.base, below.split_last()) {
            (Some(_), Some((base, dropped))) => (Some(base), dropped),
            _ => (None, &below[..]),
        };
        let (Some(first), Some(last)) = (dropped.first(), dropped.last()) else {
            return Marks::default();
        };
        let base = base.filter(|file| frozen::is_frozen_below(file, last.path())).cloned();
        Marks {
            overlays: vec![top.path().into()],
            leaves: Some(first).filter(|file| frozen::is_frozen_below(file, top.path())).cloned(),
            is_live: true,
            joins: base.map(|file| Joins { file, others: Others::Left(last.path().into()) }),
        }
    }

    /// Puts the top on the base. Guests wait.
    fn swap(&self, layers: &mut Layers, quiesced: &Quiesced) -> Result<()> {
        let graph = Arc::clone(layers.graph());
        self.release(quiesced);
        graph.set_backing(&self.top, self.base.as_ref(), quiesced)?;
        if self.drops_top {
            block_on(self.top.flush())?;
            if let Err(err) = layers.stand_alone(&self.top, quiesced) {
                // It is a good image as it is.
                tracing::warn!("'{}' stays an add-cow image: {err}", self.top.name());
            }
        }
        self.restore_access(layers, quiesced);
        Ok(())
    }
}

impl Body for Stream {
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()> {
        Box::pin(async move {
            let Some(intercept) = self.intercept.lock().unwrap().clone() else { return Ok(()) };
            let fill = FillUp::new(&intercept, self.base.clone(), self.drops_top);
            let pace = Pace::new(context, self.on_error);
            context.set_total(self.top.size());
            pace.copy(&fill, ByteRange { offset: 0, len: self.top.size() }).await?;
            pace.finish()?;
            let _turn = context.turn().await;
            self.top.flush().await
        })
    }

    fn finalize(&self, _: Ending, layers: &mut Layers) -> Result<()> {
        let graph = Arc::clone(layers.graph());
        let top = chain::image_of(layers, &self.top)?.file;
        let marks = self.marks(layers, &top);
        let old = match self.top.backing() {
            Some(below) => {
                block_on(self.top.flush())?;
                let name = chain::name_of(layers, &below)?;
                let format = chain::image_of(layers, &below)?.format;
                Some((name, format))
            }
            None => None,
        };
        let announced = marks.announce();
        if old.is_some() {
            self.rename(layers).inspect_err(|_| announced.keep())?;
        }
        let quiesced = graph.quiesce(std::slice::from_ref(&self.top));
        let swapped = match old.is_some() || self.drops_top {
            true => self.swap(layers, &quiesced),
            false => Ok(()),
        };
        self.release(&quiesced);
        let pause = graph.resume(quiesced);
        if let Err(err) = swapped {
            if let Some((name, format)) = old {
                let back = chain::rename_backing(layers, &self.top, Some(&name), Some(format));
                match back {
                    Ok(()) => announced.keep(),
                    Err(err) => tracing::error!(
                        "'{}' names its new backing already: {err}",
                        self.top.name()
                    ),
                }
            }
            return Err(err);
        }
        announced.renew();
        tracing::info!(
            "the stream to '{}' has ended; guests paused for {} us",
            self.top.name(),
            pause.as_micros()
        );
        graph.remove_root(&self.root);
        Ok(())
    }

    fn abort(&self, layers: &mut Layers) {
        let graph = Arc::clone(layers.graph());
        let quiesced = graph.quiesce(std::slice::from_ref(&self.top));
        self.release(&quiesced);
        self.restore_access(layers, &quiesced);
        graph.resume(quiesced);
        graph.remove_root(&self.root);
    }

    fn concluded(&self, layers: &mut Layers) {
        layers.collect();
    }
}
