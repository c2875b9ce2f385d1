//! What a file or a device is made of: tells whether two of them share their storage, by whatever paths.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::io::{HostFile, HostKind};

/// Something that data lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storage {
    /// A block device, by its number.
    Device(u64),
    /// A file, by its device and inode.
    File(u64, u64),
}

/// Whether a write to `one` may change `other`: they are the same, or one of them is made of the other,
/// as a partition is of its disk, and a loop device of its file.
///
/// # Errors
/// If the host does not say what the two are.
pub fn shares(one: &HostFile, other: &HostFile) -> Result<bool> {
    let (one, other) = (storage(one)?, storage(other)?);
    Ok(all_of(one).contains(&other) || all_of(other).contains(&one))
}

fn storage(file: &HostFile) -> Result<Storage> {
    let (device, inode) = file.identity()?;
    Ok(match file.kind() {
        HostKind::BlockDevice => Storage::Device(device),
        HostKind::Regular => Storage::File(device, inode),
    })
}

/// It, and what it is made of, as far as the host says.
fn all_of(storage: Storage) -> Vec<Storage> {
    let mut all = vec![storage];
    let mut next = 0;
    while let Some(storage) = all.get(next) {
        for part in parts_of(*storage) {
            if !all.contains(&part) {
                all.push(part);
            }
        }
        next += 1;
    }
    all
}

fn parts_of(storage: Storage) -> Vec<Storage> {
    let Storage::Device(number) = storage else { return Vec::new() };
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let link = format!("/sys/dev/block/{major}:{minor}");
    let Ok(directory) = std::fs::canonicalize(link) else { return Vec::new() };
    let mut parts = Vec::new();
    if directory.join("partition").exists() {
        parts.extend(directory.parent().and_then(device_of));
    }
    let slaves = std::fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten();
    parts.extend(slaves.filter_map(|slave| device_of(&slave.path())));
    if let Ok(path) = std::fs::read_to_string(directory.join("loop/backing_file"))
        && let Ok(meta) = std::fs::metadata(PathBuf::from(path.trim_end_matches('\n')))
    {
        parts.push(match meta.file_type().is_block_device() {
            true => Storage::Device(meta.rdev()),
            false => Storage::File(meta.dev(), meta.ino()),
        });
    }
    parts
}

/// The device that a directory in /sys is of.
fn device_of(directory: &Path) -> Option<Storage> {
    let text = std::fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(Storage::Device(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)))
}
