//! States as plain files where there is no FUSE: a sparse file, written anew for each state.
//!
//! Costs the data of the disk for each state, so it is for small disks and for hosts that forbid
//! better.
//!
//! The files are in a directory that only its owner may enter. What a killed process has left, the next
//! one removes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::AtFlags;

use crate::crash::disk::StateDisk;
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::crash::scratch::Scratch;
use crate::error::{Result, ResultExt};
use crate::units::{ByteRange, MIB};

/// What the names of our directories begin with.
const DIR_PREFIX: &str = "vublk-copies-";

/// The directory of a process's copies. Dropping it removes it.
#[derive(Debug)]
pub struct Copies {
    dir: Scratch,
}

impl Copies {
    /// An empty directory below that for temporary files.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> Result<Copies> {
        Ok(Copies { dir: Scratch::new(DIR_PREFIX, remove_copies)? })
    }
}

/// Removes what a killed process has left.
fn remove_copies(_path: &Path, dir: &OwnedFd) {
    let Ok(files) = rustix::fs::Dir::read_from(dir) else { return };
    for file in files.flatten() {
        if is_copy(file.file_name().to_bytes()) {
            let _ = rustix::fs::unlinkat(dir, file.file_name(), AtFlags::empty());
        }
    }
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
        CopiedFile { path: copies.dir.path().join(file_name(worker)), disk }
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
        // The checker may have made something else of the file, or have kept it by another name.
        match std::fs::remove_file(&self.path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(err).context(context);
            }
            _ => {}
        }
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
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
