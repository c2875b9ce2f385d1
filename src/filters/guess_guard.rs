//! Keeps a guest from turning its raw image into an image of another format.
//!
//! When nobody said what format an image has and it looked like none we know, it is taken for raw.
//! A guest could then write, say, a qcow2 header whose backing file is the host's `/etc/shadow` to
//! its first sector, and the next guess would follow it. So above a *guessed* raw image stands
//! this filter: a write after which the first sector would look like a known format fails, and
//! everything else passes.
//!
//! ```text
//! plan(write beyond the first sector, any read, flush) ──► below, as it is
//! plan(write to the first sector)                      ──► NotNow
//! write(first sector …)  copy it, look at the copy, write the copy; the rest straight through
//! ```
//!
//! The copy matters: a guest may change its memory between our look and the host's read. Requests
//! are aligned to the head (512 bytes), so each write brings all of the head or none of it and
//! nothing has to be read or serialised to know what it will be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::block::Quiesced;
use crate::block::driver::{BlockStatus, Driver, Limits, Plan, PlanOp, Planned};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuf, Buffers, Fut};
use crate::units::ByteRange;

/// Length of the head, in bytes: what probes look at.
const HEAD_LEN: u64 = 512;

/// Says which known format the first bytes of a disk would be taken for.
pub type Recognise = fn(&[u8]) -> Option<String>;

/// The filter; see the module's documentation.
#[derive(Debug)]
pub struct GuessGuard {
    below: Arc<dyn Driver>,
    /// The image's name, for messages.
    name: String,
    recognise: Recognise,
    /// Whether the operator has been told; a guest could fill the log otherwise.
    told: AtomicBool,
}

impl GuessGuard {
    /// Guards `below`, which messages call `name`.
    pub fn new(below: Arc<dyn Driver>, name: impl Into<String>, recognise: Recognise) -> Self {
        GuessGuard { below, name: name.into(), recognise, told: AtomicBool::new(false) }
    }

    /// Fails if a disk that starts with `head` would be taken for something else than raw.
    fn inspect(&self, head: &[u8]) -> Result<()> {
        let Some(format) = (self.recognise)(head) else { return Ok(()) };
        let message = format!(
            "{}: the guest's write to the first sector would turn this raw image into a {format} \
             image; if that is meant, open it with -f raw",
            self.name
        );
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!("{message} (said once)");
        }
        Err(Error::new(ErrorKind::PermissionDenied, message))
    }

    async fn write_guarded(&self, buf: Buffers, fua: bool) -> Result<()> {
        let below = self.below.limits();
        // The host may want larger units than the head.
        let unit = below.request_alignment.max(HEAD_LEN).min(buf.len());
        let align = below.memory_alignment.max(HEAD_LEN as usize);
        let mut copy = AlignedBuf::zeroed(unit as usize, align);
        buf.slice(0, unit).copy_to_slice(copy.as_slice());
        self.inspect(copy.as_slice())?;
        self.below.write(0, copy.buffers(), fua).await?;
        if buf.len() > unit {
            self.below.write(unit, buf.slice(unit, buf.len() - unit), fua).await?;
        }
        Ok(())
    }
}

impl Driver for GuessGuard {
    fn name(&self) -> &'static str {
        "guess-guard"
    }

    fn limits(&self) -> Limits {
        let below = self.below.limits();
        Limits { request_alignment: below.request_alignment.max(HEAD_LEN), ..below }
    }

    fn covers(&self) -> Option<&dyn Driver> {
        Some(self.below.as_ref())
    }

    fn plan<'a>(&'a self, op: PlanOp, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        match op {
            PlanOp::Write { .. } if range.offset < HEAD_LEN => Planned::NotNow,
            _ => self.below.plan(op, range, plan),
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.below.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        if offset >= HEAD_LEN {
            return self.below.write(offset, buf, fua);
        }
        Box::pin(self.write_guarded(buf, fua))
    }

    // Zeros are nobody's magic.
    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.below.write_zeroes(range, may_unmap)
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.below.discard(range)
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        self.below.flush()
    }

    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.below.block_status(range)
    }

    fn refresh(&self, quiesced: &Quiesced) -> Result<()> {
        self.below.refresh(quiesced)
    }

    fn make_empty<'a>(&'a self, discard: bool) -> Fut<'a, ()> {
        self.below.make_empty(discard)
    }

    fn resize<'a>(&'a self, size: u64) -> Fut<'a, ()> {
        self.below.resize(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Node, NodeOptions, PlanExtent};
    use crate::formats::raw::Raw;
    use crate::io::{HostFile, OpenOptions, block_on};

    fn recognise(head: &[u8]) -> Option<String> {
        let magics = [&b"QFI\xfb"[..], b"vhdxfile", b"ADD_COW\xff"];
        magics.iter().any(|magic| head.starts_with(magic)).then(|| "an image".into())
    }

    /// A node over a guarded raw file of 64 KiB, and the file.
    fn guarded() -> (Node, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(65536).unwrap();
        let options = OpenOptions { write: true, ..Default::default() };
        let host = Arc::new(HostFile::open(file.path(), options).unwrap());
        let raw = Arc::new(Raw::open(host, false).unwrap());
        let guard = GuessGuard::new(raw, "disk.raw", recognise);
        (Node::new(Arc::new(guard), NodeOptions::default()), file)
    }

    fn sectors(start: &[u8], count: usize) -> AlignedBuf {
        let mut data = vec![0xaa; 512 * count];
        data[..start.len()].copy_from_slice(start);
        AlignedBuf::from_slice(&data, 512)
    }

    #[test]
    fn planting_a_magic_fails_and_writes_nothing() {
        let (node, file) = guarded();
        for magic in [&b"QFI\xfb\0\0\0\x03"[..], b"vhdxfile", b"ADD_COW\xff"] {
            let err = block_on(node.write(0, sectors(magic, 8).buffers(), false)).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::PermissionDenied);
            assert!(err.to_string().contains("-f raw"), "{err}");
        }
        assert!(std::fs::read(file.path()).unwrap().iter().all(|b| *b == 0));
    }

    #[test]
    fn everything_else_passes() {
        let (node, file) = guarded();
        block_on(node.write(0, sectors(b"\xeb\x63\x90boot", 8).buffers(), false)).unwrap();
        block_on(node.write(512, sectors(b"QFI\xfb\0\0\0\x03", 1).buffers(), true)).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert!(bytes.starts_with(b"\xeb\x63\x90boot"));
        assert!(bytes[512..].starts_with(b"QFI"));
        assert_eq!(bytes[4095], 0xaa);
        assert_eq!(bytes[4096], 0);
        block_on(node.write_zeroes(ByteRange { offset: 0, len: 1024 }, true)).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[..1024], [0; 1024]);
    }

    #[test]
    fn writes_smaller_than_the_head_are_not_possible() {
        let (node, _file) = guarded();
        let four = AlignedBuf::from_slice(b"QFI\xfb", 512);
        let err = block_on(node.write(0, four.buffers(), false)).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn only_writes_to_the_head_leave_the_planned_path() {
        let (node, _file) = guarded();
        let driver = node.driver();
        let plan = |op, offset| {
            let mut plan = Plan::default();
            let planned = driver.plan(op, ByteRange { offset, len: 4096 }, &mut plan);
            assert_eq!(planned == Planned::Ready, !plan.extents.is_empty());
            if let Some(PlanExtent::File { offset: at, .. }) = plan.extents.first() {
                assert_eq!(*at, offset);
            }
            planned
        };
        assert_eq!(plan(PlanOp::Write { fua: false }, 0), Planned::NotNow);
        assert_eq!(plan(PlanOp::Write { fua: false }, 512), Planned::Ready);
        assert_eq!(plan(PlanOp::Read, 0), Planned::Ready);
        assert_eq!(plan(PlanOp::Flush, 0), Planned::Ready);
    }
}
