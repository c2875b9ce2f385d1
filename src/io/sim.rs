//! A simulated disk: what tests of formats and filters run on instead of a host file.
//!
//! A [`SimFile`] is a [`File`] in memory that remembers what a real disk would be free to forget:
//!
//! ```text
//! write ──► volatile content ──► list of writes since the last flush ──flush──► durable content
//!                                        │
//!                                        └── power_cut(seed): durable content plus any subset of
//!                                            the list, torn between sectors, in any order
//! ```
//!
//! * The *volatile* content is what reads see. It survives `kill -9` of the process (it stands for
//!   the page cache), but not a power cut.
//! * The *durable* content is what was flushed. [`SimFile::power_cut`] gives one of the contents
//!   the disk may have after the power failed; different seeds give different ones.
//!   [`SimFile::after_power_cut_with`] gives the one that is asked for.
//! * [`SimFile::fail`] makes chosen operations fail with an error number.
//! * A [`Sim`] is a scheduler: files attached to it complete their operations later, in an order
//!   the seed decides, and the same scheduler runs the futures under test. What it does depends
//!   on the seed alone, so that a failure can be repeated.
//!
//! Dropping the future of an operation that was handed to a scheduler does not take it back, as
//! with a real kernel: it is performed at some later step, with its memory, and what it carries, kept
//! alive until then.
//!
//! Invariants: a sector (512 bytes) is written whole or not at all; what completed before a flush
//! was submitted is durable when the flush completes; nothing else need be.

mod content;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use self::content::Content;
use super::buf::Buffers;
use super::carry::{self, Loads};
use super::file::{Alignment, File, Fut, Hole};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteRange, SECTOR_SIZE};

/// A small seeded generator of pseudo-random numbers (SplitMix64): the same seed, the same numbers,
/// on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that depends on `seed` alone.
    pub fn new(seed: u64) -> Rng {
        Rng(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.word() % n }
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The kinds of operations on a [`SimFile`], for faults and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SimOp {
    /// [`File::read`].
    Read,
    /// [`File::write`].
    Write,
    /// [`File::write_zeroes`].
    WriteZeroes,
    /// [`File::discard`].
    Discard,
    /// [`File::flush`].
    Flush,
    /// [`File::set_len`].
    SetLen,
}

/// An operation that is to fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which kind of operation; `None` for any.
    pub op: Option<SimOp>,
    /// How many such operations succeed first.
    pub after: u64,
    /// The error number, as in `errno`.
    pub errno: i32,
    /// Whether all later ones fail too.
    pub for_good: bool,
}

/// A change that is not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtRisk {
    /// Changes of a file are numbered in their order.
    pub number: u64,
    /// What it wrote; empty if it changed the file's length.
    pub range: ByteRange,
}

/// A file in memory that can lose, tear and reorder what was not flushed. Clones are the same file.
#[derive(Clone)]
pub struct SimFile {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    alignment: Alignment,
    state: Mutex<State>,
    /// Who completes the operations; `None`: each completes when first polled.
    scheduler: Mutex<Option<Arc<Scheduler>>>,
}

#[derive(Default)]
struct State {
    volatile: Content,
    durable: Content,
    /// What was done to `volatile` but need not be in `durable`, oldest first.
    unflushed: Vec<Change>,
    /// Number of the next change.
    next_change: u64,
    /// Changes older than this are no longer possible at a sector, because a later one there was
    /// made durable by itself.
    floors: HashMap<u64, u64>,
    faults: Vec<Fault>,
    counts: HashMap<SimOp, u64>,
}

/// One change of the content.
#[derive(Clone)]
struct Change {
    number: u64,
    kind: ChangeKind,
}

#[derive(Clone)]
enum ChangeKind {
    Data { offset: u64, bytes: Vec<u8> },
    Zeros(ByteRange),
    Len(u64),
}

/// An operation as handed over, with all it needs.
enum Request {
    Read {
        offset: u64,
        buf: Buffers,
    },
    Write {
        offset: u64,
        buf: Buffers,
        fua: bool,
    },
    Zero {
        range: ByteRange,
        op: SimOp,
    },
    /// Makes all changes below this number durable.
    Flush {
        below: u64,
    },
    SetLen(u64),
}

impl Request {
    fn op(&self) -> SimOp {
        match self {
            Request::Read { .. } => SimOp::Read,
            Request::Write { .. } => SimOp::Write,
            Request::Zero { op, .. } => *op,
            Request::Flush { .. } => SimOp::Flush,
            Request::SetLen(_) => SimOp::SetLen,
        }
    }
}

impl State {
    fn change(&mut self, kind: ChangeKind) -> u64 {
        apply(&mut self.volatile, &kind);
        let number = self.next_change;
        self.next_change += 1;
        self.unflushed.push(Change { number, kind });
        number
    }

    /// The error that is due for this operation, if any.
    fn fault(&mut self, op: SimOp) -> Option<i32> {
        *self.counts.entry(op).or_default() += 1;
        let mut errno = None;
        self.faults.retain_mut(|fault| {
            if fault.op.is_some_and(|kind| kind != op) {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            errno = Some(fault.errno);
            fault.for_good
        });
        errno
    }

    fn perform(&mut self, request: Request) -> Result<()> {
        if let Some(errno) = self.fault(request.op()) {
            return Err(Error::from_errno(errno));
        }
        match request {
            Request::Read { offset, buf } => {
                let start = (offset as usize).min(self.volatile.len());
                let end = ((offset + buf.len()) as usize).min(self.volatile.len());
                let mut done = 0;
                self.volatile.read(start, end, |part| {
                    buf.slice(done, part.len() as u64).copy_from_slice(part);
                    done += part.len() as u64;
                });
                if ((end - start) as u64) < buf.len() {
                    return Err(Error::new(ErrorKind::OutOfRange, "file is shorter than expected"));
                }
            }
            Request::Write { offset, buf, fua } => {
                let mut bytes = vec![0; buf.len() as usize];
                buf.copy_to_slice(&mut bytes);
                let kind = ChangeKind::Data { offset, bytes };
                if fua {
                    apply(&mut self.durable, &kind);
                }
                let range = ByteRange { offset, len: buf.len() };
                let number = self.change(kind);
                if fua {
                    for sector in sectors(range) {
                        self.floors.insert(sector, number);
                    }
                }
            }
            Request::Zero { range, op } => {
                // A discard never extends the file.
                let end = match op {
                    SimOp::Discard => range.end().min(self.volatile.len() as u64),
                    _ => range.end(),
                };
                let range = ByteRange::between(range.offset, end);
                if !range.is_empty() {
                    self.change(ChangeKind::Zeros(range));
                }
            }
            Request::Flush { below } => {
                let keep = self.unflushed.partition_point(|change| change.number < below);
                for change in self.unflushed.drain(..keep) {
                    apply_above(&mut self.durable, &change, &self.floors);
                }
                self.floors.retain(|_, number| *number >= below);
            }
            Request::SetLen(len) => {
                self.change(ChangeKind::Len(len));
            }
        }
        Ok(())
    }
}

/// The sectors that a range touches.
fn sectors(range: ByteRange) -> impl Iterator<Item = u64> {
    range.offset / SECTOR_SIZE..range.end().div_ceil(SECTOR_SIZE)
}

fn apply(content: &mut Content, kind: &ChangeKind) {
    match kind {
        ChangeKind::Data { offset, bytes } => content.write(*offset as usize, bytes),
        ChangeKind::Zeros(range) => content.zero(range.offset as usize, range.len as usize),
        ChangeKind::Len(len) => content.resize(*len as usize),
    }
}

/// Applies a change to durable content, except where something newer is durable already.
fn apply_above(content: &mut Content, change: &Change, floors: &HashMap<u64, u64>) {
    if floors.is_empty() {
        return apply(content, &change.kind);
    }
    apply_sectors(content, &change.kind, |sector| {
        floors.get(&sector).is_none_or(|floor| *floor <= change.number)
    });
}

/// Applies those sectors of a change that are wanted; a change of the length is one.
fn apply_sectors(content: &mut Content, kind: &ChangeKind, mut wanted: impl FnMut(u64) -> bool) {
    match kind {
        ChangeKind::Data { offset, bytes } => for_each_sector(*offset, bytes, |offset, bytes| {
            if wanted(offset / SECTOR_SIZE) {
                content.write(offset as usize, bytes);
            }
        }),
        ChangeKind::Zeros(range) => {
            for sector in sectors(*range).filter(|sector| wanted(*sector)) {
                let sector = ByteRange { offset: sector * SECTOR_SIZE, len: SECTOR_SIZE };
                let part = sector.intersect(range);
                content.zero(part.offset as usize, part.len as usize);
            }
        }
        ChangeKind::Len(len) => content.resize(*len as usize),
    }
}

/// Cuts a piece of data at sector boundaries.
fn for_each_sector(mut offset: u64, mut bytes: &[u8], mut f: impl FnMut(u64, &[u8])) {
    while !bytes.is_empty() {
        let len = ((SECTOR_SIZE - offset % SECTOR_SIZE) as usize).min(bytes.len());
        f(offset, &bytes[..len]);
        bytes = &bytes[len..];
        offset += len as u64;
    }
}

impl SimFile {
    /// An empty file.
    pub fn new(name: &str) -> SimFile {
        SimFile::with_alignment(name, Vec::new(), Alignment::NONE)
    }

    /// A file with this content, all of it durable.
    pub fn from_bytes(name: &str, content: Vec<u8>) -> SimFile {
        SimFile::with_alignment(name, content, Alignment::NONE)
    }

    /// As [`SimFile::from_bytes`], with demands on requests as O_DIRECT makes them: reads and
    /// writes that do not meet them fail with EINVAL.
    pub fn with_alignment(name: &str, content: Vec<u8>, alignment: Alignment) -> SimFile {
        SimFile::with_content(name, Content::from(&content[..]), alignment)
    }

    fn with_content(name: &str, content: Content, alignment: Alignment) -> SimFile {
        let state = State { durable: content.clone(), volatile: content, ..State::default() };
        SimFile {
            inner: Arc::new(Inner {
                name: name.to_string(),
                alignment,
                state: Mutex::new(state),
                scheduler: Mutex::new(None),
            }),
        }
    }

    /// The content that reads see now.
    pub fn volatile(&self) -> Vec<u8> {
        self.inner.state.lock().unwrap().volatile.to_vec()
    }

    /// The content that no power cut can take.
    pub fn durable(&self) -> Vec<u8> {
        self.inner.state.lock().unwrap().durable.to_vec()
    }

    /// Number of changes that a power cut could take.
    pub fn unflushed(&self) -> usize {
        self.inner.state.lock().unwrap().unflushed.len()
    }

    /// How often an operation was performed (or made to fail).
    pub fn count(&self, op: SimOp) -> u64 {
        self.inner.state.lock().unwrap().counts.get(&op).copied().unwrap_or(0)
    }

    /// Makes an operation fail. Several faults count independently of each other.
    pub fn fail(&self, fault: Fault) {
        self.inner.state.lock().unwrap().faults.push(fault);
    }

    /// Takes back all faults.
    pub fn heal(&self) {
        self.inner.state.lock().unwrap().faults.clear();
    }

    /// Another file with the content that reads see now, as it is for whoever opens it after a
    /// kill. Costs little.
    pub fn after_kill(&self) -> SimFile {
        let content = self.inner.state.lock().unwrap().volatile.clone();
        SimFile::with_content(&self.inner.name, content, self.inner.alignment)
    }

    /// One of the contents that the disk may have if the power fails now: the durable content plus
    /// a subset of the later changes, each whole, missing or torn at sector boundaries. Where
    /// changes overlap, any of them may be the last that reached the disk. The file goes on as if
    /// nothing had happened.
    pub fn power_cut(&self, seed: u64) -> Vec<u8> {
        self.cut(seed).to_vec()
    }

    /// The same as a file to go on with. Costs little more than what was not flushed.
    pub fn after_power_cut(&self, seed: u64) -> SimFile {
        SimFile::with_content(&self.inner.name, self.cut(seed), self.inner.alignment)
    }

    fn cut(&self, seed: u64) -> Content {
        let mut rng = Rng::new(seed);
        let state = self.inner.state.lock().unwrap();
        let mut content = state.durable.clone();
        // Bias the subset, so that "nearly nothing" and "nearly everything" turn up as well.
        let kept_of_8 = rng.below(9);
        for change in &state.unflushed {
            let keep = rng.below(8) < kept_of_8;
            let torn = rng.one_in(3);
            match &change.kind {
                ChangeKind::Len(_) if !keep => {}
                _ if !keep && !torn => {}
                kind if torn => apply_sectors(&mut content, kind, |sector| {
                    let newer = state.floors.get(&sector);
                    newer.is_none_or(|floor| *floor <= change.number) && rng.one_in(2)
                }),
                _ => apply_above(&mut content, change, &state.floors),
            }
        }
        content
    }

    /// What a power cut could take now, oldest first.
    pub fn at_risk(&self) -> Vec<AtRisk> {
        let state = self.inner.state.lock().unwrap();
        let range = |kind: &ChangeKind| match kind {
            ChangeKind::Data { offset, bytes } => {
                ByteRange { offset: *offset, len: bytes.len() as u64 }
            }
            ChangeKind::Zeros(range) => *range,
            ChangeKind::Len(_) => ByteRange::default(),
        };
        let unflushed = state.unflushed.iter();
        unflushed.map(|one| AtRisk { number: one.number, range: range(&one.kind) }).collect()
    }

    /// The file that a power cut leaves which keeps, of each change in [`SimFile::at_risk`], the
    /// sectors in the range that is given, or nothing.
    pub fn after_power_cut_with(&self, kept: &[Option<ByteRange>]) -> SimFile {
        let state = self.inner.state.lock().unwrap();
        let mut content = state.durable.clone();
        for (change, kept) in state.unflushed.iter().zip(kept) {
            let Some(kept) = kept else { continue };
            apply_sectors(&mut content, &change.kind, |sector| {
                let newer = state.floors.get(&sector);
                let place = sector * SECTOR_SIZE;
                newer.is_none_or(|floor| *floor <= change.number)
                    && (kept.offset..kept.end()).contains(&place)
            });
        }
        SimFile::with_content(&self.inner.name, content, self.inner.alignment)
    }

    fn submit<'a>(&'a self, request: Request) -> Fut<'a, ()> {
        Box::pin(Submitted { file: self, request: Some(request), slot: None })
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        let align = self.inner.alignment.request;
        if (offset | len) & (align - 1) != 0 {
            return Err(Error::from_errno(libc::EINVAL)
                .context(format!("{}: {len} bytes at {offset}", self.inner.name)));
        }
        Ok(())
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({})", self.inner.name)
    }
}

/// The future of an operation.
struct Submitted<'a> {
    file: &'a SimFile,
    /// Until first polled.
    request: Option<Request>,
    /// Where the scheduler leaves the result.
    slot: Option<Arc<Slot>>,
}

#[derive(Default)]
struct Slot {
    state: Mutex<SlotState>,
}

#[derive(Default)]
struct SlotState {
    result: Option<Result<()>>,
    waker: Option<Waker>,
}

impl Future for Submitted<'_> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if let Some(request) = self.request.take() {
            let inner = &self.file.inner;
            let Some(scheduler) = inner.scheduler.lock().unwrap().clone() else {
                return Poll::Ready(inner.state.lock().unwrap().perform(request));
            };
            let slot = Arc::new(Slot::default());
            let pending = Pending {
                file: Arc::clone(inner),
                request,
                slot: Arc::clone(&slot),
                _loads: carry::now(),
            };
            scheduler.pending.lock().unwrap().push(pending);
            self.slot = Some(slot);
        }
        let slot = self.slot.as_ref().expect("polled after completion");
        let mut state = slot.state.lock().unwrap();
        if let Some(result) = state.result.take() {
            return Poll::Ready(result);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl File for SimFile {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.inner.state.lock().unwrap().volatile.len() as u64)
    }

    fn alignment(&self) -> Alignment {
        self.inner.alignment
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        match self.check(offset, buf.len()) {
            Ok(()) => self.submit(Request::Read { offset, buf }),
            Err(err) => Box::pin(async { Err(err) }),
        }
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        match self.check(offset, buf.len()) {
            Ok(()) => self.submit(Request::Write { offset, buf, fua }),
            Err(err) => Box::pin(async { Err(err) }),
        }
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        self.submit(Request::Zero { range, op: SimOp::WriteZeroes })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.submit(Request::Zero { range, op: SimOp::Discard })
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            // What completed before now.
            let below = self.inner.state.lock().unwrap().next_change;
            self.submit(Request::Flush { below }).await
        })
    }

    fn set_len<'a>(&'a self, len: u64) -> Fut<'a, ()> {
        self.submit(Request::SetLen(len))
    }

    fn hole_at(&self, offset: u64) -> Result<Hole> {
        let state = self.inner.state.lock().unwrap();
        let (content, start) = (&state.volatile, offset as usize);
        if start >= content.len() {
            return Err(Error::new(ErrorKind::OutOfRange, "offset beyond the end of the file"));
        }
        let is_hole = content.is_zero_page(start);
        let range = ByteRange::between(offset, content.run_end(start) as u64);
        Ok(Hole { range, is_hole })
    }
}

/// Operations that wait for their turn.
#[derive(Default)]
struct Scheduler {
    pending: Mutex<Vec<Pending>>,
}

struct Pending {
    file: Arc<Inner>,
    request: Request,
    slot: Arc<Slot>,
    /// Kept until it is performed.
    _loads: Loads,
}

impl Pending {
    fn perform(self) {
        let result = self.file.state.lock().unwrap().perform(self.request);
        let waker = {
            let mut state = self.slot.state.lock().unwrap();
            state.result = Some(result);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A local future without a result, as [`Sim::run`] takes them.
pub type SimTask<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Runs futures on one thread and completes the operations of its files, both in an order that
/// the seed decides.
pub struct Sim {
    scheduler: Arc<Scheduler>,
    rng: Mutex<Rng>,
}

impl Sim {
    /// A scheduler; its decisions depend on `seed` alone.
    pub fn new(seed: u64) -> Sim {
        Sim { scheduler: Arc::default(), rng: Mutex::new(Rng::new(seed)) }
    }

    /// From now on the file's operations complete when this scheduler says so.
    pub fn attach(&self, file: &SimFile) {
        *file.inner.scheduler.lock().unwrap() = Some(Arc::clone(&self.scheduler));
    }

    /// The file's operations complete at once again.
    pub fn detach(&self, file: &SimFile) {
        *file.inner.scheduler.lock().unwrap() = None;
    }

    /// Number of operations handed over and not yet performed, those of dropped futures included.
    pub fn pending(&self) -> usize {
        self.scheduler.pending.lock().unwrap().len()
    }

    /// Performs one pending operation; false if there is none.
    pub fn step(&self) -> bool {
        let chosen = {
            let mut pending = self.scheduler.pending.lock().unwrap();
            if pending.is_empty() {
                return false;
            }
            let at = self.rng.lock().unwrap().below(pending.len() as u64) as usize;
            pending.swap_remove(at)
        };
        chosen.perform();
        true
    }

    /// Performs all pending operations.
    pub fn drain(&self) {
        while self.step() {}
    }

    /// Runs a future to its end.
    ///
    /// # Panics
    /// If it waits for something that can no longer happen.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut out = None;
        self.run(vec![Box::pin(async { out = Some(future.await) })]);
        out.expect("the future has run to its end")
    }

    /// Runs all tasks to their end, interleaved.
    ///
    /// # Panics
    /// If they wait for something that can no longer happen (a deadlock).
    pub fn run(&self, tasks: Vec<SimTask<'_>>) {
        self.run_until(tasks, |_| false);
    }

    /// Runs `first` until it `is_half_way`, and then `second`: with the first, if it waits for anything,
    /// else past it. Then the first is dropped where it stands.
    ///
    /// # Panics
    /// If the first comes to its end before it is half way.
    pub fn overtake<'a>(
        &self,
        mut first: SimTask<'a>,
        is_half_way: impl Fn() -> bool,
        mut second: SimTask<'a>,
    ) {
        let mut now = Context::from_waker(Waker::noop());
        while !is_half_way() {
            self.step();
            assert!(first.as_mut().poll(&mut now).is_pending(), "it has come to its end");
        }
        if second.as_mut().poll(&mut now).is_pending() {
            self.run(vec![first, second]);
        }
    }

    /// Runs the tasks until `stop`, called with the number of the step before each, says so; the
    /// tasks that are left are dropped where they stand. True if all came to their end.
    pub fn run_until(&self, tasks: Vec<SimTask<'_>>, mut stop: impl FnMut(u64) -> bool) -> bool {
        let mut tasks: Vec<_> = tasks.into_iter().map(|task| (task, TaskFlag::new())).collect();
        let mut steps = 0;
        while !tasks.is_empty() {
            if stop(steps) {
                return false;
            }
            steps += 1;
            let ready: Vec<usize> =
                (0..tasks.len()).filter(|i| tasks[*i].1.woken.load(Ordering::Acquire)).collect();
            let pending = self.pending();
            assert!(
                !ready.is_empty() || pending > 0,
                "deadlock: {} tasks wait and no operation is pending",
                tasks.len()
            );
            let choice = self.rng.lock().unwrap().below((ready.len() + pending) as u64) as usize;
            let Some(&at) = ready.get(choice) else {
                self.step();
                continue;
            };
            let (task, flag) = &mut tasks[at];
            flag.woken.store(false, Ordering::Release);
            let waker = Waker::from(Arc::clone(flag));
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                drop(tasks.swap_remove(at));
            }
        }
        true
    }
}

/// Whether a task wants to be polled.
struct TaskFlag {
    woken: AtomicBool,
}

impl TaskFlag {
    fn new() -> Arc<TaskFlag> {
        Arc::new(TaskFlag { woken: AtomicBool::new(true) })
    }
}

impl Wake for TaskFlag {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{AlignedBuf, block_on};

    fn write(file: &SimFile, offset: u64, byte: u8, len: usize) {
        let buf = AlignedBuf::from_slice(&vec![byte; len], 1);
        block_on(file.write(offset, buf.buffers(), false)).unwrap();
    }

    #[test]
    fn a_power_cut_keeps_what_was_flushed_and_any_part_of_the_rest() {
        let file = SimFile::new("disk");
        write(&file, 0, 1, 1024);
        block_on(file.flush()).unwrap();
        write(&file, 0, 2, 1024);
        write(&file, 512, 3, 512);
        assert_eq!(file.durable(), vec![1; 1024]);
        let mut seen = std::collections::HashSet::new();
        for seed in 0..200 {
            let content = file.power_cut(seed);
            assert_eq!(content.len(), 1024);
            assert!(content[..512].iter().all(|b| *b == content[0]), "torn inside a sector");
            assert!(content[512..].iter().all(|b| *b == content[512]), "torn inside a sector");
            seen.insert((content[0], content[512]));
        }
        let expected = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)];
        assert_eq!(seen, expected.into_iter().collect());
        block_on(file.flush()).unwrap();
        assert_eq!(file.power_cut(0), file.volatile());
    }

    #[test]
    fn fua_is_durable_by_itself() {
        let file = SimFile::from_bytes("disk", vec![0; 1024]);
        write(&file, 0, 1, 1024);
        let buf = AlignedBuf::from_slice(&[2; 512], 1);
        block_on(file.write(0, buf.buffers(), true)).unwrap();
        for seed in 0..50 {
            assert_eq!(file.power_cut(seed)[0], 2);
        }
        write(&file, 0, 3, 512);
        let firsts: std::collections::HashSet<u8> =
            (0..50).map(|seed| file.power_cut(seed)[0]).collect();
        assert_eq!(firsts, [2, 3].into_iter().collect());
        block_on(file.flush()).unwrap();
        assert_eq!(file.durable()[0], 3);
    }

    #[test]
    fn faults_hit_the_chosen_operation() {
        let file = SimFile::from_bytes("disk", vec![0; 512]);
        file.fail(Fault { op: Some(SimOp::Write), after: 1, errno: libc::ENOSPC, for_good: false });
        let buf = AlignedBuf::zeroed(512, 512);
        block_on(file.write(0, buf.buffers(), false)).unwrap();
        block_on(file.read(0, buf.buffers())).unwrap();
        let err = block_on(file.write(0, buf.buffers(), false)).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace);
        block_on(file.write(0, buf.buffers(), false)).unwrap();
        assert_eq!(file.count(SimOp::Write), 3);
    }

    #[test]
    fn a_scheduler_completes_in_any_order_and_performs_what_was_dropped() {
        let mut orders = std::collections::HashSet::new();
        for seed in 0..20 {
            let sim = Sim::new(seed);
            let file = SimFile::from_bytes("disk", vec![0; 2048]);
            sim.attach(&file);
            let order = Mutex::new(Vec::new());
            let tasks: Vec<SimTask<'_>> = (0..3u64)
                .map(|i| {
                    let (file, order) = (&file, &order);
                    Box::pin(async move {
                        let buf = AlignedBuf::from_slice(&[i as u8 + 1; 512], 1);
                        file.write(i * 512, buf.buffers(), false).await.unwrap();
                        order.lock().unwrap().push(i);
                    }) as SimTask<'_>
                })
                .collect();
            sim.run(tasks);
            orders.insert(order.into_inner().unwrap());
            // Dropped after it was handed over: performed all the same.
            let buf = AlignedBuf::from_slice(&[9; 512], 1);
            let mut future = file.write(1536, buf.buffers(), false);
            assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            drop((future, buf));
            assert_eq!(file.volatile()[1536], 0);
            sim.drain();
            assert_eq!(file.volatile()[1536], 9);
        }
        assert!(orders.len() > 1, "{orders:?}");
    }

    #[test]
    fn unaligned_requests_fail_where_the_file_demands_alignment() {
        let alignment = Alignment { request: 4096, memory: 512 };
        let file = SimFile::with_alignment("disk", vec![0; 8192], alignment);
        let buf = AlignedBuf::zeroed(512, 4096);
        let err = block_on(file.read(512, buf.buffers())).unwrap_err();
        assert_eq!(err.errno(), Some(libc::EINVAL));
    }
}
