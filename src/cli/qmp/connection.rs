//! The client's end of a control socket: one command at a time, events kept aside.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind as IoErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result, ResultExt};

/// How long a greeting may take. What comes after may take as long as it takes.
const GREETING: Duration = Duration::from_secs(10);

/// How deep a message may be nested. Each image of a chain that `query-block` tells of is one level, and
/// there are chains of hundreds.
const MAX_DEPTH: usize = 1024;

/// See the module's text.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// What has come of a line so far.
    line: Vec<u8>,
    events: VecDeque<Value>,
    /// Marks requests.
    next_id: u64,
    /// For messages.
    name: String,
}

impl Connection {
    /// Connects and ends the negotiation.
    pub fn open(path: &Path) -> Result<Connection> {
        let name = path.display().to_string();
        let stream = UnixStream::connect(path).context(|| format!("control socket {name}"))?;
        let mut connection = Connection {
            reader: BufReader::new(stream),
            line: Vec::new(),
            events: VecDeque::new(),
            next_id: 0,
            name,
        };
        let greeting = connection.message(Some(Instant::now() + GREETING))?;
        if greeting.as_ref().is_none_or(|greeting| greeting.get("QMP").is_none()) {
            return Err(connection.error("nothing that speaks QMP answers there"));
        }
        connection.execute("qmp_capabilities", Value::Null)?;
        Ok(connection)
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// What the other side says, or that it has gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let sent = self.reader.get_mut().write_all(format!("{request}\n").as_bytes());
        sent.context(|| format!("control socket {}", self.name))?;
        loop {
            let Some(mut message) = self.message(None)? else { continue };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message["id"] == id {
                let Some(error) = message.get("error") else { return Ok(message["return"].take()) };
                let desc = error["desc"].as_str().unwrap_or("no reason given");
                return Err(Error::new(ErrorKind::InvalidArgument, desc));
            } else if let Some(desc) = message["error"]["desc"].as_str() {
                return Err(self.error(desc));
            }
        }
    }

    /// The next event; `None` if there is none until `deadline`.
    pub fn event(&mut self, deadline: Option<Instant>) -> Result<Option<Value>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.message(deadline)? {
                None => return Ok(None),
                Some(message) if message.get("event").is_some() => return Ok(Some(message)),
                Some(_) => {}
            }
        }
    }

    /// The next message; `None` at the deadline.
    fn message(&mut self, deadline: Option<Instant>) -> Result<Option<Value>> {
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let what = || format!("control socket {}", self.name);
            self.reader.get_ref().set_read_timeout(left).context(what)?;
            match self.reader.read_until(b'\n', &mut self.line) {
                Ok(0) => return Err(self.error("the other side has closed the connection")),
                Ok(_) if self.line.ends_with(b"\n") => {
                    let message = parse(&self.line);
                    self.line.clear();
                    return message.map(Some).map_err(|err| {
                        self.error(&format!("what comes from there is no JSON: {err}"))
                    });
                }
                Ok(_) => {}
                Err(err) => match err.kind() {
                    IoErrorKind::WouldBlock | IoErrorKind::TimedOut | IoErrorKind::Interrupted => {}
                    _ => return Err(err).context(|| format!("control socket {}", self.name)),
                },
            }
        }
    }

    fn error(&self, text: &str) -> Error {
        Error::new(ErrorKind::Io, format!("control socket {}: {text}", self.name))
    }
}

/// Parses a line.
fn parse(line: &[u8]) -> std::result::Result<Value, String> {
    if depth(line) > MAX_DEPTH {
        return Err(format!("nested deeper than {MAX_DEPTH} levels"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    deserializer.disable_recursion_limit();
    let value = Value::deserialize(&mut deserializer).map_err(|err| err.to_string())?;
    deserializer.end().map_err(|err| err.to_string())?;
    Ok(value)
}

/// How deep objects and arrays are nested.
fn depth(line: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    let (mut is_in_string, mut is_escaped) = (false, false);
    for byte in line {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_in_string => is_escaped = true,
            b'"' => is_in_string = !is_in_string,
            b'{' | b'[' if !is_in_string => depth += 1,
            b'}' | b']' if !is_in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_hundreds_are_understood_and_no_depth_overflows_the_stack() {
        let nested = |n: usize| format!("{}1{}", "{\"image\":[".repeat(n), "]}".repeat(n));
        for levels in [1, 200, MAX_DEPTH / 2] {
            assert_eq!(parse(nested(levels).as_bytes()).unwrap().to_string(), nested(levels));
        }
        for levels in [MAX_DEPTH / 2 + 1, 1 << 20] {
            assert!(parse(nested(levels).as_bytes()).unwrap_err().contains("nested deeper"));
        }
        // What is in strings is not nested.
        let text = json!(["[{\"\\".repeat(MAX_DEPTH)]);
        assert_eq!(parse(text.to_string().as_bytes()).unwrap(), text);
        assert!(parse(b"{} {}").is_err());
    }
}
