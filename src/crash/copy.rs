//! States as plain files where there is no FUSE: a sparse file, written anew for each state.
//!
//! Costs the data of the disk for each state, so it is for small disks and for hosts that forbid
//! better.
//!
//! The files are in a directory that only its owner may enter, and that is locked for as long as its
//! process lives. One that nobody has locked is what a killed process has left, and is removed.

use std::fs::{DirBuilder, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock};

use crate::crash::disk::StateDisk;
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::units::{ByteRange, MIB};

/// What the names of our directories begin with; 32 hexadecimal digits follow.
const DIR_PREFIX: &str = "vublk-copies-";
/// How many directories are made should others take them away.
const TRIES: u32 = 100;

/// The directory of a process's copies. Dropping it removes it.
#[derive(Debug)]
pub struct Copies {
    dir: PathBuf,
    /// The directory, locked.
    _lock: OwnedFd,
}

impl Copies {
    /// An empty directory below that for temporary files.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> Result<Copies> {
        let temp = std::env::temp_dir();
        sweep(&temp);
        for _ in 0..TRIES {
            let dir = temp.join(format!("{DIR_PREFIX}{}", uuid::Uuid::new_v4().simple()));
            let context = || dir.display().to_string();
            DirBuilder::new().mode(0o700).create(&dir).context(context)?;
            // Until it is locked, it is a leftover to others.
            if let Some(lock) = lock_left(&dir) {
                return Ok(Copies { dir, _lock: lock });
            }
        }
        let message = format!("{}: others remove what we make in it", temp.display());
        Err(Error::new(ErrorKind::Busy, message))
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Removes what killed processes have left.
fn sweep(temp: &Path) {
    let Ok(entries) = std::fs::read_dir(temp) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(DIR_PREFIX));
        if !number.is_some_and(|n| n.len() == 32 && n.bytes().all(|b| b.is_ascii_hexdigit())) {
            continue;
        }
        let Some(lock) = lock_left(&entry.path()) else { continue };
        let Ok(files) = rustix::fs::Dir::read_from(&lock) else { continue };
        for file in files.flatten() {
            if is_copy(file.file_name().to_bytes()) {
                let _ = rustix::fs::unlinkat(&lock, file.file_name(), AtFlags::empty());
            }
        }
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

fn file_name(worker: usize) -> String {
    format!("{worker}.img")
}

/// Whether a name is one of [`file_name`].
fn is_copy(name: &[u8]) -> bool {
    let number = name.strip_suffix(b".img");
    number.is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit))
}

/// The file of one worker. Dropping it removes it.
#[derive(Debug)]
pub struct CopiedFile {
    path: PathBuf,
    disk: StateDisk,
}

impl CopiedFile {
    /// A file among the others.
    pub fn new(copies: &Copies, worker: usize, disk: StateDisk) -> CopiedFile {
        CopiedFile { path: copies.dir.join(file_name(worker)), disk }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The log that its states are of.
    pub fn history(&self) -> Arc<History> {
        Arc::clone(self.disk.history())
    }

    /// Makes it the state `name`, fresh.
    pub fn show(&mut self, name: &StateName) -> Result<()> {
        self.disk.show(name)?;
        let context = || self.path.display().to_string();
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&self.path).context(context)?;
        file.set_len(self.disk.size()).context(context)?;
        let mut at = 0;
        while at < self.disk.size() {
            let (run, is_zero) = self.disk.run(ByteRange::between(at, self.disk.size()))?;
            if is_zero {
                at = run.end();
                continue;
            }
            let bytes = self.disk.read(ByteRange { len: run.len.min(MIB), ..run })?;
            for (i, page) in bytes.chunks(4096).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(page, at + i as u64 * 4096).context(context)?;
                }
            }
            at += bytes.len() as u64;
        }
        Ok(())
    }
}

impl Drop for CopiedFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
