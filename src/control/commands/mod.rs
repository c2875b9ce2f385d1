//! The commands, each in a file of its own.

mod block_commit;
mod block_export_add;
mod block_export_del;
mod block_job_verbs;
mod block_resize;
mod block_stream;
mod blockdev_add;
mod blockdev_create;
mod blockdev_del;
mod blockdev_reopen;
mod blockdev_snapshot;
mod blockdev_snapshot_sync;
mod job_verbs;
mod qmp_capabilities;
mod query_block;
mod query_block_exports;
mod query_block_jobs;
mod query_blockstats;
mod query_commands;
mod query_jobs;
mod query_name;
mod query_named_block_nodes;
mod query_qmp_schema;
mod query_status;
mod query_tpm;
mod query_version;
mod quit;
mod transaction;
mod x_vublk_crash_present;
mod x_vublk_fault;
mod x_vublk_log;
mod x_vublk_metrics;
mod x_vublk_query_pauses;

pub use block_export_add::{BlockExportOptions, add as add_export};
pub use qmp_capabilities::{Capabilities, Capability};
pub use query_version::{VersionInfo, version};

use super::command::Command;

/// Every command, by name.
pub const COMMANDS: &[Command] = &[
    Command::main::<block_commit::BlockCommit>(),
    Command::main::<block_export_add::BlockExportAdd>(),
    Command::main::<block_export_del::BlockExportDel>(),
    Command::quick::<block_job_verbs::BlockJobCancel>(),
    Command::quick::<block_job_verbs::BlockJobComplete>(),
    Command::quick::<block_job_verbs::BlockJobDismiss>(),
    Command::main::<block_job_verbs::BlockJobFinalize>(),
    Command::quick::<block_job_verbs::BlockJobPause>(),
    Command::quick::<block_job_verbs::BlockJobResume>(),
    Command::quick::<block_job_verbs::BlockJobSetSpeed>(),
    Command::main::<block_stream::BlockStream>(),
    Command::main::<block_resize::BlockResize>(),
    Command::main::<blockdev_add::BlockdevAdd>(),
    Command::main::<blockdev_create::BlockdevCreate>(),
    Command::main::<blockdev_del::BlockdevDel>(),
    Command::main::<blockdev_reopen::BlockdevReopen>(),
    Command::main::<blockdev_snapshot::BlockdevSnapshotCommand>(),
    Command::main::<blockdev_snapshot_sync::BlockdevSnapshotSyncCommand>(),
    Command::quick::<job_verbs::JobCancel>(),
    Command::quick::<job_verbs::JobComplete>(),
    Command::quick::<job_verbs::JobDismiss>(),
    Command::main::<job_verbs::JobFinalize>(),
    Command::quick::<job_verbs::JobPause>(),
    Command::quick::<job_verbs::JobResume>(),
    Command::quick::<qmp_capabilities::QmpCapabilities>(),
    Command::main::<query_block::QueryBlock>(),
    Command::main::<query_block_exports::QueryBlockExports>(),
    Command::quick::<query_block_jobs::QueryBlockJobs>(),
    Command::main::<query_blockstats::QueryBlockstats>(),
    Command::quick::<query_commands::QueryCommands>(),
    Command::quick::<query_jobs::QueryJobs>(),
    Command::quick::<query_name::QueryName>(),
    Command::main::<query_named_block_nodes::QueryNamedBlockNodes>(),
    Command::quick::<query_qmp_schema::QueryQmpSchema>(),
    Command::quick::<query_status::QueryStatus>(),
    Command::quick::<query_tpm::QueryTpm>(),
    Command::quick::<query_version::QueryVersion>(),
    Command::main::<quit::Quit>(),
    Command::main::<transaction::Transaction>(),
    Command::main::<x_vublk_crash_present::XVublkCrashPresent>(),
    Command::main::<x_vublk_fault::XVublkFaultClear>(),
    Command::main::<x_vublk_fault::XVublkFaultSet>(),
    Command::main::<x_vublk_log::XVublkLogMark>(),
    Command::main::<x_vublk_log::XVublkLogStart>(),
    Command::main::<x_vublk_log::XVublkLogStop>(),
    Command::main::<x_vublk_metrics::QueryMetrics>(),
    Command::main::<x_vublk_fault::QueryFaults>(),
    Command::main::<x_vublk_query_pauses::QueryPauses>(),
];

/// The command of this name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// What a command file needs.
mod prelude {
    pub use crate::control::qapi::{Any, Nothing};
    pub use crate::control::{Daemon, MainCommand, QmpError, QmpResult, QuickCommand, Shared};
    pub use crate::qapi;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_sorted_and_documented() {
        let names: Vec<_> = COMMANDS.iter().map(|command| command.name).collect();
        let sorted: Vec<_> = BTreeSet::from_iter(&names).into_iter().copied().collect();
        assert_eq!(names, sorted);
        for command in COMMANDS {
            assert!(command.doc.ends_with('.'), "{}: {}", command.name, command.doc);
        }
    }

    #[test]
    fn every_type_of_the_schema_is_there_once() {
        let entries = crate::control::command::describe(COMMANDS);
        let names: Vec<_> = entries.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        assert_eq!(BTreeSet::from_iter(&names).len(), names.len());
        let mut used = Vec::new();
        for entry in &entries {
            for key in ["arg-type", "ret-type", "element-type"] {
                used.extend(entry[key].as_str());
            }
            for list in ["members", "variants"] {
                for member in entry[list].as_array().into_iter().flatten() {
                    used.extend(member["type"].as_str());
                }
            }
        }
        for name in used {
            assert!(names.contains(&name), "{name} is used and not described");
        }
    }
}
