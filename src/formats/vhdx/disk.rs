//! Reads and writes of metadata, in memory that O_DIRECT accepts.

use std::sync::Arc;

use crate::error::Result;
use crate::io::{AlignedBuf, File};

/// Alignment of memory that every host accepts.
const MEMORY: usize = 4096;

/// Reads `len` bytes at `offset`; both must be multiples of 4 KiB.
pub async fn read(file: &Arc<dyn File>, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut buf = AlignedBuf::zeroed(len as usize, MEMORY);
    file.read(offset, buf.buffers()).await?;
    Ok(buf.as_slice().to_vec())
}

/// Writes `bytes` at `offset`; both must be multiples of 4 KiB.
pub async fn write(file: &Arc<dyn File>, offset: u64, bytes: &[u8]) -> Result<()> {
    let buf = AlignedBuf::from_slice(bytes, MEMORY);
    file.write(offset, buf.buffers(), false).await
}
