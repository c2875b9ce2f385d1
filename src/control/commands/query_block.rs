//! `query-block`: the disks that are served.

use super::prelude::*;
use super::query_named_block_nodes::{BlockDeviceInfo, info};

qapi! {
    /// A disk that is served.
    pub struct BlockInfo {
        /// The export's name.
        pub device: String,
        /// How the disk is called where `qdev` paths are asked for.
        pub qdev: Option<String>,
        /// Nothing is known of the device that the guest sees.
        pub r#type: String,
        /// Whether the medium can be removed; never.
        pub removable: bool,
        /// Whether the guest has locked the medium; never.
        pub locked: bool,
        /// What is served.
        pub inserted: Option<BlockDeviceInfo>,
    }
}

pub struct QueryBlock;

impl MainCommand for QueryBlock {
    const NAME: &'static str = "query-block";
    const DOC: &'static str = "Tells the disks that are served.";
    type Arguments = Nothing;
    type Returns = Vec<BlockInfo>;

    fn run(daemon: &mut Daemon, _: Nothing) -> QmpResult<Vec<BlockInfo>> {
        let disks = daemon.disks();
        let row = |served: &crate::device::exports::Served| {
            Ok(BlockInfo {
                device: served.id().to_string(),
                qdev: Some(served.id().to_string()),
                r#type: "unknown".into(),
                removable: false,
                locked: false,
                inserted: Some(info(disks, &served.root().node(), false)?),
            })
        };
        disks.exports.iter().map(row).collect()
    }
}
