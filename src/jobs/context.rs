//! What a job's body has to do with the rest: turns, the speed limit, progress, readiness, errors.

use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::error_policy::{Action, OnError, Operation};
use super::job::{Job, cancelled};
use super::query::IoStatus;
use super::registry::JobEvent;
use super::state::Status;
use super::thread;
use crate::error::{Error, ErrorKind, Result};
use crate::images::Layers;

/// How a job that was ready ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was completed: for a mirror or an active commit, the guest goes over to the copy. Also the
    /// ending of all jobs that end by themselves.
    Complete,
    /// It was cancelled without force: the copy is as it should be, and the guest stays where it is.
    Stay,
}

/// A body's handle on its job.
#[derive(Clone, Debug)]
pub struct Context {
    job: Arc<Job>,
}

/// The right to issue requests. Nobody's gate closes, no pause begins, and a job that is cancelled
/// goes on until it is dropped.
#[must_use]
pub struct Turn {
    job: Arc<Job>,
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Turn of {}", self.job.id)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.job.state();
        state.turns -= 1;
        if state.turns == 0 {
            self.job.settle(&mut state);
            drop(state);
            self.job.report_if_quiet();
        }
    }
}

impl Context {
    pub(super) fn new(job: Arc<Job>) -> Context {
        Context { job }
    }

    /// The job's name.
    pub fn id(&self) -> &str {
        &self.job.id
    }

    /// Waits until the job may issue requests: it is not paused, and no gate of its roots is closed.
    /// Take a turn for each request or a few, and none across anything that waits for others, above
    /// all for the main thread. Several may be held at a time. A node and its driver may be another
    /// one in the next turn.
    pub async fn turn(&self) -> Turn {
        poll_fn(|cx| {
            // Before the look, so that no change is missed.
            self.job.waiters().add(cx.waker());
            let mut state = self.job.state();
            // A job that is cancelled begins nothing more, and is dropped while it waits here.
            if state.cancelled || state.paused || !state.may_issue() {
                self.job.settle(&mut state);
                drop(state);
                self.job.report_if_quiet();
                return Poll::Pending;
            }
            state.turns += 1;
            drop(state);
            let turn = Turn { job: Arc::clone(&self.job) };
            // A gate that has closed meanwhile has not been told of quiet, and waits for this turn.
            Poll::Ready(turn)
        })
        .await
    }

    /// Waits until so many bytes may be copied without going beyond the speed limit. Before a turn.
    pub async fn throttle(&self, bytes: u64) {
        poll_fn(|cx| {
            self.job.waiters().add(cx.waker());
            let now = Instant::now();
            let taken = self.job.state().limit.take(bytes, now);
            match taken {
                Ok(()) => Poll::Ready(()),
                Err(at) => {
                    thread::wake_at(at, cx.waker());
                    Poll::Pending
                }
            }
        })
        .await;
    }

    /// Rests for a while, or until the job is told how to end. Without a turn.
    pub async fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        poll_fn(|cx| {
            self.job.waiters().add(cx.waker());
            if self.ending().is_some() || Instant::now() >= until {
                return Poll::Ready(());
            }
            thread::wake_at(until, cx.waker());
            Poll::Pending
        })
        .await;
    }

    /// Sets how far the job has to go.
    pub fn set_total(&self, total: u64) {
        self.job.state().total = total;
    }

    /// More has to be done than was known before.
    pub fn add_total(&self, more: u64) {
        let mut state = self.job.state();
        state.total = state.total.saturating_add(more);
    }

    /// So much more is done.
    pub fn advance(&self, done: u64) {
        let mut state = self.job.state();
        state.current = state.current.saturating_add(done);
    }

    /// Sets how far the job is.
    pub fn set_current(&self, current: u64) {
        self.job.state().current = current;
    }

    /// The job is in step with the guest, and from now on waits to be told how to end.
    pub fn ready(&self) {
        let mut state = self.job.state();
        // A rest that was asked for began before, or begins behind this.
        if matches!(state.status, Status::Paused) {
            self.job.transition(&mut state, Status::Running);
        }
        self.job.transition(&mut state, Status::Ready);
        self.job.tell_block_job(&state, JobEvent::Ready);
        self.job.settle(&mut state);
    }

    /// How the job is to end, once it was told so and may go on: it does not end while it is paused.
    pub fn ending(&self) -> Option<Ending> {
        let state = self.job.state();
        state.ending.filter(|_| !state.paused)
    }

    /// Waits until the job is told how to end.
    pub async fn wait_ending(&self) -> Ending {
        poll_fn(|cx| {
            self.job.waiters().add(cx.waker());
            self.ending().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Decides what to do about a read or write that failed, and tells clients. After
    /// [`Action::Stop`] the job is paused: take a turn and try again.
    pub fn on_error(&self, policy: OnError, operation: Operation, err: &Error) -> Action {
        let action = policy.action(err);
        tracing::warn!(
            "job '{}': {} failed ({}): {err}",
            self.job.id,
            operation.name(),
            action.name()
        );
        if self.job.kind.is_block_job() {
            self.job.jobs.tell(&JobEvent::Error { id: self.job.id.clone(), operation, action });
        }
        if action == Action::Stop {
            let mut state = self.job.state();
            state.paused = true;
            state.io_status = match err.kind() {
                ErrorKind::NoSpace => IoStatus::NoSpace,
                _ => IoStatus::Failed,
            };
            self.job.settle(&mut state);
        }
        action
    }

    /// Has the main thread do something, a change of the graph for instance, and waits for it. The
    /// job must have no turn. If the job is cancelled meanwhile, the main thread does it all the
    /// same, unless it has not begun.
    pub async fn on_main<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Layers) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let answer = Answer::new(&self.job);
        let to_main = answer.clone();
        self.job.jobs.on_main(Box::new(move |layers| {
            if to_main.is_wanted() {
                to_main.give(task(layers));
            }
        }));
        answer.wait().await
    }

    /// Does something that blocks (and must not be dropped half-way) on a thread of its own, and
    /// waits for it.
    pub async fn blocking<T: Send + 'static>(
        &self,
        task: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let answer = Answer::new(&self.job);
        let to_thread = answer.clone();
        let thread = std::thread::Builder::new().name(format!("job-{}", self.job.id));
        let thread = thread.spawn(move || to_thread.give(task()));
        thread.map_err(Error::from)?;
        answer.wait().await
    }
}

/// A place for the result of what another thread does.
struct Answer<T> {
    job: Arc<Job>,
    slot: Arc<Mutex<Option<Result<T>>>>,
    /// Lives while somebody waits.
    wanted: Arc<()>,
}

impl<T> Clone for Answer<T> {
    fn clone(&self) -> Self {
        Answer {
            job: Arc::clone(&self.job),
            slot: Arc::clone(&self.slot),
            wanted: Arc::clone(&self.wanted),
        }
    }
}

impl<T> Answer<T> {
    fn new(job: &Arc<Job>) -> Self {
        Answer { job: Arc::clone(job), slot: Arc::default(), wanted: Arc::default() }
    }

    /// Whether the one who waits is still there, as seen by the one who was asked.
    fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.wanted) > 1
    }

    fn give(&self, result: Result<T>) {
        *self.slot.lock().unwrap() = Some(result);
        self.job.waiters().wake();
    }

    fn wait(&self) -> impl Future<Output = Result<T>> + '_ {
        poll_fn(|cx| {
            self.job.waiters().add(cx.waker());
            let result = self.slot.lock().unwrap().take();
            result.map_or(Poll::Pending, Poll::Ready)
        })
    }
}

/// Runs a body to its end, or drops it when the job is cancelled and has no turn, and reports quiet
/// to gates that close while the body waits for something else than a turn.
///
/// A body that has a turn may have requests with the kernel. Those go on when their future is
/// dropped, and what kept others away from where they land (locks, pins, the turn itself) would be
/// gone: so they are waited for.
pub(super) async fn drive(job: Arc<Job>) {
    {
        let mut state = job.state();
        if !state.cancelled {
            job.transition(&mut state, Status::Running);
            job.settle(&mut state);
        }
    }
    let context = Context::new(Arc::clone(&job));
    let is_given_up = || {
        let state = job.state();
        state.cancelled && state.turns == 0
    };
    let result = {
        let mut run = job.body.run(&context);
        poll_fn(|cx| {
            job.waiters().add(cx.waker());
            if is_given_up() {
                return Poll::Ready(Err(cancelled()));
            }
            let poll = run.as_mut().poll(cx);
            job.report_if_quiet();
            if poll.is_pending() && is_given_up() {
                return Poll::Ready(Err(cancelled()));
            }
            poll
        })
        .await
    };
    // The future is dropped. From here on nobody would look whether a gate waits for us.
    let parties = std::mem::take(&mut job.state().parties);
    drop(parties);
    let ended = Arc::clone(&job);
    job.jobs.on_main(Box::new(move |layers| ended.work_ended(result, layers)));
}
