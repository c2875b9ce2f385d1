//! Writes that need no plan and no task: performed at once, completed together.
//!
//! A plan says where the guest's own memory goes. A driver that must write something else besides
//! (a log, say) has no plan to offer; but where the host takes writes in place, it need not wait
//! either, and a task for each request would cost more than the work. Such a driver gives each
//! worker an [`InPlace`]: the worker hands it the writes of a batch one by one, and settles them
//! when it has taken all it takes at a time.
//!
//! ```text
//! take ─► write ─► Pending ┐
//! take ─► write ─► Pending ├─► settle ─► all of them complete
//! take ─► write ─► NotNow ─┼─► a task, as ever
//! ```
//!
//! A write that is pending is in flight: nothing has been promised, and a FLUSH that the guest
//! submits meanwhile does not cover it.

use crate::error::{Error, Result};
use crate::io::{Fut, Scattered};
use crate::units::ByteRange;

/// Performs writes of one thread in place.
pub trait InPlace {
    /// Performs a write to `range`, of what `data` holds now, for a request of queue `queue`. The
    /// range is legal, as for [`Driver`](crate::block::Driver).
    fn write(&mut self, range: ByteRange, data: Scattered<'_>, queue: u16) -> Attempt;

    /// Does what is left to be done for all that is pending. Then nothing is.
    fn settle(&mut self) -> Settled;
}

/// What became of an attempt to write in place.
#[derive(Debug)]
pub enum Attempt {
    /// Nothing was done: the request needs the asynchronous path.
    NotNow,
    /// Nothing was done, but after [`InPlace::settle`] it may be.
    SettleFirst,
    /// Written. It may complete once it is settled.
    Pending,
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
