//! Changes of several disks at one instant: `transaction`, and the commands that are a transaction of
//! one action.
//!
//! ```text
//!            prepare, in order       open files, check names, take holds: slow, undone by dropping it
//!            make, in order          overlays that are new: what their files contained is gone
//!               │                    from here on, but nothing that is wrong has come so far
//!            flush                   so that little is left to be flushed while guests wait
//!  guests    ┌─ quiesce ───────────  one barrier for all disks
//!  wait      │  commit               each action; a failure undoes those before it
//!            └─ resume ────────────  the pause is measured
//!            clean                   what can be done while guests go on
//! ```
//!
//! All or nothing: an action that fails leaves everything as it was, and files that were made for
//! the transaction are removed. Should a guest be unable to go back to where it was, then what it
//! stands on stays, with its files, and the log says so.
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

mod renamed;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::node::Hold;
use crate::block::{Graph, Node, Quiesced, Rights};
use crate::control::disks::Disks;
use crate::control::qapi::QmpResult;
use crate::control::{Daemon, QmpError};
use crate::error::{Error, Result, ResultExt};
use crate::images::blockdev::{self, BackingChoice, FormatRequest, ProtocolRequest};
use crate::images::{self, Access, CreateRequest, Image, ImageFormat, frozen};
use crate::io::{HostFile, block_on};
use crate::jobs::layer_copy::{Held, held_above};
use crate::units::ByteRange;
use renamed::Renamed;

/// What makes overlays is called.
const SYNC: &str = "blockdev-snapshot-sync";

/// Something that happens at the barrier of a transaction. Made by what prepares it; dropping it
/// before `commit` undoes the preparation.
pub trait Action {
    /// What it is called in the log.
    fn name(&self) -> &'static str;

    /// The nodes that must be quiet.
    fn nodes(&self) -> Vec<Node>;

    /// Does it. The gates of all that reach [`Action::nodes`] are closed, and guests wait.
    fn commit(&mut self, disks: &mut Disks, quiesced: &Quiesced) -> QmpResult<()>;

    /// Takes a commit back, because a later action failed. The gates are still closed.
    fn undo(&mut self, disks: &mut Disks, quiesced: &Quiesced);

    /// All actions are done, and guests go on.
    fn clean(&mut self, disks: &mut Disks) {
        let _ = disks;
    }

    /// Gives away what was made for it, which is undone when that is dropped.
    fn take_created(&mut self) -> Created {
        Created::default()
    }
}

/// An action for which nothing is gone that was there before.
pub enum Prepared {
    /// One that can be done.
    Action(Box<dyn Action>),
    /// One whose overlay is still to be made, which gives up what its file contained.
    Overlay(Box<NewOverlay>),
}

impl Prepared {
    /// Whether it is still to make the node of this name.
    pub fn makes(&self, name: &str) -> bool {
        let request = match self {
            Prepared::Overlay(overlay) => &overlay.request,
            Prepared::Action(_) => return false,
        };
        request.snapshot_node_name.as_deref() == Some(name)
    }
}

/// Makes the overlays of prepared actions. On failure all of them are undone.
pub fn make(disks: &mut Disks, prepared: Vec<Prepared>) -> QmpResult<Vec<Box<dyn Action>>> {
    let mut actions = Vec::with_capacity(prepared.len());
    let mut result = Ok(());
    for prepared in prepared {
        match prepared {
            Prepared::Action(action) => actions.push(action),
            // Nor does one of the others make its own.
            Prepared::Overlay(_) if result.is_err() => {}
            Prepared::Overlay(overlay) => match overlay.make(disks) {
                Ok(action) => actions.push(action),
                Err(err) => result = Err(err),
            },
        }
    }
    match result {
        Ok(()) => Ok(actions),
        Err(err) => {
            abandon(disks, actions);
            Err(err)
        }
    }
}

/// Undoes what was prepared; nothing was made for it yet.
pub fn give_up(disks: &mut Disks, prepared: Vec<Prepared>) {
    let action = |prepared| match prepared {
        Prepared::Action(action) => Some(action),
        Prepared::Overlay(_) => None,
    };
    abandon(disks, prepared.into_iter().filter_map(action).collect());
}

/// Undoes what prepared actions have prepared.
pub fn abandon(disks: &mut Disks, mut actions: Vec<Box<dyn Action>>) {
    let mut created = Vec::new();
    // The last one first, as each may stand on those before it.
    while let Some(mut action) = actions.pop() {
        created.push(action.take_created());
    }
    disks.layers.collect();
    // Now that nobody has the files open who would write to them when he closes them.
    drop(created);
}

/// Does prepared actions at one barrier, all or none.
pub fn run(daemon: &mut Daemon, mut actions: Vec<Box<dyn Action>>) -> QmpResult<()> {
    if actions.is_empty() {
        return Ok(());
    }
    let disks = daemon.disks_mut();
    let nodes: Vec<Node> = actions.iter().flat_map(|action| action.nodes()).collect();
    // So that little is left for the flush afterwards, which the guest's own have to wait for.
    if let Err(err) = nodes.iter().try_for_each(flush) {
        abandon(disks, actions);
        return Err(err.into());
    }
    let graph = Arc::clone(disks.graph());
    let quiesced = graph.quiesce(&nodes);
    let mut result = Ok(());
    let mut done = 0;
    for action in &mut actions {
        result = action.commit(disks, &quiesced);
        if result.is_err() {
            break;
        }
        done += 1;
    }
    if result.is_err() {
        for action in actions[..done].iter_mut().rev() {
            action.undo(disks, &quiesced);
        }
    }
    let pause = graph.resume(quiesced);
    let names: Vec<_> = actions.iter().map(|action| action.name()).collect();
    tracing::info!(
        "{}: {}; guests paused for {} us",
        names.join(", "),
        if result.is_ok() { "done" } else { "undone" },
        pause.as_micros()
    );
    if result.is_ok() {
        for action in &mut actions {
            action.clean(disks);
        }
    }
    abandon(disks, actions);
    result
}

/// Makes what was completed durable; read-only nodes have nothing of that.
fn flush(node: &Node) -> Result<()> {
    if node.limits().read_only {
        return Ok(());
    }
    block_on(node.flush()).context(|| format!("node '{}': flush before the snapshot", node.name()))
}

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
        let file = match request.exists {
            true => None,
            false => Some(prepare_file(disks, &node, &request)?),
        };
        let overlay = NewOverlay { node, request, file, hold };
        match overlay.request.exists {
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
        let stale =
            frozen::moved_to(&overlay_image.file).is_some().then(|| holds_any(&overlay, &node));
        overlay.set_backing(overlay_backing.clone(), &quiesced)?;
        drop(quiesced);
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

/// What `blockdev-snapshot-sync` asks for.
#[derive(Clone, Debug)]
pub struct OverlayRequest {
    /// The export whose disk it is.
    pub device: Option<String>,
    /// Or the node.
    pub node_name: Option<String>,
    /// The overlay's file.
    pub file: PathBuf,
    /// The overlay's node.
    pub snapshot_node_name: Option<String>,
    /// The overlay's format.
    pub format: ImageFormat,
    /// Whether the overlay is there already, and stands on the right image.
    pub exists: bool,
}

/// Files that were made into images. Dropping this removes those that were not there before, and
/// empties those that were: making the image has done so, too, and an image that stands on a disk which
/// goes on elsewhere must not lie around. A block device is left as it is.
#[derive(Default)]
pub struct Created {
    new: Vec<PathBuf>,
    overwritten: Vec<PathBuf>,
}

impl Created {
    /// Leaves the files where they are.
    fn keep(&mut self) {
        self.new.clear();
        self.overwritten.clear();
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        for path in &self.new {
            let _ = std::fs::remove_file(path);
        }
        for path in self.overwritten.iter().filter(|path| path.is_file()) {
            let emptied = std::fs::File::options().write(true).open(path);
            if let Err(err) = emptied.and_then(|file| file.set_len(0)) {
                tracing::error!("{}: an overlay without a disk is left: {err}", path.display());
            }
        }
    }
}

/// A snapshot of a node whose overlay is still to be made, or opened.
pub struct NewOverlay {
    node: Node,
    request: OverlayRequest,
    /// What is to be made.
    file: Option<NewOverlayFile>,
    /// As the snapshot has it from then on.
    hold: Hold,
}

/// The file of an overlay.
struct NewOverlayFile {
    image: images::Prepared,
    /// Whether there was no such file before.
    is_new: bool,
}

impl NewOverlay {
    fn make(self, disks: &mut Disks) -> QmpResult<Box<dyn Action>> {
        let NewOverlay { node, request, file, hold } = self;
        let mut created = Created::default();
        let made = file.map_or(Ok(()), |file| file.make(&request, &mut created));
        let overlay = made.and_then(|()| open_overlay(disks, &node, &request));
        drop(hold);
        match overlay.and_then(|overlay| Snapshot::new(disks, SYNC, node, overlay)) {
            Ok(mut snapshot) => {
                snapshot.created = created;
                snapshot.is_named = request.snapshot_node_name.is_some();
                Ok(Box::new(snapshot))
            }
            Err(err) => {
                disks.layers.collect();
                Err(err)
            }
        }
    }
}

impl NewOverlayFile {
    /// Makes it; durable on return.
    fn make(self, request: &OverlayRequest, created: &mut Created) -> QmpResult<()> {
        let path = &request.file;
        self.image.write()?;
        match self.is_new {
            true => created.new.push(path.clone()),
            false => created.overwritten.push(path.clone()),
        }
        if request.format == ImageFormat::AddCow {
            // One that was there already has been refused.
            created.new.push(data_file(path));
        }
        Ok(sync_with_directory(path)?)
    }
}

/// Opens an overlay on the node.
fn open_overlay(disks: &mut Disks, node: &Node, request: &OverlayRequest) -> QmpResult<Node> {
    let below = disks.image_of(node)?;
    let protocol = blockdev::open_protocol(&ProtocolRequest {
        node_name: crate::block::graph::auto_name(),
        path: request.file.clone(),
        driver: "file",
        access: Access::Write,
        auto_read_only: false,
        cache: below.cache,
        locking: below.locking,
        lock_wait: std::time::Duration::ZERO,
        keeps_space: node.keeps_space(),
    })?;
    if protocol.file.identity()? == below.file.identity()? {
        return Err(QmpError::generic(format!(
            "{}: an image cannot be its own backing file",
            request.file.display()
        )));
    }
    let image = blockdev::open_format(
        &protocol,
        &FormatRequest {
            node_name: match &request.snapshot_node_name {
                Some(name) => name.clone(),
                None => crate::block::graph::auto_name(),
            },
            format: request.format,
            access: Access::Write,
            keeps_space: node.keeps_space(),
            backing: match (request.exists, request.format) {
                // It knows the image below as that was when it was made, and is told how it is now
                // before it is put there.
                (true, ImageFormat::Vhdx) => BackingChoice::Nothing,
                _ => BackingChoice::Image(Box::new(below)),
            },
            allow_dirs: disks.layers.allow_dirs().to_vec(),
            state_dir: disks.layers.state_dir().clone(),
            settled: None,
        },
    )?;
    let file = disks.layers.add_protocol(protocol, false)?;
    // Not the operator's before the snapshot is done.
    Ok(disks.layers.add_format(image, Some(file), false)?)
}

/// The full path of an image, for an overlay to name.
///
/// # Errors
/// If the image is not there any more: whoever opens the overlay later would see what is, or nothing.
fn path_of(below: &Image) -> QmpResult<String> {
    let path = std::path::absolute(below.file.path()).map_err(Error::from)?;
    let refused = |why: String| QmpError::generic(format!("{}: {why}", below.name()));
    let found = HostFile::open(&path, crate::io::OpenOptions::default());
    if found.and_then(|found| found.identity()).ok() != Some(below.file.identity()?) {
        return Err(refused(format!(
            "is not the file of node '{}' any more (was it renamed or replaced?), so no overlay can name it",
            below.node.name()
        )));
    }
    let path = path.to_str().map(String::from);
    path.ok_or_else(|| refused("its path is not text".into()))
}

/// Prepares an empty overlay that names the image below by its full path.
fn prepare_file(disks: &Disks, node: &Node, request: &OverlayRequest) -> QmpResult<NewOverlayFile> {
    let below = disks.image_of(node)?;
    block_on(node.driver().prepare_for_overlay())?;
    let path = &request.file;
    let allow_dirs = disks.layers.allow_dirs();
    let is_new = std::fs::symlink_metadata(path).is_err();
    if !is_new {
        let old = HostFile::open(path, crate::io::OpenOptions::default())?;
        if old.identity()? == below.file.identity()? {
            return Err(QmpError::generic(format!(
                "{}: an image cannot be its own backing file",
                path.display()
            )));
        }
        // Neither is it overwritten where a disk goes on above it.
        frozen::check_not_frozen(&old, allow_dirs)?;
    }
    let name = path_of(&below)?;
    let image = images::create::prepare(&CreateRequest {
        path: path.clone(),
        format: request.format,
        size: Some(node.size()),
        options: Vec::new(),
        backing: Some(name),
        backing_format: Some(below.format),
        // It is open, and locked by ourselves.
        backing_unchecked: true,
        allow_dirs: allow_dirs.to_vec(),
    })?;
    Ok(NewOverlayFile { image, is_new })
}

/// The file that holds the data of a new add-cow image.
fn data_file(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".raw");
    name.into()
}

/// Has a new file survive a power cut, its name included.
fn sync_with_directory(path: &Path) -> Result<()> {
    let what = || path.display().to_string();
    std::fs::File::open(path).and_then(|file| file.sync_all()).context(what)?;
    let directory = crate::block::open_gate::directory_of(path);
    std::fs::File::open(directory).and_then(|dir| dir.sync_all()).context(what)
}

#[cfg(test)]
mod tests;
