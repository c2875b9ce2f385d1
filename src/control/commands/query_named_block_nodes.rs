//! `query-named-block-nodes`: all nodes, and what is below each.

// QEMU has names with underscores, which a doubled one stands for.
#![allow(non_snake_case)]

use serde_json::{Value, json};

use super::prelude::*;
use crate::block::Node;
use crate::control::disks::Disks;
use crate::images::info::describe;

qapi! {
    /// Which way to tell it.
    pub struct QueryNamedBlockNodesArguments {
        /// Without the images below each image.
        pub flat: Option<bool>,
    }
}
qapi! {
    /// A node below another.
    pub struct BlockdevChild {
        /// What it is for the node above.
        pub child: String,
        /// Its name.
        pub node_name: String,
    }
}
qapi! {
    /// How the host caches.
    pub struct BlockdevCacheInfo {
        /// Whether writes may be in a volatile cache until they are flushed.
        pub writeback: bool,
        /// Whether the page cache is bypassed.
        pub direct: bool,
        /// Whether flushes are ignored.
        pub no_flush: bool,
    }
}
qapi! {
    /// A node.
    pub struct BlockDeviceInfo {
        /// Its file.
        pub file: String,
        /// Its name.
        pub node_name: String,
        /// Whether it may only be read.
        pub ro: bool,
        /// Its driver.
        pub drv: String,
        /// The file of its backing image.
        pub backing__file: Option<String>,
        /// How many images are below it.
        pub backing__file__depth: u64,
        /// The nodes below it.
        pub children: Vec<BlockdevChild>,
        /// Whether it is active; always.
        pub active: bool,
        /// Whether it is encrypted.
        pub encrypted: bool,
        /// Whether zeros that are written are looked for.
        pub detect__zeroes: crate::control::blockdev::BlockdevDetectZeroesOptions,
        /// Limits; 0 is none.
        pub bps: u64,
        /// Of reads.
        pub bps__rd: u64,
        /// Of writes.
        pub bps__wr: u64,
        /// Of requests.
        pub iops: u64,
        /// Of reads.
        pub iops__rd: u64,
        /// Of writes.
        pub iops__wr: u64,
        /// What is stored, as `vublk info` tells it.
        pub image: Any,
        /// How the host caches.
        pub cache: BlockdevCacheInfo,
        /// No threshold is set.
        pub write__threshold: u64,
        /// Whether writes are refused because of an earlier failure.
        pub x_vublk_poisoned: Option<bool>,
        /// The overlay that the disk of a frozen image goes on in.
        pub x_vublk_frozen_below: Option<String>,
    }
}

/// What is to be told of a node.
pub fn info(disks: &Disks, node: &Node, flat: bool) -> QmpResult<BlockDeviceInfo> {
    let driver = node.driver();
    let layer = disks.layers.of(node);
    let file = disks.layers.below_filters(node);
    let file = file.map_or_else(String::new, |layer| layer.image.name().to_string());
    let image = match layer {
        Some(_) => image_info(disks, node, flat)?,
        None => json!({
            "filename": file, "format": driver.name(), "virtual-size": node.size(),
        }),
    };
    let children = disks.graph().children(node).into_iter();
    let cache = layer.map(|layer| layer.image.cache).unwrap_or_default();
    let mut depth = 0;
    let mut below = node.backing();
    let backing_file = below
        .as_ref()
        .and_then(|below| disks.layers.file_of(below))
        .map(|file| file.path().display().to_string());
    while let Some(node) = below {
        depth += 1;
        below = node.backing();
    }
    Ok(BlockDeviceInfo {
        file: file.clone(),
        node_name: node.name().to_string(),
        ro: node.limits().read_only,
        drv: driver.name().to_string(),
        backing__file: backing_file,
        backing__file__depth: depth,
        children: children
            .map(|(role, child)| BlockdevChild {
                child: role.to_string(),
                node_name: child.name().to_string(),
            })
            .collect(),
        active: true,
        encrypted: false,
        detect__zeroes: crate::control::blockdev::BlockdevDetectZeroesOptions::Off,
        bps: 0,
        bps__rd: 0,
        bps__wr: 0,
        iops: 0,
        iops__rd: 0,
        iops__wr: 0,
        image: Any(image),
        cache: BlockdevCacheInfo {
            writeback: !cache.is_writethrough(),
            direct: cache.is_direct(),
            no_flush: cache.ignores_flush(),
        },
        write__threshold: 0,
        x_vublk_poisoned: node.is_poisoned().then_some(true),
        x_vublk_frozen_below: layer
            .and_then(|layer| crate::images::frozen::overlay_of(&layer.image.file))
            .map(|path| path.display().to_string()),
    })
}

/// QEMU's `ImageInfo`, with that of the backing inside unless `flat`.
fn image_info(disks: &Disks, node: &Node, flat: bool) -> QmpResult<Value> {
    let Some(layer) = disks.layers.of(node) else { return Ok(Value::Null) };
    let mut info = describe(&layer.image)?;
    let Some(object) = info.as_object_mut() else { return Ok(info) };
    object.remove("children");
    if layer.is_protocol {
        object.insert("format".into(), node.driver().name().into());
        return Ok(info);
    }
    if let Some(below) = node.backing()
        && let Some(file) = disks.layers.file_of(&below)
    {
        // As it is now, which a header need not say any more.
        let path = file.path().display().to_string();
        object.insert("full-backing-filename".into(), path.clone().into());
        object.entry("backing-filename").or_insert_with(|| path.into());
        if !flat {
            object.insert("backing-image".into(), image_info(disks, &below, flat)?);
        }
    }
    Ok(info)
}

pub struct QueryNamedBlockNodes;

impl MainCommand for QueryNamedBlockNodes {
    const NAME: &'static str = "query-named-block-nodes";
    const DOC: &'static str = "Tells all nodes of the graph.";
    type Arguments = QueryNamedBlockNodesArguments;
    type Returns = Vec<BlockDeviceInfo>;

    fn run(
        daemon: &mut Daemon,
        arguments: QueryNamedBlockNodesArguments,
    ) -> QmpResult<Vec<BlockDeviceInfo>> {
        let disks = daemon.disks();
        let flat = arguments.flat == Some(true);
        // The newest first, as QEMU.
        let nodes = disks.graph().nodes().into_iter().rev();
        nodes.map(|node| info(disks, &node, flat)).collect()
    }
}
