//! Power cuts: whatever a disk may keep of what was not flushed, the image opens, shows everything
//! that was flushed, and `qemu-img check` finds no errors in it.
//!
//! Several tasks write, zero, discard and flush on a slow disk that completes operations in any
//! order. Between any two steps of the whole the power may fail; the disk then holds what was
//! flushed and any torn subset of the rest. Each block of the disk knows which values it may have.

use super::tests::*;
use super::*;
use crate::block::Driver;
use crate::crash::enumerate::Reach;
use crate::crash::simulated::Simulation;
use crate::io::Alignment;
use crate::io::block_on;
use crate::io::sim::{Rng, Sim, SimFile, SimTask};

/// Content of a block that was written with `value`; zeros for 0.
fn block_content(block: u64, value: u64) -> Vec<u8> {
    let word = if value == 0 { 0 } else { value << 32 | block };
    word.to_le_bytes().repeat(64)
}

/// The value in a block, which must be whole and of this block.
fn block_value(block: u64, content: &[u8]) -> Option<u64> {
    let word = u64::from_le_bytes(content[..8].try_into().unwrap());
    let whole = content.chunks_exact(8).all(|chunk| chunk == &content[..8]);
    (whole && (word == 0 || word & 0xffff_ffff == block)).then_some(word >> 32)
}

/// What was done to one block, oldest first.
#[derive(Clone, Debug)]
struct History {
    /// Each change: the values that the block may have by it.
    changes: Vec<Vec<u64>>,
    /// How many of them have completed.
    completed: usize,
    /// The oldest change that may still be the last one on disk.
    floor: usize,
}

impl History {
    fn new(value: u64) -> History {
        History { changes: vec![vec![value]], completed: 1, floor: 0 }
    }

    fn allows(&self, value: u64) -> bool {
        self.changes[self.floor..].iter().any(|values| values.contains(&value))
    }
}

struct Model {
    blocks: Mutex<Vec<History>>,
}

impl Model {
    fn begin(&self, range: ByteRange, value: u64, discard: bool) {
        let mut blocks = self.blocks.lock().unwrap();
        for block in range.offset / 512..range.end() / 512 {
            let history = &mut blocks[block as usize];
            let mut values = vec![value];
            if discard {
                values.extend(history.changes.last().unwrap());
            }
            history.changes.push(values);
        }
    }

    fn end(&self, range: ByteRange) {
        let mut blocks = self.blocks.lock().unwrap();
        for block in range.offset / 512..range.end() / 512 {
            let history = &mut blocks[block as usize];
            history.completed = history.changes.len();
        }
    }

    /// What a flush that is submitted now must make durable.
    fn completed(&self) -> Vec<usize> {
        self.blocks.lock().unwrap().iter().map(|history| history.completed).collect()
    }

    fn flushed(&self, completed: &[usize]) {
        for (history, completed) in self.blocks.lock().unwrap().iter_mut().zip(completed) {
            history.floor = history.floor.max(completed - 1);
        }
    }

    /// A number that grows when more must be there after a cut.
    fn promised(&self) -> u64 {
        self.blocks.lock().unwrap().iter().map(|history| history.floor as u64).sum()
    }

    fn check(&self, content: &[u8], what: &str) {
        let blocks = self.blocks.lock().unwrap();
        for (block, history) in blocks.iter().enumerate() {
            let content = &content[block * 512..][..512];
            let value = block_value(block as u64, content).unwrap_or_else(|| {
                panic!("{what}: block {block} holds foreign or torn data: {:x?}", &content[..16])
            });
            assert!(
                history.allows(value),
                "{what}: block {block} is {value}, but {:?} were possible",
                &history.changes[history.floor..]
            );
        }
    }
}

/// What kind of image is tried.
struct Case {
    name: &'static str,
    file: SimFile,
    size: u64,
    base: Option<Vec<u8>>,
    /// The values of all blocks at the start.
    start: Vec<u64>,
    longest: u64,
    /// The power fails once in so many steps.
    cut_every: u64,
    seeds: std::ops::Range<u64>,
}

fn base_content(size: u64) -> Vec<u8> {
    (0..size / 512).flat_map(|block| block_content(block, 1)).collect()
}

fn created(name: &'static str, options: CreateOptions, longest: u64, seeds: u64) -> Case {
    let file = new_image(&options, Alignment::NONE);
    let size = options.size;
    // The backing ends before the disk.
    let base = options.backing.is_some().then(|| base_content(align_down(size * 3 / 4, 512)));
    let covered = base.as_ref().map_or(0, |base| base.len() as u64 / 512);
    let start = (0..size / 512).map(|block| u64::from(block < covered)).collect();
    Case { name, file, size, base, start, longest, cut_every: 12, seeds: 0..seeds }
}

/// An image made by qemu-img, all of it data. Small, so that all that shares a cluster of
/// compressed data is soon overwritten, and the cluster free.
fn converted(name: &'static str, compressed: bool, snapshot: bool, seeds: u64) -> Option<Case> {
    let size = 64 << 10;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::write(dir.path().join("base.raw"), base_content(size)).unwrap();
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096"];
    if compressed {
        args.push("-c");
    }
    args.extend(["base.raw", "image.qcow2"]);
    qemu("qemu-img")?.args(&args).current_dir(dir.path()).status().unwrap();
    if snapshot {
        let args = ["snapshot", "-c", "one", "image.qcow2"];
        qemu("qemu-img")?.args(args).current_dir(dir.path()).status().unwrap();
    }
    let image = std::fs::read(dir.path().join("image.qcow2")).unwrap();
    let file = SimFile::from_bytes("test.qcow2", image);
    let start = vec![1; size as usize / 512];
    let (longest, cut_every) = (24, 12);
    Some(Case { name, file, size, base: None, start, longest, cut_every, seeds: 0..seeds })
}

/// Opens what a power cut left, compares, and goes on with it.
fn check_cut(case: &Case, model: &Model, image: Vec<u8>, thorough: bool, what: &str) {
    if thorough {
        check_with_qemu(&image, None, case.base.as_deref(), what);
    }
    let node = case.base.as_ref().map(|base| raw_node(base, Alignment::NONE));
    let file = SimFile::from_bytes("cut.qcow2", image);
    let driver = open_image(&file, node, None);
    let content = block_on(read(&driver, 0, case.size));
    model.check(&content, what);
    if thorough {
        // It can be written to.
        let mut rng = Rng::new(content.len() as u64);
        let mut expected = content;
        for _ in 0..20 {
            let offset = rng.below(case.size / 512) * 512;
            block_on(write(&driver, offset, &[9; 512])).unwrap();
            expected[offset as usize..][..512].fill(9);
        }
        block_on(driver.close()).unwrap();
        let content = block_on(read(&driver, 0, case.size));
        assert!(content == expected, "{what}: differs after writing on");
        check_with_qemu(&file.durable(), Some(&content), case.base.as_deref(), what);
    }
}

/// How many tasks a guest has.
const LANES: u64 = 4;

/// The tasks of a guest that writes, zeroes, discards and flushes.
fn guests<'a>(case: &'a Case, driver: &'a Driven, model: &'a Model, seed: u64) -> Vec<SimTask<'a>> {
    let lane = case.size / 512 / LANES;
    (0..LANES)
        .map(|i| {
            let mut rng = Rng::new(seed * 1000 + i);
            Box::pin(async move {
                for step in 0..25 {
                    let first = rng.below(lane);
                    let len = 1 + rng.below(case.longest.min(lane - first));
                    let range = ByteRange { offset: (i * lane + first) * 512, len: len * 512 };
                    let value = 2 + step * LANES + i;
                    match rng.below(10) {
                        0 | 1 => {
                            let completed = model.completed();
                            driver.flush().await.unwrap();
                            model.flushed(&completed);
                        }
                        2 => {
                            model.begin(range, 0, false);
                            driver.write_zeroes(range, rng.one_in(2)).await.unwrap();
                            model.end(range);
                        }
                        3 => {
                            model.begin(range, 0, true);
                            driver.discard(range).await.unwrap();
                            model.end(range);
                        }
                        _ => {
                            model.begin(range, value, false);
                            let blocks = range.offset / 512..range.end() / 512;
                            let data: Vec<u8> =
                                blocks.flat_map(|block| block_content(block, value)).collect();
                            write(driver, range.offset, &data).await.unwrap();
                            model.end(range);
                        }
                    }
                }
            }) as SimTask<'a>
        })
        .collect()
}

fn run(case: &Case) {
    let start_image = case.file.durable();
    let mut cuts = 0u64;
    for seed in case.seeds.clone() {
        let file = SimFile::from_bytes("test.qcow2", start_image.clone());
        let node = case.base.as_ref().map(|base| raw_node(base, Alignment::NONE));
        let driver = open_image(&file, node, None);
        let model =
            Model { blocks: Mutex::new(case.start.iter().copied().map(History::new).collect()) };
        let sim = Sim::new(seed);
        sim.attach(&file);
        let tasks = guests(case, &driver, &model, seed);
        let mut rng = Rng::new(!seed);
        sim.run_until(tasks, |step| {
            if rng.one_in(case.cut_every) {
                cuts += 1;
                let what = format!("{}, seed {seed}, step {step}", case.name);
                let image = file.power_cut(rng.word());
                check_cut(case, &model, image, cuts.is_multiple_of(16), &what);
            }
            false
        });
        let completed = model.completed();
        sim.block_on(driver.flush()).unwrap();
        model.flushed(&completed);
        let what = format!("{}, seed {seed}, end", case.name);
        check_cut(case, &model, file.power_cut(seed), true, &what);
    }
    eprintln!("{}: {cuts} power cuts", case.name);
    assert!(cuts > 100, "too few cuts to mean anything");
}

/// Not drawn by lot: all states that a cut could leave, at each step, until there were many.
#[test]
fn every_power_cut() {
    const STATES: u64 = 1500;
    let reach = Reach { reorder: true, torn: 512 | 4096, all_subsets: 5, samples: 10, seed: 1 };
    for case in [
        created("plain", backed(30 * 4096, 4096, false), 24, 1),
        created("backed", backed(30 * 4096 + 512, 4096, true), 24, 1),
        created("tiny", backed(64 << 10, 512, true), 12, 1),
    ] {
        let node = case.base.as_ref().map(|base| raw_node(base, Alignment::NONE));
        let driver = open_image(&case.file, node, None);
        let model =
            Model { blocks: Mutex::new(case.start.iter().copied().map(History::new).collect()) };
        let sim = Sim::new(1);
        sim.attach(&case.file);
        let mut simulation = Simulation::new(&[&case.file], reach);
        let mut thorough = 0u64;
        sim.run_until(guests(&case, &driver, &model, 1), |step| {
            simulation.explore(model.promised(), |left, state| {
                thorough += 1;
                let what = format!("{}, step {step}, {state}", case.name);
                let image = left[0].volatile();
                check_cut(&case, &model, image, thorough.is_multiple_of(128), &what);
            });
            simulation.states() > STATES
        });
        eprintln!("{}: {} states", case.name, simulation.states());
        assert!(simulation.states() > 300, "too few states to mean anything");
    }
}

#[test]
fn power_cuts_without_backing() {
    run(&created("plain", backed(40 * 65536, 65536, false), 200, 12));
}

#[test]
fn power_cuts_with_backing() {
    run(&created("backed", backed(60 * 4096 + 512, 4096, true), 24, 30));
}

#[test]
fn power_cuts_with_tiny_clusters() {
    run(&created("tiny", backed(300 << 10, 512, true), 24, 30));
}

#[test]
fn power_cuts_while_refcount_tables_move() {
    let options = CreateOptions { refcount_bits: 64, ..backed(5 << 19, 512, false) };
    run(&Case { cut_every: 60, ..created("moving", options, 300, 5) });
    let options = CreateOptions { refcount_bits: 1, ..backed(256 << 10, 512, false) };
    run(&Case { cut_every: 25, ..created("bits", options, 60, 5) });
}

#[test]
fn power_cuts_on_compressed_images_and_snapshots() {
    for (name, compressed, snapshot) in
        [("compressed", true, false), ("snapshot", false, true), ("both", true, true)]
    {
        if let Some(case) = converted(name, compressed, snapshot, 20) {
            run(&case);
        }
    }
}

#[test]
fn power_cuts_during_flushes_that_were_dropped() {
    for seed in 0..80 {
        let mut rng = Rng::new(seed);
        let case = created("dropped", backed(40 * 4096, 4096, false), 0, 1);
        let file = &case.file;
        let driver = open_image(file, None, None);
        let model =
            Model { blocks: Mutex::new(case.start.iter().copied().map(History::new).collect()) };
        let sim = Sim::new(seed);
        sim.attach(file);
        for round in 0..12 {
            for _ in 0..3 {
                let block = rng.below(case.size / 512);
                let range = ByteRange { offset: block * 512, len: 512 };
                let value = 2 + round;
                model.begin(range, value, false);
                sim.block_on(write(&driver, range.offset, &block_content(block, value))).unwrap();
                model.end(range);
            }
            let completed = model.completed();
            let stop = rng.below(14);
            let flush: SimTask<'_> = Box::pin(async { driver.flush().await.unwrap() });
            if sim.run_until(vec![flush], |step| step >= stop) {
                model.flushed(&completed);
            }
            for _ in 0..3 {
                sim.step();
                let what = format!("dropped flush, seed {seed}, round {round}");
                let cut = file.power_cut(rng.word());
                check_cut(&case, &model, cut, rng.one_in(25), &what);
            }
        }
        let completed = model.completed();
        sim.block_on(driver.flush()).unwrap();
        model.flushed(&completed);
        check_cut(&case, &model, file.power_cut(seed), true, &format!("dropped, seed {seed}"));
    }
}
