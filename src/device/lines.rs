//! How many lines a front-end or its guest can put into the log.
//!
//! Most of what is worth a line can be caused again and again by who is at the other end: by a message
//! that is refused, a queue that is started in vain, a connection that comes and goes. So these lines
//! are paid for. An honest front-end does not come near the limit; another one cannot fill the disk that
//! the log is on. What is left out is counted, and there at level debug.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that may come at once: a few for each queue of a large guest.
const BURST: u32 = 128;
/// How long it takes until there may be one more.
const REFILL: Duration = Duration::from_secs(1);

/// The lines of one device.
#[derive(Debug)]
pub(super) struct Lines(Mutex<Account>);

#[derive(Debug)]
struct Account {
    left: u32,
    /// Up to when refills have been counted.
    counted: Instant,
    left_out: u64,
}

impl Lines {
    /// The lines of a new device.
    pub(super) fn new() -> Lines {
        Lines(Mutex::new(Account { left: BURST, counted: Instant::now(), left_out: 0 }))
    }

    /// Whether a line may be written now, which it is to be then.
    pub(super) fn allow(&self) -> bool {
        let paid = self.0.lock().expect("the lines' lock is poisoned").pay(Instant::now());
        if let Some(left_out @ 1..) = paid {
            tracing::warn!("{left_out} lines about front-ends were left out");
        }
        paid.is_some()
    }
}

impl Account {
    /// Pays for a line; says how many were left out before.
    fn pay(&mut self, now: Instant) -> Option<u64> {
        let refills = now.saturating_duration_since(self.counted).as_secs() / REFILL.as_secs();
        let refills = u32::try_from(refills).unwrap_or(u32::MAX);
        self.counted += REFILL * refills;
        self.left = self.left.saturating_add(refills).min(BURST);
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out += 1;
                None
            }
        }
    }
}

/// Logs a line that the account allows; at level debug if it does not.
macro_rules! limited {
    ($lines:expr, $level:ident, $($line:tt)+) => {
        if $lines.allow() { tracing::$level!($($line)+) } else { tracing::debug!($($line)+) }
    };
}
pub(super) use limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_with_time() {
        let start = Instant::now();
        let mut account = Account { left: BURST, counted: start, left_out: 0 };
        let at = |secs: u64| start + Duration::from_millis(1000 * secs + 500);
        for _ in 0..BURST {
            assert_eq!(account.pay(at(0)), Some(0));
        }
        assert_eq!([(); 3].map(|()| account.pay(at(0))), [None; 3]);
        assert_eq!([(); 2].map(|()| account.pay(at(1))), [Some(3), None]);
        assert_eq!([(); 3].map(|()| account.pay(at(3))), [Some(1), Some(0), None]);
        // No more than at the beginning, however long nothing was said.
        let paid = (0..1000).filter(|_| account.pay(at(100_000_000)).is_some()).count();
        assert_eq!(paid, BURST as usize);
    }
}
