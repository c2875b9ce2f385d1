//! One state at a time: where each byte of it lies.
//!
//! ```text
//! read ──► the epoch's writes that reached the disk ──► all that was flushed ──► base
//!              (rebuilt for each state)                   (grows as states go on)
//! ```
//!
//! Going on to a later epoch applies the entries in between to the lower of the two, so a walk
//! through the whole log applies each entry once.

use crate::crash::history::{Epoch, History};
use crate::crash::name::StateName;
use crate::crash::overlay::{Overlay, Source};
use crate::error::Result;
use crate::units::ByteRange;
use crate::write_log::{Entry, Kind};

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub struct View {
    /// How many entries are in `flushed`.
    entries: u64,
    flushed: Overlay,
    epoch: Overlay,
}

impl View {
    /// Shows the state `name` from now on. Returns the ranges of the disk that may have changed, and
    /// all that the writes of its epoch touch whether they are part of it or not, in no order.
    ///
    /// # Errors
    /// If the log has no such state; then the view shows what it did.
    pub fn show(&mut self, history: &History, name: &StateName) -> Result<Vec<ByteRange>> {
        let (epoch, name) = history.expanded(name)?;
        let mut changed: Vec<_> = self.epoch.ranges().collect();
        if epoch.start < self.entries {
            changed.extend(self.flushed.ranges());
            self.flushed.clear();
            self.entries = 0;
        }
        while self.entries < epoch.start {
            let entry = history.entry(self.entries);
            if let Some(source) = source(entry) {
                self.flushed.put(entry.target, source);
                changed.push(entry.target);
            }
            self.entries += 1;
        }
        self.rebuild_epoch(history, &epoch, &name);
        changed.extend(epoch.writes.iter().map(|number| history.entry(*number).target));
        Ok(changed)
    }

    /// The run that begins at `range.offset`, no longer than `range`, and where it lies; `None` is
    /// the base.
    pub fn find(&self, range: ByteRange) -> (ByteRange, Option<Source>) {
        let (run, source) = self.epoch.find(range);
        match source {
            Some(source) => (run, Some(source)),
            None => self.flushed.find(run),
        }
    }

    fn rebuild_epoch(&mut self, history: &History, epoch: &Epoch, name: &StateName) {
        self.epoch.clear();
        for (i, number) in epoch.writes.iter().enumerate() {
            let entry = history.entry(*number);
            let Some(reached) = history.reached(epoch, name, i) else { continue };
            match source(entry) {
                Some(Source::Log(data)) => {
                    let skipped = reached.offset - entry.target.offset;
                    self.epoch.put(reached, Source::Log(data + skipped));
                }
                Some(Source::Zero) => self.epoch.put(reached, Source::Zero),
                None => {}
            }
        }
    }
}

/// Where the bytes that an entry leaves on the disk lie.
fn source(entry: &Entry) -> Option<Source> {
    match entry.kind() {
        Kind::Write => entry.data().map(|data| Source::Log(data.offset)),
        Kind::Discard => Some(Source::Zero),
        Kind::Flush | Kind::Mark => None,
    }
}
