//! Transfers done in place, by one call for several requests where they go on from each other.
//!
//! The requests of a guest that reads or writes in order are next to each other in the ring, too,
//! and half of what a small transfer costs the host is the call itself. So what could be done at
//! once waits for the next request of its batch:
//!
//! ```text
//! ring   W 0..4k   W 4k..8k   W 8k..12k │ W 64k..68k │ R 12k..16k │ end of the batch
//! calls  ─────── pwritev ────────────── │  pwritev   │  preadv    │
//! ```
//!
//! A call that does not do all it should is made again for each request by itself, so that each
//! learns what became of it, and no other one.

#![allow(unsafe_code)]

use super::Worker;
use super::slot::Part;
use crate::error::Error;
use crate::io::HostFile;
use crate::io::engine::{MAX_IOVECS, Op};

/// Requests of a run at most, and their bytes. Longer ones hold up the first of them and gain
/// nothing.
const MAX_REQUESTS: usize = 32;
const MAX_LEN: u64 = 128 << 10;

/// Requests that wait to be done by one call. Empty but while a batch is taken.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// Slots of requests of one part.
    members: Vec<u32>,
    /// The call for all of them, but for its memory; and the file, which their driver keeps open.
    call: Option<(Op, *const HostFile)>,
    len: u64,
    /// Memory of a call for several.
    iovs: Vec<libc::iovec>,
    n_iovs: u32,
}

impl Run {
    /// Whether the part begins where the last one ends, and there is room for it.
    #[inline]
    fn goes_on_with(&self, part: &Part) -> bool {
        self.call.is_some_and(|(op, _)| {
            part.op.offset == op.offset + self.len
                && part.op.file_id == op.file_id
                && part.op.code == op.code
                && self.len + part.len <= MAX_LEN
                && (self.n_iovs + part.op.n_iovs) as usize <= MAX_IOVECS
        })
    }

    #[inline]
    fn push(&mut self, index: u32, part: &Part, file: *const HostFile) {
        if self.call.is_none() {
            self.call = Some((part.op, file));
        }
        self.members.push(index);
        self.len += part.len;
        self.n_iovs += part.op.n_iovs;
    }
}

impl Worker {
    /// Has a request of one part done in place, at the latest by [`Worker::perform_run`]: together with
    /// what comes before or after it in the batch, if they go on from each other.
    ///
    /// # Safety
    /// The file stays open until [`Worker::perform_run`] has been called.
    #[inline]
    pub(super) unsafe fn join_run(&mut self, index: u32, file: *const HostFile) {
        if !self.run.goes_on_with(&self.slots[index as usize].parts[0]) {
            self.perform_run();
        }
        self.run.push(index, &self.slots[index as usize].parts[0], file);
        if self.run.members.len() >= MAX_REQUESTS.min(self.pace.show()) {
            self.perform_run();
        }
    }

    /// Does what waits to be done in place.
    #[inline]
    pub(super) fn perform_run(&mut self) {
        let Some((op, file)) = self.run.call.take() else { return };
        // SAFETY: by the promise of `join_run`.
        let file = unsafe { &*file };
        let len = std::mem::take(&mut self.run.len);
        self.run.n_iovs = 0;
        if let [index] = self.run.members[..] {
            self.run.members.clear();
            // SAFETY: the slot keeps the iovecs and the ring the memory.
            let result = unsafe { file.inline_call(&op) };
            return self.part_done(index, 0, result);
        }
        self.perform_several(op, file, len);
    }

    fn perform_several(&mut self, mut op: Op, file: &HostFile, len: u64) {
        let mut members = std::mem::take(&mut self.run.members);
        self.run.iovs.clear();
        for index in &members {
            let op = &self.slots[*index as usize].parts[0].op;
            // SAFETY: the slot keeps the iovecs of its operation until that is done.
            let iovs = unsafe { std::slice::from_raw_parts(op.iovs, op.n_iovs as usize) };
            self.run.iovs.extend_from_slice(iovs);
        }
        op.iovs = self.run.iovs.as_ptr();
        op.n_iovs = self.run.iovs.len() as u32;
        // SAFETY: the iovecs are above, and the rings keep the memory of their requests.
        if i64::from(unsafe { file.inline_call(&op) }) == len as i64 {
            self.run_done(&members);
        } else {
            for index in &members {
                let op = self.slots[*index as usize].parts[0].op;
                // SAFETY: as for a single one.
                let result = unsafe { file.inline_call(&op) };
                self.part_done(*index, 0, result);
            }
        }
        members.clear();
        self.run.members = members;
    }

    /// All of these requests, which go on from each other, are done. Their driver learns it in as
    /// few steps as it likes.
    fn run_done(&mut self, mut members: &[u32]) {
        while let [first, rest @ ..] = members {
            let mut together = 0;
            if let Some(mut commit) = self.slots[*first as usize].commit.take() {
                for index in rest {
                    let Some(next) = self.slots[*index as usize].commit.take() else { break };
                    if let Err(next) = commit.join(next) {
                        self.slots[*index as usize].commit = Some(next);
                        break;
                    }
                    together += 1;
                }
                let committed = commit.written();
                for index in &members[..=together] {
                    let again = match &committed {
                        Ok(committed) => Ok(*committed),
                        Err(err) => Err(Error::new(err.kind(), err.to_string())),
                    };
                    self.slots[*index as usize].pin = None;
                    self.committed(*index, again);
                }
            } else {
                let result = self.slots[*first as usize].parts[0].len as i32;
                self.part_done(*first, 0, result);
            }
            members = &members[together + 1..];
        }
    }
}
