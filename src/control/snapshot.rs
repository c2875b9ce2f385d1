//! Changes of several disks at one instant: `transaction`, and the commands that are a transaction of
//! one action.
//!
//! * `barrier`: actions are prepared, made, and done while guests wait, all or none.
//! * [`Snapshot`]: the action of the snapshot commands.
//! * `overlay`: what it puts on a disk, where that is made for it.
//!
//! # Order of a snapshot, for crashes
//!
//! 1. The overlay is complete and durable, header and directory entry, before it is used.
//! 2. The image that is frozen gets its mark (see [`crate::images::frozen`]), durable.
//! 3. At the barrier the overlay takes the image's place; the guest's session goes on there. Nothing
//!    is flushed while the guest waits. Instead the overlay *owes* a flush of what is below: until
//!    that has succeeded, a flush of the guest's flushes both ([`Node::owe_flush_of`]).
//! 4. What is frozen is flushed, while the guest goes on.
//!
//! Killed before 3, the disk is the image as it was, and the overlay is an empty file; the mark makes
//! the next process ask for the overlay, which shows the same content. Killed after it, completed
//! writes are in the overlay; those that were completed before and not flushed are in the page cache,
//! or in the keep of the image that is frozen: who opens it below its overlay redoes them
//! (`crate::images::open`).

mod barrier;
mod overlay;
mod renamed;

use std::path::PathBuf;
use std::sync::Arc;

use self::overlay::{Created, NewOverlay, SYNC};
use self::renamed::Renamed;
use crate::block::node::Hold;
use crate::block::{Graph, Node, Quiesced, Rights};
use crate::control::QmpError;
use crate::control::disks::Disks;
use crate::control::qapi::QmpResult;
use crate::error::{Error, Result, ResultExt};
use crate::images::{self, Access, Image, frozen};
use crate::io::{HostFile, block_on};
use crate::jobs::layer_copy::{Held, held_above};
use crate::units::ByteRange;

pub use self::barrier::{Action, Prepared, give_up, make, run};
pub use self::overlay::OverlayRequest;

/// A snapshot: an overlay comes to stand on a node, and everybody who stood on the node on the
/// overlay.
pub struct Snapshot {
    name: &'static str,
    node: Node,
    overlay: Node,
    /// What the overlay stood on before.
    overlay_backing: Option<Node>,
    /// What the node was opened for before.
    access: Access,
    graph: Arc<Graph>,
    /// What was made for it.
    created: Created,
    /// The overlay's file.
    overlay_file: Arc<HostFile>,
    /// Where a disk went that has left the overlay earlier, as a mark on it says.
    overlay_moved: Option<PathBuf>,
    /// What the overlay named before, if it did not name the node.
    renamed: Option<Renamed>,
    /// Whether the node got its mark from us.
    marked: Option<Image>,
    is_done: bool,
    /// Whether the overlay's node is the operator's once it is done.
    is_named: bool,
    _holds: Vec<Hold>,
}

impl Snapshot {
    /// Of an overlay that is there: `blockdev-snapshot`.
    pub fn of_node(disks: &mut Disks, node: &str, overlay: &str) -> QmpResult<Prepared> {
        let node = disks.find_image(Some(node), Some(node))?;
        disks.check_no_overlay_on(&node)?;
        disks.check_one_writer(&node)?;
        let overlay = disks.graph().find(overlay).ok_or_else(|| {
            QmpError::generic(format!("Cannot find device='{overlay}' nor node-name='{overlay}'"))
        })?;
        // Nobody's guest comes back to a node without an export.
        disks.settle(&node)?;
        let name = "blockdev-snapshot";
        if !disks.graph().parents(&overlay).is_empty() {
            return Err(QmpError::generic(format!(
                "The overlay is already in use: {}",
                disks.users_of(&overlay)
            )));
        }
        if overlay.backing().is_some() {
            return Err(QmpError::generic("The overlay already has a backing image"));
        }
        let snapshot = Snapshot::new(disks, name, node, overlay)?;
        Ok(Prepared::Action(Box::new(snapshot)))
    }

    /// Of an overlay that is opened, or made once all actions are prepared: `blockdev-snapshot-sync`.
    /// `before` is what has been prepared for the same transaction.
    pub fn of_file(
        disks: &mut Disks,
        request: OverlayRequest,
        before: &[Prepared],
    ) -> QmpResult<Prepared> {
        let node = disks.find_image(request.device.as_deref(), request.node_name.as_deref())?;
        disks.check_no_overlay_on(&node)?;
        disks.check_one_writer(&node)?;
        if request.node_name.is_some() && request.snapshot_node_name.is_none() {
            return Err(QmpError::generic("New overlay node-name missing"));
        }
        if let Some(new) = &request.snapshot_node_name {
            if disks.graph().find(new).is_some() || before.iter().any(|other| other.makes(new)) {
                return Err(QmpError::generic("New overlay node-name already in use"));
            }
            disks.graph().check_name(new)?;
        }
        let hold = node.hold(SYNC, Rights::GRAPH, Rights::ALL)?;
        disks.settle(&node)?;
        node.check_guest_is_back()?;
        let exists = request.exists;
        let overlay = NewOverlay::prepare(disks, node, request, hold)?;
        match exists {
            // Opening it changes nothing.
            true => overlay.make(disks).map(Prepared::Action),
            false => Ok(Prepared::Overlay(Box::new(overlay))),
        }
    }

    fn new(disks: &Disks, name: &'static str, node: Node, overlay: Node) -> QmpResult<Snapshot> {
        if node.is_same(&overlay) || disks.graph().reaches(&node, &overlay) {
            disks.graph().check_cycle(&overlay, &node, "backing")?;
        }
        node.check_guest_is_back()?;
        overlay.check_guest_is_back()?;
        let image = disks.image_of(&node)?;
        let overlay_image = disks.image_of(&overlay)?;
        disks.layers.check_chain(Some(&node), &overlay_image, &node)?;
        if overlay_image.access == Access::Read {
            return Err(QmpError::generic(format!(
                "Block node is read-only: '{}'",
                overlay.name()
            )));
        }
        if overlay.size() != node.size() {
            return Err(QmpError::generic(format!(
                "The overlay {} of {} bytes and node '{}' of {} must have the same size",
                overlay_image.name(),
                overlay.size(),
                node.name(),
                node.size()
            )));
        }
        // One snapshot of a node at a time: the second of a transaction would come to lie below the
        // overlay of the first, whose file names the node.
        let holds = vec![
            node.hold(name, Rights::GRAPH, Rights::ALL)?,
            overlay.hold(name, Rights::GRAPH, Rights::ALL.and(Rights::GRAPH))?,
        ];
        // Its content belongs to the disk that goes on above it.
        frozen::check_not_frozen(&overlay_image.file, disks.layers.allow_dirs())?;
        introduce(&overlay_image, &overlay, &image, &node)?;
        // Better told now than at the barrier. Nobody uses the overlay, so this closes no gate.
        let overlay_backing = overlay.backing();
        let quiesced = disks.graph().quiesce(std::slice::from_ref(&overlay));
        put_on(disks.graph(), &overlay, &node, &quiesced)?;
        let unit = overlay.limits().request_alignment;
        let is_fine = disks.graph().check_unit(&node, overlay.name(), unit);
        let stale =
            frozen::moved_to(&overlay_image.file).is_some().then(|| holds_any(&overlay, &node));
        overlay.set_backing(overlay_backing.clone(), &quiesced)?;
        drop(quiesced);
        is_fine?;
        if stale.transpose()?.unwrap_or(false) {
            return Err(QmpError::generic(format!(
                "{0}: its disk has gone on in another image since, and {0} still holds what that was \
                 before: the guest would see this again. Create it anew, or empty it (vublk reset)",
                overlay_image.name()
            )));
        }
        let renamed = Renamed::onto(&image, &overlay_image, disks.layers.allow_dirs())?;
        let is_marked = frozen::is_frozen_below(&image.file, overlay_image.file.path());
        let marked = (!is_marked).then(|| image.clone());
        if marked.is_some() {
            frozen::mark(&image.file, overlay_image.file.path());
        }
        Ok(Snapshot {
            name,
            access: image.access,
            overlay_backing,
            graph: Arc::clone(disks.graph()),
            node,
            overlay,
            created: Created::default(),
            overlay_moved: frozen::moved_to(&overlay_image.file),
            overlay_file: Arc::clone(&overlay_image.file),
            renamed,
            marked,
            is_done: false,
            is_named: false,
            _holds: holds,
        })
    }
}

/// Has an overlay that was prepared for this image, and holds nothing yet, know the image as it is now: the
/// guest may have written since.
fn introduce(overlay_image: &Image, overlay: &Node, image: &Image, node: &Node) -> Result<()> {
    let (overlay, below) = (overlay.skip_filters().1.driver(), node.skip_filters().1.driver());
    let can_write = !below.limits().read_only;
    let Some(identity) = below.identity(can_write) else { return Ok(()) };
    let is_meant = images::names_as_backing(overlay_image, &image.file)?;
    if is_meant && block_on(overlay.adopt_backing(identity))? && can_write {
        // The guest's first write would change it, too.
        block_on(below.prepare_for_overlay())?;
    }
    Ok(())
}

/// Whether an overlay hides anything of what it stands on.
fn holds_any(overlay: &Node, below: &Node) -> Result<bool> {
    let mut left = ByteRange { offset: 0, len: overlay.size() };
    while !left.is_empty() {
        let (run, held) = block_on(held_above(overlay, Some(below), left))?;
        if held != Held::Nothing {
            return Ok(true);
        }
        left = ByteRange::between(run.end(), left.end());
    }
    Ok(false)
}

/// Has the overlay stand on the node, if it does not yet.
fn put_on(graph: &Graph, overlay: &Node, node: &Node, quiesced: &Quiesced) -> QmpResult<()> {
    if overlay.backing().is_some_and(|below| below.is_same(node)) {
        return Ok(());
    }
    graph.set_backing(overlay, Some(node), quiesced).map_err(|err| match err.kind() {
        crate::ErrorKind::Unsupported => {
            QmpError::generic("The overlay does not support backing images")
        }
        _ => err.into(),
    })
}

impl Action for Snapshot {
    fn name(&self) -> &'static str {
        self.name
    }

    fn nodes(&self) -> Vec<Node> {
        vec![self.node.clone()]
    }

    fn commit(&mut self, disks: &mut Disks, quiesced: &Quiesced) -> QmpResult<()> {
        // Once more: an action before this one may have made the chain longer somewhere else.
        disks.layers.check_chain(Some(&self.node), &disks.image_of(&self.overlay)?, &self.node)?;
        put_on(&self.graph, &self.overlay, &self.node, quiesced)?;
        // What they keep from the disk is part of it.
        let prepared = self.graph.filters_on(&self.node).iter().try_for_each(|filter| {
            block_on(filter.driver().prepare_for_overlay())
                .context(|| format!("filter '{}' before the snapshot", filter.name()))
        });
        // In this order: a front-end that connects now asks what it may do with the disk.
        let moved = prepared
            .and_then(|()| self.graph.replace(&self.node, &self.overlay, quiesced))
            .and_then(|()| disks.layers.set_access(&self.node, Access::Read, quiesced));
        match moved {
            Ok(()) => {
                // A disk is in it again.
                frozen::clear_moved(&self.overlay_file);
                self.owe_flush();
                self.is_done = true;
                Ok(())
            }
            Err(err) => {
                self.undo(disks, quiesced);
                Err(err.into())
            }
        }
    }

    fn undo(&mut self, disks: &mut Disks, quiesced: &Quiesced) {
        let left = (disks.layers.set_access(&self.node, self.access, quiesced))
            .and_then(|()| self.graph.replace(&self.overlay, &self.node, quiesced));
        if let Err(err) = left {
            return self.stay(disks, quiesced, &err);
        }
        self.is_done = false;
        self.overlay.owe_nothing();
        if let Some(target) = &self.overlay_moved {
            frozen::mark_moved(&self.overlay_file, target);
        }
        if let Err(err) = self.overlay.set_backing(self.overlay_backing.clone(), quiesced) {
            tracing::error!("a snapshot that failed is not undone in full: {err}");
        }
    }

    fn clean(&mut self, disks: &mut Disks) {
        self.created.keep();
        self.marked = None;
        if let Some(renamed) = self.renamed.take() {
            renamed.keep();
        }
        if self.is_named {
            disks.graph().set_explicit(&self.overlay, true);
        }
        if let Err(err) = block_on(self.overlay.pay_flush()) {
            // The guest's next flush tries again, and fails if that does.
            tracing::error!(
                "node '{}': what was written before the snapshot cannot be flushed: {err}",
                self.node.name()
            );
        }
    }
}

impl Snapshot {
    /// What was completed before the snapshot is still to be flushed.
    fn owe_flush(&self) {
        if self.access == Access::Write {
            self.overlay.owe_flush_of(self.node.clone());
        }
    }

    /// Somebody could not be taken off the overlay: what he stands on stays, and is done.
    fn stay(&mut self, disks: &mut Disks, quiesced: &Quiesced, err: &Error) {
        tracing::error!(
            "node '{}' stays below its overlay '{}', which cannot be left ({err}); commit the overlay \
             to undo the snapshot",
            self.node.name(),
            self.overlay.name()
        );
        if let Err(err) = disks.layers.set_access(&self.node, Access::Read, quiesced) {
            tracing::error!("node '{}' is not made read-only: {err}", self.node.name());
        }
        frozen::clear_moved(&self.overlay_file);
        self.owe_flush();
        self.is_done = true;
        self.created.keep();
        if self.is_named {
            self.graph.set_explicit(&self.overlay, true);
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        if let Some(image) = &self.marked {
            frozen::unmark(&image.file, self.overlay_file.path());
        }
        if let Some(renamed) = self.renamed.take() {
            renamed.undo();
        }
    }
}

#[cfg(test)]
mod tests;
