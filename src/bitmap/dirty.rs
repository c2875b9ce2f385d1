//! A map of what has changed and was not copied yet, in memory.
//!
//! One bit for each granule. Whoever writes to the disk marks what was written, from any thread and
//! without a lock; whoever copies takes marked runs, and gives back what could not be copied.
//!
//! Invariants:
//! * A write is marked after it is on the disk and before anybody hears that it has completed. A
//!   copy takes the mark before it reads. So what was read too early is marked again afterwards.
//! * At most `MAX_GRANULES` bits, whatever the size of the disk: granules of large disks are
//!   larger.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use crate::units::ByteRange;

/// The smallest granule, in bytes.
const MIN_GRANULE: u64 = 64 << 10;
/// The most granules: half a MiB of memory.
const MAX_GRANULES: u64 = 4 << 20;
/// Bits in a word.
const WORD: u64 = 64;

/// See the [module](self).
#[derive(Debug)]
pub struct DirtyMap {
    /// Size of the disk in bytes.
    size: u64,
    granule: u64,
    words: Box<[AtomicU64]>,
    /// How many bits are set; for a moment less, while one that was just set is taken.
    marked: AtomicI64,
}

impl DirtyMap {
    /// A map of a disk of this size, with nothing marked.
    pub fn new(size: u64) -> DirtyMap {
        let granule = size.div_ceil(MAX_GRANULES).next_power_of_two().max(MIN_GRANULE);
        let words = size.div_ceil(granule).div_ceil(WORD);
        DirtyMap {
            size,
            granule,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            marked: AtomicI64::new(0),
        }
    }

    /// Bytes for which a bit stands.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// How many bytes are marked, in whole granules.
    pub fn bytes(&self) -> u64 {
        let marked = self.marked.load(Ordering::SeqCst).max(0) as u64;
        (marked * self.granule).min(self.size)
    }

    /// Whether nothing is marked.
    pub fn is_clean(&self) -> bool {
        self.marked.load(Ordering::SeqCst) <= 0
    }

    /// Marks all granules that the range touches.
    pub fn mark(&self, range: ByteRange) {
        let inside = range.intersect(&ByteRange { offset: 0, len: self.size });
        if inside.is_empty() {
            return;
        }
        let (first, last) = (inside.offset / self.granule, (inside.end() - 1) / self.granule);
        for word in first / WORD..=last / WORD {
            let mask = word_mask(word, first, last);
            let old = self.words[word as usize].fetch_or(mask, Ordering::SeqCst);
            let new = i64::from((mask & !old).count_ones());
            self.marked.fetch_add(new, Ordering::SeqCst);
        }
    }

    /// Takes the next marked run at or behind `from`, or else from the start of the disk: at least a
    /// granule, and no more than `max` bytes if that is more than one. `None` if nothing is marked.
    pub fn take(&self, from: u64, max: u64) -> Option<Taken<'_>> {
        let granules = self.size.div_ceil(self.granule);
        let from = (from / self.granule).min(granules);
        let first = self.find(from, granules).or_else(|| self.find(0, from))?;
        let most = (max / self.granule).max(1);
        let mut end = first;
        while end < granules && end - first < most && self.clear(end) {
            end += 1;
        }
        if end == first {
            // Somebody else took it in between.
            return self.take(first * self.granule, max);
        }
        let range = ByteRange::between(first * self.granule, (end * self.granule).min(self.size));
        Some(Taken { map: self, range })
    }

    /// The first marked granule in a run of them.
    fn find(&self, first: u64, end: u64) -> Option<u64> {
        let mut at = first;
        while at < end {
            let word = self.words[(at / WORD) as usize].load(Ordering::SeqCst) >> (at % WORD);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / WORD + 1) * WORD;
        }
        None
    }

    /// Clears a bit; whether it was set.
    fn clear(&self, granule: u64) -> bool {
        let bit = 1 << (granule % WORD);
        let was = self.words[(granule / WORD) as usize].fetch_and(!bit, Ordering::SeqCst);
        let was_set = was & bit != 0;
        if was_set {
            self.marked.fetch_sub(1, Ordering::SeqCst);
        }
        was_set
    }
}

/// The bits of a word that stand for granules from `first` to `last`.
fn word_mask(word: u64, first: u64, last: u64) -> u64 {
    let low = first.saturating_sub(word * WORD);
    let high = (last - word * WORD).min(WORD - 1);
    (u64::MAX << low) & (u64::MAX >> (WORD - 1 - high))
}

/// A run that somebody is copying. What is left of it when it is dropped is marked again.
#[derive(Debug)]
#[must_use]
pub struct Taken<'a> {
    map: &'a DirtyMap,
    range: ByteRange,
}

impl Taken<'_> {
    /// What is to be copied still.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// So many bytes at the start were copied.
    pub fn advance(&mut self, done: u64) {
        self.range = ByteRange::between(
            self.range.offset.saturating_add(done).min(self.range.end()),
            self.range.end(),
        );
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.map.mark(self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: u64 = MIN_GRANULE;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange { offset, len }
    }

    #[test]
    fn what_was_marked_is_taken_once() {
        let map = DirtyMap::new(200 * G + 512);
        assert!(map.is_clean() && map.take(0, G).is_none());
        map.mark(range(63 * G + 5, 2 * G));
        map.mark(range(200 * G, 512));
        map.mark(range(200 * G, 4096));
        assert_eq!(map.bytes(), 4 * G);
        let mut taken = map.take(0, 100 * G).unwrap();
        assert_eq!(taken.range(), range(63 * G, 3 * G));
        taken.advance(G);
        drop(taken);
        assert_eq!(map.bytes(), 3 * G, "what was not copied is marked again");
        let mut last = map.take(66 * G, G).unwrap();
        assert_eq!(last.range(), range(200 * G, 512));
        last.advance(512);
        drop(last);
        for at in [64, 65] {
            let mut taken = map.take(u64::MAX, 1).unwrap();
            assert_eq!(taken.range(), range(at * G, G));
            taken.advance(G);
        }
        assert!(map.is_clean());
    }

    #[test]
    fn masks_cover_whole_and_partial_words() {
        assert_eq!(word_mask(0, 0, 0), 1);
        assert_eq!(word_mask(0, 3, 70), u64::MAX << 3);
        assert_eq!(word_mask(1, 3, 70), 0x7f);
        assert_eq!(word_mask(1, 3, 700), u64::MAX);
    }

    #[test]
    fn granules_of_large_disks_are_larger() {
        assert_eq!(DirtyMap::new(1 << 30).granule(), G);
        let map = DirtyMap::new(16 << 40);
        assert_eq!(map.granule(), 4 << 20);
        map.mark(range((16 << 40) - 1, 1));
        assert_eq!(map.bytes(), 4 << 20);
    }
}
