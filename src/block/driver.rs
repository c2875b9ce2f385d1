//! What every layer of a disk's stack implements.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::block::link::Link;
use crate::block::{InPlace, Keep, Node, Quiesced};
use crate::error::{Error, Result};
use crate::io::{Buffers, Fut, HostFile};
use crate::units::ByteRange;

/// Fixed properties of a driver, asked once when a [`Node`] is made and again after a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Smallest unit of reads and writes in bytes (512 or 4096; 1 for files in the page cache).
    pub request_alignment: u64,
    /// Alignment of memory that avoids a bounce buffer.
    pub memory_alignment: usize,
    /// Best request size and alignment for the host, in bytes; 0 if unknown.
    pub optimal_io: u64,
    /// Granularity at which discards have an effect, in bytes; 0 if they have none.
    pub discard_granularity: u64,
    /// Whether nothing can be written.
    pub read_only: bool,
}

/// What a planned request wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanOp {
    /// Read the range.
    Read,
    /// Write the range; with `fua` the data must be durable on completion.
    Write {
        /// Durable on completion.
        fua: bool,
    },
    /// Make everything completed so far durable. The plan lists the files to sync, with empty
    /// ranges; the range asked about is empty.
    Flush,
}

/// Answer of [`Driver::plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Planned {
    /// The plan's extents cover the range; nothing else needs to happen before or after, except
    /// what the plan's [`commit`](Plan::commit) asks for.
    Ready,
    /// The request needs the asynchronous path. The plan's content means nothing.
    NotNow,
}

/// One piece of a plan, in the order of the disk.
#[derive(Clone, Copy, Debug)]
pub enum PlanExtent<'a> {
    /// Do the I/O at `offset` of this file.
    File {
        /// The file. Stays open until the gate has drained the request.
        file: &'a HostFile,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Fill with zeros (reads only).
    Zero {
        /// How many bytes.
        len: u64,
    },
}

/// Scratch space for [`Driver::plan`], reused from request to request.
#[derive(Debug, Default)]
pub struct Plan<'a> {
    /// The pieces, covering the range in order.
    pub extents: SmallVec<[PlanExtent<'a>; 2]>,
    /// Released when the request has completed: keeps what the extents point to from being moved
    /// or reused meanwhile. `None` where nothing ever moves (raw).
    pub pin: Option<Pin>,
    /// Called when the write's data is where the extents say, before the request completes: for
    /// metadata that changes in memory only, like a bit. `None` where nothing but data changes.
    pub commit: Option<PlanCommit>,
    /// The backing of the format that plans at this moment, if it has one.
    pub(super) below: Option<&'a Link>,
}

impl<'a> Plan<'a> {
    /// Adds what is planned for a read of the backing: for formats, where a part of a range is
    /// not theirs. If it is not planned, or there is no backing, the plan's content means nothing.
    #[inline]
    pub fn read_below(&mut self, range: ByteRange) -> Planned {
        match self.below {
            Some(link) => link.plan_read(range, self),
            None => Planned::NotNow,
        }
    }

    /// Adds what another driver plans for a read: for layers that leave a part of a range to one
    /// below. Both plans' pins are kept. If it is not planned, the plan's content means nothing.
    pub fn read_through(&mut self, below: &'a dyn Driver, range: ByteRange) -> Planned {
        let before = self.pin.take();
        if below.plan(PlanOp::Read, range, self) == Planned::NotNow {
            return Planned::NotNow;
        }
        if let Some(before) = before {
            self.add_pin(before);
        }
        Planned::Ready
    }

    /// Keeps one more pin.
    pub fn add_pin(&mut self, pin: Pin) {
        self.pin = Some(match self.pin.take() {
            Some(other) => Pin(Arc::new((other.0, pin.0))),
            None => pin,
        });
    }

    /// Adds a piece, to the one before it where they are one.
    #[inline]
    pub fn push(&mut self, extent: PlanExtent<'a>) {
        match (self.extents.last_mut(), &extent) {
            (
                Some(PlanExtent::File { file: last, offset: start, len }),
                PlanExtent::File { file, offset, len: more },
            ) if last.id() == file.id() && *start + *len == *offset => *len += more,
            (Some(PlanExtent::Zero { len }), PlanExtent::Zero { len: more }) => *len += more,
            _ => self.extents.push(extent),
        }
    }
}

/// Takes note of planned writes whose data has been written.
pub trait CommitPlanned: Send + Sync {
    /// The data of `range` has been written (not flushed). Reads see it when this returns. Called
    /// on the thread that served the request; must not wait.
    ///
    /// # Errors
    /// The request fails with it.
    fn written(&self, range: ByteRange) -> Result<Committed>;

    /// The data of `range` was not written, or not all of it: nothing is to change.
    fn abandoned(&self, range: ByteRange);

    /// The data of two planned writes, of which the second begins where the first ends, has been
    /// written. True if [`written`](CommitPlanned::written) for all of it shall do for both: then
    /// nothing else is called for `next`.
    fn join(&self, _range: ByteRange, _next: ByteRange) -> bool {
        false
    }
}

/// What [`PlanCommit::written`] leaves to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Committed {
    /// The request may complete.
    Done,
    /// The node must be flushed first: what changed cannot be kept across the death of this
    /// process otherwise.
    FlushFirst,
}

/// The second half of a planned write: exactly one of the two methods of [`CommitPlanned`] is
/// called for it, `abandoned` if this is dropped.
#[must_use]
pub struct PlanCommit {
    /// `None` once it was called.
    owner: Option<Arc<dyn CommitPlanned>>,
    /// In the owner's terms, whatever filters above make of it.
    range: ByteRange,
}

impl PlanCommit {
    /// Makes `owner` learn what becomes of a planned write to `range`.
    pub fn new(owner: Arc<dyn CommitPlanned>, range: ByteRange) -> PlanCommit {
        PlanCommit { owner: Some(owner), range }
    }

    /// Takes in the commit of another write, if its owner would as well learn of both at once; else
    /// gives it back. The data of both has been written.
    pub fn join(&mut self, mut next: PlanCommit) -> std::result::Result<(), PlanCommit> {
        match (&self.owner, &next.owner) {
            (Some(owner), Some(other))
                if Arc::ptr_eq(owner, other)
                    && self.range.end() == next.range.offset
                    && owner.join(self.range, next.range) =>
            {
                self.range.len += next.range.len;
                next.owner = None;
                Ok(())
            }
            _ => Err(next),
        }
    }

    /// The data has been written.
    pub fn written(mut self) -> Result<Committed> {
        self.owner.take().map_or(Ok(Committed::Done), |owner| owner.written(self.range))
    }
}

impl Drop for PlanCommit {
    fn drop(&mut self) {
        if let Some(owner) = self.owner.take() {
            owner.abandoned(self.range);
        }
    }
}

impl fmt::Debug for PlanCommit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlanCommit({})", self.range)
    }
}

/// Keeps an extent in place while a planned request uses it. Dropping it releases the extent. An
/// `Arc`, so that a format which only counts users can hand out clones and allocate nothing.
pub struct Pin(pub Arc<dyn Send + Sync>);

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pin")
    }
}

/// What [`Driver::block_status`] says of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusKind {
    /// Holds data.
    Data,
    /// Reads as zeros and this layer says so.
    Zero,
    /// Nothing here: this layer leaves it to its backing (or to zeros without one).
    Unallocated,
}

/// A run of a disk and what is known of it without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// The run; never empty.
    pub range: ByteRange,
    /// What is there.
    pub kind: StatusKind,
    /// Where in which file (its name) the bytes lie as they are, if they do.
    pub host: Option<(String, u64)>,
    /// How many backing files down the answer was found; 0 is the top.
    pub depth: u32,
    /// Whether the data is stored compressed.
    pub compressed: bool,
}

/// A layer of a disk: a format, a filter, or the raw file at the bottom.
///
/// Callers go through a [`Node`], which guarantees: ranges lie inside the disk, are aligned to
/// [`Limits::request_alignment`] and not empty, and nothing is written to a read-only layer.
///
/// Futures are local (not `Send`) and may be dropped at any await: no metadata may be left half
/// changed by that, and buffers stay alive by themselves. No method may hold a lock guard across
/// an await, except an asynchronous range lock.
pub trait Driver: Send + Sync + fmt::Debug {
    /// The driver's name as QEMU has it (`raw`, `qcow2`, …), or ours.
    fn name(&self) -> &'static str;

    /// Fixed properties.
    fn limits(&self) -> Limits;

    /// The driver that this one stands in front of within a node, if it does. What this one does not say
    /// of the image, its neighbours and what is kept for it, that one says.
    fn covers(&self) -> Option<&dyn Driver> {
        None
    }

    /// Resolves a request to file extents without waiting, taking no lock that anybody holds for
    /// long and allocating nothing that grows with the request. Nothing that can be read may change
    /// by it, whether or not the plan is carried out: giving a block a place in memory that reads
    /// as the block did before is allowed. See [`PlanOp`].
    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let _ = (op, range, plan);
        Planned::NotNow
    }

    /// A way to perform writes of this thread in place, for a driver that has no plan for them and
    /// still need not wait. Asked once for each thread; it must not outlive the driver's use.
    fn in_place(self: Arc<Self>) -> Option<Box<dyn InPlace>> {
        None
    }

    /// Reads `buf.len()` bytes at `offset`.
    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()>;

    /// Writes `buf.len()` bytes at `offset`; with `fua` durable on completion, mapping included.
    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()>;

    /// Makes the range read as zeros; with `may_unmap` its space may be freed.
    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()>;

    /// Frees the range's space as far as that is cheap. Reads afterwards give old data or zeros,
    /// never data of another place or of a backing file.
    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()>;

    /// Makes everything completed before this call durable: data, mapping, log, bits.
    ///
    /// # Errors
    /// Then what was lost is taken to be unknown, and nothing is written any more, unless the error
    /// says that nothing was ([`Error::lost_nothing`]).
    fn flush<'a>(&'a self) -> Fut<'a, ()>;

    /// What is known of the range from its start on without reading data. Answers for at least the
    /// first byte and may stop before the end of `range`.
    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus>;

    /// Changes the size of the disk. New space reads as zeros. Called only while quiesced.
    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        let _ = size;
        Box::pin(async move {
            Err(Error::unsupported(format!("{} images cannot be resized", self.name())))
        })
    }

    /// Looks at the size of what is below again: the host may have grown a device or file.
    /// [`Driver::limits`] tells the result. The gates of all that reach this layer are closed.
    fn refresh(&self, quiesced: &Quiesced) -> Result<()> {
        let _ = quiesced;
        Ok(())
    }

    /// Forgets what this layer holds, so that all of the disk reads as what is below; whatever the
    /// size of the disk, at once. With `discard` the space of what is forgotten goes back to the host
    /// as well, which takes as long as the host needs. Durable on return. Nothing may be in flight.
    fn make_empty<'a>(&'a self, discard: bool) -> Fut<'a, ()> {
        let _ = discard;
        Box::pin(async move {
            Err(Error::unsupported(format!("{} images are not emptied here", self.name())))
        })
    }

    /// Shows another state of a log from now on (`state` is its name): for drivers that show one. The
    /// gates of all that read through it are closed.
    ///
    /// # Errors
    /// If there is no such state; then nothing has changed.
    fn show_state(&self, state: &str, quiesced: &Quiesced) -> Result<()> {
        let _ = (state, quiesced);
        Err(Error::unsupported(format!("{} images are no states of a log", self.name())))
    }

    /// The nodes below this one, with the role each plays ("file", "backing").
    fn children(&self) -> Vec<(&'static str, Node)> {
        self.covers().map(Driver::children).unwrap_or_default()
    }

    /// Whether this is a filter: its one child, `file`, is the disk that it shows. For changes of the
    /// graph that child is its backing.
    fn is_filter(&self) -> bool {
        false
    }

    /// Whether the node that plans lead to has another driver by now, so that nothing is planned any
    /// more: [`Driver::on_backing`] with the same node mends that.
    fn is_behind(&self) -> bool {
        false
    }

    /// The same layer, of the same state, on another node (or none) as its backing: plans lead through
    /// the backing, so it cannot change under them. The guard proves that nobody uses this driver;
    /// nobody must afterwards.
    ///
    /// # Errors
    /// If this driver has no backing that could change, or cannot stand on that one. Nothing has
    /// changed then.
    fn on_backing(&self, backing: Option<Node>, quiesced: &Quiesced) -> Result<Arc<dyn Driver>> {
        let _ = (backing, quiesced);
        Err(Error::unsupported(format!("the backing of {} nodes cannot be changed", self.name())))
    }

    /// An overlay is about to be made. If overlays know this image by something that its next
    /// change would renew, it is renewed now, so that it stays from now on.
    fn prepare_for_overlay<'a>(&'a self) -> Fut<'a, ()> {
        self.covers().map_or_else(nothing, Driver::prepare_for_overlay)
    }

    /// An overlay was put on this layer, and nothing is written to it any more. It has been flushed; where
    /// that means nothing, what is in memory only is written all the same: nothing is kept of it for the
    /// guests that are still to come.
    fn freeze<'a>(&'a self) -> Fut<'a, ()> {
        self.covers().map_or_else(nothing, Driver::freeze)
    }

    /// What overlays know this image by, as it is or `once_changed`; `None` if they know it by nothing
    /// that changes.
    fn identity(&self, once_changed: bool) -> Option<u128> {
        self.covers()?.identity(once_changed)
    }

    /// The backing is about to change, where this layer hides it, and to have `identity` then (see
    /// [`Driver::identity`]). From now on this layer knows it as it is and as it will be, and by nothing
    /// else; so when the change is over this is called again, with what it has then. Durable on return.
    /// Nothing may be in flight.
    ///
    /// # Errors
    /// If this layer cannot; then nothing has changed, and the backing must not.
    fn follow_backing<'a>(&'a self, identity: u128) -> Fut<'a, ()> {
        self.covers().map_or_else(nothing, |covered| covered.follow_backing(identity))
    }

    /// The layer has no backing and is about to be put on one that has `identity`. If it holds nothing
    /// yet, and knows the image that it was made for by an earlier identity of that, it knows it by this
    /// one from now on; durable on return. Returns whether that is so.
    fn adopt_backing<'a>(&'a self, identity: u128) -> Fut<'a, bool> {
        match self.covers() {
            Some(covered) => covered.adopt_backing(identity),
            None => Box::pin(async { Ok(false) }),
        }
    }

    /// Checks that [`Driver::rename_backing`] can be done, as far as that can be told before.
    ///
    /// # Errors
    /// What is in the way.
    fn check_rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        self.covers().map_or_else(nothing, |covered| covered.check_rename_backing(backing))
    }

    /// Has the image's own metadata name another backing file and its format, or none; durable on
    /// return, and at any instant the old name or the new one. What it names shows the same where
    /// this layer leaves it to its backing; whoever asks sees to that. The node below stays.
    ///
    /// # Errors
    /// If this cannot be done here; then the old name stands.
    fn rename_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> Fut<'a, ()> {
        if let Some(covered) = self.covers() {
            return covered.rename_backing(backing);
        }
        Box::pin(async move {
            Err(Error::unsupported(format!(
                "{} images cannot be made to name another backing file here",
                self.name()
            )))
        })
    }

    /// Format-specific facts for `info`, as JSON; `null` if there are none.
    fn details(&self) -> serde_json::Value {
        self.covers().map(Driver::details).unwrap_or_default()
    }

    /// Decides what happens to metadata that outlived an earlier process (see
    /// [`Keep`](crate::block::keep)): the guest of session `nonce` came back and must find every
    /// write it saw completed, or (`None`) a new guest starts and only what was flushed counts.
    /// Called before the first request. Drivers that keep nothing have nothing to do.
    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        self.covers().map_or_else(nothing, |covered| covered.resume(nonce))
    }

    /// Starts a session of a guest whose writes must outlive this process; `nonce` names it. What is
    /// left to flush is flushed first, on this thread. Where that session runs already, it goes on
    /// as it is.
    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.covers().map_or(Ok(()), |covered| covered.begin_session(nonce))
    }

    /// The keep of this driver, if it has one: completed writes may be there and nowhere else.
    fn keep(&self) -> Option<&Keep> {
        self.covers()?.keep()
    }

    /// Flushes and leaves the image in its cleanest state. Nothing is called afterwards.
    fn close<'a>(&'a self) -> Fut<'a, ()> {
        self.covers().map_or_else(|| self.flush(), Driver::close)
    }
}

/// Done.
fn nothing<'a>() -> Fut<'a, ()> {
    Box::pin(async { Ok(()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Heard(Mutex<Vec<(&'static str, u64)>>);

    impl CommitPlanned for Heard {
        fn written(&self, range: ByteRange) -> Result<Committed> {
            self.0.lock().unwrap().push(("written", range.offset));
            Ok(Committed::FlushFirst)
        }

        fn abandoned(&self, range: ByteRange) {
            self.0.lock().unwrap().push(("abandoned", range.offset));
        }
    }

    #[test]
    fn a_planned_write_is_heard_of_exactly_once() {
        let heard = Arc::new(Heard::default());
        let commit = |offset| {
            let owner = Arc::clone(&heard) as Arc<dyn CommitPlanned>;
            PlanCommit::new(owner, ByteRange { offset, len: 512 })
        };
        assert_eq!(commit(512).written().unwrap(), Committed::FlushFirst);
        drop(Plan { commit: Some(commit(1024)), ..Plan::default() });
        assert_eq!(*heard.0.lock().unwrap(), [("written", 512), ("abandoned", 1024)]);
    }

    #[test]
    fn pieces_that_go_on_in_the_same_file_are_one() {
        let file = || {
            let file = tempfile::NamedTempFile::new().unwrap();
            HostFile::open(file.path(), crate::io::OpenOptions::default()).unwrap()
        };
        let (one, other) = (file(), file());
        let mut plan = Plan::default();
        for (file, offset) in [(&one, 0), (&one, 512), (&other, 1024), (&other, 512)] {
            plan.push(PlanExtent::File { file, offset, len: 512 });
        }
        plan.push(PlanExtent::Zero { len: 512 });
        plan.push(PlanExtent::Zero { len: 1024 });
        let found = plan.extents.iter().map(|extent| match extent {
            PlanExtent::File { file, offset, len } => (Some((file.id(), *offset)), *len),
            PlanExtent::Zero { len } => (None, *len),
        });
        let expected = [
            (Some((one.id(), 0)), 1024),
            (Some((other.id(), 1024)), 512),
            (Some((other.id(), 512)), 512),
            (None, 1536),
        ];
        assert_eq!(found.collect::<Vec<_>>(), expected);
    }
}
