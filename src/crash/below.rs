//! Reads of what states are made of: the base, and the log.
//!
//! The pieces of a state end where writes do, and torn ones end anywhere; the base may be read in whole
//! blocks only (a disk with large sectors, O_DIRECT), and so may the log. What is smaller is read with what is
//! around it, and copied.

use crate::block::Node;
use crate::error::Result;
use crate::io::{AlignedBuf, Buffers};
use crate::units::{ByteRange, MIB, align_down, align_up};
use crate::write_log::Log;

/// How much is read and copied at a time, in bytes.
const BOUNCE: u64 = MIB;

/// Whether a piece of the base can be read as it is.
pub(super) fn is_whole(base: &Node, piece: ByteRange) -> bool {
    piece.is_aligned(base.limits().request_alignment)
}

/// Whether a piece of the log can be read as it is.
pub(super) fn is_whole_in(log: &Log, piece: ByteRange) -> bool {
    piece.is_aligned(log.file().alignment().request)
}

/// Reads a piece of the base.
pub(super) async fn read_base(base: &Node, offset: u64, buf: Buffers) -> Result<()> {
    let piece = ByteRange { offset, len: buf.len() };
    if is_whole(base, piece) {
        return base.read(offset, buf).await;
    }
    let limits = base.limits();
    for part in parts(piece) {
        let end = align_up(part.end(), limits.request_alignment).unwrap_or(part.end());
        let start = align_down(part.offset, limits.request_alignment);
        let around = ByteRange::between(start, end.min(base.size()));
        let mut read = AlignedBuf::zeroed(around.len as usize, limits.memory_alignment.max(512));
        base.read(around.offset, read.buffers()).await?;
        let skipped = (part.offset - around.offset) as usize;
        let bytes = &read.as_slice()[skipped..skipped + part.len as usize];
        buf.slice(part.offset - offset, part.len).copy_from_slice(bytes);
    }
    Ok(())
}

/// Reads a piece of the log, by its place in the file.
pub(super) async fn read_log(log: &Log, position: u64, buf: Buffers) -> Result<()> {
    let piece = ByteRange { offset: position, len: buf.len() };
    if is_whole_in(log, piece) {
        return log.file().read(position, buf).await;
    }
    for part in parts(piece) {
        let bytes = log.read_bytes(part).await?;
        buf.slice(part.offset - position, part.len).copy_from_slice(&bytes);
    }
    Ok(())
}

fn parts(piece: ByteRange) -> impl Iterator<Item = ByteRange> {
    let starts = (piece.offset..piece.end()).step_by(BOUNCE as usize);
    starts.map(move |start| ByteRange::between(start, piece.end().min(start + BOUNCE)))
}
