//! qcow2 images, by way of the imago crate.
//!
//! imago understands the format: it finds mappings and changes them. Everything else is done here:
//! guest data moves between guest memory and the file directly, tables reach the disk in an order
//! that survives power cuts, and what a guest saw completed survives the death of this process.
//!
//! # For callers
//!
//! ```text
//! let header = qcow2::Header::read(&file).await?;      // what is it, which backing file?
//! // … open header.backing through the open gate, as a Node …
//! let keep = Keep::open(&state_dir, identity, "qcow2")?;      // for disks that are served
//! let image = Qcow2::open(file, OpenOptions { read_only, backing, keep, .. }).await?;
//! let node = Node::new(Arc::new(FormatDriver::new(image)?), …);
//! node.driver().resume(nonce).await?;          // device: decide what becomes of an earlier session
//! node.driver().begin_session(new_nonce)?;     // device: from now on completed writes are kept
//!
//! let new = NewImage::lay_out(file, &CreateOptions { size, cluster_size, backing, .. }).await?;
//! // … nothing will be refused any more: empty the file …
//! new.write().await?;
//! ```
//!
//! Tools that serve no guest (`convert`, `resize`) pass no keep, call neither `resume` nor
//! `begin_session`, and flush or close at the end. Nothing here opens files.
//!
//! # How it works
//!
//! ```text
//! FormatDriver ─ map ──────► imago: get_mapping            (reads go to the file directly)
//!              ─ prepare ──► mapped, nothing pending: in place, no lock
//!                            else: lock the clusters, read what surrounds the write,
//!                                  take a turn at the L2 table, imago: prepare_data_mapping
//!              ─ write ────► file, with what surrounds it
//!              ─ commit ───► imago: commit_data_mapping; record in the keep
//!              ─ flush ────► checkpoint: imago's state → overlay → file, in phases
//! ```
//!
//! * `read`, `plan`, `write`, `place`, `clear`, `resize`: what is asked of the image.
//! * `session`, `flush`: what makes it survive.
//! * [`check`], [`measure`], [`Metadata`]: what can be said of an image without opening it by imago.
//! * `store`: what imago takes for its file: an overlay over the metadata.
//! * `checkpoint`: writes the overlay out; power cuts.
//! * `disk`: access to the file itself, whatever its alignment; who still writes where.
//!
//! **Power cuts.** Between two checkpoints the file's metadata does not change at all. A flush is a
//! checkpoint. One is also made when much metadata has piled up or the keep is full.
//!
//! **Kills.** The overlay dies with the process. So a request that changes metadata, or that writes
//! into a cluster whose metadata is not on disk yet, is recorded in the [`Keep`] before it
//! completes: what was asked for, with the data. Redone in order on top of the image on disk they
//! give what the guest saw. A write to a cluster that was there at the last flush costs nothing
//! extra: its data is in the page cache, its mapping on disk. Without a keep, such a request
//! completes only after a checkpoint of its own.
//!
//! **Discards** keep the cluster allocated, as a preallocated zero cluster, and punch a hole into
//! the file after the next checkpoint: the host gets its space back, no mapping in use is ever
//! invalidated, and no freed cluster is given out again while the state on disk refers to it.
//!
//! # Invariants
//!
//! * Locks are taken in this order: guest range, slot, meta, (sectors). A checkpoint takes its turn,
//!   then meta exclusively, and never a guest range. Meta is held (shared) from before a mapping is
//!   prepared until it is committed, so a checkpoint never sees half a change, nor a mapping whose
//!   data has not been written.
//! * imago never copies up: it is always asked for whole clusters.
//! * A failed checkpoint, and a failed commit, poison the image: later writes and flushes fail,
//!   reads go on.
//!
//! # Limits
//!
//! * Encrypted images, external data files, zstd, subclusters: refused. Shrinking: refused.
//! * Writes that allocate under the same L2 table (512 MiB of disk at 64 KiB clusters) run one at a
//!   time but for what they read, because imago locks the table from prepare to commit.
//! * A compressed cluster that is overwritten leaks its old space, as does a table that had to
//!   move: imago would reuse it before the disk has forgotten it. `qemu-img check -r leaks`
//!   reclaims it.
//! * Version 2 images have no zero clusters: discards do nothing there, zeroes are written out.

mod bitmaps;
pub mod check;
mod checkpoint;
mod clear;
#[cfg(test)]
mod crash_tests;
mod create;
mod disk;
mod flush;
mod header;
pub mod measure;
mod metadata;
mod pending;
mod place;
mod plan;
mod read;
mod rename;
mod resize;
mod session;
mod snapshots;
mod store;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping};

pub use self::create::{CreateOptions, NewImage};
pub use self::header::{Backing, Header};
pub use self::metadata::Metadata;

use self::checkpoint::Layout;
use self::disk::{Disk, Tracker};
use self::flush::UnderWay;
use self::metadata::Listed;
use self::pending::Pending;
use self::store::Store;
use crate::block::{
    Extent, Format, Keep, Limits, Node, Plan, PlanOp, Planned, Prepared, Quiesced, RangeLock,
};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{Buffers, File, Fut};
use crate::units::{ByteRange, align_down, align_up};

type Imago = imago::qcow2::Qcow2<Store>;

/// Smallest request, in bytes.
const BLOCK: u64 = 512;
/// Largest piece of a write that is prepared at once, in bytes. Bounds a record in the keep.
const MAX_RUN: u64 = 1 << 20;
/// How much metadata may wait for a checkpoint before one is made without a flush, in bytes.
const MAX_DIRTY: u64 = 32 << 20;
/// How many L2 tables may have a prepared mapping at once: imago's cache must not fill up with
/// them.
const SLOTS: u64 = 32;
/// How to open an image.
#[derive(Debug, Default)]
pub struct OpenOptions {
    /// Refuse writes; the file need not be writable.
    pub read_only: bool,
    /// The backing image, opened by the caller; must be there if and only if the header names one,
    /// unless `overrides_backing`.
    pub backing: Option<Node>,
    /// The operator says what the image stands on, whatever its header names.
    pub overrides_backing: bool,
    /// Where completed writes are kept across the death of this process.
    pub keep: Option<Keep>,
}

/// A qcow2 image. Usable from any number of threads.
pub struct Qcow2 {
    disk: Arc<Disk>,
    store: Store,
    image: FormatAccess<Store>,
    header: Header,
    /// What it has besides the disk, as it was when it was opened.
    listed: Listed,
    cluster_size: u64,
    /// Size of the disk in bytes.
    size: AtomicU64,
    read_only: bool,
    /// Replaced only while nobody uses the image.
    backing: RwLock<Option<Node>>,
    /// What the header names now, if that was changed since it was read.
    renamed: Mutex<Option<Option<Backing>>>,
    keep: Option<Keep>,
    /// Whether a guest's session runs: completed writes must survive this process.
    session: AtomicBool,

    /// Clusters of the disk that are being allocated, written in order, or cleared.
    guest: RangeLock,
    /// Bounds how many L2 tables imago holds at once; see [`SLOTS`].
    slots: RangeLock,
    /// Shared: changes the metadata. Exclusive: takes a snapshot of it.
    meta: RangeLock,
    /// Held by the checkpoint that runs.
    turn: RangeLock,

    /// Where the metadata lies on disk. `None` if read-only.
    layout: Mutex<Option<Arc<Layout>>>,
    /// A snapshot whose phases have begun, until they are all done.
    under_way: Mutex<Option<Arc<UnderWay>>>,
    /// Checkpoints begun and the number of the last that was completed.
    begun: AtomicU64,
    completed: AtomicU64,
    /// Number of the snapshot that the next change will be part of.
    generation: AtomicU64,
    /// Whether the image says that what we do not keep up to date (persistent bitmaps) is: until the
    /// first change of the disk, and not any more then.
    has_claims: AtomicBool,
    /// Counts changes of metadata and records, to tell whether a checkpoint has anything to do.
    changes: AtomicU64,
    /// The count that the last completed snapshot covered.
    changes_saved: AtomicU64,
    /// Counts changes that take away mappings somebody may be about to write through.
    revocations: AtomicU64,
    pending: Mutex<Pending>,
    /// Ranges of the file to punch holes into, with the snapshot that must be complete first.
    punches: Mutex<Vec<(u64, ByteRange)>>,
    /// Metadata writes handed to the kernel.
    meta_writes: Arc<Tracker>,
    /// Why writes are refused, if they are.
    poison: Mutex<Option<String>>,
    poisoned: AtomicBool,
    /// Set while the size changes: no checkpoint in the middle.
    resizing: AtomicBool,
}

impl Qcow2 {
    /// Opens an image.
    ///
    /// # Errors
    /// Names the file and what is wrong. A refused image is not modified; neither is an accepted
    /// one before its first flush.
    pub async fn open(file: Arc<dyn File>, options: OpenOptions) -> Result<Qcow2> {
        let name = file.name().to_string();
        Qcow2::open_unnamed(file, options).await.context(|| name)
    }

    async fn open_unnamed(file: Arc<dyn File>, options: OpenOptions) -> Result<Qcow2> {
        let header = Header::read_unnamed(&file).await?;
        header.check_supported(options.read_only)?;
        if !options.overrides_backing {
            check_backing(&header, options.backing.as_ref())?;
        }
        let cluster_size = header.cluster_size();
        let disk = Arc::new(Disk::new(Arc::clone(&file)));
        disk.len()?;
        let store = Store::new(Arc::clone(&disk), cluster_size);
        if options.read_only {
            // imago refuses what is dirty or corrupt; reading is harmless.
            let shown = header.incompatible & !0b11;
            store.write(header::field::INCOMPATIBLE as u64, &shown.to_be_bytes()).await?;
        } else if header.autoclear != 0 {
            // imago would clear what it does not know, and rewrite the whole header, at once.
            store.write(header::field::AUTOCLEAR as u64, &[0; 8]).await?;
        }
        let builder = Imago::builder(store.clone()).write(!options.read_only).backing(None);
        let image = builder.data_file(None).open(DenyImplicitOpenGate::default()).await?;
        if !options.read_only {
            // The bits are true until somebody writes.
            store.forget(ByteRange { offset: 0, len: store.granule() });
        }
        let layout = match options.read_only {
            true => None,
            false => Some(Arc::new(Layout::load(&disk, &header).await?)),
        };
        if let Some(keep) = &options.keep
            && options.read_only
        {
            return Err(Error::invalid(format!(
                "a read-only image keeps nothing ({})",
                keep.path().display()
            )));
        }
        let has_claims = !options.read_only && header.autoclear != 0;
        // The disk can do without.
        let listed = Listed::read(&file, &header).await.unwrap_or_else(|err| {
            tracing::warn!("{}: its snapshots and bitmaps cannot be told: {err}", file.name());
            Listed::default()
        });
        Ok(Qcow2 {
            listed,
            size: AtomicU64::new(header.size),
            cluster_size,
            read_only: options.read_only,
            backing: RwLock::new(options.backing),
            renamed: Mutex::default(),
            keep: options.keep,
            session: AtomicBool::new(false),
            image: FormatAccess::new(image),
            disk,
            store,
            header,
            guest: RangeLock::new(),
            slots: RangeLock::new(),
            meta: RangeLock::new(),
            turn: RangeLock::new(),
            layout: Mutex::new(layout),
            under_way: Mutex::default(),
            begun: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            generation: AtomicU64::new(1),
            has_claims: AtomicBool::new(has_claims),
            changes: AtomicU64::new(0),
            changes_saved: AtomicU64::new(0),
            revocations: AtomicU64::new(0),
            pending: Mutex::default(),
            punches: Mutex::default(),
            meta_writes: Arc::default(),
            poison: Mutex::default(),
            poisoned: AtomicBool::new(false),
            resizing: AtomicBool::new(false),
        })
    }

    /// What the header said when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn name(&self) -> &str {
        self.disk.file().name()
    }

    /// The whole clusters around a range; the last one ends with the disk at the latest.
    fn clusters(&self, range: ByteRange) -> ByteRange {
        let end = align_up(range.end(), self.cluster_size).unwrap_or(u64::MAX);
        ByteRange::between(align_down(range.offset, self.cluster_size), end.min(self.size()))
    }

    /// How far the L2 table of `offset` reaches.
    fn l2_end(&self, offset: u64) -> u64 {
        let covered = self.cluster_size * (self.cluster_size / 8);
        align_down(offset, covered).saturating_add(covered)
    }

    /// The slot of the L2 table of `offset`.
    fn slot(&self, offset: u64) -> ByteRange {
        let table = offset / (self.cluster_size * (self.cluster_size / 8));
        ByteRange { offset: table % SLOTS, len: 1 }
    }

    async fn shallow(&self, range: ByteRange) -> Result<(ShallowMapping<'_, Store>, ByteRange)> {
        let (mapping, len) = self.image.get_shallow_mapping(range.offset, range.len).await?;
        if len == 0 {
            return Err(Error::corrupt(format!("no mapping at {} of the disk", range.offset)));
        }
        Ok((mapping, ByteRange { offset: range.offset, len: len.min(range.len) }))
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is read-only", self.name())));
        }
        if self.poisoned.load(Ordering::Acquire) {
            let why = self.poison.lock().unwrap().clone().unwrap_or_default();
            return Err(Error::new(
                ErrorKind::Poisoned,
                format!(
                    "{} is not written to any more, because its metadata could not be: {why}",
                    self.name()
                ),
            ));
        }
        Ok(())
    }

    fn set_poison(&self, cause: &Error) {
        let mut poison = self.poison.lock().unwrap();
        if poison.is_none() {
            tracing::error!(
                image = self.name(),
                "its metadata could not be written, writes are refused from now on: {cause}"
            );
            *poison = Some(cause.to_string());
            self.poisoned.store(true, Ordering::Release);
        }
    }
}

fn check_backing(header: &Header, backing: Option<&Node>) -> Result<()> {
    match (&header.backing, backing) {
        (Some(named), None) => Err(Error::invalid(format!(
            "the image has the backing file '{}', which was not opened",
            named.file
        ))),
        (None, Some(node)) => Err(Error::invalid(format!(
            "the image names no backing file, but node {} was given as one",
            node.name()
        ))),
        (Some(_), Some(_)) | (None, None) => Ok(()),
    }
}

impl Format for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn limits(&self) -> Limits {
        Limits {
            size: self.size(),
            request_alignment: BLOCK,
            memory_alignment: self.disk.file().alignment().memory,
            optimal_io: self.cluster_size,
            discard_granularity: if self.header.version > 2 { self.cluster_size } else { 0 },
            read_only: self.read_only,
        }
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        self.plan_now(op, range, plan)
    }

    fn map<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent> {
        Box::pin(async move {
            let (mapping, run) = self.shallow(range).await?;
            Ok(Extent { range: run, kind: self.kind_to_read(mapping, run) })
        })
    }

    fn look<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent> {
        Box::pin(async move {
            let (mapping, run) = self.shallow(range).await?;
            Ok(Extent { range: run, kind: self.extent_kind(mapping) })
        })
    }

    fn prepare_write<'a>(&'a self, range: ByteRange) -> Fut<'a, Prepared<'a>> {
        Box::pin(self.place(range))
    }

    fn read_opaque<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.read_special(offset, buf))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.clear(range, false, may_unmap))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.clear(range, true, true))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            match self.read_only {
                true => Ok(()),
                false => self.checkpoint().await,
            }
        })
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        Box::pin(self.grow(size))
    }

    fn backing(&self) -> Option<Node> {
        self.backing.read().unwrap().clone()
    }

    fn set_backing(&self, backing: Option<Node>, _quiesced: &Quiesced) -> Result<()> {
        *self.backing.write().unwrap() = backing;
        Ok(())
    }

    fn check_rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        Box::pin(async move {
            let backing = backing.map(Backing::from);
            self.renaming(backing.as_ref()).await.map(drop)
        })
    }

    fn rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        Box::pin(self.rename(backing.map(Backing::from)))
    }

    fn details(&self) -> serde_json::Value {
        let mut details = match self.renamed.lock().unwrap().clone() {
            Some(backing) => {
                let mut header = self.header.clone();
                header.backing = backing;
                header.details()
            }
            None => self.header.details(),
        };
        let are_current = self.read_only || self.has_claims.load(Ordering::Relaxed);
        self.listed.tell(are_current, &mut details);
        details
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(self.resume_session(nonce))
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.start_keeping(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        self.keep.as_ref()
    }

    fn close<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            if self.read_only {
                return Ok(());
            }
            self.checkpoint().await?;
            match &self.keep {
                Some(keep) => keep.discard(),
                None => Ok(()),
            }
        })
    }
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qcow2({})", self.name())
    }
}
