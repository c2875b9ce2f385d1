//! Several futures in flight on one thread.
//!
//! A copy keeps a fixed number of lanes busy: [`Lanes::push`] waits for a free lane and starts the
//! next piece in it, [`Lanes::drain`] waits for all. A failed piece is reported by the next call;
//! pieces already in flight are finished by `drain` even then, so that the caller knows when
//! nothing touches its buffers and files any more.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::error::{Error, Result};

/// A piece of work.
type Piece<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// A bounded number of futures in flight.
pub struct Lanes<'a> {
    lanes: Vec<Option<Piece<'a>>>,
    /// The first failure.
    failed: Option<Error>,
}

impl<'a> Lanes<'a> {
    /// `count` lanes (at least one).
    pub fn new(count: usize) -> Self {
        Lanes { lanes: (0..count.max(1)).map(|_| None).collect(), failed: None }
    }

    /// Starts a piece in a free lane, waiting for one if need be. It makes progress while this or
    /// any later call waits.
    ///
    /// # Errors
    /// The first failure of an earlier piece; the new one is not started then.
    pub async fn push(&mut self, piece: impl Future<Output = Result<()>> + 'a) -> Result<()> {
        let mut piece: Piece<'a> = Box::pin(piece);
        let free = poll_fn(|cx| {
            self.advance(cx);
            match self.lanes.iter().position(Option::is_none) {
                Some(lane) => Poll::Ready(lane),
                None => Poll::Pending,
            }
        })
        .await;
        if let Some(err) = self.failed.take() {
            // Keeps failing, so that a caller that goes on by mistake learns it again.
            self.failed = Some(Error::new(err.kind(), err.to_string()));
            return Err(err);
        }
        // Polled at once: only then does its I/O start.
        let finished = poll_fn(|cx| Poll::Ready(piece.as_mut().poll(cx))).await;
        match finished {
            Poll::Ready(result) => self.note(result),
            Poll::Pending => self.lanes[free] = Some(piece),
        }
        Ok(())
    }

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// The first failure of a piece.
    pub async fn drain(&mut self) -> Result<()> {
        poll_fn(|cx| {
            self.advance(cx);
            match self.lanes.iter().all(Option::is_none) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Polls everything in flight. There are few lanes, so telling apart which of them was woken
    /// would cost more than it saves.
    fn advance(&mut self, cx: &mut Context<'_>) {
        for lane in 0..self.lanes.len() {
            let Some(piece) = &mut self.lanes[lane] else { continue };
            if let Poll::Ready(result) = piece.as_mut().poll(cx) {
                self.lanes[lane] = None;
                self.note(result);
            }
        }
    }

    fn note(&mut self, result: Result<()>) {
        if let Err(err) = result {
            self.failed.get_or_insert(err);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use std::cell::Cell;

    /// Is pending for a number of polls.
    async fn after(polls: usize) {
        let mut left = polls;
        poll_fn(|cx| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    #[test]
    fn no_more_than_the_lanes_are_in_flight() {
        let (now, most, done) = (Cell::new(0), Cell::new(0), Cell::new(0));
        let (now, most, done) = (&now, &most, &done);
        let mut lanes = Lanes::new(3);
        block_on(async {
            for i in 0..20 {
                let piece = async move {
                    now.set(now.get() + 1);
                    most.set(most.get().max(now.get()));
                    after(i % 5).await;
                    now.set(now.get() - 1);
                    done.set(done.get() + 1);
                    Ok(())
                };
                lanes.push(piece).await.unwrap();
            }
            lanes.drain().await.unwrap();
        });
        assert_eq!((now.get(), done.get()), (0, 20));
        assert!((2..=3).contains(&most.get()), "{}", most.get());
    }

    #[test]
    fn the_first_failure_stops_the_rest() {
        let done = Cell::new(0);
        let done = &done;
        let mut lanes = Lanes::new(2);
        block_on(async {
            let slow = async move {
                after(10).await;
                done.set(1);
                Ok(())
            };
            lanes.push(slow).await.unwrap();
            lanes.push(async { Err(Error::invalid("broken")) }).await.unwrap();
            let err = lanes.push(async { panic!("must not start") }).await.unwrap_err();
            assert_eq!(err.to_string(), "broken");
            lanes.drain().await.unwrap_err();
        });
        assert_eq!(done.get(), 1);
    }
}
