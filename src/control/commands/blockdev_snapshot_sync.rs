//! `blockdev-snapshot-sync`: makes an overlay and puts it on a disk that is served.

use std::path::PathBuf;

use super::prelude::*;
use crate::control::snapshot::{self, OverlayRequest, Snapshot};
use crate::images::ImageFormat;

qapi! {
    /// What becomes of the overlay's file.
    pub enum NewImageMode { Existing = "existing", AbsolutePaths = "absolute-paths" }
}
qapi! {
    /// Which disk, and the overlay to be made.
    pub struct BlockdevSnapshotSync {
        /// The export whose disk is frozen.
        pub device: Option<String>,
        /// Or the node.
        pub node_name: Option<String>,
        /// The overlay's file. Overwritten if it exists, unless `mode` says otherwise.
        pub snapshot_file: String,
        /// The name of the overlay's node; must be given with `node-name`.
        pub snapshot_node_name: Option<String>,
        /// The overlay's format; qcow2 if absent.
        pub format: Option<String>,
        /// Whether the overlay is made (`absolute-paths`, which is usual) or there already.
        pub mode: Option<NewImageMode>,
    }
}

impl BlockdevSnapshotSync {
    /// What it asks for.
    pub fn request(self) -> QmpResult<OverlayRequest> {
        let format = self.format.as_deref().unwrap_or("qcow2");
        let known = format.parse::<ImageFormat>().ok();
        let known = known.filter(|format| format.is_supported() && *format != ImageFormat::Raw);
        let format = known.ok_or_else(|| match format {
            "raw" => QmpError::generic("raw images cannot have a backing file; use format qcow2"),
            _ => QmpError::generic(format!("Invalid snapshot format '{format}'")),
        })?;
        Ok(OverlayRequest {
            device: self.device,
            node_name: self.node_name,
            file: path_of(&self.snapshot_file)?,
            snapshot_node_name: self.snapshot_node_name,
            format,
            exists: self.mode == Some(NewImageMode::Existing),
        })
    }
}

/// The path of a file's name as QEMU understands it: with a protocol before it, or none.
fn path_of(name: &str) -> QmpResult<PathBuf> {
    match name.split_once(':').filter(|(protocol, _)| !protocol.contains('/')) {
        None => Ok(PathBuf::from(name)),
        Some(("file", path)) => Ok(PathBuf::from(path)),
        Some((protocol, _)) => Err(QmpError::generic(format!(
            "snapshot-file '{name}': the protocol '{protocol}:' is not supported (write ./{name} if \
             it is a file's name)"
        ))),
    }
}

pub struct BlockdevSnapshotSyncCommand;

impl MainCommand for BlockdevSnapshotSyncCommand {
    const NAME: &'static str = "blockdev-snapshot-sync";
    const DOC: &'static str = "Freezes a disk as it is now: writes go to an overlay that is made.";
    type Arguments = BlockdevSnapshotSync;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockdevSnapshotSync) -> QmpResult<Nothing> {
        let disks = daemon.disks_mut();
        let prepared = Snapshot::of_file(disks, arguments.request()?, &[])?;
        let actions = snapshot::make(disks, vec![prepared])?;
        snapshot::run(daemon, actions)?;
        Ok(Nothing {})
    }
}
