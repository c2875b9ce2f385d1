//! Changes of metadata on their way to the disk: pages in memory, the log, their place.
//!
//! ```text
//! publish: change words of pages in memory, and a record in the keep      (before a request completes)
//!    │ dirty
//! commit:  [flush] → entry in the log → flush                             (a guest's FLUSH)
//!    │ logged
//! apply:   pages to their place → flush                                   (when the log fills up; close)
//!    ▼ clean
//! ```
//!
//! **Group commit.** Many changes share a page, many pages an entry, and many entries an `apply`.
//! A commit costs one flush, or two where data must be on disk before the entry that shows it: for
//! blocks in reused space, and for bits of sector bitmaps, since what was there before would
//! otherwise be seen after a power cut. (A new block in fresh space shows zeros until its data
//! arrives, just as before.)
//!
//! **Kills.** What is dirty lives in memory. So a change is recorded in the [`Keep`] before the
//! request that made it completes, and redone by the successor. Without a keep, a request that
//! changed something completes after a commit of its own.
//!
//! # Invariants
//!
//! * Pages that are dirty or logged are held in the cache: the file has older ones.
//! * What is applied is what was logged, never what is in memory now.
//! * Changes that only make sense together are published together, and go into one entry.
//! * An entry never overwrites what the last entry on disk still needs. At every instant the log
//!   has a valid sequence of entries, or the header says that it is empty.
//! * A commit whose future is dropped, or that the host had no room for, is finished by the next one,
//!   with the same bytes at the same place. The turn is held until the host has done what it was given: an old page that lands late
//!   would undo what was applied since.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use super::bat::{self, CHECKED, MEMORY_BITS, UNSETTLED};
use super::cache::{Page, WORDS};
use super::disk;
use super::layout::{Guid, LOG_SECTOR, PAGE};
use super::log::{NewEntry, entry_len};
use super::{ALL, Vhdx};
use crate::error::{Error, ErrorKind, Result};
use crate::units::ByteRange;

/// A change of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Edit {
    /// Puts an entry into the BAT.
    Entry {
        /// Where.
        index: u64,
        /// What, without bits that are in memory only.
        value: u64,
    },
    /// Sets or clears bits of the sector bitmap at `bitmap` of the file.
    Bits { bitmap: u64, first: u64, count: u64, set: bool },
}

/// Length of an edit in a record of the keep.
const RECORD: usize = 40;
/// Bits of a page of a sector bitmap.
const BITS_PER_PAGE: u64 = PAGE * 8;

impl Edit {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let words = match *self {
            Edit::Entry { index, value } => [1, index, value, 0, 0],
            Edit::Bits { bitmap, first, count, set } => [2, bitmap, first, count, set.into()],
        };
        out.extend(words.iter().flat_map(|word: &u64| word.to_le_bytes()));
    }

    /// The edits of a record.
    pub(super) fn decode(record: &[u8]) -> Result<Vec<Edit>> {
        let edit = |bytes: &[u8]| {
            let word =
                |i: usize| u64::from_le_bytes(bytes[i * 8..][..8].try_into().expect("8 bytes"));
            match (word(0), word(4)) {
                (1, _) => Ok(Edit::Entry { index: word(1), value: word(2) }),
                (2, set @ (0 | 1)) => Ok(Edit::Bits {
                    bitmap: word(1),
                    first: word(2),
                    count: word(3),
                    set: set == 1,
                }),
                (kind, _) => Err(Error::corrupt(format!("kept record of unknown kind {kind}"))),
            }
        };
        if record.is_empty() || !record.len().is_multiple_of(RECORD) {
            return Err(Error::corrupt(format!("kept record of {} bytes", record.len())));
        }
        record.chunks_exact(RECORD).map(edit).collect()
    }
}

/// What goes with a group of edits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Conditions<'a> {
    /// Entries of the BAT (index, value) that must still be as they were, or nothing is done.
    pub expect: &'a [(u64, u64)],
    /// Data must be on disk before these edits are.
    pub data_first: bool,
    /// A place that nothing refers to any more after this.
    pub frees: Option<ByteRange>,
}

/// All that a journal knows, behind one lock that is never held across an await.
#[derive(Debug, Default)]
pub(super) struct Journal {
    /// Pages that differ from what is logged or in the file, by their place.
    dirty: BTreeSet<u64>,
    /// Pages as they are in the log, and not yet in their place.
    logged: BTreeMap<u64, Arc<Vec<u8>>>,
    /// Whether data must be flushed before the dirty pages are logged.
    data_first: bool,
    /// Places freed by dirty pages.
    frees: Vec<ByteRange>,
    /// Entries of the BAT to be settled by the next commit.
    unsettled: Vec<u64>,
    /// Places freed by pages that are logged: nobody may use them any more.
    freed: Vec<ByteRange>,
    /// Freed places that are waiting for their last users, with the generation of pins.
    waiting: Option<(usize, Vec<ByteRange>)>,
    /// Counts publications.
    changes: u64,
    /// A commit that has begun.
    batch: Option<Arc<Batch>>,
    /// The log, once it is in use.
    log: Option<LogState>,
    /// GUID and first entry of a log that is about to be used.
    starting: Option<(Guid, Arc<Vec<u8>>)>,
    /// Length of the file as of the last flush of ours; 0 if there was none.
    flushed_len: u64,
}

/// Where the log is.
#[derive(Clone, Copy, Debug)]
struct LogState {
    guid: Guid,
    /// Where the next entry goes, from the start of the log.
    head: u64,
    /// Its number.
    sequence: u64,
    /// Everything from here to the head is needed by the last entry on disk.
    needed_from: u64,
    /// The oldest entry whose pages are not in place.
    unapplied: Option<u64>,
}

/// What a commit writes.
#[derive(Debug)]
struct Batch {
    pages: Vec<(u64, Arc<Vec<u8>>)>,
    data_first: bool,
    frees: Vec<ByteRange>,
    unsettled: Vec<u64>,
    changes: u64,
    /// The entry, once it has a place.
    entry: OnceLock<PlacedEntry>,
}

/// An entry with its place in the log.
#[derive(Debug)]
struct PlacedEntry {
    at: u64,
    tail: u64,
    bytes: Vec<u8>,
}

/// What came of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Outcome {
    /// It is done, and survives this process.
    Kept,
    /// It is done, and must be committed before the request that made it completes.
    CommitFirst,
    /// What it relied on has changed; nothing was done.
    Stale,
}

/// What became of a publication.
enum Published {
    Done(Outcome),
    /// A page is not in memory.
    Absent(u64),
    /// Too much waits for a commit.
    Full,
}

impl Vhdx {
    /// Whether a flush has more to do than to flush the file.
    pub(super) fn is_dirty(&self) -> bool {
        self.changes.load(Ordering::SeqCst) != self.changes_saved.load(Ordering::SeqCst)
    }

    /// Whether bits of sector bitmaps wait for a commit, and so do the requests that set them. Whoever
    /// relies on a bit looks at this after it.
    pub(super) fn has_unsettled_bits(&self) -> bool {
        self.unsettled_bits.load(Ordering::SeqCst) > self.changes_saved.load(Ordering::SeqCst)
    }

    /// The most pages that may wait for a commit: what fits an entry, and leaves the cache room.
    fn max_dirty(&self) -> usize {
        let log = self.log.len - 3 * LOG_SECTOR;
        let pages = log / LOG_SECTOR;
        let by_log = pages - (entry_len(pages) / LOG_SECTOR - pages);
        (by_log as usize).min(self.cache.capacity() / 4).max(2 * MAX_PAGES_AT_ONCE)
    }

    /// Makes changes visible, all or none of them.
    ///
    /// # Errors
    /// If a page cannot be read, or a commit that was needed first failed.
    pub(super) async fn publish(&self, edits: &[Edit], with: Conditions<'_>) -> Result<Outcome> {
        loop {
            self.check_writable()?;
            match self.try_publish(edits, with)? {
                Published::Done(outcome) => return Ok(outcome),
                Published::Absent(page) => self.load(page).await?,
                // All the way, so that what is left to do does not all fall to one FLUSH later.
                Published::Full => self.commit_and(true).await?,
            }
        }
    }

    /// As [`Vhdx::publish`], without waiting: `None` if that cannot be, or went wrong. Then nothing
    /// has changed.
    pub(super) fn publish_now(&self, edits: &[Edit], with: Conditions<'_>) -> Option<Outcome> {
        match self.try_publish(edits, with) {
            Ok(Published::Done(outcome)) => Some(outcome),
            Ok(Published::Absent(_) | Published::Full) | Err(_) => None,
        }
    }

    fn try_publish(&self, edits: &[Edit], with: Conditions<'_>) -> Result<Published> {
        let pages: BTreeSet<u64> = edits.iter().flat_map(|edit| self.pages_of(edit)).collect();
        debug_assert!(pages.len() <= MAX_PAGES_AT_ONCE);
        let mut journal = self.journal.lock().unwrap();
        for (index, value) in with.expect {
            let (page, word) = self.bat_word(*index);
            let Some(now) = self.cache.word(page, word) else { return Ok(Published::Absent(page)) };
            if (now ^ value) & !MEMORY_BITS != 0 {
                return Ok(Published::Done(Outcome::Stale));
            }
        }
        let new = pages.iter().filter(|page| !journal.dirty.contains(page)).count();
        if journal.dirty.len() + new > self.max_dirty() {
            return Ok(Published::Full);
        }
        let release = |journal: &Journal| {
            for page in pages.iter().filter(|page| !journal.holds(**page)) {
                self.cache.with(*page, |words| words.hold(false));
            }
        };
        for page in &pages {
            if self.cache.with(*page, |words| words.hold(true)).is_none() {
                release(&journal);
                return Ok(Published::Absent(*page));
            }
        }
        let outcome = match self.keep_record(edits, !journal.dirty.is_empty()) {
            Some(outcome) => outcome,
            None => {
                release(&journal);
                return Ok(Published::Full);
            }
        };
        #[cfg(test)]
        super::testing::reached(super::testing::Moment::Kept);
        // First: who sees the changes must see that they are not on disk yet.
        journal.changes += 1;
        self.changes.store(journal.changes, Ordering::SeqCst);
        // Whoever writes to such a block later has to wait for the commit, too.
        let unsettled = if outcome == Outcome::CommitFirst { UNSETTLED } else { 0 };
        if unsettled != 0 && edits.iter().any(|edit| matches!(edit, Edit::Bits { .. })) {
            self.unsettled_bits.store(journal.changes, Ordering::SeqCst);
        }
        for edit in edits {
            self.change(edit, unsettled);
            if let Edit::Entry { index, .. } = edit
                && unsettled != 0
            {
                journal.unsettled.push(*index);
            }
        }
        #[cfg(test)]
        super::testing::reached(super::testing::Moment::Changed);
        journal.dirty.extend(&pages);
        journal.data_first |= with.data_first;
        journal.frees.extend(with.frees);
        Ok(Published::Done(outcome))
    }

    /// Records changes in the keep, if a guest depends on them. `None` if it is full, and a commit
    /// would make room.
    fn keep_record(&self, edits: &[Edit], can_commit: bool) -> Option<Outcome> {
        if !self.session.load(Ordering::Acquire) {
            return Some(Outcome::Kept);
        }
        let Some(keep) = &self.keep else { return Some(Outcome::CommitFirst) };
        let mut record = Vec::with_capacity(edits.len() * RECORD);
        edits.iter().for_each(|edit| edit.encode(&mut record));
        match keep.append(&[&record]) {
            Ok(()) => Some(Outcome::Kept),
            Err(err) if err.kind() == ErrorKind::NoSpace && can_commit => None,
            Err(err) => {
                tracing::warn!("flushing instead of keeping a record: {err}");
                Some(Outcome::CommitFirst)
            }
        }
    }

    /// The pages that an edit changes.
    fn pages_of(&self, edit: &Edit) -> Vec<u64> {
        match *edit {
            Edit::Entry { index, .. } => vec![self.bat_word(index).0],
            Edit::Bits { bitmap, first, count, .. } => {
                let last = (first + count - 1) / BITS_PER_PAGE;
                (first / BITS_PER_PAGE..=last).map(|page| bitmap + page * PAGE).collect()
            }
        }
    }

    /// Changes pages that are in memory and held.
    fn change(&self, edit: &Edit, unsettled: u64) {
        match *edit {
            Edit::Entry { index, value } => {
                let (page, word) = self.bat_word(index);
                self.cache.with(page, |words| words.set(word, value | CHECKED | unsettled));
            }
            Edit::Bits { bitmap, first, count, set } => {
                let (mut bit, end) = (first, first + count);
                while bit < end {
                    let page = bitmap + bit / BITS_PER_PAGE * PAGE;
                    let page_end = (bit / BITS_PER_PAGE + 1) * BITS_PER_PAGE;
                    self.cache.with(page, |words| {
                        while bit < end.min(page_end) {
                            let word = (bit % BITS_PER_PAGE / 64) as usize;
                            let len = (64 - bit % 64).min(end - bit);
                            let mask = (u64::MAX >> (64 - len)) << (bit % 64);
                            let old = words.get(word);
                            words.set(word, if set { old | mask } else { old & !mask });
                            bit += len;
                        }
                    });
                    bit = bit.max(page_end.min(end));
                }
            }
        }
    }

    /// Makes everything completed so far durable, mapping included.
    pub(super) async fn commit(&self) -> Result<()> {
        self.commit_and(false).await
    }

    /// Commits, and (`apply`) puts what was committed in its place.
    async fn commit_and(&self, apply: bool) -> Result<()> {
        self.check_writable()?;
        let before = self.begun.load(Ordering::SeqCst);
        let in_turn = async {
            self.check_writable()?;
            if self.completed.load(Ordering::SeqCst) > before {
                // Somebody else's began after we were called.
                return Ok(());
            }
            let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
            self.poisoning_unless_full(self.commit_now().await)?;
            if apply {
                self.poisoning_unless_full(self.apply().await)?;
            }
            self.completed.store(number, Ordering::SeqCst);
            self.reclaim().await;
            Ok(())
        };
        self.turn.alone_while(ALL, in_turn).await
    }

    /// Commits, and puts all pages in their place.
    pub(super) async fn checkpoint(&self) -> Result<()> {
        self.check_writable()?;
        let in_turn = async {
            self.poisoning_unless_full(self.commit_now().await)?;
            self.poisoning_unless_full(self.apply().await)
        };
        self.turn.alone_while(ALL, in_turn).await
    }

    /// Refuses further writes if the result is a failure.
    pub(super) fn poisoning<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|err| {
            let err = err.context(self.name().to_string());
            self.set_poison(&err);
            err
        })
    }

    /// As [`Vhdx::poisoning`], unless all that went wrong is that the host had no room for what the
    /// next attempt writes again: then it waits in memory, as after a commit whose future was dropped.
    pub(super) fn poisoning_unless_full<T>(&self, result: Result<T>) -> Result<T> {
        match result {
            Err(err) if err.has_lost_nothing() => Err(err.context(self.name().to_string())),
            result => self.poisoning(result),
        }
    }

    async fn commit_now(&self) -> Result<()> {
        let left_over = self.journal.lock().unwrap().batch.clone();
        if let Some(batch) = left_over {
            // An earlier commit was dropped half-way, or the host had no room for it.
            self.finish(batch).await?;
        }
        match self.take_batch()? {
            Some(batch) => self.finish(batch).await,
            None => self.flush_file().await,
        }
    }

    /// Takes all that is dirty.
    fn take_batch(&self) -> Result<Option<Arc<Batch>>> {
        let mut journal = self.journal.lock().unwrap();
        if journal.dirty.is_empty() {
            return Ok(None);
        }
        let dirty = std::mem::take(&mut journal.dirty);
        let pages = dirty.into_iter().map(|page| (page, Arc::new(self.page_for_disk(page))));
        let batch = Arc::new(Batch {
            pages: pages.collect(),
            data_first: std::mem::take(&mut journal.data_first),
            frees: std::mem::take(&mut journal.frees),
            unsettled: std::mem::take(&mut journal.unsettled),
            changes: journal.changes,
            entry: OnceLock::new(),
        });
        if let Some(keep) = self.keep.as_ref().filter(|keep| keep.is_recording()) {
            keep.rotate()?;
        }
        journal.batch = Some(Arc::clone(&batch));
        Ok(Some(batch))
    }

    /// A held page as it belongs on disk.
    fn page_for_disk(&self, page: u64) -> Vec<u8> {
        let words: Box<Page> =
            self.cache.with(page, |words| words.copy()).unwrap_or_else(|| Box::new([0; WORDS]));
        let bat = self.bat();
        let keep = if page >= bat.offset && page < bat.end() { !MEMORY_BITS } else { u64::MAX };
        words.iter().flat_map(|word| (word & keep).to_le_bytes()).collect()
    }

    /// Writes a batch to the log. May be done again from the start.
    async fn finish(&self, batch: Arc<Batch>) -> Result<()> {
        let log = self.log;
        if self.journal.lock().unwrap().log.is_none() {
            self.start_log().await?;
        }
        if batch.data_first {
            self.flush_file().await?;
        }
        if batch.entry.get().is_none() {
            self.make_room(entry_len(batch.pages.len() as u64)).await?;
        }
        let entry = batch.entry.get_or_init(|| {
            let pages: Vec<(u64, &[u8])> =
                batch.pages.iter().map(|(offset, page)| (*offset, page.as_slice())).collect();
            let (entry, at) = self.next_entry();
            PlacedEntry { at, tail: entry.tail, bytes: entry.encode(&pages) }
        });
        self.write_entry(log, entry.at, &entry.bytes).await?;
        self.flush_file().await?;
        let at = entry.at;
        self.entry_is_on_disk(at, entry.bytes.len() as u64, entry.tail);
        if let Some(keep) = self.keep.as_ref().filter(|keep| keep.is_recording()) {
            // Before freed places can be used again: a record that is redone must not meet the
            // data of somebody else.
            keep.release()?;
        }
        let mut journal = self.journal.lock().unwrap();
        if let Some(state) = &mut journal.log {
            state.unapplied.get_or_insert(at);
        }
        journal.logged.extend(batch.pages.iter().cloned());
        journal.freed.extend(&batch.frees);
        for index in &batch.unsettled {
            let (page, word) = self.bat_word(*index);
            let still = journal.unsettled.contains(index);
            self.cache.with(page, |words| {
                if !still {
                    words.set(word, words.get(word) & !UNSETTLED);
                }
            });
        }
        journal.batch = None;
        self.changes_saved.store(batch.changes, Ordering::SeqCst);
        Ok(())
    }

    /// Head of the next entry, and its place.
    fn next_entry(&self) -> (NewEntry, u64) {
        let journal = self.journal.lock().unwrap();
        let state = journal.log.expect("the log is in use");
        let entry = NewEntry {
            guid: state.guid,
            sequence: state.sequence,
            tail: state.unapplied.unwrap_or(state.head),
            flushed_file_offset: journal.flushed_len,
            last_file_offset: self.file_len.load(Ordering::Acquire),
        };
        (entry, state.head)
    }

    fn entry_is_on_disk(&self, at: u64, len: u64, tail: u64) {
        let log_len = self.log.len;
        let mut journal = self.journal.lock().unwrap();
        if let Some(state) = &mut journal.log {
            state.head = (at + len) % log_len;
            state.sequence += 1;
            state.needed_from = tail;
        }
    }

    /// Writes an entry, which goes on at the start of the log where it ends.
    async fn write_entry(&self, log: ByteRange, at: u64, bytes: &[u8]) -> Result<()> {
        let until_end = (log.len - at).min(bytes.len() as u64) as usize;
        let (first, rest) = bytes.split_at(until_end);
        disk::write(&self.file, log.offset + at, first).await?;
        if !rest.is_empty() {
            disk::write(&self.file, log.offset, rest).await?;
        }
        Ok(())
    }

    /// Begins to use the log: an empty entry first, so that there is one when the header says so.
    async fn start_log(&self) -> Result<()> {
        let log = self.log;
        if self.journal.lock().unwrap().starting.is_none() && self.header_names_log() {
            // Somebody was dropped while he declared it empty.
            let updated = self.update_header(|header| header.log_guid = Guid::ZERO).await;
            self.poisoning(updated)?;
        }
        // If an earlier attempt was dropped half-way, the header may have its GUID already: then the
        // very same entry must stay where it is.
        let (guid, first) = {
            let mut journal = self.journal.lock().unwrap();
            let entry = NewEntry {
                guid: Guid::random(),
                sequence: 1,
                tail: 0,
                flushed_file_offset: journal.flushed_len,
                last_file_offset: self.file_len.load(Ordering::Acquire),
            };
            let starting = &mut journal.starting;
            starting.get_or_insert_with(|| (entry.guid, Arc::new(entry.encode(&[])))).clone()
        };
        self.write_entry(log, 0, &first).await?;
        self.flush_file().await?;
        self.update_header(|header| header.log_guid = guid).await?;
        self.journal.lock().unwrap().log =
            Some(LogState { guid, head: LOG_SECTOR, sequence: 2, needed_from: 0, unapplied: None });
        Ok(())
    }

    /// Sees to it that an entry of `len` bytes fits the log.
    async fn make_room(&self, len: u64) -> Result<()> {
        let log = self.log;
        let fits = |state: &LogState| {
            let used = (state.head + log.len - state.needed_from) % log.len;
            used + len + LOG_SECTOR <= log.len
        };
        let state = |vhdx: &Vhdx| vhdx.journal.lock().unwrap().log.expect("the log is in use");
        let too_much = self.journal.lock().unwrap().logged.len() > self.cache.capacity() / 2;
        if fits(&state(self)) && !too_much {
            return Ok(());
        }
        self.apply().await?;
        if fits(&state(self)) {
            return Ok(());
        }
        // The last entry still points to its tail. An empty one after it needs only itself; there
        // is always room for that.
        let (entry, at) = self.next_entry();
        self.write_entry(log, at, &entry.encode(&[])).await?;
        self.flush_file().await?;
        self.entry_is_on_disk(at, LOG_SECTOR, entry.tail);
        match fits(&state(self)) {
            true => Ok(()),
            false => {
                Err(Error::invalid(format!("a log entry of {len} bytes does not fit the log")))
            }
        }
    }

    /// Puts the logged pages in their place. The caller holds the turn.
    pub(super) async fn apply(&self) -> Result<()> {
        let logged: Vec<_> = {
            let journal = self.journal.lock().unwrap();
            journal.logged.iter().map(|(page, bytes)| (*page, Arc::clone(bytes))).collect()
        };
        if logged.is_empty() {
            return Ok(());
        }
        disk::write_pages(&self.file, logged.iter().map(|(at, page)| (*at, page.as_slice())))
            .await?;
        self.flush_file().await?;
        let mut journal = self.journal.lock().unwrap();
        journal.logged.clear();
        if let Some(state) = &mut journal.log {
            state.unapplied = None;
        }
        for (page, _) in &logged {
            if !journal.holds(*page) {
                self.cache.with(*page, |words| words.hold(false));
            }
        }
        Ok(())
    }

    /// Flushes the file, and remembers how long it surely is.
    async fn flush_file(&self) -> Result<()> {
        let len = self.file_len.load(Ordering::Acquire);
        self.file.flush().await?;
        self.journal.lock().unwrap().flushed_len = len;
        Ok(())
    }

    /// Leads freed places on their way to be used again, as far as they can go now. A failure only
    /// leaves them unused.
    pub(super) async fn reclaim(&self) {
        loop {
            let Some(mut ranges) = self.next_reclaimable() else { return };
            ranges.sort_unstable_by_key(|range| range.offset);
            let mut at = 0;
            while at < ranges.len() {
                // Neighbours in one call.
                let mut hole = ranges[at];
                let first = at;
                at += 1;
                while at < ranges.len() && ranges[at].offset == hole.end() {
                    hole.len += ranges[at].len;
                    at += 1;
                }
                if let Err(err) = self.file.write_zeroes(hole, true).await {
                    tracing::warn!("{}: freeing {hole}: {err}", self.name());
                    continue;
                }
                if let Some(space) = self.space.lock().unwrap().as_mut() {
                    for range in &ranges[first..at] {
                        space.give_back(range.offset, true);
                    }
                }
            }
        }
    }

    /// The file became shorter.
    pub(super) fn forget_flushed_len(&self) {
        self.journal.lock().unwrap().flushed_len = 0;
    }

    /// Whether places were freed, and are not yet free to be used.
    pub(super) fn has_reclaimable(&self) -> bool {
        let journal = self.journal.lock().unwrap();
        journal.waiting.is_some() || !journal.freed.is_empty()
    }

    /// Freed places that nobody uses any more.
    fn next_reclaimable(&self) -> Option<Vec<ByteRange>> {
        let mut journal = self.journal.lock().unwrap();
        if journal.waiting.is_none() {
            if journal.freed.is_empty() {
                return None;
            }
            let freed = std::mem::take(&mut journal.freed);
            journal.waiting = Some((self.pins.begin(), freed));
        }
        let (generation, _) = journal.waiting.as_ref()?;
        if !self.pins.is_over(*generation) {
            return None;
        }
        journal.waiting.take().map(|(_, ranges)| ranges)
    }

    /// The log is empty and all pages are in place: forgets that it was in use.
    pub(super) fn forget_log(&self) {
        let mut journal = self.journal.lock().unwrap();
        journal.log = None;
        journal.starting = None;
    }

    /// What is free in the file is found out anew, and how long it surely is.
    pub(super) fn forget_freed(&self) {
        let mut journal = self.journal.lock().unwrap();
        journal.flushed_len = 0;
        journal.freed.clear();
        journal.waiting = None;
    }

    /// Whether the log is in use.
    pub(super) fn uses_log(&self) -> bool {
        self.journal.lock().unwrap().log.is_some()
    }

    /// Whether a place is used by an entry of the BAT.
    pub(super) fn place_of_entry(&self, index: u64, entry: u64) -> Option<ByteRange> {
        let is_used = matches!(bat::state(entry), 6 | 7);
        let len = match self.geometry().slot(index) {
            super::geometry::Slot::Payload(_) => self.geometry().block_size(),
            super::geometry::Slot::Bitmap(_) => crate::units::MIB,
        };
        is_used.then(|| ByteRange { offset: bat::offset(entry), len })
    }
}

/// The most pages that are changed together: two of the BAT, and the bits of a block of 256 MiB.
const MAX_PAGES_AT_ONCE: usize = 19;

impl Journal {
    /// Whether a page must stay in memory.
    fn holds(&self, page: u64) -> bool {
        self.dirty.contains(&page)
            || self.logged.contains_key(&page)
            || self.batch.as_ref().is_some_and(|batch| {
                batch.pages.binary_search_by_key(&page, |(page, _)| *page).is_ok()
            })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::block::{Driver, Node, NodeOptions};
    use crate::error::ErrorKind;
    use crate::io::block_on;
    use crate::io::sim::{Fault, Sim, SimFile, SimOp};
    use crate::units::MIB;
    use std::pin::pin;
    use std::task::{Context, Waker};

    /// What one page of the BAT tells of, in blocks of 1 MiB.
    const PER_PAGE: u64 = 512 * MIB;

    /// However much was allocated without a flush, and wherever, the next one finds little to do: what
    /// one entry holds. What earlier flushes have left in the log is bounded by the log.
    #[test]
    fn a_flush_has_little_to_do_however_much_came_before() {
        const PAGES: u64 = 1200;
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(PAGES * PER_PAGE).bytes());
        let driver = open_image(&file, None, None).unwrap();
        let most = driver.format().max_dirty() as u64;
        let mut written = 0;
        for (pages, writes) in [(1, 8), (3 * most + most / 2, 8), (10, most + 8), (most, most + 8)]
        {
            for _ in 0..pages {
                // Each changes another page of the BAT, and none beside the one before.
                let (page, block) = (written * 7 % PAGES, written / PAGES);
                written += 1;
                let offset = page * PER_PAGE + block * MIB;
                block_on(write(&driver, offset, &[1; 512], false)).unwrap();
            }
            let count = |op| file.count(op);
            let before = [SimOp::Write, SimOp::Flush].map(count);
            block_on(driver.flush()).unwrap();
            let after = [SimOp::Write, SimOp::Flush].map(count);
            let done = [after[0] - before[0], after[1] - before[1]];
            assert!(done[0] <= writes && done[1] <= 5, "after {pages} pages: {done:?}");
        }
    }

    /// A queue that flushes does not hold up another one that writes to new blocks, whatever the
    /// flush is waiting for.
    #[test]
    fn blocks_are_mapped_while_a_flush_is_under_way() {
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(64 * MIB).bytes());
        let driver = open_image(&file, None, None).unwrap();
        block_on(write(&driver, 0, &[1; 512], false)).unwrap();
        let (sim, mut context) = (Sim::new(1), Context::from_waker(Waker::noop()));
        let mut flush = pin!(driver.flush());
        let mut steps = 0;
        sim.attach(&file);
        while flush.as_mut().poll(&mut context).is_pending() {
            // The disk goes on with everything but the one operation of the flush.
            sim.detach(&file);
            assert_eq!(sim.pending(), 1);
            steps += 1;
            let mut beside = pin!(write(&driver, steps * MIB, &[2; 512], false));
            assert!(beside.as_mut().poll(&mut context).is_ready(), "in step {steps}");
            sim.attach(&file);
            sim.step();
        }
        // An empty entry, both headers, and the entry, with a flush for each.
        assert_eq!(steps, 8);
    }

    /// The file is sparse, so that any page of the log, of the BAT or of a header may find no room, and
    /// only where it is written to.
    #[test]
    fn what_the_host_has_no_room_for_waits_until_it_has() {
        let mut has_failed = [false; 2];
        for after in 0..40 {
            let file = SimFile::from_bytes("test.vhdx", Fixture::new(6 * PER_PAGE).bytes());
            let driver = std::sync::Arc::new(open_image(&file, None, None).unwrap());
            let node = Node::new(std::sync::Arc::clone(&driver) as _, NodeOptions::default());
            let write = |at: u64| {
                let data = crate::io::AlignedBuf::from_slice(&[1; 512], 512);
                block_on(node.write(at, data.buffers(), false))
            };
            let full = Fault { op: Some(SimOp::Write), after, errno: libc::ENOSPC, for_good: true };
            file.fail(full);
            let mut written = Vec::new();
            for page in 0..6 {
                match write(page * PER_PAGE) {
                    Ok(()) => written.push(page * PER_PAGE),
                    Err(err) => assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}"),
                }
                if let Err(err) = block_on(node.flush()) {
                    has_failed[0] = true;
                    assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
                }
            }
            // What it writes to their place when the log is full.
            if let Err(err) = block_on(driver.format().checkpoint()) {
                has_failed[1] = true;
                assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
            }
            assert!(!node.is_poisoned());
            let left = open_image(&file.after_kill(), None, None).unwrap();
            block_on(left.close()).unwrap();
            file.heal();
            written.push(MIB);
            write(MIB).unwrap();
            block_on(node.flush()).unwrap();
            let file = SimFile::from_bytes("test.vhdx", file.durable());
            let found = open_image(&file, None, None).unwrap();
            for at in written {
                assert_eq!(block_on(read(&found, at, 512)), [1; 512], "{at} after {after}");
            }
            block_on(found.close()).unwrap();
        }
        assert_eq!(has_failed, [true; 2]);
    }

    #[test]
    fn a_sync_without_room_poisons() {
        let file = SimFile::from_bytes("test.vhdx", Fixture::new(64 * MIB).bytes());
        let driver = open_image(&file, None, None).unwrap();
        let node = Node::new(std::sync::Arc::new(driver), NodeOptions::default());
        let data = crate::io::AlignedBuf::from_slice(&[1; 512], 512);
        block_on(node.write(0, data.buffers(), false)).unwrap();
        let op = Some(SimOp::Flush);
        file.fail(Fault { op, after: 0, errno: libc::ENOSPC, for_good: false });
        block_on(node.flush()).unwrap_err();
        assert!(node.is_poisoned());
    }
}
