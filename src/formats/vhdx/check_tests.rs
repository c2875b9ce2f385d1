//! Damaged images: what is found, what is repaired, and what a power cut during a repair leaves.

use std::sync::Arc;

use super::check::{Found, Repair, check};
use super::create::{CreateOptions, Parent, create};
use super::header::{Header, HeaderSlots};
use super::layout::{Guid, HEADER_OFFSETS, REGION_TABLE_OFFSETS};
use super::locator::Locator;
use super::log::NewEntry;
use super::resize::resize;
use super::testing::{open_image, read, write};
use super::{OpenOptions, Structure, Vhdx};
use crate::block::{Driver, Format};
use crate::io::sim::{Fault, SimFile};
use crate::io::{File, block_on};
use crate::units::{ByteRange, MIB};

/// Where the BAT of these images is.
const BAT: usize = 3 << 20;

/// A dynamic image of three blocks of 1 MiB, of which the first is at 4 MiB.
fn image() -> Vec<u8> {
    image_with(&CreateOptions { block_size: MIB, ..CreateOptions::new(3 * MIB) })
}

fn image_with(options: &CreateOptions) -> Vec<u8> {
    let sim = SimFile::from_bytes("new.vhdx", Vec::new());
    let file: Arc<dyn File> = Arc::new(sim.clone());
    block_on(create(&file, options)).unwrap();
    let mut content = sim.volatile();
    content.resize(6 << 20, 0);
    set_entry(&mut content, 0, 4 << 20 | 6);
    content
}

fn child() -> Vec<u8> {
    let entry = |key: &str, value: &str| (key.to_string(), value.to_string());
    let entries = vec![
        entry("parent_linkage", "{aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee}"),
        entry("relative_path", ".\\parent.vhdx"),
    ];
    let parent = Parent { locator: Locator { entries }, items: Vec::new() };
    let options =
        CreateOptions { block_size: MIB, parent: Some(parent), ..CreateOptions::new(3 * MIB) };
    image_with(&options)
}

fn set_entry(content: &mut [u8], index: usize, entry: u64) {
    content[BAT + index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
}

/// Checks, and returns what the file is afterwards.
fn checked(content: &[u8], repair: Option<Repair>) -> (Found, Vec<u8>) {
    let sim = SimFile::from_bytes("test.vhdx", content.to_vec());
    let file: Arc<dyn File> = Arc::new(sim.clone());
    let found = block_on(check(&file, repair)).unwrap();
    assert_eq!(sim.unflushed(), 0, "a repair is durable when it is done");
    (found, sim.volatile())
}

fn words(found: &Found) -> String {
    found.findings.iter().map(|finding| format!("{}\n", finding.what)).collect()
}

#[test]
fn a_good_image_has_no_findings() {
    let content = image();
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!(words(&found), "");
    assert_eq!((found.corruptions, found.fixed), (0, 0));
    assert_eq!((found.blocks, found.allocated, found.fragmented), (3, 1, 0));
    assert_eq!(found.image_end, 5 << 20);
    assert!(after == content, "nothing to repair, nothing written");
    assert_eq!(words(&checked(&child(), None).0), "");
}

/// Damage that a repair undoes; `counts` if it is a corruption.
fn is_repaired(damage: impl Fn(&mut Vec<u8>), message: &str, counts: bool) {
    let mut content = image();
    damage(&mut content);
    let (found, after) = checked(&content, None);
    assert!(words(&found).contains(message), "{found:?}");
    assert_eq!(found.corruptions, u64::from(counts), "{found:?}");
    assert!(after == content, "a check changes nothing");
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!((found.corruptions, found.fixed), (0, u64::from(counts)), "{found:?}");
    assert!(found.findings[0].is_fixed);
    let (found, _) = checked(&after, None);
    assert_eq!(words(&found), "");
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("after.vhdx", after));
    let structure = block_on(Structure::read(&file)).unwrap();
    block_on(Vhdx::open(structure, OpenOptions { read_only: true, ..Default::default() })).unwrap();
}

#[test]
fn copies_replace_what_is_damaged() {
    for (copy, offset) in HEADER_OFFSETS.into_iter().enumerate() {
        let message = format!("header {} of 2 is damaged", copy + 1);
        is_repaired(|content| content[offset as usize + 9] ^= 1, &message, true);
    }
    for (copy, offset) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
        let message = format!("region table {} of 2 is damaged", copy + 1);
        is_repaired(|content| content[offset as usize + 60_000] ^= 1, &message, true);
    }
    is_repaired(|content| make_second_table_stale(content), "the two region tables differ", true);
    is_repaired(|content| content[0] = b'V', "\"vhdxfile\" is missing", true);
}

/// As a resize that was cut off leaves it.
fn make_second_table_stale(content: &mut [u8]) {
    let table = &mut content[REGION_TABLE_OFFSETS[1] as usize..][..64 << 10];
    // Where the BAT is: a MiB further.
    table[16 + 16 + 2] += 0x10;
    let sum = super::layout::checksum(table, 4);
    table[4..8].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn the_first_write_replaces_a_bad_region_table() {
    // The second is stale, or either is damaged.
    for damaged in [None, Some(0), Some(1)] {
        let mut content = image();
        match damaged {
            None => make_second_table_stale(&mut content),
            Some(copy) => content[REGION_TABLE_OFFSETS[copy] as usize + 60_000] ^= 1,
        }
        let sim = SimFile::from_bytes("test.vhdx", content.clone());
        let disk = open_image(&sim, None, None).unwrap();
        assert_eq!(block_on(read(&disk, 0, 512)), vec![0; 512]);
        assert!(sim.volatile() == content, "who only reads changes nothing");
        block_on(write(&disk, 2 * MIB, &[1; 4096], false)).unwrap();
        let details = disk.details();
        assert_eq!(details["region-table-1"]["valid"], true);
        assert_eq!(details["region-table-2"]["valid"], true);
        block_on(disk.close()).unwrap();
        let (found, _) = checked(&sim.volatile(), None);
        assert_eq!(words(&found), "");
    }
}

#[test]
fn entries_that_mean_nothing_are_cleared() {
    is_repaired(|content| set_entry(content, 1, 5 << 20), "names a place for a block", false);
    is_repaired(|content| set_entry(content, 2, 5 << 20 | 2), "names a place for a block", false);
    let options = CreateOptions { block_size: 256 * MIB, ..CreateOptions::new(5 << 30) };
    let mut content = image_with(&options);
    set_entry(&mut content, 0, 0);
    set_entry(&mut content, 16, 4 << 20 | 6);
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!((found.corruptions, found.fixed), (0, 1), "{found:?}");
    assert!(words(&found).contains("sector bitmap is present, but the image has no parent"));
    assert_eq!(after[BAT + 16 * 8..][..8], [0; 8]);
}

#[test]
fn entries_behind_the_end_of_the_disk_mean_nothing() {
    for (entry, corruptions) in [(4 << 20 | 6, 0), (5 << 20 | 6, 0), (99 << 40 | 6, 0), (0x16, 1)] {
        // A child's BAT has entries for all of a chunk; these are of three blocks.
        let mut content = child();
        set_entry(&mut content, 3, entry);
        let (found, _) = checked(&content, None);
        let wanted = if corruptions == 0 { "behind the end of the disk" } else { "must be zero" };
        assert!(words(&found).contains(wanted), "{found:?}");
        assert_eq!(found.corruptions, corruptions);
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content.clone()));
        let structure = block_on(Structure::read(&file)).unwrap();
        let options = OpenOptions { read_only: true, alone: true, ..Default::default() };
        // What opens has no corruptions, and the other way round.
        assert_eq!(block_on(Vhdx::open(structure, options)).is_ok(), corruptions == 0);
        let (found, after) = checked(&content, Some(Repair::All));
        assert_eq!((found.corruptions, found.fixed), (0, corruptions), "{found:?}");
        assert_eq!(words(&checked(&after, None).0), "");
        assert_eq!(after[BAT + 3 * 8..][..8], [0; 8]);
    }
}

#[test]
fn details_tell_what_the_headers_say() {
    let mut content = image();
    content[8..14].copy_from_slice(b"m\0\x1b\0e\0");
    content[14..16].fill(0);
    content[HEADER_OFFSETS[0] as usize + 9] ^= 1;
    content[REGION_TABLE_OFFSETS[1] as usize] = 0;
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
    let structure = block_on(Structure::read(&file)).unwrap();
    let details = structure.details();
    assert_eq!(details["creator"], "m\u{fffd}e");
    assert_eq!((&details["log-offset"], &details["log-size"]), (&MIB.into(), &MIB.into()));
    let slot = serde_json::json!({ "offset": 65536, "valid": false, "current": false });
    assert_eq!(details["header-1"], slot);
    let sequence = structure.headers.current.sequence;
    assert_eq!(details["header-2"]["sequence-number"], sequence);
    assert_eq!(details["header-2"]["current"], true);
    assert_eq!(details["region-table-1"]["valid"], true);
    assert_eq!(details["region-table-2"]["valid"], false);
    let bat = serde_json::json!({ "offset": BAT, "length": MIB, "required": true });
    assert_eq!(details["regions"]["bat"], bat);
}

/// Damage that is told and left alone.
fn is_left_alone(mut content: Vec<u8>, damage: impl Fn(&mut Vec<u8>), message: &str) {
    damage(&mut content);
    let (found, after) = checked(&content, Some(Repair::All));
    assert!(words(&found).contains(message), "{found:?}");
    assert_eq!((found.corruptions, found.fixed), (1, 0), "{found:?}");
    assert!(after == content, "nothing is guessed");
    let finding = &found.findings[0];
    assert!(finding.repair.starts_with("nothing: "), "{finding:?}");
    assert!(!finding.meaning.is_empty() && !finding.place.is_empty());
}

#[test]
fn what_would_be_a_guess_is_left_alone() {
    let entry = |index, entry| move |content: &mut Vec<u8>| set_entry(content, index, entry);
    is_left_alone(image(), entry(1, 4 << 20 | 6), "give the same part of the file to two blocks");
    is_left_alone(image(), entry(1, 5 << 20 | 4), "a state that does not exist");
    is_left_alone(image(), entry(1, 5 << 20 | 0x16), "bits that must be zero are set");
    is_left_alone(image(), entry(1, 3 << 20 | 6), "overlaps the log or region");
    is_left_alone(image(), entry(1, 6), "in the file's header");
    is_left_alone(image(), entry(1, 5 << 20 | 7), "partially present, but the image has no parent");
    is_left_alone(image(), entry(1, 9 << 20 | 6), "which is truncated");
    is_left_alone(child(), entry(1, 5 << 20 | 7), "their sector bitmap (BAT entry 4096) is not");
    let both_headers = |content: &mut Vec<u8>| {
        HEADER_OFFSETS.iter().for_each(|at| content[*at as usize] = 0);
    };
    is_left_alone(image(), both_headers, "neither of the two headers");
    let both_tables = |content: &mut Vec<u8>| {
        REGION_TABLE_OFFSETS.iter().for_each(|at| content[*at as usize] = 0);
    };
    is_left_alone(image(), both_tables, "neither of the two region tables");
    is_left_alone(image(), |content| content[2 << 20] = 0, "instead of \"metadata\"");
    is_left_alone(image(), |content| content.truncate(2 << 20), "truncated");
    is_left_alone(image(), |content| content.truncate(70_000), "truncated");
    is_left_alone(image(), |content| content.fill(0), "neither of the two headers");
}

#[test]
fn an_unusable_image_is_refused_where_its_format_is_newer() {
    let mut content = image();
    for offset in HEADER_OFFSETS.map(|offset| offset as usize) {
        content[offset + 66] = 9;
        let sum = super::layout::checksum(&content[offset..offset + 4096], 4);
        content[offset + 4..offset + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
    let err = block_on(check(&file, Some(Repair::All))).unwrap_err().to_string();
    assert!(err.starts_with("test.vhdx: header ") && err.contains("version 9"), "{err}");
}

/// Both headers changed by `change`, with right checksums.
fn change_headers(content: &mut [u8], change: impl Fn(&mut [u8])) {
    for offset in HEADER_OFFSETS.map(|offset| offset as usize) {
        change(&mut content[offset..offset + 4096]);
        let sum = super::layout::checksum(&content[offset..offset + 4096], 4);
        content[offset + 4..offset + 8].copy_from_slice(&sum.to_le_bytes());
    }
}

#[test]
fn a_log_that_cannot_be_replayed_can_be_ignored() {
    let mut content = image();
    change_headers(&mut content, |header| header[48..64].fill(7));
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!((found.corruptions, found.fixed), (1, 0));
    let finding = &found.findings[0];
    assert!(finding.what.starts_with("the log cannot be replayed: "), "{finding:?}");
    assert!(finding.repair.contains("vublk convert --salvage"), "{finding:?}");
    assert!(after == content);
}

#[test]
fn headers_that_cannot_be_replaced_refuse_writers() {
    let mut content = image();
    change_headers(&mut content, |header| header[8..16].fill(0xff));
    let (found, _) = checked(&content, None);
    assert_eq!(found.corruptions, 0);
    assert!(words(&found).contains("cannot grow any further"), "{found:?}");
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
    for read_only in [true, false] {
        let structure = block_on(Structure::read(&file)).unwrap();
        let options = OpenOptions { read_only, ..Default::default() };
        assert_eq!(block_on(Vhdx::open(structure, options)).is_ok(), read_only);
    }
}

/// A number that can grow, but not as often as it must.
#[test]
fn headers_that_are_out_of_numbers_are_left_alone() {
    let mut content = image();
    change_headers(&mut content, |header| header[8..16].copy_from_slice(&(!1u64).to_le_bytes()));
    set_entry(&mut content, 0, 0x40_0002);
    let sim = SimFile::from_bytes("test.vhdx", content.clone());
    let file: Arc<dyn File> = Arc::new(sim.clone());
    let repaired = block_on(check(&file, Some(Repair::All))).map(drop);
    let resized = block_on(resize(&file, 4 * MIB, None));
    for refused in [repaired, resized] {
        let err = refused.unwrap_err().to_string();
        assert!(err.contains("copy it (vublk convert)"), "{err}");
    }
    assert!(sim.volatile() == content);
}

#[test]
fn a_long_list_ends() {
    let options = CreateOptions { block_size: MIB, ..CreateOptions::new(3 << 30) };
    let mut content = image_with(&options);
    (1..3000).for_each(|index| set_entry(&mut content, index, 4));
    let (found, _) = checked(&content, None);
    assert_eq!((found.corruptions, found.findings.len()), (2999, 1001));
    assert!(words(&found).ends_with("there is more, which is not listed\n"));
}

/// Good ones among bad ones that nobody can repair, and behind them.
#[test]
fn what_is_not_listed_is_repaired_all_the_same() {
    let options = CreateOptions { block_size: MIB, ..CreateOptions::new(6 << 30) };
    let mut content = image_with(&options);
    // Without a meaning; then places for blocks that are not there.
    (1..2000).for_each(|index| set_entry(&mut content, index, 4));
    (2000..5000).for_each(|index| set_entry(&mut content, index, 0x40_0002));
    // A sector bitmap, which nothing reads.
    set_entry(&mut content, 4096, 0x40_0006);
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!((found.corruptions, found.fixed), (1999, 1));
    (2000..5000).for_each(|index| set_entry(&mut content, index, 2));
    set_entry(&mut content, 4096, 0);
    let bat = BAT..BAT + 6200 * 8;
    assert!(after[bat.clone()] == content[bat]);
}

#[test]
fn a_repair_goes_on_where_nothing_could_be_seen_before() {
    let mut content = image();
    content[0] = b'V';
    set_entry(&mut content, 1, 0x40_0002);
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!((found.corruptions, found.fixed), (0, 1));
    assert_eq!(found.findings.iter().filter(|finding| finding.is_fixed).count(), 2);
    assert_eq!(words(&checked(&after, None).0), "");
}

/// A repair of everything at once, cut off after each of its operations.
#[test]
fn a_repair_cut_short_can_be_repeated() {
    let mut content = image();
    content[HEADER_OFFSETS[0] as usize + 9] ^= 1;
    content[REGION_TABLE_OFFSETS[0] as usize + 60_000] ^= 1;
    set_entry(&mut content, 1, 5 << 20);
    set_entry(&mut content, 2, 5 << 20 | 2);
    let mut cuts = 0;
    for after in 0.. {
        let sim = SimFile::from_bytes("test.vhdx", content.clone());
        let changes = Fault { op: None, after, errno: 5, for_good: true };
        sim.fail(changes);
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let done = block_on(check(&file, Some(Repair::All))).is_ok();
        for seed in 0..8 {
            let left = sim.power_cut(seed);
            let (found, after) = checked(&left, Some(Repair::All));
            assert_eq!(
                found.corruptions,
                0,
                "operation {after:?}, seed {seed}: {found:?}",
                after = cuts
            );
            assert_eq!(words(&checked(&after, None).0), "");
            cuts += 1;
            let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("after.vhdx", after));
            let structure = block_on(Structure::read(&file)).unwrap();
            let options = OpenOptions { read_only: true, ..Default::default() };
            let image = block_on(Vhdx::open(structure, options)).unwrap();
            let whole = ByteRange { offset: 0, len: 3 * MIB };
            assert_eq!(block_on(image.map(whole)).unwrap().range.len, MIB);
        }
        if done {
            break;
        }
    }
    assert!(cuts > 100, "{cuts}");
}

/// An entry in the middle of the log is damaged, and whole ones lie behind it: what they hold is given
/// up by nobody but who asks for that.
#[test]
fn entries_behind_a_damaged_one_are_not_lost_by_writing() {
    let sim = SimFile::from_bytes("test.vhdx", image());
    let file: Arc<dyn File> = Arc::new(sim.clone());
    let mut headers = block_on(HeaderSlots::read(&file)).unwrap();
    let log_guid = Guid([5; 16]);
    block_on(headers.update(&file, Header { log_guid, ..headers.current })).unwrap();
    let mut content = sim.volatile();
    let log = headers.current.log.offset as usize;
    let len = content.len() as u64;
    for (place, sequence) in [(0, 5), (2, 7), (3, 8)] {
        let entry = NewEntry {
            guid: log_guid,
            sequence,
            tail: 0,
            flushed_file_offset: len,
            last_file_offset: len,
        };
        let bytes = entry.encode(&[]);
        content[log + place * 4096..][..bytes.len()].copy_from_slice(&bytes);
    }
    let damaged = "entries up to 8 are there, but none just before 7";
    for repair in [None, Some(Repair::ReplayOnly)] {
        let (found, after) = checked(&content, repair);
        assert!(words(&found).contains(damaged), "{}", words(&found));
        assert_eq!((found.corruptions, found.fixed), (1, 0));
        assert!(after == content, "{repair:?} changes it");
    }
    let open = |read_only| {
        let sim = SimFile::from_bytes("test.vhdx", content.clone());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let opened = block_on(async { Vhdx::open(Structure::read(&file).await?, options).await });
        assert!(sim.volatile() == content);
        (opened.map(drop), block_on(resize(&file, 4 * MIB, None)))
    };
    assert!(open(true).0.is_ok());
    let (opened, resized) = open(false);
    for refused in [opened, resized] {
        let err = refused.unwrap_err().to_string();
        assert!(err.contains("entries 7 to 8 are whole, but one before them is not"), "{err}");
    }
    let (found, after) = checked(&content, Some(Repair::All));
    assert_eq!((found.corruptions, found.fixed), (0, 1), "{}", words(&found));
    assert_eq!(words(&checked(&after, None).0), "");
}

/// Repairs a sample with a dirty log, and compares the content.
#[test]
fn a_log_is_replayed_by_a_repair() {
    use crate::images::{self, OpenRequest};
    for (name, hash) in [
        ("exB.vhdx", "ef76a32f0360567f512daa9cd84c856791c9c3fd6589a5f82cce6fc7026c7fe7"),
        (
            "ntfs-fixed.crashed.vhdx",
            "5237dd895f38052344e2ef35a207fe9df08cd18d17b6ea857a1b93cc475e1f2e",
        ),
        (
            "ntfs-dynamic.crashed.vhdx",
            "b92731f8e4bf3532418444d22a9086823a8122569500acd09cd8d2ce20eb98e9",
        ),
        (
            "ntfs-fixed.crashed-short.vhdx",
            "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8",
        ),
    ] {
        let Some((_dir, path)) = super::tests::unpacked(name) else { return };
        let request = OpenRequest::read(&path);
        let report = images::check_path(&request, None).unwrap().report.unwrap();
        assert!(report.findings[0].what.contains("not applied yet"), "{name}: {report:?}");
        assert_eq!(report.corruptions, 0, "{name}");
        for repaired in [1, 0] {
            let report = images::check_path(&request, Some(images::Repair::Leaks)).unwrap();
            let report = report.report.unwrap();
            // A log is no corruption.
            assert_eq!((report.corruptions, report.corruptions_fixed), (0, 0), "{name}");
            let count = report.findings.iter().filter(|finding| finding.repaired).count();
            assert_eq!(count, repaired, "{name}");
        }
        let image = images::open(&request).unwrap();
        assert_eq!(image.node.driver().details()["log-entries-to-replay"], 0);
        assert_eq!(super::tests::content_hash(&image.node), hash, "{name}");
        if name.contains("short") {
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 8 << 20);
        }
    }
}
