//! Reading what is left of a damaged image: a file whose end is missing, a log that cannot be
//! replayed, entries of the BAT that make no sense.
//!
//! ```text
//! Structure ─► Sanitised ─► (Replayed) ─► Padded ─► the file
//!              bad entries                 zeros behind the end,
//!              say "zeros"                 a log to be ignored is empty
//! ```
//!
//! What is missing reads as zeros, and [`Report`] says which parts of the disk that is; and which
//! parts may show the data of another block, because two blocks share a place in the file. Nothing
//! is ever written: the layers refuse it.
//!
//! The headers, a region table and the metadata must be there: without them nobody knows what the
//! blocks are.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::Structure;
use super::bat::{self, Checker};
use super::disk;
use super::geometry::{Geometry, Slot};
use super::header::HeaderSlots;
use super::layout::{
    FILE_SIGNATURE, Guid, HEADER_LEN, HEADER_OFFSETS, MAX_DISK_SIZE, PAGE, payload,
};
use super::scan::{self, UsedBlock};
use crate::error::{Error, Result, ResultExt};
use crate::io::{Alignment, Buffers, File, Fut, Hole};
use crate::units::{ByteRange, MIB, align_down};

/// How long a file is taken to be: no image needs more.
const PADDED_LEN: u64 = MAX_DISK_SIZE + (MAX_DISK_SIZE >> 8);
/// The most missing parts that are listed one by one.
const MAX_LISTED: usize = 1000;
/// With so many missing parts, it is not looked for what of a block is the parent's.
const MAX_RUNS: usize = 1 << 20;

/// What is missing from an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How much of the file is there: what lies behind reads as zeros.
    pub file_len: u64,
    /// Whether there was a log that could not be replayed.
    pub ignored_log: bool,
    /// What is wrong with the file as a whole, in sentences.
    pub notes: Vec<String>,
    /// Parts of the disk that read as zeros because their content is not there.
    pub missing: Parts,
    /// Parts of the disk that may show another block's data.
    pub doubtful: Parts,
}

/// Parts of the disk, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// No more than can be listed.
    pub listed: Vec<ByteRange>,
    /// How many bytes they have together.
    pub bytes: u64,
}

impl Parts {
    /// Adds one that does not begin before the last.
    fn add(&mut self, range: ByteRange) {
        self.bytes += range.len;
        let is_full = self.listed.len() >= MAX_LISTED;
        match self.listed.last_mut() {
            Some(last) if last.end() == range.offset => last.len += range.len,
            _ if is_full => {}
            _ => self.listed.push(range),
        }
    }

    /// Of ranges in any order, which may overlap.
    fn of(mut ranges: Vec<ByteRange>) -> Parts {
        ranges.sort_unstable_by_key(|range| range.offset);
        let (mut parts, mut end) = (Parts::default(), 0);
        for range in ranges {
            if range.end() > end {
                parts.add(ByteRange::between(range.offset.max(end), range.end()));
                end = range.end();
            }
        }
        parts
    }
}

impl Report {
    /// Whether all of the image is there.
    pub fn is_empty(&self) -> bool {
        self.notes.is_empty() && self.missing.bytes == 0 && self.doubtful.bytes == 0
    }
}

/// Reads the structures of a damaged image.
///
/// # Errors
/// If not even those are there.
pub async fn read(file: &Arc<dyn File>) -> Result<Structure> {
    read_unnamed(file).await.context(|| format!("{}: nothing can be salvaged", file.name()))
}

async fn read_unnamed(file: &Arc<dyn File>) -> Result<Structure> {
    let mut report = Report::default();
    let stored = file.len()?;
    let mut file_len = stored;
    let padded = Padded::new(Arc::clone(file))?;
    let mut shown: Arc<dyn File> = Arc::new(padded.clone());
    if !disk::read(&shown, 0, PAGE).await?.starts_with(FILE_SIGNATURE) {
        return Err(Error::corrupt("is not a VHDX image (\"vhdxfile\" is missing)"));
    }
    let headers = HeaderSlots::read(&shown).await?;
    let log = headers.current.log;
    let mut structure = match Structure::read(&shown).await {
        Ok(structure) => structure,
        Err(err) if headers.current.log_guid.is_zero() => return Err(err),
        Err(err) => {
            shown = Arc::new(padded.without_log(&headers));
            let structure = Structure::read(&shown).await?;
            report.ignored_log = true;
            report.notes.push(format!(
                "the log was ignored, so that the last changes before the crash may be missing, or \
                 there in part ({err})"
            ));
            structure
        }
    };
    if let Some(last) = structure.replay.as_ref().and_then(|replay| replay.entries().last())
        && last.flushed_file_offset <= file_len
        && last.last_file_offset > file_len
    {
        report.notes.push(format!(
            "the file has {file_len} bytes, and the log says that it is to have {}: the power was cut before \
             it grew, or its end is missing",
            last.last_file_offset
        ));
        // A replay on disk would make the file longer, with zeros.
        file_len = last.last_file_offset;
    }
    if log.end() > file_len {
        report.notes.push(format!("the file ends within its log of {log}"));
    }
    report.file_len = file_len;
    let (bat, geometry) = (structure.regions.bat, structure.geometry);
    let bat_end = bat.offset + geometry.bat_entries() * 8;
    let first_unknown = file_len.saturating_sub(bat.offset) / 8;
    let mut sanitised = Sanitised {
        file: Arc::clone(&structure.file),
        bat: ByteRange::between(bat.offset, bat_end),
        checker: Checker { geometry, reserved: structure.reserved() },
        file_len,
        bitmaps: BTreeMap::new(),
    };
    look_for_missing(&mut sanitised, &geometry, first_unknown, stored, &mut report).await?;
    if bat_end > file_len {
        report.notes.push(format!(
            "the file ends within its BAT of {bat}, so that it is not known what was stored of a \
             part of the disk"
        ));
    }
    structure.file = Arc::new(sanitised);
    structure.salvaged = Some(Arc::new(report));
    Ok(structure)
}

/// Finds the parts of the disk whose blocks are not in the file, of which `stored` bytes are there. Entries
/// from `first_unknown` on are not in the file themselves.
async fn look_for_missing(
    file: &mut Sanitised,
    geometry: &Geometry,
    first_unknown: u64,
    stored: u64,
    report: &mut Report,
) -> Result<()> {
    let (mut bad, mut idle, mut short) = (0u64, 0u64, 0u64);
    let (mut used, mut missing) = (Vec::new(), Vec::new());
    let (mut partial, mut bitmaps) = (Vec::new(), BTreeMap::new());
    let mut cut = Vec::new();
    let mut visit = |index, entry| {
        if index >= first_unknown {
            return Ok(());
        }
        let is_good = file.checker.is_good(index, entry, PADDED_LEN);
        let disk = match geometry.slot(index) {
            Slot::Payload(block) if block < geometry.payload_blocks() => {
                geometry.block_range(block)
            }
            // Nothing of the disk is there.
            _ if !is_good => {
                idle += 1;
                return Ok(());
            }
            Slot::Payload(_) => return Ok(()),
            Slot::Bitmap(_) => ByteRange::default(),
        };
        if !is_good {
            bad += 1;
            missing.push(disk);
        } else if matches!(bat::state(entry), payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT) {
            short += u64::from(!file.checker.is_good(index, entry, file.file_len));
            let there = stored.saturating_sub(bat::offset(entry));
            let is_partial = bat::state(entry) == payload::PARTIALLY_PRESENT;
            if there < disk.len {
                let rest = ByteRange::between(disk.offset + there, disk.end());
                if is_partial { cut.push(rest) } else { missing.push(rest) }
            }
            match geometry.slot(index) {
                Slot::Bitmap(chunk) => _ = bitmaps.insert(chunk, bat::offset(entry)),
                Slot::Payload(block) if is_partial => partial.push(block),
                Slot::Payload(_) => {}
            }
            // What is not in the file is nobody's.
            if there > 0
                && let (Ok(mib), Ok(index)) =
                    (u32::try_from(bat::offset(entry) / MIB), u32::try_from(index))
            {
                used.push(UsedBlock { mib, index });
            }
        }
        Ok(())
    };
    let entries = geometry.bat_entries();
    scan::walk(&file.file, file.bat, entries, u64::MAX, &mut visit).await?;
    report.doubtful = look_for_shared(&file.checker, used)?;
    file.bitmaps = bitmaps;
    partial.retain(|block| !file.has_bits(*block));
    for rest in cut {
        if file.has_bits(geometry.block_of(rest.offset)) && missing.len() < MAX_RUNS {
            // The parent's sectors are there all the same.
            missing.extend(file.own_parts(rest).await?);
        } else {
            missing.push(rest);
        }
    }
    if !partial.is_empty() {
        report.notes.push(format!(
            "the sector bitmaps of {} blocks are not there, so that it is not known which of their \
             sectors are in this file and which in its parent; they are missing",
            partial.len()
        ));
        missing.extend(partial.iter().map(|block| geometry.block_range(*block)));
    }
    if idle > 0 {
        report.notes.push(format!(
            "{idle} entries of the BAT make no sense, but are for nothing that the disk shows"
        ));
    }
    if bad > 0 {
        report
            .notes
            .push(format!("{bad} entries of the BAT make no sense; their blocks are missing"));
    }
    let unknown = (first_unknown..entries).find_map(|index| match geometry.slot(index) {
        Slot::Payload(block) if block < geometry.payload_blocks() => Some(block),
        _ => None,
    });
    if let Some(block) = unknown {
        let start = geometry.block_range(block).offset;
        missing.push(ByteRange::between(start, geometry.disk_size));
    }
    report.missing = Parts::of(missing);
    if short > 0 && report.missing.bytes == 0 {
        report.notes.push(format!(
            "the file ends before {short} of its blocks do, but what they hold of the disk is all there"
        ));
    }
    Ok(())
}

/// Finds the parts of the disk whose blocks share their place in the file with others.
fn look_for_shared(checker: &Checker, mut used: Vec<UsedBlock>) -> Result<Parts> {
    used.sort_unstable();
    let geometry = checker.geometry;
    let disk = |block: &UsedBlock| match geometry.slot(block.index.into()) {
        Slot::Payload(block) => geometry.block_range(block),
        Slot::Bitmap(chunk) => geometry.chunk_range(chunk),
    };
    let mut shared = Vec::new();
    scan::overlaps(checker, &used, |first, second| {
        shared.extend([disk(first), disk(second)]);
        Ok(())
    })?;
    Ok(Parts::of(shared))
}

fn refuse<'a>(file: &dyn File) -> Fut<'a, ()> {
    let name = file.name().to_string();
    Box::pin(async move {
        Err(Error::invalid(format!("{name}: is being salvaged, so nothing can be written")))
    })
}

/// A file with zeros behind its end, and, if need be, without a log.
#[derive(Clone)]
struct Padded {
    file: Arc<dyn File>,
    /// Length of the file as it is.
    file_len: u64,
    /// What is shown in the place of both headers.
    header: Option<Arc<Vec<u8>>>,
}

impl Padded {
    fn new(file: Arc<dyn File>) -> Result<Padded> {
        let file_len = file.len()?;
        Ok(Padded { file, file_len, header: None })
    }

    /// The same with an empty log.
    fn without_log(&self, headers: &HeaderSlots) -> Padded {
        let header = super::header::Header { log_guid: Guid::ZERO, ..headers.current };
        Padded { header: Some(Arc::new(header.encode())), ..self.clone() }
    }

    async fn read_all(&self, offset: u64, buf: Buffers) -> Result<()> {
        let inside = self.file_len.saturating_sub(offset).min(buf.len());
        // Direct I/O takes whole sectors only, and a truncated file may end anywhere.
        let whole = align_down(inside, self.file.alignment().request.max(1));
        if whole > 0 {
            self.file.read(offset, buf.slice(0, whole)).await?;
        }
        if whole < buf.len() {
            buf.slice(whole, buf.len() - whole).fill_zero();
        }
        let Some(header) = &self.header else { return Ok(()) };
        for at in HEADER_OFFSETS {
            let shown = ByteRange { offset: at, len: HEADER_LEN as u64 };
            let part = shown.intersect(&ByteRange { offset, len: buf.len() });
            if !part.is_empty() {
                let from = (part.offset - at) as usize;
                buf.slice(part.offset - offset, part.len)
                    .copy_from_slice(&header[from..from + part.len as usize]);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Padded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Padded({})", self.file.name())
    }
}

impl File for Padded {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn len(&self) -> Result<u64> {
        Ok(PADDED_LEN.max(self.file_len))
    }

    fn alignment(&self) -> Alignment {
        self.file.alignment()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.read_all(offset, buf))
    }

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        refuse(self)
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        refuse(self)
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        refuse(self)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len<'a>(&'a self, _len: u64) -> Fut<'a, ()> {
        refuse(self)
    }

    fn hole_at(&self, offset: u64) -> Result<Hole> {
        if offset < self.file_len {
            return self.file.hole_at(offset);
        }
        Ok(Hole { range: ByteRange::between(offset, self.len()?.max(offset)), is_hole: true })
    }
}

/// A file in which the BAT has no bad entries: they say "zeros".
struct Sanitised {
    file: Arc<dyn File>,
    bat: ByteRange,
    checker: Checker,
    /// How much of the file is there.
    file_len: u64,
    /// Where the sector bitmaps of chunks are.
    bitmaps: BTreeMap<u64, u64>,
}

impl Sanitised {
    /// Whether the bits of a partially present block are in the file.
    fn has_bits(&self, block: u64) -> bool {
        let geometry = &self.checker.geometry;
        let end = (geometry.first_bit(block) + geometry.sectors_per_block()).div_ceil(8);
        let bitmap = self.bitmaps.get(&geometry.chunk_of(block));
        bitmap.is_some_and(|at| at + end <= self.file_len)
    }

    /// The parts of a range within a partially present block that are this file's, by its bits.
    async fn own_parts(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        let geometry = &self.checker.geometry;
        let block = geometry.block_of(range.offset);
        let Some(bitmap) = self.bitmaps.get(&geometry.chunk_of(block)) else {
            return Ok(vec![range]);
        };
        let (first, count) = (geometry.first_bit(block), geometry.sectors_per_block());
        let from = align_down(first / 8, PAGE);
        let len = ((first + count).div_ceil(8) - from).next_multiple_of(PAGE);
        let bytes = disk::read(&self.file, bitmap + from, len).await?;
        let start = geometry.block_range(block).offset;
        let mut parts: Vec<ByteRange> = Vec::new();
        for sector in 0..count {
            let bit = first + sector - from * 8;
            if bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 0 {
                continue;
            }
            let at = start + sector * geometry.sector_size();
            let part = ByteRange { offset: at, len: geometry.sector_size() }.intersect(&range);
            match parts.last_mut() {
                _ if part.is_empty() => {}
                Some(last) if last.end() == part.offset => last.len += part.len,
                _ => parts.push(part),
            }
        }
        Ok(parts)
    }

    /// Whether an entry can be used as it is.
    fn is_usable(&self, index: u64, entry: u64) -> bool {
        self.checker.is_good(index, entry, PADDED_LEN)
            && match self.checker.geometry.slot(index) {
                Slot::Payload(block) if bat::state(entry) == payload::PARTIALLY_PRESENT => {
                    self.has_bits(block)
                }
                _ => true,
            }
    }

    async fn read_all(&self, offset: u64, buf: Buffers) -> Result<()> {
        let part = ByteRange { offset, len: buf.len() }.intersect(&self.bat);
        if part.is_empty() {
            return self.file.read(offset, buf).await;
        }
        // Metadata comes in pages; nothing else is in the BAT.
        let mut bytes = disk::read(&self.file, offset, buf.len()).await?;
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let at = offset + i as u64 * 8;
            if at < part.offset || at >= part.end() {
                continue;
            }
            let index = (at - self.bat.offset) / 8;
            let entry = u64::from_le_bytes((&*word).try_into().expect("8 bytes"));
            if !self.is_usable(index, entry) {
                let zeros = match self.checker.geometry.slot(index) {
                    Slot::Payload(_) => payload::ZERO,
                    Slot::Bitmap(_) => 0,
                };
                word.copy_from_slice(&zeros.to_le_bytes());
            }
        }
        buf.copy_from_slice(&bytes);
        Ok(())
    }
}

impl fmt::Debug for Sanitised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sanitised({})", self.file.name())
    }
}

impl File for Sanitised {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn alignment(&self) -> Alignment {
        self.file.alignment()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.read_all(offset, buf))
    }

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        refuse(self)
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        refuse(self)
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        refuse(self)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len<'a>(&'a self, _len: u64) -> Fut<'a, ()> {
        refuse(self)
    }

    fn hole_at(&self, offset: u64) -> Result<Hole> {
        self.file.hole_at(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::check;
    use super::super::create::{CreateOptions, Parent, create};
    use super::super::header::Header;
    use super::super::locator::Locator;
    use super::super::log::NewEntry;
    use super::super::{OpenOptions, Vhdx};
    use super::*;
    use crate::block::{Driver, ExtentKind, Format, FormatDriver};
    use crate::io::sim::SimFile;
    use crate::io::{AlignedBuf, block_on};

    /// A fixed image of 8 MiB in blocks of 1 MiB, full of 0x55.
    fn image() -> Vec<u8> {
        let sim = SimFile::from_bytes("new.vhdx", Vec::new());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let options =
            CreateOptions { is_fixed: true, block_size: MIB, ..CreateOptions::new(8 * MIB) };
        block_on(create(&file, &options)).unwrap();
        let mut content = sim.volatile();
        content[4 << 20..].fill(0x55);
        content
    }

    /// What is missing, and the disk's content.
    fn salvaged(content: Vec<u8>) -> (Arc<Report>, Vec<u8>) {
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
        let structure = block_on(read(&file)).unwrap();
        let report = structure.salvaged.clone().unwrap();
        let options = OpenOptions { read_only: true, lenient: true, ..Default::default() };
        let disk = FormatDriver::new(block_on(Vhdx::open(structure, options)).unwrap()).unwrap();
        let mut buf = AlignedBuf::zeroed(8 << 20, 4096);
        block_on(disk.read(0, buf.buffers())).unwrap();
        let bytes = buf.as_slice().to_vec();
        (report, bytes)
    }

    /// Whether exactly these parts are zeros and all others 0x55.
    fn has_only(disk: &[u8], missing: &[ByteRange]) -> bool {
        let is_missing = |at: u64| missing.iter().any(|part| part.offset <= at && at < part.end());
        disk.chunks(512).zip((0..).step_by(512)).all(|(sector, at)| {
            let wanted = if is_missing(at) { 0 } else { 0x55 };
            sector.iter().all(|byte| *byte == wanted)
        })
    }

    #[test]
    fn what_lies_behind_the_end_of_the_file_is_missing() {
        let (report, disk) = salvaged(image());
        assert!(report.is_empty() && has_only(&disk, &[]));
        for len in [9 * MIB + 512, 4 * MIB + 512, 4 * MIB] {
            let mut content = image();
            content.truncate(len as usize);
            let (report, disk) = salvaged(content);
            let missing = ByteRange::between(len - 4 * MIB, 8 * MIB);
            assert_eq!(report.missing.listed, [missing]);
            assert_eq!(report.missing.bytes, missing.len);
            assert!(has_only(&disk, &[missing]), "{len}");
        }
    }

    #[test]
    fn blocks_behind_the_end_of_the_bat_are_missing() {
        let mut content = image();
        // Three entries are left, but not what they stand for.
        content.truncate((3 << 20) + 24);
        let (report, disk) = salvaged(content);
        assert_eq!(report.missing.listed, [ByteRange { offset: 0, len: 8 * MIB }]);
        assert!(report.notes.iter().any(|note| note.contains("within its BAT")), "{report:?}");
        assert!(disk.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn blocks_of_bad_entries_are_missing() {
        let mut content = image();
        content[(3 << 20) + 8] = 4;
        content[(3 << 20) + 3 * 8] |= 0x10;
        content[(3 << 20) + 5 * 8..][..8].copy_from_slice(&(3u64 << 20 | 6).to_le_bytes());
        let (report, disk) = salvaged(content);
        let missing = [1, 3, 5].map(|block| ByteRange { offset: block * MIB, len: MIB });
        assert_eq!(report.missing.listed, missing);
        assert!(report.notes[0].starts_with("3 entries of the BAT make no sense"));
        assert!(has_only(&disk, &missing));
    }

    #[test]
    fn a_map_shows_no_data_behind_the_end_of_the_file() {
        let mut content = image();
        content.truncate((9 << 20) + 5000);
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
        let structure = block_on(read(&file)).unwrap();
        let options = OpenOptions { read_only: true, lenient: true, ..Default::default() };
        let image = block_on(Vhdx::open(structure, options)).unwrap();
        let (mut map, mut at) = (Vec::new(), 0);
        while at < 8 * MIB {
            let extent = block_on(image.map(ByteRange::between(at, 8 * MIB))).unwrap();
            map.push((at, matches!(extent.kind, ExtentKind::Data { .. })));
            at = extent.range.end();
        }
        // A sector of which a part is there is data.
        assert_eq!(map, [(0, true), (5 * MIB + 5120, false)]);
    }

    #[test]
    fn blocks_without_their_sector_bitmap_are_missing() {
        // A child in whose block 1 some sectors may be its own.
        let sim = SimFile::from_bytes("new.vhdx", Vec::new());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let entry = |key: &str, value: &str| (key.to_string(), value.to_string());
        let entries = vec![
            entry("parent_linkage", "{aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee}"),
            entry("relative_path", ".\\parent.vhdx"),
        ];
        let parent = Some(Parent { locator: Locator { entries }, items: Vec::new() });
        let options = CreateOptions { block_size: MIB, parent, ..CreateOptions::new(3 * MIB) };
        block_on(create(&file, &options)).unwrap();
        let mut content = sim.volatile();
        content.resize(6 << 20, 0);
        let set = |content: &mut Vec<u8>, index: usize, entry: u64| {
            content[(3 << 20) + index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
        };
        set(&mut content, 1, 4 << 20 | 7);
        set(&mut content, 4096, 5 << 20 | 6);
        let found = |content: &[u8]| {
            let sim = SimFile::from_bytes("test.vhdx", content.to_vec());
            let file: Arc<dyn File> = Arc::new(sim);
            let structure = block_on(read(&file)).unwrap();
            let report = structure.salvaged.clone().unwrap();
            let options =
                OpenOptions { read_only: true, lenient: true, alone: true, ..Default::default() };
            let image = block_on(Vhdx::open(structure, options)).unwrap();
            let extent = block_on(image.map(ByteRange { offset: MIB, len: MIB })).unwrap();
            (report, matches!(extent.kind, ExtentKind::Zero { .. }))
        };
        let (report, is_zero) = found(&content);
        assert!(report.is_empty() && !is_zero, "{report:?}");
        // The file ends before the block: its own sectors are missing, and not those of the parent.
        let mut behind = content.clone();
        set(&mut behind, 1, 6 << 20 | 7);
        let bits = (5 << 20) + 256;
        behind[bits..bits + 3].copy_from_slice(&[0b110, 0, 1]);
        let (report, _) = found(&behind);
        let sectors =
            |first: u64, count: u64| ByteRange { offset: MIB + first * 512, len: count * 512 };
        assert_eq!(report.missing.listed, [sectors(1, 2), sectors(16, 1)]);
        assert_eq!(report.missing.bytes, 3 * 512);
        // The file ends behind the bits of block 1, and before the bitmap does: it is refused by others.
        let mut enough = content.clone();
        enough.truncate((5 << 20) + 512);
        let (report, is_zero) = found(&enough);
        assert!(
            report.notes[0].starts_with("the file ends before 1 of its blocks do"),
            "{report:?}"
        );
        assert!(report.missing.bytes == 0 && !is_zero);
        // The file ends before the bits of block 1, and before the bitmap; or there is none.
        let (mut short, mut none) = (content.clone(), content.clone());
        content.truncate((5 << 20) + 300);
        short.truncate(5 << 20);
        set(&mut none, 4096, 0);
        for content in [content, short, none] {
            let (report, is_zero) = found(&content);
            assert_eq!(report.missing.listed, [ByteRange { offset: MIB, len: MIB }]);
            assert!(is_zero && report.notes[0].contains("sector bitmaps of 1 blocks"));
        }
    }

    #[test]
    fn blocks_that_share_a_place_are_doubtful() {
        let mut content = image();
        content[(3 << 20) + 5 * 8..][..8].copy_from_slice(&(6u64 << 20 | 6).to_le_bytes());
        let (report, disk) = salvaged(content.clone());
        let shared = [2, 5].map(|block| ByteRange { offset: block * MIB, len: MIB });
        assert_eq!(report.doubtful, Parts { listed: shared.to_vec(), bytes: 2 * MIB });
        assert_eq!(report.missing, Parts::default());
        assert!(has_only(&disk, &[]) && !report.is_empty());
        // Three in one place, two of them side by side.
        content[(3 << 20) + 6 * 8..][..8].copy_from_slice(&(6u64 << 20 | 6).to_le_bytes());
        let (report, _) = salvaged(content);
        let shared = [shared[0], ByteRange { offset: 5 * MIB, len: 2 * MIB }];
        assert_eq!(report.doubtful, Parts { listed: shared.to_vec(), bytes: 3 * MIB });
    }

    #[test]
    fn bad_entries_of_no_block_are_told() {
        // 17 blocks of 256 MiB: the entry after the first 16 is a sector bitmap's.
        let sim = SimFile::from_bytes("new.vhdx", Vec::new());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let options = CreateOptions { block_size: 256 * MIB, ..CreateOptions::new(17 * 256 * MIB) };
        block_on(create(&file, &options)).unwrap();
        assert!(block_on(read(&file)).unwrap().salvaged.unwrap().is_empty());
        let mut content = sim.volatile();
        content[(3 << 20) + 16 * 8] = 6;
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
        let report = block_on(read(&file)).unwrap().salvaged.unwrap();
        assert!(
            report.notes[0].starts_with("1 entries of the BAT make no sense, but"),
            "{report:?}"
        );
        assert_eq!(report.missing.bytes, 0);
    }

    #[test]
    fn a_log_that_cannot_be_replayed_is_ignored() {
        let sim = SimFile::from_bytes("test.vhdx", image());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let mut headers = block_on(HeaderSlots::read(&file)).unwrap();
        let dirty = Header { log_guid: Guid::random(), ..headers.current };
        block_on(headers.update(&file, dirty)).unwrap();
        block_on(Structure::read(&file)).unwrap_err();
        let (report, disk) = salvaged(sim.volatile());
        assert!(report.notes[0].starts_with("the log was ignored"), "{report:?}");
        assert!(report.missing.listed.is_empty() && has_only(&disk, &[]));
    }

    /// A replay makes such a file longer, whether its end was ever there or not.
    #[test]
    fn what_only_a_replay_would_add_is_missing() {
        let sim = SimFile::from_bytes("test.vhdx", image());
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let mut headers = block_on(HeaderSlots::read(&file)).unwrap();
        let entry = NewEntry {
            guid: Guid::random(),
            sequence: 1,
            tail: 0,
            flushed_file_offset: 4 * MIB,
            last_file_offset: 12 * MIB,
        };
        block_on(disk::write(&file, headers.current.log.offset, &entry.encode(&[]))).unwrap();
        let dirty = Header { log_guid: entry.guid, ..headers.current };
        block_on(headers.update(&file, dirty)).unwrap();
        let mut content = sim.volatile();
        let (report, disk) = salvaged(content.clone());
        assert!(report.is_empty() && has_only(&disk, &[]));
        content.truncate((9 << 20) + 512);
        let (report, disk) = salvaged(content.clone());
        let missing = ByteRange::between(5 * MIB + 512, 8 * MIB);
        assert_eq!(report.missing.listed, [missing]);
        assert!(report.notes[0].contains("to have 12582912"), "{report:?}");
        assert!(has_only(&disk, &[missing]));
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
        let found = block_on(check(&file, None)).unwrap();
        assert!(found.findings.iter().any(|f| f.what.contains("to have 12582912")), "{found:?}");
        assert_eq!(found.corruptions, 0);
    }

    #[test]
    fn without_metadata_nothing_can_be_salvaged() {
        for len in [2 << 20, 200 << 10, 70 << 10, 100] {
            let mut content = image();
            content.truncate(len);
            let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", content));
            let err = block_on(read(&file)).unwrap_err().to_string();
            assert!(err.starts_with("test.vhdx: nothing can be salvaged: "), "{err}");
        }
    }

    #[test]
    fn nothing_can_be_written() {
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("test.vhdx", image()));
        let structure = block_on(read(&file)).unwrap();
        let err = block_on(disk::write(&structure.file, 0, &[0; 4096])).unwrap_err().to_string();
        assert!(err.contains("is being salvaged"), "{err}");
        block_on(structure.file.set_len(0)).unwrap_err();
    }
}
