//! Waiting for a time, on any thread that runs futures.
//!
//! ```text
//! task ── sleep(d) ──► list of (time, waker) ◄── thread vublk-clock: sleeps until the first of them
//! ```
//!
//! For things that are rare in a served disk (an injected delay): one thread for all, which is there
//! only while somebody waits, so a process that never sleeps has no clock and no timer.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How long the thread stays when nobody waits.
const IDLE: Duration = Duration::from_secs(1);

/// Who waits for what.
struct Waiting {
    /// By time, and a number that tells equal times apart.
    sleepers: BTreeMap<(Instant, u64), Waker>,
    next: u64,
    /// Whether the thread is there.
    is_running: bool,
}

static WAITING: Mutex<Waiting> =
    Mutex::new(Waiting { sleepers: BTreeMap::new(), next: 0, is_running: false });
static CHANGED: Condvar = Condvar::new();

/// Completes when `duration` has passed; never earlier.
pub fn sleep(duration: Duration) -> Sleep {
    Sleep { until: Instant::now() + duration, number: None }
}

/// Future of [`sleep`].
#[derive(Debug)]
pub struct Sleep {
    until: Instant,
    /// Its number in the list, once it is there.
    number: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.until {
            return Poll::Ready(());
        }
        let mut waiting = lock();
        let number = self.number.unwrap_or(waiting.next);
        if self.number.is_none() {
            waiting.next += 1;
            self.number = Some(number);
        }
        waiting.sleepers.insert((self.until, number), context.waker().clone());
        if !waiting.is_running {
            if let Err(err) = std::thread::Builder::new().name("vublk-clock".into()).spawn(run) {
                tracing::error!("no thread for a clock, so nothing is delayed: {err}");
                return Poll::Ready(());
            }
            waiting.is_running = true;
        }
        CHANGED.notify_one();
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            lock().sleepers.remove(&(self.until, number));
        }
    }
}

/// A panic ends the process, so the lock is never poisoned.
fn lock() -> MutexGuard<'static, Waiting> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run() {
    let mut waiting = lock();
    loop {
        let now = Instant::now();
        let first = waiting.sleepers.first_key_value().map(|((at, _), _)| *at);
        match first {
            Some(at) if at <= now => {
                let Some((_, waker)) = waiting.sleepers.pop_first() else { continue };
                drop(waiting);
                waker.wake();
                waiting = lock();
            }
            _ => {
                let pause = first.map_or(IDLE, |at| at - now);
                let (guard, _) =
                    CHANGED.wait_timeout(waiting, pause).unwrap_or_else(PoisonError::into_inner);
                waiting = guard;
                if first.is_none() && waiting.sleepers.is_empty() {
                    waiting.is_running = false;
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{block_on, spawn_local};
    use std::cell::RefCell;
    use std::rc::Rc;

    #[test]
    fn sleepers_wake_in_the_order_of_their_times() {
        block_on(async {
            let order = Rc::new(RefCell::new(Vec::new()));
            for ms in [60, 20, 40] {
                let order = Rc::clone(&order);
                spawn_local(async move {
                    sleep(Duration::from_millis(ms)).await;
                    order.borrow_mut().push(ms);
                });
            }
            // One that is given up is forgotten.
            drop(sleep(Duration::from_secs(1000)));
            let started = Instant::now();
            sleep(Duration::from_millis(100)).await;
            assert!(started.elapsed() >= Duration::from_millis(100));
            assert_eq!(*order.borrow(), [20, 40, 60]);
        });
    }
}
