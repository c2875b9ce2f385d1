//! Crash states: the disks that a power cut could have left.
//!
//! A write log plus the disk as it was when logging began (the *base*) defines them all: everything
//! before some flush, plus any of the writes logged between it and the next, each whole, torn or
//! missing.
//!
//! ```text
//! name         E412:s=01101 — which state, in one word
//! history      a log taken apart into epochs; what a name means in it
//! below        reads of base and log, in pieces of any size
//! overlay      where each byte of a state lies: in the log, nowhere (zeros), or in the base
//! view         one state at a time; going on to the next costs what differs
//! fingerprint  tells which states are the same disk, without reading them
//! enumerate    which states of an epoch are worth a look
//! answers      which states need no check, because nothing differs that a checker looked at
//! disk         one state at a time, as a disk that can be written to
//! state        one state as a read-only node
//! fuse copy    the same as a plain file
//! scratch      the directories of these, and what killed processes have left there
//! syncer       what a checker wrote to it and the kernel still has
//! check        programs that say whether a disk is good
//! orphans      ends what they have left running
//! guard        ends them should we be killed
//! mailbox      a guest that says so
//! stop         the operator's wish to end
//! stage        where workers show states and have them checked
//! explore      all states, each different disk checked once
//! shrink       the fewest dropped writes that still fail
//! report       what was found, kept in a file
//! simulated    the same states for files of a simulation: how our own formats are explored
//! ```
//!
//! Nothing is copied: a state is an index of ranges over base and log, and as long as the log's
//! entries of the epoch, whatever the size of the disk.
//!
//! Invariants:
//! * A state depends on base, log and name alone.
//! * Two states with the same fingerprint have the same content (as far as 128 bits can tell). The
//!   reverse may fail where the base was not worth reading; then a state is checked twice.

pub mod answers;
mod below;
pub mod check;
pub mod copy;
pub mod disk;
pub mod enumerate;
pub mod explore;
pub mod fingerprint;
pub mod fuse;
mod guard;
pub mod history;
pub mod mailbox;
pub mod name;
pub mod orphans;
pub mod overlay;
pub mod report;
pub mod scratch;
pub mod shrink;
pub mod simulated;
pub mod stage;
pub mod state;
pub mod stop;
mod syncer;
pub mod view;

pub use answers::Answers;
pub use fingerprint::{Fingerprints, Prints};
pub use history::{Epoch, History};
pub use name::{Kept, StateName, Tear};
pub use overlay::{Overlay, Source};
pub use state::CrashState;
pub use view::View;

#[cfg(test)]
mod tests;
