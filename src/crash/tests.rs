//! States against a model that applies the writes to an array of bytes.

use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::block::driver::{BlockStatus, Driver, Limits, StatusKind};
use crate::block::{Node, NodeOptions};
use crate::formats::raw::Raw;
use crate::io::sim::{Fault, Rng, SimFile, SimOp};
use crate::io::{AlignedBuf, Alignment, Buffers, File, Fut, HostFile, OpenOptions, block_on};
use crate::units::ByteRange;
use crate::write_log::{Flags, Log, LogBuilder};

const SIZE: u64 = 64 << 10;

/// A base with this content.
fn node(content: Vec<u8>) -> Node {
    node_of(SimFile::from_bytes("base.img", content))
}

fn node_of(file: SimFile) -> Node {
    base(Arc::new(Raw::open(Arc::new(file), true).unwrap()))
}

fn base(driver: Arc<dyn Driver>) -> Node {
    let options = NodeOptions { name: "base".into(), read_only: true, keeps_space: false };
    Node::new(driver, options)
}

/// What happened to a disk of [`SIZE`] bytes.
fn history(log: &LogBuilder) -> History {
    history_of(SimFile::from_bytes("w.log", log.finish()), SIZE)
}

fn history_of(log: impl File + 'static, size: u64) -> History {
    History::read(block_on(Log::open(Arc::new(log))).unwrap(), size).unwrap()
}

/// Writes, discards, flushes and marks at random, many of them at the same few places.
fn random_log(rng: &mut Rng, entries: u64) -> LogBuilder {
    let mut log = LogBuilder::new(512);
    for _ in 0..entries {
        let offset = rng.below(SIZE / 512 - 8) * 512;
        let len = (1 + rng.below(8)) * 512;
        let byte = rng.below(4) as u8;
        log = match rng.below(12) {
            0 => log.flush(),
            1 => log.mark("here"),
            2 => log
                .discard(ByteRange { offset, len: (512 + rng.below(20) * 512).min(SIZE - offset) }),
            3 => log.entry(Flags::FUA, offset, &vec![byte; len as usize]),
            4 => log.entry(Flags::FLUSH, offset, &vec![byte; len as usize]),
            _ => log.write(offset, &vec![byte; len as usize]),
        };
    }
    log
}

fn apply(disk: &mut [u8], history: &History, number: u64, part: Option<ByteRange>) {
    let entry = history.entry(number);
    let part = part.unwrap_or(entry.target);
    let place = part.offset as usize..part.end() as usize;
    match entry.data() {
        Some(data) => {
            let mut buf = AlignedBuf::zeroed(entry.target.len as usize, 512);
            block_on(history.log().file().read(data.offset, buf.buffers())).unwrap();
            let skipped = (part.offset - entry.target.offset) as usize;
            disk[place].copy_from_slice(&buf.as_slice()[skipped..skipped + part.len as usize]);
        }
        None => disk[place].fill(0),
    }
}

/// The disk in a state, made the slow way and from the words of the grammar only.
fn model(base: &[u8], history: &History, name: &StateName) -> Vec<u8> {
    let mut disk = base.to_vec();
    for number in 0..name.prefix {
        if !history.entry(number).target.is_empty() {
            apply(&mut disk, history, number, None);
        }
    }
    let mut number = name.prefix;
    for (i, applied) in name.applied.iter().enumerate() {
        while history.entry(number).target.is_empty() {
            number += 1;
        }
        if *applied {
            let target = history.entry(number).target;
            let kept =
                name.torn.iter().find(|tear| tear.write == i).map(|tear| tear.kept.of(target));
            apply(&mut disk, history, number, kept);
        }
        number += 1;
    }
    disk
}

fn read(view: &View, history: &History, base: &[u8]) -> Vec<u8> {
    let mut disk = Vec::new();
    while (disk.len() as u64) < SIZE {
        let (run, source) = view.find(ByteRange::between(disk.len() as u64, SIZE));
        match source {
            None => disk.extend_from_slice(&base[run.offset as usize..run.end() as usize]),
            Some(Source::Zero) => disk.resize(run.end() as usize, 0),
            Some(Source::Log(position)) => {
                let buf = AlignedBuf::zeroed(run.len as usize, 512);
                block_on(history.log().file().read(position, buf.buffers())).unwrap();
                disk.extend_from_slice(&buf.to_vec());
            }
        }
    }
    disk
}

fn random_state(rng: &mut Rng, history: &History, epoch: &Epoch) -> StateName {
    let mut name = StateName::prefix(epoch.start);
    for (i, number) in epoch.writes.iter().enumerate() {
        let applied = !rng.one_in(3);
        name.applied.push(applied);
        let entry = history.entry(*number);
        if applied && entry.data().is_some() && entry.target.len > 512 && rng.one_in(4) {
            let len = 512 * (1 + rng.below(entry.target.len / 512 - 1));
            let kept = if rng.one_in(2) { Kept::First(len) } else { Kept::Last(len) };
            name.torn.push(Tear { write: i, kept });
        }
    }
    name
}

#[test]
fn states_are_what_the_model_says_and_no_two_share_a_fingerprint() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        // Sparse and few values, so that states coincide now and then.
        let base: Vec<u8> = (0..SIZE / 512).flat_map(|_| [rng.below(3) as u8; 512]).collect();
        let log = random_log(&mut rng, 80);
        let (history, disk) = (history(&log), node(base.clone()));
        let mut prints = Fingerprints::new(&history, &disk).unwrap();
        let mut view = View::default();
        let mut shown = base.clone();
        let mut by_print: HashMap<u128, Vec<u8>> = HashMap::new();
        for epoch in history.epochs() {
            let print = prints.epoch(&epoch).unwrap();
            for _ in 0..12 {
                let full = random_state(&mut rng, &history, &epoch);
                let short = history.shortest(&epoch, &full);
                let expected = model(&base, &history, &full);
                assert_eq!(model(&base, &history, &short), expected, "seed {seed}: {full} {short}");
                // (The short name may be that of the end of an epoch where this one begins.)
                let (_, again) = history.expanded(&short).unwrap();
                assert_eq!(model(&base, &history, &again), expected, "seed {seed}: {short}");
                assert_eq!(short.to_string().parse::<StateName>().unwrap(), short);
                let changed = view.show(&history, &short).unwrap();
                let now = read(&view, &history, &base);
                assert!(now == expected, "seed {seed}: {full}");
                for at in (0..SIZE).filter(|at| shown[*at as usize] != now[*at as usize]) {
                    let told = changed.iter().any(|r| r.offset <= at && at < r.end());
                    assert!(told, "seed {seed}: {full}: nobody was told of byte {at}");
                }
                shown = now;
                let found = print.of(&full);
                let other = by_print.entry(found).or_insert_with(|| expected.clone());
                assert!(*other == expected, "seed {seed}: {full}: two disks, one fingerprint");
            }
        }
        // A second walk from the start, as a shrinking search makes it.
        let first = history.epochs().next().unwrap();
        let name = random_state(&mut rng, &history, &first);
        view.show(&history, &name).unwrap();
        assert!(read(&view, &history, &base) == model(&base, &history, &name), "seed {seed}");
    }
}

#[test]
fn writing_the_same_again_gives_the_same_fingerprint() {
    let log = LogBuilder::new(512)
        .write(0, &[1; 512])
        .write(1024, &[0; 1024])
        .write(0, &[1; 512])
        .discard(ByteRange { offset: 1024, len: 512 })
        .flush()
        .write(0, &[1; 1024]);
    let (history, base) = (history(&log), node(vec![0; SIZE as usize]));
    let mut prints = Fingerprints::new(&history, &base).unwrap();
    let epochs: Vec<_> = history.epochs().collect();
    let print = prints.epoch(&epochs[0]).unwrap();
    let of = |name: &str| {
        let (_, full) = history.expanded(&name.parse().unwrap()).unwrap();
        print.of(&full)
    };
    assert_eq!(of("E0"), 0);
    assert_eq!(of("E0:s=0101"), 0, "zeros over zeros");
    assert_eq!(of("E0:s=1"), of("E0:s=001"));
    assert_eq!(of("E1"), of("E4"));
    assert_ne!(of("E0"), of("E1"));
    let print = prints.epoch(&epochs[1]).unwrap();
    assert_eq!(print.of(&"E5:s=0".parse().unwrap()), of("E4"), "from one epoch to the next");
    assert_eq!(
        print.of(&"E5:s=1,torn=1@512".parse().unwrap()),
        of("E4"),
        "torn where nothing changes"
    );
    assert_ne!(print.of(&"E5:s=1,torn=1@-512".parse().unwrap()), of("E4"));
}

#[test]
fn a_discard_of_a_whole_disk_costs_nothing_for_each_sector() {
    let (huge, size) = (1 << 40, 2 << 40);
    let log = LogBuilder::new(512)
        .write(4096, &[1; 512])
        .discard(ByteRange { offset: 0, len: huge })
        .discard(ByteRange { offset: huge / 2, len: huge })
        .flush()
        .discard(ByteRange { offset: 0, len: huge });
    let history = history_of(SimFile::from_bytes("w.log", log.finish()), size);
    let disk = base(Arc::new(Unread(size)));
    let mut prints = Fingerprints::new(&history, &disk).unwrap();
    let epochs: Vec<_> = history.epochs().collect();
    let print = prints.epoch(&epochs[0]).unwrap();
    let of = |text: &str| print.of(&text.parse().unwrap());
    assert_ne!(of("E0:s=010"), of("E0:s=001"));
    assert_ne!(of("E0:s=011"), of("E0:s=001"));
    assert_eq!(of("E0:s=111"), of("E0:s=011"), "what is written is discarded");
    let last = prints.epoch(&epochs[1]).unwrap();
    assert_eq!(last.of(&"E4:s=1".parse().unwrap()), of("E0:s=111"), "discarded twice");
}

/// Write-zeroes of a guest: many sectors, and a hole in the log or zeros in it.
#[test]
fn zeros_that_are_written_to_a_whole_disk_cost_nothing_for_each_sector() {
    let len = 8 << 20;
    let size = 4 * len;
    let head = LogBuilder::new(512).write(4096, &[1; 512]);
    let zeros = head.clone().write(0, &vec![0; len as usize]);
    let mut ragged = vec![0; len as usize];
    (ragged[0], ragged[len as usize - 1]) = (1, 1);
    let ragged = head.write(0, &ragged);
    let dir = tempfile::tempdir().unwrap();
    for (log, is_ragged) in [(zeros, false), (ragged, true)] {
        let log = log
            .write(len / 2, &[2; 4096])
            .discard(ByteRange { offset: len / 4, len: 2 * len })
            .flush()
            .discard(ByteRange { offset: 0, len });
        // A file of the host has them as data; the simulation knows no zeros but holes.
        let path = dir.path().join("w.log");
        std::fs::write(&path, log.finish()).unwrap();
        let history = match is_ragged {
            false => history_of(HostFile::open(&path, OpenOptions::default()).unwrap(), size),
            true => history_of(SimFile::from_bytes("w.log", log.finish()), size),
        };
        let disk = base(Arc::new(Unread(size)));
        let mut prints = Fingerprints::new(&history, &disk).unwrap();
        let epochs: Vec<_> = history.epochs().collect();
        let print = prints.epoch(&epochs[0]).unwrap();
        assert!(print.runs().len() < 60, "{} runs", print.runs().len());
        let of = |text: &str| print.of(&text.parse().unwrap());
        let all = ["0000", "0100", "0001", "0101", "0110", "1000", "1010"];
        let distinct: std::collections::HashSet<_> =
            all.iter().map(|bits| of(&format!("E0:s={bits}"))).collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(of("E0:s=0111"), of("E0:s=0101"), "what is written is discarded");
        assert_eq!(of("E0:s=1100"), of("E0:s=0100"), "what is written is written over");
        let torn = ["@512", "@-512", "@3072", "@4194304", "@-4194304"];
        let distinct: std::collections::HashSet<_> =
            torn.iter().map(|tear| of(&format!("E0:s=0100,torn=2{tear}"))).collect();
        assert_eq!(distinct.len(), torn.len());
        let last = prints.epoch(&epochs[1]).unwrap();
        let gone = last.of(&"E5:s=1".parse().unwrap());
        if !is_ragged {
            assert_eq!(gone, of("E0:s=1101"), "zeros over zeros");
        }
    }
}

#[test]
fn epochs_begin_with_the_flush_that_carries_data() {
    let log = LogBuilder::new(512)
        .mark("start")
        .write(0, &[1; 512])
        .flush()
        .flush()
        .write(0, &[2; 512])
        .mark("between")
        .discard(ByteRange { offset: 512, len: 512 })
        .entry(Flags::FLUSH.and(Flags::FUA), 1024, &[3; 512])
        .write(0, &[4; 1024]);
    let history = history(&log);
    let epochs: Vec<_> = history.epochs().collect();
    let expected = [(0, 2, vec![1]), (4, 7, vec![4, 6]), (7, 9, vec![7, 8])];
    let found: Vec<_> = epochs.iter().map(|e| (e.start, e.end, e.writes.clone())).collect();
    assert_eq!(found, expected);
    let after = |log: &LogBuilder| {
        let last = self::history(log).epochs().last().unwrap();
        (last.start, last.end, last.writes.len())
    };
    assert_eq!(after(&log), (7, 9, 2));
    // What the last flush made durable, and what was promised then.
    let log = log.flush();
    assert_eq!(after(&log), (10, 10, 0));
    assert_eq!(after(&log.mark("synced")), (10, 11, 0));
    // The data of the flush has FUA: without it nothing that came after it.
    let possible = |text: &str| {
        let (epoch, name) = history.expanded(&text.parse().unwrap()).unwrap();
        history.is_possible(&epoch, &name)
    };
    assert!(possible("E7") && possible("E8") && possible("E9"));
    assert!(!possible("E7:s=01"));
    assert!(possible("E4:s=01"));
}

#[test]
fn names_that_the_log_does_not_have_are_refused() {
    let log = LogBuilder::new(512)
        .write(0, &[1; 1024])
        .discard(ByteRange { offset: 0, len: 1024 })
        .flush()
        .write(0, &[1; 512]);
    let history = history(&log);
    for (text, what) in [
        ("E5", "w.log: E5: the log has 4 entries only"),
        ("E0:s=111", "3 bits, but only 2 writes follow entry 0"),
        ("E2:s=1", "1 bits, but only 0 writes follow entry 2"),
        ("E0:s=11,torn=2@512", "write 2 is a discard"),
        ("E0:s=1,torn=1@1024", "so 1024 of them are no tear"),
        ("E3:s=1,torn=1@512", "so 512 of them are no tear"),
    ] {
        let err = view_error(&history, text);
        assert!(err.contains(what), "{text}: {err}");
    }
    let small = LogBuilder::new(512).write(SIZE, &[1; 512]);
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("w.log", small.finish()));
    let err = History::read(block_on(Log::open(file)).unwrap(), SIZE).unwrap_err().to_string();
    assert!(err.contains("entry 0 writes past the end of the disk"), "{err}");
}

/// A disk of data that nobody would want to read.
#[derive(Debug)]
struct Unread(u64);

impl Driver for Unread {
    fn name(&self) -> &'static str {
        "unread"
    }

    fn limits(&self) -> Limits {
        Limits {
            size: self.0,
            request_alignment: 512,
            memory_alignment: 1,
            optimal_io: 0,
            discard_granularity: 0,
            read_only: true,
        }
    }

    fn read<'a>(&'a self, _offset: u64, buf: Buffers) -> Fut<'a, ()> {
        assert!(buf.len() <= 4096, "reads as much as the writes need, and no more");
        buf.fill_zero();
        Box::pin(async { Ok(()) })
    }

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        unreachable!("read-only")
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        unreachable!("read-only")
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        unreachable!("read-only")
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        let kind = StatusKind::Data;
        Box::pin(
            async move { Ok(BlockStatus { range, kind, host: None, depth: 0, compressed: false }) },
        )
    }
}

fn view_error(history: &History, text: &str) -> String {
    let mut view = View::default();
    view.show(history, &text.parse().unwrap()).unwrap_err().to_string()
}

#[test]
fn a_missing_fua_write_tells_that_the_power_failed_before_later_marks() {
    let log = LogBuilder::new(512).mark("old").write(0, &[1; 512]).flush().mark("flushed");
    let log = log.write(512, &[1; 512]).mark("written").entry(Flags::FUA, 1024, &[1; 512]);
    let history = history(&log.mark("forced").write(0, &[2; 512]).mark("dm-log-writes-end"));
    let last = |name: &str| {
        let (epoch, full) = history.expanded(&name.parse().unwrap()).unwrap();
        let mark = history.last_mark(&epoch, &full).map(|(_, text)| text.to_string());
        mark.unwrap_or_default()
    };
    assert_eq!(last("E0"), "old");
    assert_eq!(last("E3"), "written", "the writes may be missing although the mark was made");
    assert_eq!(last("E3:s=1"), "written");
    assert_eq!(last("E3:s=11"), "forced");
    assert_eq!(last("E3:s=111"), "forced", "the mark at the end of a log promises nothing");
    assert_eq!(last("E3:s=011"), "forced");
}

/// A checker that goes where what it reads sends it. What it reads is all that it knows.
fn wander(disk: &[u8]) -> (Vec<ByteRange>, bool) {
    let (mut read, mut at, mut known) = (Vec::new(), 0, 7);
    for _ in 0..6 {
        let range = ByteRange { offset: at, len: 1024.min(SIZE - at) };
        read.push(range);
        let bytes = &disk[range.offset as usize..range.end() as usize];
        known = bytes.iter().fold(known, |known: u64, byte| {
            (known ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        at = known / 512 % (SIZE / 512) * 512;
    }
    (read, !known.is_multiple_of(4))
}

#[test]
fn a_state_that_is_alike_has_the_same_verdict() {
    let mut alike = 0;
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let base: Vec<u8> = (0..SIZE / 512).flat_map(|_| [rng.below(3) as u8; 512]).collect();
        let (history, disk) = (history(&random_log(&mut rng, 80)), node(base.clone()));
        let mut prints = Fingerprints::new(&history, &disk).unwrap();
        for epoch in history.epochs() {
            let mut answers = Answers::new(Arc::new(prints.epoch(&epoch).unwrap()));
            for _ in 0..20 {
                let name = random_state(&mut rng, &history, &epoch);
                let (read, is_good) = wander(&model(&base, &history, &name));
                if answers.has(&name, 0) {
                    assert!(is_good, "seed {seed}: {name}");
                    alike += 1;
                } else if is_good {
                    answers.learn(&name, 0, &read);
                    assert!(answers.has(&name, 0), "seed {seed}: {name}");
                    assert!(!answers.has(&name, 1), "another promise is another question");
                }
            }
        }
    }
    assert!(alike > 1000, "hardly any are alike: {alike}");
}

#[test]
fn what_a_checker_has_written_itself_is_not_looked_at() {
    let log = LogBuilder::new(512).write(512, &[1; 1024]);
    let history = Arc::new(history(&log));
    let mut disk = disk::StateDisk::new(history, node(vec![0; SIZE as usize]));
    disk.show(&"E0:s=1".parse().unwrap()).unwrap();
    let range = |offset, len| ByteRange { offset, len };
    disk.read(range(0, 100)).unwrap();
    disk.write(1024, &[2; 1024]).unwrap();
    disk.read(range(512, 2048)).unwrap();
    assert_eq!(disk.looked_at(), [range(0, 1024), range(2048, 512)]);
    disk.show(&"E0".parse().unwrap()).unwrap();
    assert_eq!(disk.looked_at(), []);
}

/// A checker that meets an error has looked there, and its verdict is none.
#[test]
fn what_cannot_be_read_is_told() {
    let log = LogBuilder::new(512).write(0, &[1; 512]);
    let file = SimFile::from_bytes("base.img", vec![0; SIZE as usize]);
    let mut disk = disk::StateDisk::new(Arc::new(history(&log)), node_of(file.clone()));
    disk.show(&"E0".parse().unwrap()).unwrap();
    file.fail(Fault { op: Some(SimOp::Read), after: 0, errno: libc::EIO, for_good: true });
    let range = ByteRange { offset: 4096, len: 512 };
    disk.read(range).unwrap_err();
    assert_eq!(disk.looked_at(), [range]);
    assert!(disk.take_failure().is_some() && disk.take_failure().is_none());
}

/// A base and a log of which the host reads whole blocks only, and writes that end within these.
#[test]
fn what_ends_within_a_block_of_base_or_log_is_read() {
    let mut rng = Rng::new(7);
    let content: Vec<u8> = (0..SIZE / 512).flat_map(|_| [rng.below(200) as u8; 512]).collect();
    let blocks = Alignment { request: 4096, memory: 512 };
    let large =
        LogBuilder::new(4096).write(4096, &content[..8192]).write(16384, &content[512..4608]);
    let small = LogBuilder::new(512).write(4096 + 512, &[1; 512]).write(8192 - 1024, &[2; 2048]);
    for (log, of_log, names) in [
        (large, blocks, &["E0:s=1,torn=1@512", "E0:s=1,torn=1@-4608", "E1:s=1,torn=1@-512"][..]),
        (small, Alignment::NONE, &["E0", "E1", "E0:s=01", "E0:s=11,torn=2@-512"]),
    ] {
        let file = SimFile::with_alignment("w.log", log.finish(), of_log);
        let history = Arc::new(history_of(file, SIZE));
        let below = node_of(SimFile::with_alignment("base.img", content.clone(), blocks));
        let mut disk = disk::StateDisk::new(Arc::clone(&history), below.clone());
        for name in names {
            let name: StateName = name.parse().unwrap();
            let expected = model(&content, &history, &name);
            disk.show(&name).unwrap();
            let all = ByteRange { offset: 0, len: SIZE };
            assert!(disk.read(all).unwrap() == expected, "{name}");
            let state = CrashState::new(Arc::clone(&history), below.clone(), &name).unwrap();
            let node = base(Arc::new(state));
            let buf = AlignedBuf::zeroed(SIZE as usize, 4096);
            block_on(node.read(0, buf.buffers())).unwrap();
            assert!(buf.to_vec() == expected, "{name}");
        }
    }
}
