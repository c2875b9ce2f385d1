//! What commands act on.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};

use super::block_events::{BlockExportDeleted, BlockIoError};
use super::disks::Disks;
use super::events::Events;
use super::inbox::Inbox;
use super::job_events;
use crate::error::{Result, ResultExt};
use crate::images::Layers;
use crate::jobs::{self, JobEvent, Jobs, VerbError};

/// The state of the process that commands look at and change. It belongs to the main thread.
#[derive(Debug)]
pub struct Daemon {
    shared: Arc<Shared>,
    disks: Disks,
    quitting: bool,
}

/// The part of the state that any thread may use.
#[derive(Debug)]
pub struct Shared {
    name: Option<String>,
    events: Events,
    jobs: Jobs,
    mailbox: Arc<Mailbox>,
    /// What the control thread is told.
    pub(super) inbox: Arc<Inbox>,
}

/// Something for the main thread to do.
type Task = Box<dyn FnOnce(&mut Daemon) + Send>;

/// What other threads leave for the main thread.
struct Mailbox {
    tasks: Mutex<VecDeque<Task>>,
    /// Readable when there are tasks.
    wake: OwnedFd,
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mailbox({} tasks)", self.tasks.lock().unwrap().len())
    }
}

impl Daemon {
    /// The state of a process that was given this name, or none, and has these disks.
    pub fn new(name: Option<String>, disks: Disks) -> Result<Daemon> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let inbox = Arc::new(Inbox::new()?);
        let mailbox =
            Arc::new(Mailbox { tasks: Mutex::default(), wake: wake.context(|| "eventfd")? });
        let events = Events::new(Arc::clone(&inbox));
        let jobs = Jobs::new(JobNews { events: events.clone(), mailbox: Arc::clone(&mailbox) });
        let shared = Shared { name, events, jobs, mailbox, inbox };
        Ok(Daemon { shared: Arc::new(shared), disks, quitting: false })
    }

    /// The part that any thread may use.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The disks.
    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// The disks, to be changed.
    pub fn disks_mut(&mut self) -> &mut Disks {
        &mut self.disks
    }

    /// Has the failures of an export's requests told to clients.
    pub fn watch_export(&self, id: &str) {
        let Some(served) = self.disks.exports.get(id) else { return };
        let events = self.shared.events.clone();
        let (device, root) = (id.to_string(), served.root().clone());
        served.export().on_failure(move |failure| {
            events.emit(&BlockIoError::new(&device, root.node().name(), failure));
        });
    }

    /// Takes out the exports whose one front-end has left, and tells clients.
    pub fn end_exports(&mut self) {
        for served in self.disks.exports.take_ended() {
            let id = served.id().to_string();
            self.disks.end(served);
            tracing::info!("export '{id}' has ended: its front-end has left");
            self.tell_export_ended(&id);
        }
    }

    /// Tells clients that an export has ended.
    pub fn tell_export_ended(&self, id: &str) {
        self.shared.events.emit(&BlockExportDeleted { id: id.to_string() });
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// All jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.shared.jobs
    }

    /// Puts in force what a job has done that waits for this. Then it is over.
    pub fn finalize_job(&mut self, id: &str) -> Result<(), VerbError> {
        let jobs = self.jobs().clone();
        self.for_job(|layers| jobs.finalize(id, layers))
    }

    /// Does something of a job's to the images.
    fn for_job<T>(&mut self, work: impl FnOnce(&mut Layers) -> T) -> T {
        let done = work(&mut self.disks.layers);
        // What a guest stands on now may be larger.
        self.disks.update_capacities();
        done
    }

    /// Ends the process after what is being done.
    pub fn quit(&mut self) {
        self.quitting = true;
    }

    /// Whether the process is to end.
    pub fn is_quitting(&self) -> bool {
        self.quitting
    }

    /// Does what other threads have left for the main thread, in the order of its arrival.
    pub fn run_tasks(&mut self) {
        let mut count = [0; 8];
        // Emptied before the tasks are taken: who leaves one later makes it readable again.
        let _ = rustix::io::read(&self.shared.mailbox.wake, &mut count);
        loop {
            let task = self.shared.mailbox.tasks.lock().unwrap().pop_front();
            let Some(task) = task else { return };
            task(self);
        }
    }

    /// Cancels all jobs and waits until what they did is undone, for the end of the process.
    pub fn end_jobs(&mut self) {
        self.quitting = true;
        self.shared.jobs.cancel_all();
        loop {
            self.run_tasks();
            if self.shared.jobs.are_over() {
                return;
            }
            let shared = Arc::clone(&self.shared);
            let mut fds = [PollFd::from_borrowed_fd(shared.main_wake(), PollFlags::IN)];
            // A signal is no reason to leave; a second SIGTERM ends the process anyway.
            let _ = rustix::event::poll(&mut fds, None);
        }
    }
}

impl Mailbox {
    fn leave(&self, task: Task) {
        self.tasks.lock().unwrap().push_back(task);
        // Fails only where it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Tells clients of jobs, and does for jobs what they may not.
struct JobNews {
    events: Events,
    mailbox: Arc<Mailbox>,
}

impl jobs::Listener for JobNews {
    fn event(&self, event: &JobEvent) {
        job_events::emit(&self.events, event);
    }

    fn on_main(&self, task: jobs::MainTask) {
        self.mailbox.leave(Box::new(move |daemon| daemon.for_job(task)));
    }
}

impl Shared {
    /// The name that was given to the process.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// All jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Has the main thread do something; returns at once.
    pub fn on_main(&self, task: impl FnOnce(&mut Daemon) + Send + 'static) {
        self.mailbox.leave(Box::new(task));
    }

    /// Readable when [`Daemon::run_tasks`] has something to do.
    pub fn main_wake(&self) -> BorrowedFd<'_> {
        self.mailbox.wake.as_fd()
    }
}
