//! Which requests get which faults.
//!
//! Rules count the requests that they apply to, and dice are thrown with a seed: the same requests
//! in the same order get the same faults. Requests that no rule applies to are not counted and cost
//! one look at a bit.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::io::sim::Rng;
use crate::units::ByteRange;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOp {
    /// A read.
    Read,
    /// A write of data.
    Write,
    /// Zeros.
    WriteZeroes,
    /// A discard.
    Discard,
    /// A flush. It has no range: rules with one do not apply.
    Flush,
}

impl FaultOp {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            FaultOp::Read => "read",
            FaultOp::Write => "write",
            FaultOp::WriteZeroes => "write of zeros",
            FaultOp::Discard => "discard",
            FaultOp::Flush => "flush",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// The requests that a rule applies to, and how often it has an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Of this kind; of any, if absent.
    pub op: Option<FaultOp>,
    /// That touch this range; anywhere, and flushes, if absent.
    pub range: Option<ByteRange>,
    /// The first so many pass.
    pub after: u64,
    /// Of those after that, one of so many, at random; all of them with 1.
    pub one_in: u64,
    /// Whether the rule is over once it had an effect.
    pub once: bool,
}

impl Default for Scope {
    fn default() -> Scope {
        Scope { op: None, range: None, after: 0, one_in: 1, once: false }
    }
}

/// A request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRule {
    /// Which.
    pub scope: Scope,
    /// With this error number.
    pub errno: i32,
}

/// A request waits before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DelayRule {
    /// Which.
    pub scope: Scope,
    /// At least so long.
    pub least: Duration,
    /// At most so long; how long in between is random.
    pub most: Duration,
}

/// What is remembered only until it is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolatileSettings {
    /// The most, in bytes; beyond that all is written, and not flushed.
    pub size: u64,
    /// One of so many writes reaches the disk at once, at random; none with 0.
    pub survive_one_in: u64,
    /// Of one of so many writes only a part reaches the disk at once; none with 0.
    pub tear_one_in: u64,
}

/// All faults of a filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// What random choices depend on.
    pub seed: u64,
    /// Requests that fail.
    pub errors: Vec<ErrorRule>,
    /// Requests that take long.
    pub delays: Vec<DelayRule>,
    /// One of so many flushes is answered without having been done, at random; all with 1, none
    /// with 0. Writes that are to be durable on completion lie as often.
    pub flush_lies_one_in: u64,
    /// A write cache that a kill empties.
    pub volatile: Option<VolatileSettings>,
}

/// How often something was done to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// Requests that failed.
    pub errors: u64,
    /// Requests that had to wait.
    pub delays: u64,
    /// Flushes, and writes that should have been durable, that were not.
    pub lies: u64,
    /// Writes of which only a part reached the disk at once.
    pub tears: u64,
}

/// What happens to one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// It waits.
    pub delay: Option<Duration>,
    /// Then it fails with this error number.
    pub errno: Option<i32>,
}

/// Settings that are in force.
#[derive(Debug, Default)]
pub struct Rules {
    /// Kinds of requests that any rule may apply to.
    touched: AtomicU8,
    state: Mutex<State>,
    errors: AtomicU64,
    delays: AtomicU64,
    lies: AtomicU64,
    tears: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    settings: Settings,
    rng: Option<Rng>,
    /// How often each rule has applied, errors first, then delays.
    met: Vec<u64>,
    /// Rules that are over.
    spent: Vec<bool>,
}

impl Scope {
    fn applies(&self, op: FaultOp, range: ByteRange) -> bool {
        self.op.is_none_or(|only| only == op)
            && self.range.is_none_or(|only| !only.intersect(&range).is_empty())
    }
}

impl State {
    fn scopes(&self) -> impl Iterator<Item = &Scope> {
        let errors = self.settings.errors.iter().map(|rule| &rule.scope);
        errors.chain(self.settings.delays.iter().map(|rule| &rule.scope))
    }

    fn one_in(&mut self, n: u64) -> bool {
        match (n, &mut self.rng) {
            (0, _) | (_, None) => false,
            (1, _) => true,
            (n, Some(rng)) => rng.one_in(n),
        }
    }

    /// Counts a request for a rule; whether the rule has an effect on it.
    fn meets(&mut self, rule: usize, scope: Scope, op: FaultOp, range: ByteRange) -> bool {
        if self.spent[rule] || !scope.applies(op, range) {
            return false;
        }
        self.met[rule] += 1;
        let hits = self.met[rule] > scope.after && self.one_in(scope.one_in);
        self.spent[rule] = hits && scope.once;
        hits
    }
}

impl Rules {
    /// These from now on; counting begins anew.
    pub fn set(&self, settings: Settings) {
        let rng = Some(Rng::new(settings.seed));
        let rules = settings.errors.len() + settings.delays.len();
        let mut touched = 0;
        let mut state = State { settings, rng, met: vec![0; rules], spent: vec![false; rules] };
        for scope in state.scopes() {
            touched |= match scope.op {
                Some(op) => op.bit(),
                None => u8::MAX,
            };
        }
        if state.settings.flush_lies_one_in > 0 {
            touched |= FaultOp::Flush.bit();
        }
        if state.settings.volatile.is_some() {
            touched |= FaultOp::Write.bit() | FaultOp::Flush.bit();
        }
        std::mem::swap(&mut *self.state.lock().unwrap(), &mut state);
        self.touched.store(touched, Ordering::Release);
    }

    /// The settings that are in force.
    pub fn settings(&self) -> Settings {
        self.state.lock().unwrap().settings.clone()
    }

    /// What was done so far.
    pub fn injected(&self) -> Injected {
        Injected {
            errors: self.errors.load(Ordering::Relaxed),
            delays: self.delays.load(Ordering::Relaxed),
            lies: self.lies.load(Ordering::Relaxed),
            tears: self.tears.load(Ordering::Relaxed),
        }
    }

    /// Whether a request is to be looked at. Costs one look at a bit where nothing of its kind is.
    pub fn touches(&self, op: FaultOp, range: ByteRange) -> bool {
        if self.touched.load(Ordering::Acquire) & op.bit() == 0 {
            return false;
        }
        let state = self.state.lock().unwrap();
        let by_rule = state
            .scopes()
            .zip(&state.spent)
            .any(|(scope, spent)| !spent && scope.applies(op, range));
        by_rule
            || (op == FaultOp::Flush && state.settings.flush_lies_one_in > 0)
            || (matches!(op, FaultOp::Flush | FaultOp::Write) && state.settings.volatile.is_some())
    }

    /// Decides about a request, and counts it.
    pub fn decide(&self, op: FaultOp, range: ByteRange) -> Fate {
        let mut fate = Fate::default();
        if self.touched.load(Ordering::Acquire) & op.bit() == 0 {
            return fate;
        }
        let mut state = self.state.lock().unwrap();
        let errors = state.settings.errors.len();
        for i in 0..errors {
            let rule = state.settings.errors[i];
            if state.meets(i, rule.scope, op, range) && fate.errno.is_none() {
                fate.errno = Some(rule.errno);
                self.errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        for i in 0..state.settings.delays.len() {
            let rule = state.settings.delays[i];
            if !state.meets(errors + i, rule.scope, op, range) {
                continue;
            }
            let spread = rule.most.saturating_sub(rule.least).as_micros() as u64;
            let more = state.rng.as_mut().map_or(0, |rng| rng.below(spread + 1));
            let delay = rule.least + Duration::from_micros(more);
            fate.delay = Some(fate.delay.unwrap_or_default() + delay);
        }
        if fate.delay.is_some() {
            self.delays.fetch_add(1, Ordering::Relaxed);
        }
        fate
    }

    /// Whether this flush, or write that is to be durable, is a lie.
    pub fn lies(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        let n = state.settings.flush_lies_one_in;
        let lies = state.one_in(n);
        self.lies.fetch_add(u64::from(lies), Ordering::Relaxed);
        lies
    }

    /// What of a write of so many units reaches the disk at once: nothing, all, or the first or
    /// last few.
    pub fn reaches(&self, units: u64) -> Reached {
        let mut state = self.state.lock().unwrap();
        let Some(volatile) = state.settings.volatile else { return Reached::All };
        if state.one_in(volatile.survive_one_in) {
            return Reached::All;
        }
        if units > 1 && state.one_in(volatile.tear_one_in) {
            self.tears.fetch_add(1, Ordering::Relaxed);
            let Some(rng) = &mut state.rng else { return Reached::Nothing };
            let kept = 1 + rng.below(units - 1);
            return if rng.one_in(2) { Reached::First(kept) } else { Reached::Last(kept) };
        }
        Reached::Nothing
    }
}

/// See [`Rules::reaches`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Nothing of it.
    Nothing,
    /// All of it.
    All,
    /// The first so many units.
    First(u64),
    /// The last so many units.
    Last(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: ByteRange = ByteRange { offset: 4096, len: 4096 };

    fn error(scope: Scope) -> ErrorRule {
        ErrorRule { scope, errno: libc::EIO }
    }

    fn rules(settings: Settings) -> Rules {
        let rules = Rules::default();
        rules.set(settings);
        rules
    }

    fn fails(rules: &Rules, op: FaultOp, range: ByteRange) -> bool {
        assert!(rules.touches(op, range) || rules.decide(op, range) == Fate::default());
        rules.decide(op, range).errno.is_some()
    }

    #[test]
    fn a_rule_applies_to_a_kind_and_a_range() {
        let only = Scope { op: Some(FaultOp::Write), range: Some(RANGE), ..Scope::default() };
        let rules = rules(Settings { errors: vec![error(only)], ..Settings::default() });
        let just_before = ByteRange { offset: 0, len: 4096 };
        let across = ByteRange { offset: 3584, len: 1024 };
        assert!(fails(&rules, FaultOp::Write, RANGE) && fails(&rules, FaultOp::Write, across));
        assert!(!fails(&rules, FaultOp::Write, just_before));
        assert!(!rules.touches(FaultOp::Write, just_before));
        assert!(!fails(&rules, FaultOp::Read, RANGE));
        assert!(!fails(&rules, FaultOp::Flush, ByteRange::default()));
        assert_eq!(rules.injected().errors, 2);
    }

    #[test]
    fn after_and_once_are_counted_by_rule() {
        let scope = Scope { after: 2, once: true, ..Scope::default() };
        let rules = rules(Settings { errors: vec![error(scope)], ..Settings::default() });
        let verdicts: Vec<_> =
            (0..5).map(|_| rules.decide(FaultOp::Read, RANGE).errno.is_some()).collect();
        assert_eq!(verdicts, [false, false, true, false, false]);
        assert!(!rules.touches(FaultOp::Read, RANGE), "it is over");
    }

    #[test]
    fn the_same_seed_gives_the_same_faults() {
        let run = |seed| -> Vec<Fate> {
            let scope = Scope { one_in: 3, ..Scope::default() };
            let (least, most) = (Duration::from_micros(10), Duration::from_micros(1000));
            let delay = DelayRule { scope: Scope::default(), least, most };
            let settings = Settings {
                seed,
                errors: vec![error(scope)],
                delays: vec![delay],
                ..Settings::default()
            };
            let rules = rules(settings);
            (0..200).map(|_| rules.decide(FaultOp::Write, RANGE)).collect()
        };
        let first = run(7);
        assert_eq!(first, run(7));
        assert_ne!(first, run(8));
        let failed = first.iter().filter(|fate| fate.errno.is_some()).count();
        assert!((40..100).contains(&failed), "{failed} of 200, and one in three was wanted");
        for fate in first {
            let delay = fate.delay.unwrap().as_micros();
            assert!((10..=1000).contains(&delay), "{delay}");
        }
    }

    #[test]
    fn flushes_lie_as_often_as_they_should() {
        let lies = |n| {
            let rules = rules(Settings { flush_lies_one_in: n, ..Settings::default() });
            (0..300).filter(|_| rules.lies()).count()
        };
        assert_eq!((lies(0), lies(1)), (0, 300));
        assert!((60..140).contains(&lies(3)), "{}", lies(3));
    }
}
