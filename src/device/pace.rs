//! How many requests a worker takes at a time.
//!
//! Two situations want opposite things:
//!
//! * The guest's processor is another one. Small batches keep both sides busy: while the worker
//!   does eight requests the guest digests the eight before. Taking the whole ring would put both
//!   in lock-step, each sleeping while the other works.
//! * The guest shares the processor with the worker, or all processors are busy. Then nothing runs
//!   side by side anyway, each interrupt only takes the processor away from the worker, and the
//!   fewer of them the better: take all there is, announce it once.
//!
//! The kernel knows which it is: in the second case the worker is switched out against its will
//! about once for each interrupt it sends. So every so often the worker compares the two counts.
//! In large batches it sends few interrupts and the sign is gone, so now and then it tries small
//! ones again, the more rarely the longer that has not helped.

#![allow(unsafe_code)]

use std::time::{Duration, Instant};

/// Requests taken at a time when the guest runs beside us. Found by measurement: 4 costs more
/// interrupts than it hides, 16 already loses some of the overlap.
const SMALL: usize = 8;
/// Requests done in place that are shown to the guest together when it runs beside us.
const SMALL_SHOW: usize = 4;
/// As many as there are: no ring is larger.
const ALL: usize = 1024;
/// Interrupts between two looks at the counts.
const WINDOW: u32 = 64;
/// Windows before small batches are tried again, at first and at most.
const HOLD: (u32, u32) = (64, 4096);

/// A worker's pace. Belongs to its thread.
#[derive(Debug)]
pub(super) struct Pace {
    all: bool,
    /// Interrupts sent in this window.
    interrupts: u32,
    /// Involuntary switches of this thread when the window began.
    switches: i64,
    /// Windows that are left before small batches are tried again.
    hold: u32,
    /// How long to hold next time.
    next_hold: u32,
}

impl Pace {
    /// The pace of a new worker: small batches.
    pub(super) fn new() -> Pace {
        Pace {
            all: false,
            interrupts: 0,
            switches: involuntary_switches(),
            hold: 0,
            next_hold: HOLD.0,
        }
    }

    /// Most requests to take from a ring at a time.
    #[inline]
    pub(super) fn batch(&self) -> usize {
        if self.all { ALL } else { SMALL }
    }

    /// Most requests done in place to keep from the guest.
    #[inline]
    pub(super) fn show(&self) -> usize {
        if self.all { ALL } else { SMALL_SHOW }
    }

    /// An interrupt was sent.
    #[inline]
    pub(super) fn interrupted(&mut self) {
        self.interrupts += 1;
        if self.interrupts >= WINDOW {
            self.look(involuntary_switches());
        }
    }

    /// The end of a window: decides on the pace of the next.
    #[cold]
    fn look(&mut self, switches: i64) {
        let taken_away = switches - self.switches;
        let is_crowded = taken_away * 2 > i64::from(self.interrupts);
        self.interrupts = 0;
        self.switches = switches;
        if !self.all {
            if is_crowded {
                self.all = true;
                self.hold = self.next_hold;
                self.next_hold = (self.next_hold * 2).min(HOLD.1);
            } else {
                self.next_hold = HOLD.0;
            }
        } else if self.hold == 0 {
            self.all = false;
        } else {
            self.hold -= 1;
        }
    }
}

/// How long an idle worker looks at its rings before it sleeps, if the operator allows it to.
///
/// Looking pays when the guest's next request comes sooner than a wake-up would take. So the time
/// doubles, up to the operator's limit, when a look found something, and halves when it did not: a
/// guest that has gone quiet costs little, and one that comes back is soon waited for again.
#[derive(Debug)]
pub(super) struct Patience {
    limit: Duration,
    now: Duration,
}

impl Patience {
    /// Looks for at most `limit_us` microseconds; zero never looks.
    pub(super) fn new(limit_us: u32) -> Patience {
        let limit = Duration::from_micros(limit_us.into());
        Patience { limit, now: limit }
    }

    /// Calls `look` until it finds something or the time is over. True if it did.
    #[inline]
    pub(super) fn wait_for(&mut self, look: impl FnMut() -> bool) -> bool {
        !self.limit.is_zero() && self.look_for(look)
    }

    #[cold]
    fn look_for(&mut self, mut look: impl FnMut() -> bool) -> bool {
        let until = Instant::now() + self.now;
        loop {
            // Reading the clock costs more than a look.
            for _ in 0..16 {
                if look() {
                    self.now = (self.now * 2).min(self.limit);
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= until {
                self.now = (self.now / 2).max(self.limit / 16);
                return false;
            }
        }
    }
}

/// How often this thread has been switched out while it wanted to go on.
fn involuntary_switches() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure; if it does not, it is zeros, which are valid too.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nivcsw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a window of interrupts, of which so many took the processor away.
    fn window(pace: &mut Pace, taken_away: i64) {
        pace.interrupts = WINDOW;
        pace.look(pace.switches + taken_away);
    }

    #[test]
    fn patience_follows_what_looking_brought() {
        assert!(!Patience::new(0).wait_for(|| unreachable!("never looks")));
        let mut patience = Patience::new(64);
        for _ in 0..8 {
            assert!(!patience.wait_for(|| false));
        }
        assert_eq!(patience.now, Duration::from_micros(4));
        assert!(patience.wait_for(|| true));
        assert_eq!(patience.now, Duration::from_micros(8));
        for _ in 0..8 {
            assert!(patience.wait_for(|| true));
        }
        assert_eq!(patience.now, Duration::from_micros(64));
    }

    #[test]
    fn a_crowded_processor_gets_large_batches_for_ever_longer() {
        let mut pace = Pace::new();
        window(&mut pace, 3);
        assert_eq!(pace.batch(), SMALL);
        for round in 0..3 {
            window(&mut pace, i64::from(WINDOW));
            assert_eq!((pace.batch(), pace.show()), (ALL, ALL));
            let mut windows = 0;
            while pace.all {
                window(&mut pace, 0);
                windows += 1;
            }
            assert_eq!(windows, (HOLD.0 << round) + 1);
        }
        // Small batches help again: the next time starts from the beginning.
        window(&mut pace, 0);
        assert_eq!(pace.next_hold, HOLD.0);
    }
}
