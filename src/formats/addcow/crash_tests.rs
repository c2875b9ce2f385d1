//! Power cuts: whatever the disks may keep of what was not flushed, everything that was flushed is
//! there, and a bit on disk never shows an image sector whose data is not.
//!
//! Several tasks write, zero, discard and flush on slow files that complete operations in any order.
//! Between any two steps the power may fail, and then each of the two files has what was flushed
//! of it and any torn subset of the rest. What was in the image file before, under clear bits, is
//! rubbish that no cut may show.

use super::tests::*;
use super::*;
use crate::block::Driver;
use crate::crash::enumerate::Reach;
use crate::crash::simulated::Simulation;
use crate::io::block_on;
use crate::io::sim::{Rng, Sim, SimFile, SimTask};
use std::sync::Mutex;

/// What the tests use of the disk: a few sectors, in two blocks of the bitmap.
const LANES: u64 = 3;
const LANE_SECTORS: u64 = 40;
/// What lies in the image file under clear bits.
const RUBBISH: u8 = 0xdd;

/// How many sectors a block of the bitmap tells of.
const BLOCK_SECTORS: u64 = pages::BLOCK_LEN as u64 * 8;

/// Where a lane starts, in sectors: the last goes across the border of two blocks.
fn lane_start(lane: u64) -> u64 {
    [0, 100, BLOCK_SECTORS - 20][lane as usize]
}

const SECTORS: u64 = BLOCK_SECTORS + LANE_SECTORS;

/// Content of a sector that was written with `value`.
fn sector_content(sector: u64, value: u64) -> [u8; 512] {
    let mut content = [0; 512];
    for chunk in content.chunks_exact_mut(16) {
        chunk[..8].copy_from_slice(&value.to_le_bytes());
        chunk[8..].copy_from_slice(&sector.to_le_bytes());
    }
    if value == 0 { [0; 512] } else { content }
}

/// The values that each sector may have after a cut: all that was asked for since what was last
/// flushed, and that.
struct Model {
    sectors: Mutex<Vec<History>>,
}

#[derive(Clone)]
struct History {
    values: Vec<u64>,
    completed: usize,
    floor: usize,
}

impl Model {
    fn new(sectors: u64, base_sectors: u64) -> Model {
        let history = |sector| History {
            values: vec![u64::from(sector < base_sectors)],
            completed: 1,
            floor: 0,
        };
        Model { sectors: Mutex::new((0..sectors).map(history).collect()) }
    }

    /// A number that grows when more must be there after a cut.
    fn promised(&self) -> u64 {
        self.sectors.lock().unwrap().iter().map(|history| history.floor as u64).sum()
    }

    fn begin(&self, range: ByteRange, value: u64) {
        let (first, count) = sectors(range);
        for history in &mut self.sectors.lock().unwrap()[first as usize..][..count as usize] {
            history.values.push(value);
        }
    }

    fn end(&self, range: ByteRange) {
        let (first, count) = sectors(range);
        for history in &mut self.sectors.lock().unwrap()[first as usize..][..count as usize] {
            history.completed = history.values.len();
        }
    }

    fn completed(&self) -> Vec<usize> {
        self.sectors.lock().unwrap().iter().map(|history| history.completed).collect()
    }

    fn flushed(&self, completed: &[usize]) {
        for (history, completed) in self.sectors.lock().unwrap().iter_mut().zip(completed) {
            history.floor = history.floor.max(completed - 1);
        }
    }

    fn check(&self, sector: u64, content: &[u8], what: &str) {
        let sectors = self.sectors.lock().unwrap();
        let history = &sectors[sector as usize];
        let allowed = &history.values[history.floor..];
        assert!(
            allowed.iter().any(|value| content == sector_content(sector, *value)),
            "{what}: sector {sector} is {:02x?}…, and {allowed:?} were possible",
            &content[..16],
        );
    }
}

struct Case {
    sectors: u64,
    lanes: u64,
    base: Option<Vec<u8>>,
    seed: u64,
    file: SimFile,
    image: SimFile,
}

impl Case {
    fn new(has_backing: bool, seed: u64) -> Case {
        Case::with_lanes(LANES, SECTORS, has_backing, seed)
    }

    fn with_lanes(lanes: u64, sectors: u64, has_backing: bool, seed: u64) -> Case {
        // Ends inside of the last lane.
        let base_sectors = sectors - LANE_SECTORS + 5;
        let base = (0..base_sectors).flat_map(|sector| sector_content(sector, 1)).collect();
        Case {
            sectors,
            lanes,
            base: has_backing.then_some(base),
            seed,
            file: SimFile::from_bytes("x.add-cow", new_file(sectors * 512, has_backing)),
            image: SimFile::from_bytes("disk.raw", vec![RUBBISH; sectors as usize * 512]),
        }
    }

    fn model(&self) -> Model {
        Model::new(self.sectors, self.base.as_ref().map_or(0, |base| base.len() as u64 / 512))
    }

    fn open(&self, file: &SimFile, image: &SimFile) -> Disk {
        open_disk(file, image, backing_of(self.base.as_deref()), None)
    }

    /// The power fails.
    fn cut(&self, model: &Model, rng: &mut Rng, what: &str) {
        let bits = self.file.power_cut(rng.word());
        let data = self.image.power_cut(rng.word());
        self.check(model, bits, data, what);
    }

    /// Opens what is left after a cut, and compares.
    fn check(&self, model: &Model, bits: Vec<u8>, data: Vec<u8>, what: &str) {
        // The invariant itself, whatever anybody was told.
        let lanes = (0..self.lanes).map(lane_start);
        for sector in lanes.flat_map(|start| start..start + LANE_SECTORS) {
            let byte = bits.get((2560 + sector / 8) as usize).copied().unwrap_or(0);
            if byte >> (sector % 8) & 1 == 1 {
                let content = &data[sector as usize * 512..][..512];
                assert!(content != [RUBBISH; 512], "{what}: the bit of {sector} was too early");
            }
        }
        let file = SimFile::from_bytes("cut.add-cow", bits);
        let image = SimFile::from_bytes("cut.raw", data);
        let disk = self.open(&file, &image);
        for lane in 0..self.lanes {
            let start = lane_start(lane);
            let content = block_on(read(&disk, start * 512, LANE_SECTORS * 512));
            for (i, content) in content.chunks(512).enumerate() {
                model.check(start + i as u64, content, what);
            }
        }
        let file = Arc::new(file) as Arc<dyn File>;
        let found = block_on(check::check(&file, self.sectors * 512, false, false)).unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{what}: {:?}", found.findings);
    }
}

async fn load(disk: &Disk, model: &Model, lane: u64, seed: u64) {
    let mut rng = Rng::new(seed * 1000 + lane);
    for step in 0..30 {
        let first = rng.below(LANE_SECTORS);
        let count = 1 + rng.below((LANE_SECTORS - first).min(12));
        let range = ByteRange { offset: (lane_start(lane) + first) * 512, len: count * 512 };
        let value = 2 + step * LANES + lane;
        match rng.below(10) {
            0 | 1 => {
                let completed = model.completed();
                disk.flush().await.unwrap();
                model.flushed(&completed);
            }
            2 => {
                model.begin(range, 0);
                disk.write_zeroes(range, rng.one_in(2)).await.unwrap();
                model.end(range);
            }
            3 => {
                // The sector keeps what it had, or is zeros from some moment on.
                model.begin(range, 0);
                disk.discard(range).await.unwrap();
                let (first, count) = sectors(range);
                let mut sectors = model.sectors.lock().unwrap();
                for history in &mut sectors[first as usize..][..count as usize] {
                    let before = history.values[history.values.len() - 2];
                    history.values.push(before);
                }
            }
            _ => {
                let (first, count) = sectors(range);
                let data: Vec<u8> =
                    (first..first + count).flat_map(|s| sector_content(s, value)).collect();
                model.begin(range, value);
                let fua = rng.one_in(5);
                let buf = AlignedBuf::from_slice(&data, 512);
                disk.write(range.offset, buf.buffers(), fua).await.unwrap();
                model.end(range);
            }
        }
    }
}

#[test]
fn no_power_cut_shows_what_is_not_there() {
    let mut cuts = 0;
    for seed in 0..40 {
        let case = Case::new(seed % 3 > 0, seed);
        let disk = case.open(&case.file, &case.image);
        let model = case.model();
        let sim = Sim::new(seed);
        sim.attach(&case.file);
        sim.attach(&case.image);
        let tasks: Vec<SimTask<'_>> = (0..LANES)
            .map(|lane| Box::pin(load(&disk, &model, lane, seed)) as SimTask<'_>)
            .collect();
        let mut rng = Rng::new(!seed);
        sim.run_until(tasks, |step| {
            if rng.one_in(8) {
                cuts += 1;
                case.cut(&model, &mut rng, &format!("seed {seed}, step {step}"));
            }
            false
        });
        let completed = model.completed();
        sim.block_on(disk.flush()).unwrap();
        model.flushed(&completed);
        case.cut(&model, &mut rng, &format!("seed {}, end", case.seed));
    }
    eprintln!("add-cow: {cuts} power cuts");
    assert!(cuts > 500, "too few cuts to mean anything: {cuts}");
}

/// Not drawn by lot: all states that a cut could leave of both files together, at each step.
#[test]
fn every_power_cut_of_both_files() {
    let reach = Reach { reorder: true, torn: 512 | 4096, all_subsets: 7, samples: 20, seed: 1 };
    let mut states = 0;
    for seed in 0..6 {
        let case = Case::with_lanes(2, 140, seed % 3 > 0, seed);
        let disk = case.open(&case.file, &case.image);
        let model = case.model();
        let sim = Sim::new(seed);
        sim.attach(&case.file);
        sim.attach(&case.image);
        let tasks: Vec<SimTask<'_>> =
            (0..2).map(|lane| Box::pin(load(&disk, &model, lane, seed)) as SimTask<'_>).collect();
        let mut simulation = Simulation::new(&[&case.file, &case.image], reach);
        sim.run_until(tasks, |step| {
            simulation.explore(model.promised(), |left, state| {
                let what = format!("seed {seed}, step {step}, {state}");
                case.check(&model, left[0].volatile(), left[1].volatile(), &what);
            });
            false
        });
        states += simulation.states();
    }
    eprintln!("add-cow: {states} states");
    assert!(states > 2000, "too few states to mean anything: {states}");
}

#[test]
fn power_cuts_while_the_size_changes() {
    let mut cuts = 0;
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let old = 1 + rng.below(60);
        let new = 1 + rng.below(60);
        let base: Vec<u8> = (0..30u64).flat_map(|sector| sector_content(sector, 1)).collect();
        let file = SimFile::from_bytes("x.add-cow", new_file(old * 512, true));
        let image = SimFile::from_bytes("disk.raw", vec![0; old as usize * 512]);
        let disk = open_disk(&file, &image, backing_of(Some(&base)), None);
        let own = rng.below(old);
        block_on(write(&disk, own * 512, &sector_content(own, 7))).unwrap();
        block_on(disk.flush()).unwrap();
        let sim = Sim::new(seed);
        sim.attach(&file);
        sim.attach(&image);
        let resize: SimTask<'_> = Box::pin(async { disk.resize(new * 512).await.unwrap() });
        sim.run_until(vec![resize], |_| {
            cuts += 1;
            let data = image.power_cut(rng.word());
            let size = data.len() as u64 / 512;
            assert!(size == old || size == new, "seed {seed}: {size} of {old} or {new}");
            let file = SimFile::from_bytes("cut.add-cow", file.power_cut(rng.word()));
            let image = SimFile::from_bytes("cut.raw", data);
            let disk = open_disk(&file, &image, backing_of(Some(&base)), None);
            for sector in 0..size {
                let value = match sector {
                    sector if sector == own => 7,
                    sector if sector < old.min(30) => 1,
                    _ => 0,
                };
                let content = block_on(read(&disk, sector * 512, 512));
                assert!(content == sector_content(sector, value), "seed {seed}, sector {sector}");
            }
            false
        });
    }
    assert!(cuts > 500, "too few cuts to mean anything: {cuts}");
}

#[test]
fn power_cuts_while_it_is_emptied() {
    let mut cuts = 0;
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        let base: Vec<u8> = (0..60u64).flat_map(|sector| sector_content(sector, 1)).collect();
        let file = SimFile::from_bytes("x.add-cow", new_file(60 * 512, true));
        let image = SimFile::from_bytes("disk.raw", vec![RUBBISH; 60 * 512]);
        let disk = open_disk(&file, &image, backing_of(Some(&base)), None);
        for _ in 0..10 {
            let own = rng.below(60);
            block_on(write(&disk, own * 512, &sector_content(own, 7))).unwrap();
        }
        if rng.one_in(2) {
            block_on(disk.flush()).unwrap();
        }
        let sim = Sim::new(seed);
        sim.attach(&file);
        sim.attach(&image);
        let empty: SimTask<'_> =
            Box::pin(async { disk.make_empty(seed.is_multiple_of(2)).await.unwrap() });
        sim.run_until(vec![empty], |_| {
            cuts += 1;
            let file = SimFile::from_bytes("cut.add-cow", file.power_cut(rng.word()));
            let image = SimFile::from_bytes("cut.raw", image.power_cut(rng.word()));
            let disk = open_disk(&file, &image, backing_of(Some(&base)), None);
            for sector in 0..60 {
                let content = block_on(read(&disk, sector * 512, 512));
                let is = |value| content == sector_content(sector, value);
                assert!(is(1) || is(7), "seed {seed}, sector {sector}");
            }
            false
        });
        assert!(sim.block_on(read(&disk, 0, 60 * 512)) == base);
        assert_eq!(file.durable()[2560..], [0; 8]);
    }
    assert!(cuts > 300, "too few cuts to mean anything: {cuts}");
}
