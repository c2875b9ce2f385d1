//! Where the log ends: who writes which entries, and up to where it is whole.
//!
//! ```text
//!   counted by the superblock      complete            next
//!            │                        │                  │
//!  ──────────┴────────────────────────┴───▒▒▒▒▒▒▒░░░░░░░─┴──
//!   entries, all written                  runs, some written
//! ```
//!
//! A *run* is a number of entries one after the other that one writer writes. It is reserved, entry
//! numbers and log sectors together, under one lock; then it is written outside of it. A run is
//! *complete* when it and all before it are written. Only then may its requests complete: so what
//! the guest saw completed is never behind a hole, and a killed process loses none of it.
//!
//! A run that cannot be written fails, and so do all after it, which nobody saw completed. Once no
//! writer is at work any more the log ends where it was complete, and the next reservation begins
//! there: a log that was full goes on when there is room again.
//!
//! *Events* number submissions and completions of requests, in one sequence.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use crate::error::{Error, ErrorKind, Result};

/// A place in the log: the number of an entry and the log sector of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the entry.
    pub entry: u64,
    /// Log sector of its header.
    pub sector: u64,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Tail {
    /// The log's name, for messages.
    name: String,
    state: Mutex<State>,
    next_event: AtomicU64,
}

#[derive(Debug)]
struct State {
    next: Place,
    complete: Place,
    /// Runs after `complete`, in order.
    runs: VecDeque<Arc<Run>>,
    /// How many of them are being written.
    writing: usize,
    /// Flushes that have their place and are not over. Nothing from the first of them on is to be
    /// counted.
    flushes: Vec<u64>,
    /// Who waits for a flush to be over.
    waiters: Vec<Waker>,
    /// Why a run failed; nothing is reserved until all writers have noticed.
    failure: Option<Failure>,
    /// A flush was left half way: what is behind it can never be counted.
    is_stuck: bool,
}

#[derive(Clone, Debug)]
struct Failure {
    kind: ErrorKind,
    message: String,
}

#[derive(Debug)]
struct Run {
    end: Place,
    /// One of the constants below.
    state: AtomicU8,
    waiters: Mutex<Vec<Waker>>,
    /// Why it failed.
    failure: Mutex<Option<Failure>>,
}

const WRITING: u8 = 0;
const WRITTEN: u8 = 1;
const COMPLETE: u8 = 2;
const FAILED: u8 = 3;

impl Run {
    fn settle(&self, state: u8) {
        self.state.store(state, Ordering::Release);
        for waiter in self.waiters.lock().unwrap().drain(..) {
            waiter.wake();
        }
    }
}

/// The right to write a run. If it is dropped before [`Reserved::written`], the run has failed.
#[must_use]
pub struct Reserved<'a> {
    tail: &'a Tail,
    run: Arc<Run>,
    /// Where it begins.
    pub first: Place,
    /// The number of the first entry's completion; the others' follow.
    pub completed: u64,
    /// Whether somebody has said how it ended.
    settled: bool,
}

impl Tail {
    /// The end of the log called `name`, which is whole up to `end`. Events count on from `event`.
    pub fn new(name: &str, end: Place, event: u64) -> Tail {
        Tail {
            name: name.to_string(),
            state: Mutex::new(State {
                next: end,
                complete: end,
                runs: VecDeque::new(),
                writing: 0,
                flushes: Vec::new(),
                waiters: Vec::new(),
                failure: None,
                is_stuck: false,
            }),
            next_event: AtomicU64::new(event),
        }
    }

    /// Something happens: its number.
    pub fn event(&self) -> u64 {
        self.next_event.fetch_add(1, Ordering::Relaxed)
    }

    /// Reserves `count` entries of `sectors` log sectors in all.
    ///
    /// # Errors
    /// If a run has failed, until all writers know.
    pub fn reserve(&self, count: u64, sectors: u64) -> Result<Reserved<'_>> {
        self.reserve_in(&mut self.state.lock().unwrap(), count, sectors)
    }

    /// Reserves the entry of a flush. It is not counted, nor anything behind it, until
    /// [`Tail::flush_over`].
    pub fn reserve_flush(&self) -> Result<Reserved<'_>> {
        let mut state = self.state.lock().unwrap();
        let reserved = self.reserve_in(&mut state, 1, 1)?;
        state.flushes.push(reserved.first.entry);
        Ok(reserved)
    }

    fn reserve_in(&self, state: &mut State, count: u64, sectors: u64) -> Result<Reserved<'_>> {
        if let Some(failure) = &state.failure {
            return Err(failure.error());
        }
        let first = state.next;
        let sector = first.sector.checked_add(sectors).filter(|sector| *sector <= i64::MAX as u64);
        let Some(sector) = sector else {
            let message = format!("{}: the log cannot become any longer", self.name);
            return Err(Error::new(ErrorKind::NoSpace, message));
        };
        state.next = Place { entry: first.entry + count, sector };
        let run = Arc::new(Run {
            end: state.next,
            state: AtomicU8::new(WRITING),
            waiters: Mutex::default(),
            failure: Mutex::default(),
        });
        state.runs.push_back(Arc::clone(&run));
        state.writing += 1;
        // Under the lock, so that completions are numbered in the order of the entries.
        let completed = self.next_event.fetch_add(count, Ordering::Relaxed);
        Ok(Reserved { tail: self, run, first, completed, settled: false })
    }

    /// Up to where the log is whole and may be counted.
    pub fn countable(&self) -> u64 {
        self.state.lock().unwrap().countable()
    }

    /// The flush with this entry has succeeded. All flushes before it are as good as over, too: it
    /// made durable what they were to.
    pub fn flush_over(&self, entry: u64) {
        self.forget_flushes(|flush| flush <= entry);
    }

    /// The flush with this entry has failed, and its entry is no flush any more. Those before it are
    /// under way as they were.
    pub fn flush_failed(&self, entry: u64) {
        self.forget_flushes(|flush| flush == entry);
    }

    fn forget_flushes(&self, are_over: impl Fn(u64) -> bool) {
        let mut state = self.state.lock().unwrap();
        state.flushes.retain(|flush| !are_over(*flush));
        for waiter in state.waiters.drain(..) {
            waiter.wake();
        }
    }

    /// A flush will never be over, because nobody waits for it any more.
    pub fn flush_abandoned(&self) {
        let mut state = self.state.lock().unwrap();
        state.is_stuck = true;
        for waiter in state.waiters.drain(..) {
            waiter.wake();
        }
    }

    /// Waits until all entries before `entry` may be counted. They must be complete.
    ///
    /// # Errors
    /// If a flush before was abandoned.
    pub async fn wait_countable(&self, entry: u64) -> Result<()> {
        poll_fn(|cx| {
            let mut state = self.state.lock().unwrap();
            if state.countable() >= entry {
                return Poll::Ready(Ok(()));
            }
            if state.is_stuck {
                let message = format!("{}: a flush was interrupted", self.name);
                return Poll::Ready(Err(Error::new(ErrorKind::Cancelled, message)));
            }
            state.waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// A writer is done with its run.
    fn settle(&self, run: &Arc<Run>, failure: Option<Failure>) {
        let mut settled = Vec::new();
        let mut state = self.state.lock().unwrap();
        state.writing -= 1;
        match failure {
            None => run.state.store(WRITTEN, Ordering::Release),
            Some(failure) => {
                // Whoever asked tells the operator, and knows how often.
                tracing::debug!("{}; the request fails", failure.message);
                run.state.store(FAILED, Ordering::Release);
                state.failure.get_or_insert(failure);
            }
        }
        while state.runs.front().is_some_and(|run| run.state.load(Ordering::Acquire) == WRITTEN) {
            let run = state.runs.pop_front().expect("looked at");
            state.complete = run.end;
            settled.push((run, COMPLETE));
        }
        if state.failure.is_some() && state.writing == 0 {
            settled.extend(self.roll_back(&mut state));
        }
        drop(state);
        for (run, state) in settled {
            run.settle(state);
        }
    }

    /// All runs that are left come after one that failed: forgets them.
    fn roll_back(&self, state: &mut State) -> Vec<(Arc<Run>, u8)> {
        let failure = state.failure.take();
        state.next = state.complete;
        state.flushes.retain(|flush| *flush < state.next.entry);
        for waiter in state.waiters.drain(..) {
            waiter.wake();
        }
        let runs = state.runs.drain(..);
        runs.map(|run| {
            (*run.failure.lock().unwrap()).clone_from(&failure);
            (run, FAILED)
        })
        .collect()
    }
}

impl State {
    fn countable(&self) -> u64 {
        self.flushes.iter().copied().fold(self.complete.entry, u64::min)
    }
}

impl Failure {
    fn error(&self) -> Error {
        Error::new(self.kind, self.message.clone())
    }
}

impl Reserved<'_> {
    /// Where the run ends.
    pub fn end(&self) -> Place {
        self.run.end
    }

    /// The run is written, or could not be. Returns when it is complete.
    ///
    /// # Errors
    /// If it could not, or one before it could not.
    pub async fn settle(self, result: Result<()>) -> Result<()> {
        self.settle_now(result).wait().await
    }

    /// As [`Reserved::settle`], without waiting for the runs before it.
    pub fn settle_now(mut self, result: Result<()>) -> Settling {
        self.settled = true;
        let failure =
            result.err().map(|err| Failure { kind: err.kind(), message: err.to_string() });
        self.tail.settle(&self.run, failure);
        Settling(Arc::clone(&self.run))
    }
}

/// A run that its writer is done with.
#[must_use = "its requests complete when it is complete"]
pub struct Settling(Arc<Run>);

impl Settling {
    /// What became of it, once it is complete, or can never be.
    pub fn outcome(&self) -> Option<Result<()>> {
        match self.0.state.load(Ordering::Acquire) {
            COMPLETE => Some(Ok(())),
            // Without a failure others are still writing.
            FAILED => self.0.failure.lock().unwrap().as_ref().map(|failure| Err(failure.error())),
            _ => None,
        }
    }

    /// Waits for that.
    pub async fn wait(self) -> Result<()> {
        poll_fn(|cx| {
            if let Some(result) = self.outcome() {
                return Poll::Ready(result);
            }
            self.0.waiters.lock().unwrap().push(cx.waker().clone());
            // It may have been settled between the two.
            self.outcome().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

impl Drop for Reserved<'_> {
    /// A run that nobody will write is a hole.
    fn drop(&mut self) {
        if !self.settled {
            let message = format!("{}: writing an entry was interrupted", self.tail.name);
            let failure = Failure { kind: ErrorKind::Cancelled, message };
            self.tail.settle(&self.run, Some(failure));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    fn tail() -> Tail {
        Tail::new("w.log", Place { entry: 0, sector: 1 }, 0)
    }

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    impl Tail {
        fn next_entry(&self) -> u64 {
            self.state.lock().unwrap().next.entry
        }
    }

    fn no_space() -> Error {
        Error::new(ErrorKind::NoSpace, "w.log: full")
    }

    #[test]
    fn a_run_is_complete_when_all_before_it_are() {
        let tail = tail();
        let first = tail.reserve(2, 10).unwrap();
        let second = tail.reserve(1, 9).unwrap();
        assert_eq!(first.first, Place { entry: 0, sector: 1 });
        assert_eq!(second.first, Place { entry: 2, sector: 11 });
        assert_eq!((first.completed, second.completed), (0, 2));
        let mut second = pin!(second.settle(Ok(())));
        assert!(poll(second.as_mut()).is_pending());
        assert_eq!(tail.countable(), 0);
        block_on(first.settle(Ok(()))).unwrap();
        assert!(matches!(poll(second), Poll::Ready(Ok(()))));
        assert_eq!(tail.state.lock().unwrap().complete, Place { entry: 3, sector: 20 });
    }

    #[test]
    fn what_follows_a_failure_fails_and_the_place_is_used_again() {
        let tail = tail();
        let good = tail.reserve(1, 3).unwrap();
        let bad = tail.reserve(1, 5).unwrap();
        let later = tail.reserve(1, 7).unwrap();
        block_on(good.settle(Ok(()))).unwrap();
        let mut bad = pin!(bad.settle(Err(no_space())));
        assert!(poll(bad.as_mut()).is_pending(), "others still write");
        assert_eq!(tail.reserve(1, 1).err().unwrap().to_string(), "w.log: full");
        let err = block_on(later.settle(Ok(()))).unwrap_err();
        assert_eq!((err.kind(), err.to_string()), (ErrorKind::NoSpace, "w.log: full".into()));
        assert!(matches!(poll(bad), Poll::Ready(Err(_))));
        let again = tail.reserve(1, 5).unwrap();
        assert_eq!(again.first, Place { entry: 1, sector: 4 });
        block_on(again.settle(Ok(()))).unwrap();
        assert_eq!(tail.countable(), 2);
    }

    #[test]
    fn a_run_that_is_dropped_has_failed() {
        let tail = tail();
        drop(tail.reserve(1, 3).unwrap());
        let again = tail.reserve(1, 3).unwrap();
        assert_eq!(again.first.entry, 0);
        let err = block_on(again.settle(Err(no_space()))).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace);
    }

    #[test]
    fn nothing_behind_a_flush_that_is_not_over_is_counted() {
        let tail = tail();
        let flush = tail.reserve_flush().unwrap();
        let write = tail.reserve(1, 2).unwrap();
        let other = tail.reserve_flush().unwrap();
        for run in [flush, write, other] {
            block_on(run.settle(Ok(()))).unwrap();
        }
        assert_eq!((tail.countable(), tail.next_entry()), (0, 3));
        let mut waits = pin!(tail.wait_countable(2));
        assert!(poll(waits.as_mut()).is_pending());
        // The second one covers what the first was to make durable.
        tail.flush_over(2);
        assert!(matches!(poll(waits), Poll::Ready(Ok(()))));
        assert_eq!(tail.countable(), 3);
        let flush = tail.reserve_flush().unwrap();
        block_on(flush.settle(Ok(()))).unwrap();
        let mut waits = pin!(tail.wait_countable(4));
        assert!(poll(waits.as_mut()).is_pending());
        tail.flush_abandoned();
        assert!(matches!(poll(waits), Poll::Ready(Err(_))));
    }
}
