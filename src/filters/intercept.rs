//! Stands in front of a disk's driver while a job copies to or from it: so that the job's copies and
//! the guest's writes do not run over each other.
//!
//! ```text
//! guest's read, flush ───────────────────────────────► below, as if the filter were not there
//! guest's write ─► shared place in the lock ─► below ─► mark what was written ─► complete
//!                                                 └──► and to the copy, once that is asked for
//! job             alone(range, …): no write of the guest's to it is under way, and none begins
//! ```
//!
//! Jobs use it in one of two ways:
//!
//! * A **stream** fills the disk itself. It copies each range while it is alone there: it reads what
//!   the disk shows (which is the guest's where the guest has written) and writes that back.
//! * A **commit** (and whatever keeps a copy elsewhere) takes what is marked from the [`DirtyMap`]
//!   and copies it. When it is about to end, it has each write go to the copy as well
//!   ([`Intercept::mirror_to`]), so that a guest that writes faster than the job copies cannot keep
//!   it from ending. From then on it copies each range while it is alone there, too.
//!
//! Invariants:
//! * The lock is held for the time of a request or of one copied piece, never across anything that
//!   waits for a gate. So whoever drains the disk waits for requests and pieces only.
//! * A write that was not copied is marked before it completes, whatever becomes of it.

use std::sync::{Arc, Mutex};

use crate::bitmap::DirtyMap;
use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned};
use crate::block::{Node, NodeOptions, RangeGuard, RangeLock};
use crate::error::Result;
use crate::io::{AlignedBuf, Buffers, Fut, block_on};
use crate::units::{ByteRange, MIB};

/// All there is, for the lock.
const ALL: ByteRange = ByteRange { offset: 0, len: u64::MAX };
/// How much of a write is copied at a time, in bytes.
const PIECE: u64 = MIB;

/// The filter; see the [module](self).
#[derive(Debug)]
pub struct Intercept {
    below: Arc<dyn Driver>,
    /// What is below as a node, for the job's own requests.
    inner: Node,
    in_flight: Arc<RangeLock>,
    dirty: DirtyMap,
    /// Where each write goes, too.
    copy: Mutex<Option<Node>>,
}

impl Intercept {
    /// Puts it before the driver of a node that is called `name`.
    pub fn new(below: Arc<dyn Driver>, name: &str) -> Intercept {
        let options = NodeOptions { name: name.into(), ..NodeOptions::default() };
        let dirty = DirtyMap::new(below.limits().size);
        Intercept {
            inner: Node::new(Arc::clone(&below), options),
            below,
            in_flight: Arc::default(),
            dirty,
            copy: Mutex::default(),
        }
    }

    /// What it stands in front of.
    pub fn below(&self) -> &Arc<dyn Driver> {
        &self.below
    }

    /// The disk without the filter, for whoever is [`alone`](Intercept::alone) where it writes.
    pub fn inner(&self) -> &Node {
        &self.inner
    }

    /// What was written and is not copied yet.
    pub fn dirty(&self) -> &DirtyMap {
        &self.dirty
    }

    /// Waits until nobody writes to the range, and keeps it so while `work` is done: until the host
    /// has done what `work` gave it, should the future be dropped.
    pub async fn alone<T>(&self, range: ByteRange, work: impl Future<Output = T>) -> T {
        self.in_flight.alone_while(range, work).await
    }

    /// From now on each write goes to `copy` as well before it completes. Writes that began before
    /// are marked. Who else writes to `copy` what it has read here must be
    /// [`alone`](Intercept::alone) meanwhile.
    pub fn mirror_to(&self, copy: Node) {
        *self.copy.lock().unwrap() = Some(copy);
    }

    fn copy(&self) -> Option<Node> {
        self.copy.lock().unwrap().clone()
    }

    /// A place for a change of a range that is marked when it is over.
    async fn enter(&self, range: ByteRange) -> Change<'_> {
        let place = match self.in_flight.try_shared(range) {
            Some(place) => place,
            None => self.in_flight.shared(range).await,
        };
        Change { dirty: Some(&self.dirty), range, _place: place }
    }

    /// A place for a change that goes to the copy, too: alone, so that both get changes that
    /// overlap in the same order.
    async fn enter_alone(&self, range: ByteRange) -> Change<'_> {
        Change { dirty: Some(&self.dirty), range, _place: self.in_flight.exclusive(range).await }
    }

    async fn write_through(&self, offset: u64, buf: Buffers, fua: bool) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        let Some(copy) = self.copy() else {
            let _change = self.enter(range).await;
            return self.below.write(offset, buf, fua).await;
        };
        let change = self.enter_alone(range).await;
        let memory = self.below.limits().memory_alignment.max(copy.limits().memory_alignment);
        let mut copied = true;
        let mut done = 0;
        while done < range.len {
            let len = (range.len - done).min(PIECE);
            // The guest may change its memory at any time, and both must get the same.
            let piece = AlignedBuf::zeroed(len as usize, memory.max(4096));
            buf.slice(done, len).copy_to(&piece.buffers());
            self.below.write(offset + done, piece.buffers(), fua).await?;
            copied &= copy.write(offset + done, piece.buffers(), false).await.is_ok();
            done += len;
        }
        change.end(copied);
        Ok(())
    }

    async fn zero_through(&self, range: ByteRange, may_unmap: bool) -> Result<()> {
        let Some(copy) = self.copy() else {
            let _change = self.enter(range).await;
            return self.below.write_zeroes(range, may_unmap).await;
        };
        let change = self.enter_alone(range).await;
        self.below.write_zeroes(range, may_unmap).await?;
        change.end(copy.write_zeroes(range, may_unmap).await.is_ok());
        Ok(())
    }

    /// What a discard leaves is not known, so it is always marked.
    async fn discard_through(&self, range: ByteRange) -> Result<()> {
        let _change = self.enter(range).await;
        self.below.discard(range).await
    }
}

/// A change under way. Marks its range when it is over.
struct Change<'a> {
    /// `None` once there is nothing to mark.
    dirty: Option<&'a DirtyMap>,
    range: ByteRange,
    /// Given up after the mark: fields are dropped after `drop` has run.
    _place: RangeGuard<'a>,
}

impl Change<'_> {
    /// It was done, and with the copy, too, or not.
    fn end(mut self, copied: bool) {
        if copied {
            self.dirty = None;
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if let Some(dirty) = self.dirty {
            dirty.mark(self.range);
        }
    }
}

impl Driver for Intercept {
    // What is shown of the node is what it was.
    fn name(&self) -> &'static str {
        self.below.name()
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn covers(&self) -> Option<&dyn Driver> {
        Some(self.below.as_ref())
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        match op {
            PlanOp::Write { .. } => Planned::NotNow,
            _ => self.below.plan(op, range, plan),
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.below.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(self.write_through(offset, buf, fua))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.zero_through(range, may_unmap))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.discard_through(range))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        self.below.flush()
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.below.block_status(range)
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        // It must not meet a change of the job's.
        Box::pin(self.alone(ALL, async move { self.below.resume(nonce).await }))
    }

    /// A session starts with nothing left to flush, and a job that fills the disk leaves something
    /// at any time: so it is kept away, and what it left is flushed.
    fn begin_session(&self, nonce: u128) -> Result<()> {
        let (_alone, flushed) = block_on(async {
            let alone = self.in_flight.exclusive(ALL).await;
            (alone, self.below.flush().await)
        });
        flushed?;
        // Blocks by itself, which no future may.
        self.below.begin_session(nonce)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::raw::Raw;
    use crate::io::sim::{Sim, SimFile, SimTask};

    #[test]
    fn what_a_dropped_copy_left_with_the_host_undoes_nothing() {
        for seed in 0..8 {
            let file = SimFile::from_bytes("disk", vec![0; 4096]);
            let raw = Raw::open(Arc::new(file.clone()), false).unwrap();
            let intercept = Intercept::new(Arc::new(raw), "disk");
            let memory = |value| AlignedBuf::from_slice(&[value; 512], 512);
            let sim = Sim::new(seed);
            sim.attach(&file);
            let range = ByteRange { offset: 512, len: 512 };
            let (copied, written) = (memory(1), memory(2));
            let copy =
                intercept.alone(range, intercept.inner().write(512, copied.buffers(), false));
            let copy = async { copy.await.unwrap() };
            sim.run_until(vec![Box::pin(copy) as SimTask<'_>], |_| sim.pending() > 0);
            sim.detach(&file);
            let guest = async { intercept.write(512, written.buffers(), false).await.unwrap() };
            sim.run(vec![Box::pin(guest) as SimTask<'_>]);
            sim.drain();
            assert!(file.volatile()[512..1024] == [2; 512], "seed {seed}");
        }
    }
}
