//! Flushes of one open file: one at a time, and what all of them must learn.
//!
//! The kernel tells a failed write-back once for each open file, to whichever sync comes first: of
//! two that run side by side one fails, and the other one succeeds although the data is gone that
//! its caller had written. So syncs of a file take turns. Who comes while one is under way waits,
//! and shares the next one with all that came meanwhile. After a failure none succeeds any more.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use crate::error::{Error, Result};

/// The flushes of an open file. Usable from any thread.
#[derive(Debug, Default)]
pub struct Flushes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether one is under way.
    running: bool,
    /// The number of the last that began, and of the last that went well.
    begun: u64,
    done: u64,
    /// Why one failed.
    failed: Option<i32>,
    waiting: Vec<Waker>,
}

/// The right to sync the file now, for as long as it lives. Dropped without a result, because its
/// sync was never made, somebody else does it again.
#[derive(Debug)]
pub struct FlushTurn {
    flushes: Arc<Flushes>,
    number: u64,
}

impl Flushes {
    /// The turn, if it can be had at once and no flush has failed.
    pub fn try_begin(self: &Arc<Self>) -> Option<FlushTurn> {
        let mut state = self.state.lock().unwrap();
        if state.running || state.failed.is_some() {
            return None;
        }
        Some(state.begin(self))
    }

    /// Waits until a flush has ended that began after this call, or has the caller make it.
    ///
    /// # Errors
    /// If a flush has failed, whoever's it was.
    pub async fn wait(self: &Arc<Self>) -> Result<Option<FlushTurn>> {
        let before = self.state.lock().unwrap().begun;
        poll_fn(|context| {
            let mut state = self.state.lock().unwrap();
            if let Some(errno) = state.failed {
                let err = Error::from_errno(errno);
                return Poll::Ready(Err(err.context("a flush of this file has failed")));
            }
            if state.done > before {
                return Poll::Ready(Ok(None));
            }
            if state.running {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(Ok(Some(state.begin(self))))
        })
        .await
    }
}

impl State {
    fn begin(&mut self, flushes: &Arc<Flushes>) -> FlushTurn {
        self.running = true;
        self.begun += 1;
        FlushTurn { flushes: Arc::clone(flushes), number: self.begun }
    }
}

impl FlushTurn {
    /// The sync has ended: `errno` is 0, or why it failed.
    pub fn end(&self, errno: i32) {
        let mut state = self.flushes.state.lock().unwrap();
        match errno {
            0 => state.done = self.number,
            errno => state.failed = Some(errno),
        }
    }
}

impl Drop for FlushTurn {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.flushes.state.lock().unwrap();
            state.running = false;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::Context;

    use super::*;

    type Waiting<'a> = Pin<&'a mut dyn Future<Output = Result<Option<FlushTurn>>>>;

    fn poll(future: &mut Waiting<'_>) -> Poll<Result<Option<FlushTurn>>> {
        future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn those_who_come_meanwhile_share_the_next_one() {
        let flushes = Arc::new(Flushes::default());
        let first = flushes.try_begin().unwrap();
        assert!(flushes.try_begin().is_none());
        let (mut a, mut b) = (pin!(flushes.wait()), pin!(flushes.wait()));
        let (mut a, mut b): (Waiting<'_>, Waiting<'_>) = (a.as_mut(), b.as_mut());
        assert!(poll(&mut a).is_pending() && poll(&mut b).is_pending());
        first.end(0);
        drop(first);
        // What the first one did says nothing of what they have written.
        let Poll::Ready(Ok(Some(turn))) = poll(&mut a) else { panic!("a does it") };
        assert!(poll(&mut b).is_pending());
        turn.end(0);
        drop(turn);
        assert!(matches!(poll(&mut b), Poll::Ready(Ok(None))));
        assert!(flushes.try_begin().is_some());
    }

    #[test]
    fn a_failure_is_everybodys() {
        let flushes = Arc::new(Flushes::default());
        let first = flushes.try_begin().unwrap();
        let mut beside = pin!(flushes.wait());
        let mut beside: Waiting<'_> = beside.as_mut();
        assert!(poll(&mut beside).is_pending());
        first.end(libc::EIO);
        drop(first);
        let Poll::Ready(Err(err)) = poll(&mut beside) else { panic!("no success after a failure") };
        assert_eq!(err.errno(), Some(libc::EIO));
        assert!(flushes.try_begin().is_none());
    }

    #[test]
    fn one_that_was_given_up_is_made_again() {
        let flushes = Arc::new(Flushes::default());
        let first = flushes.try_begin().unwrap();
        let mut beside = pin!(flushes.wait());
        let mut beside: Waiting<'_> = beside.as_mut();
        assert!(poll(&mut beside).is_pending());
        drop(first);
        assert!(matches!(poll(&mut beside), Poll::Ready(Ok(Some(_)))));
    }
}
