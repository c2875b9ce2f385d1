//! `qmp_capabilities`: ends the negotiation, in which it is the only command.

use super::prelude::*;
use crate::control::Class;

qapi! {
    /// What a client can ask for.
    pub enum Capability { Oob = "oob" }
}

qapi! {
    /// Arguments of `qmp_capabilities`.
    pub struct Capabilities {
        /// What the client asks for.
        pub enable: Option<Vec<Capability>>,
    }
}

pub struct QmpCapabilities;

impl QuickCommand for QmpCapabilities {
    const NAME: &'static str = "qmp_capabilities";
    const DOC: &'static str = "Ends the negotiation; all other commands work afterwards.";
    type Arguments = Capabilities;
    type Returns = Nothing;

    /// Reached only after the negotiation: before it, the connection looks at the command itself
    /// (see [`crate::control::request`]).
    fn run(_: &Shared, _: Capabilities) -> QmpResult<Nothing> {
        Err(QmpError::new(
            Class::CommandNotFound,
            "Capabilities negotiation is already complete, command ignored",
        ))
    }
}
