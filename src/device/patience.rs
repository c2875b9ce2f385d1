//! How long a worker looks at its rings before it sleeps.

use std::time::{Duration, Instant};

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
