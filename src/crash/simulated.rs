//! Power cuts of simulated files, all of them: vublk's own host writes, explored as a guest's are.
//!
//! ```text
//! SimFile ─┐ changes that are not    one epoch     names of states    what is left
//! SimFile ─┴─► flushed          ──►  of a log  ──► (enumerate)    ──► of all     ──► the test's check
//! ```
//!
//! [`SimFile::power_cut`] draws one of the contents that a disk may have; this goes through them,
//! for several files together, as an add-cow image and its bitmap are. Each file has its own
//! flushes, so what is at risk is asked of the files themselves, at any instant of a run: the
//! changes of all of them are the writes of one epoch, and each subset of these is a state, with any
//! one of them torn where that is asked for.
//!
//! A test calls [`Simulation::explore`] at each step of a run. States that it was shown before are
//! left out, unless more has been promised meanwhile; so it must say what is promised.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::crash::enumerate::{self, Reach};
use crate::crash::history::{Epoch, History};
use crate::crash::name::StateName;
use crate::io::sim::{AtRisk, SimFile};
use crate::io::{File, block_on};
use crate::units::{ByteRange, SECTOR_SIZE, align_down, align_up};
use crate::write_log::{Log, LogBuilder};

/// Files that a power cut hits at the same time.
#[derive(Debug)]
pub struct Simulation<'a> {
    files: Vec<&'a SimFile>,
    reach: Reach,
    /// Of each file, the number that its next change will have at least.
    seen: Vec<u64>,
    /// What was promised when it last looked.
    promised: Option<u64>,
    states: u64,
}

impl<'a> Simulation<'a> {
    /// Nothing seen yet.
    pub fn new(files: &[&'a SimFile], reach: Reach) -> Simulation<'a> {
        let seen = vec![0; files.len()];
        Simulation { files: files.to_vec(), reach, seen, promised: None, states: 0 }
    }

    /// How many states were shown.
    pub fn states(&self) -> u64 {
        self.states
    }

    /// Shows `check` what is left of all files in each state that a power cut could leave now and that
    /// it was not shown before, with words for it. `promised` is any number that grows when more must
    /// be there than before, as when a guest's flush has ended.
    pub fn explore(&mut self, promised: u64, mut check: impl FnMut(&[SimFile], &str)) {
        let all = self.promised != Some(promised);
        self.promised = Some(promised);
        let mut changes: Vec<(usize, AtRisk)> = Vec::new();
        let mut fresh = Vec::new();
        for (file, sim) in self.files.iter().enumerate() {
            for change in sim.at_risk() {
                fresh.push(change.number >= self.seen[file]);
                changes.push((file, change));
                self.seen[file] = self.seen[file].max(change.number + 1);
            }
        }
        if !all && !fresh.contains(&true) {
            return;
        }
        let history = history(&changes);
        let epoch = history.window(0);
        let reach = self.reach;
        let _ = enumerate::visit::<()>(&history, &epoch, &reach, &mut |name| {
            let is_new = name.applied.iter().zip(&fresh).any(|(applied, fresh)| *applied && *fresh);
            if all || is_new {
                self.states += 1;
                let left = self.left(&changes, &history, &epoch, &name);
                check(&left, &self.describe(&changes, &name));
            }
            ControlFlow::Continue(())
        });
    }

    fn left(
        &self,
        changes: &[(usize, AtRisk)],
        history: &History,
        epoch: &Epoch,
        name: &StateName,
    ) -> Vec<SimFile> {
        let left = |(file, sim): (usize, &&SimFile)| {
            let own = (0..changes.len()).filter(|i| changes[*i].0 == file);
            let kept: Vec<_> = own.map(|i| history.reached(epoch, name, i)).collect();
            sim.after_power_cut_with(&kept)
        };
        self.files.iter().enumerate().map(left).collect()
    }

    /// The state's name, and what its bits stand for.
    fn describe(&self, changes: &[(usize, AtRisk)], name: &StateName) -> String {
        let words: Vec<_> = changes
            .iter()
            .map(|(file, change)| match change.range.is_empty() {
                true => format!("{} length", self.files[*file].name()),
                false => format!("{} {}", self.files[*file].name(), change.range),
            })
            .collect();
        format!("{name} of [{}]", words.join(", "))
    }
}

/// A log whose only epoch has these changes, in whole sectors.
fn history(changes: &[(usize, AtRisk)]) -> History {
    let mut log = LogBuilder::new(SECTOR_SIZE as u32);
    for (_, change) in changes {
        let end = align_up(change.range.end(), SECTOR_SIZE).expect("files are small");
        let start = align_down(change.range.offset, SECTOR_SIZE);
        let whole = ByteRange::between(start, end.max(start + SECTOR_SIZE));
        log = log.write(whole.offset, &vec![0; whole.len as usize]);
    }
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("changes", log.finish()));
    let log = block_on(Log::open(file)).expect("a log just made");
    History::read(log, u64::MAX >> 1).expect("a log just made")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::io::AlignedBuf;

    fn write(file: &SimFile, offset: u64, byte: u8, len: usize) {
        let buf = AlignedBuf::from_slice(&vec![byte; len], 1);
        block_on(file.write(offset, buf.buffers(), false)).unwrap();
    }

    #[test]
    fn each_state_of_two_files_is_shown_once() {
        let files = [SimFile::from_bytes("a", vec![0; 512]), SimFile::from_bytes("b", vec![0; 8])];
        let reach = Reach { reorder: true, torn: 512 | 4096, all_subsets: 16, samples: 0, seed: 0 };
        let mut simulation = Simulation::new(&[&files[0], &files[1]], reach);
        let look = |simulation: &mut Simulation<'_>, promised| {
            let mut seen = Vec::new();
            simulation.explore(promised, |left, _| {
                seen.push((left[0].volatile(), left[1].volatile()));
            });
            let distinct: BTreeSet<_> = seen.iter().cloned().collect();
            (seen.len(), distinct)
        };
        assert_eq!(look(&mut simulation, 0).0, 1, "the state without anything");
        // Reaches beyond the end, and two sectors, of which one may be missing.
        write(&files[0], 256, 1, 512);
        let (count, seen) = look(&mut simulation, 0);
        let ends: BTreeSet<_> = seen.iter().map(|(a, _)| (a[511], a.len())).collect();
        assert_eq!(count, 3);
        assert_eq!(ends, [(0, 768), (1, 512), (1, 768)].into());
        assert_eq!(look(&mut simulation, 0).0, 0, "nothing is new");
        write(&files[1], 0, 2, 8);
        let (_, seen) = look(&mut simulation, 0);
        assert!(seen.iter().all(|(_, b)| b[0] == 2), "the others were shown before");
        block_on(files[0].flush()).unwrap();
        assert_eq!(look(&mut simulation, 0).0, 0, "a flush leaves fewer states, and none new");
        let (count, seen) = look(&mut simulation, 1);
        assert_eq!(count, 2, "more is promised");
        assert!(seen.iter().all(|(a, _)| a[256..] == [1; 512]), "one file was flushed");
    }
}
