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
//! let node = Node::new(Arc::new(FormatDriver::new(image)), …);
//! node.driver().resume(nonce).await?;          // device: decide what becomes of an earlier session
//! node.driver().begin_session(new_nonce)?;     // device: from now on completed writes are kept
//!
//! qcow2::create(file, &CreateOptions { size, cluster_size, backing, .. }).await?;
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
//!                            else: lock the clusters, copy up what surrounds the write,
//!                                  imago: prepare_data_mapping
//!              ─ write ────► file
//!              ─ commit ───► imago: commit_data_mapping; record in the keep
//!              ─ flush ────► checkpoint: imago's state → overlay → file, in phases
//! ```
//!
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
//!   time, because imago locks the table from prepare to commit.
//! * A compressed cluster that is overwritten leaks its old space, as does a table that had to
//!   move: imago would reuse it before the disk has forgotten it. `qemu-img check -r leaks`
//!   reclaims it.
//! * Version 2 images have no zero clusters: discards do nothing there, zeroes are written out.

pub mod check;
mod checkpoint;
#[cfg(test)]
mod crash_tests;
mod disk;
mod header;
pub mod measure;
mod metadata;
mod pending;
mod snapshots;
mod store;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::task::{Context, Poll, Waker};

use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder,
    PreparedDataMapping, ShallowMapping,
};

pub use self::header::{Backing, Header};
pub use self::metadata::Metadata;

use self::checkpoint::{Layout, Snapshot};
use self::disk::{ALL, Disk, Token, Tracker};
use self::pending::Pending;
use self::store::Store;
use crate::block::format::plan_file;
use crate::block::keep::Reservation;
use crate::block::{
    Extent, ExtentKind, Format, Keep, Limits, Node, Plan, PlanExtent, PlanOp, Planned, Prepared,
    Quiesced, RangeGuard, RangeLock, WriteCommit, driver::Pin,
};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{AlignedBuf, Alignment, Buffers, File, Fut, Hole};
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
/// Kinds of records in the keep.
const RECORD_WRITE: u8 = 1;
const RECORD_ZERO: u8 = 2;
const RECORD_DISCARD: u8 = 3;
/// Kind, offset and length, 8 bytes each.
const RECORD_HEADER: usize = 24;

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

/// How to create an image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes; a multiple of 512, not 0.
    pub size: u64,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// The backing file to name in the header; the format must be given. Not opened or checked.
    pub backing: Option<Backing>,
}

impl CreateOptions {
    /// An image of `size` bytes with 64 KiB clusters, as `qemu-img create` makes it.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions { size, cluster_size: 65536, refcount_bits: 16, backing: None }
    }

    /// Checks everything but the size and the backing file.
    ///
    /// # Errors
    /// Names the option, what was given and what is allowed.
    pub fn check(&self) -> Result<()> {
        let CreateOptions { cluster_size, refcount_bits, .. } = self;
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(cluster_size) {
            return Err(Error::invalid(format!(
                "cluster size {cluster_size} is not a power of two from 512 to 2097152"
            )));
        }
        if !refcount_bits.is_power_of_two() || *refcount_bits > 64 {
            return Err(Error::invalid(format!(
                "refcount width {refcount_bits} is not a power of two from 1 to 64"
            )));
        }
        Ok(())
    }
}

/// A qcow2 image. Usable from any number of threads.
pub struct Qcow2 {
    disk: Arc<Disk>,
    store: Store,
    image: FormatAccess<Store>,
    header: Header,
    cluster_size: u64,
    /// Size of the disk in bytes.
    size: AtomicU64,
    read_only: bool,
    /// Replaced only while nobody uses the image.
    backing: RwLock<Option<Node>>,
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

/// A snapshot on its way to the disk.
#[derive(Debug)]
struct UnderWay {
    snapshot: Snapshot,
    generation: u64,
    changes: u64,
    hazards: u64,
}

/// What lies around a write inside its clusters.
enum Surroundings {
    Zero,
    Data(AlignedBuf),
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
        match (&options.backing, options.overrides_backing) {
            (backing, false) => check_backing(&header, backing.as_ref())?,
            (Some(backing), true) => check_backing_alignment(backing)?,
            (None, true) => {}
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
            // To be cleared by whoever does not know them. imago would rewrite the whole header.
            store.write(header::field::AUTOCLEAR as u64, &[0; 8]).await?;
        }
        let builder = Imago::builder(store.clone()).write(!options.read_only).backing(None);
        let image = builder.data_file(None).open(DenyImplicitOpenGate::default()).await?;
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
        Ok(Qcow2 {
            size: AtomicU64::new(header.size),
            cluster_size,
            read_only: options.read_only,
            backing: RwLock::new(options.backing),
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

    /// Whether something of the backing shows at a place that is not allocated.
    fn backing_shows(&self, offset: u64) -> bool {
        self.backing.read().unwrap().as_ref().is_some_and(|backing| offset < backing.size())
    }

    fn extent_kind(&self, mapping: ShallowMapping<'_, Store>, range: ByteRange) -> ExtentKind {
        match mapping {
            ShallowMapping::Raw { offset, .. } => {
                let file = Arc::new(Data { disk: Arc::clone(&self.disk) });
                ExtentKind::Data { file, offset }
            }
            ShallowMapping::Zero { explicit: false, .. } => match self.backing() {
                // The adapter hands its own requests down; those that the backing would refuse
                // are read by us.
                Some(backing) if !range.is_aligned(backing.limits().request_alignment) => {
                    ExtentKind::Opaque
                }
                Some(_) => ExtentKind::Backing,
                None => ExtentKind::Zero { explicit: false },
            },
            ShallowMapping::Zero { .. } => ExtentKind::Zero { explicit: true },
            _ => ExtentKind::Opaque,
        }
    }

    /// Reads any part of the backing; zeros where it ends.
    async fn read_backing(&self, offset: u64, buf: Buffers) -> Result<()> {
        let Some(backing) = self.backing() else {
            buf.fill_zero();
            return Ok(());
        };
        let have = backing.size().saturating_sub(offset).min(buf.len());
        buf.slice(have, buf.len() - have).fill_zero();
        if have == 0 {
            return Ok(());
        }
        let limits = backing.limits();
        let wanted = ByteRange { offset, len: have };
        if wanted.is_aligned(limits.request_alignment) {
            return backing.read(offset, buf.slice(0, have)).await;
        }
        let start = align_down(offset, limits.request_alignment);
        let end = align_up(wanted.end(), limits.request_alignment).unwrap_or(u64::MAX);
        let whole = ByteRange::between(start, end.min(backing.size()));
        let bounce = AlignedBuf::zeroed(whole.len as usize, limits.memory_alignment.max(512));
        backing.read(start, bounce.buffers()).await?;
        let part = bounce.buffers().slice(offset - start, have);
        buf.copy_from_slice(&disk::private_copy(&part, 512).to_vec());
        Ok(())
    }

    /// Reads a run that is compressed, or lies in a backing that wants other alignment.
    async fn read_special(&self, mut offset: u64, buf: Buffers) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let want = ByteRange { offset, len: (buf.len() - done).min(MAX_RUN) };
            let (mapping, run) = self.shallow(want).await?;
            let part = buf.slice(done, run.len);
            match mapping {
                ShallowMapping::Zero { explicit: false, .. } => {
                    self.read_backing(offset, part).await?
                }
                ShallowMapping::Zero { .. } => part.fill_zero(),
                ShallowMapping::Raw { offset, .. } => self.disk.read(offset, part).await?,
                _ => {
                    let mut bytes = vec![0; run.len as usize];
                    self.image
                        .read(&mut bytes[..], offset)
                        .await
                        .context(|| format!("compressed data of {run}"))?;
                    part.copy_from_slice(&bytes);
                }
            }
            offset += run.len;
            done += run.len;
        }
        Ok(())
    }

    /// What a part of a cluster reads as now.
    async fn surroundings(&self, range: ByteRange) -> Result<Surroundings> {
        let mut at = range;
        while !at.is_empty() {
            let (mapping, run) = self.shallow(at).await?;
            match mapping {
                ShallowMapping::Zero { explicit: true, .. } => {}
                ShallowMapping::Zero { .. } if !self.backing_shows(run.offset) => {}
                _ => {
                    let buf = AlignedBuf::zeroed(range.len as usize, 4096);
                    self.read_special(range.offset, buf.buffers()).await?;
                    return Ok(Surroundings::Data(buf));
                }
            }
            at = ByteRange::between(run.end(), range.end());
        }
        Ok(Surroundings::Zero)
    }

    /// Puts what surrounds a write into the new cluster.
    async fn fill(&self, mut offset: u64, len: u64, what: &Surroundings) -> Result<()> {
        let mut done = 0;
        let zeros = match what {
            Surroundings::Zero => {
                // Beyond the end of the file there are zeros already.
                let inside = self.disk.len()?.saturating_sub(offset).min(len);
                if inside == 0 {
                    return Ok(());
                }
                Some(AlignedBuf::zeroed(inside.min(MAX_RUN) as usize, 4096))
            }
            Surroundings::Data(_) => None,
        };
        while done < len {
            let part = (len - done).min(MAX_RUN);
            let buf = match (what, &zeros) {
                (Surroundings::Data(data), _) => data.buffers().slice(done, part),
                (_, Some(zeros)) => zeros.buffers().slice(0, part.min(zeros.len() as u64)),
                _ => return Ok(()),
            };
            let written = buf.len();
            let token = self.disk.payload.begin(ByteRange { offset, len: written });
            self.disk.write(offset, buf, token).await?;
            offset += written;
            done += written;
            if zeros.is_some() && self.disk.len()? <= offset {
                return Ok(());
            }
        }
        Ok(())
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

    /// A place for a write of a prefix of `range`.
    async fn place(&self, range: ByteRange) -> Result<Prepared<'_>> {
        self.check_writable()?;
        let range = ByteRange { offset: range.offset, len: range.len.min(MAX_RUN) };
        if let Some(place) = self.place_in_use(range).await? {
            return Ok(place);
        }
        loop {
            if let Some(place) = self.place_locked(range).await? {
                return Ok(place);
            }
            self.checkpoint().await?;
        }
    }

    /// A place that is mapped on disk already.
    async fn place_in_use(&self, range: ByteRange) -> Result<Option<Prepared<'_>>> {
        let revocations = self.revocations.load(Ordering::SeqCst);
        let (mapping, run) = self.shallow(range).await?;
        let ShallowMapping::Raw { offset, writable: true, .. } = mapping else { return Ok(None) };
        // Announced first: who takes the mapping away after the look at the counter waits for us.
        let token = self.disk.payload.begin(ByteRange { offset, len: run.len });
        if !self.may_write_through(run, revocations) {
            return Ok(None);
        }
        let file = Place::new(&self.disk, token, false);
        Ok(Some(Prepared { range: run, file, offset, commit: None }))
    }

    /// Whether a mapping got when `revocations` were counted may be written through without more.
    fn may_write_through(&self, range: ByteRange, revocations: u64) -> bool {
        self.revocations.load(Ordering::SeqCst) == revocations
            && !self.pending.lock().unwrap().overlaps(range)
    }

    /// A place that must be allocated, or whose writes must be recorded; `None` if a checkpoint is
    /// needed first.
    async fn place_locked(&self, range: ByteRange) -> Result<Option<Prepared<'_>>> {
        let clusters = self.clusters(range);
        let guest = self.guest.exclusive(clusters).await;
        let slot = self.slots.exclusive(self.slot(range.offset)).await;
        if self.store.dirty_bytes() > MAX_DIRTY && !self.resizing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let within = ByteRange::between(range.offset, range.end().min(self.l2_end(range.offset)));
        let (mapping, mut run) = self.shallow(within).await?;
        let mut in_place = None;
        let mut hazard = false;
        match mapping {
            ShallowMapping::Raw { offset, writable: true, .. } => in_place = Some(offset),
            ShallowMapping::Raw { offset, .. } => hazard = self.frees(offset, run).await?,
            // One at a time, so that each gets its own preallocated cluster back.
            ShallowMapping::Zero { explicit: true, .. } => {
                let end = align_down(run.offset, self.cluster_size) + self.cluster_size;
                run = ByteRange::between(run.offset, end.min(run.end()));
                hazard = self.header.snapshots > 0;
            }
            ShallowMapping::Zero { .. } => {}
            _ => hazard = true,
        }
        let around = self.clusters(run);
        let head = ByteRange::between(around.offset, run.offset);
        let tail = ByteRange::between(run.end(), around.end());
        let (head_data, tail_data) = match in_place {
            Some(_) => (Surroundings::Zero, Surroundings::Zero),
            None => (self.surroundings(head).await?, self.surroundings(tail).await?),
        };

        let meta = self.meta.shared(ALL).await;
        let Some(promise) = self.promise(run.len) else { return Ok(None) };
        self.set_pending(around);
        let (mapping, offset) = match in_place {
            Some(offset) => (None, offset),
            None => {
                if hazard {
                    self.store.announce_hazard();
                }
                let mapping = self
                    .image
                    .prepare_data_mapping(around.offset, around.len, true)
                    .await
                    .context(|| format!("{}: allocating {around}", self.name()))?;
                let host = ByteRange { offset: mapping.offset(), len: mapping.length() };
                if self.is_under_way(host) {
                    // Freed by a cancelled request, and a snapshot from before still writes there.
                    return Ok(None);
                }
                self.store.forget(host);
                self.unpunch(host);
                let got = ByteRange { offset: around.offset, len: host.len };
                self.fill(host.offset, head.len, &head_data).await?;
                if got.end() == around.end() {
                    self.fill(host.offset + (tail.offset - got.offset), tail.len, &tail_data)
                        .await?;
                }
                run = ByteRange::between(run.offset, run.end().min(got.end()));
                (Some(mapping), host.offset + head.len)
            }
        };
        let token = self.disk.payload.begin(ByteRange { offset, len: run.len });
        let place = Place::new(&self.disk, token, promise.wants_data());
        let commit = Commit {
            image: self,
            mapping,
            promise,
            run,
            place: Arc::clone(&place),
            _guards: (meta, slot, guest),
        };
        Ok(Some(Prepared { range: run, file: place, offset, commit: Some(Box::new(commit)) }))
    }

    /// Whether overwriting these shared clusters takes away somebody's last reference.
    async fn frees(&self, offset: u64, run: ByteRange) -> Result<bool> {
        let Some(layout) = self.layout.lock().unwrap().clone() else { return Ok(true) };
        let mut at = align_down(offset, self.cluster_size);
        while at < offset + run.len {
            if layout.refcount(&self.store, at).await? < 2 {
                return Ok(true);
            }
            at += self.cluster_size;
        }
        Ok(false)
    }

    /// Settles how a change is going to survive a kill; `None` if the keep is full. Called with
    /// meta held, so that no checkpoint comes between this and the record.
    fn promise(&self, payload: u64) -> Option<Promise<'_>> {
        if !self.session.load(Ordering::Acquire) {
            return Some(Promise::Nothing);
        }
        let len = RECORD_HEADER as u64 + payload;
        match &self.keep {
            Some(keep) if keep.can_ever_hold(len) => keep.reserve(len).map(Promise::Record),
            _ => Some(Promise::Checkpoint),
        }
    }

    fn set_pending(&self, range: ByteRange) {
        if self.session.load(Ordering::Acquire) {
            let generation = self.generation.load(Ordering::SeqCst);
            self.pending.lock().unwrap().insert(range, generation);
        }
    }

    fn is_under_way(&self, range: ByteRange) -> bool {
        let under_way = self.under_way.lock().unwrap();
        under_way.as_ref().is_some_and(|under_way| under_way.snapshot.covers(range))
    }

    /// Keeps a promise, with meta held; true if a checkpoint must follow once it is released.
    fn fulfil(&self, promise: Promise<'_>, kind: u8, range: ByteRange, data: &[&[u8]]) -> bool {
        self.changes.fetch_add(1, Ordering::SeqCst);
        match promise {
            Promise::Nothing => false,
            Promise::Checkpoint => true,
            Promise::Record(reservation) => {
                let mut header = [0; RECORD_HEADER];
                header[0] = kind;
                header[8..16].copy_from_slice(&range.offset.to_le_bytes());
                header[16..].copy_from_slice(&range.len.to_le_bytes());
                let mut pieces = vec![&header[..]];
                pieces.extend(data);
                match reservation.append(&pieces) {
                    Ok(()) => false,
                    Err(err) => {
                        tracing::warn!("flushing instead of keeping a record: {err}");
                        true
                    }
                }
            }
        }
    }

    /// Writes data through [`Qcow2::place`], as the adapter does.
    async fn write_out(&self, mut offset: u64, data: Buffers) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let place = self.place(ByteRange { offset, len: data.len() - done }).await?;
            let len = place.range.len;
            place.file.write(place.offset, data.slice(done, len), false).await?;
            if let Some(commit) = place.commit {
                commit.commit().await?;
            }
            offset += len;
            done += len;
        }
        Ok(())
    }

    /// Writes zeros as data, except where zeros are read already.
    async fn write_zero_data(&self, range: ByteRange) -> Result<()> {
        let mut at = range;
        while !at.is_empty() {
            let want = ByteRange { offset: at.offset, len: at.len.min(MAX_RUN) };
            let (mapping, run) = self.shallow(want).await?;
            let zero = match mapping {
                ShallowMapping::Zero { explicit, .. } => {
                    explicit || !self.backing_shows(run.offset)
                }
                _ => false,
            };
            if !zero {
                let zeros = AlignedBuf::zeroed(run.len as usize, 4096);
                self.write_out(run.offset, zeros.buffers()).await?;
            }
            at = ByteRange::between(run.end(), at.end());
        }
        Ok(())
    }

    /// Zeroes or discards a range.
    async fn clear(&self, range: ByteRange, discard: bool, may_unmap: bool) -> Result<()> {
        self.check_writable()?;
        let mut whole = ByteRange::between(range.offset, range.offset);
        if self.header.version > 2 {
            let start = align_up(range.offset, self.cluster_size).unwrap_or(u64::MAX);
            let end = match range.end() == self.size() {
                true => range.end(),
                false => align_down(range.end(), self.cluster_size),
            };
            if start < end {
                whole = ByteRange::between(start, end);
            }
        }
        if !discard {
            self.write_zero_data(ByteRange::between(range.offset, whole.offset)).await?;
        }
        let mut at = whole;
        while !at.is_empty() {
            let chunk = ByteRange::between(at.offset, at.end().min(self.l2_end(at.offset)));
            match self.clear_clusters(chunk, discard, may_unmap).await? {
                Some(done) => at = ByteRange::between(at.offset + done, at.end()),
                None => self.checkpoint().await?,
            }
        }
        if !discard {
            self.write_zero_data(ByteRange::between(whole.end(), range.end())).await?;
        }
        Ok(())
    }

    /// Makes a prefix of a run of whole clusters zero clusters; returns its length, or `None` if a
    /// checkpoint is needed first.
    async fn clear_clusters(
        &self,
        chunk: ByteRange,
        discard: bool,
        may_unmap: bool,
    ) -> Result<Option<u64>> {
        let guest = self.guest.exclusive(chunk).await;
        let slot = self.slots.exclusive(self.slot(chunk.offset)).await;
        if self.store.dirty_bytes() > MAX_DIRTY && !self.resizing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (mapping, run) = self.shallow(chunk).await?;
        let mut host = None;
        let mut hazard = false;
        match mapping {
            ShallowMapping::Zero { explicit: true, .. } => return Ok(Some(run.len)),
            ShallowMapping::Zero { .. } if discard || !self.backing_shows(run.offset) => {
                return Ok(Some(run.len));
            }
            ShallowMapping::Zero { .. } => {}
            ShallowMapping::Raw { offset, writable, .. } => {
                host = Some((ByteRange { offset, len: run.len }, writable));
            }
            _ => hazard = true,
        }
        let meta = self.meta.shared(ALL).await;
        let Some(promise) = self.promise(0) else { return Ok(None) };
        self.set_pending(run);
        self.revocations.fetch_add(1, Ordering::SeqCst);
        if let Some((host, _)) = host {
            self.disk.payload.settle(host).await;
        }
        if hazard {
            self.store.announce_hazard();
        }
        let mut at = run;
        while !at.is_empty() {
            let (start, len) = self
                .image
                .inner()
                .ensure_zero_mapping(at.offset, at.len)
                .await
                .context(|| format!("{}: zeroing {at}", self.name()))?;
            if start != at.offset || len == 0 {
                return Err(Error::corrupt(format!("{}: cannot zero {at}", self.name())));
            }
            self.changes.fetch_add(1, Ordering::SeqCst);
            at = ByteRange::between(at.offset + len, at.end());
        }
        if let Some((host, true)) = host
            && may_unmap
        {
            let generation = self.generation.load(Ordering::SeqCst);
            self.punches.lock().unwrap().push((generation, host));
        }
        let kind = if discard { RECORD_DISCARD } else { RECORD_ZERO };
        let must_checkpoint = self.fulfil(promise, kind, run, &[]);
        drop((meta, slot, guest));
        if must_checkpoint {
            self.checkpoint().await?;
        }
        Ok(Some(run.len))
    }

    /// The range of the file is about to hold data: no hole may be punched into it any more.
    fn unpunch(&self, range: ByteRange) {
        let mut punches = self.punches.lock().unwrap();
        if !punches.iter().any(|(_, punch)| punch.overlaps(&range)) {
            return;
        }
        let cut = |(generation, punch): (u64, ByteRange)| {
            let before = ByteRange::between(punch.offset, punch.end().min(range.offset));
            let after = ByteRange::between(punch.offset.max(range.end()), punch.end());
            [(generation, before), (generation, after)]
        };
        let rest: Vec<_> = std::mem::take(&mut *punches).into_iter().flat_map(cut).collect();
        punches.extend(rest.into_iter().filter(|(_, punch)| !punch.is_empty()));
    }

    /// Gives the space of discarded clusters back to the host. Their being zero is on disk.
    fn punch(&self, generation: u64) {
        const CHUNK: u64 = 64 << 20;
        let Some(host) = self.disk.file().as_host() else {
            self.punches.lock().unwrap().retain(|(punch, _)| *punch > generation);
            return;
        };
        loop {
            // One call with the list locked: whoever is about to write there waits for it.
            let mut punches = self.punches.lock().unwrap();
            let due = punches.iter().position(|(punch, _)| *punch <= generation);
            let Some(due) = due else { return };
            let (_, range) = &mut punches[due];
            let part = ByteRange { offset: range.offset, len: range.len.min(CHUNK) };
            *range = ByteRange::between(part.end(), range.end());
            if range.is_empty() {
                punches.swap_remove(due);
            }
            let flags =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            // What cannot be freed stays allocated, and reads as zeros by its mapping.
            let _ = rustix::fs::fallocate(host, flags, part.offset, part.len);
        }
    }

    /// Makes everything completed so far durable, metadata included; see [`checkpoint`]. Drops
    /// what the keep holds of it.
    async fn checkpoint(&self) -> Result<()> {
        self.check_writable()?;
        let before = self.begun.load(Ordering::SeqCst);
        let _turn = self.turn.exclusive(ALL).await;
        self.check_writable()?;
        if self.completed.load(Ordering::SeqCst) > before {
            // Somebody else's began after we were called.
            return Ok(());
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        match self.checkpoint_now().await {
            Ok(()) => {
                self.completed.store(number, Ordering::SeqCst);
                Ok(())
            }
            Err(err) => {
                let err = err.context(format!("{}: flush", self.name()));
                self.set_poison(&err);
                Err(err)
            }
        }
    }

    async fn checkpoint_now(&self) -> Result<()> {
        let left_over = self.under_way.lock().unwrap().clone();
        if let Some(left_over) = left_over {
            // An earlier flush was dropped half-way.
            self.finish(left_over).await?;
        }
        if !self.is_dirty() {
            return self.disk.file().flush().await;
        }
        let under_way = {
            let _alone = self.meta.exclusive(ALL).await;
            self.image.flush().await?;
            let layout = self.layout.lock().unwrap().clone();
            let Some(layout) = layout else { return Ok(()) };
            let snapshot = layout.snapshot(&self.store).await?;
            if let Some(keep) = self.keep.as_ref().filter(|keep| keep.is_recording()) {
                keep.rotate()?;
            }
            let under_way = Arc::new(UnderWay {
                snapshot,
                generation: self.generation.fetch_add(1, Ordering::SeqCst),
                changes: self.changes.load(Ordering::SeqCst),
                hazards: self.store.hazards_seen(),
            });
            *self.under_way.lock().unwrap() = Some(Arc::clone(&under_way));
            under_way
        };
        self.finish(under_way).await
    }

    async fn finish(&self, under_way: Arc<UnderWay>) -> Result<()> {
        let snapshot = &under_way.snapshot;
        snapshot.write_out(&self.disk, &self.meta_writes).await?;
        self.store.written(snapshot.blocks());
        {
            let mut layout = self.layout.lock().unwrap();
            if let Some(layout) = layout.as_mut() {
                Arc::make_mut(layout).advance(snapshot);
            }
        }
        self.store.hazards_over(under_way.hazards);
        self.changes_saved.store(under_way.changes, Ordering::SeqCst);
        // The records go first: as long as one is kept, writes over it must be recorded too.
        if let Some(keep) = self.keep.as_ref().filter(|keep| keep.is_recording()) {
            keep.release()?;
        }
        self.pending.lock().unwrap().retire(under_way.generation);
        *self.under_way.lock().unwrap() = None;
        self.punch(under_way.generation);
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        self.changes.load(Ordering::SeqCst) != self.changes_saved.load(Ordering::SeqCst)
            || self.store.dirty_bytes() > 0
    }

    /// Does again what a record says.
    async fn redo(&self, record: &[u8]) -> Result<()> {
        let word = |at: usize| {
            record.get(at..at + 8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
        };
        let (Some(kind), Some(offset), Some(len)) = (word(0), word(8), word(16)) else {
            return Err(Error::corrupt("kept record is too short"));
        };
        let range = ByteRange::new(offset, len).filter(|range| range.end() <= self.size());
        let Some(range) = range else {
            return Err(Error::corrupt(format!("kept record of {len} bytes at {offset}")));
        };
        let data = &record[RECORD_HEADER..];
        match kind as u8 {
            RECORD_WRITE if data.len() as u64 == len => {
                let buf = AlignedBuf::from_slice(data, 4096);
                self.write_out(offset, buf.buffers()).await
            }
            RECORD_ZERO => self.clear(range, false, false).await,
            RECORD_DISCARD => self.clear(range, true, true).await,
            _ => Err(Error::corrupt(format!("kept record of unknown kind {kind}"))),
        }
    }

    async fn resume_session(&self, nonce: Option<u128>) -> Result<()> {
        let Some(keep) = &self.keep else { return Ok(()) };
        let Some(nonce) = nonce else { return keep.forget() };
        let Some(records) = keep.take_over(nonce)? else {
            return match keep.found() {
                Some(_) => Err(Error::invalid(format!(
                    "{}: what is kept in {} is of another guest's session, so the guest that \
                     reconnects may have lost writes; stop it, then remove that file",
                    self.name(),
                    keep.path().display()
                ))),
                None => Ok(()),
            };
        };
        for (i, record) in records.iter().enumerate() {
            self.redo(record).await.context(|| {
                format!("{}: redoing record {i} of {}", self.name(), keep.path().display())
            })?;
        }
        tracing::info!(
            image = self.name(),
            records = records.len(),
            "took over what the guest wrote and did not flush"
        );
        self.checkpoint().await
    }

    async fn grow(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let old = self.size();
        if size == old {
            return Ok(());
        }
        if size < old {
            return Err(Error::unsupported(format!(
                "{}: qcow2 images are not shrunk here; use 'qemu-img resize --shrink' while it is \
                 not in use",
                self.name()
            )));
        }
        if !size.is_multiple_of(BLOCK) {
            return Err(Error::invalid(format!(
                "{}: size {size} is not a multiple of {BLOCK}",
                self.name()
            )));
        }
        // The new size must not become durable before the new space reads as zeros.
        self.checkpoint().await?;
        self.resizing.store(true, Ordering::SeqCst);
        let result = self.grow_and_zero(old, size).await;
        self.resizing.store(false, Ordering::SeqCst);
        if let Err(err) = &result {
            self.set_poison(err);
        }
        result
    }

    async fn grow_and_zero(&self, old: u64, size: u64) -> Result<()> {
        self.store.announce_hazard();
        self.image.resize_grow(size, PreallocateMode::None).await?;
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.size.store(size, Ordering::Release);
        let range = ByteRange::between(old, size);
        let zeroed = self.clear(range, false, true).await;
        if zeroed.is_err() {
            self.size.store(old, Ordering::Release);
        }
        zeroed?;
        self.checkpoint().await
    }

    fn plan_now<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        /// Longer plans are for the asynchronous path.
        const MAX_EXTENTS: usize = 8;
        let Some(host) = self.disk.file().as_host() else { return Planned::NotNow };
        match op {
            PlanOp::Flush if self.is_dirty() || self.poisoned.load(Ordering::Acquire) => {
                return Planned::NotNow;
            }
            PlanOp::Flush => return plan_file(plan, self.disk.file(), 0, 0),
            PlanOp::Write { fua: true } => return Planned::NotNow,
            PlanOp::Write { fua: false } if self.check_writable().is_err() => {
                return Planned::NotNow;
            }
            _ => {}
        }
        let revocations = self.revocations.load(Ordering::SeqCst);
        let align = self.disk.file().alignment().request;
        let mut at = range;
        while !at.is_empty() {
            let Some(Ok((mapping, run))) = store::from_memory_only(|| now(self.shallow(at))) else {
                return Planned::NotNow;
            };
            match (mapping, op) {
                (ShallowMapping::Raw { offset, .. }, PlanOp::Read) => {
                    let place = ByteRange { offset, len: run.len };
                    if !place.is_aligned(align) || !self.disk.surely_has(place) {
                        return Planned::NotNow;
                    }
                    plan.extents.push(PlanExtent::File { file: host, offset, len: run.len });
                }
                (ShallowMapping::Zero { explicit, .. }, PlanOp::Read)
                    if explicit || self.backing.read().unwrap().is_none() =>
                {
                    plan.extents.push(PlanExtent::Zero { len: run.len });
                }
                (ShallowMapping::Raw { offset, writable: true, .. }, PlanOp::Write { .. })
                    if run.len == range.len =>
                {
                    let place = ByteRange { offset, len: run.len };
                    let Some(tokens) = self.disk.plan_write(place) else { return Planned::NotNow };
                    if !self.may_write_through(run, revocations) {
                        return Planned::NotNow;
                    }
                    plan.extents.push(PlanExtent::File { file: host, offset, len: run.len });
                    plan.pin = Some(Pin(Arc::new(tokens)));
                }
                _ => return Planned::NotNow,
            }
            if plan.extents.len() > MAX_EXTENTS {
                return Planned::NotNow;
            }
            at = ByteRange::between(run.end(), at.end());
        }
        Planned::Ready
    }
}

/// The answer of a future that need not wait; `None` if it would have to.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(out) => Some(out),
        Poll::Pending => None,
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
        (Some(named), Some(node)) => {
            check_backing_alignment(node).context(|| format!("backing file '{}'", named.file))
        }
        (None, None) => Ok(()),
    }
}

/// Refuses a backing whose end could not be read.
fn check_backing_alignment(node: &Node) -> Result<()> {
    let (size, unit) = (node.size(), node.limits().request_alignment);
    if size % unit != 0 {
        return Err(Error::unsupported(format!(
            "{size} bytes do not end with a sector of {unit} bytes; use --cache writeback"
        )));
    }
    Ok(())
}

/// How a change survives a kill.
enum Promise<'a> {
    /// No guest depends on it.
    Nothing,
    /// By a record in the keep.
    Record(Reservation<'a>),
    /// By a checkpoint before the request completes.
    Checkpoint,
}

impl Promise<'_> {
    fn wants_data(&self) -> bool {
        matches!(self, Promise::Record(_))
    }
}

/// The file, for reads of data that a mapping leads to.
#[derive(Debug)]
struct Data {
    disk: Arc<Disk>,
}

/// The file, for the one write that a place was prepared for.
#[derive(Debug)]
struct Place {
    disk: Arc<Disk>,
    state: Mutex<PlaceState>,
}

#[derive(Debug, Default)]
struct PlaceState {
    /// Announces the write until it is made.
    token: Option<Token>,
    /// Whether the data is wanted for a record.
    wants_data: bool,
    /// The data that was written.
    data: Option<AlignedBuf>,
}

impl Place {
    fn new(disk: &Arc<Disk>, token: Token, wants_data: bool) -> Arc<Place> {
        let state = PlaceState { token: Some(token), wants_data, data: None };
        Arc::new(Place { disk: Arc::clone(disk), state: Mutex::new(state) })
    }
}

/// What both ways to the file have in common.
macro_rules! forward_file {
    () => {
        fn name(&self) -> &str {
            self.disk.file().name()
        }

        fn len(&self) -> Result<u64> {
            self.disk.len()
        }

        fn alignment(&self) -> Alignment {
            Alignment { request: BLOCK.min(self.disk.file().alignment().request), memory: 1 }
        }

        fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
            Box::pin(self.disk.read(offset, buf))
        }

        fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn flush<'a>(&'a self) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn set_len<'a>(&'a self, _len: u64) -> Fut<'a, ()> {
            Box::pin(async { Err(not_for_this()) })
        }

        fn hole_at(&self, offset: u64) -> Result<Hole> {
            self.disk.file().hole_at(offset)
        }
    };
}

fn not_for_this() -> Error {
    Error::unsupported("only the image as a whole can do this")
}

impl File for Data {
    forward_file!();

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        Box::pin(async { Err(not_for_this()) })
    }
}

impl File for Place {
    forward_file!();

    fn write<'a>(&'a self, offset: u64, buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        Box::pin(async move {
            let (token, wants_data) = {
                let mut state = self.state.lock().unwrap();
                (state.token.take(), state.wants_data)
            };
            let Some(token) = token else { return Err(not_for_this()) };
            if !wants_data {
                return self.disk.write(offset, buf, token).await;
            }
            // The file and the record get the same bytes, whatever the guest does meanwhile.
            let own = disk::private_copy(&buf, self.disk.file().alignment().memory.max(4096));
            self.disk.write(offset, own.buffers(), token).await?;
            self.state.lock().unwrap().data = Some(own);
            Ok(())
        })
    }
}

/// A prepared write.
struct Commit<'a> {
    image: &'a Qcow2,
    /// What imago has prepared; `None` if only a record is needed.
    mapping: Option<PreparedDataMapping<'a, Store>>,
    promise: Promise<'a>,
    run: ByteRange,
    place: Arc<Place>,
    /// Meta, slot, guest range; released in this order, after the above.
    _guards: (RangeGuard<'a>, RangeGuard<'a>, RangeGuard<'a>),
}

impl WriteCommit for Commit<'_> {
    fn commit<'b>(self: Box<Self>) -> Fut<'b, ()>
    where
        Self: 'b,
    {
        Box::pin(async move {
            // The guards come first, so that they go last if this future is dropped.
            let Commit { _guards, image, mapping, promise, run, place } = *self;
            if let Some(mapping) = mapping {
                // Before, in case this future is dropped half-way.
                image.changes.fetch_add(1, Ordering::SeqCst);
                if let Err(err) = image.image.commit_data_mapping(mapping).await {
                    let err = Error::from(err).context(format!("{}: mapping {run}", image.name()));
                    image.set_poison(&err);
                    return Err(err);
                }
            }
            let data = place.state.lock().unwrap().data.take();
            if promise.wants_data() && data.as_ref().map(|data| data.len() as u64) != Some(run.len)
            {
                return Err(Error::invalid(format!(
                    "{}: {run} was committed without having been written",
                    image.name()
                )));
            }
            let bytes = data.map(|data| data.to_vec()).unwrap_or_default();
            let must_checkpoint = image.fulfil(promise, RECORD_WRITE, run, &[&bytes]);
            drop(_guards);
            if must_checkpoint {
                image.checkpoint().await?;
            }
            Ok(())
        })
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
            Ok(Extent { range: run, kind: self.extent_kind(mapping, run) })
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
        if let Some(node) = &backing {
            check_backing_alignment(node)?;
        }
        *self.backing.write().unwrap() = backing;
        Ok(())
    }

    fn details(&self) -> serde_json::Value {
        self.header.details()
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(self.resume_session(nonce))
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.changes.load(Ordering::SeqCst) != self.changes_saved.load(Ordering::SeqCst) {
            return Err(Error::invalid(format!(
                "{}: a session must start with nothing left to flush",
                self.name()
            )));
        }
        // Without a keep, writes that allocate wait for the disk from now on.
        if let Some(keep) = &self.keep {
            keep.begin(nonce)?;
        }
        self.session.store(true, Ordering::Release);
        Ok(())
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

/// Makes an empty file into an image. What a power cut leaves of a half-made image is not taken for
/// one: the header comes last.
///
/// # Errors
/// Names the file, the option and what is allowed. A file that is not empty is refused.
pub async fn create(file: Arc<dyn File>, options: &CreateOptions) -> Result<()> {
    let name = file.name().to_string();
    create_unnamed(file, options).await.context(|| format!("{name}: cannot create the image"))
}

async fn create_unnamed(file: Arc<dyn File>, options: &CreateOptions) -> Result<()> {
    options.check()?;
    let CreateOptions { size, cluster_size, refcount_bits, backing } = options;
    if *size == 0 || size % BLOCK != 0 {
        return Err(Error::invalid(format!("size {size} is not a positive multiple of {BLOCK}")));
    }
    if file.len()? > 0
        && file.as_host().is_none_or(|host| host.kind() == crate::io::HostKind::Regular)
    {
        return Err(Error::invalid("the file is not empty"));
    }
    let disk = Arc::new(Disk::new(Arc::clone(&file)));
    let store = Store::new(Arc::clone(&disk), *cluster_size);
    let mut builder = Imago::create_builder(store.clone())
        .size(*size)
        .cluster_size(*cluster_size as usize)
        .refcount_width(*refcount_bits as usize);
    if let Some(backing) = backing {
        let Some(format) = &backing.format else {
            return Err(Error::invalid(format!(
                "the format of backing file '{}' is not given",
                backing.file
            )));
        };
        if backing.file.is_empty() || backing.file.len() > 1023 {
            return Err(Error::invalid("backing file name must have 1 to 1023 bytes"));
        }
        builder = builder.backing(backing.file.clone(), format.clone());
    }
    let image = builder
        .create_open(DenyImplicitOpenGate::default(), |image| {
            Ok(Imago::builder(image).backing(None).write(true))
        })
        .await?;
    image.flush().await?;
    checkpoint::write_new(&disk, &store).await
}
