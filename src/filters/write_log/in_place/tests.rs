//! Writes in place, on real files in memory.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::task::{Context, Poll, Waker};

use rustix::fs::{MemfdFlags, SealFlags};

use super::*;
use crate::block::Submission;
use crate::block::driver::Driver;
use crate::filters::write_log::{Order, Settings, Subject, open};
use crate::formats::raw::Raw;
use crate::io::{AlignedBuf, Buffers, Fut, OpenOptions, block_on};
use crate::write_log::sidecar::{ImageIdentity, Sidecar};
use crate::write_log::{Kind, Log};

const SECTOR: u64 = 512;

/// A disk of 256 KiB, its log and its sidecar.
struct Bed {
    memory: [OwnedFd; 3],
    filter: Arc<WriteLog>,
}

fn host(fd: &OwnedFd) -> Arc<HostFile> {
    open_host(fd, false)
}

fn open_host(fd: &OwnedFd, direct: bool) -> Arc<HostFile> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let options = OpenOptions { write: true, direct, ..OpenOptions::default() };
    Arc::new(HostFile::open(&path, options).unwrap())
}

/// A file on a file system that takes direct I/O.
fn file_on_disk() -> OwnedFd {
    tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap().into()
}

impl Bed {
    /// All files in memory.
    fn new(settings: Settings) -> Bed {
        let memory = ["disk", "log", "sidecar"]
            .map(|name| rustix::fs::memfd_create(name, MemfdFlags::ALLOW_SEALING).unwrap());
        Bed::on(memory, [false; 2], settings)
    }

    /// All files on disk; image and log by direct I/O, if that is said of them.
    fn on_disk(direct: [bool; 2]) -> Bed {
        Bed::on([(); 3].map(|()| file_on_disk()), direct, Settings::default())
    }

    fn on(memory: [OwnedFd; 3], direct: [bool; 2], settings: Settings) -> Bed {
        rustix::fs::ftruncate(&memory[0], 256 << 10).unwrap();
        let disk = open_host(&memory[0], direct[0]);
        let log = open_host(&memory[1], direct[1]);
        let sidecar = host(&memory[2]);
        let subject = Subject {
            below: Arc::new(Raw::open(disk, false).unwrap()),
            image: ImageIdentity::default(),
            file: None,
            is_raw: true,
            notes: None,
            block_size: None,
        };
        let (filter, _) = block_on(open(subject, log, sidecar, settings)).unwrap();
        Bed { memory, filter: Arc::new(filter) }
    }

    fn lane(&self) -> Box<dyn InPlace> {
        Arc::clone(&self.filter).in_place().unwrap()
    }

    /// From now on one of the files takes no more writes.
    fn seal(&self, file: usize) {
        rustix::fs::fcntl_add_seals(&self.memory[file], SealFlags::WRITE).unwrap();
    }

    fn sector(&self, number: u64) -> u8 {
        let mut byte = [0];
        rustix::io::pread(&self.memory[0], &mut byte, number * SECTOR).unwrap();
        byte[0]
    }

    /// The log's entries as short words, after a flush. Each must be what its record says.
    fn words(&self) -> Vec<String> {
        block_on(self.filter.mark(b"end")).unwrap();
        block_on(async {
            let log = Log::open(host(&self.memory[1])).await.unwrap();
            let mut sidecar = Sidecar::open(host(&self.memory[2])).await.unwrap();
            let (mut walk, mut words) = (log.walk(), Vec::new());
            while let Some(entry) = walk.next().await.unwrap() {
                let record = sidecar.record(entry.number).await.unwrap().unwrap();
                let whole = crate::write_log::sidecar::matches(&log, &entry, &record).await;
                assert!(whole.unwrap(), "{record:?}");
                let mut byte = AlignedBuf::zeroed(1, 1);
                if let Some(data) = entry.data() {
                    log.file().read(data.offset, byte.buffers()).await.unwrap();
                }
                words.push(match entry.kind() {
                    Kind::Write => format!("W{}={}", entry.sector(), byte.as_slice()[0]),
                    Kind::Flush => "F".into(),
                    _ => continue,
                });
            }
            words
        })
    }
}

fn sectors(byte: u8, count: u64) -> Buffers {
    AlignedBuf::from_slice(&vec![byte; (count * SECTOR) as usize], 512).buffers()
}

fn write<'a>(lane: &'a mut dyn InPlace, first: u64, data: &Buffers) -> Attempt<'a> {
    let range = ByteRange { offset: first * SECTOR, len: data.len() };
    // SAFETY: `data` lives until the call is over.
    #[allow(unsafe_code)]
    lane.write(range, unsafe { Scattered::new(data.iovecs()) }, 3)
}

impl Bed {
    /// Has a write begun that the host is to perform: its token, and what is to be written where.
    #[track_caller]
    fn submit(&self, lane: &mut dyn InPlace, first: u64, data: &Buffers) -> Submitted {
        match write(lane, first, data) {
            Attempt::Submit(Submission { offset, data, token, .. }) => {
                Submitted { offset, data: data.to_vec(), token }
            }
            other => panic!("{other:?}"),
        }
    }

    /// What the host does with it.
    fn perform(&self, lane: &mut dyn InPlace, submitted: Submitted) {
        rustix::io::pwrite(&self.memory[0], &submitted.data, submitted.offset).unwrap();
        lane.written(submitted.token, true);
    }
}

struct Submitted {
    offset: u64,
    data: Vec<u8>,
    token: u32,
}

fn poll(future: &mut Fut<'_, ()>) -> Poll<Result<()>> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[track_caller]
fn settle(lane: &mut dyn InPlace) -> Result<()> {
    match lane.settle() {
        Settled::Done(result) => result,
        Settled::Later(_) => panic!("somebody else is writing"),
    }
}

#[test]
fn writes_are_on_the_image_at_once_and_in_the_log_when_settled() {
    let bed = Bed::new(Settings::default());
    let mut lane = bed.lane();
    let guest = sectors(1, 2);
    assert!(matches!(write(&mut *lane, 4, &guest), Attempt::Pending));
    // What the guest does to its memory meanwhile is of no interest.
    guest.copy_from_slice(&[9; 1024]);
    assert!(matches!(write(&mut *lane, 9, &sectors(2, 1)), Attempt::Pending));
    assert_eq!((bed.sector(4), bed.sector(9)), (1, 2));
    assert_eq!(bed.filter.entries().0, 0);
    settle(&mut *lane).unwrap();
    assert_eq!(bed.filter.entries().0, 2);
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["W4=1", "W9=2"]);
}

#[test]
fn a_flush_that_is_submitted_meanwhile_comes_first() {
    let bed = Bed::new(Settings::default());
    let mut lane = bed.lane();
    assert!(matches!(write(&mut *lane, 1, &sectors(1, 1)), Attempt::Pending));
    let mut flush = bed.filter.flush();
    let _ = poll(&mut flush);
    settle(&mut *lane).unwrap();
    block_on(flush).unwrap();
    assert_eq!(bed.words(), ["F", "W1=1"]);
}

#[test]
fn what_overlaps_is_logged_in_the_order_of_the_image() {
    let bed = Bed::new(Settings::default());
    let (mut lane, mut other) = (bed.lane(), bed.lane());
    assert!(matches!(write(&mut *lane, 0, &sectors(1, 4)), Attempt::Pending));
    // Of another queue, or by the other path.
    assert!(matches!(write(&mut *other, 3, &sectors(2, 2)), Attempt::NotNow));
    let mut slow = bed.filter.write(2 * SECTOR, sectors(3, 1), false);
    assert!(poll(&mut slow).is_pending());
    // Of its own.
    assert!(matches!(write(&mut *lane, 3, &sectors(4, 1)), Attempt::NotNow));
    assert_eq!(bed.sector(3), 1);
    settle(&mut *lane).unwrap();
    assert!(matches!(write(&mut *lane, 3, &sectors(4, 1)), Attempt::Pending));
    assert!(matches!(write(&mut *lane, 2, &sectors(5, 1)), Attempt::NotNow));
    block_on(slow).unwrap();
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["W0=1", "W2=3", "W3=4"]);
}

#[test]
fn what_fails_on_the_image_is_not_logged() {
    let bed = Bed::new(Settings::default());
    let mut lane = bed.lane();
    assert!(matches!(write(&mut *lane, 1, &sectors(1, 1)), Attempt::Pending));
    bed.seal(0);
    assert!(matches!(write(&mut *lane, 2, &sectors(2, 1)), Attempt::Failed(_)));
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["W1=1"]);
}

#[test]
fn what_cannot_be_logged_fails() {
    for file in [1, 2] {
        let bed = Bed::new(Settings::default());
        let mut lane = bed.lane();
        assert!(matches!(write(&mut *lane, 1, &sectors(1, 1)), Attempt::Pending));
        bed.seal(file);
        let err = settle(&mut *lane).unwrap_err().to_string();
        assert!(err.starts_with("/proc/self/fd/"), "{err}");
        assert_eq!(bed.filter.entries().0, 0);
        // Its range is free, and nothing of it is left to be settled.
        assert!(matches!(write(&mut *lane, 1, &sectors(1, 1)), Attempt::Pending));
    }
}

#[test]
fn a_batch_behind_a_run_that_is_being_written_completes_later() {
    let bed = Bed::new(Settings::default());
    let mut lane = bed.lane();
    let other = bed.filter.recorder.tail().reserve(1, 1).unwrap();
    assert!(matches!(write(&mut *lane, 1, &sectors(1, 1)), Attempt::Pending));
    let Settled::Later(mut outcome) = lane.settle() else { panic!("it is not complete") };
    assert!(poll(&mut outcome).is_pending());
    // Never written: then nothing behind it counts.
    drop(other);
    assert!(matches!(poll(&mut outcome), Poll::Ready(Err(_))));
}

#[test]
fn what_does_not_fit_goes_the_other_way() {
    let bed = Bed::new(Settings { interval: 3, ..Settings::default() });
    let mut lane = bed.lane();
    for first in [0, 128] {
        assert!(matches!(write(&mut *lane, first, &sectors(1, 128)), Attempt::Pending));
    }
    // No room besides.
    let attempt = write(&mut *lane, 256, &sectors(1, 128));
    assert!(matches!(attempt, Attempt::SettleFirst), "{attempt:?}");
    settle(&mut *lane).unwrap();
    assert!(matches!(write(&mut *lane, 5, &sectors(5, 1)), Attempt::Pending));
    settle(&mut *lane).unwrap();
    // The superblock is due, and that takes a flush.
    assert!(matches!(write(&mut *lane, 6, &sectors(6, 1)), Attempt::NotNow));
    block_on(bed.filter.write(6 * SECTOR, sectors(6, 1), false)).unwrap();
    assert_eq!(bed.filter.entries(), (4, 4));
    assert!(matches!(write(&mut *lane, 7, &sectors(7, 1)), Attempt::Pending));
    settle(&mut *lane).unwrap();
    let other = Bed::new(Settings { sector_size: Some(4096), ..Settings::default() });
    let mut lane = other.lane();
    assert!(matches!(write(&mut *lane, 8, &sectors(7, 1)), Attempt::NotNow), "not whole sectors");
}

#[test]
fn the_other_order_is_kept_too() {
    let bed = Bed::new(Settings { order: Order::Completion, ..Settings::default() });
    let mut lane = bed.lane();
    assert!(matches!(write(&mut *lane, 1, &sectors(1, 1)), Attempt::Pending));
    let mut flush = bed.filter.flush();
    let _ = poll(&mut flush);
    settle(&mut *lane).unwrap();
    block_on(flush).unwrap();
    assert_eq!(bed.words(), ["W1=1", "F"]);
}

#[test]
fn what_the_host_writes_is_logged_once_it_is_written() {
    let bed = Bed::on_disk([true, false]);
    let mut lane = bed.lane();
    let guest = sectors(1, 2);
    let one = bed.submit(&mut *lane, 4, &guest);
    // What the guest does to its memory meanwhile is of no interest.
    guest.copy_from_slice(&[9; 1024]);
    let other = bed.submit(&mut *lane, 9, &sectors(2, 1));
    assert_eq!((one.offset, &one.data[..]), (4 * SECTOR, &[1; 1024][..]));
    assert_ne!(one.token, other.token);
    settle(&mut *lane).unwrap();
    assert_eq!(bed.filter.entries().0, 0, "the host has written nothing");
    bed.perform(&mut *lane, other);
    settle(&mut *lane).unwrap();
    assert_eq!(bed.filter.entries().0, 1);
    bed.perform(&mut *lane, one);
    assert_eq!(bed.filter.entries().0, 1, "not settled");
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["W9=2", "W4=1"], "in the order in which they came to the disk");
}

#[test]
fn a_flush_does_not_promise_what_the_host_writes_meanwhile() {
    let bed = Bed::on_disk([true, false]);
    let mut lane = bed.lane();
    let with_the_host = bed.submit(&mut *lane, 1, &sectors(1, 1));
    let written = bed.submit(&mut *lane, 2, &sectors(2, 1));
    bed.perform(&mut *lane, written);
    let mut flush = bed.filter.flush();
    let _ = poll(&mut flush);
    settle(&mut *lane).unwrap();
    block_on(flush).unwrap();
    bed.perform(&mut *lane, with_the_host);
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["F", "W2=2", "W1=1"]);
}

#[test]
fn a_range_is_taken_until_what_the_host_writes_is_settled() {
    let bed = Bed::on_disk([true, false]);
    let (mut lane, mut other) = (bed.lane(), bed.lane());
    let submitted = bed.submit(&mut *lane, 0, &sectors(1, 4));
    let is_taken =
        |lane: &mut dyn InPlace| matches!(write(lane, 3, &sectors(2, 2)), Attempt::NotNow);
    assert!(is_taken(&mut *lane) && is_taken(&mut *other));
    bed.perform(&mut *lane, submitted);
    assert!(is_taken(&mut *lane) && is_taken(&mut *other));
    settle(&mut *lane).unwrap();
    let submitted = bed.submit(&mut *other, 3, &sectors(2, 2));
    bed.perform(&mut *other, submitted);
    settle(&mut *other).unwrap();
    assert_eq!(bed.words(), ["W0=1", "W3=2"]);
}

#[test]
fn what_the_host_could_not_write_is_not_logged() {
    let bed = Bed::on_disk([true, false]);
    let mut lane = bed.lane();
    let failing = bed.submit(&mut *lane, 1, &sectors(1, 1));
    let good = bed.submit(&mut *lane, 2, &sectors(2, 1));
    lane.written(failing.token, false);
    bed.perform(&mut *lane, good);
    settle(&mut *lane).unwrap();
    let again = bed.submit(&mut *lane, 1, &sectors(3, 1));
    bed.perform(&mut *lane, again);
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["W2=2", "W1=3"]);
}

#[test]
fn a_log_that_is_not_written_in_place_completes_later() {
    let bed = Bed::on_disk([true, true]);
    let mut lane = bed.lane();
    let mut settled = Vec::new();
    for first in [1, 5, 3] {
        let submitted = bed.submit(&mut *lane, first, &sectors(first as u8, 1));
        bed.perform(&mut *lane, submitted);
        match lane.settle() {
            Settled::Later(outcome) => settled.push(outcome),
            Settled::Done(result) => panic!("{result:?}"),
        }
    }
    assert_eq!(bed.filter.entries().0, 0);
    // The last two are one run, behind the first.
    let last = settled.pop().unwrap();
    block_on(async {
        for outcome in settled {
            outcome.await.unwrap();
        }
    });
    assert_eq!(bed.filter.entries().0, 3);
    block_on(last).unwrap();
    assert_eq!(bed.words(), ["W1=1", "W5=5", "W3=3"]);
}

#[test]
fn long_writes_are_settled_together_with_short_ones() {
    let bed = Bed::new(Settings::default());
    let mut lane = bed.lane();
    assert!(matches!(write(&mut *lane, 400, &sectors(1, 1)), Attempt::Pending));
    let long = sectors(2, (ROOM as u64) / SECTOR);
    assert!(matches!(write(&mut *lane, 0, &long), Attempt::Pending));
    assert_eq!((bed.sector(400), bed.sector(0)), (1, 2));
    settle(&mut *lane).unwrap();
    assert_eq!(bed.words(), ["W400=1", "W0=2"]);
    // Either may fail, and then both have.
    assert!(matches!(write(&mut *lane, 400, &sectors(1, 1)), Attempt::Pending));
    assert!(matches!(write(&mut *lane, 0, &long), Attempt::Pending));
    bed.seal(1);
    assert!(settle(&mut *lane).is_err());
    assert!(matches!(write(&mut *lane, 0, &sectors(1, 401)), Attempt::Pending), "no range is held");
}
