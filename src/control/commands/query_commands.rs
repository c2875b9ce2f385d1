//! `query-commands`: the names of all commands; `qmp-shell` completes from it.

use super::prelude::*;

qapi! {
    /// A command.
    pub struct CommandInfo {
        /// Its name.
        pub name: String,
    }
}

pub struct QueryCommands;

impl QuickCommand for QueryCommands {
    const NAME: &'static str = "query-commands";
    const DOC: &'static str = "Lists all commands.";
    type Arguments = Nothing;
    type Returns = Vec<CommandInfo>;

    fn run(_: &Shared, _: Nothing) -> QmpResult<Vec<CommandInfo>> {
        let info = |command: &super::Command| CommandInfo { name: command.name.to_string() };
        Ok(super::COMMANDS.iter().map(info).collect())
    }
}
