//! Jobs: long work on disks, under way while guests run.
//!
//! ```text
//! command (main thread)          jobs thread: one reactor          main thread
//! ─────────────────────          ──────────────────────────        ───────────────
//! Jobs::start(spec, body) ─────► body.run(context)
//!                                  turn: may I issue requests?
//!   pause, resume, speed,   ────►  throttle, progress, ready
//!   cancel, complete              ends, fails, or is dropped ────► waiting, pending
//!                                                                  body.finalize: graph change
//!                                                                  concluded, dismissed
//! ```
//!
//! A job is a [`Body`] (what is special about a mirror, a stream, …) around which everything that
//! operators know of jobs is done here once: the states and who may do what in which ([`state`]),
//! events, pause and resume, the speed limit, progress, what to do about errors, completion.
//! Names, transitions and events are QEMU's.
//!
//! # Threads
//!
//! All bodies run on one **jobs thread**, which exists while there are jobs. It has a reactor of
//! its own, so it runs the same driver code as the workers, and no job delays a guest but by the
//! disk they share. What changes the graph is done on the **main thread** ([`Context::on_main`],
//! [`Body::finalize`]). Verbs (pause, cancel, …) may come from any thread and never wait.
//!
//! # The gate
//!
//! A job is a party of the gates of the roots that it holds. It issues requests only while it has
//! a [`Turn`], and gets one only while all its gates are open. So whoever quiesces a disk waits for
//! the job's turns to end, and no longer. A paused job has no turn either.
//!
//! # Cancelling
//!
//! A cancelled body's future is dropped at the first await where it has no turn: what it has in
//! flight it ends first, or a copy could land on what a guest has written there since. Then
//! [`Body::abort`] undoes on the main thread what must not stay.

pub mod chain;
pub mod commit;
mod completion;
mod context;
mod error_policy;
mod job;
pub mod layer_copy;
mod limit;
pub mod marks;
mod pace;
mod query;
mod registry;
pub mod state;
pub mod stream;
mod thread;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod kill_tests;
#[cfg(test)]
mod tests;

pub use context::{Context, Ending, Turn};
pub use error_policy::{Action, OnError, Operation};
pub use job::{Body, JobKind, Spec};
pub use query::{Details, IoStatus, JobInfo};
pub use registry::{Figures, JobEvent, Jobs, Listener, MainTask, VerbError};
pub use state::{Status, Verb};
