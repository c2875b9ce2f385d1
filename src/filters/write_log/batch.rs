//! Entries that are written together.
//!
//! ```text
//! task 1  write to the disk ─► join ─► yield ─► lead: reserve, write ─► all of the batch complete
//! task 2  write to the disk ─► join ─► yield ─► wait ─────────────────┘
//! task 3       write to the disk ─► join the next one, which is led when this one is written
//! ```
//!
//! A worker's requests complete in bunches. Each, when its data is on the disk, joins the open batch
//! of its thread and lets the others run once. The first to come back leads: it closes the batch,
//! reserves one run for all of it, and writes it with as few calls as it takes, one for the log and
//! one for the sidecar. While a thread's batch is being written, entries gather in the next: a disk
//! does few long writes far better than many short ones.
//!
//! The place in the log is taken as late as that, and this is right: none of the requests is
//! complete yet, so a FLUSH that was submitted meanwhile does not promise them.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::write_log::copies::EntryCopy;
use crate::filters::write_log::recorder::Recorder;
use crate::filters::write_log::tail::{Place, Reserved};
use crate::io::buf::Gather;
use crate::io::{AlignedBuf, yield_now};
use crate::units::ByteRange;
use crate::write_log::sidecar::{Record, RecordState};

/// An entry to be written.
#[derive(Debug)]
pub struct Pending {
    /// Its header, and its data unless they are zeros.
    pub copy: EntryCopy,
    /// Log sectors after the header.
    pub data_sectors: u64,
    /// Whether the data are zeros, which are not in `copy`.
    pub zeros: bool,
    /// When the request was submitted, in events.
    pub submitted: u64,
    /// Which queue it came from.
    pub queue: Option<u16>,
}

/// A thread's way to a log: at most one batch is being written, at most one is open.
#[derive(Default)]
struct Lane {
    is_writing: Cell<bool>,
    open: RefCell<Option<Rc<Batch>>>,
}

/// A batch of this thread.
#[derive(Default)]
struct Batch {
    entries: RefCell<Vec<Pending>>,
    /// Set when it is over.
    outcome: RefCell<Option<Result<Place, (ErrorKind, String)>>>,
    waiters: RefCell<Vec<Waker>>,
}

thread_local! {
    /// The lanes in use, by log. Few, nearly always one.
    static LANES: RefCell<Vec<(u64, Rc<Lane>)>> = const { RefCell::new(Vec::new()) };
}

impl Lane {
    /// This thread's lane to a log.
    fn of(log: u64) -> Rc<Lane> {
        LANES.with_borrow_mut(|lanes| {
            if let Some((_, lane)) = lanes.iter().find(|(id, _)| *id == log) {
                return Rc::clone(lane);
            }
            let lane = Rc::new(Lane::default());
            lanes.push((log, Rc::clone(&lane)));
            lane
        })
    }

    /// Adds entries to the open batch.
    fn join(&self, entries: impl IntoIterator<Item = Pending>) -> Rc<Batch> {
        let mut open = self.open.borrow_mut();
        let batch = open.get_or_insert_default();
        batch.entries.borrow_mut().extend(entries);
        Rc::clone(batch)
    }

    /// Waits until the batch is over, or is to be led by the caller.
    async fn wait_or_lead(&self, batch: &Rc<Batch>) -> Role {
        poll_fn(|cx| {
            if let Some(outcome) = &*batch.outcome.borrow() {
                let outcome = outcome.clone();
                return Poll::Ready(Role::Follow(
                    outcome.map_err(|(kind, message)| Error::new(kind, message)),
                ));
            }
            let is_open = self.open.borrow().as_ref().is_some_and(|open| Rc::ptr_eq(open, batch));
            if is_open && !self.is_writing.get() {
                self.is_writing.set(true);
                *self.open.borrow_mut() = None;
                return Poll::Ready(Role::Lead(batch.entries.take()));
            }
            batch.waiters.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// What falls to an entry's request.
enum Role {
    /// To write these.
    Lead(Vec<Pending>),
    /// Nothing: somebody else did.
    Follow(Result<Place>),
}

impl Batch {
    fn wake(&self) {
        for waiter in self.waiters.borrow_mut().drain(..) {
            waiter.wake();
        }
    }
}

/// The right to write, given back even if the request goes away in the middle of it.
struct Leading {
    log: u64,
    lane: Rc<Lane>,
    batch: Rc<Batch>,
}

impl Leading {
    fn finish(self, result: &Result<Place>) {
        let outcome = result.as_ref().map(|end| *end);
        let outcome = outcome.map_err(|err| (err.kind(), err.to_string()));
        *self.batch.outcome.borrow_mut() = Some(outcome);
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        let message = || "the request that wrote the log for this one was dropped".to_string();
        let mut outcome = self.batch.outcome.borrow_mut();
        outcome.get_or_insert_with(|| Err((ErrorKind::Cancelled, message())));
        drop(outcome);
        self.batch.wake();
        self.lane.is_writing.set(false);
        match &*self.lane.open.borrow() {
            // One of them leads now.
            Some(next) => next.wake(),
            None => LANES.with_borrow_mut(|lanes| lanes.retain(|(id, _)| *id != self.log)),
        }
    }
}

impl Recorder {
    /// Adds an entry to the log. When this returns the entry is whole, and all before it; returns
    /// where the log goes on behind it (or behind others that were written with it).
    pub async fn append(&self, pending: Pending) -> Result<Place> {
        let lane = Lane::of(self.id());
        let batch = lane.join([pending]);
        yield_now().await;
        self.log_batch(lane, batch).await
    }

    /// The same for several at once. Where the host takes writes in place it does not wait, unless
    /// others are at it.
    pub async fn append_all(&self, entries: Vec<Pending>) -> Result<Place> {
        let lane = Lane::of(self.id());
        let batch = lane.join(entries);
        self.log_batch(lane, batch).await
    }

    /// Writes the batch, or waits until somebody else has.
    async fn log_batch(&self, lane: Rc<Lane>, batch: Rc<Batch>) -> Result<Place> {
        let entries = match lane.wait_or_lead(&batch).await {
            Role::Follow(result) => return result,
            Role::Lead(entries) => entries,
        };
        let leading = Leading { log: self.id(), lane, batch };
        let result = self.write_entries(entries).await;
        leading.finish(&result);
        result
    }

    /// Writes entries as one run.
    async fn write_entries(&self, entries: Vec<Pending>) -> Result<Place> {
        let sectors = entries.iter().map(|entry| 1 + entry.data_sectors).sum();
        let reserved = self.tail().reserve(entries.len() as u64, sectors)?;
        let end = reserved.end();
        let written = self.write_run(&entries, &reserved).await;
        drop(entries);
        reserved.settle(written).await?;
        Ok(end)
    }

    /// Writes the entries of a run, and their records.
    pub async fn write_run(&self, entries: &[Pending], reserved: &Reserved<'_>) -> Result<()> {
        let log = self.log();
        let records = self.records(entries, reserved);
        let at = Record::position(reserved.first.entry);
        let mut sector = reserved.first.sector;
        let mut start = sector;
        let mut gather = Gather::default();
        for entry in entries {
            entry.copy.gather(&mut gather);
            sector += 1 + entry.data_sectors;
            if entry.zeros {
                let header = std::mem::take(&mut gather).finish();
                let zeros_at = sector - entry.data_sectors;
                log.write(self.offset(start), header, false).await.context(|| self.log_name())?;
                self.write_zeroes(zeros_at, entry.data_sectors).await?;
                start = sector;
            }
        }
        let data = gather.finish();
        if !data.is_empty() {
            log.write(self.offset(start), data, false).await.context(|| self.log_name())?;
        }
        let sidecar = self.sidecar();
        sidecar.write(at, records.buffers(), false).await.context(|| sidecar.name().to_string())
    }

    /// The records of a run.
    fn records(&self, entries: &[Pending], reserved: &Reserved<'_>) -> AlignedBuf {
        let mut bytes = Vec::with_capacity(entries.len() * 64);
        let mut place = reserved.first;
        for (completed, entry) in (reserved.completed..).zip(entries) {
            let state = if entry.zeros { RecordState::Zeros } else { RecordState::Whole };
            let record = Record {
                entry: place.entry,
                log_sector: place.sector,
                submitted: entry.submitted,
                completed,
                queue: entry.queue,
                crc: entry.copy.crc,
                state,
            };
            bytes.extend_from_slice(&record.to_bytes());
            place.entry += 1;
            place.sector += 1 + entry.data_sectors;
        }
        AlignedBuf::from_slice(&bytes, 64)
    }

    /// Makes log sectors read as zeros, as a hole where that is possible.
    async fn write_zeroes(&self, sector: u64, count: u64) -> Result<()> {
        let (offset, len) = (self.offset(sector), self.offset(count));
        let unit = self.offset(1);
        // The last sector is written, because a hole by itself does not make a file longer.
        let zeros = AlignedBuf::zeroed(unit as usize, 4096);
        let last = offset + len - unit;
        let write = async {
            self.log().write(last, zeros.buffers(), false).await?;
            if len > unit {
                self.log().write_zeroes(ByteRange { offset, len: len - unit }, true).await?;
            }
            Ok::<(), Error>(())
        };
        write.await.context(|| self.log_name())
    }
}
