//! The table of commands: what parser, `query-commands` and `query-qmp-schema` have in common.

use serde_json::{Map, Value, json};

use super::daemon::{Daemon, Shared};
use super::events::EVENTS;
use super::qapi::{At, Object, Qapi, QmpResult, object_from_value};
use super::schema::Schema;

/// A command that runs on the main thread, where it may change the graph and wait for the host.
pub trait MainCommand: 'static {
    /// Its name on the wire.
    const NAME: &'static str;
    /// What it does, in one sentence.
    const DOC: &'static str;
    /// What clients probe for, and `deprecated`.
    const FEATURES: &'static [&'static str] = &[];
    /// What it takes.
    type Arguments: Object;
    /// What it answers.
    type Returns: Qapi;

    /// Does it.
    fn run(daemon: &mut Daemon, arguments: Self::Arguments) -> QmpResult<Self::Returns>;
}

/// A command that never waits and needs nothing of the main thread. It runs on the control thread,
/// even while the main thread is busy.
pub trait QuickCommand: 'static {
    /// Its name on the wire.
    const NAME: &'static str;
    /// What it does, in one sentence.
    const DOC: &'static str;
    /// What clients probe for, and `deprecated`.
    const FEATURES: &'static [&'static str] = &[];
    /// What it takes.
    type Arguments: Object;
    /// What it answers.
    type Returns: Qapi;

    /// Does it.
    fn run(shared: &Shared, arguments: Self::Arguments) -> QmpResult<Self::Returns>;
}

/// An entry of the table.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Its name on the wire.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub doc: &'static str,
    /// What clients probe for.
    pub features: &'static [&'static str],
    /// How to run it.
    pub run: Run,
    /// Reads arguments and writes them again.
    reread: fn(Map<String, Value>) -> QmpResult<Value>,
    arguments: fn(&mut Schema) -> String,
    returns: fn(&mut Schema) -> String,
}

/// Where a command runs, and how.
#[derive(Clone, Copy, Debug)]
pub enum Run {
    /// On the control thread.
    Quick(fn(&Shared, Map<String, Value>) -> QmpResult<Value>),
    /// On the main thread.
    Main(fn(&mut Daemon, Map<String, Value>) -> QmpResult<Value>),
}

impl Command {
    /// The entry of a command for the main thread.
    pub const fn main<C: MainCommand>() -> Command {
        Command {
            name: C::NAME,
            doc: C::DOC,
            features: C::FEATURES,
            run: Run::Main(|daemon, arguments| {
                let arguments = object_from_value(Value::Object(arguments), &At::ROOT)?;
                C::run(daemon, arguments).map(|returned| returned.to_value())
            }),
            reread: reread::<C::Arguments>,
            arguments: C::Arguments::describe,
            returns: C::Returns::describe,
        }
    }

    /// The entry of a command that never waits.
    pub const fn quick<C: QuickCommand>() -> Command {
        Command {
            name: C::NAME,
            doc: C::DOC,
            features: C::FEATURES,
            run: Run::Quick(|shared, arguments| {
                let arguments = object_from_value(Value::Object(arguments), &At::ROOT)?;
                C::run(shared, arguments).map(|returned| returned.to_value())
            }),
            reread: reread::<C::Arguments>,
            arguments: C::Arguments::describe,
            returns: C::Returns::describe,
        }
    }

    /// Reads arguments without running anything, and writes what was read.
    pub fn reread(&self, arguments: Map<String, Value>) -> QmpResult<Map<String, Value>> {
        match (self.reread)(arguments)? {
            Value::Object(arguments) => Ok(arguments),
            _ => Ok(Map::new()),
        }
    }

    /// Whether it may be run out of band (`exec-oob`): before what its client asked for earlier.
    pub fn allows_oob(&self) -> bool {
        matches!(self.run, Run::Quick(_))
    }

    fn describe(&self, schema: &mut Schema) -> Value {
        let mut entry = json!({
            "name": self.name,
            "meta-type": "command",
            "arg-type": (self.arguments)(schema),
            "ret-type": (self.returns)(schema),
        });
        if self.allows_oob() {
            entry["allow-oob"] = true.into();
        }
        if !self.features.is_empty() {
            entry["features"] = self.features.into();
        }
        entry
    }
}

fn reread<A: Object>(arguments: Map<String, Value>) -> QmpResult<Value> {
    let read: A = object_from_value(Value::Object(arguments), &At::ROOT)?;
    Ok(read.to_value())
}

/// What `query-qmp-schema` answers for a table of commands.
pub fn describe(commands: &[Command]) -> Vec<Value> {
    let mut schema = Schema::default();
    let mut entries: Vec<_> = commands.iter().map(|c| c.describe(&mut schema)).collect();
    entries.extend(EVENTS.iter().map(|event| event.describe(&mut schema)));
    entries.extend(schema.finish());
    entries
}
