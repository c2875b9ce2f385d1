//! A guest's session: what is recorded in the keep, and redone after a kill.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Qcow2;
use super::disk::ALL;
use crate::block::Keep;
use crate::block::keep::{Keeper, Reservation, begin_session};
use crate::error::{Error, Result, ResultExt};
use crate::io::AlignedBuf;
use crate::units::ByteRange;

/// Kinds of records in the keep.
pub(super) const RECORD_WRITE: u8 = 1;
pub(super) const RECORD_ZERO: u8 = 2;
pub(super) const RECORD_DISCARD: u8 = 3;
/// Kind, offset and length, 8 bytes each.
const RECORD_HEADER: usize = 24;

/// How a change survives a kill.
pub(super) enum Promise<'a> {
    /// No guest depends on it.
    Nothing,
    /// By a record in the keep.
    Record(Reservation<'a>),
    /// By a checkpoint before the request completes.
    Checkpoint,
}

impl Promise<'_> {
    pub(super) fn wants_data(&self) -> bool {
        matches!(self, Promise::Record(_))
    }
}

impl Keeper for Qcow2 {
    fn records(&self) -> Option<&Keep> {
        self.keep.as_ref()
    }

    fn session(&self) -> &AtomicBool {
        &self.session
    }

    async fn settle(&self) {
        drop(self.meta.exclusive(ALL).await);
    }

    async fn save(&self) -> Result<()> {
        match self.changes.load(Ordering::SeqCst) == self.changes_saved.load(Ordering::SeqCst) {
            true => Ok(()),
            false => self.checkpoint().await,
        }
    }
}

impl Qcow2 {
    /// Settles how a change is going to survive a kill; `None` if the keep is full. Called with
    /// meta held, so that no checkpoint comes between this and the record.
    pub(super) fn promise(&self, payload: u64) -> Option<Promise<'_>> {
        // What lies beyond the size on disk must not be kept; growing ends with a checkpoint.
        if !self.session.load(Ordering::Acquire) || self.resizing.load(Ordering::SeqCst) {
            return Some(Promise::Nothing);
        }
        let len = RECORD_HEADER as u64 + payload;
        match &self.keep {
            Some(keep) if keep.can_ever_hold(len) => keep.reserve(len).map(Promise::Record),
            _ => Some(Promise::Checkpoint),
        }
    }

    pub(super) fn set_pending(&self, range: ByteRange) {
        if self.session.load(Ordering::Acquire) {
            let generation = self.generation.load(Ordering::SeqCst);
            self.pending.lock().unwrap().insert(range, generation);
        }
    }

    /// Whether a kill would set any of the range back, were it not for the records in the keep.
    pub(super) fn is_pending(&self, range: ByteRange) -> bool {
        self.pending.lock().unwrap().overlaps(range)
    }

    /// Keeps a promise, with meta held; true if a checkpoint must follow once it is released.
    pub(super) fn fulfil(
        &self,
        promise: Promise<'_>,
        kind: u8,
        range: ByteRange,
        data: &[&[u8]],
    ) -> bool {
        self.changes.fetch_add(1, Ordering::SeqCst);
        match promise {
            Promise::Nothing => false,
            Promise::Checkpoint => true,
            Promise::Record(reservation) => {
                let mut header = [0; RECORD_HEADER];
                header[0] = kind;
                header[8..16].copy_from_slice(&range.offset.to_le_bytes());
                header[16..].copy_from_slice(&range.len.to_le_bytes());
                let mut pieces = vec![&header[..]];
                pieces.extend(data);
                match reservation.append(&pieces) {
                    Ok(()) => false,
                    Err(err) => {
                        tracing::warn!("flushing instead of keeping a record: {err}");
                        true
                    }
                }
            }
        }
    }

    /// Does again what a record says.
    async fn redo(&self, record: &[u8]) -> Result<()> {
        let word = |at: usize| {
            record.get(at..at + 8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
        };
        let (Some(kind), Some(offset), Some(len)) = (word(0), word(8), word(16)) else {
            return Err(Error::corrupt("kept record is too short"));
        };
        let range = ByteRange::new(offset, len).filter(|range| range.end() <= self.size());
        let Some(range) = range else {
            return Err(Error::corrupt(format!("kept record of {len} bytes at {offset}")));
        };
        let data = &record[RECORD_HEADER..];
        match kind as u8 {
            RECORD_WRITE if data.len() as u64 == len => {
                let buf = AlignedBuf::from_slice(data, 4096);
                self.write_out(offset, buf.buffers()).await
            }
            RECORD_ZERO => self.clear(range, false, false).await,
            RECORD_DISCARD => self.clear(range, true, true).await,
            _ => Err(Error::corrupt(format!("kept record of unknown kind {kind}"))),
        }
    }

    /// From now on, what completes must survive this process.
    pub(super) fn start_keeping(&self, nonce: u128) -> Result<()> {
        if self.read_only { Ok(()) } else { begin_session(self, nonce) }
    }

    pub(super) async fn resume_session(&self, nonce: Option<u128>) -> Result<()> {
        if nonce.is_none() {
            // Before the keep forgets: from now on nothing is recorded.
            self.session.store(false, Ordering::Release);
        }
        let Some(keep) = &self.keep else { return Ok(()) };
        let Some(nonce) = nonce else { return keep.forget() };
        let Some(records) = keep.take_over(nonce)? else {
            return match keep.found() {
                Some(_) => Err(Error::invalid(format!(
                    "{}: what is kept in {} is of another guest's session, so the guest that \
                     reconnects may have lost writes; stop it, then remove that file",
                    self.name(),
                    keep.path().display()
                ))),
                None => Ok(()),
            };
        };
        for (i, record) in records.iter().enumerate() {
            self.redo(record).await.context(|| {
                format!("{}: redoing record {i} of {}", self.name(), keep.path().display())
            })?;
        }
        tracing::info!(
            image = self.name(),
            records = records.len(),
            "took over what the guest wrote and did not flush"
        );
        self.checkpoint().await?;
        keep.reset()
    }
}
