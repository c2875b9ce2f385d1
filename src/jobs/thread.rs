//! The thread on which bodies run: a reactor, and a clock for those that wait for a time.
//!
//! It starts with the first job and ends with the last, so a process without jobs pays nothing.
//! It sleeps in its reactor; the clock is a timerfd that the reactor watches.

use std::cell::RefCell;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::context::drive;
use super::job::Job;
use crate::error::{Error, Result, ResultExt};
use crate::io::engine::WATCH;
use crate::io::{Reactor, reactor};

/// The reactor's number for the clock.
const CLOCK: u64 = WATCH;

/// The thread's handle: where new jobs are left for it.
#[derive(Default)]
pub(super) struct JobsThread {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    /// Jobs that the thread has not seen yet.
    new: Vec<Arc<Job>>,
    /// Makes the thread look; `None` if there is none.
    notify: Option<Box<dyn Fn() + Send>>,
}

impl fmt::Debug for JobsThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobsThread")
    }
}

impl JobsThread {
    /// Has the thread run a job; starts the thread if there is none. Only the main thread calls
    /// this, so no two threads start at a time.
    pub(super) fn add(&self, job: Arc<Job>) -> Result<()> {
        {
            let mut shared = self.shared.lock().unwrap();
            if let Some(notify) = &shared.notify {
                notify();
                shared.new.push(job);
                return Ok(());
            }
        }
        let (ready, started) = sync_channel(1);
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("vublk-jobs".into())
            .spawn(move || run(&shared, job, &ready))
            .context(|| "jobs thread")?;
        started.recv().unwrap_or_else(|_| Err(Error::invalid("the jobs thread died")))
    }
}

/// The thread.
fn run(shared: &Mutex<Shared>, first: Arc<Job>, ready: &SyncSender<Result<()>>) {
    let made = Reactor::new(reactor::default_engine())
        .context(|| "cannot set up I/O for jobs")
        .and_then(|reactor| Ok((reactor, Clock::new()?)));
    let (reactor, clock) = match made {
        Ok(made) => made,
        Err(err) => {
            let _ = ready.send(Err(err));
            return;
        }
    };
    reactor.engine().watch(clock.fd.as_raw_fd(), CLOCK);
    CLOCK_HERE.set(Some(clock));
    shared.lock().unwrap().notify = Some(Box::new(reactor.notifier()));
    let _ = ready.send(Ok(()));
    reactor.enter(|| {
        reactor.executor().spawn(drive(first));
        let mut events = Vec::new();
        loop {
            {
                let mut shared = shared.lock().unwrap();
                for job in shared.new.drain(..) {
                    reactor.executor().spawn(drive(job));
                }
                if reactor.executor().live() == 0 {
                    // Under the lock: whoever comes now starts another thread.
                    shared.notify = None;
                    return;
                }
            }
            reactor.turn(true, &mut events);
            // Nothing but the clock is watched. It may also have been taken by somebody else's
            // turn of this reactor, so it is looked at in any case.
            events.clear();
            CLOCK_HERE.with_borrow_mut(|clock| {
                if let Some(clock) = clock {
                    clock.tick();
                }
            });
        }
    });
    reactor.engine().unwatch(CLOCK);
    CLOCK_HERE.set(None);
}

thread_local! {
    /// The clock of this thread.
    static CLOCK_HERE: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// Has a task polled again at a time. On a thread that runs no jobs, at once.
pub(super) fn wake_at(at: Instant, waker: &Waker) {
    CLOCK_HERE.with_borrow_mut(|clock| match clock {
        Some(clock) => clock.add(at, waker),
        None => waker.wake_by_ref(),
    });
}

/// Who waits for which time.
struct Clock {
    fd: OwnedFd,
    /// Few, so a list will do.
    waiting: Vec<(Instant, Waker)>,
    /// What the timer is set to.
    armed: Option<Instant>,
}

impl Clock {
    fn new() -> Result<Clock> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags).context(|| "timerfd")?;
        Ok(Clock { fd, waiting: Vec::new(), armed: None })
    }

    fn add(&mut self, at: Instant, waker: &Waker) {
        // Once for a task, at the earliest time that it asked for: it asks again for the others.
        match self.waiting.iter_mut().find(|(_, known)| known.will_wake(waker)) {
            Some((known, _)) => *known = at.min(*known),
            None => self.waiting.push((at, waker.clone())),
        }
        self.arm();
    }

    /// Wakes those whose time has come.
    fn tick(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let is_due = |(at, _): &mut (Instant, Waker)| *at <= now;
        for (_, waker) in self.waiting.extract_if(.., is_due) {
            waker.wake();
        }
        if self.armed.is_some_and(|armed| armed <= now) {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.fd, &mut count);
            self.armed = None;
        }
        self.arm();
    }

    fn arm(&mut self) {
        let Some(next) = self.waiting.iter().map(|(at, _)| *at).min() else { return };
        if self.armed.is_some_and(|armed| armed <= next) {
            return;
        }
        // Zero would disarm it.
        let left = next.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value =
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timer = Itimerspec { it_interval, it_value };
        match timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &timer) {
            Ok(_) => self.armed = Some(next),
            Err(err) => tracing::error!("timerfd_settime: {err}"),
        }
    }
}
