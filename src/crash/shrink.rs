//! Reduces a failing state to the fewest dropped and torn writes.
//!
//! First every fault is taken back that can be, one after the other, until none can; then, if more
//! than one is left, all smaller sets of faults in the epoch that the budget allows are tried, for
//! there may be another that is smaller. At last the cut is moved as early as it still fails.

use crate::crash::history::{Epoch, History};
use crate::crash::name::StateName;
use crate::error::Result;

/// How many states are checked at most for the second step.
const BUDGET: u64 = 400;

/// The smallest failing state that was found; `name` has a bit for each write of its epoch.
///
/// # Errors
/// Those of `fails`.
pub fn shrink(
    history: &History,
    epoch: &Epoch,
    name: StateName,
    fails: &mut dyn FnMut(&StateName) -> Result<bool>,
) -> Result<StateName> {
    let mut fails = |name: &StateName| Ok(history.is_possible(epoch, name) && fails(name)?);
    let mut least = take_back(name, &mut fails)?;
    if faults(&least) > 1
        && let Some(smaller) = search_smaller(epoch, faults(&least), &mut fails)?
    {
        least = smaller;
    }
    cut_early(least, &mut fails)
}

/// Writes that are missing although a later one is there, and torn ones.
fn faults(name: &StateName) -> usize {
    let last = name.applied.iter().rposition(|applied| *applied).unwrap_or(0);
    name.applied[..last].iter().filter(|applied| !**applied).count() + name.torn.len()
}

fn take_back(
    mut name: StateName,
    fails: &mut dyn FnMut(&StateName) -> Result<bool>,
) -> Result<StateName> {
    loop {
        let before = faults(&name);
        let last = name.applied.iter().rposition(|applied| *applied).unwrap_or(0);
        for write in 0..name.applied.len().min(last + 1) {
            let mut whole = name.clone();
            whole.applied[write] = true;
            whole.torn.retain(|tear| tear.write != write);
            if whole != name && fails(&whole)? {
                name = whole;
            }
        }
        if faults(&name) == before {
            return Ok(name);
        }
    }
}

/// Looks for a failing state with fewer than `most` dropped writes, smallest sets first.
fn search_smaller(
    epoch: &Epoch,
    most: usize,
    fails: &mut dyn FnMut(&StateName) -> Result<bool>,
) -> Result<Option<StateName>> {
    let count = epoch.writes.len();
    let mut budget = BUDGET;
    for size in 0..most.min(3) {
        for last in 0..count {
            let mut dropped: Vec<usize> = (0..size).collect();
            while dropped.last().is_none_or(|top| *top < last) {
                if budget == 0 {
                    return Ok(None);
                }
                budget -= 1;
                let applied = (0..count).map(|i| i <= last && !dropped.contains(&i)).collect();
                let name = StateName { prefix: epoch.start, applied, torn: Vec::new() };
                if fails(&name)? {
                    return Ok(Some(name));
                }
                if !next_combination(&mut dropped, last) {
                    break;
                }
            }
        }
    }
    Ok(None)
}

/// The next set of numbers below `end`, of the same size. False after the last one.
fn next_combination(set: &mut [usize], end: usize) -> bool {
    let size = set.len();
    let Some(at) = (0..size).rev().find(|at| set[*at] + size - at < end) else { return false };
    set[at] += 1;
    for next in at + 1..size {
        set[next] = set[next - 1] + 1;
    }
    true
}

/// Leaves out the writes at the end that are not needed.
fn cut_early(
    mut name: StateName,
    fails: &mut dyn FnMut(&StateName) -> Result<bool>,
) -> Result<StateName> {
    let least = faults(&name);
    while let Some(last) = name.applied.iter().rposition(|applied| *applied) {
        let mut earlier = name.clone();
        earlier.applied[last] = false;
        earlier.torn.retain(|tear| tear.write != last);
        if faults(&earlier) > least || !fails(&earlier)? {
            break;
        }
        name = earlier;
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::io::sim::{Rng, SimFile};
    use crate::io::{File, block_on};
    use crate::write_log::{Log, LogBuilder};

    fn history(writes: u64) -> History {
        let log = (0..writes).fold(LogBuilder::new(512), |log, i| log.write(i * 4096, &[1; 4096]));
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("w.log", log.finish()));
        History::read(block_on(Log::open(file)).unwrap(), 1 << 20).unwrap()
    }

    /// The bug: write `late` must not be on the disk without write `early`.
    #[test]
    fn a_swapped_pair_is_found_alone() {
        let history = history(12);
        let epoch = history.window(0);
        for seed in 0..20 {
            let mut rng = Rng::new(seed);
            let early = rng.below(11) as usize;
            let late = early + 1 + rng.below(11 - early as u64) as usize;
            let mut applied: Vec<bool> = (0..12).map(|_| rng.one_in(2)).collect();
            (applied[early], applied[late]) = (false, true);
            let found = StateName { applied, ..StateName::default() };
            let mut fails = |name: &StateName| Ok(name.applied[late] && !name.applied[early]);
            let least = shrink(&history, &epoch, found, &mut fails).unwrap();
            let expected: Vec<bool> = (0..12).map(|i| i <= late && i != early).collect();
            assert_eq!(least.applied, expected, "seed {seed}");
        }
    }

    /// A set of which nothing can be taken back, while another fault alone would do.
    #[test]
    fn a_smaller_set_elsewhere_is_found() {
        let history = history(6);
        let epoch = history.window(0);
        let found: StateName = "E0:s=000111".parse().unwrap();
        let mut fails = |name: &StateName| {
            let text = name.to_string();
            Ok(text == "E0:s=000111" || name.applied == [true, true, true, true, false, true])
        };
        let least = shrink(&history, &epoch, found, &mut fails).unwrap();
        assert_eq!(least.to_string(), "E0:s=111101");
    }

    #[test]
    fn torn_writes_are_made_whole_where_that_does_not_matter() {
        let history = history(4);
        let epoch = history.window(0);
        let found: StateName = "E0:s=1111,torn=2@512,torn=3@-512".parse().unwrap();
        let mut fails = |name: &StateName| Ok(name.tear(2).is_some());
        let least = shrink(&history, &epoch, found, &mut fails).unwrap();
        assert_eq!(least.trimmed().to_string(), "E0:s=111,torn=3@-512");
    }
}
