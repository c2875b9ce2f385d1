//! Which parts of the disk may hold what the log does not have, noted where a kill leaves it.
//!
//! A write is on the disk before it is in the log. If the process is killed in between, the disk holds
//! at that place what no entry says, and rightly so. Whoever compares the two later
//! ([`compare`](super::compare)) must know these places:
//!
//! ```text
//! enter(range) ─► the disk ─► the log: its entry and all before it ─► leave
//!      ╳ kill -9: the range is noted          not noted: the log has it ╳
//! ```
//!
//! What does not get its entry (the disk or the log failed, the request was dropped) stays noted.
//!
//! The notes are a file on tmpfs: two stores to memory for each request, gone with the power, and
//! after a power cut nothing is compared. They bear the name of a *session*, which is also in the
//! log's sidecar, so those of another recording are never taken for this one's.
//!
//! ```text
//! 0   magic, session (16 bytes), first entry of the session
//! 64  slots: offset, length (0 if free)   the last one stands for the whole disk
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{Mode, OFlags};

use crate::error::{Result, ResultExt};
use crate::io::SharedMemory;
use crate::units::ByteRange;

const MAGIC: u64 = u64::from_le_bytes(*b"vublkUW1");
/// Where the slots begin, in bytes.
const HEADER_LEN: u64 = 64;
/// Length of a slot, in bytes.
const SLOT_LEN: u64 = 16;
/// How many there are for one request each; when none is free, the one behind them is used by all.
const SLOTS: u16 = 1024;
/// Length of the file, in bytes.
const FILE_LEN: u64 = HEADER_LEN + (SLOTS as u64 + 1) * SLOT_LEN;

/// Where the header's words lie.
mod at {
    pub const MAGIC: u64 = 0;
    pub const SESSION: u64 = 8;
    pub const FIRST: u64 = 24;
}

/// Notes what is under way. Usable from any thread. See the [module](self).
#[derive(Debug, Default)]
pub struct UnderWay(Option<Notes>);

#[derive(Debug)]
struct Notes {
    path: PathBuf,
    memory: SharedMemory,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: Vec<u16>,
    /// How many requests share the last slot.
    crowd: u64,
}

/// The note of one request. Dropped without [`UnderWay::leave`], it stays.
#[derive(Debug)]
#[must_use = "what is in the log must leave"]
pub struct Note(u16);

/// What an earlier process has left.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// The first entry of its session.
    pub first: u64,
    /// Where the disk may hold what the log does not have, since then.
    pub ranges: Vec<ByteRange>,
}

impl UnderWay {
    /// Begins a session whose first entry is `first`, with nothing under way. The file at `path`, which
    /// must be on tmpfs, is made if need be.
    pub fn begin(path: &Path, session: u128, first: u64) -> Result<UnderWay> {
        Notes::begin(path, session, first)
            .map(|notes| UnderWay(Some(notes)))
            .context(|| path.display().to_string())
    }

    /// A request is about to change `range` of the disk.
    pub fn enter(&self, range: ByteRange) -> Note {
        self.0.as_ref().map_or(Note(SLOTS), |notes| notes.enter(range))
    }

    /// Its entry is in the log, and whole, and all before it.
    pub fn leave(&self, note: Note) {
        if let Some(notes) = &self.0 {
            notes.leave(note);
        }
    }

    /// The recording has ended in order: nobody will ask.
    pub fn remove(&self) {
        if let Some(notes) = &self.0 {
            let _ = std::fs::remove_file(&notes.path);
        }
    }
}

impl Notes {
    fn begin(path: &Path, session: u128, first: u64) -> Result<Notes> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file: File = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?.into();
        let memory = SharedMemory::map(&file, FILE_LEN)?;
        SharedMemory::reserve(&file, 0, FILE_LEN)?;
        // Killed within this, the notes are nobody's.
        memory.store(at::MAGIC, 0);
        memory.copy_in(HEADER_LEN, &[0; (FILE_LEN - HEADER_LEN) as usize]);
        memory.copy_in(at::SESSION, &session.to_le_bytes());
        memory.store(at::FIRST, first);
        memory.store(at::MAGIC, MAGIC);
        let state = State { free: (0..SLOTS).rev().collect(), crowd: 0 };
        Ok(Notes { path: path.to_path_buf(), memory, state: Mutex::new(state) })
    }

    fn enter(&self, range: ByteRange) -> Note {
        let mut state = self.state.lock().unwrap();
        let Some(slot) = state.free.pop() else {
            state.crowd += 1;
            self.store(SLOTS, ByteRange { offset: 0, len: u64::MAX });
            return Note(SLOTS);
        };
        self.store(slot, range);
        Note(slot)
    }

    fn leave(&self, Note(slot): Note) {
        let mut state = self.state.lock().unwrap();
        if slot < SLOTS {
            self.store(slot, ByteRange::default());
            state.free.push(slot);
            return;
        }
        state.crowd -= 1;
        if state.crowd == 0 {
            self.store(slot, ByteRange::default());
        }
    }

    fn store(&self, slot: u16, range: ByteRange) {
        let at = HEADER_LEN + u64::from(slot) * SLOT_LEN;
        self.memory.store(at, range.offset);
        // A slot of no length is free, so the length comes last.
        self.memory.store(at + 8, range.len);
    }
}

impl Left {
    /// What the process that recorded `session` has left at `path`; `None` if that is not known.
    pub fn read(path: &Path, session: u128) -> Option<Left> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file: File = rustix::fs::open(path, flags, Mode::empty()).ok()?.into();
        let mut bytes = vec![0; FILE_LEN as usize];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let word = |at: u64| {
            let bytes = bytes[at as usize..].first_chunk();
            bytes.map_or(0, |word| u64::from_le_bytes(*word))
        };
        let is_of_session = bytes[at::SESSION as usize..].starts_with(&session.to_le_bytes());
        if session == 0 || word(at::MAGIC) != MAGIC || !is_of_session {
            return None;
        }
        let slots = (HEADER_LEN..FILE_LEN).step_by(SLOT_LEN as usize);
        let ranges = slots.filter_map(|at| ByteRange::new(word(at), word(at + 8)));
        let ranges = ranges.filter(|range| !range.is_empty()).collect();
        Some(Left { first: word(at::FIRST), ranges })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64) -> ByteRange {
        ByteRange { offset, len: 512 }
    }

    #[test]
    fn what_has_not_left_is_found() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("notes");
        assert_eq!(Left::read(&path, 7), None);
        let under_way = UnderWay::begin(&path, 7, 3).unwrap();
        let left = |ranges: &[ByteRange]| Some(Left { first: 3, ranges: ranges.to_vec() });
        assert_eq!(Left::read(&path, 7), left(&[]));
        let (one, other) = (under_way.enter(range(0)), under_way.enter(range(512)));
        assert_eq!(Left::read(&path, 7), left(&[range(0), range(512)]));
        under_way.leave(one);
        assert_eq!(Left::read(&path, 7), left(&[range(512)]));
        drop(other);
        assert_eq!(Left::read(&path, 7), left(&[range(512)]), "it failed, so it stays");
        assert_eq!((Left::read(&path, 8), Left::read(&path, 0)), (None, None), "of others");
        let again = UnderWay::begin(&path, 8, 9).unwrap();
        assert_eq!(Left::read(&path, 7), None);
        assert_eq!(Left::read(&path, 8), Some(Left { first: 9, ranges: Vec::new() }));
        again.remove();
        assert_eq!(Left::read(&path, 8), None);
    }

    #[test]
    fn too_many_stand_for_the_whole_disk() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("notes");
        let under_way = UnderWay::begin(&path, 1, 0).unwrap();
        let notes: Vec<_> = (0..u64::from(SLOTS) + 2).map(|i| under_way.enter(range(i))).collect();
        let everything = ByteRange { offset: 0, len: u64::MAX };
        assert_eq!(Left::read(&path, 1).unwrap().ranges.last(), Some(&everything));
        notes.into_iter().for_each(|note| under_way.leave(note));
        assert_eq!(Left::read(&path, 1).unwrap().ranges, []);
    }
}
