//! Where data is, and reading what is not simply there: backing files and compressed clusters.

use std::sync::Arc;

use imago::ShallowMapping;

use super::place::Data;
use super::store::Store;
use super::{MAX_RUN, Qcow2, disk};
use crate::block::{ExtentKind, Format};
use crate::error::{Result, ResultExt};
use crate::io::{AlignedBuf, Buffers};
use crate::units::{ByteRange, align_down, align_up};

impl Qcow2 {
    /// Whether something of the backing shows at a place that is not allocated.
    pub(super) fn backing_shows(&self, offset: u64) -> bool {
        self.backing.read().unwrap().as_ref().is_some_and(|backing| offset < backing.size())
    }

    /// How the adapter is to read a run. It hands its own requests down; those that the backing would
    /// refuse are read by us.
    pub(super) fn kind_to_read(
        &self,
        mapping: ShallowMapping<'_, Store>,
        run: ByteRange,
    ) -> ExtentKind {
        match self.extent_kind(mapping) {
            ExtentKind::Backing if !self.backing_takes(run) => ExtentKind::Opaque,
            kind => kind,
        }
    }

    fn backing_takes(&self, range: ByteRange) -> bool {
        self.backing().is_none_or(|backing| range.is_aligned(backing.limits().request_alignment))
    }

    pub(super) fn extent_kind(&self, mapping: ShallowMapping<'_, Store>) -> ExtentKind {
        match mapping {
            ShallowMapping::Raw { offset, .. } => {
                let file = Arc::new(Data { disk: Arc::clone(&self.disk) });
                ExtentKind::Data { file, offset }
            }
            ShallowMapping::Zero { explicit: false, .. } => match self.backing() {
                Some(_) => ExtentKind::Backing,
                None => ExtentKind::Zero { explicit: false },
            },
            ShallowMapping::Zero { .. } => ExtentKind::Zero { explicit: true },
            _ => ExtentKind::Opaque,
        }
    }

    /// Reads any part of the backing; zeros where it ends.
    async fn read_backing(&self, offset: u64, buf: Buffers) -> Result<()> {
        let Some(backing) = self.backing() else {
            buf.fill_zero();
            return Ok(());
        };
        let have = backing.size().saturating_sub(offset).min(buf.len());
        buf.slice(have, buf.len() - have).fill_zero();
        if have == 0 {
            return Ok(());
        }
        let limits = backing.limits();
        let wanted = ByteRange { offset, len: have };
        if wanted.is_aligned(limits.request_alignment) {
            return backing.read_planned(offset, buf.slice(0, have)).await;
        }
        let start = align_down(offset, limits.request_alignment);
        let end = align_up(wanted.end(), limits.request_alignment).unwrap_or(u64::MAX);
        let whole = ByteRange::between(start, end.min(backing.size()));
        let bounce = AlignedBuf::zeroed(whole.len as usize, limits.memory_alignment.max(512));
        backing.read(start, bounce.buffers()).await?;
        let part = bounce.buffers().slice(offset - start, have);
        buf.copy_from_slice(&disk::private_copy(&part, 512).to_vec());
        Ok(())
    }

    /// Reads a run that is compressed, or lies in a backing that wants other alignment.
    pub(super) async fn read_special(&self, mut offset: u64, buf: Buffers) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let want = ByteRange { offset, len: (buf.len() - done).min(MAX_RUN) };
            let (mapping, run) = self.shallow(want).await?;
            let part = buf.slice(done, run.len);
            match mapping {
                ShallowMapping::Zero { explicit: false, .. } => {
                    self.read_backing(offset, part).await?
                }
                ShallowMapping::Zero { .. } => part.fill_zero(),
                ShallowMapping::Raw { offset, .. } => self.disk.read(offset, part).await?,
                _ => {
                    let mut bytes = vec![0; run.len as usize];
                    self.image
                        .read(&mut bytes[..], offset)
                        .await
                        .context(|| format!("compressed data of {run}"))?;
                    part.copy_from_slice(&bytes);
                }
            }
            offset += run.len;
            done += run.len;
        }
        Ok(())
    }
}
