//! `query-qmp-schema`: all commands, events and types, out of the tables that the parser uses.

use super::prelude::*;

pub struct QueryQmpSchema;

impl QuickCommand for QueryQmpSchema {
    const NAME: &'static str = "query-qmp-schema";
    const DOC: &'static str = "Describes all commands, events and types.";
    type Arguments = Nothing;
    type Returns = Vec<Any>;

    fn run(_: &Shared, _: Nothing) -> QmpResult<Vec<Any>> {
        Ok(crate::control::command::describe(super::COMMANDS).into_iter().map(Any).collect())
    }
}
