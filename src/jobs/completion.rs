//! The end of a job, on the main thread: from the end of the work to its dismissal.
//!
//! ```text
//! work_ended ─ok──► waiting ─► pending ─► finalize ─ok──► concluded ─► null
//!            └error, cancelled ──────────────┴─error─► aborting ─► concluded ─► null
//! ```
//!
//! The event of a block job's end comes between its last state of work and `concluded`.

use std::sync::Arc;

use super::context::Ending;
use super::job::{Job, cancelled};
use super::registry::JobEvent;
use super::state::Status;
use crate::error::{Error, ErrorKind, Result};
use crate::images::Layers;

/// What clients read as the error of a job that was cancelled, in the C library's words.
const CANCELLED: &str = "Operation canceled";

impl Job {
    /// The body has returned or was dropped.
    pub(super) fn work_ended(self: Arc<Self>, result: Result<()>, layers: &mut Layers) {
        let mut state = self.state();
        // Who ends needs no rest.
        state.paused = false;
        self.settle(&mut state);
        let result = if state.cancelled { Err(cancelled()) } else { result };
        if let Err(err) = result {
            drop(state);
            return self.fail(&err, layers);
        }
        self.transition(&mut state, Status::Waiting);
        self.transition(&mut state, Status::Pending);
        if !self.auto_finalize {
            if self.kind.is_block_job() {
                self.jobs.tell(&JobEvent::Pending { id: self.id.clone(), kind: self.kind });
            }
            return;
        }
        drop(state);
        self.finalize(layers);
    }

    /// Puts what was done in force.
    pub(super) fn finalize(&self, layers: &mut Layers) {
        let ending = self.state().ending.unwrap_or(Ending::Complete);
        match self.body.finalize(ending, layers) {
            Ok(()) => self.conclude(layers),
            Err(err) => self.fail(&err, layers),
        }
    }

    /// Undoes what was done.
    pub(super) fn fail(&self, err: &Error, layers: &mut Layers) {
        let mut state = self.state();
        state.error = Some(match err.kind() {
            ErrorKind::Cancelled => CANCELLED.to_string(),
            _ => err.to_string(),
        });
        self.transition(&mut state, Status::Aborting);
        drop(state);
        self.body.abort(layers);
        self.conclude(layers);
    }

    fn conclude(&self, layers: &mut Layers) {
        // Before anybody hears that it is over: whoever hears it may want what the job had.
        self.release();
        self.body.concluded(layers);
        let mut state = self.state();
        match (state.cancelled, state.error.clone()) {
            (true, _) => {
                tracing::info!("{} job '{}' was cancelled", self.kind.name(), self.id);
                self.tell_block_job(&state, JobEvent::Cancelled);
            }
            (false, None) => {
                tracing::info!("{} job '{}' has completed", self.kind.name(), self.id);
                self.tell_block_job(&state, |figures| JobEvent::Completed(figures, None));
            }
            (false, Some(error)) => {
                tracing::error!("{} job '{}' has failed: {error}", self.kind.name(), self.id);
                self.tell_block_job(&state, |figures| JobEvent::Completed(figures, Some(error)));
            }
        }
        self.transition(&mut state, Status::Concluded);
        if self.auto_dismiss {
            self.dismiss(&mut state);
        }
    }

    /// Forgets a job that is over.
    pub(super) fn dismiss(&self, state: &mut super::job::State) {
        self.transition(state, Status::Null);
        self.jobs.remove(self);
    }
}
