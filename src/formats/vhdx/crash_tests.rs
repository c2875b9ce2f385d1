//! Power cuts: whatever a disk may keep of what was not flushed, the image opens, its log replays,
//! everything that was flushed is there, and no block shows another one's data.
//!
//! Several tasks write, zero, discard and flush on a slow disk that completes operations in any
//! order. Between any two steps of the whole the power may fail; the disk then holds what was
//! flushed and any torn subset of the rest. Each sector of the disk knows which values it may have.
//!
//! `VUBLK_TEST_CUTS` multiplies the number of runs, for a long search.

use std::sync::Mutex;

use super::testing::*;
use super::*;
use crate::block::{Driver, RangeLock};
use crate::io::block_on;
use crate::io::sim::{Rng, Sim, SimFile, SimTask};
use crate::units::MIB;

/// What a disk writes whole, whatever the image's sectors are.
const SECTOR: u64 = 512;
const ZEROS: [u8; SECTOR as usize] = [0; SECTOR as usize];

/// Content of a range that was written with `value`, which is not 0.
fn content_of(range: ByteRange, value: u64) -> Vec<u8> {
    let word = |sector: u64| (value << 32 | sector).to_le_bytes();
    (range.offset / SECTOR..range.end() / SECTOR)
        .flat_map(|sector| word(sector).repeat(SECTOR as usize / 8))
        .collect()
}

/// The value in a sector, which must be whole and of this sector; 0 for zeros.
fn sector_value(sector: u64, content: &[u8]) -> Option<u64> {
    if content == ZEROS {
        return Some(0);
    }
    let word = u64::from_le_bytes(content[..8].try_into().unwrap());
    let whole = content[8..] == content[..content.len() - 8];
    (whole && word & 0xffff_ffff == sector).then_some(word >> 32)
}

/// What was done to one sector, oldest first.
#[derive(Clone, Debug)]
struct History {
    /// Each change: the values that the sector may have by it.
    changes: Vec<[u64; 2]>,
    /// How many of them have completed.
    completed: usize,
    /// The oldest change that may still be the last one on disk.
    floor: usize,
}

impl History {
    fn allows(&self, value: u64) -> bool {
        self.changes[self.floor..].iter().any(|values| values.contains(&value))
    }
}

struct Model {
    sectors: Mutex<Vec<History>>,
}

/// The numbers of the sectors of a range.
fn sectors_of(range: ByteRange) -> std::ops::Range<usize> {
    (range.offset / SECTOR) as usize..(range.end() / SECTOR) as usize
}

impl Model {
    fn new(case: &Case) -> Model {
        let parent = case.parent.as_ref().map_or(0, |parent| parent.len() as u64);
        let start = |n: u64| u64::from(n * SECTOR < parent);
        let history = |n| History { changes: vec![[start(n); 2]], completed: 1, floor: 0 };
        Model { sectors: Mutex::new((0..case.fixture.size / SECTOR).map(history).collect()) }
    }

    fn begin(&self, range: ByteRange, value: u64, discard: bool) {
        let mut sectors = self.sectors.lock().unwrap();
        for history in &mut sectors[sectors_of(range)] {
            // A discard may leave what was there, which is one value or zeros.
            let [a, b] = *history.changes.last().unwrap();
            history.changes.push([value, if discard { a.max(b) } else { value }]);
        }
    }

    fn end(&self, range: ByteRange) {
        let mut sectors = self.sectors.lock().unwrap();
        for history in &mut sectors[sectors_of(range)] {
            history.completed = history.changes.len();
        }
    }

    /// What a flush that is submitted now must make durable.
    fn completed(&self) -> Vec<usize> {
        self.sectors.lock().unwrap().iter().map(|history| history.completed).collect()
    }

    fn flushed(&self, completed: &[usize]) {
        for (history, completed) in self.sectors.lock().unwrap().iter_mut().zip(completed) {
            history.floor = history.floor.max(completed - 1);
        }
    }

    fn check(&self, content: &[u8], what: &str) {
        let sectors = self.sectors.lock().unwrap();
        for (n, (history, content)) in
            sectors.iter().zip(content.chunks_exact(SECTOR as usize)).enumerate()
        {
            let value = sector_value(n as u64, content).unwrap_or_else(|| {
                panic!("{what}: sector {n} holds foreign or torn data: {:x?}", &content[..16])
            });
            assert!(
                history.allows(value),
                "{what}: sector {n} is {value}, but {:?} were possible",
                &history.changes[history.floor..]
            );
        }
    }
}

/// What kind of image is tried.
struct Case {
    name: &'static str,
    fixture: Fixture,
    parent: Option<Vec<u8>>,
    /// How often the power fails at each step.
    cuts_per_step: u64,
    seeds: u64,
    /// One in so many requests is a flush.
    flush_every: u64,
}

impl Case {
    fn new(name: &'static str, size: u64) -> Case {
        let fixture = Fixture::new(size);
        Case { name, fixture, parent: None, cuts_per_step: 2, seeds: 2, flush_every: 6 }
    }

    fn with_parent(mut self, len: u64) -> Case {
        self.fixture.has_parent = true;
        self.parent = Some(content_of(ByteRange { offset: 0, len }, 1));
        self
    }

    fn open(&self, file: &SimFile, read_only: bool) -> Driven {
        let backing = self.parent.as_deref().map(parent_node);
        let options = OpenOptions { read_only, backing, ..OpenOptions::default() };
        open_with(file, options).unwrap_or_else(|err| panic!("{}: {err}", self.name))
    }

    /// A range in sectors, or (one in `blocks`) in blocks.
    fn range(&self, rng: &mut Rng, blocks: u64) -> ByteRange {
        let unit = if rng.one_in(blocks) { self.fixture.block } else { self.fixture.sector };
        let start = rng.below(self.fixture.size.div_ceil(unit)) * unit;
        let longest = if unit == self.fixture.sector { 40 } else { 2 };
        let end = (start + (1 + rng.below(longest)) * unit).min(self.fixture.size);
        ByteRange::between(start, end)
    }
}

/// Opens what a power cut left and compares; now and then goes on with it.
fn check_cut(case: &Case, model: &Model, image: Vec<u8>, thorough: bool, what: &str) {
    let file = SimFile::from_bytes("cut.vhdx", image);
    let reader = case.open(&file, true);
    let content = block_on(read(&reader, 0, case.fixture.size));
    model.check(&content, what);
    if !thorough {
        return;
    }
    // Replayed on disk it says the same, and it can be written to.
    drop(reader);
    let driver = case.open(&file, false);
    let mut expected = content;
    assert!(block_on(read(&driver, 0, case.fixture.size)) == expected, "{what}: replayed on disk");
    let mut rng = Rng::new(expected.len() as u64);
    for _ in 0..10 {
        let range = case.range(&mut rng, 20);
        let data = content_of(range, 9);
        block_on(write(&driver, range.offset, &data, false)).unwrap();
        expected[range.offset as usize..range.end() as usize].copy_from_slice(&data);
    }
    block_on(driver.close()).unwrap();
    let file = SimFile::from_bytes("again.vhdx", file.durable());
    let content = block_on(read(&case.open(&file, true), 0, case.fixture.size));
    assert!(content == expected, "{what}: differs after writing on");
}

/// One task of the guest.
async fn guest(
    case: &Case,
    driver: &Driven,
    model: &Model,
    busy: &RangeLock,
    lane: u64,
    seed: u64,
) {
    let mut rng = Rng::new(seed * 1000 + lane);
    for step in 0..20 {
        let kind = rng.below(8);
        // Clearing whole blocks is what frees them; writing them is only slow.
        let range = case.range(&mut rng, if kind < 3 { 2 } else { 20 });
        if rng.one_in(case.flush_every) {
            let completed = model.completed();
            driver.flush().await.unwrap();
            model.flushed(&completed);
            continue;
        }
        // A guest that writes the same sectors twice at a time gets what it deserves.
        let _alone = busy.exclusive(range).await;
        match kind {
            0 | 1 => {
                model.begin(range, 0, false);
                driver.write_zeroes(range, rng.one_in(2)).await.unwrap();
            }
            2 => {
                model.begin(range, 0, true);
                driver.discard(range).await.unwrap();
            }
            _ => {
                let value = 2 + step * 8 + lane;
                model.begin(range, value, false);
                let data = content_of(range, value);
                write(driver, range.offset, &data, rng.one_in(20)).await.unwrap();
            }
        }
        model.end(range);
    }
}

fn run(case: &Case) {
    const LANES: u64 = 4;
    let factor = std::env::var("VUBLK_TEST_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let mut cuts = 0u64;
    for seed in 0..case.seeds * factor {
        let file = SimFile::from_bytes("test.vhdx", case.fixture.bytes());
        let driver = case.open(&file, false);
        let model = Model::new(case);
        let busy = RangeLock::new();
        let sim = Sim::new(seed);
        sim.attach(&file);
        let tasks: Vec<SimTask<'_>> = (0..LANES)
            .map(|lane| Box::pin(guest(case, &driver, &model, &busy, lane, seed)) as SimTask<'_>)
            .collect();
        let mut rng = Rng::new(!seed);
        sim.run_until(tasks, |step| {
            for _ in 0..case.cuts_per_step {
                cuts += 1;
                let what = format!("{}, seed {seed}, step {step}", case.name);
                let image = file.power_cut(rng.word());
                check_cut(case, &model, image, cuts.is_multiple_of(32), &what);
            }
            false
        });
        let completed = model.completed();
        sim.block_on(driver.flush()).unwrap();
        model.flushed(&completed);
        let what = format!("{}, seed {seed}, end", case.name);
        check_cut(case, &model, file.power_cut(seed), true, &what);
        sim.block_on(driver.close()).unwrap();
        let what = format!("{}, seed {seed}, closed", case.name);
        check_cut(case, &model, file.power_cut(seed), true, &what);
    }
    eprintln!("{}: {cuts} power cuts", case.name);
    assert!(cuts > 500, "too few cuts to mean anything: {cuts}");
}

#[test]
fn power_cuts_of_a_dynamic_image() {
    run(&Case::new("dynamic", 2 * MIB + 512));
}

#[test]
fn power_cuts_of_a_differencing_image() {
    run(&Case::new("differencing", 2 * MIB + 512).with_parent(MIB + 512));
}

#[test]
fn power_cuts_of_large_sectors() {
    let mut case = Case::new("4096", 2 * MIB + 4096);
    case.fixture.sector = 4096;
    run(&case);
    let mut case = Case::new("4096, differencing", 2 * MIB + 4096);
    case.fixture.sector = 4096;
    run(&case.with_parent(2 * MIB));
}

#[test]
fn power_cuts_when_nobody_flushes() {
    run(&Case { flush_every: 200, ..Case::new("hardly flushed", 3 * MIB) });
}
