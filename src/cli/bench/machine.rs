//! What the machine itself takes: the least that any back-end can do with.
//!
//! A request costs its guest and its back-end two wake-ups and a few system calls, whoever serves
//! it. These differ between machines by more than back-ends do, so figures of two machines can be
//! compared only with these beside them.

use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

use crate::error::{Error, Result, ResultExt};

/// How often each is done; the best of [`TRIES`] counts, as others only make it longer.
const CALLS: u32 = 100_000;
const SWITCHES: u32 = 4_000;
const TRIES: usize = 5;

/// Times in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// A system call that does nothing.
    pub system_call_us: f64,
    /// There and back between two threads on one CPU, by eventfds.
    pub same_cpu_us: f64,
    /// The same between two CPUs, where both threads sleep; none if there is one CPU only.
    pub other_cpu_us: Option<f64>,
}

impl Machine {
    /// Measures it, on the CPUs that this process may use. Takes a few seconds at most.
    ///
    /// # Errors
    /// If the host gives no eventfds or does not let us choose a CPU.
    pub fn measure() -> Result<Machine> {
        let allowed = sched_getaffinity(None).context(|| "the CPUs of this process")?;
        let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
        let last = *cpus.last().expect("this runs somewhere");
        let other = cpus.first().copied().filter(|first| *first != last);
        Ok(Machine {
            system_call_us: best(|| Ok(system_calls()))?,
            same_cpu_us: best(|| ping_pong(last, last))?,
            other_cpu_us: other.map(|other| best(|| ping_pong(last, other))).transpose()?,
        })
    }

    /// For programs.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|err| Error::invalid(err.to_string()))
    }

    /// For people.
    pub fn table(&self) -> String {
        let Machine { system_call_us, same_cpu_us, other_cpu_us } = self;
        let other = other_cpu_us.map_or("-".into(), |us| format!("{us:.1} us"));
        format!(
            "system call            {system_call_us:.2} us\n\
             wake-up and back       {same_cpu_us:.1} us on one CPU, {other} between two\n"
        )
    }
}

/// The shortest of a few, in microseconds.
fn best(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..TRIES {
        best = best.min(measure()?);
    }
    Ok(best)
}

fn per(time: Duration, count: u32) -> f64 {
    time.as_secs_f64() * 1e6 / f64::from(count)
}

fn system_calls() -> f64 {
    let begin = Instant::now();
    for _ in 0..CALLS {
        // One that the C library cannot answer by itself.
        std::hint::black_box(rustix::process::getppid());
    }
    per(begin.elapsed(), CALLS)
}

fn ping_pong(here: usize, there: usize) -> Result<f64> {
    let event = || eventfd(0, EventfdFlags::CLOEXEC).context(|| "eventfd");
    let (ping, pong) = (event()?, event()?);
    thread::scope(|scope| {
        let other = scope.spawn(|| -> Result<()> {
            run_on(there)?;
            for _ in 0..SWITCHES {
                wait(&ping)?;
                signal(&pong)?;
            }
            Ok(())
        });
        // A thread of its own: the caller's goes on where it likes.
        let this = scope.spawn(|| -> Result<f64> {
            run_on(here)?;
            let begin = Instant::now();
            for _ in 0..SWITCHES {
                signal(&ping)?;
                wait(&pong)?;
            }
            Ok(per(begin.elapsed(), SWITCHES))
        });
        other.join().expect("it does not panic")?;
        this.join().expect("it does not panic")
    })
}

fn run_on(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).context(|| format!("cannot run on CPU {cpu}"))
}

fn signal(event: &OwnedFd) -> Result<()> {
    rustix::io::write(event, &1u64.to_ne_bytes())?;
    Ok(())
}

fn wait(event: &OwnedFd) -> Result<()> {
    rustix::io::read(event, &mut [0; 8])?;
    Ok(())
}
