//! The directory of persistent bitmaps, for `info`. They are not kept up to date here; see
//! `give_up_claims`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::disk;
use super::header::Header;
use crate::error::{Error, Result};
use crate::io::File;

/// Bytes of an entry before its variable parts.
const ENTRY_LEN: usize = 24;
/// Most bitmaps that an image may have, and the longest name of one in bytes: QEMU's limits.
const MAX_COUNT: u32 = 65535;
const MAX_NAME: usize = 1023;
/// Flags of a bitmap: what it says may be out of date; it goes on counting when the image is opened.
const IN_USE: u32 = 1 << 0;
const AUTO: u32 = 1 << 1;

/// The bitmaps of an image, as QEMU's Qcow2BitmapInfo. None where the header does not say that they are
/// of the disk as it is.
pub async fn read(file: &Arc<dyn File>, header: &Header) -> Result<Vec<Value>> {
    let Some((count, mut at)) = header.current_bitmaps() else { return Ok(Vec::new()) };
    if count > MAX_COUNT {
        return Err(Error::corrupt(format!(
            "{count} bitmaps in the header extension are more than {MAX_COUNT}"
        )));
    }
    let mut bitmaps = Vec::new();
    for index in 0..count {
        let broken =
            || Error::corrupt(format!("bitmap directory entry {index} at {at} makes no sense"));
        if at >= file.len()? {
            return Err(broken());
        }
        let bytes = disk::read_bytes(&**file, at, ENTRY_LEN + MAX_NAME).await?;
        let (bitmap, len) = parse(&bytes).ok_or_else(broken)?;
        bitmaps.push(bitmap);
        at = at.checked_add(len.next_multiple_of(8) as u64).ok_or_else(broken)?;
    }
    Ok(bitmaps)
}

/// An entry and its length, without the padding. As in QEMU, none has extra data.
fn parse(bytes: &[u8]) -> Option<(Value, usize)> {
    let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let (flags, granularity_bits, extra) = (be32(12), u32::from(bytes[17]), be32(20));
    let end = ENTRY_LEN + usize::from(u16::from_be_bytes([bytes[18], bytes[19]]));
    let name = bytes.get(ENTRY_LEN..end)?;
    if extra > 0 {
        return None;
    }
    let flags =
        [(IN_USE, "in-use"), (AUTO, "auto")].into_iter().filter(|(bit, _)| flags & bit != 0);
    let bitmap = json!({
        "flags": flags.map(|(_, name)| name).collect::<Vec<_>>(),
        "name": String::from_utf8_lossy(name),
        "granularity": 1u64.checked_shl(granularity_bits)?,
    });
    Some((bitmap, end))
}
