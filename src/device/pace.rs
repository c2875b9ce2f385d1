//! How many requests a worker takes at a time.
//!
//! Two situations want opposite things:
//!
//! * The guest's processor is another one. Small batches keep both sides busy: while the worker
//!   does ten requests the guest digests the ten before. Taking the whole ring would put both
//!   in lock-step, each sleeping while the other works.
//! * The guest shares the processor with the worker, or all processors are busy. Then nothing runs
//!   side by side anyway, each interrupt only takes the processor away from the worker, and the
//!   fewer of them the better: take all there is, announce it once.
//!
//! The kernel knows which it is: in the second case the worker is switched out against its will
//! about once for each interrupt it sends. So every so often the worker compares the two counts.
//! In large batches it sends few interrupts and the sign is gone, so it tries small ones again
//! soon; a window of them in every eight costs less than a percent.
//!
//! All that is about requests that are done in place. While the disk works on something, batches
//! are small: there each completion wakes somebody, which looks the same and is not.

#![allow(unsafe_code)]

/// Requests taken at a time when the guest runs beside us. Found by measurement: 4 costs more
/// interrupts than it hides, 16 already loses some of the overlap; 10 enters the kernel less often
/// than 8 and does as much.
const SMALL: usize = 10;
/// The same where what is done in place has to be settled before any of it is shown. Each of these
/// steps costs more the fewer it is for: at 20 a logged write costs a seventh less than at 10.
const SMALL_SETTLED: usize = 20;
/// Requests done in place that are shown to the guest together when it runs beside us.
const SMALL_SHOW: usize = 4;
/// As many as there are: no ring is larger.
const ALL: usize = 1024;
/// Interrupts between two looks at the counts.
const WINDOW: u32 = 64;
/// Windows before small batches are tried again.
const HOLD: u32 = 8;

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
}

impl Pace {
    /// The pace of a new worker: small batches.
    pub(super) fn new() -> Pace {
        Pace { all: false, interrupts: 0, switches: involuntary_switches(), hold: 0 }
    }

    /// Most requests to take from a ring at a time, with so many in flight, if they have to be
    /// settled together or not.
    #[inline]
    pub(super) fn batch(&self, in_flight: usize, are_settled: bool) -> usize {
        match (self.all && in_flight == 0, are_settled) {
            (true, _) => ALL,
            (false, true) => SMALL_SETTLED,
            (false, false) => SMALL,
        }
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
            self.all = is_crowded;
            self.hold = HOLD;
        } else if self.hold == 0 {
            self.all = false;
        } else {
            self.hold -= 1;
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
    fn a_crowded_processor_gets_large_batches_for_a_while() {
        let mut pace = Pace::new();
        window(&mut pace, 3);
        assert_eq!((pace.batch(0, false), pace.batch(0, true)), (SMALL, SMALL_SETTLED));
        for _ in 0..3 {
            window(&mut pace, i64::from(WINDOW));
            assert_eq!((pace.batch(0, false), pace.show()), (ALL, ALL));
            assert_eq!(pace.batch(0, true), ALL);
            assert_eq!(pace.batch(1, false), SMALL, "the disk is at work");
            let mut windows = 0;
            while pace.all {
                window(&mut pace, 0);
                windows += 1;
            }
            assert_eq!(windows, HOLD + 1);
        }
    }
}
