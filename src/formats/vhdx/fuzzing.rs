//! The body of the fuzz target `vhdx`: damage to a small image.
//!
//! The input is a list of changes to the fixed structures, the log, the metadata and the BAT of an
//! image with a pending log, whose checksums are made right again afterwards, or else nothing but
//! checksums would be tested. What comes out is opened, mapped, checked, salvaged and repaired.
//! Nothing may panic, nothing but a repair may modify the file, and a repair keeps the content.
//!
//! ```text
//! input: flags, length of the file in 64 KiB, then changes: area, offset (2), length, bytes …
//! ```
//!
//! `VUBLK_FUZZ_IMAGES` names a directory of real images to start from as well, a few MiB each, with log,
//! metadata and BAT where Windows puts them; upper bits of the flags choose.

use std::sync::{Arc, OnceLock};

use zerocopy::IntoBytes;

use super::check::{Repair, check};
use super::create::{CreateOptions, Parent, create};
use super::header::{Header, HeaderSlots};
use super::layout::{
    Guid, HEADER_LEN, HEADER_OFFSETS, LOG_DATA_DESCRIPTOR, LOG_DATA_SIGNATURE, LOG_ENTRY_SIGNATURE,
    LOG_SECTOR, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawLogDescriptor, RawLogHeader, checksum,
};
use super::locator::Locator;
use super::{OpenOptions, Structure, Vhdx, salvage};
use crate::block::{ExtentKind, Format};
use crate::io::sim::SimFile;
use crate::io::{File, block_on};
use crate::units::{ByteRange, KIB, MIB};

/// Where changes go.
const AREAS: [u64; 9] = [
    0,
    HEADER_OFFSETS[0],
    HEADER_OFFSETS[1],
    REGION_TABLE_OFFSETS[0],
    REGION_TABLE_OFFSETS[1],
    LOG,
    METADATA,
    METADATA + 64 * KIB,
    BAT,
];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;
/// Length of the log's one entry: its header with a descriptor, and a page.
const ENTRY_LEN: usize = 8192;
/// The input's flag for an image that has a parent.
const HAS_PARENT: u8 = 1;
/// The input's flag for checksums that stay as they are.
const WRONG_SUMS: u8 = 2;
/// The flags above this bit choose among real images.
const REAL_SHIFT: u32 = 2;

/// Real images, if there are any.
fn real_images() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let Some(dir) = std::env::var_os("VUBLK_FUZZ_IMAGES") else { return Vec::new() };
        let files = std::fs::read_dir(dir).expect("VUBLK_FUZZ_IMAGES is a directory");
        let mut paths: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
        paths.sort();
        let image = |path| std::fs::read(path).expect("a readable image");
        let images: Vec<Vec<u8>> = paths.into_iter().map(image).collect();
        assert!(images.iter().all(|image| image.len() as u64 > BAT + MIB), "too short");
        images
    })
}

/// Tries one input.
pub fn run(input: &[u8]) {
    let [flags, length, changes @ ..] = input else { return };
    let real = real_images();
    let mut content = match usize::from(*flags >> REAL_SHIFT) % (real.len() + 1) {
        0 => base(flags & HAS_PARENT != 0).to_vec(),
        n => real[n - 1].clone(),
    };
    apply(&mut content, changes);
    if flags & WRONG_SUMS == 0 {
        fix_sums(&mut content);
    }
    if *length != 0 {
        content.resize(usize::from(*length) * 64 * 1024, 0);
    }
    let sim = SimFile::from_bytes("fuzz.vhdx", content.clone());
    let file = Arc::new(sim.clone()) as Arc<dyn File>;
    let before = look(&file, false);
    let salvaged = look(&file, true);
    assert!(before.is_none() || salvaged.is_some(), "opens, but cannot be salvaged");
    let found = block_on(check(&file, None));
    assert!(sim.volatile() == content, "a reader has modified the file");
    let Ok(found) = found else { return };
    let repaired = block_on(check(&file, Some(Repair::All)));
    if found.corruptions == 0
        && let Some(before) = before
    {
        // Only a sequence number at its end stands in the way.
        assert!(repaired.is_err() || look(&file, false).as_ref() == Some(&before));
    }
}

/// What a map shows: range, kind, place. `None` if the image is refused.
fn look(file: &Arc<dyn File>, salvaging: bool) -> Option<Vec<(ByteRange, u8, u64)>> {
    let structure = match salvaging {
        true => block_on(salvage::read(file)).ok()?,
        false => block_on(Structure::read(file)).ok()?,
    };
    structure.details();
    let size = structure.geometry.disk_size;
    let options = OpenOptions { read_only: true, lenient: salvaging, ..OpenOptions::default() };
    let image = block_on(Vhdx::open(structure, options)).ok()?;
    let mut map = Vec::new();
    let mut at = 0;
    while at < size && map.len() < 64 {
        let rest = ByteRange::between(at, size);
        let Ok(extent) = block_on(image.map(rest)) else { break };
        assert!(extent.range.offset == at && !extent.range.is_empty());
        at = extent.range.end();
        map.push(match extent.kind {
            ExtentKind::Data { offset, .. } => (extent.range, 0, offset),
            ExtentKind::Zero { explicit } => (extent.range, 1, u64::from(explicit)),
            ExtentKind::Backing => (extent.range, 2, 0),
            ExtentKind::Opaque => unreachable!("there is nothing encoded in this format"),
        });
    }
    Some(map)
}

fn apply(content: &mut [u8], mut changes: &[u8]) {
    while let [area, low, high, len, rest @ ..] = changes {
        let at =
            AREAS[usize::from(*area) % AREAS.len()] + u64::from(u16::from_le_bytes([*low, *high]));
        let len = usize::from(*len % 64).min(rest.len());
        content[at as usize..][..len].copy_from_slice(&rest[..len]);
        changes = &rest[len..];
    }
}

fn fix_sums(content: &mut [u8]) {
    let headers = HEADER_OFFSETS.map(|at| (at, HEADER_LEN));
    let tables = REGION_TABLE_OFFSETS.map(|at| (at, REGION_TABLE_LEN));
    // Wherever an entry of the log may begin, and as long as it says.
    let entries: Vec<_> = (LOG..METADATA)
        .step_by(LOG_SECTOR as usize)
        .filter_map(|at| {
            let head = &content[at as usize..][..12];
            let len = u32::from_le_bytes(head[8..].try_into().expect("4 bytes"));
            let fits = u64::from(len) >= LOG_SECTOR && at + u64::from(len) <= METADATA;
            (head.starts_with(LOG_ENTRY_SIGNATURE) && fits).then_some((at, len as usize))
        })
        .collect();
    for (at, len) in headers.into_iter().chain(tables).chain(entries) {
        let part = &mut content[at as usize..][..len];
        let sum = checksum(part, 4);
        part[4..8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// An image of three blocks of 1 MiB, of which the last comes from the log.
fn base(has_parent: bool) -> &'static [u8] {
    static BASES: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    BASES[usize::from(has_parent)].get_or_init(|| make_base(has_parent))
}

fn make_base(has_parent: bool) -> Vec<u8> {
    let entry = |key: &str, value: &str| (key.to_string(), value.to_string());
    let entries = vec![
        entry("parent_linkage", "{aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee}"),
        entry("relative_path", ".\\parent.vhdx"),
    ];
    let parent = has_parent.then(|| Parent { locator: Locator { entries }, items: Vec::new() });
    let options = CreateOptions { block_size: MIB, parent, ..CreateOptions::new(3 * MIB) };
    let sim = SimFile::from_bytes("base.vhdx", Vec::new());
    let file = Arc::new(sim.clone()) as Arc<dyn File>;
    block_on(create(&file, &options)).expect("it can be created");
    block_on(file.set_len(7 * MIB)).expect("it can grow");
    let mut headers = block_on(HeaderSlots::read(&file)).expect("it has headers");
    let log_guid = Guid([7; 16]);
    block_on(headers.update(&file, Header { log_guid, ..headers.current })).expect("it is written");
    let mut content = sim.volatile();
    let states: [u64; 3] =
        if has_parent { [4 << 20 | 7, 1, 6 << 20 | 6] } else { [4 << 20 | 6, 2, 6 << 20 | 6] };
    let page: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    content[LOG as usize..][..ENTRY_LEN].copy_from_slice(&log_entry(log_guid, &page));
    if has_parent {
        content[BAT as usize + 4096 * 8..][..8].copy_from_slice(&(5u64 << 20 | 6).to_le_bytes());
        content[5 << 20] = 0x0f;
    }
    fix_sums(&mut content);
    content
}

/// A log entry that writes the first page of the BAT.
fn log_entry(log_guid: Guid, start: &[u8]) -> Vec<u8> {
    let mut page = start.to_vec();
    page.resize(4096, 0);
    let header = RawLogHeader {
        signature: *LOG_ENTRY_SIGNATURE,
        checksum: 0.into(),
        entry_length: (ENTRY_LEN as u32).into(),
        tail: 0.into(),
        sequence: 1.into(),
        descriptor_count: 1.into(),
        reserved: 0.into(),
        log_guid,
        flushed_file_offset: (7 * MIB).into(),
        last_file_offset: (7 * MIB).into(),
    };
    let descriptor = RawLogDescriptor {
        signature: *LOG_DATA_DESCRIPTOR,
        trailing: page[4092..].try_into().expect("4 bytes"),
        leading: page[..8].try_into().expect("8 bytes"),
        file_offset: BAT.into(),
        sequence: 1.into(),
    };
    let mut entry = [header.as_bytes(), descriptor.as_bytes()].concat();
    entry.resize(4096, 0);
    entry.extend_from_slice(LOG_DATA_SIGNATURE);
    entry.extend_from_slice(&[0; 4]);
    entry.extend_from_slice(&page[8..4092]);
    entry.extend_from_slice(&1u32.to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::Rng;

    #[test]
    fn the_image_itself_is_good() {
        for flags in [0, HAS_PARENT] {
            let file = SimFile::from_bytes("base.vhdx", base(flags == HAS_PARENT).to_vec());
            let file = Arc::new(file) as Arc<dyn File>;
            let found = block_on(check(&file, None)).unwrap();
            assert_eq!((found.corruptions, found.allocated), (0, 2), "{found:?}");
            assert!(look(&file, false).unwrap().len() >= 3);
            run(&[flags, 0]);
        }
    }

    /// `VUBLK_TEST_INPUTS` multiplies their number, for a long search.
    #[test]
    fn damaged_images_do_no_harm() {
        let factor = std::env::var("VUBLK_TEST_INPUTS").ok().and_then(|n| n.parse().ok());
        for seed in 0..150 * factor.unwrap_or(1) {
            let mut rng = Rng::new(seed);
            let mut input = vec![rng.word() as u8, 0];
            if rng.one_in(4) {
                input[1] = rng.below(112) as u8;
            }
            for _ in 0..1 + rng.below(3) {
                let len = 1 + rng.below(8);
                let limit = if rng.one_in(2) { 100 } else { 300 };
                let offset = rng.below(limit) as u16;
                input.push(rng.word() as u8);
                input.extend(offset.to_le_bytes());
                input.push(len as u8);
                input
                    .extend((0..len).map(|_| rng.below(if seed % 2 == 0 { 8 } else { 256 }) as u8));
            }
            run(&input);
        }
        run(&[]);
    }
}
