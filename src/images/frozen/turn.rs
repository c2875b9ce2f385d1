//! Whose turn it is to change the marks of an image.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::store;
use crate::block::open_gate;
use crate::error::Result;
use crate::io::{File, HostFile, HostKind, lock_notes};

/// How long somebody who changes marks, too, is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether he is done.
const LOOK: Duration = Duration::from_millis(1);

/// The turn to change the marks and notes of an image, which one process has at a time: they are read,
/// changed and written, and two who do that at once would lose what one of them has written.
///
/// It is a lock of the host's, so it ends with whoever has it. Where marks are attributes, it is on a byte
/// of the image itself, opened for writing: whoever may set the one may do the other. Where they are
/// files, it is on their directory, since the image may be one that cannot be written to. Where the host
/// has no such lock, everybody has the turn.
#[derive(Debug)]
pub struct Turn<'a> {
    pub(super) file: &'a HostFile,
    lock: Lock,
}

/// What came of it.
#[derive(Debug)]
enum Lock {
    /// Held until this is closed.
    Held { _fd: OwnedFd },
    /// There is none to be had.
    None,
    /// Somebody else has it all the time.
    Others,
}

impl<'a> Turn<'a> {
    /// Waits for the turn; not forever for somebody who keeps it. Then the marks are changed all the same
    /// by whoever has to: an entry that is lost is less likely than one that would never be made.
    pub fn wait(file: &'a HostFile) -> Turn<'a> {
        let opened = match file.kind() {
            HostKind::Regular => open(file),
            // Takes no mark, and to open it for writing is an event for all the host.
            HostKind::BlockDevice => Err(Errno::NOTSUP),
        };
        let lock = match opened {
            Ok(fd) if store::has_attributes(file) => wait_for(fd, |fd| lock_notes(fd.as_fd())),
            Ok(fd) => wait_for(fd, lock_directory),
            Err(_) => Lock::None,
        };
        if matches!(lock, Lock::Others) {
            tracing::warn!(
                "{}: another process has been changing its marks for {} seconds",
                file.name(),
                PATIENCE.as_secs()
            );
        }
        Turn { file, lock }
    }

    /// Whether somebody else has it, who has been waited for in vain.
    pub fn is_of_others(&self) -> bool {
        matches!(self.lock, Lock::Others)
    }
}

/// What is locked, opened anew: a lock belongs to an open file, and the image's may be in the hands of
/// several threads.
fn open(file: &HostFile) -> rustix::io::Result<OwnedFd> {
    match store::has_attributes(file) {
        true => {
            let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
            rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        }
        false => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(open_gate::directory_of(file.path()), flags, Mode::empty())
        }
    }
}

fn lock_directory(fd: &OwnedFd) -> Result<bool> {
    match rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

fn wait_for(fd: OwnedFd, try_lock: impl Fn(&OwnedFd) -> Result<bool>) -> Lock {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match try_lock(&fd) {
            Ok(true) => return Lock::Held { _fd: fd },
            Ok(false) if Instant::now() < deadline => std::thread::sleep(LOOK),
            Ok(false) => return Lock::Others,
            Err(_) => return Lock::None,
        }
    }
}
