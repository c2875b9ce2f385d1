//! Printing to stdout without panics when the reader has gone.

use std::io::Write;

use serde::Serialize;

use crate::error::{Result, ResultExt};

/// Prints `text` as it is. Where the reader has closed its end (`vublk check … | head`), nobody hears it,
/// and the command goes on: its exit code still has to tell what was found.
pub fn print(text: &str) -> Result<()> {
    try_print(text).map(drop)
}

/// The same for a part of a list, which may be long or without end. If the reader has closed its end, the
/// program ends quietly, as one that does not ignore SIGPIPE would.
pub fn print_or_end(text: &str) -> Result<()> {
    match try_print(text)? {
        true => Ok(()),
        false => std::process::exit(0),
    }
}

/// As [`print()`], for whoever wants to know: false if the reader has closed its end.
pub fn try_print(text: &str) -> Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(err) if err.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true).context(|| "writing to stdout"),
    }
}

/// Prints a value as indented JSON (four spaces, as qemu-img does) and a line end.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut bytes = Vec::new();
    let format = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, format);
    value.serialize(&mut serializer).map_err(std::io::Error::from)?;
    bytes.push(b'\n');
    print(&String::from_utf8_lossy(&bytes))
}
