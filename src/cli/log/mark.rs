//! `vublk log mark`: gives a name to the present end of a log that is being recorded.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::DONE;
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// Add a mark to the log that a running `vublk serve` records; it is durable when this returns
#[derive(Debug, Args)]
pub struct MarkArgs {
    /// Which disk: an export or a node
    #[arg(long, value_name = "NAME", default_value = "disk")]
    device: String,
    /// The control socket (`serve --control`)
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// The mark
    #[arg(value_name = "TEXT")]
    text: String,
}

pub fn run(args: &MarkArgs) -> Result<u8> {
    let name = || args.socket.display().to_string();
    mark(args).context(name)?;
    Ok(DONE)
}

fn mark(args: &MarkArgs) -> Result<()> {
    let mut stream = BufReader::new(UnixStream::connect(&args.socket)?);
    read(&mut stream, "QMP")?;
    execute(&mut stream, json!({ "execute": "qmp_capabilities" }))?;
    let arguments = json!({ "device": args.device, "mark": args.text });
    execute(&mut stream, json!({ "execute": "x-vublk-log-mark", "arguments": arguments }))
}

/// Runs a command and waits for its end.
fn execute(stream: &mut BufReader<UnixStream>, command: Value) -> Result<()> {
    stream.get_mut().write_all(format!("{command}\n").as_bytes())?;
    read(stream, "return")
}

/// Reads up to the message with this member. Events come in between.
fn read(stream: &mut BufReader<UnixStream>, member: &str) -> Result<()> {
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(Error::new(ErrorKind::Io, "the connection was closed"));
        }
        let message: Value = serde_json::from_str(&line)
            .map_err(|err| Error::corrupt(format!("what came is not QMP: {err}")))?;
        if let Some(desc) = message["error"]["desc"].as_str() {
            return Err(Error::invalid(desc));
        }
        if message.get(member).is_some() {
            return Ok(());
        }
    }
}
