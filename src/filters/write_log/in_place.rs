//! Entries of one thread whose writes need not wait.
//!
//! Where image, log and sidecar are files that the host writes in place (tmpfs, most file systems by
//! way of the page cache), a logged write is three plain calls, and what a task for each request
//! costs would be most of the price. So the worker performs them itself:
//!
//! ```text
//! write    copy it behind the entries that wait ─► the copy to the image
//! settle   reserve a run ─► one call writes all entries to the log ─► one writes their records
//! ```
//!
//! The copies lie in memory as they will in the log, header and data, entry after entry. All that
//! the [module above](super) promises holds here, too: an entry takes its place when its data is on
//! the image, ranges are locked until then, requests complete when their run does.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;

use crate::block::driver::{Plan, PlanExtent, PlanOp, Planned};
use crate::block::{Attempt, InPlace, OwnedRangeGuard, Settled};
use crate::error::{Result, ResultExt};
use crate::filters::write_log::WriteLog;
use crate::filters::write_log::tail::Reserved;
use crate::filters::write_log::under_way::Note;
use crate::io::{HostFile, Scattered};
use crate::units::ByteRange;
use crate::write_log::layout::{ENTRY_LEN, Flags};
use crate::write_log::sidecar::{RECORD_LEN, Record, RecordState};

/// Memory for the entries that wait, in bytes. As many as fit the processor's cache.
const ROOM: usize = 160 << 10;

/// See the [module](self).
#[derive(Debug)]
pub struct InPlaceWrites {
    filter: Arc<WriteLog>,
    /// Entries as they will be in the log.
    room: Vec<u8>,
    /// How much of it is used.
    used: usize,
    waiting: Vec<Waiting>,
    /// Scratch space for their records.
    records: Vec<u8>,
    /// Whether the superblock was due when somebody last looked.
    is_due: bool,
}

/// An entry that is on the image and not in the log.
#[derive(Debug)]
struct Waiting {
    /// Log sectors, header included.
    sectors: u64,
    crc: u32,
    submitted: u64,
    queue: u16,
    /// Until the entry is whole, and all before it.
    note: Note,
    /// Until the entry has its place.
    _range: OwnedRangeGuard,
}

impl InPlaceWrites {
    /// For one thread; `None` if the log or its sidecar is no file of the host.
    pub fn new(filter: Arc<WriteLog>) -> Option<InPlaceWrites> {
        files(&filter)?;
        Some(InPlaceWrites {
            filter,
            room: Vec::new(),
            used: 0,
            waiting: Vec::new(),
            records: Vec::new(),
            is_due: false,
        })
    }

    /// Whether log and sidecar take writes in place right now.
    #[inline]
    fn takes_writes(&self) -> bool {
        files(&self.filter)
            .is_some_and(|(log, sidecar)| log.inline().writes && sidecar.inline().writes)
    }

    /// Whether the superblock waits to be written, which takes a flush.
    #[inline]
    fn owes_superblock(&mut self) -> bool {
        if self.is_due {
            self.is_due = self.filter.recorder.is_due();
        }
        self.is_due
    }

    /// Writes what waits, as one run.
    fn write_run(&mut self, reserved: &Reserved<'_>) -> Result<()> {
        let recorder = &self.filter.recorder;
        let (log, sidecar) = files(&self.filter).expect("looked at when this was made");
        let at = recorder.offset(reserved.first.sector);
        log.write_in_place(at, &self.room[..self.used]).context(|| recorder.log_name())?;
        self.records.clear();
        let mut place = reserved.first;
        for (completed, entry) in (reserved.completed..).zip(&self.waiting) {
            let record = Record {
                entry: place.entry,
                log_sector: place.sector,
                submitted: entry.submitted,
                completed,
                queue: Some(entry.queue),
                crc: entry.crc,
                state: RecordState::Whole,
            };
            self.records.extend_from_slice(&record.to_bytes());
            place.entry += 1;
            place.sector += entry.sectors;
        }
        debug_assert_eq!(self.records.len() as u64, RECORD_LEN * self.waiting.len() as u64);
        let at = Record::position(reserved.first.entry);
        sidecar.write_in_place(at, &self.records).context(|| sidecar_name(sidecar))
    }
}

/// Log and sidecar.
#[inline]
fn files(filter: &WriteLog) -> Option<(&HostFile, &HostFile)> {
    Some((filter.recorder.log().as_host()?, filter.recorder.sidecar().as_host()?))
}

fn sidecar_name(sidecar: &HostFile) -> String {
    use crate::io::File;
    sidecar.name().to_string()
}

impl InPlace for InPlaceWrites {
    fn write(&mut self, range: ByteRange, data: Scattered<'_>, queue: u16) -> Attempt {
        let header_len = self.filter.recorder.sector_size() as usize;
        let size = header_len as u64 + range.len;
        if size > ROOM as u64
            || !range.is_aligned(header_len as u64)
            || self.owes_superblock()
            || !self.takes_writes()
        {
            return Attempt::NotNow;
        }
        let filter = &*self.filter;
        let mut plan = Plan::default();
        if filter.below.plan(PlanOp::Write { fua: false }, range, &mut plan) == Planned::NotNow {
            return Attempt::NotNow;
        }
        let [PlanExtent::File { file, offset, len }] = plan.extents[..] else {
            return Attempt::NotNow;
        };
        if plan.commit.is_some() || len != range.len || !file.inline().writes {
            return Attempt::NotNow;
        }
        let end = self.used + size as usize;
        if end > ROOM {
            return Attempt::SettleFirst;
        }
        // If it overlaps one that waits here, to settle that now could put it before a FLUSH that
        // the guest submitted together with it. So it waits its turn, as with any other.
        let Some(guard) = filter.in_flight.try_exclusive_owned(range) else {
            return Attempt::NotNow;
        };
        let submitted = filter.recorder.tail().event();
        if self.room.is_empty() {
            self.room = vec![0; ROOM];
        }
        let entry = &mut self.room[self.used..end];
        let (header, copy) = entry.split_at_mut(header_len);
        let fields = filter.recorder.header(Flags::NONE, range, 0);
        header[..ENTRY_LEN].copy_from_slice(fields.as_bytes());
        header[ENTRY_LEN..].fill(0);
        data.copy_to_slice(copy);
        let note = filter.under_way.enter(range);
        if let Err(err) = file.write_in_place(offset, copy) {
            return Attempt::Failed(err);
        }
        self.waiting.push(Waiting {
            sectors: size / header_len as u64,
            crc: crc32c::crc32c(entry),
            submitted,
            queue,
            note,
            _range: guard,
        });
        self.used = end;
        Attempt::Pending
    }

    fn settle(&mut self) -> Settled {
        if self.waiting.is_empty() {
            return Settled::Done(Ok(()));
        }
        let filter = Arc::clone(&self.filter);
        filter.has_grown.store(true, Ordering::Relaxed);
        let sectors = self.waiting.iter().map(|entry| entry.sectors).sum();
        let settling = match filter.recorder.tail().reserve(self.waiting.len() as u64, sectors) {
            Ok(reserved) => {
                let written = self.write_run(&reserved);
                Ok(reserved.settle_now(written))
            }
            Err(err) => Err(err),
        };
        let notes: Vec<Note> = self.waiting.drain(..).map(|entry| entry.note).collect();
        self.used = 0;
        self.is_due = filter.recorder.is_due();
        let settling = match settling {
            Ok(settling) => settling,
            Err(err) => return Settled::Done(Err(err)),
        };
        let leave = move |result: Result<()>| {
            result.map(|()| notes.into_iter().for_each(|note| filter.under_way.leave(note)))
        };
        match settling.outcome() {
            Some(result) => Settled::Done(leave(result)),
            None => Settled::Later(Box::pin(async move { leave(settling.wait().await) })),
        }
    }
}

#[cfg(test)]
mod tests;
