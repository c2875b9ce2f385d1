//! States as plain files where there is no FUSE: a sparse file, written anew for each state.
//!
//! Costs the data of the disk for each state, so it is for small disks and for hosts that forbid
//! better.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crash::disk::StateDisk;
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::error::{Result, ResultExt};
use crate::units::{ByteRange, MIB};

/// The file of one worker. Dropping it removes it.
#[derive(Debug)]
pub struct CopiedFile {
    path: PathBuf,
    disk: StateDisk,
}

impl CopiedFile {
    /// A file below the directory for temporary files.
    pub fn new(worker: usize, disk: StateDisk) -> CopiedFile {
        let name = format!("vublk-state-{}-{worker}.img", std::process::id());
        CopiedFile { path: std::env::temp_dir().join(name), disk }
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
        let file = File::create(&self.path).context(context)?;
        file.set_len(self.disk.size()).context(context)?;
        let mut at = 0;
        while at < self.disk.size() {
            let bytes = self.disk.read(ByteRange { offset: at, len: MIB })?;
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
