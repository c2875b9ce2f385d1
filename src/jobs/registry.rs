//! All jobs, and the verbs that operators have for them.

use std::fmt;
use std::sync::{Arc, Mutex};

use super::context::Ending;
use super::error_policy::{Action, Operation};
use super::job::{Body, Job, JobKind, Spec, cancelled};
use super::query::{IoStatus, JobInfo};
use super::state::{Status, Verb};
use super::thread::JobsThread;
use crate::error::{Error, ErrorKind, Result};
use crate::images::Layers;

/// What happens to jobs, for whoever tells clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// A job has changed its state.
    Status {
        /// The job.
        id: String,
        /// Its state from now on.
        status: Status,
    },
    /// A block job waits to be completed.
    Ready(Figures),
    /// A block job waits to be finalized.
    Pending {
        /// The job.
        id: String,
        /// What it does.
        kind: JobKind,
    },
    /// A block job has ended, with this error if there is one.
    Completed(Figures, Option<String>),
    /// A block job was cancelled.
    Cancelled(Figures),
    /// A read or write of a block job has failed.
    Error {
        /// The job.
        id: String,
        /// What failed.
        operation: Operation,
        /// What is done about it.
        action: Action,
    },
}

/// What events tell of a block job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// The job.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// How far it has to go.
    pub total: u64,
    /// How far it is.
    pub current: u64,
    /// Bytes in a second; 0 is no limit.
    pub speed: u64,
}

/// Something for the main thread to do, which has the images and their graph in its hands.
pub type MainTask = Box<dyn FnOnce(&mut Layers) + Send>;

/// Who hears of jobs and has the main thread's ear.
pub trait Listener: Send + Sync {
    /// Something has happened. Must not block and must not ask anything of a job.
    fn event(&self, event: &JobEvent);

    /// Has the main thread do this, in the order of the calls.
    fn on_main(&self, task: MainTask);
}

/// Why a verb was not obeyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VerbError {
    /// There is no such job.
    NotFound,
    /// The job does not do that, or not now.
    Refused(String),
}

/// All jobs of a process. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    inner: Arc<Inner>,
}

struct Inner {
    /// In the order of their start.
    jobs: Mutex<Vec<Arc<Job>>>,
    thread: JobsThread,
    listener: Box<dyn Listener>,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Jobs({:?})", self.inner.jobs.lock().unwrap())
    }
}

impl Jobs {
    /// No jobs yet.
    pub fn new(listener: impl Listener + 'static) -> Jobs {
        let listener = Box::new(listener);
        Jobs {
            inner: Arc::new(Inner {
                jobs: Mutex::default(),
                thread: JobsThread::default(),
                listener,
            }),
        }
    }

    /// Checks that a new job may have this name.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_id(&self, id: &str) -> Result<()> {
        let is_well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !is_well_formed {
            return Err(Error::invalid(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_some() {
            return Err(Error::new(ErrorKind::Busy, format!("Job ID '{id}' already in use")));
        }
        Ok(())
    }

    /// Starts a job. To be called on the main thread.
    ///
    /// # Errors
    /// The name is of no use, or the host gives us no thread.
    pub fn start(&self, spec: Spec, body: impl Body) -> Result<()> {
        self.check_id(&spec.id)?;
        tracing::info!("{} job '{}' starts", spec.kind.name(), spec.id);
        let job = Arc::new(Job::new(spec, Box::new(body), self.clone()));
        self.tell(&JobEvent::Status { id: job.id.clone(), status: Status::Created });
        self.inner.jobs.lock().unwrap().push(Arc::clone(&job));
        if let Err(err) = self.inner.thread.add(Arc::clone(&job)) {
            self.on_main(Box::new(move |layers| {
                job.work_ended(Err(err.context("cannot run a job")), layers);
            }));
        }
        Ok(())
    }

    /// What there is to know of each job.
    pub fn query(&self) -> Vec<JobInfo> {
        let jobs = self.inner.jobs.lock().unwrap().clone();
        jobs.iter().map(|job| job.info()).collect()
    }

    /// Puts in force what a job has done that waits for this, on the main thread. Then it is over: whoever
    /// asked may dismiss it at once.
    pub fn finalize(&self, id: &str, layers: &mut Layers) -> Result<(), VerbError> {
        let job = self.find(id).ok_or(VerbError::NotFound)?;
        let status = job.state().status;
        if !Verb::Finalize.is_allowed(status) {
            return Err(refused(id, status, Verb::Finalize));
        }
        job.finalize(layers);
        Ok(())
    }

    /// Obeys a verb that needs nothing but a name. For `Cancel`, what is done counts for nothing,
    /// however far the job is; see [`Jobs::cancel_gently`].
    pub fn apply(&self, id: &str, verb: Verb) -> Result<(), VerbError> {
        let job = self.find(id).ok_or(VerbError::NotFound)?;
        let mut state = job.state();
        if verb == Verb::Resume && !state.paused {
            return Err(VerbError::Refused("Can't resume a job that was not paused".into()));
        }
        if !verb.is_allowed(state.status) {
            return Err(refused(id, state.status, verb));
        }
        match verb {
            Verb::Pause if state.paused => {
                return Err(VerbError::Refused("Job is already paused".into()));
            }
            Verb::Pause => {
                state.paused = true;
                job.settle(&mut state);
            }
            Verb::Resume => {
                state.paused = false;
                state.io_status = IoStatus::Ok;
                job.settle(&mut state);
            }
            Verb::Complete if state.asked_to_stay => {
                return Err(VerbError::Refused(format!(
                    "The active block job '{id}' cannot be completed"
                )));
            }
            Verb::Complete => state.ending = Some(Ending::Complete),
            Verb::Cancel if state.status.is_at_work() => {
                state.cancelled = true;
                job.settle(&mut state);
            }
            Verb::Cancel => {
                drop(state);
                // The end of a job is the main thread's. It may have come there by itself.
                let job = Arc::clone(&job);
                self.on_main(Box::new(move |layers| {
                    let mut state = job.state();
                    if state.status != Status::Pending {
                        return;
                    }
                    state.cancelled = true;
                    drop(state);
                    job.fail(&cancelled(), layers);
                }));
                return Ok(());
            }
            Verb::Dismiss => job.dismiss(&mut state),
            Verb::SetSpeed | Verb::Change | Verb::Finalize => {
                unreachable!("{verb} needs more than a name")
            }
        }
        drop(state);
        job.waiters().wake();
        Ok(())
    }

    /// Ends a job that is ready as it is (the guest stays where it is), and cancels any other. One that
    /// was told to complete does so all the same.
    pub fn cancel_gently(&self, id: &str) -> Result<(), VerbError> {
        let job = self.find(id).ok_or(VerbError::NotFound)?;
        let mut state = job.state();
        if state.paused && Verb::Cancel.is_allowed(state.status) {
            return Err(VerbError::Refused(format!(
                "The block job for device '{id}' is currently paused"
            )));
        }
        if state.status != Status::Ready {
            drop(state);
            return self.apply(id, Verb::Cancel);
        }
        state.asked_to_stay = true;
        state.ending.get_or_insert(Ending::Stay);
        drop(state);
        job.waiters().wake();
        Ok(())
    }

    /// Limits the speed of a job, in bytes in a second; 0 is no limit.
    pub fn set_speed(&self, id: &str, speed: u64) -> Result<(), VerbError> {
        let job = self.find(id).ok_or(VerbError::NotFound)?;
        let mut state = job.state();
        if !Verb::SetSpeed.is_allowed(state.status) {
            return Err(refused(id, state.status, Verb::SetSpeed));
        }
        state.limit.set_speed(speed);
        drop(state);
        job.waiters().wake();
        Ok(())
    }

    /// Cancels everything, for the end of the process. What was pending is not put in force.
    pub fn cancel_all(&self) {
        for info in self.query() {
            // Refused by those that are over.
            let _ = self.apply(&info.id, Verb::Cancel);
        }
    }

    /// Whether a job has work to do or to undo, here or on the main thread.
    pub fn are_over(&self) -> bool {
        let jobs = self.inner.jobs.lock().unwrap().clone();
        jobs.iter().all(|job| matches!(job.state().status, Status::Concluded | Status::Null))
    }

    /// Whether this is a job, and a block job.
    pub fn kind(&self, id: &str) -> Option<JobKind> {
        self.find(id).map(|job| job.kind)
    }

    pub(super) fn find(&self, id: &str) -> Option<Arc<Job>> {
        self.inner.jobs.lock().unwrap().iter().find(|job| job.id == id).cloned()
    }

    pub(super) fn remove(&self, job: &Job) {
        self.inner.jobs.lock().unwrap().retain(|known| !std::ptr::eq(&**known, job));
    }

    pub(super) fn tell(&self, event: &JobEvent) {
        self.inner.listener.event(event);
    }

    pub(super) fn on_main(&self, task: MainTask) {
        self.inner.listener.on_main(task);
    }
}

/// A verb that a job does not obey in this state, in QEMU's words.
fn refused(id: &str, status: Status, verb: Verb) -> VerbError {
    VerbError::Refused(format!(
        "Job '{id}' in state '{status}' cannot accept command verb '{verb}'"
    ))
}

impl Job {
    /// Tells clients of block jobs something.
    pub(super) fn tell_block_job(
        &self,
        state: &super::job::State,
        event: impl FnOnce(Figures) -> JobEvent,
    ) {
        if self.kind.is_block_job() {
            self.jobs.tell(&event(Figures {
                id: self.id.clone(),
                kind: self.kind,
                total: state.total,
                current: state.current,
                speed: state.limit.speed(),
            }));
        }
    }
}
