//! A block device over a file, where the host lets us make one.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; detached when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Over a file that is there; `None`, visibly, where that is not allowed.
    pub fn over(file: &Path) -> Option<LoopDevice> {
        LoopDevice::with_blocks(file, 512)
    }

    /// The same, with logical blocks of this size.
    pub fn with_blocks(file: &Path, block_size: u32) -> Option<LoopDevice> {
        LoopDevice::with(&["-b", &block_size.to_string()], file)
    }

    /// The same, which refuses writes.
    pub fn read_only(file: &Path) -> Option<LoopDevice> {
        LoopDevice::with(&["-r"], file)
    }

    fn with(options: &[&str], file: &Path) -> Option<LoopDevice> {
        let output =
            Command::new("losetup").args(["-f", "--show"]).args(options).arg(file).output();
        let Some(output) = output.ok().filter(|output| output.status.success()) else {
            super::skip("no loop device can be made");
            return None;
        };
        let device = String::from_utf8(output.stdout).expect("a path in UTF-8");
        Some(LoopDevice(device.trim().into()))
    }

    /// Over a new file of this size.
    pub fn new(file: &Path, size: u64) -> Option<LoopDevice> {
        std::fs::File::create(file).unwrap().set_len(size).unwrap();
        LoopDevice::over(file)
    }

    /// The device's node.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The same as text.
    pub fn name(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}
