//! Writes that need no plan and no task: of a copy that the driver keeps, completed together.
//!
//! A plan says where the guest's own memory goes. A driver that must write something else besides
//! (a log, say) has no plan to offer; but a task for each request would cost more than the work.
//! Such a driver gives each worker an [`InPlace`]: the worker hands it the writes of a batch one by
//! one. Where the host takes writes in place they are performed at once; otherwise the worker has the
//! host write the driver's copy, as it does for any planned request. What is written is settled when
//! the worker has done all it does at a time.
//!
//! ```text
//! take ─► write ─► Pending ───────────────────┐
//! take ─► write ─► Submit ─► the host ─► written ─► settle ─► all of them complete
//! take ─► write ─► NotNow ─► a task, as ever
//! ```
//!
//! A write that is pending is in flight: nothing has been promised, and a FLUSH that the guest
//! submits meanwhile does not cover it.

#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::io::{Fut, HostFile, Scattered};
use crate::units::ByteRange;

/// Performs writes of one thread.
///
/// # Safety
/// What a [`Submission`] has as its data stays in its place, and as it is, until [`InPlace::written`] is
/// called for it: the host reads it meanwhile.
pub unsafe trait InPlace {
    /// Performs or prepares a write to `range`, of what `data` holds now, for a request of queue
    /// `queue`. The range is legal, as for [`Driver`](crate::block::Driver).
    fn write(&mut self, range: ByteRange, data: Scattered<'_>, queue: u16) -> Attempt<'_>;

    /// The host has performed the [`Submission`] called `token`, or could not. If it has, the write is
    /// pending now. Called once for each.
    fn written(&mut self, token: u32, has_succeeded: bool);

    /// Does what is left to be done for all that is pending. Then nothing is.
    fn settle(&mut self) -> Settled;
}

/// A write for the host to perform.
#[derive(Debug)]
pub struct Submission<'a> {
    /// The file. Stays open until the gate has drained the request.
    pub file: &'a HostFile,
    /// Where in the file.
    pub offset: u64,
    /// What to write.
    pub data: &'a [u8],
    /// Names it.
    pub token: u32,
}

/// What became of an attempt to write in place.
#[derive(Debug)]
pub enum Attempt<'a> {
    /// Nothing was done: the request needs the asynchronous path.
    NotNow,
    /// Nothing was done, but after [`InPlace::settle`] it may be.
    SettleFirst,
    /// Written. It may complete once it is settled.
    Pending,
    /// The host is to write it.
    Submit(Submission<'a>),
    /// It has failed.
    Failed(Error),
}

/// What became of all that was pending.
#[must_use]
pub enum Settled {
    /// All of it may complete, with this result.
    Done(Result<()>),
    /// All of it may complete with the result of this future: other threads have something to do
    /// first.
    Later(Fut<'static, ()>),
}

impl Settled {
    /// Both of them together: fails if one does.
    pub fn and(self, other: Settled) -> Settled {
        match (self, other) {
            (Settled::Done(Ok(())), settled) | (settled, Settled::Done(Ok(()))) => settled,
            (Settled::Done(one), Settled::Done(other)) => Settled::Done(one.and(other)),
            (one, other) => {
                let (one, other) = (one.outcome(), other.outcome());
                Settled::Later(Box::pin(async move {
                    let one = one.await;
                    other.await.and(one)
                }))
            }
        }
    }

    fn outcome(self) -> Fut<'static, ()> {
        match self {
            Settled::Done(result) => Box::pin(async move { result }),
            Settled::Later(outcome) => outcome,
        }
    }
}
