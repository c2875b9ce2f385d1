//! The planned path: requests that change no metadata, answered without waiting.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use imago::ShallowMapping;

use super::{Qcow2, store};
use crate::block::driver::Pin;
use crate::block::format::plan_file;
use crate::block::{Plan, PlanExtent, PlanOp, Planned};
use crate::units::ByteRange;

impl Qcow2 {
    pub(super) fn plan_now<'a>(
        &'a self,
        op: PlanOp,
        range: ByteRange,
        plan: &mut Plan<'a>,
    ) -> Planned {
        /// Longer plans are for the asynchronous path.
        const MAX_EXTENTS: usize = 8;
        let Some(host) = self.disk.file().as_host() else { return Planned::NotNow };
        match op {
            PlanOp::Flush if self.is_dirty() || self.poisoned.load(Ordering::Acquire) => {
                return Planned::NotNow;
            }
            PlanOp::Flush => return plan_file(plan, self.disk.file(), 0, 0),
            PlanOp::Write { fua: true } => return Planned::NotNow,
            PlanOp::Write { fua: false } if self.check_writable().is_err() => {
                return Planned::NotNow;
            }
            _ => {}
        }
        let revocations = self.revocations.load(Ordering::SeqCst);
        let align = self.disk.file().alignment().request;
        let mut at = range;
        while !at.is_empty() {
            let Some(Ok((mapping, run))) = store::from_memory_only(|| now(self.shallow(at))) else {
                return Planned::NotNow;
            };
            match (mapping, op) {
                (ShallowMapping::Raw { offset, .. }, PlanOp::Read) => {
                    let place = ByteRange { offset, len: run.len };
                    if !place.is_aligned(align) || !self.disk.surely_has(place) {
                        return Planned::NotNow;
                    }
                    plan.push(PlanExtent::File { file: host, offset, len: run.len });
                }
                (ShallowMapping::Zero { explicit, .. }, PlanOp::Read)
                    if explicit || self.backing.read().unwrap().is_none() =>
                {
                    plan.push(PlanExtent::Zero { len: run.len });
                }
                (ShallowMapping::Zero { .. }, PlanOp::Read) => {
                    if plan.read_below(run) == Planned::NotNow {
                        return Planned::NotNow;
                    }
                }
                (ShallowMapping::Raw { offset, writable: true, .. }, PlanOp::Write { .. })
                    if run.len == range.len =>
                {
                    let place = ByteRange { offset, len: run.len };
                    let Some(tokens) = self.disk.plan_write(place) else { return Planned::NotNow };
                    if !self.may_write_through(run, revocations) {
                        return Planned::NotNow;
                    }
                    plan.extents.push(PlanExtent::File { file: host, offset, len: run.len });
                    plan.pin = Some(Pin(Arc::new(tokens)));
                }
                _ => return Planned::NotNow,
            }
            if plan.extents.len() > MAX_EXTENTS {
                return Planned::NotNow;
            }
            at = ByteRange::between(run.end(), at.end());
        }
        Planned::Ready
    }
}

/// The answer of a future that need not wait; `None` if it would have to.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(out) => Some(out),
        Poll::Pending => None,
    }
}
