//! Writes in place, on real files in memory.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::task::{Context, Poll, Waker};

use rustix::fs::{MemfdFlags, SealFlags};

use super::*;
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
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    Arc::new(HostFile::open(&path, options).unwrap())
}

impl Bed {
    fn new(settings: Settings) -> Bed {
        let memory = ["disk", "log", "sidecar"]
            .map(|name| rustix::fs::memfd_create(name, MemfdFlags::ALLOW_SEALING).unwrap());
        rustix::fs::ftruncate(&memory[0], 256 << 10).unwrap();
        let [disk, log, sidecar] = [0, 1, 2].map(|i| host(&memory[i]));
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

fn write(lane: &mut dyn InPlace, first: u64, data: &Buffers) -> Attempt {
    let range = ByteRange { offset: first * SECTOR, len: data.len() };
    // SAFETY: `data` lives until the call is over.
    #[allow(unsafe_code)]
    lane.write(range, unsafe { Scattered::new(data.iovecs()) }, 3)
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
