//! `vublk qmp`: one command to the control socket of a running process.
//!
//! ```text
//! words ─► nested object ─► types by the server's own schema ─► execute ─► text, or JSON
//!                                                                  └ --wait: until its job is over
//! ```
//!
//! It speaks plain QMP, so it works with QEMU's sockets as well.

pub mod arguments;
pub mod connection;
pub mod human;
mod wait;

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use crate::cli::progress::ProgressArgs;
use crate::cli::{DONE, output};
use crate::error::{Error, Result};
use arguments::Schema;
use connection::Connection;

/// Send a command to the control socket of a running vublk
#[derive(Clone, Debug, Args)]
pub struct QmpArgs {
    /// The control socket (`serve --control`)
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// The command; without one, all commands are listed with what they take
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
    /// Its arguments: key=value, with dots for what is nested (target.filename=x, actions.0.type=abort),
    /// or a JSON object
    #[arg(value_name = "KEY=VALUE")]
    arguments: Vec<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
    /// If the command starts or ends a job, wait until that is over (or ready to be completed)
    #[arg(long, requires = "command")]
    wait: bool,
    /// Print events as they come, one JSON object a line, until interrupted
    #[arg(long, conflicts_with = "wait")]
    events: bool,
    #[command(flatten)]
    progress: ProgressArgs,
}

/// Runs the command; returns the exit code.
pub fn run(args: &QmpArgs) -> Result<u8> {
    let mut connection = Connection::open(&args.socket)?;
    match &args.command {
        Some(command) => execute(args, &mut connection, command)?,
        None if args.events => {}
        None => list(args, &mut connection)?,
    }
    if !args.events {
        return Ok(DONE);
    }
    loop {
        if let Some(event) = connection.event(None)? {
            output::print_or_end(&format!("{event}\n"))?;
        }
    }
}

fn execute(args: &QmpArgs, connection: &mut Connection, command: &str) -> Result<()> {
    let arguments = match args.arguments.as_slice() {
        [] => Default::default(),
        words => arguments::parse(words, command, &Schema::fetch(connection)?)?,
    };
    let job = args.wait.then(|| wait::job_of(&arguments)).flatten();
    if args.wait && job.is_none() {
        return Err(Error::invalid(format!(
            "--wait: which job? give {command} a name with job-id=NAME"
        )));
    }
    let answer = match connection.execute(command, Value::Object(arguments)) {
        Ok(answer) => answer,
        Err(err) => return Err(explained(err, args, connection, command)),
    };
    if args.json {
        output::print_json(&answer)?;
    } else {
        output::print(&human::text(&answer))?;
    }
    match job {
        Some(job) => wait::until_over(connection, command, &job, args.progress),
        None => Ok(()),
    }
}

/// An error of the other side, and what helps whoever has typed the command.
fn explained(err: Error, args: &QmpArgs, connection: &mut Connection, command: &str) -> Error {
    let text = err.to_string();
    let is_of_arguments = text.starts_with("Parameter '")
        && (text.ends_with("' is missing") || text.ends_with("' is unexpected"));
    let help = if text == format!("The command {command} has not been found") {
        Some(format!("vublk qmp {} lists what there is", args.socket.display()))
    } else if is_of_arguments {
        Schema::fetch(connection).ok().and_then(|schema| schema.usage(command))
    } else {
        None
    };
    let Some(help) = help else { return err };
    Error::new(err.kind(), format!("{text} ({help})"))
}

/// Prints all commands.
fn list(args: &QmpArgs, connection: &mut Connection) -> Result<()> {
    if args.json {
        return output::print_json(&connection.execute("query-commands", Value::Null)?);
    }
    let lines: String =
        Schema::fetch(connection)?.usages().into_iter().map(|usage| usage + "\n").collect();
    output::print(&lines)
}
