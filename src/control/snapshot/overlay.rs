//! Overlays that are made for a snapshot, or opened: `blockdev-snapshot-sync`.
//!
//! What is wrong with one is found before it is made, as making it empties a file that was there.
//! Its files belong to the action ([`Created`]) until that is done, and go if it is not.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Snapshot;
use super::barrier::Action;
use crate::block::Node;
use crate::block::node::Hold;
use crate::control::QmpError;
use crate::control::disks::Disks;
use crate::control::qapi::QmpResult;
use crate::error::{Error, Result, ResultExt};
use crate::images::blockdev::{self, BackingChoice, FormatRequest, ProtocolRequest};
use crate::images::{self, Access, CreateRequest, Image, ImageFormat, frozen};
use crate::io::{File, HostFile, block_on};

/// What makes overlays is called.
pub const SYNC: &str = "blockdev-snapshot-sync";

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
    pub fn keep(&mut self) {
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
    /// That of the disk.
    below: Arc<HostFile>,
    /// Whether there was no such file before.
    is_new: bool,
}

impl NewOverlay {
    /// Finds out whether it can be made, or is there.
    pub fn prepare(
        disks: &Disks,
        node: Node,
        request: OverlayRequest,
        hold: Hold,
    ) -> QmpResult<NewOverlay> {
        let file = match request.exists {
            true => None,
            false => Some(prepare_file(disks, &node, &request)?),
        };
        Ok(NewOverlay { node, request, file, hold })
    }

    /// Whether its node will have this name.
    pub fn makes(&self, name: &str) -> bool {
        self.request.snapshot_node_name.as_deref() == Some(name)
    }

    /// Makes its file, unless that is there, and opens it.
    pub fn make(self, disks: &mut Disks) -> QmpResult<Box<dyn Action>> {
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
        for path in &created.new {
            let file = HostFile::open(path, crate::io::OpenOptions::default())?;
            file.open_no_wider_than(&self.below);
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
    let name = request.snapshot_node_name.clone().unwrap_or_else(crate::block::graph::auto_name);
    let image = blockdev::open_format(
        &protocol,
        &FormatRequest {
            keeps_space: node.keeps_space(),
            backing: match (request.exists, request.format) {
                // It knows the image below as that was when it was made, and is told how it is now
                // before it is put there.
                (true, ImageFormat::Vhdx) => BackingChoice::Nothing,
                _ => BackingChoice::Image(Box::new(below)),
            },
            ..disks.layers.format_request(name, request.format, Access::Write)
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
pub fn path_of(below: &Image) -> QmpResult<String> {
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
    let node_name = request.snapshot_node_name.as_deref().unwrap_or("the overlay");
    disks.layers.check_new_overlay(node_name, request.format, node)?;
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
    // It is there now, and will be opened like this.
    let direct = below.cache.is_direct();
    let file = HostFile::open(path, crate::io::OpenOptions { direct, ..Default::default() })?;
    if request.format != ImageFormat::Qcow2 {
        let unit = file.alignment().request;
        disks.graph().check_unit(node, node_name, unit)?;
    }
    Ok(NewOverlayFile { image, below: below.file, is_new })
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
