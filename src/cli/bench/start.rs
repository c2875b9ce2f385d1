//! The back-end as a child process: how long from exec to its socket, and to the first read.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::args::BenchArgs;
use super::session_options;
use crate::device::server::remove_stale;
use crate::error::{Error, Result, ResultExt};
use crate::frontend::{Client, Session, Wire};

/// How often to look for the socket.
const LOOK: Duration = Duration::from_micros(50);
/// How long a back-end may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A back-end that was started here.
#[derive(Debug)]
pub struct Child {
    /// The process.
    child: std::process::Child,
    /// When it was started.
    begin: Instant,
    /// From there to the socket.
    socket: Duration,
    /// Its socket.
    path: PathBuf,
}

/// Times of one start.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// From exec to a socket that accepts.
    pub socket: Duration,
    /// From exec to the first completed read.
    pub first_read: Duration,
}

impl Child {
    /// Starts a command, waits until its socket accepts, and returns the connection with it.
    pub fn spawn(command: &str, socket_path: &Path) -> Result<(Self, Wire)> {
        let words = split(command)?;
        let (program, rest) =
            words.split_first().ok_or_else(|| Error::invalid("--start names no command"))?;
        // A socket left by an earlier process would be found too soon.
        if Wire::connect(socket_path).is_ok() {
            return Err(Error::invalid(format!(
                "{} is in use: --start would measure another process",
                socket_path.display()
            )));
        }
        remove_stale(socket_path)?;
        let begin = Instant::now();
        let mut child = Command::new(program)
            .args(rest)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context(|| format!("cannot start {program}"))?;
        let wire = loop {
            match Wire::connect(socket_path) {
                Ok(wire) => break wire,
                Err(err) if begin.elapsed() > STOP_TIMEOUT => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(err.context(format!("{program} did not open its socket")));
                }
                Err(_) => {
                    if let Some(status) = child.try_wait()? {
                        return Err(Error::invalid(format!("{program} ended at once ({status})")));
                    }
                    thread::sleep(LOOK);
                }
            }
        };
        let socket = begin.elapsed();
        let path = socket_path.to_owned();
        Ok((Child { child, begin, socket, path }, wire))
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Milliseconds from exec to the socket.
    pub fn socket_ms(&self) -> f64 {
        self.socket.as_secs_f64() * 1e3
    }

    /// Asks it to stop and waits for that; kills it when it does not.
    pub fn stop(mut self) -> Result<()> {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Err(Error::from_errno(libc::ETIMEDOUT)
                    .context("the back-end does not stop at SIGTERM and was killed"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = remove_stale(&self.path);
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Starts and stops the back-end as often as was asked for.
pub fn measure(args: &BenchArgs, command: &str) -> Result<Vec<Round>> {
    let mut rounds = Vec::new();
    for _ in 0..args.start_rounds {
        let (child, wire) = Child::spawn(command, args.socket())?;
        let client = Client::new(wire, args.timeout);
        let mut session = Session::negotiate(client, args.socket(), session_options(args))?;
        session.start()?;
        session.read(0, args.offset, args.block_size)?;
        rounds.push(Round { socket: child.socket, first_read: child.begin.elapsed() });
        drop(session);
        child.stop()?;
    }
    Ok(rounds)
}

/// Splits a command at blanks; single and double quotes keep blanks together.
fn split(command: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in command.chars() {
        match quote {
            Some(end) if c == end => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            None => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(Error::invalid("--start has a quote without its partner"));
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_split_at_blanks() {
        assert_eq!(split("a  b 'c d' e\"f g\"'' ''").unwrap(), ["a", "b", "c d", "ef g", ""]);
        assert!(split("a 'b").is_err());
        assert!(split("  ").unwrap().is_empty());
    }
}
