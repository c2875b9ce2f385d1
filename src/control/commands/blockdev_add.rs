//! `blockdev-add`: opens an image or a file and gives it a place in the graph.

use super::prelude::*;
use crate::control::blockdev::{self, BlockdevOptions};

pub struct BlockdevAdd;

impl MainCommand for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    const DOC: &'static str = "Adds a node to the graph.";
    type Arguments = BlockdevOptions;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, options: BlockdevOptions) -> QmpResult<Nothing> {
        blockdev::add(daemon.disks_mut(), &options)?;
        Ok(Nothing {})
    }
}
