//! What a back-end process costs, as /proc and its CPU clock tell.
//!
//! CPU time is the process's CPU clock: user and system time of all its threads in nanoseconds,
//! those that have ended and the kernel's io_uring workers included. Memory is RSS and, from
//! `smaps_rollup`, what is private to the process; shared guest memory shows as shmem.

#![allow(unsafe_code)]

use std::fs;
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result, ResultExt};
use crate::units::KIB;

/// CPU time and context switches so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// User and system time.
    pub cpu: Duration,
    /// Context switches, voluntary or not, of the threads that live.
    pub switches: u64,
    /// Number of threads.
    pub threads: u64,
}

/// Memory in use, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Footprint {
    /// Resident set.
    pub rss: u64,
    /// Resident shared memory, which is guest memory above all.
    pub rss_shared_memory: u64,
    /// Private memory: clean and dirty.
    pub private: u64,
}

impl Footprint {
    /// Resident set less guest memory.
    pub fn own(&self) -> u64 {
        self.rss.saturating_sub(self.rss_shared_memory)
    }
}

/// CPU time and context switches of a process.
pub fn usage(pid: u32) -> Result<Usage> {
    let mut usage = Usage { cpu: cpu_time(pid)?, ..Usage::default() };
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).context(|| format!("cannot read {tasks}"))? {
        usage.threads += 1;
        // A thread that ends right now is no error.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else { continue };
        usage.switches += field(&status, "voluntary_ctxt_switches:")
            + field(&status, "nonvoluntary_ctxt_switches:");
    }
    Ok(usage)
}

/// Memory of a process.
pub fn footprint(pid: u32) -> Result<Footprint> {
    let read = |name: &str| {
        let path = format!("/proc/{pid}/{name}");
        fs::read_to_string(&path).context(|| format!("cannot read {path}"))
    };
    let (status, rollup) = (read("status")?, read("smaps_rollup")?);
    Ok(Footprint {
        rss: KIB * field(&status, "VmRSS:"),
        rss_shared_memory: KIB * field(&status, "RssShmem:"),
        private: KIB * (field(&rollup, "Private_Clean:") + field(&rollup, "Private_Dirty:")),
    })
}

/// The number after `name` at the beginning of a line, 0 if there is none.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// CPU time of all threads that a process has or had.
fn cpu_time(pid: u32) -> Result<Duration> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| Error::invalid("no such process"))?;
    let mut clock = 0;
    // SAFETY: writes one clock number to `clock`.
    let failed = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if failed != 0 {
        return Err(Error::from_errno(failed).context(format!("CPU clock of process {pid}")));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec to `time`.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        let err = std::io::Error::last_os_error();
        return Err(Error::from(err).context(format!("CPU clock of process {pid}")));
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_costs_something() {
        let pid = std::process::id();
        let before = usage(pid).unwrap();
        let mut sum = 0u64;
        while usage(pid).unwrap().cpu < before.cpu + Duration::from_millis(2) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(before.threads >= 1);
        let memory = footprint(pid).unwrap();
        assert!(memory.rss > memory.private / 2 && memory.private > 0);
        assert!(usage(u32::MAX).is_err());
    }
}
