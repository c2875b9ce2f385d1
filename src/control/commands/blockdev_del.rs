//! `blockdev-del`: takes a node out of the graph and closes its image.

use super::prelude::*;

qapi! {
    /// Which node.
    pub struct BlockdevDelArguments {
        /// Its name.
        pub node_name: String,
    }
}

pub struct BlockdevDel;

impl MainCommand for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    const DOC: &'static str = "Removes a node that nobody uses, and closes its image.";
    type Arguments = BlockdevDelArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockdevDelArguments) -> QmpResult<Nothing> {
        let disks = daemon.disks_mut();
        disks.layers.remove(&arguments.node_name)?;
        disks.collect();
        Ok(Nothing {})
    }
}
