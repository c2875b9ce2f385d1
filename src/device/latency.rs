//! How long requests take, from the ring to their completion.
//!
//! A look at the clock costs more than a planned request may, so a worker times one request in
//! `EVERY`, and one at a time. What it finds goes into a histogram that anybody may read.

use std::time::{Duration, Instant};

use super::export::Counter;

/// One request in so many is timed.
const EVERY: u32 = 16;
/// Buckets for each doubling of the time.
const PER_OCTAVE: u64 = 4;
/// Octaves above a microsecond's quarter; the last bucket has everything above an hour.
const OCTAVES: u64 = 35;
/// The upper end of the first bucket, in nanoseconds.
const FIRST: u64 = 256;
const BUCKETS: usize = (OCTAVES * PER_OCTAVE) as usize;

/// Times of requests of one kind. One thread adds, anybody may read.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[Counter; BUCKETS]>,
    total_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: Box::new(std::array::from_fn(|_| Counter::default())),
            total_ns: Counter::default(),
        }
    }
}

impl Histogram {
    fn add(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(ns)].add(1);
        self.total_ns.add(ns);
    }

    fn absorb(&self, other: &Histogram) {
        for (bucket, other) in self.buckets.iter().zip(other.buckets.iter()) {
            bucket.add(other.get());
        }
        self.total_ns.add(other.total_ns.get());
    }

    /// Adds the times to others, to see those of several workers as one.
    pub fn add_to(&self, times: &mut Times) {
        for (sum, bucket) in times.buckets.iter_mut().zip(self.buckets.iter()) {
            *sum += bucket.get();
        }
        times.total_ns = times.total_ns.wrapping_add(self.total_ns.get());
    }
}

/// A look at one or several histograms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Times {
    buckets: Vec<u64>,
    total_ns: u64,
}

impl Default for Times {
    fn default() -> Self {
        Times { buckets: vec![0; BUCKETS], total_ns: 0 }
    }
}

impl Times {
    /// The buckets that are not empty: where each ends, and how many requests are in it.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let buckets = self.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        buckets.map(|(index, count)| (Duration::from_nanos(end_of(index)), *count))
    }

    /// How many requests were timed.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Their times together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.total_ns)
    }

    /// The time that so many of 1000 requests did not exceed, rounded up by less than a fifth.
    pub fn permille(&self, permille: u64) -> Duration {
        let wanted = (self.count() * permille.min(1000)).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(end_of(index));
            }
        }
        Duration::ZERO
    }

    /// What has come since an earlier look.
    pub fn since(&self, earlier: &Times) -> Times {
        let buckets = self.buckets.iter().zip(&earlier.buckets);
        Times {
            buckets: buckets.map(|(now, then)| now.saturating_sub(*then)).collect(),
            total_ns: self.total_ns.wrapping_sub(earlier.total_ns),
        }
    }
}

/// The bucket of a time.
fn bucket_of(ns: u64) -> usize {
    let Some(octave) = (ns / FIRST).checked_ilog2() else { return 0 };
    let octave = u64::from(octave);
    // Where between this power of two and the next.
    let within = (ns >> octave) * PER_OCTAVE / FIRST - PER_OCTAVE;
    ((octave * PER_OCTAVE + within + 1) as usize).min(BUCKETS - 1)
}

/// Where a bucket ends, in nanoseconds.
fn end_of(index: usize) -> u64 {
    let (octave, within) = (index as u64 / PER_OCTAVE, index as u64 % PER_OCTAVE);
    (FIRST << octave) + ((FIRST << octave) / PER_OCTAVE) * within
}

/// Which kind of request it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

/// The times of a worker's requests.
#[derive(Debug, Default)]
pub struct Latencies {
    /// Of reads.
    pub reads: Histogram,
    /// Of writes.
    pub writes: Histogram,
    /// Of flushes.
    pub flushes: Histogram,
}

impl Latencies {
    /// Adds the times of a worker that is gone.
    pub(super) fn absorb(&self, gone: &Latencies) {
        self.reads.absorb(&gone.reads);
        self.writes.absorb(&gone.writes);
        self.flushes.absorb(&gone.flushes);
    }

    pub(super) fn add(&self, kind: Timed, time: Duration) {
        match kind {
            Timed::Read => self.reads.add(time),
            Timed::Write => self.writes.add(time),
            Timed::Flush => self.flushes.add(time),
        }
    }
}

/// The worker's part: which request is being timed.
#[derive(Debug)]
pub(super) struct Stopwatch {
    /// Requests until the next that may be timed.
    countdown: u32,
    /// The slot of the request that is timed; none has the largest number.
    slot: u32,
    since: Instant,
}

impl Stopwatch {
    pub(super) fn new() -> Stopwatch {
        Stopwatch { countdown: 1, slot: u32::MAX, since: Instant::now() }
    }

    /// A request begins in this slot.
    #[inline]
    pub(super) fn begin(&mut self, slot: u32) {
        self.countdown -= 1;
        if self.countdown == 0 {
            self.countdown = EVERY;
            if self.slot == u32::MAX {
                self.slot = slot;
                self.since = Instant::now();
            }
        }
    }

    /// The request in this slot has ended: how long it took, if it was timed.
    #[inline]
    pub(super) fn end(&mut self, slot: u32) -> Option<Duration> {
        if self.slot != slot {
            return None;
        }
        self.slot = u32::MAX;
        Some(self.since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_all_times_without_a_gap() {
        let mut last = 0;
        for exponent in 0..64 {
            for quarter in 0..8u64 {
                let ns = (1u64 << exponent) + ((1u64 << exponent) / 8) * quarter;
                let bucket = bucket_of(ns);
                assert!(bucket >= last && bucket < BUCKETS, "{ns}");
                last = bucket;
                if bucket < BUCKETS - 1 {
                    assert!(ns < end_of(bucket) && (bucket == 0 || ns >= end_of(bucket - 1)));
                }
            }
        }
        assert!(end_of(BUCKETS - 2) > 3_600_000_000_000, "an hour");
    }

    #[test]
    fn percentiles_and_differences() {
        let histogram = Histogram::default();
        let mut before = Times::default();
        assert_eq!(before.permille(500), Duration::ZERO);
        histogram.add(Duration::from_secs(1));
        histogram.add_to(&mut before);
        for us in 1..=100 {
            histogram.add(Duration::from_micros(us));
        }
        let mut after = Times::default();
        histogram.add_to(&mut after);
        let times = after.since(&before);
        assert_eq!((times.count(), times.total()), (100, Duration::from_micros(5050)));
        for (permille, us) in [(500, 50.0), (990, 99.0), (1000, 100.0)] {
            let found = times.permille(permille).as_secs_f64() * 1e6;
            assert!(found >= us && found < us * 1.2, "{permille}: {found}");
        }
    }

    #[test]
    fn one_request_in_sixteen_and_one_at_a_time() {
        let mut watch = Stopwatch::new();
        let mut timed = 0;
        for round in 0..160u32 {
            watch.begin(round % 7);
            timed += u32::from(watch.end(round % 7).is_some());
        }
        assert_eq!(timed, 10);
        watch.begin(3);
        for slot in 4..100 {
            watch.begin(slot);
        }
        assert_eq!(watch.end(5), None);
        assert!(watch.end(3).is_some());
    }
}
