//! `fault`: a disk that misbehaves on demand, for tests of guests, of programs above, and of vublk.
//!
//! ```text
//! guest ──► fault ──► [blklogwrites ──►] image
//!             │
//!             ├─ rules      which requests fail or wait; flushes that lie; seeded
//!             └─ volatile   a write cache that a kill empties
//! ```
//!
//! * **Errors** fail requests by kind and range, before they reach the disk.
//! * **Delays** make requests wait before they begin; nobody else waits, because a request that is
//!   touched is a task of its own.
//! * **A lying flush** is answered without having been done. It stands *above* a write log, so the
//!   log does not hear of the flush either, and the states of the log have what the guest believes
//!   to be durable among what a power cut may take. (Below a log nobody would see the lie: the
//!   log would promise what the disk does not keep.)
//! * **A volatile cache** keeps writes in memory until a flush that does not lie. After `kill -9`
//!   the image is what a power cut had left: writes that were not flushed are lost, whole or in
//!   part, as seeded dice fall. Closing in order loses nothing.
//!
//! What no rule touches is planned, as if the filter were not there.
//!
//! Invariants:
//! * A request that fails here has changed nothing below.
//! * Without a volatile cache, what is completed is on the disk below.

pub mod rules;
mod volatile;

use std::sync::{Arc, RwLock};

use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned, StatusKind};
use crate::block::{Keep, Node, Quiesced};
use crate::error::{Error, Result};
use crate::io::{Buffers, Fut, clock};
use crate::units::{ByteRange, SECTOR_SIZE};

pub use rules::{DelayRule, ErrorRule, FaultOp, Injected, Scope, Settings, VolatileSettings};

use rules::{Reached, Rules};
use volatile::Volatile;

/// Name of the driver.
pub const NAME: &str = "fault";

/// The filter; see the [module](self).
#[derive(Debug)]
pub struct Fault {
    state: Arc<State>,
    /// As in the state: plans take no lock.
    below: Node,
    /// Its driver, which plans borrow from.
    driver: Arc<dyn Driver>,
    /// The node's when `driver` was loaded.
    generation: u64,
}

/// The filter itself, whatever it stands on.
#[derive(Debug)]
struct State {
    /// Its own name, for messages.
    name: String,
    /// Changed only while nothing is in flight; whoever made the filter holds the first of its drivers.
    below: RwLock<Node>,
    rules: Rules,
    /// Changed only while nothing is in flight; the lock is for the few who look meanwhile.
    volatile: RwLock<Option<Arc<Volatile>>>,
}

impl Fault {
    /// A filter called `name` before a node.
    pub fn new(name: impl Into<String>, below: Node, settings: Settings) -> Fault {
        let state = State {
            name: name.into(),
            below: RwLock::new(below),
            rules: Rules::default(),
            volatile: RwLock::default(),
        };
        let fault = Fault::on(Arc::new(state));
        fault.put(settings);
        fault
    }

    /// On what the state says.
    fn on(state: Arc<State>) -> Fault {
        let below = state.below.read().unwrap().clone();
        // Before the driver: if that is replaced in between, the generation is already old.
        let generation = below.generation();
        Fault { driver: below.driver(), generation, below, state }
    }

    /// Other faults from now on. Nothing may be in flight. What was kept from the disk is written,
    /// and not flushed.
    ///
    /// # Errors
    /// If that cannot be written; then nothing has changed.
    pub async fn set(&self, settings: Settings) -> Result<()> {
        self.write_back().await?;
        self.put(settings);
        Ok(())
    }

    fn put(&self, settings: Settings) {
        let unit = self.below().limits().request_alignment.max(SECTOR_SIZE);
        let volatile = settings.volatile.map(|_| Arc::new(Volatile::new(unit)));
        *self.state.volatile.write().unwrap() = volatile;
        self.state.rules.set(settings);
    }

    /// The faults that are in force.
    pub fn settings(&self) -> Settings {
        self.state.rules.settings()
    }

    /// What was done so far.
    pub fn injected(&self) -> Injected {
        self.state.rules.injected()
    }

    /// How many bytes a kill would lose now.
    pub fn at_risk(&self) -> u64 {
        self.volatile().map_or(0, |volatile| volatile.len())
    }

    /// The node that it stands on.
    pub fn below(&self) -> Node {
        self.state.below.read().unwrap().clone()
    }

    fn volatile(&self) -> Option<Arc<Volatile>> {
        self.state.volatile.read().unwrap().clone()
    }

    /// Writes what was kept from the disk.
    pub async fn write_back(&self) -> Result<()> {
        match self.volatile() {
            Some(volatile) => volatile.write_back(&self.below()).await,
            None => Ok(()),
        }
    }

    /// Lets a request through, after a while or not at all.
    async fn pass(&self, op: FaultOp, range: ByteRange) -> Result<()> {
        let fate = self.state.rules.decide(op, range);
        if let Some(delay) = fate.delay {
            clock::sleep(delay).await;
        }
        let Some(errno) = fate.errno else { return Ok(()) };
        let what = match op {
            FaultOp::Flush => op.name().to_string(),
            _ => format!("{} of {range}", op.name()),
        };
        Err(Error::from_errno(errno)
            .context(format!("node '{}': injected fault: {what}", self.state.name)))
    }

    async fn do_read(&self, offset: u64, buf: Buffers) -> Result<()> {
        self.pass(FaultOp::Read, ByteRange { offset, len: buf.len() }).await?;
        match self.volatile() {
            Some(volatile) => volatile.read(&self.below(), offset, buf).await,
            None => self.below().read(offset, buf).await,
        }
    }

    async fn do_write(&self, offset: u64, buf: Buffers, fua: bool) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        self.pass(FaultOp::Write, range).await?;
        let fua = fua && !self.state.rules.lies();
        let Some(volatile) = self.volatile() else {
            return self.below().write(offset, buf, fua).await;
        };
        let unit = self.limits().request_alignment;
        let reached = match fua {
            true => Reached::All,
            false => self.state.rules.reaches(range.len / unit),
        };
        let reached = match reached {
            Reached::Nothing => ByteRange { offset, len: 0 },
            Reached::All => range,
            Reached::First(units) => ByteRange { offset, len: units * unit },
            Reached::Last(units) => ByteRange::between(range.end() - units * unit, range.end()),
        };
        volatile.write(&self.below(), offset, &buf, reached, fua).await?;
        let most = self.state.rules.settings().volatile.map_or(0, |settings| settings.size);
        if volatile.len() > most {
            volatile.write_back(&self.below()).await?;
        }
        Ok(())
    }

    async fn do_flush(&self) -> Result<()> {
        self.pass(FaultOp::Flush, ByteRange::default()).await?;
        if self.state.rules.lies() {
            return Ok(());
        }
        self.write_back().await?;
        self.below().flush().await
    }

    async fn do_zero(&self, range: ByteRange, may_unmap: bool) -> Result<()> {
        self.pass(FaultOp::WriteZeroes, range).await?;
        let below = self.below();
        let zero = below.write_zeroes(range, may_unmap);
        match self.volatile() {
            Some(volatile) => volatile.replace(range, zero).await,
            None => zero.await,
        }
    }

    async fn do_discard(&self, range: ByteRange) -> Result<()> {
        self.pass(FaultOp::Discard, range).await?;
        let below = self.below();
        let discard = below.discard(range);
        match self.volatile() {
            // Where discards are ignored, what was written must stay.
            Some(_) if below.keeps_space() => Ok(()),
            Some(volatile) => volatile.replace(range, discard).await,
            None => discard.await,
        }
    }

    async fn status(&self, range: ByteRange) -> Result<BlockStatus> {
        let Some(volatile) = self.volatile() else { return self.below().block_status(range).await };
        let (run, kept) = volatile.run(range);
        if !kept {
            return self.below().block_status(run).await;
        }
        Ok(BlockStatus {
            range: run,
            kind: StatusKind::Data,
            host: None,
            depth: 0,
            compressed: false,
        })
    }
}

impl Driver for Fault {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> Limits {
        let below = self.below().limits();
        Limits {
            size: self.below().driver().limits().size,
            request_alignment: below.request_alignment.max(SECTOR_SIZE),
            ..below
        }
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let is_touched = match op {
            PlanOp::Read => {
                let is_kept = || self.volatile().is_some_and(|volatile| !volatile.is_clear(range));
                self.state.rules.touches(FaultOp::Read, range) || is_kept()
            }
            PlanOp::Write { fua } => {
                // A write that is to be durable may lie as a flush may.
                self.state.rules.touches(FaultOp::Write, range)
                    || (fua && self.state.rules.touches(FaultOp::Flush, ByteRange::default()))
                    || self.below.is_poisoned()
            }
            PlanOp::Flush => {
                self.state.rules.touches(FaultOp::Flush, range)
                    || self.below.is_poisoned()
                    || self.below.owes_flush()
            }
        };
        if is_touched || self.is_behind() {
            return Planned::NotNow;
        }
        self.driver.plan(op, range, plan)
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.do_read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(self.do_write(offset, buf, fua))
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(self.do_zero(range, may_unmap))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(self.do_discard(range))
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(self.do_flush())
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(self.status(range))
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        Box::pin(async move {
            self.write_back().await?;
            self.below().driver().resize(size).await
        })
    }

    fn refresh(&self, quiesced: &Quiesced) -> Result<()> {
        self.below().refresh(quiesced).map(drop)
    }

    fn children(&self) -> Vec<(&'static str, Node)> {
        vec![("file", self.below())]
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn is_behind(&self) -> bool {
        self.below.generation() != self.generation
    }

    fn on_backing(&self, backing: Option<Node>, _quiesced: &Quiesced) -> Result<Arc<dyn Driver>> {
        let Some(below) = backing else {
            return Err(Error::unsupported("a filter cannot stand on nothing"));
        };
        *self.state.below.write().unwrap() = below;
        Ok(Arc::new(Fault::on(Arc::clone(&self.state))))
    }

    fn details(&self) -> serde_json::Value {
        let done = self.injected();
        serde_json::json!({
            "errors": done.errors,
            "delays": done.delays,
            "flush-lies": done.lies,
            "tears": done.tears,
            "bytes-at-risk": self.at_risk(),
        })
    }

    fn identity(&self, once_changed: bool) -> Option<u128> {
        self.below().driver().identity(once_changed)
    }

    fn follow_backing<'a>(&'a self, identity: u128) -> Fut<'a, ()> {
        Box::pin(async move { self.below().driver().follow_backing(identity).await })
    }

    fn freeze<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move { self.below().driver().freeze().await })
    }

    /// The snapshot is of what the guest has written, wherever it is.
    fn prepare_for_overlay<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            self.write_back().await?;
            self.below().driver().prepare_for_overlay().await
        })
    }

    fn resume<'a>(&'a self, nonce: Option<u128>) -> Fut<'a, ()> {
        Box::pin(async move { self.below().driver().resume(nonce).await })
    }

    fn begin_session(&self, nonce: u128) -> Result<()> {
        self.below().driver().begin_session(nonce)
    }

    fn keep(&self) -> Option<&Keep> {
        // The driver's of before, if it was replaced: whoever asks loads drivers anew then.
        self.driver.keep()
    }

    /// The node below is closed by whoever has opened it.
    fn close<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(self.write_back())
    }
}

#[cfg(test)]
mod tests;
