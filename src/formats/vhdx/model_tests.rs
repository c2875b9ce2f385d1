//! Random requests against a vector of bytes, across reopening, on all kinds of images.

use super::testing::*;
use super::*;
use crate::block::Driver;
use crate::io::block_on;
use crate::io::sim::{Fault, Rng, SimFile, SimOp};
use crate::units::MIB;

/// A kind of image.
struct Case {
    fixture: Fixture,
    /// Content of the parent, and the parent.
    parent: Option<(Vec<u8>, Node)>,
    steps: usize,
    cache: u64,
    /// Only this much of the disk is used, to keep the file small; the rest is zeros.
    window: Vec<ByteRange>,
}

/// A parent of this content.
fn below(content: Vec<u8>) -> Option<(Vec<u8>, Node)> {
    let node = parent_node(&content);
    Some((content, node))
}

impl Case {
    fn new(fixture: Fixture) -> Case {
        let all = ByteRange { offset: 0, len: fixture.size };
        Case { fixture, parent: None, steps: 300, cache: DEFAULT_CACHE, window: vec![all] }
    }

    /// On a parent of `len` random bytes.
    fn with_parent(mut fixture: Fixture, len: u64) -> Case {
        fixture.has_parent = true;
        let mut rng = Rng::new(7);
        let parent = (0..len / 8).flat_map(|_| rng.word().to_le_bytes()).collect();
        Case { parent: below(parent), ..Case::new(fixture) }
    }

    fn open(&self, file: &SimFile, read_only: bool) -> Driven {
        let backing = self.parent.as_ref().map(|(_, node)| node.clone());
        let options =
            OpenOptions { read_only, backing, cache: self.cache, ..OpenOptions::default() };
        open_with(file, options).unwrap()
    }

    /// A range of the disk in whole sectors; now and then whole blocks.
    fn range(&self, rng: &mut Rng) -> ByteRange {
        let window = self.window[rng.below(self.window.len() as u64) as usize];
        let unit = match rng.below(4) {
            0 => self.fixture.block,
            1 => 64 << 10,
            _ => self.fixture.sector,
        };
        let (first, last) = (window.offset / unit, window.end().div_ceil(unit));
        let start = first + rng.below(last - first);
        let longest = if unit == self.fixture.block { 2 } else { 40 };
        let len = 1 + rng.below(longest.min(last - start));
        let end = ((start + len) * unit).min(window.end());
        ByteRange::between((start * unit).max(window.offset), end)
    }
}

/// The bytes of the windows, which is all that is ever used.
struct Model {
    parts: Vec<(ByteRange, Vec<u8>)>,
}

impl Model {
    fn new(case: &Case) -> Model {
        let part = |window: &ByteRange| {
            let mut bytes = vec![0; window.len as usize];
            if let Some((parent, _)) = &case.parent {
                let from = parent.len().min(window.offset as usize);
                let to = parent.len().min(window.end() as usize);
                bytes[..to - from].copy_from_slice(&parent[from..to]);
            }
            (*window, bytes)
        };
        Model { parts: case.window.iter().map(part).collect() }
    }

    fn slice(&mut self, range: ByteRange) -> &mut [u8] {
        let inside =
            |window: &ByteRange| range.offset >= window.offset && range.end() <= window.end();
        let (window, bytes) = self.parts.iter_mut().find(|(w, _)| inside(w)).unwrap();
        let from = (range.offset - window.offset) as usize;
        &mut bytes[from..from + range.len as usize]
    }

    fn check(&self, driver: &Driven, what: &str) {
        for (window, bytes) in &self.parts {
            let found = block_on(read(driver, window.offset, window.len));
            if found != *bytes {
                let at = found.iter().zip(bytes).position(|(a, b)| a != b).unwrap();
                panic!("{what}: differs from byte {} of the disk on", window.offset + at as u64);
            }
        }
    }
}

fn run(name: &str, case: &Case, seeds: u64) {
    for seed in 0..seeds {
        let mut rng = Rng::new(seed);
        let file = SimFile::from_bytes("test.vhdx", case.fixture.bytes());
        let mut driver = case.open(&file, false);
        let mut model = Model::new(case);
        for step in 0..case.steps {
            let what = format!("{name}, seed {seed}, step {step}");
            let range = case.range(&mut rng);
            match rng.below(20) {
                0 => block_on(driver.flush()).unwrap(),
                1 => {
                    // Closed in order, or as a kill leaves it after a flush.
                    match rng.one_in(2) {
                        true => block_on(driver.close()).unwrap(),
                        false => block_on(driver.flush()).unwrap(),
                    }
                    let reader = case.open(&file.after_kill(), true);
                    model.check(&reader, &what);
                    driver = case.open(&file, false);
                }
                2..=4 => {
                    block_on(driver.write_zeroes(range, rng.one_in(2))).unwrap();
                    model.slice(range).fill(0);
                }
                5..=7 => {
                    block_on(driver.discard(range)).unwrap();
                    let found = block_on(read(&driver, range.offset, range.len));
                    let known = model.slice(range).chunks_mut(512).zip(found.chunks(512));
                    for (known, found) in known.filter(|(known, found)| known != found) {
                        let zeros = found.iter().all(|byte| *byte == 0);
                        assert!(zeros, "{what}: a discard shows other data");
                        known.fill(0);
                    }
                }
                8..=11 => {
                    let found = block_on(read(&driver, range.offset, range.len));
                    assert!(found == model.slice(range), "{what}: {range} differ");
                }
                _ => {
                    let word = rng.word();
                    let data: Vec<u8> = (0..range.len / 512)
                        .flat_map(|sector| (word ^ sector).to_le_bytes().repeat(64))
                        .collect();
                    block_on(write(&driver, range.offset, &data, rng.one_in(20))).unwrap();
                    model.slice(range).copy_from_slice(&data);
                }
            }
        }
        model.check(&driver, &format!("{name}, seed {seed}, end"));
        block_on(driver.close()).unwrap();
        // A clean close leaves an empty log.
        let driver = case.open(&file.after_power_cut(seed), true);
        assert!(driver.format().structure().replay.is_none());
        model.check(&driver, &format!("{name}, seed {seed}, closed"));
    }
}

#[test]
fn dynamic_images_agree_with_a_vector_of_bytes() {
    run("dynamic", &Case::new(Fixture::new(7 * MIB + 512)), 6);
    let large_sectors = Fixture { sector: 4096, ..Fixture::new(5 * MIB + 4096) };
    run("4096", &Case::new(large_sectors), 3);
    let two = Fixture { block: 2 * MIB, ..Fixture::new(9 * MIB) };
    run("2 MiB blocks", &Case::new(two), 3);
}

#[test]
fn differencing_images_agree_with_a_vector_of_bytes() {
    run("differencing", &Case::with_parent(Fixture::new(7 * MIB + 512), 7 * MIB + 512), 6);
    // The parent ends before the disk, within a block.
    run("short parent", &Case::with_parent(Fixture::new(6 * MIB), 3 * MIB + 512), 3);
    let large_sectors = Fixture { sector: 4096, ..Fixture::new(5 * MIB + 4096) };
    run("4096 with a parent", &Case::with_parent(large_sectors, 5 * MIB), 3);
}

/// The ends of a disk of more than 4 GiB, where payload entries lie beyond the first bitmap's.
#[test]
fn beyond_the_first_sector_bitmap() {
    let size = (4 << 30) + 3 * MIB;
    let mut fixture = Fixture::new(size);
    let ends = || {
        vec![
            ByteRange { offset: 0, len: 2 * MIB },
            ByteRange { offset: (4 << 30) - 2 * MIB, len: 5 * MIB },
        ]
    };
    let case = Case { window: ends(), ..Case::new(fixture.clone()) };
    run("interleave", &case, 2);
    fixture.has_parent = true;
    let parent = below(vec![0x77; 3 * MIB as usize]);
    let case = Case { window: ends(), parent, ..Case::new(fixture) };
    run("interleave, differencing", &case, 2);
}

/// Blocks of 256 MiB, whose bits take many pages: where two meet, and the last, which is not whole.
#[test]
fn the_largest_blocks() {
    for sector in [512, 4096] {
        let fixture = Fixture { block: 256 * MIB, sector, ..Fixture::new(600 * MIB + 4096) };
        let part = |offset, len| ByteRange { offset: offset * MIB, len };
        let window = vec![part(255, 2 * MIB), part(511, MIB), part(599, MIB + 4096)];
        let case = Case { window: window.clone(), steps: 100, ..Case::new(fixture.clone()) };
        run("256 MiB blocks", &case, 2);
        let fixture = Fixture { has_parent: true, ..fixture };
        let parent = below(vec![0x55; 256 << 20]);
        let case = Case { window, parent, steps: 100, ..Case::new(fixture) };
        run("256 MiB blocks, differencing", &case, 2);
    }
}

#[test]
fn fixed_images_agree_with_a_vector_of_bytes() {
    let fixed = Fixture { is_fixed: true, ..Fixture::new(5 * MIB + 512) };
    run("fixed", &Case::new(fixed), 4);
    let large_sectors = Fixture { is_fixed: true, sector: 4096, ..Fixture::new(3 * MIB + 4096) };
    run("fixed, 4096", &Case::new(large_sectors), 2);
}

/// With memory for the fewest pages that there can be, everything comes and goes.
#[test]
fn hardly_any_memory_for_pages() {
    let size = (4 << 30) + 3 * MIB;
    let ends = || {
        let far = [0, 700, 1500, 2100, 2700, 3300, 4095];
        far.map(|mib| ByteRange { offset: mib * MIB, len: 2 * MIB }).to_vec()
    };
    let case = Case { window: ends(), cache: 1, ..Case::new(Fixture::new(size)) };
    run("little memory", &case, 3);
    let fixture = Fixture { has_parent: true, ..Fixture::new(size) };
    let parent = below(vec![0x77; 3 * MIB as usize]);
    let case = Case { window: ends(), cache: 1, parent, ..Case::new(fixture) };
    run("little memory, differencing", &case, 3);
}

#[test]
fn discards_and_zeroes_make_room_for_others() {
    let file = SimFile::from_bytes("test.vhdx", Fixture::new(8 * MIB).bytes());
    let driver = open_image(&file, None, None).unwrap();
    block_on(async {
        let block = |n: u64| ByteRange { offset: n * MIB, len: MIB };
        for n in 0..4 {
            write(&driver, n * MIB, &vec![1 + n as u8; MIB as usize], false).await.unwrap();
        }
        let full = file.volatile().len();
        driver.discard(block(0)).await.unwrap();
        driver.write_zeroes(block(1), true).await.unwrap();
        driver.flush().await.unwrap();
        // Where they were is zeros now, and is used for others.
        let zeros = file.volatile()[4 << 20..6 << 20].iter().all(|byte| *byte == 0);
        assert!(zeros, "what was freed was not given back to the host");
        write(&driver, 4 * MIB, &[5; 512], false).await.unwrap();
        write(&driver, 5 * MIB, &[6; 512], false).await.unwrap();
        assert_eq!(file.volatile().len(), full);
        assert_eq!(read(&driver, 0, 2 * MIB).await, vec![0; 2 << 20]);
        assert_eq!(read(&driver, 2 * MIB, 512).await, [3; 512]);
        assert_eq!(read(&driver, 4 * MIB, 1024).await, [[5; 512], [0; 512]].concat());
        // Without a flush, what was freed is not used again.
        driver.discard(block(2)).await.unwrap();
        write(&driver, 6 * MIB, &[7; 512], false).await.unwrap();
        assert_eq!(file.volatile()[8 << 20..][..512], [7; 512]);
    });
}

#[test]
fn a_closed_image_ends_with_its_last_block() {
    for block in [MIB, 2 * MIB] {
        let fixture = Fixture { block, ..Fixture::new(16 * MIB) };
        let fresh = fixture.bytes().len();
        let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
        let clear = |driver: &Driven, from: u64, to: u64| {
            let range = ByteRange::between(from * MIB, to * MIB);
            block_on(driver.discard(range)).unwrap();
        };
        let driver = open_image(&file, None, None).unwrap();
        block_on(write(&driver, 0, &vec![1; 16 << 20], false)).unwrap();
        block_on(driver.close()).unwrap();
        assert_eq!(file.volatile().len(), fresh + (16 << 20));
        // Freed in the middle and at the end, by two sessions, the second of which uses it again.
        let driver = open_image(&file, None, None).unwrap();
        clear(&driver, 2, 4);
        clear(&driver, 10, 16);
        block_on(driver.close()).unwrap();
        assert_eq!(file.volatile().len(), fresh + (10 << 20));
        let driver = open_image(&file, None, None).unwrap();
        clear(&driver, 8, 10);
        block_on(driver.flush()).unwrap();
        block_on(write(&driver, 14 * MIB, &vec![2; 2 << 20], false)).unwrap();
        block_on(driver.close()).unwrap();
        assert_eq!(file.volatile().len(), fresh + (8 << 20));
        // What a kill leaves behind is cut off when the image is closed the next time.
        let driver = open_image(&file, None, None).unwrap();
        block_on(write(&driver, 10 * MIB, &vec![3; 6 << 20], false)).unwrap();
        block_on(driver.flush()).unwrap();
        let file = file.after_kill();
        let driver = open_image(&file, None, None).unwrap();
        clear(&driver, 0, 16);
        block_on(driver.close()).unwrap();
        assert_eq!(file.volatile().len(), fresh);
        assert_eq!(file.unflushed(), 0);
        let driver = open_image(&file.after_kill(), None, None).unwrap();
        assert_eq!(block_on(read(&driver, 0, 16 * MIB)), vec![0; 16 << 20]);
    }
}

/// A guest may try again for ever, and the first write to a chunk of a child makes a sector bitmap, too.
#[test]
fn attempts_that_the_host_has_no_room_for_take_no_place() {
    let fixture = Fixture { has_parent: true, block: 2 * MIB, ..Fixture::new(8 * MIB) };
    let len_after = |failures| {
        let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
        let driver = open_image(&file, Some(parent_node(&[1; 512])), None).unwrap();
        for _ in 0..failures {
            let op = Some(SimOp::SetLen);
            file.fail(Fault { op, after: 0, errno: libc::ENOSPC, for_good: true });
            block_on(write(&driver, 0, &[2; 512], false)).unwrap_err();
            file.heal();
        }
        block_on(write(&driver, 0, &[2; 512], false)).unwrap();
        assert_eq!(block_on(read(&driver, 0, 1024)), [[2; 512], [0; 512]].concat());
        block_on(driver.close()).unwrap();
        file.volatile().len()
    };
    assert_eq!(len_after(5), len_after(0));
}

#[test]
fn zeroes_that_must_keep_their_space_keep_it() {
    let file = SimFile::from_bytes("test.vhdx", Fixture::new(2 * MIB).bytes());
    let driver = open_image(&file, None, None).unwrap();
    block_on(async {
        write(&driver, 0, &vec![1; MIB as usize], false).await.unwrap();
        driver.write_zeroes(ByteRange { offset: 0, len: MIB }, false).await.unwrap();
        let status = driver.block_status(ByteRange { offset: 0, len: MIB }).await.unwrap();
        assert_eq!(status.kind, crate::block::StatusKind::Data);
        assert_eq!(read(&driver, 0, MIB).await, vec![0; 1 << 20]);
    });
}
