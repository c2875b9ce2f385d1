//! Which queue the request came from that a thread is starting.
//!
//! A worker says so before it calls into a driver, and a driver that wants to know asks when it is
//! called, before its first await: after that the thread may be busy with another request.

use std::cell::Cell;

thread_local! {
    static QUEUE: Cell<Option<u16>> = const { Cell::new(None) };
}

/// The queue of the request that is being started on this thread, if it came from one.
pub fn queue() -> Option<u16> {
    QUEUE.get()
}

/// Says from which queue the next request comes.
pub fn set_queue(queue: Option<u16>) {
    QUEUE.set(queue);
}
