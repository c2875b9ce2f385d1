//! Entries of the block allocation table, as they are in memory.
//!
//! Each is checked when its page comes into memory, so that whoever uses it need not. A checked
//! entry carries [`CHECKED`] in one of the bits that are zero on disk; one that failed does not,
//! and is looked at again ([`Checker::explain`]) only to say what is wrong with it.

use super::geometry::{Geometry, Slot};
use super::layout::{
    BAT_OFFSET, BAT_RESERVED, BAT_STATE, BITMAP_PRESENT, FIRST_ALLOCATION, payload,
};
use crate::error::{Error, Result};
use crate::units::{ByteRange, MIB};

/// In memory: the entry was checked and found good.
pub const CHECKED: u64 = 1 << 3;
/// In memory: the mapping is not safe yet, so a write to the block must wait for a flush before it
/// completes.
pub const UNSETTLED: u64 = 1 << 4;
/// All that is in memory only.
pub const MEMORY_BITS: u64 = CHECKED | UNSETTLED;

/// State of a checked payload entry that plain I/O may go to.
pub const PRESENT: u64 = payload::FULLY_PRESENT | CHECKED;
/// State of a checked payload entry whose sectors are in the bitmap.
pub const PARTIAL: u64 = payload::PARTIALLY_PRESENT | CHECKED;
/// The bits that tell these from all others.
pub const PLAN_BITS: u64 = BAT_STATE | MEMORY_BITS;

/// The state of an entry.
pub fn state(entry: u64) -> u64 {
    entry & BAT_STATE
}

/// Where an entry's block lies in the file.
pub fn offset(entry: u64) -> u64 {
    entry & BAT_OFFSET
}

/// What is wrong with an entry.
enum Wrong {
    Because(&'static str),
    Truncated,
    Overlaps(ByteRange),
}

/// Knows what entries are allowed.
#[derive(Clone, Debug)]
pub struct Checker {
    /// The image's sizes.
    pub geometry: Geometry,
    /// Where no block may lie, sorted.
    pub reserved: Vec<ByteRange>,
}

impl Checker {
    /// Checks the entry at `index` of the BAT.
    pub fn is_good(&self, index: u64, entry: u64, file_len: u64) -> bool {
        // The usual entries first.
        entry == 0 || self.judge(index, entry, file_len).is_ok()
    }

    /// Says what is wrong with an entry as it is on disk.
    ///
    /// # Errors
    /// Kind [`Corrupt`](crate::ErrorKind::Corrupt), naming the entry.
    pub fn explain(&self, index: u64, entry: u64, file_len: u64) -> Result<()> {
        let Err(wrong) = self.judge(index, entry, file_len) else { return Ok(()) };
        let what = match self.geometry.slot(index) {
            Slot::Payload(block) => format!("of block {block}"),
            Slot::Bitmap(chunk) => format!("of the sector bitmap of chunk {chunk}"),
        };
        let why = match wrong {
            Wrong::Because(why) => why.to_string(),
            Wrong::Truncated => format!(
                "the block ends beyond the {file_len} bytes of the file, which is truncated"
            ),
            Wrong::Overlaps(range) => format!("the block overlaps the log or region of {range}"),
        };
        Err(Error::corrupt(format!("BAT entry {index} ({what}) is {entry:#x}: {why}")))
    }

    /// What is wrong with an entry, not in words yet: there may be millions.
    fn judge(&self, index: u64, entry: u64, file_len: u64) -> std::result::Result<(), Wrong> {
        let bad = |why| Err(Wrong::Because(why));
        if entry & BAT_RESERVED != 0 {
            return bad("bits that must be zero are set");
        }
        let len = match self.geometry.slot(index) {
            Slot::Payload(block) => match state(entry) {
                payload::NOT_PRESENT
                | payload::UNDEFINED
                | payload::ZERO
                | payload::UNMAPPED
                | payload::UNMAPPED_V095 => return Ok(()),
                // Entries behind the last block may hold anything.
                _ if block >= self.geometry.payload_blocks() => return Ok(()),
                payload::FULLY_PRESENT => self.geometry.block_range(block).len,
                payload::PARTIALLY_PRESENT if self.geometry.has_parent => {
                    self.geometry.block_range(block).len
                }
                payload::PARTIALLY_PRESENT => {
                    return bad("partially present, but the image has no parent");
                }
                _ => return bad("a state that does not exist"),
            },
            Slot::Bitmap(_) => match state(entry) {
                0 => return Ok(()),
                BITMAP_PRESENT if self.geometry.has_parent => MIB,
                BITMAP_PRESENT => {
                    return bad("a sector bitmap is present, but the image has no parent");
                }
                _ => return bad("a state that does not exist for sector bitmaps"),
            },
        };
        let place = ByteRange { offset: offset(entry), len };
        if place.offset < FIRST_ALLOCATION {
            return bad("the block lies in the file's header");
        }
        if place.offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(Wrong::Truncated);
        }
        match self.reserved.iter().find(|range| range.overlaps(&place)) {
            Some(range) => Err(Wrong::Overlaps(*range)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checker(has_parent: bool) -> Checker {
        Checker {
            geometry: Geometry::of(3 * MIB, MIB, 512, has_parent),
            reserved: vec![ByteRange { offset: MIB, len: 3 * MIB }],
        }
    }

    /// An entry of this state (and other bits) for a block at `mib`.
    fn at(mib: u64, bits: u64) -> u64 {
        mib << 20 | bits
    }

    fn refused(has_parent: bool, index: u64, entry: u64, words: &str) {
        let err = checker(has_parent).explain(index, entry, 8 * MIB).unwrap_err().to_string();
        assert!(err.contains(words), "{err}");
        assert!(!checker(has_parent).is_good(index, entry, 8 * MIB));
    }

    #[test]
    fn good_entries_pass() {
        for entry in [0, 1, 2, 3, 5, at(4, 6), at(7, 6), at(99, 2)] {
            assert!(checker(false).is_good(1, entry, 8 * MIB), "{entry:#x}");
        }
        assert!(checker(true).is_good(0, at(4, 7), 8 * MIB));
        assert!(checker(true).is_good(4096, at(4, 6), 8 * MIB));
    }

    #[test]
    fn bad_entries_are_explained() {
        refused(false, 0, 4, "a state that does not exist");
        refused(false, 0, at(4, 7), "the image has no parent");
        refused(false, 4096, at(4, 6), "sector bitmap is present, but");
        refused(true, 4096, at(4, 7), "does not exist for sector bitmaps");
        refused(false, 2, at(4, 0x16), "BAT entry 2 (of block 2) is 0x400016: ");
        refused(false, 0, CHECKED, "bits that must be zero");
        refused(false, 2, at(4, 0x106), "bits that must be zero");
        refused(false, 0, 6, "in the file's header");
        refused(false, 0, at(8, 6), "truncated");
        refused(false, 0, !0xf_ffff | 6, "truncated");
        refused(false, 0, at(3, 6), "overlaps the log or region");
    }
}
