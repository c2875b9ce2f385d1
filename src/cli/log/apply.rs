//! Applying entries of a log to a disk.
//!
//! Small entries come out of the window that the walk has in memory anyway; large ones the host
//! copies from file to file, or else they are read in pieces. Several writes are in flight at a time, but never two that overlap: the order of the
//! entries is the order on the disk.

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;

use crate::block::Node;
use crate::block::driver::{Plan, PlanExtent, PlanOp, Planned};
use crate::cli::lanes::Lanes;
use crate::error::{Result, ResultExt};
use crate::io::{AlignedBuf, Buffers, File};
use crate::units::{ByteRange, MIB};
use crate::write_log::{Entry, Kind, Log, Walk};

/// How much of a large entry is read and written at a time.
const PIECE: u64 = MIB;
/// How many pieces are in flight.
const LANES: usize = 8;
/// How many ranges may have been started since everything was last known to be done.
const MAX_STARTED: usize = 64;

/// Of what length pieces of the disk's file are told apart by whether they were written before, in bytes.
const CHUNK: u64 = 256 << 10;
/// How many of these are remembered: 256 GiB.
const MAX_CHUNKS: usize = 1 << 20;

/// Writes entries to a disk.
pub struct Replayer {
    log: Arc<dyn File>,
    node: Node,
    lanes: Lanes<'static>,
    /// What may be in flight.
    started: Vec<ByteRange>,
    spare: Spare,
    /// Which chunks of the disk's file the host has begun to write out, if it is to do so.
    written_out: Option<HashSet<u64>>,
}

/// Memory of pieces that are done: fresh memory would cost the host more than the copy.
type Spare = Rc<RefCell<Vec<AlignedBuf>>>;

impl Replayer {
    /// For entries of `log` on `node`, which is flushed afterwards if `is_flushed`.
    pub fn new(log: &Log, node: Node, is_flushed: bool) -> Replayer {
        Replayer {
            log: Arc::clone(log.file()),
            node,
            lanes: Lanes::new(LANES),
            started: Vec::new(),
            spare: Spare::default(),
            written_out: is_flushed.then(HashSet::new),
        }
    }

    /// Applies an entry, after all before it. It may be in flight when this returns.
    pub async fn apply(&mut self, entry: &Entry, walk: &Walk<'_>) -> Result<()> {
        let target = entry.target;
        match entry.kind() {
            Kind::Mark | Kind::Flush => Ok(()),
            Kind::Discard if target.is_empty() => Ok(()),
            Kind::Discard => {
                self.make_way_for(target).await?;
                let node = self.node.clone();
                let context = context_of(&self.node, entry);
                self.lanes
                    .push(async move { node.write_zeroes(target, true).await.context(context) })
                    .await
            }
            Kind::Write => {
                self.make_way_for(target).await?;
                self.write(entry, walk).await
            }
        }
    }

    /// Waits until all that was applied is on the disk's file (not flushed).
    pub async fn settle(&mut self) -> Result<()> {
        self.started.clear();
        self.lanes.drain().await
    }

    async fn make_way_for(&mut self, target: ByteRange) -> Result<()> {
        let in_the_way = self.started.iter().any(|range| range.overlaps(&target));
        if in_the_way || self.started.len() >= MAX_STARTED {
            self.settle().await?;
        }
        self.started.push(target);
        Ok(())
    }

    async fn write(&mut self, entry: &Entry, walk: &Walk<'_>) -> Result<()> {
        let data = entry.data().expect("a write has data");
        let at = entry.target.offset;
        if let Some(bytes) = walk.buffered(data) {
            let (node, context) = (self.node.clone(), context_of(&self.node, entry));
            let write = async move { node.write(at, bytes, false).await.context(context) };
            return self.lanes.push(write).await;
        }
        let mut done = self.copy_within_host(entry, data)?;
        while done < data.len {
            let len = (data.len - done).min(PIECE);
            let (node, log) = (self.node.clone(), Arc::clone(&self.log));
            let context = context_of(&self.node, entry);
            let (from, to) = (ByteRange { offset: data.offset + done, len }, at + done);
            let spare = Rc::clone(&self.spare);
            let copy = async move {
                let memory = spare.borrow_mut().pop();
                let memory = memory.unwrap_or_else(|| AlignedBuf::zeroed(PIECE as usize, 4096));
                let bytes = memory.buffers().slice(0, len);
                read(&*log, from, bytes.clone()).await?;
                node.write(to, bytes, false).await.context(context)?;
                // Unless the host still uses it.
                if memory.is_unshared() {
                    spare.borrow_mut().push(memory);
                }
                Ok(())
            };
            self.lanes.push(copy).await?;
            done += len;
        }
        Ok(())
    }

    /// Has the host copy an entry's data, where the disk is a file of its. Returns how much of it is
    /// done.
    fn copy_within_host(&mut self, entry: &Entry, data: ByteRange) -> Result<u64> {
        let Some(log) = self.log.as_host() else { return Ok(0) };
        let driver = self.node.driver();
        let mut plan = Plan::default();
        if driver.plan(PlanOp::Write { fua: false }, entry.target, &mut plan) == Planned::NotNow {
            return Ok(0);
        }
        match plan.extents[..] {
            [PlanExtent::File { file, offset, len }]
                if len == data.len && plan.commit.is_none() && !self.node.is_poisoned() =>
            {
                let copied = file.copy_from(offset, log, data);
                let copied = copied.context(context_of(&self.node, entry))?;
                if self.is_worth_writing_out(offset) {
                    file.begin_writeback(ByteRange { offset, len: copied });
                }
                Ok(copied)
            }
            _ => Ok(0),
        }
    }

    /// Whether the host is to begin to write out what was written to this place of the disk's file: the
    /// disk would have nothing to do until the flush at the end. What is written again and again is
    /// better written out once, then.
    fn is_worth_writing_out(&mut self, offset: u64) -> bool {
        let chunks = self.written_out.as_mut().filter(|chunks| chunks.len() < MAX_CHUNKS);
        chunks.is_some_and(|chunks| chunks.insert(offset / CHUNK))
    }
}

/// What to say before an error that concerns an entry.
fn context_of(node: &Node, entry: &Entry) -> impl FnOnce() -> String + use<> {
    let (node, entry) = (node.clone(), *entry);
    move || format!("applying entry {} ({}) to {}", entry.number, entry.target, node.name())
}

/// Reads a piece of the log. Logs are read through the page cache, which has no demands.
async fn read(log: &dyn File, range: ByteRange, into: Buffers) -> Result<()> {
    log.read(range.offset, into).await.context(|| format!("{}: reading {range}", log.name()))
}
