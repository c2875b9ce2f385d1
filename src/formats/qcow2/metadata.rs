//! An image of which only the metadata is wanted.
//!
//! `info` and `check` must work on images that nobody can serve: encrypted, with features unknown
//! here, corrupt. So they see the header through this driver, and imago never sees the file.

use std::sync::Arc;

use super::{BLOCK, Header, bitmaps, snapshots};
use crate::block::{BlockStatus, Driver, Limits};
use crate::error::{Error, Result, ResultExt};
use crate::io::{Buffers, File, Fut};
use crate::units::ByteRange;

/// What an image has besides its disk, as `info` tells it.
#[derive(Debug, Default)]
pub(super) struct Listed {
    snapshots: Vec<serde_json::Value>,
    bitmaps: Vec<serde_json::Value>,
}

impl Listed {
    pub async fn read(file: &Arc<dyn File>, header: &Header) -> Result<Listed> {
        let (snapshots, _) = match header.snapshots {
            0 => Default::default(),
            _ => snapshots::read(file, header).await?,
        };
        let bitmaps = bitmaps::read(file, header).await?;
        let snapshots = snapshots.into_iter().map(|snapshot| snapshot.info).collect();
        Ok(Listed { snapshots, bitmaps })
    }

    /// Adds it to an image's details. The bitmaps are told as long as they are `current`.
    pub fn tell(&self, current: bool, details: &mut serde_json::Value) {
        if !self.snapshots.is_empty() {
            details["snapshots"] = self.snapshots.clone().into();
        }
        if current && !self.bitmaps.is_empty() {
            details["bitmaps"] = self.bitmaps.clone().into();
        }
    }
}

/// The metadata of an image. Reads and writes fail.
#[derive(Debug)]
pub struct Metadata {
    file: Arc<dyn File>,
    header: Header,
    details: serde_json::Value,
}

impl Metadata {
    /// Reads what `info` tells.
    ///
    /// # Errors
    /// Names the file and what cannot be understood.
    pub async fn open(file: Arc<dyn File>) -> Result<Metadata> {
        let header = Header::read(&file).await?;
        let mut details = header.details();
        let listed = Listed::read(&file, &header).await.context(|| file.name().to_string())?;
        listed.tell(true, &mut details);
        Ok(Metadata { file, header, details })
    }

    fn refuse<T: 'static>(&self) -> Fut<'_, T> {
        Box::pin(async {
            let name = self.file.name();
            Err(Error::invalid(format!("{name}: was opened for a look at its metadata only")))
        })
    }
}

impl Driver for Metadata {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn limits(&self) -> Limits {
        Limits {
            size: self.header.size,
            request_alignment: BLOCK,
            memory_alignment: 1,
            optimal_io: self.header.cluster_size(),
            discard_granularity: 0,
            read_only: true,
        }
    }

    fn read<'a>(&'a self, _offset: u64, _buf: Buffers) -> Fut<'a, ()> {
        self.refuse()
    }

    fn write<'a>(&'a self, _offset: u64, _buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        self.refuse()
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        self.refuse()
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        self.refuse()
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn block_status<'a>(&'a self, _range: ByteRange) -> Fut<'a, BlockStatus> {
        self.refuse()
    }

    fn details(&self) -> serde_json::Value {
        self.details.clone()
    }
}
