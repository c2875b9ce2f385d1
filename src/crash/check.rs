//! Checkers: programs, or a guest, that say whether a state is good.

#![allow(unsafe_code)]

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::crash::name::StateName;
use crate::crash::stop::{Stop, stopped};
use crate::crash::{guard, orphans};
use crate::error::{Error, ErrorKind, Result, ResultExt};

/// What a shell exits with where it cannot run a command.
const NOT_EXECUTABLE: [i32; 2] = [126, 127];
/// How much of what a checker prints is kept: the end of it.
const OUTPUT_KEPT: u64 = 4096;

/// See the [module](self).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checker {
    /// Recovers the journal as a mount would, then `e2fsck -fn` must find nothing.
    Ext4,
    /// A shell's command line in which `{}` stands for the path of the disk, `{state}` for the name of
    /// the state, and `{mark}` for the last mark before the power cut. Exit code 0 is good.
    Command(String),
    /// A guest that has the state as its disk; see [`mailbox`](crate::crash::mailbox). It is told the
    /// last mark.
    Guest,
}

/// What stands for the path of the disk in a command.
const PATH: &str = "{}";
/// What stands for the name of the state.
const STATE: &str = "{state}";
/// What stands for the last mark in a command, which gets it as one word.
const MARK: &str = "{mark}";
/// Where the command has it. A mark may hold anything, and comes from whoever made the log: as part of
/// the command it would be one wherever somebody puts it in quotes of his own.
const MARK_VARIABLE: &str = "VUBLK_MARK";

/// A text as one word for the shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A text as one word for the shell, and as it is if it is one already: it may stand in quotes then.
fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,@%:=".contains(c);
    if text.chars().all(is_plain) { text.to_string() } else { quoted(text) }
}

/// How long a checker may run.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// Then it is killed, and the state is not good.
    pub limit: Duration,
    /// Then it is killed, and nothing is known of the state.
    pub stop: &'a Stop,
}

/// What a checker found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The state is good.
    Good,
    /// It is not; says how the checker ended.
    Bad(String),
}

impl FromStr for Checker {
    type Err = Error;

    fn from_str(text: &str) -> Result<Checker> {
        let quoted = |quote: char| text.contains(&format!("{quote}{MARK}{quote}"));
        match text {
            "ext4" => Ok(Checker::Ext4),
            // In them it would be no word, or another one.
            _ if quoted('\'') || quoted('"') => Err(Error::invalid(format!(
                "'{text}': {MARK} is one word by itself; leave out the quotes around it"
            ))),
            command if command.contains(PATH) || command.contains(STATE) => {
                Ok(Checker::Command(command.into()))
            }
            _ => Err(Error::invalid(format!(
                "'{text}' is neither ext4 nor a command with {{}} in the place of the disk's path, or \
                 {{state}} in that of the state's name"
            ))),
        }
    }
}

impl std::fmt::Display for Checker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Checker::Ext4 => f.write_str("ext4"),
            Checker::Command(command) => f.write_str(command),
            Checker::Guest => f.write_str("a guest"),
        }
    }
}

impl Checker {
    /// Whether the verdict may depend on the last mark, and not on the disk alone.
    pub fn wants_mark(&self) -> bool {
        match self {
            Checker::Ext4 => false,
            Checker::Command(line) => line.contains(MARK),
            Checker::Guest => true,
        }
    }

    /// Whether it looks at the disk as a file, and not by the name of its state alone.
    pub fn wants_file(&self) -> bool {
        match self {
            Checker::Ext4 => true,
            Checker::Command(line) => line.contains(PATH),
            Checker::Guest => false,
        }
    }

    /// Whether the verdict depends on nothing but what it reads of that file, and on the last mark.
    pub fn reads_the_file_alone(&self) -> bool {
        match self {
            Checker::Ext4 => true,
            Checker::Command(line) => line.contains(PATH) && !line.contains(STATE),
            Checker::Guest => false,
        }
    }

    /// Checks the disk at `path`, which is the state `state`, left by a power cut after `mark`; what is printed goes nowhere, or
    /// to `output`.
    ///
    /// # Errors
    /// If the checker cannot be run at all, which says nothing about the disk. Kind
    /// [`Cancelled`](ErrorKind::Cancelled) if it was to end.
    pub fn run(
        &self,
        path: &Path,
        state: &StateName,
        mark: &str,
        bounds: Bounds<'_>,
        output: Option<&File>,
    ) -> Result<Verdict> {
        match self {
            Checker::Guest => Err(Error::invalid("a guest is no program that could be run")),
            Checker::Command(line) => {
                let line = line.replace(PATH, &word(&path.display().to_string()));
                let line = line.replace(STATE, &state.to_string());
                let line = line.replace(MARK, &format!("\"${MARK_VARIABLE}\""));
                let mut command = Command::new("sh");
                command.arg("-c").arg(&line).env(MARK_VARIABLE, mark);
                let status = run(&mut command, bounds, output)?;
                if status
                    .and_then(|status| status.code())
                    .is_some_and(|c| NOT_EXECUTABLE.contains(&c))
                {
                    let message = format!("the checker cannot be run: {line}");
                    return Err(Error::new(ErrorKind::NotFound, message));
                }
                Ok(verdict("the checker", status, &[0], bounds.limit))
            }
            Checker::Ext4 => {
                // Without -f: that would check and repair everything after the recovery.
                let mut recover = Command::new("e2fsck");
                recover.args(["-y", "-E", "journal_only"]).arg(path);
                let status = run(&mut recover, bounds, output)?;
                let recovered = verdict("the journal's recovery", status, &[0, 1], bounds.limit);
                if recovered != Verdict::Good {
                    return Ok(recovered);
                }
                let mut check = Command::new("e2fsck");
                check.arg("-fn").arg(path);
                let status = run(&mut check, bounds, output)?;
                Ok(verdict("e2fsck", status, &[0], bounds.limit))
            }
        }
    }

    /// Like [`Checker::run`], with the end of what the checker printed.
    pub fn run_and_listen(
        &self,
        path: &Path,
        state: &StateName,
        mark: &str,
        bounds: Bounds<'_>,
    ) -> Result<(Verdict, String)> {
        use std::os::unix::fs::FileExt;
        let memory = rustix::fs::memfd_create("checker", rustix::fs::MemfdFlags::CLOEXEC)
            .context(|| "memory for what the checker prints")?;
        let file = File::from(memory);
        let verdict = self.run(path, state, mark, bounds, Some(&file))?;
        let len = file.metadata()?.len();
        let mut bytes = vec![0; len.min(OUTPUT_KEPT) as usize];
        let start = len - bytes.len() as u64;
        file.read_exact_at(&mut bytes, start)?;
        Ok((verdict, String::from_utf8_lossy(&bytes).into_owned()))
    }
}

fn verdict(who: &str, status: Option<ExitStatus>, good: &[i32], limit: Duration) -> Verdict {
    match status {
        None => Verdict::Bad(format!("{who} was killed after {} seconds", limit.as_secs())),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) if good.contains(&code) => Verdict::Good,
            (Some(code), _) => Verdict::Bad(format!("{who} exited with {code}")),
            (None, signal) => {
                let signal = signal.map(|number| format!(" by signal {number}"));
                Verdict::Bad(format!("{who} was killed{}", signal.unwrap_or_default()))
            }
        },
    }
}

/// Has a command begin with no signal blocked, and none ignored that we do. We block those that we wait for,
/// and who uses `timeout` or `kill` in a checker wants them to arrive.
fn reset_signals(command: &mut Command) {
    let reset = || {
        let mut none = MaybeUninit::uninit();
        // SAFETY: it is made what it is to be before it is used.
        let done = unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_DFL);
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
        };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: these calls may be made between fork and exec, and no memory is allocated.
    unsafe { command.pre_exec(reset) };
}

/// Runs a command to its end; `None` if it had to be killed because it took too long. Nothing that it
/// has started is left: that would still have the file in which the next state is shown.
fn run(
    command: &mut Command,
    bounds: Bounds<'_>,
    output: Option<&File>,
) -> Result<Option<ExitStatus>> {
    let stdio = || -> Result<Stdio> {
        Ok(output.map(File::try_clone).transpose()?.map_or_else(Stdio::null, Stdio::from))
    };
    command.stdin(Stdio::null()).stdout(stdio()?).stderr(stdio()?);
    let mark = guard::mark(command);
    reset_signals(command);
    // A group of its own: Ctrl-C at the terminal is for us, and must not look like a bad disk.
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.process_group(0).spawn().context(|| name)?;
    let pid = Pid::from_child(&child);
    let ended = pidfd_open(pid, PidfdFlags::empty()).context(|| "pidfd_open")?;
    // Nobody waits longer than the kernel can.
    let seconds = bounds.limit.as_secs().try_into().unwrap_or(i64::MAX);
    let limit = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let (mut has_ended, mut is_late) = (false, false);
    while !has_ended && !is_late && !bounds.stop.is_asked() {
        let mut events = [PollFd::new(&ended, PollFlags::IN), bounds.stop.poll()];
        match poll(&mut events, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            Err(err) => return Err(Error::from(std::io::Error::from(err))),
            Ok(0) => is_late = true,
            Ok(_) => has_ended = !events[0].revents().is_empty(),
        }
    }
    // Before it is waited for: until then nobody else has its number.
    let _ = kill_process_group(pid, Signal::KILL);
    let status = child.wait()?;
    orphans::end(&mark)?;
    match (has_ended, is_late) {
        (true, _) => Ok(Some(status)),
        (_, true) => Ok(None),
        _ => Err(stopped()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str) -> Result<Verdict> {
        let checker: Checker = line.parse()?;
        let (state, stop) = (StateName::prefix(7), Stop::new()?);
        let bounds = Bounds { limit: Duration::from_secs(1), stop: &stop };
        checker.run(Path::new("/dev/null"), &state, "a mark's {} text", bounds, None)
    }

    #[test]
    fn the_exit_code_decides() {
        assert_eq!(check("test -e {}").unwrap(), Verdict::Good);
        assert_eq!(check("exit 3 # {}").unwrap(), Verdict::Bad("the checker exited with 3".into()));
        let slow = Verdict::Bad("the checker was killed after 1 seconds".into());
        assert_eq!(check("sleep 100 < {}").unwrap(), slow);
        let killed = Verdict::Bad("the checker was killed by signal 9".into());
        assert_eq!(check("kill -9 $$ # {}").unwrap(), killed);
        assert!(check("/no/such/program {}").is_err());
        assert!(check("true").is_err(), "a checker that does not look at the disk");
        let mark = check("test -e {} && test $(printf %s {mark} | wc -c) = 16");
        assert_eq!(mark.unwrap(), Verdict::Good, "a mark is one word, and not looked into");
        assert_eq!(check("test {state} = E7").unwrap(), Verdict::Good);
    }

    #[test]
    fn a_checker_may_have_all_the_time_there_is() {
        let (state, stop) = (StateName::prefix(0), Stop::new().unwrap());
        for seconds in [1 << 63, u64::MAX] {
            let bounds = Bounds { limit: Duration::from_secs(seconds), stop: &stop };
            let checker = Checker::Command("test {}".into());
            let verdict = checker.run(Path::new("/dev/null"), &state, "", bounds, None);
            assert_eq!(verdict.unwrap(), Verdict::Good);
        }
    }

    #[test]
    fn a_mark_is_never_a_command() {
        let dir = tempfile::tempdir().unwrap();
        let trap = dir.path().join("trap");
        let mark = format!("'\"$(touch {0})`touch {0}`", trap.display());
        let (state, stop) = (StateName::prefix(0), Stop::new().unwrap());
        let bounds = Bounds { limit: Duration::from_secs(60), stop: &stop };
        for quote in ["", "\"", "'"] {
            let checker = Checker::Command(format!(": {{}} {quote}{{mark}}{quote}"));
            let verdict = checker.run(Path::new("/dev/null"), &state, &mark, bounds, None);
            assert_eq!(verdict.unwrap(), Verdict::Good);
            assert!(!trap.exists(), "with {quote} around it");
        }
    }

    #[test]
    fn a_mark_in_quotes_is_refused() {
        for text in ["look {} '{mark}'", "look {} \"{mark}\""] {
            let err = text.parse::<Checker>().unwrap_err().to_string();
            assert!(err.contains("leave out the quotes around it"), "{err}");
        }
        for text in ["look {} {mark}", "sh -c 'look {} {mark}'", "test \"$(look {} {mark})\""] {
            text.parse::<Checker>().unwrap();
        }
    }

    #[test]
    fn the_end_of_what_is_printed_is_kept() {
        let checker = Checker::Command("echo first; seq 2000; echo {} >&2; exit 1".into());
        let stop = Stop::new().unwrap();
        let bounds = Bounds { limit: Duration::from_secs(60), stop: &stop };
        let state = StateName::prefix(0);
        let (verdict, output) =
            checker.run_and_listen(Path::new("/a/disk"), &state, "", bounds).unwrap();
        assert_eq!(verdict, Verdict::Bad("the checker exited with 1".into()));
        assert!(output.ends_with("2000\n/a/disk\n") && !output.contains("first"), "{output}");
    }
}
