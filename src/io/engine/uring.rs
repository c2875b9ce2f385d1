//! The engine on an io_uring of the thread's own.
//!
//! * `SINGLE_ISSUER | DEFER_TASKRUN`: completions are processed when this thread enters the
//!   kernel, never by interrupting it; `TASKRUN_FLAG` tells without a system call whether there is
//!   anything to enter for. Older kernels get a plain ring.
//! * Files are registered at first use, which saves a reference count per operation.
//! * The ring's own descriptor is registered, which saves one per enter.
//! * Discards of block devices, which most kernels' rings do not know, are done by the pool of the
//!   [`ThreadsEngine`]. The ring watches its descriptor.

#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, opcode, squeue, types};

use super::{ASYNC, Event, Op, OpCode, ThreadsEngine, WATCH, blocking};
use crate::error::{Error, Result, ResultExt};

/// Operations queued before the kernel must be entered. A worker takes at most a small batch at a
/// time, so this is never the limit.
const SQ_ENTRIES: u32 = 128;
/// Slots for registered files.
const FILE_SLOTS: u32 = 64;

/// See the module's text.
pub struct UringEngine {
    submitter: Submitter<'static>,
    sq: SubmissionQueue<'static>,
    cq: CompletionQueue<'static>,
    /// Files by their registered slot; `u32::MAX` is free.
    files: Vec<u32>,
    /// Whether registering works at all.
    can_register: bool,
    /// The kernel tells by a flag whether there are completions to process.
    has_taskrun_flag: bool,
    enters: u64,
    /// Watches, to arm them again when the kernel ends a multishot poll.
    watches: Vec<Watch>,
    /// Completions taken out of the queue because the kernel accepted nothing before.
    aside: Vec<Event>,
    /// Watches whose poll is among the completions taken as ended, and which are still wanted.
    ended: Vec<u64>,
    /// Does what the ring cannot. Made when there is something.
    beside: Option<ThreadsEngine>,
    /// What the halves borrow from. The last field: dropped after them.
    _ring: RingBox,
}

/// A descriptor that is watched.
struct Watch {
    user: u64,
    fd: RawFd,
    /// How often in a row its poll has ended with an error, and when it did so last.
    failures: u32,
    failed: Option<Instant>,
}

/// So many failures of a poll in a row, and the watch is given up. The pauses between them add up to a
/// quarter of a second, in case the kernel has no memory.
const MAX_FAILURES: u32 = 9;
/// Failures that are further apart are not in a row.
const IN_A_ROW: Duration = Duration::from_secs(5);

/// Owns the ring that the engine's halves borrow from.
struct RingBox(*mut IoUring);

impl Drop for RingBox {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new`; those who borrow from it are gone.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// User number of operations whose events nobody wants.
const IGNORE: u64 = u64::MAX;
/// User number of the watch on what is done beside the ring; nobody else's.
const BESIDE: u64 = WATCH | ((WATCH - 2) & !ASYNC);

impl UringEngine {
    /// Makes a ring for the calling thread, with room for so many completions (a power of two);
    /// the kernel keeps those aside that do not fit. The room counts as memory of the process.
    pub fn new(completions: u32) -> Result<UringEngine> {
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_cqsize(completions)
            .dontfork()
            .build(SQ_ENTRIES);
        let has_taskrun_flag = modern.is_ok();
        let ring = match modern {
            Ok(ring) => ring,
            Err(_) => IoUring::builder()
                .setup_cqsize(completions)
                .dontfork()
                .build(SQ_ENTRIES)
                .context(|| "io_uring_setup")?,
        };
        // Tagged resources came with the multishot polls that watches need, and those have no flag
        // of their own.
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_resource_tagging() {
            return Err(Error::unsupported("this kernel's io_uring is too old (5.13 is needed)"));
        }
        let ring = RingBox(Box::into_raw(Box::new(ring)));
        // SAFETY: the box is freed by `RingBox`, after the halves that borrow from it.
        let (mut submitter, sq, cq) = unsafe { (*ring.0).split() };
        // Both registrations only save time; without them everything works.
        let _ = submitter.register_ring_fd();
        let can_register = submitter.register_files_sparse(FILE_SLOTS).is_ok();
        Ok(UringEngine {
            submitter,
            sq,
            cq,
            files: Vec::new(),
            can_register,
            has_taskrun_flag,
            enters: 0,
            watches: Vec::new(),
            aside: Vec::new(),
            ended: Vec::new(),
            beside: None,
            _ring: ring,
        })
    }

    /// See [`super::Engine::push`].
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub unsafe fn push(&mut self, op: &Op, user: u64) {
        if op.code == OpCode::Discard {
            // SAFETY: passed on to the caller.
            return unsafe { self.push_beside(op, user) };
        }
        // An asynchronous operation has a reference to its file, and nobody calls `forget_files`
        // before it lets go of that: a registration would keep the file open, and locked.
        let slot = if user & ASYNC == 0 { self.slot_of(op) } else { None };
        let entry = match slot {
            Some(slot) => build(op, types::Fixed(slot)),
            None => build(op, types::Fd(op.fd)),
        };
        self.push_entry(entry.user_data(user));
    }

    /// Has the pool of threads do the operation.
    ///
    /// # Safety
    /// As [`super::Engine::push`].
    #[cold]
    unsafe fn push_beside(&mut self, op: &Op, user: u64) {
        if self.beside.is_none() {
            let Ok(beside) = ThreadsEngine::new() else {
                // Out of descriptors: then it is done right here.
                // SAFETY: passed on to the caller.
                let result = unsafe { blocking(op) };
                return self.aside.push(Event { user, result });
            };
            self.watch(beside.wake_fd(), BESIDE);
            self.beside = Some(beside);
        }
        if let Some(beside) = &mut self.beside {
            // SAFETY: passed on to the caller.
            unsafe { beside.push(op, user) };
            beside.submit();
        }
    }

    #[inline]
    fn push_entry(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller of `push` keeps what the entry points to valid; other entries point
        // to nothing.
        while unsafe { self.sq.push(&entry) }.is_err() {
            self.enter(0);
            if self.sq.is_full() {
                // Older kernels take nothing before completions that did not fit were reaped.
                self.set_aside();
            }
        }
    }

    /// Takes completions out of the queue, for the next `reap`.
    #[cold]
    fn set_aside(&mut self) {
        let mut aside = std::mem::take(&mut self.aside);
        self.collect(&mut aside);
        self.aside = aside;
    }

    /// The registered slot of the operation's file.
    #[inline]
    fn slot_of(&mut self, op: &Op) -> Option<u32> {
        // Nearly always one to three files: a scan beats a map.
        if let Some(slot) = self.files.iter().position(|id| *id == op.file_id) {
            return Some(slot as u32);
        }
        self.register(op)
    }

    #[cold]
    fn register(&mut self, op: &Op) -> Option<u32> {
        if !self.can_register || self.files.len() >= FILE_SLOTS as usize {
            return None;
        }
        let slot = self.files.len() as u32;
        self.submitter.register_files_update(slot, &[op.fd]).ok()?;
        self.files.push(op.file_id);
        Some(slot)
    }

    /// See [`super::Engine::forget_files`].
    pub fn forget_files(&mut self) {
        if self.files.is_empty() {
            return;
        }
        let none = vec![-1; self.files.len()];
        let _ = self.submitter.register_files_update(0, &none);
        self.files.clear();
    }

    /// See [`super::Engine::watch`].
    pub fn watch(&mut self, fd: RawFd, user: u64) {
        self.watches.push(Watch { user, fd, failures: 0, failed: None });
        self.arm(fd, user);
    }

    /// Arms a multishot poll. The eventfd's counter is never read: each write wakes the poll anew.
    fn arm(&mut self, fd: RawFd, user: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true);
        self.push_entry(poll.build().user_data(user));
    }

    /// See [`super::Engine::unwatch`].
    pub fn unwatch(&mut self, user: u64) {
        self.watches.retain(|watch| watch.user != user);
        self.push_entry(opcode::PollRemove::new(user).build().user_data(IGNORE));
        // The descriptor may be closed right after this returns.
        self.enter(0);
    }

    /// See [`super::Engine::submit`].
    #[inline]
    pub fn submit(&mut self) {
        self.sq.sync();
        if !self.sq.is_empty()
            || !self.has_taskrun_flag
            || self.sq.taskrun()
            || self.sq.cq_overflow()
        {
            self.enter(0);
        }
    }

    /// See [`super::Engine::wait`].
    pub fn wait(&mut self) {
        self.cq.sync();
        let is_empty = self.cq.is_empty()
            && self.aside.is_empty()
            && !self.beside.as_ref().is_some_and(ThreadsEngine::has_done);
        self.enter(is_empty.into());
    }

    /// Enters the kernel: submits everything queued, processes completions, waits for `want`.
    #[inline]
    fn enter(&mut self, want: u32) {
        const GETEVENTS: u32 = 1;
        self.sq.sync();
        let queued = self.sq.len() as u32;
        self.enters += 1;
        // SAFETY: no argument structure is passed.
        let result =
            unsafe { self.submitter.enter::<libc::sigset_t>(queued, want, GETEVENTS, None) };
        self.sq.sync();
        if let Err(err) = result {
            match err.raw_os_error() {
                // Interrupted; or completions must be reaped before more can be submitted.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME) => {}
                // The ring is ours, so nothing else can be wrong with it.
                _ => panic!("io_uring_enter: {err}"),
            }
        }
    }

    /// See [`super::Engine::reap`].
    #[inline]
    pub fn reap(&mut self, out: &mut Vec<Event>) {
        if !self.aside.is_empty() {
            out.append(&mut self.aside);
        }
        self.collect(out);
        // After that: what the descriptor has told of is here.
        if let Some(beside) = &self.beside {
            beside.reap_done(out);
        }
        if !self.ended.is_empty() {
            self.rearm();
        }
    }

    /// Takes what is in the completion queue.
    #[inline]
    fn collect(&mut self, out: &mut Vec<Event>) {
        self.cq.sync();
        for cqe in &mut self.cq {
            let user = cqe.user_data();
            if user == IGNORE {
                continue;
            }
            let mut result = cqe.result();
            if user & WATCH != 0 && !io_uring::cqueue::more(cqe.flags()) {
                match watch_ended(&mut self.watches, &mut self.ended, user, result) {
                    Some(reported) => result = reported,
                    None => continue,
                }
            }
            if user == BESIDE {
                if result < 0
                    && let Some(beside) = &self.beside
                {
                    // Nothing else would tell of it.
                    let fd = beside.wake_fd();
                    self.watches.push(Watch { user, fd, failures: 0, failed: None });
                    self.ended.push(user);
                }
                continue;
            }
            out.push(Event { user, result });
        }
        self.cq.sync();
    }

    /// Arms again the watches that the kernel has ended.
    #[cold]
    fn rearm(&mut self) {
        for user in std::mem::take(&mut self.ended) {
            let Some(watch) = self.watches.iter().find(|watch| watch.user == user) else {
                continue;
            };
            let fd = watch.fd;
            if watch.failures > 1 {
                std::thread::sleep(Duration::from_millis(1 << (watch.failures - 2)));
            }
            self.arm(fd, user);
        }
    }

    /// See [`super::Engine::enters`].
    pub fn enters(&self) -> u64 {
        self.enters
    }
}

/// The kernel has ended a watch's poll, as it may at any time, well or with an error. Returns what to
/// report of it, if anything: a kick may have come meanwhile.
#[cold]
fn watch_ended(
    watches: &mut Vec<Watch>,
    ended: &mut Vec<u64>,
    user: u64,
    result: i32,
) -> Option<i32> {
    // One that is not there any more was ended by ourselves.
    let at = watches.iter().position(|watch| watch.user == user)?;
    let watch = &mut watches[at];
    if result > 0 {
        watch.failures = 0;
    } else {
        let now = Instant::now();
        let is_in_a_row = watch.failed.replace(now).is_some_and(|last| now - last < IN_A_ROW);
        watch.failures = if is_in_a_row { watch.failures + 1 } else { 1 };
        if watch.failures >= MAX_FAILURES {
            let err = Error::from_errno(-result);
            tracing::error!("a descriptor cannot be watched any more: {err}");
            watches.swap_remove(at);
            return Some(result.min(-1));
        }
    }
    ended.push(user);
    Some(libc::POLLIN.into())
}

#[inline]
fn build(op: &Op, fd: impl types_use::UseFd) -> squeue::Entry {
    fd.build(op)
}

/// The crate's builders are generic over a sealed trait; this makes one function serve both kinds
/// of descriptor.
mod types_use {
    use super::*;

    pub trait UseFd {
        fn build(self, op: &Op) -> squeue::Entry;
    }

    macro_rules! use_fd {
        ($kind:ty) => {
            impl UseFd for $kind {
                #[inline]
                fn build(self, op: &Op) -> squeue::Entry {
                    // One piece of memory is not worth a list: the kernel would copy that first.
                    // SAFETY: whoever pushes the operation keeps the list valid.
                    let single = (op.n_iovs == 1).then(|| unsafe { *op.iovs });
                    match op.code {
                        OpCode::Read => match single {
                            Some(iov) => {
                                let (memory, len) = (iov.iov_base.cast(), iov.iov_len as u32);
                                opcode::Read::new(self, memory, len).offset(op.offset).build()
                            }
                            None => opcode::Readv::new(self, op.iovs, op.n_iovs)
                                .offset(op.offset)
                                .build(),
                        },
                        OpCode::Write { dsync } => {
                            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                            if let Some(iov) = single {
                                let (memory, len) = (iov.iov_base.cast(), iov.iov_len as u32);
                                return opcode::Write::new(self, memory, len)
                                    .offset(op.offset)
                                    .rw_flags(flags)
                                    .build();
                            }
                            opcode::Writev::new(self, op.iovs, op.n_iovs)
                                .offset(op.offset)
                                .rw_flags(flags)
                                .build()
                        }
                        OpCode::Sync => {
                            opcode::Fsync::new(self).flags(types::FsyncFlags::DATASYNC).build()
                        }
                        OpCode::Allocate { mode } => opcode::Fallocate::new(self, op.len)
                            .offset(op.offset)
                            .mode(mode)
                            .build(),
                        OpCode::Discard => unreachable!("done beside the ring"),
                    }
                }
            }
        };
    }

    use_fd!(types::Fd);
    use_fd!(types::Fixed);
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // The kernel tears a ring down in its own time. Who opens an image next finds it locked
        // as long as a file of ours is open, so those go now.
        self.forget_files();
        let _ = self.submitter.unregister_ring_fd();
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UringEngine({} enters)", self.enters)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const USER: u64 = WATCH | 7;

    /// What a watch reports soon.
    fn next(engine: &mut UringEngine) -> Option<Event> {
        let until = Instant::now() + Duration::from_secs(5);
        let mut events = Vec::new();
        while events.is_empty() && Instant::now() < until {
            engine.enter(0);
            engine.reap(&mut events);
            std::thread::sleep(Duration::from_millis(1));
        }
        events.first().copied()
    }

    /// Some kernels end a poll with an error of their own; here it is made to look so.
    #[test]
    fn a_watch_that_ends_with_an_error_goes_on() {
        let Ok(mut engine) = UringEngine::new(256) else { return };
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        engine.watch(kick.as_raw_fd(), USER);
        engine.enter(0);
        for _ in 0..3 {
            engine.push_entry(opcode::PollRemove::new(USER).build().user_data(IGNORE));
            // It may have missed a kick, so that is taken for one.
            assert!(next(&mut engine).is_some_and(|event| event.result > 0));
            rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
            assert!(next(&mut engine).is_some_and(|event| event.result > 0), "the watch is lost");
            rustix::io::read(&kick, &mut [0; 8]).unwrap();
        }
        engine.unwatch(USER);
        assert_eq!(next(&mut engine), None, "armed again after it was given up");
    }

    /// What cannot be watched at all is reported, once, instead of being tried for ever.
    #[test]
    fn a_watch_that_cannot_be_armed_is_given_up() {
        let Ok(mut engine) = UringEngine::new(256) else { return };
        engine.watch(-1, USER);
        let mut last = next(&mut engine).expect("a word of it");
        while last.result > 0 {
            last = next(&mut engine).expect("a word of it");
        }
        assert_eq!(last, Event { user: USER, result: -libc::EBADF });
        let kick = eventfd(1, EventfdFlags::CLOEXEC).unwrap();
        engine.watch(kick.as_raw_fd(), USER + 1);
        assert_eq!(next(&mut engine).map(|event| event.user), Some(USER + 1));
        assert_eq!(next(&mut engine), None);
    }

    #[test]
    fn what_is_done_beside_the_ring_wakes_it() {
        let Ok(mut engine) = UringEngine::new(256) else { return };
        let (iovs, n_iovs) = (std::ptr::null(), 0);
        let nowhere =
            Op { code: OpCode::Discard, fd: -1, file_id: 0, offset: 0, len: 0, iovs, n_iovs };
        let mut events = Vec::new();
        for user in 0..2000 {
            // Some end before the ring sleeps, and some while it does.
            let count = 1 + user % 3;
            for part in 0..count {
                let code = if part == 1 { OpCode::Sync } else { OpCode::Discard };
                // SAFETY: the operation refers to nothing.
                unsafe { engine.push(&Op { code, ..nowhere }, ASYNC | user << 2 | part) };
            }
            while events.len() < count as usize {
                engine.wait();
                engine.reap(&mut events);
            }
            events.sort_by_key(|event: &Event| event.user);
            for (part, event) in events.drain(..).enumerate() {
                let expected =
                    Event { user: ASYNC | user << 2 | part as u64, result: -libc::EBADF };
                assert_eq!(event, expected);
            }
        }
    }
}
