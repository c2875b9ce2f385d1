//! What layers of a chain hold, and copying it: down into a base, or up into the top.
//!
//! ```text
//! top ──► mid ──► base ──► …        held above base: what top or mid say of a range
//!  └───────┴── the first layer that holds it, or says that it is zeros, decides
//!
//! CopyDown   what is held above base ──► base       commit
//! FillUp     what is held between top and base ──► top        stream
//! ```
//!
//! Used by `vublk commit` and by the jobs, which differ in who may write meanwhile and in how fast
//! they go, and not in what is copied. Either copy leaves what the disk on top reads as at it is, so
//! it may be stopped, killed and done again at any point.

use crate::block::{Node, StatusKind};
use crate::error::{Error, Result, ResultExt};
use crate::filters::Intercept;
use crate::io::{AlignedBuf, Fut};
use crate::jobs::Operation;
use crate::units::{ByteRange, MIB, align_down, align_up};

/// How much is copied at a time, in bytes.
pub const CHUNK: u64 = MIB;
/// How much is zeroed at a time where that keeps a guest's writes waiting, in bytes.
const ZERO_CHUNK: u64 = 16 * MIB;

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

/// How far a step has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// How much of the range, from its start on, is done with, in bytes; never 0.
    pub done: u64,
    /// How much of the host's time that took, in bytes that were copied.
    pub copied: u64,
}

/// A step that failed.
#[derive(Debug)]
pub struct Failed {
    /// What was being done.
    pub operation: Operation,
    /// Why it failed.
    pub error: Error,
    /// How much of the range, from its start on, has to be left out to go on without it.
    pub skip: u64,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Error {
        failed.error
    }
}

impl Failed {
    fn new(operation: Operation, error: Error, skip: u64) -> Failed {
        Failed { operation, error, skip }
    }
}

/// Copies ranges, step by step.
pub trait Copier {
    /// Does what there is to do at the start of `range`, which is not empty.
    fn step<'a>(&'a self, range: ByteRange) -> Stepping<'a>;
}

/// A step under way.
pub type Stepping<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Step, Failed>> + 'a>>;

/// A copy from the layers above a base down into it.
#[derive(Clone, Debug)]
pub struct CopyDown<'a> {
    top: Node,
    base: Node,
    /// What requests to the base, and reads of the top, must be multiples of.
    align: u64,
    /// Where a guest's writes pass that go to both meanwhile.
    mirror: Option<&'a Intercept>,
}

impl<'a> CopyDown<'a> {
    /// From `top`, which stands on `base` (with others between, perhaps), which is writable and at
    /// least as large. Nobody else writes to the base. Behind the end of the top there are zeros to
    /// be copied.
    pub fn new(top: &Node, base: &Node) -> CopyDown<'a> {
        let align = top.limits().request_alignment.max(base.limits().request_alignment);
        CopyDown { top: top.clone(), base: base.clone(), align, mirror: None }
    }

    /// The same while what a guest writes to `top` goes to `base`, too: it waits while the piece is
    /// copied that it writes to.
    pub fn beside(mirror: &'a Intercept, top: &Node, base: &Node) -> CopyDown<'a> {
        CopyDown { mirror: Some(mirror), ..CopyDown::new(top, base) }
    }

    async fn do_step(&self, range: ByteRange) -> Result<Step, Failed> {
        let Some(mirror) = self.mirror else { return self.copy_start(range).await };
        // Else what was read before a write could reach the base after it, and stay.
        let range = ByteRange { len: range.len.min(CHUNK), ..range };
        let end = align_up(range.end(), self.align).unwrap_or(range.end());
        let whole = ByteRange::between(align_down(range.offset, self.align), end);
        mirror.alone(whole, self.copy_start(range)).await
    }

    /// Copies the start of a range, or finds that there is nothing to copy.
    async fn copy_start(&self, range: ByteRange) -> Result<Step, Failed> {
        let held = held_above(&self.top, Some(&self.base), range).await;
        let (run, held) =
            held.map_err(|err| Failed::new(Operation::Read, err, range.len.min(CHUNK)))?;
        if held == Held::Nothing {
            // What is left of a unit is copied with what follows.
            let end = match run.end() == range.end() {
                true => run.end(),
                false => align_down(run.end(), self.align),
            };
            if end > range.offset {
                return Ok(Step { done: end - range.offset, copied: 0 });
            }
        }
        let end = align_up(run.end(), self.align).unwrap_or(run.end()).min(self.base.size());
        let whole = ByteRange::between(align_down(run.offset, self.align), end);
        if held == Held::Zero && whole == run {
            let zeroed = self.base.write_zeroes(run, true).await;
            zeroed
                .context(|| format!("zeroing {run} of {}", self.base.name()))
                .map_err(|err| Failed::new(Operation::Write, err, run.len))?;
            return Ok(Step { done: run.len, copied: 0 });
        }
        let part = ByteRange { offset: whole.offset, len: whole.len.min(CHUNK) };
        let done = part.end().min(range.end()) - range.offset;
        copy(&self.top, &self.base, part)
            .await
            .map_err(|(operation, err)| Failed::new(operation, err, done))?;
        Ok(Step { done, copied: part.len })
    }
}

impl Copier for CopyDown<'_> {
    fn step<'a>(&'a self, range: ByteRange) -> Stepping<'a> {
        Box::pin(self.do_step(range))
    }
}

/// A copy from the layers between a top and a base up into the top, on which a guest goes on
/// writing.
#[derive(Debug)]
pub struct FillUp<'a> {
    top: &'a Intercept,
    base: Option<Node>,
    align: u64,
    /// Whether what no layer holds is made zeros in the top, which then needs nothing below it.
    fills_holes: bool,
}

impl<'a> FillUp<'a> {
    /// Into the disk that `top` stands in front of, from what is below it and above `base`.
    pub fn new(top: &'a Intercept, base: Option<Node>, fills_holes: bool) -> FillUp<'a> {
        let align = top.inner().limits().request_alignment;
        FillUp { top, base, align, fills_holes }
    }

    /// What the top lacks at the start of a range.
    async fn missing(&self, range: ByteRange) -> Result<(ByteRange, Held)> {
        let node = self.top.inner();
        let status = node.block_status(range).await?;
        let run = status.range.intersect(&range);
        if status.kind != StatusKind::Unallocated {
            return Ok((run, Held::Nothing));
        }
        let (run, held) = match node.backing() {
            Some(below) => held_above(&below, self.base.as_ref(), run).await?,
            None => (run, Held::Nothing),
        };
        match held {
            Held::Nothing if self.fills_holes => Ok((run, Held::Zero)),
            held => Ok((run, held)),
        }
    }

    async fn do_step(&self, range: ByteRange) -> Result<Step, Failed> {
        let failed_read = |err| Failed::new(Operation::Read, err, range.len.min(CHUNK));
        let (run, held) = self.missing(range).await.map_err(failed_read)?;
        if held == Held::Nothing {
            return Ok(Step { done: run.len, copied: 0 });
        }
        let node = self.top.inner();
        let start = align_down(run.offset, self.align);
        let end = align_up(run.end(), self.align).unwrap_or(run.end()).min(node.size());
        let zeroes = held == Held::Zero && node.backing().is_some();
        let zeroes = zeroes && ByteRange::between(start, end) == run;
        let most = if zeroes { ZERO_CHUNK } else { CHUNK };
        let part = ByteRange { offset: start, len: (end - start).min(most) };
        let done = part.end().min(range.end()) - range.offset;
        let fill = self.fill(part, zeroes);
        let filled = self
            .top
            .alone(part, fill)
            .await
            .map_err(|(operation, err)| Failed::new(operation, err, done))?;
        match filled {
            Filled::Copied(filled) => {
                let done = filled.end().min(range.end()) - range.offset;
                Ok(Step { done, copied: filled.len })
            }
            Filled::Zeroed(filled) => Ok(Step { done: filled.end() - range.offset, copied: 0 }),
        }
    }

    /// Fills a part of the top with what it reads as. Nobody else writes to it meanwhile.
    async fn fill(&self, part: ByteRange, zeroes: bool) -> Result<Filled, (Operation, Error)> {
        let node = self.top.inner();
        if !zeroes {
            // What is read is the guest's where the guest has written.
            copy(node, node, part).await?;
            return Ok(Filled::Copied(part));
        }
        // What the guest has written since is the guest's.
        let missing = self.missing(part).await.map_err(|err| (Operation::Read, err))?;
        if let (run, Held::Zero) = missing
            && run.is_aligned(self.align)
        {
            let zeroed = node.write_zeroes(run, true).await;
            zeroed
                .context(|| format!("zeroing {run} of {}", node.name()))
                .map_err(|err| (Operation::Write, err))?;
            return Ok(Filled::Zeroed(run));
        }
        let part = ByteRange { offset: part.offset, len: part.len.min(CHUNK) };
        copy(node, node, part).await?;
        Ok(Filled::Copied(part))
    }
}

/// What was done to a part of the top.
enum Filled {
    Copied(ByteRange),
    Zeroed(ByteRange),
}

impl Copier for FillUp<'_> {
    fn step<'a>(&'a self, range: ByteRange) -> Stepping<'a> {
        Box::pin(self.do_step(range))
    }
}

/// Copies a run of what one node reads as to another, whoever holds it. Behind its end that is zeros.
async fn copy(from: &Node, to: &Node, range: ByteRange) -> Result<(), (Operation, Error)> {
    let memory = from.limits().memory_alignment.max(to.limits().memory_alignment).max(4096);
    let buf = AlignedBuf::zeroed(range.len as usize, memory);
    let inside = from.size().saturating_sub(range.offset).min(range.len);
    let read = from.read(range.offset, buf.buffers().slice(0, inside)).await;
    read.context(|| format!("reading {range} of {}", from.name()))
        .map_err(|err| (Operation::Read, err))?;
    let written = to.write(range.offset, buf.buffers(), false).await;
    written
        .context(|| format!("writing {range} of {}", to.name()))
        .map_err(|err| (Operation::Write, err))
}

/// Copies all of a range at once: for when nobody else is at work.
pub fn copy_all<'a>(copier: &'a dyn Copier, range: ByteRange) -> Fut<'a, ()> {
    Box::pin(async move {
        let mut at = range;
        while !at.is_empty() {
            let step = copier.step(at).await?;
            at = ByteRange::between((at.offset + step.done).min(at.end()), at.end());
        }
        Ok(())
    })
}
