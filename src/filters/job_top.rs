//! The node by which a job shows itself in the graph, if whoever starts it gives it a name
//! (`filter-node-name`).
//!
//! What a job has to see of a guest's requests it sees elsewhere ([`Intercept`](super::Intercept)), so
//! nothing passes through this node: it stands beside the guest's way, on the disk that the job works
//! on, as long as the job lasts. Clients that look for the name find it.

use std::sync::Arc;

use crate::block::driver::{BlockStatus, Driver, Limits};
use crate::block::{Node, Quiesced};
use crate::error::{Error, Result};
use crate::io::{Buffers, Fut};
use crate::units::ByteRange;

/// See the [module](self).
#[derive(Debug)]
pub struct JobTop {
    /// What QEMU calls the filter of such a job.
    name: &'static str,
    below: Node,
}

impl JobTop {
    /// Of a job whose filter QEMU calls `name`, on the node that it works on.
    pub fn new(name: &'static str, below: Node) -> JobTop {
        JobTop { name, below }
    }
}

impl Driver for JobTop {
    fn name(&self) -> &'static str {
        self.name
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.below.read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(self.below.write(offset, buf, fua))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.below.write_zeroes(range, may_unmap))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.below.discard(range))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(self.below.flush())
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(self.below.block_status(range))
    }

    fn children(&self) -> Vec<(&'static str, Node)> {
        vec![("file", self.below.clone())]
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn on_backing(&self, backing: Option<Node>, _quiesced: &Quiesced) -> Result<Arc<dyn Driver>> {
        match backing {
            Some(below) => Ok(Arc::new(JobTop::new(self.name, below))),
            None => Err(Error::unsupported("a filter cannot stand on nothing")),
        }
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(async move { self.below.driver().resume(nonce).await })
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.below.driver().begin_session(nonce)
    }

    /// Nothing was kept here.
    fn close<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}
