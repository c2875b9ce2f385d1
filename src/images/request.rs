//! What to open, and how.

use std::path::PathBuf;
use std::time::Duration;

use crate::images::ImageFormat;
use crate::images::cache_mode::CacheMode;
use crate::images::crash_state::StateOf;
use crate::images::lock::Locking;

/// What may be done with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read, write and resize it.
    Write,
}

/// Where a served disk keeps what must outlive the process ([`crate::block::keep`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StateDir {
    /// Nowhere: no guest is served.
    #[default]
    None,
    /// Here, if that is possible; if not, metadata is written out before a request completes.
    IfPossible(PathBuf),
    /// Here.
    Required(PathBuf),
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// The image, as the operator named it.
    pub path: PathBuf,
    /// Its format; guessed if absent.
    pub format: Option<ImageFormat>,
    /// What may be done with it. Files below the top are opened for reading unless their role
    /// demands more.
    pub access: Access,
    /// How host files are opened.
    pub cache: CacheMode,
    /// How the files are locked.
    pub locking: Locking,
    /// Whether whoever asks could have said [`Locking::Share`] (`-U`): a refusal then says so.
    pub may_share: bool,
    /// How long to wait for a lock. The kernel may hold a killed process's files (and so its
    /// locks) until the I/O it had in flight is done, so whoever restarts one should wait a moment.
    pub lock_wait: Duration,
    /// Directories that files named by images may be in, besides the image's own.
    pub allow_dirs: Vec<PathBuf>,
    /// The most memory for metadata of each image that reads it page by page, in bytes (vhdx).
    pub metadata_cache: Option<u64>,
    /// Whether to open backing files. Without them, only metadata may be looked at: an image that
    /// has a format cannot be read then.
    pub backing: bool,
    /// Whether what is left of a damaged image is to be read (vhdx only, and only for reading).
    pub salvage: bool,
    /// Where metadata is kept that must outlive this process, for disks that are served.
    pub state_dir: StateDir,
    /// Where that may be found for an image below one that is served; see `settle`.
    pub settle_in: StateDir,
    /// The node's name. Nodes below it get names of their own.
    pub node_name: String,
    /// A state of a log, of which the image is the base, instead of the image itself.
    pub state: Option<StateOf>,
}

impl OpenRequest {
    /// Opens `path` for reading, with all else as usual.
    pub fn read(path: impl Into<PathBuf>) -> OpenRequest {
        OpenRequest {
            path: path.into(),
            format: None,
            access: Access::Read,
            cache: CacheMode::Writeback,
            locking: Locking::Guard,
            may_share: false,
            lock_wait: Duration::ZERO,
            allow_dirs: Vec::new(),
            metadata_cache: None,
            backing: true,
            salvage: false,
            state_dir: StateDir::None,
            settle_in: StateDir::None,
            node_name: "disk".into(),
            state: None,
        }
    }

    /// Opens `path` for reading and writing, with all else as usual.
    pub fn write(path: impl Into<PathBuf>) -> OpenRequest {
        OpenRequest { access: Access::Write, ..OpenRequest::read(path) }
    }

    /// With this format.
    pub fn format(self, format: Option<ImageFormat>) -> OpenRequest {
        OpenRequest { format, ..self }
    }

    /// With this cache mode.
    pub fn cache(self, cache: CacheMode) -> OpenRequest {
        OpenRequest { cache, ..self }
    }

    /// With these locks.
    pub fn locking(self, locking: Locking) -> OpenRequest {
        OpenRequest { locking, ..self }
    }

    /// Letting images pull in files from these directories, too.
    pub fn allow_dirs(self, allow_dirs: &[PathBuf]) -> OpenRequest {
        OpenRequest { allow_dirs: allow_dirs.to_vec(), ..self }
    }
}
