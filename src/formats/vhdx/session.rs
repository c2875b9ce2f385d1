//! What frames the writing: replay at open, headers before the first write, redo after a kill, an
//! empty log at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::header::{Header, HeaderSlots};
use super::journal::{Conditions, Edit};
use super::layout::{Guid, REGION_TABLE_OFFSETS};
use super::space::Space;
use super::structure::Structure;
use super::{ALL, Vhdx};
use super::{disk, region, scan};
use crate::block::Keep;
use crate::block::keep::{Keeper, begin_session};
use crate::error::{Error, Result, ResultExt};
use crate::io::HostKind;
use crate::units::ByteRange;

/// Of how much of the BAT the places are remembered to find what is free inside the file, in bytes. If
/// more of it is stored, the file only grows at its end.
const SPACE_SCAN: u64 = 16 << 20;

/// A BAT up to this length gets its space on the host before the first write, in bytes: that of 4 TiB in
/// blocks of 32 MiB.
const RESERVED_BAT: u64 = 1 << 20;

/// Replays the log of an image on disk, and declares it empty. Can be repeated after a crash.
pub(super) async fn replay(structure: &Structure, headers: &mut HeaderSlots) -> Result<()> {
    let Some(replay) = &structure.replay else { return Ok(()) };
    let file = &structure.raw_file;
    replay.make(file, headers).await?;
    tracing::info!(
        "{}: {} log entries that were not in place yet were replayed",
        file.name(),
        replay.entries().len()
    );
    Ok(())
}

impl Keeper for Vhdx {
    fn records(&self) -> Option<&Keep> {
        self.keep.as_ref()
    }

    fn session(&self) -> &AtomicBool {
        &self.session
    }

    async fn settle(&self) {
        // Whoever has not seen yet that a session begins shows his change before he lets go of this.
        drop(self.journal.lock().unwrap());
    }

    async fn save(&self) -> Result<()> {
        let saved = if self.is_dirty() { self.commit().await } else { Ok(()) };
        #[cfg(test)]
        super::testing::reached(super::testing::Moment::Saved);
        saved
    }
}

impl Vhdx {
    /// Prepares for the first change: both headers say on disk that the content changes, and the
    /// free space is known.
    pub(super) async fn start_session(&self) -> Result<()> {
        self.check_writable()?;
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        let _alone = self.starting.exclusive(ALL).await;
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.find_space().await?;
        self.reserve_metadata().await?;
        // As was said to children that follow.
        let data_guid = *self.next_data_guid.lock().unwrap();
        let updated = self
            .update_header(|header| {
                header.file_write_guid = Guid::random();
                header.data_write_guid = data_guid;
            })
            .await;
        self.poisoning_unless_full(updated)?;
        let replaced = self.replace_bad_region_tables().await;
        self.poisoning_unless_full(replaced)?;
        *self.next_data_guid.lock().unwrap() = Guid::random();
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    /// Sees to it that metadata finds room on the host when it is written: no write is lost then that has
    /// been completed, and the one that needs more space than there is fails alone. The log, and a BAT that
    /// is not large, are holes in a new image.
    async fn reserve_metadata(&self) -> Result<()> {
        let entries = ByteRange { len: self.geometry().bat_entries() * 8, ..self.bat() };
        let bat = (entries.len <= RESERVED_BAT).then_some(entries);
        for range in std::iter::once(self.log).chain(bat) {
            let room = self.file.reserve(range).await;
            room.context(|| format!("{}: making room for metadata, {range}", self.name()))?;
        }
        Ok(())
    }

    /// Makes both region tables say what the one does that is believed. A resize that was cut off leaves a
    /// second one that names a BAT in space which is used for other things from now on, and should the
    /// first be damaged one day, it would be believed. One that is damaged is no spare copy, and QEMU reads
    /// only the first. The caller holds `starting`.
    async fn replace_bad_region_tables(&self) -> Result<()> {
        let regions = self.structure().regions;
        let table = region::encode(&regions.all);
        for (copy, offset) in REGION_TABLE_OFFSETS.into_iter().enumerate() {
            let is_stale = copy == 1 && regions.differ;
            if regions.valid[copy] && !is_stale {
                continue;
            }
            disk::write(&self.file, offset, &table).await?;
            self.file.flush().await?;
            let (name, number) = (self.name(), copy + 1);
            let was = if is_stale { "out of date" } else { "damaged" };
            tracing::info!("{name}: region table {number} of 2 was {was}, and is no more");
        }
        let regions = &mut self.structure.write().unwrap().regions;
        (regions.valid, regions.differ) = ([true; 2], false);
        Ok(())
    }

    /// Prepares for changes that belong to an earlier session: what children know the image by
    /// stays as that session made it, as after a replay of the log.
    pub(super) async fn start_redo(&self) -> Result<()> {
        self.check_writable()?;
        let _alone = self.starting.exclusive(ALL).await;
        let updated = self.update_header(|header| header.file_write_guid = Guid::random()).await;
        self.poisoning(updated)
    }

    /// Finds out what is free in the file. The caller holds `starting`.
    async fn find_space(&self) -> Result<()> {
        let checker = self.checker();
        let used = scan::scan(&self.file, &checker, self.bat(), SPACE_SCAN).await;
        let used = self.poisoning(used)?;
        let file_len = self.file_len.load(Ordering::Acquire);
        if used.is_none() {
            // No entry may name a place that the file would grow into.
            let checked = scan::check(&self.file, &checker, self.bat()).await;
            self.poisoning(checked)?;
            tracing::info!(
                "{}: its BAT is too large to look for free space inside of it",
                self.name()
            );
        }
        *self.space.lock().unwrap() = Some(Space::new(&checker, file_len, used.as_ref()));
        Ok(())
    }

    /// Changes both headers; durable on return.
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let update = async {
            let mut slots = *self.headers.lock().unwrap();
            let mut header = slots.current;
            change(&mut header);
            slots.update(&self.file, header).await?;
            *self.headers.lock().unwrap() = slots;
            Ok(())
        };
        self.header_turn.alone_while(ALL, update).await
    }

    /// Redoes what the guest of this session saw completed, or drops it for a new guest.
    pub(super) async fn resume_session(&self, nonce: Option<u128>) -> Result<()> {
        if nonce.is_none() {
            // Before the keep forgets: from now on nothing is recorded.
            self.session.store(false, Ordering::Release);
        }
        let Some(keep) = &self.keep else { return Ok(()) };
        let _alone = self.framing.exclusive(ALL).await;
        let Some(nonce) = nonce else { return keep.forget() };
        let Some(records) = keep.take_over(nonce)? else {
            return match keep.found() {
                Some(_) => Err(Error::invalid(format!(
                    "{}: what is kept in {} is of another guest's session, so the guest that \
                     reconnects may have lost writes; stop it, then remove that file",
                    self.name(),
                    keep.path().display()
                ))),
                None => Ok(()),
            };
        };
        if records.is_empty() {
            return Ok(());
        }
        let context = || format!("{}: redoing {}", self.name(), keep.path().display());
        self.redo_all(&records).await.context(context)?;
        tracing::info!("{}: {} kept changes were redone", self.name(), records.len());
        keep.reset()
    }

    /// Redoes changes. Some of them may be on disk already: a kill can come after a commit and before
    /// its records are dropped. Then a record that frees a place is followed by the one that gave it
    /// to somebody. So nothing is freed here; what is free is found out when all is in its place.
    async fn redo_all(&self, records: &[Vec<u8>]) -> Result<()> {
        self.start_redo().await?;
        for (i, record) in records.iter().enumerate() {
            self.redo(record).await.context(|| format!("record {i}"))?;
        }
        self.checkpoint().await?;
        self.forget_space();
        Ok(())
    }

    async fn redo(&self, record: &[u8]) -> Result<()> {
        let edits = Edit::decode(record)?;
        for edit in &edits {
            match *edit {
                Edit::Entry { index, value } => {
                    if index >= self.geometry().bat_entries() {
                        return Err(Error::corrupt(format!("there is no BAT entry {index}")));
                    }
                    let file_len = self.file_len.load(Ordering::Acquire);
                    self.checker().explain(index, value, file_len)?;
                }
                Edit::Bits { bitmap, first, count, .. } => self.check_bits(bitmap, first, count)?,
            }
        }
        let conditions = Conditions { expect: &[], data_first: true, frees: None };
        self.publish(&edits, conditions).await.map(drop)
    }

    /// The next change finds out what is free in the file, where everything is in its place.
    pub(super) fn forget_space(&self) {
        self.forget_freed();
        *self.space.lock().unwrap() = None;
        self.started.store(false, Ordering::Release);
    }

    /// Checks that bits lie in a sector bitmap block of the file.
    fn check_bits(&self, bitmap: u64, first: u64, count: u64) -> Result<()> {
        let inside = count > 0
            && first.checked_add(count).is_some_and(|end| end <= super::layout::SECTORS_PER_BITMAP);
        let file_len = self.file_len.load(Ordering::Acquire);
        let place = ByteRange::new(bitmap, crate::units::MIB);
        let in_file = place.is_some_and(|place| {
            place.is_aligned(crate::units::MIB)
                && place.end() <= file_len
                && !self.checker().reserved.iter().any(|range| range.overlaps(&place))
        });
        match inside && in_file {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "{count} bits from {first} of a sector bitmap at {bitmap} of the file"
            ))),
        }
    }

    /// From now on, what completes must survive this process.
    pub(super) fn start_keeping(&self, nonce: u128) -> Result<()> {
        if self.read_only { Ok(()) } else { begin_session(self, nonce) }
    }

    /// Leaves everything in its place and the log empty.
    pub(super) async fn finish_session(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let _alone = self.framing.exclusive(ALL).await;
        self.empty_log().await?;
        // Before anything is cut off: a record that is redone must find its place in the file.
        if let Some(keep) = &self.keep {
            keep.discard()?;
            if keep.awaited().is_some() {
                return Ok(());
            }
        }
        self.cut_unused_end().await
    }

    /// Puts everything in its place, and declares the log empty.
    pub(super) async fn empty_log(&self) -> Result<()> {
        self.checkpoint().await?;
        self.reclaim().await;
        let update = async {
            let is_left = self.started.load(Ordering::Acquire) && self.header_names_log();
            if !self.uses_log() && !is_left {
                return Ok(());
            }
            // First: if this is dropped, one header may say already that the log is empty, and an entry
            // that was added to it would be lost.
            self.forget_log();
            let updated = self.update_header(|header| header.log_guid = Guid::ZERO).await;
            self.poisoning(updated)
        };
        self.turn.alone_while(ALL, update).await
    }

    /// Whether the headers do not say that the log is empty, as far as we know.
    pub(super) fn header_names_log(&self) -> bool {
        !self.headers.lock().unwrap().current.log_guid.is_zero()
    }

    /// Cuts off what lies behind the last place in use: what was freed there, and what the file grew
    /// by ahead of its use. Only while the log is empty, as entries say how long the file is at least,
    /// and once no entry of the BAT on disk names a place there.
    async fn cut_unused_end(&self) -> Result<()> {
        let host = self.file.as_host();
        if host.is_some_and(|host| host.kind() == HostKind::BlockDevice) {
            // It ends where it ends.
            return Ok(());
        }
        let end = {
            let mut space = self.space.lock().unwrap();
            let Some(space) = space.as_mut() else { return Ok(()) };
            // One that is fixed has all the space that its disk may ever need.
            if !self.is_fixed {
                space.let_go_of_end();
            }
            space.end()
        };
        let cut = async {
            if end >= self.file_len.load(Ordering::Acquire) {
                return Ok(());
            }
            if let Err(err) = self.file.set_len(end).await {
                tracing::warn!("{}: cutting its unused end: {err}", self.name());
                // What lies there does not read as zeros.
                self.forget_space();
                return Ok(());
            }
            self.file_len.store(end, Ordering::Release);
            self.forget_flushed_len();
            // Or a cut of the power could undo this, and leave the rest, once the file has grown again.
            self.poisoning(self.file.flush().await)
        };
        self.growing.alone_while(ALL, cut).await
    }

    /// The structure with the headers as they are now.
    pub(super) fn current_structure(&self) -> Structure {
        let headers = *self.headers.lock().unwrap();
        let structure = self.structure();
        // Who writes has replayed it.
        let replay = structure.replay.clone().filter(|_| self.read_only);
        Structure { headers, raw_file: Arc::clone(&self.file), replay, ..structure }
    }
}

#[cfg(test)]
mod tests {
    use super::super::OpenOptions;
    use super::super::geometry::Geometry;
    use super::super::layout::payload;
    use super::super::testing::*;
    use super::*;
    use crate::block::Driver;
    use crate::io::sim::{SimFile, SimOp};
    use crate::io::{File, block_on};
    use crate::units::MIB;

    /// As a kill leaves it after a commit and before the records of that are dropped.
    #[test]
    fn what_is_durable_already_is_redone_without_harm() {
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(4 * MIB).bytes());
        let driver = open_image(&file, None, None).unwrap();
        block_on(async {
            write(&driver, 0, &vec![1; MIB as usize], false).await.unwrap();
            driver.close().await.unwrap();
        });
        let file = file.after_kill();
        let driver = open_image(&file, None, None).unwrap();
        let image = driver.format();
        let now = block_on(image.entry_at(0)).unwrap() & !super::super::bat::MEMORY_BITS;
        let record = |value| {
            let mut record = Vec::new();
            Edit::Entry { index: 0, value }.encode(&mut record);
            record
        };
        // The block was cleared, and written again to the place that it has.
        block_on(image.redo_all(&[record(payload::ZERO), record(now)])).unwrap();
        block_on(async {
            for block in 1..4 {
                write(&driver, block * MIB, &[2; 512], false).await.unwrap();
                driver.flush().await.unwrap();
            }
            assert_eq!(read(&driver, 0, MIB).await, vec![1; MIB as usize]);
        });
    }

    /// A place behind the end of a truncated file would become another block's when the file grows.
    #[test]
    fn a_truncated_file_with_a_large_bat_is_not_written_to() {
        let blocks = SPACE_SCAN / 8 + 1;
        let mut bytes = Fixture::new(blocks * MIB).bytes();
        let geometry = Geometry::of(blocks * MIB, MIB, 512, false);
        let set = |bytes: &mut [u8], block, entry: u64| {
            let at = (3 * MIB + geometry.payload_index(block) * 8) as usize;
            bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        };
        (0..blocks).for_each(|block| set(&mut bytes, block, payload::ZERO));
        let write_to = |bytes: &[u8]| {
            let file = SimFile::from_bytes("test.vhdx", bytes.to_vec());
            let image = open_image(&file, None, None).unwrap();
            block_on(write(&image, 0, &[1; 512], true))
        };
        write_to(&bytes).unwrap();
        let end = bytes.len() as u64;
        set(&mut bytes, blocks - 1, end | payload::FULLY_PRESENT);
        let err = write_to(&bytes).unwrap_err().to_string();
        assert!(err.contains(&format!("of block {}", blocks - 1)), "{err}");
        assert!(err.contains("truncated"), "{err}");
    }

    #[test]
    fn children_still_know_an_image_after_a_redo() {
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(4 * MIB).bytes());
        let driver = open_image(&file, None, None).unwrap();
        let guid = |driver: &Driven| driver.details()["data-write-guid"].clone();
        block_on(write(&driver, 0, &[1; 512], true)).unwrap();
        let known = guid(&driver);
        let again = open_image(&file.after_kill(), None, None).unwrap();
        let mut record = Vec::new();
        Edit::Entry { index: 1, value: payload::ZERO }.encode(&mut record);
        block_on(again.format().redo_all(&[record])).unwrap();
        assert_eq!(guid(&again), known);
        block_on(write(&again, 0, &[2; 512], false)).unwrap();
        assert_ne!(guid(&again), known);
        // Before an overlay is made, that is done already.
        let again = open_image(&file.after_kill(), None, None).unwrap();
        block_on(again.prepare_for_overlay()).unwrap();
        let known = guid(&again);
        block_on(write(&again, 0, &[2; 512], false)).unwrap();
        assert_eq!(guid(&again), known);
    }

    /// One after the first header, before anything else is changed; one after the other header and the
    /// pages; one after each of the headers that say that the log is empty.
    #[test]
    fn a_replay_flushes_four_times() {
        const PAGES: u64 = 600;
        // What one page of the BAT tells of, in blocks of 1 MiB.
        let per_page = 512 * MIB;
        let fixture = Fixture { log: 4 * MIB, ..Fixture::new(PAGES * per_page) };
        let file = SimFile::from_bytes("test.vhdx", fixture.bytes());
        let driver = open_image(&file, None, None).unwrap();
        for page in 0..PAGES {
            block_on(write(&driver, page * per_page, &[1; 512], false)).unwrap();
            if page % 100 == 99 {
                block_on(driver.flush()).unwrap();
            }
        }
        let file = file.after_kill();
        let raw: Arc<dyn File> = Arc::new(file.clone());
        let structure = block_on(Structure::read(&raw)).unwrap();
        assert_eq!(structure.replay.as_ref().unwrap().page_count() as u64, PAGES);
        let counts = || [SimOp::Flush, SimOp::Write].map(|op| file.count(op));
        let before = counts();
        block_on(Vhdx::open(structure, OpenOptions::default())).unwrap();
        let done = counts();
        // The writes are four headers, and the pages, which lie side by side, 1 MiB at once.
        assert_eq!([done[0] - before[0], done[1] - before[1]], [4, 4 + 3]);
        let driver = open_image(&file, None, None).unwrap();
        for page in 0..PAGES {
            assert_eq!(block_on(read(&driver, page * per_page, 512)), [1; 512]);
        }
    }
}
