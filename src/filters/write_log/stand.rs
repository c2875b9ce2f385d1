//! What a write log stands on that is a node of its own: two other nodes.
//!
//! ```text
//! blklogwrites ─┬─ file ──► this driver ──► the node that is recorded, with all its checks
//!               └─ log      the node of the log's file, for those who look at the graph
//! ```
//!
//! A log in the place of a node's driver needs none of this: it stands on that driver.

use std::sync::Arc;

use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned};
use crate::block::{Keep, Node};
use crate::error::{Error, Result};
use crate::filters::write_log::NAME;
use crate::io::{Buffers, Fut};
use crate::units::ByteRange;

/// What a write log records that is a node of its own: the node below, with all its checks.
#[derive(Debug)]
pub struct Stand {
    file: Node,
    log: Node,
    /// The driver of `file`, which plans borrow from.
    driver: Arc<dyn Driver>,
    /// The node's when `driver` was loaded.
    generation: u64,
}

impl Stand {
    /// The disk `file`, and the node of the log's file.
    pub fn new(file: Node, log: Node) -> Stand {
        // Before the driver: if that is replaced in between, the generation is already old.
        let generation = file.generation();
        Stand { driver: file.driver(), generation, file, log }
    }
}

impl Driver for Stand {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let is_checked = match op {
            PlanOp::Read => false,
            PlanOp::Write { .. } => self.file.is_poisoned(),
            PlanOp::Flush => self.file.is_poisoned() || self.file.owes_flush(),
        };
        if is_checked || self.file.generation() != self.generation {
            return Planned::NotNow;
        }
        self.driver.plan(op, range, plan)
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.file.read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(self.file.write(offset, buf, fua))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.file.write_zeroes(range, may_unmap))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.file.discard(range))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(self.file.flush())
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(self.file.block_status(range))
    }

    fn resize<'a>(&'a self, _: u64) -> Fut<'a, ()> {
        let name = self.file.name();
        Box::pin(async move {
            Err(Error::unsupported(format!("node '{name}' is being recorded, so its size stays")))
        })
    }

    fn children(&self) -> Vec<(&'static str, Node)> {
        vec![("file", self.file.clone()), ("log", self.log.clone())]
    }

    fn prepare_for_overlay<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { self.file.driver().prepare_for_overlay().await })
    }

    fn freeze<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { self.file.driver().freeze().await })
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(async move { self.file.driver().resume(nonce).await })
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.file.driver().begin_session(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        // The driver's of before, if it was replaced: whoever asks loads drivers anew then.
        self.driver.keep()
    }
}
