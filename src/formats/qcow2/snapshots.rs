//! The table of internal snapshots, for `info` and for the check. The disk itself never needs it.

use std::sync::Arc;

use serde_json::{Value, json};

use super::disk;
use super::header::Header;
use crate::error::{Error, Result};
use crate::io::File;

/// Bytes of an entry before its variable parts.
const ENTRY_LEN: usize = 40;
/// Most snapshots that an image may have, and most bytes that one may take: QEMU's limits.
const MAX_COUNT: u32 = 65536;
const MAX_EXTRA: usize = 1024;
/// How much is read at a time: an entry with all that a 16-bit length allows.
const MAX_ENTRY: usize = ENTRY_LEN + MAX_EXTRA + 2 * 65535;

/// An internal snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub l1_offset: u64,
    pub l1_entries: u64,
    /// For `info`: QEMU's SnapshotInfo.
    pub info: Value,
}

/// The snapshots of an image and the length of their table in bytes.
pub async fn read(file: &Arc<dyn File>, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    if header.snapshots > MAX_COUNT {
        return Err(Error::corrupt(format!(
            "{} snapshots at header offset 60 are more than {MAX_COUNT}",
            header.snapshots
        )));
    }
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    for index in 0..header.snapshots {
        let broken = || {
            Error::corrupt(format!("snapshot table entry {index} at {at} runs past what it may"))
        };
        if at >= file.len()? {
            return Err(broken());
        }
        let bytes = disk::read_bytes(&**file, at, MAX_ENTRY).await?;
        let (snapshot, len) = parse(&bytes).ok_or_else(broken)?;
        snapshots.push(snapshot);
        at = at.checked_add(len.next_multiple_of(8) as u64).ok_or_else(broken)?;
    }
    Ok((snapshots, at - header.snapshots_offset))
}

/// An entry and its length, without the padding.
fn parse(bytes: &[u8]) -> Option<(Snapshot, usize)> {
    let be16 = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
    let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let extra = be32(36) as usize;
    if extra > MAX_EXTRA {
        return None;
    }
    let id = ENTRY_LEN + extra;
    let name = id + usize::from(be16(12));
    let end = name + usize::from(be16(14));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let clock = be64(24);
    let mut info = json!({
        "id": text(bytes.get(id..name)?),
        "name": text(bytes.get(name..end)?),
        "vm-state-size": if extra >= 8 { be64(ENTRY_LEN) } else { u64::from(be32(32)) },
        "date-sec": be32(16),
        "date-nsec": be32(20),
        "vm-clock-sec": clock / 1_000_000_000,
        "vm-clock-nsec": clock % 1_000_000_000,
    });
    if extra >= 24 && be64(ENTRY_LEN + 16) != u64::MAX {
        info["icount"] = be64(ENTRY_LEN + 16).into();
    }
    let snapshot = Snapshot { l1_offset: be64(0), l1_entries: u64::from(be32(8)), info };
    Some((snapshot, end))
}
