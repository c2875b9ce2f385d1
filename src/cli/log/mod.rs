//! `vublk log`: looks at, replays and checks write logs in dm-log-writes format.
//!
//! Options are those of `replay-log`, the tool that goes with the kernel's target, and mean what
//! they mean there; `docs/write-log.md` says where it is otherwise, and why.

mod apply;
mod explore;
mod find;
mod guest;
mod info;
mod list;
mod mark;
mod replay;
mod report;
mod source;
mod verify;

use clap::{Args, Subcommand};

use crate::error::Result;

/// Look at a log of writes (dm-log-writes)
#[derive(Debug, Args)]
pub struct LogArgs {
    #[command(subcommand)]
    command: LogCommand,
}

#[derive(Debug, Subcommand)]
enum LogCommand {
    Info(info::InfoArgs),
    List(list::ListArgs),
    Find(find::FindArgs),
    Replay(Box<replay::ReplayArgs>),
    Explore(Box<explore::ExploreArgs>),
    Report(report::ReportArgs),
    Verify(verify::VerifyArgs),
    Mark(mark::MarkArgs),
}

pub fn run(args: &LogArgs) -> Result<u8> {
    match &args.command {
        LogCommand::Info(args) => info::run(args),
        LogCommand::List(args) => list::run(args),
        LogCommand::Find(args) => find::run(args),
        LogCommand::Replay(args) => replay::run(args),
        LogCommand::Explore(args) => explore::run(args),
        LogCommand::Report(args) => report::run(args),
        LogCommand::Verify(args) => verify::run(args),
        LogCommand::Mark(args) => mark::run(args),
    }
}
