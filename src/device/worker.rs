//! A worker: the thread that serves one or more rings.
//!
//! ```text
//! loop:
//!   commands of the message thread      start, stop, new memory, …
//!   gate                                closed: pop nothing, report quiet once drained;
//!                                       about to be: hold flushes
//!   for each ring: pop a batch          parse, plan; submit, or start a task
//!   reactor.turn()                      enter the kernel at most once; reap; run tasks
//!   completions                         status byte, used element; what was written in place
//!   for each ring: publish              one index store, at most one interrupt
//!   nothing came: ask for a kick, look once more, sleep in the reactor
//! ```
//!
//! The loop is here. The way of a request is in `taking` and `completion`, with what it needs
//! meanwhile in `slot`; `run` has transfers that are done by plain calls, and `in_place` writes that
//! the driver performs; a ring and its life are in `served` and `commands`; `failure` has what goes
//! wrong.
//!
//! How large a batch is depends on where the guest runs: see [`super::pace`].
//!
//! Invariants:
//! * Each popped chain is completed exactly once: its slot is freed only by [`Worker::finish`].
//! * The memory and the driver a request uses outlive it: a ring keeps replaced memory tables until
//!   the last request of their time has completed, and the driver is replaced only when the gate
//!   has drained the worker.
//! * A ring that breaks its protocol is taken out of service by itself; the others go on.

mod commands;
mod completion;
mod failure;
mod in_place;
mod run;
mod served;
mod slot;
mod taking;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use self::failure::FailureLog;
use self::run::Run;
use self::served::Served;
use self::slot::Slot;
use crate::block::driver::Driver;
use crate::block::{InPlace, Node, Party};
use crate::device::chain::Chain;
use crate::device::export::{Counters, Export};
use crate::device::latency::Stopwatch;
use crate::device::pace::Pace;
use crate::device::patience::Patience;
use crate::device::pool::Mailbox;
use crate::device::request;
use crate::error::Result;
use crate::io::Reactor;
use crate::io::engine::{Event, WATCH};

/// A ring without a kick descriptor has to be looked at now and then.
const KICKLESS_PAUSE: Duration = Duration::from_micros(50);

/// Runs a worker thread until it is told to quit. `ready` learns whether it could be set up.
pub(super) fn run(
    export: Arc<Export>,
    mailbox: Arc<Mailbox>,
    number: usize,
    ready: SyncSender<Result<()>>,
) {
    let reactor = match Reactor::for_worker(export.options.engine) {
        Ok(reactor) => reactor,
        Err(err) => {
            let _ = ready.send(Err(err.context("cannot set up I/O for a worker")));
            return;
        }
    };
    mailbox.set_notify(reactor.notifier());
    let name = format!("queue worker {number}");
    let bell = Arc::clone(mailbox.bell());
    bell.belongs_here();
    let party = export.root.gate().join(name, reactor.notifier()).holds_flushes();
    let party = party.nudged_by(move || bell.nudge());
    let _ = ready.send(Ok(()));
    let entered = Rc::clone(&reactor);
    export.worker_starts();
    entered.enter(|| Worker::new(Arc::clone(&export), mailbox, reactor, party).serve());
    export.worker_ends();
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
    /// Whether several reads of cached pages cost less through the engine than by plain calls.
    has_ring: bool,
    rings: Vec<Served>,
    slots: Vec<Slot>,
    free_slots: Vec<u32>,
    /// Requests in flight on all rings.
    in_flight: usize,
    /// Bytes of their data.
    data_in_flight: u64,
    /// The ring that batches are taken from first.
    first: usize,
    /// Flushes among them that have been started.
    flushing: usize,
    /// Flushes among them that wait for the gate: slots, oldest first.
    held: Vec<u32>,
    /// Requests that wait to be done in place with what follows them.
    run: Run,
    /// The driver's way to write in place, if it has one.
    in_place: Option<Box<dyn InPlace>>,
    /// The slots of requests written so that are to be settled.
    unsettled: Vec<u32>,
    /// Whether a task was started that has not been polled yet: a flush that has no place yet among
    /// the writes. What is taken after it must not overtake it.
    has_unpolled: bool,
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
        let has_ring = reactor.engine().is_ring();
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
            has_ring,
            rings: Vec::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            in_flight: 0,
            data_in_flight: 0,
            first: 0,
            flushing: 0,
            held: Vec::new(),
            run: Run::default(),
            in_place: None,
            unsettled: Vec::new(),
            has_unpolled: false,
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
        self.in_place = Arc::clone(&self.driver).in_place();
        let limits = self.node.limits();
        self.capacity = limits.size;
        self.read_only = limits.read_only || self.export.options.read_only;
        self.memory_alignment = limits.memory_alignment;
        // A format may have larger blocks than its file, whose memory is all the same to the host.
        let demands = limits.memory_alignment > 1;
        self.length_alignment = if demands { limits.request_alignment as usize } else { 1 };
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
                busy = self.take_batches();
            }
            if busy && self.may_sleep() {
                busy = false;
            } else {
                busy |= self.turn(false);
            }
            self.settle_stops();
            if !busy && !self.quit {
                self.idle(open);
            }
        }
        // All rings should have been stopped before. If not: the slots own what the host still
        // reads and writes, so they stay until it is done.
        while self.in_flight > 0 {
            self.pass_gate();
            self.turn(true);
        }
    }

    /// Takes a batch from each ring. True if there was anything.
    #[inline]
    fn take_batches(&mut self) -> bool {
        let rings = self.rings.len();
        let first = if self.first < rings { self.first } else { 0 };
        let mut busy = false;
        for step in first..first + rings {
            busy |= self.take_batch(if step < rings { step } else { step - rings });
        }
        // Where one ring's requests leave nothing for the others, each is the first in its turn.
        self.first = match (self.is_sated(), busy) {
            (false, _) => 0,
            (true, true) => first + 1,
            (true, false) => first,
        };
        busy
    }

    /// Whether so many bytes are under way that some have to be done before more are taken. A single
    /// request may be larger than that.
    #[inline]
    fn is_sated(&self) -> bool {
        self.data_in_flight >= self.export.data_limit()
    }

    /// Whether requests may be popped. Reports quiet when the gate is closed and all is drained, and
    /// calm when it is about to be and no flush is under way; loads the driver anew, and starts the
    /// flushes that were held, when the gate has been opened again.
    #[inline]
    fn pass_gate(&mut self) -> bool {
        let open = self.party.is_open();
        if !open {
            if self.party.is_closed() {
                if self.is_drained() {
                    self.party.report_quiet();
                }
                return false;
            }
            if self.owes_calm() {
                self.party.report_calm();
            }
        }
        let generation = self.party.generation();
        if generation != self.generation {
            self.generation = generation;
            self.node = self.export.root.node();
            self.driver = self.node.driver();
            self.reactor.engine().forget_files();
            self.load_limits();
        }
        if open && !self.held.is_empty() {
            self.start_held();
        }
        true
    }

    /// Whether nothing is with the driver.
    fn is_drained(&self) -> bool {
        self.in_flight == self.held.len()
    }

    /// Whether to say that no flush is under way.
    fn owes_calm(&self) -> bool {
        self.flushing == 0 && self.party.owes_calm()
    }

    /// One turn of the reactor, and what came of it. True if a request completed or an event
    /// arrived.
    #[inline]
    fn turn(&mut self, wait: bool) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.counts.in_flight.set(self.in_flight as u64);
        self.reactor.turn(wait, &mut events);
        self.has_unpolled = false;
        let mut busy = !events.is_empty();
        for event in events.drain(..) {
            if event.user & WATCH != 0 {
                self.counts.kicks.add(1);
                if let Some(at) = self.rings.iter().position(|r| r.watch == event.user) {
                    let served = &mut self.rings[at];
                    served.ring.disable_notifications();
                    if event.result < 0 {
                        served.lose_kick();
                    } else if served.ring.is_untouched() {
                        self.doubt_memory(at);
                    }
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
        self.settle();
        self.publish_all();
        busy
    }

    #[inline]
    fn publish_all(&mut self) {
        for at in 0..self.rings.len() {
            self.publish(at);
        }
    }

    /// Whether all that the guests have made available has been planned, and some of it is still to
    /// be done. Then it need not be submitted before the wait for its completion, but by the same
    /// system call.
    #[inline]
    fn may_sleep(&mut self) -> bool {
        let drained = self.in_flight > 0
            && !self.has_unpolled
            && self.unsettled.is_empty()
            && !self.rings.iter().any(|served| {
                served.ring.has_available() || !served.resubmit.is_empty() || served.kick.is_none()
            });
        if drained {
            self.publish_all();
        }
        drained
    }

    /// Nothing is to be done: asks for kicks, looks once more, sleeps.
    fn idle(&mut self, open: bool) {
        let mut kickless = false;
        // Who is sated waits for completions, whatever there is in the rings.
        if open && !self.is_sated() {
            for served in &mut self.rings {
                if served.stopping.is_none() && served.ring.enable_notifications() {
                    // Something came meanwhile. What was left for the wait begins now.
                    self.reactor.engine().submit();
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
        if self.is_drained() && self.party.owes_report() || self.owes_calm() {
            return;
        }
        if !self.held.is_empty() && self.party.is_open() {
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
                || party.owes_calm()
        })
    }
}
