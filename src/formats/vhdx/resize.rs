//! Changing the size of a disk: of an image that nobody uses, or under a guest that waits meanwhile.
//!
//! ```text
//! grow:    new GUIDs ─► zeros behind the old end ─► new BAT entries ─► (BAT moved) ─► size ─► done
//! shrink:  new GUIDs ─► size ─► entries behind the new end cleared ─► space given back
//! ```
//!
//! The size is eight bytes within one sector, so it changes at one instant. What is written before
//! it lies behind the end of the disk and is not seen; what is done after it only tidies up. So a
//! power cut at any time leaves the old or the new size, with the same content in front of it.
//!
//! A BAT that has become too small is copied to the end of the file. The second region table is
//! made to say so, and then the first: readers take the first that is valid, so they see the old
//! place or the new one, and both say the same.
//!
//! Under a guest all that waits in memory is put in its place first and the log is emptied; then the
//! file is as one that nobody uses. Afterwards the image is looked at as if it were opened anew.
//!
//! Children of a resized image refuse it from then on, as its DataWriteGuid is a new one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::bat::Checker;
use super::geometry::{Geometry, Slot};
use super::header::{Header, HeaderSlots};
use super::layout::{
    ENTRIES_PER_PAGE, Guid, MAX_DISK_SIZE, PAGE, REGION_TABLE_OFFSETS, guid, payload,
};
use super::region;
use super::scan::{self, Used};
use super::{ALL, Structure, Vhdx, disk};
use crate::block::Format;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::File;
use crate::units::{ByteRange, MIB, SECTOR_SIZE, align_down, align_up};

/// How much of a BAT is copied or written at once, in bytes.
const CHUNK: u64 = MIB;

/// Makes an image ready to be changed while nobody uses it: a new FileWriteGuid, both headers good,
/// and the log replayed and empty.
///
/// # Errors
/// If the headers cannot be replaced any more; then nothing was changed. Those of the file: what was done
/// by then can be repeated.
pub(super) async fn begin_change(
    file: &Arc<dyn File>,
    structure: &Structure,
) -> Result<HeaderSlots> {
    structure.headers.check_room()?;
    let mut headers = structure.headers;
    match &structure.replay {
        Some(replay) => {
            replay.make(file, &mut headers).await.context(|| "replaying the log")?;
        }
        None => {
            let begun = Header { file_write_guid: Guid::random(), ..headers.current };
            headers.update(file, begun).await?;
        }
    }
    Ok(headers)
}

/// Gives a disk another size. `parent_size` is that of the parent, for a differencing image.
///
/// # Errors
/// Says what is in the way, before anything was changed; or, later, what failed: then the disk has
/// the old size or the new one.
pub async fn resize(file: &Arc<dyn File>, size: u64, parent_size: Option<u64>) -> Result<()> {
    let name = || file.name().to_string();
    resize_unnamed(file, size, parent_size).await.context(name)
}

async fn resize_unnamed(file: &Arc<dyn File>, size: u64, parent_size: Option<u64>) -> Result<()> {
    let structure = Structure::read(file).await?;
    structure.check_log()?;
    match Change::prepare(file, &structure, size, parent_size).await? {
        Some(change) => change.make().await,
        None => Ok(()),
    }
}

impl Vhdx {
    /// Gives the disk another size, with nothing in flight.
    ///
    /// # Errors
    /// Those of [`resize`]; kind [`Busy`](ErrorKind::Busy) if a guest is still to come back that
    /// relies on what is kept. If something failed after the first change, writes are refused; the disk
    /// has the size that the file says.
    pub(super) async fn resize_open(&self, size: u64) -> Result<()> {
        let name = || self.name().to_string();
        let _alone = self.framing.exclusive(ALL).await;
        let has_begun = self.session.load(Ordering::Acquire);
        if self.keep.as_ref().is_some_and(|keep| !has_begun && keep.found().is_some()) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{}: the guest of an earlier process has not come back yet, and what is kept of \
                     its writes is of the size that the disk has",
                    self.name()
                ),
            ));
        }
        self.empty_log().await?;
        let structure = Structure::read(&self.file).await?;
        let parent_size = self.backing().map(|parent| parent.size());
        let change = Change::prepare(&self.file, &structure, size, parent_size).await;
        let Some(change) = change.context(name)? else { return Ok(()) };
        let made = self.poisoning(change.make().await.context(|| "resizing"));
        let adopted = match Structure::read(&self.file).await {
            Ok(structure) => self.adopt(structure),
            Err(err) => Err(err),
        };
        made.and(self.poisoning(adopted))
    }

    /// Takes another look at the file for what is known of it.
    fn adopt(&self, structure: Structure) -> Result<()> {
        let (geometry, bat) = (structure.geometry, structure.regions.bat);
        self.cache.clear();
        self.file_len.store(self.file.len()?, Ordering::Release);
        self.disk_size.store(geometry.disk_size, Ordering::Release);
        self.bat_offset.store(bat.offset, Ordering::Release);
        self.bat_len.store(bat.len, Ordering::Release);
        let checker = Checker { geometry, reserved: structure.reserved() };
        *self.checker.write().unwrap() = Arc::new(checker);
        *self.headers.lock().unwrap() = structure.headers;
        *self.structure.write().unwrap() = structure;
        self.forget_space();
        Ok(())
    }
}

/// Where the size is in the file.
fn place_of_size(structure: &Structure) -> Result<u64> {
    let is_it = |item: &&super::metadata::Item| item.guid == guid::DISK_SIZE && item.flags & 1 == 0;
    let place = structure.metadata.items.iter().find(is_it).map_or(0, |item| item.range.offset);
    if place / SECTOR_SIZE != (place + 7) / SECTOR_SIZE {
        return Err(Error::unsupported(
            "its size lies across two sectors of the file and cannot be changed at one instant; \
             convert it to a new image",
        ));
    }
    Ok(place)
}

async fn write_size(file: &Arc<dyn File>, place: u64, size: u64) -> Result<()> {
    let page = align_down(place, PAGE);
    let mut bytes = disk::read(file, page, PAGE).await?;
    bytes[(place - page) as usize..][..8].copy_from_slice(&size.to_le_bytes());
    disk::write(file, page, &bytes).await?;
    file.flush().await
}

struct Change<'a> {
    file: &'a Arc<dyn File>,
    structure: &'a Structure,
    checker: Checker,
    /// What the old BAT has in the file.
    used: Used,
    old: Geometry,
    new: Geometry,
    /// Where the size is in the file.
    place: u64,
}

impl<'a> Change<'a> {
    /// Sees whether it can be done. `None` if there is nothing to do.
    ///
    /// # Errors
    /// Says what is in the way; nothing was changed.
    async fn prepare(
        file: &'a Arc<dyn File>,
        structure: &'a Structure,
        size: u64,
        parent_size: Option<u64>,
    ) -> Result<Option<Change<'a>>> {
        let old = structure.geometry;
        let sector = old.sector_size();
        if size == 0 || size > MAX_DISK_SIZE || !size.is_multiple_of(sector) {
            return Err(Error::invalid(format!(
                "a size of {size} bytes is not a multiple of the {sector} bytes of a sector up to \
                 64T"
            )));
        }
        if size == old.disk_size {
            return Ok(None);
        }
        if size > old.disk_size && parent_size.is_some_and(|parent| parent > old.disk_size) {
            return Err(Error::unsupported(
                "its backing file is larger than the disk, and what lies there would show; it \
                 cannot grow",
            ));
        }
        let place = place_of_size(structure)?;
        let checker = Checker { geometry: old, reserved: structure.reserved() };
        let used = scan::scan(&structure.file, &checker, structure.regions.bat, u64::MAX)
            .await
            .context(|| "it must be in order to be resized (vublk check)")?
            .unwrap_or_default();
        let new = Geometry::of(size, old.block_size(), sector, old.has_parent);
        Ok(Some(Change { file, structure, checker, used, old, new, place }))
    }

    /// Does it; durable on return.
    async fn make(mut self) -> Result<()> {
        let (file, place, size) = (self.file, self.place, self.new.disk_size);
        let mut headers = begin_change(file, self.structure).await?;
        let begun = Header { data_write_guid: Guid::random(), ..headers.current };
        headers.update(file, begun).await?;
        match size > self.old.disk_size {
            true => {
                self.grow().await?;
                write_size(file, place, size).await
            }
            false => {
                write_size(file, place, size).await?;
                self.tidy().await
            }
        }
    }

    /// Does all that must be there before the disk is larger.
    async fn grow(&mut self) -> Result<()> {
        let is_fixed = self.structure.metadata.is_fixed;
        let mut end = self.end_of_file()?;
        self.zero_behind_end().await.context(|| "zeroing what lies behind the old end")?;
        let mut bat = self.structure.regions.bat;
        let needed = self.new.bat_entries() * 8;
        let moves = needed > bat.len;
        if moves {
            bat = ByteRange { offset: end, len: needed.next_multiple_of(MIB) };
            end = bat.end();
        }
        let first_block = end;
        let added = self.new.payload_blocks() - self.old.payload_blocks();
        if is_fixed {
            end += added * self.new.block_size();
        }
        if self.file.len()? < end {
            self.file.set_len(end).await.context(|| format!("making it {end} bytes long"))?;
        }
        if moves {
            self.copy_bat(bat).await.context(|| "moving the BAT")?;
        }
        self.write_entries(bat, is_fixed.then_some(first_block)).await?;
        self.file.flush().await?;
        if moves {
            self.switch_bat(bat).await.context(|| "moving the BAT")?;
        }
        Ok(())
    }

    /// Where the file can be made longer: everything behind it reads as zeros then.
    fn end_of_file(&self) -> Result<u64> {
        let ends = self.checker.reserved.iter().map(|range| range.end());
        let blocks = self.used.blocks.iter().chain(&self.used.anchors);
        let ends = ends.chain(blocks.map(|block| Used::range(&self.checker, block).end()));
        let end = ends.max().unwrap_or(0).max(self.file.len()?);
        align_up(end, MIB).ok_or_else(|| Error::corrupt("the file is too long"))
    }

    /// Makes the rest of the last block read as zeros.
    async fn zero_behind_end(&self) -> Result<()> {
        let block = self.old.payload_blocks() - 1;
        let range = self.old.block_range(block);
        let index = self.old.payload_index(block);
        let present = self.used.blocks.iter().find(|used| u64::from(used.index) == index);
        let Some(present) = present.filter(|_| range.len < self.old.block_size()) else {
            return Ok(());
        };
        let place = Used::range(&self.checker, present);
        if self.file.len()? < place.end() {
            self.file.set_len(place.end()).await?;
        }
        let rest = ByteRange::between(place.offset + range.len, place.end());
        self.file.write_zeroes(rest, true).await?;
        self.file.flush().await
    }

    /// Copies what is stored of the old BAT.
    async fn copy_bat(&self, to: ByteRange) -> Result<()> {
        let from = self.structure.regions.bat;
        let len = (self.old.bat_entries() * 8).next_multiple_of(PAGE);
        for at in (0..len).step_by(CHUNK as usize) {
            let part = CHUNK.min(len - at);
            let bytes = disk::read(self.file, from.offset + at, part).await?;
            if bytes.iter().any(|byte| *byte != 0) {
                disk::write(self.file, to.offset + at, &bytes).await?;
            }
        }
        Ok(())
    }

    /// Writes the entries that the old size has no use for.
    async fn write_entries(&self, bat: ByteRange, first_block: Option<u64>) -> Result<()> {
        let old_blocks = self.old.payload_blocks();
        let entry = |index| match (self.new.slot(index), first_block) {
            (Slot::Payload(block), Some(start)) if block < self.new.payload_blocks() => {
                let place = start + (block - old_blocks) * self.new.block_size();
                place | payload::FULLY_PRESENT
            }
            _ => 0,
        };
        let keeps = |index| match self.new.slot(index) {
            Slot::Payload(block) => block < old_blocks,
            // Of a chunk that the disk has already.
            Slot::Bitmap(chunk) => self.old.has_parent && chunk < self.old.chunks(),
        };
        let first = self.old.payload_index(old_blocks - 1) + 1;
        self.rewrite(bat, first, self.new.bat_entries(), &|index, old| {
            if keeps(index) { old } else { entry(index) }
        })
        .await
    }

    /// Replaces the entries from `first` to `end` by what `value` makes of them.
    async fn rewrite(
        &self,
        bat: ByteRange,
        first: u64,
        end: u64,
        value: &dyn Fn(u64, u64) -> u64,
    ) -> Result<()> {
        let mut at = align_down(first, ENTRIES_PER_PAGE);
        while at < end {
            let count = (CHUNK / 8).min(end - at);
            let len = (count * 8).next_multiple_of(PAGE).min(bat.end() - bat.offset - at * 8);
            let before = disk::read(self.file, bat.offset + at * 8, len).await?;
            let mut bytes = before.clone();
            for (index, word) in (at..end).zip(bytes.chunks_exact_mut(8)) {
                if index >= first {
                    let old = u64::from_le_bytes((&*word).try_into().expect("8 bytes"));
                    word.copy_from_slice(&value(index, old).to_le_bytes());
                }
            }
            // Holes of the BAT stay holes.
            if bytes != before {
                disk::write(self.file, bat.offset + at * 8, &bytes).await?;
            }
            at += count;
        }
        Ok(())
    }

    /// Makes the region tables name another place of the BAT.
    async fn switch_bat(&self, bat: ByteRange) -> Result<()> {
        let mut regions = self.structure.regions.all.clone();
        let old = regions.iter_mut().find(|region| region.guid == guid::BAT_REGION);
        old.expect("every image has a BAT").range = bat;
        let table = region::encode(&regions);
        let old_table = region::encode(&self.structure.regions.all);
        // The first must be good before the second may be changed.
        if !self.structure.regions.valid[0] {
            disk::write(self.file, REGION_TABLE_OFFSETS[0], &old_table).await?;
            self.file.flush().await?;
        }
        for offset in REGION_TABLE_OFFSETS.into_iter().rev() {
            disk::write(self.file, offset, &table).await?;
            self.file.flush().await?;
        }
        Ok(())
    }

    /// Clears what the smaller disk has no use for, and gives its space back.
    async fn tidy(&self) -> Result<()> {
        let bat = self.structure.regions.bat;
        let is_cut = |index| match self.old.slot(index) {
            Slot::Payload(block) => block >= self.new.payload_blocks(),
            Slot::Bitmap(chunk) => chunk >= self.new.chunks(),
        };
        let first = self.new.payload_index(self.new.payload_blocks() - 1) + 1;
        let cleared = |index, old| if is_cut(index) { 0 } else { old };
        self.rewrite(bat, first, self.old.bat_entries(), &cleared).await?;
        self.file.flush().await?;
        let mut end = self.checker.reserved.iter().map(|range| range.end()).max().unwrap_or(0);
        let is_gone = |index: u32| is_cut(u64::from(index));
        for block in self.used.blocks.iter().chain(&self.used.anchors) {
            if !is_gone(block.index) {
                end = end.max(Used::range(&self.checker, block).end());
            }
        }
        let len = self.file.len()?;
        for block in self.used.blocks.iter().filter(|block| is_gone(block.index)) {
            let range = Used::range(&self.checker, block);
            let inside = range.intersect(&ByteRange { offset: 0, len: end.min(len) });
            if !inside.is_empty() {
                self.file.discard(inside).await?;
            }
        }
        if end < len {
            self.file.set_len(end).await?;
        }
        self.file.flush().await
    }
}
