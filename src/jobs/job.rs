//! A job: its settings, its state, and the changes of it that any thread may cause.
//!
//! The state is behind one lock, held for moments and never across a call to a body. Whoever waits
//! for a change leaves a waker in `waiters`, a list with a lock of its own: gates wake it while
//! they hold theirs, and a job tells its gates of its quiet while it holds the state's.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use super::context::Context;
use super::limit::Limit;
use super::query::{Details, IoStatus, JobInfo};
use super::registry::{JobEvent, Jobs};
use super::state::Status;
use crate::block::node::Hold;
use crate::block::{Party, Root};
use crate::error::{Error, ErrorKind, Result};
use crate::images::Layers;
use crate::io::Fut;

/// What jobs do, by the names that clients know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Push a layer down into the one below.
    Commit,
    /// Fill a layer from what is below.
    Stream,
    /// Keep a copy in step with the disk.
    Mirror,
    /// Copy a disk as it was at the start.
    Backup,
    /// Make an image.
    Create,
}

impl JobKind {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            JobKind::Commit => "commit",
            JobKind::Stream => "stream",
            JobKind::Mirror => "mirror",
            JobKind::Backup => "backup",
            JobKind::Create => "create",
        }
    }

    /// Whether it works on a disk, and so has the events and commands of block jobs, too.
    pub fn is_block_job(self) -> bool {
        self != JobKind::Create
    }
}

/// What is special about a job.
///
/// `run` is on the jobs thread, the others are on the main thread; never two at a time.
pub trait Body: Send + Sync + 'static {
    /// Does the work. Dropped at any await without a [`Turn`](super::Turn) if the job is cancelled.
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()>;

    /// The work is done: puts it in force. The graph may be changed here; the job has no turn. The
    /// job's holds and roots are still there.
    ///
    /// # Errors
    /// The job fails, and [`Body::abort`] is called.
    fn finalize(&self, ending: super::Ending, layers: &mut Layers) -> Result<()> {
        let _ = (ending, layers);
        Ok(())
    }

    /// The work has failed, was cancelled, or another job of the group has: undoes what must not
    /// stay.
    fn abort(&self, layers: &mut Layers) {
        let _ = layers;
    }

    /// The job is over, however it ended, and what it held is free: nodes that nobody uses any more
    /// may go.
    fn concluded(&self, layers: &mut Layers) {
        let _ = layers;
    }

    /// What only this job tells in `query-block-jobs`.
    fn details(&self) -> Details {
        Details::default()
    }
}

/// How to start a job.
pub struct Spec {
    /// Its name; unique among the jobs there are.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Bytes in a second; 0 is no limit.
    pub speed: u64,
    /// Whether it is put in force without being asked.
    pub auto_finalize: bool,
    /// Whether it is forgotten without being asked.
    pub auto_dismiss: bool,
    /// Through these it issues requests. Their gates are closed before it is called quiet.
    pub roots: Vec<Root>,
    /// What it keeps others from doing.
    pub holds: Vec<Hold>,
}

impl Spec {
    /// A job with the settings that clients expect if they say nothing.
    pub fn new(id: impl Into<String>, kind: JobKind) -> Spec {
        Spec {
            id: id.into(),
            kind,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: kind.is_block_job(),
            roots: Vec::new(),
            holds: Vec::new(),
        }
    }
}

/// A job that was started.
pub(super) struct Job {
    pub(super) id: String,
    pub(super) kind: JobKind,
    pub(super) auto_finalize: bool,
    pub(super) auto_dismiss: bool,
    pub(super) body: Box<dyn Body>,
    pub(super) jobs: Jobs,
    state: Mutex<State>,
    /// Who wants to know of any change.
    waiters: Arc<Waiters>,
}

/// See [`Job::waiters`].
#[derive(Default)]
pub(super) struct Waiters(Mutex<Vec<Waker>>);

impl Waiters {
    pub(super) fn add(&self, waker: &Waker) {
        let mut wakers = self.0.lock().unwrap();
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }

    pub(super) fn wake(&self) {
        for waker in std::mem::take(&mut *self.0.lock().unwrap()) {
            waker.wake();
        }
    }
}

impl State {
    /// Whether all gates are open.
    pub(super) fn may_issue(&self) -> bool {
        self.parties.iter().all(|party| !party.is_closed())
    }
}

/// What changes.
pub(super) struct State {
    pub(super) status: Status,
    /// Where it is registered as somebody who issues requests, until its work has ended.
    pub(super) parties: Vec<Party>,
    /// Whether the operator or an error wants it to rest.
    pub(super) paused: bool,
    /// How it is to end, once it is ready.
    pub(super) ending: Option<super::Ending>,
    /// Whether it was asked to end as it is. It obeys unless it was told to complete before, and is not
    /// told to complete after that.
    pub(super) asked_to_stay: bool,
    /// Whether it is to end at once.
    pub(super) cancelled: bool,
    /// Turns that are taken.
    pub(super) turns: usize,
    pub(super) current: u64,
    pub(super) total: u64,
    pub(super) limit: Limit,
    pub(super) io_status: IoStatus,
    /// Why it failed.
    pub(super) error: Option<String>,
    /// Given back when the job is over.
    pub(super) roots: Vec<Root>,
    pub(super) holds: Vec<Hold>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({}, {})", self.id, self.state().status)
    }
}

impl Job {
    pub(super) fn new(spec: Spec, body: Box<dyn Body>, jobs: Jobs) -> Job {
        let waiters = Arc::new(Waiters::default());
        let join = |root: &Root| {
            let waiters = Arc::clone(&waiters);
            root.gate().join(format!("job '{}'", spec.id), move || waiters.wake())
        };
        let parties = spec.roots.iter().map(join).collect();
        let mut limit = Limit::default();
        limit.set_speed(spec.speed);
        Job {
            id: spec.id,
            kind: spec.kind,
            auto_finalize: spec.auto_finalize,
            auto_dismiss: spec.auto_dismiss,
            body,
            jobs,
            state: Mutex::new(State {
                status: Status::Created,
                parties,
                paused: false,
                ending: None,
                asked_to_stay: false,
                cancelled: false,
                turns: 0,
                current: 0,
                total: 0,
                limit,
                io_status: IoStatus::Ok,
                error: None,
                roots: spec.roots,
                holds: spec.holds,
            }),
            waiters,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn waiters(&self) -> &Waiters {
        &self.waiters
    }

    /// Changes the state of life, and says so. The event is sent under the lock, so that events
    /// come in the order of the changes.
    pub(super) fn transition(&self, state: &mut State, next: Status) {
        // Null is left for good: whoever dismisses twice finds no job.
        assert!(state.status.may_become(next), "{}: from {} to {next}", self.id, state.status);
        state.status = next;
        self.jobs.tell(&JobEvent::Status { id: self.id.clone(), status: next });
    }

    /// Brings the state in line with whether the job is to rest; to be called when that, or the
    /// number of turns, has changed.
    pub(super) fn settle(&self, state: &mut State) {
        let next = match (state.paused && !state.cancelled, state.status) {
            (true, Status::Running) if state.turns == 0 => Status::Paused,
            (true, Status::Ready) if state.turns == 0 => Status::Standby,
            (false, Status::Paused) => Status::Running,
            (false, Status::Standby) => Status::Ready,
            _ => return,
        };
        self.transition(state, next);
    }

    /// Tells the gates that are closed that nothing of this job is in flight, if that is so.
    pub(super) fn report_if_quiet(&self) {
        let state = self.state();
        if state.turns == 0 {
            // Under the lock: no turn can be taken meanwhile.
            for party in state.parties.iter().filter(|party| party.owes_report()) {
                party.report_quiet();
            }
        }
    }

    /// Lets go of everything that the job kept from others.
    pub(super) fn release(&self) {
        let mut state = self.state();
        let (roots, holds) = (std::mem::take(&mut state.roots), std::mem::take(&mut state.holds));
        drop(state);
        drop((holds, roots));
    }

    pub(super) fn info(&self) -> JobInfo {
        let state = self.state();
        JobInfo {
            id: self.id.clone(),
            kind: self.kind,
            status: state.status,
            current: state.current,
            total: state.total,
            speed: state.limit.speed(),
            busy: state.turns > 0,
            paused: state.paused,
            ready: matches!(state.status, Status::Ready | Status::Standby),
            io_status: state.io_status,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            error: state.error.clone(),
            details: self.body.details(),
        }
    }
}

/// The error of a job that was cancelled.
pub(super) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the job was cancelled")
}
