//! How a job copies: piece by piece, each in a turn of its own, within the speed limit, and with what
//! the operator wants to happen when one fails.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use super::layer_copy::{Copier, Step};
use super::{Action, Context, OnError};
use crate::bitmap::DirtyMap;
use crate::error::{Error, Result};
use crate::io::clock;
use crate::units::ByteRange;

/// How much of a dirty disk is taken at a time, in bytes.
const RUN: u64 = 16 << 20;
/// How long a job rests before it does again what has failed.
pub const REST: Duration = Duration::from_millis(100);

/// See the [module](self).
#[derive(Debug)]
pub struct Pace<'a> {
    context: &'a Context,
    on_error: OnError,
    /// Bytes copied that the speed limit has not been asked about.
    unpaid: Cell<u64>,
    /// What was left out because of an error that was ignored, with the first such error.
    left_out: RefCell<Option<(Error, Vec<ByteRange>)>>,
}

impl<'a> Pace<'a> {
    /// Of a job with this policy.
    pub fn new(context: &'a Context, on_error: OnError) -> Pace<'a> {
        Pace { context, on_error, unpaid: Cell::new(0), left_out: RefCell::default() }
    }

    /// Does one step, and has it counted while it still has its turn: a job that is paused stands
    /// still for whoever looks. What was ignored counts as done.
    async fn step(
        &self,
        copier: &dyn Copier,
        range: ByteRange,
        count: impl Fn(u64),
    ) -> Result<u64> {
        loop {
            if self.unpaid.get() > 0 {
                self.context.throttle(self.unpaid.take()).await;
            }
            let turn = self.context.turn().await;
            let result = copier.step(range).await;
            let failed = match result {
                Ok(Step { done, copied }) => {
                    self.unpaid.set(copied);
                    let done = done.min(range.len);
                    count(done);
                    return Ok(done);
                }
                Err(failed) => failed,
            };
            drop(turn);
            match self.context.on_error(self.on_error, failed.operation, &failed.error) {
                Action::Report => return Err(failed.error),
                Action::Ignore => {
                    let len = failed.skip.clamp(1, range.len);
                    let mut left_out = self.left_out.borrow_mut();
                    let (_, ranges) = left_out.get_or_insert((failed.error, Vec::new()));
                    ranges.push(ByteRange { offset: range.offset, len });
                    count(len);
                    return Ok(len);
                }
                Action::Stop => {}
            }
        }
    }

    /// Copies a range from end to end, and counts it as progress.
    pub async fn copy(&self, copier: &dyn Copier, range: ByteRange) -> Result<()> {
        let mut at = range;
        while !at.is_empty() {
            let done = self.step(copier, at, |done| self.context.advance(done)).await?;
            at = ByteRange::between(at.offset + done, at.end());
        }
        Ok(())
    }

    /// Copies what was left out because of errors, after a rest and as often as that takes: for jobs
    /// that are of no use without it.
    pub async fn copy_left_out(&self, copier: &dyn Copier) -> Result<()> {
        loop {
            let Some((_, ranges)) = self.left_out.borrow_mut().take() else { return Ok(()) };
            clock::sleep(REST).await;
            for range in ranges {
                let mut at = range;
                while !at.is_empty() {
                    let done = self.step(copier, at, |_| ()).await?;
                    at = ByteRange::between(at.offset + done, at.end());
                }
            }
        }
    }

    /// Copies what is marked until nothing is. The total grows by what is marked meanwhile. What is
    /// left out because of an error is marked again at the end; then the answer is no.
    pub async fn copy_dirty(
        &self,
        copier: &dyn Copier,
        map: &DirtyMap,
        done: &mut u64,
    ) -> Result<bool> {
        let mut from = 0;
        while let Some(mut taken) = map.take(from, RUN) {
            while !taken.range().is_empty() {
                let left = map.bytes() + taken.range().len;
                self.context.set_total(*done + left);
                let before = *done;
                let count = |step| self.context.set_current(before + step);
                let step = self.step(copier, taken.range(), count).await?;
                taken.advance(step);
                *done += step;
            }
            from = taken.range().end();
        }
        let left_out = self.left_out.borrow_mut().take();
        if let Some((_, ranges)) = &left_out {
            for range in ranges {
                map.mark(*range);
                *done = done.saturating_sub(range.len);
            }
            self.context.set_current(*done);
        }
        self.context.set_total(*done + map.bytes());
        Ok(left_out.is_none())
    }

    /// Fails if an error was ignored: what was left out must not be relied on.
    pub fn finish(self) -> Result<()> {
        match self.left_out.into_inner() {
            Some((err, _)) => Err(err.context("not all could be copied")),
            None => Ok(()),
        }
    }
}
