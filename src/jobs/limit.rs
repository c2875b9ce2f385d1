//! The speed limit of a job.

use std::time::{Duration, Instant};

/// Spreads bytes over time. What is asked for is let through as a whole, and what comes next waits
/// until that has been paid for; so pieces larger than a second's worth work, too.
#[derive(Debug, Default)]
pub struct Limit {
    /// Bytes in a second; 0 is no limit.
    speed: u64,
    /// When all that was let through is paid for.
    paid: Option<Instant>,
}

impl Limit {
    /// Bytes in a second; 0 is no limit.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// Sets the bytes in a second. Debts of the old speed are forgotten.
    pub fn set_speed(&mut self, speed: u64) {
        self.speed = speed;
        self.paid = None;
    }

    /// Lets `bytes` through if it is time, else says when it will be.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
        if self.speed == 0 {
            return Ok(());
        }
        if let Some(paid) = self.paid.filter(|paid| *paid > now) {
            return Err(paid);
        }
        // A day is for ever, and the clock cannot be made to overflow.
        let seconds = (bytes as f64 / self.speed as f64).min(86400.0);
        self.paid = Some(now + Duration::from_secs_f64(seconds));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time() {
        let mut limit = Limit::default();
        let begin = Instant::now();
        assert_eq!(limit.take(u64::MAX, begin), Ok(()));
        limit.set_speed(1000);
        let mut now = begin;
        for _ in 0..100 {
            if let Err(at) = limit.take(100, now) {
                now = at;
                assert_eq!(limit.take(100, now), Ok(()));
            }
        }
        // The first hundred bytes were free.
        let took = (now - begin).as_secs_f64();
        assert!((took - 9.9).abs() < 1e-6, "{took}");
        limit.set_speed(1);
        assert_eq!(limit.take(u64::MAX, now), Ok(()));
        assert!(limit.take(1, now).is_err());
        limit.set_speed(0);
        assert_eq!(limit.take(1, now), Ok(()));
    }
}
