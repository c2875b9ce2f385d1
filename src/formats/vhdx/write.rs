//! Writes, zeroes and discards.
//!
//! ```text
//! block …               write                                     zeroes, discard (whole block)
//! present               in place, planned                         → ZERO, its place is freed
//! partially present     in place; then its bits are set           → ZERO, its place is freed
//! absent, no parent     a zeroed place is mapped first (present)  nothing to do
//! absent, parent below  a place is mapped (partially present,     → ZERO
//!                       no bits), then as above
//! zero, unmapped, …     a zeroed place is mapped first (present)  nothing to do
//! ```
//!
//! A new place reads as what the block read before: zeros, or (no bit set) the parent. So it is
//! mapped *before* the data is written, and then all writers of the block need no lock at all. Only
//! bits are set after the data.
//!
//! Where nothing has to be read, zeroed, committed or made longer first, mapping a block is a matter
//! of memory ([`Vhdx::map_block_now`]): so a write to an absent block is planned, too. To have it so
//! most of the time, the file grows by more than a block; closing the image cuts the rest off.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::bat::{self, CHECKED, PARTIAL, PLAN_BITS, PRESENT, UNSETTLED};
use super::journal::{Conditions, Edit, Outcome};
use super::layout::{BITMAP_PRESENT, payload};
use super::pins::Token;
use super::space::{Place, Space};
use super::{ALL, Vhdx};
use crate::block::{Plan, PlanExtent, Planned, Prepared, WriteCommit, driver::Pin};
use crate::error::{Error, Result, ResultExt};
use crate::io::{Fut, carrying};
use crate::units::{ByteRange, MIB};

impl Vhdx {
    /// Resolves a write that needs no metadata but what is in memory, mapping blocks where that is
    /// enough.
    pub(super) fn plan_write<'a>(
        &'a self,
        range: ByteRange,
        fua: bool,
        plan: &mut Plan<'a>,
    ) -> Planned {
        let Some(host) = self.file.as_host() else { return Planned::NotNow };
        let ready = self.started.load(Ordering::Acquire) && !self.poisoned.load(Ordering::Relaxed);
        if !ready || (fua && self.is_dirty()) {
            return Planned::NotNow;
        }
        #[cfg(test)]
        super::testing::reached(super::testing::Moment::Planning);
        let pin = self.pins.pin();
        let mut at = range;
        while !at.is_empty() {
            let part = self.in_first_block(at);
            let block = self.geometry().block_of(at.offset);
            let Some(mut entry) = self.entry_now(block) else { return Planned::NotNow };
            if !fua && is_absent(entry) && self.map_block_now(block, entry) {
                let Some(mapped) = self.entry_now(block) else { return Planned::NotNow };
                entry = mapped;
            }
            match entry & PLAN_BITS {
                PRESENT => {}
                PARTIAL => {
                    let bits = self.bitmap_now(block).and_then(|b| self.bits_now(b, block, part));
                    if bits != Some((true, part.len)) || self.has_unsettled_bits() {
                        return Planned::NotNow;
                    }
                }
                _ => return Planned::NotNow,
            }
            let offset = bat::offset(entry) + self.geometry().within_block(at.offset);
            plan.push(PlanExtent::File { file: host, offset, len: part.len });
            at = ByteRange::between(part.end(), at.end());
        }
        // What was read of the mapping may have come to be meanwhile.
        if fua && self.is_dirty() {
            return Planned::NotNow;
        }
        plan.pin = Some(Pin(pin as Arc<_>));
        Planned::Ready
    }

    /// Finds or makes a place for the start of a range.
    pub(super) async fn place(&self, range: ByteRange) -> Result<Prepared<'_>> {
        self.start_session().await?;
        let range = self.in_first_block(range);
        let block = self.geometry().block_of(range.offset);
        let index = self.geometry().payload_index(block);
        loop {
            let pin = self.pins.pin();
            let entry = self.entry_at(index).await?;
            let partial = match bat::state(entry) {
                payload::FULLY_PRESENT => false,
                payload::PARTIALLY_PRESENT => true,
                _ => {
                    drop(pin);
                    self.map_block(block).await?;
                    continue;
                }
            };
            let bitmap = match partial {
                true => Some(self.bitmap_of(block).await?),
                false => None,
            };
            return Ok(Prepared {
                range,
                file: Arc::clone(&self.file),
                offset: bat::offset(entry) + self.geometry().within_block(range.offset),
                commit: Some(Box::new(Written {
                    image: self,
                    range,
                    block,
                    entry,
                    bitmap,
                    _pin: Arc::clone(&pin),
                })),
                pin: Some(Pin(pin as Arc<_>)),
            });
        }
    }

    /// Gives a block that is absent, and behind which no parent shows, a place if one is ready. False
    /// if that takes more than memory, or the entry changed: then nothing was done.
    fn map_block_now(&self, block: u64, entry: u64) -> bool {
        if (self.geometry().has_parent && bat::state(entry) == payload::NOT_PRESENT)
            // What is about to become free is used before the file grows.
            || self.has_reclaimable()
            // A commit would have to come before the write completes.
            || (self.keep.is_none() && self.session.load(Ordering::Acquire))
        {
            return false;
        }
        let with_space = |f: &dyn Fn(&mut Space) -> Option<Place>| {
            self.space.lock().unwrap().as_mut().and_then(f)
        };
        let file_len = self.file_len.load(Ordering::Acquire);
        let Some(place) = with_space(&|space| space.take_ready_block(file_len)) else {
            return false;
        };
        let index = self.geometry().payload_index(block);
        let edit = Edit::Entry { index, value: place.offset | payload::FULLY_PRESENT };
        let expect = [(index, entry)];
        let conditions = Conditions { expect: &expect, data_first: !place.is_fresh, frees: None };
        match self.publish_now(&[edit], conditions) {
            // To be committed first: the entry says so, and whoever writes by it will see to that.
            Some(Outcome::Kept | Outcome::CommitFirst) => true,
            Some(Outcome::Stale) | None => {
                with_space(&|space| {
                    space.untake_block(place);
                    None
                });
                false
            }
        }
    }

    /// Gives a block a place, if it has none; perhaps only after another try.
    async fn map_block(&self, block: u64) -> Result<()> {
        let _alone = self.blocks.exclusive(ByteRange { offset: block, len: 1 }).await;
        let index = self.geometry().payload_index(block);
        let entry = self.entry_at(index).await?;
        if matches!(bat::state(entry), payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT)
            || self.map_block_now(block, entry)
        {
            return Ok(());
        }
        let partial = self.geometry().has_parent && bat::state(entry) == payload::NOT_PRESENT;
        let state = if partial { payload::PARTIALLY_PRESENT } else { payload::FULLY_PRESENT };
        let mut edits = Vec::new();
        if partial {
            let bitmap = self.make_bitmap(self.geometry().chunk_of(block)).await?;
            edits.extend(self.stale_bits(bitmap, block).await?);
        }
        let place = self.allocate(self.geometry().block_size()).await?;
        edits.push(Edit::Entry { index, value: place.offset | state });
        if !self.publish_place(place, index, entry, &edits).await? {
            // Planned writes map blocks without the lock.
            self.unallocate(place, self.geometry().block_size());
        }
        Ok(())
    }

    /// The sector bitmap block of a chunk, which is made if need be, without a bit set.
    async fn make_bitmap(&self, chunk: u64) -> Result<u64> {
        let index = self.geometry().bitmap_index(chunk);
        let entry = self.entry_at(index).await?;
        if bat::state(entry) == BITMAP_PRESENT {
            return Ok(bat::offset(entry));
        }
        let _alone = self.chunks.exclusive(ByteRange { offset: chunk, len: 1 }).await;
        let entry = self.entry_at(index).await?;
        if bat::state(entry) == BITMAP_PRESENT {
            return Ok(bat::offset(entry));
        }
        let place = self.allocate(MIB).await?;
        // As for other metadata.
        let reserved = self.file.reserve(ByteRange { offset: place.offset, len: MIB }).await;
        if reserved.is_err() {
            self.unallocate(Place { is_zeroed: false, ..place }, MIB);
        }
        reserved.context(|| {
            format!("{}: making room for a sector bitmap at {}", self.name(), place.offset)
        })?;
        let edit = Edit::Entry { index, value: place.offset | BITMAP_PRESENT };
        match self.publish_place(place, index, entry, &[edit]).await? {
            true => Ok(place.offset),
            false => Err(Error::invalid(format!(
                "{}: BAT entry {index} changed while it was locked",
                self.name()
            ))),
        }
    }

    /// Publishes an entry for a place that nobody else refers to. False if the entry changed.
    async fn publish_place(
        &self,
        place: Place,
        index: u64,
        entry: u64,
        edits: &[Edit],
    ) -> Result<bool> {
        let expect = [(index, entry)];
        // What is reused must be zeros on disk before the mapping is.
        let conditions = Conditions { expect: &expect, data_first: !place.is_fresh, frees: None };
        match self.publish(edits, conditions).await? {
            Outcome::Kept => Ok(true),
            Outcome::CommitFirst => self.commit().await.map(|()| true),
            Outcome::Stale => Ok(false),
        }
    }

    /// Clears the bits of a block that becomes partially present, if any are set: those of a block
    /// in another state mean nothing.
    async fn stale_bits(&self, bitmap: u64, block: u64) -> Result<Option<Edit>> {
        let first = self.geometry().first_bit(block);
        let count = self.geometry().sectors_per_block();
        let start = block << self.geometry().block_shift;
        let mut at = ByteRange { offset: start, len: self.geometry().block_size() };
        while !at.is_empty() {
            match self.bits(bitmap, block, at).await? {
                (true, _) => return Ok(Some(Edit::Bits { bitmap, first, count, set: false })),
                (false, len) => at = ByteRange::between(at.offset + len, at.end()),
            }
        }
        Ok(None)
    }

    /// Takes a place that reads as zeros and lies in the file.
    async fn allocate(&self, len: u64) -> Result<Place> {
        self.reclaim().await;
        let place = {
            let mut space = self.space.lock().unwrap();
            let space = space.as_mut().ok_or_else(|| Error::invalid("no session was started"))?;
            if len == self.geometry().block_size() {
                space.take_block()
            } else {
                space.take_bitmap()
            }
        };
        let ready = self.prepare_place(place, len).await;
        if ready.is_err() {
            self.unallocate(Place { is_zeroed: false, ..place }, len);
        }
        ready.map(|()| place)
    }

    async fn prepare_place(&self, place: Place, len: u64) -> Result<()> {
        let end = place.offset + len;
        let context = || format!("{}: making room for a block at {}", self.name(), place.offset);
        if self.file_len.load(Ordering::Acquire) < end {
            // One after the other, or a later and shorter length could win.
            let grown = self.growing.alone_while(ALL, self.grow(end)).await;
            grown.context(context)?;
        }
        if !place.is_zeroed {
            let range = ByteRange { offset: place.offset, len };
            self.file.write_zeroes(range, true).await.context(context)?;
        }
        Ok(())
    }

    /// Makes the file reach to `end` at least. The caller holds `growing`.
    async fn grow(&self, end: u64) -> Result<()> {
        if self.file_len.load(Ordering::Acquire) >= end {
            return Ok(());
        }
        let ahead = end + self.growth(end);
        let len = match self.file.set_len(ahead).await {
            Err(_) if ahead > end => {
                self.file.set_len(end).await?;
                end
            }
            result => result.map(|()| ahead)?,
        };
        self.file_len.store(len, Ordering::Release);
        Ok(())
    }

    /// By how much a file of `len` bytes grows beyond what is needed: an eighth, in whole blocks. Holes
    /// cost nothing, but what they make of the file's length should not surprise anybody.
    fn growth(&self, len: u64) -> u64 {
        const MOST: u64 = 4 << 30;
        let block = self.geometry().block_size();
        (len.min(self.geometry().disk_size) / 8).min(MOST) / block * block
    }

    /// Gives back a place that was never mapped: on a full host a guest may try again for ever.
    fn unallocate(&self, place: Place, len: u64) {
        if let Some(space) = self.space.lock().unwrap().as_mut() {
            match len == self.geometry().block_size() {
                true => space.give_back(place.offset, place.is_zeroed),
                false => space.give_back_bitmap(place.offset),
            }
        }
    }

    /// The data of `range` has been written to the place of a partially present block.
    async fn set_bits(
        &self,
        block: u64,
        entry: u64,
        bitmap: u64,
        range: ByteRange,
    ) -> Result<Outcome> {
        if self.bits(bitmap, block, range).await? == (true, range.len) {
            return Ok(match self.has_unsettled_bits() {
                true => Outcome::CommitFirst,
                false => Outcome::Kept,
            });
        }
        let shift = self.geometry().sector_shift;
        let first = self.geometry().first_bit(block)
            + (self.geometry().within_block(range.offset) >> shift);
        let count = range.len >> shift;
        let bits = Edit::Bits { bitmap, first, count, set: true };
        let index = self.geometry().payload_index(block);
        let expect = [(index, entry)];
        let conditions = Conditions { expect: &expect, data_first: true, frees: None };
        // With its last sector written, a block may be complete: then nobody need look at bits.
        let block_range = self.geometry().block_range(block);
        let mut edits = vec![bits];
        if range.end() == block_range.end()
            && self
                .has_all_bits(bitmap, ByteRange::between(block_range.offset, range.offset))
                .await?
        {
            let value = bat::offset(entry) | payload::FULLY_PRESENT;
            edits.push(Edit::Entry { index, value });
        }
        self.publish(&edits, conditions).await
    }

    /// Whether all sectors of a range within one block are in the file.
    async fn has_all_bits(&self, bitmap: u64, range: ByteRange) -> Result<bool> {
        let block = self.geometry().block_of(range.offset);
        let mut at = range;
        while !at.is_empty() {
            match self.bits(bitmap, block, at).await? {
                (true, len) => at = ByteRange::between(at.offset + len, at.end()),
                (false, _) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Makes a range read as zeros, or (`discard`) gives up what it holds.
    pub(super) async fn clear(
        &self,
        range: ByteRange,
        discard: bool,
        may_unmap: bool,
    ) -> Result<()> {
        if discard && self.is_fixed {
            return Ok(());
        }
        self.start_session().await?;
        let may_unmap = may_unmap && !self.is_fixed;
        let mut at = range;
        let mut commit_first = false;
        while !at.is_empty() {
            let part = self.in_first_block(at);
            let block = self.geometry().block_of(part.offset);
            let whole = part == self.geometry().block_range(block);
            commit_first |= match (whole, discard) {
                (true, _) if may_unmap => self.clear_block(block, discard).await?,
                (_, false) => self.clear_part(block, part, may_unmap).await?,
                (_, true) => self.discard_part(block, part).await?,
            };
            at = ByteRange::between(part.end(), at.end());
        }
        if commit_first {
            self.commit().await?;
        }
        Ok(())
    }

    /// Frees a whole block; true if a commit must follow.
    async fn clear_block(&self, block: u64, discard: bool) -> Result<bool> {
        let index = self.geometry().payload_index(block);
        // Most of an empty disk is cleared without taking a lock.
        let entry = self.entry_at(index).await?;
        if !self.needs_clearing(entry, discard) {
            // Somebody may have cleared it who still has to commit that.
            return Ok(entry & UNSETTLED != 0);
        }
        let _alone = self.blocks.exclusive(ByteRange { offset: block, len: 1 }).await;
        loop {
            let entry = self.entry_at(index).await?;
            if !self.needs_clearing(entry, discard) {
                return Ok(entry & UNSETTLED != 0);
            }
            let edit = Edit::Entry { index, value: payload::ZERO };
            let expect = [(index, entry)];
            let frees = self.place_of_entry(index, entry);
            let conditions = Conditions { expect: &expect, data_first: false, frees };
            match self.publish(&[edit], conditions).await? {
                Outcome::Kept => return Ok(false),
                Outcome::CommitFirst => return Ok(true),
                // It became complete, say.
                Outcome::Stale => {}
            }
        }
    }

    /// Whether a block of this entry must become a zero block to be cleared.
    fn needs_clearing(&self, entry: u64, discard: bool) -> bool {
        match bat::state(entry) {
            payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT => true,
            // What the parent shows is old data, which a discard may leave.
            payload::NOT_PRESENT => self.geometry().has_parent && !discard,
            _ => false,
        }
    }

    /// Zeroes a part of a block in its place; true if a commit must follow.
    async fn clear_part(&self, block: u64, part: ByteRange, may_unmap: bool) -> Result<bool> {
        let index = self.geometry().payload_index(block);
        let whole = part == self.geometry().block_range(block);
        let entry = self.entry_at(index).await?;
        match bat::state(entry) {
            payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT => {}
            // A whole block needs no place to be zeros.
            payload::NOT_PRESENT if whole => return self.clear_block(block, false).await,
            payload::NOT_PRESENT if self.geometry().has_parent => {}
            _ => return Ok(entry & UNSETTLED != 0),
        }
        let mut at = part;
        while !at.is_empty() {
            let place = self.place(at).await?;
            let target = ByteRange { offset: place.offset, len: place.range.len };
            place.perform(self.file.write_zeroes(target, may_unmap)).await?;
            if let Some(commit) = place.commit {
                commit.commit().await?;
            }
            at = ByteRange::between(place.range.end(), at.end());
        }
        Ok(false)
    }

    /// Gives the host's space of a part of a block back.
    async fn discard_part(&self, block: u64, part: ByteRange) -> Result<bool> {
        let pin = self.pins.pin();
        let entry = self.entry_at(self.geometry().payload_index(block)).await?;
        if let payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT = bat::state(entry) {
            let offset = bat::offset(entry) + self.geometry().within_block(part.offset);
            let place = ByteRange { offset, len: part.len };
            carrying(pin as Arc<_>, self.file.discard(place)).await?;
        }
        Ok(false)
    }

    /// Whether an entry of the BAT waits for a commit.
    fn is_unsettled(&self, index: u64) -> bool {
        let (page, word) = self.bat_word(index);
        // A page that is not in memory has nothing that waits.
        self.cache.word(page, word).is_some_and(|entry| entry & UNSETTLED != 0)
    }
}

/// Whether an entry is good, and its block has no place.
fn is_absent(entry: u64) -> bool {
    entry & CHECKED != 0
        && !matches!(bat::state(entry), payload::FULLY_PRESENT | payload::PARTIALLY_PRESENT)
}

/// A write on its way to its place.
struct Written<'a> {
    image: &'a Vhdx,
    range: ByteRange,
    block: u64,
    /// The block's entry when the place was found.
    entry: u64,
    /// The sector bitmap, if the block is partially present.
    bitmap: Option<u64>,
    /// Keeps the place.
    _pin: Arc<Token>,
}

impl WriteCommit for Written<'_> {
    fn commit<'b>(self: Box<Self>) -> Fut<'b, ()>
    where
        Self: 'b,
    {
        Box::pin(async move {
            let Written { image, range, block, entry, bitmap, _pin } = *self;
            let outcome = match bitmap {
                // Stale: the block was cleared or completed meanwhile, as if after this write.
                Some(bitmap) => image.set_bits(block, entry & !CHECKED, bitmap, range).await?,
                None => Outcome::Kept,
            };
            let index = image.geometry().payload_index(block);
            if outcome == Outcome::CommitFirst || image.is_unsettled(index) {
                image.commit().await?;
            }
            Ok(())
        })
    }
}
