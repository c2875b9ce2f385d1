//! `quit`: ends the process in order, as SIGTERM does.

use super::prelude::*;

pub struct Quit;

impl MainCommand for Quit {
    const NAME: &'static str = "quit";
    const DOC: &'static str = "Ends the process: what is in flight completes, all is flushed.";
    type Arguments = Nothing;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, _: Nothing) -> QmpResult<Nothing> {
        daemon.quit();
        Ok(Nothing {})
    }
}
