//! What must come before what: stops and what is owed, nodes and who reads from them, sessions and
//! what is noted of them. Each of these tests stands for a line of the worker or the pool that could
//! be left out without the stress noticing.

use std::io::Write;

use super::*;
use crate::device::rings::Session;
use crate::io::Rights;

/// Waits until `holds`; panics with `what` if that takes too long.
pub(super) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "still waiting for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_readable(fd: &impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

fn region() -> Arc<InflightRegion> {
    let new = InflightRegion::create(2, QUEUE_SIZE).unwrap();
    InflightRegion::from_front_end(new.file, new.mmap_size, 0, 2, QUEUE_SIZE).unwrap()
}

impl Queue {
    /// Reads 4 KiB; the status and the first byte.
    fn read(&mut self, offset: u64) -> (u8, u8) {
        let head = self.offer(0, 0, offset, true);
        self.ring.publish();
        self.ring.kick().unwrap();
        self.ring.wait_used(Instant::now() + PATIENCE).expect("an answer");
        let used = self.ring.take_used().expect("an answer");
        assert_eq!(used.id, u32::from(head));
        assert!(self.ring.free_chain(used.id));
        let byte = |addr| self.memory.read_vec(addr, 1).unwrap()[0];
        (byte(self.status(0)), byte(self.data(0)))
    }
}

/// A ring that is to stop before it has begun: what an earlier process owed is done, what is new
/// is left to the guest's next ring.
#[test]
fn a_ring_that_is_stopped_at_once_does_what_is_owed_and_no_more() {
    const OWED: u16 = 12;
    let _watchdog = Watchdog::new("the stopped ring");
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let export = export(Slow::new(), engine, 1);
        let pool = Pool::new(Arc::clone(&export));
        let memory = guest_memory();
        let mut queue = Queue::new(&memory, 0, true);
        let region = region();
        {
            let mut earlier = region.queue(0).unwrap();
            earlier.start(0, 0, QUEUE_SIZE).unwrap();
            for slot in 0..SLOTS {
                let head = queue.offer(slot, 0, slot * 4096, true);
                if slot < u64::from(OWED) {
                    earlier.take(head);
                }
            }
        }
        queue.ring.publish();
        let closed = export.root.quiesce();
        let mut start = start_of(&queue.ring, 0, true, &memory);
        start.inflight = region.queue(0);
        pool.start(0, start).unwrap();
        let base = std::thread::scope(|scope| {
            let stopper = scope.spawn(|| pool.stop(0).expect("live"));
            // Long enough for a stop that waits for nothing.
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(queue.ring.used_index(), 0, "the gate is closed");
            assert!(!stopper.is_finished(), "stopped with requests that are owed");
            drop(closed);
            stopper.join().unwrap()
        });
        assert_eq!((base, queue.ring.used_index()), (OWED, OWED));
        for slot in 0..SLOTS {
            let status = memory.read_vec(queue.status(slot), 1).unwrap()[0];
            assert_eq!(status, if slot < u64::from(OWED) { 0 } else { 0xee }, "slot {slot}");
        }
        pool.disconnected();
    }
}

/// Under a guest that reads, one file takes the place of another, mostly with the descriptor of the
/// one before it. Every read finds the node of its time, content and size, and the file before it is
/// closed: a registration with the engine would keep it open, and locked.
#[test]
fn reads_go_to_the_node_that_is_there_now() {
    let _watchdog = Watchdog::new("the replaced node");
    let dir = tempfile::tempdir().unwrap();
    let path = |i: u8| dir.path().join(i.to_string());
    let driver = |i: u8| {
        // Every other one has one block more.
        std::fs::write(path(i), vec![i; 4096 * (1 + usize::from(i & 1))]).unwrap();
        let file = Arc::new(HostFile::open(&path(i), OpenOptions::default()).unwrap());
        file.lock(Rights::CONSISTENT_READ, Rights::CONSISTENT_READ).unwrap();
        Arc::new(Raw::open(file, true).unwrap())
    };
    let node =
        |i: u8| Node::new(driver(i), NodeOptions { name: i.to_string(), ..NodeOptions::default() });
    let is_locked = |i: u8| {
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = HostFile::open(&path(i), options).unwrap();
        file.lock(Rights::WRITE, Rights::ALL).is_err()
    };
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let export = export(driver(0), engine, 1);
        let pool = Pool::new(Arc::clone(&export));
        let memory = guest_memory();
        let mut queue = Queue::new(&memory, 0, true);
        pool.start(0, start_of(&queue.ring, 0, true, &memory)).unwrap();
        assert_eq!(queue.read(0), (0, 0));
        for i in 1..40 {
            let quiesced = export.root.quiesce();
            drop(export.root.replace_node(node(i), &quiesced).unwrap());
            drop(quiesced);
            assert_eq!(queue.read(0), (0, i));
            // A child that another test starts has all our files, and their locks, for a moment.
            wait_until("the old file to be closed", || !is_locked(i - 1));
            assert!(is_locked(i));
            let (status, byte) = queue.read(4096);
            if i & 1 == 0 {
                assert_eq!(status, 1, "node {i} ends before that");
            } else {
                assert_eq!((status, byte), (0, i));
            }
        }
        pool.stop(0).unwrap();
        pool.disconnected();
    }
}

/// Nobody may be listening where an interrupt went before: one more goes out when a ring starts,
/// and when the place changes.
#[test]
fn interrupts_that_may_have_got_lost_are_sent_again() {
    let export = export(Slow::new(), EngineKind::Auto, 1);
    let pool = Pool::new(export);
    let memory = guest_memory();
    let queue = Queue::new(&memory, 0, true);
    pool.start(0, start_of(&queue.ring, 0, true, &memory)).unwrap();
    wait_until("the interrupt at the start", || is_readable(&queue.ring.call_fd()));
    let flags = rustix::event::EventfdFlags::CLOEXEC;
    let new = Arc::new(rustix::event::eventfd(0, flags).unwrap());
    pool.set_call(0, Some(Arc::clone(&new)));
    wait_until("the interrupt on the new descriptor", || is_readable(&new));
    pool.stop(0).unwrap();
    pool.disconnected();
}

/// The kernel keeps a file that it is asked to watch. Once the ring has stopped, nobody has the
/// kick any more, which the writer of a pipe can tell.
#[test]
fn a_stopped_ring_leaves_no_watch_behind() {
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let pool = Pool::new(export(Slow::new(), engine, 1));
        let memory = guest_memory();
        let queue = Queue::new(&memory, 0, true);
        let (kick, mut guest) = std::io::pipe().unwrap();
        let mut start = start_of(&queue.ring, 0, true, &memory);
        start.kick = Some(Arc::new(kick.into()));
        pool.start(0, start).unwrap();
        guest.write_all(&[1]).unwrap();
        pool.stop(0).unwrap();
        wait_until("the watch to go", || {
            guest.write(&[1]).is_err_and(|err| err.kind() == std::io::ErrorKind::BrokenPipe)
        });
        pool.disconnected();
    }
}

/// Completed writes that are kept outside of the image: a guest that comes back is refused where
/// they are not found, and the note goes only when everything is durable.
#[test]
fn what_is_noted_of_kept_writes_is_heeded_and_stays_until_they_are_durable() {
    let slow = Slow::new();
    let pool = Pool::new(export(slow.clone(), EngineKind::Auto, 1));
    let region = region();
    pool.session(Session::New(7), Some(&region)).unwrap();
    assert!(!region.is_kept(), "this driver has no keep");
    // As the process before us left it, which had one.
    region.queue(0).unwrap().start(0, 0, QUEUE_SIZE).unwrap();
    region.note_kept(true);
    let err = pool.session(Session::Returned(7), Some(&region)).unwrap_err().to_string();
    assert!(err.contains("no state directory now"), "{err}");
    pool.session(Session::New(8), Some(&region)).unwrap();
    region.note_kept(true);
    pool.disconnected();
    assert!(!region.is_kept());
    pool.session(Session::New(9), Some(&region)).unwrap();
    region.note_kept(true);
    slow.fails_to_flush.store(true, Ordering::SeqCst);
    pool.disconnected();
    assert!(region.is_kept(), "nothing is durable");
}

/// What was kept has been redone and is durable: from then on until the session has begun nobody
/// needs the keep, which is of no session meanwhile.
#[test]
fn a_kill_while_a_session_begins_costs_the_guest_nothing() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let slow = Slow::new();
    let pool = Pool::new(export(slow.clone(), EngineKind::Auto, 1));
    let region = region();
    let keep = Keep::open(dir.path(), (1, 2), "slow").unwrap();
    slow.kept.set((keep, Arc::clone(&region))).unwrap();
    pool.session(Session::New(7), Some(&region)).unwrap();
    assert!(region.is_kept());
    region.queue(0).unwrap().start(0, 0, QUEUE_SIZE).unwrap();
    // As after a kill: the region says so, and the keep is there.
    pool.session(Session::Returned(7), Some(&region)).unwrap();
    assert!(region.is_kept());
    pool.disconnected();
    assert!(!region.is_kept());
}

/// A disk whose flushes end when they are told to.
#[derive(Debug)]
struct SlowToFlush {
    below: Arc<Slow>,
    begun: AtomicUsize,
    may_end: AtomicBool,
}

impl Driver for SlowToFlush {
    fn name(&self) -> &'static str {
        "slow to flush"
    }

    fn limits(&self) -> Limits {
        self.below.limits()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.below.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        self.below.write(offset, buf, fua)
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.below.write_zeroes(range, may_unmap)
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.below.discard(range)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            while !self.may_end.load(Ordering::SeqCst) {
                Nap(&self.below, false).await;
            }
            Ok(())
        })
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.below.block_status(range)
    }
}

/// Before the gate is closed, the flush under way ends, while reads go on; another one waits until
/// the gate is open again, and then goes to the node that is there.
#[test]
fn a_flush_keeps_nobody_waiting_for_a_gate() {
    let _watchdog = Watchdog::new("the held flush");
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let disk = || {
            Arc::new(SlowToFlush {
                below: Slow::new(),
                begun: AtomicUsize::new(0),
                may_end: AtomicBool::new(false),
            })
        };
        let (first, second) = (disk(), disk());
        let begun = |disk: &SlowToFlush| disk.begun.load(Ordering::SeqCst);
        let export = export(first.clone(), engine, 1);
        let pool = Pool::new(Arc::clone(&export));
        let memory = guest_memory();
        let mut queues = [0, 1].map(|index| Queue::new(&memory, index, true));
        for (index, queue) in queues.iter().enumerate() {
            pool.start(index, start_of(&queue.ring, 0, true, &memory)).unwrap();
        }
        let flush = |queue: &mut Queue, slot| {
            queue.offer(slot, 4, 0, false);
            queue.ring.publish();
            queue.ring.kick().unwrap();
        };
        let [flushed, read] = &mut queues;
        flush(flushed, 1);
        wait_until("a flush", || begun(&first) == 1);
        let closer = std::thread::spawn({
            let root = export.root.clone();
            move || root.quiesce()
        });
        // Long enough for the gate to be closed, if that waited for nothing.
        std::thread::sleep(Duration::from_millis(20));
        flush(flushed, 2);
        for _ in 0..10 {
            assert_eq!(read.read(0), (0, 0));
        }
        assert_eq!(begun(&first), 1, "the second one is held");
        assert!(!closer.is_finished(), "closed over a flush");
        first.may_end.store(true, Ordering::SeqCst);
        let quiesced = closer.join().unwrap();
        let node = Node::new(second.clone(), NodeOptions::default());
        export.root.replace_node(node, &quiesced).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!((begun(&first), begun(&second)), (1, 0));
        assert_eq!(flushed.ring.used_index(), 1);
        drop(quiesced);
        wait_until("the held flush", || begun(&second) == 1);
        second.may_end.store(true, Ordering::SeqCst);
        wait_until("both answers", || flushed.ring.used_index() == 2);
        for slot in [1, 2] {
            assert_eq!(memory.read_vec(flushed.status(slot), 1).unwrap(), [0]);
        }
        for index in [0, 1] {
            pool.stop(index).unwrap();
        }
        pool.disconnected();
        assert_eq!(begun(&first), 1);
    }
}
