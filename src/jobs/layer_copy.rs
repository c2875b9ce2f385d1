//! What the layers above a base hold, and copying it down into the base.
//!
//! ```text
//! top ──► mid ──► base ──► …        held above base: what top or mid say of a range
//!  └───────┴── the first layer that holds it, or says that it is zeros, decides
//! ```
//!
//! Used by `vublk commit` and by the jobs, which differ in who may write meanwhile and in how fast
//! they go, and not in what is copied.

use crate::block::{Node, StatusKind};
use crate::error::{Result, ResultExt};
use crate::io::AlignedBuf;
use crate::units::{ByteRange, MIB, align_down, align_up};

/// How much is copied at a time, in bytes.
pub const CHUNK: u64 = MIB;

/// What layers hold of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Data.
    Data,
    /// They say that it is zeros, or they end before it.
    Zero,
    /// Nothing: it is the base's, or nobody's.
    Nothing,
}

/// What the layers from `top` down to `base`, which is not one of them, hold of a range: of how
/// much of it from its start on, and what. Without a base it is all layers.
pub async fn held_above(
    top: &Node,
    base: Option<&Node>,
    range: ByteRange,
) -> Result<(ByteRange, Held)> {
    let (mut node, mut range) = (top.clone(), range);
    loop {
        if base.is_some_and(|base| base.is_same(&node)) {
            return Ok((range, Held::Nothing));
        }
        let inside = range.intersect(&ByteRange { offset: 0, len: node.size() });
        if inside.is_empty() {
            // The layer above reads as zeros here, whatever lies further down.
            return Ok((range, Held::Zero));
        }
        let status = node.block_status(inside).await?;
        let run = status.range.intersect(&inside);
        match status.kind {
            StatusKind::Data => return Ok((run, Held::Data)),
            StatusKind::Zero => return Ok((run, Held::Zero)),
            StatusKind::Unallocated => range = run,
        }
        let Some(below) = node.backing() else { return Ok((run, Held::Nothing)) };
        node = below;
    }
}

/// A copy from the layers above a base down into it. What the disk on top reads as does not change
/// by it, so it may be stopped, killed and done again at any point.
#[derive(Clone, Debug)]
pub struct CopyDown {
    top: Node,
    base: Node,
    /// What requests to the base, and reads of the top, must be multiples of.
    align: u64,
}

impl CopyDown {
    /// From `top`, which stands on `base` (with others between, perhaps), which is writable and at
    /// least as large.
    pub fn new(top: &Node, base: &Node) -> CopyDown {
        let align = top.limits().request_alignment.max(base.limits().request_alignment);
        CopyDown { top: top.clone(), base: base.clone(), align }
    }

    /// Does what there is to do at the start of `range`; returns how much of it is done with, and
    /// how much of that had to be copied.
    pub async fn step(&self, range: ByteRange) -> Result<(u64, u64)> {
        let (run, held) = held_above(&self.top, Some(&self.base), range).await?;
        if held == Held::Nothing {
            // What is left of a unit is copied with what follows.
            let end = match run.end() == range.end() {
                true => run.end(),
                false => align_down(run.end(), self.align),
            };
            if end > range.offset {
                return Ok((end - range.offset, 0));
            }
        }
        let end = align_up(run.end(), self.align).unwrap_or(run.end()).min(self.top.size());
        let whole = ByteRange::between(align_down(run.offset, self.align), end);
        if held == Held::Zero && whole == run {
            let zeroed = self.base.write_zeroes(run, true).await;
            zeroed.context(|| format!("zeroing {run} of {}", self.base.name()))?;
            return Ok((run.len, run.len));
        }
        let part = ByteRange { offset: whole.offset, len: whole.len.min(CHUNK) };
        self.copy(part).await?;
        let done = part.end().min(range.end()) - range.offset;
        Ok((done, part.len))
    }

    /// Copies a run of the top's content, whoever holds it.
    async fn copy(&self, range: ByteRange) -> Result<()> {
        let memory =
            self.top.limits().memory_alignment.max(self.base.limits().memory_alignment).max(4096);
        let buf = AlignedBuf::zeroed(range.len as usize, memory);
        let read = self.top.read(range.offset, buf.buffers()).await;
        read.context(|| format!("reading {range} of {}", self.top.name()))?;
        let written = self.base.write(range.offset, buf.buffers(), false).await;
        written.context(|| format!("writing {range} of {}", self.base.name()))
    }
}
