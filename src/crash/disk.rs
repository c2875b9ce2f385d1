//! A state as a disk that a checker may write to.
//!
//! What is written goes to memory and is forgotten with the next state. Base and log are never
//! touched.

use std::collections::HashMap;
use std::sync::Arc;

use crate::block::Node;
use crate::block::driver::StatusKind;
use crate::crash::below;
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::crash::overlay::Source;
use crate::crash::view::View;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuf, Buffers, block_on};
use crate::units::{ByteRange, SECTOR_SIZE, align_down, align_up};

/// Unit in which written sectors are kept.
const PAGE: u64 = 4096;
/// The most that may be written to one state, in pages: 1 GiB.
const MAX_PAGES: usize = 1 << 18;

/// See the [module](self).
#[derive(Debug)]
pub struct StateDisk {
    history: Arc<History>,
    base: Node,
    view: View,
    written: HashMap<u64, Page>,
    /// What was read of the state itself, in sectors and in the order of the reads.
    looked_at: Vec<ByteRange>,
    /// The first read or write of the state that failed.
    failure: Option<Error>,
}

/// Sectors that were written.
#[derive(Debug)]
struct Page {
    /// One bit for each sector that is valid.
    valid: u8,
    bytes: Box<[u8; PAGE as usize]>,
}

impl StateDisk {
    /// The base, until a state is shown.
    pub fn new(history: Arc<History>, base: Node) -> StateDisk {
        StateDisk {
            history,
            base,
            view: View::default(),
            written: HashMap::new(),
            looked_at: Vec::new(),
            failure: None,
        }
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.base.size()
    }

    /// The log it is made of.
    pub fn history(&self) -> &Arc<History> {
        &self.history
    }

    /// Is the state `name` from now on, fresh. Returns what may read differently now, and all that
    /// differs between states of the same epoch, as ranges of whole pages in the order of the disk:
    /// who forgets these reads anew whatever a verdict can depend on.
    ///
    /// # Errors
    /// If the log has no such state.
    pub fn show(&mut self, name: &StateName) -> Result<Vec<ByteRange>> {
        let mut changed = self.view.show(&self.history, name)?;
        changed
            .extend(self.written.keys().map(|page| ByteRange { offset: page * PAGE, len: PAGE }));
        self.written.clear();
        self.looked_at.clear();
        self.failure = None;
        changed.sort_by_key(|range| range.offset);
        let mut pages: Vec<ByteRange> = Vec::new();
        for range in changed {
            let end = align_up(range.end(), PAGE).unwrap_or(range.end());
            let range = ByteRange::between(align_down(range.offset, PAGE), end);
            match pages.last_mut() {
                Some(last) if range.offset <= last.end() => {
                    *last = ByteRange::between(last.offset, last.end().max(range.end()));
                }
                _ => pages.push(range),
            }
        }
        Ok(pages)
    }

    /// What was read of the state since it is shown, but for what had been written before.
    pub fn looked_at(&self) -> &[ByteRange] {
        &self.looked_at
    }

    /// What failed first since the state is shown, once.
    pub fn take_failure(&mut self) -> Option<Error> {
        self.failure.take()
    }

    fn note_failure<T>(&mut self, result: Result<T>) -> Result<T> {
        if let (Err(err), None) = (&result, &self.failure) {
            self.failure = Some(Error::new(err.kind(), err.to_string()));
        }
        result
    }

    /// The run of the state that begins at `range.offset`, no longer than `range`, and whether it is
    /// known to be zeros without being read. What was written since the state is shown does not count.
    ///
    /// # Errors
    /// If the host does not say.
    pub fn run(&self, range: ByteRange) -> Result<(ByteRange, bool)> {
        let (run, source) = self.view.find(range);
        match source {
            Some(Source::Zero) => Ok((run, true)),
            Some(Source::Log(position)) => {
                let hole = self.history.log().file().hole_at(position)?;
                let len = (hole.range.end() - position).min(run.len);
                Ok((ByteRange { len, ..run }, hole.is_hole))
            }
            None => {
                let status = block_on(self.base.block_status_deep(run))?;
                Ok((status.range.intersect(&run), status.kind != StatusKind::Data))
            }
        }
    }

    /// Reads a range; less at the end of the disk.
    ///
    /// # Errors
    /// If base or log cannot be read.
    pub fn read(&mut self, range: ByteRange) -> Result<Vec<u8>> {
        let read = self.read_state(range);
        self.note_failure(read)
    }

    fn read_state(&mut self, range: ByteRange) -> Result<Vec<u8>> {
        let range = range.intersect(&ByteRange { offset: 0, len: self.size() });
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let unit = self.base.limits().request_alignment.max(SECTOR_SIZE);
        let end = align_up(range.end(), unit).unwrap_or(range.end()).min(self.size());
        let around = ByteRange::between(align_down(range.offset, unit), end);
        self.note_what_is_not_written(around);
        let mut buf = AlignedBuf::zeroed(around.len as usize, PAGE as usize);
        block_on(self.read_below(around, &buf.buffers()))?;
        let bytes = buf.as_slice();
        self.lay_written_over(around, bytes);
        let skipped = (range.offset - around.offset) as usize;
        Ok(bytes[skipped..skipped + range.len as usize].to_vec())
    }

    /// Keeps what is written until the next state.
    ///
    /// # Errors
    /// If it lies outside of the disk, or too much was written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let written = self.write_state(offset, data);
        self.note_failure(written)
    }

    fn write_state(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let size = self.size();
        let range = ByteRange::new(offset, data.len() as u64).filter(|r| r.end() <= size);
        let range = range.ok_or_else(|| {
            let message = format!("the checker wrote past the end of the disk of {size} bytes");
            Error::new(ErrorKind::OutOfRange, message)
        })?;
        let end = align_up(range.end(), SECTOR_SIZE).unwrap_or(range.end());
        let whole = ByteRange::between(align_down(range.offset, SECTOR_SIZE), end);
        let mut bytes;
        let data = if whole == range {
            data
        } else {
            bytes = self.read_state(whole)?;
            bytes.resize(whole.len as usize, 0);
            let skipped = (range.offset - whole.offset) as usize;
            bytes[skipped..skipped + data.len()].copy_from_slice(data);
            &bytes
        };
        for (i, sector) in data.chunks(SECTOR_SIZE as usize).enumerate() {
            self.keep(whole.offset + i as u64 * SECTOR_SIZE, sector)?;
        }
        Ok(())
    }

    async fn read_below(&self, range: ByteRange, buf: &Buffers) -> Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            let (run, source) = self.view.find(ByteRange::between(at, range.end()));
            let part = buf.slice(run.offset - range.offset, run.len);
            match source {
                None => below::read_base(&self.base, run.offset, part).await?,
                Some(Source::Zero) => part.fill_zero(),
                Some(Source::Log(position)) => {
                    below::read_log(self.history.log(), position, part).await?;
                }
            }
            at = run.end();
        }
        Ok(())
    }

    fn note_what_is_not_written(&mut self, range: ByteRange) {
        if self.written.is_empty() {
            return self.note(range);
        }
        for offset in (range.offset..range.end()).step_by(SECTOR_SIZE as usize) {
            let bit = 1 << (offset % PAGE / SECTOR_SIZE);
            if self.written.get(&(offset / PAGE)).is_none_or(|page| page.valid & bit == 0) {
                self.note(ByteRange { offset, len: SECTOR_SIZE });
            }
        }
    }

    fn note(&mut self, range: ByteRange) {
        match self.looked_at.last_mut() {
            Some(last) if last.end() == range.offset => last.len += range.len,
            _ => self.looked_at.push(range),
        }
    }

    fn lay_written_over(&self, range: ByteRange, bytes: &mut [u8]) {
        if self.written.is_empty() {
            return;
        }
        for offset in (range.offset..range.end()).step_by(SECTOR_SIZE as usize) {
            let Some(page) = self.written.get(&(offset / PAGE)) else { continue };
            let inside = (offset % PAGE) as usize;
            if page.valid & 1 << (inside / SECTOR_SIZE as usize) != 0 {
                let place = (offset - range.offset) as usize;
                let len = (bytes.len() - place).min(SECTOR_SIZE as usize);
                bytes[place..place + len].copy_from_slice(&page.bytes[inside..inside + len]);
            }
        }
    }

    fn keep(&mut self, offset: u64, sector: &[u8]) -> Result<()> {
        let number = offset / PAGE;
        if self.written.len() >= MAX_PAGES && !self.written.contains_key(&number) {
            let message = "the checker wrote more than 1 GiB";
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        let fresh = || Page { valid: 0, bytes: Box::new([0; PAGE as usize]) };
        let page = self.written.entry(number).or_insert_with(fresh);
        let inside = (offset % PAGE) as usize;
        page.valid |= 1 << (inside / SECTOR_SIZE as usize);
        page.bytes[inside..inside + sector.len()].copy_from_slice(sector);
        Ok(())
    }
}
