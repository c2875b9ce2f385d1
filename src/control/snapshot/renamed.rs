//! What the header of an overlay names, once it stands on another image.

use std::path::{Path, PathBuf};

use crate::control::qapi::QmpResult;
use crate::error::ErrorKind;
use crate::images::frozen::{self, Turn};
use crate::images::{self, Image, ImageFormat};
use crate::io::HostFile;

/// An overlay that names another backing file than before.
///
/// What it has named before may be marked as frozen below it. The mark goes when the snapshot is done, so
/// there is a note from before the header changes ([`frozen`]).
pub(super) struct Renamed {
    overlay: Image,
    /// A file and its format.
    old: Option<(String, Option<ImageFormat>)>,
    /// What is frozen below it no more.
    leaves: Option<HostFile>,
}

impl Renamed {
    /// Has an overlay that was made beforehand name the image that it comes to stand on: whoever opens it
    /// later goes by that. `None` if it does already, or cannot.
    pub(super) fn onto(
        below: &Image,
        overlay: &Image,
        allow_dirs: &[PathBuf],
    ) -> QmpResult<Option<Renamed>> {
        // A VHDX image would not have been put there; and a state is no file.
        if !matches!(overlay.format, ImageFormat::Qcow2 | ImageFormat::AddCow)
            || below.format == ImageFormat::CrashState
            || images::names_as_backing(overlay, &below.file)?
        {
            return Ok(None);
        }
        let details = overlay.node.driver().details();
        let format = details["backing-filename-format"].as_str().and_then(|name| name.parse().ok());
        let old = details["backing-filename"].as_str().map(|name| (name.to_string(), format));
        let name = super::overlay::path_of(below)?;
        let file = overlay.name();
        let named = old.as_ref().map_or("nothing".into(), |(name, _)| name.clone());
        let leaves = old
            .as_ref()
            .and_then(|(name, _)| images::named_file(overlay, name, allow_dirs))
            .filter(|left| frozen::is_frozen_below(left, overlay.file.path()));
        let renamed = Renamed { overlay: overlay.clone(), old, leaves };
        renamed.on_left(|left, overlay| Turn::wait(left).note_restacked(overlay));
        match images::set_backing(overlay, Some(&name), Some(below.format)) {
            Ok(()) => {
                tracing::info!(
                    "{file}: names {name} as its backing file from now on, and not {named}"
                );
                Ok(Some(renamed))
            }
            Err(err) => {
                renamed.on_left(|left, overlay| Turn::wait(left).clear_note(overlay));
                if err.kind() != ErrorKind::Unsupported {
                    return Err(err.into());
                }
                // Who has made it may see to it later.
                tracing::warn!(
                    "{file}: names {named} as its backing file and not {name}, which cannot be changed \
                     now ({err}); whoever opens it later without that sees another disk"
                );
                Ok(None)
            }
        }
    }

    /// It stays so.
    pub(super) fn keep(self) {
        self.on_left(frozen::unmark);
    }

    /// It names what it did before.
    pub(super) fn undo(self) {
        let (name, format) = self.old.as_ref().map_or((None, None), |(n, f)| (Some(&**n), *f));
        if let Err(err) = images::set_backing(&self.overlay, name, format) {
            tracing::warn!(
                "{}: names a backing file that it is not put on: {err}",
                self.overlay.name()
            );
            return;
        }
        // Somebody may have taken the note for that of one who is dead.
        self.on_left(frozen::mark);
    }

    fn on_left(&self, change: impl Fn(&HostFile, &Path)) {
        if let Some(left) = &self.leaves {
            change(left, self.overlay.file.path());
        }
    }
}
