//! Nodes as the operator puts them together: a protocol node for a file, a format node on it.
//!
//! ```text
//! file, host_device   ProtocolRequest ─► open, lock ─► Image (its node shows the bytes of the file)
//!                                                        │
//! raw, qcow2, …       FormatRequest ─► driver ───────────┘ I/O goes to the host file directly
//! ```
//!
//! The same opening code as for images by path ([`open`](mod@super::open)), with three differences:
//! the format is always said, the file is there already, and the operator may say what the image
//! stands on instead of what its header names.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::block::open_gate::{Chain, OpenGate};
use crate::block::{Driver, Node, NodeOptions};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::NoFlush;
use crate::formats::raw::Raw;
use crate::images::lock::lock;
use crate::images::open::{self, Opening, open_host, protocol_name};
use crate::images::{Access, CacheMode, Image, ImageFormat, Locking, OpenRequest, StateDir};
use crate::io::{File, HostFile, OpenOptions};

/// A file or device of the host, to become a node.
#[derive(Clone, Debug)]
pub struct ProtocolRequest {
    /// The node's name.
    pub node_name: String,
    /// Where it is.
    pub path: PathBuf,
    /// The driver that was asked for, `file` or `host_device`.
    pub driver: &'static str,
    /// What it is opened for.
    pub access: Access,
    /// Whether to open it for reading where writing is not allowed.
    pub auto_read_only: bool,
    /// How the host caches.
    pub cache: CacheMode,
    /// How it is guarded against others.
    pub locking: Locking,
    /// How long to wait for a lock.
    pub lock_wait: Duration,
    /// Whether discards are ignored.
    pub keeps_space: bool,
}

/// Opens a protocol node.
///
/// # Errors
/// In QEMU's words, `Could not open 'PATH': …`; or that it is not of the driver's kind.
pub fn open_protocol(request: &ProtocolRequest) -> Result<Image> {
    let name = request.path.display();
    let attempt = |access| {
        let options = OpenOptions {
            write: access == Access::Write,
            direct: request.cache.is_direct(),
            ..OpenOptions::default()
        };
        open_host(&request.path, options)
    };
    let mut access = request.access;
    let file = match attempt(access) {
        Err(err)
            if access == Access::Write
                && request.auto_read_only
                && matches!(err.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly) =>
        {
            access = Access::Read;
            attempt(access)
        }
        other => other,
    };
    // The path is in the error already; QEMU's sentence has it in quotes.
    let file = file.map_err(|err| match err.errno() {
        Some(errno) => Error::from_errno(errno).context(format!("Could not open '{name}'")),
        None => err,
    })?;
    if protocol_name(&file) != request.driver {
        return Err(Error::invalid(format!(
            "driver '{}' cannot open '{name}': it needs driver '{}'",
            request.driver,
            protocol_name(&file)
        )));
    }
    let by_path = OpenRequest {
        access,
        locking: request.locking,
        lock_wait: request.lock_wait,
        ..OpenRequest::read(&request.path)
    };
    lock(&file, &by_path, ImageFormat::Raw)?;
    let file = Arc::new(file);
    let read_only = access == Access::Read;
    let node = protocol_node(&file, &request.node_name, read_only, request.keeps_space)?;
    Ok(Image {
        node,
        file,
        format: ImageFormat::Raw,
        guessed: false,
        cache: request.cache,
        access,
        locking: request.locking,
        image_file: None,
        backing: None,
    })
}

/// A node that stands for a host file.
pub fn protocol_node(
    file: &Arc<HostFile>,
    name: &str,
    read_only: bool,
    keeps_space: bool,
) -> Result<Node> {
    let driver = protocol_driver(file, read_only)?;
    let options = NodeOptions { name: name.into(), read_only, keeps_space };
    Ok(Node::new(driver, options))
}

/// The driver of a node that stands for a host file.
pub fn protocol_driver(file: &Arc<HostFile>, read_only: bool) -> Result<Arc<dyn Driver>> {
    let below = Arc::clone(file) as Arc<dyn File>;
    let raw = Raw::protocol(below, read_only || !file.is_writable(), protocol_name(file));
    Ok(Arc::new(raw.context(|| file.name().to_string())?))
}

/// The driver of a raw image in a file that is open for writing, and a protocol node for it.
pub fn open_raw_on(
    file: &Arc<HostFile>,
    cache: CacheMode,
    keeps_space: bool,
) -> Result<(Arc<dyn Driver>, Node)> {
    let below = Arc::clone(file) as Arc<dyn File>;
    let raw = Raw::open(below, false).context(|| file.name().to_string())?;
    let protocol = protocol_node(file, &crate::block::graph::auto_name(), false, keeps_space)?;
    Ok((ignoring_flushes(Arc::new(raw), cache), protocol))
}

/// What a format node stands on.
#[derive(Clone, Debug)]
pub enum BackingChoice {
    /// What the image names, if anything.
    AsNamed,
    /// Nothing, whatever the image names.
    Nothing,
    /// This.
    Image(Box<Image>),
}

/// An image in a file that is open, to become a node.
#[derive(Clone, Debug)]
pub struct FormatRequest {
    /// The node's name.
    pub node_name: String,
    /// Its format.
    pub format: ImageFormat,
    /// What may be done with it.
    pub access: Access,
    /// Whether discards are ignored.
    pub keeps_space: bool,
    /// What it stands on.
    pub backing: BackingChoice,
    /// Directories that files named by images may be in, besides the image's own.
    pub allow_dirs: Vec<PathBuf>,
    /// The most memory for its metadata; see [`OpenRequest::metadata_cache`].
    pub metadata_cache: Option<u64>,
    /// Where is kept what must outlive the process.
    pub state_dir: StateDir,
    /// The session whose records were redone in the image that it is to stand on
    /// ([`Layers::settle`](crate::images::Layers::settle)).
    pub settled: Option<u128>,
}

/// Opens a format node on a protocol node.
///
/// # Errors
/// Names the file and what is wrong with it.
pub fn open_format(protocol: &Image, request: &FormatRequest) -> Result<Image> {
    if request.access == Access::Write && protocol.access == Access::Read {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!(
                "Block node is read-only: node '{}' cannot be written through '{}'",
                request.node_name,
                protocol.node.name()
            ),
        ));
    }
    with_opening(protocol, request, |mut opening| {
        opening.keeps_space = request.keeps_space;
        let image = open::build(opening, request.format, false)?;
        Ok(with_cache(image, protocol.cache))
    })
}

/// A driver, and the file with its data where that is not the image's own.
pub type Reopened = (Arc<dyn Driver>, Option<Arc<HostFile>>);

/// The driver of the same image once more, in a file that was opened anew.
pub fn open_driver(file: &Image, request: &FormatRequest) -> Result<Reopened> {
    with_opening(file, request, |mut opening| {
        let driver = open::open_driver(&mut opening, request.format, false)?;
        Ok((ignoring_flushes(driver, file.cache), opening.image_file.take()))
    })
}

fn with_opening<T>(
    protocol: &Image,
    request: &FormatRequest,
    open: impl FnOnce(Opening<'_>) -> Result<T>,
) -> Result<T> {
    let path: &Path = protocol.file.path();
    let by_path = OpenRequest {
        format: Some(request.format),
        access: request.access,
        cache: protocol.cache,
        locking: protocol.locking,
        allow_dirs: request.allow_dirs.clone(),
        metadata_cache: request.metadata_cache,
        state_dir: request.state_dir.clone(),
        node_name: request.node_name.clone(),
        ..OpenRequest::read(path)
    };
    let gate = OpenGate::new(path, &request.allow_dirs)?;
    let mut chain = Chain::default();
    chain.push(&protocol.file)?;
    let mut opening = Opening::new(&by_path, Arc::clone(&protocol.file), &gate, &mut chain);
    opening.settled = request.settled;
    opening.overridden = match &request.backing {
        BackingChoice::AsNamed => None,
        BackingChoice::Nothing => Some(None),
        BackingChoice::Image(image) => Some(Some((**image).clone())),
    };
    open(opening)
}

fn with_cache(mut image: Image, cache: CacheMode) -> Image {
    image.cache = cache;
    if cache.ignores_flush() {
        let read_only = image.access == Access::Read;
        let options = NodeOptions {
            name: image.node.name().to_string(),
            read_only,
            keeps_space: image.node.keeps_space(),
        };
        image.node = Node::new(ignoring_flushes(image.node.driver(), cache), options);
    }
    image
}

fn ignoring_flushes(driver: Arc<dyn Driver>, cache: CacheMode) -> Arc<dyn Driver> {
    if cache.ignores_flush() { Arc::new(NoFlush::new(driver)) } else { driver }
}
