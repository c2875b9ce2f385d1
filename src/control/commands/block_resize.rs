//! `block_resize`: changes the size of a disk while it is served; the guest is told.

use std::sync::Arc;

use super::prelude::*;
use crate::images::frozen;
use crate::io::block_on;

qapi! {
    /// Which disk, and its new size.
    pub struct BlockResizeArguments {
        /// The export whose disk it is.
        pub device: Option<String>,
        /// Or the node.
        pub node_name: Option<String>,
        /// In bytes; whole blocks of the guest's.
        pub size: i64,
        /// Allow it to become smaller: what lies beyond the new end is lost.
        pub x_vublk_shrink: Option<bool>,
    }
}

pub struct BlockResize;

impl MainCommand for BlockResize {
    const NAME: &'static str = "block_resize";
    const DOC: &'static str = "Changes the size of a disk, and tells the guest.";
    type Arguments = BlockResizeArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockResizeArguments) -> QmpResult<Nothing> {
        let BlockResizeArguments { device, node_name, size, x_vublk_shrink } = arguments;
        let disks = daemon.disks();
        let node = disks.find(device.as_deref(), node_name.as_deref())?;
        let size = u64::try_from(size)
            .ok()
            .filter(|size| *size > 0)
            .ok_or_else(|| QmpError::generic("Parameter 'size' expects a >0 size"))?;
        crate::images::create::check_size(size)?;
        let old = node.size();
        if size < old && x_vublk_shrink != Some(true) {
            return Err(QmpError::generic(format!(
                "{size} bytes are less than the {old} that '{}' has, and what lies beyond would be \
                 lost; say x-vublk-shrink if that is meant",
                node.name()
            )));
        }
        for served in disks.exports.iter().filter(|served| served.root().node().is_same(&node)) {
            let block = u64::from(served.export().options.block_size);
            if !size.is_multiple_of(block) {
                return Err(QmpError::generic(format!(
                    "{size} bytes are not whole blocks of {block} bytes, as export '{}' has them",
                    served.id()
                )));
            }
        }
        let _hold = disks.hold_graph(&node, "block_resize")?;
        disks.check_no_node_on(&node, "resize", "block_resize")?;
        frozen::check(&disks.image_below(&node)?.file, disks.layers.allow_dirs())?;
        // What is kept is of the size that the disk has.
        node.check_guest_is_back()?;
        let graph = Arc::clone(disks.graph());
        let quiesced = graph.quiesce(std::slice::from_ref(&node));
        let resized = block_on(node.resize(size, &quiesced));
        refresh_file(&graph, &node, &quiesced);
        let pause = graph.resume(quiesced);
        let resized = resized.and_then(|()| block_on(node.flush()));
        // Also if that has failed: the guest must not see a size that is not there.
        disks.update_capacities();
        tracing::info!(
            "block_resize of '{}' from {old} to {} bytes: guests paused for {} us",
            node.name(),
            node.size(),
            pause.as_micros()
        );
        resized?;
        Ok(Nothing {})
    }
}

/// The protocol node below has another size now, too.
fn refresh_file(
    graph: &crate::block::Graph,
    node: &crate::block::Node,
    quiesced: &crate::block::Quiesced,
) {
    for (role, child) in graph.children(node) {
        if role != "file" {
            continue;
        }
        if let Err(err) = child.refresh(quiesced) {
            tracing::warn!("the size of node '{}' is not known any more: {err}", child.name());
        }
        // Below a filter is an image, which has a file itself.
        refresh_file(graph, &child, quiesced);
    }
}
