//! A request in flight: its slot, and the parts that its plan cuts it into.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use crate::block::Submission;
use crate::block::driver::{Driver, Pin, Plan, PlanCommit, PlanExtent, PlanOp, Planned};
use crate::device::request::Request;
use crate::io::HostFile;
use crate::io::buf::{iovecs_aligned, slice_iovecs};
use crate::io::engine::{MAX_IOVECS, Op, OpCode, nowait_read};
use crate::io::flushes::FlushTurn;
use crate::units::ByteRange;

/// A request in flight, or room for one.
pub(super) struct Slot {
    /// Watch number of the ring: unlike its position it never changes.
    pub(super) ring: u64,
    pub(super) head: u16,
    pub(super) table: u32,
    pub(super) request: Request,
    /// Whether it is counted among the worker's flushes under way.
    pub(super) flushing: bool,
    /// The pieces of a planned request.
    pub(super) parts: Vec<Part>,
    pub(super) parts_left: u32,
    /// First error of a part, as a positive error number.
    pub(super) errno: i32,
    /// The turn of a planned flush to sync its file.
    pub(super) turn: Option<FlushTurn>,
    /// Whether a planned write is durable only after a flush.
    pub(super) flush_after: bool,
    /// Keeps planned extents where they are.
    pub(super) pin: Option<Pin>,
    /// Who must know when a planned write's data is written.
    pub(super) commit: Option<PlanCommit>,
    /// The driver's name for the copy that is being written, where it is not the guest's memory.
    pub(super) staged: Option<u32>,
}

/// A piece of a planned request: one operation on one file.
pub(super) struct Part {
    pub(super) op: Op,
    /// Bytes to transfer; 0 for a sync.
    pub(super) len: u64,
    pub(super) done: u64,
    /// The memory of this piece where it is not just all of the request's.
    pub(super) iovs: Vec<libc::iovec>,
}

/// What became of planning a request.
pub(super) enum Prepared {
    /// The driver has no plan, or the request's memory does not fit it.
    NotNow,
    /// It is done already.
    Nothing,
    /// It was done in place, with this result.
    Inline(i32),
    /// Its one part is to be done in place, on this file.
    InPlace(*const HostFile),
    /// So many parts are to be pushed.
    Push(usize),
}

impl Slot {
    /// Room for a request.
    pub(super) fn new() -> Slot {
        Slot {
            ring: 0,
            head: 0,
            table: 0,
            request: Request::new(),
            flushing: false,
            parts: Vec::with_capacity(1),
            parts_left: 0,
            errno: 0,
            turn: None,
            flush_after: false,
            pin: None,
            commit: None,
            staged: None,
        }
    }

    /// Makes the request a write of the driver's own copy of its data.
    pub(super) fn stage(&mut self, submission: &Submission<'_>) {
        let Submission { file, offset, data, token } = *submission;
        self.request.data.clear();
        let iov_base = data.as_ptr().cast_mut().cast();
        self.request.data.push(libc::iovec { iov_base, iov_len: data.len() });
        let op = PlanOp::Write { fua: false };
        let part = Part::new(op, file, offset, data.len() as u64, &self.request.data, Vec::new());
        self.errno = 0;
        self.flush_after = false;
        self.parts.clear();
        self.parts.push(part);
        self.parts_left = 1;
        self.staged = Some(token);
    }

    /// Asks the driver for a plan and cuts the request into parts accordingly. A single part is
    /// to be done in place on a file where the ring would only hand it to a kernel worker, and is
    /// done at once if it is `alone` and what it reads is in the page cache.
    #[inline]
    pub(super) fn plan(
        &mut self,
        driver: &dyn Driver,
        op: PlanOp,
        range: ByteRange,
        (memory_alignment, length_alignment): (usize, usize),
        alone: bool,
    ) -> Prepared {
        let data = &self.request.data;
        if data.len() > MAX_IOVECS
            || (length_alignment > 1 && !iovecs_aligned(data, memory_alignment, length_alignment))
        {
            return Prepared::NotNow;
        }
        let mut plan = Plan::default();
        if driver.plan(op, range, &mut plan) == Planned::NotNow {
            return Prepared::NotNow;
        }
        self.errno = 0;
        self.parts.clear();
        self.flush_after = false;
        if let [PlanExtent::File { file, offset, len }] = plan.extents[..] {
            if op == PlanOp::Flush {
                // Beside another one it would not learn what that one learns.
                self.turn = file.flushes().try_begin();
                if self.turn.is_none() {
                    return Prepared::NotNow;
                }
            }
            let op = through(op, file, &mut self.flush_after);
            let part = Part::new(op, file, offset, len, data, Vec::new());
            let prepared = match op {
                PlanOp::Read if alone && file.reads_nowait() => {
                    // SAFETY: this slot keeps the iovecs, the ring the memory, the driver the file.
                    unsafe { nowait_read(&part.op) }.map_or(Prepared::Push(1), Prepared::Inline)
                }
                PlanOp::Read if file.inline().reads => Prepared::InPlace(file),
                PlanOp::Write { fua: false } if file.inline().writes => Prepared::InPlace(file),
                _ => Prepared::Push(1),
            };
            self.parts.push(part);
            self.parts_left = 1;
            self.pin = plan.pin;
            self.commit = plan.commit;
            return prepared;
        }
        self.plan_parts(op, plan)
    }

    /// Cuts a request whose plan has several extents.
    #[cold]
    fn plan_parts(&mut self, op: PlanOp, plan: Plan<'_>) -> Prepared {
        if op == PlanOp::Flush && !plan.extents.is_empty() {
            return Prepared::NotNow;
        }
        let mut at = 0;
        for extent in plan.extents {
            let mut iovs = Vec::new();
            match extent {
                PlanExtent::File { file, offset, len } => {
                    slice_iovecs(&self.request.data, at, len, &mut iovs);
                    let op = through(op, file, &mut self.flush_after);
                    self.parts.push(Part::new(op, file, offset, len, &[], iovs));
                    at += len;
                }
                PlanExtent::Zero { len } => {
                    slice_iovecs(&self.request.data, at, len, &mut iovs);
                    zero(&iovs);
                    at += len;
                }
            }
        }
        self.parts_left = self.parts.len() as u32;
        self.pin = plan.pin;
        self.commit = plan.commit;
        match self.parts.len() {
            0 => {
                self.pin = None;
                Prepared::Nothing
            }
            parts => Prepared::Push(parts),
        }
    }
}

/// What to do with a file for an operation. Through the page cache a durable write is a plain one,
/// and a flush for all of them that are done by then: the kernel would sync the file for each of
/// them anyway, and tell a failure to one of them only.
#[inline]
fn through(op: PlanOp, file: &HostFile, flush_after: &mut bool) -> PlanOp {
    match op {
        PlanOp::Write { fua: true } if !file.is_direct() => {
            *flush_after = true;
            PlanOp::Write { fua: false }
        }
        op => op,
    }
}

impl Part {
    /// A part whose memory is `shared` (the request's own list), or `own` if that is not empty.
    #[inline]
    fn new(
        op: PlanOp,
        file: &HostFile,
        offset: u64,
        len: u64,
        shared: &[libc::iovec],
        own: Vec<libc::iovec>,
    ) -> Part {
        let memory = if own.is_empty() { shared } else { &own };
        Part {
            op: Op {
                code: match op {
                    PlanOp::Read => OpCode::Read,
                    PlanOp::Write { fua } => OpCode::Write { dsync: fua },
                    PlanOp::Flush => OpCode::Sync,
                },
                fd: file.as_raw_fd(),
                file_id: file.id(),
                offset,
                len: 0,
                iovs: memory.as_ptr(),
                n_iovs: memory.len() as u32,
            },
            len,
            done: 0,
            iovs: own,
        }
    }
}

/// Fills guest memory with zeros.
fn zero(iovs: &[libc::iovec]) {
    for iov in iovs {
        // SAFETY: parts of a parsed request, whose memory the ring keeps mapped.
        unsafe { std::ptr::write_bytes(iov.iov_base.cast::<u8>(), 0, iov.iov_len) };
    }
}
