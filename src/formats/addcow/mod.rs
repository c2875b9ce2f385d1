//! add-cow: a bitmap that says which sectors of a raw image file override a backing file.
//!
//! ```text
//! disk.add-cow   header, bitmap       bit 1: the sector is in the image file, at the same offset
//!     │    └───► disk.raw             bit 0: it is the backing file's, or zeros past its end
//!     └────────► base                 (without a backing: zeros)
//! ```
//!
//! The layout is version 1 of the format ([`layout`]); what is here makes it fast and safe.
//!
//! # How it works
//!
//! ```text
//! read    bits in memory ──► plan: extents of the image file, of the backing's plan, zeros
//! write   all bits set   ──► plan: the image file, nothing else
//!         some clear     ──► plan: pin the page; the data goes to the image file; then, by the
//!                            plan's commit: record in the keep, set the bits, complete
//! flush   no new bits    ──► plan: sync the image file
//!         else           ──► [`flush`]: copy changed pages, sync the image file, write the copies,
//!                            sync the bitmap
//! ```
//!
//! * `pages`: the bitmap's pages in memory, bounded, without locks.
//! * `flush`: what becomes durable when; what survives a kill.
//! * [`create`], [`check`], `resize`: the life of the file.
//!
//! A bit covers the smallest block a guest may have, so nothing is ever copied up for a write. Space
//! is never given back to the backing: discards punch holes into the image file where bits are
//! set, and those stay set, so that what was discarded reads as zeros or old data of its own.
//!
//! # Invariants
//!
//! * A durable 1 bit implies durable data in the image file.
//! * A bit is visible only once the data is written, and recorded if a guest's session runs.
//! * Bits go from 0 to 1 only. So an extent that was planned stays right while it is used.
//! * Locks are taken in this order: loading, turn.
//!
//! # Limits
//!
//! * The format does not store the backing file's format; who opens the image must know it.
//! * 2 MiB of the bitmap are in memory at most (64 GiB of disk need 16 MiB of bitmap, unless they
//!   are all written or all not).

pub mod check;
pub mod create;
mod flush;
pub mod fuzzing;
pub mod layout;
mod pages;
mod resize;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

pub use self::layout::Header;

use self::flush::Durability;
use self::layout::{HEADER_LEN, bitmap_len, sectors_of};
use self::pages::{NoRoom, PAGE_LEN, PAGE_SECTORS, Pages, Place};
use crate::block::{
    CommitPlanned, Committed, Extent, ExtentKind, Format, Keep, Limits, Node, Plan, PlanCommit,
    PlanExtent, PlanOp, Planned, Prepared, Quiesced, RangeLock, WriteCommit,
};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{AlignedBuf, File, Fut, yield_now};
use crate::units::{ByteRange, SECTOR_SIZE};

/// Name of the driver.
pub const NAME: &str = "add-cow";

/// Longer plans are for the asynchronous path.
const MAX_EXTENTS: usize = 64;

/// How many pages of the bitmap are looked at together where the file has nothing, and how many are
/// read together where it has something. A look costs about as much as a read of one page.
const LOOK_AHEAD: u64 = 1024;
const READ_AHEAD: u64 = 16;

/// All there is, for range locks.
const ALL: ByteRange = ByteRange { offset: 0, len: u64::MAX };

/// What shows where no bit is set.
#[derive(Clone, Debug)]
pub enum Backing {
    /// Zeros.
    None,
    /// This node.
    Node(Node),
    /// Nobody knows: only metadata is wanted, and reading there fails.
    Unopened,
}

/// How to open an image.
#[derive(Debug)]
pub struct OpenOptions {
    /// Refuse writes; the files need not be writable.
    pub read_only: bool,
    /// The image file: raw, opened by the caller.
    pub image: Arc<dyn File>,
    /// The backing, opened by the caller.
    pub backing: Backing,
    /// What format the backing has, for `info`.
    pub backing_format: Option<String>,
    /// Where completed writes are kept across the death of this process.
    pub keep: Option<Keep>,
}

/// An add-cow image on a backing. Usable from any number of threads.
pub struct AddCow {
    shared: Arc<Shared>,
    /// Replaced only while nobody uses the image.
    below: RwLock<Backing>,
    /// Whether it is nothing, so that zeros show.
    is_alone: AtomicBool,
}

/// The image itself, whatever it stands on.
struct Shared {
    /// The add-cow file.
    file: Arc<dyn File>,
    /// The image file.
    data: Arc<dyn File>,
    header: Header,
    /// The backing file and its format as they are named now.
    named: Mutex<Option<(String, Option<String>)>>,
    /// Size of the disk in bytes: whole sectors of the image file.
    size: AtomicU64,
    read_only: bool,
    pages: Pages,
    durability: Durability,
    /// Page numbers that are being read from the file.
    loading: RangeLock,
}

impl AddCow {
    /// Opens an image.
    ///
    /// # Errors
    /// Names the file and what is wrong. A refused image is not modified; neither is an accepted
    /// one before its first flush.
    pub async fn open(file: Arc<dyn File>, options: OpenOptions) -> Result<AddCow> {
        let name = file.name().to_string();
        let header = read_header(&file).await?;
        let image_len = options.image.len().context(|| name.clone())?;
        let sectors = sectors_of(image_len);
        let file_len = file.len().context(|| name.clone())?;
        let bits = file_len.saturating_sub(HEADER_LEN);
        if !image_len.is_multiple_of(SECTOR_SIZE) {
            tracing::warn!(
                "{name}: image file {}: its last {} bytes are no whole sector and are ignored",
                options.image.name(),
                image_len % SECTOR_SIZE
            );
        }
        if bits != bitmap_len(sectors) {
            tracing::warn!(
                "{name}: has a bitmap of {bits} bytes, and image file {} one of {} sectors would \
                 have {}; was one of them truncated or resized? vublk check tells more",
                options.image.name(),
                sectors,
                bitmap_len(sectors)
            );
        }
        if options.read_only && options.keep.is_some() {
            return Err(Error::invalid(format!("{name}: a read-only image keeps nothing")));
        }
        let shared = Shared {
            file,
            data: options.image,
            named: Mutex::new(header.backing.clone().map(|name| (name, options.backing_format))),
            header,
            size: AtomicU64::new(sectors * SECTOR_SIZE),
            read_only: options.read_only,
            pages: Pages::new(sectors.div_ceil(PAGE_SECTORS)),
            durability: Durability::new(options.keep, file_len),
            loading: RangeLock::new(),
        };
        Ok(AddCow {
            shared: Arc::new(shared),
            is_alone: AtomicBool::new(matches!(options.backing, Backing::None)),
            below: RwLock::new(options.backing),
        })
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.shared.header
    }

    /// The image file.
    pub fn image(&self) -> &Arc<dyn File> {
        &self.shared.data
    }

    /// Plans a read. Leaves rubbish in the plan if it cannot.
    fn plan_read<'a>(&'a self, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let Some(data) = self.shared.data.as_host() else { return Planned::NotNow };
        let mut at = range;
        while !at.is_empty() {
            let (first, count) = sectors(at);
            let Some((in_image, run)) = self.shared.pages.run(first, count) else {
                return Planned::NotNow;
            };
            let run = ByteRange { offset: at.offset, len: run * SECTOR_SIZE };
            let planned = match in_image {
                // A sector may be less than what direct I/O takes.
                true if !run.is_aligned(data.alignment().request) => Planned::NotNow,
                true => {
                    plan.push(PlanExtent::File { file: data, offset: run.offset, len: run.len });
                    Planned::Ready
                }
                false if self.is_alone.load(Ordering::Relaxed) => {
                    plan.push(PlanExtent::Zero { len: run.len });
                    Planned::Ready
                }
                false => plan.read_below(run),
            };
            if planned == Planned::NotNow || plan.extents.len() > MAX_EXTENTS {
                return Planned::NotNow;
            }
            at = ByteRange::between(run.end(), range.end());
        }
        Planned::Ready
    }

    fn plan_write<'a>(&'a self, fua: bool, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let shared = &*self.shared;
        let Some(file) = shared.data.as_host() else { return Planned::NotNow };
        if shared.read_only || shared.durability.is_poisoned() {
            return Planned::NotNow;
        }
        let (first, count) = sectors(range);
        match shared.pages.run(first, count) {
            Some((true, run)) if run == count => {
                // After the look at the bits, which somebody may have set a moment ago.
                if shared.durability.must_wait_for_bits(fua) {
                    return Planned::NotNow;
                }
            }
            None => return Planned::NotNow,
            Some((true, _)) if first % PAGE_SECTORS + count > PAGE_SECTORS => {
                return Planned::NotNow;
            }
            Some(_) => {
                if fua
                    || !shared.durability.may_commit_in_memory()
                    || first % PAGE_SECTORS + count > PAGE_SECTORS
                    || !shared.pages.pin(first)
                {
                    return Planned::NotNow;
                }
                let owner = Arc::clone(&self.shared) as Arc<dyn CommitPlanned>;
                plan.commit = Some(PlanCommit::new(owner, range));
            }
        }
        plan.extents.push(PlanExtent::File { file, offset: range.offset, len: range.len });
        Planned::Ready
    }
}

/// The first sector of a range and how many there are.
fn sectors(range: ByteRange) -> (u64, u64) {
    (range.offset / SECTOR_SIZE, range.len / SECTOR_SIZE)
}

/// Reads the header of an add-cow file. Changes nothing.
///
/// # Errors
/// Names the file and the field.
pub async fn read_header(file: &Arc<dyn File>) -> Result<Header> {
    let bytes = read_header_bytes(file).await?;
    Header::parse(&bytes).context(|| file.name().to_string())
}

async fn read_header_bytes(file: &Arc<dyn File>) -> Result<Vec<u8>> {
    let name = || file.name().to_string();
    let len = file.len().context(name)?.min(HEADER_LEN);
    let buf = AlignedBuf::zeroed(len as usize, 512);
    file.read(0, buf.buffers()).await.context(name)?;
    Ok(buf.to_vec())
}

impl Shared {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn sectors(&self) -> u64 {
        self.size() / SECTOR_SIZE
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is read-only", self.name())));
        }
        self.durability.check_poison(self.name())
    }

    /// The value of the sector's bit, and for how many sectors (at most `max`) it stays the same, as
    /// far as one look goes: the next one may have the same value.
    async fn run(&self, sector: u64, max: u64) -> Result<(bool, u64)> {
        let page = sector / PAGE_SECTORS;
        // Whoever asks about much gets it with few looks at the file.
        let last = (sector.saturating_add(max)).div_ceil(PAGE_SECTORS);
        let wanted = last.saturating_sub(page).clamp(1, LOOK_AHEAD);
        loop {
            if let Some(run) = self.pages.run(sector, max) {
                return Ok(run);
            }
            let empty = self.empty_pages(page).min(wanted);
            let together = if empty > 0 { empty } else { wanted.min(READ_AHEAD) };
            let _these = self.loading.exclusive(ByteRange { offset: page, len: together }).await;
            // What is absent stays so, and is in the file as it is, while this is locked.
            let absent = self.pages.absent(page..page + together);
            if absent == 0 {
                continue;
            }
            // Not what was seen before the lock: a page may have been loaded, changed and written.
            let empty = if empty > 0 { self.empty_pages(page).min(absent) } else { 0 };
            if empty > 0 {
                self.pages.note_empty(page..page + empty);
                return Ok((false, max.min((page + empty) * PAGE_SECTORS - sector)));
            }
            let read = self.read_pages(page, absent.min(READ_AHEAD)).await?;
            for (page, bytes) in (page..).zip(&read) {
                // Without room for it the answer is right all the same, as nobody else can load it.
                let _ = self.pages.install(page, bytes);
            }
            return Ok(pages::run_in_bytes(&read[0], sector, max));
        }
    }

    /// For how many sectors, from the first of a page on, no bit is set, as far as one look at the
    /// host's file tells: however many these are, none of them is looked at.
    fn sectors_never_written(&self, sector: u64) -> u64 {
        let page = sector / PAGE_SECTORS;
        // Before the file. What has no frame then has all of its bits in the file, and as these are
        // never cleared, what the file has nothing of afterwards had none set.
        let framed = self.pages.first_resident(page).unwrap_or(u64::MAX);
        self.empty_pages(page).min(framed - page).saturating_mul(PAGE_SECTORS)
    }

    /// How many whole pages from this one on the file has nothing of, as far as it says so.
    fn empty_pages(&self, page: u64) -> u64 {
        let start = page * PAGE_LEN as u64;
        let end = bitmap_len(self.sectors()).min(self.durability.bitmap_bytes_in_file());
        if start >= end {
            return u64::MAX - page;
        }
        match self.file.hole_at(HEADER_LEN + start) {
            Ok(hole) if hole.is_hole && hole.range.end() >= HEADER_LEN + end => u64::MAX - page,
            Ok(hole) if hole.is_hole => hole.range.len / PAGE_LEN as u64,
            // Reading it tells.
            _ => 0,
        }
    }

    /// Pins the page of a sector, loading it if need be.
    async fn pin(&self, sector: u64) -> Result<()> {
        let page = sector / PAGE_SECTORS;
        while !self.pages.pin(sector) {
            let refused = match self.pages.find(page) {
                Place::Frame(..) => continue,
                Place::Uniform(value) => self.pages.install_uniform(page, value),
                Place::Absent => {
                    let _one = self.loading.exclusive(ByteRange { offset: page, len: 1 }).await;
                    if self.pages.absent(page..page + 1) == 0 {
                        continue;
                    }
                    let read = self.read_pages(page, 1).await?;
                    self.pages.install(page, &read[0])
                }
            };
            match refused {
                Ok(()) => {}
                Err(NoRoom::Dirty) => self.flush_all().await?,
                Err(NoRoom::Pinned) => yield_now().await,
            }
        }
        Ok(())
    }

    /// Reads pages of the bitmap that follow each other. What the file does not have is zeros, and so
    /// is what lies beyond the disk, whatever the file has there.
    async fn read_pages(&self, page: u64, count: u64) -> Result<Vec<[u8; PAGE_LEN]>> {
        let mut pages = vec![[0; PAGE_LEN]; count as usize];
        let start = page * PAGE_LEN as u64;
        let end = bitmap_len(self.sectors()).min(self.durability.bitmap_bytes_in_file());
        let len = end.saturating_sub(start).min(count * PAGE_LEN as u64) as usize;
        if len > 0 {
            let buf = AlignedBuf::zeroed(len, 512);
            let read = self.file.read(HEADER_LEN + start, buf.buffers()).await;
            read.context(|| format!("{}: bitmap at byte {start}", self.name()))?;
            buf.buffers().copy_to_slice(&mut pages.as_flattened_mut()[..len]);
        }
        for (page, bytes) in (page..).zip(&mut pages) {
            self.mask_tail(page, bytes);
        }
        Ok(pages)
    }

    /// Clears the bits of a page that lie beyond the disk.
    fn mask_tail(&self, page: u64, bytes: &mut [u8; PAGE_LEN]) {
        let valid = self.sectors().saturating_sub(page * PAGE_SECTORS);
        if valid >= PAGE_SECTORS {
            return;
        }
        let whole = (valid / 8) as usize;
        bytes[whole] &= (1u16 << (valid % 8)).wrapping_sub(1) as u8;
        bytes[whole + 1..].fill(0);
    }

    /// The data of a range inside one page, which is pinned, has been written: makes it visible.
    fn mark(&self, range: ByteRange) -> Committed {
        let (first, count) = sectors(range);
        self.durability.commit(range, || {
            self.pages.set(first, count);
        })
    }

    /// A place for a write of a prefix of `range`.
    async fn place(&self, range: ByteRange) -> Result<Prepared<'_>> {
        self.check_writable()?;
        let (first, count) = sectors(range);
        let count = count.min(PAGE_SECTORS - first % PAGE_SECTORS);
        let (in_image, run) = self.run(first, count).await?;
        // What is there already is written in place, whatever comes behind it.
        let count = if in_image { run } else { count };
        if !in_image {
            self.pin(first).await?;
        }
        let range = ByteRange { offset: range.offset, len: count * SECTOR_SIZE };
        let commit = Commit { shared: self, range, pinned: !in_image };
        Ok(Prepared {
            range,
            file: Arc::clone(&self.data),
            offset: range.offset,
            commit: Some(Box::new(commit)),
            // A sector's place is its own for good.
            pin: None,
        })
    }

    /// Zeroes the range in the image file, or gives its space back.
    async fn clear(&self, range: ByteRange, how: Clear, has_backing: bool) -> Result<()> {
        self.check_writable()?;
        let mut at = range;
        while !at.is_empty() {
            let (first, count) = sectors(at);
            let count = count.min(PAGE_SECTORS - first % PAGE_SECTORS);
            let (in_image, run) = self.run(first, count).await?;
            let run = ByteRange { offset: at.offset, len: run * SECTOR_SIZE };
            match (how, in_image) {
                (Clear::Discard, true) => self.data.discard(run).await?,
                (Clear::Discard, false) => {}
                (Clear::Zero { .. }, false) if !has_backing => {}
                (Clear::Zero { may_unmap }, _) => self.data.write_zeroes(run, may_unmap).await?,
            }
            if !in_image && has_backing && how != Clear::Discard {
                self.pin(first).await?;
                let commit = Commit { shared: self, range: run, pinned: true };
                Box::new(commit).commit().await?;
            } else if in_image {
                self.settle().await?;
            }
            let mut end = run.end();
            let is_left = how == Clear::Discard || !has_backing;
            if !in_image && is_left && self.pages.is_far_page(end / SECTOR_SIZE) {
                let empty = self.sectors_never_written(end / SECTOR_SIZE);
                end = empty
                    .checked_mul(SECTOR_SIZE)
                    .map_or(range.end(), |len| end.saturating_add(len));
            }
            at = ByteRange::between(end.min(range.end()), range.end());
        }
        Ok(())
    }

    /// Makes what was written to sectors with set bits survive a kill.
    async fn settle(&self) -> Result<()> {
        match self.durability.must_wait_for_bits(false) {
            true => self.flush_all().await,
            false => Ok(()),
        }
    }
}

/// What [`Shared::clear`] does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clear {
    Zero { may_unmap: bool },
    Discard,
}

/// A prepared write.
struct Commit<'a> {
    shared: &'a Shared,
    range: ByteRange,
    /// Whether bits are to be set, in a page that this keeps in memory.
    pinned: bool,
}

impl Drop for Commit<'_> {
    fn drop(&mut self) {
        if self.pinned {
            self.shared.pages.unpin(self.range.offset / SECTOR_SIZE);
        }
    }
}

impl WriteCommit for Commit<'_> {
    fn commit<'b>(self: Box<Self>) -> Fut<'b, ()>
    where
        Self: 'b,
    {
        Box::pin(async move {
            let must_flush = match self.pinned {
                true => self.shared.mark(self.range) == Committed::FlushFirst,
                false => self.shared.durability.must_wait_for_bits(false),
            };
            let shared = self.shared;
            // A flush takes its turn, and may wait for others that want this lock.
            drop(self);
            if must_flush { shared.flush_all().await } else { Ok(()) }
        })
    }
}

impl CommitPlanned for Shared {
    fn written(&self, range: ByteRange) -> Result<Committed> {
        let committed = self.mark(range);
        self.pages.unpin(range.offset / SECTOR_SIZE);
        Ok(committed)
    }

    fn abandoned(&self, range: ByteRange) {
        self.pages.unpin(range.offset / SECTOR_SIZE);
    }

    fn join(&self, range: ByteRange, next: ByteRange) -> bool {
        let page = |range: ByteRange| range.offset / SECTOR_SIZE / PAGE_SECTORS;
        let is_joined = page(range) == page(next);
        if is_joined {
            // One pin is enough for both.
            self.pages.unpin(next.offset / SECTOR_SIZE);
        }
        is_joined
    }
}

impl Format for AddCow {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> Limits {
        let data = self.shared.data.alignment();
        let host = self.shared.data.as_host();
        // Less than a unit of the backing is read, too, but it is never written.
        let memory = self.backing().map_or(1, |node| node.limits().memory_alignment);
        Limits {
            size: self.shared.size(),
            request_alignment: SECTOR_SIZE.max(data.request),
            memory_alignment: data.memory.max(memory),
            optimal_io: host.map_or(0, |host| host.preferred_io_size()),
            discard_granularity: host.map_or(SECTOR_SIZE, |host| host.discard_granularity()),
            read_only: self.shared.read_only,
        }
    }

    #[inline]
    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        match op {
            PlanOp::Read => self.plan_read(range, plan),
            PlanOp::Write { fua } => self.plan_write(fua, range, plan),
            PlanOp::Flush => match self.shared.data.as_host() {
                Some(file) if self.shared.durability.is_settled() => {
                    plan.extents.push(PlanExtent::File { file, offset: 0, len: 0 });
                    Planned::Ready
                }
                _ => Planned::NotNow,
            },
        }
    }

    fn map<'a>(&'a self, range: ByteRange) -> Fut<'a, Extent> {
        Box::pin(async move {
            let shared = &self.shared;
            // Whoever follows a chain down may come with the odd end of a layer below.
            let last = range.end().div_ceil(SECTOR_SIZE);
            let mut end = range.offset / SECTOR_SIZE;
            let mut value = None;
            let mut may_jump = true;
            // On through pages that are all the same, but not for ever.
            for _ in 0..1024 {
                if end >= last {
                    break;
                }
                let (in_image, same) = shared.run(end, last - end).await?;
                if *value.get_or_insert(in_image) != in_image {
                    break;
                }
                end += same;
                if !in_image && may_jump && shared.pages.is_far_page(end) {
                    let empty = shared.sectors_never_written(end);
                    may_jump = empty > 0;
                    end += empty.min(last.saturating_sub(end));
                }
            }
            let run = ByteRange::between(range.offset, range.end().min(end * SECTOR_SIZE));
            let kind = match (value == Some(true), &*self.below.read().unwrap()) {
                (true, _) => {
                    ExtentKind::Data { file: Arc::clone(&shared.data), offset: run.offset }
                }
                (false, Backing::None) => ExtentKind::Zero { explicit: false },
                (false, Backing::Node(_)) => ExtentKind::Backing,
                (false, Backing::Unopened) => {
                    return Err(Error::invalid(format!(
                        "{}: was opened without its backing file, so {run} cannot be read",
                        shared.name()
                    )));
                }
            };
            Ok(Extent { range: run, kind })
        })
    }

    fn prepare_write<'a>(&'a self, range: ByteRange) -> Fut<'a, Prepared<'a>> {
        Box::pin(self.shared.place(range))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        let has_backing = !self.is_alone.load(Ordering::Relaxed);
        Box::pin(self.shared.clear(range, Clear::Zero { may_unmap }, has_backing))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.shared.clear(range, Clear::Discard, true))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            match self.shared.read_only {
                true => Ok(()),
                false => self.shared.flush_all().await,
            }
        })
    }

    fn can_flush_again(&self) -> bool {
        !self.shared.durability.is_poisoned()
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        let backing = self.backing().map_or(0, |node| node.size());
        Box::pin(self.shared.resize(size, backing))
    }

    fn make_empty<'a>(&'a self, discard: bool) -> Fut<'a, ()> {
        Box::pin(self.shared.make_empty(discard))
    }

    fn backing(&self) -> Option<Node> {
        match &*self.below.read().unwrap() {
            Backing::Node(node) => Some(node.clone()),
            _ => None,
        }
    }

    fn set_backing(&self, backing: Option<Node>, _quiesced: &Quiesced) -> Result<()> {
        let backing = backing.map_or(Backing::None, Backing::Node);
        self.is_alone.store(matches!(backing, Backing::None), Ordering::Relaxed);
        *self.below.write().unwrap() = backing;
        Ok(())
    }

    /// The header is written by whoever knows the files' paths, as what it does not hold (the
    /// format) has to change with it: this only takes note.
    fn rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        let named = backing.map(|(name, format)| (name.to_string(), Some(format.to_string())));
        *self.shared.named.lock().unwrap() = named;
        Box::pin(async { Ok(()) })
    }

    fn details(&self) -> serde_json::Value {
        let shared = &self.shared;
        let mut details = serde_json::json!({
            "version": 1,
            "image-filename": shared.header.image,
        });
        if let Some((backing, format)) = &*shared.named.lock().unwrap() {
            details["backing-filename"] = backing.as_str().into();
            if let Some(format) = format {
                details["backing-filename-format"] = format.as_str().into();
            }
        }
        details
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(self.shared.resume_session(nonce))
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.shared.begin_session(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        self.shared.durability.keep()
    }

    fn close<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            if self.shared.read_only {
                return Ok(());
            }
            self.shared.flush_all().await?;
            self.shared.durability.discard_keep()
        })
    }
}

impl fmt::Debug for AddCow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddCow({})", self.shared.name())
    }
}
