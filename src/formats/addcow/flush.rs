//! What of an add-cow image is durable when, and what survives a kill.
//!
//! ```text
//! write completes:  data written ─► record in the keep, bit in memory (one step) ─► answer
//! flush:            rotate the keep
//!                   copy the changed pages               bits of data written until now
//!                   sync the image file                  … that data is durable
//!                   write the copies, sync the add-cow   … so its bits may be
//!                   release the keep
//! ```
//!
//! **Power cuts.** The copy is taken before the image file is synced, and the copy is what is
//! written: bits that are set meanwhile belong to data that the sync may have missed. Where much
//! has changed this is repeated, so that the copies stay small.
//!
//! **Kills.** Bits in memory die with the process, and they may not be put into the page cache
//! early: the host could write them out before the data. So each allocating write is recorded in
//! the [`Keep`] under the keep's lock together with the change of the bits, and the keep is rotated
//! before pages are copied: a record that a flush drops has its bits in the copies.
//!
//! Where nothing can be kept (no keep, or no room in it), bits must be on disk before a request
//! completes that relies on them, and that includes writes to sectors whose bit somebody else has
//! just set: [`Durability::must_wait_for_bits`].
//!
//! A flush that fails refuses writes from then on. But the bitmap is sparse, and if the host only had
//! no room for a part of it, nothing is lost: what was not written counts as changed again, and the
//! next flush makes up for this one.
//!
//! A bit shows before the one who sets it has said that, so a flush begins by waiting for those who are
//! about to: others may have completed by what they saw.
//!
//! Flushes run one at a time; whoever waited while one began and ended is served by it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::layout::{HEADER_LEN, bitmap_len};
use super::pages::{BLOCK_LEN, DirtyPage, PAGE_LEN};
use super::{ALL, PAGE_SECTORS, Shared};
use crate::block::keep::{Keeper, begin_session};
use crate::block::{Committed, Keep, RangeLock};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{AlignedBuf, yield_now};
use crate::units::{ByteRange, SECTOR_SIZE};

/// How many pages are copied for one sync of the image file: 1 MiB.
const BATCH: usize = 256;

/// See the [module](self).
pub(super) struct Durability {
    keep: Option<Keep>,
    /// Whether a guest's session runs: completed writes must survive this process.
    session: AtomicBool,
    /// How many records could not be kept, of how many of them the bits are set, and for how many a
    /// flush has made that good.
    unkept: AtomicU64,
    unkept_set: AtomicU64,
    unkept_settled: AtomicU64,
    /// How many are setting bits right now.
    setting: AtomicU64,
    /// Whether bits were set since the last flush began.
    changed: AtomicBool,
    /// Whether a flush is under way.
    flushing: AtomicBool,
    /// Whether bits beyond the size on disk are set: these must not be kept, as a process that comes
    /// after a kill finds no such sectors. Growing ends with a flush.
    pub is_growing: AtomicBool,
    /// Whether the keep was rotated for a flush that has not completed.
    rotated: AtomicBool,
    /// Held by the flush that runs.
    turn: Arc<RangeLock>,
    /// Flushes begun, and the number of the last that has completed.
    begun: AtomicU64,
    completed: AtomicU64,
    /// Length of the add-cow file in bytes.
    file_len: AtomicU64,
    poisoned: AtomicBool,
    /// Why writes are refused, if they are.
    poison: Mutex<Option<String>>,
}

impl Durability {
    pub fn new(keep: Option<Keep>, file_len: u64) -> Durability {
        Durability {
            keep,
            is_growing: AtomicBool::new(false),
            session: AtomicBool::new(false),
            unkept: AtomicU64::new(0),
            unkept_set: AtomicU64::new(0),
            unkept_settled: AtomicU64::new(0),
            setting: AtomicU64::new(0),
            changed: AtomicBool::new(false),
            flushing: AtomicBool::new(false),
            rotated: AtomicBool::new(false),
            turn: Arc::default(),
            begun: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            file_len: AtomicU64::new(file_len),
            poisoned: AtomicBool::new(false),
            poison: Mutex::default(),
        }
    }

    /// Whether every bit that is set is on disk, and nothing keeps a flush from being a sync of
    /// the image file alone.
    #[inline]
    pub fn is_settled(&self) -> bool {
        // In this order: who sets bits says that they changed before he is done, and a flush that
        // begins says so before it takes that back.
        self.setting.load(Ordering::SeqCst) == 0
            && !self.changed.load(Ordering::SeqCst)
            && !self.flushing.load(Ordering::SeqCst)
            && !self.is_poisoned()
    }

    /// Whether a write to sectors whose bits are set may complete only after a flush: it is to be
    /// durable itself, or a kill would lose a bit that nobody could keep.
    #[inline]
    pub fn must_wait_for_bits(&self, fua: bool) -> bool {
        let session = self.session.load(Ordering::SeqCst);
        let lossy = session && !self.keeps_all();
        (fua || lossy) && !self.is_settled()
    }

    /// Whether an allocating write needs nothing but a record and its bits.
    #[inline]
    pub fn may_commit_in_memory(&self) -> bool {
        !self.session.load(Ordering::SeqCst) || self.keeps_all()
    }

    /// Whether a record is kept of every bit that is set but not on disk.
    fn keeps_all(&self) -> bool {
        let unkept = self.unkept.load(Ordering::SeqCst);
        self.keep.is_some() && unkept == self.unkept_settled.load(Ordering::SeqCst)
    }

    /// Lets `set` set the bits of a range and makes that survive a kill, or says what else must
    /// happen first.
    pub fn commit(&self, range: ByteRange, set: impl FnOnce()) -> Committed {
        let mut committed = Committed::Done;
        self.setting.fetch_add(1, Ordering::SeqCst);
        let mut set = Some(set);
        let mut set_now = || {
            if let Some(set) = set.take() {
                set();
            }
            if !self.changed.load(Ordering::SeqCst) {
                self.changed.store(true, Ordering::SeqCst);
            }
        };
        if self.session.load(Ordering::SeqCst) && !self.is_growing.load(Ordering::SeqCst) {
            let record = [range.offset.to_le_bytes(), range.len.to_le_bytes()];
            let pieces = [&record[0][..], &record[1][..]];
            let kept = match &self.keep {
                Some(keep) => keep.append_and(&pieces, &mut set_now),
                None => Err(Error::unsupported("nothing is kept")),
            };
            if kept.is_err() {
                // Before the bits: who sees them must see this.
                self.unkept.fetch_add(1, Ordering::SeqCst);
                committed = Committed::FlushFirst;
            }
        }
        set_now();
        if committed == Committed::FlushFirst {
            // Not before: a flush that had counted it would have copied its page without them.
            self.unkept_set.fetch_add(1, Ordering::SeqCst);
        }
        self.setting.fetch_sub(1, Ordering::SeqCst);
        committed
    }

    pub fn keep(&self) -> Option<&Keep> {
        self.keep.as_ref()
    }

    /// The image was closed in order.
    pub fn discard_keep(&self) -> Result<()> {
        self.keep.as_ref().map_or(Ok(()), Keep::discard)
    }

    /// What is kept counts for nothing any more.
    pub fn forget_kept(&self) -> Result<()> {
        match &self.keep {
            Some(keep) if keep.is_recording() => keep.reset(),
            _ => Ok(()),
        }
    }

    /// How much of the bitmap the file has, in bytes.
    pub fn bitmap_bytes_in_file(&self) -> u64 {
        self.file_len.load(Ordering::SeqCst).saturating_sub(HEADER_LEN)
    }

    /// The file has been made this long.
    pub fn set_file_len(&self, len: u64) {
        self.file_len.store(len, Ordering::SeqCst);
    }

    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    pub fn check_poison(&self, name: &str) -> Result<()> {
        if !self.is_poisoned() {
            return Ok(());
        }
        let why = self.poison.lock().unwrap().clone().unwrap_or_default();
        Err(Error::new(
            ErrorKind::Poisoned,
            format!("{name} is not written to any more, because its bitmap could not be: {why}"),
        ))
    }

    pub fn set_poison(&self, name: &str, cause: &Error) {
        let mut poison = self.poison.lock().unwrap();
        if poison.is_none() {
            tracing::error!(
                image = name,
                "its bitmap could not be written, writes are refused from now on: {cause}"
            );
            *poison = Some(cause.to_string());
            self.poisoned.store(true, Ordering::SeqCst);
        }
    }
}

impl Keeper for Shared {
    fn records(&self) -> Option<&Keep> {
        self.durability.keep()
    }

    fn session(&self) -> &AtomicBool {
        &self.durability.session
    }

    async fn settle(&self) {
        // Setting bits is short.
        while self.durability.setting.load(Ordering::SeqCst) > 0 {
            yield_now().await;
        }
    }

    async fn save(&self) -> Result<()> {
        let durability = &self.durability;
        let changed = durability.changed.load(Ordering::SeqCst);
        match changed || durability.flushing.load(Ordering::SeqCst) {
            true => self.flush_all().await,
            false => Ok(()),
        }
    }

    fn has_begun(&self) {
        self.durability.rotated.store(false, Ordering::SeqCst);
    }
}

impl Shared {
    /// Makes everything that completed before this call durable, bits included.
    pub(super) async fn flush_all(&self) -> Result<()> {
        self.check_writable()?;
        let durability = &self.durability;
        let before = durability.begun.load(Ordering::SeqCst);
        let in_turn = async {
            self.check_writable()?;
            if durability.completed.load(Ordering::SeqCst) > before {
                // Somebody else's began after we were called.
                return Ok(());
            }
            let number = durability.begun.fetch_add(1, Ordering::SeqCst) + 1;
            match self.flush_now().await {
                Ok(()) => {
                    durability.completed.store(number, Ordering::SeqCst);
                    Ok(())
                }
                Err(err) => {
                    let err = err.context(format!("{}: flush", self.name()));
                    // Without room for them, bits are as changed as before.
                    if !err.has_lost_nothing() {
                        durability.set_poison(self.name(), &err);
                    }
                    Err(err)
                }
            }
        };
        // A copy that lands after its future was dropped must not undo a later one.
        durability.turn.alone_while(ALL, in_turn).await
    }

    async fn flush_now(&self) -> Result<()> {
        let durability = &self.durability;
        let round = Round::begin(durability);
        // A write to a sector whose bit another one is just setting may have completed by it, before
        // that one says that something has changed, and where.
        Keeper::settle(self).await;
        if !durability.changed.swap(false, Ordering::SeqCst) {
            self.data.flush().await?;
            round.end();
            return Ok(());
        }
        let unkept = durability.unkept_set.load(Ordering::SeqCst);
        let keep = durability.keep.as_ref().filter(|keep| keep.is_recording());
        if let Some(keep) = keep
            && !durability.rotated.load(Ordering::SeqCst)
        {
            keep.rotate()?;
            durability.rotated.store(true, Ordering::SeqCst);
        }
        let mut from = 0;
        loop {
            let batch = Batch::take(self, &mut from);
            self.data.flush().await?;
            let full = batch.pages.len() == BATCH;
            batch.write_out().await?;
            if !full {
                break;
            }
        }
        self.file.flush().await?;
        if let Some(keep) = keep {
            keep.release()?;
        }
        durability.rotated.store(false, Ordering::SeqCst);
        durability.unkept_settled.store(unkept, Ordering::SeqCst);
        round.end();
        Ok(())
    }

    /// Makes the file long enough for all of the bitmap.
    async fn extend(&self) -> Result<()> {
        let needed = HEADER_LEN + bitmap_len(self.sectors());
        if self.durability.file_len.load(Ordering::SeqCst) < needed {
            self.file.set_len(needed).await.map_err(Error::lost_nothing_if_full)?;
            self.durability.set_file_len(needed);
        }
        Ok(())
    }

    /// See [`Driver::begin_session`](crate::block::Driver::begin_session).
    pub(super) fn begin_session(&self, nonce: u128) -> Result<()> {
        if self.read_only { Ok(()) } else { begin_session(self, nonce) }
    }

    /// See [`Driver::resume`](crate::block::Driver::resume).
    pub(super) async fn resume_session(&self, nonce: Option<u128>) -> Result<()> {
        if nonce.is_none() {
            // Before the keep forgets: from now on nothing is recorded.
            self.durability.session.store(false, Ordering::SeqCst);
        }
        let Some(keep) = &self.durability.keep else { return Ok(()) };
        let Some(nonce) = nonce else { return keep.forget() };
        let mut ranges: Vec<ByteRange> = Vec::new();
        let mut bad = None;
        let found =
            keep.take_over_each(nonce, |record| match parse_record(record, self.size()) {
                None => bad = Some(record.len()),
                Some(range) => match ranges.last_mut() {
                    Some(last) if last.end() == range.offset => last.len += range.len,
                    _ => ranges.push(range),
                },
            })?;
        if let Some(len) = bad {
            return Err(Error::corrupt(format!(
                "{}: a kept record of {len} bytes in {} names no sectors of this disk",
                self.name(),
                keep.path().display()
            )));
        }
        if !found {
            return match keep.found() {
                Some(_) => Err(Error::invalid(format!(
                    "{}: what is kept in {} is of another guest's session, so the guest that \
                     reconnects may have lost writes; stop it, then remove that file",
                    self.name(),
                    keep.path().display()
                ))),
                None => Ok(()),
            };
        }
        for range in &ranges {
            self.mark_all(*range).await.context(|| format!("{}: taking over", self.name()))?;
        }
        tracing::info!(
            image = self.name(),
            runs = ranges.len(),
            "took over what the guest wrote and did not flush"
        );
        self.flush_all().await?;
        keep.reset()
    }

    /// Sets the bits of a range of any length.
    pub(super) async fn mark_all(&self, range: ByteRange) -> Result<()> {
        let mut at = range;
        while !at.is_empty() {
            let first = at.offset / SECTOR_SIZE;
            let page_end = (first / PAGE_SECTORS + 1) * PAGE_SECTORS * SECTOR_SIZE;
            let part = ByteRange::between(at.offset, at.end().min(page_end));
            self.pin(first).await?;
            let committed = self.mark(part);
            self.pages.unpin(first);
            if committed == Committed::FlushFirst {
                self.flush_all().await?;
            }
            at = ByteRange::between(part.end(), range.end());
        }
        Ok(())
    }
}

/// The range that a record names.
fn parse_record(record: &[u8], size: u64) -> Option<ByteRange> {
    let (words, []) = record.as_chunks::<8>() else { return None };
    let [offset, len] = words else { return None };
    let range = ByteRange::new(u64::from_le_bytes(*offset), u64::from_le_bytes(*len))?;
    (range.end() <= size && range.is_aligned(SECTOR_SIZE)).then_some(range)
}

/// A flush under way. One that fails or is dropped leaves everything to be flushed again.
struct Round<'a>(&'a Durability);

impl Round<'_> {
    fn begin(durability: &Durability) -> Round<'_> {
        durability.flushing.store(true, Ordering::SeqCst);
        Round(durability)
    }

    fn end(self) {
        self.0.flushing.store(false, Ordering::SeqCst);
        std::mem::forget(self);
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        self.0.changed.store(true, Ordering::SeqCst);
        self.0.flushing.store(false, Ordering::SeqCst);
    }
}

/// Copies of changed pages. Those that are not written count as changed again.
struct Batch<'a> {
    shared: &'a Shared,
    pages: Vec<DirtyPage>,
}

impl<'a> Batch<'a> {
    /// Copies the next changed pages, from frame `from` on.
    fn take(shared: &'a Shared, from: &mut usize) -> Batch<'a> {
        let mut pages = Vec::new();
        while pages.len() < BATCH
            && let Some(page) = shared.pages.take_dirty(*from)
        {
            *from = page.frame + 1;
            pages.push(page);
        }
        Batch { shared, pages }
    }

    /// Writes the copies. The data they tell of must be durable.
    async fn write_out(mut self) -> Result<()> {
        let shared = self.shared;
        if !self.pages.is_empty() {
            shared.extend().await?;
        }
        while let Some(page) = self.pages.last_mut() {
            let first = page.blocks.trailing_zeros() as usize * BLOCK_LEN;
            let last = (u32::BITS - page.blocks.leading_zeros()) as usize * BLOCK_LEN;
            let start = page.page * PAGE_LEN as u64;
            shared.mask_tail(page.page, &mut page.bytes);
            let end = bitmap_len(shared.sectors()).saturating_sub(start).min(last as u64) as usize;
            if first < end {
                let buf = AlignedBuf::from_slice(&page.bytes[first..end], 512);
                let at = HEADER_LEN + start + first as u64;
                let written = shared.file.write(at, buf.buffers(), false).await;
                let written = written.map_err(Error::lost_nothing_if_full);
                written.context(|| format!("bitmap at byte {}", start + first as u64))?;
            }
            if let Some(page) = self.pages.pop() {
                shared.pages.written(&page);
            }
        }
        Ok(())
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        for page in &self.pages {
            self.shared.pages.not_written(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: ByteRange = ByteRange { offset: 0, len: SECTOR_SIZE };

    /// Somebody else sees a bit as soon as it is set, and must not take it for one that is on disk.
    #[test]
    fn bits_are_not_settled_while_they_are_set() {
        let durability = Durability::new(None, HEADER_LEN);
        assert!(durability.is_settled());
        let committed = durability.commit(RANGE, || {
            assert!(!durability.is_settled());
            assert!(durability.must_wait_for_bits(true));
        });
        assert_eq!(committed, Committed::Done);
        assert!(!durability.is_settled());
    }
}
