//! Disks that change their size while they are open: between requests, failing, and cut off.

use super::testing::*;
use super::*;
use crate::block::Driver;
use crate::io::block_on;
use crate::io::sim::{Fault, Rng, SimFile};
use crate::units::{GIB, MIB};

fn options(backing: Option<&Node>, read_only: bool) -> OpenOptions {
    OpenOptions { read_only, backing: backing.cloned(), ..OpenOptions::default() }
}

/// Random requests and sizes against a vector of bytes.
fn run(name: &str, fixture: &Fixture, parent: Option<&[u8]>) {
    let node = parent.map(parent_node);
    // Below its parent's size a disk that has become smaller cannot grow again.
    let least = parent.map_or(1, |parent| parent.len() as u64 / fixture.sector);
    for seed in 0..3 {
        let mut rng = Rng::new(seed);
        let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
        let mut driver = open_with(&file, options(node.as_ref(), false)).unwrap();
        let mut model = parent.map_or(Vec::new(), <[u8]>::to_vec);
        model.resize(fixture.size as usize, 0);
        for step in 0..150 {
            let what = format!("{name}, seed {seed}, step {step}");
            let size = model.len() as u64;
            let unit = if rng.one_in(4) { fixture.block } else { fixture.sector };
            let start = rng.below(size.div_ceil(unit)) * unit;
            let range = ByteRange::between(start, (start + (1 + rng.below(60)) * unit).min(size));
            let part = range.offset as usize..range.end() as usize;
            match rng.below(12) {
                0 | 1 => {
                    let sectors = least + rng.below(6 * MIB / fixture.sector - least);
                    let new = sectors * fixture.sector;
                    block_on(driver.resize(new)).unwrap_or_else(|err| panic!("{what}: {err}"));
                    assert_eq!(driver.limits().size, new, "{what}");
                    model.resize(new as usize, 0);
                }
                2 => block_on(driver.flush()).unwrap(),
                3 => {
                    block_on(driver.close()).unwrap();
                    drop(driver);
                    driver = open_with(&file, options(node.as_ref(), false)).unwrap();
                }
                4 => {
                    block_on(driver.write_zeroes(range, rng.one_in(2))).unwrap();
                    model[part].fill(0);
                }
                5 => {
                    block_on(driver.discard(range)).unwrap();
                    model[part.clone()].copy_from_slice(&block_on(read(
                        &driver,
                        range.offset,
                        range.len,
                    )));
                }
                _ => {
                    let data = vec![1 + step as u8; range.len as usize];
                    block_on(write(&driver, range.offset, &data, rng.one_in(20))).unwrap();
                    model[part].copy_from_slice(&data);
                }
            }
            if step % 10 == 9 {
                let found = block_on(read(&driver, 0, model.len() as u64));
                assert!(found == model, "{what}: differs");
            }
        }
        block_on(driver.close()).unwrap();
        let found: Arc<dyn File> = Arc::new(file.after_power_cut(seed));
        let found = block_on(check::check(&found, None)).unwrap();
        assert_eq!(found.corruptions, 0, "{name}, seed {seed}: {found:?}");
        let driver = open_with(&file.after_power_cut(seed), options(node.as_ref(), true)).unwrap();
        assert!(block_on(read(&driver, 0, model.len() as u64)) == model, "{name}: closed");
    }
}

#[test]
fn sizes_change_between_requests() {
    run("dynamic", &Fixture::new(3 * MIB + 512), None);
    let fixed = Fixture { is_fixed: true, ..Fixture::new(2 * MIB) };
    run("fixed", &fixed, None);
    let large_sectors = Fixture { sector: 4096, block: 2 * MIB, ..Fixture::new(3 * MIB) };
    run("4096", &large_sectors, None);
    let child = Fixture { has_parent: true, ..Fixture::new(3 * MIB) };
    run("differencing", &child, Some(&vec![0x77; MIB as usize + 512]));
}

/// A size that takes a larger BAT, which moves, and back.
#[test]
fn the_bat_moves_under_an_open_image() {
    let file = SimFile::from_bytes("test.vhdx", Fixture::new(100 * GIB).bytes());
    let driver = open_image(&file, None, None).unwrap();
    block_on(async {
        let end = 100 * GIB - MIB;
        write(&driver, end, &[1; 4096], false).await.unwrap();
        driver.resize(300 * GIB).await.unwrap();
        write(&driver, 300 * GIB - 4096, &[2; 4096], false).await.unwrap();
        assert_eq!(read(&driver, end, 4096).await, [1; 4096]);
        driver.resize(end + 4096).await.unwrap();
        write(&driver, 0, &[3; 4096], false).await.unwrap();
        driver.close().await.unwrap();
    });
    let driver = open_image(&file.after_power_cut(0), None, None).unwrap();
    assert_eq!(driver.limits().size, 100 * GIB - MIB + 4096);
    assert_eq!(block_on(read(&driver, 100 * GIB - MIB, 4096)), [1; 4096]);
    assert_eq!(block_on(read(&driver, 0, 4096)), [3; 4096]);
}

#[test]
fn what_cannot_be_done_is_refused_and_the_disk_goes_on() {
    let parent = parent_node(&vec![7; 3 * MIB as usize]);
    let child = Fixture { has_parent: true, ..Fixture::new(2 * MIB) };
    let file = SimFile::from_bytes("test.vhdx", child.bytes());
    let driver = open_with(&file, options(Some(&parent), false)).unwrap();
    for (size, words) in [
        (0, "not a multiple of the 512 bytes"),
        (1000, "not a multiple of the 512 bytes"),
        (65 << 40, "up to 64T"),
        (4 * MIB, "its backing file is larger than the disk"),
    ] {
        block_on(write(&driver, 0, &[9; 512], false)).unwrap();
        let err = block_on(driver.resize(size)).unwrap_err().to_string();
        assert!(err.starts_with("test.vhdx: ") && err.contains(words), "{err}");
    }
    block_on(write(&driver, 512, &[8; 512], false)).unwrap();
    block_on(driver.flush()).unwrap();
    let again = open_with(&file.after_power_cut(1), options(Some(&parent), true)).unwrap();
    assert_eq!(block_on(read(&again, 0, 1024)), [[9; 512], [8; 512]].concat());
}

/// Cut off after each operation, with any subset of what was not flushed: the old size or the new
/// one, and all that was flushed. Whoever goes on with the open image sees the size that the file has.
#[test]
fn a_power_cut_leaves_the_old_size_or_the_new() {
    let old = 2 * MIB + 512;
    for (new, is_fixed) in [(4 * MIB, false), (MIB, false), (4 * MIB, true), (MIB - 512, true)] {
        let fixture = Fixture { is_fixed, ..Fixture::new(old) };
        let (mut cuts, mut sizes) = (0, std::collections::BTreeSet::new());
        for after in 0.. {
            let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
            let driver = open_image(&file, None, None).unwrap();
            block_on(write(&driver, 0, &vec![0x55; old as usize], false)).unwrap();
            block_on(driver.flush()).unwrap();
            file.fail(Fault { op: None, after, errno: libc::EIO, for_good: true });
            let made = block_on(driver.resize(new));
            for seed in 0..12 {
                let left = file.after_power_cut(seed);
                let what = format!("to {new}, operation {after}, seed {seed}");
                let disk =
                    open_image(&left, None, None).unwrap_or_else(|err| panic!("{what}: {err}"));
                let size = disk.limits().size;
                assert!(size == old || size == new, "{what}: {size}");
                let content = block_on(read(&disk, 0, size));
                let (head, tail) = content.split_at(old.min(size) as usize);
                assert!(head.iter().all(|byte| *byte == 0x55), "{what}: lost");
                assert!(tail.iter().all(|byte| *byte == 0), "{what}: old data");
                sizes.insert(size);
                cuts += 1;
            }
            file.heal();
            let size = driver.limits().size;
            if made.is_ok() {
                assert_eq!(size, new);
                block_on(write(&driver, size - 512, &[0x66; 512], true)).unwrap();
                let disk = open_image(&file.after_power_cut(after), None, None).unwrap();
                assert_eq!(block_on(read(&disk, size - 512, 512)), [0x66; 512]);
                break;
            }
            // Reads go on, as far as the disk goes.
            assert!(block_on(read(&driver, 0, size.min(old).min(new))).iter().all(|b| *b == 0x55));
        }
        eprintln!("to {new}: {cuts} power cuts");
        assert!(cuts > 150 && sizes.len() == 2, "{cuts} {sizes:?}");
    }
}
