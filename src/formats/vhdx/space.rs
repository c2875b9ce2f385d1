//! Places for new blocks in the file, and what becomes of the places of freed ones.
//!
//! ```text
//! freed ──► in a log entry on disk ──► nobody uses it any more ──► hole punched ──► free ──► used again
//!           (journal: a commit)        (pins: a generation)        (zeros)
//! ```
//!
//! A place is given away again only at the end of this way. Before its freeing is on disk, a power
//! cut could bring the old mapping back, which would then show another block's data; and a request
//! that was under way when the block was freed may still read or write there.
//!
//! New space at the end of the file reads as zeros, so a mapping to it may reach the disk before
//! the data does. Space that is used again is zeroed first, and whoever maps it must see to it that
//! data and zeros are on disk before the mapping is.
//!
//! The lowest place is used first, so that what becomes free gathers at the end of the file, where it
//! can be cut off.

use std::collections::{BTreeMap, BTreeSet};

use crate::units::{ByteRange, MIB};

use super::bat::Checker;
use super::scan::Used;

/// The most free places that are known at a time: a file may be long, and have next to nothing in it.
/// What does not count is found when the image is opened again, and cut off if it is at the end.
const MAX_PLACES: usize = 1 << 18;

/// A place for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where in the file.
    pub offset: u64,
    /// Whether it is new space at the end of the file.
    pub is_fresh: bool,
    /// Whether it reads as zeros once the file is long enough.
    pub is_zeroed: bool,
}

/// The free space of a file.
#[derive(Debug)]
pub struct Space {
    block_size: u64,
    /// Everything from here on was never used.
    end: u64,
    /// Free places of a block's size, with whether they read as zeros.
    free: BTreeMap<u64, bool>,
    /// Free places of 1 MiB, too small for a block. Never zeroed.
    scraps: BTreeSet<u64>,
    /// What is free behind all that is in use or known, up to the end as it was at first.
    unknown: Option<ByteRange>,
}

impl Space {
    /// Of a file of `file_len` bytes. Without `used`, what is free inside of it is not known.
    pub fn new(checker: &Checker, file_len: u64, used: Option<&Used>) -> Space {
        let block_size = checker.geometry.block_size();
        // A region that nobody knows may lie behind the end of the file.
        let reserved = checker.reserved.iter().map(|range| range.end());
        let end = reserved.fold(file_len, u64::max).next_multiple_of(MIB);
        let (free, scraps) = (BTreeMap::new(), BTreeSet::new());
        let mut space = Space { block_size, end, free, scraps, unknown: None };
        if let Some(used) = used {
            let blocks = used.blocks.iter().chain(&used.anchors);
            let mut taken: Vec<ByteRange> = blocks.map(|b| Used::range(checker, b)).collect();
            taken.extend(&checker.reserved);
            taken.sort_unstable_by_key(|range| range.offset);
            // Of the last block of the disk, no more than the disk has need be in the file.
            let ends = used.blocks.iter().map(|block| Used::range(checker, block).end());
            space.end = ends.fold(space.end, u64::max);
            space.add_gaps(&taken);
        }
        space
    }

    fn add_gaps(&mut self, taken: &[ByteRange]) {
        let mut at = 0;
        let end = ByteRange { offset: self.end, len: 0 };
        for range in taken.iter().chain([&end]) {
            let gap_end = range.offset.min(self.end);
            while at + self.block_size <= gap_end && self.free.len() < MAX_PLACES {
                self.free.insert(at, false);
                at += self.block_size;
            }
            let is_scrap = at + self.block_size > gap_end;
            while is_scrap && at + MIB <= gap_end && self.scraps.len() < MAX_PLACES {
                self.scraps.insert(at);
                at += MIB;
            }
            // After the last gap it stays.
            self.unknown = (at < gap_end).then(|| ByteRange::between(at, gap_end));
            at = at.max(range.end()).next_multiple_of(MIB);
        }
    }

    /// A place for a payload block.
    pub fn take_block(&mut self) -> Place {
        match self.free.pop_first() {
            Some((offset, is_zeroed)) => Place { offset, is_fresh: false, is_zeroed },
            None => self.take_fresh(self.block_size),
        }
    }

    /// A place for a payload block that is ready: it reads as zeros, and lies within a file of
    /// `file_len` bytes. `None` if the next place is not.
    pub fn take_ready_block(&mut self, file_len: u64) -> Option<Place> {
        let is_ready = match self.free.first_key_value() {
            Some((offset, is_zeroed)) => *is_zeroed && offset + self.block_size <= file_len,
            None => self.end + self.block_size <= file_len,
        };
        is_ready.then(|| self.take_block())
    }

    /// Where the part of the file begins that was never used.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// A place for a sector bitmap block.
    pub fn take_bitmap(&mut self) -> Place {
        if self.block_size == MIB {
            return self.take_block();
        }
        match self.scraps.pop_first() {
            Some(offset) => Place { offset, is_fresh: false, is_zeroed: false },
            None => self.take_fresh(MIB),
        }
    }

    /// Counts what is free just before the part that was never used to that part, which then begins
    /// behind the last place that is in use.
    pub fn let_go_of_end(&mut self) {
        loop {
            let block = self.end.saturating_sub(self.block_size);
            let scrap = self.end.saturating_sub(MIB);
            self.end = if self.free.remove(&block).is_some() {
                block
            } else if self.scraps.remove(&scrap) {
                scrap
            } else if let Some(unknown) = self.unknown.take_if(|unknown| unknown.end() == self.end)
            {
                unknown.offset
            } else {
                return;
            };
        }
    }

    fn take_fresh(&mut self, len: u64) -> Place {
        let offset = self.end;
        self.end += len;
        Place { offset, is_fresh: true, is_zeroed: true }
    }

    /// Gives back a ready place that was not used after all.
    pub fn untake_block(&mut self, place: Place) {
        match place.is_fresh && place.offset + self.block_size == self.end {
            true => self.end = place.offset,
            false => self.give_back(place.offset, place.is_zeroed),
        }
    }

    /// Gives back a place that nothing refers to, of a block's size.
    pub fn give_back(&mut self, offset: u64, is_zeroed: bool) {
        self.free.insert(offset, is_zeroed);
    }

    /// Gives back a place for a sector bitmap block, which is smaller than a block.
    pub fn give_back_bitmap(&mut self, offset: u64) {
        self.scraps.insert(offset);
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::Geometry;
    use super::super::scan::UsedBlock;
    use super::*;

    fn checker(block: u64) -> Checker {
        let geometry = Geometry::of(64 * MIB, block, 512, true);
        Checker { geometry, reserved: vec![ByteRange { offset: 0, len: 4 * MIB }] }
    }

    #[test]
    fn gaps_are_used_before_the_file_grows() {
        let index = checker(2 * MIB).geometry.bitmap_index(0) as u32;
        let used = Used {
            blocks: vec![
                UsedBlock { mib: 6, index: 0 },
                UsedBlock { mib: 8, index },
                UsedBlock { mib: 11, index: 1 },
            ],
            anchors: vec![UsedBlock { mib: 16, index: 2 }],
        };
        let mut space = Space::new(&checker(2 * MIB), 18 * MIB + 5, Some(&used));
        // 4..6, 9..11, 13..15; 15..16 is too small for a block; then the end.
        let place = |mib| Place { offset: mib * MIB, is_fresh: false, is_zeroed: false };
        assert_eq!(space.free.len(), 3);
        assert_eq!([4, 9, 13].map(|_| space.take_block()), [place(4), place(9), place(13)]);
        let fresh = space.take_block();
        assert_eq!((fresh.offset, fresh.is_fresh), (19 * MIB, true));
        let scrap = Place { offset: 15 * MIB, is_fresh: false, is_zeroed: false };
        assert_eq!(space.take_bitmap(), scrap);
        // 18..19 was free, and too small, too.
        assert_eq!([18, 21].map(|_| space.take_bitmap().offset), [18 * MIB, 21 * MIB]);
        space.give_back(9 * MIB, true);
        assert!(space.take_block().is_zeroed);
        assert_eq!(space.take_block().offset, 22 * MIB);
    }

    #[test]
    fn the_lowest_place_is_used_again_first() {
        let mut space = Space::new(&checker(MIB), 4 * MIB, None);
        let places = [(); 4].map(|()| space.take_block().offset);
        for n in [1, 3, 0, 2] {
            space.give_back(places[n], n != 1);
        }
        let ready = |space: &mut Space| {
            space.take_ready_block(99 * MIB).map(|place| (place.offset, place.is_fresh))
        };
        assert_eq!(ready(&mut space), Some((places[0], false)));
        // The next one is not ready, although others are.
        assert_eq!(ready(&mut space), None);
        assert_eq!(space.take_block().offset, places[1]);
        assert_eq!(ready(&mut space), Some((places[2], false)));
    }

    #[test]
    fn what_is_free_at_the_end_is_let_go_of() {
        let used = Used { blocks: vec![UsedBlock { mib: 6, index: 0 }], ..Used::default() };
        let mut space = Space::new(&checker(2 * MIB), 13 * MIB, Some(&used));
        space.let_go_of_end();
        assert_eq!(space.end(), 8 * MIB);
        // 4..6 is still there, and what was let go of is not given to two.
        let offsets = [(); 3].map(|()| space.take_block().offset / MIB);
        assert_eq!(offsets, [4, 8, 10]);
        space.give_back(8 * MIB, true);
        space.let_go_of_end();
        assert_eq!(space.end(), 12 * MIB);
        space.give_back(10 * MIB, true);
        space.let_go_of_end();
        assert_eq!(space.end(), 8 * MIB);
        // Of an image that holds nothing, down to the last structure.
        space.give_back(6 * MIB, true);
        space.give_back(4 * MIB, true);
        space.let_go_of_end();
        assert_eq!(space.end(), 4 * MIB);
    }

    #[test]
    fn the_last_block_may_end_behind_the_file() {
        let used = Used { blocks: vec![UsedBlock { mib: 5, index: 0 }], ..Used::default() };
        let mut space = Space::new(&checker(2 * MIB), 6 * MIB, Some(&used));
        assert_eq!(space.take_block().offset, 7 * MIB);
    }

    #[test]
    fn ready_places_need_nothing_done_to_them() {
        let mut space = Space::new(&checker(2 * MIB), 18 * MIB, None);
        assert_eq!(space.take_ready_block(19 * MIB), None);
        let fresh = space.take_ready_block(20 * MIB).unwrap();
        assert_eq!((fresh.offset, fresh.is_fresh), (18 * MIB, true));
        space.untake_block(fresh);
        assert_eq!((space.end(), space.free.len()), (18 * MIB, 0));
        let [first, _] = [(); 2].map(|()| space.take_ready_block(22 * MIB).unwrap());
        space.untake_block(first);
        let again = space.take_ready_block(22 * MIB).unwrap();
        assert_eq!((again.offset, again.is_fresh, again.is_zeroed), (18 * MIB, false, true));
        space.give_back(4 * MIB, false);
        assert_eq!(space.take_ready_block(99 * MIB), None);
    }

    #[test]
    fn a_place_that_the_file_does_not_hold_yet_is_not_ready() {
        let mut space = Space::new(&checker(2 * MIB), 8 * MIB, None);
        let place = space.take_block().offset;
        space.give_back(place, true);
        assert_eq!(space.take_ready_block(place + 2 * MIB - 512), None);
        assert_eq!(space.take_ready_block(place + 2 * MIB).map(|p| p.offset), Some(place));
    }

    #[test]
    fn a_region_behind_the_end_is_not_used() {
        for used in [None, Some(&Used::default())] {
            let mut checker = checker(2 * MIB);
            checker.reserved.push(ByteRange { offset: 7 * MIB, len: MIB });
            let mut space = Space::new(&checker, 4 * MIB, used);
            let offsets = [(); 3].map(|()| space.take_block().offset / MIB);
            let expected = if used.is_some() { [4, 8, 10] } else { [8, 10, 12] };
            assert_eq!(offsets, expected);
        }
    }

    #[test]
    fn a_long_file_with_next_to_nothing_in_it_takes_little_memory() {
        let mut space = Space::new(&checker(MIB), 1 << 50, Some(&Used::default()));
        assert_eq!((space.free.len(), space.scraps.len()), (MAX_PLACES, 0));
        assert_eq!(space.take_block().offset, 4 * MIB);
    }

    #[test]
    fn a_long_file_is_let_go_of_with_more_free_places_than_are_known() {
        let mut used = Used { blocks: vec![UsedBlock { mib: 6, index: 0 }], ..Used::default() };
        let long = |used: &Used| Space::new(&checker(MIB), 1 << 50, Some(used));
        let mut space = long(&used);
        space.let_go_of_end();
        assert_eq!(space.end(), 7 * MIB);
        // Of what was given away since, and of what lies behind it.
        let mut space = long(&used);
        let places = [(); 4].map(|()| space.take_block().offset / MIB);
        assert_eq!(places, [4, 5, 7, 8]);
        space.let_go_of_end();
        assert_eq!(space.end(), 9 * MIB);
        assert_eq!(space.take_block().offset, 9 * MIB);
        // All that is known lies before what is in use.
        used.blocks.push(UsedBlock { mib: 1 << 20, index: 1 });
        let mut space = long(&used);
        space.let_go_of_end();
        assert_eq!(space.end(), MIB * ((1 << 20) + 1));
    }

    #[test]
    fn what_is_not_known_is_left_alone() {
        let mut space = Space::new(&checker(MIB), 18 * MIB, None);
        assert_eq!(space.take_bitmap().offset, 18 * MIB);
    }
}
