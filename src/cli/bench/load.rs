//! The threads that make the load.
//!
//! Each queue has one thread, which takes up to a batch of completions, submits their slots again,
//! publishes them by one index store, kicks if the back-end asked for that, and sleeps in a read of
//! the call eventfd when nothing is left to do. It never spins and, in the measured loop, never
//! allocates. The main thread samples counters and the back-end's CPU clock at both ends of the
//! measured time, and wakes a queue that makes no progress, so that it can see its deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::args::{BenchArgs, Mix};
use super::slot_shape;
use super::verify::{self, Ledger};
use crate::error::{Error, Result, ResultExt};
use crate::frontend::process::{self, Footprint, Usage};
use crate::frontend::request::STATUS_OK;
use crate::frontend::ring::{Ring, Waker};
use crate::frontend::{Session, SlotKind, Slots, client::feature};
use crate::units::SECTOR_SIZE;

/// Load without measuring.
const RAMP: u8 = 0;
/// Measure.
const MEASURE: u8 = 1;
/// Submit nothing more.
const STOP: u8 = 2;
/// The back-end is gone: wait for nothing.
const GONE: u8 = 3;
/// Mismatches that are described; the rest is counted.
const DESCRIBED: usize = 5;
/// Latencies above this are counted as this, in nanoseconds.
const SLOWEST_NS: u64 = 100_000_000_000;

/// What one thread tells the others, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shared {
    /// Requests completed.
    done: AtomicU64,
    /// Bytes of them.
    bytes: AtomicU64,
    /// Kicks sent.
    kicks: AtomicU64,
    /// Interrupts received.
    interrupts: AtomicU64,
    /// Set when the thread has ended.
    ended: AtomicU8,
}

/// A sample of the counters of all threads, added up.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Requests completed.
    done: u64,
    /// Bytes of them.
    bytes: u64,
    /// Kicks sent.
    kicks: u64,
    /// Interrupts received.
    interrupts: u64,
}

impl Counts {
    /// Adds up the counters of all threads.
    fn sample(shared: &[Shared]) -> Self {
        let mut counts = Counts::default();
        for shared in shared {
            counts.done += shared.done.load(Ordering::Relaxed);
            counts.bytes += shared.bytes.load(Ordering::Relaxed);
            counts.kicks += shared.kicks.load(Ordering::Relaxed);
            counts.interrupts += shared.interrupts.load(Ordering::Relaxed);
        }
        counts
    }
}

/// What was measured.
#[derive(Debug)]
pub struct Outcome {
    /// How long.
    pub elapsed: Duration,
    /// Requests completed in that time.
    pub requests: u64,
    /// Bytes read or written by them.
    pub bytes: u64,
    /// Kicks sent.
    pub kicks: u64,
    /// Interrupts received.
    pub interrupts: u64,
    /// Latencies in nanoseconds.
    pub latency: Histogram<u64>,
    /// Requests that ended with another status than "ok", at any time.
    pub errors: u64,
    /// Blocks that were checked.
    pub checked: u64,
    /// Blocks that were wrong.
    pub mismatches: u64,
    /// Descriptions of the first of them.
    pub described: Vec<String>,
    /// Times that the back-end was away, each from the hang-up to running queues.
    pub outages: Vec<Duration>,
    /// What the back-end spent.
    pub spent: Option<Spent>,
    /// CPU time of this process while measuring.
    pub own_cpu: Duration,
}

/// What a back-end process spent while it was watched: as long as the load was measured, or from the
/// last outage to the end, since what died before can be asked no more.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// Which process.
    pub pid: u32,
    /// Its counters at the beginning.
    pub before: Usage,
    /// The same at the end.
    pub after: Usage,
    /// How long that was.
    pub elapsed: Duration,
    /// Requests completed in that time.
    pub requests: u64,
    /// Its memory at the end, still under load.
    pub footprint: Footprint,
}

/// A process that is watched.
#[derive(Clone, Copy, Debug)]
struct Watched {
    pid: u32,
    since: Instant,
    usage: Usage,
    /// Requests completed before.
    done: u64,
}

impl Watched {
    fn new(pid: u32, shared: &[Shared]) -> Result<Watched> {
        let usage = process::usage(pid)?;
        Ok(Watched { pid, since: Instant::now(), usage, done: Counts::sample(shared).done })
    }

    /// What it has spent; an error if it is dead.
    fn spent(&self, shared: &[Shared]) -> Result<Spent> {
        Ok(Spent {
            pid: self.pid,
            before: self.usage,
            after: process::usage(self.pid)?,
            elapsed: self.since.elapsed(),
            requests: Counts::sample(shared).done - self.done,
            footprint: process::footprint(self.pid)?,
        })
    }
}

/// Has each worker do its work on a thread of its own; `main` runs meanwhile.
fn on_threads(
    workers: Vec<Worker>,
    shared: &Arc<[Shared]>,
    phase: &Arc<AtomicU8>,
    work: fn(&mut Worker, &AtomicU8, &Shared) -> Result<()>,
    main: impl FnOnce(),
) -> Result<Vec<(Worker, Result<()>)>> {
    shared.iter().for_each(|shared| shared.ended.store(0, Ordering::Release));
    let start = |(queue, mut worker): (usize, Worker)| {
        let (phase, shared) = (phase.clone(), shared.clone());
        let main = thread::current();
        thread::Builder::new().name(format!("queue-{queue}")).spawn(move || {
            let result = work(&mut worker, &phase, &shared[queue]);
            shared[queue].ended.store(1, Ordering::Release);
            main.unpark();
            (worker, result)
        })
    };
    let threads: std::io::Result<Vec<_>> = workers.into_iter().enumerate().map(start).collect();
    let threads = threads.context(|| "cannot start a thread")?;
    main();
    let join = |thread: thread::JoinHandle<_>| {
        thread.join().map_err(|_| Error::invalid("a thread panicked"))
    };
    threads.into_iter().map(join).collect()
}

/// The workers, if all have done their work. Why the connection could not be had again says more than
/// that requests are stuck.
fn all_well(ended: Vec<(Worker, Result<()>)>, failure: &mut Option<Error>) -> Result<Vec<Worker>> {
    let is_well = |(worker, result): (Worker, Result<()>)| match result {
        Ok(()) => Ok(worker),
        Err(err) => Err(failure
            .take()
            .unwrap_or_else(|| err.context(format!("queue {}", worker.ring.index())))),
    };
    ended.into_iter().map(is_well).collect()
}

/// Loads all queues of `session` as `args` say. `pid` is the back-end's process, if it is known.
pub fn run(args: &BenchArgs, session: &mut Session, pid: Option<u32>) -> Result<Outcome> {
    let phase = Arc::new(AtomicU8::new(RAMP));
    let shared: Arc<[Shared]> = (0..args.queues).map(|_| Shared::default()).collect();
    let mut wakers = Vec::new();
    let mut workers = Vec::new();
    let plan = Plan::new(args, session)?;
    // The threads drive the rings; the session keeps views, to tell a new back-end about them.
    let views = session.rings.iter().map(Ring::view).collect();
    let rings = std::mem::replace(&mut session.rings, views);
    for (queue, ring) in rings.into_iter().enumerate() {
        let mut shape = slot_shape(args);
        shape.indirect = session.features() & feature::INDIRECT_DESC != 0;
        let base = session.arena.alloc_pages(shape.memory())?;
        let slots = Slots::new(&session.memory, base, &ring, shape)?;
        wakers.push(ring.waker());
        workers.push(Worker::new(args, plan, queue as u64, ring, slots)?);
    }
    let mut watch = Watch {
        shared: &shared,
        wakers: &wakers,
        session,
        phase: &phase,
        patience: args.reconnect,
        depth: args.iodepth,
        pid,
        watched: None,
        is_measuring: false,
        outages: Vec::new(),
        failure: None,
    };
    let mut measured = None;
    let ended = on_threads(workers, &shared, &phase, Worker::run, || {
        measured = Some(measure(args, &mut watch));
    })?;
    let mut workers = all_well(ended, &mut watch.failure)?;
    let mut outcome = measured.expect("it has run")?;
    if args.verify {
        let ended = on_threads(workers, &shared, &phase, Worker::verify_all, || {
            watch.sleep(Duration::MAX);
        })?;
        workers = all_well(ended, &mut watch.failure)?;
    }
    outcome.outages = watch.outages;
    for mut worker in workers {
        outcome.latency.add(&worker.latency).map_err(|err| Error::invalid(err.to_string()))?;
        outcome.errors += worker.errors;
        outcome.checked += worker.checked;
        outcome.mismatches += worker.mismatches;
        outcome.described.append(&mut worker.described);
    }
    outcome.described.truncate(DESCRIBED);
    Ok(outcome)
}

/// Measures while the threads make the load, and has them end.
fn measure(args: &BenchArgs, watch: &mut Watch<'_>) -> Result<Outcome> {
    let result = measure_load(args, watch);
    advance(watch.phase, STOP);
    watch.sleep(Duration::MAX);
    result
}

fn measure_load(args: &BenchArgs, watch: &mut Watch<'_>) -> Result<Outcome> {
    // A single pass is measured from its first request on: the threads must find the phase.
    if args.once {
        advance(watch.phase, MEASURE);
    } else {
        watch.sleep(args.ramp);
    }
    let own_before = process::usage(std::process::id())?.cpu;
    watch.is_measuring = true;
    match watch.pid.map(|pid| Watched::new(pid, watch.shared)).transpose() {
        Ok(watched) => watch.watched = watched,
        // It has just died; the next one will be found.
        Err(_) if watch.patience.is_some() => {}
        Err(err) => return Err(err),
    }
    let before = Counts::sample(watch.shared);
    advance(watch.phase, MEASURE);
    let begin = Instant::now();
    let unlimited = args.requests.is_some() || args.once;
    watch.sleep(if unlimited { Duration::MAX } else { args.duration });
    let elapsed = begin.elapsed();
    let after = Counts::sample(watch.shared);
    let spent = watch.watched.and_then(|watched| watched.spent(watch.shared).ok());
    watch.is_measuring = false;
    Ok(Outcome {
        elapsed,
        requests: after.done - before.done,
        bytes: after.bytes - before.bytes,
        kicks: after.kicks - before.kicks,
        interrupts: after.interrupts - before.interrupts,
        latency: histogram()?,
        errors: 0,
        checked: 0,
        mismatches: 0,
        described: Vec::new(),
        outages: Vec::new(),
        spent,
        own_cpu: process::usage(std::process::id())?.cpu - own_before,
    })
}

/// Goes on to a later phase.
fn advance(phase: &AtomicU8, to: u8) {
    phase.fetch_max(to, Ordering::AcqRel);
}

/// An empty histogram of latencies.
fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, SLOWEST_NS, 3).map_err(|err| Error::invalid(err.to_string()))
}

/// Watches the threads while the main thread has nothing else to do.
struct Watch<'a> {
    /// What the threads tell.
    shared: &'a [Shared],
    /// How to wake them.
    wakers: &'a [Waker],
    /// The disk, whose connection may end; its rings are views.
    session: &'a mut Session,
    /// What the threads are told.
    phase: &'a AtomicU8,
    /// How long to wait for another back-end when this one goes away.
    patience: Option<Duration>,
    /// Requests in flight on each queue.
    depth: u16,
    /// The back-end's process, if it is known.
    pid: Option<u32>,
    /// The same, while it is measured.
    watched: Option<Watched>,
    /// Whether it is to be.
    is_measuring: bool,
    /// How long each one was away.
    outages: Vec<Duration>,
    /// Why there was no other one.
    failure: Option<Error>,
}

impl Watch<'_> {
    /// Carries on with the next back-end, if that is wanted.
    fn reconnect(&mut self) -> Result<()> {
        let begin = Instant::now();
        let gone =
            || Error::from_errno(libc::ECONNRESET).context("the back-end went away under load");
        let patience = self.patience.ok_or_else(gone)?;
        // One request at a time completes in order, and the used index says it all.
        if self.session.inflight.is_none() && self.depth > 1 {
            return Err(gone().context("cannot carry on: it does not track what is in flight"));
        }
        self.session.options.timeout = patience;
        self.session.reconnect()?;
        if self.session.inflight.is_none() {
            // With the area a back-end looks at its rings by itself; without, it may wait for
            // the kick that its predecessor ate.
            self.session.rings.iter_mut().try_for_each(Ring::kick)?;
        }
        self.outages.push(begin.elapsed());
        // Nobody knows what the dead one had spent in the end, so its successor is watched instead,
        // if the connection says who that is.
        let peer = || self.session.client.wire().peer_pid();
        self.pid = self.pid.and_then(|_| peer()).filter(|pid| process::usage(*pid).is_ok());
        let pid = self.pid.filter(|_| self.is_measuring);
        self.watched = pid.and_then(|pid| Watched::new(pid, self.shared).ok());
        Ok(())
    }

    /// Sleeps for `time`, or until all threads have ended. Wakes threads that made no progress
    /// for half a second, so that they look at their deadline and at the phase.
    fn sleep(&mut self, time: Duration) {
        let begin = Instant::now();
        let mut last: Vec<u64> = vec![u64::MAX; self.shared.len()];
        let mut looked = begin;
        loop {
            let left = time.saturating_sub(begin.elapsed());
            let ended = |s: &Shared| s.ended.load(Ordering::Acquire) != 0;
            if left.is_zero() || self.shared.iter().all(ended) {
                return;
            }
            // Threads that end unpark this one.
            thread::park_timeout(left.min(Duration::from_millis(100)));
            if self.session.client.wire().has_hung_up() {
                if let Err(failure) = self.reconnect() {
                    self.failure = self.failure.take().or(Some(failure));
                    advance(self.phase, GONE);
                }
            } else if looked.elapsed() < Duration::from_millis(500) {
                continue;
            }
            looked = Instant::now();
            for ((shared, waker), last) in self.shared.iter().zip(self.wakers).zip(&mut last) {
                let done = shared.done.load(Ordering::Relaxed);
                if done == *last && !ended(shared) {
                    // A full eventfd wakes as well.
                    let _ = waker.wake();
                }
                *last = done;
            }
        }
    }
}

/// What all queues have in common.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// First byte of the range.
    offset: u64,
    /// Blocks of the range.
    blocks: u64,
    /// Number of queues.
    queues: u64,
    /// Requests to measure in all.
    requests: Option<u64>,
    /// Whether the device knows FLUSH.
    can_flush: bool,
}

impl Plan {
    fn new(args: &BenchArgs, session: &Session) -> Result<Self> {
        let disk = session.config.bytes();
        let range = args.range.unwrap_or(disk.saturating_sub(args.offset));
        if args.offset.checked_add(range).is_none_or(|end| end > disk) {
            return Err(Error::invalid(format!(
                "{range} bytes at {} are not on the disk, which has {disk}",
                args.offset
            )));
        }
        let queues = u64::from(args.queues);
        let past_first = range.checked_sub(u64::from(args.block_size));
        let blocks = past_first.map_or(0, |bytes| bytes / args.stride() + 1);
        if blocks < queues && args.rw != Mix::GetId {
            return Err(Error::invalid(format!("a range of {range} bytes has too few blocks")));
        }
        if args.verify {
            let each = blocks / queues;
            if each <= u64::from(args.iodepth) || each > Ledger::MAX_BLOCKS {
                return Err(Error::invalid(format!(
                    "--verify needs more blocks than requests in flight and at most {} for each \
                     queue, not {each}; --range sets them",
                    Ledger::MAX_BLOCKS
                )));
            }
        }
        let can_flush = session.features() & feature::FLUSH != 0;
        if args.flush_every > 0 && !can_flush {
            return Err(Error::unsupported("the device knows no flush, for --flush-every"));
        }
        Ok(Plan { offset: args.offset, blocks, queues, requests: args.requests, can_flush })
    }
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    /// Type of the request.
    kind: SlotKind,
    /// Block, counted from the start of the queue's own stripe.
    block: u64,
    /// Generation read or written, with --verify.
    generation: u32,
    /// When its batch was submitted.
    submitted: Instant,
}

/// The thread of one queue.
struct Worker {
    /// The queue.
    ring: Ring,
    /// Its requests.
    slots: Slots,
    /// What each slot is doing.
    in_flight: Vec<InFlight>,
    /// Slots that the device has.
    pending: usize,
    /// Bytes of a request.
    block_size: u32,
    /// What to send.
    mix: Mix,
    /// Share of reads.
    read_percent: u64,
    /// Flush after so many writes.
    flush_every: u32,
    /// Most completions of a batch.
    batch: u16,
    /// CPU to run on.
    cpu: Option<usize>,
    /// First byte of the queue's stripe.
    first: u64,
    /// From the start of a block to that of the next.
    stride: u64,
    /// Blocks of the stripe.
    blocks: u64,
    /// Next block, for sequential mixes.
    next_block: u64,
    /// Whether to end with the last block.
    once: bool,
    /// Whether it has been sent.
    exhausted: bool,
    /// Writes since the last flush.
    unflushed: u32,
    /// State of the random sequence.
    random: u64,
    /// Seed of the pattern.
    seed: u64,
    /// Whether the device knows FLUSH.
    can_flush: bool,
    /// What each block must hold, with --verify.
    ledger: Option<Ledger>,
    /// A block to fill or to check.
    scratch: Vec<u8>,
    /// Requests to measure.
    quota: Option<u64>,
    /// How long no completion may take.
    timeout: Duration,
    /// Latencies of the measured requests.
    latency: Histogram<u64>,
    /// A latency and how often in a row it was seen: requests of one batch share theirs, and the
    /// histogram is the dearest part of a completion.
    same_latency: (u64, u64),
    /// Requests completed, at any time.
    done: u64,
    /// Bytes of them.
    bytes: u64,
    /// Requests that failed.
    errors: u64,
    /// Blocks checked.
    checked: u64,
    /// Blocks found wrong.
    mismatches: u64,
    /// What failed or was wrong, the first few.
    described: Vec<String>,
}

impl Worker {
    fn new(args: &BenchArgs, plan: Plan, queue: u64, ring: Ring, slots: Slots) -> Result<Self> {
        // Sequential and verified load gives each queue its own stripe; random load needs none.
        let own = args.verify || args.is_sequential();
        let (first, blocks) = if own {
            let each = plan.blocks / plan.queues;
            (queue * each, each)
        } else {
            (0, plan.blocks)
        };
        let idle =
            InFlight { kind: SlotKind::Flush, block: 0, generation: 0, submitted: Instant::now() };
        let share = |n: u64| n / plan.queues + u64::from(queue < n % plan.queues);
        let mut worker = Worker {
            in_flight: vec![idle; slots.len()],
            ring,
            slots,
            pending: 0,
            block_size: args.block_size,
            mix: args.rw,
            read_percent: u64::from(args.read_percent),
            flush_every: args.flush_every,
            batch: args.batch,
            cpu: args.cpu.get(queue as usize % args.cpu.len().max(1)).copied(),
            first: plan.offset + first * args.stride(),
            stride: args.stride(),
            blocks,
            next_block: 0,
            once: args.once,
            exhausted: false,
            unflushed: 0,
            random: args.seed.wrapping_add(queue).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            seed: args.seed,
            can_flush: plan.can_flush,
            ledger: args.verify.then(|| Ledger::new(blocks)),
            scratch: vec![0; args.block_size as usize],
            quota: plan.requests.map(share),
            timeout: args.timeout,
            latency: histogram()?,
            same_latency: (1, 0),
            done: 0,
            bytes: 0,
            errors: 0,
            checked: 0,
            mismatches: 0,
            described: Vec::new(),
        };
        // Something to write that no layer can compress into nothing; with --verify every write
        // fills its own.
        for slot in 0..worker.slots.len() {
            let place = queue << 48 | (slot as u64) << 32;
            verify::fill(&mut worker.scratch, args.seed, place, 1);
            worker.slots.write_data(slot, &worker.scratch);
        }
        Ok(worker)
    }

    /// The next number of the random sequence.
    #[inline]
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A random number below `limit`.
    #[inline]
    fn random_below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next_random()) * u128::from(limit)) >> 64) as u64
    }

    /// Chooses a slot's next request and pushes it.
    #[inline]
    fn submit(&mut self, slot: usize, now: Instant) {
        let mut kind = match self.mix {
            Mix::Randread | Mix::Read => SlotKind::Read,
            Mix::Randwrite | Mix::Write => SlotKind::Write,
            Mix::Randrw => {
                if self.random_below(100) < self.read_percent {
                    SlotKind::Read
                } else {
                    SlotKind::Write
                }
            }
            Mix::GetId => SlotKind::GetId,
        };
        if kind == SlotKind::Write && self.flush_every != 0 {
            if self.unflushed == self.flush_every {
                self.unflushed = 0;
                kind = SlotKind::Flush;
            } else {
                self.unflushed += 1;
            }
        }
        let (mut block, mut generation) = (0, 0);
        if matches!(kind, SlotKind::Read | SlotKind::Write) {
            block = match self.mix {
                Mix::Read | Mix::Write => {
                    let block = self.next_block;
                    self.next_block = if block + 1 == self.blocks { 0 } else { block + 1 };
                    self.exhausted = self.once && self.next_block == 0;
                    block
                }
                _ => self.random_below(self.blocks),
            };
            if self.ledger.is_some() {
                (block, generation) = self.enter(slot, kind, block);
            }
        }
        self.push(slot, InFlight { kind, block, generation, submitted: now });
    }

    /// Enters a request into the ledger and, for a write, fills the slot's buffer.
    #[cold]
    fn enter(&mut self, slot: usize, kind: SlotKind, block: u64) -> (u64, u32) {
        let Some(ledger) = &mut self.ledger else { return (block, 0) };
        let block = ledger.free_from(block);
        if kind == SlotKind::Read {
            return (block, ledger.begin_read(block));
        }
        let generation = ledger.begin_write(block);
        let offset = self.offset_of(block);
        verify::fill(&mut self.scratch, self.seed, offset, generation);
        self.slots.write_data(slot, &self.scratch);
        (block, generation)
    }

    /// Where a block lies on the disk.
    fn offset_of(&self, block: u64) -> u64 {
        self.first + block * self.stride
    }

    /// Pushes a slot with a request that was chosen.
    #[inline]
    fn push(&mut self, slot: usize, request: InFlight) {
        let sector = match request.kind {
            SlotKind::Read | SlotKind::Write => self.offset_of(request.block) / SECTOR_SIZE,
            SlotKind::Flush | SlotKind::GetId => 0,
        };
        self.in_flight[slot] = request;
        self.slots.submit(&mut self.ring, slot, request.kind, sector);
        self.pending += 1;
    }

    /// Takes a completion: what the slot did, after checks.
    #[inline]
    fn complete(&mut self, id: u32) -> Result<(usize, InFlight)> {
        let (slot, status) = self.slots.complete(id)?;
        self.pending -= 1;
        let request = self.in_flight[slot];
        if status != STATUS_OK {
            self.errors += 1;
            if self.described.len() < DESCRIBED {
                let text = format!(
                    "{:?} at {} ended with status {status}",
                    request.kind,
                    self.offset_of(request.block)
                );
                self.described.push(text);
            }
        }
        if self.ledger.is_some() {
            self.settle(slot, request, status == STATUS_OK);
        }
        Ok((slot, request))
    }

    /// Checks what was read against the ledger and settles the entry.
    #[cold]
    fn settle(&mut self, slot: usize, request: InFlight, ok: bool) {
        let InFlight { kind, block, generation, .. } = request;
        let Some(ledger) = &mut self.ledger else { return };
        match kind {
            SlotKind::Write => ledger.end(block, if ok { generation } else { 0 }),
            SlotKind::Read => {
                ledger.end(block, generation);
                if ok && generation != 0 {
                    self.slots.read_data(slot, &mut self.scratch);
                    let offset = self.offset_of(block);
                    self.checked += 1;
                    if let Some(wrong) = verify::check(&self.scratch, self.seed, offset, generation)
                    {
                        self.mismatches += 1;
                        if self.described.len() < DESCRIBED {
                            self.described.push(wrong.to_string());
                        }
                    }
                }
            }
            SlotKind::Flush | SlotKind::GetId => {}
        }
    }

    /// Pins the thread, if it is to be pinned.
    fn pin(&self) -> Result<()> {
        if let Some(cpu) = self.cpu {
            if cpu >= CpuSet::MAX_CPU {
                return Err(Error::invalid(format!("there is no CPU {cpu}")));
            }
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(None, &set).context(|| format!("cannot run on CPU {cpu}"))?;
        }
        Ok(())
    }

    /// The loop.
    fn run(&mut self, phase: &AtomicU8, shared: &Shared) -> Result<()> {
        self.pin()?;
        let mut progress = Instant::now();
        for slot in 0..self.slots.len() {
            if self.exhausted {
                break;
            }
            self.submit(slot, progress);
        }
        self.ring.publish();
        self.ring.kick_if_wanted()?;
        let mut measuring = false;
        let mut measured = 0;
        let quota = self.quota.unwrap_or(u64::MAX);
        while self.pending > 0 {
            let used = self.ring.used_index();
            if used == self.ring.next_used() {
                self.wait(phase, progress)?;
                continue;
            }
            let now = Instant::now();
            progress = now;
            let phase = phase.load(Ordering::Relaxed);
            if phase == MEASURE && !measuring {
                measuring = true;
            }
            let mut stop = phase >= STOP || measured >= quota;
            for _ in 0..self.batch {
                let Some(element) = self.ring.take_used_below(used) else { break };
                let (slot, request) = self.complete(element.id)?;
                self.done += 1;
                if matches!(request.kind, SlotKind::Read | SlotKind::Write) {
                    self.bytes += u64::from(self.block_size);
                }
                if measuring && !stop {
                    let taken = now.duration_since(request.submitted).as_nanos() as u64;
                    self.record(taken);
                    measured += 1;
                    stop = measured >= quota;
                }
                if !stop && !self.exhausted {
                    self.submit(slot, now);
                }
            }
            self.ring.publish();
            self.ring.kick_if_wanted()?;
            self.report(shared);
        }
        self.report(shared);
        // Whatever the last run of equal latencies was, it is recorded now.
        self.record(u64::MAX);
        self.same_latency = (1, 0);
        Ok(())
    }

    /// Sleeps until something may have completed, or the main thread looks for progress. Fails if
    /// nothing will complete any more.
    fn wait(&mut self, phase: &AtomicU8, progress: Instant) -> Result<()> {
        if self.ring.want_interrupt() {
            let interrupted = self.ring.sleep()?;
            if !interrupted && phase.load(Ordering::Acquire) == GONE {
                return Err(Error::from_errno(libc::ECONNRESET).context(format!(
                    "the back-end closed the connection with {} requests in flight",
                    self.pending
                )));
            }
            if !interrupted && progress.elapsed() > self.timeout {
                return Err(Error::from_errno(libc::ETIMEDOUT).context(format!(
                    "{} requests are in flight and none completed in {:.1} s",
                    self.pending,
                    self.timeout.as_secs_f64()
                )));
            }
        }
        self.ring.refuse_interrupts();
        Ok(())
    }

    /// Records a latency.
    #[inline]
    fn record(&mut self, nanoseconds: u64) {
        if self.same_latency.0 == nanoseconds {
            self.same_latency.1 += 1;
        } else {
            let (value, count) = std::mem::replace(&mut self.same_latency, (nanoseconds, 1));
            if count > 0 {
                self.latency.saturating_record_n(value.clamp(1, SLOWEST_NS), count);
            }
        }
    }

    /// Lets the main thread see the counters.
    #[inline]
    fn report(&self, shared: &Shared) {
        let counters = self.ring.counters();
        shared.done.store(self.done, Ordering::Relaxed);
        shared.bytes.store(self.bytes, Ordering::Relaxed);
        shared.kicks.store(counters.kicks, Ordering::Relaxed);
        shared.interrupts.store(counters.interrupts, Ordering::Relaxed);
    }

    /// After the load: flushes, then reads and checks every block that was ever written.
    fn verify_all(&mut self, phase: &AtomicU8, _: &Shared) -> Result<()> {
        if self.can_flush {
            let (kind, submitted) = (SlotKind::Flush, Instant::now());
            self.push(0, InFlight { kind, block: 0, generation: 0, submitted });
            self.drain(1, phase)?;
        }
        let mut next = 0;
        loop {
            let ledger = self.ledger.as_ref().expect("verification has a ledger");
            let Some((block, _)) = ledger.next_known(next) else { break };
            next = block + 1;
            let slot = self.pending;
            let generation = self.ledger.as_mut().map_or(0, |ledger| ledger.begin_read(block));
            let submitted = Instant::now();
            self.push(slot, InFlight { kind: SlotKind::Read, block, generation, submitted });
            if self.pending == self.slots.len() {
                self.drain(self.pending, phase)?;
            }
        }
        self.drain(self.pending, phase)
    }

    /// Publishes what was pushed and waits until `count` requests are back.
    fn drain(&mut self, count: usize, phase: &AtomicU8) -> Result<()> {
        self.ring.publish();
        self.ring.kick_if_wanted()?;
        let mut progress = Instant::now();
        let mut left = count;
        while left > 0 {
            match self.ring.take_used() {
                Some(element) => {
                    self.complete(element.id)?;
                    progress = Instant::now();
                    left -= 1;
                }
                None => self.wait(phase, progress)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
