//! Entries that are written together.
//!
//! ```text
//! task 1  write to the disk ─► join ─► yield ─► close the batch: reserve, write ─► all complete
//! task 2  write to the disk ─► join ─► yield ─────────────────────────────────────┘
//! ```
//!
//! A worker's requests complete in bunches. Each, when its data is on the disk, joins the batch of
//! its thread and lets the others run once. The first to come back closes the batch, reserves one
//! run for all of it, and writes it with as few calls as it takes: one for the log and one for the
//! sidecar. The place in the log is taken as late as that, and this is right: none of the requests
//! is complete yet, so a FLUSH that was submitted meanwhile does not promise them.

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

/// A batch of this thread.
struct Batch {
    entries: RefCell<Vec<Pending>>,
    /// Set when it is over.
    outcome: RefCell<Option<Result<Place, (ErrorKind, String)>>>,
    is_open: Cell<bool>,
    waiters: RefCell<Vec<Waker>>,
}

thread_local! {
    /// The open batch of each log that this thread writes to. Few, nearly always one.
    static OPEN: RefCell<Vec<(u64, Rc<Batch>)>> = const { RefCell::new(Vec::new()) };
}

impl Batch {
    /// The open batch of this thread for a log.
    fn of(log: u64) -> Rc<Batch> {
        OPEN.with_borrow_mut(|open| {
            if let Some((_, batch)) = open.iter().find(|(id, _)| *id == log) {
                return Rc::clone(batch);
            }
            let batch = Rc::new(Batch {
                entries: RefCell::default(),
                outcome: RefCell::default(),
                is_open: Cell::new(true),
                waiters: RefCell::default(),
            });
            open.push((log, Rc::clone(&batch)));
            batch
        })
    }

    /// From now on entries join another one.
    fn close(&self, log: u64) -> Vec<Pending> {
        self.is_open.set(false);
        OPEN.with_borrow_mut(|open| open.retain(|(id, _)| *id != log));
        self.entries.take()
    }

    fn finish(&self, outcome: Result<Place, (ErrorKind, String)>) {
        *self.outcome.borrow_mut() = Some(outcome);
        for waiter in self.waiters.borrow_mut().drain(..) {
            waiter.wake();
        }
    }

    /// Waits until somebody has written it.
    async fn wait(&self) -> Result<Place> {
        poll_fn(|cx| match &*self.outcome.borrow() {
            Some(Ok(end)) => Poll::Ready(Ok(*end)),
            Some(Err((kind, message))) => Poll::Ready(Err(Error::new(*kind, message.clone()))),
            None => {
                self.waiters.borrow_mut().push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }
}

/// Finishes a batch even if whoever writes it goes away.
struct Finish(Rc<Batch>);

impl Drop for Finish {
    fn drop(&mut self) {
        if self.0.outcome.borrow().is_none() {
            let message = "the request that wrote the log for this one was dropped".to_string();
            self.0.finish(Err((ErrorKind::Cancelled, message)));
        }
    }
}

impl Recorder {
    /// Adds an entry to the log. When this returns the entry is whole, and all before it; returns
    /// where the log goes on behind it (or behind others that were written with it).
    pub async fn append(&self, pending: Pending) -> Result<Place> {
        let batch = Batch::of(self.id());
        batch.entries.borrow_mut().push(pending);
        yield_now().await;
        if !batch.is_open.get() {
            return batch.wait().await;
        }
        let entries = batch.close(self.id());
        let finish = Finish(batch);
        let result = self.write_entries(entries).await;
        finish.0.finish(match &result {
            Ok(end) => Ok(*end),
            Err(err) => Err((err.kind(), err.to_string())),
        });
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
