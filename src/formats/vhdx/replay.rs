//! Replaying the log: in memory for those who only read, on disk for those who write.
//!
//! [`Replay`] is what the active log entries leave behind, by place. [`Replayed`] shows a file as
//! it will be after that, without changing it; every image with a log that is not empty is
//! first looked at in this way, so that a refused image stays as it was. [`Replay::make`] then
//! does it on disk, where it can be repeated any number of times: until the header says that the
//! log is empty, the entries are there and say the same.
//!
//! Memory is bounded by the length of the log: pages stay in it, only their places are kept.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::disk;
use super::header::{Header, HeaderSlots};
use super::layout::{Guid, HEADER_OFFSETS, MAX_FILE_LEN, PAGE, REGION_TABLE_OFFSETS};
use super::log::{Active, Change, Entry, LogReader, PageSource};
use crate::error::{Error, Result, ResultExt};
use crate::io::{Alignment, Buffers, File, Fut, Hole};
use crate::units::{ByteRange, MIB, align_down, align_up};

/// How many pages are in memory at once while they are put in place.
const AT_ONCE: usize = 256;

/// The sum of all entries to be replayed.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Pages by their place in the file.
    pages: BTreeMap<u64, PageSource>,
    /// Zeros by their start, with their end; they neither touch nor overlap. Pages lie on top.
    zeros: BTreeMap<u64, u64>,
    /// How long the file must be afterwards.
    len: u64,
    /// The entries, oldest first.
    entries: Vec<Entry>,
    /// Sequence numbers of the first and the last entry that is later, whole, and out of reach.
    cut_off: Option<(u64, u64)>,
}

impl Replay {
    /// Reads the active entries.
    ///
    /// # Errors
    /// If there are none, if one reaches where it must not, or if the file is shorter than it was.
    pub async fn read(mut reader: LogReader<'_>, log: ByteRange, file_len: u64) -> Result<Replay> {
        let Active { entries, cut_off } = reader.active().await.context(|| "log")?;
        let last = *entries.last().expect("an active sequence has an entry");
        if last.flushed_file_offset > file_len {
            return Err(Error::corrupt(format!(
                "the log says that the file had {} bytes at least, but it has {file_len}: it is \
                 truncated",
                last.flushed_file_offset
            )));
        }
        let end = align_up(last.last_file_offset, MIB).filter(|end| *end <= MAX_FILE_LEN);
        let Some(end) = end else {
            return Err(Error::corrupt(format!(
                "the log wants the file to have {} bytes, more than any can need",
                last.last_file_offset
            )));
        };
        let mut replay = Replay {
            pages: BTreeMap::new(),
            zeros: BTreeMap::new(),
            len: end.max(file_len),
            entries: Vec::new(),
            cut_off,
        };
        for entry in &entries {
            for change in reader.changes(entry)? {
                replay.check(&change, log).context(|| format!("log entry {}", entry.sequence))?;
                replay.add(change);
            }
        }
        replay.entries = entries;
        Ok(replay)
    }

    /// The entries that were replayed, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Sequence numbers of the first and the last entry behind a damaged one. They cannot be replayed
    /// without that, though what is in them was written later.
    pub fn cut_off(&self) -> Option<(u64, u64)> {
        self.cut_off
    }

    /// How many pages it changes.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// How long the file is afterwards.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// How long the file is to be, as the last entry says.
    pub fn last_file_offset(&self) -> u64 {
        self.entries.last().map_or(0, |entry| entry.last_file_offset)
    }

    fn check(&self, change: &Change, log: ByteRange) -> Result<()> {
        let target = match change {
            Change::Page { offset, .. } => ByteRange::new(*offset, PAGE),
            Change::Zeros(range) => Some(*range),
        };
        let refuse = |why: &str| {
            let what = target.map_or("a range without end".into(), |target| target.to_string());
            Err(Error::corrupt(format!("writes {what}, {why}")))
        };
        let Some(target) = target else { return refuse("which cannot be") };
        if target.offset < REGION_TABLE_OFFSETS[0] {
            let second = HEADER_OFFSETS[1];
            return refuse(&format!("but headers (up to {second}) are never logged"));
        }
        if target.overlaps(&log) {
            return refuse("which is in the log itself");
        }
        if target.end() > self.len {
            return refuse(&format!("beyond the end of the file at {}", self.len));
        }
        Ok(())
    }

    fn add(&mut self, change: Change) {
        match change {
            Change::Page { offset, source } => {
                self.pages.insert(offset, source);
            }
            Change::Zeros(range) if range.is_empty() => {}
            Change::Zeros(range) => {
                let covered: Vec<u64> =
                    self.pages.range(range.offset..range.end()).map(|(at, _)| *at).collect();
                for at in covered {
                    self.pages.remove(&at);
                }
                self.add_zeros(range);
            }
        }
    }

    /// Adds a range of zeros, merged with those that it touches.
    fn add_zeros(&mut self, range: ByteRange) {
        let (mut start, mut end) = (range.offset, range.end());
        while let Some((&at, &to)) = self.zeros.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.zeros.remove(&at);
            start = start.min(at);
            end = end.max(to);
        }
        self.zeros.insert(start, end);
    }

    /// Makes the replay on disk, and declares the log empty. Can be repeated after a crash.
    ///
    /// # Errors
    /// Those of the file.
    pub async fn make(&self, file: &Arc<dyn File>, headers: &mut HeaderSlots) -> Result<()> {
        let begun = Header { file_write_guid: Guid::random(), ..headers.current };
        // Before the first byte is changed.
        headers.write_next(file, begun).await?;
        file.flush().await?;
        // The other slot and the pages share a flush: whatever of that is lost, the header that is on
        // disk already has the replay made again.
        headers.write_next(file, begun).await?;
        self.apply(file).await?;
        file.flush().await?;
        headers.update(file, Header { log_guid: Guid::ZERO, ..headers.current }).await
    }

    /// Changes the file. Nothing is durable before the next flush, and until the log is declared
    /// empty the same can be done again.
    async fn apply(&self, file: &Arc<dyn File>) -> Result<()> {
        let len = file.len()?;
        if len < self.last_file_offset() {
            tracing::warn!(
                "{}: has {len} bytes, and its log says that it is to have {}: it is made longer, with zeros. \
                 After a power cut that is as it should be; of a copy that was cut short, the end is missing",
                file.name(),
                self.last_file_offset()
            );
        }
        if len < self.len {
            file.set_len(self.len).await?;
        }
        for (start, end) in &self.zeros {
            file.write_zeroes(ByteRange::between(*start, *end), true).await?;
        }
        let (places, sources): (Vec<u64>, Vec<PageSource>) = self.pages.iter().unzip();
        // The same memory for all, as new memory takes longer than what is done with it.
        let mut memory = disk::memory(sources.len().min(AT_ONCE) as u64 * PAGE);
        for (places, sources) in places.chunks(AT_ONCE).zip(sources.chunks(AT_ONCE)) {
            PageSource::read_all(sources, file, &mut memory).await?;
            let pages = memory.buffers();
            let mut done = 0;
            for run in places.chunk_by(|a, b| a + PAGE == *b) {
                let len = run.len() as u64 * PAGE;
                file.write(run[0], pages.slice(done, len), false).await?;
                done += len;
            }
        }
        Ok(())
    }

    /// Where the pages come from that lie side by side from `page` on and start before `end`, as
    /// many as are read at once.
    fn pages_from(&self, page: u64, end: u64) -> Vec<PageSource> {
        let pages = self.pages.range(page..end).take(AT_ONCE);
        let places = (page..).step_by(PAGE as usize);
        let run = pages.zip(places).take_while(|((at, _), place)| *at == place);
        run.map(|((_, source), _)| *source).collect()
    }

    /// The first place at or after `offset` that differs from the file, if it is before `end`.
    fn next_change(&self, offset: u64, end: u64) -> Option<u64> {
        let page = self.pages.range(offset..end).next().map(|(at, _)| *at);
        let zeros = self.zeros.range(offset..end).next().map(|(at, _)| *at);
        page.into_iter().chain(zeros).min()
    }

    /// Until where zeros go that are at `offset`.
    fn zeros_at(&self, offset: u64) -> Option<u64> {
        let (_, end) = self.zeros.range(..=offset).next_back()?;
        (*end > offset).then_some(*end)
    }
}

/// A file as it is after a replay that was not made.
pub struct Replayed {
    file: Arc<dyn File>,
    replay: Arc<Replay>,
    /// Length of the file as it is.
    file_len: u64,
}

impl Replayed {
    /// Shows `file` with `replay` made.
    pub fn new(file: Arc<dyn File>, replay: Arc<Replay>) -> Result<Replayed> {
        let file_len = file.len()?;
        Ok(Replayed { file, replay, file_len })
    }

    async fn read_all(&self, offset: u64, buf: Buffers) -> Result<()> {
        let end = offset.checked_add(buf.len()).filter(|end| *end <= self.replay.len);
        let Some(end) = end else {
            return Err(Error::corrupt(format!(
                "{}: {} bytes at {offset} lie beyond the end of the file",
                self.file.name(),
                buf.len()
            )));
        };
        let mut at = offset;
        while at < end {
            let page = align_down(at, PAGE);
            let to;
            let part = |to: u64| buf.slice(at - offset, to - at);
            let sources = self.replay.pages_from(page, end);
            if !sources.is_empty() {
                to = end.min(page + sources.len() as u64 * PAGE);
                let mut content = disk::memory(sources.len() as u64 * PAGE);
                PageSource::read_all(&sources, &self.file, &mut content).await?;
                content.buffers().slice(at - page, to - at).copy_to(&part(to));
            } else if let Some(zeros_end) = self.replay.zeros_at(at) {
                let next = self.replay.pages.range(at..end).next().map_or(end, |(at, _)| *at);
                to = end.min(zeros_end).min(next);
                part(to).fill_zero();
            } else if at >= self.file_len {
                to = self.replay.next_change(at, end).unwrap_or(end);
                part(to).fill_zero();
            } else {
                to = self.replay.next_change(at, end).unwrap_or(end).min(self.file_len);
                self.file.read(at, part(to)).await?;
            }
            at = to;
        }
        Ok(())
    }

    fn refuse<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async {
            Err(Error::invalid(format!(
                "{}: its log was replayed in memory only, so nothing can be written",
                self.file.name()
            )))
        })
    }
}

impl fmt::Debug for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replayed({}, {} pages)", self.file.name(), self.replay.pages.len())
    }
}

impl File for Replayed {
    fn name(&self) -> &str {
        self.file.name()
    }

    fn len(&self) -> Result<u64> {
        Ok(self.replay.len)
    }

    fn alignment(&self) -> Alignment {
        self.file.alignment()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.read_all(offset, buf))
    }

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        self.refuse()
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        self.refuse()
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        self.refuse()
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn set_len<'a>(&'a self, _len: u64) -> Fut<'a, ()> {
        self.refuse()
    }

    fn hole_at(&self, offset: u64) -> Result<Hole> {
        // Whether there is a hole is not worth working out: nothing is wrong with data.
        let range = ByteRange::between(offset, self.replay.len);
        Ok(Hole { range, is_hole: false })
    }
}
