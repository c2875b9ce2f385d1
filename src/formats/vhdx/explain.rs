//! Findings of a check, in words for people who never read the specification: what is wrong, where,
//! what it means for the data, and what a repair does about it.

use super::bat::{self, Checker};
use super::check::Repair;
use super::geometry::{Geometry, Slot};
use super::layout::{
    BAT_RESERVED, BAT_STATE, BITMAP_PRESENT, HEADER_OFFSETS, REGION_TABLE_OFFSETS,
};
use super::scan::{Used, UsedBlock};
use crate::error::Error;

/// What a repair does about a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing: what would be right cannot be known.
    None,
    /// Writes the identifier at the start of the file.
    WriteIdentifier,
    /// Writes both headers anew.
    RewriteHeaders,
    /// Replays the log.
    Replay,
    /// Replays the part of the log that is in front of a damaged entry.
    ReplayPart,
    /// Replaces this copy of the region table by the other one.
    CopyRegionTable(usize),
    /// Gives an entry of the BAT this value.
    SetEntry {
        /// Which entry.
        index: u64,
        /// Its new value.
        value: u64,
    },
}

impl Remedy {
    /// Whether a repair of this kind does it.
    pub fn is_for(&self, repair: Repair) -> bool {
        match self {
            Remedy::None => false,
            Remedy::Replay => true,
            _ => repair == Repair::All,
        }
    }
}

/// Something that a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong, in a line.
    pub what: String,
    /// Where it is, in the file and on the disk.
    pub place: String,
    /// What it means for whoever uses the disk.
    pub meaning: String,
    /// What a repair does about it, or why nothing.
    pub repair: String,
    /// The same, for the repair.
    pub remedy: Remedy,
    /// Whether data is in danger, or lost.
    pub is_corruption: bool,
    /// Whether it has been repaired.
    pub is_fixed: bool,
}

impl Finding {
    fn new(remedy: Remedy, what: String, place: String, meaning: &str, repair: &str) -> Finding {
        let (meaning, repair) = (meaning.to_string(), repair.to_string());
        Finding { what, place, meaning, repair, remedy, is_corruption: true, is_fixed: false }
    }

    /// That there are more than can be listed.
    pub(super) fn more() -> Finding {
        let what = "there is more, which is not listed".to_string();
        let (place, meaning, repair) = (String::new(), "", "as for those that are listed");
        let more = Finding::new(Remedy::None, what, place, meaning, repair);
        Finding { is_corruption: false, ..more }
    }

    /// The identifier is gone, but not the headers.
    pub(super) fn no_identifier() -> Finding {
        Finding::new(
            Remedy::WriteIdentifier,
            "the identifier \"vhdxfile\" is missing, although there are VHDX headers".into(),
            "the first 4096 bytes of the file".into(),
            "no program takes the file for a VHDX image. Its creation may have been cut short, or \
             the start of the file was overwritten",
            "writes the identifier, and then looks at everything else, which was not looked at yet",
        )
    }

    /// The fixed structures make no sense.
    pub(super) fn unreadable(err: &Error) -> Finding {
        let what = err.to_string();
        let truncated = what.contains("truncated");
        let (meaning, repair) = match truncated {
            true => (
                "the end of the file is missing, as after a copy that was cut short. The image is \
                 not opened, so that nobody takes what is left for the whole",
                "nothing: get the whole file again. What is left can be copied with `vublk convert \
                 --salvage`",
            ),
            false => (
                "the image cannot be opened: what describes the disk is damaged, and there is no \
                 good second copy of it",
                "nothing: what belongs there cannot be known. Take a backup",
            ),
        };
        Finding::new(Remedy::None, what, "see above".into(), meaning, repair)
    }

    /// There is a log, but what is in it cannot be used; all else can be read.
    pub(super) fn bad_log(err: &Error) -> Finding {
        Finding::new(
            Remedy::None,
            format!("the log cannot be replayed: {err}"),
            "the log".into(),
            "whoever wrote the image last was cut off, and how it was to go on cannot be read. The \
             image is not opened, because its last changes may be there in part only",
            "nothing: what the log said cannot be known. What is there without it can be copied with \
             `vublk convert --salvage`",
        )
    }

    /// One of the headers has no right checksum.
    pub(super) fn damaged_header(slot: usize) -> Finding {
        let other = HEADER_OFFSETS[1 - slot];
        Finding::new(
            Remedy::RewriteHeaders,
            format!("header {} of 2 is damaged (signature or checksum)", slot + 1),
            format!("4096 bytes at {} of the file", HEADER_OFFSETS[slot]),
            "the image works with the other header, but has no spare one. A power cut while headers \
             are written leaves this behind, and so does a bad disk",
            &format!("writes both headers anew from the good one at {other}"),
        )
    }

    /// The headers cannot be replaced any more.
    pub(super) fn no_room_in_headers(err: &Error) -> Finding {
        let finding = Finding::new(
            Remedy::None,
            err.to_string(),
            "8 bytes at 65544 and at 131080 of the file".into(),
            "all data is there and can be read, but the image cannot be opened for writing. No \
             program counts that far; the number was written on purpose or by mistake",
            "nothing: a smaller number would make the other header count. Copy the image with \
             `vublk convert`",
        );
        Finding { is_corruption: false, ..finding }
    }

    /// There are log entries to be replayed.
    pub(super) fn dirty_log(entries: usize) -> Finding {
        let finding = Finding::new(
            Remedy::Replay,
            format!("the log holds {entries} entries that were not applied yet"),
            "the log".into(),
            "whoever wrote the image last was cut off (a crash, a kill, a power cut). Nothing is \
             lost: the log says how to go on. Programs that ignore it read wrong data",
            "replays the log, as every opening for writing does",
        );
        Finding { is_corruption: false, ..finding }
    }

    /// The file is not as long as it is to be after a replay.
    pub(super) fn shorter_than_logged(len: u64, wanted: u64) -> Finding {
        let finding = Finding::new(
            Remedy::None,
            format!("the file has {len} bytes, and the log says that it is to have {wanted}"),
            format!("the end of the file, from {len} on"),
            "whoever wrote the image last made it longer, and the power was cut before that was safe: then \
             nothing is lost that was flushed. Or it is a copy that was cut short: then what is missing \
             reads as zeros once the log is replayed",
            "nothing of its own: a replay makes the file longer, with zeros. If it may be a copy that was cut \
             short, get the whole file first. `vublk info --salvage` says which parts of the disk it is",
        );
        Finding { is_corruption: false, ..finding }
    }

    /// Whole entries of the log lie behind a damaged one.
    pub(super) fn cut_off((first, last): (u64, u64)) -> Finding {
        Finding::new(
            Remedy::ReplayPart,
            format!(
                "the log is damaged: entries up to {last} are there, but none just before {first}"
            ),
            "the log".into(),
            "what was written, and maybe flushed, after the damaged entry is not seen: the disk is as it \
             was before. That is no power cut's doing where each entry is flushed before the next, as \
             QEMU and vublk do",
            "gives up the entries behind the damage. Copy the file first: they hold what may yet be \
             wanted",
        )
    }

    /// One of the region tables has no right checksum.
    pub(super) fn damaged_region_table(copy: usize) -> Finding {
        let other = REGION_TABLE_OFFSETS[1 - copy];
        let hint = if copy == 0 { ". QEMU reads only the first and refuses the image" } else { "" };
        Finding::new(
            Remedy::CopyRegionTable(copy),
            format!("region table {} of 2 is damaged (signature or checksum)", copy + 1),
            format!("65536 bytes at {} of the file", REGION_TABLE_OFFSETS[copy]),
            &format!("the image works with the other copy, but has no spare one{hint}"),
            &format!("replaces it by the good copy at {other}"),
        )
    }

    /// Both region tables are valid, and say different things.
    pub(super) fn region_tables_differ() -> Finding {
        Finding::new(
            Remedy::CopyRegionTable(1),
            "the two region tables differ, though both are valid".into(),
            format!(
                "65536 bytes at {} and {} of the file",
                REGION_TABLE_OFFSETS[0], REGION_TABLE_OFFSETS[1]
            ),
            "they should be copies. The first counts, here as in QEMU; a program that reads the \
             second finds the BAT or the metadata elsewhere. A resize that was cut short leaves this \
             behind",
            &format!("replaces the second by the first, at {}", REGION_TABLE_OFFSETS[0]),
        )
    }

    /// An entry of the BAT that is not allowed.
    pub(super) fn bad_entry(
        err: &Error,
        geometry: &Geometry,
        index: u64,
        at: u64,
        entry: u64,
    ) -> Finding {
        let is_bitmap = matches!(geometry.slot(index), Slot::Bitmap(_));
        let is_idle_bitmap = is_bitmap && !geometry.has_parent && entry & BAT_RESERVED == 0;
        if is_idle_bitmap && entry & BAT_STATE == BITMAP_PRESENT {
            return Finding::new(
                Remedy::SetEntry { index, value: 0 },
                err.to_string(),
                place_of(geometry, index, at),
                "sector bitmaps are for images with a parent; here, nothing reads it",
                "clears the entry",
            );
        }
        if matches!(geometry.slot(index), Slot::Payload(n) if n >= geometry.payload_blocks()) {
            return Finding::new(
                Remedy::SetEntry { index, value: 0 },
                err.to_string(),
                place_of(geometry, index, at),
                "nothing of the disk is there, but the image is refused because of it",
                "clears the entry, which is no guess: no part of the disk hangs on it",
            );
        }
        let (meaning, repair) = match err.to_string().contains("truncated") {
            true => (
                "this part of the disk is not in the file any more, because the end of the file is \
                 missing",
                "nothing: get the whole file again. What is left can be copied with `vublk convert \
                 --salvage`",
            ),
            false => (
                "where this part of the disk lies cannot be told. It can be neither read nor \
                 written; the rest of the disk is not affected",
                "nothing: any value that could be put there would be a guess. The rest can be \
                 copied with `vublk convert --salvage`",
            ),
        };
        Finding::new(Remedy::None, err.to_string(), place_of(geometry, index, at), meaning, repair)
    }

    /// An absent block that has a place all the same.
    pub(super) fn stale_place(geometry: &Geometry, index: u64, at: u64, entry: u64) -> Finding {
        let finding = Finding::new(
            Remedy::SetEntry { index, value: bat::state(entry) },
            format!("BAT entry {index} is {entry:#x}: names a place for a block that is not there"),
            place_of(geometry, index, at),
            "no data is affected, but Hyper-V refuses such images",
            "clears the place",
        );
        Finding { is_corruption: false, ..finding }
    }

    /// A place for a block that the disk does not have.
    pub(super) fn behind_end(geometry: &Geometry, index: u64, at: u64, entry: u64) -> Finding {
        let finding = Finding::new(
            Remedy::SetEntry { index, value: 0 },
            format!(
                "BAT entry {index} is {entry:#x}: names a place for a block behind the end of the \
                 disk"
            ),
            place_of(geometry, index, at),
            "no data of the disk is affected: nothing is read there. A disk that was made smaller \
             leaves this behind if that was cut short. Other programs may take the place for used, \
             or for shared by two blocks",
            "clears the entry, which is no guess: no part of the disk hangs on it",
        );
        Finding { is_corruption: false, ..finding }
    }

    /// Two blocks in one place.
    pub(super) fn overlap(checker: &Checker, first: &UsedBlock, second: &UsedBlock) -> Finding {
        let name = |block: &UsedBlock| match checker.geometry.slot(block.index.into()) {
            Slot::Payload(number) => {
                format!("block {number} ({} of the disk)", checker.geometry.block_range(number))
            }
            Slot::Bitmap(chunk) => format!("the sector bitmap of chunk {chunk}"),
        };
        let (a, b) = (Used::range(checker, first), Used::range(checker, second));
        Finding::new(
            Remedy::None,
            format!(
                "BAT entries {} and {} give the same part of the file to two blocks ({a}, {b})",
                first.index, second.index
            ),
            format!("{} and {}", name(first), name(second)),
            "at least one of the two shows the other's data, and a write to one changes both. \
             Versions of QEMU before 8.1 made such images",
            "nothing: whose data it is cannot be known. The image can be copied with `vublk convert \
             --salvage`, which says what to compare with a backup; all other parts are good",
        )
    }

    /// Partially present blocks whose bitmap is not there.
    pub(super) fn missing_bitmap(geometry: &Geometry, chunk: u64) -> Finding {
        let index = geometry.bitmap_index(chunk);
        Finding::new(
            Remedy::None,
            format!(
                "blocks of chunk {chunk} are partially present, but their sector bitmap (BAT entry \
                 {index}) is not there"
            ),
            format!(
                "blocks {} to {}",
                chunk * geometry.chunk_ratio(),
                ((chunk + 1) * geometry.chunk_ratio()).min(geometry.payload_blocks()) - 1
            ),
            "which sectors of these blocks are in this file and which in its parent cannot be told",
            "nothing: any bitmap would be a guess",
        )
    }
}

/// Where an entry is, and what part of the disk it is for.
fn place_of(geometry: &Geometry, index: u64, at: u64) -> String {
    let what = match geometry.slot(index) {
        Slot::Payload(block) if block >= geometry.payload_blocks() => {
            format!("block {block}, behind the end of the disk")
        }
        Slot::Payload(block) => {
            format!("block {block}, {} of the disk", geometry.block_range(block))
        }
        Slot::Bitmap(chunk) => format!("the sector bitmap of chunk {chunk}"),
    };
    format!("{what}; the entry is at {at} of the file")
}
