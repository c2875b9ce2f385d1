//! Checkpoints: making everything completed durable, see [`checkpoint`](super::checkpoint).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::checkpoint::Snapshot;
use super::disk::ALL;
use crate::error::Result;
use crate::units::ByteRange;

/// A snapshot on its way to the disk.
#[derive(Debug)]
pub(super) struct UnderWay {
    snapshot: Snapshot,
    generation: u64,
    changes: u64,
    hazards: u64,
}

impl Qcow2 {
    /// Makes everything completed so far durable, metadata included; see [`checkpoint`]. Drops
    /// what the keep holds of it.
    pub(super) async fn checkpoint(&self) -> Result<()> {
        self.check_writable()?;
        let before = self.begun.load(Ordering::SeqCst);
        let _turn = self.turn.exclusive(ALL).await;
        self.check_writable()?;
        if self.completed.load(Ordering::SeqCst) > before {
            // Somebody else's began after we were called.
            return Ok(());
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        match self.checkpoint_now().await {
            Ok(()) => {
                self.completed.store(number, Ordering::SeqCst);
                Ok(())
            }
            Err(err) => {
                let err = err.context(format!("{}: flush", self.name()));
                self.set_poison(&err);
                Err(err)
            }
        }
    }

    async fn checkpoint_now(&self) -> Result<()> {
        let left_over = self.under_way.lock().unwrap().clone();
        if let Some(left_over) = left_over {
            // An earlier flush was dropped half-way.
            self.finish(left_over).await?;
        }
        if !self.is_dirty() {
            return self.disk.file().flush().await;
        }
        let under_way = {
            let _alone = self.meta.exclusive(ALL).await;
            self.image.flush().await?;
            let layout = self.layout.lock().unwrap().clone();
            let Some(layout) = layout else { return Ok(()) };
            let snapshot = layout.snapshot(&self.store).await?;
            if let Some(keep) = self.keep.as_ref().filter(|keep| keep.is_recording()) {
                keep.rotate()?;
            }
            let under_way = Arc::new(UnderWay {
                snapshot,
                generation: self.generation.fetch_add(1, Ordering::SeqCst),
                changes: self.changes.load(Ordering::SeqCst),
                hazards: self.store.hazards_seen(),
            });
            *self.under_way.lock().unwrap() = Some(Arc::clone(&under_way));
            under_way
        };
        self.finish(under_way).await
    }

    async fn finish(&self, under_way: Arc<UnderWay>) -> Result<()> {
        let snapshot = &under_way.snapshot;
        snapshot.write_out(&self.disk, &self.meta_writes).await?;
        self.store.written(snapshot.blocks());
        {
            let mut layout = self.layout.lock().unwrap();
            if let Some(layout) = layout.as_mut() {
                Arc::make_mut(layout).advance(snapshot);
            }
        }
        self.store.hazards_over(under_way.hazards);
        self.changes_saved.store(under_way.changes, Ordering::SeqCst);
        // The records go first: as long as one is kept, writes over it must be recorded too.
        if let Some(keep) = self.keep.as_ref().filter(|keep| keep.is_recording()) {
            keep.release()?;
        }
        self.pending.lock().unwrap().retire(under_way.generation);
        *self.under_way.lock().unwrap() = None;
        self.punch(under_way.generation).await;
        Ok(())
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.changes.load(Ordering::SeqCst) != self.changes_saved.load(Ordering::SeqCst)
            || self.store.dirty_bytes() > 0
    }

    pub(super) fn is_under_way(&self, range: ByteRange) -> bool {
        let under_way = self.under_way.lock().unwrap();
        under_way.as_ref().is_some_and(|under_way| under_way.snapshot.covers(range))
    }
}
