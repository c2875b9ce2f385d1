//! Who else has a file open, for the message that refuses to share it.
//!
//! Image locks belong to open files, not to processes, so the kernel does not say whose they are.
//! Looking through the descriptors of all processes does, as far as they may be looked at. Only
//! done once something has failed.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::io::HostFile;

/// The most processes that are named.
const MAX_NAMED: usize = 3;

/// Who has this file open besides the caller, as `name (pid 1234)`, or `this process` if it has it
/// open once more; empty if nobody can be seen.
pub fn of(file: &HostFile) -> Vec<String> {
    let Ok(wanted) = file.identity() else { return Vec::new() };
    let own = std::process::id().to_string();
    let mut users = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let descriptors = std::fs::read_dir(process.path().join("fdinfo")).into_iter().flatten();
        let mut to_the_file =
            descriptors.flatten().filter(|fd| is_open(&process.path(), &fd.path(), wanted));
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

/// Whether a descriptor of a process is of the file with this device and inode number.
fn is_open(process: &Path, info: &Path, wanted: (u64, u64)) -> bool {
    // What strangers have open may be on a file system that does not answer, and is not asked
    // before the number of its inode is the right one, which the kernel knows by itself.
    let Ok(text) = std::fs::read_to_string(info) else { return false };
    let inode = text.lines().find_map(|line| line.strip_prefix("ino:"));
    if inode.is_some_and(|inode| inode.trim().parse() != Ok(wanted.1)) {
        return false;
    }
    let Some(number) = info.file_name() else { return false };
    // Follows the link to the open file itself.
    std::fs::metadata(process.join("fd").join(number))
        .is_ok_and(|meta| (meta.dev(), meta.ino()) == wanted)
}
