//! `transaction`: several changes at one instant, all or none.

use super::blockdev_snapshot::BlockdevSnapshot;
use super::blockdev_snapshot_sync::BlockdevSnapshotSync;
use super::prelude::*;
use crate::control::Disks;
use crate::control::qapi::Flat;
use crate::control::snapshot::{self, Prepared, Snapshot};

qapi! {
    /// An action whose data has members of its own.
    pub struct AbortWrapper {
        /// Nothing.
        pub data: Nothing,
    }
}
qapi! {
    /// An action whose data has members of its own.
    pub struct BlockdevSnapshotWrapper {
        /// As for the command.
        pub data: BlockdevSnapshot,
    }
}
qapi! {
    /// An action whose data has members of its own.
    pub struct BlockdevSnapshotSyncWrapper {
        /// As for the command.
        pub data: BlockdevSnapshotSync,
    }
}
qapi! {
    /// What is done.
    pub union TransactionData by "type" {
        Abort(AbortWrapper) = "abort",
        BlockdevSnapshot(BlockdevSnapshotWrapper) = "blockdev-snapshot",
        BlockdevSnapshotSync(BlockdevSnapshotSyncWrapper) = "blockdev-snapshot-sync",
    }
}
qapi! {
    /// One change.
    pub struct TransactionAction {
        /// Which.
        pub action: Flat<TransactionData>,
    }
}
qapi! {
    /// Whether jobs of a transaction fail together.
    pub enum ActionCompletionMode { Individual = "individual", Grouped = "grouped" }
}
qapi! {
    /// What holds for all actions.
    pub struct TransactionProperties {
        /// Whether jobs of it fail together. No action starts a job yet, so none takes `grouped`.
        pub completion_mode: Option<ActionCompletionMode>,
    }
}
qapi! {
    /// What is to be done.
    pub struct TransactionArguments {
        /// The changes, in order.
        pub actions: Vec<TransactionAction>,
        /// What holds for all of them.
        pub properties: Option<TransactionProperties>,
    }
}

pub struct Transaction;

impl MainCommand for Transaction {
    const NAME: &'static str = "transaction";
    const DOC: &'static str = "Changes several disks at one instant: all is done, or nothing.";
    type Arguments = TransactionArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: TransactionArguments) -> QmpResult<Nothing> {
        let mode = arguments.properties.and_then(|properties| properties.completion_mode);
        if let (Some(ActionCompletionMode::Grouped), Some(first)) =
            (mode, arguments.actions.first())
        {
            return Err(QmpError::generic(format!(
                "Action '{}' does not support transaction property completion-mode = grouped",
                first.action.word()
            )));
        }
        let disks = daemon.disks_mut();
        let mut prepared = Vec::with_capacity(arguments.actions.len());
        for action in arguments.actions {
            match prepare(disks, action.action.0, &prepared) {
                Ok(action) => prepared.push(action),
                Err(err) => {
                    snapshot::give_up(disks, prepared);
                    return Err(err);
                }
            }
        }
        let actions = snapshot::make(disks, prepared)?;
        snapshot::run(daemon, actions)?;
        Ok(Nothing {})
    }
}

/// Prepares an action that follows those `before`.
fn prepare(disks: &mut Disks, action: TransactionData, before: &[Prepared]) -> QmpResult<Prepared> {
    let is_made = |name: &&str| before.iter().any(|other| other.makes(name));
    if let Some(name) = named_nodes(&action).into_iter().find(is_made) {
        return Err(QmpError::generic(format!(
            "Node '{name}' is busy: block device is in use by blockdev-snapshot-sync"
        )));
    }
    match action {
        TransactionData::Abort(_) => {
            Err(QmpError::generic("Transaction aborted using Abort action"))
        }
        TransactionData::BlockdevSnapshot(BlockdevSnapshotWrapper { data }) => {
            Snapshot::of_node(disks, &data.node, &data.overlay)
        }
        TransactionData::BlockdevSnapshotSync(BlockdevSnapshotSyncWrapper { data }) => {
            Snapshot::of_file(disks, data.request()?, before)
        }
    }
}

/// The nodes that must be there for an action.
fn named_nodes(action: &TransactionData) -> Vec<&str> {
    match action {
        TransactionData::Abort(_) => Vec::new(),
        TransactionData::BlockdevSnapshot(BlockdevSnapshotWrapper { data }) => {
            vec![&data.node, &data.overlay]
        }
        TransactionData::BlockdevSnapshotSync(BlockdevSnapshotSyncWrapper { data }) => {
            [&data.device, &data.node_name].into_iter().flatten().map(|name| &**name).collect()
        }
    }
}
