//! Resized images: what is in them, and what a power cut leaves.

use std::sync::Arc;

use super::check::check;
use super::create::{CreateOptions, create};
use super::layout::payload;
use super::resize::resize;
use super::{OpenOptions, Structure, Vhdx, disk};
use crate::block::{Driver, FormatDriver};
use crate::io::sim::{Fault, SimFile};
use crate::io::{AlignedBuf, File, block_on};
use crate::units::{GIB, MIB};

/// An image whose blocks, if it is fixed, are full of 0x55, also behind the end of the disk.
fn image(options: &CreateOptions) -> Vec<u8> {
    let sim = SimFile::from_bytes("new.vhdx", Vec::new());
    let file: Arc<dyn File> = Arc::new(sim.clone());
    block_on(create(&file, options)).unwrap();
    let mut content = sim.volatile();
    if options.is_fixed {
        content[4 << 20..].fill(0x55);
    }
    content
}

fn fixed(size: u64) -> CreateOptions {
    CreateOptions { is_fixed: true, block_size: MIB, ..CreateOptions::new(size) }
}

/// The whole disk, which passes a check, too.
fn content(bytes: Vec<u8>) -> Vec<u8> {
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("after.vhdx", bytes));
    let found = block_on(check(&file, None)).unwrap();
    assert_eq!(found.corruptions, 0, "{found:?}");
    let structure = block_on(Structure::read(&file)).unwrap();
    let size = structure.geometry.disk_size;
    let options = OpenOptions { read_only: true, ..Default::default() };
    let disk = FormatDriver::new(block_on(Vhdx::open(structure, options)).unwrap()).unwrap();
    let mut buf = AlignedBuf::zeroed(size as usize, 4096);
    block_on(disk.read(0, buf.buffers())).unwrap();
    buf.as_slice().to_vec()
}

fn resized(bytes: Vec<u8>, size: u64) -> Vec<u8> {
    let sim = SimFile::from_bytes("test.vhdx", bytes);
    let file: Arc<dyn File> = Arc::new(sim.clone());
    block_on(resize(&file, size, None)).unwrap();
    assert_eq!(sim.unflushed(), 0, "durable when it is done");
    sim.volatile()
}

/// Whether a disk begins with `old` bytes of 0x55 (or all it has), and goes on with zeros.
fn is_grown(disk: &[u8], old: u64) -> bool {
    let (head, tail) = disk.split_at(disk.len().min(old as usize));
    head.iter().all(|byte| *byte == 0x55) && tail.iter().all(|byte| *byte == 0)
}

#[test]
fn fixed_images_grow_and_shrink() {
    let old = 2 * MIB + 512;
    let before = image(&fixed(old));
    let grown = resized(before.clone(), 5 * MIB);
    // All blocks are there.
    assert_eq!(grown.len() as u64, 4 * MIB + 5 * MIB);
    let disk = content(grown.clone());
    assert_eq!(disk.len() as u64, 5 * MIB);
    assert!(is_grown(&disk, old), "what lay behind the end must not show");
    let shrunk = resized(grown, MIB);
    assert_eq!(shrunk.len() as u64, 5 * MIB);
    assert!(is_grown(&content(shrunk.clone()), old));
    let again = content(resized(shrunk, 3 * MIB));
    assert!(is_grown(&again, MIB), "what was cut off must not come back");
}

#[test]
fn a_bat_that_becomes_too_small_moves() {
    // The most that a BAT of 1 MiB holds, and more.
    let old = CreateOptions { block_size: MIB, ..CreateOptions::new(100 * GIB) };
    let mut before = image(&old);
    before.resize(5 << 20, 0x66);
    before[3 << 20..][..8].copy_from_slice(&(4u64 << 20 | payload::FULLY_PRESENT).to_le_bytes());
    let after = resized(before, 300 * GIB);
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("after.vhdx", after));
    let structure = block_on(Structure::read(&file)).unwrap();
    assert_eq!(structure.regions.valid, [true; 2]);
    assert_eq!(structure.regions.bat.offset, 5 * MIB);
    assert_eq!(structure.regions.bat.len, 3 * MIB);
    assert_eq!(structure.geometry.disk_size, 300 * GIB);
    let found = block_on(check(&file, None)).unwrap();
    assert_eq!((found.corruptions, found.allocated), (0, 1), "{found:?}");
    let options = OpenOptions { read_only: true, ..Default::default() };
    let disk = FormatDriver::new(block_on(Vhdx::open(structure, options)).unwrap()).unwrap();
    let mut buf = AlignedBuf::zeroed(1 << 20, 4096);
    block_on(disk.read(0, buf.buffers())).unwrap();
    assert!(buf.as_slice().iter().all(|byte| *byte == 0x66));
}

#[test]
fn entries_behind_the_end_are_not_believed() {
    let options = CreateOptions { block_size: MIB, ..CreateOptions::new(2 * MIB) };
    let mut before = image(&options);
    // What some other program left behind the last entry.
    before[(3 << 20) + 16..][..24].fill(0xff);
    assert!(content(resized(before, 5 * MIB)).iter().all(|byte| *byte == 0));
}

#[test]
fn a_new_size_has_a_new_identity() {
    let before = image(&fixed(2 * MIB));
    let guids = |bytes: &[u8]| {
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", bytes.to_vec()));
        let header = block_on(Structure::read(&file)).unwrap().headers.current;
        (header.file_write_guid, header.data_write_guid)
    };
    let (file, data) = guids(&before);
    let after = resized(before.clone(), 3 * MIB);
    assert!(guids(&after).0 != file && guids(&after).1 != data);
    assert!(resized(before.clone(), 2 * MIB) == before, "the size that it has");
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_changes() {
    let refused = |size, parent, words: &str| {
        let before = image(&fixed(2 * MIB));
        let sim = SimFile::from_bytes("test.vhdx", before.clone());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let err = block_on(resize(&file, size, parent)).unwrap_err().to_string();
        assert!(err.starts_with("test.vhdx: ") && err.contains(words), "{err}");
        assert!(sim.volatile() == before);
    };
    refused(0, None, "not a multiple of the 512 bytes");
    refused(1000, None, "not a multiple of the 512 bytes");
    refused(65 << 40, None, "up to 64T");
    refused(3 * MIB, Some(4 * MIB), "its backing file is larger than the disk");
}

/// Cut off after each operation, with any subset of what was not flushed.
#[test]
fn a_power_cut_leaves_the_old_size_or_the_new() {
    let old = 2 * MIB + 512;
    for new in [5 * MIB, MIB] {
        let before = image(&fixed(old));
        let (mut cuts, mut sizes) = (0, std::collections::BTreeSet::new());
        for after in 0.. {
            let sim = SimFile::from_bytes("test.vhdx", before.clone());
            sim.fail(Fault { op: None, after, errno: 5, for_good: true });
            let file: Arc<dyn File> = Arc::new(sim.clone());
            let done = block_on(resize(&file, new, None)).is_ok();
            for seed in 0..6 {
                let disk = content_or_repaired(sim.power_cut(seed));
                let len = disk.len() as u64;
                assert!(len == old || len == new, "operation {after}, seed {seed}: {len}");
                assert!(is_grown(&disk, old), "operation {after}, seed {seed}");
                sizes.insert(len);
                cuts += 1;
            }
            if done {
                break;
            }
        }
        assert!(cuts > 100 && sizes.len() == 2, "{cuts} {sizes:?}");
    }
}

/// The disk, once damaged copies are repaired.
fn content_or_repaired(bytes: Vec<u8>) -> Vec<u8> {
    let sim = SimFile::from_bytes("cut.vhdx", bytes);
    let file: Arc<dyn File> = Arc::new(sim.clone());
    block_on(check(&file, Some(super::check::Repair::All))).unwrap();
    assert!(block_on(disk::read(&file, 0, 4096)).is_ok());
    content(sim.volatile())
}
