//! Power cuts: whatever a disk may keep of what was not flushed, the image opens, its log replays,
//! everything that was flushed is there, and no block shows another one's data.
//!
//! Several tasks write, zero, discard and flush on a slow disk that completes operations in any
//! order. Between any two steps of the whole the power may fail, so before and after each write
//! and flush of ours; the disk then holds what was flushed and any torn subset of the rest. Each
//! sector of the disk knows which values it may have.
//!
//! Each run ends with the end of the disk cleared and the image closed, which cuts the file, and with
//! it opened and written again.
//!
//! Small requests go to the ends of blocks only, and those are what is looked at after each cut:
//! a block has one place, so a wrong place shows there. The whole disk is looked at now and then,
//! when the replay is also done on disk, is cut off itself, again and again, and must say the same.
//!
//! `VUBLK_TEST_CUTS` multiplies the number of cuts, for a long search; `VUBLK_TEST_SEED` is the seed of
//! the first run, so that a later search does not repeat an earlier one.

use std::sync::Mutex;

use super::layout::HEADER_OFFSETS;
use super::testing::*;
use super::*;
use crate::block::{Driver, RangeLock};
use crate::crash::enumerate::Reach;
use crate::crash::simulated::Simulation;
use crate::io::block_on;
use crate::io::sim::{Fault, Rng, Sim, SimFile, SimTask};
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
        let parent = case.parent.as_ref().map_or(0, |(content, _)| content.len() as u64);
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

    /// A number that grows when more must be there after a cut.
    fn promised(&self) -> u64 {
        self.sectors.lock().unwrap().iter().map(|history| history.floor as u64).sum()
    }

    /// Compares the content of a range with what it may be.
    fn check(&self, range: ByteRange, content: &[u8], what: &str) {
        let sectors = self.sectors.lock().unwrap();
        for (n, content) in sectors_of(range).zip(content.chunks_exact(SECTOR as usize)) {
            let history = &sectors[n];
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

/// What kind of image is tried, and how.
struct Case {
    name: &'static str,
    fixture: Fixture,
    /// Content of the parent, and the parent.
    parent: Option<(Vec<u8>, Node)>,
    /// How often the power is cut at least.
    cuts: u64,
    /// How often it is cut at each step.
    cuts_per_step: u64,
    /// Requests of each task.
    requests: u64,
    /// One in so many requests is a flush.
    flush_every: u64,
    /// One in so many requests is for whole blocks, and those of clearing more often.
    blocks_every: u64,
    /// Memory for pages.
    cache: u64,
    /// Commits before it begins, to bring the log's head near its end.
    commits_before: u64,
}

/// How much of each block's start small requests go to, and of its end a quarter of that.
const WINDOW: u64 = 48 << 10;

impl Case {
    fn new(name: &'static str, size: u64, cuts: u64) -> Case {
        Case {
            name,
            fixture: Fixture::new(size),
            parent: None,
            cuts,
            cuts_per_step: 1,
            requests: 20,
            flush_every: 6,
            blocks_every: 20,
            cache: DEFAULT_CACHE,
            commits_before: 0,
        }
    }

    fn with_parent(mut self, len: u64) -> Case {
        self.fixture.has_parent = true;
        let content = content_of(ByteRange { offset: 0, len }, 1);
        let node = parent_node(&content);
        self.parent = Some((content, node));
        self
    }

    fn with_large_sectors(mut self) -> Case {
        self.fixture.sector = 4096;
        self
    }

    fn options(&self, read_only: bool) -> OpenOptions {
        let backing = self.parent.as_ref().map(|(_, node)| node.clone());
        OpenOptions { read_only, backing, cache: self.cache, ..OpenOptions::default() }
    }

    fn open(&self, file: &SimFile, read_only: bool, what: &str) -> Driven {
        open_with(file, self.options(read_only)).unwrap_or_else(|err| panic!("{what}: {err}"))
    }

    /// The parts of the disk that small requests go to.
    fn windows(&self) -> impl Iterator<Item = ByteRange> {
        let (size, block) = (self.fixture.size, self.fixture.block);
        (0..size.div_ceil(block)).flat_map(move |n| {
            let (start, end) = (n * block, ((n + 1) * block).min(size));
            let head = ByteRange::between(start, end.min(start + WINDOW));
            let tail = ByteRange::between(end.saturating_sub(WINDOW / 4).max(head.end()), end);
            [head, tail].into_iter().filter(|part| !part.is_empty())
        })
    }

    /// A range in sectors, or (one in `blocks_every`) in blocks.
    fn range(&self, rng: &mut Rng, blocks_every: u64) -> ByteRange {
        let (size, block, sector) = (self.fixture.size, self.fixture.block, self.fixture.sector);
        if rng.one_in(blocks_every) {
            let start = rng.below(size.div_ceil(block)) * block;
            return ByteRange::between(start, (start + (1 + rng.below(2)) * block).min(size));
        }
        let windows: Vec<_> = self.windows().collect();
        let window = windows[rng.below(windows.len() as u64) as usize];
        let start = window.offset + rng.below(window.len / sector) * sector;
        ByteRange::between(start, (start + (1 + rng.below(40)) * sector).min(window.end()))
    }

    /// The content of the parts that small requests go to, compared with what is possible.
    fn look(&self, driver: &Driven, model: &Model, what: &str) -> Vec<Vec<u8>> {
        let part = |range: ByteRange| {
            let content = block_on(read(driver, range.offset, range.len));
            model.check(range, &content, what);
            content
        };
        self.windows().map(part).collect()
    }
}

/// Opens what a power cut left and compares; now and then goes on with it.
fn check_cut(case: &Case, model: &Model, file: &SimFile, thorough: bool, what: &str) {
    let reader = case.open(file, true, what);
    let seen = case.look(&reader, model, what);
    if !thorough {
        return;
    }
    let all = ByteRange { offset: 0, len: case.fixture.size };
    let mut expected = block_on(read(&reader, 0, all.len));
    model.check(all, &expected, what);
    drop(reader);
    // A replay may be cut off as often as it likes.
    let mut rng = Rng::new(seen.iter().map(|part| u64::from(part[0])).sum());
    let mut file = file.clone();
    for round in 0..4 {
        file.fail(Fault { op: None, after: rng.below(40), errno: libc::EIO, for_good: true });
        let _ = open_with(&file, case.options(false));
        file.heal();
        file = file.after_power_cut(rng.word());
        let reader = case.open(&file, true, what);
        let again = case.look(&reader, model, what);
        assert!(again == seen, "{what}: replay {round} changed what is seen");
    }
    // Replayed on disk it says the same, and it can be written to.
    let driver = case.open(&file, false, what);
    assert!(block_on(read(&driver, 0, all.len)) == expected, "{what}: replayed on disk");
    for _ in 0..10 {
        let range = case.range(&mut rng, 20);
        let data = content_of(range, 9);
        block_on(write(&driver, range.offset, &data, false)).unwrap();
        expected[range.offset as usize..range.end() as usize].copy_from_slice(&data);
    }
    block_on(driver.close()).unwrap();
    let file = file.after_power_cut(rng.word());
    let content = block_on(read(&case.open(&file, true, what), 0, all.len));
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
    for step in 0..case.requests {
        let kind = rng.below(8);
        // Clearing whole blocks is what frees them; writing them is only slow.
        let range = case.range(&mut rng, if kind < 3 { 2 } else { case.blocks_every });
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

/// Writes and flushes one by one, which brings the log on.
fn commit_often(case: &Case, driver: &Driven, model: &Model) {
    for n in 0..case.commits_before {
        let block = n % case.fixture.size.div_ceil(case.fixture.block);
        let start = block * case.fixture.block;
        let end = (start + case.fixture.block).min(case.fixture.size);
        let range = ByteRange::between(start, end);
        model.begin(range, 0, false);
        block_on(driver.write_zeroes(range, true)).unwrap();
        model.end(range);
        let part = ByteRange { offset: range.offset, len: case.fixture.sector };
        model.begin(part, 1, false);
        block_on(write(driver, part.offset, &content_of(part, 1), false)).unwrap();
        model.end(part);
        let completed = model.completed();
        block_on(driver.flush()).unwrap();
        model.flushed(&completed);
    }
}

/// Clears the end of the disk, from a block on that is drawn by lot, and closes the image.
async fn close_trimmed(case: &Case, driver: &Driven, model: &Model, seed: u64) {
    let (size, block) = (case.fixture.size, case.fixture.block);
    let first = seed % (size.div_ceil(block) + 1);
    let range = ByteRange::between((first * block).min(size), size);
    if !range.is_empty() {
        model.begin(range, 0, false);
        driver.write_zeroes(range, true).await.unwrap();
        model.end(range);
    }
    let completed = model.completed();
    driver.close().await.unwrap();
    model.flushed(&completed);
}

/// Writes to each block, flushes now and then, and closes the image.
async fn write_again(case: &Case, driver: &Driven, model: &Model, seed: u64) {
    let windows: Vec<_> = case.windows().collect();
    for (n, window) in (seed..).zip(windows) {
        let range = ByteRange { offset: window.offset, len: case.fixture.sector };
        model.begin(range, 1000 + n, false);
        write(driver, range.offset, &content_of(range, 1000 + n), false).await.unwrap();
        model.end(range);
        if n % 3 == 0 {
            let completed = model.completed();
            driver.flush().await.unwrap();
            model.flushed(&completed);
        }
    }
    let completed = model.completed();
    driver.close().await.unwrap();
    model.flushed(&completed);
}

/// A number that the environment may set.
fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")))
}

fn run(case: &Case) {
    const LANES: u64 = 4;
    let factor = setting("VUBLK_TEST_CUTS").unwrap_or(1);
    let first = setting("VUBLK_TEST_SEED").unwrap_or(1);
    let (mut cuts, mut runs, mut shorter) = (0u64, 0, 0);
    while cuts < case.cuts * factor {
        let seed = first + runs;
        runs += 1;
        let file = SimFile::from_bytes("test.vhdx", case.fixture.bytes());
        let driver = case.open(&file, false, case.name);
        let model = Model::new(case);
        commit_often(case, &driver, &model);
        let busy = RangeLock::new();
        let sim = Sim::new(seed);
        sim.attach(&file);
        let tasks: Vec<SimTask<'_>> = (0..LANES)
            .map(|lane| Box::pin(guest(case, &driver, &model, &busy, lane, seed)) as SimTask<'_>)
            .collect();
        let mut rng = Rng::new(!seed);
        let mut run_and_cut = |tasks: Vec<SimTask<'_>>, part: &str| {
            sim.run_until(tasks, |step| {
                for _ in 0..case.cuts_per_step {
                    cuts += 1;
                    let what = format!("{}, seed {seed}, {part} {step}", case.name);
                    let left = file.after_power_cut(rng.word());
                    check_cut(case, &model, &left, cuts.is_multiple_of(100), &what);
                }
                false
            });
        };
        run_and_cut(tasks, "step");
        let completed = model.completed();
        sim.block_on(driver.flush()).unwrap();
        model.flushed(&completed);
        let what = format!("{}, seed {seed}, end", case.name);
        check_cut(case, &model, &file.after_power_cut(seed), true, &what);
        let before = file.volatile().len();
        run_and_cut(vec![Box::pin(close_trimmed(case, &driver, &model, seed))], "closing");
        shorter += u64::from(file.volatile().len() < before);
        let what = format!("{}, seed {seed}, closed", case.name);
        check_cut(case, &model, &file.after_power_cut(seed), true, &what);
        drop(driver);
        // The file grows again where it was cut.
        sim.detach(&file);
        let driver = case.open(&file, false, case.name);
        sim.attach(&file);
        run_and_cut(vec![Box::pin(write_again(case, &driver, &model, seed))], "again");
    }
    assert!(case.fixture.is_fixed || shorter > 0, "{}: no file was cut", case.name);
    assert!(cuts >= case.cuts * factor);
    eprintln!("{}: {cuts} power cuts in {runs} runs from seed {first} on", case.name);
}

/// How many cuts each case makes at least. The figures say what a run of all tests is worth.
const DYNAMIC: u64 = 4000;
const DIFFERENCING: u64 = 4000;
const FIXED: u64 = 1500;
const LARGE_SECTORS: u64 = 1500;
const HARDLY_FLUSHED: u64 = 1500;
const REUSE: u64 = 2000;
const WRAP: u64 = 2000;
const _: () = assert!(
    DYNAMIC + DIFFERENCING + FIXED + 2 * LARGE_SECTORS + HARDLY_FLUSHED + 2 * REUSE + 2 * WRAP
        >= 20_000
);

#[test]
fn power_cuts_of_a_dynamic_image() {
    run(&Case::new("dynamic", 2 * MIB + 512, DYNAMIC));
}

#[test]
fn power_cuts_of_a_differencing_image() {
    run(&Case::new("differencing", 2 * MIB + 512, DIFFERENCING).with_parent(MIB + 512));
}

#[test]
fn power_cuts_of_a_fixed_image() {
    let mut case = Case::new("fixed", 2 * MIB + 512, FIXED);
    case.fixture.is_fixed = true;
    run(&case);
}

#[test]
fn power_cuts_of_large_sectors() {
    run(&Case::new("4096", 2 * MIB + 4096, LARGE_SECTORS).with_large_sectors());
    let size = 2 * MIB + 4096;
    run(&Case::new("4096, differencing", size, LARGE_SECTORS)
        .with_large_sectors()
        .with_parent(2 * MIB));
}

#[test]
fn power_cuts_when_nobody_flushes() {
    run(&Case { flush_every: 200, ..Case::new("hardly flushed", 3 * MIB, HARDLY_FLUSHED) });
}

/// Blocks come and go all the time, so that each place in the file is used by many of them.
#[test]
fn power_cuts_while_freed_blocks_are_used_again() {
    let often = |case| Case { flush_every: 3, blocks_every: 2, ..case };
    run(&often(Case::new("reuse", 3 * MIB, REUSE)));
    run(&often(Case::new("reuse, differencing", 3 * MIB, REUSE).with_parent(2 * MIB + 512)));
}

/// The log fills up and goes on at its start, with hardly any memory for pages.
#[test]
fn power_cuts_while_the_log_wraps() {
    let wraps = |case| Case { commits_before: 108, flush_every: 2, requests: 30, cache: 1, ..case };
    run(&wraps(Case::new("wrap", 3 * MIB, WRAP)));
    run(&wraps(Case::new("wrap, differencing", 3 * MIB, WRAP).with_parent(2 * MIB + 512)));
}

/// Not drawn by lot: all states that a cut could leave, at each step, until there were many.
#[test]
fn every_power_cut() {
    const STATES: u64 = 1500;
    let reach = Reach { reorder: true, torn: 0, all_subsets: 5, samples: 4, seed: 1 };
    for case in [
        Case { flush_every: 3, ..Case::new("dynamic", MIB + 512, STATES) },
        Case { flush_every: 3, ..Case::new("differencing", MIB + 512, STATES) }.with_parent(MIB),
    ] {
        let (mut states, mut runs) = (0, 0);
        while states < case.cuts {
            let seed = setting("VUBLK_TEST_SEED").unwrap_or(1) + runs;
            runs += 1;
            let file = SimFile::from_bytes("test.vhdx", case.fixture.bytes());
            let driver = case.open(&file, false, case.name);
            let (model, busy, sim) = (Model::new(&case), RangeLock::new(), Sim::new(seed));
            sim.attach(&file);
            let guests = (0..4).map(|lane| guest(&case, &driver, &model, &busy, lane, seed));
            let tasks: Vec<_> = guests.map(|guest| Box::pin(guest) as SimTask<'_>).collect();
            let mut simulation = Simulation::new(&[&file], reach);
            sim.run_until(tasks, |step| {
                simulation.explore(model.promised(), |left, state| {
                    states += 1;
                    let what = format!("{}, seed {seed}, step {step}, {state}", case.name);
                    check_cut(&case, &model, &left[0], states.is_multiple_of(100), &what);
                });
                states >= case.cuts
            });
        }
        eprintln!("{}: {states} states in {runs} runs", case.name);
    }
}

// ---- orders that only images with a large BAT or a full log depend on --------------------------

/// Large enough for a BAT of two pages: then an entry of the log need not repeat what is in those
/// before.
const TWO_PAGES: u64 = 600 * MIB;
/// Block in the second page of the BAT.
const FAR: u64 = 520;

/// Shows `check` all that a power cut could leave at each step of a task; `promised` grows when more
/// must be there.
fn at_each_step<'a>(
    file: &'a SimFile,
    task: SimTask<'a>,
    promised: impl Fn() -> u64,
    check: impl Fn(&SimFile, &str),
) {
    let reach = Reach { reorder: true, torn: 0, all_subsets: 8, samples: 0, seed: 1 };
    let mut simulation = Simulation::new(&[file], reach);
    let sim = Sim::new(1);
    sim.attach(file);
    sim.run_until(vec![task], |step| {
        simulation
            .explore(promised(), |left, state| check(&left[0], &format!("step {step}, {state}")));
        false
    });
    assert!(simulation.states() > 0);
}

/// The first sector of a block.
fn first_sector(block: u64) -> ByteRange {
    ByteRange { offset: block * MIB, len: SECTOR }
}

async fn write_block(driver: &Driven, block: u64, value: u64) {
    let range = first_sector(block);
    write(driver, range.offset, &content_of(range, value), false).await.unwrap();
}

#[track_caller]
fn assert_holds(file: &SimFile, block: u64, value: u64, what: &str) {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let reader = open_with(file, options).unwrap_or_else(|err| panic!("{what}: {err}"));
    let range = first_sector(block);
    let content = block_on(read(&reader, range.offset, range.len));
    assert!(content == content_of(range, value), "{what}: block {block} is not what was flushed");
}

/// An image with two blocks that were flushed, and whose pages are in the log only.
fn with_two_blocks() -> (SimFile, Driven) {
    let file = SimFile::from_bytes("test.vhdx", Fixture::new(TWO_PAGES).bytes());
    let driver = open_image(&file, None, None).unwrap();
    block_on(write_block(&driver, 0, 2));
    block_on(write_block(&driver, FAR, 2));
    block_on(driver.flush()).unwrap();
    (file, driver)
}

#[test]
fn pages_are_in_their_place_before_the_log_forgets_them() {
    let (file, driver) = with_two_blocks();
    let task = async {
        driver.format().checkpoint().await.unwrap();
        // A change of the second page only, and no data that would have to be flushed first.
        driver.discard(ByteRange { offset: FAR * MIB, len: MIB }).await.unwrap();
        driver.flush().await.unwrap();
    };
    at_each_step(&file, Box::pin(task), || 0, |left, what| assert_holds(left, 0, 2, what));
}

#[test]
fn a_replay_is_durable_before_the_log_counts_as_empty() {
    let (file, _driver) = with_two_blocks();
    let file = SimFile::from_bytes("left.vhdx", file.durable());
    let task = async {
        let raw: Arc<dyn File> = Arc::new(file.clone());
        let structure = Structure::read(&raw).await.unwrap();
        Vhdx::open(structure, OpenOptions::default()).await.unwrap();
    };
    at_each_step(
        &file,
        Box::pin(task),
        || 0,
        |left, what| {
            assert_holds(left, 0, 2, what);
            assert_holds(left, FAR, 2, what);
        },
    );
}

/// The slot that the current header is not in is written first, and is on disk before anything else is
/// changed: the other slot, too.
#[test]
fn a_replay_changes_nothing_before_a_header_says_so() {
    let (file, _driver) = with_two_blocks();
    let file = SimFile::from_bytes("left.vhdx", file.durable());
    let headers_on_disk = || {
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("durable.vhdx", file.durable()));
        block_on(HeaderSlots::read(&file)).unwrap()
    };
    let before = headers_on_disk();
    let task = async {
        let raw: Arc<dyn File> = Arc::new(file.clone());
        let structure = Structure::read(&raw).await.unwrap();
        Vhdx::open(structure, OpenOptions::default()).await.unwrap();
    };
    let sim = Sim::new(1);
    sim.attach(&file);
    let mut changing = 0;
    sim.run_until(vec![Box::pin(task)], |step| {
        let places: Vec<u64> = file.at_risk().iter().map(|risk| risk.range.offset).collect();
        let other = HEADER_OFFSETS[1 - before.slot];
        if places.iter().any(|place| *place != other) {
            changing += 1;
            assert!(!places.contains(&other), "step {step}: both slots are at risk");
            let current = headers_on_disk().current;
            assert_ne!(current.file_write_guid, before.current.file_write_guid, "step {step}");
        }
        false
    });
    assert!(changing > 2);
    assert!(headers_on_disk().current.log_guid.is_zero());
}

/// When a log is full of entries that point back to the first, an empty one must be there before
/// that is overwritten.
#[test]
fn a_full_log_always_has_an_entry_to_begin_with() {
    let file = SimFile::from_bytes("test.vhdx", Fixture::new(4 * MIB).bytes());
    let driver = open_image(&file, None, None).unwrap();
    // Each of two blocks in turn is freed and written anew: an entry of two sectors of the log.
    let commit = async |n: u64| {
        let block = ByteRange { offset: n % 2 * MIB, len: MIB };
        driver.write_zeroes(block, true).await.unwrap();
        write_block(&driver, n % 2, n).await;
        driver.flush().await.unwrap();
    };
    for n in 2..100 {
        block_on(commit(n));
    }
    let now = std::cell::Cell::new(100);
    let task = async {
        for n in 100..150 {
            now.set(n);
            commit(n).await;
        }
    };
    at_each_step(
        &file,
        Box::pin(task),
        || now.get(),
        |left, what| {
            // The other block.
            let before = now.get() - 1;
            assert_holds(left, before % 2, before, what);
        },
    );
}
