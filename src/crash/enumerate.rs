//! Which states of an epoch are looked at.
//!
//! Small epochs have all their subsets. For larger ones: none, each prefix, all but one, only one,
//! then sets such that any two writes are seen in all four combinations, then random ones.
//!
//! A chosen set that no power cut leaves, because a FUA write is missing and one is there that was submitted
//! after it, gets the FUA writes that it must have. (Were it left out, an epoch with many of them would hardly be
//! looked at.) So does the set of none, where FUA writes were [promised](History::promised).

use std::ops::ControlFlow;

use crate::crash::history::{Epoch, History};
use crate::crash::name::{Kept, StateName, Tear};
use crate::io::sim::Rng;
use crate::write_log::Kind;

/// The block of newer disks, in bytes.
const LARGE_BLOCK: u64 = 4096;

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Anything but the states at flushes, where nothing of the epoch has reached the disk.
    pub reorder: bool,
    /// Writes of which only a part reached the disk: sizes in bytes at which they are torn, each a
    /// power of two, added up. None if 0.
    pub torn: u64,
    /// Epochs with up to so many writes have all their subsets looked at.
    pub all_subsets: u32,
    /// How many random subsets of a larger epoch.
    pub samples: u64,
    /// What the random ones depend on.
    pub seed: u64,
}

/// The sizes at which writes of a log are torn, as in [`Reach::torn`], unless somebody says otherwise: a
/// sector of the log, and the block of newer disks.
///
/// A log's sector is the logical block of the disk that was written to, or the smallest that the guest
/// was shown. A disk does not tear these, and guests may rely on that.
pub fn usual_tears(history: &History) -> u64 {
    let sector = history.log().sector_size();
    sector | sector.max(LARGE_BLOCK)
}

/// Calls `visit` for each state of an epoch that a power cut could leave, with a bit for each write.
/// The same state may come more than once. The order depends on the arguments alone.
pub fn visit<B>(
    history: &History,
    epoch: &Epoch,
    reach: &Reach,
    visit: &mut dyn FnMut(StateName) -> ControlFlow<B>,
) -> ControlFlow<B> {
    let count = epoch.writes.len();
    let state = |bit: &dyn Fn(usize) -> bool| StateName {
        prefix: epoch.start,
        applied: (0..count).map(bit).collect(),
        torn: Vec::new(),
    };
    let promised = history.promised(epoch);
    if reach.reorder && count <= reach.all_subsets.min(30) as usize {
        for subset in 0..1u64 << count {
            let name = state(&|i| subset >> i & 1 == 1);
            if history.is_possible(epoch, &name) {
                visit(name)?;
            }
        }
    } else {
        visit(history.made_possible(epoch, state(&|_| false)))?;
    }
    if reach.reorder && count > reach.all_subsets.min(30) as usize {
        let mut visit = |name| visit(history.made_possible(epoch, name));
        for last in 0..count {
            visit(state(&|i| i <= last))?;
        }
        for one in 0..count {
            visit(state(&|i| i != one))?;
            visit(state(&|i| i == one))?;
        }
        for digit in 0..count.next_power_of_two().trailing_zeros() {
            visit(state(&|i| i >> digit & 1 == 1))?;
            visit(state(&|i| i >> digit & 1 == 0))?;
        }
        // Each epoch has numbers of its own, wherever an exploration begins.
        let mut rng = Rng::new(reach.seed ^ epoch.start.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for _ in 0..reach.samples {
            let bits: Vec<bool> = (0..count).map(|_| rng.one_in(2)).collect();
            visit(state(&|i| bits[i]))?;
        }
    }
    if reach.torn != 0 {
        for torn in (0..count).filter(|torn| may_be_torn(history, epoch, *torn, promised)) {
            for tear in tears(history, epoch, torn, reach.torn) {
                let last = StateName { torn: vec![tear], ..state(&|i| i <= torn) };
                visit(history.made_possible(epoch, last))?;
                if torn + 1 < count && !history.is_fua(epoch, torn) {
                    visit(StateName { torn: vec![tear], ..state(&|_| true) })?;
                }
            }
        }
    }
    ControlFlow::Continue(())
}

/// How many states [`visit`] calls `visit` for, without making them.
pub fn count(history: &History, epoch: &Epoch, reach: &Reach) -> u64 {
    let count = epoch.writes.len();
    let promised = history.promised(epoch);
    let mut states = 1;
    if reach.reorder && count <= reach.all_subsets.min(30) as usize {
        states = count_subsets(history, epoch, promised);
    } else if reach.reorder {
        let digits = count.next_power_of_two().trailing_zeros();
        states += 3 * count as u64 + 2 * u64::from(digits) + reach.samples;
    }
    if reach.torn != 0 {
        for torn in (0..count).filter(|torn| may_be_torn(history, epoch, *torn, promised)) {
            let is_torn_before_others = torn + 1 < count && !history.is_fua(epoch, torn);
            states += tears(history, epoch, torn, reach.torn).len() as u64
                * (1 + u64::from(is_torn_before_others));
        }
    }
    states
}

/// How many sets of an epoch's writes a power cut could leave.
fn count_subsets(history: &History, epoch: &Epoch, promised: usize) -> u64 {
    let count = epoch.writes.len();
    // By the first FUA write that is missing: those before it are there, and of what comes after it only
    // that may be which was in flight together with it. If none is missing, any other write may be.
    let (mut sets, mut free) = (0, 0);
    for write in 0..count {
        if !history.is_fua(epoch, write) {
            free += 1;
        } else if write >= promised {
            let may_outlive = |later: &usize| history.may_outlive(epoch, *later, write);
            sets += 1 << (free + (write + 1..count).filter(may_outlive).count());
        }
    }
    sets + (1 << free)
}

/// Whether a power cut may tear a write: not one with FUA that was promised before.
fn may_be_torn(history: &History, epoch: &Epoch, write: usize, promised: usize) -> bool {
    write >= promised || !history.is_fua(epoch, write)
}

/// The ways in which a write is torn: its first or last unit is there, or all but that.
fn tears(history: &History, epoch: &Epoch, write: usize, sizes: u64) -> Vec<Tear> {
    let entry = history.entry(epoch.writes[write]);
    let mut tears = Vec::new();
    if entry.kind() != Kind::Write {
        return tears;
    }
    let len = entry.target.len;
    let units = (0..u64::BITS).map(|bit| 1 << bit).filter(|unit| sizes & unit != 0);
    for unit in units.filter(|unit| *unit < len) {
        for kept in [unit, (len - 1) / unit * unit] {
            for kept in [Kept::First(kept), Kept::Last(kept)] {
                let tear = Tear { write, kept };
                if !tears.contains(&tear) {
                    tears.push(tear);
                }
            }
        }
    }
    tears
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;

    use super::*;
    use crate::io::sim::SimFile;
    use crate::io::{File, block_on};
    use crate::write_log::{Flags, Log, LogBuilder};

    /// One epoch; each letter is a write, `f` one with FUA.
    fn history(writes: &str) -> History {
        let log = writes.chars().zip(0..).fold(LogBuilder::new(512), |log, (kind, i)| {
            let flags = if kind == 'f' { Flags::FUA } else { Flags::NONE };
            log.entry(flags, i * 8192, &[1; 8192])
        });
        let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("w.log", log.finish()));
        History::read(block_on(Log::open(file)).unwrap(), 1 << 20).unwrap()
    }

    fn visited(history: &History, reach: &Reach) -> Vec<StateName> {
        let mut names = Vec::new();
        let _ = visit::<()>(history, &history.window(0), reach, &mut |name| {
            names.push(name);
            ControlFlow::Continue(())
        });
        names
    }

    #[test]
    fn states_are_counted_without_being_made_and_are_all_possible() {
        let logs = ["", "w", "f", "wfw", "wwwwfwww", "ffffff", "wfwfwfwfwfwwww"];
        for (writes, since) in logs.iter().flat_map(|log| [0, 1, 2, 5, 6].map(|n| (log, n))) {
            let history = history(writes).since(since);
            let epoch = history.window(0);
            for (all_subsets, bits) in [(4, 0), (4, 1), (4, 2), (4, 3), (16, 1), (16, 3)] {
                let (reorder, torn) = (bits & 1 == 1, (bits & 2) / 2 * (512 | 4096));
                let reach = Reach { reorder, torn, all_subsets, samples: 20, seed: 1 };
                let names = visited(&history, &reach);
                let case = format!("{writes} since {since} {reach:?}");
                assert_eq!(count(&history, &epoch, &reach), names.len() as u64, "{case}");
                let impossible = names.iter().find(|name| !history.is_possible(&epoch, name));
                assert_eq!(impossible, None, "{case}");
            }
        }
    }

    /// All sets of a log's writes, asked one by one whether a power cut after the n-th entry leaves them.
    #[test]
    fn a_power_cut_from_an_entry_on_leaves_all_that_was_promised_and_any_of_the_rest() {
        let all = Reach { reorder: true, torn: 0, all_subsets: 16, samples: 0, seed: 0 };
        for (writes, since) in ["wwww", "wfww", "fwfw", "wwff"].iter().zip([2, 2, 3, 4]) {
            let history = history(writes).since(since);
            let found: HashSet<_> = visited(&history, &all).into_iter().collect();
            for set in 0..1u64 << writes.len() {
                let is_there = |i: usize| set >> i & 1 == 1;
                let is_fua = |i: usize| writes.as_bytes()[i] == b'f';
                // When the power fails, so many writes were completed, those with FUA for good.
                let leaves = |completed: usize| {
                    let done = (0..writes.len())
                        .filter(|i| is_fua(*i))
                        .all(|i| i >= completed || is_there(i));
                    done && (completed..writes.len()).all(|i| !is_there(i))
                };
                let expected = (since as usize..=writes.len()).any(leaves);
                let applied = (0..writes.len()).map(is_there).collect();
                let name = StateName { prefix: 0, applied, torn: Vec::new() };
                assert_eq!(found.contains(&name), expected, "{writes} since {since}: {name}");
            }
        }
    }

    /// An order in which each write was in flight together with some of those before it.
    fn overlapping(writes: &str, rng: &mut Rng) -> Vec<(u64, u64)> {
        let mut order = Vec::new();
        let mut event = 0;
        for _ in writes.chars() {
            let completed: u64 = event + 1 + rng.below(3);
            order.push((completed.saturating_sub(1 + rng.below(8)), completed));
            event = completed;
        }
        order
    }

    /// All sets, asked one by one whether there is an instant that leaves them.
    #[test]
    fn what_was_in_flight_together_may_be_there_without_each_other() {
        let mut rng = Rng::new(7);
        let all = Reach { reorder: true, torn: 0, all_subsets: 16, samples: 20, seed: 0 };
        for _ in 0..300 {
            let writes: String =
                (0..1 + rng.below(7)).map(|_| if rng.one_in(2) { 'f' } else { 'w' }).collect();
            let order = overlapping(&writes, &mut rng);
            let history = history(&writes).ordered(order.clone());
            let found: HashSet<_> = visited(&history, &all).into_iter().collect();
            let epoch = history.window(0);
            assert_eq!(count(&history, &epoch, &all), found.len() as u64, "{writes} {order:?}");
            for set in 0..1u64 << writes.len() {
                let is_there = |i: usize| set >> i & 1 == 1;
                let is_fua = |i: usize| writes.as_bytes()[i] == b'f';
                // Nothing that is submitted later is there, and all with FUA that was completed.
                let leaves = |instant: u64| {
                    order.iter().enumerate().all(|(i, (submitted, completed))| {
                        let may_be = !is_there(i) || *submitted < instant;
                        may_be && (is_there(i) || !is_fua(i) || *completed >= instant)
                    })
                };
                let expected = (0..100).any(leaves);
                let applied = (0..writes.len()).map(is_there).collect();
                let name = StateName { prefix: 0, applied, torn: Vec::new() };
                let case = format!("{writes} {order:?}: {name}");
                assert_eq!(found.contains(&name), expected, "{case}");
                assert_eq!(history.is_possible(&epoch, &name), expected, "{case}");
                let made = history.made_possible(&epoch, name.clone());
                assert!(history.is_possible(&epoch, &made), "{case} became {made}");
                assert!(!expected || made == name, "{case} became {made}");
            }
            let large = Reach { all_subsets: 0, torn: 512, ..all };
            let names = visited(&history, &large);
            assert_eq!(count(&history, &epoch, &large), names.len() as u64, "{writes} {order:?}");
            let impossible = names.iter().find(|name| !history.is_possible(&epoch, name));
            assert_eq!(impossible, None, "{writes} {order:?}");
        }
    }

    #[test]
    fn random_sets_of_an_epoch_with_many_fua_writes_are_not_lost() {
        let history = history(&"wwf".repeat(10));
        let reach = Reach { reorder: true, torn: 0, all_subsets: 16, samples: 500, seed: 1 };
        let distinct: HashSet<_> = visited(&history, &reach).into_iter().collect();
        assert!(distinct.len() > 450, "{} states only", distinct.len());
    }
}
