//! Logs of other programs are read entry for entry; every rule of the format that a log may break
//! is found, with its message.

use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::ErrorKind;
use crate::io::block_on;
use crate::io::sim::SimFile;
use crate::write_log::{LogBuilder, Start};

/// A file of the sample data, decompressed; `None`, visibly, where the data is not there.
pub(crate) fn sample(name: &str) -> Option<Vec<u8>> {
    let dir = std::env::var_os("VUBLK_TEST_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data")),
        PathBuf::from,
    );
    let path = dir.join(name);
    let tool = match path.extension().and_then(|ext| ext.to_str()) {
        Some("zst") => "zstd",
        Some("xz") => "xz",
        _ => "cat",
    };
    let args: &[&str] = if tool == "cat" { &[] } else { &["-dc"] };
    match Command::new(tool).args(args).arg(&path).output() {
        Ok(output) if path.exists() && output.status.success() => Some(output.stdout),
        _ => {
            eprintln!("SKIP: no sample data: {} (unpacked with {tool})", path.display());
            None
        }
    }
}

fn open(bytes: Vec<u8>) -> Result<Log> {
    block_on(Log::open(Arc::new(SimFile::from_bytes("w.log", bytes))))
}

fn entries(bytes: Vec<u8>) -> Result<Vec<(Entry, Mark)>> {
    let log = open(bytes)?;
    block_on(async {
        let mut found = Vec::new();
        let mut walk = log.walk();
        while let Some(entry) = walk.next().await? {
            found.push((entry, walk.mark().clone()));
        }
        Ok(found)
    })
}

/// An entry as the sample data's tables have it.
fn table_line(entry: &Entry, mark: &Mark) -> String {
    let (number, flags) = (entry.number, entry.flags.0);
    let (sector, sectors) = (entry.sector(), entry.sectors());
    format!("{number}\t{sector}\t{sectors}\t{flags}\t{}\t{mark}", entry.mark_len)
}

#[test]
fn logs_of_the_kernel_and_of_qemu_are_read_entry_for_entry() {
    for name in ["dm-ext4", "qemu-ext4"] {
        let (Some(log), Some(table)) = (
            sample(&format!("logwrites/{name}.log.zst")),
            sample(&format!("logwrites/{name}.entries.tsv")),
        ) else {
            continue;
        };
        let table = String::from_utf8(table).unwrap();
        let expected: Vec<_> = table.lines().filter(|line| !line.starts_with('#')).collect();
        let found = entries(log).unwrap();
        let found: Vec<_> = found.iter().map(|(entry, mark)| table_line(entry, mark)).collect();
        assert_eq!(found, expected, "{name}");
    }
    for (name, count) in [("q512", 18), ("q512-before-append", 13), ("q4k", 12)] {
        let Some(log) = sample(&format!("dm-log-writes/{name}.log.xz")) else { continue };
        assert_eq!(entries(log).unwrap().len(), count, "{name}");
    }
}

#[test]
fn the_worked_example_is_read_as_it_says() {
    let bytes = LogBuilder::new(512)
        .mark("start")
        .write(3 * 512, &[0xab; 512])
        .discard(ByteRange { offset: 8 * 512, len: 1024 })
        .flush()
        .entry(Flags::FUA.and(Flags::METADATA), 4 * 512, &[0xcd; 512])
        .mark("dm-log-writes-end")
        .finish();
    assert_eq!(bytes.len(), 4608);
    if let Some(example) = sample("spec-examples/ex.log") {
        assert_eq!(bytes, example, "the builder's bytes");
    }
    let found = entries(bytes).unwrap();
    let kinds: Vec<_> = found.iter().map(|(entry, _)| entry.kind()).collect();
    assert_eq!(
        kinds,
        [Kind::Mark, Kind::Write, Kind::Discard, Kind::Flush, Kind::Write, Kind::Mark]
    );
    // As `replay-log --find` prints them.
    let ends: Vec<_> = found.iter().map(|(entry, _)| entry.end_sector()).collect();
    assert_eq!(ends, [2, 4, 5, 6, 8, 9]);
    assert_eq!(found[1].0.data(), Some(ByteRange { offset: 0x600, len: 512 }));
    assert_eq!(found[5].1, Mark(b"dm-log-writes-end".to_vec()));
}

#[test]
fn an_index_finds_marks_around_an_entry() {
    let bytes = LogBuilder::new(4096)
        .write(0, &[1; 8192])
        .mark("a")
        .flush()
        .mark("b")
        .write(4096 * 9, &[2; 4096])
        .finish();
    let log = open(bytes).unwrap();
    let index = block_on(Index::read(&log)).unwrap();
    assert_eq!(index.entries().len(), 5);
    assert_eq!(index.mark_before(1), None);
    assert_eq!(index.mark_before(2).unwrap().0, 1);
    assert_eq!(index.mark_after(2).unwrap().1, Mark(b"b".to_vec()));
    assert_eq!(index.mark_after(4), None);
    assert_eq!(index.highest_byte(), 40960);
    let third = index.entries()[2];
    let next = block_on(log.walk_after(&third).next()).unwrap().unwrap();
    assert_eq!(next, index.entries()[3]);
    assert_eq!(block_on(log.read_mark(&next)).unwrap(), Mark(b"b".to_vec()));
}

#[test]
fn nothing_behind_the_count_is_looked_at() {
    let mut bytes = LogBuilder::new(512).flush().write(0, &[7; 512]).finish();
    bytes[16] = 1;
    // A header that would be refused.
    bytes[1024 + 16..1024 + 24].fill(0xff);
    assert_eq!(entries(bytes).unwrap().len(), 1);
}

#[test]
fn marks_may_hold_anything() {
    let mark = Mark(b"a\tb\\\xff\x00z".to_vec());
    assert_eq!(mark.to_string(), "a\\tb\\\\\\xff\\u{0}z");
}

/// Changes a good log of one entry and expects the message.
fn refused(change: impl FnOnce(&mut Vec<u8>), kind: ErrorKind, message: &str) {
    let mut bytes = LogBuilder::new(512).write(512, &[7; 1024]).finish();
    change(&mut bytes);
    let err = entries(bytes).unwrap_err();
    assert_eq!(err.to_string(), format!("w.log: {message}"));
    assert_eq!(err.kind(), kind);
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn hostile_superblocks_are_refused() {
    use ErrorKind::{Corrupt, Unsupported};
    refused(|b| b.truncate(27), Corrupt, "log too short for a superblock (27 bytes)");
    refused(
        |b| b[0] = 0x71,
        Corrupt,
        "not a dm-log-writes log (magic 0x006a736677736871, not 0x006a736677736872)",
    );
    refused(|b| b[8] = 2, Unsupported, "unsupported log version 2");
    for size in [0u32, 32, 513, 256, 131_072, 1 << 31] {
        refused(
            |b| b[24..28].copy_from_slice(&size.to_le_bytes()),
            Corrupt,
            &format!(
                "invalid log sector size {size} (a power of two from 512 to 65536 is expected)"
            ),
        );
    }
    for count in [4, u64::MAX] {
        refused(
            |b| put(b, 16, count),
            Corrupt,
            &format!(
                "superblock claims {count} entries but the file holds at most 3 sectors of 512 \
                 bytes for them"
            ),
        );
    }
    // Shorter than a sector.
    refused(
        |b| b.truncate(100),
        Corrupt,
        "superblock claims 1 entries but the file holds at most 0 sectors of 512 bytes for them",
    );
}

/// Where the fields of entry 0 lie.
const SECTOR: usize = 512;
const NR_SECTORS: usize = 520;
const FLAGS: usize = 528;
const DATA_LEN: usize = 536;
const TEXT: usize = 544;

#[test]
fn hostile_entries_are_refused() {
    let corrupt = |change: fn(&mut [u8]), message: &str| {
        refused(|b| change(b), ErrorKind::Corrupt, &format!("entry 0: {message}"));
    };
    corrupt(|b| put(b, FLAGS, 0x20), "unknown flags 0x20");
    corrupt(|b| put(b, FLAGS, 1 << 63 | 1), "unknown flags 0x8000000000000000");
    corrupt(|b| put(b, NR_SECTORS, 0), "empty entry (neither data nor flags)");
    for flags in [5, 6, 12] {
        let shown = Flags(flags);
        refused(
            |b| put(b, FLAGS, flags),
            ErrorKind::Corrupt,
            &format!("entry 0: a discard cannot be {shown}"),
        );
    }
    corrupt(|b| b[TEXT] = 1, "its header is not padded with zeros");
    corrupt(|b| put(b, NR_SECTORS, 3), "data runs past the end of the log");
    let beyond = "lie beyond what any disk can have";
    corrupt(
        |b| put(b, NR_SECTORS, u64::MAX),
        &format!("its {} sectors from 1 on {beyond}", u64::MAX),
    );
    corrupt(|b| put(b, SECTOR, u64::MAX), &format!("its 2 sectors from {} on {beyond}", u64::MAX));
    corrupt(
        |b| put(b, SECTOR, (u64::MAX >> 9) - 1),
        &format!("its 2 sectors from {} on {beyond}", (u64::MAX >> 9) - 1),
    );
    // The largest that does not overflow is merely too long for the log.
    corrupt(
        |b| {
            put(b, SECTOR, 0);
            put(b, NR_SECTORS, u64::MAX >> 9);
        },
        "data runs past the end of the log",
    );
    corrupt(
        |b| put(b, DATA_LEN, 1025),
        "its data length of 1025 bytes is more than its 2 sectors hold",
    );
    corrupt(|b| put(b, FLAGS, 8), "a mark cannot have data (2 sectors)");
    corrupt(
        |b| {
            put(b, FLAGS, 8);
            put(b, NR_SECTORS, 0);
            put(b, DATA_LEN, 481);
        },
        "a mark of 481 bytes does not fit the 480 of its header",
    );
}

#[test]
fn an_entry_past_the_end_of_the_file_is_named() {
    // Three sectors have room for three entries, were each one sector long.
    let mut bytes = LogBuilder::new(512).write(512, &[7; 1024]).finish();
    bytes[16] = 2;
    let err = entries(bytes).unwrap_err().to_string();
    assert_eq!(err, "w.log: entry 1: its header lies past the end of the log");
}

#[test]
fn a_walk_that_failed_is_at_its_end() {
    let mut bytes = LogBuilder::new(512).flush().flush().finish();
    put(&mut bytes, FLAGS, 0x40);
    let log = open(bytes).unwrap();
    let mut walk = log.walk();
    block_on(walk.next()).unwrap_err();
    assert_eq!(block_on(walk.next()).unwrap(), None);
}

#[test]
fn copies_of_dax_writes_have_a_data_length() {
    let mut bytes = LogBuilder::new(512).write(512, &[7; 1024]).finish();
    put(&mut bytes, DATA_LEN, 1000);
    let found = entries(bytes).unwrap();
    assert_eq!((found[0].0.target.len, found[0].0.mark_len), (1024, 0));
}

#[test]
fn flushes_may_carry_data() {
    let bytes =
        LogBuilder::new(512).entry(Flags::FLUSH.and(Flags::FUA), 512, &[9; 512]).flush().finish();
    let found = entries(bytes).unwrap();
    assert_eq!((found[0].0.kind(), found[0].0.is_flush()), (Kind::Write, true));
    assert_eq!((found[1].0.kind(), found[1].0.is_flush()), (Kind::Flush, true));
}

#[test]
fn logs_larger_than_the_window_and_files_with_demands_are_read() {
    let mut builder = LogBuilder::new(512);
    for i in 0..400u64 {
        builder = builder.write(i * 512, &vec![i as u8; 512 * (1 + i as usize % 300)]).flush();
    }
    let mut bytes = builder.finish();
    let plain = entries(bytes.clone()).unwrap();
    assert_eq!(plain.len(), 800);
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let demands = crate::io::Alignment { request: 4096, memory: 512 };
    let file = Arc::new(SimFile::with_alignment("w.log", bytes, demands));
    let log = block_on(Log::open(file)).unwrap();
    let index = block_on(Index::read(&log)).unwrap();
    let same: Vec<_> = plain.iter().map(|(entry, _)| *entry).collect();
    assert_eq!(index.entries(), same);
}

#[test]
fn a_walk_with_data_has_that_of_small_entries_in_memory() {
    let mut builder = LogBuilder::new(512);
    let lengths = [512, 2 << 20, 1 << 20, 512, 1 << 20, 4096, 4096, 65536, 512, 3 << 20];
    for (i, len) in (0..).zip(lengths) {
        builder = builder.write(0, &vec![i; len]);
    }
    let log = open(builder.finish()).unwrap();
    let mut walk = block_on(log.walk_from(&Start::Entry(0))).unwrap().with_data();
    let mut small_ones = 0;
    for (i, len) in (0..).zip(lengths) {
        let entry = block_on(walk.next()).unwrap().unwrap();
        assert_eq!(entry.target.len, len as u64);
        if let Some(data) = walk.buffered(entry.data().unwrap()) {
            let mut bytes = vec![0; len];
            data.copy_to_slice(&mut bytes);
            assert!(bytes.iter().all(|byte| *byte == i), "entry {i}");
            small_ones += 1;
        }
    }
    // The first after a large one may not be there, the others are.
    assert!(small_ones >= 4, "{small_ones}");
    assert!(block_on(walk.next()).unwrap().is_none());
}
