//! From the ring: requests are taken, parsed and started.

#![allow(unsafe_code)]

use std::rc::Rc;

use super::Worker;
use super::slot::{Prepared, Slot};
use crate::block::driver::PlanOp;
use crate::block::{Node, origin};
use crate::device::export::CachePolicy;
use crate::device::request::{Kind, Parsed, Segment, Status};
use crate::error::Result;
use crate::io::buf::Buffers;
use crate::units::ByteRange;

impl Worker {
    /// Takes a batch of requests from a ring and starts them. True if there were any.
    #[inline]
    pub(super) fn take_batch(&mut self, at: usize) -> bool {
        // A ring that is to stop still takes up again what an earlier process owed.
        let stopping = self.rings[at].stopping.is_some();
        if stopping && self.rings[at].resubmit.is_empty() {
            return false;
        }
        if self.rings[at].ring.is_memory_broken() {
            self.lose_memory(at);
            return false;
        }
        let mut taken = 0;
        let in_flight = self.in_flight;
        while taken < self.pace.batch(in_flight, !self.unsettled.is_empty()) && !self.is_sated() {
            let served = &mut self.rings[at];
            let head = match served.resubmit.pop_front() {
                Some(head) => head,
                None if stopping => break,
                None => match served.ring.pop() {
                    None => break,
                    Some(Ok(head)) => head,
                    Some(Err(_)) if self.rings[at].ring.is_memory_broken() => {
                        // It was read from the hole; the guest is not to blame.
                        self.lose_memory(at);
                        break;
                    }
                    Some(Err(err)) => {
                        self.report_broken(at, &err.to_string());
                        break;
                    }
                },
            };
            taken += 1;
            self.take(at, head);
            if self.rings[at].unpublished >= self.pace.show() {
                self.publish(at);
            }
        }
        self.perform_run();
        taken > 0
    }

    /// Parses the request at `head` and starts it.
    #[inline]
    fn take(&mut self, at: usize, head: u16) {
        let index = self.new_slot();
        let served = &mut self.rings[at];
        let slot = &mut self.slots[index as usize];
        slot.ring = served.watch;
        slot.head = head;
        slot.table = served.table;
        served.in_flight_here += 1;
        self.in_flight += 1;
        self.stopwatch.begin(index);
        if let Err(err) = served.ring.walk(head, &mut self.chain) {
            self.failures.note_chain(self.export.name(), served.index, head, &err);
        }
        // SAFETY: the ring keeps the memory that the chain was walked in mapped, now and (in
        // `retired`) until this request has completed.
        let parsed = unsafe { slot.request.parse(&self.chain, &served.limits) };
        self.data_in_flight += slot.request.data_len;
        match parsed {
            Parsed::Done(status) => self.finish(index, status),
            Parsed::Submit => self.submit(at, index),
        }
    }

    /// Starts a legal request: on the planned path if the driver has a plan, else as a task.
    #[inline]
    fn submit(&mut self, at: usize, index: u32) {
        let request = &self.slots[index as usize].request;
        let (op, range) = match request.kind {
            Kind::Read { offset } => (PlanOp::Read, ByteRange { offset, len: request.data_len }),
            Kind::Write { offset } => {
                if self.node.is_poisoned() {
                    return self.finish(index, Status::IoErr);
                }
                let fua = self.export.writes_through();
                (PlanOp::Write { fua }, ByteRange { offset, len: request.data_len })
            }
            Kind::Flush => {
                if self.export.options.cache == CachePolicy::Unsafe || self.read_only {
                    return self.finish(index, Status::Ok);
                }
                if self.node.is_poisoned() {
                    return self.finish(index, Status::IoErr);
                }
                if !self.party.is_open() {
                    // The gate is about to be closed, and would have to wait for it.
                    return self.held.push(index);
                }
                self.flushing += 1;
                self.slots[index as usize].flushing = true;
                if self.node.owes_flush() {
                    return self.spawn(at, index);
                }
                (PlanOp::Flush, ByteRange::default())
            }
            Kind::GetId => {
                // SAFETY: as for `parse`.
                unsafe { request.write_id(&self.serial) };
                return self.finish(index, Status::Ok);
            }
            Kind::Discard | Kind::WriteZeroes => return self.spawn(at, index),
        };
        if !self.submit_planned(at, index, op, range) && !self.write_in_place(at, index, op, range)
        {
            self.spawn(at, index);
        }
    }

    /// Starts the flushes that were held.
    #[cold]
    pub(super) fn start_held(&mut self) {
        for index in std::mem::take(&mut self.held) {
            let watch = self.slots[index as usize].ring;
            let at = self.rings.iter().position(|served| served.watch == watch);
            self.submit(at.expect("a ring leaves only when it is drained"), index);
        }
    }

    /// Submits a request as the driver's plan says. False if it has none.
    #[inline]
    fn submit_planned(&mut self, at: usize, index: u32, op: PlanOp, range: ByteRange) -> bool {
        let slot = &mut self.slots[index as usize];
        let alignment = (self.memory_alignment, self.length_alignment);
        let alone = self.in_flight == 1 && (!self.has_ring || !self.rings[at].ring.has_available());
        match slot.plan(self.driver.as_ref(), op, range, alignment, alone) {
            Prepared::NotNow => return false,
            Prepared::Nothing => self.finish(index, Status::Ok),
            Prepared::Inline(result) => self.part_done(index, 0, result),
            // SAFETY: the driver keeps its files open, and stays until this batch has been taken.
            Prepared::InPlace(file) => unsafe { self.join_run(index, file) },
            Prepared::Push(parts) => {
                for part in 0..parts {
                    self.push_part(index, part);
                }
            }
        }
        true
    }

    #[inline]
    pub(super) fn push_part(&mut self, index: u32, part: usize) {
        let op = &self.slots[index as usize].parts[part].op;
        let user = u64::from(index) | (part as u64) << 32;
        // SAFETY: the slot keeps the iovecs until its last part is done, the ring keeps the
        // memory (of a copy: the driver), and the driver's files stay open until the gate has
        // drained this request.
        unsafe { self.reactor.engine().push(op, user) };
    }

    /// Starts a request as a task of this thread.
    fn spawn(&mut self, at: usize, index: u32) {
        self.has_unpolled = true;
        let slot = &mut self.slots[index as usize];
        let memory = self.rings[at].ring.memory();
        if matches!(slot.request.kind, Kind::Flush) {
            // One that was held may find another memory here, and what a guest adds is not data.
            slot.request.data.clear();
        }
        // SAFETY: the request was parsed from a chain walked in the ring's present memory, or has
        // no data.
        let data = unsafe { slot.request.buffers(memory) };
        let kind = slot.request.kind;
        let segments = slot.request.segments.clone();
        let node = self.node.clone();
        let fua = self.export.writes_through();
        let ended = Rc::clone(&self.ended);
        let queue = self.rings[at].index as u16;
        self.reactor.executor().spawn(async move {
            origin::set_queue(Some(queue));
            let result = perform(&node, kind, data, &segments, fua).await;
            ended.borrow_mut().push((index, result));
        });
    }

    fn new_slot(&mut self) -> u32 {
        if let Some(index) = self.free_slots.pop() {
            return index;
        }
        self.slots.push(Slot::new());
        self.slots.len() as u32 - 1
    }
}

/// Performs a request through the asynchronous path.
async fn perform(
    node: &Node,
    kind: Kind,
    data: Buffers,
    segments: &[Segment],
    fua: bool,
) -> Result<()> {
    match kind {
        Kind::Read { offset } => node.read(offset, data).await,
        Kind::Write { offset } => node.write(offset, data, fua).await,
        Kind::Flush => node.flush().await,
        Kind::Discard => {
            for segment in segments {
                node.discard(segment.range).await?;
            }
            if fua { node.flush().await } else { Ok(()) }
        }
        Kind::WriteZeroes => {
            for segment in segments {
                node.write_zeroes(segment.range, segment.unmap).await?;
            }
            if fua { node.flush().await } else { Ok(()) }
        }
        Kind::GetId => Ok(()),
    }
}
