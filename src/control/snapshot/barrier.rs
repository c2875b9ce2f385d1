//! Actions that happen at one instant, all or none.
//!
//! ```text
//!            prepare, in order       open files, check names, take holds: slow, undone by dropping it
//!            make, in order          overlays that are new: what their files contained is gone
//!               │                    from here on, but nothing that is wrong has come so far
//!            flush                   so that little is left to be flushed while guests wait
//!  guests    ┌─ quiesce ───────────  one barrier for all disks
//!  wait      │  commit               each action; a failure undoes those before it
//!            └─ resume ────────────  the pause is measured
//!            clean                   what can be done while guests go on
//! ```
//!
//! All or nothing: an action that fails leaves everything as it was, and files that were made for
//! the transaction are removed. Should a guest be unable to go back to where it was, then what it
//! stands on stays, with its files, and the log says so.

use std::sync::Arc;

use super::overlay::{Created, NewOverlay};
use crate::block::{Node, Quiesced};
use crate::control::Daemon;
use crate::control::disks::Disks;
use crate::control::qapi::QmpResult;
use crate::error::{Result, ResultExt};
use crate::io::block_on;

/// Something that happens at the barrier of a transaction. Made by what prepares it; dropping it
/// before `commit` undoes the preparation.
pub trait Action {
    /// What it is called in the log.
    fn name(&self) -> &'static str;

    /// The nodes that must be quiet.
    fn nodes(&self) -> Vec<Node>;

    /// Does it. The gates of all that reach [`Action::nodes`] are closed, and guests wait.
    fn commit(&mut self, disks: &mut Disks, quiesced: &Quiesced) -> QmpResult<()>;

    /// Takes a commit back, because a later action failed. The gates are still closed.
    fn undo(&mut self, disks: &mut Disks, quiesced: &Quiesced);

    /// All actions are done, and guests go on.
    fn clean(&mut self, disks: &mut Disks) {
        let _ = disks;
    }

    /// Gives away what was made for it, which is undone when that is dropped.
    fn take_created(&mut self) -> Created {
        Created::default()
    }
}

/// An action for which nothing is gone that was there before.
pub enum Prepared {
    /// One that can be done.
    Action(Box<dyn Action>),
    /// One whose overlay is still to be made, which gives up what its file contained.
    Overlay(Box<NewOverlay>),
}

impl Prepared {
    /// Whether it is still to make the node of this name.
    pub fn makes(&self, name: &str) -> bool {
        match self {
            Prepared::Overlay(overlay) => overlay.makes(name),
            Prepared::Action(_) => false,
        }
    }
}

/// Makes the overlays of prepared actions. On failure all of them are undone.
pub fn make(disks: &mut Disks, prepared: Vec<Prepared>) -> QmpResult<Vec<Box<dyn Action>>> {
    let mut actions = Vec::with_capacity(prepared.len());
    let mut result = Ok(());
    for prepared in prepared {
        match prepared {
            Prepared::Action(action) => actions.push(action),
            // Nor does one of the others make its own.
            Prepared::Overlay(_) if result.is_err() => {}
            Prepared::Overlay(overlay) => match overlay.make(disks) {
                Ok(action) => actions.push(action),
                Err(err) => result = Err(err),
            },
        }
    }
    match result {
        Ok(()) => Ok(actions),
        Err(err) => {
            abandon(disks, actions);
            Err(err)
        }
    }
}

/// Undoes what was prepared; nothing was made for it yet.
pub fn give_up(disks: &mut Disks, prepared: Vec<Prepared>) {
    let action = |prepared| match prepared {
        Prepared::Action(action) => Some(action),
        Prepared::Overlay(_) => None,
    };
    abandon(disks, prepared.into_iter().filter_map(action).collect());
}

/// Undoes what prepared actions have prepared.
pub fn abandon(disks: &mut Disks, mut actions: Vec<Box<dyn Action>>) {
    let mut created = Vec::new();
    // The last one first, as each may stand on those before it.
    while let Some(mut action) = actions.pop() {
        created.push(action.take_created());
    }
    disks.layers.collect();
    // Now that nobody has the files open who would write to them when he closes them.
    drop(created);
}

/// Does prepared actions at one barrier, all or none.
pub fn run(daemon: &mut Daemon, mut actions: Vec<Box<dyn Action>>) -> QmpResult<()> {
    if actions.is_empty() {
        return Ok(());
    }
    let disks = daemon.disks_mut();
    let nodes: Vec<Node> = actions.iter().flat_map(|action| action.nodes()).collect();
    // So that little is left for the flush afterwards, which the guest's own have to wait for.
    if let Err(err) = nodes.iter().try_for_each(flush) {
        abandon(disks, actions);
        return Err(err.into());
    }
    let graph = Arc::clone(disks.graph());
    let quiesced = graph.quiesce(&nodes);
    let mut result = Ok(());
    let mut done = 0;
    for action in &mut actions {
        result = action.commit(disks, &quiesced);
        if result.is_err() {
            break;
        }
        done += 1;
    }
    if result.is_err() {
        for action in actions[..done].iter_mut().rev() {
            action.undo(disks, &quiesced);
        }
    }
    let pause = graph.resume(quiesced);
    let names: Vec<_> = actions.iter().map(|action| action.name()).collect();
    tracing::info!(
        "{}: {}; guests paused for {} us",
        names.join(", "),
        if result.is_ok() { "done" } else { "undone" },
        pause.as_micros()
    );
    if result.is_ok() {
        for action in &mut actions {
            action.clean(disks);
        }
    }
    abandon(disks, actions);
    result
}

/// Makes what was completed durable; read-only nodes have nothing of that.
fn flush(node: &Node) -> Result<()> {
    if node.limits().read_only {
        return Ok(());
    }
    block_on(node.flush()).context(|| format!("node '{}': flush before the snapshot", node.name()))
}
