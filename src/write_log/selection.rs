//! A part of a log: where to begin and where to stop, as `replay-log` selects it.
//!
//! Entries count from 0. A mark to start from is skipped, the mark to end at is the last entry of
//! the part. Where several conditions for the end are given, the first that is met decides, with
//! one exception that is `replay-log`'s: once there is a mark to end at, flushes and FUA writes do
//! not stop. The first entry may already be the last.

use crate::error::{Error, Result};
use crate::write_log::{Entry, Flags, Kind, Log, Mark, Walk};

/// Where a part begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// At this entry.
    Entry(u64),
    /// Just after the first mark with this text.
    AfterMark(String),
}

/// Where a part ends. Without any condition, at the end of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// After this many entries; 0 for no limit.
    pub limit: u64,
    /// After the first mark with this text.
    pub end_mark: Option<String>,
    /// After the first entry that is a flush.
    pub next_flush: bool,
    /// After the first entry that is a FUA write.
    pub next_fua: bool,
}

/// What ended a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// As many entries as were asked for.
    Limit,
    /// The mark.
    Mark,
    /// A flush.
    Flush,
    /// A FUA write.
    Fua,
    /// Nothing; there are no more entries.
    EndOfLog,
}

impl Stopped {
    /// The word for it in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Stopped::Limit => "limit",
            Stopped::Mark => "mark",
            Stopped::Flush => "flush",
            Stopped::Fua => "fua",
            Stopped::EndOfLog => "end-of-log",
        }
    }
}

impl Stop {
    /// Whether the part ends with `entry`, its `count`th. `mark` is its text, should it be one.
    pub fn at(&self, entry: &Entry, mark: &Mark, count: u64) -> Option<Stopped> {
        if self.limit != 0 && count >= self.limit {
            return Some(Stopped::Limit);
        }
        match &self.end_mark {
            Some(end) => {
                (entry.kind() == Kind::Mark && mark.0 == end.as_bytes()).then_some(Stopped::Mark)
            }
            None if self.next_flush && entry.is_flush() => Some(Stopped::Flush),
            None if self.next_fua && entry.flags.has(Flags::FUA) => Some(Stopped::Fua),
            None => None,
        }
    }
}

impl Log {
    /// The entries from `start` on.
    ///
    /// # Errors
    /// Kind [`NotFound`](crate::ErrorKind::NotFound) if there is no such mark,
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) if there is no such entry.
    pub async fn walk_from(&self, start: &Start) -> Result<Walk<'_>> {
        let mut walk = self.walk();
        match start {
            // An empty log may be replayed: it changes nothing.
            Start::Entry(0) => {}
            Start::Entry(first) => {
                if *first >= self.entries() {
                    return Err(Error::invalid(format!(
                        "{}: invalid entry number {first} (the log has {} entries, counted from 0)",
                        self.name(),
                        self.entries()
                    )));
                }
                for _ in 0..*first {
                    walk.next().await?;
                }
            }
            Start::AfterMark(text) => {
                while let Some(entry) = walk.next().await? {
                    if entry.kind() == Kind::Mark && walk.mark().0 == text.as_bytes() {
                        return Ok(walk);
                    }
                }
                return Err(self.no_mark(text));
            }
        }
        Ok(walk)
    }

    /// The error for a mark that was asked for and is not there.
    pub fn no_mark(&self, text: &str) -> Error {
        let message = format!(
            "{}: no mark '{text}' in what was searched (list shows the marks)",
            self.name()
        );
        Error::new(crate::ErrorKind::NotFound, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use crate::io::sim::SimFile;
    use crate::write_log::LogBuilder;
    use std::sync::Arc;

    /// mark a, write, flush, mark b, FUA write, mark a
    fn log() -> Log {
        let bytes = LogBuilder::new(512)
            .mark("a")
            .write(0, &[1; 512])
            .flush()
            .mark("b")
            .entry(Flags::FUA, 512, &[2; 512])
            .mark("a")
            .finish();
        block_on(Log::open(Arc::new(SimFile::from_bytes("w.log", bytes)))).unwrap()
    }

    /// The last entry of a part, and why it is the last.
    fn end(start: Start, stop: Stop) -> (Option<u64>, Stopped) {
        let log = log();
        block_on(async {
            let mut walk = log.walk_from(&start).await.unwrap();
            let (mut last, mut count) = (None, 0);
            while let Some(entry) = walk.next().await.unwrap() {
                (last, count) = (Some(entry.number), count + 1);
                if let Some(why) = stop.at(&entry, walk.mark(), count) {
                    return (last, why);
                }
            }
            (last, Stopped::EndOfLog)
        })
    }

    #[test]
    fn parts_end_where_replay_log_ends_them() {
        let none = Stop::default();
        let mark = |text: &str| Stop { end_mark: Some(text.into()), ..none.clone() };
        let flush = Stop { next_flush: true, ..none.clone() };
        let fua = Stop { next_fua: true, ..none.clone() };
        let from = Start::Entry;
        assert_eq!(end(from(0), none.clone()), (Some(5), Stopped::EndOfLog));
        assert_eq!(end(from(1), Stop { limit: 2, ..none.clone() }), (Some(2), Stopped::Limit));
        assert_eq!(end(from(0), mark("a")), (Some(0), Stopped::Mark));
        assert_eq!(end(from(1), mark("a")), (Some(5), Stopped::Mark));
        assert_eq!(end(Start::AfterMark("a".into()), mark("b")), (Some(3), Stopped::Mark));
        assert_eq!(end(from(0), flush.clone()), (Some(2), Stopped::Flush));
        assert_eq!(end(from(2), flush.clone()), (Some(2), Stopped::Flush));
        assert_eq!(end(from(0), fua), (Some(4), Stopped::Fua));
        let both = Stop { next_flush: true, next_fua: true, ..none.clone() };
        assert_eq!(end(from(3), both), (Some(4), Stopped::Fua));
        // With a mark, flushes do not stop.
        assert_eq!(end(from(0), Stop { next_flush: true, ..mark("b") }), (Some(3), Stopped::Mark));
        assert_eq!(end(from(0), mark("A")), (Some(5), Stopped::EndOfLog));
        assert_eq!(end(from(0), mark("")), (Some(5), Stopped::EndOfLog));
    }

    #[test]
    fn starts_that_are_not_there_are_refused() {
        let log = log();
        let refused =
            |start: Start| block_on(log.walk_from(&start)).map(|_| ()).unwrap_err().to_string();
        assert_eq!(
            refused(Start::Entry(6)),
            "w.log: invalid entry number 6 (the log has 6 entries, counted from 0)"
        );
        assert_eq!(
            refused(Start::AfterMark("c".into())),
            "w.log: no mark 'c' in what was searched (list shows the marks)"
        );
    }
}
