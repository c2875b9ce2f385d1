//! `blockdev-snapshot`: puts an overlay that is there already on a disk that is served.

use super::prelude::*;
use crate::control::snapshot::{self, Snapshot};

qapi! {
    /// What is put on what.
    pub struct BlockdevSnapshot {
        /// The node that is frozen, or the export whose disk it is.
        pub node: String,
        /// The node that takes its place. It has no backing yet.
        pub overlay: String,
    }
}

pub struct BlockdevSnapshotCommand;

impl MainCommand for BlockdevSnapshotCommand {
    const NAME: &'static str = "blockdev-snapshot";
    const DOC: &'static str = "Freezes a disk as it is now: writes go to an overlay.";
    type Arguments = BlockdevSnapshot;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockdevSnapshot) -> QmpResult<Nothing> {
        let BlockdevSnapshot { node, overlay } = arguments;
        let disks = daemon.disks_mut();
        let prepared = Snapshot::of_node(disks, &node, &overlay)?;
        let actions = snapshot::make(disks, vec![prepared])?;
        snapshot::run(daemon, actions)?;
        Ok(Nothing {})
    }
}
