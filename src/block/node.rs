//! The handle that everybody holds on a disk or a layer of one.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanExtent, PlanOp, Planned};
use crate::block::gate::Quiesced;
use crate::error::{Error, ErrorKind, Result};
pub use crate::io::lock::Rights;
use crate::io::{Buffers, File, carrying};
use crate::units::ByteRange;

/// How to make a node.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// Its name; unique in a daemon.
    pub name: String,
    /// Refuse writes even if the driver would take them.
    pub read_only: bool,
    /// Ignore discards, and free no space where zeros are written.
    pub keeps_space: bool,
}

/// A place in the graph: a driver with a name, limits, rights and counters.
///
/// Cheap to clone; clones are the same node. All operations check range, alignment and rights, so
/// that drivers see only legal requests. Usable from any thread with a reactor.
#[derive(Clone)]
pub struct Node {
    inner: Arc<NodeInner>,
}

struct NodeInner {
    name: String,
    read_only: AtomicBool,
    keeps_space: bool,
    /// Replaced only while nobody uses it.
    driver: RwLock<Arc<dyn Driver>>,
    /// Counts the drivers that were here before.
    generation: AtomicU64,
    /// The driver's limits, as of the last change.
    limits: RwLock<Limits>,
    /// Who uses the node, and what each lets others do.
    holds: Mutex<Vec<HoldEntry>>,
    next_hold: AtomicU64,
    /// Set when a metadata write or flush failed: writes are refused from then on.
    poisoned: AtomicBool,
    /// The node below that a flush of this one has to flush first, if `owes_flush`.
    owed: Mutex<Option<Node>>,
    owes_flush: AtomicBool,
    counters: Counters,
}

#[derive(Clone)]
struct HoldEntry {
    id: u64,
    holder: String,
    held: Rights,
    shared: Rights,
}

/// Requests that went through the asynchronous path of a node, since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads.
    pub reads: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
    /// Bytes read.
    pub bytes_read: AtomicU64,
    /// Bytes written.
    pub bytes_written: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Requests that failed.
    pub errors: AtomicU64,
}

/// A claim on a node; dropping it gives the rights back.
pub struct Hold {
    node: Node,
    id: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.node.inner.holds.lock().unwrap().retain(|h| h.id != self.id);
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hold({})", self.node.name())
    }
}

impl Node {
    /// Makes a node of a driver.
    pub fn new(driver: Arc<dyn Driver>, options: NodeOptions) -> Node {
        let limits = driver.limits();
        Node {
            inner: Arc::new(NodeInner {
                name: options.name,
                read_only: AtomicBool::new(options.read_only),
                keeps_space: options.keeps_space,
                driver: RwLock::new(driver),
                generation: AtomicU64::new(0),
                limits: RwLock::new(limits),
                holds: Mutex::default(),
                next_hold: AtomicU64::new(0),
                poisoned: AtomicBool::new(false),
                owed: Mutex::default(),
                owes_flush: AtomicBool::new(false),
                counters: Counters::default(),
            }),
        }
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The driver as of now. Who caches it loads it again after the gate of its
    /// [`Root`](crate::block::Root) has been closed.
    pub fn driver(&self) -> Arc<dyn Driver> {
        Arc::clone(&self.inner.driver.read().unwrap())
    }

    /// Limits, with the node's own read-only flag applied.
    pub fn limits(&self) -> Limits {
        let mut limits = *self.inner.limits.read().unwrap();
        limits.read_only |= self.inner.read_only.load(Ordering::Relaxed);
        limits
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.inner.limits.read().unwrap().size
    }

    /// Counts of the asynchronous path.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// Whether both handles are the same node.
    pub fn is_same(&self, other: &Node) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// What tells nodes apart, for as long as they live: equal for handles that
    /// [are the same](Node::is_same), and cheap to look up.
    pub fn key(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
    }

    /// Puts another driver in place. The guard proves that nobody uses the old one.
    pub fn replace_driver(&self, driver: Arc<dyn Driver>, _quiesced: &Quiesced) -> Arc<dyn Driver> {
        let limits = driver.limits();
        let old = std::mem::replace(&mut *self.inner.driver.write().unwrap(), driver);
        *self.inner.limits.write().unwrap() = limits;
        self.inner.generation.fetch_add(1, Ordering::SeqCst);
        old
    }

    /// Changes whenever another driver was put in place, or the size was found to be another: who
    /// caches the driver compares.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.inner.generation.load(Ordering::Acquire)
    }

    /// Refuses writes from now on even if the driver would take them, or no longer.
    pub fn set_read_only(&self, on: bool, _quiesced: &Quiesced) {
        self.inner.read_only.store(on, Ordering::Relaxed);
    }

    /// Puts another node (or none) below the driver, as its backing. The content must be the same
    /// where the driver leaves it to its backing; who asks sees to that. What the image's own
    /// header says of its backing stays as it is.
    ///
    /// # Errors
    /// If the driver cannot change its backing; then nothing has changed.
    pub fn set_backing(&self, backing: Option<Node>, quiesced: &Quiesced) -> Result<()> {
        let other = self.driver().on_backing(backing, quiesced)?;
        self.replace_driver(other, quiesced);
        Ok(())
    }

    /// Whether discards are ignored.
    pub fn keeps_space(&self) -> bool {
        self.inner.keeps_space
    }

    /// Takes rights for `holder`, who lets others hold `shared` meanwhile.
    ///
    /// # Errors
    /// Kind [`Busy`](ErrorKind::Busy), naming who is in the way.
    pub fn hold(&self, holder: impl Into<String>, held: Rights, shared: Rights) -> Result<Hold> {
        let holder = holder.into();
        let mut holds = self.inner.holds.lock().unwrap();
        for other in holds.iter() {
            let conflict = held.without(other.shared).and(other.held.without(shared));
            if !conflict.is_empty() {
                // In QEMU's words.
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!(
                        "Node '{}' is busy: block device is in use by {}",
                        self.name(),
                        other.holder
                    ),
                ));
            }
        }
        let id = self.inner.next_hold.fetch_add(1, Ordering::Relaxed);
        holds.push(HoldEntry { id, holder, held, shared });
        Ok(Hold { node: self.clone(), id })
    }

    /// Who holds the node.
    pub fn holders(&self) -> Vec<String> {
        self.inner.holds.lock().unwrap().iter().map(|h| h.holder.clone()).collect()
    }

    /// Reads `buf.len()` bytes at `offset`.
    pub async fn read(&self, offset: u64, buf: Buffers) -> Result<()> {
        self.check(offset, buf.len(), false)?;
        if buf.is_empty() {
            return Ok(());
        }
        self.inner.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.counters.bytes_read.fetch_add(buf.len(), Ordering::Relaxed);
        self.counted(self.driver().read(offset, buf).await)
    }

    /// As [`Node::read`], along the driver's plan if it has one: through a long chain at once, instead
    /// of layer by layer.
    pub async fn read_planned(&self, offset: u64, buf: Buffers) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        self.check(offset, buf.len(), false)?;
        let driver = self.driver();
        let mut plan = Plan::default();
        if buf.is_empty() || driver.plan(PlanOp::Read, range, &mut plan) == Planned::NotNow {
            return self.read(offset, buf).await;
        }
        self.inner.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.counters.bytes_read.fetch_add(buf.len(), Ordering::Relaxed);
        let read = async {
            let mut done = 0;
            for extent in &plan.extents {
                let (PlanExtent::File { len, .. } | PlanExtent::Zero { len }) = *extent;
                let part = buf.slice(done, len);
                match extent {
                    PlanExtent::File { file, offset, .. } => file.read(*offset, part).await?,
                    PlanExtent::Zero { .. } => part.fill_zero(),
                }
                done += len;
            }
            Ok(())
        };
        self.counted(match &plan.pin {
            Some(pin) => carrying(Arc::clone(&pin.0), read).await,
            None => read.await,
        })
    }

    /// Writes `buf.len()` bytes at `offset`; with `fua` durable on completion.
    pub async fn write(&self, offset: u64, buf: Buffers, fua: bool) -> Result<()> {
        self.check(offset, buf.len(), true)?;
        if buf.is_empty() {
            return Ok(());
        }
        self.inner.counters.writes.fetch_add(1, Ordering::Relaxed);
        self.inner.counters.bytes_written.fetch_add(buf.len(), Ordering::Relaxed);
        self.counted(self.driver().write(offset, buf, fua).await)
    }

    /// Makes the range read as zeros.
    pub async fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<()> {
        self.check(range.offset, range.len, true)?;
        if range.is_empty() {
            return Ok(());
        }
        let may_unmap = may_unmap && !self.inner.keeps_space;
        self.counted(self.driver().write_zeroes(range, may_unmap).await)
    }

    /// Frees the range's space as far as that is cheap.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        self.check(range.offset, range.len, true)?;
        if range.is_empty() || self.inner.keeps_space {
            return Ok(());
        }
        self.counted(self.driver().discard(range).await)
    }

    /// Makes all completed writes durable. A failure poisons the node: what was lost is unknown,
    /// and a later success would be a lie. Unless the driver is certain that nothing was
    /// ([`Error::has_lost_nothing`]).
    pub async fn flush(&self) -> Result<()> {
        if self.inner.poisoned.load(Ordering::Acquire) {
            return Err(self.poisoned());
        }
        self.inner.counters.flushes.fetch_add(1, Ordering::Relaxed);
        let result = match self.pay_flush().await {
            Ok(()) => self.driver().flush().await,
            Err(err) => Err(err),
        };
        if let Err(err) = &result
            && !err.has_lost_nothing()
        {
            self.poison(err);
        }
        self.counted(result)
    }

    /// From now on a flush of this node flushes `below` first, until one has: requests that completed
    /// there before a snapshot must survive a power cut after a flush of the overlay. So a snapshot
    /// need not keep guests waiting for the disk.
    pub fn owe_flush_of(&self, below: Node) {
        *self.inner.owed.lock().unwrap() = Some(below);
        self.inner.owes_flush.store(true, Ordering::Release);
    }

    /// Takes [`Node::owe_flush_of`] back: nobody came to stand here after all.
    pub fn owe_nothing(&self) {
        *self.inner.owed.lock().unwrap() = None;
        self.inner.owes_flush.store(false, Ordering::Release);
    }

    /// Whether a flush has to go through [`Node::flush`], not straight to the driver.
    #[inline]
    pub fn owes_flush(&self) -> bool {
        self.inner.owes_flush.load(Ordering::Acquire)
    }

    /// Flushes what [`Node::owe_flush_of`] was told of.
    pub async fn pay_flush(&self) -> Result<()> {
        if !self.owes_flush() {
            return Ok(());
        }
        let Some(below) = self.inner.owed.lock().unwrap().clone() else { return Ok(()) };
        // It may owe one itself.
        Box::pin(below.flush()).await?;
        below.driver().freeze().await?;
        let mut owed = self.inner.owed.lock().unwrap();
        if owed.as_ref().is_some_and(|owed| owed.is_same(&below)) {
            *owed = None;
            self.inner.owes_flush.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// What is known of the range without reading it; see [`Driver::block_status`].
    pub async fn block_status(&self, range: ByteRange) -> Result<BlockStatus> {
        self.check_range(range.offset, range.len)?;
        self.driver().block_status(range).await
    }

    /// Like [`Node::block_status`], following backing files down the chain.
    pub async fn block_status_deep(&self, range: ByteRange) -> Result<BlockStatus> {
        let mut node = self.clone();
        let mut range = range;
        let mut depth = 0;
        loop {
            let mut status = node.block_status(range).await?;
            status.depth = depth;
            let backing = node.backing();
            let Some(backing) =
                backing.filter(|_| status.kind == crate::block::driver::StatusKind::Unallocated)
            else {
                return Ok(status);
            };
            let inside = status.range.intersect(&ByteRange { offset: 0, len: backing.size() });
            if inside.is_empty() {
                return Ok(status);
            }
            range = inside;
            node = backing;
            depth += 1;
        }
    }

    /// The backing node of the driver, if it has one; of a filter, the node that it filters.
    pub fn backing(&self) -> Option<Node> {
        let driver = self.driver();
        let wanted = if driver.is_filter() { "file" } else { "backing" };
        driver.children().into_iter().find(|(role, _)| *role == wanted).map(|(_, n)| n)
    }

    /// The filters from this node down, and the node below them; no filters where it is none.
    pub fn skip_filters(&self) -> (Vec<Node>, Node) {
        let mut filters = Vec::new();
        let mut node = self.clone();
        while let Some(below) = node.driver().is_filter().then(|| node.backing()).flatten() {
            filters.push(std::mem::replace(&mut node, below));
        }
        (filters, node)
    }

    /// Checks that the node shows all that its guest relies on. It does not after a kill, until what
    /// was kept for that guest has been redone: nothing may be made of the node before.
    ///
    /// # Errors
    /// Kind [`Busy`](crate::error::ErrorKind::Busy), with what to wait for.
    pub fn check_guest_is_back(&self) -> Result<()> {
        let driver = self.driver();
        let Some(keep) = driver.keep().filter(|keep| keep.awaited().is_some()) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Busy,
            format!(
                "node '{}': the guest of an earlier process has not come back yet, and what it \
                 completed last is in {} and nowhere else. Wait until it has connected; if it never \
                 will, connect a new guest, which drops that",
                self.name(),
                keep.path().display()
            ),
        ))
    }

    /// Changes the size, with the gate closed.
    pub async fn resize(&self, size: u64, _quiesced: &Quiesced) -> Result<()> {
        if self.limits().read_only {
            return Err(self.read_only());
        }
        let driver = self.driver();
        driver.resize(size).await?;
        *self.inner.limits.write().unwrap() = driver.limits();
        Ok(())
    }

    /// Looks at the driver's size again, with the gate closed.
    pub fn refresh(&self, quiesced: &Quiesced) -> Result<Limits> {
        let driver = self.driver();
        driver.refresh(quiesced)?;
        let limits = driver.limits();
        let before = std::mem::replace(&mut *self.inner.limits.write().unwrap(), limits);
        if before.size != limits.size {
            // Who plans by way of this node knows where it ended.
            self.inner.generation.fetch_add(1, Ordering::SeqCst);
        }
        Ok(self.limits())
    }

    /// Flushes and closes the driver for good.
    pub async fn close(&self) -> Result<()> {
        self.driver().close().await
    }

    /// Refuses all further writes and flushes because of `cause`. Reads go on.
    pub fn poison(&self, cause: &Error) {
        if !self.inner.poisoned.swap(true, Ordering::AcqRel) {
            tracing::error!(
                node = self.name(),
                "writes are refused from now on, because a flush failed: {cause}"
            );
        }
    }

    /// Whether writes are refused because of an earlier failure.
    pub fn is_poisoned(&self) -> bool {
        self.inner.poisoned.load(Ordering::Acquire)
    }

    fn counted<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.inner.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn check(&self, offset: u64, len: u64, write: bool) -> Result<()> {
        let range = self.check_range(offset, len)?;
        let align = self.inner.limits.read().unwrap().request_alignment;
        if !range.is_aligned(align) {
            return Err(Error::invalid(format!(
                "request of {range} on node {} is not aligned to {align} bytes",
                self.name()
            )));
        }
        if write {
            if self.limits().read_only {
                return Err(self.read_only());
            }
            if self.is_poisoned() {
                return Err(self.poisoned());
            }
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<ByteRange> {
        let size = self.size();
        ByteRange::new(offset, len).filter(|r| r.end() <= size).ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "request of {len} bytes at {offset} on node {} ends beyond its {size} bytes",
                    self.name()
                ),
            )
        })
    }

    fn read_only(&self) -> Error {
        Error::new(ErrorKind::ReadOnly, format!("node {} is read-only", self.name()))
    }

    fn poisoned(&self) -> Error {
        Error::new(
            ErrorKind::Poisoned,
            format!("node {} refuses writes after a failed flush", self.name()),
        )
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({}, {:?})", self.name(), self.driver())
    }
}
