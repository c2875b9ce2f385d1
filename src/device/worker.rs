//! A worker: the thread that serves one or more rings.
//!
//! ```text
//! loop:
//!   commands of the message thread      start, stop, new memory, …
//!   gate                                closed: pop nothing, report quiet once drained
//!   for each ring: pop a batch          parse, plan; submit, or start a task
//!   reactor.turn()                      enter the kernel at most once; reap; run tasks
//!   completions                         status byte, used element
//!   for each ring: publish              one index store, at most one interrupt
//!   nothing came: ask for a kick, look once more, sleep in the reactor
//! ```
//!
//! How large a batch is depends on where the guest runs: see [`super::pace`].
//!
//! Invariants:
//! * Each popped chain is completed exactly once: its slot is freed only by [`Worker::finish`].
//! * The memory and the driver a request uses outlive it: a ring keeps replaced memory tables until
//!   the last request of their time has completed, and the driver is replaced only when the gate
//!   has drained the worker.
//! * A ring that breaks its protocol is taken out of service by itself; the others go on.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use crate::block::driver::{Committed, Driver, Pin, Plan, PlanCommit, PlanExtent, PlanOp, Planned};
use crate::block::{Node, Party, origin};
use crate::device::chain::Chain;
use crate::device::dirty_log::DirtyLog;
use crate::device::export::{CachePolicy, Counters, Export, FailureOf};
use crate::device::features;
use crate::device::latency::{Stopwatch, Timed};
use crate::device::memory::GuestMemory;
use crate::device::pace::Pace;
use crate::device::patience::Patience;
use crate::device::pool::{Command, Mailbox, Stopped};
use crate::device::request::{self, Kind, Limits, Parsed, Request, Segment, Status};
use crate::device::ring::{Ring, RingConfig};
use crate::device::rings::{Notifier, RingStart};
use crate::error::{Error, ErrorKind, Result};
use crate::io::buf::{Buffers, iovecs_aligned, slice_iovecs};
use crate::io::engine::{Event, MAX_IOVECS, Op, OpCode, WATCH, nowait_read};
use crate::io::{HostFile, Reactor};
use crate::units::ByteRange;

/// A ring without a kick descriptor has to be looked at now and then.
const KICKLESS_PAUSE: Duration = Duration::from_micros(50);

/// Runs a worker thread until it is told to quit. `ready` learns whether it could be set up.
pub(super) fn run(
    export: Arc<Export>,
    mailbox: Arc<Mailbox>,
    number: usize,
    ready: SyncSender<Result<()>>,
) {
    let reactor = match Reactor::new(export.options.engine) {
        Ok(reactor) => reactor,
        Err(err) => {
            let _ = ready.send(Err(err.context("cannot set up I/O for a worker")));
            return;
        }
    };
    mailbox.set_notify(reactor.notifier());
    let party = export.root.gate().join(format!("queue worker {number}"), reactor.notifier());
    let _ = ready.send(Ok(()));
    let entered = Rc::clone(&reactor);
    entered.enter(|| Worker::new(export, mailbox, reactor, party).serve());
}

/// See the module's text.
struct Worker {
    export: Arc<Export>,
    node: Node,
    mailbox: Arc<Mailbox>,
    reactor: Rc<Reactor>,
    party: Party,
    /// The gate's generation that `driver` was loaded in.
    generation: u64,
    driver: Arc<dyn Driver>,
    /// What the driver's limits were when it was loaded.
    capacity: u64,
    read_only: bool,
    memory_alignment: usize,
    /// Of the length of each memory range, where `memory_alignment` demands anything at all.
    length_alignment: usize,
    rings: Vec<Served>,
    slots: Vec<Slot>,
    free_slots: Vec<u32>,
    /// Requests in flight on all rings.
    in_flight: usize,
    /// Asynchronous requests that have ended.
    ended: Rc<RefCell<Vec<Ended>>>,
    chain: Chain,
    events: Vec<Event>,
    /// Distinguishes the kick watches of successive rings.
    next_watch: u64,
    serial: [u8; request::ID_LEN],
    counts: Arc<Counters>,
    stopwatch: Stopwatch,
    pace: Pace,
    patience: Patience,
    failures: FailureLog,
    quit: bool,
}

/// The slot of an asynchronous request that has ended, and its outcome.
type Ended = (u32, Result<()>);

/// A ring in service.
struct Served {
    index: usize,
    ring: Ring,
    limits: Limits,
    /// Never read; kept open for the watch.
    kick: Option<Notifier>,
    call: Option<Notifier>,
    err: Option<Notifier>,
    /// User number of the kick's watch.
    watch: u64,
    /// Requests in flight that use the current memory table.
    in_flight_here: usize,
    /// Number of the current memory table.
    table: u32,
    /// Earlier memory tables that requests in flight still use, and how many do.
    retired: Vec<(u32, usize, Arc<GuestMemory>)>,
    /// Guest address of the used ring, for the dirty log.
    log_used: Option<u64>,
    /// Heads that were in flight when an earlier back-end died, oldest first.
    resubmit: VecDeque<u16>,
    /// Who waits for the ring to stop.
    stopping: Option<Stopped>,
    /// Completed since the last publication.
    unpublished: usize,
    /// Whether the ring has been reported as broken.
    reported: bool,
}

/// A request in flight, or room for one.
struct Slot {
    /// Watch number of the ring: unlike its position it never changes.
    ring: u64,
    head: u16,
    table: u32,
    request: Request,
    /// The pieces of a planned request.
    parts: Vec<Part>,
    parts_left: u32,
    /// First error of a part, as a positive error number.
    errno: i32,
    /// Keeps planned extents where they are.
    pin: Option<Pin>,
    /// Who must know when a planned write's data is written.
    commit: Option<PlanCommit>,
}

/// A piece of a planned request: one operation on one file.
struct Part {
    op: Op,
    /// Bytes to transfer; 0 for a sync.
    len: u64,
    done: u64,
    /// The memory of this piece where it is not just all of the request's.
    iovs: Vec<libc::iovec>,
}

/// What became of planning a request.
enum Prepared {
    /// The driver has no plan, or the request's memory does not fit it.
    NotNow,
    /// It is done already.
    Nothing,
    /// It was done in place, with this result.
    Inline(i32),
    /// So many parts are to be pushed.
    Push(usize),
}

impl Slot {
    /// Asks the driver for a plan and cuts the request into parts accordingly. A single part is
    /// done at once on a file where the ring would only hand it to a kernel worker, or if it is
    /// `alone` in flight and what it reads is in the page cache.
    #[inline]
    fn plan(
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
        if let [PlanExtent::File { file, offset, len }] = plan.extents[..] {
            let part = Part::new(op, file, offset, len, data, Vec::new());
            let result = match op {
                // SAFETY: this slot keeps the iovecs, the ring the memory, the driver the file.
                PlanOp::Read if alone && file.reads_nowait() => unsafe { nowait_read(&part.op) },
                PlanOp::Read if file.inline().reads => {
                    // SAFETY: as above.
                    Some(unsafe { file.inline_call(&part.op) })
                }
                PlanOp::Write { fua: false } if file.inline().writes => {
                    // SAFETY: as above.
                    Some(unsafe { file.inline_call(&part.op) })
                }
                _ => None,
            };
            self.parts.push(part);
            self.parts_left = 1;
            self.pin = plan.pin;
            self.commit = plan.commit;
            return result.map_or(Prepared::Push(1), Prepared::Inline);
        }
        self.plan_parts(op, plan)
    }

    /// Cuts a request whose plan has several extents.
    #[cold]
    fn plan_parts(&mut self, op: PlanOp, plan: Plan<'_>) -> Prepared {
        let mut at = 0;
        for extent in plan.extents {
            let mut iovs = Vec::new();
            match extent {
                PlanExtent::File { file, offset, len } => {
                    slice_iovecs(&self.request.data, at, len, &mut iovs);
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

impl Worker {
    fn new(
        export: Arc<Export>,
        mailbox: Arc<Mailbox>,
        reactor: Rc<Reactor>,
        party: Party,
    ) -> Worker {
        // Before node and driver: if they are replaced in between, the generation is already old.
        let generation = party.generation();
        let node = export.root.node();
        let counts = export.new_counters();
        let patience = Patience::new(export.options.poll_us);
        let mut worker = Worker {
            serial: request::id_bytes(&export.options.serial),
            driver: node.driver(),
            node,
            generation,
            export,
            mailbox,
            reactor,
            party,
            capacity: 0,
            read_only: false,
            memory_alignment: 1,
            length_alignment: 1,
            rings: Vec::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            in_flight: 0,
            ended: Rc::default(),
            chain: Chain::new(),
            events: Vec::with_capacity(64),
            next_watch: 0,
            counts,
            stopwatch: Stopwatch::new(),
            pace: Pace::new(),
            patience,
            failures: FailureLog::default(),
            quit: false,
        };
        worker.load_limits();
        worker
    }

    fn load_limits(&mut self) {
        let limits = self.node.limits();
        self.capacity = limits.size;
        self.read_only = limits.read_only || self.export.options.read_only;
        self.memory_alignment = limits.memory_alignment;
        self.length_alignment = limits.request_alignment as usize;
        for served in &mut self.rings {
            served.limits.capacity = limits.size;
            served.limits.read_only = self.read_only;
        }
    }

    fn serve(mut self) {
        while !self.quit {
            while let Some(command) = self.mailbox.take() {
                self.obey(command);
            }
            let open = self.pass_gate();
            let mut busy = false;
            if open {
                for at in 0..self.rings.len() {
                    busy |= self.take_batch(at);
                }
            }
            busy |= self.turn(false);
            self.settle_stops();
            if !busy && !self.quit {
                self.idle(open);
            }
        }
        // All rings should have been stopped before. If not: the slots own what the host still
        // reads and writes, so they stay until it is done.
        while self.in_flight > 0 {
            self.turn(true);
        }
    }

    /// Whether requests may be popped. Reports quiet when the gate is closed and all is drained;
    /// loads the driver anew when the gate has been opened again.
    #[inline]
    fn pass_gate(&mut self) -> bool {
        if self.party.is_closed() {
            if self.in_flight == 0 {
                self.party.report_quiet();
            }
            return false;
        }
        let generation = self.party.generation();
        if generation != self.generation {
            self.generation = generation;
            self.node = self.export.root.node();
            self.driver = self.node.driver();
            self.reactor.engine().forget_files();
            self.load_limits();
        }
        true
    }

    /// One turn of the reactor, and what came of it. True if a request completed or an event
    /// arrived.
    #[inline]
    fn turn(&mut self, wait: bool) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.counts.in_flight.set(self.in_flight as u64);
        self.reactor.turn(wait, &mut events);
        let mut busy = !events.is_empty();
        for event in events.drain(..) {
            if event.user & WATCH != 0 {
                self.counts.kicks.add(1);
                if let Some(served) = self.rings.iter_mut().find(|r| r.watch == event.user) {
                    served.ring.disable_notifications();
                }
            } else {
                self.part_done(event.user as u32, (event.user >> 32) as usize, event.result);
            }
        }
        self.events = events;
        if !self.ended.borrow().is_empty() {
            busy = true;
            let mut ended = self.ended.take();
            for (slot, result) in ended.drain(..) {
                self.request_ended(slot, result);
            }
            // Give the space back, unless something ended meanwhile.
            let mut current = self.ended.borrow_mut();
            if current.is_empty() {
                *current = ended;
            }
        }
        for at in 0..self.rings.len() {
            self.publish(at);
        }
        busy
    }

    /// Nothing is to be done: asks for kicks, looks once more, sleeps.
    fn idle(&mut self, open: bool) {
        let mut kickless = false;
        if open {
            for served in &mut self.rings {
                if served.stopping.is_none() && served.ring.enable_notifications() {
                    // Something came meanwhile.
                    return;
                }
                kickless |= served.kick.is_none() && served.ring.broken().is_none();
            }
            if self.in_flight == 0 && self.look_around() {
                return;
            }
        }
        self.counts.enters.set(self.reactor.engine().enters());
        // A wake-up that the turn before this has swallowed: what it was for is in plain sight.
        if self.mailbox.is_full() || self.party.is_closed() == open {
            return;
        }
        // Opened and closed again since the report: the new closer waits for a new one.
        if self.in_flight == 0 && self.party.owes_report() {
            return;
        }
        if kickless {
            std::thread::sleep(KICKLESS_PAUSE);
            return;
        }
        self.turn(true);
    }

    /// Looks at the rings for as long as the operator allows; true if something came. Never while
    /// the disk has work: its completions would wait for the look to end.
    #[inline]
    fn look_around(&mut self) -> bool {
        let Worker { rings, mailbox, party, patience, .. } = self;
        patience.wait_for(|| {
            rings.iter().any(|served| served.ring.has_available())
                || mailbox.is_full()
                || party.is_closed()
        })
    }

    // ---- from the ring ----

    /// Takes a batch of requests from a ring and starts them. True if there were any.
    #[inline]
    fn take_batch(&mut self, at: usize) -> bool {
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
        let batch = self.pace.batch(self.in_flight);
        while taken < batch {
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
        match unsafe { slot.request.parse(&self.chain, &served.limits) } {
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
        if !self.submit_planned(index, op, range) {
            self.spawn(at, index);
        }
    }

    /// Submits a request as the driver's plan says. False if it has none.
    #[inline]
    fn submit_planned(&mut self, index: u32, op: PlanOp, range: ByteRange) -> bool {
        let slot = &mut self.slots[index as usize];
        let alignment = (self.memory_alignment, self.length_alignment);
        let alone = self.in_flight == 1;
        match slot.plan(self.driver.as_ref(), op, range, alignment, alone) {
            Prepared::NotNow => return false,
            Prepared::Nothing => self.finish(index, Status::Ok),
            Prepared::Inline(result) => self.part_done(index, 0, result),
            Prepared::Push(parts) => {
                for part in 0..parts {
                    self.push_part(index, part);
                }
            }
        }
        true
    }

    #[inline]
    fn push_part(&mut self, index: u32, part: usize) {
        let op = &self.slots[index as usize].parts[part].op;
        let user = u64::from(index) | (part as u64) << 32;
        // SAFETY: the slot keeps the iovecs until its last part is done, the ring keeps the
        // memory, and the driver's files stay open until the gate has drained this request.
        unsafe { self.reactor.engine().push(op, user) };
    }

    /// Starts a request as a task of this thread.
    fn spawn(&mut self, at: usize, index: u32) {
        let slot = &mut self.slots[index as usize];
        let memory = self.rings[at].ring.memory();
        // SAFETY: the request was parsed from a chain walked in the ring's present memory.
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

    // ---- back to the ring ----

    /// An operation of a planned request has ended.
    #[inline]
    fn part_done(&mut self, index: u32, part: usize, result: i32) {
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
        if slot.errno == 0 {
            return match slot.commit.take() {
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
        match commit.written() {
            Ok(Committed::Done) => self.finish(index, Status::Ok),
            Ok(Committed::FlushFirst) => {
                let (node, ended) = (self.node.clone(), Rc::clone(&self.ended));
                self.reactor.executor().spawn(async move {
                    let result = node.flush().await;
                    ended.borrow_mut().push((index, result));
                });
            }
            Err(err) => self.request_ended(index, Err(err)),
        }
    }

    /// A request has ended, well or badly.
    fn request_ended(&mut self, index: u32, result: Result<()>) {
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
    fn finish(&mut self, index: u32, status: Status) {
        let slot = &mut self.slots[index as usize];
        let served = self
            .rings
            .iter_mut()
            .find(|r| r.watch == slot.ring)
            .expect("a ring leaves only when it is drained");
        // SAFETY: the ring keeps the memory of this request mapped until `release_table` below.
        let len = unsafe { slot.request.finish(status) };
        self.counts.requests.add(1);
        match slot.request.kind {
            Kind::Read { .. } => {
                self.counts.reads.add(1);
                self.counts.bytes_read.add(slot.request.data_len);
            }
            Kind::Write { .. } => {
                self.counts.writes.add(1);
                self.counts.bytes_written.add(slot.request.data_len);
            }
            Kind::Flush => self.counts.flushes.add(1),
            _ => {}
        }
        if status != Status::Ok {
            self.counts.errors.add(1);
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
        self.free_slots.push(index);
    }

    /// Shows the guest what was completed, with at most one interrupt.
    #[inline]
    fn publish(&mut self, at: usize) {
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

    fn new_slot(&mut self) -> u32 {
        if let Some(index) = self.free_slots.pop() {
            return index;
        }
        self.slots.push(Slot {
            ring: 0,
            head: 0,
            table: 0,
            request: Request::new(),
            parts: Vec::with_capacity(1),
            parts_left: 0,
            errno: 0,
            pin: None,
            commit: None,
        });
        self.slots.len() as u32 - 1
    }

    // ---- commands ----

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start { index, start, reply } => {
                let _ = reply.send(self.start(index, *start));
            }
            Command::Stop { index, reply } => match self.find(index) {
                Some(at) => self.rings[at].stopping = Some(reply),
                // The sender learns from the closed channel that the ring was not live.
                None => drop(reply),
            },
            Command::SetCall { index, call } => {
                if let Some(at) = self.find(index) {
                    let served = &mut self.rings[at];
                    served.call = call;
                    // A completion may have been announced on the old one, where nobody listens
                    // any more.
                    served.interrupt();
                }
            }
            Command::SetError { index, err } => {
                if let Some(at) = self.find(index) {
                    self.rings[at].err = err;
                }
            }
            Command::SetLogUsed { index, log_used } => {
                if let Some(at) = self.find(index) {
                    let served = &mut self.rings[at];
                    served.log_used = log_used;
                    let log = served.ring.dirty_log().cloned();
                    served.ring.set_dirty_log(log, log_used);
                }
            }
            Command::SetMemory { memory, reply } => {
                for at in 0..self.rings.len() {
                    self.set_memory(at, &memory);
                }
                let _ = reply.send(());
            }
            Command::SetDirtyLog { log, reply } => {
                for at in 0..self.rings.len() {
                    self.set_dirty_log(at, &log);
                }
                let _ = reply.send(());
            }
            Command::Quit => self.quit = true,
        }
    }

    fn find(&self, index: usize) -> Option<usize> {
        self.rings.iter().position(|r| r.index == index)
    }

    fn start(&mut self, index: usize, start: RingStart) -> Result<()> {
        let limits = Limits::new(
            self.capacity,
            self.export.options.block_size,
            self.read_only,
            start.features & features::device_features(self.read_only),
        );
        let memory = Arc::clone(&start.memory);
        let (ring, resubmit) = Ring::new(RingConfig {
            size: start.size,
            desc_addr: start.desc,
            avail_addr: start.avail,
            used_addr: start.used,
            base: start.base,
            features: start.features,
            memory,
            dirty_log: start.dirty_log,
            log_used_addr: start.log_used,
            inflight: start.inflight,
        })
        .map_err(|err| Error::from(err).context(format!("queue {index}")))?;
        if !resubmit.is_empty() {
            tracing::info!(
                export = self.export.name(),
                queue = index,
                "taking up {} requests that an earlier process left in flight",
                resubmit.len()
            );
        }
        self.next_watch += 1;
        let watch = WATCH | self.next_watch;
        if let Some(kick) = &start.kick {
            self.reactor.engine().watch(kick.as_raw_fd(), watch);
        }
        let mut served = Served {
            index,
            ring,
            limits,
            kick: start.kick,
            call: start.call,
            err: start.err,
            watch,
            in_flight_here: 0,
            table: 0,
            retired: Vec::new(),
            log_used: start.log_used,
            resubmit: resubmit.into(),
            stopping: None,
            unpublished: 0,
            reported: false,
        };
        // The process before us may have published without an interrupt.
        served.interrupt();
        self.rings.push(served);
        Ok(())
    }

    /// Lets rings go that are to stop and have nothing left in flight.
    #[inline]
    fn settle_stops(&mut self) {
        if self.rings.iter().all(|r| r.stopping.is_none()) {
            return;
        }
        let mut at = 0;
        while at < self.rings.len() {
            let served = &mut self.rings[at];
            let drained = served.in_flight_here == 0
                && served.retired.is_empty()
                && served.resubmit.is_empty();
            if served.stopping.is_none() || !drained {
                at += 1;
                continue;
            }
            self.publish(at);
            let served = self.rings.swap_remove(at);
            if served.kick.is_some() {
                self.reactor.engine().unwatch(served.watch);
            }
            if let Some(reply) = served.stopping {
                let _ = reply.send(served.ring.last_avail());
            }
        }
        if self.in_flight == 0 && self.rings.is_empty() {
            // Slots keep the longest lists their guest ever made them hold.
            self.slots = Vec::new();
            self.free_slots = Vec::new();
        }
    }

    fn set_memory(&mut self, at: usize, memory: &Arc<GuestMemory>) {
        let served = &mut self.rings[at];
        let old = Arc::clone(served.ring.memory());
        if let Err(err) = served.ring.set_memory(Arc::clone(memory)) {
            return self.report_broken(at, &err.to_string());
        }
        if served.in_flight_here > 0 {
            served.retired.push((served.table, served.in_flight_here, old));
            served.in_flight_here = 0;
        }
        served.table = served.table.wrapping_add(1);
    }

    fn set_dirty_log(&mut self, at: usize, log: &Option<Arc<DirtyLog>>) {
        let served = &mut self.rings[at];
        served.ring.set_dirty_log(log.clone(), served.log_used);
    }

    // ---- what goes wrong ----

    /// A ring broke its protocol: nothing more is taken from it until it is set up anew.
    #[cold]
    fn report_broken(&mut self, at: usize, why: &str) {
        let served = &mut self.rings[at];
        if std::mem::replace(&mut served.reported, true) {
            return;
        }
        tracing::error!(
            export = self.export.name(),
            queue = served.index,
            "the queue is broken and no longer served until the guest resets the device: {why}"
        );
        if let Some(err) = &served.err {
            signal(err);
        }
    }

    /// Guest memory lost its file: the ring lives in it, so nothing in it can be trusted.
    #[cold]
    fn lose_memory(&mut self, at: usize) {
        let served = &mut self.rings[at];
        served.ring.retire();
        served.resubmit.clear();
        self.report_broken(at, "the front-end has truncated the file of its shared memory");
    }
}

impl Served {
    /// Sends an interrupt, if the guest has asked to be told.
    #[inline]
    fn interrupt(&mut self) {
        if let Some(call) = &self.call {
            signal(call);
        }
    }

    /// The memory table of that number.
    fn table_of(&self, table: u32) -> &GuestMemory {
        match self.retired.iter().find(|(number, ..)| *number == table) {
            Some((.., memory)) => memory,
            None => self.ring.memory(),
        }
    }

    /// A request that used the memory table has completed.
    #[inline]
    fn release_table(&mut self, table: u32) {
        if table == self.table {
            self.in_flight_here -= 1;
            return;
        }
        let at = self.retired.iter().position(|(number, ..)| *number == table);
        let at = at.expect("a table stays until its last request is done");
        self.retired[at].1 -= 1;
        if self.retired[at].1 == 0 {
            self.retired.swap_remove(at);
        }
    }
}

/// Adds one to an eventfd of the front-end's. A failure is the front-end's loss: the file is of its
/// choosing.
#[inline]
fn signal(fd: &Notifier) {
    let _ = rustix::io::write(fd.as_ref(), &1u64.to_ne_bytes());
}

/// Fills guest memory with zeros.
fn zero(iovs: &[libc::iovec]) {
    for iov in iovs {
        // SAFETY: parts of a parsed request, whose memory the ring keeps mapped.
        unsafe { std::ptr::write_bytes(iov.iov_base.cast::<u8>(), 0, iov.iov_len) };
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

/// Logs failures without flooding: each kind at once the first time, then a count at most once a
/// second.
#[derive(Default)]
struct FailureLog {
    last: Option<Instant>,
    silent: u64,
}

impl FailureLog {
    /// True if a line may be written now.
    fn may_speak(&mut self) -> bool {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < Duration::from_secs(1)) {
            self.silent += 1;
            return false;
        }
        self.last = Some(now);
        if self.silent > 0 {
            tracing::warn!("{} more failures were not logged", std::mem::take(&mut self.silent));
        }
        true
    }

    #[cold]
    fn note_request(&mut self, export: &str, kind: Kind, err: &Error) {
        if !self.may_speak() {
            return;
        }
        let nospace = err.kind() == ErrorKind::NoSpace;
        match kind {
            Kind::Read { offset } => tracing::error!(export, offset, "read failed: {err}"),
            Kind::Write { offset } => {
                tracing::error!(export, offset, nospace, "write failed: {err}")
            }
            Kind::Flush => tracing::error!(export, nospace, "flush failed: {err}"),
            Kind::Discard => tracing::error!(export, "discard failed: {err}"),
            Kind::WriteZeroes => tracing::error!(export, nospace, "write zeroes failed: {err}"),
            Kind::GetId => tracing::error!(export, "get id failed: {err}"),
        }
    }

    #[cold]
    fn note_chain(&mut self, export: &str, queue: usize, head: u16, err: &dyn std::fmt::Display) {
        if self.may_speak() {
            tracing::warn!(export, queue, head, "bad descriptor chain: {err}");
        }
    }
}
