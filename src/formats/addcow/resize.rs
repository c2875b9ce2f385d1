//! Growing and shrinking an add-cow image.
//!
//! The image file's length is the disk's, and bits beyond the end are ignored. So the bitmap is
//! always made right for the larger of the two sizes *before* the image file grows and *after* it
//! has shrunk, and a power cut in between leaves a disk of the old or the new size that reads right:
//!
//! * Grow: where the backing is longer than the disk was, the new sectors' bits are set first, so
//!   that they read as zeros and not as what the backing had hidden there. Then the image grows.
//! * Shrink: first the image, then the bits. The other way round, sectors whose bits were cleared
//!   would show the backing if the power failed before the image had shrunk.

use std::sync::atomic::Ordering;

use super::Shared;
use super::layout::{HEADER_LEN, bitmap_len};
use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, File};
use crate::units::{ByteRange, SECTOR_SIZE};

impl Shared {
    /// Changes the size of the disk, with nothing in flight. `backing` is the backing's size.
    pub(super) async fn resize(&self, size: u64, backing: u64) -> Result<()> {
        self.check_writable()?;
        if !size.is_multiple_of(SECTOR_SIZE) || size == 0 {
            return Err(Error::invalid(format!(
                "{}: size {size} is not a positive multiple of {SECTOR_SIZE}",
                self.name()
            )));
        }
        // From here on all bits are on disk, and memory may forget them.
        self.flush_all().await?;
        let old = self.size();
        let result = match size.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(old, size, backing).await,
            std::cmp::Ordering::Less => self.shrink(size).await,
        };
        self.pages.forget_all();
        result.context(|| format!("{}: resizing", self.name()))
    }

    /// Clears all bits, with nothing in flight, and gives the space of the image file back.
    pub(super) async fn make_empty(&self, discard: bool) -> Result<()> {
        // Nothing of what was written may be waiting to be written out afterwards.
        self.flush_all().await?;
        let emptied = async {
            // Cut off and made anew: however long the bitmap is, and a power cut leaves all or none
            // of it. Only then may the data go that the bits told of.
            self.file.set_len(HEADER_LEN).await?;
            self.file.set_len(HEADER_LEN + bitmap_len(self.sectors())).await?;
            self.file.flush().await?;
            match discard {
                true => self.data.discard(ByteRange { offset: 0, len: self.size() }).await,
                false => Ok(()),
            }
        };
        let result = emptied.await;
        self.durability.set_file_len(HEADER_LEN + bitmap_len(self.sectors()));
        self.pages.forget_all();
        self.durability.forget_kept()?;
        result.context(|| format!("{}: emptying it", self.name()))
    }

    async fn grow(&self, old: u64, size: u64, backing: u64) -> Result<()> {
        trim_bitmap(self.file.as_ref(), old / SECTOR_SIZE).await?;
        let is_growing = &self.durability.is_growing;
        is_growing.store(true, Ordering::SeqCst);
        let result = self.grow_files(old, size, backing).await;
        is_growing.store(false, Ordering::SeqCst);
        if result.is_err() {
            self.size.store(old, Ordering::Release);
            self.undo_grow(old).await;
        }
        result
    }

    async fn grow_files(&self, old: u64, size: u64, backing: u64) -> Result<()> {
        let len = HEADER_LEN + bitmap_len(size / SECTOR_SIZE);
        self.file.set_len(len).await?;
        self.durability.set_file_len(len);
        self.pages.forget_all();
        let tail = self.data.len()?;
        if tail > old {
            // An odd tail that was no sector until now.
            self.data.write_zeroes(ByteRange::between(old, tail), true).await?;
        }
        self.size.store(size, Ordering::Release);
        let hidden = backing.next_multiple_of(SECTOR_SIZE).min(size);
        self.mark_all(ByteRange::between(old, hidden)).await?;
        self.flush_all().await?;
        self.file.flush().await?;
        self.data.set_len(size).await?;
        self.data.flush().await
    }

    /// Makes the bitmap again what the disk needs that could not grow, so that nobody takes the image file
    /// for one that was cut off. Where that fails, too, a check finds it.
    async fn undo_grow(&self, old: u64) {
        // If the image file has grown all the same, so has the disk as soon as it is opened again.
        let has_grown = self.data.len().map_or(true, |len| len / SECTOR_SIZE > old / SECTOR_SIZE);
        if has_grown || self.durability.is_poisoned() {
            return;
        }
        if let Err(err) = trim_bitmap(self.file.as_ref(), old / SECTOR_SIZE).await {
            tracing::warn!("{}: its bitmap stays longer than the disk needs: {err}", self.name());
        }
        if let Ok(len) = self.file.len() {
            self.durability.set_file_len(len);
        }
    }

    async fn shrink(&self, size: u64) -> Result<()> {
        self.data.set_len(size).await?;
        self.data.flush().await?;
        self.size.store(size, Ordering::Release);
        trim_bitmap(self.file.as_ref(), size / SECTOR_SIZE).await?;
        self.durability.set_file_len(HEADER_LEN + bitmap_len(size / SECTOR_SIZE));
        self.file.flush().await
    }
}

/// Makes the bitmap in the file exactly as long as a disk of so many sectors needs, with the bits
/// beyond the last sector clear.
pub(super) async fn trim_bitmap(file: &dyn File, sectors: u64) -> Result<()> {
    let needed = HEADER_LEN + bitmap_len(sectors);
    let had = file.len()?;
    if had != needed {
        file.set_len(needed).await?;
    }
    if !sectors.is_multiple_of(8) && had >= needed {
        let buf = AlignedBuf::zeroed(1, 512);
        file.read(needed - 1, buf.buffers()).await?;
        let last = buf.to_vec()[0];
        let valid = last & ((1 << (sectors % 8)) - 1) as u8;
        if valid != last {
            file.write(needed - 1, AlignedBuf::from_slice(&[valid], 512).buffers(), false).await?;
        }
    }
    Ok(())
}
