//! Back to the ring: operations end, requests complete, the guest is told.

#![allow(unsafe_code)]

use std::rc::Rc;
use std::sync::Arc;

use super::Worker;
use crate::block::driver::{Committed, PlanCommit};
use crate::device::export::FailureOf;
use crate::device::latency::Timed;
use crate::device::request::{Kind, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::io::buf::slice_iovecs;

impl Worker {
    /// An operation of a planned request has ended.
    #[inline]
    pub(super) fn part_done(&mut self, index: u32, part: usize, result: i32) {
        let slot = &mut self.slots[index as usize];
        let piece = &mut slot.parts[part];
        if i64::from(result) == piece.len as i64 - piece.done as i64 && result >= 0 {
            // All of it.
        } else if !self.part_short(index, part, result) {
            return;
        }
        let slot = &mut self.slots[index as usize];
        slot.parts_left -= 1;
        if slot.parts_left == 0 {
            self.planned_done(index);
        }
    }

    /// An operation did not do all it should: goes on with the rest, or notes the error. True if
    /// the part is over.
    #[cold]
    fn part_short(&mut self, index: u32, part: usize, result: i32) -> bool {
        let slot = &mut self.slots[index as usize];
        let piece = &mut slot.parts[part];
        match result {
            e if e == -libc::EAGAIN || e == -libc::EINTR => {}
            0 => {
                // The end of the file, inside of the disk.
                slot.errno = libc::ENODATA;
                return true;
            }
            e if e < 0 => {
                slot.errno = -e;
                return true;
            }
            n => {
                piece.done += n as u64;
                let all = if piece.iovs.is_empty() { &slot.request.data } else { &piece.iovs };
                let mut rest = Vec::new();
                let have: u64 = all.iter().map(|iov| iov.iov_len as u64).sum();
                slice_iovecs(all, n as u64, have - n as u64, &mut rest);
                piece.iovs = rest;
                piece.op.iovs = piece.iovs.as_ptr();
                piece.op.n_iovs = piece.iovs.len() as u32;
                piece.op.offset += n as u64;
            }
        }
        self.push_part(index, part);
        false
    }

    #[inline]
    fn planned_done(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.pin = None;
        if let Some(turn) = slot.turn.take() {
            turn.end(slot.errno);
        }
        let has_succeeded = slot.errno == 0;
        if let Some(token) = slot.staged.take() {
            self.copy_written(index, token, has_succeeded);
            if has_succeeded {
                return;
            }
        }
        let slot = &mut self.slots[index as usize];
        if has_succeeded {
            return match slot.commit.take() {
                None if slot.flush_after => self.flush_then_finish(index),
                None => self.finish(index, Status::Ok),
                Some(commit) => self.commit(index, commit),
            };
        }
        slot.commit = None;
        let errno = std::mem::take(&mut slot.errno);
        let err = match errno {
            libc::ENODATA => Error::new(
                ErrorKind::OutOfRange,
                "the image ends before the disk does: it has been truncated by another program",
            ),
            errno => Error::from_errno(errno),
        };
        if slot.request.kind == Kind::Flush {
            self.node.poison(&err);
        }
        self.request_ended(index, Err(err));
    }

    /// The data of a planned write is where it should be, and somebody wants to know.
    #[inline]
    fn commit(&mut self, index: u32, commit: PlanCommit) {
        self.committed(index, commit.written());
    }

    /// Somebody has been told that the data of a planned write is where it should be.
    #[inline]
    pub(super) fn committed(&mut self, index: u32, result: Result<Committed>) {
        match result {
            Ok(Committed::Done) if !self.slots[index as usize].flush_after => {
                self.finish(index, Status::Ok);
            }
            Ok(Committed::Done | Committed::FlushFirst) => self.flush_then_finish(index),
            Err(err) => self.request_ended(index, Err(err)),
        }
    }

    /// Completes a write whose data is written after a flush.
    fn flush_then_finish(&mut self, index: u32) {
        self.has_unpolled = true;
        let (node, ended) = (self.node.clone(), Rc::clone(&self.ended));
        self.reactor.executor().spawn(async move {
            let result = node.flush().await;
            ended.borrow_mut().push((index, result));
        });
    }

    /// A request has ended, well or badly.
    pub(super) fn request_ended(&mut self, index: u32, result: Result<()>) {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(err) => {
                let kind = self.slots[index as usize].request.kind;
                self.failures.note_request(self.export.name(), kind, &err);
                if !matches!(kind, Kind::GetId) && err.kind() != ErrorKind::Unsupported {
                    let is_read = matches!(kind, Kind::Read { .. });
                    let of = if is_read { FailureOf::Read } else { FailureOf::Write };
                    self.export.note_failure(of, &err);
                }
                if err.kind() == ErrorKind::Unsupported {
                    Status::Unsupported
                } else {
                    Status::IoErr
                }
            }
        };
        self.finish(index, status);
    }

    /// Completes a request: its status, its dirty pages, its used element. The one place where a
    /// slot becomes free.
    #[inline]
    pub(super) fn finish(&mut self, index: u32, status: Status) {
        let slot = &mut self.slots[index as usize];
        let served = self
            .rings
            .iter_mut()
            .find(|r| r.watch == slot.ring)
            .expect("a ring leaves only when it is drained");
        // SAFETY: the ring keeps the memory of this request mapped until `release_table` below.
        let len = unsafe { slot.request.finish(status) };
        self.counts.requests.add(1);
        let moved = if status == Status::Ok { slot.request.data_len } else { 0 };
        match slot.request.kind {
            Kind::Read { .. } => {
                self.counts.reads.add(1);
                self.counts.bytes_read.add(moved);
            }
            Kind::Write { .. } => {
                self.counts.writes.add(1);
                self.counts.bytes_written.add(moved);
            }
            Kind::Flush => self.counts.flushes.add(1),
            Kind::Discard => {
                self.counts.discards.add(1);
                let segments = slot.request.segments.iter().filter(|_| status == Status::Ok);
                self.counts.bytes_discarded.add(segments.map(|segment| segment.range.len).sum());
            }
            Kind::WriteZeroes | Kind::GetId => {}
        }
        if std::mem::take(&mut slot.flushing) {
            self.flushing -= 1;
        }
        if status != Status::Ok {
            self.counts.errors.add(1);
            match slot.request.kind {
                Kind::Read { .. } => self.counts.failed_reads.add(1),
                Kind::Write { .. } => self.counts.failed_writes.add(1),
                Kind::Flush => self.counts.failed_flushes.add(1),
                Kind::Discard => self.counts.failed_discards.add(1),
                Kind::WriteZeroes | Kind::GetId => {}
            }
        }
        if let Some(time) = self.stopwatch.end(index) {
            let timed = match slot.request.kind {
                Kind::Read { .. } => Some(Timed::Read),
                Kind::Write { .. } => Some(Timed::Write),
                Kind::Flush => Some(Timed::Flush),
                _ => None,
            };
            if let Some(timed) = timed {
                self.counts.latencies.add(timed, time);
            }
        }
        if let Some(log) = served.ring.dirty_log() {
            let log = Arc::clone(log);
            slot.request.mark_dirty(served.table_of(slot.table), &log);
        }
        served.ring.complete(slot.head, len);
        served.unpublished += 1;
        served.release_table(slot.table);
        self.in_flight -= 1;
        self.data_in_flight -= slot.request.data_len;
        self.free_slots.push(index);
    }

    /// Shows the guest what was completed, with at most one interrupt.
    #[inline]
    pub(super) fn publish(&mut self, at: usize) {
        let served = &mut self.rings[at];
        if served.unpublished == 0 {
            return;
        }
        served.unpublished = 0;
        if served.ring.publish() {
            self.counts.interrupts.add(1);
            served.interrupt();
            self.pace.interrupted();
        }
    }
}
