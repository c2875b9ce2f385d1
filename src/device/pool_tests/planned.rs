//! What a worker and the pool owe to those who plan: their files are let go, their flushes that fail
//! count, their commits are heard of, and sessions reach them. Each test stands for lines that could
//! be left out without another test noticing.

use std::os::fd::AsRawFd;

use super::order::wait_until;
use super::*;
use crate::block::driver::{
    CommitPlanned, Committed, Plan, PlanCommit, PlanExtent, PlanOp, Planned,
};
use crate::block::{Attempt, InPlace, Settled, Submission};
use crate::device::rings::Session;
use crate::io::Scattered;

/// What a [`Planner`] was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// A write was planned, durable on completion or not.
    Planned { fua: bool },
    /// The data of a planned write was there.
    Written(u64),
    /// So was that of another one, which is to be heard of together with the one before it.
    Joined(u64),
    /// It was not.
    Abandoned(u64),
    /// A flush, not planned.
    Flush,
    /// The host has written the copy of a write's data, or could not.
    HostWrote(bool),
    /// What was written is settled.
    Settled,
    /// What became of an earlier guest.
    Resume(Option<u128>),
    /// A guest's session began.
    Begin(u128),
}

/// Where it is noted.
#[derive(Debug, Default)]
struct Notes {
    heard: Mutex<Vec<Heard>>,
    /// What the next commit answers.
    next: Mutex<Option<Result<Committed>>>,
    /// Whether commits of writes that go on from each other are wanted together.
    joins: AtomicBool,
}

impl Notes {
    fn note(&self, heard: Heard) {
        self.heard.lock().unwrap().push(heard);
    }

    /// What has been heard since the last call.
    fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }
}

impl CommitPlanned for Notes {
    fn written(&self, range: ByteRange) -> Result<Committed> {
        self.note(Heard::Written(range.offset));
        self.next.lock().unwrap().take().unwrap_or(Ok(Committed::Done))
    }

    fn abandoned(&self, range: ByteRange) {
        self.note(Heard::Abandoned(range.offset));
    }

    fn join(&self, range: ByteRange, next: ByteRange) -> bool {
        assert_eq!(range.end(), next.offset);
        let joins = self.joins.load(Ordering::SeqCst);
        if joins {
            self.note(Heard::Joined(next.offset));
        }
        joins
    }
}

/// A driver that plans all it can, wants to know of writes, and notes what it hears.
#[derive(Debug)]
struct Planner {
    data: HostFile,
    /// What a planned flush syncs.
    synced: HostFile,
    notes: Arc<Notes>,
    rest: Arc<Slow>,
    /// Whether writes are of copies, and planned by nobody.
    copies: AtomicBool,
    /// What it demands of addresses in memory; of requests, whole blocks.
    memory_alignment: AtomicUsize,
}

impl Planner {
    fn new(data: HostFile, synced: HostFile) -> Arc<Planner> {
        let (notes, rest, copies) = (Arc::default(), Slow::new(), AtomicBool::new(false));
        let memory_alignment = AtomicUsize::new(1);
        Arc::new(Planner { data, synced, notes, rest, copies, memory_alignment })
    }

    /// One on a file of its own in `dir`.
    fn in_dir(dir: &tempfile::TempDir, write: bool) -> Arc<Planner> {
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
        let open = || HostFile::open(&path, OpenOptions { write, ..OpenOptions::default() });
        Planner::new(open().unwrap(), open().unwrap())
    }
}

impl Driver for Planner {
    fn name(&self) -> &'static str {
        "planner"
    }

    fn limits(&self) -> Limits {
        let memory_alignment = self.memory_alignment.load(Ordering::SeqCst);
        Limits { request_alignment: 512, memory_alignment, ..self.rest.limits() }
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let mut file = &self.data;
        match op {
            PlanOp::Read => {}
            PlanOp::Write { .. } if self.copies.load(Ordering::SeqCst) => return Planned::NotNow,
            PlanOp::Write { fua } => {
                self.notes.note(Heard::Planned { fua });
                let owner = Arc::clone(&self.notes) as Arc<dyn CommitPlanned>;
                plan.commit = Some(PlanCommit::new(owner, range));
            }
            PlanOp::Flush => file = &self.synced,
        }
        plan.extents.push(PlanExtent::File { file, offset: range.offset, len: range.len });
        Planned::Ready
    }

    fn in_place(self: Arc<Self>) -> Option<Box<dyn InPlace>> {
        let copies = self.copies.load(Ordering::SeqCst);
        copies.then(|| Box::new(Copier { planner: self, copy: None }) as Box<dyn InPlace>)
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.rest.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        self.rest.write(offset, buf, fua)
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.rest.write_zeroes(range, may_unmap)
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.rest.discard(range)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        self.notes.note(Heard::Flush);
        self.rest.flush()
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.rest.block_status(range)
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        self.notes.note(Heard::Resume(nonce));
        Box::pin(async { Ok(()) })
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.notes.note(Heard::Begin(nonce));
        Ok(())
    }
}

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

impl Queue {
    /// One request of that kind, to its end; its status.
    fn request(&mut self, kind: u32, offset: u64) -> u8 {
        let head = self.offer(0, kind, offset, kind != FLUSH);
        self.ring.publish();
        self.ring.kick().unwrap();
        self.ring.wait_used(Instant::now() + PATIENCE).expect("an answer");
        let used = self.ring.take_used().expect("an answer");
        assert_eq!(used.id, u32::from(head));
        assert!(self.ring.free_chain(used.id));
        self.memory.read_vec(self.status(0), 1).unwrap()[0]
    }
}

/// Writes a copy of one request's data at a time, with all bits the other way round.
struct Copier {
    planner: Arc<Planner>,
    copy: Option<Vec<u8>>,
}

// SAFETY: the copy is let go when its write has ended.
unsafe impl InPlace for Copier {
    fn write(&mut self, range: ByteRange, data: Scattered<'_>, _queue: u16) -> Attempt<'_> {
        assert!(self.copy.is_none(), "one at a time");
        self.planner.notes.note(Heard::Planned { fua: false });
        let mut copy = vec![0; range.len as usize];
        data.copy_to_slice(&mut copy);
        copy.iter_mut().for_each(|byte| *byte = !*byte);
        let (file, offset) = (&self.planner.data, range.offset);
        Attempt::Submit(Submission { file, offset, data: self.copy.insert(copy), token: 77 })
    }

    fn written(&mut self, token: u32, has_succeeded: bool) {
        assert_eq!(token, 77);
        assert!(self.copy.take().is_some(), "told twice");
        self.planner.notes.note(Heard::HostWrote(has_succeeded));
    }

    fn settle(&mut self) -> Settled {
        let planner = Arc::clone(&self.planner);
        match self.planner.notes.next.lock().unwrap().take() {
            Some(result) => Settled::Later(Box::pin(async move {
                Nap(&planner.rest, false).await;
                planner.notes.note(Heard::Settled);
                result.map(|_| ())
            })),
            None => {
                planner.notes.note(Heard::Settled);
                Settled::Done(Ok(()))
            }
        }
    }
}

/// What a worker answers to 4 KiB requests that it takes in one batch; what their memory holds then.
/// That of the first was full of ones, of the second full of twos, and so on.
fn batch(planner: &Arc<Planner>, requests: &[(u32, u64)]) -> (Vec<u8>, Vec<u8>) {
    let export = export(Arc::clone(planner) as Arc<dyn Driver>, EngineKind::Auto, 1);
    let pool = Pool::new(export);
    let memory = guest_memory();
    let mut queue = Queue::new(&memory, 0, true);
    for (slot, (kind, offset)) in requests.iter().enumerate() {
        memory.write(queue.data(slot as u64), &[slot as u8 + 1; 4096]).unwrap();
        queue.offer(slot as u64, *kind, *offset, true);
    }
    queue.ring.publish();
    pool.start(0, start_of(&queue.ring, 0, true, &memory)).unwrap();
    queue.ring.kick().unwrap();
    for _ in requests {
        while queue.ring.take_used().is_none() {
            queue.ring.wait_used(Instant::now() + PATIENCE).expect("an answer");
        }
    }
    pool.stop(0).unwrap();
    pool.disconnected();
    let slots = 0..requests.len() as u64;
    let status = |slot| memory.read_vec(queue.status(slot), 1).unwrap()[0];
    let data = |slot| memory.read_vec(queue.data(slot), 4096).unwrap();
    (slots.clone().map(status).collect(), slots.flat_map(data).collect())
}

/// A planner on memory, where what can be done in place is, with so many blocks of 4 KiB. It does not
/// grow.
fn in_memory(blocks: u64) -> Arc<Planner> {
    let file = memfd(blocks * 4096);
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::GROW).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    let open = || HostFile::open(path.as_ref(), options).unwrap();
    Planner::new(open(), open())
}

fn content(planner: &Planner) -> Vec<u8> {
    let len = planner.data.extent().0 as usize;
    let buf = crate::io::AlignedBuf::zeroed(len, 4096);
    crate::io::block_on(crate::io::File::read(&planner.data, 0, buf.buffers())).unwrap();
    buf.to_vec()
}

/// So many blocks of each byte.
fn blocks(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte; 4096]).collect()
}

/// A planner served on one ring.
fn serve(planner: &Arc<Planner>, engine: EngineKind) -> (Arc<Export>, Pool, Queue) {
    let export = export(Arc::clone(planner) as Arc<dyn Driver>, engine, 1);
    let pool = Pool::new(Arc::clone(&export));
    let memory = guest_memory();
    let queue = Queue::new(&memory, 0, true);
    pool.start(0, start_of(&queue.ring, 0, true, &memory)).unwrap();
    (export, pool, queue)
}

/// The ring registers the files of planned requests with the kernel, which keeps them open. Once
/// the graph has changed nothing of ours may.
#[test]
fn the_engine_lets_go_of_files_when_the_graph_changes() {
    let _watchdog = Watchdog::new("the registered file");
    let dir = tempfile::tempdir().unwrap();
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let planner = Planner::in_dir(&dir, true);
        let path = planner.synced.path().to_owned();
        // This kind of lock goes only when nobody has the open file any more, the kernel included.
        // SAFETY: no argument is a pointer.
        assert_eq!(unsafe { libc::flock(planner.synced.as_raw_fd(), libc::LOCK_EX) }, 0);
        let (export, pool, mut queue) = serve(&planner, engine);
        // A read might be done in place; a flush goes through the engine.
        assert_eq!(queue.request(FLUSH, 0), 0);
        let other = tempfile::tempdir().unwrap();
        let quiesced = export.root.quiesce();
        export.node().replace_driver(Planner::in_dir(&other, true), &quiesced);
        drop((quiesced, planner));
        assert_eq!(queue.request(FLUSH, 0), 0);
        let again = std::fs::File::open(&path).unwrap();
        // A child that another test starts has all our files for a moment.
        wait_until("the file to be closed", || {
            // SAFETY: as above.
            unsafe { libc::flock(again.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
        });
        pool.stop(0).unwrap();
        pool.disconnected();
    }
}

/// What a flush that failed has lost nobody knows, so no later one may succeed.
#[test]
fn a_planned_flush_that_fails_poisons_the_node() {
    let _watchdog = Watchdog::new("the failed flush");
    let dir = tempfile::tempdir().unwrap();
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let data = Planner::in_dir(&dir, true);
        let path = data.data.path();
        let data =
            HostFile::open(path, OpenOptions { write: true, ..OpenOptions::default() }).unwrap();
        // Looks like a file, and cannot be synced.
        let synced =
            HostFile::open("/proc/version".as_ref(), OpenOptions::default()).expect("proc");
        let planner = Planner::new(data, synced);
        let (export, pool, mut queue) = serve(&planner, engine);
        assert_eq!(queue.request(WRITE, 4096), 0);
        assert!(!export.node().is_poisoned());
        assert_eq!(queue.request(FLUSH, 0), 1);
        assert!(export.node().is_poisoned());
        planner.notes.take();
        assert_eq!(queue.request(WRITE, 4096), 1, "a write after a flush that failed");
        assert_eq!(queue.request(FLUSH, 0), 1, "a flush after a flush that failed");
        assert_eq!(queue.request(0, 4096), 0, "reads go on");
        pool.stop(0).unwrap();
        pool.disconnected();
        assert_eq!(planner.notes.take(), [], "nothing was asked for");
    }
}

/// The second half of a planned write happens before the guest hears of it, and what it says counts.
#[test]
fn a_planned_write_is_committed() {
    let _watchdog = Watchdog::new("the commit");
    let dir = tempfile::tempdir().unwrap();
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        use Heard::*;
        let planner = Planner::in_dir(&dir, true);
        let (_, pool, mut queue) = serve(&planner, engine);
        let mut write = |answer| {
            *planner.notes.next.lock().unwrap() = Some(answer);
            (queue.request(WRITE, 8192), planner.notes.take())
        };
        let planned = Planned { fua: false };
        assert_eq!(write(Ok(Committed::Done)), (0, vec![planned, Written(8192)]));
        assert_eq!(write(Ok(Committed::FlushFirst)), (0, vec![planned, Written(8192), Flush]));
        let refused = Err(Error::from_errno(libc::ENOSPC));
        assert_eq!(write(refused), (1, vec![planned, Written(8192)]));
        pool.stop(0).unwrap();
        pool.disconnected();
        // And one whose data does not arrive.
        let planner = Planner::in_dir(&dir, false);
        let (_, pool, mut queue) = serve(&planner, engine);
        assert_eq!(queue.request(WRITE, 8192), 1);
        assert_eq!(planner.notes.take(), [planned, Abandoned(8192)]);
        pool.stop(0).unwrap();
        pool.disconnected();
    }
}

/// Writes that go on from each other are one call of the host, and one step of the driver, if it
/// wants to have it so.
#[test]
fn writes_that_go_on_from_each_other_are_done_and_committed_together() {
    use Heard::*;
    let _watchdog = Watchdog::new("the run");
    let writes = [(WRITE, 4096), (WRITE, 8192), (WRITE, 12288), (WRITE, 24576)];
    let planned = Planned { fua: false };
    for joins in [true, false] {
        let planner = in_memory(8);
        planner.notes.joins.store(joins, Ordering::SeqCst);
        assert_eq!(batch(&planner, &writes).0, [0; 4]);
        // The first three wait for the fourth.
        let mut heard = vec![planned; 4];
        match joins {
            true => heard.extend([Joined(8192), Joined(12288), Written(4096)]),
            false => heard.extend([Written(4096), Written(8192), Written(12288)]),
        }
        heard.push(Written(24576));
        let mut found = planner.notes.take();
        assert_eq!(found.pop(), Some(Flush), "of the guest's end");
        assert_eq!(found, heard);
        assert!(content(&planner) == blocks(&[0, 1, 2, 3, 0, 0, 4, 0]));
    }
    // What the driver says then is of all of them.
    for (answer, status) in
        [(Ok(Committed::FlushFirst), 0), (Err(Error::from_errno(libc::ENOSPC)), 1)]
    {
        let planner = in_memory(8);
        planner.notes.joins.store(true, Ordering::SeqCst);
        *planner.notes.next.lock().unwrap() = Some(answer);
        assert_eq!(batch(&planner, &writes).0, [status, status, status, 0]);
    }
}

/// What a format has as its blocks is nothing to the memory of a request, unless the host says so.
#[test]
fn memory_in_odd_pieces_is_planned_where_the_host_takes_it() {
    let _watchdog = Watchdog::new("the odd pieces");
    for (alignment, planned) in [(1, 1), (4, 0)] {
        let planner = in_memory(8);
        planner.memory_alignment.store(alignment, Ordering::SeqCst);
        let (_, pool, mut queue) = serve(&planner, EngineKind::Auto);
        let (header, data) = (queue.header(0), queue.data(0));
        queue.memory.write(header, &crate::frontend::request::header(WRITE, 8)).unwrap();
        let part = |addr, len, writable| Segment { addr, len, writable };
        let head = queue.ring.add_chain(&[
            part(header, 16, false),
            part(data, 100, false),
            part(data + 100, 412, false),
            part(queue.status(0), 1, true),
        ]);
        queue.ring.push(head.unwrap());
        queue.ring.publish();
        queue.ring.kick().unwrap();
        queue.ring.wait_used(Instant::now() + PATIENCE).expect("an answer");
        assert_eq!(queue.memory.read_vec(queue.status(0), 1).unwrap(), [0]);
        let heard = planner.notes.take();
        assert_eq!(
            heard.iter().filter(|heard| matches!(heard, Heard::Planned { .. })).count(),
            planned
        );
        pool.stop(0).unwrap();
        pool.disconnected();
    }
}

/// Each request learns what became of itself.
#[test]
fn a_run_that_fails_in_its_middle_fails_there_only() {
    use Heard::*;
    let _watchdog = Watchdog::new("the run that fails");
    let planner = in_memory(2);
    planner.notes.joins.store(true, Ordering::SeqCst);
    let at = |kind| [0, 4096, 8192, 12288].map(|offset| (kind, offset));
    assert_eq!(batch(&planner, &at(WRITE)).0, [0, 0, 1, 1]);
    let mut heard = vec![Planned { fua: false }; 4];
    heard.extend([Written(0), Written(4096), Abandoned(8192), Abandoned(12288), Flush]);
    assert_eq!(planner.notes.take(), heard);
    assert!(content(&planner) == blocks(&[1, 2]));
    let (status, data) = batch(&planner, &at(READ));
    assert_eq!(status, [0, 0, 1, 1]);
    assert!(data == blocks(&[1, 2, 3, 4]));
    // In another order, they are no run.
    let reads = [(READ, 4096), (READ, 0), (READ, 4096), (WRITE, 8192)];
    let (status, data) = batch(&planner, &reads);
    assert_eq!(status, [0, 0, 0, 1]);
    assert!(data == blocks(&[2, 1, 2, 4]));
}

/// The host writes the driver's copy, and the guest hears of it when the driver has settled it.
#[test]
fn a_write_of_a_copy_completes_once_it_is_settled() {
    use Heard::*;
    let _watchdog = Watchdog::new("the copy");
    let dir = tempfile::tempdir().unwrap();
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let planner = Planner::in_dir(&dir, true);
        planner.copies.store(true, Ordering::SeqCst);
        let (_, pool, mut queue) = serve(&planner, engine);
        let planned = Planned { fua: false };
        let data = queue.data(0);
        for (i, answer) in [None, Some(Ok(Committed::Done))].into_iter().enumerate() {
            *planner.notes.next.lock().unwrap() = answer;
            queue.memory.write(data, &[i as u8; 4096]).unwrap();
            assert_eq!(queue.request(WRITE, 8192), 0);
            assert_eq!(planner.notes.take(), [planned, HostWrote(true), Settled]);
            let disk = std::fs::read(planner.data.path()).unwrap();
            assert!(disk[8192..][..4096].iter().all(|byte| *byte == !(i as u8)));
            assert!(queue.memory.read_vec(data, 4096).unwrap().iter().all(|b| *b == i as u8));
        }
        *planner.notes.next.lock().unwrap() = Some(Err(Error::from_errno(libc::ENOSPC)));
        assert_eq!(queue.request(WRITE, 8192), 1);
        assert_eq!(planner.notes.take(), [planned, HostWrote(true), Settled]);
        // The slot that had the copy has the guest's memory again.
        assert_eq!(queue.request(0, 8192), 0);
        assert!(queue.memory.read_vec(data, 4096).unwrap().iter().all(|byte| *byte == !1));
        pool.stop(0).unwrap();
        pool.disconnected();
        // And one that the host cannot write.
        let planner = Planner::in_dir(&dir, false);
        planner.copies.store(true, Ordering::SeqCst);
        let (_, pool, mut queue) = serve(&planner, engine);
        assert_eq!(queue.request(WRITE, 8192), 1);
        assert_eq!(planner.notes.take(), [planned, HostWrote(false)], "there is nothing to settle");
        pool.stop(0).unwrap();
        pool.disconnected();
    }
}

/// From the switch to write-through on, what completed before and after is durable; and so is
/// everything when the guest has gone.
#[test]
fn what_completed_is_flushed_at_the_switch_and_at_the_end() {
    use Heard::*;
    let _watchdog = Watchdog::new("the switch");
    let dir = tempfile::tempdir().unwrap();
    let planner = Planner::in_dir(&dir, true);
    let (_, pool, mut queue) = serve(&planner, EngineKind::Auto);
    assert_eq!(queue.request(WRITE, 0), 0);
    assert_eq!(planner.notes.take(), [Planned { fua: false }, Written(0)]);
    pool.set_write_through(true);
    assert_eq!(planner.notes.take(), [Flush]);
    pool.set_write_through(true);
    assert_eq!(planner.notes.take(), [], "no flush twice");
    assert_eq!(queue.request(WRITE, 0), 0);
    assert_eq!(planner.notes.take(), [Planned { fua: true }, Written(0), Flush]);
    pool.set_write_through(false);
    assert_eq!(queue.request(WRITE, 0), 0);
    assert_eq!(planner.notes.take(), [Planned { fua: false }, Written(0)]);
    pool.set_write_through(true);
    planner.notes.take();
    pool.stop(0).unwrap();
    assert_eq!(planner.notes.take(), []);
    pool.disconnected();
    assert_eq!(planner.notes.take(), [Flush]);
    assert!(!pool.export().guest_write_through(), "the next guest starts anew");
}

/// Drivers that keep something for a guest hear whether it is back before anything else.
#[test]
fn a_driver_hears_of_each_session() {
    use Heard::*;
    let dir = tempfile::tempdir().unwrap();
    let planner = Planner::in_dir(&dir, true);
    let pool = Pool::new(export(Arc::clone(&planner) as Arc<dyn Driver>, EngineKind::Auto, 1));
    pool.session(Session::Anonymous, None).unwrap();
    assert_eq!(planner.notes.take(), [Resume(None)]);
    pool.session(Session::New(7), None).unwrap();
    assert_eq!(planner.notes.take(), [Resume(None), Begin(7)]);
    pool.session(Session::Returned(7), None).unwrap();
    assert_eq!(planner.notes.take(), [Resume(Some(7)), Begin(7)]);
}
