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
//! quiesce(): phase = Closed, wake──►  sees closed: pops nothing more
//!            wait …                   last request completes
//!                                ◄──  report_quiet()
//! change the graph
//! drop(Quiesced): phase = Open   ──►  wakes, reloads the node and its driver, goes on
//! ```
//!
//! # Flushes first
//!
//! A flush takes as long as the disk does, and a gate that is closed while one is under way keeps the
//! guest waiting for it. So the gate is *calmed* before it is closed: a party that can
//! ([`Party::holds_flushes`]) starts no more flushes, and goes on with everything else; those that
//! are under way end; then the gate is closed, and the drain is short. The flushes that were held
//! start when it is open again. What they promise is the same, a little later.
//!
//! ```text
//! calm: phase = Calming, wake    ──►  holds new flushes; reads and writes go on
//!            wait …                   the last flush ends
//!                                ◄──  report_calm()
//! close …
//! ```
//!
//! Invariant: between a party's `report_quiet` and the moment it sees itself open again, it issues
//! nothing. Closing nests: the gate opens when the last guard is dropped.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

/// Pauses and drains all parties of a root. Cheap to clone; clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when a party becomes calm or quiet or leaves.
    changed: Condvar,
    /// Counts openings, so that a party notices that the graph may have changed.
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Number of live [`Quiesced`] guards.
    closers: usize,
    /// Number of those who want flushes held before they close the gate.
    calmers: usize,
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
    /// A [`Phase`]. Changed under the state lock only, as are the next two.
    phase: AtomicU8,
    /// Set by the party, cleared when the gate opens.
    quiet: AtomicBool,
    /// Set by the party, cleared when the gate is to be calm.
    calm: AtomicBool,
    /// Whether the party can be asked to hold flushes.
    holds_flushes: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
    /// Called each second that somebody waits for the party.
    nudge: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// What a party is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Nothing.
    Open,
    /// To start no flush.
    Calming,
    /// To start nothing.
    Closed,
}

impl State {
    /// What parties are asked for now, those that hold flushes.
    fn phase(&self) -> Phase {
        match (self.closers, self.calmers) {
            (0, 0) => Phase::Open,
            (0, _) => Phase::Calming,
            _ => Phase::Closed,
        }
    }
}

impl PartyInner {
    fn is_closed(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == Phase::Closed as u8
    }

    /// Asks for something else, under the state lock.
    fn set_phase(&self, phase: Phase) {
        if self.phase.load(Ordering::SeqCst) == phase as u8 {
            return;
        }
        if phase == Phase::Calming {
            self.calm.store(false, Ordering::SeqCst);
        }
        self.phase.store(phase as u8, Ordering::SeqCst);
        (self.wake)();
    }
}

impl fmt::Debug for PartyInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Party({}, phase: {:?}, quiet: {:?})", self.name, self.phase, self.quiet)
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
        let phase = if closed { Phase::Closed } else { Phase::Open };
        let inner = Arc::new(PartyInner {
            name: name.into(),
            phase: AtomicU8::new(phase as u8),
            quiet: AtomicBool::new(closed),
            calm: AtomicBool::new(true),
            holds_flushes: AtomicBool::new(false),
            wake: Box::new(wake),
            nudge: OnceLock::new(),
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
    /// closing nests and parties wait for nobody, the order does not matter. The pause begins when
    /// no flush is under way any more.
    pub fn quiesce_all<'a>(gates: impl IntoIterator<Item = &'a Gate>) -> Quiesced {
        let gates: Vec<_> = gates.into_iter().map(|gate| Arc::clone(&gate.shared)).collect();
        for gate in &gates {
            gate.change(|state| state.calmers += 1);
        }
        for gate in &gates {
            gate.wait_until("flushes", |state, party| {
                state.closers > 0 || party.calm.load(Ordering::SeqCst)
            });
        }
        let quiesced = Quiesced { gates, since: Instant::now() };
        for gate in &quiesced.gates {
            gate.change(|state| {
                state.calmers -= 1;
                state.closers += 1;
            });
        }
        for gate in &quiesced.gates {
            gate.wait_until("requests", |_, party| party.quiet.load(Ordering::SeqCst));
        }
        quiesced
    }
}

impl Shared {
    /// Asks all parties for what `change` makes of the state.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap();
        change(&mut state);
        let phase = state.phase();
        for party in state.parties.iter().filter_map(Weak::upgrade) {
            if phase != Phase::Calming || party.holds_flushes.load(Ordering::SeqCst) {
                party.set_phase(phase);
            }
        }
        // Who waits for calm need not when somebody else has closed the gate.
        self.changed.notify_all();
    }

    /// Waits until all parties are as they are wanted.
    fn wait_until(&self, what: &str, is_so: impl Fn(&State, &PartyInner) -> bool) {
        let mut state = self.state.lock().unwrap();
        let mut warned = false;
        loop {
            let noisy: Vec<_> = (state.parties.iter().filter_map(Weak::upgrade))
                .filter(|party| !is_so(&state, party))
                .collect();
            if noisy.is_empty() {
                return;
            }
            let since = Instant::now();
            loop {
                let wait = self.changed.wait_timeout(state, Duration::from_secs(1)).unwrap();
                state = wait.0;
                if !wait.1.timed_out() {
                    break;
                }
                noisy.iter().filter_map(|party| party.nudge.get()).for_each(|nudge| nudge());
                if since.elapsed() >= Duration::from_secs(10) {
                    if !std::mem::replace(&mut warned, true) {
                        let names: Vec<_> = noisy.iter().map(|p| p.name.as_str()).collect();
                        let names = names.join(", ");
                        tracing::warn!("still waiting for {what} of {names} to complete");
                    }
                    break;
                }
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
        let phase = state.phase();
        for party in state.parties.iter().filter_map(Weak::upgrade) {
            party.quiet.store(false, Ordering::SeqCst);
            let holds = party.holds_flushes.load(Ordering::SeqCst);
            party.set_phase(if holds { phase } else { Phase::Open });
        }
    }
}

impl Party {
    /// A party that promises to start no flush while the gate is to be calm, and to say so
    /// ([`Party::report_calm`]) when the last one under way has ended.
    pub fn holds_flushes(self) -> Party {
        let state = self.shared.state.lock().unwrap();
        self.inner.holds_flushes.store(true, Ordering::SeqCst);
        self.inner.set_phase(state.phase());
        drop(state);
        self
    }

    /// A party that something may keep from looking at the gate: `nudge` gets it out of there. It is
    /// called each second that somebody waits for the party, and must not wait.
    pub fn nudged_by(self, nudge: impl Fn() + Send + Sync + 'static) -> Party {
        let _ = self.inner.nudge.set(Box::new(nudge));
        self
    }

    /// Whether to stop issuing requests. One atomic load.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.inner.phase.load(Ordering::Acquire) == Phase::Closed as u8
    }

    /// Whether nothing is asked of the party. One atomic load.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.inner.phase.load(Ordering::Acquire) == Phase::Open as u8
    }

    /// Says that the party starts no flushes and none of it is in flight. Harmless if the gate is
    /// not to be calm any more.
    pub fn report_calm(&self) {
        let _state = self.shared.state.lock().unwrap();
        self.inner.calm.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    /// Whether the party is to be calm and has not said yet that it is.
    #[inline]
    pub fn owes_calm(&self) -> bool {
        self.inner.phase.load(Ordering::SeqCst) == Phase::Calming as u8
            && !self.inner.calm.load(Ordering::SeqCst)
    }

    /// Says that the party is closed and nothing of it is in flight. Harmless if the gate has
    /// opened meanwhile.
    pub fn report_quiet(&self) {
        // Under the lock, so that it cannot fall between an opening's two stores.
        let _state = self.shared.state.lock().unwrap();
        if self.inner.is_closed() {
            self.inner.quiet.store(true, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
    }

    /// Whether the party is closed and has not said yet that it is quiet. To be looked at before a
    /// sleep: the gate may have opened and closed again since the last report, and the wake-ups of
    /// both may have been taken for those of something else.
    pub fn owes_report(&self) -> bool {
        // Opening clears `quiet` before the phase, so a report that was withdrawn is seen as such.
        self.inner.is_closed() && !self.inner.quiet.load(Ordering::SeqCst)
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

    /// A gate that somebody is about to close, who waits for flushes to end.
    fn calming(gate: &Gate, party: &Party) -> std::thread::JoinHandle<Quiesced> {
        let closer = std::thread::spawn({
            let gate = gate.clone();
            move || gate.quiesce()
        });
        while !party.owes_calm() {
            std::thread::yield_now();
        }
        closer
    }

    #[test]
    fn flushes_end_before_the_gate_is_closed() {
        let gate = Gate::new();
        let party = gate.join("worker", || {}).holds_flushes();
        assert!(party.is_open() && !party.owes_calm());
        let begun = Instant::now();
        let closer = calming(&gate, &party);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!party.is_open() && !party.is_closed(), "reads and writes go on");
        let calm = begun.elapsed();
        party.report_calm();
        while !party.is_closed() {
            std::thread::yield_now();
        }
        party.report_quiet();
        let quiesced = closer.join().unwrap();
        assert!(quiesced.elapsed() + calm <= begun.elapsed(), "the pause begins with the close");
        // The guard is gone before the party looks, and somebody is back at once.
        drop(quiesced);
        assert!(party.is_open());
        let closer = calming(&gate, &party);
        // A party that leaves is not waited for, whatever it had under way.
        drop(party);
        drop(closer.join().unwrap());
    }

    #[test]
    fn who_closes_a_closed_gate_waits_for_no_flush() {
        let gate = Gate::new();
        let party = gate.join("worker", || {}).holds_flushes();
        let first = calming(&gate, &party);
        let second = std::thread::spawn({
            let gate = gate.clone();
            move || gate.quiesce()
        });
        party.report_calm();
        while !party.is_closed() {
            std::thread::yield_now();
        }
        party.report_quiet();
        let both = [first.join().unwrap(), second.join().unwrap()];
        let late = gate.join("late", || {}).holds_flushes();
        assert!(late.is_closed() && !late.owes_report());
        drop(both);
        assert!(party.is_open() && late.is_open());
        assert!(!party.owes_calm() && !late.owes_calm());
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

    /// Closes the gate on a thread of its own; hears of it when all parties are quiet. Returns when
    /// the closer is waiting, or is about to.
    fn closing(gate: &Gate, party: &Party) -> mpsc::Receiver<Quiesced> {
        let (tx, rx) = mpsc::channel();
        let gate = gate.clone();
        std::thread::spawn(move || tx.send(gate.quiesce()));
        while !party.is_closed() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(30));
        rx
    }

    /// Less than the time after which a closer that nobody wakes looks again by itself.
    const SOON: Duration = Duration::from_secs(8);

    #[test]
    fn a_party_that_leaves_is_not_waited_for() {
        let gate = Gate::new();
        let party = gate.join("gone", || {});
        let waiter = closing(&gate, &party);
        drop(party);
        drop(waiter.recv_timeout(SOON).expect("the closer is woken"));
        assert!(gate.shared.state.lock().unwrap().parties.is_empty());
    }

    #[test]
    fn a_report_wakes_the_closer() {
        let gate = Gate::new();
        let party = gate.join("prompt", || {});
        let waiter = closing(&gate, &party);
        assert!(waiter.try_recv().is_err(), "nothing was reported");
        party.report_quiet();
        let quiesced = waiter.recv_timeout(SOON).expect("the closer is woken");
        assert!(quiesced.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn a_report_to_an_open_gate_says_nothing_of_the_next_pause() {
        let gate = Gate::new();
        let party = gate.join("hasty", || {});
        party.report_quiet();
        let waiter = closing(&gate, &party);
        assert!(waiter.try_recv().is_err(), "the party may have gone on since");
        party.report_quiet();
        drop(waiter.recv_timeout(SOON).expect("the closer is woken"));
    }

    #[test]
    fn a_party_that_joins_a_closed_gate_is_quiet_and_hears_of_the_opening() {
        let gate = Gate::new();
        let first = gate.quiesce();
        let woken = Arc::new(AtomicUsize::new(0));
        let party = gate.join("late", {
            let woken = Arc::clone(&woken);
            move || {
                woken.fetch_add(1, Ordering::SeqCst);
            }
        });
        assert!(party.is_closed() && !party.owes_report());
        let second = closing(&gate, &party).recv_timeout(SOON).expect("nobody to wait for");
        let (before, generation) = (woken.load(Ordering::SeqCst), party.generation());
        drop((first, second));
        assert!(!party.is_closed());
        assert_eq!(woken.load(Ordering::SeqCst), before + 1);
        assert_eq!(party.generation(), generation + 1);
    }
}
