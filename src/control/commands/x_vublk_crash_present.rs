//! `x-vublk-crash-present`: another crash state in the place of the one that a guest has.

use super::prelude::*;
use crate::control::crash_states;

qapi! {
    /// Which state, and where.
    pub struct CrashPresent {
        /// The export, or the node: a crash state, or an overlay on one.
        pub device: String,
        /// The name of the state.
        pub state: String,
    }
}
qapi! {
    /// What came of it.
    pub struct CrashPresented {
        /// How long guests were kept waiting, in microseconds.
        pub pause_us: u64,
    }
}

pub struct XVublkCrashPresent;

impl MainCommand for XVublkCrashPresent {
    const NAME: &'static str = "x-vublk-crash-present";
    const DOC: &'static str =
        "Shows a guest another state of a log, fresh; the guest must drop what it has cached.";
    type Arguments = CrashPresent;
    type Returns = CrashPresented;

    fn run(daemon: &mut Daemon, arguments: CrashPresent) -> QmpResult<CrashPresented> {
        let name = arguments.state.parse()?;
        let pause = crash_states::present(daemon.disks_mut(), &arguments.device, &name)?;
        Ok(CrashPresented { pause_us: pause.as_micros() as u64 })
    }
}
