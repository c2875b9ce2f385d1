//! Recording what is written to an image in a log: opens the log's files and puts the filter in
//! front of the image's driver.
//!
//! The log is locked as an image is that somebody writes to, so two processes never record into the
//! same one, and a process that takes over from one that was killed waits for the host to be done
//! with its I/O. So is its sidecar, which another log may have been given by mistake.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::block::{Driver, Keep, Node, NodeOptions};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::write_log::{self, Began, Settings, Subject, WriteLog};
use crate::images::lock::{lock, lock_for_writing};
use crate::images::storage;
use crate::images::{Access, CacheMode, Image, ImageFormat, Locking, OpenRequest, StateDir};
use crate::io::{AlignedBuf, File, HostFile, HostKind, OpenOptions, block_on};
use crate::write_log::sidecar::{self, ImageIdentity, Record};

/// What to record into, and how.
#[derive(Clone, Debug)]
pub struct RecordRequest {
    /// The log: a file, which is made if need be, or a block device.
    pub log: PathBuf,
    /// How the log is cached.
    pub cache: CacheMode,
    /// How long to wait for its lock.
    pub lock_wait: Duration,
    /// The rest.
    pub options: RecordOptions,
}

/// How to record into a log.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// Its sidecar; beside the log if not given.
    pub sidecar: Option<PathBuf>,
    /// Whether log and sidecar are locked.
    pub locking: Locking,
    /// Where is noted what is under way, for the case that this process is killed.
    pub state_dir: StateDir,
    /// Size of the guest's blocks in bytes, if there is a guest: a request is whole log sectors.
    pub block_size: Option<u64>,
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
    check_is_written(image, &*below)?;
    let (log, is_new) = open_log(request)?;
    if is_new {
        log.open_no_wider_than(&image.file);
    }
    let recording = record_to(image, below, &log, &request.options);
    if recording.is_err() && is_new {
        let _ = std::fs::remove_file(&request.log);
    }
    recording
}

/// The same with a log that is open, and locked as somebody locks it who writes to it.
///
/// # Errors
/// Names the log and the way out. A sidecar that did not exist does not exist.
pub fn record_to(
    image: &Image,
    below: Arc<dyn Driver>,
    log: &Arc<HostFile>,
    options: &RecordOptions,
) -> Result<Recording> {
    check_is_written(image, &*below)?;
    let name = log.name().to_string();
    for file in files_of(image) {
        if storage::shares(log, file)? {
            let file = file.name();
            let message =
                format!("{name}: is {file} itself, which is to be recorded, or part of it");
            return Err(Error::invalid(message));
        }
    }
    check_not_in_use(log)?;
    let sidecar = match &options.sidecar {
        Some(path) => path.clone(),
        None if log.kind() == HostKind::BlockDevice => {
            return Err(Error::invalid(format!(
                "{name}: is a device, and the log's sidecar needs a file; say which with \
                 --log-sidecar FILE"
            )));
        }
        None => sidecar::default_path(log.path()),
    };
    let (sidecar, is_new) =
        open_sidecar(&sidecar, image, log).context(|| format!("{name}: its sidecar"))?;
    if is_new {
        sidecar.open_no_wider_than(&image.file);
    }
    let path = sidecar.path().to_path_buf();
    let recording = record_with(image, below, log, sidecar, options);
    if recording.is_err() && is_new {
        let _ = std::fs::remove_file(path);
    }
    recording
}

/// The same with a sidecar that is open.
fn record_with(
    image: &Image,
    below: Arc<dyn Driver>,
    log: &Arc<HostFile>,
    sidecar: HostFile,
    options: &RecordOptions,
) -> Result<Recording> {
    if options.locking != Locking::Off {
        lock_for_writing(&sidecar).context(|| format!("{}: its sidecar", log.name()))?;
    }
    let subject = Subject {
        below,
        image: ImageIdentity {
            file: image.file.identity()?,
            born_ns: image.file.born_ns(),
            path: absolute(image.file.path()),
        },
        file: Some(Arc::clone(&image.file)),
        is_raw: image.format == ImageFormat::Raw,
        notes: notes_path(&options.state_dir, log)?,
        block_size: options.block_size,
    };
    let log = Arc::clone(log) as Arc<dyn File>;
    let (filter, began) =
        block_on(write_log::open(subject, log, Arc::new(sidecar), options.settings))?;
    Ok(Recording { filter: Arc::new(filter), began })
}

/// Where is noted what is under way on its way to a log; nowhere if that is not possible.
fn notes_path(state_dir: &StateDir, log: &HostFile) -> Result<Option<PathBuf>> {
    let (dir, required) = match state_dir {
        StateDir::None => return Ok(None),
        StateDir::IfPossible(dir) => (dir, false),
        StateDir::Required(dir) => (dir, true),
    };
    match Keep::check_dir(dir) {
        Err(err) if required => return Err(err),
        Err(err) => {
            tracing::warn!(
                "{}: should this process be killed, the next one cannot tell whether the disk was \
                 changed by others: {err}",
                log.name()
            );
            return Ok(None);
        }
        Ok(()) => {}
    }
    let (device, inode) = log.identity()?;
    Ok(Some(dir.join(format!("write-log-{device:x}-{inode:x}.notes"))))
}

/// Opens the file that is to be a log's sidecar. True if it was made.
///
/// # Errors
/// If it is part of the disk or the log, or holds anything but a sidecar: it would be lost.
fn open_sidecar(path: &Path, image: &Image, log: &HostFile) -> Result<(HostFile, bool)> {
    let (file, is_new) = open_or_create(path, OpenOptions { write: true, ..Default::default() })?;
    if is_new {
        return Ok((file, true));
    }
    let identity = file.identity()?;
    for other in files_of(image).chain([log]) {
        if other.identity()? == identity {
            let (path, other) = (path.display(), other.name());
            return Err(Error::invalid(format!("{path} is {other} itself; it needs another file")));
        }
    }
    let len = file.len()?.min(Record::position(0));
    let mut head = AlignedBuf::zeroed(len as usize, 4096);
    if len > 0 {
        block_on(file.read(0, head.buffers()))?;
    }
    let head = head.as_slice();
    // Zeros are what a power cut has left of one that was just begun.
    let is_begun = file.len()? <= Record::position(0) && head.iter().all(|byte| *byte == 0);
    if head.starts_with(&sidecar::MAGIC) || is_begun {
        return Ok((file, false));
    }
    let path = path.display();
    let message = format!("{path} is neither empty nor the sidecar of a log; name another file");
    Err(Error::invalid(message))
}

/// All that an image lies in.
fn files_of(image: &Image) -> impl Iterator<Item = &HostFile> {
    let chain = std::iter::successors(Some(image), |image| image.backing.as_deref());
    let files = chain.flat_map(|image| [Some(&image.file), image.image_file.as_ref()]).flatten();
    files.map(|file| &**file)
}

/// Refuses a device that the host uses: what it has there would be lost. It is not kept from others
/// afterwards: while somebody has it for himself, the kernel refuses to make holes by any other descriptor.
fn check_not_in_use(log: &HostFile) -> Result<()> {
    if log.kind() != HostKind::BlockDevice {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    match rustix::fs::open(log.path(), flags, Mode::empty()) {
        Ok(_claim) => Ok(()),
        Err(rustix::io::Errno::BUSY) => Err(Error::new(
            ErrorKind::Busy,
            format!("{}: is in use by the host: mounted, or part of another device", log.name()),
        )),
        Err(err) => Err(Error::from(err).context(log.name().to_string())),
    }
}

fn check_is_written(image: &Image, below: &dyn Driver) -> Result<()> {
    if below.limits().read_only || image.access == Access::Read {
        return Err(Error::invalid(format!(
            "{}: is not written to, so there is nothing to record",
            image.name()
        )));
    }
    Ok(())
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
        locking: request.options.locking,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::{self, OpenRequest};
    use crate::io::AlignedBuf;

    fn disk(path: &Path) -> Image {
        std::fs::write(path, vec![0; 65536]).unwrap();
        let request = OpenRequest {
            access: Access::Write,
            format: Some(ImageFormat::Raw),
            ..OpenRequest::read(path)
        };
        images::open(&request).unwrap()
    }

    fn request(log: PathBuf, state_dir: StateDir) -> RecordRequest {
        let options = RecordOptions {
            sidecar: None,
            locking: Locking::Off,
            state_dir,
            block_size: Some(512),
            settings: Settings::default(),
        };
        RecordRequest { log, cache: CacheMode::Writeback, lock_wait: Duration::ZERO, options }
    }

    #[test]
    fn a_recording_that_does_not_begin_leaves_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let image = disk(&dir.path().join("disk.raw"));
        // Not a directory.
        let state_dir = StateDir::Required(dir.path().join("disk.raw"));
        let request = request(dir.path().join("w.log"), state_dir);
        assert!(record(&image, image.node.driver(), &request).is_err());
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    /// A format may write to its file when it is closed, which is after the log has ended.
    #[test]
    fn an_image_that_was_changed_by_closing_it_is_still_the_logs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let image = disk(&path);
        let request = request(dir.path().join("w.log"), StateDir::None);
        let change_file = |seconds| {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            let then = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            file.set_modified(then).unwrap();
        };
        let record = || record(&image, image.node.driver(), &request);
        let filter = record().unwrap().filter;
        block_on(filter.write(0, AlignedBuf::from_slice(&[1; 512], 512).buffers(), false)).unwrap();
        block_on(filter.image_was_closed()).unwrap();
        block_on(filter.end()).unwrap();
        change_file(1000);
        let err = record().unwrap_err().to_string();
        assert!(err.contains("was changed after recording ended"), "{err}");
        block_on(filter.image_was_closed()).unwrap();
        assert_eq!(record().unwrap().began, Began::After { entries: 2, counted_in: 0 });
    }
}
