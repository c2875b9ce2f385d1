//! What lies where in a VHDX file: sizes, places, bits and GUIDs of MS-VHDX 2.x.
//!
//! Everything is little-endian. GUIDs are stored in the memory layout of Windows: the first three
//! fields little-endian, the last eight bytes as they are. Checksums are CRC-32C over the whole
//! structure with its own checksum field taken as zero.
//!
//! ```text
//! 0        file identifier   "vhdxfile", the creator's name
//! 64 KiB   header 1          the one with the greater sequence number is current
//! 128 KiB  header 2
//! 192 KiB  region table 1    where the BAT and the metadata are
//! 256 KiB  region table 2    a copy
//! 320 KiB  reserved
//! 1 MiB …  log, BAT, metadata, payload blocks, sector bitmap blocks: in any order, 1 MiB aligned
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc32c;
use crate::units::{GIB, KIB, MIB, TIB};

/// Signature of the file identifier (2.2.1).
pub const FILE_SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Length of the creator's name behind it, in bytes of UTF-16.
pub const CREATOR_LEN: usize = 512;

/// Places of the two headers (2.2).
pub const HEADER_OFFSETS: [u64; 2] = [64 * KIB, 128 * KIB];
/// Length of a header, in bytes.
pub const HEADER_LEN: usize = 4096;
/// The fields of a header; the rest is zero.
pub const HEADER_FIELDS_LEN: usize = 80;
/// Signature of a header.
pub const HEADER_SIGNATURE: &[u8; 4] = b"head";
/// The only version of the format.
pub const HEADER_VERSION: u16 = 1;

/// Places of the two region tables (2.2.3).
pub const REGION_TABLE_OFFSETS: [u64; 2] = [192 * KIB, 256 * KIB];
/// Length of a region table.
pub const REGION_TABLE_LEN: usize = 64 << 10;
/// Signature of a region table.
pub const REGION_SIGNATURE: &[u8; 4] = b"regi";
/// The most entries that fit a region table.
pub const MAX_REGION_ENTRIES: u32 = 2047;
/// Flag of a region that whoever opens the file must know.
pub const REGION_REQUIRED: u32 = 1;

/// Everything from here on is allocated in units of [`MIB`]; before it are the fixed structures.
pub const FIRST_ALLOCATION: u64 = MIB;

/// The longest log that is believed.
pub const MAX_LOG_LEN: u64 = GIB;
/// The longest metadata region that is believed.
pub const MAX_METADATA_LEN: u32 = 128 << 20;
/// Place of the first metadata item in its region.
pub const METADATA_ITEMS: u32 = 64 << 10;
/// Signature of the metadata table (2.6.1).
pub const METADATA_SIGNATURE: &[u8; 8] = b"metadata";
/// The most entries that fit a metadata table.
pub const MAX_METADATA_ENTRIES: u16 = 2047;
/// The longest metadata item.
pub const MAX_METADATA_ITEM: u32 = 1 << 20;

/// Flag of a metadata item that belongs to the user, not to the system.
pub const METADATA_IS_USER: u32 = 1;
/// Flag of a metadata item that describes the disk and is copied to children.
pub const METADATA_IS_DISK: u32 = 2;
/// Flag of a metadata item that whoever opens the file must know.
pub const METADATA_IS_REQUIRED: u32 = 4;

/// Flag of the file parameters: blocks stay allocated (a fixed image).
pub const PARAMETERS_FIXED: u32 = 1;
/// Flag of the file parameters: the image has a parent.
pub const PARAMETERS_HAS_PARENT: u32 = 2;

/// The smallest and the largest block.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;
/// The largest disk.
pub const MAX_DISK_SIZE: u64 = 64 * TIB;
/// The longest file that is believed, in bytes: what the largest disk needs, and much room to spare.
pub const MAX_FILE_LEN: u64 = 2048 * TIB;

/// The most entries of a parent locator that are looked at.
pub const MAX_LOCATOR_ENTRIES: u16 = 256;

/// Size of a page of metadata: the unit that the log records.
pub const PAGE: u64 = 4096;
/// Entries of the BAT in a page.
pub const ENTRIES_PER_PAGE: u64 = PAGE / 8;
/// Sectors that one sector bitmap block describes (2.5.1.2); its length is 1 MiB.
pub const SECTORS_PER_BITMAP: u64 = MIB * 8;

/// Unit of the log: entries start and end at multiples of it.
pub const LOG_SECTOR: u64 = 4096;
/// Signatures in the log (2.3.1).
pub const LOG_ENTRY_SIGNATURE: &[u8; 4] = b"loge";
/// A descriptor with a data sector.
pub const LOG_DATA_DESCRIPTOR: &[u8; 4] = b"desc";
/// A descriptor of zeros.
pub const LOG_ZERO_DESCRIPTOR: &[u8; 4] = b"zero";
/// A data sector.
pub const LOG_DATA_SIGNATURE: &[u8; 4] = b"data";
/// Length of a log entry's header and of a descriptor.
pub const LOG_ENTRY_HEADER_LEN: u64 = 64;
/// Length of a descriptor.
pub const LOG_DESCRIPTOR_LEN: u64 = 32;

/// Places in an entry of the BAT (2.5.1): state, reserved bits, offset in units of 1 MiB.
pub const BAT_STATE: u64 = 0x7;
/// Bits that must be zero.
pub const BAT_RESERVED: u64 = 0xf_fff8;
/// Where the block lies, as a byte offset.
pub const BAT_OFFSET: u64 = !0xf_ffff;

/// States of payload blocks (2.5.1.1).
pub mod payload {
    /// Never written: zeros, or the parent's data.
    pub const NOT_PRESENT: u64 = 0;
    /// Content is undefined; read as zeros.
    pub const UNDEFINED: u64 = 1;
    /// Zeros.
    pub const ZERO: u64 = 2;
    /// Trimmed; read as zeros.
    pub const UNMAPPED: u64 = 3;
    /// What UNMAPPED was in version 0.95 of the specification.
    pub const UNMAPPED_V095: u64 = 5;
    /// All of the block is in the file.
    pub const FULLY_PRESENT: u64 = 6;
    /// The sector bitmap says which sectors are in the file.
    pub const PARTIALLY_PRESENT: u64 = 7;
}

/// State of a sector bitmap block that is in the file; 0 if it is not (2.5.1.2).
pub const BITMAP_PRESENT: u64 = 6;

/// A GUID as it is stored.
#[derive(
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// No GUID.
    pub const ZERO: Guid = Guid([0; 16]);

    /// The GUID that is written `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` with these digits.
    pub const fn new(digits: u128) -> Guid {
        Guid(uuid::Uuid::from_u128(digits).to_bytes_le())
    }

    /// A new random one.
    pub fn random() -> Guid {
        Guid(uuid::Uuid::new_v4().to_bytes_le())
    }

    /// Parses the text form, with or without braces, in any case.
    pub fn parse(text: &str) -> Option<Guid> {
        let text = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
        uuid::Uuid::try_parse(text).ok().map(|uuid| Guid(uuid.to_bytes_le()))
    }

    /// Whether it is all zeros.
    pub fn is_zero(&self) -> bool {
        *self == Guid::ZERO
    }
}

impl std::fmt::Display for Guid {
    /// Lower case, without braces.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        uuid::Uuid::from_bytes_le(self.0).hyphenated().fmt(f)
    }
}

impl std::fmt::Debug for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{{{self}}}")
    }
}

/// GUIDs of regions, metadata items and the parent locator's type.
pub mod guid {
    use super::Guid;

    /// The region of the block allocation table.
    pub const BAT_REGION: Guid = Guid::new(0x2dc27766_f623_4200_9d64_115e9bfd4a08);
    /// The region of the metadata.
    pub const METADATA_REGION: Guid = Guid::new(0x8b7ca206_4790_4b9a_b8fe_575f050f886e);

    /// Block size and flags.
    pub const FILE_PARAMETERS: Guid = Guid::new(0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b);
    /// Size of the disk.
    pub const DISK_SIZE: Guid = Guid::new(0x2fa54224_cd1b_4876_b211_5dbed83bf4b8);
    /// Logical sector size.
    pub const LOGICAL_SECTOR: Guid = Guid::new(0x8141bf1d_a96f_4709_ba47_f233a8faab5f);
    /// Physical sector size.
    pub const PHYSICAL_SECTOR: Guid = Guid::new(0xcda348c7_445d_4471_9cc9_e9885251c556);
    /// The disk's identity on SCSI.
    pub const PAGE_83: Guid = Guid::new(0xbeca12ab_b2e6_4523_93ef_c309e000c746);
    /// The parent locator.
    pub const PARENT_LOCATOR: Guid = Guid::new(0xa8d35f2d_b30b_454d_abf7_d3d84834ab0c);
    /// Cylinders, heads and sectors; of no use here.
    pub const CHS: Guid = Guid::new(0xda02d7bc_3d3a_423c_ac88_2a36ab21479b);
    /// Whoever made the file did not finish.
    pub const INCOMPLETE_FILE: Guid = Guid::new(0x71cc85f0_1b69_4e28_9558_c3bf83ae75d3);
    /// A label of persistent memory; of no use here.
    pub const PMEM_LABEL: Guid = Guid::new(0x10e1ae8a_4b7e_4169_a40f_cd70de928393);

    /// Type of a parent locator whose parent is a VHDX image.
    pub const VHDX_PARENT: Guid = Guid::new(0xb04aefb7_d19e_4a81_b789_25b8e9445913);
}

/// The fields of a header (2.2.2).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawHeader {
    /// [`HEADER_SIGNATURE`].
    pub signature: [u8; 4],
    /// CRC-32C of the 4 KiB.
    pub checksum: U32,
    /// The greater one is current.
    pub sequence: U64,
    /// New with the first change of the file after it was opened.
    pub file_write_guid: Guid,
    /// New before the first change of what a guest sees; children know their parent by it.
    pub data_write_guid: Guid,
    /// Which log entries count; zero if the log is empty.
    pub log_guid: Guid,
    /// Must be 0 if there is a log.
    pub log_version: U16,
    /// [`HEADER_VERSION`].
    pub version: U16,
    /// Length of the log.
    pub log_length: U32,
    /// Place of the log.
    pub log_offset: U64,
}

/// The head of a region table; entries follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawRegionHeader {
    /// [`REGION_SIGNATURE`].
    pub signature: [u8; 4],
    /// CRC-32C of the 64 KiB.
    pub checksum: U32,
    /// How many entries follow.
    pub entry_count: U32,
    /// Zero.
    pub reserved: U32,
}

/// An entry of a region table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawRegionEntry {
    /// Which region.
    pub guid: Guid,
    /// Where in the file.
    pub offset: U64,
    /// How long.
    pub length: U32,
    /// [`REGION_REQUIRED`].
    pub flags: U32,
}

/// The head of the metadata table; entries follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawMetadataHeader {
    /// [`METADATA_SIGNATURE`].
    pub signature: [u8; 8],
    /// Zero.
    pub reserved: U16,
    /// How many entries follow.
    pub entry_count: U16,
    /// Zero.
    pub reserved2: [u8; 20],
}

/// An entry of the metadata table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawMetadataEntry {
    /// Which item.
    pub guid: Guid,
    /// Where, from the start of the region; 0 if the item is empty.
    pub offset: U32,
    /// How long.
    pub length: U32,
    /// [`METADATA_IS_USER`] and so on.
    pub flags: U32,
    /// Zero.
    pub reserved: U32,
}

/// The head of a parent locator; entries follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawLocatorHeader {
    /// [`guid::VHDX_PARENT`].
    pub locator_type: Guid,
    /// Zero.
    pub reserved: U16,
    /// How many entries follow.
    pub entry_count: U16,
}

/// An entry of a parent locator: places of two UTF-16 strings from the start of the item.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawLocatorEntry {
    /// Where the key is.
    pub key_offset: U32,
    /// Where the value is.
    pub value_offset: U32,
    /// Length of the key in bytes.
    pub key_length: U16,
    /// Length of the value in bytes.
    pub value_length: U16,
}

/// The head of a log entry (2.3.1.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawLogHeader {
    /// [`LOG_ENTRY_SIGNATURE`].
    pub signature: [u8; 4],
    /// CRC-32C of the whole entry.
    pub checksum: U32,
    /// Length of the whole entry.
    pub entry_length: U32,
    /// Place in the log of the oldest entry that is still needed.
    pub tail: U32,
    /// Consecutive; never 0.
    pub sequence: U64,
    /// How many descriptors follow.
    pub descriptor_count: U32,
    /// Zero.
    pub reserved: U32,
    /// The header's LogGuid.
    pub log_guid: Guid,
    /// The file was at least this long, durably, when the entry was written.
    pub flushed_file_offset: U64,
    /// The file must be at least this long once the entry is applied.
    pub last_file_offset: U64,
}

/// A descriptor of a log entry (2.3.1.2, 2.3.1.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawLogDescriptor {
    /// [`LOG_DATA_DESCRIPTOR`] or [`LOG_ZERO_DESCRIPTOR`].
    pub signature: [u8; 4],
    /// Data: the last 4 bytes of the page.
    pub trailing: [u8; 4],
    /// Data: the first 8 bytes of the page. Zeros: how many.
    pub leading: [u8; 8],
    /// Where it goes in the file.
    pub file_offset: U64,
    /// The entry's sequence number.
    pub sequence: U64,
}

/// A data sector of a log entry (2.3.1.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawLogData {
    /// [`LOG_DATA_SIGNATURE`].
    pub signature: [u8; 4],
    /// Upper half of the entry's sequence number.
    pub sequence_high: U32,
    /// The page without its first 8 and last 4 bytes.
    pub data: [u8; 4084],
    /// Lower half of the entry's sequence number.
    pub sequence_low: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_FIELDS_LEN);
    assert!(size_of::<RawRegionHeader>() == 16);
    assert!(size_of::<RawRegionEntry>() == 32);
    assert!(size_of::<RawMetadataHeader>() == 32);
    assert!(size_of::<RawMetadataEntry>() == 32);
    assert!(size_of::<RawLocatorHeader>() == 20);
    assert!(size_of::<RawLocatorEntry>() == 12);
    assert!(size_of::<RawLogHeader>() as u64 == LOG_ENTRY_HEADER_LEN);
    assert!(size_of::<RawLogDescriptor>() as u64 == LOG_DESCRIPTOR_LEN);
    assert!(size_of::<RawLogData>() as u64 == LOG_SECTOR);
};

/// CRC-32C of a structure whose checksum field, 4 bytes at `at`, is taken as zero.
pub fn checksum(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..at]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[at + 4..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_stored_as_windows_does() {
        let bytes = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd,
            0x4a, 0x08,
        ];
        assert_eq!(guid::BAT_REGION, Guid(bytes));
        assert_eq!(guid::BAT_REGION.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        let braced = "{2DC27766-F623-4200-9D64-115E9BFD4A08}";
        assert_eq!(Guid::parse(braced), Some(guid::BAT_REGION));
        assert_eq!(Guid::parse("{2dc27766}"), None);
        assert!(Guid::random() != Guid::random());
    }

    #[test]
    fn checksums_leave_their_own_field_out() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let mut bytes = *b"head\x11\x22\x33\x44rest";
        let sum = checksum(&bytes, 4);
        bytes[5] = 0;
        assert_eq!(checksum(&bytes, 4), sum);
        bytes[8] = 0;
        assert_ne!(checksum(&bytes, 4), sum);
    }
}
