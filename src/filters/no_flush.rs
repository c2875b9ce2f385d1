//! Ignores flushes: `cache.no-flush` of a node. Fast, and a power cut loses what the host had not
//! written by itself.
//!
//! Nothing else is changed. A write that is to be durable on completion is an ordinary one.

use std::sync::Arc;

use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned};
use crate::block::{Node, Quiesced};
use crate::error::Result;
use crate::io::{Buffers, Fut};
use crate::units::ByteRange;

/// The filter.
#[derive(Debug)]
pub struct NoFlush {
    below: Arc<dyn Driver>,
}

impl NoFlush {
    /// Puts it before a driver.
    pub fn new(below: Arc<dyn Driver>) -> NoFlush {
        NoFlush { below }
    }
}

impl Driver for NoFlush {
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
            // No file is synced: done.
            PlanOp::Flush => Planned::Ready,
            PlanOp::Write { .. } => self.below.plan(PlanOp::Write { fua: false }, range, plan),
            PlanOp::Read => self.below.plan(op, range, plan),
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.below.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        self.below.write(offset, buf, false)
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.below.write_zeroes(range, may_unmap)
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.below.discard(range)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn freeze<'a>(&'a self) -> Fut<'a, ()> {
        self.below.flush()
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.below.block_status(range)
    }

    fn make_empty<'a>(&'a self, discard: bool) -> Fut<'a, ()> {
        self.below.make_empty(discard)
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        self.below.resize(size)
    }

    fn refresh(&self, quiesced: &Quiesced) -> Result<()> {
        self.below.refresh(quiesced)
    }

    fn is_behind(&self) -> bool {
        self.below.is_behind()
    }

    fn on_backing(&self, backing: Option<Node>, quiesced: &Quiesced) -> Result<Arc<dyn Driver>> {
        let below = self.below.on_backing(backing, quiesced)?;
        Ok(Arc::new(NoFlush { below }))
    }
}
