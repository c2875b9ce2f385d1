//! The marks of snapshots that change with what an overlay stands on.
//!
//! ```text
//! announce ──► the overlay's header names another image ──► renew
//!                                 └ failed ───────────────► keep
//! ```
//!
//! Killed at any point in between, what has been announced is settled by what the overlay's header says by
//! then ([`frozen`]).

use std::path::Path;
use std::sync::Arc;

use crate::images::frozen;
use crate::io::HostFile;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// The image that is frozen below the overlay no more.
    pub leaves: Option<Arc<HostFile>>,
    /// The one that is frozen below it from then on.
    pub joins: Option<Arc<HostFile>>,
}

impl Marks {
    /// Before the header changes.
    pub fn announce(&self, overlay: &Path) {
        self.files().for_each(|file| frozen::note_restacked(file, overlay));
    }

    /// The header has changed.
    pub fn renew(&self, overlay: &Path) {
        if let Some(file) = &self.joins {
            frozen::mark(file, overlay);
        }
        if let Some(file) = &self.leaves {
            frozen::clear_overlay(file);
        }
    }

    /// The header says what it did before.
    pub fn keep(&self) {
        self.files().for_each(frozen::clear_note);
    }

    fn files(&self) -> impl Iterator<Item = &HostFile> {
        self.joins.iter().chain(&self.leaves).map(Arc::as_ref)
    }
}
