//! Reads and writes of metadata, in memory that O_DIRECT accepts.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::{AlignedBuf, File};

/// Alignment of memory that every host accepts.
const MEMORY: usize = 4096;
/// The most bytes that are written at once.
const MOST: usize = 1 << 20;

/// Memory for `len` bytes of metadata.
pub fn memory(len: u64) -> AlignedBuf {
    AlignedBuf::zeroed(len as usize, MEMORY)
}

/// Reads `len` bytes at `offset`; both must be multiples of 4 KiB.
pub async fn read(file: &Arc<dyn File>, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut buf = memory(len);
    file.read(offset, buf.buffers()).await?;
    Ok(buf.as_slice().to_vec())
}

/// Writes `bytes` at `offset`; both must be multiples of 4 KiB.
///
/// # Errors
/// The host's. One that only had no room says so ([`Error::lost_nothing_if_full`]): the file may be
/// sparse, and who writes the same again loses nothing.
pub async fn write(file: &Arc<dyn File>, offset: u64, bytes: &[u8]) -> Result<()> {
    let buf = AlignedBuf::from_slice(bytes, MEMORY);
    file.write(offset, buf.buffers(), false).await.map_err(Error::lost_nothing_if_full)
}

/// Writes pages, sorted by their offset; those that lie side by side together.
pub async fn write_pages(
    file: &Arc<dyn File>,
    pages: impl Iterator<Item = (u64, &[u8])>,
) -> Result<()> {
    let (mut start, mut run) = (0, Vec::new());
    for (offset, page) in pages {
        if offset != start + run.len() as u64 || run.len() + page.len() > MOST {
            if !run.is_empty() {
                write(file, start, &run).await?;
            }
            start = offset;
            run.clear();
        }
        run.extend_from_slice(page);
    }
    match run.is_empty() {
        true => Ok(()),
        false => write(file, start, &run).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use crate::io::sim::SimFile;

    #[test]
    fn pages_get_to_their_places() {
        let sim = SimFile::from_bytes("pages", vec![0; 4 << 20]);
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let page_of = |at: u64| vec![(at >> 12) as u8 | 1; 4096];
        // A run longer than what is written at once, a gap, one alone.
        let places: Vec<u64> = (3..300).chain([310, 311, 900]).map(|page| page << 12).collect();
        let pages: Vec<(u64, Vec<u8>)> = places.iter().map(|at| (*at, page_of(*at))).collect();
        let pages = pages.iter().map(|(at, page)| (*at, page.as_slice()));
        block_on(write_pages(&file, pages)).unwrap();
        block_on(write_pages(&file, std::iter::empty())).unwrap();
        for (number, page) in sim.volatile().chunks(4096).enumerate() {
            let at = (number as u64) << 12;
            let expected = if places.contains(&at) { page_of(at) } else { vec![0; 4096] };
            assert!(page == expected, "page {number}");
        }
    }
}
