//! Places for writes: in use already, or to be allocated, with what surrounds the write copied up.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use imago::{PreparedDataMapping, ShallowMapping};

use super::disk::ALL;
use super::header::field;
use super::place::Place;
use super::session::{Promise, RECORD_WRITE};
use super::store::Store;
use super::{MAX_DIRTY, MAX_RUN, Qcow2};
use crate::block::{Prepared, RangeGuard, WriteCommit};
use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, Buffers, Fut};
use crate::units::{ByteRange, align_down};

/// What lies around a write inside its clusters.
enum Surroundings {
    Zero,
    Data(AlignedBuf),
}

impl Qcow2 {
    /// What a part of a cluster reads as now.
    async fn surroundings(&self, range: ByteRange) -> Result<Surroundings> {
        let mut at = range;
        while !at.is_empty() {
            let (mapping, run) = self.shallow(at).await?;
            match mapping {
                ShallowMapping::Zero { explicit: true, .. } => {}
                ShallowMapping::Zero { .. } if !self.backing_shows(run.offset) => {}
                _ => {
                    let buf = AlignedBuf::zeroed(range.len as usize, 4096);
                    self.read_special(range.offset, buf.buffers()).await?;
                    return Ok(Surroundings::Data(buf));
                }
            }
            at = ByteRange::between(run.end(), range.end());
        }
        Ok(Surroundings::Zero)
    }

    /// Writes zeros to a part of a new cluster, as far as something of the file is there.
    async fn fill_zeros(&self, part: ByteRange) -> Result<()> {
        // Beyond the end of the file there are zeros already.
        let inside = self.disk.len()?.saturating_sub(part.offset).min(part.len);
        if inside == 0 {
            return Ok(());
        }
        let zeros = AlignedBuf::zeroed(inside.min(MAX_RUN) as usize, 4096);
        let mut rest = ByteRange { offset: part.offset, len: inside };
        while !rest.is_empty() {
            let buf = zeros.buffers().slice(0, rest.len.min(zeros.len() as u64));
            let done = ByteRange { offset: rest.offset, len: buf.len() };
            self.disk.write(done.offset, buf, self.disk.payload.begin(done)).await?;
            rest = ByteRange::between(done.end(), rest.end());
        }
        Ok(())
    }

    /// A place for a write of a prefix of `range`.
    pub(super) async fn place(&self, range: ByteRange) -> Result<Prepared<'_>> {
        self.check_writable()?;
        self.give_up_claims().await?;
        let range = ByteRange { offset: range.offset, len: range.len.min(MAX_RUN) };
        if let Some(place) = self.place_in_use(range).await? {
            return Ok(place);
        }
        loop {
            if let Some(place) = self.place_locked(range).await? {
                return Ok(place);
            }
            self.checkpoint().await?;
        }
    }

    /// Makes sure that the header does not claim any more, on disk, what the first change makes untrue.
    pub(super) async fn give_up_claims(&self) -> Result<()> {
        if self.has_claims.load(Ordering::Acquire) {
            self.store.write(field::AUTOCLEAR as u64, &[0; 8]).await?;
            self.changes.fetch_add(1, Ordering::SeqCst);
            self.checkpoint().await?;
            self.has_claims.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// A place that is mapped on disk already.
    async fn place_in_use(&self, range: ByteRange) -> Result<Option<Prepared<'_>>> {
        let revocations = self.revocations.load(Ordering::SeqCst);
        let (mapping, run) = self.shallow(range).await?;
        let ShallowMapping::Raw { offset, writable: true, .. } = mapping else { return Ok(None) };
        // Announced first: who takes the mapping away after the look at the counter waits for us.
        let token = self.disk.payload.begin(ByteRange { offset, len: run.len });
        if !self.may_write_through(run, revocations) {
            return Ok(None);
        }
        let file = Place::new(&self.disk, token, false, [None, None]);
        Ok(Some(Prepared { range: run, file, offset, commit: None, pin: None }))
    }

    /// Whether a mapping got when `revocations` were counted may be written through without more.
    pub(super) fn may_write_through(&self, range: ByteRange, revocations: u64) -> bool {
        self.revocations.load(Ordering::SeqCst) == revocations
            && !self.has_claims.load(Ordering::Relaxed)
            && !self.is_pending(range)
    }

    /// A place that must be allocated, or whose writes must be recorded; `None` if a checkpoint is
    /// needed first.
    async fn place_locked(&self, range: ByteRange) -> Result<Option<Prepared<'_>>> {
        let clusters = self.clusters(range);
        let guest = self.guest.exclusive(clusters).await;
        // From here on nobody else changes these clusters, so what surrounds the write can be read
        // before it is this write's turn at the table.
        let within = ByteRange::between(range.offset, range.end().min(self.l2_end(range.offset)));
        let (mapping, mut run) = self.shallow(within).await?;
        let mut in_place = None;
        let mut hazard = false;
        let mut shared = None;
        match mapping {
            ShallowMapping::Raw { offset, writable: true, .. } => in_place = Some(offset),
            ShallowMapping::Raw { offset, .. } => shared = Some(offset),
            // One at a time, so that each gets its own preallocated cluster back.
            ShallowMapping::Zero { explicit: true, .. } => {
                let end = align_down(run.offset, self.cluster_size) + self.cluster_size;
                run = ByteRange::between(run.offset, end.min(run.end()));
                hazard = self.header.snapshots > 0;
            }
            ShallowMapping::Zero { .. } => {}
            _ => hazard = true,
        }
        let around = self.clusters(run);
        let head = ByteRange::between(around.offset, run.offset);
        let tail = ByteRange::between(run.end(), around.end());
        let (head_data, tail_data) = match in_place {
            Some(_) => (Surroundings::Zero, Surroundings::Zero),
            None => (self.surroundings(head).await?, self.surroundings(tail).await?),
        };

        let slot = self.slots.exclusive(self.slot(range.offset)).await;
        if self.store.dirty_bytes() > MAX_DIRTY && !self.resizing.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if let Some(offset) = shared {
            hazard = self.frees(offset, run).await?;
        }
        let meta = self.meta.shared(ALL).await;
        let Some(promise) = self.promise(run.len) else { return Ok(None) };
        self.set_pending(around);
        let (mapping, offset, around) = match in_place {
            Some(offset) => (None, offset, [None, None]),
            None => {
                if hazard {
                    self.store.announce_hazard();
                }
                let mapping = self
                    .image
                    .prepare_data_mapping(around.offset, around.len, true)
                    .await
                    .context(|| format!("{}: allocating {around}", self.name()))?;
                let host = ByteRange { offset: mapping.offset(), len: mapping.length() };
                if self.is_under_way(host) {
                    // Freed by a cancelled request, and a snapshot from before still writes there.
                    return Ok(None);
                }
                self.store.forget(host);
                self.unpunch(host);
                let got = ByteRange { offset: around.offset, len: host.len };
                let before = match head_data {
                    Surroundings::Data(data) => Some(data),
                    Surroundings::Zero => {
                        self.fill_zeros(ByteRange { offset: host.offset, len: head.len }).await?;
                        None
                    }
                };
                let behind = match tail_data {
                    // Somebody else's then.
                    _ if got.end() < around.end() => None,
                    Surroundings::Data(data) => Some(data),
                    Surroundings::Zero => {
                        let offset = host.offset + (tail.offset - got.offset);
                        self.fill_zeros(ByteRange { offset, len: tail.len }).await?;
                        None
                    }
                };
                run = ByteRange::between(run.offset, run.end().min(got.end()));
                (Some(mapping), host.offset + head.len, [before, behind])
            }
        };
        let len = |buf: &Option<AlignedBuf>| buf.as_ref().map_or(0, AlignedBuf::len) as u64;
        let [before, behind] = [len(&around[0]), len(&around[1])];
        let written = ByteRange { offset: offset - before, len: before + run.len + behind };
        let token = self.disk.payload.begin(written);
        let place = Place::new(&self.disk, token, promise.wants_data(), around);
        let commit = Commit {
            image: self,
            mapping,
            promise,
            run,
            place: Arc::clone(&place),
            _guards: (meta, slot, guest),
        };
        let commit = Some(Box::new(commit) as Box<_>);
        Ok(Some(Prepared { range: run, file: place, offset, commit, pin: None }))
    }

    /// Whether overwriting these shared clusters takes away somebody's last reference.
    async fn frees(&self, offset: u64, run: ByteRange) -> Result<bool> {
        let Some(layout) = self.layout.lock().unwrap().clone() else { return Ok(true) };
        let mut at = align_down(offset, self.cluster_size);
        while at < offset + run.len {
            if layout.refcount(&self.store, at).await? < 2 {
                return Ok(true);
            }
            at += self.cluster_size;
        }
        Ok(false)
    }

    /// Writes data through [`Qcow2::place`], as the adapter does.
    pub(super) async fn write_out(&self, mut offset: u64, data: Buffers) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let place = self.place(ByteRange { offset, len: data.len() - done }).await?;
            let len = place.range.len;
            place.file.write(place.offset, data.slice(done, len), false).await?;
            if let Some(commit) = place.commit {
                commit.commit().await?;
            }
            offset += len;
            done += len;
        }
        Ok(())
    }
}

/// A prepared write.
struct Commit<'a> {
    image: &'a Qcow2,
    /// What imago has prepared; `None` if only a record is needed.
    mapping: Option<PreparedDataMapping<'a, Store>>,
    promise: Promise<'a>,
    run: ByteRange,
    place: Arc<Place>,
    /// Meta, slot, guest range; released in this order, after the above.
    _guards: (RangeGuard<'a>, RangeGuard<'a>, RangeGuard<'a>),
}

impl WriteCommit for Commit<'_> {
    fn commit<'b>(self: Box<Self>) -> Fut<'b, ()>
    where
        Self: 'b,
    {
        Box::pin(async move {
            // The guards come first, so that they go last if this future is dropped.
            let Commit { _guards, image, mapping, promise, run, place } = *self;
            if let Some(mapping) = mapping {
                // Before, in case this future is dropped half-way.
                image.changes.fetch_add(1, Ordering::SeqCst);
                if let Err(err) = image.image.commit_data_mapping(mapping).await {
                    let err = Error::from(err).context(format!("{}: mapping {run}", image.name()));
                    image.set_poison(&err);
                    return Err(err);
                }
            }
            let data = place.take_data();
            if promise.wants_data() && data.as_ref().map(|data| data.len() as u64) != Some(run.len)
            {
                return Err(Error::invalid(format!(
                    "{}: {run} was committed without having been written",
                    image.name()
                )));
            }
            let bytes = data.map(|data| data.to_vec()).unwrap_or_default();
            let must_checkpoint = image.fulfil(promise, RECORD_WRITE, run, &[&bytes]);
            drop(_guards);
            if must_checkpoint {
                image.checkpoint().await?;
            }
            Ok(())
        })
    }
}
