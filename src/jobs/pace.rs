//! How a job copies: piece by piece, each in a turn of its own, within the speed limit, and with what
//! the operator wants to happen when one fails.

use std::cell::RefCell;

use super::layer_copy::{Copier, Step};
use super::{Action, Context, OnError};
use crate::bitmap::DirtyMap;
use crate::error::{Error, Result};
use crate::units::ByteRange;

/// How much of a dirty disk is taken at a time, in bytes.
const RUN: u64 = 16 << 20;

/// See the [module](self).
#[derive(Debug)]
pub struct Pace<'a> {
    context: &'a Context,
    on_error: OnError,
    /// The first error that was ignored.
    ignored: RefCell<Option<Error>>,
}

impl<'a> Pace<'a> {
    /// Of a job with this policy.
    pub fn new(context: &'a Context, on_error: OnError) -> Pace<'a> {
        Pace { context, on_error, ignored: RefCell::default() }
    }

    /// Does one step. What was ignored counts as done.
    async fn step(&self, copier: &dyn Copier, range: ByteRange) -> Result<u64> {
        loop {
            let turn = self.context.turn().await;
            let result = copier.step(range).await;
            drop(turn);
            let failed = match result {
                Ok(Step { done, copied }) => {
                    if copied > 0 {
                        self.context.throttle(copied).await;
                    }
                    return Ok(done.min(range.len));
                }
                Err(failed) => failed,
            };
            match self.context.on_error(self.on_error, failed.operation, &failed.error) {
                Action::Report => return Err(failed.error),
                Action::Ignore => {
                    self.ignored.borrow_mut().get_or_insert(failed.error);
                    return Ok(failed.skip.clamp(1, range.len));
                }
                Action::Stop => {}
            }
        }
    }

    /// Copies a range from end to end, and counts it as progress.
    pub async fn copy(&self, copier: &dyn Copier, range: ByteRange) -> Result<()> {
        let mut at = range;
        while !at.is_empty() {
            let done = self.step(copier, at).await?;
            self.context.advance(done);
            at = ByteRange::between(at.offset + done, at.end());
        }
        Ok(())
    }

    /// Copies what is marked until nothing is. The total grows by what is marked meanwhile.
    pub async fn copy_dirty(
        &self,
        copier: &dyn Copier,
        map: &DirtyMap,
        done: &mut u64,
    ) -> Result<()> {
        let mut from = 0;
        while let Some(mut taken) = map.take(from, RUN) {
            while !taken.range().is_empty() {
                let left = map.bytes() + taken.range().len;
                self.context.set_total(*done + left);
                let step = self.step(copier, taken.range()).await?;
                taken.advance(step);
                *done += step;
                self.context.set_current(*done);
            }
            from = taken.range().end();
        }
        self.context.set_total(*done + map.bytes());
        Ok(())
    }

    /// Fails if an error was ignored: what was left out must not be relied on.
    pub fn finish(self) -> Result<()> {
        match self.ignored.into_inner() {
            Some(err) => Err(err.context("not all could be copied")),
            None => Ok(()),
        }
    }
}
