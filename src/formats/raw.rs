//! The raw format: the disk is the file, byte for byte.
//!
//! Every read, write and flush is planned: offset in, offset out. The file's size is read once;
//! it changes by [`Driver::resize`] or when the operator asks to look again. A size that is not a
//! multiple of the guest's block size is refused when the disk is opened for a guest, so nothing
//! here rounds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::Quiesced;
use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned, StatusKind};
use crate::block::format::plan_file;
use crate::error::Result;
use crate::io::{Buffers, File, Fut};
use crate::units::ByteRange;

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: Arc<dyn File>,
    /// Size of the disk in bytes.
    size: AtomicU64,
    read_only: bool,
    name: &'static str,
}

impl Raw {
    /// A disk of all of `file`.
    pub fn open(file: Arc<dyn File>, read_only: bool) -> Result<Raw> {
        let size = AtomicU64::new(file.len()?);
        Ok(Raw { file, size, read_only, name: "raw" })
    }

    /// The same as a node of its own that stands for the file: `name` is `file` or `host_device`.
    pub fn protocol(file: Arc<dyn File>, read_only: bool, name: &'static str) -> Result<Raw> {
        Ok(Raw { name, ..Raw::open(file, read_only)? })
    }

    /// The file below.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        self.name
    }

    fn limits(&self) -> Limits {
        let alignment = self.file.alignment();
        let host = self.file.as_host();
        Limits {
            size: self.size.load(Ordering::Acquire),
            request_alignment: alignment.request,
            memory_alignment: alignment.memory,
            optimal_io: host.map_or(0, |h| h.preferred_io_size()),
            discard_granularity: host.map_or(512, |h| h.discard_granularity()),
            read_only: self.read_only,
        }
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        let _ = op;
        plan_file(plan, &self.file, range.offset, range.len)
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.file.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        self.file.write(offset, buf, fua)
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.file.write_zeroes(range, may_unmap)
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.file.discard(range)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        self.file.flush()
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(async move {
            let hole = self.file.hole_at(range.offset)?;
            let kind = if hole.is_hole { StatusKind::Zero } else { StatusKind::Data };
            Ok(BlockStatus {
                range: hole.range.intersect(&range),
                kind,
                host: Some((self.file.name().to_string(), range.offset)),
                depth: 0,
                compressed: false,
            })
        })
    }

    fn refresh(&self, _quiesced: &Quiesced) -> Result<()> {
        self.size.store(self.file.len()?, Ordering::Release);
        Ok(())
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        Box::pin(async move {
            self.file.set_len(size).await?;
            self.size.store(size, Ordering::Release);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::io::{HostFile, OpenOptions, block_on};

    #[test]
    fn a_file_that_was_truncated_has_no_status_beyond_its_end() {
        let there = tempfile::NamedTempFile::new().unwrap();
        there.as_file().set_len(1 << 20).unwrap();
        let file = HostFile::open(there.path(), OpenOptions::default()).unwrap();
        let disk = Raw::open(Arc::new(file), true).unwrap();
        there.as_file().set_len(4096).unwrap();
        let status = |offset| block_on(disk.block_status(ByteRange::between(offset, 1 << 20)));
        assert_eq!(status(0).unwrap().range.len, 4096);
        // An empty run would be asked about for ever.
        for offset in [4096, 8192] {
            let err = status(offset).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::OutOfRange);
            assert!(err.to_string().contains("truncated by another program"), "{err}");
        }
    }
}
