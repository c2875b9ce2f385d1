//! VHDX images: the format of Hyper-V, Azure, WSL2 and Windows' own virtual disks.
//!
//! # For callers
//!
//! ```text
//! let structure = vhdx::Structure::read(&file).await?;    // what is it, which parent?
//! // … open one of structure.metadata.parent's paths through the open gate, as a Node …
//! structure.check_parent(node.as_ref())?;                 // is it the right one?
//! let image = Vhdx::open(structure, OpenOptions { read_only, backing, .. }).await?;
//! let node = Node::new(Arc::new(FormatDriver::new(image)?), …);
//! ```
//!
//! Nothing here opens files.
//!
//! # How it works
//!
//! ```text
//! request ─ plan ─► pin ─► page of the BAT in memory? ─► block present? ─► file extent, no lock
//!                              │ no                         │ no
//!                              ▼                            ▼
//!                          load the page             read: zeros, or the parent
//!                                                    write: map a place for the block (planned, too,
//!                                                    if one is ready), then as above
//! FLUSH ─► commit: changed pages → one entry of the log → flush; their place later
//! ```
//!
//! * [`create`]: new images. [`check`], [`explain`], [`salvage`]: damaged ones.
//! * [`resize`]: another size, while nobody uses the disk or while a guest waits.
//! * [`layout`]: the structures on disk. `header`, `region`, `metadata`, `locator`: read and checked.
//! * [`structure`]: all of that, before anything is changed.
//! * [`log`], [`replay`]: entries of the log; replay in memory (readers) or on disk (writers).
//! * [`geometry`], [`bat`]: which entry of the BAT, which bit of which bitmap; what entries may say.
//! * `cache`: pages of the BAT and of sector bitmaps in bounded memory, read without a lock.
//! * `read`, `write`: looking up, mapping, clearing. `pins`: who still uses a place in the file.
//! * [`scan`], `space`: which places are free, and when one that was freed may be used again.
//! * `journal`: changed pages on their way through the log to their place; power cuts and kills.
//! * `linkage`: a parent that changes under its child.
//! * `session`: what frames it: headers before the first write, redo after a kill, an empty log at
//!   the end.
//!
//! # Invariants
//!
//! * Nothing is changed before both headers say so on disk with new GUIDs.
//! * Between two commits the file's metadata does not change at all; what a commit wrote is in the
//!   log or in place, at every instant.
//! * What the host was given by a request that was dropped spoils nothing, however late it lands: it
//!   holds the pin of its place, or the turn of its commit.
//! * An entry of the BAT changes only if it still is what the change was based on.
//! * Locks are taken in this order: a block, its chunk, the length of the file; then the turn of a
//!   commit, then the header. The journal's own lock is never held across an await.
//! * A failed commit poisons the image: later writes and flushes fail, reads go on. One that the host
//!   had no room for is only late: the next one makes up for it.
//!
//! # Limits
//!
//! * An image without a log is only read.
//! * A block is freed as a whole. Discards of less give the host's space back, not the block's.
//! * The BAT of an image with more than 2 million blocks stored is not searched for free places
//!   inside the file; it then grows at its end only.

pub mod bat;
mod cache;
#[cfg(test)]
mod cancel_tests;
pub mod check;
#[cfg(test)]
mod check_tests;
#[cfg(test)]
mod crash_tests;
pub mod create;
mod disk;
pub mod explain;
pub mod fuzzing;
pub mod geometry;
pub mod header;
#[cfg(test)]
mod hostile_tests;
mod journal;
pub mod layout;
mod linkage;
pub mod locator;
pub mod log;
pub mod metadata;
#[cfg(test)]
mod model_tests;
mod pins;
#[cfg(test)]
mod plan_tests;
mod read;
pub mod region;
pub mod replay;
pub mod resize;
#[cfg(test)]
mod resize_open_tests;
#[cfg(test)]
mod resize_tests;
pub mod salvage;
pub mod scan;
mod session;
mod space;
pub mod structure;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

pub use self::structure::Structure;

use self::bat::Checker;
use self::cache::PageCache;
use self::geometry::Geometry;
use self::header::HeaderSlots;
use self::journal::Journal;
use self::layout::Guid;
use self::pins::Pins;
use self::space::Space;
use crate::block::format::plan_file;
use crate::block::{
    Extent, Format, Guard, Keep, Limits, Node, Plan, PlanOp, Planned, Prepared, Quiesced, RangeLock,
};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{File, Fut};
use crate::units::ByteRange;

/// Memory for pages of the BAT and of sector bitmaps, if nobody says otherwise, in bytes. Enough
/// for the whole BAT of a disk of 32 TiB in blocks of 32 MiB.
pub const DEFAULT_CACHE: u64 = 8 << 20;

/// How much of the BAT is looked at when an image is opened, in bytes: all of it for nearly every
/// image, but a look at more would be felt. The rest is looked at page by page when it is used.
const EAGER_SCAN: u64 = 1 << 20;

/// The range of a lock that has one holder at a time.
const ALL: ByteRange = ByteRange { offset: 0, len: u64::MAX };

/// How to open an image.
#[derive(Debug)]
pub struct OpenOptions {
    /// Refuse writes; the file need not be writable.
    pub read_only: bool,
    /// The parent, opened and [checked](Structure::check_parent) by the caller. Without it, only
    /// the metadata of a differencing image can be looked at.
    pub backing: Option<Node>,
    /// Where completed writes are kept across the death of this process.
    pub keep: Option<Keep>,
    /// Memory for pages of the BAT and of sector bitmaps, in bytes.
    pub cache: u64,
    /// Do not look for bad entries of the BAT now: each fails where it is used.
    pub lenient: bool,
    /// Of a differencing image without its parent show what it holds itself, and zeros elsewhere,
    /// because that was asked for.
    pub alone: bool,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            backing: None,
            keep: None,
            cache: DEFAULT_CACHE,
            lenient: false,
            alone: false,
        }
    }
}

/// A VHDX image. Usable from any number of threads.
pub struct Vhdx {
    /// The file that blocks are read from: with the log replayed, in memory or on disk.
    file: Arc<dyn File>,
    /// As of the last opening or resize; the headers are in `headers`.
    structure: RwLock<Structure>,
    /// As of the opening: all of it stays, but the size.
    opened: Geometry,
    /// Size of the disk, and where the BAT is. Changed only while nothing is in flight.
    disk_size: AtomicU64,
    bat_offset: AtomicU64,
    bat_len: AtomicU64,
    /// Knows the sizes as they are.
    checker: RwLock<Arc<Checker>>,
    log: ByteRange,
    /// How much of the file is there, in whole sectors; no limit unless it is being salvaged.
    present_len: u64,
    is_fixed: bool,
    read_only: bool,
    /// Changed only while nothing is in flight.
    backing: RwLock<Option<Node>>,
    /// Whether it was opened without its parent on purpose.
    alone: bool,
    /// Whether what is left to the parent can be read.
    is_readable: AtomicBool,
    keep: Option<Keep>,
    /// Whether a guest's session runs: completed writes must survive this process.
    session: AtomicBool,
    /// Length of the file.
    file_len: AtomicU64,
    cache: PageCache,
    pins: Pins,
    headers: Mutex<HeaderSlots>,
    /// What children will know the image by once it has changed.
    next_data_guid: Mutex<Guid>,
    journal: Mutex<Journal>,
    /// Known once something is written.
    space: Mutex<Option<Space>>,

    /// Whether both headers say that this session writes.
    started: AtomicBool,
    /// Held by who makes it so.
    starting: RangeLock,
    /// Held by who redoes what was kept, resizes, or closes: a guest may come back at any time.
    framing: RangeLock,
    /// Held by who changes the headers.
    header_turn: Arc<RangeLock>,
    /// Payload blocks whose entries change from or to "absent", by number.
    blocks: RangeLock,
    /// Chunks whose sector bitmap is being made, by number.
    chunks: RangeLock,
    /// Held by who makes the file longer.
    growing: Arc<RangeLock>,
    /// Held by the commit that runs.
    turn: Arc<RangeLock>,
    /// Commits begun, and the number of the last that was completed.
    begun: AtomicU64,
    completed: AtomicU64,
    /// Counts publications, and those that the last commit covered.
    changes: AtomicU64,
    changes_saved: AtomicU64,
    /// Which publication was the last that set bits whose requests wait for the commit.
    unsettled_bits: AtomicU64,
    /// Why writes are refused, if they are.
    poison: Mutex<Option<String>>,
    poisoned: AtomicBool,
}

impl Structure {
    /// Checks that `parent` is the image that this one was made from, if it was made from one.
    ///
    /// # Errors
    /// Says that it was changed since, or does not fit.
    pub fn check_parent(&self, parent: Option<&Node>) -> Result<()> {
        let (locator, parent) = match (&self.metadata.parent, parent) {
            (None, None) => return Ok(()),
            (Some(locator), Some(parent)) => (locator, parent),
            (None, Some(_)) => {
                return Err(Error::invalid("the image has no parent, but one was given"));
            }
            (Some(_), None) => {
                return Err(Error::invalid("the image has a parent, but none was given"));
            }
        };
        let found = data_guid_of(parent)?;
        let details = parent.skip_filters().1.driver().details();
        if !locator.linkages().any(|linkage| linkage == found) {
            let wanted: Vec<_> = locator.linkages().map(|guid| guid.to_string()).collect();
            return Err(Error::corrupt(format!(
                "the parent was modified since this child was created, or is another image (its \
                 DataWriteGuid is {found}, the child was made from {})",
                wanted.join(" or ")
            )));
        }
        let (own, sector) = (self.metadata.logical_sector, &details["logical-sector-size"]);
        if sector.as_u64() != Some(own) {
            return Err(Error::corrupt(format!(
                "the parent has logical sectors of {sector} bytes, the child of {own}"
            )));
        }
        Ok(())
    }
}

/// What children know an image by.
fn data_guid_of(parent: &Node) -> Result<Guid> {
    let details = parent.skip_filters().1.driver().details();
    let found = details["data-write-guid"].as_str().and_then(Guid::parse);
    found.ok_or_else(|| Error::unsupported("the parent is not a VHDX image"))
}

impl Vhdx {
    /// Opens an image whose structures were read.
    ///
    /// # Errors
    /// Names the file and what is wrong. A refused image is not modified.
    pub async fn open(structure: Structure, options: OpenOptions) -> Result<Vhdx> {
        let name = structure.raw_file.name().to_string();
        Vhdx::open_unnamed(structure, options).await.context(|| name)
    }

    async fn open_unnamed(structure: Structure, options: OpenOptions) -> Result<Vhdx> {
        if !options.read_only && structure.headers.current.log.is_empty() {
            return Err(Error::unsupported(
                "has no log, and nothing can be written safely without one; open it read-only",
            ));
        }
        if !options.read_only {
            structure.headers.check_room()?;
        }
        match structure.check_log() {
            Err(err) if options.read_only => tracing::warn!("{}: {err}", structure.raw_file.name()),
            checked => checked?,
        }
        if let Some(keep) = &options.keep
            && options.read_only
        {
            return Err(Error::invalid(format!(
                "a read-only image keeps nothing ({})",
                keep.path().display()
            )));
        }
        let geometry = structure.geometry;
        if let Some(parent) = &options.backing
            && parent.size() != geometry.disk_size
        {
            tracing::warn!(
                "{}: has {} bytes, but its parent {}; {}",
                structure.raw_file.name(),
                geometry.disk_size,
                parent.size(),
                match parent.size() < geometry.disk_size {
                    true => "where the parent ends, zeros are read",
                    false => "what the parent holds behind that is not seen",
                }
            );
        }
        let checker = Checker { geometry, reserved: structure.reserved() };
        if !options.lenient {
            scan::scan(&structure.file, &checker, structure.regions.bat, EAGER_SCAN).await?;
        }
        // Everything was found good: now the file may be changed.
        let mut headers = structure.headers;
        let file = match options.read_only {
            true => Arc::clone(&structure.file),
            false => {
                session::replay(&structure, &mut headers).await?;
                Arc::clone(&structure.raw_file)
            }
        };
        let bat = structure.regions.bat;
        Ok(Vhdx {
            file_len: AtomicU64::new(file.len()?),
            cache: PageCache::new(options.cache),
            checker: RwLock::new(Arc::new(checker)),
            file,
            opened: geometry,
            disk_size: AtomicU64::new(geometry.disk_size),
            bat_offset: AtomicU64::new(bat.offset),
            bat_len: AtomicU64::new(bat.len),
            log: headers.current.log,
            present_len: structure.salvaged.as_ref().map_or(u64::MAX, |report| {
                report.file_len.next_multiple_of(geometry.sector_size())
            }),
            is_fixed: structure.metadata.is_fixed,
            structure: RwLock::new(structure),
            read_only: options.read_only,
            alone: options.alone,
            is_readable: AtomicBool::new(options.backing.is_some() || options.alone),
            backing: RwLock::new(options.backing),
            pins: Pins::new(),
            keep: options.keep,
            session: AtomicBool::new(false),
            headers: Mutex::new(headers),
            next_data_guid: Mutex::new(Guid::random()),
            journal: Mutex::default(),
            space: Mutex::new(None),
            started: AtomicBool::new(false),
            starting: RangeLock::new(),
            framing: RangeLock::new(),
            header_turn: Arc::default(),
            blocks: RangeLock::new(),
            chunks: RangeLock::new(),
            growing: Arc::default(),
            turn: Arc::default(),
            begun: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            changes_saved: AtomicU64::new(0),
            unsettled_bits: AtomicU64::new(0),
            poison: Mutex::default(),
            poisoned: AtomicBool::new(false),
        })
    }

    /// The fixed structures, as they were when the image was opened or resized.
    pub fn structure(&self) -> Structure {
        self.structure.read().unwrap().clone()
    }

    #[inline]
    fn geometry(&self) -> Geometry {
        Geometry { disk_size: self.disk_size.load(Ordering::Relaxed), ..self.opened }
    }

    /// The part of the file that is the BAT.
    #[inline]
    fn bat(&self) -> ByteRange {
        let (offset, len) = (&self.bat_offset, &self.bat_len);
        ByteRange { offset: offset.load(Ordering::Relaxed), len: len.load(Ordering::Relaxed) }
    }

    fn checker(&self) -> Arc<Checker> {
        Arc::clone(&self.checker.read().unwrap())
    }

    fn name(&self) -> &str {
        self.file.name()
    }

    /// Refuses writes from now on.
    fn set_poison(&self, cause: &Error) {
        let mut poison = self.poison.lock().unwrap();
        if poison.is_none() {
            if !self.read_only {
                tracing::error!(
                    "{}: writes are refused from now on, reads go on: {cause}",
                    self.name()
                );
            }
            *poison = Some(cause.to_string());
            self.poisoned.store(true, Ordering::SeqCst);
        }
    }

    /// Smallest discard that gives space back to the host.
    fn discard_granularity(&self) -> u64 {
        match self.read_only || self.is_fixed {
            true => 0,
            false => self.file.as_host().map_or(self.geometry().sector_size(), |host| {
                host.discard_granularity().max(self.geometry().sector_size())
            }),
        }
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{}: was opened for reading only", self.name()),
            ));
        }
        if !self.poisoned.load(Ordering::SeqCst) {
            return Ok(());
        }
        let poison = self.poison.lock().unwrap();
        Err(Error::new(
            ErrorKind::Poisoned,
            format!(
                "{}: refuses writes after a failure ({})",
                self.name(),
                poison.as_deref().unwrap_or("unknown")
            ),
        ))
    }
}

impl Format for Vhdx {
    fn name(&self) -> &'static str {
        "vhdx"
    }

    fn limits(&self) -> Limits {
        let alignment = self.file.alignment();
        Limits {
            size: self.geometry().disk_size,
            request_alignment: alignment.request.max(self.geometry().sector_size()),
            memory_alignment: alignment.memory,
            optimal_io: self.file.as_host().map_or(0, |host| host.preferred_io_size()),
            discard_granularity: self.discard_granularity(),
            read_only: self.read_only,
        }
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        match op {
            PlanOp::Read => self.plan_read(range, plan),
            PlanOp::Write { fua } => self.plan_write(range, fua, plan),
            PlanOp::Flush if self.is_dirty() || self.poisoned.load(Ordering::Acquire) => {
                Planned::NotNow
            }
            PlanOp::Flush => plan_file(plan, &self.file, 0, 0),
        }
    }

    fn map<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent> {
        Box::pin(self.map_run(range))
    }

    fn read_guard<'a>(&'a self) -> Fut<'a, Box<dyn Guard + 'a>> {
        Box::pin(async {
            if self.geometry().has_parent && !self.is_readable.load(Ordering::Relaxed) {
                return Err(Error::invalid(format!(
                    "{}: was opened for a look at its metadata only, without its parent",
                    self.name()
                )));
            }
            Ok(Box::new(self.pins.pin()) as Box<dyn Guard>)
        })
    }

    fn prepare_write<'a>(&'a self, range: ByteRange) -> Fut<'a, Prepared<'a>> {
        Box::pin(self.place(range))
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
                false => self.commit().await,
            }
        })
    }

    fn can_flush_again(&self) -> bool {
        !self.poisoned.load(Ordering::SeqCst)
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(self.resume_session(nonce))
    }

    fn prepare_for_overlay<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            match self.read_only {
                true => Ok(()),
                false => self.start_session().await,
            }
        })
    }

    fn identity(&self, once_changed: bool) -> Option<u128> {
        let guid = match once_changed {
            true => self.next_data_guid(),
            false => self.headers.lock().unwrap().current.data_write_guid,
        };
        Some(u128::from_le_bytes(guid.0))
    }

    fn follow_backing<'a>(&'a self, identity: u128) -> Fut<'a, ()> {
        Box::pin(self.follow_parent(Guid(identity.to_le_bytes())))
    }

    fn adopt_backing<'a>(&'a self, identity: u128) -> Fut<'a, bool> {
        Box::pin(self.adopt_parent(Guid(identity.to_le_bytes())))
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.start_keeping(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        self.keep.as_ref()
    }

    fn close<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(self.finish_session())
    }

    fn backing(&self) -> Option<Node> {
        self.backing.read().unwrap().clone()
    }

    fn set_backing(&self, backing: Option<Node>, _quiesced: &Quiesced) -> Result<()> {
        // Of an overlay that was opened on nothing, and goes back to that.
        let is_undone = backing.is_none() && self.alone;
        if !is_undone {
            self.current_structure()
                .check_parent(backing.as_ref())
                .context(|| self.name().to_string())?;
        }
        self.is_readable.store(true, Ordering::Relaxed);
        *self.backing.write().unwrap() = backing;
        Ok(())
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        Box::pin(self.resize_open(size))
    }

    fn details(&self) -> serde_json::Value {
        self.current_structure().details()
    }
}

impl Structure {
    /// What `info` tells.
    pub fn details(&self) -> serde_json::Value {
        let header = &self.headers.current;
        let metadata = &self.metadata;
        let kind = match (&metadata.parent, metadata.is_fixed) {
            (Some(_), _) => "differencing",
            (None, true) => "fixed",
            (None, false) => "dynamic",
        };
        let mut details = serde_json::json!({
            "cluster-size": metadata.block_size,
            "type": kind,
            "creator": self.creator,
            "format-version": layout::HEADER_VERSION,
            "logical-sector-size": metadata.logical_sector,
            "physical-sector-size": metadata.physical_sector,
            "log-offset": header.log.offset,
            "log-size": header.log.len,
            "log-guid": header.log_guid.to_string(),
            "log-entries-to-replay": self.replay.as_ref().map_or(0, |log| log.entries().len()),
            "dirty-flag": self.replay.is_some(),
            "file-write-guid": header.file_write_guid.to_string(),
            "data-write-guid": header.data_write_guid.to_string(),
        });
        for (n, offset) in layout::HEADER_OFFSETS.into_iter().enumerate() {
            let mut slot = serde_json::json!({
                "offset": offset,
                "valid": self.headers.valid[n],
                "current": self.headers.slot == n,
            });
            if self.headers.valid[n] {
                slot["sequence-number"] = self.headers.sequences[n].into();
            }
            details[format!("header-{}", n + 1)] = slot;
        }
        for (n, offset) in layout::REGION_TABLE_OFFSETS.into_iter().enumerate() {
            details[format!("region-table-{}", n + 1)] =
                serde_json::json!({ "offset": offset, "valid": self.regions.valid[n] });
        }
        let regions = self.regions.all.iter().map(|region| {
            let name = match region.guid {
                layout::guid::BAT_REGION => "bat".to_string(),
                layout::guid::METADATA_REGION => "metadata".to_string(),
                other => other.to_string(),
            };
            let ByteRange { offset, len } = region.range;
            let required = region.required;
            let place =
                serde_json::json!({ "offset": offset, "length": len, "required": required });
            (name, place)
        });
        details["regions"] = regions.collect::<serde_json::Map<_, _>>().into();
        if let Some(report) = &self.salvaged {
            let list = |parts: &salvage::Parts| -> Vec<_> {
                let part = |range: &ByteRange| serde_json::json!({ "start": range.offset, "length": range.len });
                parts.listed.iter().map(part).collect()
            };
            details["salvage"] = serde_json::json!({
                "missing-bytes": report.missing.bytes,
                "missing": list(&report.missing),
                "doubtful-bytes": report.doubtful.bytes,
                "doubtful": list(&report.doubtful),
                "notes": report.notes,
            });
        }
        if let Some(guid) = metadata.page_83 {
            details["page-83-guid"] = guid.to_string().into();
        }
        if let Some(locator) = &metadata.parent {
            details["parent-locator"] = locator
                .entries
                .iter()
                .map(|(key, value)| (key.clone(), value.clone().into()))
                .collect::<serde_json::Map<_, _>>()
                .into();
            details["backing-filename"] = locator.paths().first().cloned().into();
            details["backing-filename-format"] = "vhdx".into();
        }
        details
    }
}

impl fmt::Debug for Vhdx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vhdx({})", self.name())
    }
}
