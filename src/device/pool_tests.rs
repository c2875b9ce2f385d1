//! The workers under stress: a driver's ring in shared memory, a driver below that is slow and
//! fails, and a message thread that starts, stops and changes everything meanwhile.
//!
//! Nothing may hang (each wait has a deadline), get lost (each request is answered), or happen
//! twice (each answer is to a request that waits for one).

#![allow(unsafe_code)]

mod hostile;
mod order;
mod planned;

use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::dirty_log::DirtyLog;
use super::export::{CachePolicy, Export, ExportOptions};
use super::features;
use super::inflight::InflightRegion;
use super::mapping::tests::memfd;
use super::memory::{GuestMemory, MemoryRegion};
use super::pool::Pool;
use super::rings::{RingStart, Rings};
use crate::block::driver::{BlockStatus, Driver, Limits};
use crate::block::{Keep, Node, NodeOptions, Root};
use crate::error::{Error, Result};
use crate::formats::raw::Raw;
use crate::frontend::ring::{Ring, RingLayout, Segment};
use crate::frontend::{Memory, Pages};
use crate::io::{Buffers, EngineKind, Fut, HostFile, OpenOptions};
use crate::units::ByteRange;

/// No wait of these tests may take longer.
const PATIENCE: Duration = Duration::from_secs(60);
const DISK: u64 = 4 << 20;
/// Requests from here on fail.
const BAD: u64 = DISK - (64 << 10);
const SLOTS: u64 = 16;
const QUEUE_SIZE: u16 = 64;

/// A deterministic source of choices.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % n
    }
}

/// A disk in memory that is slow, wakes its tasks from another thread, and fails at its end.
struct Slow {
    data: Mutex<Vec<u8>>,
    /// Operations that have begun and not ended.
    active: AtomicUsize,
    /// Operations that have ended.
    done: AtomicU64,
    /// Whether flushes fail.
    fails_to_flush: AtomicBool,
    /// What keeps completed writes, and where that is noted.
    kept: OnceLock<(Keep, Arc<InflightRegion>)>,
    /// Tasks to be woken a little later.
    later: Mutex<Sender<Waker>>,
}

impl std::fmt::Debug for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slow")
    }
}

/// Is ready the second time; in between another thread wakes.
struct Nap<'a>(&'a Slow, bool);

impl Future for Nap<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.1, true) {
            return Poll::Ready(());
        }
        self.0.later.lock().unwrap().send(cx.waker().clone()).unwrap();
        Poll::Pending
    }
}

impl Slow {
    fn new() -> Arc<Slow> {
        let (later, wakers) = channel::<Waker>();
        std::thread::spawn(move || {
            let mut dice = Dice(1);
            while let Ok(waker) = wakers.recv() {
                if dice.below(4) == 0 {
                    std::thread::sleep(Duration::from_micros(dice.below(100)));
                }
                waker.wake();
            }
        });
        Arc::new(Slow {
            data: Mutex::new(vec![0; DISK as usize]),
            active: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            fails_to_flush: AtomicBool::new(false),
            kept: OnceLock::new(),
            later: Mutex::new(later),
        })
    }

    async fn transfer(&self, offset: u64, buf: Option<Buffers>, write: bool) -> Result<()> {
        self.active.fetch_add(1, Ordering::SeqCst);
        for _ in 0..(offset / 4096 % 3) {
            Nap(self, false).await;
        }
        let result = if offset >= BAD { Err(Error::from_errno(libc::EIO)) } else { Ok(()) };
        if let (Ok(()), Some(buf)) = (&result, buf) {
            let (start, len) = (offset as usize, buf.len() as usize);
            let mut data = self.data.lock().unwrap();
            if write {
                buf.copy_to_slice(&mut data[start..start + len]);
            } else {
                buf.copy_from_slice(&data[start..start + len]);
            }
        }
        self.done.fetch_add(1, Ordering::SeqCst);
        self.active.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

impl Driver for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn limits(&self) -> Limits {
        Limits {
            size: DISK,
            request_alignment: 1,
            memory_alignment: 1,
            optimal_io: 4096,
            discard_granularity: 512,
            read_only: false,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.transfer(offset, Some(buf), false))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        Box::pin(self.transfer(offset, Some(buf), true))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.transfer(range.offset, None, true))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.transfer(range.offset, None, true))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        let fails = self.fails_to_flush.load(Ordering::SeqCst);
        Box::pin(self.transfer(if fails { BAD } else { 4096 }, None, true))
    }

    fn block_status<'a>(&'a self, _range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(async { Err(Error::unsupported("not asked for here")) })
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        let Some((keep, region)) = self.kept.get() else { return Ok(()) };
        // A kill in here leaves a keep that nobody will be told of.
        assert!(!region.is_kept(), "a keep is wanted whose session is about to be dropped");
        keep.begin(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        self.kept.get().map(|(keep, _)| keep)
    }
}

fn export(driver: Arc<dyn Driver>, engine: EngineKind, threads: usize) -> Arc<Export> {
    let node = Node::new(driver, NodeOptions { name: "stressed".into(), ..NodeOptions::default() });
    let options = ExportOptions {
        serial: "stress".into(),
        block_size: 512,
        num_queues: 2,
        queue_size: QUEUE_SIZE,
        threads,
        cache: CachePolicy::WriteBack,
        engine,
        poll_us: 0,
        read_only: false,
    };
    Arc::new(Export::new("stressed", Root::new("stressed", node), options))
}

/// Guest memory with two regions: rings, headers and status bytes; data.
const RINGS_AT: u64 = 0x10_0000;
const DATA_AT: u64 = 0x100_0000;

fn guest_memory() -> Memory {
    let mut memory = Memory::with_region(RINGS_AT, 1 << 20, Pages::Small).unwrap();
    memory.add(crate::frontend::Region::new(DATA_AT, 1 << 20, Pages::Small).unwrap()).unwrap();
    memory
}

/// The device's view of it: a new one, with mappings of its own, each time.
fn table(memory: &Memory) -> Arc<GuestMemory> {
    GuestMemory::from_regions(memory.regions().iter().map(|region| {
        let layout = MemoryRegion {
            guest_addr: region.guest_addr(),
            size: region.size(),
            front_end_addr: region.user_addr(),
            mmap_offset: 0,
        };
        (layout, region.fd().try_clone_to_owned().unwrap().into())
    }))
    .unwrap()
}

fn notifier(fd: impl AsFd) -> Arc<OwnedFd> {
    Arc::new(fd.as_fd().try_clone_to_owned().unwrap())
}

/// One ring of the guest and what lies around it.
struct Queue {
    index: u64,
    ring: Ring,
    memory: Memory,
}

impl Queue {
    fn new(memory: &Memory, index: u64, event_idx: bool) -> Queue {
        let layout = RingLayout::contiguous(RINGS_AT + index * 0x1_0000, QUEUE_SIZE);
        let mut ring = Ring::new(memory, index as u16, layout).unwrap();
        ring.set_event_idx(event_idx);
        Queue { index, ring, memory: memory.clone() }
    }

    fn header(&self, slot: u64) -> u64 {
        RINGS_AT + 0x8_0000 + self.index * 0x1000 + slot * 32
    }

    fn status(&self, slot: u64) -> u64 {
        self.header(slot) + 16
    }

    fn data(&self, slot: u64) -> u64 {
        DATA_AT + (self.index * SLOTS + slot) * 4096
    }

    /// Offers a request and returns its head.
    fn offer(&mut self, slot: u64, kind: u32, offset: u64, with_data: bool) -> u16 {
        let (header, status, data) = (self.header(slot), self.status(slot), self.data(slot));
        self.memory.write(header, &crate::frontend::request::header(kind, offset / 512)).unwrap();
        self.memory.write(status, &[0xee]).unwrap();
        let mut parts = vec![Segment { addr: header, len: 16, writable: false }];
        if with_data {
            parts.push(Segment { addr: data, len: 4096, writable: kind != 1 });
        }
        parts.push(Segment { addr: status, len: 1, writable: true });
        let head = self.ring.add_chain(&parts).unwrap();
        self.ring.push(head);
        head
    }

    /// Drives the ring until `stop`, and until nothing is outstanding. Returns how many requests
    /// were answered.
    fn drive(&mut self, stop: &AtomicBool) -> u64 {
        // Per slot: the head and kind in flight; what its block of the disk holds.
        let mut busy: Vec<Option<(u16, u32, bool)>> = vec![None; SLOTS as usize];
        let mut stamps = vec![0u64; SLOTS as usize];
        let mut dice = Dice(self.index + 17);
        let mut answered = 0;
        loop {
            for slot in 0..SLOTS {
                if busy[slot as usize].is_some() || stop.load(Ordering::SeqCst) {
                    continue;
                }
                let own = (self.index * SLOTS + slot) * 4096;
                let (kind, offset, data) = match dice.below(12) {
                    0 => (4, 0, false),
                    1 => (0, BAD, true),
                    2..7 => (1, own, true),
                    _ => (0, own, true),
                };
                if kind == 1 {
                    stamps[slot as usize] = 1 + answered * SLOTS + slot;
                    let bytes = stamps[slot as usize].to_le_bytes().repeat(512);
                    self.memory.write(self.data(slot), &bytes).unwrap();
                } else if data {
                    self.memory.write(self.data(slot), &[0x55; 4096]).unwrap();
                }
                let head = self.offer(slot, kind, offset, data);
                busy[slot as usize] = Some((head, kind, offset == BAD));
            }
            self.ring.publish();
            self.ring.kick_if_wanted().unwrap();
            if busy.iter().all(Option::is_none) {
                assert!(!self.ring.has_used(), "an answer that nobody waits for");
                return answered;
            }
            self.ring.wait_used(Instant::now() + PATIENCE).expect("a request got lost");
            while let Some(used) = self.ring.take_used() {
                let slot = busy
                    .iter()
                    .position(|b| b.is_some_and(|(head, ..)| u32::from(head) == used.id))
                    .expect("an answer that nobody waits for");
                let (_, kind, bad) = busy[slot].take().unwrap();
                assert!(self.ring.free_chain(used.id));
                let status = self.memory.read_vec(self.status(slot as u64), 1).unwrap()[0];
                assert_eq!(status, u8::from(bad), "kind {kind}");
                let data = kind == 0 && !bad;
                assert_eq!(used.len, if data { 4097 } else { 1 });
                if data {
                    let got = self.memory.read_vec(self.data(slot as u64), 4096).unwrap();
                    assert!(got == stamps[slot].to_le_bytes().repeat(512), "slot {slot}: old data");
                }
                answered += 1;
            }
        }
    }
}

/// Ends the process when not dropped in time: a drain that hangs cannot be waited for.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn new(what: &'static str) -> Watchdog {
        let over = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&over);
        std::thread::spawn(move || {
            let until = Instant::now() + 3 * PATIENCE;
            while !watched.load(Ordering::SeqCst) {
                if Instant::now() > until {
                    eprintln!("{what} hangs");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Watchdog(over)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What a ring starts with.
fn start_of(view: &Ring, base: u16, event_idx: bool, memory: &Memory) -> RingStart {
    let (desc, avail, used) = view.user_addresses();
    let event = if event_idx { features::EVENT_IDX } else { 0 };
    RingStart {
        size: view.size(),
        desc,
        avail,
        used,
        base,
        features: features::VERSION_1 | event,
        kick: Some(notifier(view.kick_fd())),
        call: Some(notifier(view.call_fd())),
        err: Some(notifier(view.err_fd())),
        inflight: None,
        log_used: None,
        memory: table(memory),
        dirty_log: None,
    }
}

/// Drives two rings while everything about them changes.
fn stress(driver: Arc<dyn Driver>, slow: Option<Arc<Slow>>, engine: EngineKind, seed: u64) {
    let _watchdog = Watchdog::new("the stress");
    let event_idx = seed & 1 == 0;
    let export = export(driver, engine, 1 + (seed & 1) as usize);
    let pool = Pool::new(Arc::clone(&export));
    let memory = guest_memory();
    let new = InflightRegion::create(2, QUEUE_SIZE).unwrap();
    let inflight = InflightRegion::from_front_end(new.file, new.mmap_size, 0, 2, QUEUE_SIZE);
    let inflight = (seed & 2 != 0).then(|| inflight.unwrap());
    let mut queues: Vec<_> = (0..2).map(|index| Queue::new(&memory, index, event_idx)).collect();
    let views: Vec<_> = queues.iter().map(|queue| queue.ring.view()).collect();
    let mut log: Option<Arc<DirtyLog>> = None;
    let start = |index: usize, base: u16, log: &Option<Arc<DirtyLog>>| {
        let mut start = start_of(&views[index], base, event_idx, &memory);
        start.inflight = inflight.as_ref().map(|region| region.queue(index as u16).unwrap());
        start.dirty_log = log.clone();
        start.log_used = Some(views[index].layout().used);
        pool.start(index, start).unwrap();
    };
    (0..2).for_each(|index| start(index, 0, &None));
    let over = AtomicBool::new(false);
    let answered: u64 = std::thread::scope(|scope| {
        let guests: Vec<_> =
            queues.iter_mut().map(|queue| scope.spawn(|| queue.drive(&over))).collect();
        let mut dice = Dice(seed);
        let until = Instant::now() + Duration::from_millis(700);
        while Instant::now() < until {
            let index = dice.below(2) as usize;
            match dice.below(7) {
                0 | 1 => {
                    let base = pool.stop(index).expect("the ring was live");
                    assert_eq!(base, views[index].used_index(), "stopped before it was drained");
                    start(index, base, &log);
                }
                2 => {
                    let quiesced = export.root.quiesce();
                    if let Some(slow) = &slow {
                        assert_eq!(slow.active.load(Ordering::SeqCst), 0, "not quiet");
                    }
                    let node = export.node();
                    node.replace_driver(node.driver(), &quiesced);
                }
                // A stop has to wait for the gate, and nothing else.
                3 => {
                    let quiesced = export.root.quiesce();
                    let again = export.root.quiesce();
                    std::thread::scope(|scope| {
                        let stopper = scope.spawn(|| pool.stop(index).expect("live"));
                        std::thread::yield_now();
                        drop((quiesced, again));
                        start(index, stopper.join().unwrap(), &log);
                    });
                }
                4 => pool.set_memory(table(&memory)),
                5 => {
                    log =
                        (dice.below(2) == 0).then(|| DirtyLog::new(memfd(8192), 0, 8192).unwrap());
                    pool.set_dirty_log(log.clone());
                }
                _ => {
                    pool.set_call(index, Some(notifier(views[index].call_fd())));
                    pool.set_write_through(dice.below(2) == 0);
                }
            }
        }
        over.store(true, Ordering::SeqCst);
        guests.into_iter().map(|guest| guest.join().unwrap()).sum()
    });
    for (index, view) in views.iter().enumerate() {
        assert_eq!(pool.stop(index), Some(view.used_index()));
        assert_eq!(pool.stop(index), None);
    }
    pool.disconnected();
    assert!(answered > 100, "only {answered} requests");
    let counted = export.totals().requests;
    assert_eq!(counted, answered, "lost or doubled");
}

#[test]
fn nothing_is_lost_on_a_slow_driver() {
    for seed in 0..4 {
        let slow = Slow::new();
        let engine = if seed & 1 == 0 { EngineKind::Auto } else { EngineKind::Threads };
        stress(slow.clone(), Some(slow.clone()), engine, seed);
    }
}

#[test]
fn nothing_is_lost_on_planned_io() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        // The file ends where requests are to fail.
        std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = Arc::new(HostFile::open(&path, options).unwrap());
        let raw = Arc::new(Raw::open(file, false).unwrap());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(BAD).unwrap();
        let engine = if seed & 2 == 0 { EngineKind::Auto } else { EngineKind::Threads };
        stress(raw, None, engine, seed);
    }
}

#[test]
fn a_gate_that_closes_again_at_once_is_noticed() {
    let _watchdog = Watchdog::new("the gate");
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let export = export(Slow::new(), engine, 1);
        let pool = Pool::new(Arc::clone(&export));
        let memory = guest_memory();
        let queue = Queue::new(&memory, 0, true);
        pool.start(0, start_of(&queue.ring, 0, true, &memory)).unwrap();
        // The worker has nothing to do, so that nothing but the gate wakes it.
        for _ in 0..5000 {
            drop(export.root.quiesce());
        }
        pool.stop(0).unwrap();
        pool.disconnected();
    }
}

#[test]
fn a_truncated_region_takes_its_own_device_down() {
    let _watchdog = Watchdog::new("the truncated device");
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let exports = [0, 1].map(|_| export(Slow::new(), engine, 1));
        let pools = exports.clone().map(Pool::new);
        let memories = [guest_memory(), guest_memory()];
        let mut queues = [0, 1].map(|i| Queue::new(&memories[i], 0, true));
        for (i, pool) in pools.iter().enumerate() {
            pool.start(0, start_of(&queues[i].ring, 0, true, &memories[i])).unwrap();
        }
        // Reads into the data region without looking at them: our own mapping breaks, too.
        for slot in 0..SLOTS {
            queues[0].offer(slot, 0, slot * 4096, true);
        }
        let hurt = &mut queues[0];
        hurt.ring.publish();
        hurt.ring.kick().unwrap();
        memories[0].regions()[1].truncate(0).unwrap();
        let until = Instant::now() + PATIENCE;
        // More requests until one has touched the hole and the ring is given up.
        let mut slot = 0;
        while hurt.ring.wait_broken(Instant::now()).is_err() {
            assert!(Instant::now() < until, "the truncation was not noticed");
            while let Some(used) = hurt.ring.take_used() {
                hurt.ring.free_chain(used.id);
            }
            if hurt.ring.free_descriptors() >= 3 {
                hurt.offer(slot % SLOTS, 0, slot % SLOTS * 4096, true);
                hurt.ring.publish();
                hurt.ring.kick().unwrap();
                slot += 1;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        assert!(pools[0].stop(0).is_some());
        let over = AtomicBool::new(false);
        let answered = std::thread::scope(|scope| {
            let guest = scope.spawn(|| queues[1].drive(&over));
            let until = Instant::now() + PATIENCE;
            while exports[1].totals().requests == 0 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            over.store(true, Ordering::SeqCst);
            guest.join().unwrap()
        });
        assert!(answered > 0, "the other device goes on");
        pools[1].stop(0).unwrap();
        pools.iter().for_each(Rings::disconnected);
    }
}

#[test]
fn a_worker_that_quits_with_requests_in_flight_finishes_them() {
    let _watchdog = Watchdog::new("the quitting worker");
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let slow = Slow::new();
        let pool = Pool::new(export(slow.clone(), engine, 1));
        let memory = guest_memory();
        let mut queue = Queue::new(&memory, 0, true);
        for slot in 0..SLOTS {
            queue.offer(slot, 0, slot * 4096, true);
        }
        queue.ring.publish();
        pool.start(0, start_of(&queue.ring, 0, true, &memory)).unwrap();
        // Against the rules: the ring was not stopped.
        pool.disconnected();
        assert_eq!(slow.active.load(Ordering::SeqCst), 0);
    }
}
