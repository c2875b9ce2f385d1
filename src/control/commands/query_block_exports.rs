//! `query-block-exports`: what is served, and where.

use super::prelude::*;

qapi! {
    /// How an export is served.
    pub enum BlockExportType { VhostUserBlk = "vhost-user-blk" }
}
qapi! {
    /// An export.
    pub struct BlockExportInfo {
        /// Its name.
        pub id: String,
        /// How it is served.
        pub r#type: BlockExportType,
        /// The node it stands on.
        pub node_name: String,
        /// Whether it is about to end.
        pub shutting_down: bool,
        /// Where front-ends connect to.
        pub x_vublk_socket: String,
        /// Whether a front-end is connected.
        pub x_vublk_connected: bool,
        /// Whether the guest may write.
        pub x_vublk_writable: bool,
    }
}

pub struct QueryBlockExports;

impl MainCommand for QueryBlockExports {
    const NAME: &'static str = "query-block-exports";
    const DOC: &'static str = "Tells what is served.";
    type Arguments = Nothing;
    type Returns = Vec<BlockExportInfo>;

    fn run(daemon: &mut Daemon, _: Nothing) -> QmpResult<Vec<BlockExportInfo>> {
        let info = |served: &crate::device::exports::Served| BlockExportInfo {
            id: served.id().to_string(),
            r#type: BlockExportType::VhostUserBlk,
            node_name: served.root().node().name().to_string(),
            shutting_down: served.has_ended(),
            x_vublk_socket: served.socket().to_string(),
            x_vublk_connected: served.is_connected(),
            x_vublk_writable: !served.export().is_read_only(),
        };
        Ok(daemon.disks().exports.iter().map(info).collect())
    }
}
