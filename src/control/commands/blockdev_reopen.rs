//! `blockdev-reopen`: changes how nodes are used: read-only or not, and what they stand on.

use super::prelude::*;
use crate::control::blockdev::{self, BlockdevOptions};

qapi! {
    /// Which nodes, and how they are to be.
    pub struct BlockdevReopenArguments {
        /// For each node all its options, as for `blockdev-add`.
        pub options: Vec<BlockdevOptions>,
    }
}

pub struct BlockdevReopen;

impl MainCommand for BlockdevReopen {
    const NAME: &'static str = "blockdev-reopen";
    const DOC: &'static str = "Changes read-only and backing of nodes while they are in use.";
    type Arguments = BlockdevReopenArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockdevReopenArguments) -> QmpResult<Nothing> {
        blockdev::reopen(daemon.disks_mut(), &arguments.options)?;
        Ok(Nothing {})
    }
}
