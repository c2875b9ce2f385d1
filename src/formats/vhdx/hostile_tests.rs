//! What no image may say: one case for each check that there is, with the words that tell it.
//!
//! Whatever it is, the image is refused when it is opened, for reading and for writing, the file
//! is named, and not a byte of it is changed. Entries of the BAT behind the part that is looked at
//! when an image is opened fail where they are used, and refuse writes from then on.

use super::layout::{
    Guid, HEADER_LEN, HEADER_OFFSETS, PAGE, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, checksum,
};
use super::log::NewEntry;
use super::testing::*;
use super::*;
use crate::block::Driver;
use crate::crc32c;
use crate::io::sim::{SimFile, SimOp};
use crate::io::{AlignedBuf, block_on};
use crate::units::{GIB, MIB, TIB};

const METADATA: usize = 2 << 20;
/// The items: file parameters, size, sector sizes, page 83, locator.
const ITEMS: usize = METADATA + (64 << 10);
const BAT: usize = 3 << 20;
const LOG_GUID: Guid = Guid([5; 16]);

/// Changes a file.
type Damage = Box<dyn Fn(&mut Vec<u8>)>;

fn put(content: &mut [u8], at: usize, bytes: &[u8]) {
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

fn fix(content: &mut [u8], at: usize, len: usize) {
    let sum = checksum(&content[at..at + len], 4);
    put(content, at + 4, &sum.to_le_bytes());
}

/// Puts bytes into both headers.
fn header(at: usize, bytes: impl Into<Vec<u8>>) -> Damage {
    let bytes = bytes.into();
    Box::new(move |content| {
        for start in HEADER_OFFSETS.map(|start| start as usize) {
            put(content, start + at, &bytes);
            fix(content, start, HEADER_LEN);
        }
    })
}

/// Puts bytes into both region tables.
fn regions(at: usize, bytes: impl Into<Vec<u8>>) -> Damage {
    let bytes = bytes.into();
    Box::new(move |content| {
        for start in REGION_TABLE_OFFSETS.map(|start| start as usize) {
            put(content, start + at, &bytes);
            fix(content, start, REGION_TABLE_LEN);
        }
    })
}

/// Puts bytes anywhere.
fn bytes(at: usize, bytes: impl Into<Vec<u8>>) -> Damage {
    let bytes = bytes.into();
    Box::new(move |content| put(content, at, &bytes))
}

/// An entry of the BAT.
fn entry(index: usize, value: u64) -> Damage {
    bytes(BAT + index * 8, value.to_le_bytes())
}

fn both(first: Damage, second: Damage) -> Damage {
    Box::new(move |content| {
        first(content);
        second(content);
    })
}

/// A third region: GUID, place, length, flags.
fn third_region(guid: u8, offset: u64, length: u32, flags: u32) -> Damage {
    let mut raw = vec![guid; 16];
    raw.extend(offset.to_le_bytes());
    raw.extend(length.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    both(regions(16 + 64, raw), regions(8, 3u32.to_le_bytes()))
}

/// A sixth item of the metadata: GUID, place from the start of the region, length, flags.
fn sixth_item(guid: [u8; 16], offset: u32, length: u32, flags: u32) -> Damage {
    let mut raw = guid.to_vec();
    raw.extend([offset, length, flags, 0].iter().flat_map(|word| word.to_le_bytes()));
    both(bytes(METADATA + 32 + 5 * 32, raw), bytes(METADATA + 10, 6u16.to_le_bytes()))
}

/// An entry of the log that puts a page at `target`, and headers that say that there is one. `change`
/// may spoil the entry before its checksum is made.
fn log(target: u64, flushed: u64, last: u64, change: impl Fn(&mut Vec<u8>) + 'static) -> Damage {
    let entry = NewEntry {
        guid: LOG_GUID,
        sequence: 7,
        tail: 0,
        flushed_file_offset: flushed,
        last_file_offset: last,
    };
    let mut raw = entry.encode(&[(target, &[0x77; PAGE as usize])]);
    change(&mut raw);
    raw[4..8].fill(0);
    let sum = crc32c::crc32c(&raw);
    raw[4..8].copy_from_slice(&sum.to_le_bytes());
    both(bytes(1 << 20, raw), header(48, LOG_GUID.0))
}

/// A descriptor that zeroes `len` bytes at `target`, instead of the page.
fn log_zeros(target: u64, len: u64) -> Damage {
    log(4 * MIB, 4 * MIB, 8 * MIB, move |raw| {
        raw.truncate(PAGE as usize);
        put(raw, 8, &(PAGE as u32).to_le_bytes());
        put(raw, 64, b"zero\0\0\0\0");
        put(raw, 72, &len.to_le_bytes());
        put(raw, 80, &target.to_le_bytes());
    })
}

fn truncated(len: usize) -> Damage {
    Box::new(move |content| content.truncate(len))
}

/// A dynamic image of three blocks of 1 MiB, of which the first is at 4 MiB and the second at 5 MiB.
fn fixture(has_parent: bool) -> Vec<u8> {
    let mut content = Fixture { has_parent, ..Fixture::new(3 * MIB) }.bytes();
    content.resize(8 << 20, 0);
    entry(0, (4 * MIB) | 6)(&mut content);
    entry(1, (5 * MIB) | 6)(&mut content);
    content
}

fn u32s(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Opens a file for reading and for writing; both must fail with these words.
fn is_refused(content: &[u8], words: &str) {
    for read_only in [true, false] {
        let file = SimFile::from_bytes("hostile.vhdx", content.to_vec());
        let backing = Some(parent_node(&[0; 512]));
        let result = open_with(&file, OpenOptions { read_only, backing, ..Default::default() });
        let err = match result {
            Ok(_) => panic!("not refused: {words}"),
            Err(err) => err.to_string(),
        };
        assert!(err.starts_with("hostile.vhdx: "), "{err}");
        assert!(err.contains(words), "{err}\nhas not: {words}");
        assert!(file.volatile() == content, "{words}: changed");
        for op in [SimOp::Write, SimOp::WriteZeroes, SimOp::SetLen, SimOp::Discard] {
            assert_eq!(file.count(op), 0, "{words}: changed");
        }
    }
}

#[test]
fn what_no_header_may_say() {
    let cases: Vec<(Damage, &str)> = vec![
        (truncated((1 << 20) - 1), "truncated"),
        (truncated(1024), "has only 1024 bytes"),
        (truncated(0), "has only 0 bytes"),
        (bytes(0, *b"conectix"), "is not a VHDX image"),
        (both(bytes(64 << 10, [0]), bytes(128 << 10, [0])), "neither of the two headers"),
        (
            both(bytes((64 << 10) + 100, [1]), bytes((128 << 10) + 100, [1])),
            "neither of the two headers",
        ),
        (
            both(
                header(8, 5u64.to_le_bytes()),
                Box::new(|content| {
                    put(content, (64 << 10) + 16, &[9]);
                    fix(content, 64 << 10, HEADER_LEN);
                }),
            ),
            "have the same sequence number 5",
        ),
        (header(66, 2u16.to_le_bytes()), "version 2 of the format"),
        (both(header(48, [1; 16]), header(64, [1, 0])), "version 1 of the log"),
        (header(68, 4096u32.to_le_bytes()), "does not start and end at multiples of 1 MiB"),
        (header(72, (MIB + 4096).to_le_bytes()), "does not start and end at multiples of 1 MiB"),
        (header(72, 0u64.to_le_bytes()), "does not start and end at multiples of 1 MiB"),
        (header(68, (2u32 << 30).to_le_bytes()), "longer than the 1 GiB"),
        (header(72, (9 * MIB).to_le_bytes()), "ends beyond the end of the file"),
        (header(72, (u64::MAX << 20).to_le_bytes()), "the log of 1048576 bytes"),
        (header(72, (3 * MIB).to_le_bytes()), "overlaps the log"),
        (both(header(68, [0; 4]), header(48, [1; 16])), "its GUID says that it must be replayed"),
    ];
    run(false, cases);
}

#[test]
fn what_no_region_table_may_say() {
    let bat = 16;
    let metadata = 48;
    let cases: Vec<(Damage, &str)> = vec![
        (both(bytes(192 << 10, [0]), bytes(256 << 10, [0])), "neither of the two region tables"),
        (regions(8, 2048u32.to_le_bytes()), "2048 entries; 2047 fit"),
        (both(regions(bat, [9; 16]), regions(bat + 28, [0])), "names no BAT region"),
        (regions(metadata, [9; 16]), "which is unknown"),
        (both(regions(metadata, [9; 16]), regions(metadata + 28, [0])), "names no metadata region"),
        (regions(bat + 16, (3 * MIB + 4096).to_le_bytes()), "multiples of 1 MiB after the first"),
        (regions(bat + 16, 0u64.to_le_bytes()), "multiples of 1 MiB after the first"),
        (regions(bat + 24, 4096u32.to_le_bytes()), "multiples of 1 MiB after the first"),
        (regions(bat + 24, [0; 4]), "multiples of 1 MiB after the first"),
        (regions(bat + 16, u64::MAX.to_le_bytes()), "has no end"),
        (regions(bat + 16, (8 * MIB).to_le_bytes()), "truncated"),
        (regions(bat + 16, (64 * TIB).to_le_bytes()), "truncated"),
        (regions(bat + 16, (2 * MIB).to_le_bytes()), "overlap"),
        (regions(bat + 16, MIB.to_le_bytes()), "overlaps the log"),
        (
            regions(bat + 16, (4096 * TIB).to_le_bytes()),
            "further back than any VHDX image can reach",
        ),
        (third_region(7, 2048 * TIB, 1 << 20, 0), "further back than any VHDX image can reach"),
        (third_region(7, 5 * MIB, 1 << 20, 1), "which is unknown"),
        (third_region(7, 2 * MIB, 1 << 20, 0), "overlap"),
        (
            both(
                third_region(7, 6 * MIB, 1 << 20, 0),
                both(regions(metadata, [7; 16]), regions(metadata + 28, [0])),
            ),
            "twice",
        ),
        // A region that nobody knows keeps its place.
        (third_region(7, 5 * MIB, 1 << 20, 0), "the block overlaps the log or region"),
    ];
    run(false, cases);
}

#[test]
fn what_no_metadata_may_say() {
    let item = |n: usize| METADATA + 32 + n * 32;
    let size = |size: u64| bytes(ITEMS + 8, size.to_le_bytes());
    let incomplete = Guid::parse("71CC85F0-1B69-4E28-9558-C3BF83AE75D3").unwrap().0;
    let cases: Vec<(Damage, &str)> = vec![
        (bytes(METADATA, [0]), "instead of \"metadata\""),
        (bytes(METADATA + 10, 2048u16.to_le_bytes()), "2048 entries; 2047 fit"),
        (bytes(METADATA + 10, 0u16.to_le_bytes()), "there is no file parameters item"),
        (bytes(METADATA + 10, 3u16.to_le_bytes()), "there is no physical sector size item"),
        (bytes(item(1) + 16, u32s(&[0x100, 8])), "lies outside of it"),
        (bytes(item(1) + 16, u32s(&[(1 << 20) - 4, 8])), "lies outside of it"),
        (bytes(item(1) + 16, u32s(&[u32::MAX, u32::MAX])), "lies outside of it"),
        (bytes(item(1) + 16, u32s(&[65536, 0])), "lies outside of it"),
        (bytes(item(1) + 16, u32s(&[65536 + 4, 8])), "overlaps item"),
        (bytes(item(1) + 16, u32s(&[0, 0])), "has 0 bytes instead of 8"),
        (bytes(item(2) + 20, u32s(&[3])), "has 3 bytes instead of 4"),
        (bytes(item(4) + 20, u32s(&[15])), "has 15 bytes instead of 16"),
        (bytes(item(0) + 24, u32s(&[5])), "is the user's, but required"),
        (Box::new(move |content| content.copy_within(item(2)..item(2) + 16, item(3))), "twice"),
        (sixth_item([8; 16], 0, 0, 4), "which is unknown"),
        (sixth_item(incomplete, 0, 0, 0), "marked it as incomplete"),
        (bytes(ITEMS, u32s(&[0])), "block size 0 is not a power of two"),
        (bytes(ITEMS, u32s(&[3 << 20])), "block size 3145728 is not a power of two"),
        (bytes(ITEMS, u32s(&[512 << 20])), "block size 536870912 is not a power of two"),
        (bytes(ITEMS, u32s(&[1 << 19])), "block size 524288 is not a power of two"),
        (bytes(ITEMS + 4, u32s(&[4])), "unknown file parameters 0x4"),
        (bytes(ITEMS + 4, u32s(&[2])), "there is no parent locator item"),
        (bytes(ITEMS + 16, u32s(&[1024])), "logical sector size 1024 is neither 512 nor 4096"),
        (bytes(ITEMS + 20, u32s(&[0])), "physical sector size 0 is neither 512 nor 4096"),
        (size(0), "virtual disk size 0 is not"),
        (size(64 * TIB + 512), "from one sector to 64 TiB"),
        (size(u64::MAX), "from one sector to 64 TiB"),
        (size(MIB + 100), "not a multiple of 512"),
        (size(64 * TIB), "the BAT holds 131072 entries, and 67125247 are needed"),
        (size(200 * GIB), "the BAT holds 131072 entries"),
    ];
    run(false, cases);
}

#[test]
fn what_no_bat_may_say() {
    let cases: Vec<(Damage, &str)> = vec![
        (entry(2, 4), "BAT entry 2 (of block 2) is 0x4: a state that does not exist"),
        (entry(2, (6 * MIB) | 0x106), "bits that must be zero are set"),
        (entry(2, (6 * MIB) | 0xe), "bits that must be zero are set"),
        (entry(2, 6), "the block lies in the file's header"),
        (entry(2, (3 * MIB) | 6), "the block overlaps the log or region"),
        (entry(2, MIB | 6), "the block overlaps the log or region"),
        (entry(2, (8 * MIB) | 6), "which is truncated"),
        (entry(2, !0xf_ffff | 6), "which is truncated"),
        (entry(2, (5 * MIB) | 6), "BAT entries 1 and 2 give the same part of the file"),
        (entry(2, (6 * MIB) | 7), "partially present, but the image has no parent"),
    ];
    run(false, cases);
    let cases: Vec<(Damage, &str)> = vec![
        (entry(4096, (6 * MIB) | 7), "does not exist for sector bitmaps"),
        (entry(4096, (9 * MIB) | 6), "which is truncated"),
        (entry(4096, (5 * MIB) | 6), "BAT entries 1 and 4096 give the same part of the file"),
    ];
    run(true, cases);
    // The entry for a bitmap in an image that has none.
    let mut content = Fixture { block: 256 * MIB, ..Fixture::new(5 * GIB) }.bytes();
    content.resize(8 << 20, 0);
    entry(16, (6 * MIB) | 6)(&mut content);
    is_refused(&content, "a sector bitmap is present, but the image has no parent");
}

#[test]
fn what_no_parent_locator_may_say() {
    let at = ITEMS + 40;
    let cases: Vec<(Damage, &str)> = vec![
        (bytes(at, [0]), "has the type"),
        (bytes(at + 18, 257u16.to_le_bytes()), "257 entries; no more than 256"),
        (bytes(at + 18, 0u16.to_le_bytes()), "has no parent_linkage"),
        (bytes(at + 18, 200u16.to_le_bytes()), "is shorter than its entries"),
        (bytes(at + 20, u32s(&[0])), "outside of the item"),
        (bytes(at + 24, u32s(&[u32::MAX])), "outside of the item"),
        (bytes(at + 28, 3u16.to_le_bytes()), "outside of the item"),
        (bytes(at + 44, [0, 0]), "contains a NUL"),
        (bytes(at + 44, [0, 0xd8]), "is not UTF-16"),
        (bytes(at + 44, [b'q', 0]), "has no parent_linkage"),
    ];
    run(true, cases);
}

#[test]
fn what_no_log_may_say() {
    let good = |_: &mut Vec<u8>| {};
    let (flushed, last) = (4 * MIB, 8 * MIB);
    let cases: Vec<(Damage, &str)> = vec![
        (header(48, LOG_GUID.0), "it holds no valid sequence of entries"),
        // An entry that is not whole is none.
        (
            both(log(4 * MIB, flushed, last, good), bytes((1 << 20) + 5000, [1])),
            "it holds no valid sequence of entries",
        ),
        (
            log(4 * MIB, flushed, last, |raw| put(raw, 8, &u32s(&[2 << 20]))),
            "it holds no valid sequence of entries",
        ),
        (
            log(4 * MIB, flushed, last, |raw| put(raw, 24, &u32s(&[u32::MAX]))),
            "it holds no valid sequence of entries",
        ),
        (
            log(4 * MIB, flushed, last, |raw| put(raw, 12, &u32s(&[8192]))),
            "it holds no valid sequence of entries",
        ),
        (log(64 << 10, flushed, last, good), "headers (up to 131072) are never logged"),
        (log(0, flushed, last, good), "headers (up to 131072) are never logged"),
        (log(MIB + 8192, flushed, last, good), "which is in the log itself"),
        (log(9 * MIB, flushed, last, good), "beyond the end of the file"),
        (log(4 * MIB, 9 * MIB, last, good), "the file had 9437184 bytes at least"),
        (log(4 * MIB, flushed, u64::MAX, good), "more than any can need"),
        (log(4 * MIB, flushed, 3000 * TIB, good), "more than any can need"),
        (log_zeros(64 << 10, 8192), "are never logged"),
        (log_zeros(0, 4 * MIB), "are never logged"),
        (log_zeros(7 * MIB, 2 * MIB), "beyond the end of the file"),
        (log_zeros(7 * MIB, !0xfff), "the log zeroes"),
        // What the log leads to is looked at like everything else, and is not put in place before.
        (log(3 * MIB, flushed, last, good), "BAT entry 0 (of block 0) is 0x7777777777777777"),
        (log(2 * MIB, flushed, last, good), "instead of \"metadata\""),
    ];
    run(false, cases);
}

fn run(has_parent: bool, cases: Vec<(Damage, &str)>) {
    // The image itself is good.
    let file = SimFile::from_bytes("good.vhdx", fixture(has_parent));
    let backing = has_parent.then(|| parent_node(&[0; 512]));
    open_with(&file, OpenOptions { read_only: true, backing, ..Default::default() }).unwrap();
    for (damage, words) in cases {
        let mut content = fixture(has_parent);
        damage(&mut content);
        is_refused(&content, words);
    }
}

/// A bad entry that was not looked at when the image was opened fails the request that meets it,
/// and whoever writes is refused from then on.
#[test]
fn bad_entries_far_behind_fail_where_they_are_used() {
    // So much is stored of the BAT that it is not looked at as a whole.
    let size = 200 * GIB;
    let mut content = Fixture::new(size).bytes();
    let end = content.len();
    for page in (BAT..end).step_by(PAGE as usize) {
        put(&mut content, page + 800, &2u64.to_le_bytes());
    }
    let last = (size / MIB - 1) as usize;
    let index = last + last / 4096;
    entry(index, (end as u64) | 6)(&mut content);
    let file = SimFile::from_bytes("far.vhdx", content);
    let driver = open_image(&file, None, None).unwrap();
    let buf = AlignedBuf::zeroed(512, 512);
    let err = block_on(driver.read(size - 512, buf.buffers())).unwrap_err().to_string();
    assert!(err.contains("BAT entry") && err.contains("truncated"), "{err}");
    block_on(driver.read(0, buf.buffers())).unwrap();
    let err = block_on(write(&driver, MIB, &[1; 512], false)).unwrap_err().to_string();
    assert!(err.contains("refuses writes after a failure"), "{err}");
}

/// A block that is there in part, without the bits that say which.
#[test]
fn a_missing_sector_bitmap_fails_the_request() {
    let mut content = fixture(true);
    entry(1, (5 * MIB) | 7)(&mut content);
    let file = SimFile::from_bytes("bits.vhdx", content);
    let backing = Some(parent_node(&[0; 512]));
    let driver = open_with(&file, OpenOptions { backing, ..Default::default() }).unwrap();
    let buf = AlignedBuf::zeroed(512, 512);
    let err = block_on(driver.read(MIB, buf.buffers())).unwrap_err().to_string();
    assert!(err.contains("block 1 is partially present, but its sector bitmap"), "{err}");
    block_on(driver.read(0, buf.buffers())).unwrap();
    block_on(write(&driver, 0, &[1; 512], false)).unwrap_err();
}

/// A file of 1 KiB or 1 MiB, or a hole of many, that claims 64 TiB: nothing is taken for it.
#[test]
fn large_claims_cost_nothing() {
    let mut content = Fixture { block: 32 * MIB, ..Fixture::new(3 * MIB) }.bytes();
    put(&mut content, ITEMS + 8, &(64 * TIB).to_le_bytes());
    let needed = 64 * TIB / (32 * MIB) * 8;
    regions(16 + 24, (needed as u32 + (1 << 20)).to_le_bytes())(&mut content);
    content.resize(BAT + needed as usize + (1 << 20), 0);
    let file = SimFile::from_bytes("large.vhdx", content.clone());
    let driver = open_image(&file, None, None).unwrap();
    assert_eq!(driver.limits().size, 64 * TIB);
    block_on(write(&driver, 64 * TIB - 4096, &[1; 4096], true)).unwrap();
    assert_eq!(block_on(read(&driver, 64 * TIB - 4096, 4096)), [1; 4096]);
    for len in [1 << 10, 1 << 20, 3 << 20] {
        let file = SimFile::from_bytes("large.vhdx", content[..len].to_vec());
        let err = open_image(&file, None, None).unwrap_err().to_string();
        assert!(err.contains("truncated"), "{err}");
    }
}
