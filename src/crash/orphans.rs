//! Ends what a checker has left running.
//!
//! A daemon that has left its checker's process group (`setsid`) has the file of its state open and
//! would write to the next one. So this process takes the place of init for all that its checkers begin:
//! who loses his parent becomes a child of ours, and has the name of the check that he belongs to in his
//! environment. He is ended with that check, and then those who have become our children thereby, until
//! there are none.
//!
//! What has cleared its environment, or belongs to another user, could be any worker's, and is let alone.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, getpid, kill_process, pidfd_open, set_child_subreaper,
    waitpid,
};

use crate::error::{Error, ErrorKind, Result, ResultExt};

/// How long a process may take to end that was killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether they become children of ours.
static ARE_OURS: AtomicBool = AtomicBool::new(false);
/// One at a time looks through our children, so that no number changes its meaning meanwhile.
static TURN: Mutex<()> = Mutex::new(());

/// From now on, what loses its parent below this process becomes its child, for good; and those that
/// have died are waited for by `end`. For a process whose threads wait for their own children
/// themselves, and have none that a thread which has ended has left.
///
/// # Errors
/// If the kernel cannot do that.
pub fn adopt() -> Result<()> {
    set_child_subreaper(Some(getpid())).context(|| "prctl(PR_SET_CHILD_SUBREAPER)")?;
    ARE_OURS.store(true, Ordering::Relaxed);
    Ok(())
}

/// Ends all who have `name` (with its value) in their environment and have lost their parent.
///
/// # Errors
/// Kind [`Busy`](ErrorKind::Busy) if one of them does not end.
pub(super) fn end(name: &str) -> Result<()> {
    if !ARE_OURS.load(Ordering::Relaxed) {
        return Ok(());
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut done = HashSet::new();
    loop {
        // Those whose parent was killed are among them now.
        let found: Vec<_> = children().into_iter().filter(|pid| !done.contains(pid)).collect();
        if found.is_empty() {
            return Ok(());
        }
        for pid in found {
            let is_dead = matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(Some(_)));
            if is_dead || !has_in_environment(pid, name) || !kill(pid)? {
                done.insert(pid);
            }
        }
    }
}

/// The children of the first thread, which gets those of all that have none.
fn children() -> Vec<Pid> {
    let own = getpid().as_raw_nonzero();
    let path = format!("/proc/self/task/{own}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

fn has_in_environment(pid: Pid, name: &str) -> bool {
    let environment = std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero()));
    environment.is_ok_and(|bytes| bytes.split(|byte| *byte == 0).any(|it| it == name.as_bytes()))
}

/// Kills a child and waits for its end; whether there is one that has ended.
fn kill(pid: Pid) -> Result<bool> {
    // Nobody else waits for it, so its number is its own.
    if kill_process(pid, Signal::KILL).is_err() {
        return Ok(false);
    }
    let ended = pidfd_open(pid, PidfdFlags::empty()).context(|| "pidfd_open")?;
    let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let mut events = [PollFd::new(&ended, PollFlags::IN)];
    let has_ended = loop {
        match poll(&mut events, Some(&limit)) {
            Err(Errno::INTR) => {}
            other => break other.context(|| "poll")? == 1,
        }
    };
    if !has_ended {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
        return Err(Error::new(
            ErrorKind::Busy,
            format!(
                "a checker has left process {} ({}), which does not end though it was killed, and would \
                 change the next state",
                pid.as_raw_nonzero(),
                name.unwrap_or_default().trim_end()
            ),
        ));
    }
    Ok(matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(Some(_))))
}
