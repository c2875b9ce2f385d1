//! The command line: qemu-img's verbs, and `serve`.
//!
//! Each command is a module with its arguments (`…Args`) and a `run` that returns the exit code.
//! Errors come back here and are printed as one line on stderr, `vublk: …`.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; for `compare` the images differ |
//! | 2 | wrong usage; for `check` the image is corrupt, for `log verify` the log; for `compare` an image cannot be opened, or it failed otherwise |
//! | 3 | for `check` there are leaks only; for `compare` what is allocated cannot be found out |
//! | 4 | for `compare` an image cannot be read |
//! | 63 | for `check` the format cannot be checked |
//! | 78 | for `serve` it cannot start, and will not until somebody changes something |

pub mod bench;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
pub mod daemon_args;
mod info;
pub mod lanes;
mod log;
pub mod logging;
mod map;
mod measure;
pub mod options;
pub mod output;
pub mod progress;
pub mod qmp;
mod rebase;
pub mod recording_args;
mod reset;
mod resize;
pub mod serve;
pub mod serve_args;
mod shell;
pub mod size;
pub mod socket_args;
mod top;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::filter::LevelFilter;

use crate::error::{Error, Result};

pub use serve_args::ServeArgs;

/// Exit code of a command that did what it should.
pub(crate) const DONE: u8 = 0;

/// A virtio-blk vhost-user back-end, and a tool for disk images
#[derive(Debug, Parser)]
#[command(name = "vublk", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    log: logging::LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<ServeArgs>),
    Create(create::CreateArgs),
    Info(info::InfoArgs),
    Check(check::CheckArgs),
    Map(map::MapArgs),
    Measure(measure::MeasureArgs),
    Convert(convert::ConvertArgs),
    Compare(compare::CompareArgs),
    Commit(commit::CommitArgs),
    Rebase(rebase::RebaseArgs),
    Reset(reset::ResetArgs),
    Resize(resize::ResizeArgs),
    Log(log::LogArgs),
    Qmp(qmp::QmpArgs),
    Top(top::TopArgs),
    Bench(Box<bench::BenchArgs>),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
}

impl Command {
    /// What is logged unless the operator says otherwise: a server tells what it does, a tool
    /// only what is wrong, and one that is to be quiet only what has failed.
    fn default_level(&self) -> LevelFilter {
        match self {
            Command::Serve(_) => LevelFilter::INFO,
            _ if self.is_quiet() => LevelFilter::ERROR,
            _ => LevelFilter::WARN,
        }
    }

    /// The exit code of a failure that the command has none of its own for.
    fn failure(&self) -> u8 {
        match self {
            // 1 would say that the images differ.
            Command::Compare(_) => 2,
            _ => 1,
        }
    }

    /// Whether `-q` is given.
    fn is_quiet(&self) -> bool {
        match self {
            Command::Create(args) => args.quiet,
            Command::Check(args) => args.quiet,
            Command::Convert(args) => args.quiet,
            Command::Compare(args) => args.quiet,
            Command::Commit(args) => args.quiet,
            Command::Rebase(args) => args.quiet,
            Command::Reset(args) => args.quiet,
            Command::Resize(args) => args.quiet,
            _ => false,
        }
    }

    fn run(&self) -> Result<u8> {
        match self {
            Command::Serve(args) => {
                if args.print_capabilities {
                    return serve_args::print_capabilities();
                }
                serve::run(args)
            }
            Command::Create(args) => create::run(args),
            Command::Info(args) => info::run(args),
            Command::Check(args) => check::run(args),
            Command::Map(args) => map::run(args),
            Command::Measure(args) => measure::run(args),
            Command::Convert(args) => convert::run(args),
            Command::Compare(args) => compare::run(args),
            Command::Commit(args) => commit::run(args),
            Command::Rebase(args) => rebase::run(args),
            Command::Reset(args) => reset::run(args),
            Command::Resize(args) => resize::run(args),
            Command::Log(args) => log::run(args),
            Command::Qmp(args) => qmp::run(args),
            Command::Top(args) => top::run(args),
            Command::Bench(args) => bench::run(args).map(|()| DONE),
            Command::Completions(args) => shell::completions(args),
            Command::Man(args) => shell::man(args),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    ignore_file_size_signal();
    let serves = matches!(cli.command, Command::Serve(_));
    let failure = cli.command.failure();
    let result = logging::init(&cli.log, cli.command.default_level(), !serves)
        .and_then(|()| cli.command.run());
    match result {
        Ok(code) => ExitCode::from(code),
        Err(err) => {
            report(&err);
            ExitCode::from(failure)
        }
    }
}

/// Has writes beyond the limit on the size of files (`ulimit -f`) fail, and not kill us: a guest gets an
/// error for that request and no more, and a command says what it could not write.
#[allow(unsafe_code)]
fn ignore_file_size_signal() {
    // SAFETY: no handler is installed that could run anything.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Prints an error as the one line that an operator sees.
pub(crate) fn report(err: &Error) {
    use std::io::Write;
    // Names come from images and paths and may hold anything; the line stays one line.
    let line: String =
        err.to_string().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    // Nobody is left to be told if stderr is gone.
    let _ = writeln!(std::io::stderr(), "vublk: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_tree_is_sound() {
        Cli::command().debug_assert();
    }
}
