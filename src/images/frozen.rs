//! The mark on an image that a snapshot has frozen: which overlay its disk goes on in.
//!
//! After a snapshot the guest writes to the overlay, and whoever writes to the image below destroys
//! the disk. A command line that was written before the snapshot does just that when it is run again:
//! after a crash, or by an operator who does not know. So a snapshot leaves a mark on the image it
//! freezes, an extended attribute with the overlay's path, before the guest's first write goes to
//! the overlay; and an image with a mark is not given to a guest for writing. The mark goes when the
//! image is on top again (commit), or when its overlay is gone.
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
/// The longest path that fits.
const MAX_PATH: usize = 4096;

/// Marks `file` as frozen below the image at `overlay`; durable on return.
pub fn mark(file: &HostFile, overlay: &Path) {
    let absolute = std::path::absolute(overlay).unwrap_or_else(|_| overlay.to_path_buf());
    let value = absolute.as_os_str().as_bytes();
    let flags = rustix::fs::XattrFlags::empty();
    let marked = rustix::fs::fsetxattr(file.as_fd(), ATTRIBUTE, value, flags)
        .and_then(|()| rustix::fs::fsync(file.as_fd()));
    if let Err(err) = marked {
        tracing::warn!(
            "{}: cannot be marked as frozen below {} ({}): take care to serve the overlay from now on",
            file.name(),
            absolute.display(),
            Error::from(err)
        );
    }
}

/// Takes the mark away.
pub fn clear(file: &HostFile) {
    match rustix::fs::fremovexattr(file.as_fd(), ATTRIBUTE) {
        Ok(()) | Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
        Err(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS) => {}
        Err(err) => {
            tracing::warn!("{}: its mark cannot be removed: {}", file.name(), Error::from(err));
        }
    }
}

/// The overlay that the disk of this image goes on in, if it is marked.
pub fn overlay_of(file: &HostFile) -> Option<PathBuf> {
    let mut value = vec![0; MAX_PATH];
    let len = rustix::fs::fgetxattr(file.as_fd(), ATTRIBUTE, &mut value[..]).ok()?;
    value.truncate(len);
    Some(PathBuf::from(std::ffi::OsString::from_vec(value)))
}

/// Refuses to have a guest write to an image that a snapshot has frozen.
///
/// # Errors
/// Kind [`Busy`](ErrorKind::Busy), with the overlay to serve instead.
pub fn check(file: &HostFile) -> Result<()> {
    let Some(overlay) = overlay_of(file) else { return Ok(()) };
    // A missing directory may be one that is not mounted; the overlay may well be there.
    let directory_is_there = overlay.parent().is_some_and(Path::is_dir);
    if directory_is_there && std::fs::symlink_metadata(&overlay).is_err() {
        tracing::warn!(
            "{}: the overlay {} that a snapshot had put on it is gone; the disk is as it was at the \
             snapshot",
            file.name(),
            overlay.display()
        );
        clear(file);
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Busy,
        format!(
            "{name}: a snapshot was taken of this disk while it was served, and the disk goes on in \
             {overlay}; serve that one (writing here would destroy it). To go back to the snapshot \
             and give up what was written since, remove {overlay} first",
            name = file.name(),
            overlay = overlay.display()
        ),
    ))
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
