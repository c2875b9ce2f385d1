//! Which ranges of a disk do not come from the base, and where they come from instead.

use std::collections::BTreeMap;

use crate::units::ByteRange;

/// Where a run of a state lies if not in the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the log's file, from this byte on.
    Log(u64),
    /// Nowhere: it reads as zeros, as discarded ranges do.
    Zero,
}

impl Source {
    /// The source of what lies `by` bytes further on.
    fn advanced(self, by: u64) -> Source {
        match self {
            Source::Log(position) => Source::Log(position + by),
            Source::Zero => Source::Zero,
        }
    }
}

/// A map from ranges of the disk to their sources. What was put last lies on top.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    /// First byte to length and source; no two overlap, none is empty.
    pieces: BTreeMap<u64, (u64, Source)>,
}

impl Overlay {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pieces.clear();
    }

    /// How many ranges it keeps apart.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether all is the base's.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Lays `range` over what is there.
    pub fn put(&mut self, range: ByteRange, source: Source) {
        if range.is_empty() {
            return;
        }
        self.cut(range);
        self.pieces.insert(range.offset, (range.len, source));
    }

    /// The run that begins at `range.offset`, no longer than `range`, and where it lies; `None` is
    /// whatever is below.
    pub fn find(&self, range: ByteRange) -> (ByteRange, Option<Source>) {
        let covering = self.pieces.range(..=range.offset).next_back();
        if let Some((&start, &(len, source))) = covering
            && range.offset < start + len
        {
            let run = ByteRange::between(range.offset, (start + len).min(range.end()));
            return (run, Some(source.advanced(range.offset - start)));
        }
        let next = self.pieces.range(range.offset..range.end()).next();
        let end = next.map_or(range.end(), |(&start, _)| start);
        (ByteRange::between(range.offset, end), None)
    }

    /// The ranges, in the order of the disk.
    pub fn ranges(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.pieces.iter().map(|(&offset, &(len, _))| ByteRange { offset, len })
    }

    /// Takes `range` out of all pieces.
    fn cut(&mut self, range: ByteRange) {
        let before = self.pieces.range(..range.offset).next_back();
        if let Some((&start, &(len, source))) = before
            && start + len > range.offset
        {
            self.pieces.insert(start, (range.offset - start, source));
            if start + len > range.end() {
                let rest = (start + len - range.end(), source.advanced(range.end() - start));
                self.pieces.insert(range.end(), rest);
                return;
            }
        }
        while let Some((&start, &(len, source))) =
            self.pieces.range(range.offset..range.end()).next()
        {
            self.pieces.remove(&start);
            if start + len > range.end() {
                let rest = (start + len - range.end(), source.advanced(range.end() - start));
                self.pieces.insert(range.end(), rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::Rng;

    #[test]
    fn the_last_on_top_as_in_an_array() {
        for seed in 0..50 {
            let mut rng = Rng::new(seed);
            let mut overlay = Overlay::default();
            let mut model = vec![None; 200];
            for step in 0..60 {
                let offset = rng.below(200);
                let len = rng.below(200 - offset + 1);
                let zero = rng.one_in(3);
                let source = if zero { Source::Zero } else { Source::Log(step * 1000) };
                overlay.put(ByteRange { offset, len }, source);
                for (i, byte) in
                    model[offset as usize..(offset + len) as usize].iter_mut().enumerate()
                {
                    *byte = Some(source.advanced(i as u64));
                }
                let mut at = 0;
                while at < 200 {
                    let (run, source) = overlay.find(ByteRange::between(at, 200));
                    assert!(run.offset == at && run.len > 0, "seed {seed}");
                    for i in 0..run.len {
                        let expected = source.map(|source| source.advanced(i));
                        assert_eq!(model[(at + i) as usize], expected, "seed {seed}");
                    }
                    at = run.end();
                }
            }
        }
    }
}
