//! A look at the whole BAT: is every entry good, and which parts of the file are in use?
//!
//! Holes of the file are skipped, because they hold entries of blocks that were never written. So
//! what it costs depends on what is stored, not on the size of the disk; and whoever asks sets a
//! limit.

use std::sync::Arc;

use super::bat::{self, Checker};
use super::disk;
use super::geometry::Slot;
use super::layout::{PAGE, payload};
use crate::error::{Error, Result};
use crate::io::File;
use crate::units::{ByteRange, MIB, align_down, align_up};

/// How much of the BAT is read at once, in bytes.
const CHUNK: u64 = 256 << 10;

/// A block that the BAT says is in the file. Small, because there may be millions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsedBlock {
    /// Where it is in the file, in units of 1 MiB.
    pub mib: u32,
    /// Index of its entry in the BAT.
    pub index: u32,
}

/// What the BAT says of the file.
#[derive(Clone, Debug, Default)]
pub struct Used {
    /// Blocks that hold data, sorted by their place.
    pub blocks: Vec<UsedBlock>,
    /// Places that blocks without data, or behind the end of the disk, may have a claim on.
    pub anchors: Vec<UsedBlock>,
}

impl Used {
    /// Where in the file a block of the list is.
    pub fn range(checker: &Checker, block: &UsedBlock) -> ByteRange {
        let len = match checker.geometry.slot(block.index.into()) {
            Slot::Payload(_) => checker.geometry.block_size(),
            Slot::Bitmap(_) => MIB,
        };
        ByteRange { offset: u64::from(block.mib) * MIB, len }
    }
}

/// Looks at all entries of the BAT. `None` if more than `limit` bytes of it are stored.
///
/// # Errors
/// Says which entry is bad, or which two blocks overlap.
pub async fn scan(
    file: &Arc<dyn File>,
    checker: &Checker,
    bat: ByteRange,
    limit: u64,
) -> Result<Option<Used>> {
    let file_len = file.len()?;
    let mut used = Used::default();
    let mut visit = |index, entry| used.add(checker, index, entry, file_len);
    if !walk(file, bat, checker.geometry.bat_entries(), limit, &mut visit).await? {
        return Ok(None);
    }
    used.blocks.sort_unstable();
    refuse_overlaps(checker, &used.blocks)?;
    Ok(Some(used))
}

/// Looks at all entries of the BAT, however many are stored, and remembers none.
///
/// # Errors
/// Says which entry is bad.
pub async fn check(file: &Arc<dyn File>, checker: &Checker, bat: ByteRange) -> Result<()> {
    let file_len = file.len()?;
    let mut visit = |index, entry| checker.explain(index, entry, file_len);
    walk(file, bat, checker.geometry.bat_entries(), u64::MAX, &mut visit).await.map(drop)
}

/// Shows `visit` each of the first `entries` entries that is not zero, with its index. False if
/// more than `limit` bytes of the BAT are stored.
///
/// # Errors
/// The first of `visit`'s, or that of a read.
pub(super) async fn walk(
    file: &Arc<dyn File>,
    bat: ByteRange,
    entries: u64,
    limit: u64,
    visit: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<bool> {
    let end = align_up(bat.offset + entries * 8, PAGE).unwrap_or(bat.end()).min(bat.end());
    let mut at = bat.offset;
    let mut seen = 0;
    while at < end {
        let hole = file.hole_at(at)?;
        let to = match hole.is_hole {
            true => align_down(hole.range.end(), PAGE),
            false => align_up(hole.range.end(), PAGE).unwrap_or(end),
        };
        let to = to.min(end);
        if hole.is_hole && to > at {
            at = to;
            continue;
        }
        let len = (to.max(at + PAGE) - at).min(CHUNK).min(end - at);
        seen += len;
        if seen > limit {
            return Ok(false);
        }
        let bytes = disk::read(file, at, len).await?;
        for (index, bytes) in ((at - bat.offset) / 8..entries).zip(bytes.chunks_exact(8)) {
            let entry = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
            if entry != 0 {
                visit(index, entry)?;
            }
        }
        at += len;
    }
    Ok(true)
}

impl Used {
    fn add(&mut self, checker: &Checker, index: u64, entry: u64, file_len: u64) -> Result<()> {
        checker.explain(index, entry, file_len)?;
        let mib = u32::try_from(bat::offset(entry) / MIB);
        let (Ok(mib), Ok(index)) = (mib, u32::try_from(index)) else {
            // Only what is not used can lie there: the file is not that long.
            return Ok(());
        };
        let block = UsedBlock { mib, index };
        if let Slot::Payload(number) = checker.geometry.slot(index.into())
            && number >= checker.geometry.payload_blocks()
        {
            // Nothing of the disk, so it cannot show foreign data; but others may count its place.
            if mib > 0 && Used::range(checker, &block).end() <= file_len {
                self.anchors.push(block);
            }
            return Ok(());
        }
        match bat::state(entry) {
            payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT => self.blocks.push(block),
            payload::UNDEFINED | payload::UNMAPPED | payload::UNMAPPED_V095 if mib > 0 => {
                self.anchors.push(block);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Shows `visit` two blocks for each that begins before an earlier one has ended. Each block that
/// shares its place is shown at least once.
pub(super) fn overlaps(
    checker: &Checker,
    sorted: &[UsedBlock],
    mut visit: impl FnMut(&UsedBlock, &UsedBlock) -> Result<()>,
) -> Result<()> {
    // A bitmap may end before the block that it lies in.
    let mut before: Option<(&UsedBlock, u64)> = None;
    for block in sorted {
        let range = Used::range(checker, block);
        if let Some((before, end)) = before
            && range.offset < end
        {
            visit(before, block)?;
        }
        if before.is_none_or(|(_, end)| range.end() > end) {
            before = Some((block, range.end()));
        }
    }
    Ok(())
}

fn refuse_overlaps(checker: &Checker, sorted: &[UsedBlock]) -> Result<()> {
    overlaps(checker, sorted, |first, second| {
        let (a, b) = (Used::range(checker, first), Used::range(checker, second));
        Err(Error::corrupt(format!(
            "BAT entries {} and {} give the same part of the file to two blocks ({a}, {b}); at \
             least one of them shows foreign data",
            first.index, second.index
        )))
    })
}
