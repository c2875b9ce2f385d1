//! `crash-state`: one state as a node that can be served, converted and looked at. Read-only; an
//! overlay on it is writable.
//!
//! ```text
//! read ──► view: in the log ──► the log's file, at that place
//!                zeros      ──► zeros
//!                the base   ──► the base's driver
//! ```
//!
//! Reads are planned. The state can be exchanged for another while nothing is in flight
//! ([`Driver::show_state`]): the log is read once, however many states are shown.
//!
//! The base must not be written to while this stands on it, and what the log's superblock counts
//! does not change.

use std::sync::{Arc, RwLock};

use crate::block::driver::{
    BlockStatus, Driver, Limits, Plan, PlanExtent, PlanOp, Planned, StatusKind,
};
use crate::block::{Node, Quiesced};
use crate::crash::below;
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::crash::overlay::Source;
use crate::crash::view::View;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Buffers, Fut};
use crate::units::ByteRange;

/// Name of the driver.
pub const NAME: &str = "crash-state";
/// Longer plans are for the asynchronous path.
const MAX_EXTENTS: usize = 64;

/// See the [module](self).
#[derive(Debug)]
pub struct CrashState {
    history: Arc<History>,
    base: Node,
    /// The base's driver, which plans borrow from. The base is read-only, so nothing replaces it;
    /// should somebody do so all the same, `generation` tells.
    driver: Arc<dyn Driver>,
    /// The base's when `driver` was loaded.
    generation: u64,
    /// Exchanged only while nothing is in flight.
    shown: RwLock<Shown>,
}

#[derive(Debug)]
struct Shown {
    name: StateName,
    view: View,
}

impl CrashState {
    /// The state `name` of a log over a base.
    ///
    /// # Errors
    /// If the log has no such state, or if the base is written to.
    pub fn new(history: Arc<History>, base: Node, name: &StateName) -> Result<CrashState> {
        let log = history.log();
        if !base.limits().read_only {
            return Err(Error::invalid(format!(
                "{}: node '{}' is the base of a crash state and must be read-only",
                log.name(),
                base.name()
            )));
        }
        let mut view = View::default();
        view.show(&history, name)?;
        let generation = base.generation();
        Ok(CrashState {
            driver: base.driver(),
            generation,
            base,
            shown: RwLock::new(Shown { name: name.clone(), view }),
            history,
        })
    }

    /// The state that it is.
    pub fn state(&self) -> StateName {
        self.shown.read().unwrap().name.clone()
    }

    /// The log.
    pub fn history(&self) -> &Arc<History> {
        &self.history
    }

    fn find(&self, range: ByteRange) -> (ByteRange, Option<Source>) {
        self.shown.read().unwrap().view.find(range)
    }

    async fn read_runs(&self, offset: u64, buf: &Buffers) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        let mut left = range;
        while !left.is_empty() {
            let (run, source) = self.find(left);
            let part = buf.slice(run.offset - offset, run.len);
            match source {
                None => below::read_base(&self.base, run.offset, part).await?,
                Some(Source::Zero) => part.fill_zero(),
                Some(Source::Log(at)) => below::read_log(self.history.log(), at, part).await?,
            }
            left = ByteRange::between(run.end(), range.end());
        }
        Ok(())
    }

    fn plan_read<'a>(&'a self, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let Some(log) = self.history.log().file().as_host() else { return Planned::NotNow };
        let shown = self.shown.read().unwrap();
        let mut left = range;
        while !left.is_empty() {
            let (run, source) = shown.view.find(left);
            match source {
                Some(Source::Zero) => plan.extents.push(PlanExtent::Zero { len: run.len }),
                Some(Source::Log(offset)) => {
                    let piece = ByteRange { offset, len: run.len };
                    if !below::is_whole_in(self.history.log(), piece) {
                        return Planned::NotNow;
                    }
                    plan.extents.push(PlanExtent::File { file: log, offset, len: run.len });
                }
                None if self.base.generation() != self.generation => return Planned::NotNow,
                None if !below::is_whole(&self.base, run) => return Planned::NotNow,
                None => {
                    if plan.read_through(&*self.driver, run) == Planned::NotNow {
                        return Planned::NotNow;
                    }
                }
            }
            if plan.extents.len() > MAX_EXTENTS {
                return Planned::NotNow;
            }
            left = ByteRange::between(run.end(), range.end());
        }
        Planned::Ready
    }

    /// Whatever would change it.
    fn refuse<'a>(&self) -> Fut<'a, ()> {
        let message = format!("{}: a crash state cannot be written to", self.history.log().name());
        Box::pin(async move { Err(Error::new(ErrorKind::ReadOnly, message)) })
    }
}

impl Driver for CrashState {
    fn name(&self) -> &'static str {
        NAME
    }

    fn limits(&self) -> Limits {
        let base = self.base.limits();
        let log = self.history.log().file().alignment();
        Limits {
            request_alignment: base.request_alignment.max(log.request),
            memory_alignment: base.memory_alignment.max(log.memory),
            read_only: true,
            ..base
        }
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        match op {
            PlanOp::Read => self.plan_read(range, plan),
            PlanOp::Write { .. } => Planned::NotNow,
            // Nothing is ever written.
            PlanOp::Flush => Planned::Ready,
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(async move { self.read_runs(offset, &buf).await })
    }

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        self.refuse()
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        self.refuse()
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        self.refuse()
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        let (range, source) = self.find(range);
        let (kind, host) = match source {
            None => (StatusKind::Unallocated, None),
            Some(Source::Zero) => (StatusKind::Zero, None),
            Some(Source::Log(at)) => {
                (StatusKind::Data, Some((self.history.log().name().to_string(), at)))
            }
        };
        Box::pin(async move { Ok(BlockStatus { range, kind, host, depth: 0, compressed: false }) })
    }

    fn show_state(&self, state: &str, _quiesced: &Quiesced) -> Result<()> {
        let name: StateName = state.parse()?;
        let mut shown = self.shown.write().unwrap();
        shown.view.show(&self.history, &name)?;
        shown.name = name;
        Ok(())
    }

    fn children(&self) -> Vec<(&'static str, Node)> {
        vec![("backing", self.base.clone())]
    }

    fn details(&self) -> serde_json::Value {
        serde_json::json!({
            "state": self.state().to_string(),
            "log-entries": self.history.len(),
            "log-sector-size": self.history.log().sector_size(),
        })
    }
}
