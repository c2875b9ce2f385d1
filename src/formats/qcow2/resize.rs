//! Growing an image.

use std::sync::atomic::Ordering;

use imago::format::PreallocateMode;

use super::{BLOCK, Qcow2};
use crate::error::{Error, Result};
use crate::units::ByteRange;

impl Qcow2 {
    pub(super) async fn grow(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let old = self.size();
        if size == old {
            return Ok(());
        }
        if size < old {
            return Err(Error::unsupported(format!(
                "{}: qcow2 images are not shrunk here; use 'qemu-img resize --shrink' while it is \
                 not in use",
                self.name()
            )));
        }
        if !size.is_multiple_of(BLOCK) {
            return Err(Error::invalid(format!(
                "{}: size {size} is not a multiple of {BLOCK}",
                self.name()
            )));
        }
        self.check_growth(size)?;
        self.give_up_claims().await?;
        // The new size must not become durable before the new space reads as zeros.
        self.checkpoint().await?;
        self.resizing.store(true, Ordering::SeqCst);
        let result = self.grow_and_zero(old, size).await;
        self.resizing.store(false, Ordering::SeqCst);
        if let Err(err) = &result {
            self.set_poison(err);
        }
        result
    }

    /// Refuses what cannot be before anything is done: a failure later refuses all writes.
    fn check_growth(&self, size: u64) -> Result<()> {
        /// Entries of the longest L1 table that QEMU takes.
        const MAX_L1: u64 = 4 << 20;
        if self.header.version < 3 && self.header.snapshots > 0 {
            return Err(Error::unsupported(format!(
                "{}: Can't resize a v2 image which has snapshots",
                self.name()
            )));
        }
        let covered = u128::from(self.cluster_size) * u128::from(self.cluster_size / 8);
        let most = covered * u128::from(MAX_L1);
        if u128::from(size) > most {
            return Err(Error::unsupported(format!(
                "{}: a size of {size} bytes is more than the {most} that an image with clusters of {} \
                 bytes can have",
                self.name(),
                self.cluster_size
            )));
        }
        Ok(())
    }

    async fn grow_and_zero(&self, old: u64, size: u64) -> Result<()> {
        self.store.announce_hazard();
        self.image.resize_grow(size, PreallocateMode::None).await?;
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.size.store(size, Ordering::Release);
        let range = ByteRange::between(old, size);
        let zeroed = self.clear(range, false, true).await;
        if zeroed.is_err() {
            self.size.store(old, Ordering::Release);
        }
        zeroed?;
        self.checkpoint().await
    }
}
