//! `blklogwrites`: records what is written to a disk in a log in dm-log-writes format.
//!
//! ```text
//! read, status ───────────────────────────────────────────► below, as if the filter were not there
//! write    copy it ─► the copy to the disk ─► the same copy to the log ─► complete
//! discard, write-zeroes    to the disk ─► an entry in the log ─► complete
//! flush    take a place in the log ─► flush the disk ─► make the log durable, count ─► complete
//!
//! tail       who writes where, and up to where the log is whole
//! batch      entries of one thread that are written together
//! in_place   entries of one thread that need no task: those whose writes need not wait,
//! staged     and those that the host writes like any other request's
//! under_way  where the disk may hold what the log does not have, should the process be killed
//! copies     what is written, once for the disk and the log
//! recorder   the log's files and its superblock
//! open       starting a log, or going on with one
//! compare    whether the disk is still what the log ends with
//! stand      what it stands on, where it is a node of its own
//! ```
//!
//! **The order** of entries is one in which the disk may have become durable, as the kernel's target
//! has it: a write takes its place when it is on the disk, a flush when it is *submitted*. So a
//! write that was in flight when the guest asked for a flush stands behind it, however early it
//! ended: the flush does not promise it. (QEMU's order, [`Order::Completion`], gives the flush
//! its place when it has ended, and thereby hides the bugs of guests that do not wait.)
//!
//! Invariants:
//! * What fails on the disk is not in the log. What cannot be logged fails, although it is on the
//!   disk: a guest that sees an error knows nothing of what is there.
//! * If a request was completed before another was submitted, its entry comes first. Requests that
//!   overlap take their places in the order in which they reach the disk, so the last in the log
//!   is what the disk holds.
//! * A request completes only when its entry is whole, and all before it (`tail`).
//! * The superblock covers what is durable, and after a flush all that the flush promised.
//! * What was completed is found again after `kill -9`, by the CRCs in the sidecar (`open`), and the
//!   disk has it, whoever the guest is then.

mod batch;
mod compare;
mod copies;
mod in_place;
pub mod open;
mod recorder;
mod staged;
mod stand;
mod tail;
mod under_way;

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned};
use crate::block::{InPlace, Keep, Node, Quiesced, RangeGuard, RangeLock, origin};
use crate::error::Result;
use crate::filters::write_log::batch::Pending;
use crate::filters::write_log::copies::MAX_DATA;
use crate::filters::write_log::recorder::Recorder;
use crate::filters::write_log::under_way::UnderWay;
use crate::io::{Buffers, Fut};
use crate::units::ByteRange;
use crate::write_log::layout::{Flags, RawEntry};

use open::Closed;
pub use open::{Began, Existing, Settings, Subject, open};
pub use stand::Stand;

/// Name of the driver.
pub const NAME: &str = "blklogwrites";

/// Where a flush stands among the writes that were in flight with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Before all that had not completed when it was submitted, as the kernel has it.
    #[default]
    Strict,
    /// Before all that had not completed when it ended, as QEMU has it.
    Completion,
}

/// The filter; see the [module](self).
#[derive(Debug)]
pub struct WriteLog {
    below: Arc<dyn Driver>,
    recording: Arc<Recording>,
}

/// What is recorded, whatever the disk stands on.
#[derive(Debug)]
pub struct Recording {
    recorder: Recorder,
    order: Order,
    /// Whether there were entries when it was opened.
    goes_on: bool,
    /// Held by each request until it has its place in the log.
    in_flight: Arc<RangeLock>,
    /// What is on the disk, or about to be, and not yet in the log.
    under_way: UnderWay,
    /// Whether anything but an end mark was added.
    has_grown: AtomicBool,
    /// Whether it was ended in order.
    has_ended: AtomicBool,
    closing: Closed,
}

impl Deref for WriteLog {
    type Target = Recording;

    fn deref(&self) -> &Recording {
        &self.recording
    }
}

impl WriteLog {
    /// The log's name.
    pub fn log_name(&self) -> &str {
        self.recorder.log().name()
    }

    /// Size of a log sector in bytes: the unit of requests.
    pub fn sector_size(&self) -> u64 {
        u64::from(self.recorder.sector_size())
    }

    /// How many entries there are and may be counted, and how many the superblock counts.
    pub fn entries(&self) -> (u64, u64) {
        (self.recorder.tail().countable(), self.recorder.counted())
    }

    /// What is recorded.
    pub fn below(&self) -> &Arc<dyn Driver> {
        &self.below
    }

    /// Adds a mark and makes the log durable up to it. A text that does not fit its log sector is
    /// cut.
    pub async fn mark(&self, text: &[u8]) -> Result<()> {
        self.has_grown.store(true, Ordering::Relaxed);
        let end = self.recorder.append(self.recorder.mark(text)).await?;
        self.recorder.publish(end.entry).await?;
        self.recorder.check_has_name()
    }

    /// An entry for a write, a discard or zeros that are not in memory.
    fn without_data(&self, header: RawEntry, zero_sectors: u64, submitted: u64) -> Pending {
        Pending {
            copy: self.recorder.copies().header(&header, &[]),
            data_sectors: zero_sectors,
            zeros: zero_sectors > 0,
            submitted,
            queue: origin::queue(),
        }
    }

    /// Waits until no request that overlaps is under way.
    async fn enter(&self, range: ByteRange) -> RangeGuard<'_> {
        match self.in_flight.try_exclusive(range) {
            Some(guard) => guard,
            None => self.in_flight.exclusive(range).await,
        }
    }

    /// Does what changes a range of the disk and then logs that.
    async fn change(&self, range: ByteRange, work: impl Future<Output = Result<()>>) -> Result<()> {
        let _place = self.enter(range).await;
        let note = self.under_way.enter(range);
        work.await?;
        self.under_way.leave(note);
        Ok(())
    }

    async fn write_and_log(&self, offset: u64, buf: Buffers, fua: bool) -> Result<()> {
        let (submitted, queue) = (self.recorder.tail().event(), origin::queue());
        let work = async {
            let mut done = 0;
            let mut end = 0;
            while done < buf.len() {
                let len = (buf.len() - done).min(MAX_DATA);
                let range = ByteRange { offset: offset + done, len };
                let flags = if fua { Flags::FUA } else { Flags::NONE };
                let header = self.recorder.header(flags, range, 0);
                let copies = self.recorder.copies();
                let copy = match len == buf.len() {
                    true => copies.copy(&header, &buf).await,
                    false => copies.copy(&header, &buf.slice(done, len)).await,
                };
                self.below.write(range.offset, copy.data(), fua).await?;
                let data_sectors = header.nr_sectors.get();
                let pending = Pending { copy, data_sectors, zeros: false, submitted, queue };
                end = self.append(pending).await?;
                done += len;
            }
            if fua { self.recorder.publish(end).await } else { Ok(()) }
        };
        self.change(ByteRange { offset, len: buf.len() }, work).await
    }

    /// Adds an entry; returns the number after it.
    async fn append(&self, pending: Pending) -> Result<u64> {
        self.has_grown.store(true, Ordering::Relaxed);
        let end = self.recorder.append(pending).await?;
        self.recorder.publish_now_and_then().await?;
        Ok(end.entry)
    }

    async fn zero_and_log(&self, range: ByteRange, may_unmap: bool) -> Result<()> {
        let submitted = self.recorder.tail().event();
        let work = async {
            self.below.write_zeroes(range, may_unmap).await?;
            let header = self.recorder.header(Flags::NONE, range, 0);
            let sectors = header.nr_sectors.get();
            self.append(self.without_data(header, sectors, submitted)).await.map(|_| ())
        };
        self.change(range, work).await
    }

    /// A replay makes zeros of a discard. What is below might leave old data, at the edges of its units
    /// or everywhere, or show its backing: so it is told to make zeros, in the way that frees space.
    async fn discard_and_log(&self, range: ByteRange) -> Result<()> {
        let submitted = self.recorder.tail().event();
        let work = async {
            self.below.write_zeroes(range, true).await?;
            let header = self.recorder.header(Flags::DISCARD, range, 0);
            self.append(self.without_data(header, 0, submitted)).await.map(|_| ())
        };
        self.change(range, work).await
    }

    async fn flush_and_log(&self) -> Result<()> {
        let (submitted, queue) = (self.recorder.tail().event(), origin::queue());
        if self.order == Order::Completion {
            self.below.flush().await?;
        }
        // Without a place in the log the disk's own flush does not begin.
        let began = self.recorder.begin_flush(submitted, queue).await;
        let flush = began.map_err(|err| err.lost_nothing(true))?;
        let end = flush.entry() + 1;
        if self.order == Order::Strict
            && let Err(err) = self.below.flush().await
        {
            // Should this fail as well, nothing is counted any more.
            let _ = flush.failed(&err).await;
            return Err(err);
        }
        flush.succeeded().await?;
        self.recorder.publish(end).await
    }

    /// Makes sure, for a disk that was written to while the log was opened, that the log still ends
    /// with what the disk is. Nothing may be in flight.
    ///
    /// # Errors
    /// If it does not. Then the log is as it was, and nothing is to be recorded.
    pub async fn check_unchanged(&self) -> Result<()> {
        self.closing.check_unchanged(&self.recorder).await.inspect_err(|_| self.under_way.remove())
    }

    /// Ends the recording, for a disk that goes on without it. Nothing may be in flight.
    pub async fn end(&self) -> Result<()> {
        let has_grown = self.has_grown.swap(false, Ordering::Relaxed);
        self.closing.end(&self.recorder, has_grown).await?;
        self.under_way.remove();
        self.has_ended.store(true, Ordering::Relaxed);
        self.recorder.check_has_name()
    }

    /// Lets others write to log and sidecar, after the end: threads that were not awake since may have
    /// the files open for some time.
    pub fn unlock(&self) {
        for file in [self.recorder.log(), self.recorder.sidecar()] {
            file.as_host().inspect(|file| file.unlock());
        }
    }

    /// The image was closed after the log had ended, and may have been changed by that: what is known
    /// of it is brought up to date, so that the log can be continued.
    pub async fn image_was_closed(&self) -> Result<()> {
        if !self.has_ended.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.closing.end(&self.recorder, false).await
    }
}

impl Driver for WriteLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> Limits {
        let below = self.below.limits();
        let unit = u64::from(self.recorder.sector_size());
        Limits { request_alignment: below.request_alignment.max(unit), ..below }
    }

    fn covers(&self) -> Option<&dyn Driver> {
        Some(self.below.as_ref())
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        match op {
            PlanOp::Read => self.below.plan(op, range, plan),
            PlanOp::Write { .. } | PlanOp::Flush => Planned::NotNow,
        }
    }

    fn in_place(self: Arc<Self>) -> Option<Box<dyn InPlace>> {
        Some(Box::new(in_place::InPlaceWrites::new(self)))
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.below.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(self.write_and_log(offset, buf, fua))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.zero_and_log(range, may_unmap))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.discard_and_log(range))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(self.flush_and_log())
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.below.block_status(range)
    }

    /// No entry says that the end was cut off, and that it reads as zeros should the disk grow again.
    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        Box::pin(async move {
            if size < self.below.limits().size {
                let _stays = self.under_way.enter(ByteRange::between(size, u64::MAX));
            }
            self.below.resize(size).await
        })
    }

    fn refresh(&self, quiesced: &Quiesced) -> Result<()> {
        self.below.refresh(quiesced)
    }

    fn is_behind(&self) -> bool {
        self.below.is_behind()
    }

    fn on_backing(&self, backing: Option<Node>, quiesced: &Quiesced) -> Result<Arc<dyn Driver>> {
        let below = self.below.on_backing(backing, quiesced)?;
        Ok(Arc::new(WriteLog { below, recording: Arc::clone(&self.recording) }))
    }

    /// What the log says of the disk stays true: where a new guest would begin with what was flushed,
    /// it begins with all that was logged.
    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(async move {
            let kept = self.below.keep().filter(|_| self.goes_on).and_then(Keep::found);
            let (None, Some(kept)) = (nonce, kept) else { return self.below.resume(nonce).await };
            tracing::info!(
                "{}: the disk keeps what an earlier guest had not flushed",
                self.log_name()
            );
            self.below.resume(Some(kept)).await?;
            // The session that comes knows nothing of it.
            self.below.flush().await
        })
    }

    fn close<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async {
            self.below.close().await?;
            self.end().await
        })
    }
}

#[cfg(test)]
mod tests;
