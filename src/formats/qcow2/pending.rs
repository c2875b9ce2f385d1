//! Which parts of the disk a kill would set back, were it not for the records in the keep.

use std::collections::BTreeMap;

use crate::units::ByteRange;

/// A set of ranges, each with the number of the checkpoint that will make it durable.
#[derive(Debug, Default)]
pub struct Pending {
    /// Start to (end, checkpoint); the ranges do not overlap.
    ranges: BTreeMap<u64, (u64, u64)>,
}

impl Pending {
    /// Whether any of the range is in the set.
    pub fn overlaps(&self, range: ByteRange) -> bool {
        let before = self.ranges.range(..range.end()).next_back();
        before.is_some_and(|(_, (end, _))| *end > range.offset)
    }

    /// Adds a range; what is in the set already takes the new number, which is never lower.
    pub fn insert(&mut self, range: ByteRange, checkpoint: u64) {
        let (mut start, mut end) = (range.offset, range.end());
        while let Some((&old_start, &(old_end, number))) = self.ranges.range(..end).next_back()
            && old_end > start
        {
            self.ranges.remove(&old_start);
            if old_start < start {
                self.ranges.insert(old_start, (start, number));
            }
            if old_end > end {
                self.ranges.insert(end, (old_end, number));
            }
        }
        // Neighbours with the same number become one range.
        if let Some((&before, &(before_end, number))) = self.ranges.range(..start).next_back()
            && (before_end, number) == (start, checkpoint)
        {
            self.ranges.remove(&before);
            start = before;
        }
        if let Some(&(after_end, number)) = self.ranges.get(&end)
            && number == checkpoint
        {
            self.ranges.remove(&end);
            end = after_end;
        }
        self.ranges.insert(start, (end, checkpoint));
    }

    /// Removes what checkpoint number `checkpoint` and those before it have made durable.
    pub fn retire(&mut self, checkpoint: u64) {
        self.ranges.retain(|_, (_, number)| *number > checkpoint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::Rng;

    #[test]
    fn agrees_with_an_array() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let mut pending = Pending::default();
            let mut model = [0u64; 64];
            let mut checkpoint = 1;
            for _ in 0..100 {
                let offset = rng.below(64);
                let range = ByteRange { offset, len: 1 + rng.below(64 - offset) };
                let part = range.offset as usize..range.end() as usize;
                match rng.below(8) {
                    0 => {
                        let retired = checkpoint - rng.below(2).min(checkpoint);
                        pending.retire(retired);
                        model.iter_mut().filter(|n| **n <= retired).for_each(|n| *n = 0);
                        checkpoint += 1;
                    }
                    1..=3 => {
                        pending.insert(range, checkpoint);
                        model[part].fill(checkpoint);
                    }
                    _ => {
                        let expected = model[part].iter().any(|n| *n != 0);
                        assert_eq!(pending.overlaps(range), expected, "seed {seed}, {range}");
                    }
                }
            }
            let runs = 1 + model.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(pending.ranges.len() <= runs, "seed {seed}: neighbours were not joined");
        }
    }
}
