//! What an image is, as QEMU tells it (`BlockNodeInfo`): for `vublk info` and for the queries of the
//! control socket.
//!
//! A driver's [`details`](crate::block::Driver::details) fill it: keys that QEMU has at the top
//! (`cluster-size`, `backing-filename`, `backing-filename-format`, `encrypted`, `compressed`,
//! `dirty-flag`, `snapshots`) go there, all others under `format-specific.data`.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::error::{Result, ResultExt};
use crate::images::Image;
use crate::images::open::{full_backing_name, protocol_name};
use crate::images::parents::backing_names;
use crate::io::File;
use crate::units::SECTOR_SIZE;

/// Keys of a driver's details that stand at the top of the answer.
const TOP_KEYS: &[&str] = &[
    "cluster-size",
    "backing-filename",
    "backing-filename-format",
    "encrypted",
    "compressed",
    "dirty-flag",
    "snapshots",
];

/// QEMU's description of an image.
pub fn describe(image: &Image) -> Result<Value> {
    let name = || image.name().to_string();
    let actual_size = image.file.allocated_size().context(name)?;
    let protocol = protocol_name(&image.file);
    let child = json!({
        "children": [],
        // As a node it is a disk, which has whole sectors.
        "virtual-size": image.file.len().context(name)?.next_multiple_of(SECTOR_SIZE),
        "filename": image.name(),
        "format": protocol,
        "actual-size": actual_size,
        "format-specific": { "type": protocol, "data": {} },
        "dirty-flag": false,
    });
    let mut info = Map::new();
    info.insert("children".into(), json!([{ "name": "file", "info": child }]));
    info.insert("virtual-size".into(), image.node.size().into());
    info.insert("filename".into(), image.name().into());
    info.insert("format".into(), image.format.name().into());
    info.insert("actual-size".into(), actual_size.into());
    info.insert("dirty-flag".into(), false.into());
    let details = image.node.driver().details();
    let names = backing_names(image.file.path(), &details);
    let mut specific = Map::new();
    if let Value::Object(details) = details {
        for (key, value) in details {
            match TOP_KEYS.contains(&key.as_str()) {
                true => info.insert(key, value),
                false => specific.insert(key, value),
            };
        }
    }
    if !specific.is_empty() {
        let typed = json!({ "type": image.format.name(), "data": specific });
        info.insert("format-specific".into(), typed);
    }
    let paths = names.iter().map(|name| full_backing_name(image.file.path(), name));
    let paths: Vec<PathBuf> = paths.collect();
    if let Some(path) = paths.iter().find(|path| path.exists()).or(paths.first()) {
        let full = path.display().to_string();
        info.insert("full-backing-filename".into(), full.into());
    }
    Ok(Value::Object(info))
}
