//! The workers as the message thread sees them: [`Pool`] implements [`Rings`].
//!
//! A command goes into the worker's mailbox, its reactor is notified, and where the message thread
//! must wait (start, stop, memory, log) it waits on a channel that the worker answers. Workers never
//! wait for anybody.
//!
//! Worker threads start with the first ring they serve and end when the client has gone, so that an
//! export without a client costs no threads and no rings.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use crate::block::Keep;
use crate::device::bell::{self, Bell};
use crate::device::config_space::ConfigSpace;
use crate::device::dirty_log::DirtyLog;
use crate::device::export::Export;
use crate::device::features;
use crate::device::identity::DiskIdentity;
use crate::device::inflight::InflightRegion;
use crate::device::memory::GuestMemory;
use crate::device::rings::{Notifier, RingStart, Rings, Session};
use crate::device::worker;
use crate::error::{Error, Result, ResultExt};
use crate::io::block_on;

/// Answers a [`Command::Stop`] with the next index to pop.
pub(super) type Stopped = SyncSender<u16>;

/// What a worker is told.
pub(super) enum Command {
    Start {
        index: usize,
        start: Box<RingStart>,
        reply: SyncSender<Result<()>>,
    },
    Stop {
        index: usize,
        reply: Stopped,
    },
    SetCall {
        index: usize,
        call: Option<Notifier>,
    },
    SetError {
        index: usize,
        err: Option<Notifier>,
    },
    SetLogUsed {
        index: usize,
        log_used: Option<u64>,
    },
    SetMemory {
        memory: Arc<GuestMemory>,
        reply: SyncSender<()>,
    },
    SetDirtyLog {
        log: Option<Arc<DirtyLog>>,
        reply: SyncSender<()>,
    },
    /// End the thread; no ring is in service any more.
    Quit,
}

/// Where a worker finds its commands.
pub(super) struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    /// Whether there is something in it: one load per turn of the worker.
    full: AtomicBool,
    /// Makes the worker leave its wait. Set by the worker once its reactor exists.
    notify: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// How the worker tells the guest something.
    bell: Arc<Bell>,
}

impl Mailbox {
    fn new() -> Arc<Mailbox> {
        Arc::new(Mailbox {
            commands: Mutex::default(),
            full: AtomicBool::new(false),
            notify: OnceLock::new(),
            bell: Arc::default(),
        })
    }

    fn post(&self, command: Command) {
        self.commands.lock().unwrap().push_back(command);
        self.full.store(true, Ordering::Release);
        if let Some(notify) = self.notify.get() {
            notify();
        }
    }

    /// Called by the worker before its first look into the mailbox.
    pub(super) fn set_notify(&self, notify: impl Fn() + Send + Sync + 'static) {
        let _ = self.notify.set(Box::new(notify));
    }

    /// The worker's bell.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// Waits for the answer to a command.
    fn wait<T>(&self, answer: &Receiver<T>) -> std::result::Result<T, RecvError> {
        bell::wait(answer, || self.bell.nudge())
    }

    /// Whether a command waits.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    /// The next command. Costs one load if there is none.
    pub(super) fn take(&self) -> Option<Command> {
        if !self.full.load(Ordering::Acquire) {
            return None;
        }
        let mut commands = self.commands.lock().unwrap();
        let command = commands.pop_front();
        if commands.is_empty() {
            self.full.store(false, Ordering::Release);
        }
        command
    }
}

/// The workers of one export.
pub struct Pool {
    export: Arc<Export>,
    workers: Mutex<Vec<Option<Running>>>,
    /// Rings in service, by index.
    live: Mutex<Vec<bool>>,
}

/// A worker thread.
struct Running {
    mailbox: Arc<Mailbox>,
    thread: JoinHandle<()>,
}

impl Pool {
    /// A pool for `export`, without any thread yet.
    pub fn new(export: Arc<Export>) -> Pool {
        let threads = export.options.threads.clamp(1, export.options.num_queues);
        let live = vec![false; export.options.num_queues];
        Pool {
            export,
            workers: Mutex::new((0..threads).map(|_| None).collect()),
            live: Mutex::new(live),
        }
    }

    /// What is served.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// The mailbox of the worker that serves ring `index`; starts the thread if need be.
    fn worker_of(&self, index: usize) -> Result<Arc<Mailbox>> {
        let mut workers = self.workers.lock().unwrap();
        let number = index % workers.len();
        if let Some(running) = &workers[number] {
            return Ok(Arc::clone(&running.mailbox));
        }
        let mailbox = Mailbox::new();
        let (ready, started) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("vublk-q{number}"))
            // Room for requests that go down a chain of hundreds of images; only what is used counts.
            .stack_size(4 << 20)
            .spawn({
                let (export, mailbox) = (Arc::clone(&self.export), Arc::clone(&mailbox));
                move || worker::run(export, mailbox, number, ready)
            })
            .context(|| "cannot start a worker thread")?;
        started.recv().map_err(|_| Error::invalid("the worker thread died"))??;
        workers[number] = Some(Running { mailbox: Arc::clone(&mailbox), thread });
        Ok(mailbox)
    }

    /// The mailbox of a live ring's worker.
    fn mailbox_of_live(&self, index: usize) -> Option<Arc<Mailbox>> {
        if !*self.live.lock().unwrap().get(index)? {
            return None;
        }
        self.worker_of(index).ok()
    }

    /// Refuses the guest of session `nonce`, whose completed writes are in a keep, unless this is
    /// the keep.
    fn check_kept(&self, nonce: u128) -> Result<()> {
        let driver = self.export.node().driver();
        let keep = driver.keep();
        // Where nothing is kept for a guest, its disk may have gone on in an image that has no keep.
        let awaited = self.export.root.awaited();
        if keep.and_then(Keep::session).or(awaited.filter(|_| keep.is_none())) == Some(nonce) {
            return Ok(());
        }
        let found = match keep {
            Some(keep) => format!("{} has nothing of it", keep.path().display()),
            None => "there is no state directory now".into(),
        };
        Err(Error::invalid(format!(
            "{}: what its guest completed and did not flush was kept outside of the image, and \
             {found}; start vublk with the state directory of before (--state-dir), or, if that is \
             lost, reset the guest: it then starts from what was flushed",
            self.export.name()
        )))
    }

    /// Sends a command to each running worker, then waits for all answers.
    fn tell_all(&self, command: impl Fn(SyncSender<()>) -> Command) {
        let mailboxes: Vec<_> = (self.workers.lock().unwrap().iter().flatten())
            .map(|w| Arc::clone(&w.mailbox))
            .collect();
        let (reply, answers) = sync_channel(mailboxes.len());
        for mailbox in &mailboxes {
            mailbox.post(command(reply.clone()));
        }
        drop(reply);
        for _ in &mailboxes {
            // A worker that is gone has nothing left to apply the change to.
            let _ =
                bell::wait(&answers, || mailboxes.iter().for_each(|mailbox| mailbox.bell.nudge()));
        }
    }
}

impl Rings for Pool {
    fn max_queues(&self) -> usize {
        self.export.options.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.export.options.queue_size
    }

    fn features(&self) -> u64 {
        features::device_features(self.export.is_read_only())
    }

    fn config(&self) -> ConfigSpace {
        self.export.config()
    }

    fn identity(&self) -> DiskIdentity {
        DiskIdentity::of(&self.export.node(), &self.export.options.serial)
    }

    fn settle(&self) -> Result<()> {
        let node = self.export.node();
        match node.limits().read_only {
            true => Ok(()),
            false => block_on(node.flush()),
        }
    }

    fn session(&self, session: Session, region: Option<&Arc<InflightRegion>>) -> Result<()> {
        let returned = match session {
            // Where no queue has ever run, nothing has completed: who made the region was killed before.
            Session::Returned(nonce) if region.is_none_or(|region| region.is_recovery()) => {
                Some(nonce)
            }
            Session::Returned(_) | Session::New(_) | Session::Anonymous => None,
        };
        if let (Some(nonce), Some(region)) = (returned, region)
            && region.is_kept()
        {
            self.check_kept(nonce)?;
        } else if self.export.options.read_only {
            // Completes no writes, and has no say in what is kept for the guest that does.
            return Ok(());
        }
        // No ring is live: the message thread may run the driver's code here, on a reactor of its
        // own, without anybody's drain depending on it.
        self.export.root.resume(returned)?;
        if let Some(region) = region {
            // All is durable. What begins now drops what is kept, and is not one step: who comes
            // after a kill in the midst of it must not miss the keep.
            region.note_kept(false);
        }
        match session {
            // It could write once, and what it had written is in its place now.
            _ if self.export.options.read_only => Ok(()),
            Session::New(nonce) | Session::Returned(nonce) => {
                let region = region.cloned();
                self.export.root.begin_session(nonce, move |kept| {
                    if let Some(region) = &region {
                        region.note_kept(kept);
                    }
                })
            }
            Session::Anonymous => Ok(()),
        }
    }

    fn start(&self, index: usize, start: RingStart) -> Result<()> {
        let mailbox = self.worker_of(index)?;
        let (reply, answer) = sync_channel(1);
        mailbox.post(Command::Start { index, start: Box::new(start), reply });
        mailbox.wait(&answer).map_err(|_| Error::invalid("the worker thread died"))??;
        self.live.lock().unwrap()[index] = true;
        Ok(())
    }

    fn stop(&self, index: usize) -> Option<u16> {
        let mailbox = self.mailbox_of_live(index)?;
        let (reply, answer) = sync_channel(1);
        mailbox.post(Command::Stop { index, reply });
        let last_avail = mailbox.wait(&answer).ok();
        self.live.lock().unwrap()[index] = false;
        last_avail
    }

    fn set_call(&self, index: usize, call: Option<Notifier>) {
        if let Some(mailbox) = self.mailbox_of_live(index) {
            mailbox.post(Command::SetCall { index, call });
        }
    }

    fn set_error_fd(&self, index: usize, err: Option<Notifier>) {
        if let Some(mailbox) = self.mailbox_of_live(index) {
            mailbox.post(Command::SetError { index, err });
        }
    }

    fn set_log_used(&self, index: usize, log_used: Option<u64>) {
        if let Some(mailbox) = self.mailbox_of_live(index) {
            mailbox.post(Command::SetLogUsed { index, log_used });
        }
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) {
        self.tell_all(|reply| Command::SetMemory { memory: Arc::clone(&memory), reply });
    }

    fn set_dirty_log(&self, log: Option<Arc<DirtyLog>>) {
        self.tell_all(|reply| Command::SetDirtyLog { log: log.clone(), reply });
    }

    fn set_write_through(&self, on: bool) {
        let was = self.export.guest_write_through();
        self.export.set_guest_write_through(on);
        if on && !was {
            // What completed before the switch was promised nothing; from now on it is. Writes that
            // were started before and complete after it must be durable too, so they are drained
            // first. A failure poisons the node, which the guest sees with its next write.
            let _quiesced = self.export.root.quiesce();
            let _ = block_on(self.export.node().flush());
        }
    }

    fn set_writeback(&self, on: bool) {
        self.export.set_writeback(on);
    }

    fn disconnected(&self) {
        let workers: Vec<_> =
            self.workers.lock().unwrap().iter_mut().filter_map(Option::take).collect();
        for worker in &workers {
            worker.mailbox.post(Command::Quit);
        }
        for worker in workers {
            let _ = worker.thread.join();
        }
        self.export.set_guest_write_through(false);
        let node = self.export.node();
        let flushed = match (node.limits().read_only, node.is_poisoned()) {
            (true, _) => Ok(()),
            // Said already, when it happened.
            (_, true) => return,
            _ => block_on(node.flush()),
        };
        match flushed {
            Ok(()) => self.export.root.end_session(),
            Err(err) => {
                tracing::error!(export = self.export.name(), "flush after the client left: {err}");
            }
        }
    }
}
