//! Events of disks.

use super::events::Event;
use super::job_events::{BlockErrorAction, IoOperationType};
use crate::device::export::{Failure, FailureOf};
use crate::qapi;

qapi! {
    /// An export has ended; its name is free again.
    pub struct BlockExportDeleted {
        /// Its name.
        pub id: String,
    }
}

impl Event for BlockExportDeleted {
    const NAME: &'static str = "BLOCK_EXPORT_DELETED";
}

qapi! {
    /// A guest's request has failed, and the guest was told so.
    pub struct BlockIoError {
        /// Where the guest's device is in a tree of objects, which we have none of: empty.
        pub qom_path: String,
        /// The export.
        pub device: String,
        /// The node it stands on.
        pub node_name: Option<String>,
        /// What the guest wanted.
        pub operation: IoOperationType,
        /// The guest was told.
        pub action: BlockErrorAction,
        /// Whether the host has no space left.
        pub nospace: Option<bool>,
        /// What happened, for people.
        pub reason: String,
    }
}

impl BlockIoError {
    /// Of a failure on an export.
    pub fn new(device: &str, node_name: &str, failure: &Failure<'_>) -> BlockIoError {
        BlockIoError {
            qom_path: String::new(),
            device: device.to_string(),
            node_name: Some(node_name.to_string()),
            operation: match failure.of {
                FailureOf::Read => IoOperationType::Read,
                FailureOf::Write => IoOperationType::Write,
            },
            action: BlockErrorAction::Report,
            nospace: Some(failure.nospace),
            reason: failure.reason.to_string(),
        }
    }
}

impl Event for BlockIoError {
    const NAME: &'static str = "BLOCK_IO_ERROR";

    fn limited_by(&self) -> Option<String> {
        // As in QEMU, which limits by the device; a read must not hide that there is no space.
        Some(format!("{}/{}", self.device, self.operation))
    }
}
