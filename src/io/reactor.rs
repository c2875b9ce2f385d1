//! The reactor of a thread: its engine, its executor, and the operations its tasks wait for.
//!
//! Drivers call [`File`](super::File) methods; the futures find the reactor of the thread they are
//! polled on. A device worker owns its reactor and calls [`Reactor::turn`] in its loop; any other
//! thread gets one with [`block_on`].
//!
//! ```text
//! turn:  submit / wait ──► reap ──► asynchronous operation: store result, wake its task
//!                              ├──► wake-up of another thread: the executor collects it
//!                              └──► anything else: handed to the caller (kicks, planned I/O)
//!        then poll the tasks that are ready
//! ```
//!
//! Invariant: an operation's slot owns its file descriptor and buffers from the push until the
//! event has been reaped. A dropped future leaves its slot behind as an orphan; the event frees it.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Waker};

use super::engine::{ASYNC, Engine, EngineKind, Event, MAX_IOVECS, Op, OpCode, WATCH, blocking};
use super::exec::Executor;
use super::host::OpenFile;
use super::{Buffers, HostFile};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::units::ByteRange;

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dir {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// User number of the watch on the executor's eventfd.
const WAKE: u64 = WATCH | (WATCH - 1) & !ASYNC;

/// See the module's text.
#[derive(Debug)]
pub struct Reactor {
    engine: RefCell<Engine>,
    ops: RefCell<Slots>,
    exec: Executor,
    /// Scratch space of `turn`.
    events: RefCell<Vec<Event>>,
    /// Whether `block_on` is running: it does not nest.
    blocked_on: Cell<bool>,
}

/// Asynchronous operations by slot number.
#[derive(Debug, Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Debug)]
enum Slot {
    Free,
    /// Handed to the engine.
    InFlight {
        /// `None` if the future was dropped.
        waker: Option<Waker>,
        orphan: bool,
        /// Never looked at: kept alive for the kernel.
        _keep: Keep,
    },
    /// The event has come, the future has not looked yet.
    Done(i32),
}

/// What the kernel may still use.
#[derive(Debug)]
struct Keep {
    _file: Arc<OpenFile>,
    _buf: Option<Buffers>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

/// The engine that reactors of threads without an own choice use.
static DEFAULT_KIND: AtomicU8 = AtomicU8::new(0);

/// Chooses the engine for reactors that [`block_on`] makes from now on, on all threads.
pub fn set_default_engine(kind: EngineKind) {
    DEFAULT_KIND.store(kind as u8, Ordering::Relaxed);
}

fn default_engine() -> EngineKind {
    match DEFAULT_KIND.load(Ordering::Relaxed) {
        k if k == EngineKind::IoUring as u8 => EngineKind::IoUring,
        k if k == EngineKind::Threads as u8 => EngineKind::Threads,
        _ => EngineKind::Auto,
    }
}

impl Reactor {
    /// Makes a reactor for the calling thread.
    pub fn new(kind: EngineKind) -> Result<Rc<Reactor>> {
        let exec = Executor::new()?;
        let mut engine = Engine::new(kind)?;
        engine.watch(exec.wake_fd(), WAKE);
        Ok(Rc::new(Reactor {
            engine: RefCell::new(engine),
            ops: RefCell::default(),
            exec,
            events: RefCell::default(),
            blocked_on: Cell::new(false),
        }))
    }

    /// Makes this the thread's reactor while `f` runs.
    pub fn enter<T>(self: &Rc<Self>, f: impl FnOnce() -> T) -> T {
        struct Restore(Option<Rc<Reactor>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _restore = Restore(CURRENT.replace(Some(Rc::clone(self))));
        let _current = self.exec.make_current();
        f()
    }

    /// The engine, to push planned operations and watches.
    pub fn engine(&self) -> std::cell::RefMut<'_, Engine> {
        self.engine.borrow_mut()
    }

    /// The tasks of this thread.
    pub fn executor(&self) -> &Executor {
        &self.exec
    }

    /// A closure for other threads that makes this thread leave its wait.
    pub fn notifier(&self) -> impl Fn() + Send + Sync + 'static {
        self.exec.notifier()
    }

    /// One turn: starts what was queued, waits for an event if `wait` and no task is ready, hands
    /// events that are not the reactor's own to `sink`, polls ready tasks. The caller must have
    /// [entered](Reactor::enter) the reactor.
    #[inline]
    pub fn turn(&self, wait: bool, sink: &mut Vec<Event>) {
        let mut events = self.events.take();
        {
            let mut engine = self.engine.borrow_mut();
            if wait && !self.exec.has_ready() {
                engine.wait();
            } else {
                engine.submit();
            }
            engine.reap(&mut events);
        }
        for event in events.drain(..) {
            if event.user & ASYNC != 0 {
                self.complete((event.user & !ASYNC) as u32, event.result);
            } else if event.user != WAKE {
                sink.push(event);
            }
        }
        self.events.replace(events);
        self.exec.run_ready();
    }

    /// Whether an asynchronous operation or task is unfinished.
    pub fn is_busy(&self) -> bool {
        self.exec.live() > 0 || {
            let ops = self.ops.borrow();
            ops.free.len() < ops.slots.len()
        }
    }

    /// Starts an operation whose memory and file the slot keeps.
    fn start(&self, op: &Op, keep: Keep) -> u32 {
        let mut ops = self.ops.borrow_mut();
        let slot = Slot::InFlight { waker: None, orphan: false, _keep: keep };
        let index = match ops.free.pop() {
            Some(index) => {
                ops.slots[index as usize] = slot;
                index
            }
            None => {
                ops.slots.push(slot);
                ops.slots.len() as u32 - 1
            }
        };
        // SAFETY: the slot owns file and buffers until `complete`.
        unsafe { self.engine.borrow_mut().push(op, ASYNC | u64::from(index)) };
        index
    }

    fn complete(&self, index: u32, result: i32) {
        let waker = {
            let mut ops = self.ops.borrow_mut();
            let slot = &mut ops.slots[index as usize];
            match std::mem::replace(slot, Slot::Done(result)) {
                Slot::InFlight { orphan: true, .. } => {
                    *slot = Slot::Free;
                    ops.free.push(index);
                    None
                }
                Slot::InFlight { waker, .. } => waker,
                other => unreachable!("event for a slot that is {other:?}"),
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Waits for one operation.
struct OpFuture {
    reactor: Rc<Reactor>,
    index: u32,
    finished: bool,
}

impl Future for OpFuture {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let index = self.index;
        let result = {
            let mut ops = self.reactor.ops.borrow_mut();
            let slot = &mut ops.slots[index as usize];
            match slot {
                Slot::Done(result) => {
                    let result = *result;
                    *slot = Slot::Free;
                    ops.free.push(index);
                    result
                }
                Slot::InFlight { waker, .. } => {
                    match waker {
                        Some(old) if old.will_wake(cx.waker()) => {}
                        _ => *waker = Some(cx.waker().clone()),
                    }
                    return Poll::Pending;
                }
                Slot::Free => unreachable!("operation polled after its end"),
            }
        };
        self.finished = true;
        Poll::Ready(result)
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut ops = self.reactor.ops.borrow_mut();
        let slot = &mut ops.slots[self.index as usize];
        match slot {
            Slot::InFlight { orphan, waker, .. } => {
                *orphan = true;
                *waker = None;
            }
            _ => {
                *slot = Slot::Free;
                ops.free.push(self.index);
            }
        }
    }
}

/// This thread's reactor; makes one if there is none.
fn thread_reactor() -> Result<Rc<Reactor>> {
    if let Some(reactor) = CURRENT.with_borrow(Clone::clone) {
        return Ok(reactor);
    }
    let reactor = Reactor::new(default_engine()).context(|| "cannot set up I/O for this thread")?;
    CURRENT.set(Some(Rc::clone(&reactor)));
    Ok(reactor)
}

/// Makes this thread's reactor now. After that [`block_on`] needs nothing more of the host, and
/// works even where file descriptors have run out.
pub fn prepare_thread() -> Result<()> {
    thread_reactor().map(|_| ())
}

/// Runs a future to its end on this thread, with a reactor of the thread's own. Tasks it spawned
/// that are unfinished then stay until the next call on this thread.
///
/// # Panics
/// If called from within itself, or if the host gives neither an io_uring nor an eventfd and the
/// thread was not prepared ([`prepare_thread`]).
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let reactor = thread_reactor().unwrap_or_else(|err| panic!("{err}"));
    assert!(!reactor.blocked_on.replace(true), "block_on called from within itself");
    struct Unblock<'a>(&'a Cell<bool>);
    impl Drop for Unblock<'_> {
        fn drop(&mut self) {
            self.0.set(false);
        }
    }
    let _unblock = Unblock(&reactor.blocked_on);
    let _current = reactor.exec.make_current();
    let mut future = pin!(future);
    let mut sink = Vec::new();
    loop {
        if let Poll::Ready(out) = reactor.exec.poll_root(future.as_mut()) {
            return out;
        }
        // At least one turn, even if the root is ready again: others want to run too.
        loop {
            reactor.turn(true, &mut sink);
            sink.clear();
            if reactor.exec.is_root_ready() {
                break;
            }
        }
    }
}

/// Starts a task on this thread's reactor. It runs while the thread is in [`block_on`] or its
/// worker's loop.
///
/// # Panics
/// If the thread has no reactor.
pub fn spawn_local(task: impl Future<Output = ()> + 'static) {
    CURRENT.with_borrow(|current| {
        current.as_ref().expect("no reactor on this thread").exec.spawn(task);
    });
}

/// Performs one operation: through this thread's reactor, or in place on a thread without one.
async fn perform(file: &HostFile, op: Op, buf: Option<Buffers>) -> i32 {
    let Some(reactor) = CURRENT.with_borrow(Clone::clone) else {
        // SAFETY: `buf` and `file` live until the call is over.
        return unsafe { blocking(&op) };
    };
    let keep = Keep { _file: file.share_fd(), _buf: buf };
    let index = reactor.start(&op, keep);
    OpFuture { reactor, index, finished: false }.await
}

/// Transfers all of `buf`, in as many system calls as it takes.
pub(super) async fn rw(
    file: &HostFile,
    dir: Dir,
    offset: u64,
    buf: Buffers,
    fua: bool,
) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = if done == 0 { buf.clone() } else { buf.slice(done, buf.len() - done) };
        let inline = file.inline();
        let (code, inline) = match dir {
            Dir::Read => (OpCode::Read, inline.reads),
            Dir::Write => (OpCode::Write { dsync: fua }, inline.writes && !fua),
        };
        let op = Op {
            code,
            fd: file.as_raw_fd(),
            file_id: file.id(),
            offset: offset + done,
            len: 0,
            iovs: rest.iovecs().as_ptr(),
            n_iovs: rest.iovecs().len().min(MAX_IOVECS) as u32,
        };
        let result = if inline {
            // SAFETY: `rest` and `file` live until the call is over.
            unsafe { file.inline_call(&op) }
        } else {
            perform(file, op, Some(rest)).await
        };
        match result {
            0 => return Err(short_file(file, offset + done)),
            n if n > 0 => done += n as u64,
            e if e == -libc::EAGAIN || e == -libc::EINTR => {}
            e => return Err(Error::from_errno(-e)),
        }
    }
    Ok(())
}

/// A transfer that the end of the file cut short.
pub(crate) fn short_file(file: &HostFile, offset: u64) -> Error {
    use super::File;
    Error::new(
        ErrorKind::OutOfRange,
        format!(
            "{} ends before byte {offset}: it has been truncated by another program",
            file.name()
        ),
    )
}

pub(super) async fn fallocate(file: &HostFile, mode: i32, range: ByteRange) -> Result<()> {
    simple(file, OpCode::Allocate { mode }, range).await
}

pub(super) async fn fdatasync(file: &HostFile) -> Result<()> {
    simple(file, OpCode::Sync, ByteRange::default()).await
}

/// An operation without memory.
async fn simple(file: &HostFile, code: OpCode, range: ByteRange) -> Result<()> {
    loop {
        let op = Op {
            code,
            fd: file.as_raw_fd(),
            file_id: file.id(),
            offset: range.offset,
            len: range.len,
            iovs: std::ptr::null(),
            n_iovs: 0,
        };
        match perform(file, op, None).await {
            e if e == -libc::EAGAIN || e == -libc::EINTR => {}
            e if e < 0 => return Err(Error::from_errno(-e)),
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{AlignedBuf, File, OpenOptions};
    use std::rc::Rc;

    fn scratch(len: u64) -> (tempfile::TempDir, HostFile) {
        let dir = tempfile::tempdir().unwrap();
        let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
        let file = HostFile::open(&dir.path().join("scratch"), options).unwrap();
        std::fs::OpenOptions::new().write(true).open(file.path()).unwrap().set_len(len).unwrap();
        (dir, file)
    }

    fn both(test: impl Fn(EngineKind) + Copy + Send + 'static) {
        for kind in [EngineKind::Auto, EngineKind::Threads] {
            // A thread each, because a reactor belongs to its thread.
            std::thread::spawn(move || {
                let reactor = Reactor::new(kind).unwrap();
                reactor.enter(|| test(kind));
                assert!(!reactor.is_busy(), "{kind:?} left something behind");
            })
            .join()
            .unwrap();
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        both(|_| {
            let (_dir, file) = scratch(1 << 20);
            block_on(async {
                let data: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
                let buf = AlignedBuf::from_slice(&data, 4096);
                file.write(12345, buf.buffers(), true).await.unwrap();
                let back = AlignedBuf::zeroed(data.len(), 512);
                file.read(12345, back.buffers()).await.unwrap();
                assert_eq!(back.to_vec(), data);
                file.flush().await.unwrap();
                file.write_zeroes(ByteRange { offset: 12345, len: 10 }, true).await.unwrap();
                file.read(12345, back.buffers()).await.unwrap();
                assert_eq!(&back.to_vec()[..11], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10]);
            });
        });
    }

    #[test]
    fn a_shortened_file_is_an_error_that_names_it() {
        both(|_| {
            let (_dir, file) = scratch(1000);
            let buf = AlignedBuf::zeroed(512, 512);
            let err = block_on(file.read(800, buf.buffers())).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::OutOfRange);
            assert!(err.to_string().contains("scratch ends before byte 1000"), "{err}");
        });
    }

    #[test]
    fn a_dropped_future_keeps_its_buffer_until_the_kernel_is_done() {
        both(|_| {
            let (_dir, file) = scratch(1 << 20);
            let mut buf = AlignedBuf::zeroed(1 << 16, 4096);
            // Poll once, so that the operation starts, then drop it.
            block_on(async {
                let mut future = file.read(0, buf.buffers());
                let _ = futures_poll_once(future.as_mut()).await;
            });
            // Whether or not the operation is over, the reactor has not let go of the memory
            // before its event; a flush behind it gives the event time to come.
            block_on(async { file.flush().await.unwrap() });
            let reactor = CURRENT.with_borrow(Clone::clone).unwrap();
            let mut sink = Vec::new();
            while reactor.is_busy() {
                reactor.turn(true, &mut sink);
            }
            assert_eq!(buf.as_slice().len(), 1 << 16);
        });
    }

    /// Polls a future once and gives back what that gave.
    async fn futures_poll_once<T>(
        mut future: Pin<&mut (impl Future<Output = T> + ?Sized)>,
    ) -> Poll<T> {
        std::future::poll_fn(move |cx| Poll::Ready(future.as_mut().poll(cx))).await
    }

    #[test]
    fn tasks_run_and_wake_each_other_across_threads() {
        both(|_| {
            let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
            let waker_thread = std::thread::spawn(move || {
                for waker in receiver {
                    waker.wake();
                }
            });
            let count = Rc::new(Cell::new(0));
            block_on(async {
                for _ in 0..10 {
                    let (count, sender) = (Rc::clone(&count), sender.clone());
                    spawn_local(async move {
                        for _ in 0..100 {
                            let mut sent = false;
                            std::future::poll_fn(|cx| {
                                if std::mem::replace(&mut sent, true) {
                                    return Poll::Ready(());
                                }
                                sender.send(cx.waker().clone()).unwrap();
                                Poll::Pending
                            })
                            .await;
                            count.set(count.get() + 1);
                        }
                    });
                }
                while count.get() < 1000 {
                    let mut yielded = false;
                    std::future::poll_fn(|cx| {
                        cx.waker().wake_by_ref();
                        if std::mem::replace(&mut yielded, true) {
                            Poll::Ready(())
                        } else {
                            Poll::Pending
                        }
                    })
                    .await;
                }
            });
            drop(sender);
            waker_thread.join().unwrap();
        });
    }
}
