//! The marks of snapshots that change with what overlays stand on.
//!
//! ```text
//! announce ──► the overlays' headers name another image ──► renew
//!                                 └ failed ───────────────► keep
//! ```
//!
//! Killed at any point in between, what has been announced is settled by what an overlay's header says by
//! then ([`frozen`]).

use std::path::PathBuf;
use std::sync::Arc;

use crate::images::frozen;
use crate::io::HostFile;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Marks {
    /// The overlays whose headers change.
    pub overlays: Vec<PathBuf>,
    /// The image that is frozen below them no more.
    pub leaves: Option<Arc<HostFile>>,
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
    pub fn announce(&self) {
        self.for_each(frozen::note_restacked);
    }

    /// The headers have changed.
    pub fn renew(&self) {
        if let Some(Joins { file, others }) = &self.joins {
            match others {
                Others::Lost => frozen::mark_only(file, &self.overlays),
                Others::Stay => {
                    self.overlays.iter().for_each(|overlay| frozen::mark(file, overlay))
                }
                Others::Left(left) => {
                    self.overlays.iter().for_each(|overlay| frozen::mark_over(file, overlay, left));
                }
            }
        }
        if let Some(file) = &self.leaves {
            self.overlays.iter().for_each(|overlay| frozen::unmark(file, overlay));
        }
    }

    /// The headers say what they did before.
    pub fn keep(&self) {
        self.for_each(frozen::clear_note);
    }

    fn for_each(&self, change: fn(&HostFile, &std::path::Path)) {
        let joins = self.joins.iter().map(|joins| &joins.file);
        for file in joins.chain(&self.leaves) {
            self.overlays.iter().for_each(|overlay| change(file, overlay));
        }
    }
}
