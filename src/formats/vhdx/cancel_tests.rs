//! Requests that are dropped half-way: the image goes on as if nothing had happened, or as if the
//! request had been carried out in part.
//!
//! A dropped request may have left an operation with the kernel. It is performed all the same, later,
//! as [`Sim`] does it; the memory stays alive until then.

use super::testing::*;
use super::*;
use crate::block::Driver;
use crate::io::sim::{Rng, Sim, SimFile, SimTask};
use crate::io::{File, block_on};
use crate::units::MIB;

const BLOCKS: u64 = 4;
const SIZE: u64 = BLOCKS * MIB;

/// A request that is dropped at each of its steps.
#[derive(Clone, Copy, Debug)]
enum Request {
    Write { offset: u64, len: u64, fua: bool },
    Zero(ByteRange, bool),
    Discard(ByteRange),
    Flush,
    Close,
}

const OLD: u8 = 0x11;
const NEW: u8 = 0x22;

impl Request {
    /// What it changes, and to what.
    fn effect(self) -> (ByteRange, u8) {
        match self {
            Request::Write { offset, len, .. } => (ByteRange { offset, len }, NEW),
            Request::Zero(range, _) | Request::Discard(range) => (range, 0),
            Request::Flush | Request::Close => (ByteRange { offset: 0, len: 0 }, 0),
        }
    }

    async fn run(self, driver: &Driven) {
        match self {
            Request::Write { offset, len, fua } => {
                write(driver, offset, &vec![NEW; len as usize], fua).await.unwrap();
            }
            Request::Zero(range, may_unmap) => {
                driver.write_zeroes(range, may_unmap).await.unwrap();
            }
            Request::Discard(range) => driver.discard(range).await.unwrap(),
            Request::Flush => driver.flush().await.unwrap(),
            Request::Close => driver.close().await.unwrap(),
        }
    }
}

fn requests() -> Vec<Request> {
    let block = |n: u64| ByteRange { offset: n * MIB, len: MIB };
    let part = ByteRange { offset: MIB - 4096, len: 8192 };
    vec![
        // Into a present block, one that was cleared, one that never was, and across them.
        Request::Write { offset: 4096, len: 4096, fua: false },
        Request::Write { offset: MIB + 512, len: 512, fua: true },
        Request::Write { offset: 3 * MIB, len: 1536, fua: false },
        Request::Write { offset: part.offset, len: part.len, fua: true },
        Request::Write { offset: 2 * MIB, len: 2 * MIB, fua: false },
        Request::Zero(block(0), true),
        Request::Zero(part, false),
        Request::Zero(ByteRange { offset: 2 * MIB - 512, len: MIB + 1024 }, true),
        Request::Discard(block(0)),
        Request::Discard(part),
        Request::Flush,
        Request::Close,
    ]
}

/// The disk before: blocks 0 and 2 hold data (2 in part), 1 was cleared, 3 is absent. Some of it is
/// flushed, and what block 1 had can be used again.
async fn prepare(driver: &Driven, disk: &mut [u8]) {
    write(driver, 0, &vec![OLD; 2 << 20], false).await.unwrap();
    disk[..2 << 20].fill(OLD);
    driver.flush().await.unwrap();
    driver.write_zeroes(ByteRange { offset: MIB, len: MIB }, true).await.unwrap();
    disk[1 << 20..2 << 20].fill(0);
    driver.flush().await.unwrap();
    write(driver, 2 * MIB + 512, &[OLD; 512], false).await.unwrap();
    disk[(2 << 20) + 512..(2 << 20) + 1024].fill(OLD);
}

/// Whether `found` is `before` with any part of the effect.
fn is_possible(found: &[u8], before: &[u8], effect: (ByteRange, u8)) -> bool {
    let (range, value) = effect;
    let (start, end) = (range.offset as usize, range.end() as usize);
    let inside = || found[start..end].iter().zip(&before[start..end]);
    found[..start] == before[..start]
        && found[end..] == before[end..]
        && inside().all(|(found, before)| found == before || *found == value)
}

fn dropped_at_each_step(fixture: &Fixture, parent: Option<&[u8]>) {
    let node = parent.map(parent_node);
    let mut drops = 0;
    for request in requests() {
        for at in 0.. {
            let what = format!("{request:?}, dropped at step {at}");
            let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
            let driver = open_image(&file, node.clone(), None).unwrap();
            let mut disk = parent.map_or(Vec::new(), <[u8]>::to_vec);
            disk.resize(SIZE as usize, 0);
            block_on(prepare(&driver, &mut disk));
            let sim = Sim::new(at);
            sim.attach(&file);
            let task = Box::pin(request.run(&driver)) as SimTask<'_>;
            let is_done = sim.run_until(vec![task], |step| step == at);
            drops += 1;
            sim.drain();
            sim.detach(&file);
            let found = block_on(read(&driver, 0, SIZE));
            let effect = request.effect();
            if is_done && !matches!(request, Request::Discard(_)) {
                disk[effect.0.offset as usize..effect.0.end() as usize].fill(effect.1);
            }
            assert!(is_possible(&found, &disk, effect), "{what}: read afterwards");
            if matches!(request, Request::Close) {
                // Nothing is called after that, but the file is good.
                let again = open_image(&file.after_kill(), node.clone(), None).unwrap();
                let readable = block_on(read(&again, 0, MIB));
                assert!(readable == disk[..1 << 20], "{what}: opened after a kill");
            } else {
                goes_on(&driver, &file, node.as_ref(), found, &what);
            }
            if is_done {
                break;
            }
        }
    }
    eprintln!("{drops} drops");
    assert!(drops > 60, "{drops}");
}

/// Who resizes, or changes what a child knows its parent by, empties the log and goes on.
#[test]
fn a_log_that_was_half_emptied_is_used_again() {
    let fixture = Fixture::new(SIZE);
    for at in 0.. {
        let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
        let driver = open_image(&file, None, None).unwrap();
        let mut disk = vec![0; SIZE as usize];
        block_on(prepare(&driver, &mut disk));
        let sim = Sim::new(at);
        sim.attach(&file);
        let emptying = async { driver.format().empty_log().await.unwrap() };
        let is_done = sim.run_until(vec![Box::pin(emptying)], |step| step == at);
        sim.drain();
        sim.detach(&file);
        block_on(write(&driver, 3 * MIB, &[NEW; 512], true)).unwrap();
        disk[3 << 20..(3 << 20) + 512].fill(NEW);
        let check = |content: Vec<u8>| {
            let again = open_image(&SimFile::from_bytes("test.vhdx", content), None, None).unwrap();
            assert!(block_on(read(&again, 0, SIZE)) == disk, "dropped at step {at}");
        };
        check(file.durable());
        block_on(driver.close()).unwrap();
        check(file.durable());
        if is_done {
            assert!(at > 4, "{at}");
            break;
        }
    }
}

/// Whatever was dropped, others are not held up, and see no damage.
fn goes_on(driver: &Driven, file: &SimFile, node: Option<&Node>, mut disk: Vec<u8>, what: &str) {
    for (offset, value) in [(3 * MIB + 8192, 3), (MIB, 4), (0, 5), (2 * MIB + 512, 6)] {
        block_on(write(driver, offset, &[value; 1024], false)).unwrap();
        disk[offset as usize..][..1024].fill(value);
    }
    block_on(driver.flush()).unwrap();
    // What was freed may be used now.
    for offset in [3 * MIB - 512, SIZE - 512] {
        block_on(write(driver, offset, &[7; 512], false)).unwrap();
        disk[offset as usize..][..512].fill(7);
    }
    block_on(driver.flush()).unwrap();
    assert!(block_on(read(driver, 0, SIZE)) == disk, "{what}: going on");
    for seed in 0..3 {
        let cut = file.after_power_cut(seed);
        let again = open_with(
            &cut,
            OpenOptions { read_only: true, backing: node.cloned(), ..OpenOptions::default() },
        )
        .unwrap_or_else(|err| panic!("{what}: {err}"));
        assert!(block_on(read(&again, 0, SIZE)) == disk, "{what}: after a power cut");
    }
}

#[test]
fn requests_dropped_at_each_step() {
    dropped_at_each_step(&Fixture::new(SIZE), None);
}

#[test]
fn requests_of_a_differencing_image_dropped_at_each_step() {
    let fixture = Fixture { has_parent: true, ..Fixture::new(SIZE) };
    dropped_at_each_step(&fixture, Some(&vec![0x77; 3 * MIB as usize + 512]));
}

/// Many at a time, all dropped at once.
#[test]
fn crowds_of_requests_dropped_at_once() {
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let has_parent = seed % 2 == 1;
        let parent = vec![0x77; 2 << 20];
        let node = has_parent.then(|| parent_node(&parent));
        let file =
            SimFile::from_bytes("test.vhdx", Fixture { has_parent, ..Fixture::new(SIZE) }.bytes());
        let driver = open_image(&file, node.clone(), None).unwrap();
        let mut disk = vec![0; SIZE as usize];
        if has_parent {
            disk[..2 << 20].copy_from_slice(&parent);
        }
        block_on(prepare(&driver, &mut disk));
        for round in 0..4 {
            let sim = Sim::new(seed * 10 + round);
            sim.attach(&file);
            let all = requests();
            let tasks: Vec<SimTask<'_>> = (0..5)
                .map(|_| {
                    // What is closed is done with.
                    let request = all[rng.below(all.len() as u64 - 1) as usize];
                    Box::pin(request.run(&driver)) as SimTask<'_>
                })
                .collect();
            let last = rng.below(120);
            sim.run_until(tasks, |step| step == last);
            sim.drain();
            sim.detach(&file);
            let found = block_on(read(&driver, 0, SIZE));
            let legal = |byte: &u8| [0, OLD, NEW, 0x77, 3, 4, 5, 6, 7].contains(byte);
            assert!(found.iter().all(legal), "seed {seed}: no such data was ever written");
            goes_on(&driver, &file, node.as_ref(), found, &format!("seed {seed}, round {round}"));
        }
    }
}

/// Polls a request until the host has been given something to do, and drops it then. What the host
/// was given is still to be done.
fn dropped_with_the_host(sim: &Sim, file: &SimFile, request: SimTask<'_>) {
    sim.attach(file);
    let is_done = sim.run_until(vec![request], |_| sim.pending() > 0);
    assert!(!is_done && sim.pending() == 1);
    sim.detach(file);
}

/// The host may carry out what a dropped request gave it at any later time: until then the place it
/// goes to belongs to nobody else.
#[test]
fn a_place_is_not_used_again_under_a_dropped_request() {
    let into = |request: Request| {
        let what = format!("{request:?}");
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(SIZE).bytes());
        let driver = open_image(&file, None, None).unwrap();
        block_on(write(&driver, 0, &vec![OLD; MIB as usize], false)).unwrap();
        block_on(driver.flush()).unwrap();
        let sim = Sim::new(0);
        dropped_with_the_host(&sim, &file, Box::pin(request.run(&driver)));
        block_on(async {
            driver.write_zeroes(ByteRange { offset: 0, len: MIB }, true).await.unwrap();
            driver.flush().await.unwrap();
            for block in 1..3 {
                let mine = vec![block as u8; MIB as usize];
                write(&driver, block * MIB, &mine, false).await.unwrap();
            }
        });
        sim.drain();
        for block in 1..3 {
            let found = block_on(read(&driver, block * MIB, MIB));
            assert!(found.iter().all(|byte| *byte == block as u8), "{what}: in block {block}");
        }
        // It is used again when the host is done.
        let len = File::len(&file).unwrap();
        block_on(driver.flush()).unwrap();
        block_on(write(&driver, 3 * MIB, &[3; 512], false)).unwrap();
        assert_eq!(File::len(&file).unwrap(), len, "{what}: the place is lost");
    };
    into(Request::Write { offset: 4096, len: 4096, fua: false });
    into(Request::Zero(ByteRange { offset: 4096, len: 4096 }, true));
    into(Request::Discard(ByteRange { offset: 4096, len: 4096 }));
}

/// The same of what a commit writes: an old page of the BAT, or an old entry of the log, must not
/// land on what later commits have written.
#[test]
fn what_a_dropped_commit_left_with_the_host_undoes_nothing() {
    let mut drops = 0;
    for at in 0.. {
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(SIZE).bytes());
        let driver = open_image(&file, None, None).unwrap();
        block_on(write(&driver, 0, &[OLD; 512], false)).unwrap();
        let sim = Sim::new(at);
        sim.attach(&file);
        let close = async { driver.close().await.unwrap() };
        let is_done = sim.run_until(vec![Box::pin(close) as SimTask<'_>], |step| step == at);
        drops += sim.pending();
        sim.detach(&file);
        let later = async {
            write(&driver, MIB, &[NEW; 512], false).await.unwrap();
            driver.close().await.unwrap();
        };
        sim.run(vec![Box::pin(later) as SimTask<'_>]);
        sim.drain();
        let again = open_image(&file.after_kill(), None, None)
            .unwrap_or_else(|err| panic!("dropped at step {at}: {err}"));
        for (offset, value) in [(0, OLD), (MIB, NEW)] {
            let found = block_on(read(&again, offset, 512));
            assert!(found == [value; 512], "dropped at step {at}: at {offset}");
        }
        if is_done {
            break;
        }
    }
    assert!(drops > 10, "{drops}");
}

/// Without a keep, who clears a block completes once that is on disk, and not only who was the first.
#[test]
fn a_block_that_is_being_cleared_is_not_yet_clear() {
    let block = ByteRange { offset: 0, len: MIB };
    for range in [block, ByteRange { offset: 4096, len: 4096 }] {
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(SIZE).bytes());
        let driver = open_image(&file, None, None).unwrap();
        driver.begin_session(1).unwrap();
        block_on(write(&driver, 0, &vec![OLD; 1 << 20], true)).unwrap();
        let sim = Sim::new(0);
        sim.attach(&file);
        let first = Box::pin(async { driver.write_zeroes(block, true).await.unwrap() });
        let mut killed = None;
        let second = Box::pin(async {
            driver.write_zeroes(range, true).await.unwrap();
            killed = Some(file.after_kill());
        });
        sim.overtake(first, || driver.format().is_dirty(), second);
        let again = open_image(&killed.unwrap(), None, None).unwrap();
        let found = block_on(read(&again, range.offset, range.len));
        assert!(found.iter().all(|byte| *byte == 0), "{range}");
    }
}
