//! An asynchronous lock on byte ranges, shared or exclusive.
//!
//! The one lock whose guard may live across an await. Layers use it where requests that overlap
//! must not run together: to allocate a block once, to read, change and write back a sector, to
//! keep a flush apart from the changes it writes out.
//!
//! ```text
//! queue, oldest first:   [0..8 excl, granted] [8..16 shared, granted] [4..12 excl, waits]
//!                                                                          ▲
//!                        a new shared lock on 8..9 waits behind it: no overtaking
//! ```
//!
//! How it works: all requests stand in one queue in the order of arrival. A request is granted as
//! soon as no older entry of the queue (granted or waiting) conflicts with it. That is fair, and a
//! stream of readers cannot starve a writer.
//!
//! Invariants:
//! * Two granted locks that share a byte are both shared.
//! * An entry leaves the queue when its guard, or the future that waits for it, is dropped; whoever
//!   waited for it is woken.
//!
//! A guard that is dropped with a future does not wait for what that has with the host. Where that
//! matters, because what lands late would spoil what the next holder does, the lock is held by
//! [`RangeLock::alone_while`].
//!
//! Somebody who holds a lock and asks for another that an older waiter is in front of may wait for
//! himself; users state the order in which they take their locks.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use crate::io::carrying;
use crate::units::ByteRange;

/// An asynchronous lock on byte ranges. Usable from any thread; wakes waiters on theirs.
#[derive(Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    next_id: u64,
    /// Oldest first.
    entries: VecDeque<Entry>,
}

struct Entry {
    id: u64,
    range: ByteRange,
    exclusive: bool,
    granted: bool,
    /// Of the future that waits; `None` once granted.
    waker: Option<Waker>,
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        (self.exclusive || other.exclusive) && self.range.overlaps(&other.range)
    }
}

impl Queue {
    /// Grants whatever nothing older stands in the way of, and wakes it.
    fn grant(&mut self) {
        for i in 0..self.entries.len() {
            if self.entries[i].granted || !self.is_free(i) {
                continue;
            }
            self.entries[i].granted = true;
            if let Some(waker) = self.entries[i].waker.take() {
                waker.wake();
            }
        }
    }

    fn is_free(&self, i: usize) -> bool {
        self.entries.range(..i).all(|older| !older.conflicts(&self.entries[i]))
    }

    fn remove(&mut self, id: u64) {
        if let Some(at) = self.entries.iter().position(|entry| entry.id == id) {
            self.entries.remove(at);
            self.grant();
        }
    }
}

impl RangeLock {
    /// A lock that nobody holds.
    pub fn new() -> Self {
        RangeLock::default()
    }

    /// Waits until nothing older holds or wants the range exclusively. An empty range conflicts
    /// with nothing. Dropping the future gives up the place in the queue.
    pub fn shared(&self, range: ByteRange) -> Acquire<'_> {
        Acquire { lock: self, range, exclusive: false, id: None }
    }

    /// Waits until nothing older holds or wants any byte of the range. Dropping the future gives
    /// up the place in the queue.
    pub fn exclusive(&self, range: ByteRange) -> Acquire<'_> {
        Acquire { lock: self, range, exclusive: true, id: None }
    }

    /// The shared lock, if it can be had at once.
    pub fn try_shared(&self, range: ByteRange) -> Option<RangeGuard<'_>> {
        self.try_lock(range, false)
    }

    /// The exclusive lock, if it can be had at once.
    pub fn try_exclusive(&self, range: ByteRange) -> Option<RangeGuard<'_>> {
        self.try_lock(range, true)
    }

    fn try_lock(&self, range: ByteRange, exclusive: bool) -> Option<RangeGuard<'_>> {
        Some(RangeGuard { lock: self, id: self.try_enter(range, exclusive)? })
    }

    /// Appends an entry if it is granted at once; returns its number.
    fn try_enter(&self, range: ByteRange, exclusive: bool) -> Option<u64> {
        let mut queue = self.queue.lock().unwrap();
        let id = queue.enter(range, exclusive, None);
        if queue.entries.back().is_some_and(|entry| entry.granted) {
            return Some(id);
        }
        queue.remove(id);
        None
    }

    /// As [`RangeLock::try_exclusive`], with a guard that keeps the lock itself alive.
    pub fn try_exclusive_owned(self: &Arc<Self>, range: ByteRange) -> Option<OwnedRangeGuard> {
        let id = self.try_enter(range, true)?;
        Some(OwnedRangeGuard { lock: Arc::clone(self), id })
    }

    /// As [`RangeLock::exclusive`], with a guard that keeps the lock itself alive.
    pub async fn exclusive_owned(self: &Arc<Self>, range: ByteRange) -> OwnedRangeGuard {
        let guard = self.exclusive(range).await;
        let id = guard.id;
        // Its place in the queue goes over to the other.
        std::mem::forget(guard);
        OwnedRangeGuard { lock: Arc::clone(self), id }
    }

    /// Runs `work` while nobody else holds any byte of the range. What `work` has given to the host
    /// holds it, too: if the future is dropped, until the host is done.
    pub async fn alone_while<T>(
        self: &Arc<Self>,
        range: ByteRange,
        work: impl Future<Output = T>,
    ) -> T {
        let guard = Arc::new(self.exclusive_owned(range).await);
        carrying(guard, work).await
    }

    /// How many locks are held or waited for.
    pub fn len(&self) -> usize {
        self.queue.lock().unwrap().entries.len()
    }

    /// Whether nobody holds or wants anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Queue {
    /// Appends an entry, granted at once if nothing is in the way; returns its number.
    fn enter(&mut self, range: ByteRange, exclusive: bool, waker: Option<Waker>) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.entries.push_back(Entry { id, range, exclusive, granted: false, waker });
        let last = self.entries.len() - 1;
        if self.is_free(last) {
            self.entries[last].granted = true;
            self.entries[last].waker = None;
        }
        id
    }
}

impl fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let queue = self.queue.lock().unwrap();
        let mut list = f.debug_list();
        for entry in &queue.entries {
            let kind = if entry.exclusive { "exclusive" } else { "shared" };
            let state = if entry.granted { "held" } else { "waits" };
            list.entry(&format_args!("{} {kind} {state}", entry.range));
        }
        list.finish()
    }
}

/// A wait for a [`RangeLock`]. Enters the queue when first polled.
#[must_use = "futures do nothing unless awaited"]
pub struct Acquire<'a> {
    lock: &'a RangeLock,
    range: ByteRange,
    exclusive: bool,
    /// The place in the queue; taken over by the guard.
    id: Option<u64>,
}

impl<'a> Future for Acquire<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let lock = self.lock;
        let mut queue = lock.queue.lock().unwrap();
        let id = match self.id {
            Some(id) => id,
            None => {
                let id = queue.enter(self.range, self.exclusive, Some(cx.waker().clone()));
                drop(queue);
                self.id = Some(id);
                queue = lock.queue.lock().unwrap();
                id
            }
        };
        let entry = queue.entries.iter_mut().find(|entry| entry.id == id).expect("still queued");
        if entry.granted {
            drop(queue);
            self.id = None;
            return Poll::Ready(RangeGuard { lock, id });
        }
        entry.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.lock.queue.lock().unwrap().remove(id);
        }
    }
}

/// Holds a range until dropped.
#[must_use = "dropping the guard releases the range"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.queue.lock().unwrap().remove(self.id);
    }
}

/// As [`RangeGuard`], for holders that do not borrow the lock.
#[must_use = "dropping the guard releases the range"]
#[derive(Debug)]
pub struct OwnedRangeGuard {
    lock: Arc<RangeLock>,
    id: u64,
}

impl Drop for OwnedRangeGuard {
    fn drop(&mut self) {
        self.lock.queue.lock().unwrap().remove(self.id);
    }
}

impl fmt::Debug for RangeGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RangeGuard({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange { offset, len }
    }

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn readers_share_and_writers_wait() {
        let lock = RangeLock::new();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        let a = lock.try_shared(range(0, 10)).unwrap();
        let b = lock.try_shared(range(5, 10)).unwrap();
        assert!(lock.try_exclusive(range(9, 1)).is_none());
        let far = lock.try_exclusive(range(100, 1)).unwrap();
        let mut writer = pin!(lock.exclusive(range(9, 1)));
        assert!(writer.as_mut().poll(&mut cx).is_pending());
        // A later reader does not overtake the writer.
        assert!(lock.try_shared(range(9, 1)).is_none());
        assert!(lock.try_shared(range(0, 9)).is_some());
        drop(a);
        assert!(writer.as_mut().poll(&mut cx).is_pending());
        drop(b);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(writer.as_mut().poll(&mut cx).is_ready());
        drop(far);
        assert!(lock.is_empty());
    }

    #[test]
    fn a_dropped_waiter_gives_up_its_place() {
        let lock = RangeLock::new();
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        let held = lock.try_shared(range(0, 10)).unwrap();
        let mut writer = Box::pin(lock.exclusive(range(0, 10)));
        assert!(writer.as_mut().poll(&mut cx).is_pending());
        let mut reader = pin!(lock.shared(range(0, 1)));
        assert!(reader.as_mut().poll(&mut cx).is_pending());
        drop(writer);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(reader.as_mut().poll(&mut cx).is_ready());
        drop(held);
        // Granted but never polled again: dropping it must release it.
        let held = lock.try_exclusive(range(0, 10)).unwrap();
        let mut next = Box::pin(lock.exclusive(range(0, 10)));
        assert!(next.as_mut().poll(&mut cx).is_pending());
        drop(held);
        drop(next);
        assert!(lock.try_exclusive(range(0, 10)).is_some());
    }

    #[test]
    fn never_two_writers_on_a_byte() {
        // Threads hammer a few ranges; each checks that it is alone.
        let lock = Arc::new(RangeLock::new());
        let users: Arc<Vec<AtomicUsize>> = Arc::new((0..8).map(|_| AtomicUsize::new(0)).collect());
        let threads: Vec<_> = (0..4u64)
            .map(|seed| {
                let (lock, users) = (Arc::clone(&lock), Arc::clone(&users));
                std::thread::spawn(move || {
                    let mut x = seed + 1;
                    for _ in 0..2000 {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let start = (x >> 33) % 8;
                        let len = 1 + (x >> 40) % (8 - start);
                        let guard = loop {
                            if let Some(guard) = lock.try_exclusive(range(start, len)) {
                                break guard;
                            }
                            std::thread::yield_now();
                        };
                        for i in start..start + len {
                            assert_eq!(users[i as usize].fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for i in start..start + len {
                            users[i as usize].fetch_sub(1, Ordering::SeqCst);
                        }
                        drop(guard);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
