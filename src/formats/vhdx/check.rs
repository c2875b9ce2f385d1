//! Looks for what is wrong with an image, says it in plain words, and repairs what can be repaired
//! without guessing.
//!
//! ```text
//! identifier ─► headers ─► log ─► region tables ─► metadata ─► BAT ─► overlaps, sector bitmaps
//! ```
//!
//! A log that was not replayed is no error: the check looks at the image as it is after a replay.
//!
//! # What is repaired
//!
//! Only what can be known for sure, in an order in which each step may be the last before a power
//! cut:
//!
//! 1. a new FileWriteGuid, in both headers, which also replaces a damaged header;
//! 2. the log is replayed, and declared empty when that is durable;
//! 3. the damaged one of the two region tables is replaced by the other, and a second that differs
//!    by the first, which is the one that counts;
//! 4. entries of the BAT that mean nothing (a sector bitmap in an image without a parent, a place
//!    given for a block that has none, or that lies behind the end of the disk) are cleared, each a
//!    store within one sector.
//!
//! An image whose structures cannot be believed is not touched at all.
//!
//! # Limits
//!
//! Memory grows with the number of blocks in the file, 8 bytes for each; with a repair also with what is
//! to be repaired, 24 bytes for each.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bat::{self, Checker};
use super::create::identifier;
use super::explain::{Finding, Remedy};
use super::geometry::Slot;
use super::header::HeaderSlots;
use super::layout::{
    BAT_STATE, BITMAP_PRESENT, ENTRIES_PER_PAGE, FILE_SIGNATURE, PAGE, REGION_TABLE_OFFSETS,
    payload,
};
use super::region;
use super::resize::begin_change;
use super::scan::{self, Used, UsedBlock};
use super::{Structure, disk, salvage};
use crate::error::{ErrorKind, Result, ResultExt};
use crate::io::File;
use crate::units::align_down;

/// Most findings that are put into words.
const MAX_FINDINGS: usize = 1000;

/// How often a repair looks for what the one before has brought to light: behind a missing identifier nothing
/// is seen.
const ROUNDS: usize = 2;

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// End of the last part of the file that is used, in bytes.
    pub image_end: u64,
    /// Payload blocks of the disk.
    pub blocks: u64,
    /// How many of them are in the file.
    pub allocated: u64,
    /// How many of those do not follow the one before.
    pub fragmented: u64,
    /// What can lose data, or was lost.
    pub corruptions: u64,
    /// How many of those were repaired.
    pub fixed: u64,
    /// In words, up to a limit.
    pub findings: Vec<Finding>,
    to_do: ToDo,
}

/// What a repair is to do, whether it is listed or not.
#[derive(Clone, Debug, Default)]
struct ToDo {
    /// `None` if there is to be no repair.
    repair: Option<Repair>,
    remedies: Vec<Remedy>,
    /// How many of them are for corruptions.
    corruptions: u64,
}

/// How much a repair may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Replay the log, as every opening for writing does.
    ReplayOnly,
    /// Everything that can be repaired.
    All,
}

/// Checks an image; with `repair` it is repaired and then checked again.
///
/// # Errors
/// If the file cannot be read, or uses what is not known here.
pub async fn check(file: &Arc<dyn File>, repair: Option<Repair>) -> Result<Found> {
    let name = || file.name().to_string();
    let mut repaired = Vec::new();
    let mut fixed = 0;
    let mut rounds = 0..ROUNDS;
    loop {
        let (mut found, structure) = look(file, repair).await.context(name)?;
        let to_do = std::mem::take(&mut found.to_do);
        if to_do.remedies.is_empty() || rounds.next().is_none() {
            found.fixed = fixed;
            found.findings.splice(0..0, repaired);
            return Ok(found);
        }
        mend(file, structure, &to_do.remedies).await.context(|| "repairing").context(name)?;
        fixed += to_do.corruptions;
        let is_repaired = |remedy: Remedy| repair.is_some_and(|repair| remedy.is_for(repair));
        let listed = found.findings.into_iter().filter(|finding| is_repaired(finding.remedy));
        repaired.extend(listed.map(|finding| Finding { is_fixed: true, ..finding }));
    }
}

/// Looks at everything, and returns what could be read of the structures.
async fn look(file: &Arc<dyn File>, repair: Option<Repair>) -> Result<(Found, Option<Structure>)> {
    let mut found = Found { to_do: ToDo { repair, ..ToDo::default() }, ..Found::default() };
    let is_whole = file.len()? >= PAGE;
    if is_whole && !disk::read(file, 0, PAGE).await?.starts_with(FILE_SIGNATURE) {
        match HeaderSlots::read(file).await {
            Ok(_) => found.say(Finding::no_identifier()),
            Err(err) => found.say(Finding::unreadable(&err)),
        }
        return Ok((found, None));
    }
    let structure = match Structure::read_unnamed(file, true).await {
        Ok(structure) => structure,
        Err(err) if err.kind() == ErrorKind::Corrupt => {
            let is_log = match salvage::read(file).await {
                Ok(rest) => rest.salvaged.is_some_and(|report| report.ignored_log),
                Err(_) => false,
            };
            found.say(if is_log { Finding::bad_log(&err) } else { Finding::unreadable(&err) });
            return Ok((found, None));
        }
        Err(err) => return Err(err),
    };
    for slot in (0..2).filter(|slot| !structure.headers.valid[*slot]) {
        found.say(Finding::damaged_header(slot));
    }
    if let Err(err) = structure.headers.check_room() {
        found.say(Finding::no_room_in_headers(&err));
    }
    if let Some(replay) = &structure.replay {
        found.say(match replay.cut_off() {
            None => Finding::dirty_log(replay.entries().len()),
            Some(entries) => Finding::cut_off(entries),
        });
        let len = file.len()?;
        let wanted = replay.last_file_offset();
        if wanted > len {
            found.say(Finding::shorter_than_logged(len, wanted));
        }
    }
    for copy in (0..2).filter(|copy| !structure.regions.valid[*copy]) {
        found.say(Finding::damaged_region_table(copy));
    }
    if structure.regions.differ {
        found.say(Finding::region_tables_differ());
    }
    let mut walk = Walk::new(&structure);
    walk.run(&mut found).await?;
    walk.finish(&mut found)?;
    Ok((found, Some(structure)))
}

impl Found {
    fn say(&mut self, finding: Finding) {
        self.say_with(finding.is_corruption, || finding);
    }

    /// Says what is put into words only if it is listed: there may be millions.
    fn say_with(&mut self, is_corruption: bool, finding: impl FnOnce() -> Finding) {
        self.corruptions += u64::from(is_corruption);
        let is_listed = self.findings.len() < MAX_FINDINGS;
        if self.findings.len() == MAX_FINDINGS {
            self.findings.push(Finding::more());
        }
        if !is_listed && self.to_do.repair.is_none() {
            return;
        }
        let finding = finding();
        self.to_do.add(&finding);
        if is_listed {
            self.findings.push(finding);
        }
    }
}

impl ToDo {
    fn add(&mut self, finding: &Finding) {
        if self.repair.is_some_and(|repair| finding.remedy.is_for(repair)) {
            self.remedies.push(finding.remedy);
            self.corruptions += u64::from(finding.is_corruption);
        }
    }
}

/// A walk through the BAT.
struct Walk<'a> {
    structure: &'a Structure,
    checker: Checker,
    file_len: u64,
    used: Vec<UsedBlock>,
    /// Chunks with partially present blocks, with one of them; and chunks that have a bitmap.
    partial: BTreeSet<u64>,
    bitmaps: BTreeSet<u64>,
    /// Where the last payload block ended.
    last_end: u64,
}

impl Walk<'_> {
    fn new(structure: &Structure) -> Walk<'_> {
        let checker = Checker { geometry: structure.geometry, reserved: structure.reserved() };
        Walk {
            structure,
            checker,
            file_len: 0,
            used: Vec::new(),
            partial: BTreeSet::new(),
            bitmaps: BTreeSet::new(),
            last_end: 0,
        }
    }

    async fn run(&mut self, found: &mut Found) -> Result<()> {
        let structure = self.structure;
        self.file_len = structure.file.len()?;
        found.blocks = structure.geometry.payload_blocks();
        let (file, bat) = (&structure.file, structure.regions.bat);
        let entries = structure.geometry.bat_entries();
        let mut visit = |index, entry| {
            self.entry(found, index, entry);
            Ok(())
        };
        scan::walk(file, bat, entries, u64::MAX, &mut visit).await?;
        Ok(())
    }

    fn entry(&mut self, found: &mut Found, index: u64, entry: u64) {
        let geometry = self.checker.geometry;
        let at = self.structure.regions.bat.offset + index * 8;
        if !self.checker.is_good(index, entry, self.file_len) {
            let explain = || self.checker.explain(index, entry, self.file_len);
            return found.say_with(true, || match explain() {
                Err(err) => Finding::bad_entry(&err, &geometry, index, at, entry),
                Ok(()) => unreachable!("entry {index} was found bad"),
            });
        }
        let state = bat::state(entry);
        match geometry.slot(index) {
            Slot::Payload(block) if block >= geometry.payload_blocks() => {
                if bat::offset(entry) != 0 {
                    found.say_with(false, || Finding::behind_end(&geometry, index, at, entry));
                }
                return;
            }
            Slot::Bitmap(chunk) if state == BITMAP_PRESENT => _ = self.bitmaps.insert(chunk),
            Slot::Payload(block) if state == payload::PARTIALLY_PRESENT => {
                self.partial.insert(geometry.chunk_of(block));
            }
            Slot::Payload(_) if state == payload::FULLY_PRESENT => {}
            _ => {
                let keeps_place = [payload::NOT_PRESENT, payload::ZERO].contains(&state);
                if keeps_place && entry & !BAT_STATE != 0 {
                    found.say_with(false, || Finding::stale_place(&geometry, index, at, entry));
                }
                return;
            }
        }
        let (mib, index) = (u32::try_from(bat::offset(entry) >> 20), u32::try_from(index));
        // Beyond 4 PiB of a sparse file; no two of them are compared.
        let (Ok(mib), Ok(index)) = (mib, index) else { return };
        let block = UsedBlock { mib, index };
        self.used.push(block);
        if matches!(geometry.slot(index.into()), Slot::Payload(_)) {
            let range = Used::range(&self.checker, &block);
            found.allocated += 1;
            if self.last_end != 0 && range.offset != self.last_end {
                found.fragmented += 1;
            }
            self.last_end = range.end();
        }
    }

    /// What can be said when all entries were seen.
    fn finish(mut self, found: &mut Found) -> Result<()> {
        self.used.sort_unstable();
        scan::overlaps(&self.checker, &self.used, |first, second| {
            found.say_with(true, || Finding::overlap(&self.checker, first, second));
            Ok(())
        })?;
        for chunk in self.partial.difference(&self.bitmaps) {
            found.say_with(true, || Finding::missing_bitmap(&self.checker.geometry, *chunk));
        }
        let ends = self.used.iter().map(|block| Used::range(&self.checker, block).end());
        let last = ends.max().unwrap_or(0);
        let reserved = self.checker.reserved.iter().map(|range| range.end()).max().unwrap_or(0);
        found.image_end = last.max(reserved).min(self.file_len);
        Ok(())
    }
}

/// Repairs what was found.
async fn mend(
    file: &Arc<dyn File>,
    structure: Option<Structure>,
    remedies: &[Remedy],
) -> Result<()> {
    let Some(structure) = structure else {
        // Nothing but the identifier is wrong: the headers are good.
        disk::write(file, 0, &identifier()).await?;
        return file.flush().await;
    };
    begin_change(file, &structure).await?;
    for (copy, offset) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
        if remedies.contains(&Remedy::CopyRegionTable(copy)) {
            disk::write(file, offset, &region::encode(&structure.regions.all)).await?;
            file.flush().await?;
        }
    }
    let entry = |remedy: &Remedy| match *remedy {
        Remedy::SetEntry { index, value } => Some((index, value)),
        _ => None,
    };
    let entries: Vec<_> = remedies.iter().filter_map(entry).collect();
    for entries in entries.chunk_by(|(one, _), (next, _)| page_of(*one) == page_of(*next)) {
        let page = structure.regions.bat.offset + page_of(entries[0].0);
        let mut bytes = disk::read(file, page, PAGE).await?;
        for (index, value) in entries {
            let at = (index % ENTRIES_PER_PAGE * 8) as usize;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        disk::write(file, page, &bytes).await?;
    }
    file.flush().await
}

/// Where in the BAT the page of an entry begins, in bytes.
fn page_of(index: u64) -> u64 {
    align_down(index * 8, PAGE)
}
