//! What must outlive the process of whoever serves an image: where it goes, and what an earlier process
//! has left of it ([`crate::block::keep`]).

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::Keep;
use crate::error::{Error, ErrorKind, Result};
use crate::images::lock::lock;
use crate::images::open::guess;
use crate::images::request::{Access, OpenRequest, StateDir};
use crate::images::{Image, ImageFormat, Locking, frozen, open};
use crate::io::{File, HostFile, OpenOptions, block_on};

/// The name of the attribute of an image that says where something may be kept of it, if that is not
/// where commands look anyway.
const ATTRIBUTE: &str = "user.vublk.state-dir";

/// Opens the place for what must outlive this process, if a guest is to be served.
pub(super) fn open_keep(
    request: &OpenRequest,
    file: &HostFile,
    format: &str,
) -> Result<Option<Keep>> {
    let (dir, required) = match &request.state_dir {
        StateDir::None => return Ok(None),
        StateDir::IfPossible(dir) => (dir, false),
        StateDir::Required(dir) => (dir, true),
    };
    match Keep::open_for(dir, file, format) {
        Ok(keep) => {
            mark(file, dir, format);
            Ok(Some(keep))
        }
        // Whoever serves the image from this very directory is in the way; nobody may ignore that.
        Err(err) if required || err.kind() == ErrorKind::Busy => Err(err),
        Err(err) => {
            tracing::warn!(
                "{}: writes that allocate will wait for the disk, because nothing can be kept \
                 across a kill of this process: {err}",
                file.name()
            );
            Ok(None)
        }
    }
}

/// Leaves a mark on the image that says where something is kept of it. It need not survive the power,
/// and so is not flushed.
fn mark(file: &HostFile, dir: &Path, format: &str) {
    let marked = marked(file);
    let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.into());
    if marked.as_ref() == Some(&dir) || (marked.is_none() && dir == Keep::default_dir()) {
        return;
    }
    if let Some(Ok(Some(left))) = marked.map(|other| Keep::left_in(&other, file, format)) {
        tracing::warn!(
            "{}: the process that served it was killed, and what its guest completed last is in {}; \
             that guest can only come back if --state-dir names that directory",
            file.name(),
            left.display()
        );
        return;
    }
    let flags = rustix::fs::XattrFlags::empty();
    // File systems without attributes, and devices: commands look in the default directory only.
    let _ = rustix::fs::fsetxattr(file.as_fd(), ATTRIBUTE, dir.as_os_str().as_bytes(), flags);
}

/// Where the image's mark says that something may be kept of it.
fn marked(file: &HostFile) -> Option<PathBuf> {
    let mut value = vec![0; 4096];
    let len = rustix::fs::fgetxattr(file.as_fd(), ATTRIBUTE, &mut value[..]).ok()?;
    value.truncate(len);
    Some(OsString::from_vec(value).into())
}

/// Redoes what a process that was killed has kept for an image that another stands on: writes that
/// its guest saw completed may be in its keep and nowhere else, if a snapshot had just frozen it.
/// Returns the session they are of.
pub(super) fn settle(request: &OpenRequest) -> Result<Option<u128>> {
    let (StateDir::IfPossible(dir) | StateDir::Required(dir)) = &request.settle_in else {
        return Ok(None);
    };
    let Ok(file) = HostFile::open(&request.path, OpenOptions::default()) else { return Ok(None) };
    let Ok(format) = request.format.map_or_else(|| guess(&file), Ok) else { return Ok(None) };
    let found = match look(dir, &file, format) {
        Err(err) if err.kind() == ErrorKind::Busy => {
            // Until who was killed is gone, or there is nobody who would write.
            lock(&file, request, format)?;
            look_among_others(dir, &file, format)?
        }
        found => found?,
    };
    let Some((session, true)) = found else { return Ok(found.map(|(session, _)| session)) };
    let is_marked = frozen::overlay_of(&file).is_some();
    drop(file);
    let image = open(&OpenRequest {
        access: Access::Write,
        format: Some(format),
        state_dir: request.settle_in.clone(),
        settle_in: StateDir::None,
        ..request.clone()
    })?;
    tracing::info!("{}: redoing what was kept of it by an earlier process", image.name());
    let driver = image.node.driver();
    block_on(async {
        driver.resume(Some(session)).await?;
        driver.close().await
    })?;
    let file = Arc::clone(&image.file);
    drop((driver, image));
    if !is_marked {
        // Its guest may come back to this very image, and is known by the session.
        Keep::open_for(dir, &file, format.name())?.begin(session)?;
    }
    Ok(Some(session))
}

/// Removes what an earlier process kept of images that snapshots have frozen below `top`, one below the
/// other, where nothing is left to be redone: their guest comes back to `top`, whose keep bears its name.
pub(super) fn forget_below(request: &OpenRequest, top: &HostFile, below: &Image) {
    let (StateDir::IfPossible(dir) | StateDir::Required(dir)) = &request.state_dir else { return };
    let (mut top, mut below) = (top, Some(below));
    while let Some(image) = below.filter(|image| frozen::is_frozen_below(&image.file, top.path())) {
        if matches!(look(dir, &image.file, image.format), Ok(Some((_, false)))) {
            let keep = Keep::open_for(dir, &image.file, image.format.name());
            if let Err(err) = keep.and_then(|keep| keep.forget()) {
                tracing::warn!("{}: what was kept of it stays: {err}", image.name());
            }
        }
        (top, below) = (&image.file, image.backing.as_deref());
    }
}

/// The session that an earlier process has kept in `dir` for an image, and whether there are records
/// that nobody has redone.
///
/// # Errors
/// Kind [`Busy`](ErrorKind::Busy) if a process has it open.
pub(super) fn look(
    dir: &Path,
    file: &HostFile,
    format: ImageFormat,
) -> Result<Option<(u128, bool)>> {
    if format == ImageFormat::Raw || !Keep::is_there(dir, file.identity()?, format.name()) {
        return Ok(None);
    }
    let keep = Keep::open_for(dir, file, format.name())?;
    Ok(keep.session().map(|session| (session, keep.awaited().is_some())))
}

/// The same, of an image that others read. Who has it open and does not write has redone what there
/// was.
pub(super) fn look_among_others(
    dir: &Path,
    file: &HostFile,
    format: ImageFormat,
) -> Result<Option<(u128, bool)>> {
    match look(dir, file, format) {
        Err(err) if err.kind() == ErrorKind::Busy => Ok(None),
        found => found,
    }
}

/// Looks whether an image that a command opens, and no guest is served from, is what its own guest
/// knows: after a kill, what that completed last may be in the default state directory only, or in the
/// one that the image is marked with. `file` is locked.
///
/// # Errors
/// Kind [`Busy`](ErrorKind::Busy) if so and the image is to be written: what is redone later would not
/// fit it any more. Who reads it is warned.
pub(super) fn check_settled(
    request: &OpenRequest,
    file: &HostFile,
    format: ImageFormat,
) -> Result<()> {
    let is_served = [&request.state_dir, &request.settle_in].iter().any(|d| **d != StateDir::None);
    if is_served || request.locking != Locking::Guard || format == ImageFormat::Raw {
        return Ok(());
    }
    check_guest_is_back(file, format, request.access)
}

/// The same, of a file that is known to be nobody's but ours.
///
/// # Errors
/// As [`check_settled`].
pub(super) fn check_guest_is_back(
    file: &HostFile,
    format: ImageFormat,
    access: Access,
) -> Result<()> {
    let Some(left) = left_of(file, format) else { return Ok(()) };
    let what = format!(
        "{}: the process that served it was killed, and what its guest completed last is in {} and not \
         in the image",
        file.name(),
        left.display()
    );
    if access == Access::Read {
        tracing::warn!("{what}; it does not show here before the guest has come back");
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Busy,
        format!(
            "{what}. Serve it again and let the guest come back first; if it never will, remove that \
             file"
        ),
    ))
}

/// Refuses to make a new image of a file that a guest may come back to, whatever its format is: what
/// is redone then would be redone to the new one.
///
/// # Errors
/// As [`check_settled`].
pub(super) fn check_nobody_comes_back(file: &HostFile) -> Result<()> {
    ImageFormat::SUPPORTED
        .iter()
        .try_for_each(|format| check_guest_is_back(file, *format, Access::Write))
}

/// What is kept for a guest of an image that is still to come back.
fn left_of(file: &HostFile, format: ImageFormat) -> Option<PathBuf> {
    let mut dirs = std::iter::once(Keep::default_dir()).chain(marked(file));
    // What cannot be read is of somebody else's guests.
    dirs.find_map(|dir| Keep::left_in(&dir, file, format.name()).ok().flatten())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::block::keep::tests::state_dir;
    use crate::images::{self, CreateRequest, Image};
    use crate::io::AlignedBuf;

    /// The session of the guest whose daemon was killed.
    pub const SESSION: u128 = 7;

    /// The first byte of the disk.
    pub fn first_byte(image: &Image) -> u8 {
        let buf = AlignedBuf::zeroed(512, 512);
        block_on(image.node.read(0, buf.buffers())).unwrap();
        buf.to_vec()[0]
    }

    /// A qcow2 image whose guest has written 2 into its first sector and seen that completed, when the
    /// daemon was killed.
    pub fn killed(path: &Path, state: &Path) {
        make(path, None);
        let image = open(&OpenRequest {
            state_dir: StateDir::Required(state.into()),
            ..OpenRequest::write(path).format(Some(ImageFormat::Qcow2))
        });
        let image = image.unwrap();
        image.node.driver().begin_session(SESSION).unwrap();
        let buf = AlignedBuf::from_slice(&[2; 512], 512);
        block_on(image.node.write(0, buf.buffers(), false)).unwrap();
    }

    /// A qcow2 image, on another if so.
    pub fn make(path: &Path, below: Option<&Path>) {
        let made = images::create(&CreateRequest {
            path: path.into(),
            format: ImageFormat::Qcow2,
            size: Some(1 << 20),
            options: Vec::new(),
            backing: below.map(|below| below.to_str().unwrap().into()),
            backing_format: below.map(|_| ImageFormat::Qcow2),
            backing_unchecked: true,
            allow_dirs: Vec::new(),
        });
        made.unwrap();
    }

    #[test]
    fn what_was_kept_of_a_base_is_redone_with_or_without_a_mark() {
        for is_marked in [false, true] {
            let (dir, state) = (tempfile::tempdir().unwrap(), state_dir());
            let (base, over) = (dir.path().join("base"), dir.path().join("over"));
            killed(&base, state.path());
            make(&over, Some(&base));
            let file = HostFile::open(&base, OpenOptions { write: true, ..Default::default() });
            if is_marked {
                frozen::mark(&file.unwrap(), &over);
            }
            let request = OpenRequest {
                state_dir: StateDir::Required(state.path().into()),
                ..OpenRequest::write(&over).format(Some(ImageFormat::Qcow2))
            };
            let image = open(&request).unwrap();
            assert_eq!(first_byte(&image), 2, "marked: {is_marked}");
            let keep = |image: &Image| image.node.driver().keep().unwrap().session();
            assert_eq!(keep(&image), Some(SESSION));
            drop(image);
            if !is_marked {
                // Its guest may yet come back to itself.
                let image = open(&OpenRequest { path: base, ..request }).unwrap();
                assert_eq!(keep(&image), Some(SESSION));
                assert_eq!(image.node.driver().keep().unwrap().found(), None);
            }
        }
    }
}
