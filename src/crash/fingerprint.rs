//! Tells which states are the same disk, without reading them.
//!
//! The fingerprint of a disk is a sum over its 512-byte sectors: each adds a hash of its place and
//! content, less that of what the base has there. So it is kept up to date by what changes, in any
//! order, and an untouched disk has 0.
//!
//! ```text
//! sectors that some entry writes    hashed as they are written; the base's read once, when first needed
//! all other sectors                 change only by discards and by many zeros at a time, from the base's
//!                                   content to zeros
//! ```
//!
//! The second kind may be a whole disk (`fstrim`, write-zeroes), so it must not cost anything for each
//! sector.
//! Zeros in sector n hash to Z(n+1) − Z(n), so that a run of them needs two hashes; the unread
//! content of the base does likewise with another function. Runs where the base is known to be
//! zeros already add nothing.
//!
//! For each epoch the differences are worked out once for each write ([`Prints`]). Sectors that only
//! one of the epoch's writes touches are one sum for that write; those that the same several writes
//! touch are one sum for each of these, of which the last that reached the disk counts. So a state
//! costs an addition for each of its writes and for each way in which they overlap, however long they
//! are.

use std::collections::{BTreeSet, HashMap, HashSet};

use twox_hash::xxhash3_128::Hasher;

use crate::block::Node;
use crate::block::driver::StatusKind;
use crate::crash::history::{Epoch, History};
use crate::crash::name::StateName;
use crate::crash::overlay::{Overlay, Source};
use crate::error::Result;
use crate::io::{AlignedBuf, block_on};
use crate::units::{ByteRange, MIB, SECTOR_SIZE, align_down, align_up};
use crate::write_log::{Entry, Kind};

/// How much is read and hashed at a time, and the fewest zeros that a write is not hashed for.
const PIECE: u64 = MIB;
/// Of a piece that may be zeros, so much is looked at first.
const TASTE: u64 = 4096;
/// Seeds that keep the three kinds of hashes apart from each other.
const ZERO_SEED: u64 = 0x7a65_726f;
const UNREAD_SEED: u64 = 0x756e_7265_6164;
/// One for runs that a torn write has reached in part.
const PART_SEED: u64 = 0x7061_7274;

/// The hash of zeros in `range`.
fn zeros(range: ByteRange) -> u128 {
    boundary(ZERO_SEED, range.end()).wrapping_sub(boundary(ZERO_SEED, range.offset))
}

/// The hash of whatever the base has in `range`, unread.
fn unread(range: ByteRange) -> u128 {
    boundary(UNREAD_SEED, range.end()).wrapping_sub(boundary(UNREAD_SEED, range.offset))
}

fn boundary(seed: u64, offset: u64) -> u128 {
    Hasher::oneshot_with_seed(seed, &offset.to_le_bytes())
}

/// The hash of a sector's content.
fn content(offset: u64, bytes: &[u8]) -> u128 {
    if are_zeros(bytes) {
        return zeros(ByteRange { offset, len: SECTOR_SIZE });
    }
    // Odd numbers, to be no seed of the other kinds.
    Hasher::oneshot_with_seed((offset / SECTOR_SIZE) << 1 | 1, bytes)
}

fn are_zeros(bytes: &[u8]) -> bool {
    // Comparing slices is much faster than looking at each byte.
    const ZEROS: [u8; SECTOR_SIZE as usize] = [0; SECTOR_SIZE as usize];
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Fingerprints of the states of one log, epoch after epoch.
#[derive(Debug)]
pub struct Fingerprints<'a> {
    history: &'a History,
    base: &'a Node,
    /// Which ranges some entry of the log writes, where that is not many zeros.
    written: Overlay,
    /// The ranges in which writes write many zeros, by their entries.
    zeros: HashMap<u64, Vec<ByteRange>>,
    /// How many entries are in the sum.
    entries: u64,
    /// That of the disk after so many entries.
    sum: u128,
    /// Hashes of the sectors that were looked at, as of now; by offset.
    sectors: HashMap<u64, u128>,
    /// What was discarded outside of what is ever written.
    discarded: Overlay,
}

/// What the writes of one epoch do to the fingerprint.
#[derive(Debug)]
pub struct Prints {
    /// That of the disk without any of them.
    sum: u128,
    /// What each write adds by the runs that no other touches.
    alone: Vec<u128>,
    /// The same, run by run, for writes that are torn.
    runs: Vec<Vec<(ByteRange, u128)>>,
    /// Runs that several writes touch, by these.
    shared: Vec<Overlap>,
    /// The ranges of the writes.
    targets: Vec<ByteRange>,
}

/// A run that several writes touch.
#[derive(Clone, Debug)]
struct Shared {
    run: ByteRange,
    /// What is there without any of them.
    before: u128,
    /// The writes and what each leaves there, in order.
    after: Vec<(usize, u128)>,
}

/// All runs that the same several writes touch.
#[derive(Debug, Default)]
struct Overlap {
    /// The writes in their order, and what all runs together add if it is the last of them.
    adds: Vec<(usize, u128)>,
    /// The same, run by run, for writes that are torn.
    runs: Vec<Shared>,
}

/// What one entry leaves in one run.
struct Touch {
    run: ByteRange,
    write: usize,
    after: u128,
}

impl<'a> Fingerprints<'a> {
    /// Those of the states of `history` over `base`.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn new(history: &'a History, base: &'a Node) -> Result<Fingerprints<'a>> {
        let mut prints = Fingerprints {
            history,
            base,
            written: Overlay::default(),
            zeros: HashMap::new(),
            entries: 0,
            sum: 0,
            sectors: HashMap::new(),
            discarded: Overlay::default(),
        };
        for entry in history.index().entries().iter().filter(|entry| entry.kind() == Kind::Write) {
            let zeros = many_zeros(history, entry)?;
            for part in between(entry.target, &zeros) {
                prints.written.put(part, Source::Zero);
            }
            if !zeros.is_empty() {
                prints.zeros.insert(entry.number, zeros);
            }
        }
        Ok(prints)
    }

    /// Works out what the writes of an epoch do. Epochs are asked for in the order of the log.
    ///
    /// # Errors
    /// If base or log cannot be read.
    pub fn epoch(&mut self, epoch: &Epoch) -> Result<Prints> {
        assert!(epoch.start >= self.entries, "epochs are asked for in their order");
        while self.entries < epoch.start {
            let before =
                Epoch { start: self.entries, end: epoch.start, writes: vec![self.entries] };
            let entry = self.history.entry(self.entries);
            if matches!(entry.kind(), Kind::Write | Kind::Discard) {
                self.apply(&before)?;
            }
            self.entries += 1;
        }
        let touches = self.touches(epoch)?;
        self.prints(epoch, touches)
    }

    /// Makes the only write of `epoch` part of the sum.
    fn apply(&mut self, epoch: &Epoch) -> Result<()> {
        for touch in self.touches(epoch)? {
            let before = self.hash_of(touch.run)?;
            self.sum = self.sum.wrapping_add(touch.after).wrapping_sub(before);
            if self.is_written(touch.run.offset) {
                self.sectors.insert(touch.run.offset, touch.after);
            } else {
                self.discarded.put(touch.run, Source::Zero);
            }
        }
        Ok(())
    }

    fn prints(&mut self, epoch: &Epoch, touches: Vec<Touch>) -> Result<Prints> {
        let count = epoch.writes.len();
        let mut by_run: HashMap<u64, Shared> = HashMap::new();
        for touch in touches {
            let offset = touch.run.offset;
            let shared = match by_run.entry(offset) {
                std::collections::hash_map::Entry::Occupied(shared) => shared.into_mut(),
                std::collections::hash_map::Entry::Vacant(place) => {
                    let before = self.hash_of(touch.run)?;
                    place.insert(Shared { run: touch.run, before, after: Vec::new() })
                }
            };
            shared.after.push((touch.write, touch.after));
        }
        let mut prints = Prints {
            sum: self.sum,
            alone: vec![0; count],
            runs: vec![Vec::new(); count],
            shared: Vec::new(),
            targets: epoch.writes.iter().map(|n| self.history.entry(*n).target).collect(),
        };
        let mut overlaps: HashMap<Vec<usize>, Overlap> = HashMap::new();
        for shared in by_run.into_values() {
            match shared.after[..] {
                [(write, after)] => {
                    let difference = after.wrapping_sub(shared.before);
                    prints.alone[write] = prints.alone[write].wrapping_add(difference);
                    prints.runs[write].push((shared.run, difference));
                }
                _ => {
                    let writes = shared.after.iter().map(|(write, _)| *write).collect();
                    overlaps.entry(writes).or_default().add(shared);
                }
            }
        }
        prints.shared = overlaps.into_values().collect();
        Ok(prints)
    }

    fn is_written(&self, offset: u64) -> bool {
        self.written.find(ByteRange { offset, len: 1 }).1.is_some()
    }

    /// What each write of an epoch leaves where. Runs that are not the same do not overlap.
    fn touches(&mut self, epoch: &Epoch) -> Result<Vec<Touch>> {
        let mut touches = Vec::new();
        let entries = epoch.writes.iter().map(|number| self.history.entry(*number));
        let discards = entries.filter(|entry| entry.kind() == Kind::Discard);
        let zeros = epoch.writes.iter().filter_map(|number| self.zeros.get(number)).flatten();
        let ends = |range: ByteRange| [range.offset, range.end()];
        let cuts: BTreeSet<u64> =
            discards.map(|entry| entry.target).chain(zeros.copied()).flat_map(ends).collect();
        for (write, number) in epoch.writes.iter().enumerate() {
            let entry = *self.history.entry(*number);
            match entry.kind() {
                Kind::Write => {
                    let zeros = self.zeros.get(number).cloned().unwrap_or_default();
                    for part in between(entry.target, &zeros) {
                        self.touches_of_data(write, &entry, part, &mut touches)?;
                    }
                    for part in zeros {
                        self.touches_of_zeros(write, part, &cuts, &mut touches)?;
                    }
                }
                _ => self.touches_of_zeros(write, entry.target, &cuts, &mut touches)?,
            }
        }
        Ok(touches)
    }

    fn touches_of_data(
        &mut self,
        write: usize,
        entry: &Entry,
        part: ByteRange,
        touches: &mut Vec<Touch>,
    ) -> Result<()> {
        self.look_at_base(part)?;
        let Some(data) = entry.data() else { return Ok(()) };
        let mut at = part.offset;
        while at < part.end() {
            let len = PIECE.min(part.end() - at);
            let position = data.offset + (at - entry.target.offset);
            let mut read = read_log(self.history, ByteRange { offset: position, len })?;
            for (i, bytes) in read.as_slice().chunks(SECTOR_SIZE as usize).enumerate() {
                let run = ByteRange { offset: at + i as u64 * SECTOR_SIZE, len: SECTOR_SIZE };
                touches.push(Touch { run, write, after: content(run.offset, bytes) });
            }
            at += len;
        }
        Ok(())
    }

    fn touches_of_zeros(
        &mut self,
        write: usize,
        range: ByteRange,
        cuts: &BTreeSet<u64>,
        touches: &mut Vec<Touch>,
    ) -> Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            let rest = ByteRange::between(at, range.end());
            let (part, source) = self.written.find(rest);
            if source.is_some() {
                self.look_at_base(part)?;
                for offset in (part.offset..part.end()).step_by(SECTOR_SIZE as usize) {
                    let run = ByteRange { offset, len: SECTOR_SIZE };
                    touches.push(Touch { run, write, after: zeros(run) });
                }
                at = part.end();
            } else {
                let cut = cuts.range(at + 1..part.end()).next().copied().unwrap_or(part.end());
                let run = ByteRange::between(at, cut);
                touches.push(Touch { run, write, after: zeros(run) });
                at = cut;
            }
        }
        Ok(())
    }

    /// The hash of a run as it is after the entries in the sum.
    fn hash_of(&mut self, run: ByteRange) -> Result<u128> {
        if let Some(hash) = self.sectors.get(&run.offset) {
            return Ok(*hash);
        }
        let (mut hash, mut at) = (0u128, run.offset);
        while at < run.end() {
            let (part, source) = self.discarded.find(ByteRange::between(at, run.end()));
            let (part, is_zero) = match source {
                Some(_) => (part, true),
                None => {
                    let status = block_on(self.base.block_status_deep(part))?;
                    (status.range.intersect(&part), status.kind != StatusKind::Data)
                }
            };
            hash = hash.wrapping_add(if is_zero { zeros(part) } else { unread(part) });
            at = part.end();
        }
        Ok(hash)
    }

    /// Hashes what the base has in sectors that were not looked at yet.
    fn look_at_base(&mut self, range: ByteRange) -> Result<()> {
        let unit = self.base.limits().request_alignment.max(1);
        let mut at = range.offset;
        while at < range.end() {
            let piece = ByteRange::between(at, range.end().min(at + PIECE));
            at = piece.end();
            let mut offsets = (piece.offset..piece.end()).step_by(SECTOR_SIZE as usize);
            if offsets.all(|offset| self.sectors.contains_key(&offset)) {
                continue;
            }
            let end = align_up(piece.end(), unit).unwrap_or(piece.end()).min(self.base.size());
            let around = ByteRange::between(align_down(piece.offset, unit), end);
            let mut buf = AlignedBuf::zeroed(around.len as usize, 4096);
            block_on(self.base.read(around.offset, buf.buffers()))?;
            let skipped = (piece.offset - around.offset) as usize;
            let sectors = buf.as_slice()[skipped..skipped + piece.len as usize].chunks(512);
            for (i, bytes) in sectors.enumerate() {
                let offset = piece.offset + i as u64 * SECTOR_SIZE;
                self.sectors.entry(offset).or_insert_with(|| content(offset, bytes));
            }
        }
        Ok(())
    }
}

/// Where a write writes zeros, a [`PIECE`] and more at a time: such as a host made a hole of, which is
/// not read, and others.
fn many_zeros(history: &History, entry: &Entry) -> Result<Vec<ByteRange>> {
    let mut found: Vec<ByteRange> = Vec::new();
    let Some(data) = entry.data().filter(|data| data.len >= PIECE) else { return Ok(found) };
    let file = history.log().file();
    let mut at = data.offset;
    while at < data.end() {
        let hole = file.hole_at(at)?;
        let run_end = hole.range.end().clamp(at + 1, data.end());
        let end = if hole.is_hole { run_end } else { run_end.min(at + PIECE) };
        let piece = ByteRange::between(at, end);
        if hole.is_hole || is_zero(history, piece)? {
            match found.last_mut() {
                Some(last) if last.end() == at => last.len += piece.len,
                _ => found.push(piece),
            }
        }
        at = end;
    }
    // In whole sectors of the disk.
    let on_disk = |run: ByteRange| {
        let start = align_up(run.offset - data.offset, SECTOR_SIZE)?;
        let end = align_down(run.end() - data.offset, SECTOR_SIZE);
        let base = entry.target.offset;
        (end >= start + PIECE).then(|| ByteRange::between(base + start, base + end))
    };
    Ok(found.into_iter().filter_map(on_disk).collect())
}

/// Whether the log has nothing but zeros in a range.
fn is_zero(history: &History, range: ByteRange) -> Result<bool> {
    for len in [TASTE.min(range.len), range.len] {
        let mut read = read_log(history, ByteRange { len, ..range })?;
        if !are_zeros(read.as_slice()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the log has in a range, which lies in the data of an entry.
fn read_log(history: &History, range: ByteRange) -> Result<AlignedBuf> {
    let buf = AlignedBuf::zeroed(range.len as usize, 4096);
    block_on(history.log().file().read(range.offset, buf.buffers()))?;
    Ok(buf)
}

/// What is left of `range` without `parts` of it, which are in order.
fn between(range: ByteRange, parts: &[ByteRange]) -> Vec<ByteRange> {
    let starts = std::iter::once(range.offset).chain(parts.iter().map(ByteRange::end));
    let ends = parts.iter().map(|part| part.offset).chain([range.end()]);
    let left = starts.zip(ends).map(|(start, end)| ByteRange::between(start, end));
    left.filter(|part| !part.is_empty()).collect()
}

impl Overlap {
    /// Adds a run that the same writes touch as the others.
    fn add(&mut self, run: Shared) {
        self.adds.resize(run.after.len(), (0, 0));
        for (sum, (write, after)) in self.adds.iter_mut().zip(&run.after) {
            *sum = (*write, sum.1.wrapping_add(*after).wrapping_sub(run.before));
        }
        self.runs.push(run);
    }
}

impl Prints {
    /// The fingerprint of a state of the epoch, with a bit for each of its writes.
    pub fn of(&self, name: &StateName) -> u128 {
        let mut sum = self.sum;
        for write in (0..self.alone.len()).filter(|write| name.applied[*write]) {
            match name.tear(write) {
                None => sum = sum.wrapping_add(self.alone[write]),
                Some(_) => {
                    for (run, add) in &self.runs[write] {
                        match self.reach(name, write, *run) {
                            Reached::Whole => sum = sum.wrapping_add(*add),
                            Reached::Part(print) => sum = sum.wrapping_add(print),
                            Reached::Nothing => {}
                        }
                    }
                }
            }
        }
        for overlap in &self.shared {
            if overlap.adds.iter().all(|(write, _)| name.tear(*write).is_none()) {
                let last = overlap.adds.iter().rev().find(|(write, _)| name.applied[*write]);
                sum = sum.wrapping_add(last.map_or(0, |(_, add)| *add));
                continue;
            }
            for shared in &overlap.runs {
                for (write, after) in shared.after.iter().rev() {
                    match self.reach(name, *write, shared.run) {
                        Reached::Whole => {
                            sum = sum.wrapping_add(*after).wrapping_sub(shared.before);
                            break;
                        }
                        // And below it what the others have left.
                        Reached::Part(print) => sum = sum.wrapping_add(print),
                        Reached::Nothing => {}
                    }
                }
            }
        }
        sum
    }

    /// What the epoch's writes touch, in the order of the disk. No two overlap.
    pub fn runs(&self) -> Vec<ByteRange> {
        let alone = self.runs.iter().flatten().map(|(run, _)| *run);
        let shared = self.shared.iter().flat_map(|overlap| &overlap.runs).map(|shared| shared.run);
        let mut runs: Vec<_> = alone.chain(shared).collect();
        runs.sort_unstable_by_key(|run| run.offset);
        runs
    }

    /// Those of a part of the disk: the [runs](Prints::runs) that begin at these offsets.
    pub fn within(&self, part: &HashSet<u64>) -> Prints {
        let is_part = |run: &ByteRange| part.contains(&run.offset);
        let of_write = |all: &Vec<(ByteRange, u128)>| -> Vec<(ByteRange, u128)> {
            all.iter().filter(|(run, _)| is_part(run)).copied().collect()
        };
        let runs: Vec<_> = self.runs.iter().map(of_write).collect();
        let sum = |runs: &Vec<(ByteRange, u128)>| {
            runs.iter().fold(0u128, |sum, (_, add)| sum.wrapping_add(*add))
        };
        let of_overlap = |all: &Overlap| {
            let mut overlap = Overlap::default();
            all.runs
                .iter()
                .filter(|shared| is_part(&shared.run))
                .for_each(|s| overlap.add(s.clone()));
            overlap
        };
        Prints {
            sum: 0,
            alone: runs.iter().map(sum).collect(),
            runs,
            shared: self.shared.iter().map(of_overlap).filter(|o| !o.runs.is_empty()).collect(),
            targets: self.targets.clone(),
        }
    }

    /// How much of what a write left in a run is part of the state.
    fn reach(&self, name: &StateName, write: usize, run: ByteRange) -> Reached {
        if !name.applied[write] {
            return Reached::Nothing;
        }
        let Some(kept) = name.tear(write) else { return Reached::Whole };
        let part = kept.of(self.targets[write]).intersect(&run);
        match part.len {
            0 => Reached::Nothing,
            len if len == run.len => Reached::Whole,
            // A run that is longer than a sector is of zeros. What they replace was not read, so all
            // that can be told is that it is this part and no other.
            _ => {
                let place = [part.offset, part.end(), write as u64].map(u64::to_le_bytes);
                Reached::Part(Hasher::oneshot_with_seed(PART_SEED, place.as_flattened()))
            }
        }
    }
}

/// See [`Prints::reach`].
enum Reached {
    Nothing,
    Whole,
    /// With a fingerprint for the part.
    Part(u128),
}
