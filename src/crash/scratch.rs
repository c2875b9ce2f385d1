//! Directories for what lasts as long as its process.
//!
//! Only its owner may enter one, and it is locked for as long as its process lives. One that nobody has
//! locked is what a killed process has left, and is removed. (A process number would not tell: it
//! may be used again, and means nothing to who sees other processes and the same files.)

use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use crate::error::{Error, ErrorKind, Result, ResultExt};

/// How many directories are made should others take them away.
const TRIES: u32 = 100;

/// See the [module](self). Dropping it removes it, if nothing is left in it.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    /// The directory, locked.
    lock: OwnedFd,
}

impl Scratch {
    /// An empty directory below that for temporary files. Its name begins with `prefix`, and 32
    /// hexadecimal digits follow. What killed processes have left in others with such a name is given to
    /// `clear`, which removes what it knows.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(prefix: &str, clear: impl Fn(&Path, &OwnedFd)) -> Result<Scratch> {
        let temp = std::env::temp_dir();
        sweep(&temp, prefix, clear);
        for _ in 0..TRIES {
            let dir = temp.join(format!("{prefix}{}", uuid::Uuid::new_v4().simple()));
            let context = || dir.display().to_string();
            DirBuilder::new().mode(0o700).create(&dir).context(context)?;
            // Until it is locked, it is a leftover to others.
            if let Some(lock) = lock_left(&dir) {
                return Ok(Scratch { dir, lock });
            }
            let _ = std::fs::remove_dir(&dir);
        }
        let message = format!(
            "{}: others remove what we make in it, or it has no directories that can be locked",
            temp.display()
        );
        Err(Error::new(ErrorKind::Busy, message))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The same, open.
    pub fn dir(&self) -> &OwnedFd {
        &self.lock
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Removes what killed processes have left.
fn sweep(temp: &Path, prefix: &str, clear: impl Fn(&Path, &OwnedFd)) {
    let Ok(entries) = std::fs::read_dir(temp) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
        if !number.is_some_and(|n| n.len() == 32 && n.bytes().all(|b| b.is_ascii_hexdigit())) {
            continue;
        }
        let Some(lock) = lock_left(&entry.path()) else { continue };
        clear(&entry.path(), &lock);
        // Fails if there is anything else in it, which is not ours then.
        let _ = std::fs::remove_dir(entry.path());
    }
}

/// Locks a directory that we have made and that no living process has locked. `None` if it is not one.
fn lock_left(dir: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty()).ok()?;
    let is_own = |stat: &rustix::fs::Stat| {
        stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o077 == 0
    };
    let stat = rustix::fs::fstat(&fd).ok().filter(is_own)?;
    flock(&fd, FlockOperation::NonBlockingLockExclusive).ok()?;
    // Whoever had it locked may have removed it.
    let there = rustix::fs::lstat(dir).ok()?;
    ((there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino)).then_some(fd)
}
