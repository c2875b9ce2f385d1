//! Where marks are: in an extended attribute of the image, or in a file beside it.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::block::open_gate;
use crate::error::{Error, Result, ResultExt};
use crate::io::{File, HostFile};

/// The longest mark, of the kernel's.
const MAX_MARK: usize = 65536;
/// What a mark beside an image begins with; then come the inode, a line feed, and the path.
const BESIDE: &str = "vublk: the disk of the file beside this one goes on elsewhere; inode ";

/// Has an attribute, or the file that stands for it, say this; durable on return.
pub(super) fn put(file: &HostFile, attribute: &str, value: &[u8]) -> Result<()> {
    #[cfg(test)]
    super::tests::step();
    if value.len() > MAX_MARK {
        return Err(Errno::NOSPC.into());
    }
    let flags = rustix::fs::XattrFlags::empty();
    match rustix::fs::fsetxattr(file.as_fd(), attribute, value, flags) {
        Ok(()) => rustix::fs::fsync(file.as_fd()).map_err(Error::from),
        Err(Errno::OPNOTSUPP) => put_beside(file, attribute, value),
        Err(err) => Err(err.into()),
    }
}

/// Takes an attribute away; durable on return. What cannot be removed is logged.
pub(super) fn take(file: &HostFile, attribute: &str) {
    #[cfg(test)]
    super::tests::step();
    let removed = match rustix::fs::fremovexattr(file.as_fd(), attribute) {
        Ok(()) => rustix::fs::fsync(file.as_fd()).map_err(Error::from),
        Err(Errno::OPNOTSUPP) => take_beside(file, attribute),
        Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::ROFS) => Ok(()),
        Err(err) => Err(err.into()),
    };
    if let Err(err) = removed {
        cannot_be_removed(file, &err);
    }
}

pub(super) fn cannot_be_removed(file: &HostFile, err: &Error) {
    tracing::warn!("{}: its mark cannot be removed: {err}", file.name());
}

/// Whether the file system has attributes.
pub(super) fn has_attributes(file: &HostFile) -> bool {
    let asked = rustix::fs::fgetxattr(file.as_fd(), super::ATTRIBUTE, &mut [0; 0][..]);
    asked != Err(Errno::OPNOTSUPP)
}

/// What an attribute says.
pub(super) fn get(file: &HostFile, attribute: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; MAX_MARK];
    match rustix::fs::fgetxattr(file.as_fd(), attribute, &mut value[..]) {
        Ok(len) => value.truncate(len),
        Err(Errno::OPNOTSUPP) => value = get_beside(file, attribute)?,
        Err(_) => return None,
    }
    Some(value)
}

/// Where the mark of an image is that takes no attributes.
pub(super) fn beside(file: &HostFile, attribute: &str) -> PathBuf {
    let path = file.path();
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(attribute.replace("user.vublk.", ".vublk-"));
    path.with_file_name(name)
}

/// What such a mark begins with.
fn head(file: &HostFile) -> Result<String> {
    Ok(format!("{BESIDE}{}\n", file.identity()?.1))
}

fn put_beside(file: &HostFile, attribute: &str, value: &[u8]) -> Result<()> {
    let path = beside(file, attribute);
    let mut new = path.clone().into_os_string();
    new.push(".new");
    let content = [head(file)?.as_bytes(), value].concat();
    let written = (|| {
        // Of somebody who was killed; and a link that somebody put there is not followed.
        let _ = std::fs::remove_file(&new);
        let mut mark = std::fs::OpenOptions::new().write(true).create_new(true).open(&new)?;
        mark.write_all(&content)?;
        mark.sync_all()?;
        // There is no moment without a mark.
        std::fs::rename(&new, &path)?;
        sync_directory(&path)
    })();
    written.context(|| path.display().to_string())
}

fn take_beside(file: &HostFile, attribute: &str) -> Result<()> {
    let path = beside(file, attribute);
    let removed = match std::fs::remove_file(&path) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| sync_directory(&path)),
    };
    removed.context(|| path.display().to_string())
}

fn get_beside(file: &HostFile, attribute: &str) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    // A FIFO that somebody put there keeps nobody waiting.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mark = rustix::fs::open(beside(file, attribute), flags, Mode::empty()).ok()?;
    let mark = std::fs::File::from(mark);
    mark.take((MAX_MARK + 128) as u64).read_to_end(&mut content).ok()?;
    content.strip_prefix(head(file).ok()?.as_bytes()).map(<[u8]>::to_vec)
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(open_gate::directory_of(path))?.sync_all()
}
