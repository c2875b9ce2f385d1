//! The gate: the one place where a running export is paused, drained and changed.
//!
//! Everybody who issues requests through a [`Root`](crate::block::Root) on its own thread (a device worker, a job) is a
//! [`Party`]. Closing the gate asks each party to stop issuing and waits until each has reported
//! that nothing of it is in flight. While the [`Quiesced`] guard lives, the graph below may be
//! changed; dropping it lets the parties go on. A guest sees latency, never an error.
//!
//! ```text
//! control thread                      party (worker)
//! ──────────────                      ──────────────
//! quiesce(): closed = true, wake ──►  sees closed: pops nothing more
//!            wait …                   last request completes
//!                                ◄──  report_quiet()
//! change the graph
//! drop(Quiesced): closed = false ──►  wakes, reloads the node and its driver, goes on
//! ```
//!
//! Invariant: between a party's `report_quiet` and the moment it sees itself open again, it issues
//! nothing. Closing nests: the gate opens when the last guard is dropped.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

/// Pauses and drains all parties of a root. Cheap to clone; clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when a party becomes quiet or leaves.
    changed: Condvar,
    /// Counts openings, so that a party notices that the graph may have changed.
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Number of live [`Quiesced`] guards.
    closers: usize,
    parties: Vec<Weak<PartyInner>>,
}

/// Somebody who issues requests.
#[derive(Debug)]
pub struct Party {
    inner: Arc<PartyInner>,
    shared: Arc<Shared>,
}

struct PartyInner {
    /// For messages: who does not get quiet.
    name: String,
    closed: AtomicBool,
    /// Set by the party, cleared when the gate opens. Changed under the state lock only.
    quiet: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for PartyInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Party({}, closed: {:?}, quiet: {:?})", self.name, self.closed, self.quiet)
    }
}

/// While this lives, no party of the gate (or the gates) issues requests. Dropping it opens them
/// again.
#[derive(Debug)]
#[must_use]
pub struct Quiesced {
    gates: Vec<Arc<Shared>>,
    since: Instant,
}

impl Gate {
    /// An open gate without parties.
    pub fn new() -> Self {
        Gate::default()
    }

    /// Adds a party. `wake` is called from other threads whenever the party must look at
    /// [`Party::is_closed`] again; it must not block. A party that joins a closed gate starts
    /// closed and counts as quiet.
    pub fn join(&self, name: impl Into<String>, wake: impl Fn() + Send + Sync + 'static) -> Party {
        let mut state = self.shared.state.lock().unwrap();
        let closed = state.closers > 0;
        let inner = Arc::new(PartyInner {
            name: name.into(),
            closed: AtomicBool::new(closed),
            quiet: AtomicBool::new(closed),
            wake: Box::new(wake),
        });
        state.parties.push(Arc::downgrade(&inner));
        Party { inner, shared: Arc::clone(&self.shared) }
    }

    /// Closes the gate and waits until every party is quiet. Blocks the calling thread, which must
    /// not be one that a party's requests need to make progress.
    pub fn quiesce(&self) -> Quiesced {
        Gate::quiesce_all([self])
    }

    /// Closes several gates as one: all are closed before the first is waited for, so that the
    /// pause is that of the slowest and there is an instant at which all of them are quiet. As
    /// closing nests and parties wait for nobody, the order does not matter.
    pub fn quiesce_all<'a>(gates: impl IntoIterator<Item = &'a Gate>) -> Quiesced {
        let gates: Vec<_> = gates.into_iter().map(|gate| Arc::clone(&gate.shared)).collect();
        let quiesced = Quiesced { gates, since: Instant::now() };
        for gate in &quiesced.gates {
            gate.close();
        }
        for gate in &quiesced.gates {
            gate.wait_until_quiet();
        }
        quiesced
    }
}

impl Shared {
    /// Asks all parties to stop.
    fn close(&self) {
        let mut state = self.state.lock().unwrap();
        state.closers += 1;
        state.parties.retain(|p| p.strong_count() > 0);
        for party in state.parties.iter().filter_map(Weak::upgrade) {
            party.closed.store(true, Ordering::SeqCst);
            (party.wake)();
        }
    }

    fn wait_until_quiet(&self) {
        let mut state = self.state.lock().unwrap();
        let mut warned = false;
        loop {
            let noisy: Vec<_> = (state.parties.iter().filter_map(Weak::upgrade))
                .filter(|p| !p.quiet.load(Ordering::SeqCst))
                .collect();
            if noisy.is_empty() {
                return;
            }
            let wait = self.changed.wait_timeout(state, Duration::from_secs(10)).unwrap();
            state = wait.0;
            if wait.1.timed_out() && !warned {
                warned = true;
                let names: Vec<_> = noisy.iter().map(|p| p.name.as_str()).collect();
                tracing::warn!("still waiting for requests of {} to complete", names.join(", "));
            }
        }
    }
}

impl Quiesced {
    /// How long the parties have been kept waiting.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Quiesced {
    fn drop(&mut self) {
        for gate in &self.gates {
            gate.open();
        }
    }
}

impl Shared {
    /// Lets the parties go on, if this was the last closer.
    fn open(&self) {
        let mut state = self.state.lock().unwrap();
        state.closers -= 1;
        if state.closers > 0 {
            return;
        }
        self.generation.fetch_add(1, Ordering::SeqCst);
        for party in state.parties.iter().filter_map(Weak::upgrade) {
            party.quiet.store(false, Ordering::SeqCst);
            party.closed.store(false, Ordering::SeqCst);
            (party.wake)();
        }
    }
}

impl Party {
    /// Whether to stop issuing requests. One atomic load.
    pub fn is_closed(&self) -> bool {
        self.inner.closed.load(Ordering::Acquire)
    }

    /// Says that the party is closed and nothing of it is in flight. Harmless if the gate has
    /// opened meanwhile.
    pub fn report_quiet(&self) {
        // Under the lock, so that it cannot fall between an opening's two stores.
        let _state = self.shared.state.lock().unwrap();
        if self.inner.closed.load(Ordering::SeqCst) {
            self.inner.quiet.store(true, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
    }

    /// Whether the party is closed and has not said yet that it is quiet. To be looked at before a
    /// sleep: the gate may have opened and closed again since the last report, and the wake-ups of
    /// both may have been taken for those of something else.
    pub fn owes_report(&self) -> bool {
        // Opening clears `quiet` before `closed`, so a report that was withdrawn is seen as such.
        self.inner.closed.load(Ordering::SeqCst) && !self.inner.quiet.load(Ordering::SeqCst)
    }

    /// Changes whenever the gate has been open again after a pause: the graph may have changed.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock().unwrap();
        let me = Arc::downgrade(&self.inner);
        state.parties.retain(|p| !p.ptr_eq(&me));
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    #[test]
    fn quiesce_waits_for_every_party() {
        let gate = Gate::new();
        let in_flight = Arc::new(AtomicUsize::new(3));
        let (wake_tx, wake_rx) = mpsc::channel();
        let party = gate.join("worker 0", move || {
            let _ = wake_tx.send(());
        });
        let left = Arc::clone(&in_flight);
        let worker = std::thread::spawn(move || {
            wake_rx.recv().unwrap();
            assert!(party.is_closed());
            while left.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
                left.fetch_sub(1, Ordering::SeqCst);
            }
            let before = party.generation();
            party.report_quiet();
            wake_rx.recv().unwrap();
            assert!(!party.is_closed());
            assert_eq!(party.generation(), before + 1);
        });
        let quiesced = gate.quiesce();
        assert_eq!(in_flight.load(Ordering::SeqCst), 0);
        drop(quiesced);
        worker.join().unwrap();
    }

    #[test]
    fn closing_nests_and_late_parties_start_closed() {
        let gate = Gate::new();
        let first = gate.quiesce();
        let second = gate.quiesce();
        let party = gate.join("late", || {});
        assert!(party.is_closed());
        drop(first);
        assert!(party.is_closed());
        drop(second);
        assert!(!party.is_closed());
    }

    #[test]
    fn a_report_does_not_outlive_its_pause() {
        let gate = Gate::new();
        let party = gate.join("sleepy", || {});
        assert!(!party.owes_report());
        let close = || {
            let gate = gate.clone();
            let closer = std::thread::spawn(move || gate.quiesce());
            while !party.is_closed() {
                std::thread::yield_now();
            }
            closer
        };
        let first = close();
        assert!(party.owes_report());
        party.report_quiet();
        assert!(!party.owes_report());
        drop(first.join().unwrap());
        // Closed again before the party looked: what it said of the first pause is void.
        let second = close();
        assert!(party.owes_report());
        party.report_quiet();
        drop(second.join().unwrap());
        assert!(!party.owes_report());
    }

    #[test]
    fn several_gates_close_as_one() {
        let gates = [Gate::new(), Gate::new()];
        let parties = [0, 1].map(|i| Arc::new(gates[i].join(format!("{i}"), || {})));
        let waiting = parties.clone().map(|party| {
            std::thread::spawn(move || {
                while !party.is_closed() {
                    std::thread::yield_now();
                }
                party.report_quiet();
            })
        });
        // Neither party waits for the other to be quiet: both must have been told.
        let quiesced = Gate::quiesce_all(&gates);
        assert!(parties.iter().all(|party| party.is_closed()));
        for thread in waiting {
            thread.join().unwrap();
        }
        drop(quiesced);
        assert!(parties.iter().all(|party| !party.is_closed() && party.generation() == 1));
    }

    #[test]
    fn a_party_that_leaves_is_not_waited_for() {
        let gate = Gate::new();
        let party = gate.join("gone", || {});
        let waiter = std::thread::spawn({
            let gate = gate.clone();
            move || drop(gate.quiesce())
        });
        drop(party);
        waiter.join().unwrap();
    }
}
