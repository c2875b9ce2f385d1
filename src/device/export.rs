//! What is served: a node, and how the guest is to see it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::block::{Node, Root};
use crate::device::config_space::{ConfigParams, ConfigSpace};
use crate::device::latency::{Latencies, Times};
use crate::error::{Error, ErrorKind, Result};
use crate::io::EngineKind;

/// How the guest's flushes and writes are treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Volatile cache, flushes honoured.
    #[default]
    WriteBack,
    /// Every write is durable before it completes.
    WriteThrough,
    /// Flushes are ignored: fast, and a power cut loses the disk.
    Unsafe,
}

/// Settings of an export, fixed while it lives.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// What the guest gets for GET_ID: at most 20 bytes.
    pub serial: String,
    /// Logical block size the guest sees, in bytes: 512 or 4096.
    pub block_size: u32,
    /// Most queues a front-end may use, 1 to 64.
    pub num_queues: usize,
    /// Largest queue size, a power of two up to 1024.
    pub queue_size: u16,
    /// Worker threads; queues are dealt out to them. At most one per queue is made.
    pub threads: usize,
    /// What to do with flushes.
    pub cache: CachePolicy,
    /// How I/O is done.
    pub engine: EngineKind,
    /// How long a worker may poll its rings before it sleeps, in microseconds; 0 is never.
    pub poll_us: u32,
    /// Do not let the guest write, even if the node could be written.
    pub read_only: bool,
}

/// Bytes of data that all workers of an export have under way at a time, about. The guest may name the
/// same memory in as many requests as it likes, but what some of them need is ours: a request that
/// O_DIRECT cannot use as it is takes a buffer. And a drain lasts as long as what is under way.
const DATA_IN_FLIGHT: u64 = 512 << 20;
/// The most and the least of it that one worker has.
const MOST_DATA: u64 = 64 << 20;
const LEAST_DATA: u64 = 8 << 20;

/// A served disk. Shared by the message thread and the workers.
#[derive(Debug)]
pub struct Export {
    /// What log lines call it.
    name: String,
    /// The disk, and the gate of the workers.
    pub root: Root,
    /// How it is served.
    pub options: ExportOptions,
    /// Whether the guest may not write. Settled once: a node may be frozen at any time, and be replaced by
    /// then, or be about to.
    read_only: bool,
    /// What the guest reads as device configuration.
    config: Mutex<ConfigSpace>,
    /// Completed writes must be durable, whatever the cache policy: the guest has no FLUSH, or
    /// has switched its cache to write-through.
    guest_write_through: AtomicBool,
    /// What each worker that there is or was has done.
    workers: Mutex<Vec<Arc<Counters>>>,
    /// Workers that run.
    running: Mutex<u64>,
    /// How many bytes of data each of them may have under way when it takes one more request.
    data_limit: AtomicU64,
    /// Hears of requests that fail.
    observer: Observer,
}

/// A request that has failed.
#[derive(Clone, Copy, Debug)]
pub struct Failure<'a> {
    /// Of what kind.
    pub of: FailureOf,
    /// Whether the host has no space left.
    pub nospace: bool,
    /// Why.
    pub reason: &'a Error,
}

/// What a failed request wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureOf {
    /// To read.
    Read,
    /// To write, flush, or free space.
    Write,
}

/// Somebody who hears of requests that fail.
#[derive(Default)]
struct Observer(OnceLock<Box<Listener>>);

type Listener = dyn Fn(&Failure<'_>) + Send + Sync;

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// Makes [`Counters`] and [`Totals`] of one list.
macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a worker has done since it was made. Only the worker adds; anybody may read.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
            /// Requests that are in flight, when the worker last submitted or waited.
            pub in_flight: Counter,
            /// How long requests took.
            pub latencies: Latencies,
        }

        /// What all workers of an export together have done.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Totals {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Adds what a worker has done that is gone.
            fn absorb(&self, gone: &Counters) {
                $(self.$name.add(gone.$name.get());)*
                self.latencies.absorb(&gone.latencies);
            }

            fn add_to(&self, totals: &mut Totals) {
                $(totals.$name += self.$name.get();)*
            }
        }
    };
}

counts! {
    /// Requests completed.
    requests,
    /// Of these, reads.
    reads,
    /// Of these, writes.
    writes,
    /// Of these, flushes.
    flushes,
    /// Of these, discards.
    discards,
    /// Bytes read.
    bytes_read,
    /// Bytes written.
    bytes_written,
    /// Bytes discarded.
    bytes_discarded,
    /// Requests that ended with an error.
    errors,
    /// Of these, reads.
    failed_reads,
    /// Of these, writes.
    failed_writes,
    /// Of these, flushes.
    failed_flushes,
    /// Of these, discards.
    failed_discards,
    /// Kicks that woke a worker.
    kicks,
    /// Interrupts sent to the guest.
    interrupts,
    /// Times a worker entered the kernel to submit or wait.
    enters,
}

/// The counts that people look for, in the order that they read them.
impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { requests, reads, writes, flushes, .. } = self;
        write!(f, "requests={requests} reads={reads} writes={writes} flushes={flushes} ")?;
        let Totals { bytes_read, bytes_written, errors, .. } = self;
        write!(f, "bytes_read={bytes_read} bytes_written={bytes_written} errors={errors} ")?;
        let Totals { kicks, interrupts, enters, .. } = self;
        write!(f, "kicks={kicks} interrupts={interrupts} enters={enters}")
    }
}

/// A count that one thread adds to: a plain addition, no locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the count. Only its one writer may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Replaces the count. Only its one writer may call this.
    #[inline]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The count as of now, on any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Export {
    /// An export of a node whose size is a multiple of the block size and not zero, and whose
    /// requests need no larger alignment than a block's. (Who opens the image has checked that,
    /// with messages that name the image.)
    pub fn new(name: impl Into<String>, root: Root, options: ExportOptions) -> Export {
        let node = root.node();
        let config = ConfigSpace::new(&config_params(&node, &options));
        let read_only = options.read_only || node.limits().read_only;
        if !read_only {
            root.await_guest();
        }
        Export {
            name: name.into(),
            read_only,
            root,
            options,
            config: Mutex::new(config),
            guest_write_through: AtomicBool::new(false),
            workers: Mutex::default(),
            running: Mutex::new(0),
            data_limit: AtomicU64::new(MOST_DATA),
            observer: Observer::default(),
        }
    }

    /// The node that is served now.
    pub fn node(&self) -> Node {
        self.root.node()
    }

    /// One more worker runs.
    pub(super) fn worker_starts(&self) {
        self.share_data(|running| running + 1);
    }

    /// A worker has ended.
    pub(super) fn worker_ends(&self) {
        self.share_data(|running| running - 1);
    }

    fn share_data(&self, change: impl FnOnce(u64) -> u64) {
        let mut running = self.running.lock().unwrap();
        *running = change(*running);
        let limit = (DATA_IN_FLIGHT / (*running).max(1)).clamp(LEAST_DATA, MOST_DATA);
        self.data_limit.store(limit, Ordering::Relaxed);
    }

    /// With so many bytes of data under way a worker takes no more requests.
    #[inline]
    pub(super) fn data_limit(&self) -> u64 {
        self.data_limit.load(Ordering::Relaxed)
    }

    /// Has `observer` hear of requests that fail, on the worker's thread; it must not wait. Only
    /// the first one counts.
    pub fn on_failure(&self, observer: impl Fn(&Failure<'_>) + Send + Sync + 'static) {
        let _ = self.observer.0.set(Box::new(observer));
    }

    /// A request has failed.
    pub(super) fn note_failure(&self, of: FailureOf, reason: &Error) {
        if let Some(observer) = self.observer.0.get() {
            observer(&Failure { of, nospace: reason.kind() == ErrorKind::NoSpace, reason });
        }
    }

    /// Counters for a new worker.
    pub(super) fn new_counters(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        let mut workers = self.workers.lock().unwrap();
        // A guest may come and go for years: what workers did that are gone is added up.
        let (mut alive, gone): (Vec<_>, Vec<_>) =
            workers.drain(..).partition(|worker| Arc::strong_count(worker) > 1);
        let past = Counters::default();
        gone.iter().for_each(|worker| past.absorb(worker));
        alive.extend([Arc::new(past), Arc::clone(&counters)]);
        *workers = alive;
        counters
    }

    /// What all workers together have done since the export was made.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for worker in self.workers.lock().unwrap().iter() {
            worker.add_to(&mut totals);
        }
        totals
    }

    /// How many requests are in flight now.
    pub fn in_flight(&self) -> u64 {
        self.workers.lock().unwrap().iter().map(|worker| worker.in_flight.get()).sum()
    }

    /// How long reads, writes and flushes took since the export was made, as far as they were
    /// timed.
    pub fn times(&self) -> [Times; 3] {
        let mut times: [Times; 3] = Default::default();
        for worker in self.workers.lock().unwrap().iter() {
            let Latencies { reads, writes, flushes } = &worker.latencies;
            for (histogram, times) in [reads, writes, flushes].into_iter().zip(&mut times) {
                histogram.add_to(times);
            }
        }
        times
    }

    /// The device configuration as of now.
    pub fn config(&self) -> ConfigSpace {
        self.config.lock().unwrap().clone()
    }

    /// Sets the byte that tells whether the disk has a volatile cache.
    pub fn set_writeback(&self, on: bool) {
        self.config.lock().unwrap().set_writeback(on);
    }

    /// Looks at the size of the disk again and takes over a change, as far as it has whole blocks.
    /// Returns whether the guest sees one. Blocks until the workers have drained; not for the
    /// message thread or a worker.
    pub fn refresh_capacity(&self) -> Result<bool> {
        let quiesced = self.root.quiesce();
        self.node().refresh(&quiesced)?;
        Ok(self.update_capacity())
    }

    /// Takes the size that the node has now over into the config space, as far as it has whole
    /// blocks. Returns whether the guest sees a change.
    pub fn update_capacity(&self) -> bool {
        let size = self.node().size();
        let mut config = self.config.lock().unwrap();
        let before = config.read(0, 8).ok();
        config.set_capacity(size - size % u64::from(self.options.block_size));
        before != config.read(0, 8).ok()
    }

    /// Sets whether the guest wants each completed write to be durable.
    pub fn set_guest_write_through(&self, on: bool) {
        self.guest_write_through.store(on, Ordering::Release);
    }

    /// Whether the guest wants each completed write to be durable.
    pub fn guest_write_through(&self) -> bool {
        self.guest_write_through.load(Ordering::Acquire)
    }

    /// Whether each completed write must be durable.
    pub fn writes_through(&self) -> bool {
        match self.options.cache {
            CachePolicy::WriteBack => self.guest_write_through.load(Ordering::Acquire),
            CachePolicy::WriteThrough => true,
            CachePolicy::Unsafe => false,
        }
    }

    /// Whether the guest may not write.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The name for log lines.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What the guest is told of the disk.
fn config_params(node: &Node, options: &ExportOptions) -> ConfigParams {
    let limits = node.limits();
    let block = u64::from(options.block_size);
    // Hosts work in pages or more; a disk that says so gets aligned requests.
    let physical = limits.optimal_io.clamp(block, 4096).max(block);
    ConfigParams {
        capacity: limits.size,
        block_size: options.block_size,
        physical_block_size: if physical.is_power_of_two() { physical as u32 } else { 4096 },
        min_io: 0,
        opt_io: 0,
        seg_max: u32::from(options.queue_size.min(128)) - 2,
        num_queues: options.num_queues as u16,
        discard_granularity: limits.discard_granularity,
        may_unmap: limits.discard_granularity > 0,
        writeback: options.cache != CachePolicy::WriteThrough,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::latency::Timed;
    use std::time::Duration;

    fn options() -> ExportOptions {
        ExportOptions {
            serial: String::new(),
            block_size: 512,
            num_queues: 1,
            queue_size: 128,
            read_only: false,
            threads: 1,
            cache: CachePolicy::WriteBack,
            engine: EngineKind::Auto,
            poll_us: 0,
        }
    }

    fn disk() -> Node {
        let file = Arc::new(crate::io::sim::SimFile::new("disk"));
        let driver = crate::formats::raw::Raw::open(file, false).unwrap();
        Node::new(Arc::new(driver), Default::default())
    }

    /// A snapshot puts an overlay in the node's place and freezes the node; a front-end that connects at
    /// that moment may still look at the latter.
    #[test]
    fn a_guest_that_may_write_is_told_so_whatever_becomes_of_the_node() {
        let root = Root::new("e", disk());
        let export = Export::new("e", root.clone(), options());
        let quiesced = root.quiesce();
        root.node().set_read_only(true, &quiesced);
        assert!(!export.is_read_only());
        drop(quiesced);
        assert!(Export::new("e", root, options()).is_read_only());
    }

    #[test]
    fn workers_that_are_gone_stay_in_the_sums_and_cost_nothing() {
        let export = Export::new("e", Root::new("e", disk()), options());
        for round in 1..=100 {
            let counters = export.new_counters();
            counters.requests.add(2);
            counters.in_flight.set(1);
            counters.latencies.add(Timed::Read, Duration::from_micros(7));
            assert_eq!(export.totals().requests, 2 * round);
            assert_eq!(export.times()[0].count(), round);
            assert!(export.workers.lock().unwrap().len() <= 3);
        }
    }
}
