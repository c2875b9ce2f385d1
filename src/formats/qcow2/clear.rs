//! Zeroing and discarding, and giving space back to the host.

use std::sync::atomic::Ordering;

use imago::ShallowMapping;

use super::disk::ALL;
use super::session::{RECORD_DISCARD, RECORD_ZERO};
use super::{MAX_DIRTY, MAX_RUN, Qcow2};
use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, HostFile, yield_now};
use crate::units::{ByteRange, align_down, align_up};

impl Qcow2 {
    /// Writes zeros as data, except where zeros are read already.
    async fn write_zero_data(&self, range: ByteRange) -> Result<()> {
        let mut at = range;
        while !at.is_empty() {
            let want = ByteRange { offset: at.offset, len: at.len.min(MAX_RUN) };
            let (mapping, run) = self.shallow(want).await?;
            let is_zero = match mapping {
                ShallowMapping::Zero { explicit: true, .. } => self.keep_zeros(run).await?,
                ShallowMapping::Zero { .. } => !self.backing_shows(run.offset),
                _ => false,
            };
            if !is_zero {
                let zeros = AlignedBuf::zeroed(run.len as usize, 4096);
                self.write_out(run.offset, zeros.buffers()).await?;
            }
            at = ByteRange::between(run.end(), at.end());
        }
        Ok(())
    }

    /// Sees to it that a run of zeros, of which a kill may take away what made it zeros, survives that
    /// by this request as well: who made it so need not be done. False if it is no such run any more.
    async fn keep_zeros(&self, run: ByteRange) -> Result<bool> {
        while self.is_pending(run) {
            let guest = self.guest.exclusive(self.clusters(run)).await;
            let (mapping, same) = self.shallow(run).await?;
            if !matches!(mapping, ShallowMapping::Zero { explicit: true, .. }) || same != run {
                return Ok(false);
            }
            let meta = self.meta.shared(ALL).await;
            let promise = self.promise(0);
            let is_promised = promise.is_some();
            let must_checkpoint = promise.is_none_or(|promise| {
                self.set_pending(run);
                self.fulfil(promise, RECORD_ZERO, run, &[])
            });
            drop((meta, guest));
            if must_checkpoint {
                self.checkpoint().await?;
            }
            if is_promised {
                break;
            }
        }
        Ok(true)
    }

    /// Zeroes or discards a range.
    pub(super) async fn clear(
        &self,
        range: ByteRange,
        discard: bool,
        may_unmap: bool,
    ) -> Result<()> {
        self.check_writable()?;
        self.give_up_claims().await?;
        let mut whole = ByteRange::between(range.offset, range.offset);
        if self.header.version > 2 {
            let start = align_up(range.offset, self.cluster_size).unwrap_or(u64::MAX);
            let end = match range.end() == self.size() {
                true => range.end(),
                false => align_down(range.end(), self.cluster_size),
            };
            if start < end {
                whole = ByteRange::between(start, end);
            }
        }
        if !discard {
            self.write_zero_data(ByteRange::between(range.offset, whole.offset)).await?;
        }
        let mut at = whole;
        while !at.is_empty() {
            let chunk = ByteRange::between(at.offset, at.end().min(self.l2_end(at.offset)));
            match self.clear_clusters(chunk, discard, may_unmap).await? {
                Some(done) => at = ByteRange::between(at.offset + done, at.end()),
                None => self.checkpoint().await?,
            }
        }
        if !discard {
            self.write_zero_data(ByteRange::between(whole.end(), range.end())).await?;
        }
        Ok(())
    }

    /// Makes a prefix of a run of whole clusters zero clusters; returns its length, or `None` if a
    /// checkpoint is needed first.
    async fn clear_clusters(
        &self,
        chunk: ByteRange,
        discard: bool,
        may_unmap: bool,
    ) -> Result<Option<u64>> {
        let guest = self.guest.exclusive(chunk).await;
        let slot = self.slots.exclusive(self.slot(chunk.offset)).await;
        if self.store.dirty_bytes() > MAX_DIRTY && !self.resizing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (mapping, run) = self.shallow(chunk).await?;
        let mut host = None;
        let mut hazard = false;
        let mut is_zero = false;
        match mapping {
            ShallowMapping::Zero { explicit: true, .. } if !self.is_pending(run) => {
                return Ok(Some(run.len));
            }
            // A kill may take it away, and who made it so need not be done.
            ShallowMapping::Zero { explicit: true, .. } => is_zero = true,
            ShallowMapping::Zero { .. } if discard || !self.backing_shows(run.offset) => {
                return Ok(Some(run.len));
            }
            ShallowMapping::Zero { .. } => {}
            ShallowMapping::Raw { offset, writable, .. } => {
                host = Some((ByteRange { offset, len: run.len }, writable));
            }
            _ => hazard = true,
        }
        let meta = self.meta.shared(ALL).await;
        let Some(promise) = self.promise(0) else { return Ok(None) };
        self.set_pending(run);
        self.revocations.fetch_add(1, Ordering::SeqCst);
        if let Some((host, _)) = host {
            self.disk.payload.settle(host).await;
        }
        if hazard {
            self.store.announce_hazard();
        }
        let mut at = if is_zero { ByteRange::default() } else { run };
        while !at.is_empty() {
            let (start, len) = self
                .image
                .inner()
                .ensure_zero_mapping(at.offset, at.len)
                .await
                .context(|| format!("{}: zeroing {at}", self.name()))?;
            if start != at.offset || len == 0 {
                return Err(Error::corrupt(format!("{}: cannot zero {at}", self.name())));
            }
            self.changes.fetch_add(1, Ordering::SeqCst);
            at = ByteRange::between(at.offset + len, at.end());
        }
        if let Some((host, true)) = host
            && may_unmap
        {
            let generation = self.generation.load(Ordering::SeqCst);
            self.punches.lock().unwrap().push((generation, host));
        }
        let kind = if discard { RECORD_DISCARD } else { RECORD_ZERO };
        let must_checkpoint = self.fulfil(promise, kind, run, &[]);
        drop((meta, slot, guest));
        if must_checkpoint {
            self.checkpoint().await?;
        }
        Ok(Some(run.len))
    }

    /// The range of the file is about to hold data: no hole may be punched into it any more.
    pub(super) fn unpunch(&self, range: ByteRange) {
        let mut punches = self.punches.lock().unwrap();
        if !punches.iter().any(|(_, punch)| punch.overlaps(&range)) {
            return;
        }
        let cut = |(generation, punch): (u64, ByteRange)| {
            let before = ByteRange::between(punch.offset, punch.end().min(range.offset));
            let after = ByteRange::between(punch.offset.max(range.end()), punch.end());
            [(generation, before), (generation, after)]
        };
        let rest: Vec<_> = std::mem::take(&mut *punches).into_iter().flat_map(cut).collect();
        punches.extend(rest.into_iter().filter(|(_, punch)| !punch.is_empty()));
    }

    /// Gives the space of discarded clusters back to the host. Their being zero is on disk. Dropped, it
    /// leaves the rest to the next call.
    pub(super) async fn punch(&self, generation: u64) {
        let Some(host) = self.disk.file().as_host() else {
            self.punches.lock().unwrap().retain(|(punch, _)| *punch > generation);
            return;
        };
        // A guest that discards all of its disk leaves many thousands, and each is a plain call.
        while self.punch_one(host, generation) {
            yield_now().await;
        }
    }

    /// Makes one of the holes that are due; false if there is none.
    fn punch_one(&self, host: &HostFile, generation: u64) -> bool {
        const CHUNK: u64 = 64 << 20;
        // One call with the list locked: whoever is about to write there waits for it.
        let mut punches = self.punches.lock().unwrap();
        let due = punches.iter().position(|(punch, _)| *punch <= generation);
        let Some(due) = due else { return false };
        let (_, range) = &mut punches[due];
        let part = ByteRange { offset: range.offset, len: range.len.min(CHUNK) };
        *range = ByteRange::between(part.end(), range.end());
        if range.is_empty() {
            punches.swap_remove(due);
        }
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        // What cannot be freed stays allocated, and reads as zeros by its mapping.
        let _ = rustix::fs::fallocate(host, flags, part.offset, part.len);
        true
    }
}
