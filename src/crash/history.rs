//! A log taken apart: epochs, and what the name of a state means.
//!
//! An *epoch* is what a power cut may keep in any combination: the writes and discards after one
//! flush and before the next. A flush that carries data makes durable what precedes it; its own
//! data is the first write of the epoch that it begins.
//!
//! A write with FUA was durable when it completed, and the log has it where it completed. So it may
//! be missing only where everything after it in the epoch is missing, too: everything that was submitted
//! after that, where the log's sidecar tells ([`History::learn_order`]). What was in flight together with
//! it may be there without it.
//!
//! A history may be looked at [up to](History::up_to) some entry, as if nothing behind it had happened,
//! and [since](History::since) one: the power fails when the entries before it are there, or later.
//! That leaves the same states, as far as plain writes go: of those that were not flushed by then, any
//! may be lost. But a FUA write that was completed by then is there.

use crate::crash::name::{StateName, Tear};
use crate::error::{Error, ErrorKind, Result};
use crate::io::block_on;
use crate::units::ByteRange;
use crate::write_log::layout::END_MARK;
use crate::write_log::sidecar::Sidecar;
use crate::write_log::{Entry, Flags, Index, Kind, Log, Mark};

/// The writes between two flushes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// How many entries of the log lie before it: its states are named `E<start>:s=…`.
    pub start: u64,
    /// The entry after its last: the next flush, or the end of the log.
    pub end: u64,
    /// The numbers of its writes and discards.
    pub writes: Vec<u64>,
}

/// A log with all its headers in memory.
#[derive(Clone, Debug)]
pub struct History {
    log: Log,
    index: Index,
    /// How many entries are there when the power fails, at least.
    since: u64,
    /// When each entry was submitted and when completed, as numbers of events. Empty if not known.
    order: Vec<(u64, u64)>,
}

impl History {
    /// Reads the headers of a log that belongs to a disk of `size` bytes.
    ///
    /// # Errors
    /// Names the entry that breaks the format, or that does not fit the disk.
    pub fn read(log: Log, size: u64) -> Result<History> {
        let index = block_on(Index::read(&log))?;
        let outside = index.entries().iter().find(|entry| {
            matches!(entry.kind(), Kind::Write | Kind::Discard) && entry.target.end() > size
        });
        if let Some(entry) = outside {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "{}: entry {} writes past the end of the disk: up to byte {}, and the base has \
                     {size}; the base must be the disk as it was when logging began",
                    log.name(),
                    entry.number,
                    entry.target.end()
                ),
            ));
        }
        Ok(History { log, index, since: 0, order: Vec::new() })
    }

    /// Takes over what a sidecar knows of the order in which requests came and went, if it knows that of
    /// every write, and if it matters: without a FUA write no power cut asks for it.
    ///
    /// # Errors
    /// If the sidecar cannot be read.
    pub fn learn_order(&mut self, sidecar: &mut Sidecar) -> Result<()> {
        let entries = self.index.entries();
        if !entries.iter().any(|entry| entry.flags.has(Flags::FUA)) {
            return Ok(());
        }
        let mut order = Vec::with_capacity(entries.len());
        let mut completed = 0;
        for entry in entries {
            if matches!(entry.kind(), Kind::Write | Kind::Discard) {
                let record = block_on(sidecar.record(entry.number))?;
                // As the log has them, or it is the sidecar of another.
                let record = record.filter(|record| {
                    record.completed > completed && record.log_sector == entry.log_sector()
                });
                let Some(record) = record else { return Ok(()) };
                completed = record.completed;
                order.push((record.submitted, record.completed));
            } else {
                order.push((u64::MAX, 0));
            }
        }
        self.order = order;
        Ok(())
    }

    /// The same with this order, which has an item for each entry.
    #[cfg(test)]
    pub fn ordered(mut self, order: Vec<(u64, u64)>) -> History {
        assert_eq!(order.len() as u64, self.len());
        self.order = order;
        self
    }

    /// Whether it is known which writes were in flight together.
    pub fn knows_order(&self) -> bool {
        !self.order.is_empty()
    }

    /// When an entry was submitted, and when completed. What is not known is taken for the order of the
    /// log: submitted when all before it were completed.
    fn order_of(&self, number: u64) -> (u64, u64) {
        self.order.get(number as usize).copied().unwrap_or((u64::MAX, 0))
    }

    /// What had happened when the log had so many entries. Its states have the same names, and are
    /// the same disks, as in the whole.
    pub fn up_to(mut self, entries: u64) -> History {
        self.index.truncate(entries);
        self
    }

    /// What a power cut can leave that comes when the log has so many entries, or later. States with
    /// other names can still be shown, but are not [possible](History::is_possible).
    pub fn since(mut self, entries: u64) -> History {
        self.since = entries;
        self
    }

    /// The log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its entries and marks.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// An entry that exists.
    pub fn entry(&self, number: u64) -> &Entry {
        &self.index.entries()[number as usize]
    }

    /// How many entries there are; the log may have more.
    pub fn len(&self) -> u64 {
        self.index.entries().len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All epochs that have writes and in which the power may fail, in the order of the log, and what
    /// follows the last flush if it has none: that flush has promised the most.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> + '_ {
        let mut next = Some(0);
        std::iter::from_fn(move || {
            loop {
                let epoch = self.window(next?);
                // A flush without data begins nothing by itself.
                next =
                    self.index.entries().get(epoch.end as usize).map(|flush| {
                        if flush.target.is_empty() { epoch.end + 1 } else { epoch.end }
                    });
                let is_after_all = next.is_none() && epoch.start > 0;
                // Until its flush is there, nothing that it makes durable is.
                let may_end = epoch.end >= self.since;
                if may_end && (is_after_all || !epoch.writes.is_empty()) {
                    return Some(epoch);
                }
            }
        })
    }

    /// The epoch that entry `number` belongs to, or that a state after so many entries is in.
    pub fn epoch_of(&self, number: u64) -> Epoch {
        let before = &self.index.entries()[..number.min(self.len()) as usize];
        let start = match self.index.entries().get(number as usize) {
            Some(entry) if entry.is_flush() && !entry.target.is_empty() => number,
            _ => before.iter().rev().find(|entry| entry.is_flush()).map_or(0, |flush| {
                if flush.target.is_empty() { flush.number + 1 } else { flush.number }
            }),
        };
        self.window(start)
    }

    /// The writes that the bits of `E<start>:s=…` stand for.
    pub fn window(&self, start: u64) -> Epoch {
        let mut epoch = Epoch { start, end: self.len(), writes: Vec::new() };
        for entry in self.index.entries().get(start as usize..).unwrap_or_default() {
            if entry.is_flush() && (entry.number != start || entry.target.is_empty()) {
                epoch.end = entry.number;
                break;
            }
            if matches!(entry.kind(), Kind::Write | Kind::Discard) {
                epoch.writes.push(entry.number);
            }
        }
        epoch
    }

    /// Checks that there is such a state.
    ///
    /// # Errors
    /// Says what the log does not have.
    pub fn check(&self, name: &StateName) -> Result<()> {
        let refuse =
            |what: String| Err(Error::invalid(format!("{}: {name}: {what}", self.log.name())));
        if name.prefix > self.len() {
            return refuse(format!("the log has {} entries only", self.len()));
        }
        let epoch = self.window(name.prefix);
        if name.applied.len() > epoch.writes.len() {
            return refuse(format!(
                "{} bits, but only {} writes follow entry {} before the next flush",
                name.applied.len(),
                epoch.writes.len(),
                name.prefix
            ));
        }
        for tear in &name.torn {
            let entry = self.entry(epoch.writes[tear.write]);
            if entry.kind() != Kind::Write {
                return refuse(format!("write {} is a discard, which has no data", tear.write + 1));
            }
            if tear.kept.len() >= entry.target.len {
                return refuse(format!(
                    "write {} has {} bytes, so {} of them are no tear",
                    tear.write + 1,
                    entry.target.len,
                    tear.kept.len()
                ));
            }
        }
        Ok(())
    }

    /// Whether one of an epoch's writes has FUA.
    pub fn is_fua(&self, epoch: &Epoch, write: usize) -> bool {
        self.entry(epoch.writes[write]).flags.has(Flags::FUA)
    }

    /// How many of an epoch's writes have taken their place when the last of those with FUA is there
    /// that no power cut can take any more.
    pub fn promised(&self, epoch: &Epoch) -> usize {
        let before = epoch.writes.partition_point(|number| *number < self.since);
        (0..before).rfind(|write| self.is_fua(epoch, *write)).map_or(0, |last| last + 1)
    }

    /// Whether a write of an epoch, later in the log than one with FUA, may be there without that.
    pub fn may_outlive(&self, epoch: &Epoch, later: usize, fua: usize) -> bool {
        let (submitted, _) = self.order_of(epoch.writes[later]);
        let (_, completed) = self.order_of(epoch.writes[fua]);
        submitted < completed
    }

    /// The state, with the FUA writes that were promised and those without which what is there of it would
    /// not be there. `name` has a bit for each write of the epoch.
    pub fn made_possible(&self, epoch: &Epoch, mut name: StateName) -> StateName {
        let promised = self.promised(epoch);
        let mut youngest = None;
        for write in (0..epoch.writes.len()).rev() {
            if self.must_be_whole(epoch, write, promised, youngest) {
                name.applied[write] = true;
                name.torn.retain(|tear| tear.write != write);
            }
            if name.applied[write] {
                youngest = youngest.max(Some(self.order_of(epoch.writes[write]).0));
            }
        }
        name
    }

    /// Whether a power cut could leave it: a FUA write is whole unless nothing is there that was submitted
    /// after it was completed, and it was not promised before.
    pub fn is_possible(&self, epoch: &Epoch, name: &StateName) -> bool {
        let promised = self.promised(epoch);
        let mut youngest = None;
        (0..epoch.writes.len()).rev().all(|write| {
            let is_there = name.applied.get(write) == Some(&true);
            let is_whole = is_there && name.tear(write).is_none();
            let is_good = is_whole || !self.must_be_whole(epoch, write, promised, youngest);
            if is_there {
                youngest = youngest.max(Some(self.order_of(epoch.writes[write]).0));
            }
            is_good
        })
    }

    /// Whether a write is one with FUA that no power cut takes any more: it was promised, or something is
    /// there that was submitted after it, the last of that at the event `youngest`.
    fn must_be_whole(
        &self,
        epoch: &Epoch,
        write: usize,
        promised: usize,
        youngest: Option<u64>,
    ) -> bool {
        let (_, completed) = self.order_of(epoch.writes[write]);
        self.is_fua(epoch, write)
            && (write < promised || youngest.is_some_and(|youngest| youngest >= completed))
    }

    /// The same state with a bit for each write of its epoch: `E<start of the epoch>:s=…`.
    ///
    /// # Errors
    /// As [`History::check`].
    pub fn expanded(&self, name: &StateName) -> Result<(Epoch, StateName)> {
        self.check(name)?;
        let epoch = self.epoch_of(name.prefix);
        // After a flush with data that is the last thing applied, the next writes follow it.
        let skipped = epoch.writes.partition_point(|number| *number < name.prefix);
        let mut applied = vec![true; skipped];
        applied.extend_from_slice(&name.applied);
        applied.resize(epoch.writes.len(), false);
        let moved = |tear: &Tear| Tear { write: tear.write + skipped, ..*tear };
        let torn = name.torn.iter().map(moved).collect();
        let expanded = StateName { prefix: epoch.start, applied, torn };
        Ok((epoch, expanded))
    }

    /// The shortest name of an expanded state. Of equally short ones, that with the fewest entries.
    pub fn shortest(&self, epoch: &Epoch, name: &StateName) -> StateName {
        let whole = |i: &usize| name.applied[*i] && name.tear(*i).is_none();
        let leading = (0..name.applied.len()).take_while(whole).count();
        let candidate = |skipped: usize| {
            let prefix = match skipped {
                0 => epoch.start,
                n => epoch.writes[n - 1] + 1,
            };
            let applied = name.applied[skipped..].to_vec();
            let moved = |tear: &Tear| Tear { write: tear.write - skipped, ..*tear };
            let torn = name.torn.iter().map(moved).collect();
            StateName { prefix, applied, torn }.trimmed()
        };
        // Entries that are marks may make a number longer than the bits it stands for.
        let names = (0..=leading).map(candidate);
        names.min_by_key(|name| name.to_string().len()).unwrap_or_default()
    }

    /// The last mark that may have been made before the power failed: every state of an epoch could
    /// have been left just before the next flush, after all the epoch's marks. Only a FUA write that
    /// is missing tells that it was earlier. `name` has a bit for each write of the epoch. The mark
    /// that ends a log says nothing of what is on the disk, and does not count.
    pub fn last_mark(&self, epoch: &Epoch, name: &StateName) -> Option<&(u64, Mark)> {
        let is_whole = |i: usize| name.applied.get(i) == Some(&true) && name.tear(i).is_none();
        let lost = epoch
            .writes
            .iter()
            .enumerate()
            .find(|(i, number)| self.entry(**number).flags.has(Flags::FUA) && !is_whole(*i));
        let end = lost.map_or(epoch.end, |(_, number)| *number);
        let mut mark = self.index.mark_before(end);
        while let Some((number, text)) = mark
            && text.0 == END_MARK
        {
            mark = self.index.mark_before(*number);
        }
        mark
    }

    /// The part of a write or discard of a state that reached the disk.
    pub fn reached(&self, epoch: &Epoch, name: &StateName, write: usize) -> Option<ByteRange> {
        let target = self.entry(epoch.writes[write]).target;
        (name.applied.get(write) == Some(&true))
            .then(|| name.tear(write).map_or(target, |kept| kept.of(target)))
    }
}
