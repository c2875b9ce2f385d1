//! Entries of one thread that need no task.
//!
//! Where image, log and sidecar are files that the host writes in place (tmpfs, most file systems by
//! way of the page cache), a logged write is three plain calls, and what a task for each request
//! costs would be most of the price. So the worker performs them itself, the entries lying in memory
//! as they will in the log, header and data, entry after entry (the *room*):
//!
//! ```text
//! write    copy it behind the entries that wait ─► the copy to the image
//! settle   reserve a run ─► one call writes all entries to the log ─► one writes their records
//! ```
//!
//! Where the image, or the log, is no such file, and for long writes, each entry has a copy of its own
//! ([`staged`](super::staged)).
//!
//! All that the [module above](super) promises holds here, too: an entry takes its place when its data is on
//! the image, ranges are locked until then, requests complete when their run does.

#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;

use crate::block::driver::{Pin, Plan, PlanExtent, PlanOp, Planned};
use crate::block::{Attempt, InPlace, OwnedRangeGuard, Settled};
use crate::crc32c;
use crate::error::{Result, ResultExt};
use crate::filters::write_log::WriteLog;
use crate::filters::write_log::copies::MAX_DATA;
use crate::filters::write_log::staged::Staged;
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
    room: Room,
    staged: Staged,
    /// Whether the superblock was due when somebody last looked.
    is_due: bool,
}

/// Entries that lie one behind the other.
#[derive(Debug, Default)]
struct Room {
    /// Entries as they will be in the log.
    memory: Vec<u8>,
    /// How much of it is used.
    used: usize,
    waiting: Vec<Waiting>,
    /// Scratch space for their records.
    records: Vec<u8>,
}

/// An entry in the room. It is on the image and not in the log.
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

/// A write that needs no task, and where its data goes on the image.
pub struct Target<'a> {
    /// Where it is on the disk.
    pub range: ByteRange,
    /// The queue that it came from.
    pub queue: u16,
    /// The file that has it.
    pub file: &'a HostFile,
    /// Where in the file.
    pub offset: u64,
    /// What keeps it there.
    pub pin: Option<Pin>,
}

impl InPlaceWrites {
    /// For one thread.
    pub fn new(filter: Arc<WriteLog>) -> InPlaceWrites {
        let (room, staged) = (Room::default(), Staged::default());
        InPlaceWrites { filter, room, staged, is_due: false }
    }

    /// Whether the superblock waits to be written, which takes a flush.
    #[inline]
    fn owes_superblock(&mut self) -> bool {
        if self.is_due {
            self.is_due = self.filter.recorder.is_due();
        }
        self.is_due
    }
}

impl WriteLog {
    /// Where a write goes, if it is one to a single place that is ready.
    #[inline]
    fn target(&self, range: ByteRange, queue: u16) -> Option<Target<'_>> {
        let mut plan = Plan::default();
        if self.below.plan(PlanOp::Write { fua: false }, range, &mut plan) == Planned::NotNow {
            return None;
        }
        let [PlanExtent::File { file, offset, len }] = plan.extents[..] else { return None };
        if plan.commit.is_some() || len != range.len {
            return None;
        }
        Some(Target { range, queue, file, offset, pin: plan.pin })
    }

    /// Log and sidecar, if they take writes in place right now.
    #[inline]
    fn in_place_files(&self) -> Option<(&HostFile, &HostFile)> {
        let (log, sidecar) = (self.recorder.log().as_host()?, self.recorder.sidecar().as_host()?);
        (log.inline().writes && sidecar.inline().writes).then_some((log, sidecar))
    }
}

impl Room {
    /// Performs a write whose entry takes `size` bytes.
    #[inline]
    fn write(
        &mut self,
        filter: &WriteLog,
        target: &Target<'_>,
        data: Scattered<'_>,
        size: usize,
    ) -> Attempt<'static> {
        let end = self.used + size;
        if end > ROOM {
            return Attempt::SettleFirst;
        }
        let Some(guard) = filter.in_flight.try_exclusive_owned(target.range) else {
            return Attempt::NotNow;
        };
        let submitted = filter.recorder.tail().event();
        if self.memory.is_empty() {
            self.memory = vec![0; ROOM];
        }
        let entry = &mut self.memory[self.used..end];
        let (header, copy) = entry.split_at_mut(filter.recorder.sector_size() as usize);
        let fields = filter.recorder.header(Flags::NONE, target.range, 0);
        header[..ENTRY_LEN].copy_from_slice(fields.as_bytes());
        header[ENTRY_LEN..].fill(0);
        data.copy_to_slice(copy);
        let note = filter.under_way.enter(target.range);
        if let Err(err) = target.file.write_in_place(target.offset, copy) {
            return Attempt::Failed(err);
        }
        self.waiting.push(Waiting {
            sectors: (size / header.len()) as u64,
            crc: crc32c::crc32c(entry),
            submitted,
            queue: target.queue,
            note,
            _range: guard,
        });
        self.used = end;
        Attempt::Pending
    }

    /// Puts what waits into the log; `None` if there is nothing.
    fn settle(&mut self, filter: &Arc<WriteLog>) -> Option<Settled> {
        if self.waiting.is_empty() {
            return None;
        }
        filter.has_grown.store(true, Ordering::Relaxed);
        let sectors = self.waiting.iter().map(|entry| entry.sectors).sum();
        let settling = match filter.recorder.tail().reserve(self.waiting.len() as u64, sectors) {
            Ok(reserved) => {
                let written = self.write_run(filter, &reserved);
                Ok(reserved.settle_now(written))
            }
            Err(err) => Err(err),
        };
        let notes: Vec<Note> = self.waiting.drain(..).map(|entry| entry.note).collect();
        self.used = 0;
        let settling = match settling {
            Ok(settling) => settling,
            Err(err) => return Some(Settled::Done(Err(err))),
        };
        let filter = Arc::clone(filter);
        let leave = move |result: Result<()>| {
            result.map(|()| notes.into_iter().for_each(|note| filter.under_way.leave(note)))
        };
        Some(match settling.outcome() {
            Some(result) => Settled::Done(leave(result)),
            None => Settled::Later(Box::pin(async move { leave(settling.wait().await) })),
        })
    }

    /// Writes what waits, as one run.
    fn write_run(&mut self, filter: &WriteLog, reserved: &Reserved<'_>) -> Result<()> {
        let recorder = &filter.recorder;
        let host = "what waits here was written while both were files of the host";
        let log = recorder.log().as_host().expect(host);
        let sidecar = recorder.sidecar().as_host().expect(host);
        let at = recorder.offset(reserved.first.sector);
        log.write_in_place(at, &self.memory[..self.used]).context(|| recorder.log_name())?;
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

fn sidecar_name(sidecar: &HostFile) -> String {
    use crate::io::File;
    sidecar.name().to_string()
}

// SAFETY: `Staged` keeps the copy of each entry, in memory of its own, until it is told.
unsafe impl InPlace for InPlaceWrites {
    fn write(&mut self, range: ByteRange, data: Scattered<'_>, queue: u16) -> Attempt<'_> {
        let header_len = u64::from(self.filter.recorder.sector_size());
        if !range.is_aligned(header_len) || range.len > MAX_DATA || self.owes_superblock() {
            return Attempt::NotNow;
        }
        let filter = &*self.filter;
        let Some(target) = filter.target(range, queue) else { return Attempt::NotNow };
        // If it overlaps one that waits here, to settle that now could put it before a FLUSH that
        // the guest submitted together with it. So it waits its turn as a task.
        let size = (header_len + range.len) as usize;
        let fits = size <= ROOM && target.file.inline().writes;
        match fits && filter.in_place_files().is_some() {
            true => self.room.write(filter, &target, data, size),
            false => self.staged.write(filter, target, data),
        }
    }

    fn written(&mut self, token: u32, has_succeeded: bool) {
        self.staged.written(token, has_succeeded);
    }

    fn settle(&mut self) -> Settled {
        let (room, staged) = (self.room.settle(&self.filter), self.staged.settle(&self.filter));
        self.is_due = self.filter.recorder.is_due();
        match (room, staged) {
            (Some(one), Some(other)) => one.and(other),
            (settled, other) => settled.or(other).unwrap_or(Settled::Done(Ok(()))),
        }
    }
}

#[cfg(test)]
mod tests;
