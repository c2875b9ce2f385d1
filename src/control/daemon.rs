//! What commands act on.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

use super::events::Events;
use super::inbox::Inbox;
use crate::error::{Result, ResultExt};

/// The state of the process that commands look at and change. It belongs to the main thread.
#[derive(Debug)]
pub struct Daemon {
    shared: Arc<Shared>,
    quitting: bool,
}

/// The part of the state that any thread may use.
#[derive(Debug)]
pub struct Shared {
    name: Option<String>,
    events: Events,
    mailbox: Mailbox,
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
    /// The state of a process that was given this name, or none.
    pub fn new(name: Option<String>) -> Result<Daemon> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let inbox = Arc::new(Inbox::new()?);
        let shared = Shared {
            name,
            events: Events::new(Arc::clone(&inbox)),
            mailbox: Mailbox { tasks: Mutex::default(), wake: wake.context(|| "eventfd")? },
            inbox,
        };
        Ok(Daemon { shared: Arc::new(shared), quitting: false })
    }

    /// The part that any thread may use.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.shared.events
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
        while !self.quitting {
            let task = self.shared.mailbox.tasks.lock().unwrap().pop_front();
            let Some(task) = task else { return };
            task(self);
        }
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

    /// Has the main thread do something; returns at once.
    pub fn on_main(&self, task: impl FnOnce(&mut Daemon) + Send + 'static) {
        self.mailbox.tasks.lock().unwrap().push_back(Box::new(task));
        // Fails only where it is readable already.
        let _ = rustix::io::write(&self.mailbox.wake, &1u64.to_ne_bytes());
    }

    /// Readable when [`Daemon::run_tasks`] has something to do.
    pub fn main_wake(&self) -> BorrowedFd<'_> {
        self.mailbox.wake.as_fd()
    }
}
