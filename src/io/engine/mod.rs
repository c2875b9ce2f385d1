//! The engine: hands operations to the host and waits for them, for one thread.
//!
//! Two implementations with one interface: an io_uring of the thread's own, and a pool of blocking
//! threads for hosts that refuse io_uring (containers often do). Kicks, completions and wake-ups
//! from other threads all arrive as [`Event`]s, so [`Engine::wait`] is the only place where the
//! thread sleeps.
//!
//! An operation refers to memory by raw pointers. Whoever pushes it keeps that memory (the iovecs
//! and what they point to) and the file alive until its completion has been reaped: the reactor's
//! slots do so for asynchronous operations, the device's request slots for planned ones.

#![allow(unsafe_code)]

mod threads;
mod uring;

use std::os::fd::RawFd;

use crate::error::Result;

pub use threads::ThreadsEngine;
pub use uring::UringEngine;

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring; where the host refuses it, threads.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Blocking calls on a pool of threads.
    Threads,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpCode {
    /// preadv.
    Read,
    /// pwritev; with `dsync` durable on completion.
    Write {
        /// Durable on completion (RWF_DSYNC).
        dsync: bool,
    },
    /// fdatasync.
    Sync,
    /// fallocate with these mode bits.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
    },
    /// BLKDISCARD, of a block device. A call like any other, which a ring has done by the threads.
    Discard,
}

/// One operation on a file.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// What to do.
    pub code: OpCode,
    /// The file's descriptor.
    pub fd: RawFd,
    /// The file's number ([`HostFile::id`](crate::io::HostFile::id)), never reused: lets the engine
    /// register it.
    pub file_id: u32,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes ([`OpCode::Allocate`] and [`OpCode::Discard`] only).
    pub len: u64,
    /// The memory of a transfer: at most [`MAX_IOVECS`] parts.
    pub iovs: *const libc::iovec,
    /// Number of parts.
    pub n_iovs: u32,
}

/// Bit of the user numbers of watches, and of nothing else.
pub const WATCH: u64 = 1 << 62;
/// Bit of the user numbers of the reactor's asynchronous operations.
pub(super) const ASYNC: u64 = 1 << 61;

/// The host's limit on parts in one transfer (UIO_MAXIOV).
pub const MAX_IOVECS: usize = 1024;

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What was passed with the operation or watch.
    pub user: u64,
    /// The result: as the system call's, errors negative. Of a watch: positive; if it could not be
    /// kept up and is over, an error.
    pub result: i32,
}

/// The engine of a thread.
#[derive(Debug)]
pub enum Engine {
    /// On io_uring.
    Uring(UringEngine),
    /// On a thread pool.
    Threads(ThreadsEngine),
}

impl Engine {
    /// Makes an engine for the calling thread, which must be the only one to use it, for about so
    /// many operations at a time (a power of two). More are possible, at a cost.
    pub fn new(kind: EngineKind, completions: u32) -> Result<Engine> {
        match kind {
            EngineKind::IoUring => Ok(Engine::Uring(UringEngine::new(completions)?)),
            EngineKind::Threads => Ok(Engine::Threads(ThreadsEngine::new()?)),
            EngineKind::Auto => match UringEngine::new(completions) {
                Ok(engine) => Ok(Engine::Uring(engine)),
                Err(err) => {
                    note_fallback(&err);
                    Ok(Engine::Threads(ThreadsEngine::new()?))
                }
            },
        }
    }

    /// What it is, for the start-up line.
    pub fn name(&self) -> &'static str {
        match self {
            Engine::Uring(_) => "io_uring",
            Engine::Threads(_) => "threads",
        }
    }

    /// Whether many operations cost one system call.
    pub fn is_ring(&self) -> bool {
        matches!(self, Engine::Uring(_))
    }

    /// Queues an operation. It starts at the next [`Engine::submit`] or [`Engine::wait`] at the
    /// latest.
    ///
    /// # Safety
    /// The iovecs, the memory behind them and the file must stay valid until the operation's event
    /// has been reaped.
    #[inline]
    pub unsafe fn push(&mut self, op: &Op, user: u64) {
        match self {
            // SAFETY: passed on to the caller.
            Engine::Uring(e) => unsafe { e.push(op, user) },
            // SAFETY: as above.
            Engine::Threads(e) => unsafe { e.push(op, user) },
        }
    }

    /// Reports an event for `user` whenever the eventfd is written to, until [`Engine::unwatch`].
    /// Several writes may be reported once; a write before the watch began may be reported too.
    pub fn watch(&mut self, fd: RawFd, user: u64) {
        match self {
            Engine::Uring(e) => e.watch(fd, user),
            Engine::Threads(e) => e.watch(fd, user),
        }
    }

    /// Ends a watch. Events already on their way may still arrive.
    pub fn unwatch(&mut self, user: u64) {
        match self {
            Engine::Uring(e) => e.unwatch(user),
            Engine::Threads(e) => e.unwatch(user),
        }
    }

    /// Starts what was queued and collects what has completed, without waiting.
    #[inline]
    pub fn submit(&mut self) {
        match self {
            Engine::Uring(e) => e.submit(),
            Engine::Threads(e) => e.submit(),
        }
    }

    /// Starts what was queued and sleeps until there is an event.
    pub fn wait(&mut self) {
        match self {
            Engine::Uring(e) => e.wait(),
            Engine::Threads(e) => e.wait(),
        }
    }

    /// Appends all events that have arrived to `out`.
    #[inline]
    pub fn reap(&mut self, out: &mut Vec<Event>) {
        match self {
            Engine::Uring(e) => e.reap(out),
            Engine::Threads(e) => e.reap(out),
        }
    }

    /// Forgets registered files, so that the kernel keeps none of them open. Call when the graph
    /// may have changed, with no planned operation in flight.
    pub fn forget_files(&mut self) {
        if let Engine::Uring(e) = self {
            e.forget_files();
        }
    }

    /// How often the thread entered the kernel to submit or wait, since the engine was made.
    pub fn enters(&self) -> u64 {
        match self {
            Engine::Uring(e) => e.enters(),
            Engine::Threads(e) => e.enters(),
        }
    }
}

/// Says once that io_uring cannot be had.
fn note_fallback(err: &crate::Error) {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        tracing::warn!("io_uring is refused here ({err}); using a pool of threads instead");
    });
}

/// `preadv2` or `pwritev2`, past the C library: its functions are places where a thread may be
/// cancelled, and to say so at each call takes a noticeable part of a cached read.
///
/// # Safety
/// As for [`Engine::push`], until the call returns.
#[inline]
unsafe fn transfer(call: libc::c_long, op: &Op, flags: libc::c_int) -> isize {
    // The offset goes in two halves, of which the first has all of it where it fits.
    let (low, high) = (op.offset as libc::c_long, 0 as libc::c_long);
    let n = libc::c_long::from(op.n_iovs);
    // SAFETY: the caller keeps memory and file valid during the call.
    unsafe { libc::syscall(call, op.fd, op.iovs, n, low, high, flags) as isize }
}

/// `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Performs a blocking transfer of the iovecs; the system call's result, errors negative.
///
/// # Safety
/// As for [`Engine::push`], until the call returns.
#[inline]
pub unsafe fn blocking(op: &Op) -> i32 {
    let offset = op.offset as libc::off_t;
    loop {
        // SAFETY: the caller keeps memory and file valid during the call.
        let rc = unsafe {
            match op.code {
                OpCode::Read => transfer(libc::SYS_preadv2, op, 0),
                OpCode::Write { dsync: false } => transfer(libc::SYS_pwritev2, op, 0),
                OpCode::Write { dsync: true } => transfer(libc::SYS_pwritev2, op, libc::RWF_DSYNC),
                OpCode::Sync => libc::fdatasync(op.fd) as isize,
                OpCode::Allocate { mode } => {
                    libc::fallocate(op.fd, mode, offset, op.len as libc::off_t) as isize
                }
                OpCode::Discard => {
                    libc::ioctl(op.fd, BLKDISCARD as _, &[op.offset, op.len]) as isize
                }
            }
        };
        if rc >= 0 {
            // Transfers are below 2 GiB (the kernel's own limit), so the count fits.
            return rc as i32;
        }
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if errno != libc::EINTR {
            return -errno;
        }
    }
}

/// Reads what is in the page cache, without waiting; `None` if it is not.
///
/// # Safety
/// As for [`Engine::push`], until the call returns.
#[inline]
pub unsafe fn nowait_read(op: &Op) -> Option<i32> {
    // SAFETY: the caller keeps memory and file valid during the call.
    let rc = unsafe { transfer(libc::SYS_preadv2, op, libc::RWF_NOWAIT) };
    // Zero (the end of the file) and errors take the usual way, which reports them.
    (rc > 0).then_some(rc as i32)
}
