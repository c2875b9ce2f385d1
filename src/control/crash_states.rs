//! Showing one state of a log after the other to a guest.

use std::sync::Arc;
use std::time::Duration;

use crate::block::{Node, Quiesced};
use crate::control::QmpError;
use crate::control::disks::Disks;
use crate::control::qapi::QmpResult;
use crate::crash::StateName;
use crate::formats::addcow;
use crate::images::crash_state;
use crate::io::block_on;

/// Has an export or a node (`device`: a crash state, or an overlay on one) show another state, fresh.
/// Returns how long guests were kept waiting. They must drop what they have cached.
///
/// # Errors
/// If it is no crash state, if there is no such state of its log, or if what was written to an overlay
/// cannot be forgotten.
pub fn present(disks: &mut Disks, device: &str, name: &StateName) -> QmpResult<Duration> {
    let graph = Arc::clone(disks.graph());
    let node = disks.find_any(device)?;
    let Some(state) = below(disks, &node) else {
        return Err(QmpError::generic(format!(
            "node '{}' is no crash state, and stands on none",
            node.name()
        )));
    };
    let above: Vec<Node> = (graph.nodes().into_iter())
        .filter(|node| !node.is_same(&state) && graph.reaches(node, &state))
        .collect();
    above.iter().try_for_each(|node| check_overlay(disks, node))?;
    let quiesced = graph.quiesce(std::slice::from_ref(&state));
    let shown = show(&state, &above, name, &quiesced);
    let pause = graph.resume(quiesced);
    shown?;
    Ok(pause)
}

/// The crash state that a node is or stands on.
fn below(disks: &Disks, node: &Node) -> Option<Node> {
    let is_state = |node: &Node| node.driver().name() == crate::crash::state::NAME;
    let found = disks.graph().nodes().into_iter();
    found.filter(is_state).find(|state| disks.graph().reaches(node, state))
}

/// What was written to an overlay belongs to the state of before, so it must be possible to forget
/// it, and no restart may put it on another state.
fn check_overlay(disks: &Disks, node: &Node) -> QmpResult<()> {
    let refuse = |why: &str| {
        Err(QmpError::generic(format!(
            "node '{}' stands on the crash state, and {why}",
            node.name()
        )))
    };
    let driver = node.driver();
    if driver.name() != addcow::NAME {
        return refuse("only add-cow overlays can be emptied for another state");
    }
    let named = driver.details()["backing-filename"].as_str().is_some_and(crash_state::is_name);
    if named && !disks.layers.file_of(node).is_some_and(|file| file.is_unlinked()) {
        return refuse(
            "its file says that it belongs to one state; serve the state without --overlay",
        );
    }
    Ok(())
}

fn show(state: &Node, above: &[Node], name: &StateName, quiesced: &Quiesced) -> QmpResult<()> {
    state.driver().show_state(&name.to_string(), quiesced)?;
    for overlay in above {
        block_on(overlay.driver().make_empty(false))?;
    }
    Ok(())
}
