//! A small executor for the local tasks of one thread.
//!
//! Tasks live in a slab whose slots (and wakers) are reused. Waking on the same thread costs a
//! push to a queue; waking from another thread goes through a mutex and an eventfd that the
//! thread's engine watches.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use rustix::event::EventfdFlags;

use crate::error::{Result, ResultExt};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Index of the future that [`block_on`](super::block_on) waits for.
const ROOT: u32 = u32::MAX;

/// The tasks of one thread.
pub struct Executor {
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<u32>>,
    /// Woken on this thread.
    ready: RefCell<VecDeque<u32>>,
    /// Scratch space of `run_ready`.
    turn: RefCell<Vec<u32>>,
    remote: Arc<Remote>,
    root_waker: Waker,
    root: Arc<TaskWaker>,
    root_ready: Cell<bool>,
    live: Cell<usize>,
}

struct Slot {
    task: Option<Task>,
    waker: Waker,
    shared: Arc<TaskWaker>,
}

/// What other threads may touch.
struct Remote {
    woken: Mutex<Vec<u32>>,
    /// Whether the eventfd has been written since the thread last looked.
    signalled: AtomicBool,
    wake: OwnedFd,
    thread: std::thread::ThreadId,
}

struct TaskWaker {
    index: u32,
    /// Whether the task is queued already.
    queued: AtomicBool,
    remote: Arc<Remote>,
}

thread_local! {
    /// The executor of this thread, while it polls or its reactor is current. Set by the reactor.
    static HERE: Cell<*const Executor> = const { Cell::new(std::ptr::null()) };
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if self.remote.thread == current_thread() && Executor::queue_here(&self.remote, self.index)
        {
            return;
        }
        self.remote.woken.lock().unwrap().push(self.index);
        self.remote.notify();
    }
}

impl Remote {
    fn notify(&self) {
        if !self.signalled.swap(true, Ordering::AcqRel) {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// This thread's id, remembered: asking std for it clones an Arc.
fn current_thread() -> std::thread::ThreadId {
    thread_local!(static ID: std::thread::ThreadId = std::thread::current().id());
    ID.with(|id| *id)
}

impl Executor {
    /// An executor for the calling thread.
    pub fn new() -> Result<Executor> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context(|| "eventfd")?;
        let remote = Arc::new(Remote {
            woken: Mutex::default(),
            signalled: AtomicBool::new(false),
            wake,
            thread: current_thread(),
        });
        let root =
            TaskWaker { index: ROOT, queued: AtomicBool::new(false), remote: Arc::clone(&remote) };
        let root = Arc::new(root);
        Ok(Executor {
            slots: RefCell::default(),
            free: RefCell::default(),
            ready: RefCell::default(),
            turn: RefCell::default(),
            root_waker: Waker::from(Arc::clone(&root)),
            root,
            root_ready: Cell::new(false),
            remote,
            live: Cell::new(0),
        })
    }

    /// The eventfd that other threads' wake-ups arrive at, for the engine to watch.
    pub fn wake_fd(&self) -> RawFd {
        self.remote.wake.as_raw_fd()
    }

    /// A closure for other threads that makes this thread leave its wait.
    pub fn notifier(&self) -> impl Fn() + Send + Sync + 'static {
        let remote = Arc::clone(&self.remote);
        move || remote.notify()
    }

    /// Makes this the executor that wake-ups on this thread go to, until the guard is dropped.
    pub(super) fn make_current(&self) -> Current {
        Current(HERE.replace(self))
    }

    /// Queues a wake-up without locking, if the thread's current executor is the one meant.
    #[allow(unsafe_code)]
    fn queue_here(remote: &Arc<Remote>, index: u32) -> bool {
        let here = HERE.get();
        if here.is_null() {
            return false;
        }
        // SAFETY: `make_current`'s guard resets the pointer before the executor can go away, and
        // the pointer never leaves this thread.
        let here = unsafe { &*here };
        if !Arc::ptr_eq(&here.remote, remote) {
            return false;
        }
        if index == ROOT {
            here.root_ready.set(true);
        } else {
            here.ready.borrow_mut().push_back(index);
        }
        true
    }

    /// Starts a task. It is polled for the first time at the next turn.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn_boxed(Box::pin(task));
    }

    fn spawn_boxed(&self, task: Task) {
        let mut slots = self.slots.borrow_mut();
        let index = match self.free.borrow_mut().pop() {
            Some(index) => index,
            None => {
                let index = slots.len() as u32;
                let shared = Arc::new(TaskWaker {
                    index,
                    queued: AtomicBool::new(false),
                    remote: Arc::clone(&self.remote),
                });
                let waker = Waker::from(Arc::clone(&shared));
                slots.push(Slot { task: None, waker, shared });
                index
            }
        };
        let slot = &mut slots[index as usize];
        slot.task = Some(task);
        slot.shared.queued.store(true, Ordering::Release);
        self.live.set(self.live.get() + 1);
        self.ready.borrow_mut().push_back(index);
    }

    /// Number of tasks that have not ended.
    pub fn live(&self) -> usize {
        self.live.get()
    }

    /// Whether a task is waiting to be polled, as far as this thread knows.
    pub fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty() || self.root_ready.get()
    }

    /// Fetches wake-ups of other threads. Cheap when there are none.
    fn collect_remote(&self) {
        if !self.remote.signalled.load(Ordering::Acquire) {
            return;
        }
        let mut value = [0u8; 8];
        // Drained before the flag is cleared: a write after that is a new signal.
        let _ = rustix::io::read(&self.remote.wake, &mut value);
        // A read-modify-write, because a store could sink below the caller's next look at what it
        // was woken for (a mailbox, a gate), while whoever filled that still finds the flag set and
        // does not write. This way one of the two sees the other.
        self.remote.signalled.swap(false, Ordering::AcqRel);
        let woken = std::mem::take(&mut *self.remote.woken.lock().unwrap());
        for index in woken {
            if index == ROOT {
                self.root_ready.set(true);
            } else {
                self.ready.borrow_mut().push_back(index);
            }
        }
    }

    /// Polls each task that is ready now, once.
    pub fn run_ready(&self) {
        self.collect_remote();
        if self.ready.borrow().is_empty() {
            return;
        }
        let mut turn = std::mem::take(&mut *self.turn.borrow_mut());
        turn.extend(self.ready.borrow_mut().drain(..));
        for index in turn.drain(..) {
            self.poll_task(index);
        }
        *self.turn.borrow_mut() = turn;
    }

    fn poll_task(&self, index: u32) {
        // The task leaves its slot while it is polled: it may spawn others.
        let (mut task, waker) = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[index as usize];
            // Cleared before the poll: a wake-up during it queues the task again.
            slot.shared.queued.store(false, Ordering::Release);
            let Some(task) = slot.task.take() else { return };
            (task, slot.waker.clone())
        };
        let mut cx = Context::from_waker(&waker);
        match task.as_mut().poll(&mut cx) {
            Poll::Pending => self.slots.borrow_mut()[index as usize].task = Some(task),
            Poll::Ready(()) => {
                drop(task);
                self.live.set(self.live.get() - 1);
                self.free.borrow_mut().push(index);
            }
        }
    }

    /// Polls the future of `block_on`.
    pub(super) fn poll_root<F: Future>(&self, future: Pin<&mut F>) -> Poll<F::Output> {
        self.root_ready.set(false);
        self.root.queued.store(false, Ordering::Release);
        future.poll(&mut Context::from_waker(&self.root_waker))
    }

    /// Whether the future of `block_on` has been woken.
    pub(super) fn is_root_ready(&self) -> bool {
        self.root_ready.get()
    }
}

/// While this lives, an executor is the current one of the thread.
pub(super) struct Current(*const Executor);

impl Drop for Current {
    fn drop(&mut self) {
        HERE.set(self.0);
    }
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Executor({} tasks)", self.live.get())
    }
}
