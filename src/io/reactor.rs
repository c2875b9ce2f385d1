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

use super::carry::{self, Loads};
use super::engine::{ASYNC, Engine, EngineKind, Event, MAX_IOVECS, Op, OpCode, WATCH, blocking};
use super::exec::Executor;
use super::flushes::FlushTurn;
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

/// Operations at a time of a thread that opens images or does a job.
const FEW: u32 = 256;
/// The same of a worker: what the largest ring can hold.
const MANY: u32 = 1024;

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
    /// Operations in flight whose futures were dropped.
    orphans: usize,
}

#[derive(Debug)]
enum Slot {
    Free,
    /// Handed to the engine.
    InFlight {
        /// `None` if the future was dropped.
        waker: Option<Waker>,
        orphan: bool,
        /// Kept alive for the kernel.
        keep: Keep,
    },
    /// The event has come, the future has not looked yet.
    Done(i32),
}

/// What the kernel may still use.
#[derive(Debug)]
struct Keep {
    _file: Arc<OpenFile>,
    _buf: Option<Buffers>,
    /// What others must not do meanwhile.
    _loads: Loads,
    /// Of a sync: hears of its end even if nobody waits for it any more. The host tells that a sync
    /// has failed once, so this may be the only one that learns of it.
    turn: Option<Arc<FlushTurn>>,
}

impl Keep {
    /// Of an operation on `file`.
    fn new(file: &HostFile, buf: Option<Buffers>, turn: Option<Arc<FlushTurn>>) -> Keep {
        Keep { _file: file.share_fd(), _buf: buf, _loads: carry::now(), turn }
    }
}

/// Tells the turn of a sync how that has ended.
fn end_turn(turn: Option<&FlushTurn>, result: i32) {
    if let Some(turn) = turn
        && !is_to_be_repeated(result)
    {
        turn.end(-result.min(0));
    }
}

fn is_to_be_repeated(result: i32) -> bool {
    result == -libc::EAGAIN || result == -libc::EINTR
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

/// The engine for reactors that say nothing else.
pub fn default_engine() -> EngineKind {
    match DEFAULT_KIND.load(Ordering::Relaxed) {
        k if k == EngineKind::IoUring as u8 => EngineKind::IoUring,
        k if k == EngineKind::Threads as u8 => EngineKind::Threads,
        _ => EngineKind::Auto,
    }
}

impl Reactor {
    /// Makes a reactor for the calling thread.
    pub fn new(kind: EngineKind) -> Result<Rc<Reactor>> {
        Reactor::with_room(kind, FEW)
    }

    /// Makes a reactor for a thread that serves guests.
    pub fn for_worker(kind: EngineKind) -> Result<Rc<Reactor>> {
        Reactor::with_room(kind, MANY)
    }

    fn with_room(kind: EngineKind, completions: u32) -> Result<Rc<Reactor>> {
        let exec = Executor::new()?;
        let mut engine = Engine::new(kind, completions)?;
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
            } else if event.result < 0 {
                // Nobody could wake this thread any more.
                self.engine.borrow_mut().watch(self.exec.wake_fd(), WAKE);
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

    /// Whether the host has something to do whose future was dropped.
    fn has_orphans(&self) -> bool {
        self.ops.borrow().orphans > 0
    }

    /// Starts an operation whose memory and file the slot keeps.
    fn start(&self, op: &Op, keep: Keep) -> u32 {
        let mut ops = self.ops.borrow_mut();
        let slot = Slot::InFlight { waker: None, orphan: false, keep };
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
        let ended = {
            let mut ops = self.ops.borrow_mut();
            let slot = &mut ops.slots[index as usize];
            let ended = std::mem::replace(slot, Slot::Done(result));
            if let Slot::InFlight { orphan: true, .. } = ended {
                *slot = Slot::Free;
                ops.free.push(index);
                ops.orphans -= 1;
            }
            ended
        };
        match ended {
            Slot::InFlight { waker, keep, .. } => {
                end_turn(keep.turn.as_deref(), result);
                // With nothing borrowed: what was kept may wake somebody, too.
                drop(keep);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            other => unreachable!("event for a slot that is {other:?}"),
        }
    }
}

impl Drop for Reactor {
    /// Waits for the operations whose futures were dropped: the host still uses their buffers.
    fn drop(&mut self) {
        let mut events = Vec::new();
        while self.ops.borrow().slots.iter().any(|slot| matches!(slot, Slot::InFlight { .. })) {
            {
                let mut engine = self.engine.borrow_mut();
                engine.wait();
                engine.reap(&mut events);
            }
            for event in events.drain(..) {
                if event.user & ASYNC != 0 && event.user & WATCH == 0 {
                    self.complete((event.user & !ASYNC) as u32, event.result);
                }
            }
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
                ops.orphans += 1;
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

/// Runs a future to its end on this thread, with a reactor of the thread's own; then waits for the
/// operations that it has dropped. Tasks it spawned that are unfinished stay until the next call on
/// this thread.
///
/// If the host gives neither an io_uring nor an eventfd (out of file descriptors, say), this call
/// does without a reactor: operations are plain blocking calls.
///
/// # Panics
/// If called from within itself.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let reactor = match thread_reactor() {
        Ok(reactor) => reactor,
        Err(err) => {
            tracing::warn!("using plain calls: {err}");
            return block_on_plainly(future);
        }
    };
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
            // What others wait for must not depend on this thread's next call.
            while reactor.has_orphans() {
                reactor.turn(true, &mut sink);
                sink.clear();
            }
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

/// Runs a future on a thread without a reactor, where [`perform`] blocks.
fn block_on_plainly<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(out) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return out;
        }
        std::thread::park();
    }
}

/// Lets others run: the task goes on in the next turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
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
async fn perform(op: Op, keep: Keep) -> i32 {
    let Some(reactor) = CURRENT.with_borrow(Clone::clone) else {
        // SAFETY: `keep` has the file and the memory until the call is over.
        let result = unsafe { blocking(&op) };
        end_turn(keep.turn.as_deref(), result);
        return result;
    };
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
            perform(op, Keep::new(file, Some(rest), None)).await
        };
        match result {
            0 => return Err(short_file(file, offset + done)),
            n if n > 0 => done += n as u64,
            e if is_to_be_repeated(e) => {}
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
    simple(file, OpCode::Allocate { mode }, range, None).await
}

/// Discards a range of a block device.
pub(super) async fn discard(file: &HostFile, range: ByteRange) -> Result<()> {
    simple(file, OpCode::Discard, range, None).await
}

/// Syncs the file, and says in `turn` how that has ended, whether or not somebody still waits for it.
pub(super) async fn fdatasync(file: &HostFile, turn: Arc<FlushTurn>) -> Result<()> {
    simple(file, OpCode::Sync, ByteRange::default(), Some(turn)).await
}

/// An operation without memory.
async fn simple(
    file: &HostFile,
    code: OpCode,
    range: ByteRange,
    turn: Option<Arc<FlushTurn>>,
) -> Result<()> {
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
        match perform(op, Keep::new(file, None, turn.clone())).await {
            e if is_to_be_repeated(e) => {}
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
    fn without_a_reactor_calls_are_plain() {
        let (_dir, file) = scratch(1 << 20);
        block_on_plainly(async {
            file.write(512, AlignedBuf::from_slice(b"plain", 512).buffers(), true).await.unwrap();
            let back = AlignedBuf::zeroed(5, 512);
            file.read(512, back.buffers()).await.unwrap();
            assert_eq!(back.to_vec(), b"plain");
        });
        assert!(CURRENT.with_borrow(Option::is_none));
    }

    #[test]
    fn a_reactor_waits_for_what_was_abandoned() {
        /// What is in the buffer when it is freed.
        struct Guarded(AlignedBuf, std::sync::mpsc::Sender<Vec<u8>>);
        impl crate::io::BufferOwner for Guarded {}
        impl Drop for Guarded {
            fn drop(&mut self) {
                self.1.send(self.0.to_vec()).unwrap();
            }
        }
        // Only io_uring reads from a pipe at an offset; whoever reads from it has to wait.
        let Ok(reactor) = Reactor::new(EngineKind::IoUring) else { return };
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (freed, at_end) = std::sync::mpsc::channel();
        let memory = AlignedBuf::zeroed(4, 8);
        let iovs = memory.buffers().iovecs().to_vec();
        // SAFETY: the owner has the memory.
        let buf = unsafe { Buffers::from_raw(iovs, Arc::new(Guarded(memory, freed))) };
        let op = Op {
            code: OpCode::Read,
            fd: reader.as_raw_fd(),
            file_id: u32::MAX - 1,
            offset: 0,
            len: 0,
            iovs: buf.iovecs().as_ptr(),
            n_iovs: 1,
        };
        let file = Arc::new(OpenFile(reader.into()));
        let keep = Keep { _file: file, _buf: Some(buf), _loads: Loads::default(), turn: None };
        let index = reactor.start(&op, keep);
        drop(OpFuture { reactor: Rc::clone(&reactor), index, finished: false });
        reactor.engine().submit();
        let late = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            std::io::Write::write_all(&mut writer, b"late").unwrap();
        });
        drop(reactor);
        assert_eq!(at_end.try_recv().unwrap(), b"late", "freed under the host's hands");
        late.join().unwrap();
    }

    #[test]
    fn zeroing_by_hand_lets_others_run() {
        both(|_| {
            let (_dir, file) = scratch(16 << 20);
            let turns = Rc::new(Cell::new(0));
            let over = Rc::new(Cell::new(false));
            block_on(async {
                spawn_local({
                    let (turns, over) = (Rc::clone(&turns), Rc::clone(&over));
                    async move {
                        while !over.get() {
                            turns.set(turns.get() + 1);
                            yield_now().await;
                        }
                    }
                });
                let range = ByteRange { offset: 0, len: 16 << 20 };
                file.write_plain_zeroes(range).await.unwrap();
                over.set(true);
                yield_now().await;
            });
            assert!(turns.get() >= 15, "{} turns in 16 MiB", turns.get());
        });
    }

    #[test]
    fn odd_memory_is_bounced_in_pieces() {
        both(|_| {
            let (_dir, file) = scratch(4 << 20);
            let options = OpenOptions { write: true, direct: true, ..OpenOptions::default() };
            // Not all file systems have it.
            let Ok(file) = HostFile::open(file.path(), options) else { return };
            let len = (1u64 << 20) + 4096;
            let data: Vec<u8> = (0..len).map(|i| ((i * 31) >> 7) as u8).collect();
            let memory = [(); 2].map(|()| AlignedBuf::zeroed(len as usize + 512, 4096));
            let (from, to) = (memory[0].buffers().slice(3, len), memory[1].buffers().slice(7, len));
            from.copy_from_slice(&data);
            block_on(async {
                file.write(8192, from, true).await.unwrap();
                file.read(8192, to.clone()).await.unwrap();
            });
            let mut back = vec![0; len as usize];
            to.copy_to_slice(&mut back);
            assert!(back == data);
        });
    }

    #[test]
    fn no_reactor_keeps_a_file_locked_that_was_closed() {
        use crate::io::lock::Rights;
        both(|kind| {
            let (_dir, file) = scratch(1 << 20);
            let path = file.path().to_path_buf();
            let open = || {
                let options = OpenOptions { write: true, ..OpenOptions::default() };
                HostFile::open(&path, options).unwrap()
            };
            let all = Rights::WRITE;
            file.lock(all, Rights::NONE).unwrap();
            assert!(open().lock(all, Rights::NONE).is_err());
            let buf = AlignedBuf::zeroed(4096, 4096);
            block_on(file.read(0, buf.buffers())).unwrap();
            drop(file);
            // The reactor of this thread lives on.
            open().lock(all, Rights::NONE).unwrap_or_else(|err| panic!("{kind:?}: {err}"));
            // A planned operation registers its file, until the engine goes.
            let file = open();
            file.lock(all, Rights::NONE).unwrap();
            let mut engine = Engine::new(kind, FEW).unwrap();
            let iovs = buf.buffers().iovecs().to_vec();
            let op = Op {
                code: OpCode::Read,
                fd: file.as_raw_fd(),
                file_id: file.id(),
                offset: 0,
                len: 0,
                iovs: iovs.as_ptr(),
                n_iovs: 1,
            };
            // SAFETY: all of it lives until the event is here.
            unsafe { engine.push(&op, 1) };
            let mut events = Vec::new();
            while events.is_empty() {
                engine.wait();
                engine.reap(&mut events);
            }
            drop(file);
            drop(engine);
            open().lock(all, Rights::NONE).unwrap_or_else(|err| panic!("{kind:?}: {err}"));
        });
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
    fn a_flush_that_nobody_waits_for_fails_for_all() {
        both(|kind| {
            // A regular file that cannot be synced.
            let file =
                HostFile::open("/proc/self/status".as_ref(), OpenOptions::default()).unwrap();
            block_on(async {
                let mut future = file.flush();
                let _ = futures_poll_once(future.as_mut()).await;
            });
            // The host tells such a failure once, so the next sync could succeed.
            assert!(file.flushes().try_begin().is_none(), "{kind:?}: the failure is forgotten");
        });
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
