//! The dm-log-writes format, version 1: sizes, fields and bits.
//!
//! As the kernel's `drivers/md/dm-log-writes.c` writes it (its user's guide is
//! `Documentation/admin-guide/device-mapper/log-writes.rst`) and as QEMU's `block/blklogwrites.c`
//! and the `replay-log` tool of xfstests read it. All integers are little-endian.
//!
//! ```text
//! log sector 0   superblock, zeros up to a sector
//!            1   header of entry 0 (one whole sector), then its data
//!            …   header of entry 1, its data, …            no gaps
//! ```
//!
//! The sector is not 512 bytes but whatever the superblock says, and every position and length in
//! the log counts in it, those on the logged disk too.

use std::fmt;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a log begins with: "rhswfsj" and a zero.
pub const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The only version there is.
pub const VERSION: u64 = 1;

/// Smallest sector size taken. The format allows 32; nothing makes such logs.
pub const MIN_SECTOR_SIZE: u32 = 512;
/// Largest sector size taken. The format allows 8 MiB; no disk has such blocks.
pub const MAX_SECTOR_SIZE: u32 = 64 << 10;
/// The sector size of a new log unless somebody says otherwise, as QEMU's.
pub const DEFAULT_SECTOR_SIZE: u32 = 512;

/// The kernel ends a log with this mark when its target is removed in order, and so do we.
pub const END_MARK: &[u8] = b"dm-log-writes-end";

/// The first bytes of log sector 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawSuperblock {
    /// [`MAGIC`].
    pub magic: U64,
    /// [`VERSION`].
    pub version: U64,
    /// How many entries a reader may trust.
    pub nr_entries: U64,
    /// Size of a log sector in bytes.
    pub sectorsize: U32,
}

/// The first bytes of an entry's header. The rest of its sector is the text of a mark, or zeros.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawEntry {
    /// Where on the disk, in log sectors.
    pub sector: U64,
    /// How long, in log sectors; 0 for a mark or a flush that carries no data.
    pub nr_sectors: U64,
    /// [`Flags`].
    pub flags: U64,
    /// Length of a mark's text in bytes; otherwise 0 (or what it was, for copies of DAX writes).
    pub data_len: U64,
}

/// Bytes of the superblock that mean something.
pub const SUPERBLOCK_LEN: usize = 28;
/// Bytes of a header that mean something; a mark's text starts here.
pub const ENTRY_LEN: usize = 32;

const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_LEN);
const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// What an entry is. A plain write has none of these.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u64);

impl Flags {
    /// A plain write.
    pub const NONE: Flags = Flags(0);
    /// Everything before this entry was made durable. May carry data, which is written after.
    pub const FLUSH: Flags = Flags(0x1);
    /// The data was durable on completion.
    pub const FUA: Flags = Flags(0x2);
    /// The range was discarded; no data follows.
    pub const DISCARD: Flags = Flags(0x4);
    /// A mark: a name for this place in the log.
    pub const MARK: Flags = Flags(0x8);
    /// The kernel's file system said that this is metadata. Tells nothing to a replay.
    pub const METADATA: Flags = Flags(0x10);
    /// All that version 1 knows.
    pub const KNOWN: Flags = Flags(0x1f);

    const NAMES: [(Flags, &'static str); 5] = [
        (Flags::FLUSH, "FLUSH"),
        (Flags::FUA, "FUA"),
        (Flags::DISCARD, "DISCARD"),
        (Flags::MARK, "MARK"),
        (Flags::METADATA, "METADATA"),
    ];

    /// Whether it has all of `flags`.
    pub const fn has(self, flags: Flags) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// These and those.
    pub const fn and(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// The bits that version 1 does not know.
    pub const fn unknown(self) -> u64 {
        self.0 & !Flags::KNOWN.0
    }

    /// The names, as lists show them.
    pub fn names(self) -> Vec<&'static str> {
        Self::NAMES.iter().filter(|(flag, _)| self.has(*flag)).map(|(_, name)| *name).collect()
    }
}

impl fmt::Display for Flags {
    /// As `replay-log -v` prints them: `FLUSH|FUA`, or `NONE`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("NONE"),
            _ => f.write_str(&self.names().join("|")),
        }
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}({self})", self.0)
    }
}

/// The content of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// How many entries a reader may trust. Whatever lies behind them may look like entries, too:
    /// those of an earlier run.
    pub entries: u64,
    /// Size of a log sector in bytes.
    pub sector_size: u32,
}

impl Superblock {
    /// The sector that begins the log.
    pub fn to_sector(self) -> Vec<u8> {
        let raw = RawSuperblock {
            magic: MAGIC.into(),
            version: VERSION.into(),
            nr_entries: self.entries.into(),
            sectorsize: self.sector_size.into(),
        };
        let mut sector = vec![0; self.sector_size as usize];
        sector[..SUPERBLOCK_LEN].copy_from_slice(raw.as_bytes());
        sector
    }
}

/// The sector that heads an entry. `text` is that of a mark, and empty for all others.
///
/// # Panics
/// If the text does not fit; see [`mark_room`].
pub fn header_sector(entry: &RawEntry, text: &[u8], sector_size: u32) -> Vec<u8> {
    let mut sector = vec![0; sector_size as usize];
    sector[..ENTRY_LEN].copy_from_slice(entry.as_bytes());
    sector[ENTRY_LEN..ENTRY_LEN + text.len()].copy_from_slice(text);
    sector
}

/// Longest text of a mark, in bytes. Other readers expect a zero after it.
pub fn mark_room(sector_size: u32) -> usize {
    sector_size as usize - ENTRY_LEN - 1
}

/// Whether a log may have sectors of `size` bytes.
pub fn is_sector_size(size: u32) -> bool {
    size.is_power_of_two() && (MIN_SECTOR_SIZE..=MAX_SECTOR_SIZE).contains(&size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_named_as_replay_log_names_them() {
        assert_eq!(Flags::NONE.to_string(), "NONE");
        assert_eq!(Flags(19).to_string(), "FLUSH|FUA|METADATA");
        assert_eq!(Flags(0x41).unknown(), 0x40);
    }

    #[test]
    fn the_superblock_has_the_bytes_of_the_specification() {
        let sector = Superblock { entries: 6, sector_size: 512 }.to_sector();
        assert_eq!(sector.len(), 512);
        assert_eq!(&sector[..8], b"rhswfsj\0");
        assert_eq!(sector[8..28], [1, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
        assert!(sector[28..].iter().all(|byte| *byte == 0));
    }
}
