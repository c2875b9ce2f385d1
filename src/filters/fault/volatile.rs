//! A write cache that a kill empties: what a disk without power protection does to writes that
//! nobody flushed.
//!
//! Written units are kept in memory and laid over what is read. A flush writes them below. So
//! `kill -9` at any instant leaves on the disk below what was flushed, and of what was written
//! since whatever reached it at once (all of a write, a part of it, or none), which is what a power
//! cut leaves; nothing has to run at the end.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::block::{Node, RangeLock};
use crate::error::Result;
use crate::io::{AlignedBuf, Buffers};
use crate::units::ByteRange;

/// The most that is written at once, in bytes.
const MAX_RUN: u64 = 1 << 20;
/// Alignment of memory that any disk takes.
const MEMORY_ALIGNMENT: usize = 4096;

/// See the [module](self).
#[derive(Debug)]
pub struct Volatile {
    /// Size of a unit in bytes.
    unit: u64,
    /// Contents of the units that are kept, by the number of the unit.
    units: Mutex<BTreeMap<u64, Box<[u8]>>>,
    /// Shared by reads, exclusive for whoever changes what is kept.
    order: RangeLock,
}

impl Volatile {
    /// An empty one, of units of so many bytes.
    pub fn new(unit: u64) -> Volatile {
        Volatile { unit, units: Mutex::default(), order: RangeLock::new() }
    }

    /// How many bytes are kept.
    pub fn len(&self) -> u64 {
        self.units.lock().unwrap().len() as u64 * self.unit
    }

    /// Whether the range is the disk's alone.
    pub fn is_clear(&self, range: ByteRange) -> bool {
        self.units.lock().unwrap().range(self.numbers(range)).next().is_none()
    }

    fn numbers(&self, range: ByteRange) -> std::ops::Range<u64> {
        range.offset / self.unit..range.end().div_ceil(self.unit)
    }

    /// The run of kept or not kept units that begins with the range, and which of the two it is.
    pub fn run(&self, range: ByteRange) -> (ByteRange, bool) {
        let units = self.units.lock().unwrap();
        let numbers = self.numbers(range);
        let kept = units.contains_key(&numbers.start);
        let end = match kept {
            true => numbers.clone().find(|number| !units.contains_key(number)),
            false => units.range(numbers.clone()).next().map(|(number, _)| *number),
        };
        let end = end.unwrap_or(numbers.end) * self.unit;
        (ByteRange::between(range.offset, end.min(range.end())), kept)
    }

    /// Reads what is kept, and the rest from below.
    pub async fn read(&self, below: &Node, offset: u64, buf: Buffers) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        let _order = self.order.shared(range).await;
        below.read(offset, buf.clone()).await?;
        for (number, bytes) in self.units.lock().unwrap().range(self.numbers(range)) {
            buf.slice(number * self.unit - offset, self.unit).copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Takes a write: `reached` of it goes below at once, durably with `fua`; the rest is kept.
    pub async fn write(
        &self,
        below: &Node,
        offset: u64,
        buf: &Buffers,
        reached: ByteRange,
        fua: bool,
    ) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        // The guest may change its memory meanwhile.
        let mut copy = AlignedBuf::zeroed(buf.len() as usize, MEMORY_ALIGNMENT);
        buf.copy_to_slice(copy.as_slice());
        let _order = self.order.exclusive(range).await;
        if !reached.is_empty() {
            let part = copy.buffers().slice(reached.offset - offset, reached.len);
            below.write(reached.offset, part, fua).await?;
        }
        let bytes = copy.to_vec();
        let through = self.numbers(reached);
        let mut units = self.units.lock().unwrap();
        for (number, bytes) in self.numbers(range).zip(bytes.chunks(self.unit as usize)) {
            match !reached.is_empty() && through.contains(&number) {
                true => drop(units.remove(&number)),
                false => drop(units.insert(number, bytes.into())),
            }
        }
        Ok(())
    }

    /// Does something to the range below that what is kept of it must not hide.
    pub async fn replace(
        &self,
        range: ByteRange,
        change: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let _order = self.order.exclusive(range).await;
        change.await?;
        let mut units = self.units.lock().unwrap();
        self.numbers(range).for_each(|number| drop(units.remove(&number)));
        Ok(())
    }

    /// Writes all that is kept now; what comes meanwhile may stay.
    ///
    /// # Errors
    /// What could not be written is kept.
    pub async fn write_back(&self, below: &Node) -> Result<()> {
        let mut at = 0;
        loop {
            let first = self.units.lock().unwrap().range(at..).next().map(|(number, _)| *number);
            let Some(first) = first else { return Ok(()) };
            let start = first * self.unit;
            let longest = ByteRange { offset: start, len: MAX_RUN.max(self.unit) };
            let (run, _) = self.run(longest);
            at = run.end() / self.unit;
            let _order = self.order.exclusive(run).await;
            self.write_run(below, run).await?;
        }
    }

    /// Writes what is kept of a range, which nobody else changes.
    async fn write_run(&self, below: &Node, range: ByteRange) -> Result<()> {
        let mut left = range;
        while !left.is_empty() {
            let (run, kept) = self.run(left);
            left = ByteRange::between(run.end(), range.end());
            if !kept {
                continue;
            }
            let mut bytes = Vec::with_capacity(run.len as usize);
            for (_, unit) in self.units.lock().unwrap().range(self.numbers(run)) {
                bytes.extend_from_slice(unit);
            }
            let copy = AlignedBuf::from_slice(&bytes, MEMORY_ALIGNMENT);
            below.write(run.offset, copy.buffers(), false).await?;
            let mut units = self.units.lock().unwrap();
            self.numbers(run).for_each(|number| drop(units.remove(&number)));
        }
        Ok(())
    }
}
