//! The mark on an image that a snapshot has frozen: which overlay its disk goes on in.
//!
//! After a snapshot the guest writes to the overlay, and whoever writes to the image below destroys
//! the disk. A command line that was written before the snapshot does just that when it is run again:
//! after a crash, or by an operator who does not know. So a snapshot leaves a mark on the image it
//! freezes, an extended attribute with the overlay's path, before the guest's first write goes to
//! the overlay; and an image with a mark is not given to a guest for writing. The mark goes when the
//! image is on top again (commit), or when its overlay is gone.
//!
//! Likewise when a disk *leaves* an image: the overlay that was committed into the image below it (also by
//! `vublk commit -d`, of an overlay that a snapshot had made), the add-cow file whose raw image file needs it no more. What is left there is old, or would write
//! past whatever comes to stand on the disk from now on. So it gets a mark with the image where the
//! disk goes on, before the guest's first write goes there.
//!
//! A job that takes layers out from below an overlay changes the overlay's header and the marks of images
//! below it, one after the other. So these get a note before (`user.vublk.restacked`) that the marks are
//! about to change with what that overlay stands on. A process that finds such a note on an image that is
//! to be written, because the job's was killed, looks at the overlay: if it stands on the image, then that
//! is frozen below it, and if not, then it is not.
//!
//! On a file system without extended attributes a mark is a small file beside the image,
//! `.NAME.vublk-overlay`, `.NAME.vublk-moved` or `.NAME.vublk-restacked`. It names the image's inode, so it says nothing of a
//! file that takes the image's place.
//!
//! Block devices take no mark: they have no attributes, nothing beside them in `/dev` outlives the
//! host's next start, and the bytes in them are the guest's. Neither does a file whose directory
//! cannot be written to. Then a line in the log says so, once for each snapshot.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::block::open_gate;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::open;
use crate::io::{File, HostFile};

/// The attribute's name.
const ATTRIBUTE: &str = "user.vublk.overlay";
/// The name of the one that says where the disk has moved to.
const MOVED: &str = "user.vublk.moved";
/// The name of the one that says which overlay is being taken off what it stands on, or put on it.
const RESTACKED: &str = "user.vublk.restacked";
/// The longest path that fits.
const MAX_PATH: usize = 4096;
/// What a mark beside an image begins with; then come the inode, a line feed, and the path.
const BESIDE: &str = "vublk: the disk of the file beside this one goes on elsewhere; inode ";

/// Marks `file` as frozen below the image at `overlay`; durable on return.
pub fn mark(file: &HostFile, overlay: &Path) {
    put(file, ATTRIBUTE, overlay, "frozen below");
    take(file, RESTACKED);
}

/// Notes on `file` that its mark is about to change, with what the image at `overlay` stands on; durable
/// on return. The note goes with the next change of the mark.
pub fn note_restacked(file: &HostFile, overlay: &Path) {
    put(file, RESTACKED, overlay, "standing or not below");
}

/// Marks `file` as left by its disk, which goes on in the image at `target`; durable on return.
pub fn mark_moved(file: &HostFile, target: &Path) {
    put(file, MOVED, target, "left for");
}

fn put(file: &HostFile, attribute: &str, path: &Path, what: &str) {
    #[cfg(test)]
    tests::step();
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let value = absolute.as_os_str().as_bytes();
    let flags = rustix::fs::XattrFlags::empty();
    let marked = match rustix::fs::fsetxattr(file.as_fd(), attribute, value, flags) {
        Ok(()) => rustix::fs::fsync(file.as_fd()).map_err(Error::from),
        Err(Errno::OPNOTSUPP) => put_beside(file, attribute, value),
        Err(err) => Err(err.into()),
    };
    if let Err(err) = marked {
        tracing::warn!(
            "{}: cannot be marked as {what} {} ({err}): take care to serve that one from now on",
            file.name(),
            absolute.display(),
        );
    }
}

/// Takes the marks away; durable on return.
pub fn clear(file: &HostFile) {
    clear_overlay(file);
    take(file, MOVED);
}

/// Takes away the mark that names an overlay; durable on return.
pub fn clear_overlay(file: &HostFile) {
    take(file, ATTRIBUTE);
    take(file, RESTACKED);
}

/// Takes away the note that the mark is about to change.
pub fn clear_note(file: &HostFile) {
    take(file, RESTACKED);
}

/// Takes away the mark that says where the disk has moved to; durable on return.
pub fn clear_moved(file: &HostFile) {
    take(file, MOVED);
}

fn take(file: &HostFile, attribute: &str) {
    #[cfg(test)]
    tests::step();
    let removed = match rustix::fs::fremovexattr(file.as_fd(), attribute) {
        Ok(()) => rustix::fs::fsync(file.as_fd()).map_err(Error::from),
        Err(Errno::OPNOTSUPP) => take_beside(file, attribute),
        Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::ROFS) => Ok(()),
        Err(err) => Err(err.into()),
    };
    if let Err(err) = removed {
        tracing::warn!("{}: its mark cannot be removed: {err}", file.name());
    }
}

/// The overlay that the disk of this image goes on in, if it is marked.
pub fn overlay_of(file: &HostFile) -> Option<PathBuf> {
    get(file, ATTRIBUTE)
}

/// Whether the image is marked as frozen below this one, under whatever name.
pub fn is_frozen_below(file: &HostFile, overlay: &Path) -> bool {
    let Some(marked) = overlay_of(file) else { return false };
    let is_same = |path: std::io::Result<PathBuf>| path.is_ok_and(|path| path == marked);
    is_same(std::path::absolute(overlay))
        || marked
            .canonicalize()
            .is_ok_and(|marked| overlay.canonicalize().is_ok_and(|overlay| overlay == marked))
}

/// The image that the disk of this one has moved to, if it is marked so.
pub fn moved_to(file: &HostFile) -> Option<PathBuf> {
    get(file, MOVED)
}

fn get(file: &HostFile, attribute: &str) -> Option<PathBuf> {
    let mut value = vec![0; MAX_PATH];
    match rustix::fs::fgetxattr(file.as_fd(), attribute, &mut value[..]) {
        Ok(len) => value.truncate(len),
        Err(Errno::OPNOTSUPP) => value = get_beside(file, attribute)?,
        Err(_) => return None,
    }
    Some(PathBuf::from(OsString::from_vec(value)))
}

/// Where the mark of an image is that takes no attributes.
fn beside(file: &HostFile, attribute: &str) -> PathBuf {
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
    let content = [head(file)?.as_bytes(), value].concat();
    let written = (|| {
        // A link that somebody put there is not followed.
        let _ = std::fs::remove_file(&path);
        let mut mark = std::fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
        mark.write_all(&content)?;
        mark.sync_all()?;
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
    let mark = std::fs::File::open(beside(file, attribute)).ok()?;
    mark.take((MAX_PATH + 128) as u64).read_to_end(&mut content).ok()?;
    content.strip_prefix(head(file).ok()?.as_bytes()).map(<[u8]>::to_vec)
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(open_gate::directory_of(path))?.sync_all()
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
pub fn check(file: &HostFile, allow_dirs: &[PathBuf]) -> Result<()> {
    check_not_frozen(file, allow_dirs)?;
    let name = file.name();
    if let Some(target) = moved_to(file) {
        let shown = target.display();
        if !is_gone(&target) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{name}: this disk was committed or streamed into another image, and goes on in \
                     {shown}; serve that one, in its own format (-f raw if it is raw): what is here \
                     is old"
                ),
            ));
        }
        tracing::warn!("{name}: the image {shown} that the disk had moved to is gone");
        take(file, MOVED);
    }
    Ok(())
}

/// The same, but for an image that its disk has left: what it holds may be given up.
pub fn check_not_frozen(file: &HostFile, allow_dirs: &[PathBuf]) -> Result<()> {
    let name = file.name();
    settle_restacked(file, allow_dirs)?;
    let Some(overlay) = overlay_of(file) else { return Ok(()) };
    let shown = overlay.display();
    if !is_gone(&overlay) {
        return Err(Error::new(
            ErrorKind::Busy,
            format!(
                "{name}: a snapshot was taken of this disk while it was served, and the disk goes on \
                 in {shown}; serve that one (writing here would destroy it). To go back to the \
                 snapshot and give up what was written since, remove {shown} first"
            ),
        ));
    }
    tracing::warn!(
        "{name}: the overlay {shown} that a snapshot had put on it is gone; the disk is as it was \
         at the snapshot"
    );
    take(file, ATTRIBUTE);
    Ok(())
}

/// Has the mark say what the process would have had it say that was killed after it had left a note.
///
/// # Errors
/// If the overlay is there and does not tell what it stands on.
fn settle_restacked(file: &HostFile, allow_dirs: &[PathBuf]) -> Result<()> {
    let Some(overlay) = get(file, RESTACKED) else { return Ok(()) };
    if !is_gone(&overlay) {
        let is_below = open::stands_on(&overlay, file, allow_dirs).context(|| {
            format!(
                "{}: a job on the disk that goes on in {} was cut short, and whether that still needs \
                 this image cannot be seen",
                file.name(),
                overlay.display()
            )
        })?;
        match is_below {
            true => mark(file, &overlay),
            false if is_frozen_below(file, &overlay) => clear_overlay(file),
            false => {}
        }
    }
    take(file, RESTACKED);
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::io::OpenOptions;

    thread_local! {
        /// How many more changes of files this thread makes before it dies.
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// Has the thread panic in place of one of the next changes of marks and headers; with `None` it lives
    /// on.
    pub fn die_after(changes: Option<u32>) {
        LEFT.set(changes);
    }

    /// A change of a file is about to be made.
    pub fn step() {
        if let Some(left) = LEFT.get() {
            assert!(left > 0, "killed by the test");
            LEFT.set(Some(left - 1));
        }
    }

    fn image(dir: &Path) -> HostFile {
        std::fs::write(dir.join("base"), "x").unwrap();
        std::fs::write(dir.join("overlay"), "x").unwrap();
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        HostFile::open(&dir.join("base"), options).unwrap()
    }

    #[test]
    fn a_new_image_has_no_mark_and_is_never_made_of_a_frozen_one() {
        use crate::images::{CreateRequest, ImageFormat, create};
        let dir = tempfile::tempdir().unwrap();
        let file = image(dir.path());
        let overlay = dir.path().join("overlay");
        let create = || {
            create(&CreateRequest {
                path: file.path().into(),
                format: ImageFormat::Raw,
                size: Some(512),
                options: Vec::new(),
                backing: None,
                backing_format: None,
                backing_unchecked: false,
                allow_dirs: Vec::new(),
            })
        };
        mark_moved(&file, &overlay);
        create().unwrap();
        assert_eq!(moved_to(&file), None);
        check(&file, &[]).unwrap();
        std::fs::write(file.path(), "x").unwrap();
        mark(&file, &overlay);
        let err = create().unwrap_err().to_string();
        assert!(err.contains("serve that one (writing here would destroy it)"), "{err}");
        assert_eq!(std::fs::read(file.path()).unwrap(), b"x");
    }

    #[test]
    fn a_marked_image_names_its_overlay_until_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let base = image(dir.path());
        check(&base, &[]).unwrap();
        mark(&base, &dir.path().join("overlay"));
        if beside(&base, ATTRIBUTE).exists() {
            println!("SKIP: no extended attributes in {}", dir.path().display());
        }
        names_its_overlay(dir.path(), &base);
    }

    /// The same where there are no attributes: in the one kind of file system that never has them.
    #[test]
    fn an_image_without_attributes_has_its_mark_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let mount = |what: &str, args: &[&str]| {
            let done = std::process::Command::new(what).args(args).arg(dir.path()).status();
            done.is_ok_and(|status| status.success())
        };
        if !rustix::process::geteuid().is_root() || !mount("mount", &["-t", "ramfs", "none"]) {
            println!("SKIP: only root may mount a file system without attributes");
            return;
        }
        let outcome = std::panic::catch_unwind(|| {
            let base = image(dir.path());
            let overlay = dir.path().join("overlay");
            mark(&base, &overlay);
            assert!(beside(&base, ATTRIBUTE).exists());
            assert_eq!(overlay_of(&base), Some(overlay.clone()));
            // Another file in the image's place is not meant.
            std::fs::rename(dir.path().join("base"), dir.path().join("away")).unwrap();
            let other = image(dir.path());
            check(&other, &[]).unwrap();
            mark(&other, &overlay);
            names_its_overlay(dir.path(), &other);
            assert!(!beside(&other, ATTRIBUTE).exists());
        });
        assert!(mount("umount", &["-l"]));
        outcome.unwrap();
    }

    fn names_its_overlay(dir: &Path, base: &HostFile) {
        let path = |name: &str| dir.join(name);
        let err = check(base, &[]).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        assert!(err.to_string().contains(path("overlay").to_str().unwrap()), "{err}");
        // A directory that is away may come back.
        std::fs::create_dir(path("mount")).unwrap();
        mark(base, &path("mount/overlay"));
        std::fs::remove_dir(path("mount")).unwrap();
        check(base, &[]).unwrap_err();
        mark(base, &path("overlay"));
        std::fs::remove_file(path("overlay")).unwrap();
        check(base, &[]).unwrap();
        assert_eq!(overlay_of(base), None);
        mark(base, &path("overlay"));
        clear(base);
        clear(base);
        assert_eq!(overlay_of(base), None);
    }
}
