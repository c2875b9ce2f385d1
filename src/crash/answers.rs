//! Answers that earlier checks have given already: a state that differs from a checked one only where
//! the checker did not look has the same verdict.
//!
//! A checker says what it says because of what it read, and of a disk it reads little: `e2fsck` no
//! data of files, a journal's recovery no transaction without its commit. The states of one epoch
//! differ in what the epoch's writes left and nowhere else. So if all that was read of it in one state
//! is the same in another, a checker that does the same on the same disk reads the same there, asks
//! for the same next, and ends the same.
//!
//! ```text
//! look     the runs of the epoch that one checker read, in part or whole
//! answers  for each look the fingerprints, of these runs alone, of the states that passed
//! ```
//!
//! Only good verdicts are kept: a state that is not good is always looked at itself.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::crash::fingerprint::Prints;
use crate::crash::name::StateName;
use crate::units::ByteRange;

/// How many looks of an epoch are kept. Each costs every state of it a fingerprint.
const MAX_LOOKS: usize = 256;

/// What is known of one epoch's states. See the [module](self).
#[derive(Debug)]
pub struct Answers {
    prints: Arc<Prints>,
    /// What the epoch's writes touch, in the order of the disk.
    runs: Vec<ByteRange>,
    looks: HashMap<Vec<u32>, Look>,
}

/// What one or more checkers looked at.
#[derive(Debug)]
struct Look {
    prints: Prints,
    /// What was there when they said that all was good, and what they had been promised.
    good: HashSet<(u128, u64)>,
}

impl Answers {
    /// Nothing known yet.
    pub fn new(prints: Arc<Prints>) -> Answers {
        let runs = prints.runs();
        Answers { prints, runs, looks: HashMap::new() }
    }

    /// Whether a checker that was told `promised` has passed a state that was the same wherever it
    /// looked.
    pub fn has(&self, name: &StateName, promised: u64) -> bool {
        self.looks.values().any(|look| look.good.contains(&(look.prints.of(name), promised)))
    }

    /// A checker that was told `promised` has passed this state, and has read these ranges of it.
    pub fn learn(&mut self, name: &StateName, promised: u64, read: &[ByteRange]) {
        let looked_at = self.looked_at(read);
        if self.looks.len() >= MAX_LOOKS && !self.looks.contains_key(&looked_at) {
            return;
        }
        let look = self.looks.entry(looked_at).or_insert_with_key(|looked_at| {
            let offsets = looked_at.iter().map(|run| self.runs[*run as usize].offset);
            Look { prints: self.prints.within(&offsets.collect()), good: HashSet::new() }
        });
        look.good.insert((look.prints.of(name), promised));
    }

    /// The places in `runs` of those that were read, ascending.
    fn looked_at(&self, read: &[ByteRange]) -> Vec<u32> {
        let mut places: Vec<u32> = Vec::new();
        for range in read {
            let first = self.runs.partition_point(|run| run.end() <= range.offset);
            let behind = self.runs.partition_point(|run| run.offset < range.end());
            places.extend(first as u32..behind as u32);
        }
        places.sort_unstable();
        places.dedup();
        places
    }
}
