//! The command line.

pub mod bench;

use std::process::ExitCode;

use clap::Parser;

/// The commands that exist so far.
#[derive(Parser)]
#[command(name = "vublk", version)]
enum Command {
    /// Load generator for any vhost-user-blk back-end
    Bench(Box<bench::BenchArgs>),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let Command::Bench(args) = Command::parse();
    match bench::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("vublk: {err}");
            ExitCode::FAILURE
        }
    }
}
