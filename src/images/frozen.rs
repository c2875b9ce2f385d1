//! The mark on an image that a snapshot has frozen: which overlay its disk goes on in.
//!
//! After a snapshot the guest writes to the overlay, and whoever writes to the image below destroys
//! the disk. A command line that was written before the snapshot does just that when it is run again:
//! after a crash, or by an operator who does not know. So a snapshot leaves a mark on the image it
//! freezes, an extended attribute with the overlay's path, before the guest's first write goes to
//! the overlay; and an image with a mark is not given to a guest for writing. The mark goes when the
//! image is on top again (commit), or when its overlay is gone.
//!
//! Likewise when a disk *leaves* an image: the overlay that was committed into the image below it, the
//! add-cow file whose raw image file needs it no more. What is left there is old, or would write
//! past whatever comes to stand on the disk from now on. So it gets a mark with the image where the
//! disk goes on, before the guest's first write goes there.
//!
//! File systems without extended attributes, and block devices, take no mark. Then a line in the log
//! says so, once for each snapshot.

use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{File, HostFile};

/// The attribute's name.
const ATTRIBUTE: &str = "user.vublk.overlay";
/// The name of the one that says where the disk has moved to.
const MOVED: &str = "user.vublk.moved";
/// The longest path that fits.
const MAX_PATH: usize = 4096;

/// Marks `file` as frozen below the image at `overlay`; durable on return.
pub fn mark(file: &HostFile, overlay: &Path) {
    put(file, ATTRIBUTE, overlay, "frozen below");
}

/// Marks `file` as left by its disk, which goes on in the image at `target`; durable on return.
pub fn mark_moved(file: &HostFile, target: &Path) {
    put(file, MOVED, target, "left for");
}

fn put(file: &HostFile, attribute: &str, path: &Path, what: &str) {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let value = absolute.as_os_str().as_bytes();
    let flags = rustix::fs::XattrFlags::empty();
    let marked = rustix::fs::fsetxattr(file.as_fd(), attribute, value, flags)
        .and_then(|()| rustix::fs::fsync(file.as_fd()));
    if let Err(err) = marked {
        tracing::warn!(
            "{}: cannot be marked as {what} {} ({}): take care to serve that one from now on",
            file.name(),
            absolute.display(),
            Error::from(err)
        );
    }
}

/// Takes the marks away; durable on return.
pub fn clear(file: &HostFile) {
    take(file, ATTRIBUTE);
    take(file, MOVED);
}

fn take(file: &HostFile, attribute: &str) {
    use rustix::io::Errno;
    let removed = rustix::fs::fremovexattr(file.as_fd(), attribute)
        .and_then(|()| rustix::fs::fsync(file.as_fd()));
    match removed {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
        Err(Errno::PERM | Errno::ACCESS | Errno::ROFS) => {}
        Err(err) => {
            tracing::warn!("{}: its mark cannot be removed: {}", file.name(), Error::from(err));
        }
    }
}

/// The overlay that the disk of this image goes on in, if it is marked.
pub fn overlay_of(file: &HostFile) -> Option<PathBuf> {
    get(file, ATTRIBUTE)
}

/// The image that the disk of this one has moved to, if it is marked so.
pub fn moved_to(file: &HostFile) -> Option<PathBuf> {
    get(file, MOVED)
}

fn get(file: &HostFile, attribute: &str) -> Option<PathBuf> {
    let mut value = vec![0; MAX_PATH];
    let len = rustix::fs::fgetxattr(file.as_fd(), attribute, &mut value[..]).ok()?;
    value.truncate(len);
    Some(PathBuf::from(std::ffi::OsString::from_vec(value)))
}

/// Whether the image that a mark names is gone. A missing directory may be one that is not mounted;
/// the image may well be there.
fn is_gone(path: &Path) -> bool {
    path.parent().is_some_and(Path::is_dir) && std::fs::symlink_metadata(path).is_err()
}

/// Refuses to have a guest write to an image that a snapshot has frozen, or that its disk has left.
///
/// # Errors
/// Kind [`Busy`](ErrorKind::Busy), with the image to serve instead.
pub fn check(file: &HostFile) -> Result<()> {
    let name = file.name();
    if let Some(overlay) = overlay_of(file) {
        let shown = overlay.display();
        if !is_gone(&overlay) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{name}: a snapshot was taken of this disk while it was served, and the disk \
                     goes on in {shown}; serve that one (writing here would destroy it). To go back \
                     to the snapshot and give up what was written since, remove {shown} first"
                ),
            ));
        }
        tracing::warn!(
            "{name}: the overlay {shown} that a snapshot had put on it is gone; the disk is as it \
             was at the snapshot"
        );
        clear(file);
    }
    if let Some(target) = moved_to(file) {
        let shown = target.display();
        if !is_gone(&target) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{name}: this disk was committed or streamed while it was served, and goes on in \
                     {shown}; serve that one (what is here is old)"
                ),
            ));
        }
        tracing::warn!("{name}: the image {shown} that the disk had moved to is gone");
        clear(file);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::OpenOptions;

    #[test]
    fn a_marked_image_names_its_overlay_until_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("base"), "x").unwrap();
        std::fs::write(path("overlay"), "x").unwrap();
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let base = HostFile::open(&path("base"), options).unwrap();
        check(&base).unwrap();
        mark(&base, &path("overlay"));
        if overlay_of(&base).is_none() {
            println!("SKIP: no extended attributes in {}", dir.path().display());
            return;
        }
        let err = check(&base).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        assert!(err.to_string().contains(path("overlay").to_str().unwrap()), "{err}");
        // A directory that is away may come back.
        std::fs::create_dir(path("mount")).unwrap();
        mark(&base, &path("mount/overlay"));
        std::fs::remove_dir(path("mount")).unwrap();
        check(&base).unwrap_err();
        mark(&base, &path("overlay"));
        std::fs::remove_file(path("overlay")).unwrap();
        check(&base).unwrap();
        assert_eq!(overlay_of(&base), None);
        mark(&base, &path("overlay"));
        clear(&base);
        clear(&base);
        assert_eq!(overlay_of(&base), None);
    }
}
