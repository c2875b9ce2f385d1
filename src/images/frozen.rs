//! The mark on an image that a snapshot has frozen: which overlays need it as it is.
//!
//! After a snapshot the guest writes to the overlay, and whoever writes to the image below destroys
//! the disk. A command line that was written before the snapshot does just that when it is run again:
//! after a crash, or by an operator who does not know. So a snapshot leaves a mark on the image it
//! freezes, an extended attribute with the overlay's path, before the guest's first write goes to
//! the overlay; and an image with a mark is not given to a guest for writing. The mark goes when the
//! image is on top again (commit), or when its overlays are gone.
//!
//! A mark names all overlays that are known, with a zero byte between them, the one that came last first.
//! A layer that a stream has taken out of a chain still stands on the stream's base; so it stays in the
//! mark, with `left:` before it: its disk has gone on without it, and nobody but the operator knows whether
//! it is needed. What is gone is dropped when the mark changes. A mark that is too long for the file
//! system stays as it was, with a line in the log.
//!
//! Likewise when a disk *leaves* an image: the overlay that was committed into the image below it (also by
//! `vublk commit -d`, of an overlay that a snapshot had made), the add-cow file whose raw image file
//! needs it no more, a layer that a job has taken out from below an overlay that froze it. What is left there
//! is old, or would write past whatever comes to stand on the disk from now on. So it gets a mark with the image where the
//! disk goes on, before the guest's first write goes there. An overlay with such a mark needs the image
//! that the mark names no more, whatever that one's own mark says: so a kill between the two changes leaves
//! one of them that may be written, and not none or both.
//!
//! A job that takes layers out from below an overlay changes the overlay's header and the marks of images
//! below it, one after the other. So these get a note before (`user.vublk.restacked`) that the marks are
//! about to change with what that overlay stands on. A process that finds such a note on an image that is
//! to be written, because the job's was killed, looks at the overlay: if it stands on the image, then that
//! is frozen below it, and if not, then it is not.
//!
//! Two processes may change one mark at once, for overlays of their own. So each waits for its [`Turn`]; a
//! job has it from its note until the marks are as they are to be, so that nobody takes it for dead.
//!
//! On a file system without extended attributes a mark is a small file beside the image,
//! `.NAME.vublk-overlay`, `.NAME.vublk-moved` or `.NAME.vublk-restacked`. It names the image's inode, so it says nothing of a
//! file that takes the image's place.
//!
//! Block devices take no mark: they have no attributes, nothing beside them in `/dev` outlives the
//! host's next start, and the bytes in them are the guest's. Neither does a file whose directory
//! cannot be written to. Then a line in the log says so, once for each snapshot.

mod store;
mod turn;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::open;
use crate::io::{File, HostFile, OpenOptions};
use store::{cannot_be_removed, get, put, take};
pub use turn::Turn;

/// The attribute's name.
const ATTRIBUTE: &str = "user.vublk.overlay";
/// The name of the one that says where the disk has moved to.
const MOVED: &str = "user.vublk.moved";
/// The name of the one that says which overlay is being taken off what it stands on, or put on it.
const RESTACKED: &str = "user.vublk.restacked";
/// What is before the path of an overlay in a mark that its disk has left.
const LEFT: &str = "left:";

/// An overlay that a mark names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Overlay {
    path: PathBuf,
    /// Whether its disk goes on without it.
    is_left: bool,
}

impl Overlay {
    fn new(path: &Path, is_left: bool) -> Overlay {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        Overlay { path, is_left }
    }

    fn parse(text: &[u8]) -> Overlay {
        let path = text.strip_prefix(LEFT.as_bytes());
        let is_left = path.is_some();
        Overlay { path: OsString::from_vec(path.unwrap_or(text).to_vec()).into(), is_left }
    }

    fn text(&self) -> Vec<u8> {
        let before = if self.is_left { LEFT } else { "" };
        [before.as_bytes(), self.path.as_os_str().as_bytes()].concat()
    }

    /// Whether it is this one, under whatever name.
    fn is(&self, path: &Path) -> bool {
        std::path::absolute(path).is_ok_and(|path| path == self.path)
            || self
                .path
                .canonicalize()
                .is_ok_and(|own| path.canonicalize().is_ok_and(|path| path == own))
    }

    /// Whether the image with this mark must stay as it is for its sake: unless it is gone, or its disk goes
    /// on in that image, and who has moved it there was killed before he could take the mark away.
    fn needs(&self, file: &HostFile) -> bool {
        let is_file = |path: PathBuf| {
            let found = std::fs::metadata(path);
            found.is_ok_and(|found| file.identity().ok() == Some((found.dev(), found.ino())))
        };
        let overlay = HostFile::open(&self.path, OpenOptions::default());
        let has_moved = overlay.is_ok_and(|overlay| moved_to(&overlay).is_some_and(is_file));
        !is_gone(&self.path) && !has_moved
    }
}

/// Marks `file` as frozen below the image at `overlay`, too; durable on return.
pub fn mark(file: &HostFile, overlay: &Path) {
    Turn::wait(file).mark(overlay);
}

/// Takes the overlay out of the mark; durable on return.
pub fn unmark(file: &HostFile, overlay: &Path) {
    Turn::wait(file).unmark(overlay);
}

/// Takes the marks away; durable on return.
pub fn clear(file: &HostFile) {
    let _turn = Turn::wait(file);
    take(file, ATTRIBUTE);
    take(file, RESTACKED);
    take(file, MOVED);
}

impl Turn<'_> {
    /// As [`mark`].
    pub fn mark(&self, overlay: &Path) {
        self.put_first(overlay, self.others(overlay));
    }

    /// Marks the file as frozen below the image at `overlay`, whose disk has left the layer at `left`,
    /// which stands on the file as well; durable on return.
    pub fn mark_over(&self, overlay: &Path, left: &Path) {
        let mut others = self.others(overlay);
        for other in others.iter_mut().filter(|other| other.is(left)) {
            other.is_left = true;
        }
        self.put_first(overlay, others);
    }

    /// Marks the file as frozen below these images and no others, because its content was changed for
    /// them; durable on return.
    pub fn mark_only(&self, overlays: &[PathBuf]) {
        let marked: Vec<_> = overlays.iter().map(|path| Overlay::new(path, false)).collect();
        if let Some(first) = overlays.first() {
            put_overlays(self.file, ATTRIBUTE, &marked, "frozen below", first);
        }
        overlays.iter().for_each(|overlay| self.clear_note(overlay));
    }

    /// As [`unmark`].
    pub fn unmark(&self, overlay: &Path) {
        self.forget(ATTRIBUTE, |other| other.is(overlay));
        self.clear_note(overlay);
    }

    /// Notes on the file that its mark is about to change, with what the image at `overlay` stands on;
    /// durable on return. The note goes with the next change of the mark, and is not settled while this
    /// turn lasts.
    pub fn note_restacked(&self, overlay: &Path) {
        let mut noted = overlays(self.file, RESTACKED);
        noted.retain(|other| !other.is(overlay));
        noted.push(Overlay::new(overlay, false));
        put_overlays(self.file, RESTACKED, &noted, "standing or not below", overlay);
    }

    /// Takes away the note that the mark is about to change with this overlay.
    pub fn clear_note(&self, overlay: &Path) {
        self.forget(RESTACKED, |other| other.is(overlay));
    }

    fn put_first(&self, overlay: &Path, mut others: Vec<Overlay>) {
        others.insert(0, Overlay::new(overlay, false));
        put_overlays(self.file, ATTRIBUTE, &others, "frozen below", overlay);
        self.clear_note(overlay);
    }

    /// The overlays in the mark that are there, without this one.
    fn others(&self, overlay: &Path) -> Vec<Overlay> {
        let mut overlays = overlays(self.file, ATTRIBUTE);
        overlays.retain(|other| !other.is(overlay) && !is_gone(&other.path));
        overlays
    }

    /// Takes overlays out of a mark or note, and that away if none is left.
    fn forget(&self, attribute: &str, which: impl Fn(&Overlay) -> bool) {
        let before = overlays(self.file, attribute);
        let (out, rest): (Vec<_>, Vec<_>) = before.into_iter().partition(which);
        if out.is_empty() {
            return;
        }
        if rest.is_empty() {
            return take(self.file, attribute);
        }
        let value = rest.iter().map(Overlay::text).collect::<Vec<_>>().join(&0);
        if let Err(err) = put(self.file, attribute, &value) {
            cannot_be_removed(self.file, &err);
        }
    }
}

/// Marks `file` as left by its disk, which goes on in the image at `target`; durable on return.
pub fn mark_moved(file: &HostFile, target: &Path) {
    let moved = [Overlay::new(target, false)];
    put_overlays(file, MOVED, &moved, "left for", target);
}

fn put_overlays(
    file: &HostFile,
    attribute: &str,
    overlays: &[Overlay],
    what: &str,
    for_what: &Path,
) {
    let value = overlays.iter().map(Overlay::text).collect::<Vec<_>>().join(&0);
    if let Err(err) = put(file, attribute, &value) {
        tracing::warn!(
            "{}: cannot be marked as {what} {} ({err}): take care to serve that one from now on",
            file.name(),
            Overlay::new(for_what, false).path.display(),
        );
    }
}

/// Has a disk go on in `base`, which has all that its layers down from `top` held: `base` is on top again, and
/// `top` is old. Durable on return. Killed at any point, either the one or the other may be written.
pub fn move_down(top: &HostFile, base: &HostFile) {
    take(base, MOVED);
    if overlay_of(base).is_some() {
        // Instead of the layers in between: the base is free once the top is marked.
        Turn::wait(base).mark_only(&[top.path().into()]);
    }
    mark_moved(top, base.path());
    clear(base);
}

/// Takes away the mark that says where the disk has moved to; durable on return.
pub fn clear_moved(file: &HostFile) {
    take(file, MOVED);
}

/// The overlay that the disk of this image goes on in, if it is marked.
pub fn overlay_of(file: &HostFile) -> Option<PathBuf> {
    overlays(file, ATTRIBUTE).into_iter().next().map(|overlay| overlay.path)
}

/// Whether the image is marked as frozen below this one, under whatever name.
pub fn is_frozen_below(file: &HostFile, overlay: &Path) -> bool {
    overlays(file, ATTRIBUTE).iter().any(|marked| marked.is(overlay))
}

fn overlays(file: &HostFile, attribute: &str) -> Vec<Overlay> {
    let value = get(file, attribute).unwrap_or_default();
    value.split(|byte| *byte == 0).filter(|text| !text.is_empty()).map(Overlay::parse).collect()
}

/// The image that the disk of this one has moved to, if it is marked so.
pub fn moved_to(file: &HostFile) -> Option<PathBuf> {
    get(file, MOVED).map(|path| OsString::from_vec(path).into())
}

/// Whether the image that a mark names is gone. A missing directory may be one that is not mounted;
/// the image may well be there.
fn is_gone(path: &Path) -> bool {
    path.parent().is_some_and(Path::is_dir) && std::fs::symlink_metadata(path).is_err()
}

/// Refuses to have a guest write to an image that a snapshot has frozen, or that its disk has left.
///
/// # Errors
/// Kind [`InvalidArgument`](ErrorKind::InvalidArgument), with the image to serve instead: nobody else
/// will change that, so it is of no use to try again.
pub fn check(file: &HostFile, allow_dirs: &[PathBuf]) -> Result<()> {
    let frozen = check_not_frozen(file, allow_dirs);
    if frozen.is_err() && !only_left_stand_on(file) {
        return frozen;
    }
    let name = file.name();
    if let Some(target) = moved_to(file) {
        let shown = target.display();
        if !is_gone(&target) {
            return Err(Error::invalid(format!(
                "{name}: this disk was committed or streamed into another image, and goes on in \
                 {shown}; serve that one, in its own format (-f raw if it is raw): what is here is \
                 old"
            )));
        }
        if frozen.is_ok() {
            tracing::warn!("{name}: the image {shown} that the disk had moved to is gone");
            take(file, MOVED);
        }
    }
    frozen
}

/// Whether nothing that needs the image is where its disk goes on.
fn only_left_stand_on(file: &HostFile) -> bool {
    let overlays = overlays(file, ATTRIBUTE);
    overlays.iter().all(|overlay| overlay.is_left || !overlay.needs(file))
}

/// The same, but for an image that its disk has left: what it holds may be given up.
pub fn check_not_frozen(file: &HostFile, allow_dirs: &[PathBuf]) -> Result<()> {
    settle_restacked(file, allow_dirs)?;
    let overlays = overlays(file, ATTRIBUTE);
    if let Some(overlay) = overlays.iter().find(|overlay| overlay.needs(file)) {
        return Err(refusal(file, overlay, allow_dirs));
    }
    let Some(overlay) = overlays.first() else { return Ok(()) };
    if is_gone(&overlay.path) {
        tracing::warn!(
            "{}: the overlay {} that a snapshot had put on it is gone; the disk is as it was at the \
             snapshot",
            file.name(),
            overlay.path.display()
        );
    }
    Turn::wait(file).forget(ATTRIBUTE, |overlay| !overlay.needs(file));
    Ok(())
}

/// Refuses to change the content of an image for the sake of these overlays, if a disk that is in none of
/// them goes on above it. Layers that a disk has left are not in the way.
///
/// # Errors
/// As [`check`].
pub fn check_only_below(file: &HostFile, ours: &[&Path], allow_dirs: &[PathBuf]) -> Result<()> {
    settle_restacked(file, allow_dirs)?;
    let is_in_the_way = |overlay: &&Overlay| {
        !overlay.is_left && overlay.needs(file) && !ours.iter().any(|ours| overlay.is(ours))
    };
    let overlays = overlays(file, ATTRIBUTE);
    overlays
        .iter()
        .find(is_in_the_way)
        .map_or(Ok(()), |overlay| Err(refusal(file, overlay, allow_dirs)))
}

fn refusal(file: &HostFile, overlay: &Overlay, allow_dirs: &[PathBuf]) -> Error {
    let (name, shown) = (file.name(), overlay.path.display());
    let mut message = match overlay.is_left {
        false => format!(
            "{name}: a snapshot was taken of this disk while it was served, and the disk goes on in \
             {shown}; serve that one (writing here would destroy it). To go back to the snapshot and \
             give up what was written since, remove {shown} first"
        ),
        true => format!(
            "{name}: a snapshot has frozen this image, and {shown} still stands on it, which a stream \
             has taken out of its disk; writing here would destroy what that holds. If nobody needs \
             it, remove {shown} first"
        ),
    };
    if open::stands_elsewhere(&overlay.path, file, allow_dirs) {
        message += ". What is there now does not name this image as its backing file: if another image was \
                    made in the overlay's place, do not remove it, but move it away until this one has \
                    been opened";
    }
    Error::invalid(message)
}

/// Has the mark say what the process would have had it say that was killed after it had left a note.
///
/// # Errors
/// If an overlay is there and does not tell what it stands on.
fn settle_restacked(file: &HostFile, allow_dirs: &[PathBuf]) -> Result<()> {
    if overlays(file, RESTACKED).is_empty() {
        return Ok(());
    }
    // A job that lives has the turn until it has settled its notes itself.
    let turn = Turn::wait(file);
    for Overlay { path: overlay, .. } in overlays(file, RESTACKED) {
        if turn.is_of_others() {
            let (name, shown) = (file.name(), overlay.display());
            let message = format!(
                "{name}: another process is changing what {shown} stands on; try again when it is done"
            );
            return Err(Error::new(ErrorKind::Busy, message));
        }
        if is_gone(&overlay) {
            turn.clear_note(&overlay);
            continue;
        }
        let is_below = open::stands_on(&overlay, file, allow_dirs).context(|| {
            format!(
                "{}: a job on the disk that goes on in {} was cut short, and whether that still needs \
                 this image cannot be seen",
                file.name(),
                overlay.display()
            )
        })?;
        match is_below {
            true => turn.mark(&overlay),
            false => turn.unmark(&overlay),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
