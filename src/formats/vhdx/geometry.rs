//! Where blocks, their entries in the BAT and their sector bitmaps are.
//!
//! The entries of sector bitmaps lie between those of payload blocks: after each *chunk* of
//! payload entries comes one for the bitmap of that chunk, in images without a parent, too.
//!
//! ```text
//! BAT:  payload 0 … payload r-1 │ bitmap 0 │ payload r … payload 2r-1 │ bitmap 1 │ …
//! r = chunk ratio = 2^23 sectors of a bitmap block / sectors of a payload block
//! ```

use super::layout::{MAX_DISK_SIZE, SECTORS_PER_BITMAP};
use super::metadata::Metadata;
use crate::units::ByteRange;

/// The sizes that everything follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk.
    pub disk_size: u64,
    /// The block size is 1 << this.
    pub block_shift: u32,
    /// The logical sector size is 1 << this.
    pub sector_shift: u32,
    /// The chunk ratio is 1 << this.
    pub chunk_shift: u32,
    /// Whether there is a parent.
    pub has_parent: bool,
}

impl Geometry {
    /// As the metadata says, whose numbers have been checked.
    pub fn new(metadata: &Metadata) -> Geometry {
        let (disk_size, has_parent) = (metadata.disk_size, metadata.parent.is_some());
        Geometry::of(disk_size, metadata.block_size, metadata.logical_sector, has_parent)
    }

    /// Of legal sizes.
    pub fn of(disk_size: u64, block_size: u64, sector_size: u64, has_parent: bool) -> Geometry {
        debug_assert!(disk_size <= MAX_DISK_SIZE && disk_size > 0);
        let chunk_ratio = SECTORS_PER_BITMAP * sector_size / block_size;
        Geometry {
            disk_size,
            block_shift: block_size.trailing_zeros(),
            sector_shift: sector_size.trailing_zeros(),
            chunk_shift: chunk_ratio.trailing_zeros(),
            has_parent,
        }
    }

    /// Size of a payload block.
    pub fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Size of a logical sector.
    pub fn sector_size(&self) -> u64 {
        1 << self.sector_shift
    }

    /// How many payload blocks share a sector bitmap block.
    pub fn chunk_ratio(&self) -> u64 {
        1 << self.chunk_shift
    }

    /// How many sectors a payload block has.
    pub fn sectors_per_block(&self) -> u64 {
        1 << (self.block_shift - self.sector_shift)
    }

    /// How many payload blocks the disk has.
    pub fn payload_blocks(&self) -> u64 {
        self.disk_size.div_ceil(self.block_size())
    }

    /// How many chunks the disk has.
    pub fn chunks(&self) -> u64 {
        self.payload_blocks().div_ceil(self.chunk_ratio())
    }

    /// How many entries the BAT needs.
    pub fn bat_entries(&self) -> u64 {
        match self.has_parent {
            true => self.chunks() * (self.chunk_ratio() + 1),
            false => self.payload_blocks() + (self.payload_blocks() - 1) / self.chunk_ratio(),
        }
    }

    /// The payload block at an offset of the disk.
    pub fn block_of(&self, offset: u64) -> u64 {
        offset >> self.block_shift
    }

    /// Offset of the disk within its block.
    pub fn within_block(&self, offset: u64) -> u64 {
        offset & (self.block_size() - 1)
    }

    /// The part of the disk that a payload block holds; the last one may end with the disk.
    pub fn block_range(&self, block: u64) -> ByteRange {
        let start = block << self.block_shift;
        ByteRange::between(start, (start + self.block_size()).min(self.disk_size))
    }

    /// The part of the disk that a chunk's blocks hold.
    pub fn chunk_range(&self, chunk: u64) -> ByteRange {
        let first = self.block_range(chunk << self.chunk_shift);
        let last = ((chunk + 1) << self.chunk_shift).min(self.payload_blocks()) - 1;
        ByteRange::between(first.offset, self.block_range(last).end())
    }

    /// Index in the BAT of a payload block.
    pub fn payload_index(&self, block: u64) -> u64 {
        block + (block >> self.chunk_shift)
    }

    /// The chunk that a payload block is in.
    pub fn chunk_of(&self, block: u64) -> u64 {
        block >> self.chunk_shift
    }

    /// Index in the BAT of a chunk's sector bitmap.
    pub fn bitmap_index(&self, chunk: u64) -> u64 {
        (chunk + 1) * (self.chunk_ratio() + 1) - 1
    }

    /// What an index of the BAT stands for.
    pub fn slot(&self, index: u64) -> Slot {
        let (chunk, within) = (index / (self.chunk_ratio() + 1), index % (self.chunk_ratio() + 1));
        match within == self.chunk_ratio() {
            true => Slot::Bitmap(chunk),
            false => Slot::Payload((chunk << self.chunk_shift) + within),
        }
    }

    /// The bit in its chunk's bitmap that stands for the first sector of a payload block.
    pub fn first_bit(&self, block: u64) -> u64 {
        (block & (self.chunk_ratio() - 1)) * self.sectors_per_block()
    }
}

/// What an entry of the BAT is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// A payload block, by number.
    Payload(u64),
    /// The sector bitmap of a chunk, by number.
    Bitmap(u64),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GIB, MIB, TIB};

    #[test]
    fn bitmaps_lie_between_payload_entries() {
        // Example C of the specification's sheet: 5 GiB in blocks of 256 MiB.
        let disk = Geometry::of(5 * GIB, 256 * MIB, 512, false);
        assert_eq!(disk.chunk_ratio(), 16);
        let indices: Vec<_> = [15, 16, 19].map(|block| disk.payload_index(block)).to_vec();
        assert_eq!(indices, [15, 17, 20]);
        assert_eq!(disk.slot(16), Slot::Bitmap(0));
        assert_eq!(disk.bat_entries(), 21);
        for block in 0..20 {
            assert_eq!(disk.slot(disk.payload_index(block)), Slot::Payload(block));
        }
    }

    #[test]
    fn differencing_images_have_all_their_bitmaps() {
        // Example D.
        let disk = Geometry::of(3 * MIB, MIB, 512, true);
        assert_eq!((disk.chunk_ratio(), disk.bat_entries()), (4096, 4097));
        assert_eq!(disk.bitmap_index(0), 4096);
        let disk = Geometry::of(4 * MIB, MIB, 4096, false);
        assert_eq!((disk.chunk_ratio(), disk.bat_entries()), (32768, 4));
    }

    #[test]
    fn the_largest_disk_fits_its_numbers() {
        let disk = Geometry::of(64 * TIB, MIB, 512, true);
        assert_eq!(disk.bat_entries(), (64 << 20) + (16 << 10));
        assert_eq!(disk.first_bit(4095), 4095 * 2048);
        assert_eq!(disk.block_range(disk.payload_blocks() - 1).end(), 64 * TIB);
    }
}
