//! Whether plain calls on a file hold up the queue that makes them.
//!
//! A plain call beats the ring where the ring would hand the request to a kernel thread. But a host that
//! throttles its writers has each of them sleep, and with it all that the worker has to do. So when calls
//! are seen to sleep for long, those that follow go through the ring for a while.
//!
//! ```text
//! plain calls ──slow──► watched ──slow, and has slept──► suspended ──time──► watched
//!      ▲                   │ none of many was slow
//!      └───────────────────┘
//! ```
//!
//! A call may take long without having slept: other threads had the processor. Nothing is won by the
//! ring then, and a host that is busy is where its kernel threads cost most. The kernel counts the sleeps
//! of a thread, and asking for them costs a tenth of a call; so that is done for calls that are watched.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A plain call that takes this long has held up its queue. Two ticks of the coarse clock at 250
/// Hz, so that a quick call across one tick does not count.
const SLOW_MS: u64 = 8;
/// How long plain calls on a file are suspended after a slow one; doubled for each in a row.
const SUSPENSION_MS: u64 = 100;
/// Most doublings: 100 ms << 6 is 6.4 s.
const MAX_DOUBLINGS: u32 = 6;
/// How many calls are watched after a slow one. A host that throttles has a thread sleep once for some
/// thousand pages.
const WATCHED: u32 = 4096;

/// Milliseconds of the coarse monotonic clock (a tick's resolution, a few nanoseconds to read).
fn coarse_now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// How often the calling thread has slept.
fn sleeps() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure lives until the call is over, and zeros are a value of it.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nvcsw
    }
}

/// What is known of the plain calls on one file.
#[derive(Debug, Default)]
pub(super) struct SlowCalls {
    /// Of [`coarse_now_ms`].
    suspended_until_ms: AtomicU64,
    /// How many more calls to watch.
    watched: AtomicU32,
    /// Slow calls in a row; each doubles the suspension.
    streak: AtomicU32,
}

impl SlowCalls {
    /// Whether requests are to go through the ring for now.
    #[inline]
    pub(super) fn are_suspended(&self) -> bool {
        let until = self.suspended_until_ms.load(Ordering::Relaxed);
        until != 0 && coarse_now_ms() < until
    }

    /// Makes a call, and sees how long it takes.
    #[inline]
    pub(super) fn make(&self, call: impl FnOnce() -> i32) -> i32 {
        let start = coarse_now_ms();
        let before = self.is_watched().then(sleeps);
        let result = call();
        if coarse_now_ms() - start >= SLOW_MS {
            self.was_slow(before);
        } else if self.streak.load(Ordering::Relaxed) != 0 {
            self.streak.store(0, Ordering::Relaxed);
        }
        result
    }

    #[inline]
    fn is_watched(&self) -> bool {
        let left = self.watched.load(Ordering::Relaxed);
        if left != 0 {
            // Other threads may do the same; it is no matter how many it are.
            self.watched.store(left - 1, Ordering::Relaxed);
        }
        left != 0
    }

    /// `before` is how often the thread had slept before, if that was looked at.
    #[cold]
    fn was_slow(&self, before: Option<i64>) {
        if before.is_some_and(|before| sleeps() != before) {
            let streak = self.streak.fetch_add(1, Ordering::Relaxed);
            let until = coarse_now_ms() + (SUSPENSION_MS << streak.min(MAX_DOUBLINGS));
            self.suspended_until_ms.store(until, Ordering::Relaxed);
        }
        self.watched.store(WATCHED, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const LONG: Duration = Duration::from_millis(4 * SLOW_MS);

    fn sleep() -> i32 {
        std::thread::sleep(LONG);
        0
    }

    #[test]
    fn calls_that_sleep_are_suspended() {
        let calls = SlowCalls::default();
        assert_eq!(calls.make(|| 5), 5);
        calls.make(sleep);
        assert!(!calls.are_suspended(), "it may have waited for the processor alone");
        calls.make(sleep);
        assert!(calls.are_suspended());
        // Those that come after it are watched, so one is enough.
        calls.suspended_until_ms.store(1, Ordering::Relaxed);
        assert!(!calls.are_suspended());
        calls.make(sleep);
        assert!(calls.are_suspended());
        let left = calls.suspended_until_ms.load(Ordering::Relaxed) - coarse_now_ms();
        assert!(left > SUSPENSION_MS, "the second in a row: {left} ms");
    }

    #[test]
    fn calls_that_wait_for_the_processor_go_on() {
        let calls = SlowCalls::default();
        for _ in 0..3 {
            calls.make(|| {
                let start = Instant::now();
                while start.elapsed() < LONG {}
                0
            });
            assert_eq!(calls.watched.load(Ordering::Relaxed), WATCHED);
            assert!(!calls.are_suspended());
        }
        for _ in 0..WATCHED {
            calls.make(|| 0);
        }
        assert!(!calls.is_watched());
    }
}
