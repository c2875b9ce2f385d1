//! What frames the writing: replay at open, headers before the first write, redo after a kill, an
//! empty log at the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::header::{Header, HeaderSlots};
use super::journal::{Conditions, Edit};
use super::layout::Guid;
use super::scan;
use super::space::Space;
use super::structure::Structure;
use super::{ALL, Vhdx};
use crate::error::{Error, Result, ResultExt};
use crate::units::ByteRange;

/// How much of the BAT is looked at to find free places inside the file, in bytes. More would hold
/// up the first write for too long; then the file only grows at its end.
const SPACE_SCAN: u64 = 16 << 20;

/// Replays the log of an image on disk, and declares it empty. Can be repeated after a crash.
pub(super) async fn replay(structure: &Structure, headers: &mut HeaderSlots) -> Result<()> {
    let Some(replay) = &structure.replay else { return Ok(()) };
    let file = &structure.raw_file;
    // Before the first byte is changed.
    let header = Header { file_write_guid: Guid::random(), ..headers.current };
    headers.update(file, header).await?;
    replay.apply(file).await?;
    file.flush().await?;
    let header = Header { log_guid: Guid::ZERO, ..headers.current };
    headers.update(file, header).await?;
    tracing::info!(
        "{}: {} log entries that were not in place yet were replayed",
        file.name(),
        replay.entries().len()
    );
    Ok(())
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
        let bat = self.structure.regions.bat;
        let used = scan::scan(&self.file, &self.checker, bat, SPACE_SCAN).await;
        let used = self.poisoning(used)?;
        let file_len = self.file_len.load(Ordering::Acquire);
        if used.is_none() {
            tracing::info!(
                "{}: its BAT is too large to look for free space inside of it",
                self.name()
            );
        }
        *self.space.lock().unwrap() = Some(Space::new(&self.checker, file_len, used.as_ref()));
        let updated = self
            .update_header(|header| {
                header.file_write_guid = Guid::random();
                header.data_write_guid = Guid::random();
            })
            .await;
        self.poisoning(updated)?;
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    /// Changes both headers; durable on return.
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _alone = self.header_turn.exclusive(ALL).await;
        let mut slots = *self.headers.lock().unwrap();
        let mut header = slots.current;
        change(&mut header);
        slots.update(&self.file, header).await?;
        *self.headers.lock().unwrap() = slots;
        Ok(())
    }

    /// Redoes what the guest of this session saw completed, or drops it for a new guest.
    pub(super) async fn resume_session(&self, nonce: Option<u128>) -> Result<()> {
        let Some(keep) = &self.keep else { return Ok(()) };
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
        self.start_session().await?;
        for (i, record) in records.iter().enumerate() {
            self.redo(record).await.context(|| {
                format!("{}: redoing record {i} of {}", self.name(), keep.path().display())
            })?;
        }
        self.commit().await?;
        tracing::info!("{}: {} kept changes were redone", self.name(), records.len());
        Ok(())
    }

    async fn redo(&self, record: &[u8]) -> Result<()> {
        let edits = Edit::decode(record)?;
        let mut frees = None;
        for edit in &edits {
            match *edit {
                Edit::Entry { index, value } => {
                    if index >= self.geometry.bat_entries() {
                        return Err(Error::corrupt(format!("there is no BAT entry {index}")));
                    }
                    let file_len = self.file_len.load(Ordering::Acquire);
                    self.checker.explain(index, value, file_len)?;
                    let (old, new) = (
                        self.place_of_entry(index, self.entry_at(index).await?),
                        self.place_of_entry(index, value),
                    );
                    if let (Some(new), Some(space)) = (new, self.space.lock().unwrap().as_mut()) {
                        space.claim(new);
                    }
                    frees = frees.or(old.filter(|old| Some(*old) != new));
                }
                Edit::Bits { bitmap, first, count, .. } => self.check_bits(bitmap, first, count)?,
            }
        }
        let conditions = Conditions { expect: &[], data_first: true, frees };
        self.publish(&edits, conditions).await.map(drop)
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
                && !self.checker.reserved.iter().any(|range| range.overlaps(&place))
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
        if self.read_only {
            return Ok(());
        }
        if self.is_dirty() {
            return Err(Error::invalid(format!(
                "{}: a session must start with nothing left to flush",
                self.name()
            )));
        }
        // Without a keep, writes that allocate wait for the disk from now on.
        if let Some(keep) = &self.keep {
            keep.begin(nonce)?;
        }
        self.session.store(true, Ordering::Release);
        Ok(())
    }

    /// Leaves everything in its place and the log empty.
    pub(super) async fn finish_session(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.checkpoint().await?;
        self.reclaim().await;
        if self.uses_log() {
            let _turn = self.turn.exclusive(ALL).await;
            let updated = self.update_header(|header| header.log_guid = Guid::ZERO).await;
            self.poisoning(updated)?;
            self.forget_log();
        }
        match &self.keep {
            Some(keep) => keep.discard(),
            None => Ok(()),
        }
    }

    /// The structure with the headers as they are now.
    pub(super) fn current_structure(&self) -> Structure {
        let headers = *self.headers.lock().unwrap();
        Structure { headers, raw_file: Arc::clone(&self.file), ..self.structure.clone() }
    }
}
