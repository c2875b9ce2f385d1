//! `block-export-del`: ends an export. The node that it stood on stays.

use super::prelude::*;

qapi! {
    /// Whether a front-end is waited for.
    pub enum BlockExportRemoveMode { Safe = "safe", Hard = "hard" }
}
qapi! {
    /// Which export.
    pub struct BlockExportDelArguments {
        /// Its name.
        pub id: String,
        /// `safe` (usual) refuses while a front-end is connected, `hard` ends its connection.
        pub mode: Option<BlockExportRemoveMode>,
    }
}

pub struct BlockExportDel;

impl MainCommand for BlockExportDel {
    const NAME: &'static str = "block-export-del";
    const DOC: &'static str = "Ends an export: all is drained and flushed, its socket goes away.";
    type Arguments = BlockExportDelArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockExportDelArguments) -> QmpResult<Nothing> {
        let hard = arguments.mode == Some(BlockExportRemoveMode::Hard);
        daemon.disks_mut().unexport(&arguments.id, hard)?;
        daemon.tell_export_ended(&arguments.id);
        Ok(Nothing {})
    }
}
