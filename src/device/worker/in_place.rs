//! Writes of a copy that the driver keeps; see [`InPlace`](crate::block::InPlace).
//!
//! They are settled after the tasks have run: a FLUSH that was taken with them is a task, and
//! takes its place before those that were in flight when the guest submitted it. Nor may a write
//! that is taken after a FLUSH come before it, so nothing is written in place while a task waits to
//! be polled for the first time.

#![allow(unsafe_code)]

use std::rc::Rc;

use crate::block::driver::PlanOp;
use crate::block::{Attempt, Settled};
use crate::device::request::Status;
use crate::device::worker::Worker;
use crate::error::Error;
use crate::io::Scattered;
use crate::units::ByteRange;

impl Worker {
    /// Performs or starts a write of a copy, if the driver can do that. False if nothing was done.
    #[inline]
    pub(super) fn write_in_place(
        &mut self,
        at: usize,
        index: u32,
        op: PlanOp,
        range: ByteRange,
    ) -> bool {
        if op != (PlanOp::Write { fua: false }) || self.has_unpolled {
            return false;
        }
        let queue = self.rings[at].index as u16;
        loop {
            let Worker { in_place: Some(in_place), slots, .. } = self else { return false };
            let slot = &mut slots[index as usize];
            // SAFETY: the request was parsed in memory that its ring keeps mapped.
            let data = unsafe { Scattered::new(&slot.request.data) };
            match in_place.write(range, data, queue) {
                Attempt::NotNow => return false,
                Attempt::SettleFirst => self.settle(),
                Attempt::Pending => {
                    self.unsettled.push(index);
                    return true;
                }
                Attempt::Submit(submission) => {
                    slot.stage(&submission);
                    self.push_part(index, 0);
                    return true;
                }
                Attempt::Failed(err) => {
                    self.request_ended(index, Err(err));
                    return true;
                }
            }
        }
    }

    /// The driver's copy of a request's data is on the image, or could not be written there.
    #[inline]
    pub(super) fn copy_written(&mut self, index: u32, token: u32, has_succeeded: bool) {
        let in_place = self.in_place.as_mut().expect("replaced only when the worker is drained");
        in_place.written(token, has_succeeded);
        if has_succeeded {
            self.unsettled.push(index);
        }
    }

    /// Completes what was written.
    #[inline]
    pub(super) fn settle(&mut self) {
        let Some(in_place) = self.in_place.as_mut().filter(|_| !self.unsettled.is_empty()) else {
            return;
        };
        let settled = in_place.settle();
        let mut unsettled = std::mem::take(&mut self.unsettled);
        match settled {
            Settled::Done(Ok(())) => {
                for index in unsettled.drain(..) {
                    self.finish(index, Status::Ok);
                }
            }
            Settled::Done(Err(err)) => {
                for index in unsettled.drain(..) {
                    self.request_ended(index, Err(Error::new(err.kind(), err.to_string())));
                }
            }
            Settled::Later(result) => {
                let (ended, unsettled) = (Rc::clone(&self.ended), std::mem::take(&mut unsettled));
                self.reactor.executor().spawn(async move {
                    let result = result.await.map_err(|err| (err.kind(), err.to_string()));
                    let again = || result.clone().map_err(|(kind, text)| Error::new(kind, text));
                    ended.borrow_mut().extend(unsettled.into_iter().map(|index| (index, again())));
                });
            }
        }
        self.unsettled = unsettled;
    }
}
