//! The pattern that proves end-to-end integrity.
//!
//! Each sector of 512 bytes begins with its own offset on the disk and the generation of the write
//! that put it there; the rest is a mix of both, so that a torn, shifted, stale or foreign sector
//! cannot pass. A [`Ledger`] knows the generation that each block of a queue must have. Queues own
//! disjoint blocks, and a block with a request in flight is left alone, so what a read must return
//! is always one known generation.

use std::fmt;

use crate::units::SECTOR_SIZE;

/// Words of a sector.
const WORDS: usize = SECTOR_SIZE as usize / 8;
/// Marks a block with a request in flight.
const BUSY: u32 = 1 << 31;

/// Mixes a number so that neighbours look unrelated.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The words of a sector: its place, its generation, and a mix of both.
fn sector_word(seed: u64, place: u64, generation: u32, index: usize) -> u64 {
    match index {
        0 => place,
        1 => u64::from(generation),
        _ => mix(seed ^ place ^ u64::from(generation) << 40 ^ (index as u64) << 1),
    }
}

/// Fills a block that lies at `offset` on the disk.
pub fn fill(block: &mut [u8], seed: u64, offset: u64, generation: u32) {
    for (number, sector) in block.chunks_exact_mut(SECTOR_SIZE as usize).enumerate() {
        let place = offset + number as u64 * SECTOR_SIZE;
        for (index, word) in sector.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&sector_word(seed, place, generation, index).to_le_bytes());
        }
    }
}

/// A sector that is not what was written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Where the sector lies on the disk.
    pub offset: u64,
    /// Generation that was written.
    pub expected: u32,
    /// The place and generation that the sector names.
    pub found: (u64, u64),
    /// Bytes that differ.
    pub bytes: usize,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sector at {}: generation {} was written, found {} bytes of something else, \
             which begins like generation {} of offset {}",
            self.offset, self.expected, self.bytes, self.found.1, self.found.0
        )
    }
}

/// Checks a block; the first wrong sector.
pub fn check(block: &[u8], seed: u64, offset: u64, generation: u32) -> Option<Mismatch> {
    let mut expected = [0; WORDS * 8];
    for (number, sector) in block.chunks_exact(SECTOR_SIZE as usize).enumerate() {
        let place = offset + number as u64 * SECTOR_SIZE;
        fill(&mut expected, seed, place, generation);
        if sector != expected {
            let word =
                |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
            return Some(Mismatch {
                offset: place,
                expected: generation,
                found: (word(0), word(8)),
                bytes: sector.iter().zip(&expected).filter(|(a, b)| a != b).count(),
            });
        }
    }
    None
}

/// What each block of one queue must hold.
#[derive(Debug)]
pub struct Ledger {
    /// Generation of each block, 0 if never written; [`BUSY`] while a request is in flight.
    blocks: Vec<u32>,
    /// Generation of the next write.
    next: u32,
}

impl Ledger {
    /// Most blocks that a ledger keeps (a quarter of a gigabyte).
    pub const MAX_BLOCKS: u64 = 64 << 20;

    /// A ledger of blocks that were never written.
    pub fn new(blocks: u64) -> Self {
        Ledger { blocks: vec![0; blocks as usize], next: 1 }
    }

    /// Number of blocks.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The first block from `block` on, around the end, without a request in flight. There must be
    /// more blocks than requests.
    pub fn free_from(&self, block: u64) -> u64 {
        let mut block = block;
        while self.blocks[block as usize] & BUSY != 0 {
            block = (block + 1) % self.len();
        }
        block
    }

    /// Marks a block as being read and returns the generation to expect, 0 for anything.
    pub fn begin_read(&mut self, block: u64) -> u32 {
        let generation = self.blocks[block as usize];
        self.blocks[block as usize] |= BUSY;
        generation
    }

    /// Marks a block as being written and returns the generation to write.
    pub fn begin_write(&mut self, block: u64) -> u32 {
        let generation = self.next;
        // 31 bits of generations; 0 means "never written".
        self.next = if self.next + 1 == BUSY { 1 } else { self.next + 1 };
        self.blocks[block as usize] |= BUSY;
        generation
    }

    /// Ends a read, or a write of `generation`. A write that failed leaves the block unknown (0).
    pub fn end(&mut self, block: u64, generation: u32) {
        self.blocks[block as usize] = generation;
    }

    /// The next block at or after `block` whose content is known, with its generation.
    pub fn next_known(&self, block: u64) -> Option<(u64, u32)> {
        let tail = self.blocks.get(block as usize..)?;
        let at = tail.iter().position(|generation| *generation != 0)?;
        Some((block + at as u64, tail[at]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_knows_its_place_and_generation() {
        let mut block = vec![0; 4096];
        fill(&mut block, 7, 8192, 3);
        assert_eq!(check(&block, 7, 8192, 3), None);
        let wrong = check(&block, 7, 8192, 4).unwrap();
        assert_eq!((wrong.offset, wrong.expected, wrong.found), (8192, 4, (8192, 3)));
        assert!(check(&block, 7, 0, 3).is_some());
        assert!(check(&block, 8, 8192, 3).is_some());
        block[4095] ^= 1;
        let wrong = check(&block, 7, 8192, 3).unwrap();
        assert_eq!((wrong.offset, wrong.bytes), (8192 + 3584, 1));
    }

    #[test]
    fn blocks_in_flight_are_left_alone() {
        let mut ledger = Ledger::new(3);
        assert_eq!(ledger.begin_write(1), 1);
        assert_eq!(ledger.free_from(1), 2);
        assert_eq!(ledger.begin_read(2), 0);
        assert_eq!(ledger.free_from(1), 0);
        ledger.end(1, 1);
        ledger.end(2, 0);
        assert_eq!(ledger.begin_read(1), 1);
        ledger.end(1, 1);
        assert_eq!(ledger.next_known(0), Some((1, 1)));
        assert_eq!(ledger.next_known(2), None);
        assert_eq!(ledger.next_known(3), None);
    }
}
