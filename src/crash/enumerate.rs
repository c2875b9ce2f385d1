//! Which states of an epoch are looked at.
//!
//! Small epochs have all their subsets. For larger ones: none, each prefix, all but one, only one,
//! then sets such that any two writes are seen in all four combinations, then random ones.

use std::ops::ControlFlow;

use crate::crash::history::{Epoch, History};
use crate::crash::name::{Kept, StateName, Tear};
use crate::io::sim::Rng;
use crate::units::SECTOR_SIZE;
use crate::write_log::Kind;

/// Sizes at which writes are torn, in bytes: a sector, and the block of newer disks.
const TEARS: [u64; 2] = [SECTOR_SIZE, 4096];

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Anything but the states at flushes, where nothing of the epoch has reached the disk.
    pub reorder: bool,
    /// Writes of which only a part reached the disk.
    pub torn: bool,
    /// Epochs with up to so many writes have all their subsets looked at.
    pub all_subsets: u32,
    /// How many random subsets of a larger epoch.
    pub samples: u64,
    /// What the random ones depend on.
    pub seed: u64,
}

/// Calls `visit` for each state of an epoch that a power cut could leave, with a bit for each write.
/// The same state may come more than once. The order depends on the arguments alone.
pub fn visit<B>(
    history: &History,
    epoch: &Epoch,
    reach: &Reach,
    visit: &mut dyn FnMut(StateName) -> ControlFlow<B>,
) -> ControlFlow<B> {
    let mut visit = |name: StateName| match history.is_possible(epoch, &name) {
        true => visit(name),
        false => ControlFlow::Continue(()),
    };
    let count = epoch.writes.len();
    let state = |bit: &dyn Fn(usize) -> bool| StateName {
        prefix: epoch.start,
        applied: (0..count).map(bit).collect(),
        torn: Vec::new(),
    };
    visit(state(&|_| false))?;
    if reach.reorder && count <= reach.all_subsets.min(30) as usize {
        for subset in 1..1u64 << count {
            visit(state(&|i| subset >> i & 1 == 1))?;
        }
    } else if reach.reorder {
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
    if reach.torn {
        for torn in 0..count {
            for tear in tears(history, epoch, torn) {
                visit(StateName { torn: vec![tear], ..state(&|i| i <= torn) })?;
                if torn + 1 < count {
                    visit(StateName { torn: vec![tear], ..state(&|_| true) })?;
                }
            }
        }
    }
    ControlFlow::Continue(())
}

/// The ways in which a write is torn: its first or last unit is there, or all but that.
fn tears(history: &History, epoch: &Epoch, write: usize) -> Vec<Tear> {
    let entry = history.entry(epoch.writes[write]);
    let mut tears = Vec::new();
    if entry.kind() != Kind::Write {
        return tears;
    }
    let len = entry.target.len;
    for unit in TEARS.into_iter().filter(|unit| *unit < len) {
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
