//! What goes wrong: rings that are taken out of service, and the log of requests that failed.

use std::time::{Duration, Instant};

use super::Worker;
use crate::device::request::Kind;
use crate::error::{Error, ErrorKind};

impl Worker {
    /// A ring broke its protocol: nothing more is taken from it until it is set up anew.
    #[cold]
    pub(super) fn report_broken(&mut self, at: usize, why: &str) {
        let served = &mut self.rings[at];
        if std::mem::replace(&mut served.reported, true) {
            return;
        }
        tracing::error!(
            export = self.export.name(),
            queue = served.index,
            "the queue is broken and no longer served until the guest resets the device: {why}"
        );
        if let Some(err) = &served.err {
            // One that blocks is written to once.
            let _ = served.bell.ring(err);
        }
    }

    /// The ring was kicked, and nothing was ever made available in it. A front-end kicks a ring once
    /// by itself when it starts. But a guest that kicks has written to its ring before; if that
    /// cannot be seen, its memory is most likely another: QEMU hands over the file of a memory-backend
    /// without `share=on`, too, while the guest writes to private pages.
    #[cold]
    pub(super) fn doubt_memory(&mut self, at: usize) {
        let served = &mut self.rings[at];
        served.early_kicks = served.early_kicks.saturating_add(1);
        if served.early_kicks != 2 || self.counts.requests.get() > 0 || !self.failures.may_speak() {
            return;
        }
        tracing::warn!(
            export = self.export.name(),
            queue = served.index,
            "the guest kicks the queue, and nothing is to be seen in it: its memory is probably not \
             shared (QEMU: a memory-backend with share=on; Cloud Hypervisor: --memory shared=on)"
        );
    }

    /// Guest memory lost its file: the ring lives in it, so nothing in it can be trusted.
    #[cold]
    pub(super) fn lose_memory(&mut self, at: usize) {
        let served = &mut self.rings[at];
        served.ring.retire();
        served.resubmit.clear();
        self.report_broken(at, "the front-end has truncated the file of its shared memory");
    }
}

/// Logs failures without flooding: each kind at once the first time, then a count at most once a
/// second.
#[derive(Default)]
pub(super) struct FailureLog {
    last: Option<Instant>,
    silent: u64,
}

impl FailureLog {
    /// True if a line may be written now.
    fn may_speak(&mut self) -> bool {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < Duration::from_secs(1)) {
            self.silent += 1;
            return false;
        }
        self.last = Some(now);
        if self.silent > 0 {
            tracing::warn!("{} more failures were not logged", std::mem::take(&mut self.silent));
        }
        true
    }

    #[cold]
    pub(super) fn note_request(&mut self, export: &str, kind: Kind, err: &Error) {
        if !self.may_speak() {
            return;
        }
        let nospace = err.kind() == ErrorKind::NoSpace;
        match kind {
            Kind::Read { offset } => tracing::error!(export, offset, "read failed: {err}"),
            Kind::Write { offset } => {
                tracing::error!(export, offset, nospace, "write failed: {err}")
            }
            Kind::Flush => tracing::error!(export, nospace, "flush failed: {err}"),
            Kind::Discard => tracing::error!(export, "discard failed: {err}"),
            Kind::WriteZeroes => tracing::error!(export, nospace, "write zeroes failed: {err}"),
            Kind::GetId => tracing::error!(export, "get id failed: {err}"),
        }
    }

    #[cold]
    pub(super) fn note_chain(
        &mut self,
        export: &str,
        queue: usize,
        head: u16,
        err: &dyn std::fmt::Display,
    ) {
        if self.may_speak() {
            tracing::warn!(export, queue, head, "bad descriptor chain: {err}");
        }
    }
}
