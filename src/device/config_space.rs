//! The config space: `struct virtio_blk_config` as bytes.
//!
//! Front-ends read it in one piece of 36, 57 or 60 bytes, at offset 0 or (older Cloud Hypervisor)
//! at 0x100, and want exactly as many bytes back as they asked for. The only byte a guest can write
//! is the write cache's.

use std::mem::offset_of;

use virtio_bindings::virtio_blk::virtio_blk_config as Layout;

use super::features::{MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::error::{Error, Result};
use crate::units::SECTOR_SIZE;

/// The bytes we fill: up to and with `write_zeroes_may_unmap` and its padding.
const LEN: usize = offset_of!(Layout, max_secure_erase_sectors);
/// Where the write cache byte is.
const WCE_OFFSET: usize = offset_of!(Layout, wce);
/// Older Cloud Hypervisor counts from where a virtio-mmio device has its config space.
const MMIO_OFFSET: u32 = 0x100;
/// Longest read of the config space in one message (the protocol's own limit).
const MAX_READ: u32 = 0x1000;

const _: () = assert!(LEN == 60 && WCE_OFFSET == 32);

/// Sectors in one segment of a discard or write-zeroes request: 2 GiB less a page, in one go.
pub const MAX_RANGE_SECTORS: u32 = (0x7fff_f000 / SECTOR_SIZE) as u32;
/// Segments in one discard or write-zeroes request.
pub const MAX_RANGE_SEGMENTS: u32 = 32;
/// Most data segments in one read or write that can be announced: what a ring of the largest size
/// carries beside header and status. Announce no more than the ring's size less two, or guests
/// without indirect descriptors build chains that do not fit.
pub const MAX_DATA_SEGMENTS: u32 = MAX_QUEUE_SIZE as u32 - 2;

/// What the config space is made from. Lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigParams {
    /// Size of the disk.
    pub capacity: u64,
    /// Logical block size, 512 or 4096.
    pub block_size: u32,
    /// Physical block size: what the host writes without reading. A power of two, at least the
    /// logical one.
    pub physical_block_size: u32,
    /// Smallest efficient request; 0 if unknown.
    pub min_io: u64,
    /// Best request size; 0 if unknown.
    pub opt_io: u64,
    /// Data segments in one request.
    pub seg_max: u32,
    /// Number of queues.
    pub num_queues: u16,
    /// Granularity of discards; 0 if unknown.
    pub discard_granularity: u64,
    /// Whether write-zeroes with the unmap flag gives space back.
    pub may_unmap: bool,
    /// Whether the write cache starts as writeback.
    pub writeback: bool,
}

/// The config space of one device.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; LEN],
}

impl ConfigSpace {
    /// Makes the config space. The limits of discard and write-zeroes are always set and never
    /// zero (Windows crashes on zeros).
    pub fn new(params: &ConfigParams) -> ConfigSpace {
        let block = u64::from(params.block_size);
        debug_assert!(block.is_power_of_two() && block >= SECTOR_SIZE);
        let blocks = |bytes: u64| bytes / block;
        let physical = u64::from(params.physical_block_size).max(block);
        let discard_sectors =
            params.discard_granularity.max(block).min(u64::from(MAX_RANGE_SECTORS)) / SECTOR_SIZE;
        let mut space = ConfigSpace { bytes: [0; LEN] };
        space.set_capacity(params.capacity);
        let seg_max = params.seg_max.clamp(1, MAX_DATA_SEGMENTS);
        space.put(offset_of!(Layout, seg_max), &seg_max.to_le_bytes());
        space.put(offset_of!(Layout, blk_size), &params.block_size.to_le_bytes());
        let exponent = (physical / block).max(1).ilog2() as u8;
        space.put(offset_of!(Layout, physical_block_exp), &[exponent]);
        let min_io = u16::try_from(blocks(params.min_io)).unwrap_or(u16::MAX);
        space.put(offset_of!(Layout, min_io_size), &min_io.to_le_bytes());
        let opt_io = u32::try_from(blocks(params.opt_io)).unwrap_or(u32::MAX);
        space.put(offset_of!(Layout, opt_io_size), &opt_io.to_le_bytes());
        space.put(WCE_OFFSET, &[params.writeback.into()]);
        let num_queues = params.num_queues.clamp(1, MAX_QUEUES);
        space.put(offset_of!(Layout, num_queues), &num_queues.to_le_bytes());
        for (offset, value) in [
            (offset_of!(Layout, max_discard_sectors), MAX_RANGE_SECTORS),
            (offset_of!(Layout, max_discard_seg), MAX_RANGE_SEGMENTS),
            (offset_of!(Layout, discard_sector_alignment), discard_sectors.max(1) as u32),
            (offset_of!(Layout, max_write_zeroes_sectors), MAX_RANGE_SECTORS),
            (offset_of!(Layout, max_write_zeroes_seg), MAX_RANGE_SEGMENTS),
        ] {
            space.put(offset, &value.to_le_bytes());
        }
        space.put(offset_of!(Layout, write_zeroes_may_unmap), &[params.may_unmap.into()]);
        space
    }

    fn put(&mut self, offset: usize, value: &[u8]) {
        self.bytes[offset..offset + value.len()].copy_from_slice(value);
    }

    /// Sets the size of the disk, in bytes; a last half sector is left out.
    pub fn set_capacity(&mut self, capacity: u64) {
        self.put(offset_of!(Layout, capacity), &(capacity / SECTOR_SIZE).to_le_bytes());
    }

    /// Whether the write cache is on.
    pub fn writeback(&self) -> bool {
        self.bytes[WCE_OFFSET] != 0
    }

    /// Sets the write cache byte.
    pub fn set_writeback(&mut self, on: bool) {
        self.bytes[WCE_OFFSET] = on.into();
    }

    /// Exactly `size` bytes from `offset`, zeros beyond what there is. Refused only if longer than
    /// a message can be.
    pub fn read(&self, offset: u32, size: u32) -> Result<Vec<u8>> {
        if size > MAX_READ {
            return Err(Error::invalid(format!("config space read of {size} bytes")));
        }
        let mut out = vec![0; size as usize];
        let have = self.bytes.get(real_offset(offset)..).unwrap_or_default();
        let n = have.len().min(out.len());
        out[..n].copy_from_slice(&have[..n]);
        Ok(out)
    }

    /// A guest's write, which can only be the write cache byte. Returns whether the cache is to be
    /// on; the config space shows it from now on.
    pub fn write(&mut self, offset: u32, bytes: &[u8]) -> Result<bool> {
        match (real_offset(offset), bytes) {
            (WCE_OFFSET, [value @ (0 | 1)]) => {
                self.set_writeback(*value == 1);
                Ok(self.writeback())
            }
            (WCE_OFFSET, [value]) => {
                Err(Error::invalid(format!("write cache set to {value}, neither 0 nor 1")))
            }
            _ => Err(Error::invalid(format!(
                "config space write of {} bytes at {offset}: only the byte at {WCE_OFFSET} can be written",
                bytes.len()
            ))),
        }
    }
}

/// The offset counted from the start of `struct virtio_blk_config`, whichever way it was counted.
fn real_offset(offset: u32) -> usize {
    offset.checked_sub(MMIO_OFFSET).unwrap_or(offset) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> ConfigParams {
        ConfigParams {
            capacity: 0x1234_5678 * 512,
            block_size: 512,
            physical_block_size: 4096,
            min_io: 4096,
            opt_io: 1 << 20,
            seg_max: 254,
            num_queues: 4,
            discard_granularity: 4096,
            may_unmap: true,
            writeback: true,
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn fields_are_where_the_spec_has_them() {
        let bytes = ConfigSpace::new(&params()).read(0, 60).unwrap();
        assert_eq!(bytes[..8], 0x1234_5678u64.to_le_bytes());
        assert_eq!(u32_at(&bytes, 8), 0, "size_max is not offered");
        assert_eq!(u32_at(&bytes, 12), 254);
        assert_eq!(u32_at(&bytes, 20), 512);
        assert_eq!((bytes[24], bytes[25]), (3, 0));
        assert_eq!(bytes[26..28], [8, 0]);
        assert_eq!(u32_at(&bytes, 28), 2048);
        assert_eq!((bytes[32], bytes[33]), (1, 0));
        assert_eq!(bytes[34..36], [4, 0]);
        assert_eq!(u32_at(&bytes, 36), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(&bytes, 40), 32);
        assert_eq!(u32_at(&bytes, 44), 8);
        assert_eq!(u32_at(&bytes, 48), MAX_RANGE_SECTORS);
        assert_eq!(u32_at(&bytes, 52), 32);
        assert_eq!(bytes[56], 1);
    }

    #[test]
    fn limits_of_ranges_are_never_zero() {
        let bare = ConfigParams {
            discard_granularity: 0,
            min_io: 0,
            opt_io: 0,
            seg_max: 0,
            num_queues: 0,
            physical_block_size: 0,
            ..params()
        };
        let bytes = ConfigSpace::new(&bare).read(0, 60).unwrap();
        for at in [12, 36, 40, 44, 48, 52] {
            assert_ne!(u32_at(&bytes, at), 0, "at {at}");
        }
        assert_eq!(bytes[24], 0);
        assert_eq!(bytes[34], 1);
    }

    #[test]
    fn sizes_in_blocks_of_4096() {
        let native = ConfigParams { block_size: 4096, opt_io: u64::MAX, ..params() };
        let bytes = ConfigSpace::new(&native).read(0, 60).unwrap();
        assert_eq!(u32_at(&bytes, 20), 4096);
        assert_eq!(bytes[24], 0);
        assert_eq!(bytes[26], 1);
        assert_eq!(u32_at(&bytes, 28), u32::MAX);
        assert_eq!(u32_at(&bytes, 44), 8);
    }

    #[test]
    fn reads_are_exactly_as_long_as_asked() {
        let space = ConfigSpace::new(&params());
        let whole = space.read(0, 60).unwrap();
        for size in [0, 1, 36, 57, 60, 64, 256, 0x1000] {
            let got = space.read(0, size).unwrap();
            assert_eq!(got.len(), size as usize);
            let n = got.len().min(60);
            assert_eq!(got[..n], whole[..n]);
            assert!(got[n..].iter().all(|b| *b == 0));
            assert_eq!(space.read(0x100, size).unwrap(), got);
        }
        assert_eq!(space.read(32, 1).unwrap(), [1]);
        assert_eq!(space.read(0x120, 1).unwrap(), [1]);
        assert_eq!(space.read(58, 4).unwrap(), [0; 4]);
        assert_eq!(space.read(u32::MAX, 4).unwrap(), [0; 4]);
        assert!(space.read(0, 0x1001).is_err());
    }

    #[test]
    fn only_the_write_cache_can_be_written() {
        let mut space = ConfigSpace::new(&params());
        assert!(!space.write(32, &[0]).unwrap());
        assert!(!space.writeback());
        assert!(space.write(0x120, &[1]).unwrap());
        assert!(space.writeback());
        for (offset, bytes) in
            [(32, &[1, 0][..]), (32, &[]), (31, &[1]), (33, &[1]), (0, &[1]), (32, &[2])]
        {
            assert!(space.write(offset, bytes).is_err());
        }
        assert!(space.writeback());
        space.set_capacity(1 << 40);
        assert_eq!(space.read(0, 8).unwrap(), ((1u64 << 40) / 512).to_le_bytes());
    }
}
