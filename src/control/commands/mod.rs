//! The commands, each in a file of its own.

mod block_job_verbs;
mod job_verbs;
mod qmp_capabilities;
mod query_block_jobs;
mod query_commands;
mod query_jobs;
mod query_name;
mod query_qmp_schema;
mod query_status;
mod query_tpm;
mod query_version;
mod quit;

pub use qmp_capabilities::{Capabilities, Capability};
pub use query_version::{VersionInfo, version};

use super::command::Command;

/// Every command, by name.
pub const COMMANDS: &[Command] = &[
    Command::quick::<block_job_verbs::BlockJobCancel>(),
    Command::quick::<block_job_verbs::BlockJobComplete>(),
    Command::quick::<block_job_verbs::BlockJobDismiss>(),
    Command::quick::<block_job_verbs::BlockJobFinalize>(),
    Command::quick::<block_job_verbs::BlockJobPause>(),
    Command::quick::<block_job_verbs::BlockJobResume>(),
    Command::quick::<block_job_verbs::BlockJobSetSpeed>(),
    Command::quick::<job_verbs::JobCancel>(),
    Command::quick::<job_verbs::JobComplete>(),
    Command::quick::<job_verbs::JobDismiss>(),
    Command::quick::<job_verbs::JobFinalize>(),
    Command::quick::<job_verbs::JobPause>(),
    Command::quick::<job_verbs::JobResume>(),
    Command::quick::<qmp_capabilities::QmpCapabilities>(),
    Command::quick::<query_block_jobs::QueryBlockJobs>(),
    Command::quick::<query_commands::QueryCommands>(),
    Command::quick::<query_jobs::QueryJobs>(),
    Command::quick::<query_name::QueryName>(),
    Command::quick::<query_qmp_schema::QueryQmpSchema>(),
    Command::quick::<query_status::QueryStatus>(),
    Command::quick::<query_tpm::QueryTpm>(),
    Command::quick::<query_version::QueryVersion>(),
    Command::main::<quit::Quit>(),
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
