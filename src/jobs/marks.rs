//! The marks of snapshots that change with what overlays stand on.
//!
//! ```text
//! announce ──► the overlays' headers name another image ──► renew
//!                                 └ failed ───────────────► keep
//! ```
//!
//! Killed at any point in between, what has been announced is settled by what an overlay's header says by
//! then ([`frozen`]).
//!
//! What a job takes out from below a guest's disk is needed by nobody, and yet not to be served by mistake:
//! a command line that was written before the snapshot names it, and the guest that lives would come back to
//! a disk without what it has written since. So it gets the mark of what a disk has left, before the headers
//! change: until then it is frozen all the same.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::images::frozen::{self, Turn};
use crate::io::HostFile;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Marks {
    /// The overlays whose headers change.
    pub overlays: Vec<PathBuf>,
    /// The image that is frozen below them no more.
    pub leaves: Option<Arc<HostFile>>,
    /// Whether their disk goes on meanwhile, for a guest that must not find it where it was before the
    /// snapshot: what leaves is marked as left.
    pub is_live: bool,
    /// The one that is frozen below them from then on.
    pub joins: Option<Joins>,
}

/// What comes to be below the overlays.
#[derive(Debug)]
pub struct Joins {
    /// Its file.
    pub file: Arc<HostFile>,
    /// Who else is named by its mark.
    pub others: Others,
}

/// Who has stood on an image so far.
#[derive(Debug)]
pub enum Others {
    /// They are named as before.
    Stay,
    /// The layer at this path, which the overlays stood on so far, stands there still.
    Left(PathBuf),
    /// The image's content was changed for the overlays, so it is of no use to others.
    Lost,
}

impl Marks {
    /// Before the headers change.
    pub fn announce(&self) -> Announced<'_> {
        let joins = self.joins.as_ref().map(|joins| &*joins.file);
        let leaves = self.leaves.as_deref();
        let identity = |file: Option<&HostFile>| file.and_then(|file| file.identity().ok());
        let wait = |file: Option<_>| file.map(Turn::wait);
        // In the order in which everybody does, or two would wait for each other.
        let (joins, leaves) = if identity(joins) < identity(leaves) {
            let joins = wait(joins);
            (joins, wait(leaves))
        } else {
            let leaves = wait(leaves);
            (wait(joins), leaves)
        };
        let announced = Announced { marks: self, joins, leaves };
        announced.for_each(Turn::note_restacked);
        // Now: whoever settles the note of a job that was killed only sees to what is needed.
        if let (Some(left), Some(overlay)) = (announced.left(), self.overlays.first()) {
            frozen::mark_moved(left, overlay);
        }
        announced
    }
}

/// Marks that are about to change, and the turns to do that.
#[derive(Debug)]
#[must_use = "the turn to change the marks ends with it"]
pub struct Announced<'a> {
    marks: &'a Marks,
    joins: Option<Turn<'a>>,
    leaves: Option<Turn<'a>>,
}

impl<'a> Announced<'a> {
    /// The headers have changed.
    pub fn renew(&self) {
        let overlays = &self.marks.overlays;
        if let (Some(turn), Some(Joins { others, .. })) = (&self.joins, &self.marks.joins) {
            match others {
                Others::Lost => turn.mark_only(overlays),
                Others::Stay => overlays.iter().for_each(|overlay| turn.mark(overlay)),
                Others::Left(left) => {
                    overlays.iter().for_each(|overlay| turn.mark_over(overlay, left));
                }
            }
        }
        if let Some(turn) = &self.leaves {
            overlays.iter().for_each(|overlay| turn.unmark(overlay));
        }
    }

    /// The headers say what they did before.
    pub fn keep(&self) {
        if let Some(left) = self.left() {
            frozen::clear_moved(left);
        }
        self.for_each(Turn::clear_note);
    }

    /// The image that the disk leaves.
    fn left(&self) -> Option<&HostFile> {
        self.marks.leaves.as_deref().filter(|_| self.marks.is_live)
    }

    fn for_each(&self, change: fn(&Turn<'a>, &Path)) {
        for turn in self.joins.iter().chain(&self.leaves) {
            self.marks.overlays.iter().for_each(|overlay| change(turn, overlay));
        }
    }
}
