//! The engine on a pool of blocking threads, for hosts that refuse io_uring, and for what a ring cannot
//! do.
//!
//! One pool serves all engines of the process; it grows with the load and its threads end after
//! idling. What a file may occupy of it is limited, and nothing else: a disk that hangs holds up its
//! own requests only, as it does with a ring.
//!
//! ```text
//! submit ─► file has threads left ──► jobs ──► a thread ─► done
//!               └ no: waits for the file ──────────┘ one of the file's has ended
//! ```
//!
//! Completions come back through a queue and an eventfd that the engine polls together with its
//! watches.

#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::{Event, Op, blocking};
use crate::error::{Result, ResultExt};

/// Most operations on a file at a time, each of which has a thread. A disk's queue is rarely served
/// better by more.
const MAX_PER_FILE: usize = 16;
/// How long a thread of the pool waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// See the module's text.
pub struct ThreadsEngine {
    /// Pushed, not yet handed to the pool.
    queued: Vec<Job>,
    done: Arc<Done>,
    watches: Vec<(u64, RawFd)>,
    /// Watch events found while polling, not yet reaped.
    fired: Vec<Event>,
    enters: u64,
}

/// Completions on their way back to an engine.
struct Done {
    events: Mutex<Vec<Event>>,
    /// Whether `wake` has been written since the engine last looked.
    signalled: AtomicBool,
    wake: OwnedFd,
}

impl Done {
    fn new() -> Result<Done> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context(|| "eventfd")?;
        Ok(Done { events: Mutex::default(), signalled: AtomicBool::new(false), wake })
    }

    /// Adds an event and wakes its engine, on any thread.
    fn post(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        if !self.signalled.swap(true, Ordering::AcqRel) {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Takes the signal back. Whoever does must look at the events afterwards, before it sleeps.
    fn calm(&self) {
        // In this order: a signal that came between would be drained, while the flag it leaves
        // keeps all others from writing, and the engine would sleep for ever.
        drain(self.wake.as_raw_fd());
        // Not a store, which could sink below the look at the events.
        self.signalled.swap(false, Ordering::AcqRel);
    }

    /// Whether there is an event, on the engine's thread. If there is none, the next one wakes it.
    fn is_any(&self) -> bool {
        if self.signalled.load(Ordering::Acquire) {
            self.calm();
        }
        !self.events.lock().unwrap().is_empty()
    }

    /// Moves all events to `out`, on the engine's thread.
    fn take(&self, out: &mut Vec<Event>) {
        if self.signalled.load(Ordering::Acquire) {
            self.calm();
        }
        out.append(&mut self.events.lock().unwrap());
    }
}

struct Job {
    op: Op,
    user: u64,
    done: Arc<Done>,
}

// SAFETY: the operation's pointers are valid until its event is reaped, on any thread; that is the
// promise of `Engine::push`.
unsafe impl Send for Job {}

struct Pool {
    state: Mutex<PoolState>,
    work: Condvar,
}

#[derive(Default)]
struct PoolState {
    /// To be taken by a thread, oldest first.
    jobs: VecDeque<Job>,
    /// The files that have something to do, by [`Op::file_id`].
    files: HashMap<u32, FileLoad>,
    threads: usize,
    idle: usize,
    /// Threads that have been started and have not looked for a job yet.
    starting: usize,
}

/// What is to be done on a file.
#[derive(Default)]
struct FileLoad {
    /// How much of it is being done, or in the queue of the pool.
    started: usize,
    /// What waits until less is, oldest first.
    waiting: VecDeque<Job>,
}

impl PoolState {
    /// Takes a job on, now or when its turn comes.
    fn add(&mut self, job: Job) {
        let file = self.files.entry(job.op.file_id).or_default();
        if file.started < MAX_PER_FILE {
            file.started += 1;
            self.jobs.push_back(job);
        } else {
            file.waiting.push_back(job);
        }
    }

    /// A job on this file has been done; the next one that waited for that takes its place.
    fn ended(&mut self, file_id: u32) {
        let Some(file) = self.files.get_mut(&file_id) else { return };
        match file.waiting.pop_front() {
            Some(next) => self.jobs.push_back(next),
            None if file.started > 1 => file.started -= 1,
            None => {
                self.files.remove(&file_id);
            }
        }
    }

    /// Threads that it takes to do all jobs at once, besides those that are about to look for one.
    fn missing(&self) -> usize {
        self.jobs.len().saturating_sub(self.idle + self.starting)
    }
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool { state: Mutex::default(), work: Condvar::new() })
}

impl ThreadsEngine {
    /// Makes an engine for the calling thread.
    pub fn new() -> Result<ThreadsEngine> {
        Ok(ThreadsEngine {
            queued: Vec::new(),
            done: Arc::new(Done::new()?),
            watches: Vec::new(),
            fired: Vec::new(),
            enters: 0,
        })
    }

    /// See [`super::Engine::push`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn push(&mut self, op: &Op, user: u64) {
        self.queued.push(Job { op: *op, user, done: Arc::clone(&self.done) });
    }

    /// See [`super::Engine::watch`].
    pub fn watch(&mut self, fd: RawFd, user: u64) {
        self.watches.push((user, fd));
    }

    /// See [`super::Engine::unwatch`].
    pub fn unwatch(&mut self, user: u64) {
        self.watches.retain(|(u, _)| *u != user);
    }

    /// See [`super::Engine::submit`].
    pub fn submit(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        self.enters += 1;
        let pool = pool();
        let mut state = pool.state.lock().unwrap();
        let before = state.jobs.len();
        self.queued.drain(..).for_each(|job| state.add(job));
        let added = state.jobs.len() - before;
        // All that nobody has taken up counts, not just ours: an idle thread that was notified
        // looks idle until it runs.
        let mut missing = state.missing();
        while missing > 0 {
            let spawned = std::thread::Builder::new()
                .name("vublk-io".into())
                .stack_size(128 * 1024)
                .spawn(run);
            if spawned.is_err() {
                // Those that exist will do the work; without any it is done right here.
                break;
            }
            state.threads += 1;
            state.starting += 1;
            missing -= 1;
        }
        while state.threads == 0
            && let Some(job) = state.jobs.pop_front()
        {
            state = pool.perform(job, state);
        }
        drop(state);
        for _ in 0..added {
            pool.work.notify_one();
        }
    }

    /// See [`super::Engine::wait`].
    pub fn wait(&mut self) {
        self.submit();
        self.poll(-1);
    }

    fn poll(&mut self, timeout_ms: i32) {
        if !self.done.events.lock().unwrap().is_empty() || !self.fired.is_empty() {
            return;
        }
        self.enters += 1;
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = vec![entry(self.done.wake.as_raw_fd())];
        fds.extend(self.watches.iter().map(|(_, fd)| entry(*fd)));
        // SAFETY: `fds` is a valid array of that many entries.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
        if n <= 0 {
            return;
        }
        if fds[0].revents != 0 {
            // Here too, as a thread may write after `reap` has seen its event: left readable it
            // would end every wait at once.
            self.done.calm();
        }
        let mut slots = fds[1..].iter();
        let fired = &mut self.fired;
        self.watches.retain(|(user, fd)| {
            let revents = slots.next().map_or(0, |slot| slot.revents);
            if revents == 0 {
                return true;
            }
            fired.push(Event { user: *user, result: 1 });
            // One whose other end is gone is ready for ever, and tells nothing any more.
            revents & libc::POLLIN != 0 && drain(*fd)
        });
    }

    /// See [`super::Engine::reap`].
    pub fn reap(&mut self, out: &mut Vec<Event>) {
        self.done.take(out);
        if self.fired.is_empty() && !self.watches.is_empty() && out.is_empty() {
            self.poll(0);
        }
        out.append(&mut self.fired);
    }

    /// See [`super::Engine::enters`].
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Becomes readable when an operation ends, for an engine that sleeps elsewhere.
    pub(super) fn wake_fd(&self) -> RawFd {
        self.done.wake.as_raw_fd()
    }

    /// Whether an operation has ended that was not reaped. If none has, the descriptor tells of the
    /// next one.
    pub(super) fn has_done(&self) -> bool {
        self.done.is_any()
    }

    /// [`ThreadsEngine::reap`] without a look at watches.
    pub(super) fn reap_done(&self, out: &mut Vec<Event>) {
        self.done.take(out);
    }
}

/// Resets an eventfd's counter. False if the file has come to its end. Never waits, even if the
/// file is a front-end's that somebody else reads, too.
fn drain(fd: RawFd) -> bool {
    let mut value = 0u64;
    let part = libc::iovec { iov_base: (&raw mut value).cast(), iov_len: 8 };
    // SAFETY: eight bytes to a u64 of ours.
    let mut n = unsafe { libc::preadv2(fd, &part, 1, -1, libc::RWF_NOWAIT) };
    if n < 0 && errno() == libc::EOPNOTSUPP {
        // Not an eventfd. The message thread has made it non-blocking.
        // SAFETY: as above.
        n = unsafe { libc::read(fd, (&raw mut value).cast(), 8) };
    }
    n > 0 || (n < 0 && matches!(errno(), libc::EAGAIN | libc::EINTR))
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

impl Pool {
    /// Does a job, with nothing locked meanwhile, and tells its engine.
    fn perform<'a>(
        &'a self,
        job: Job,
        state: MutexGuard<'a, PoolState>,
    ) -> MutexGuard<'a, PoolState> {
        drop(state);
        // SAFETY: who pushed the job keeps its memory and file until the event is reaped.
        let result = unsafe { blocking(&job.op) };
        job.done.post(Event { user: job.user, result });
        let mut state = self.state.lock().unwrap();
        // Its thread, which looks for the next job now, takes over what comes in its place.
        state.ended(job.op.file_id);
        state
    }
}

/// A thread of the pool.
fn run() {
    let pool = pool();
    let mut state = pool.state.lock().unwrap();
    state.starting -= 1;
    loop {
        if let Some(job) = state.jobs.pop_front() {
            state = pool.perform(job, state);
            continue;
        }
        state.idle += 1;
        let (next, timeout) = pool.work.wait_timeout(state, IDLE).unwrap();
        state = next;
        state.idle -= 1;
        if timeout.timed_out() && state.jobs.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}

impl fmt::Debug for ThreadsEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ThreadsEngine({} watches)", self.watches.len())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::io::engine::{OpCode, WATCH};

    fn engine() -> ThreadsEngine {
        ThreadsEngine::new().unwrap()
    }

    /// An operation that fails at once.
    fn quick() -> Op {
        let (iovs, n_iovs) = (std::ptr::null(), 0);
        Op { code: OpCode::Sync, fd: -1, file_id: 0, offset: 0, len: 0, iovs, n_iovs }
    }

    #[test]
    fn no_event_is_slept_through() {
        const EVENTS: u64 = 300_000;
        let done = Arc::new(Done::new().unwrap());
        let posters: Vec<_> = (0..2)
            .map(|_| {
                let done = Arc::clone(&done);
                std::thread::spawn(move || {
                    for user in 0..EVENTS {
                        done.post(Event { user, result: 0 });
                    }
                })
            })
            .collect();
        let (mut seen, mut out) = (0, Vec::new());
        while seen < 2 * EVENTS {
            done.take(&mut out);
            seen += out.drain(..).count() as u64;
            // As the engine sleeps: unless something is there, until it is signalled.
            if seen < 2 * EVENTS && done.events.lock().unwrap().is_empty() {
                let mut fd =
                    libc::pollfd { fd: done.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one valid entry.
                let n = unsafe { libc::poll(&mut fd, 1, 20_000) };
                assert_eq!(n, 1, "asleep, with {} events to come", 2 * EVENTS - seen);
            }
        }
        posters.into_iter().for_each(|poster| poster.join().unwrap());
    }

    #[test]
    fn every_operation_ends_once() {
        let engines: Vec<_> = (0..3u64)
            .map(|seed| {
                std::thread::spawn(move || {
                    let mut engine = engine();
                    let mut seen = vec![false; 3000];
                    let (mut next, mut out) = (0, Vec::new());
                    let mut ended = 0;
                    while ended < seen.len() {
                        for _ in 0..(1 + (next as u64 + seed) % 40) {
                            if next < seen.len() {
                                // SAFETY: the operation refers to nothing.
                                unsafe { engine.push(&quick(), next as u64) };
                                next += 1;
                            }
                        }
                        engine.wait();
                        engine.reap(&mut out);
                        for event in out.drain(..) {
                            assert_eq!(event.result, -libc::EBADF);
                            assert!(!std::mem::replace(&mut seen[event.user as usize], true));
                            ended += 1;
                        }
                    }
                })
            })
            .collect();
        engines.into_iter().for_each(|engine| engine.join().unwrap());
    }

    #[test]
    fn an_idle_engine_sleeps() {
        let mut out = Vec::new();
        for _ in 0..200 {
            let mut engine = engine();
            let (reader, mut writer) = std::io::pipe().unwrap();
            engine.watch(reader.as_raw_fd(), WATCH | 1);
            for user in 0..3 {
                // SAFETY: the operation refers to nothing.
                unsafe { engine.push(&quick(), user) };
            }
            while out.len() < 3 {
                engine.wait();
                engine.reap(&mut out);
            }
            out.clear();
            // Whatever the pool's threads still do, a few waits later all is quiet.
            let late = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(3));
                writer.write_all(&[0; 8]).unwrap();
                writer
            });
            let mut waits = 0;
            while out.is_empty() {
                engine.wait();
                engine.reap(&mut out);
                waits += 1;
            }
            assert!(waits < 20, "{waits} waits for one event");
            assert_eq!(std::mem::take(&mut out), [Event { user: WATCH | 1, result: 1 }]);
            // The other end goes: that is told once.
            drop(late.join().unwrap());
            engine.wait();
            engine.reap(&mut out);
            out.clear();
            engine.poll(0);
            engine.reap(&mut out);
            assert!(out.is_empty());
            assert!(engine.watches.is_empty());
        }
    }

    #[test]
    fn a_disk_that_hangs_takes_no_threads_from_others() {
        const HUNG: u64 = 100;
        let (reader, writer) = std::io::pipe().unwrap();
        let (mut hung, mut other) = (engine(), engine());
        let mut bytes = [0u8; HUNG as usize];
        let iovs: Vec<_> = (bytes.iter_mut())
            .map(|byte| libc::iovec { iov_base: (&raw mut *byte).cast(), iov_len: 1 })
            .collect();
        for (user, iov) in iovs.iter().enumerate() {
            let op = Op {
                code: OpCode::Read,
                fd: reader.as_raw_fd(),
                file_id: u32::MAX - 2,
                // Of a pipe there is only the next byte, and that does not come.
                offset: u64::MAX,
                len: 0,
                iovs: iov,
                n_iovs: 1,
            };
            // SAFETY: all of it lives until the events are here.
            unsafe { hung.push(&op, user as u64) };
        }
        hung.submit();
        // SAFETY: the operation refers to nothing.
        unsafe { other.push(&Op { file_id: u32::MAX - 3, ..quick() }, 7) };
        other.submit();
        other.poll(20_000);
        let mut out = Vec::new();
        other.reap(&mut out);
        drop(writer);
        let mut ended = Vec::new();
        while ended.len() < HUNG as usize {
            hung.wait();
            hung.reap(&mut ended);
        }
        assert_eq!(out, [Event { user: 7, result: -libc::EBADF }], "it waited for another disk");
        ended.sort_by_key(|event| event.user);
        let each = (0..HUNG).map(|user| Event { user, result: 0 });
        assert!(ended.iter().copied().eq(each));
    }

    #[test]
    fn a_slow_operation_does_not_hold_up_another() {
        let mut engine = engine();
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("f")).unwrap();
        let mut out = Vec::new();
        for round in 0..50u64 {
            // Two at a time, in two submissions, so that the second finds an "idle" thread.
            for user in [2 * round, 2 * round + 1] {
                let op = Op { code: OpCode::Sync, fd: file.as_raw_fd(), ..quick() };
                // SAFETY: the file lives until both have ended.
                unsafe { engine.push(&op, user) };
                engine.submit();
            }
            let waiting = pool().state.lock().unwrap().missing();
            assert_eq!(waiting, 0, "so many wait for nobody");
            while out.len() < 2 {
                engine.wait();
                engine.reap(&mut out);
            }
            out.clear();
        }
    }
}
