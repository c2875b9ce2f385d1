//! Recording what is written to an image in a log: opens the log's files and puts the filter in
//! front of the image's driver.
//!
//! The log is locked as an image is that somebody writes to, so two processes never record into the
//! same one, and a process that takes over from one that was killed waits for the host to be done
//! with its I/O. Its sidecar is used by whoever holds the log.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::block::{Driver, Node, NodeOptions};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::write_log::{self, Began, Settings, Subject, WriteLog};
use crate::images::open::lock;
use crate::images::{Access, CacheMode, Image, ImageFormat, Locking, OpenRequest};
use crate::io::{File, HostFile, HostKind, OpenOptions, block_on};
use crate::write_log::sidecar::{self, ImageIdentity};

/// What to record into, and how.
#[derive(Clone, Debug)]
pub struct RecordRequest {
    /// The log: a file, which is made if need be, or a block device.
    pub log: PathBuf,
    /// Its sidecar; beside the log if not given.
    pub sidecar: Option<PathBuf>,
    /// How the log is cached.
    pub cache: CacheMode,
    /// Whether the log is locked.
    pub locking: Locking,
    /// How long to wait for its lock.
    pub lock_wait: Duration,
    /// Size of the guest's blocks in bytes: a request is whole log sectors.
    pub block_size: u64,
    /// The rest.
    pub settings: Settings,
}

/// A log that is being recorded into.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The filter.
    pub filter: Arc<WriteLog>,
    /// How it began.
    pub began: Began,
}

/// Opens the log and makes the filter that records `below`, the driver of `image`.
///
/// # Errors
/// Names the log and the way out. A log that is refused is not modified; one that did not exist
/// does not exist.
pub fn record(image: &Image, below: Arc<dyn Driver>, request: &RecordRequest) -> Result<Recording> {
    if below.limits().read_only || image.access == Access::Read {
        return Err(Error::invalid(format!(
            "{}: is not written to, so there is nothing to record",
            image.name()
        )));
    }
    let (log, is_new) = open_log(request)?;
    let recording = start(image, below, request, &log);
    if recording.is_err() && is_new {
        let _ = std::fs::remove_file(&request.log);
    }
    recording
}

fn start(
    image: &Image,
    below: Arc<dyn Driver>,
    request: &RecordRequest,
    log: &Arc<HostFile>,
) -> Result<Recording> {
    let name = request.log.display();
    if log.identity()? == image.file.identity()? {
        return Err(Error::invalid(format!("{name}: is the image that is to be recorded")));
    }
    let sidecar = match &request.sidecar {
        Some(path) => path.clone(),
        None if log.kind() == HostKind::BlockDevice => {
            return Err(Error::invalid(format!(
                "{name}: is a device, and the log's sidecar needs a file; say which with \
                 --log-sidecar FILE"
            )));
        }
        None => sidecar::default_path(&request.log),
    };
    let (sidecar, _) = open_or_create(&sidecar, OpenOptions { write: true, ..Default::default() })
        .context(|| format!("{name}: its sidecar"))?;
    let subject = Subject {
        below,
        image: ImageIdentity {
            file: image.file.identity()?,
            born_ns: image.file.born_ns(),
            path: absolute(image.file.path()),
        },
        file: Some(Arc::clone(&image.file)),
    };
    let log = Arc::clone(log) as Arc<dyn File>;
    let opening = write_log::open(subject, log, Arc::new(sidecar), request.settings);
    let (filter, began) = block_on(opening)?;
    let unit = filter.sector_size();
    if unit > request.block_size {
        return Err(Error::invalid(format!(
            "{name}: log sectors of {unit} bytes are larger than the guest's blocks of {}; use \
             --block-size {unit}, or a log with smaller sectors",
            request.block_size
        )));
    }
    Ok(Recording { filter: Arc::new(filter), began })
}

/// The image with the filter in front of it.
pub fn record_image(image: Image, request: &RecordRequest) -> Result<(Image, Recording)> {
    let recording = record(&image, image.node.driver(), request)?;
    recording.say(image.name());
    let filter = Arc::clone(&recording.filter);
    let options =
        NodeOptions { name: image.node.name().into(), read_only: false, ..NodeOptions::default() };
    let node = Node::new(filter, options);
    Ok((Image { node, ..image }, recording))
}

impl Recording {
    /// Tells the operator what is recorded where.
    pub fn say(&self, image: &str) {
        let log = self.filter.log_name();
        match self.began {
            Began::New => tracing::info!("recording the writes to {image} in {log}"),
            Began::After { entries, counted_in: 0 } => {
                tracing::info!("recording the writes to {image} in {log}, after {entries} entries");
            }
            Began::After { entries, counted_in } => tracing::info!(
                "recording the writes to {image} in {log}, after {entries} entries, {counted_in} of \
                 which an earlier process had not counted yet"
            ),
        }
    }
}

/// Opens and locks the log. True if it was made.
fn open_log(request: &RecordRequest) -> Result<(Arc<HostFile>, bool)> {
    let direct = request.cache.is_direct();
    let options = OpenOptions { write: true, direct, ..OpenOptions::default() };
    let (file, is_new) = open_or_create(&request.log, options)?;
    let by_path = OpenRequest {
        access: Access::Write,
        locking: request.locking,
        lock_wait: request.lock_wait,
        ..OpenRequest::read(&request.log)
    };
    lock(&file, &by_path, ImageFormat::Raw)?;
    Ok((Arc::new(file), is_new))
}

fn open_or_create(path: &Path, options: OpenOptions) -> Result<(HostFile, bool)> {
    match HostFile::open(path, options) {
        Err(err) if err.kind() == ErrorKind::NotFound => {
            HostFile::open(path, OpenOptions { create: true, ..options }).map(|file| (file, true))
        }
        other => other.map(|file| (file, false)),
    }
}

/// The path as it is for everybody, as far as that can be found out.
fn absolute(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}
