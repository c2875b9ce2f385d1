//! Looking for what is wrong with an add-cow file, and putting it right.
//!
//! Each bit has a meaning whatever the others are, so little can be wrong: the bitmap may be of
//! another length than the disk needs, and bits may be set beyond the end. Reads one window of the
//! bitmap at a time.

use std::sync::Arc;

use super::layout::{HEADER_LEN, bitmap_len, reserved_is_zero, sectors_of};
use super::{Header, read_header_bytes, resize};
use crate::error::{Result, ResultExt};
use crate::io::{AlignedBuf, File};
use crate::units::MIB;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Sectors of the disk.
    pub sectors: u64,
    /// How many of them are in the image file.
    pub allocated: u64,
    /// Runs of set bits, but the first.
    pub fragments: u64,
    /// What loses data: the bitmap is short, or the image file is.
    pub corruptions: u64,
    /// What merely should not be there.
    pub leaks: u64,
    /// What was repaired of each.
    pub corruptions_fixed: u64,
    /// See `corruptions_fixed`.
    pub leaks_fixed: u64,
    /// One sentence for each finding.
    pub findings: Vec<String>,
}

/// Checks an add-cow file whose image file has `image_len` bytes. Repairs what is found where
/// `fix_leaks`, `fix_all` (which needs a writable file) say so. Nothing of the disk's content changes
/// by a repair.
pub async fn check(
    file: &Arc<dyn File>,
    image_len: u64,
    fix_leaks: bool,
    fix_all: bool,
) -> Result<Found> {
    check_unnamed(file, image_len, fix_leaks, fix_all)
        .await
        .context(|| format!("{}: check", file.name()))
}

async fn check_unnamed(
    file: &Arc<dyn File>,
    image_len: u64,
    fix_leaks: bool,
    fix_all: bool,
) -> Result<Found> {
    let header = read_header_bytes(file).await?;
    Header::parse(&header)?;
    let sectors = sectors_of(image_len);
    let mut found = Found { sectors, ..Found::default() };
    if !reserved_is_zero(&header) {
        found.findings.push("warning: reserved bytes of the header are not zero".into());
    }
    if !image_len.is_multiple_of(512) {
        found.findings.push(format!(
            "warning: the last {} bytes of the image file are no whole sector and are ignored",
            image_len % 512
        ));
    }
    let needed = bitmap_len(sectors);
    let have = file.len()?.saturating_sub(HEADER_LEN);
    let scan = scan(file, have, sectors).await?;
    found.allocated = scan.set_inside;
    found.fragments = scan.runs.saturating_sub(1);
    if have < needed {
        found.corruptions += 1;
        found.findings.push(format!(
            "ERROR bitmap is short: {have} of {needed} bytes; the rest counts as not written"
        ));
    }
    if let Some(highest) = scan.highest
        && highest >= needed * 8
    {
        found.corruptions += 1;
        found.findings.push(format!(
            "ERROR image file is smaller than the highest set bit: sector {highest} is set, and \
             the disk has {sectors}; was the image file truncated?"
        ));
    } else if scan.set_beyond > 0 {
        found.leaks += 1;
        found.findings.push(format!(
            "{} bits are set past the end, behind the last of {sectors} sectors",
            scan.set_beyond
        ));
    }
    if have > needed {
        found.leaks += 1;
        found.findings.push(format!(
            "leftover: {} bytes behind the {needed} bytes of the bitmap",
            have - needed
        ));
    }
    if sectors > 0 && found.allocated == sectors {
        found.findings.push("fully allocated: backing can be dropped".into());
    }
    let fix_now = fix_all || fix_leaks && found.corruptions == 0;
    if fix_now && (found.leaks > 0 || found.corruptions > 0) {
        // Bits beyond the end go first, so that no power cut makes a longer bitmap of them.
        resize::trim_bitmap(file.as_ref(), sectors).await?;
        file.flush().await?;
        found.leaks_fixed = std::mem::take(&mut found.leaks);
        found.corruptions_fixed = std::mem::take(&mut found.corruptions);
    }
    Ok(found)
}

/// What the bits are.
#[derive(Default)]
struct Scan {
    set_inside: u64,
    set_beyond: u64,
    runs: u64,
    highest: Option<u64>,
}

/// Counts the bits of a bitmap of `len` bytes. Holes are passed over.
async fn scan(file: &Arc<dyn File>, len: u64, sectors: u64) -> Result<Scan> {
    let mut scan = Scan::default();
    let mut last_bit = false;
    let mut at = 0;
    while at < len {
        let hole = file.hole_at(HEADER_LEN + at)?;
        if hole.is_hole {
            at = (hole.range.end() - HEADER_LEN).min(len);
            last_bit = false;
            continue;
        }
        let part = (hole.range.end() - HEADER_LEN).min(len).min(at + MIB) - at;
        let buf = AlignedBuf::zeroed(part as usize, 512);
        file.read(HEADER_LEN + at, buf.buffers()).await?;
        for (i, byte) in buf.to_vec().into_iter().enumerate() {
            let first = (at + i as u64) * 8;
            if byte == 0 || byte == 0xff && first + 8 <= sectors {
                // The common cases, eight at a time.
                if byte != 0 {
                    scan.set_inside += 8;
                    scan.runs += u64::from(!last_bit);
                    scan.highest = Some(first + 7);
                }
                last_bit = byte != 0;
                continue;
            }
            for bit in 0..8 {
                let is_set = byte >> bit & 1 == 1;
                let sector = first + bit;
                if is_set {
                    scan.highest = Some(sector);
                    match sector < sectors {
                        true => scan.set_inside += 1,
                        false => scan.set_beyond += 1,
                    }
                }
                scan.runs += u64::from(is_set && !last_bit && sector < sectors);
                last_bit = is_set;
            }
        }
        at += part;
    }
    Ok(scan)
}
