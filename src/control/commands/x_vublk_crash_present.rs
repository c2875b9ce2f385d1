//! `x-vublk-crash-present`: another crash state in the place of the one that a guest has.

use std::sync::Arc;

use super::prelude::*;
use crate::block::{Node, Quiesced};
use crate::control::disks::Disks;
use crate::crash::StateName;
use crate::formats::addcow;
use crate::images::crash_state;
use crate::io::block_on;

qapi! {
    /// Which state, and where.
    pub struct CrashPresent {
        /// The export, or the node: a crash state, or an overlay on one.
        pub device: String,
        /// The name of the state.
        pub state: String,
    }
}
qapi! {
    /// What came of it.
    pub struct CrashPresented {
        /// How long guests were kept waiting, in microseconds.
        pub pause_us: u64,
    }
}

pub struct XVublkCrashPresent;

impl MainCommand for XVublkCrashPresent {
    const NAME: &'static str = "x-vublk-crash-present";
    const DOC: &'static str =
        "Shows a guest another state of a log, fresh; the guest must drop what it has cached.";
    type Arguments = CrashPresent;
    type Returns = CrashPresented;

    fn run(daemon: &mut Daemon, arguments: CrashPresent) -> QmpResult<CrashPresented> {
        let name: StateName = arguments.state.parse()?;
        let disks = daemon.disks_mut();
        let graph = Arc::clone(disks.graph());
        let node = disks.find_any(&arguments.device)?;
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
        let shown = show(&state, &above, &name, &quiesced);
        let pause = graph.resume(quiesced);
        shown?;
        Ok(CrashPresented { pause_us: pause.as_micros() as u64 })
    }
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
