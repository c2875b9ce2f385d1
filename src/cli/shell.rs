//! Completions and manual pages, made from the command tree itself.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::{Cli, DONE, output};
use crate::error::{Result, ResultExt};

/// Print a completion script for a shell
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write the manual pages (section 1) to a directory
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The directory; made if missing
    dir: PathBuf,
}

pub fn completions(args: &CompletionsArgs) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vublk", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(DONE)
}

pub fn man(args: &ManArgs) -> Result<u8> {
    let name = || args.dir.display().to_string();
    std::fs::create_dir_all(&args.dir).context(name)?;
    clap_mangen::generate_to(Cli::command(), &args.dir).context(name)?;
    Ok(DONE)
}
