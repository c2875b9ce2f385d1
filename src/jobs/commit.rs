//! `block-commit`: pushes what layers hold down into a base, while the guest goes on.
//!
//! ```text
//! a layer below the top            over ──► top ──► mid ──► base
//!   copy what top and mid hold     └──────────── then ──────┘
//!
//! the active layer                 guest ──► top ──► mid ──► base       the guest writes to top
//!   copy what top and mid hold, and again what was written meanwhile; ready;
//!   told to complete:              guest ──────────────────► base
//! ```
//!
//! # Crashes
//!
//! The base is changed only where a layer above it hides it, so until the very end whoever opens the
//! chain reads the same as before, whatever was copied. A layer that knows the base by something that
//! changes with its content knows what it will be, too, before anything is changed ([`chain::follow`]).
//!
//! * **Below the top**: the base is flushed; then the overlay's header names it instead of the top, at
//!   one instant; then the graph follows. Either name shows the same disk. Marks of snapshots follow the
//!   header, with a note before it, as in a stream ([`super::stream`]).
//! * **The active layer**: at the barrier, with all copied, the base is flushed and the guest's
//!   session goes on there. The base loses the mark that a snapshot left on it, then the old top
//!   gets one that says where the disk went ([`frozen`]), and only then guests go on. Killed
//!   before, both images show the same disk; killed after, the old one is not served.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::layer_copy::{CopyDown, Held, copy_all, held_above};
use super::marks::{Joins, Marks, Others};
use super::pace::{Pace, REST};
use super::{Body, Context, Ending, JobKind, Jobs, OnError, Operation, Spec, chain};
use crate::block::graph::Parent;
use crate::block::{Graph, Node, Quiesced, Root};
use crate::error::{Error, Result};
use crate::filters::Intercept;
use crate::images::{Access, Layers, frozen};
use crate::io::{Fut, block_on, clock};
use crate::units::ByteRange;

/// What to commit.
#[derive(Debug)]
pub struct CommitRequest {
    /// The topmost layer that is committed.
    pub top: Node,
    /// The layer that gets the content.
    pub base: Node,
    /// Whether the top is where the guest writes.
    pub is_active: bool,
    /// How overlays of the top are to name the base; its path if absent.
    pub backing_file: Option<String>,
    /// What happens when a read or write fails.
    pub on_error: OnError,
    /// The name of the node by which the job is to be seen.
    pub filter_name: Option<String>,
}

/// The job.
struct Commit {
    top: Node,
    base: Node,
    root: Root,
    on_error: OnError,
    backing_file: Option<String>,
    /// How much of the base is seen once the layers above it are gone, in bytes.
    seen: u64,
    /// What the base was opened for before.
    base_access: Access,
    /// In front of the top, as long as it is there; `None` for a layer below the top.
    intercept: Mutex<Option<Arc<Intercept>>>,
}

/// Starts a commit. `spec` says what is not special about it.
///
/// # Errors
/// If a node is in use by somebody who is in the way, the base cannot be written, or an overlay
/// cannot be made to name the base. Everything is as it was then.
pub fn start(jobs: &Jobs, layers: &mut Layers, request: CommitRequest, spec: Spec) -> Result<()> {
    let CommitRequest { top, base, is_active, backing_file, on_error, filter_name } = request;
    let graph = Arc::clone(layers.graph());
    let nodes =
        chain::between(&top, Some(&base)).filter(|nodes| nodes.len() > 1).ok_or_else(|| {
            Error::invalid(format!("'{}' is not below '{}'", base.name(), top.name()))
        })?;
    let overlays = if is_active { Vec::new() } else { overlays_of(&graph, &top) };
    let steady: Vec<_> = overlays.iter().chain([&top]).cloned().collect();
    let mut holds = chain::hold(JobKind::Commit, &steady, &nodes[1..])?;
    jobs.check_id(&spec.id)?;
    nodes.iter().try_for_each(Node::check_guest_is_back)?;
    chain::check_alone(&graph, &nodes)?;
    check_is_ours(layers, &nodes)?;
    if is_active {
        graph.check_unit(&top, base.name(), base.limits().request_alignment)?;
    }
    let name = chain::name_of(layers, &base)?;
    for overlay in &overlays {
        let name = backing_file.as_deref().unwrap_or(&name);
        chain::check_renaming(layers, overlay, Some((name, &base)))?;
        chain::check_leads_to(layers, overlay, name, &base)?;
    }
    let image = chain::image_of(layers, &base)?;
    let base_access = image.access;
    let root = Root::new(format!("job '{}'", spec.id), top.clone());
    graph.add_root(&root)?;
    let driver = if is_active { "mirror_top" } else { "commit_top" };
    let shown = chain::show(layers, JobKind::Commit, driver, filter_name, &top);
    let quiesced = graph.quiesce(std::slice::from_ref(&base));
    let prepared = shown.and_then(|shown| {
        holds.extend(shown);
        chain::open_base(layers, &nodes, &quiesced)
    });
    let intercept = match &prepared {
        Ok(()) if is_active => Some(chain::intercept(&top, &quiesced)),
        Ok(()) => None,
        Err(_) => {
            restore_access(layers, &base, base_access, &quiesced);
            None
        }
    };
    graph.resume(quiesced);
    if let Err(err) = prepared {
        graph.remove_root(&root);
        drop(holds);
        layers.collect();
        return Err(err);
    }
    // Behind the end of the top its overlays read zeros, and must go on to.
    let seen = overlays.iter().map(Node::size).max().unwrap_or(0).min(base.size());
    let seen = seen.max(top.size());
    let intercept = Mutex::new(intercept);
    let spec = Spec { roots: vec![root.clone()], holds, ..spec };
    let body = Commit { top, base, root, on_error, backing_file, seen, base_access, intercept };
    jobs.start(spec, body)
}

/// Refuses a base that a snapshot has frozen below another disk than this one: what is written to it would
/// show there.
///
/// # Errors
/// Says which one, and what to do.
pub fn check_is_ours(layers: &Layers, nodes: &[Node]) -> Result<()> {
    let files: Vec<_> = nodes.iter().filter_map(|node| layers.file_of(node)).collect();
    let Some((base, overlays)) = files.split_last() else { return Ok(()) };
    let overlays: Vec<_> = overlays.iter().map(|overlay| overlay.path()).collect();
    frozen::check_only_below(base, &overlays, layers.allow_dirs())
}

fn restore_access(layers: &mut Layers, node: &Node, access: Access, quiesced: &Quiesced) {
    if let Err(err) = layers.set_access(node, access, quiesced) {
        tracing::error!("node '{}' is not opened as it was before: {err}", node.name());
    }
}

/// The images that stand on a node, or on filters before it.
fn overlays_of(graph: &Graph, node: &Node) -> Vec<Node> {
    let overlays = |parent| match parent {
        Parent::Node(node, "backing") => vec![node],
        Parent::Node(node, _) if node.driver().is_filter() => overlays_of(graph, &node),
        _ => Vec::new(),
    };
    graph.parents(node).into_iter().flat_map(overlays).collect()
}

impl Commit {
    fn intercept(&self) -> Option<Arc<Intercept>> {
        self.intercept.lock().unwrap().clone()
    }

    /// A layer that nobody writes to: from end to end, once.
    async fn run_below(&self, context: &Context) -> Result<()> {
        let copy = CopyDown::new(&self.top, &self.base);
        let pace = Pace::new(context, self.on_error);
        context.set_total(self.seen);
        pace.copy(&copy, ByteRange { offset: 0, len: self.seen }).await?;
        pace.copy_left_out(&copy).await?;
        let _turn = context.turn().await;
        self.base.flush().await
    }

    /// The layer that the guest writes to.
    async fn run_active(&self, context: &Context, intercept: &Intercept) -> Result<()> {
        let copy = CopyDown::new(&self.top, &self.base);
        let pace = Pace::new(context, self.on_error);
        let map = intercept.dirty();
        self.mark_held(context, intercept).await?;
        let mut done = 0;
        while !pace.copy_dirty(&copy, map, &mut done).await? {
            clock::sleep(REST).await;
        }
        context.ready();
        while context.ending().is_none() {
            pace.copy_dirty(&copy, map, &mut done).await?;
            context.rest(REST).await;
        }
        // The guest cannot get ahead any more.
        intercept.mirror_to(self.base.clone());
        let copy = CopyDown::beside(intercept, &self.top, &self.base);
        while !map.is_clean() {
            if !pace.copy_dirty(&copy, map, &mut done).await? {
                clock::sleep(REST).await;
            }
        }
        // So that little is left to be flushed while the guest waits.
        let _turn = context.turn().await;
        self.base.flush().await
    }

    /// Marks what is held above the base.
    async fn mark_held(&self, context: &Context, intercept: &Intercept) -> Result<()> {
        let mut at = ByteRange { offset: 0, len: self.top.size() };
        while !at.is_empty() {
            let _turn = context.turn().await;
            let looked = held_above(&self.top, Some(&self.base), at).await;
            let (run, held) = match looked {
                Ok(found) => found,
                // The copy will meet it again, and do what the operator wants.
                Err(err) => {
                    let _ = context.on_error(OnError::Ignore, Operation::Read, &err);
                    (at, Held::Data)
                }
            };
            if held != Held::Nothing {
                intercept.dirty().mark(run);
                context.set_total(intercept.dirty().bytes());
            }
            at = ByteRange::between(run.end(), at.end());
        }
        Ok(())
    }

    /// The guest goes over to the base.
    fn pivot(&self, layers: &mut Layers, quiesced: &Quiesced) -> Result<()> {
        let graph = Arc::clone(layers.graph());
        let (top, base) =
            (chain::image_of(layers, &self.top)?, chain::image_of(layers, &self.base)?);
        graph.replace(&self.top, &self.base, quiesced)?;
        frozen::move_down(&top.file, &base.file);
        restore_access(layers, &self.top, Access::Read, quiesced);
        Ok(())
    }

    /// The end of a commit of the active layer. Guests wait.
    fn finish_active(
        &self,
        ending: Ending,
        layers: &mut Layers,
        intercept: &Intercept,
        quiesced: &Quiesced,
    ) -> Result<()> {
        let copy = CopyDown::new(&self.top, &self.base);
        block_on(async {
            while let Some(mut taken) = intercept.dirty().take(0, u64::MAX) {
                copy_all(&copy, taken.range()).await?;
                taken.advance(taken.range().len);
            }
            self.base.flush().await
        })?;
        // Whoever opens the top knows the base by what it is now.
        let nodes = chain::between(&self.top, Some(&self.base)).unwrap_or_default();
        chain::follow(layers, &nodes, false, quiesced)?;
        match ending {
            Ending::Complete => {
                self.release(quiesced);
                self.pivot(layers, quiesced)
            }
            Ending::Stay => {
                self.release(quiesced);
                restore_access(layers, &self.base, self.base_access, quiesced);
                Ok(())
            }
        }
    }

    /// Takes the filter away, if it is there.
    fn release(&self, quiesced: &Quiesced) {
        if let Some(intercept) = self.intercept.lock().unwrap().take() {
            chain::release(&self.top, &intercept, quiesced);
        }
    }

    /// The end of a commit of a layer below the top.
    fn finish_below(&self, layers: &mut Layers) -> Result<()> {
        let graph = Arc::clone(layers.graph());
        block_on(self.base.flush())?;
        let overlays = overlays_of(&graph, &self.top);
        let base = chain::image_of(layers, &self.base)?;
        let top = chain::image_of(layers, &self.top)?;
        let top_name = chain::name_of(layers, &self.top)?;
        let name = match &self.backing_file {
            Some(name) => name.clone(),
            None => chain::name_of(layers, &self.base)?,
        };
        let paths = overlays.iter().map(|overlay| {
            chain::image_of(layers, overlay).map(|image| image.file.path().to_path_buf())
        });
        let paths: Vec<_> = paths.collect::<Result<_>>()?;
        let stands_on_top = |path: &PathBuf| frozen::is_frozen_below(&top.file, path);
        let marks = Marks {
            leaves: paths.iter().any(stands_on_top).then(|| Arc::clone(&top.file)),
            is_live: true,
            joins: Some(Joins { file: Arc::clone(&base.file), others: Others::Lost }),
            overlays: paths,
        };
        let announced = marks.announce();
        let mut renamed = Vec::new();
        let mut result = Ok(());
        for overlay in &overlays {
            result = chain::rename_backing(layers, overlay, Some(&name), Some(base.format));
            if result.is_err() {
                break;
            }
            renamed.push(overlay);
        }
        if result.is_ok() {
            let quiesced = graph.quiesce(&[self.top.clone(), self.base.clone()]);
            result = graph.replace(&self.top, &self.base, &quiesced);
            if result.is_ok() {
                restore_access(layers, &self.base, self.base_access, &quiesced);
                announced.renew();
            }
            graph.resume(quiesced);
        }
        if let Err(err) = result {
            let mut is_as_before = true;
            for overlay in renamed {
                let back =
                    chain::rename_backing(layers, overlay, Some(&top_name), Some(top.format));
                if let Err(err) = back {
                    is_as_before = false;
                    tracing::error!("'{}' names '{name}' already: {err}", overlay.name());
                }
            }
            if is_as_before {
                announced.keep();
            }
            return Err(err);
        }
        Ok(())
    }
}

impl Body for Commit {
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()> {
        Box::pin(async move {
            match self.intercept() {
                Some(intercept) => self.run_active(context, &intercept).await,
                None => self.run_below(context).await,
            }
        })
    }

    fn finalize(&self, ending: Ending, layers: &mut Layers) -> Result<()> {
        let graph = Arc::clone(layers.graph());
        match self.intercept() {
            None => self.finish_below(layers)?,
            Some(intercept) => {
                let quiesced = graph.quiesce(&[self.top.clone(), self.base.clone()]);
                let finished = self.finish_active(ending, layers, &intercept, &quiesced);
                let pause = graph.resume(quiesced);
                finished?;
                tracing::info!(
                    "the commit to '{}' has ended; guests paused for {} us",
                    self.base.name(),
                    pause.as_micros()
                );
            }
        }
        graph.remove_root(&self.root);
        Ok(())
    }

    fn abort(&self, layers: &mut Layers) {
        let graph = Arc::clone(layers.graph());
        let quiesced = graph.quiesce(&[self.top.clone(), self.base.clone()]);
        self.release(&quiesced);
        restore_access(layers, &self.base, self.base_access, &quiesced);
        graph.resume(quiesced);
        graph.remove_root(&self.root);
    }

    fn concluded(&self, layers: &mut Layers) {
        layers.collect();
    }
}
