//! Who else has a file open, for the message that refuses to share it.
//!
//! Image locks belong to open files, not to processes, so the kernel does not say whose they are.
//! Looking through the descriptors of all processes does, as far as they may be looked at. Only
//! done once something has failed.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::io::HostFile;

/// The most processes that are named.
const MAX_NAMED: usize = 3;

/// Who has this file open besides the caller, as `name (pid 1234)`, or `this process` if it has it
/// open once more; empty if nobody can be seen.
pub fn of(file: &HostFile) -> Vec<String> {
    let Ok(wanted) = std::fs::metadata(file.path()) else { return Vec::new() };
    let number =
        inode_of(&Path::new("/proc/self/fdinfo").join(file.as_fd().as_raw_fd().to_string()));
    let own = std::process::id().to_string();
    let mut users = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let descriptors = std::fs::read_dir(process.path().join("fdinfo")).into_iter().flatten();
        let mut to_the_file =
            descriptors.flatten().filter(|fd| inode_of(&fd.path()) == number).filter(|fd| {
                // Follows the link to the open file itself.
                std::fs::metadata(process.path().join("fd").join(fd.file_name()))
                    .is_ok_and(|meta| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino()))
            });
        // One descriptor of ours is the caller's.
        let not_others = usize::from(pid == own);
        if to_the_file.nth(not_others).is_some() {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            users.push(match pid == own {
                true => "this process".to_string(),
                false => format!("{} (pid {pid})", name.trim_end()),
            });
            if users.len() == MAX_NAMED {
                break;
            }
        }
    }
    users
}

/// The inode number of an open file as the kernel has it, from its `fdinfo`; none if it does not say.
/// What strangers have open may be on a file system that does not answer, so the file system is asked
/// only where this number is the right one.
fn inode_of(info: &Path) -> Option<String> {
    let text = std::fs::read_to_string(info).ok()?;
    text.lines().find_map(|line| line.strip_prefix("ino:")).map(|number| number.trim().to_string())
}
