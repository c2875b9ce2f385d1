//! The filter on simulated files: what ends up in the log, and what is left of it when something
//! fails, the process is killed or the power goes.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::ErrorKind;
use crate::block::{FormatDriver, Node, NodeOptions};
use crate::crash::enumerate::Reach;
use crate::crash::simulated::Simulation;
use crate::formats::addcow::{self, AddCow, Backing, Header};
use crate::formats::raw::Raw;
use crate::io::sim::{Fault, Rng, Sim, SimFile, SimOp, SimTask};
use crate::io::{AlignedBuf, block_on};
use crate::write_log::sidecar::{ImageIdentity, Sidecar};
use crate::write_log::{Entry, Kind, Log, LogBuilder, Mark};

mod existing;

/// Size of the disk, in bytes.
const SIZE: u64 = 64 << 10;
const SECTOR: u64 = 512;

/// A disk, its log and its sidecar.
#[derive(Clone)]
struct Bed {
    disk: SimFile,
    log: SimFile,
    sidecar: SimFile,
    /// A directory for the notes of what is under way.
    state: Rc<tempfile::TempDir>,
}

impl Bed {
    fn new() -> Bed {
        Bed {
            state: Rc::new(tempfile::tempdir_in("/dev/shm").unwrap()),
            disk: SimFile::from_bytes("disk", vec![0; SIZE as usize]),
            log: SimFile::new("w.log"),
            sidecar: SimFile::new("w.log.sidecar"),
        }
    }

    /// What another process finds after this one was killed.
    fn after_kill(&self) -> Bed {
        Bed {
            disk: SimFile::from_bytes("disk", self.disk.volatile()),
            log: SimFile::from_bytes("w.log", self.log.volatile()),
            sidecar: SimFile::from_bytes("w.log.sidecar", self.sidecar.volatile()),
            state: Rc::clone(&self.state),
        }
    }

    fn subject(&self) -> Subject {
        let image = ImageIdentity { file: (1, 2), born_ns: 3, path: "/disks/disk".into() };
        let raw = Raw::open(Arc::new(self.disk.clone()), false).unwrap();
        let notes = Some(self.state.path().join("notes"));
        Subject { below: Arc::new(raw), image, file: None, is_raw: true, notes, block_size: None }
    }

    fn try_open(&self, settings: Settings) -> Result<(WriteLog, Began)> {
        let (log, sidecar) = (self.log.clone(), self.sidecar.clone());
        let opening = open(self.subject(), Arc::new(log), Arc::new(sidecar), settings);
        // Also called from within `block_on`.
        Sim::new(0).block_on(opening)
    }

    fn open(&self) -> WriteLog {
        self.try_open(Settings::default()).unwrap().0
    }

    /// The entries that the superblock counts.
    fn entries(&self) -> Vec<(Entry, Mark)> {
        entries_of(&self.log.volatile())
    }

    /// The entries as short words: `W3+2` (write of two sectors at sector 3), `D…`, `F`, `M:text`.
    fn words(&self) -> Vec<String> {
        self.entries().iter().map(|(entry, mark)| word(entry, mark)).collect()
    }
}

fn entries_of(log: &[u8]) -> Vec<(Entry, Mark)> {
    // Also called from within `block_on`.
    Sim::new(0).block_on(async {
        let log = Log::open(Arc::new(SimFile::from_bytes("w.log", log.to_vec()))).await.unwrap();
        let mut walk = log.walk();
        let mut found = Vec::new();
        while let Some(entry) = walk.next().await.unwrap() {
            found.push((entry, walk.mark().clone()));
        }
        found
    })
}

fn word(entry: &Entry, mark: &Mark) -> String {
    let place = format!("{}+{}", entry.sector(), entry.sectors());
    match entry.kind() {
        Kind::Write if entry.flags.has(Flags::FUA) => format!("U{place}"),
        Kind::Write => format!("W{place}"),
        Kind::Discard => format!("D{place}"),
        Kind::Flush => "F".into(),
        Kind::Mark => format!("M:{mark}"),
    }
}

/// The disk that the first `count` entries make of zeros.
fn replay(log: &[u8], count: usize) -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    for (entry, _) in entries_of(log).iter().take(count) {
        let target = &mut disk[entry.target.offset as usize..entry.target.end() as usize];
        match entry.data() {
            Some(data) => {
                target.copy_from_slice(&log[data.offset as usize..data.end() as usize]);
            }
            None => target.fill(0),
        }
    }
    disk
}

fn data(byte: u8, sectors: u64) -> Buffers {
    AlignedBuf::from_slice(&vec![byte; (sectors * SECTOR) as usize], 512).buffers()
}

fn sectors(first: u64, count: u64) -> ByteRange {
    ByteRange { offset: first * SECTOR, len: count * SECTOR }
}

async fn write(filter: &WriteLog, sector: u64, byte: u8, count: u64) -> Result<()> {
    filter.write(sector * SECTOR, data(byte, count), false).await
}

#[test]
fn each_kind_of_request_is_logged_as_the_format_has_it() {
    let bed = Bed::new();
    let filter = bed.open();
    assert_eq!(bed.words(), [""; 0]);
    block_on(async {
        write(&filter, 3, 0xab, 2).await.unwrap();
        filter.discard(sectors(8, 3)).await.unwrap();
        filter.write_zeroes(sectors(16, 40), true).await.unwrap();
        assert_eq!(bed.words(), [""; 0], "counted before a flush");
        filter.flush().await.unwrap();
        assert_eq!(bed.words(), ["W3+2", "D8+3", "W16+40", "F"]);
        filter.write(SECTOR, data(9, 1), true).await.unwrap();
        assert_eq!(bed.words().len(), 5, "a FUA write is durable by itself");
        filter.mark(b"here").await.unwrap();
        assert_eq!(bed.words().len(), 6);
        filter.close().await.unwrap();
    });
    let expected = ["W3+2", "D8+3", "W16+40", "F", "U1+1", "M:here", "M:dm-log-writes-end"];
    assert_eq!(bed.words(), expected);
    assert_eq!(replay(&bed.log.volatile(), 99), bed.disk.volatile());
    assert_eq!(bed.log.durable(), bed.log.volatile());
}

/// A discard on an overlay shows what is below again, and a replay knows of nothing below.
#[test]
fn a_discard_leaves_zeros_on_an_overlay_as_well() {
    let bed = Bed::new();
    let base = Raw::open(Arc::new(SimFile::from_bytes("base", vec![7; SIZE as usize])), true);
    let file = SimFile::new("x.add-cow");
    let header = Header { backing: Some("base".into()), image: "disk".into() };
    let options = addcow::OpenOptions {
        read_only: false,
        image: Arc::new(bed.disk.clone()),
        backing: Backing::Node(Node::new(Arc::new(base.unwrap()), NodeOptions::default())),
        backing_format: None,
        keep: None,
    };
    let filter = Sim::new(0).block_on(async {
        addcow::create::create(&file, &header, SIZE).await.unwrap();
        let overlay = AddCow::open(Arc::new(file.clone()), options).await.unwrap();
        let below: Arc<dyn Driver> = Arc::new(FormatDriver::new(overlay).unwrap());
        let subject = Subject { below, is_raw: false, ..bed.subject() };
        let (log, sidecar) = (Arc::new(bed.log.clone()), Arc::new(bed.sidecar.clone()));
        open(subject, log, sidecar, Settings::default()).await.unwrap().0
    });
    let buf = AlignedBuf::zeroed(SIZE as usize, 512);
    block_on(async {
        filter.discard(sectors(5, 90)).await.unwrap();
        filter.read(0, buf.buffers()).await.unwrap();
    });
    let mut expected = vec![7; SIZE as usize];
    expected[5 * 512..95 * 512].fill(0);
    assert!(buf.to_vec() == expected);
}

#[test]
fn the_log_has_the_bytes_that_the_format_demands() {
    let bed = Bed::new();
    let filter = bed.try_open(Settings { sector_size: Some(4096), ..Settings::default() });
    let filter = filter.unwrap().0;
    block_on(async {
        filter.write(4096, data(7, 16), false).await.unwrap();
        filter.flush().await.unwrap();
        filter.discard(ByteRange { offset: 8192, len: 4096 }).await.unwrap();
        filter.close().await.unwrap();
    });
    let same = LogBuilder::new(4096)
        .write(4096, &[7; 8192])
        .flush()
        .discard(ByteRange { offset: 8192, len: 4096 })
        .mark("dm-log-writes-end");
    assert_eq!(bed.log.volatile(), same.finish());
    assert_eq!(filter.limits().request_alignment, 4096);
}

#[test]
fn long_writes_become_several_entries_and_long_marks_are_cut() {
    let bed = Bed::new();
    let disk = SimFile::from_bytes("disk", vec![0; 8 << 20]);
    let bed = Bed { disk, ..bed };
    let filter = bed.open();
    let len = MAX_DATA + 4096;
    let bytes: Vec<u8> = (0..len).map(|i| (i >> 9) as u8).collect();
    block_on(async {
        let buf = AlignedBuf::from_slice(&bytes, 512).buffers();
        filter.write(1024, buf, false).await.unwrap();
        filter.mark(&[b'x'; 600]).await.unwrap();
        // Two bytes each, of which only one would fit.
        filter.mark("ü".repeat(300).as_bytes()).await.unwrap();
    });
    let first = MAX_DATA / SECTOR;
    let marks = ["x".repeat(479), "ü".repeat(239)].map(|text| format!("M:{text}"));
    let writes = [format!("W2+{first}"), format!("W{}+8", first + 2)];
    assert_eq!(bed.words(), [writes, marks].concat());
    assert_eq!(bed.disk.volatile()[1024..1024 + len as usize], bytes);
}

/// Polls a future once.
fn poll<F: Future + ?Sized>(future: &mut std::pin::Pin<Box<F>>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

/// Polls futures and performs operations of `sim` until the future is over.
fn finish<F: Future + ?Sized>(sim: &Sim, future: &mut std::pin::Pin<Box<F>>) -> F::Output {
    for _ in 0..1000 {
        if let Poll::Ready(out) = poll(future) {
            return out;
        }
        sim.step();
    }
    panic!("it does not end");
}

#[test]
fn a_write_in_flight_stands_behind_the_flush_that_did_not_wait_for_it() {
    for (order, expected) in [
        (Order::Strict, ["W1+1", "F", "W2+1", "M:end"]),
        (Order::Completion, ["W1+1", "W2+1", "F", "M:end"]),
    ] {
        let bed = Bed::new();
        let filter = bed.try_open(Settings { order, ..Settings::default() }).unwrap().0;
        block_on(write(&filter, 1, 1, 1)).unwrap();
        let sim = Sim::new(1);
        sim.attach(&bed.disk);
        let mut late: Fut<'_, ()> = Box::pin(write(&filter, 2, 2, 1));
        assert!(poll(&mut late).is_pending());
        // Submitted while the write is in flight; the write ends first.
        let mut flush = filter.flush();
        assert!(poll(&mut flush).is_pending());
        let started = bed.disk.count(SimOp::Write);
        while bed.disk.count(SimOp::Write) == started {
            // The scheduler may choose the flush; then the orders do not differ.
            sim.step();
        }
        finish(&sim, &mut late).unwrap();
        finish(&sim, &mut flush).unwrap();
        sim.detach(&bed.disk);
        block_on(filter.mark(b"end")).unwrap();
        if order == Order::Strict {
            assert_eq!(bed.words(), expected, "{order:?}");
        } else {
            let words = bed.words();
            assert!(words == expected || words[1] == "F", "{words:?}");
        }
    }
}

#[test]
fn the_copy_that_is_logged_is_the_copy_that_is_stored() {
    let bed = Bed::new();
    let filter = bed.open();
    let sim = Sim::new(1);
    sim.attach(&bed.disk);
    sim.attach(&bed.log);
    let guest = data(1, 1);
    let mut request = filter.write(0, guest.clone(), false);
    for byte in 2..50 {
        let over = poll(&mut request).is_ready();
        guest.copy_from_slice(&[byte; 512]);
        if over {
            break;
        }
        sim.step();
    }
    sim.detach(&bed.disk);
    sim.detach(&bed.log);
    drop(request);
    block_on(filter.mark(b"end")).unwrap();
    assert_eq!(bed.words(), ["W0+1", "M:end"]);
    assert_eq!(bed.disk.volatile()[..512], [1; 512]);
    assert_eq!(replay(&bed.log.volatile(), 1), bed.disk.volatile());
}

#[test]
fn what_fails_on_the_disk_is_not_logged() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(async {
        for op in [SimOp::Write, SimOp::WriteZeroes, SimOp::Discard] {
            bed.disk.fail(Fault { op: Some(op), after: 0, errno: libc::EIO, for_good: true });
        }
        write(&filter, 1, 1, 1).await.unwrap_err();
        filter.write_zeroes(sectors(1, 1), true).await.unwrap_err();
        filter.discard(sectors(1, 1)).await.unwrap_err();
        bed.disk.heal();
        write(&filter, 2, 2, 1).await.unwrap();
        filter.flush().await.unwrap();
    });
    assert_eq!(bed.words(), ["W2+1", "F"]);
}

#[test]
fn a_flush_that_fails_becomes_a_mark() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(async {
        write(&filter, 1, 1, 1).await.unwrap();
        bed.disk.fail(Fault {
            op: Some(SimOp::Flush),
            after: 0,
            errno: libc::EIO,
            for_good: false,
        });
        filter.flush().await.unwrap_err();
        write(&filter, 2, 2, 1).await.unwrap();
        filter.flush().await.unwrap();
    });
    let words = bed.words();
    assert_eq!(words.len(), 4);
    assert!(words[1].starts_with("M:flush failed: ") && words[3] == "F", "{words:?}");
}

/// A later one that fails is no end of a flush that is still under way.
#[test]
fn a_flush_that_fails_says_nothing_of_one_before_it() {
    let bed = Bed::new();
    let filter = bed.open();
    let sim = Sim::new(1);
    sim.attach(&bed.disk);
    let mut first = filter.flush();
    while sim.pending() == 0 {
        assert!(poll(&mut first).is_pending());
    }
    sim.detach(&bed.disk);
    bed.disk.fail(Fault { op: Some(SimOp::Flush), after: 0, errno: libc::EIO, for_good: false });
    block_on(filter.flush()).unwrap_err();
    assert_eq!(filter.entries(), (0, 0), "a flush that is not over may be counted");
    finish(&sim, &mut first).unwrap();
    assert_eq!(filter.entries(), (2, 2));
    assert_eq!(bed.words()[0], "F");
}

#[test]
fn a_full_log_fails_requests_and_loses_nothing() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(async {
        write(&filter, 1, 1, 1).await.unwrap();
        filter.flush().await.unwrap();
        let full = Fault { op: Some(SimOp::Write), after: 0, errno: libc::ENOSPC, for_good: true };
        bed.log.fail(full);
        let err = write(&filter, 2, 2, 1).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace);
        assert!(err.to_string().starts_with("w.log: "), "{err}");
        filter.discard(sectors(9, 1)).await.unwrap_err();
        let err = filter.flush().await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::NoSpace);
        assert_eq!(bed.words(), ["W1+1", "F"]);
        // There is room again.
        bed.log.heal();
        write(&filter, 3, 3, 1).await.unwrap();
        filter.flush().await.unwrap();
    });
    assert_eq!(bed.words(), ["W1+1", "F", "W3+1", "F"]);
    assert_eq!(replay(&bed.log.volatile(), 4)[3 * 512..4 * 512], [3; 512]);
}

/// A flush that had no place in the log has not begun, so the node goes on; one that failed on the disk
/// or could not be counted may have lost something.
#[test]
fn a_flush_without_a_place_in_the_log_has_lost_nothing() {
    let bed = Bed::new();
    let node = Node::new(Arc::new(bed.open()), NodeOptions::default());
    block_on(async {
        bed.log.fail(Fault {
            op: Some(SimOp::Write),
            after: 0,
            errno: libc::ENOSPC,
            for_good: true,
        });
        node.flush().await.unwrap_err();
        assert!(!node.is_poisoned());
        bed.log.heal();
        node.flush().await.unwrap();
        bed.disk.fail(Fault {
            op: Some(SimOp::Flush),
            after: 0,
            errno: libc::EIO,
            for_good: false,
        });
        node.flush().await.unwrap_err();
        assert!(node.is_poisoned());
    });
}

/// Nor does it say anything of a flush before it that is still under way.
#[test]
fn a_flush_without_a_place_in_the_log_is_not_the_end_of_others() {
    let bed = Bed::new();
    let filter = bed.open();
    let sim = Sim::new(1);
    sim.attach(&bed.disk);
    let mut flush = filter.flush();
    assert!(poll(&mut flush).is_pending());
    let full = Fault { op: Some(SimOp::Write), after: 0, errno: libc::ENOSPC, for_good: false };
    bed.log.fail(full);
    block_on(filter.flush()).unwrap_err();
    assert_eq!(filter.entries(), (0, 0), "a flush that is not over may be counted");
    finish(&sim, &mut flush).unwrap();
    assert_eq!(filter.entries(), (1, 1));
    assert_eq!(bed.words(), ["F"]);
}

#[test]
fn a_log_that_cannot_be_made_durable_counts_nothing_more() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(async {
        filter.flush().await.unwrap();
        bed.log.fail(Fault { op: Some(SimOp::Flush), after: 0, errno: libc::EIO, for_good: false });
        write(&filter, 1, 1, 1).await.unwrap();
        let err = filter.flush().await.unwrap_err().to_string();
        assert!(err.starts_with("w.log: writing the superblock"), "{err}");
        let err = filter.flush().await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Poisoned);
    });
    assert_eq!(bed.words(), ["F"]);
}

#[test]
fn the_superblock_is_written_now_and_then() {
    let bed = Bed::new();
    let filter = bed.try_open(Settings { interval: 3, ..Settings::default() }).unwrap().0;
    let counts: Vec<usize> = block_on(async {
        let mut counts = Vec::new();
        for i in 0..7 {
            write(&filter, i, 1, 1).await.unwrap();
            counts.push(bed.words().len());
        }
        counts
    });
    assert_eq!(counts, [0, 0, 3, 3, 3, 6, 6]);
}

#[test]
fn a_flush_that_was_interrupted_promised_nothing() {
    let bed = Bed::new();
    let filter = bed.open();
    let sim = Sim::new(1);
    sim.attach(&bed.disk);
    let mut flush = filter.flush();
    for _ in 0..5 {
        assert!(poll(&mut flush).is_pending());
    }
    let next = bed.after_kill();
    let (filter, began) = next.try_open(Settings::default()).unwrap();
    assert_eq!(began, Began::After { entries: 1, counted_in: 1 });
    block_on(filter.flush()).unwrap();
    assert_eq!(next.words(), ["M:flush interrupted", "F"]);
}

#[test]
fn the_sidecar_tells_the_order_and_the_queue() {
    let bed = Bed::new();
    let filter = bed.open();
    origin::set_queue(Some(5));
    block_on(write(&filter, 1, 1, 1)).unwrap();
    origin::set_queue(None);
    block_on(async {
        filter.write_zeroes(sectors(2, 2), true).await.unwrap();
        filter.flush().await.unwrap();
        let log = Log::open(Arc::new(bed.log.clone())).await.unwrap();
        let mut sidecar = Sidecar::open(Arc::new(bed.sidecar.clone())).await.unwrap();
        assert_eq!(sidecar.header().disk_size, SIZE);
        let mut walk = log.walk();
        let mut seen = Vec::new();
        while let Some(entry) = walk.next().await.unwrap() {
            let record = sidecar.record(entry.number).await.unwrap().unwrap();
            let whole = crate::write_log::sidecar::matches(&log, &entry, &record).await.unwrap();
            assert!(whole, "{record:?}");
            seen.push((record.submitted, record.completed, record.queue));
        }
        assert_eq!(seen, [(0, 1, Some(5)), (2, 3, None), (4, 5, None)]);
        assert_eq!(sidecar.record(3).await.unwrap(), None);
    });
}

/// A write to a sector, as the guest knows it. Submissions and completions are numbered.
#[derive(Clone, Copy, Debug)]
struct Access {
    byte: u8,
    submitted: u64,
    completed: Option<u64>,
}

/// What a random guest has done.
struct History {
    /// For each sector the writes to it, oldest submission first.
    sectors: Vec<Vec<Access>>,
    events: u64,
}

impl Default for History {
    fn default() -> Self {
        let zeros = Access { byte: 0, submitted: 0, completed: Some(0) };
        History { sectors: vec![vec![zeros]; (SIZE / SECTOR) as usize], events: 0 }
    }
}

impl History {
    fn submit(&mut self, range: ByteRange, byte: u8) -> u64 {
        self.events += 1;
        let access = Access { byte, submitted: self.events, completed: None };
        self.in_range(range).for_each(|sector| sector.push(access));
        access.submitted
    }

    fn complete(&mut self, range: ByteRange, submitted: u64) {
        self.events += 1;
        let completed = Some(self.events);
        for sector in self.in_range(range) {
            let access = sector.iter_mut().find(|access| access.submitted == submitted);
            access.expect("submitted before").completed = completed;
        }
    }

    fn in_range(&mut self, range: ByteRange) -> impl Iterator<Item = &mut Vec<Access>> {
        let sectors = (range.offset / SECTOR) as usize..(range.end() / SECTOR) as usize;
        self.sectors[sectors].iter_mut()
    }
}

/// Whether a sector with these accesses may hold `byte`, given that nothing completed is lost:
/// somebody wrote it, and nobody completed another write that began after that had ended.
fn is_possible(accesses: &[Access], byte: u8) -> bool {
    let superseded = |one: &Access| {
        let later = |other: &&Access| one.completed.is_some_and(|end| other.submitted > end);
        accesses.iter().filter(later).any(|other| other.completed.is_some())
    };
    accesses.iter().any(|access| access.byte == byte && !superseded(access))
}

/// A guest that writes, discards and flushes at random, several requests at a time. Each write has
/// a byte of its own. What is completed is noted in `history`; flushes note how many entries the
/// log must count from then on.
fn guest<'a>(
    filter: &'a WriteLog,
    seed: u64,
    history: &'a RefCell<History>,
    flushed: &'a Cell<u64>,
) -> Vec<SimTask<'a>> {
    let next = Rc::new(Cell::new(1));
    (0..4)
        .map(|lane| {
            let (next, mut rng) = (Rc::clone(&next), Rng::new(seed * 8 + lane));
            Box::pin(async move {
                for _ in 0..12 {
                    let byte: u8 = next.get();
                    let first = rng.below(16);
                    let count = 1 + rng.below(4);
                    let range = sectors(first, count);
                    let submit = |byte| history.borrow_mut().submit(range, byte);
                    let complete = |submitted| history.borrow_mut().complete(range, submitted);
                    match rng.below(8) {
                        0 | 1 => {
                            filter.flush().await.unwrap();
                            flushed.set(flushed.get().max(filter.entries().1));
                        }
                        2 => {
                            let submitted = submit(0);
                            filter.write_zeroes(range, true).await.unwrap();
                            complete(submitted);
                        }
                        _ => {
                            next.set(byte + 1);
                            let submitted = submit(byte);
                            write(filter, first, byte, count).await.unwrap();
                            complete(submitted);
                        }
                    }
                }
            }) as SimTask<'a>
        })
        .collect()
}

#[test]
fn a_replay_makes_the_disk_whatever_the_order_of_the_host() {
    for seed in 0..200 {
        let bed = Bed::new();
        let filter = bed.open();
        let (history, flushed) = (RefCell::default(), Cell::new(0));
        let sim = Sim::new(seed);
        for file in [&bed.disk, &bed.log, &bed.sidecar] {
            sim.attach(file);
        }
        sim.run(guest(&filter, seed, &history, &flushed));
        for file in [&bed.disk, &bed.log, &bed.sidecar] {
            sim.detach(file);
        }
        block_on(filter.close()).unwrap();
        let log = bed.log.volatile();
        assert_eq!(replay(&log, usize::MAX), bed.disk.volatile(), "seed {seed}");
    }
}

#[test]
fn killed_anywhere_the_log_holds_what_was_completed() {
    let (mut counted_in, mut changed) = (0, 0);
    for seed in 0..400 {
        let bed = Bed::new();
        let filter = bed.open();
        let (history, flushed) = (RefCell::default(), Cell::new(0));
        let sim = Sim::new(seed);
        for file in [&bed.disk, &bed.log, &bed.sidecar] {
            sim.attach(file);
        }
        let end = 1 + Rng::new(seed).below(400);
        sim.run_until(guest(&filter, seed, &history, &flushed), |step| step >= end);
        // Requests that were handed to the host may still happen, or not.
        if seed % 2 == 0 {
            sim.drain();
        }
        assert!(entries_of(&bed.log.volatile()).len() as u64 >= flushed.get(), "seed {seed}");
        // Whatever is in flight, it is not taken for somebody else's; what is somebody else's, is.
        let next = bed.after_kill();
        changed += u64::from(next.is_changed_where_nothing_was_under_way(seed));
        let (filter, began) = next.try_open(Settings::default()).unwrap();
        let Began::After { counted_in: some, .. } = began else { panic!("seed {seed}: {began:?}") };
        counted_in += some;
        block_on(filter.close()).unwrap();
        let log = next.log.volatile();
        let replayed = replay(&log, usize::MAX);
        let disk = next.disk.volatile();
        for (sector, accesses) in history.borrow().sectors.iter().enumerate() {
            let at = sector * 512;
            let (logged, stored) = (replayed[at], disk[at]);
            let case = format!("seed {seed}, sector {sector}: {accesses:?}");
            assert!(is_possible(accesses, logged), "{logged} is logged, {case}");
            assert!(is_possible(accesses, stored), "{stored} is stored, {case}");
            // They may differ only where a request was in flight.
            let in_flight = accesses.iter().any(|access| access.completed.is_none());
            assert!(in_flight || logged == stored, "{logged} logged, {stored} stored, {case}");
        }
    }
    assert!(counted_in > 1000, "only {counted_in} entries were counted in: nothing was tested");
    assert!(changed > 200, "a change was noticed {changed} times only");
}

impl Bed {
    /// Changes a sector that is logged and where nothing was under way, if there is one, and expects
    /// that somebody notices; puts it back again.
    fn is_changed_where_nothing_was_under_way(&self, seed: u64) -> bool {
        let sidecar = Sidecar::open(Arc::new(self.sidecar.clone()));
        let session = Sim::new(0).block_on(sidecar).unwrap().header().session;
        let left = under_way::Left::read(&self.state.path().join("notes"), session).unwrap();
        let is_quiet = |entry: &Entry| !left.ranges.iter().any(|r| r.overlaps(&entry.target));
        let entries = self.entries();
        let quiet =
            entries.iter().rev().find(|(entry, _)| !entry.target.is_empty() && is_quiet(entry));
        let Some((entry, _)) = quiet else { return false };
        let at = entry.target.end() - 1;
        let mut disk = self.disk.volatile();
        disk[at as usize] ^= 0x80;
        let other = Bed { disk: SimFile::from_bytes("disk", disk), ..self.clone() };
        let before = (other.log.volatile(), other.sidecar.volatile());
        let err = other.try_open(Settings::default()).unwrap_err().to_string();
        assert!(err.contains(&format!("at byte {at} of the disk")), "seed {seed}: {err}");
        assert!(before == (other.log.volatile(), other.sidecar.volatile()), "a refusal changed it");
        true
    }
}

#[test]
fn a_disk_that_somebody_else_has_changed_is_not_recorded_on() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(async {
        write(&filter, 1, 1, 4).await.unwrap();
        filter.flush().await.unwrap();
        write(&filter, 2, 2, 1).await.unwrap();
        filter.discard(sectors(3, 1)).await.unwrap();
    });
    // An older disk, as it was when the log was begun.
    let other = bed.after_kill();
    let zeros = Bed { disk: Bed::new().disk, ..other.clone() };
    let err = zeros.try_open(Settings::default()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidArgument);
    let text = err.to_string();
    assert!(text.contains("/disks/disk was changed while nobody recorded"), "{text}");
    assert!(text.contains("at byte 1024 of the disk there is not what entry 2 wrote"), "{text}");
    assert!(text.contains("--log-append") && text.contains("--log-overwrite"), "{text}");
    // What was overwritten later, or lies past the end of a disk that is smaller now, is no matter.
    let shrunk = bed.disk.volatile()[..3 * 512].to_vec();
    let shrunk = Bed { disk: SimFile::from_bytes("disk", shrunk), ..bed.after_kill() };
    shrunk.try_open(Settings::default()).unwrap();
    let append = Settings { existing: Existing::Append, ..Settings::default() };
    zeros.try_open(append).unwrap();
}

/// The log says nothing of it, so the disk may be what it likes there.
#[test]
fn what_was_cut_off_and_what_failed_is_not_compared() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(async {
        write(&filter, 0, 1, 128).await.unwrap();
        filter.resize(SIZE / 2).await.unwrap();
        filter.resize(SIZE).await.unwrap();
        bed.log.fail(Fault {
            op: Some(SimOp::Write),
            after: 0,
            errno: libc::ENOSPC,
            for_good: true,
        });
        write(&filter, 5, 5, 1).await.unwrap_err();
        bed.log.heal();
        bed.disk.fail(Fault {
            op: Some(SimOp::Write),
            after: 0,
            errno: libc::EIO,
            for_good: false,
        });
        write(&filter, 7, 7, 1).await.unwrap_err();
    });
    let mut disk = bed.disk.volatile();
    assert_eq!((disk[5 * 512], disk[SIZE as usize - 1]), (5, 0));
    disk[7 * 512] = 7;
    let next = Bed { disk: SimFile::from_bytes("disk", disk), ..bed.after_kill() };
    assert_eq!(
        next.try_open(Settings::default()).unwrap().1,
        Began::After { entries: 1, counted_in: 1 }
    );
}

#[test]
fn a_power_cut_leaves_a_log_of_all_that_was_flushed() {
    for seed in 0..300 {
        let bed = Bed::new();
        let filter = bed.open();
        let (history, flushed) = (RefCell::default(), Cell::new(0));
        let sim = Sim::new(seed);
        for file in [&bed.disk, &bed.log, &bed.sidecar] {
            sim.attach(file);
        }
        let end = 1 + Rng::new(seed).below(400);
        sim.run_until(guest(&filter, seed, &history, &flushed), |step| step >= end);
        let whole = bed.log.volatile();
        let left = bed.log.power_cut(seed);
        let entries = entries_of(&left);
        assert!(entries.len() as u64 >= flushed.get(), "seed {seed}");
        // Each entry that is counted is what was written, to the last byte.
        let end = entries.last().map_or(512, |(entry, _)| entry.end_position() as usize);
        assert!(left[512..end] == whole[512..end], "seed {seed}: a counted entry is torn");
    }
}

/// Not drawn by lot: all states that a cut could leave of disk, log and sidecar together.
#[test]
fn every_power_cut_leaves_a_log_of_all_that_was_flushed() {
    let reach = Reach { reorder: true, torn: 512 | 4096, all_subsets: 5, samples: 5, seed: 1 };
    let mut states = 0;
    for seed in 0..2 {
        let bed = Bed::new();
        let filter = bed.open();
        let (history, flushed) = (RefCell::default(), Cell::new(0));
        let sim = Sim::new(seed);
        let files = [&bed.disk, &bed.log, &bed.sidecar];
        files.iter().for_each(|file| sim.attach(file));
        let mut simulation = Simulation::new(&files, reach);
        sim.run_until(guest(&filter, seed, &history, &flushed), |step| {
            let whole = bed.log.volatile();
            simulation.explore(flushed.get(), |left, state| {
                let what = format!("seed {seed}, step {step}, {state}");
                let (disk, log) = (left[0].volatile(), left[1].volatile());
                let entries = entries_of(&log);
                assert!(entries.len() as u64 >= flushed.get(), "{what}");
                let end = entries.last().map_or(512, |(entry, _)| entry.end_position() as usize);
                assert!(log[512..end] == whole[512..end], "{what}: a counted entry is torn");
                // The disk has all that stands before a flush in the log, or something newer.
                let last = entries.iter().rposition(|(entry, _)| entry.kind() == Kind::Flush);
                let replayed = replay(&log, last.unwrap_or(0));
                for (sector, accesses) in history.borrow().sectors.iter().enumerate() {
                    let (logged, stored) = (replayed[sector * 512], disk[sector * 512]);
                    let is_newer =
                        accesses.iter().position(|one| one.byte == logged).is_some_and(|at| {
                            let since = accesses[at].submitted;
                            let newer =
                                |other: &Access| other.completed.is_none_or(|end| end > since);
                            accesses.iter().any(|other| other.byte == stored && newer(other))
                        });
                    assert!(
                        logged == stored || is_newer,
                        "{what}: sector {sector} is {stored}, {logged} was flushed: {accesses:?}"
                    );
                }
            });
            false
        });
        states += simulation.states();
    }
    eprintln!("write log: {states} states");
    assert!(states > 2000, "too few states to mean anything: {states}");
}
