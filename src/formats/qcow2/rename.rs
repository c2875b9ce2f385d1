//! Naming another backing file, while the image is in use.
//!
//! The new name is written to where no header points yet, and made durable. Then the fields that
//! point to it, and the format with them, change in one sector. Of an image without a backing file the format
//! means nothing, and goes with the name. imago keeps the header that it has
//! read, and writes it again when a table moves; the [store](super::store) sees to it that what it
//! says of the backing file stays what it is now.

use super::Qcow2;
use super::disk::ALL;
use super::header::{Backing, Renaming};
use crate::error::{Result, ResultExt};

impl Qcow2 {
    /// What changes in the header for it to name this backing file.
    pub(super) async fn renaming(&self, backing: Option<&Backing>) -> Result<Renaming> {
        let cluster = self.store.read(0, self.cluster_size as usize).await?;
        Renaming::new(&cluster, backing).context(|| self.name().to_string())
    }

    pub(super) async fn rename(&self, backing: Option<Backing>) -> Result<()> {
        self.check_writable()?;
        let change = self.renaming(backing.as_ref()).await?;
        for (at, bytes) in &change.before {
            self.store.write(*at, bytes).await?;
        }
        if !change.before.is_empty() {
            self.checkpoint().await?;
        }
        {
            // No checkpoint takes one without the other.
            let _alone = self.meta.exclusive(ALL).await;
            if let Some((at, format)) = &change.format {
                self.store.write(*at, format).await?;
            }
            self.store.set_backing_field(change.field).await?;
        }
        self.checkpoint().await?;
        *self.renamed.lock().unwrap() = Some(backing);
        Ok(())
    }
}
