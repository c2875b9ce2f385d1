//! How a worker rings for the guest, and how it is got away from a bell that does not move.
//!
//! An interrupt is a number written to an eventfd of the front-end's. The descriptor does not block,
//! but that is a property of the *open file*, which both sides have: a front-end can take it back at any
//! time, fill the counter, and the next interrupt would never end. With it would hang whoever waits for
//! the worker: the message thread, a job, a change of the graph, the end of the process.
//!
//! The write stays a plain one. Who has waited for a worker for a second [nudges](Bell::nudge) it, each
//! second: a signal interrupts the write, if the worker is in one, and the notifier is given up.
//!
//! Invariants:
//! * The signal's handler does nothing, and no other system call of the worker is interrupted by it
//!   (but for the instant between a look at [`Bell::ringing`] and the signal): some of them would fail.

#![allow(unsafe_code)]

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError};
use std::time::Duration;

use super::rings::Notifier;

/// How long somebody waits for a worker before it is nudged, and until the next time.
const PATIENCE: Duration = Duration::from_secs(1);

/// A worker's bell.
#[derive(Debug, Default)]
pub(super) struct Bell {
    /// The worker's thread; 0 before it has begun.
    thread: AtomicI32,
    /// Whether the worker is writing to a notifier.
    ringing: AtomicBool,
}

impl Bell {
    /// The calling thread is the worker.
    pub(super) fn belongs_here(&self) {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    }

    /// Adds one to an eventfd of the front-end's; the worker only. A failure is the front-end's
    /// loss: the file is of its choosing. False if it kept us until somebody was tired of it.
    #[inline]
    #[must_use = "such a notifier is to be given up"]
    pub(super) fn ring(&self, notifier: &Notifier) -> bool {
        self.ringing.store(true, Ordering::Relaxed);
        let result = rustix::io::write(notifier.as_ref(), &1u64.to_ne_bytes());
        self.ringing.store(false, Ordering::Relaxed);
        result != Err(rustix::io::Errno::INTR)
    }

    /// Interrupts the worker's write, if it is in one. Any thread.
    pub(super) fn nudge(&self) {
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 && self.ringing.load(Ordering::Relaxed) {
            // SAFETY: no memory is involved. A thread that has ended rings no more; should another
            // have its number, the handler does nothing there either.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }
}

/// Waits for the answer of a worker; `nudge` is called each second that this lasts.
pub(super) fn wait<T>(answer: &Receiver<T>, nudge: impl Fn()) -> Result<T, RecvError> {
    loop {
        match answer.recv_timeout(PATIENCE) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Disconnected) => return Err(RecvError),
            Err(RecvTimeoutError::Timeout) => nudge(),
        }
    }
}

/// The signal. One that nobody else has a use for.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 7
}

/// Installs the handler, without SA_RESTART: the write is to end.
fn install() {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: all zeros is a valid `sigaction`, whose fields are then set to a handler that does
    // nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigemptyset(&mut action.sa_mask);
        let rc = libc::sigaction(signal(), &action, std::ptr::null_mut());
        debug_assert_eq!(rc, 0);
    }
}
