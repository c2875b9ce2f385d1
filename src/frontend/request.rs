//! virtio-blk requests and the device's configuration space.
//!
//! A request is a stream of bytes that the device reads (a 16-byte header, then data to be
//! written) and one that it writes (data read, then a status byte). How the streams are cut into
//! descriptors is the driver's affair, and [`Layout`] cuts them anywhere.

use super::ring::Segment;
use crate::error::{Error, Result};
use crate::units::SECTOR_SIZE;

/// Types of requests.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Read the serial number.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status: done.
pub const STATUS_OK: u8 = 0;
/// Status: failed.
pub const STATUS_IOERR: u8 = 1;
/// Status: no such request.
pub const STATUS_UNSUPP: u8 = 2;
/// What the status byte holds before the device wrote it; no legal status.
pub const STATUS_UNTOUCHED: u8 = 0xee;
/// Bytes of a request's header.
pub const HEADER_LEN: u32 = 16;
/// Bytes of a serial number.
pub const ID_LEN: u32 = 20;
/// Flag of a range of WRITE_ZEROES: the space may be given back.
pub const UNMAP: u32 = 1;

/// The header of a request.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN as usize] {
    let mut bytes = [0; HEADER_LEN as usize];
    bytes[0..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A request: what the header says and the data that goes out or comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Type, one of [`kind`] or anything else.
    pub kind: u32,
    /// First sector, in units of 512 bytes.
    pub sector: u64,
    /// Data the device reads.
    pub out: Vec<u8>,
    /// Bytes of data the device writes.
    pub receive: u32,
}

impl Request {
    /// A request without data.
    fn bare(kind: u32, sector: u64) -> Self {
        Request { kind, sector, out: Vec::new(), receive: 0 }
    }

    /// Reads `len` bytes at `offset`, both multiples of 512.
    pub fn read(offset: u64, len: u32) -> Self {
        Request { receive: len, ..Request::bare(kind::IN, offset / SECTOR_SIZE) }
    }

    /// Writes `data` at `offset`, a multiple of 512.
    pub fn write(offset: u64, data: impl Into<Vec<u8>>) -> Self {
        Request { out: data.into(), ..Request::bare(kind::OUT, offset / SECTOR_SIZE) }
    }

    /// Makes completed writes durable.
    pub fn flush() -> Self {
        Request::bare(kind::FLUSH, 0)
    }

    /// Reads the serial number.
    pub fn get_id() -> Self {
        Request { receive: ID_LEN, ..Request::bare(kind::GET_ID, 0) }
    }

    /// Discards ranges of (offset, bytes).
    pub fn discard(ranges: &[(u64, u64)]) -> Self {
        Request::ranges(kind::DISCARD, ranges, 0)
    }

    /// Zeroes ranges of (offset, bytes); with `unmap` their space may be given back.
    pub fn write_zeroes(ranges: &[(u64, u64)], unmap: bool) -> Self {
        Request::ranges(kind::WRITE_ZEROES, ranges, if unmap { UNMAP } else { 0 })
    }

    /// A request whose data is a list of ranges.
    pub fn ranges(kind: u32, ranges: &[(u64, u64)], flags: u32) -> Self {
        let mut out = Vec::with_capacity(16 * ranges.len());
        for (offset, len) in ranges {
            out.extend_from_slice(&(offset / SECTOR_SIZE).to_le_bytes());
            out.extend_from_slice(&((len / SECTOR_SIZE) as u32).to_le_bytes());
            out.extend_from_slice(&flags.to_le_bytes());
        }
        Request { out, ..Request::bare(kind, 0) }
    }

    /// The bytes that the device reads: header and data.
    pub fn readable(&self) -> Vec<u8> {
        let mut bytes = header(self.kind, self.sector).to_vec();
        bytes.extend_from_slice(&self.out);
        bytes
    }

    /// How many bytes the device writes: data and status.
    pub fn writable(&self) -> u32 {
        self.receive + 1
    }
}

/// How a request is cut into descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Lengths of the first descriptors of the readable stream; the usual one is `[16]`, which
    /// puts the header alone. Zero lengths are left out.
    pub readable: Vec<u32>,
    /// Most bytes of each further descriptor.
    pub segment: u32,
    /// Whether the status byte shares the last descriptor of the data read.
    pub join_status: bool,
    /// Whether the chain goes into an indirect table.
    pub indirect: bool,
}

impl Default for Layout {
    /// Header, data, status, each in one descriptor.
    fn default() -> Self {
        Layout {
            readable: vec![HEADER_LEN],
            segment: u32::MAX,
            join_status: false,
            indirect: false,
        }
    }
}

impl Layout {
    /// The default in an indirect table.
    pub fn indirect() -> Self {
        Layout { indirect: true, ..Layout::default() }
    }

    /// Cuts the readable stream, which lies at `out`, and the writable one, which lies at `into`.
    pub fn cut(&self, out: u64, out_len: u32, into: u64, into_len: u32) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut done = 0;
        let first = self.readable.iter().copied().filter(|len| *len > 0);
        for len in first.chain(std::iter::repeat(self.segment.max(1))) {
            if done == out_len {
                break;
            }
            let len = len.min(out_len - done);
            segments.push(Segment { addr: out + u64::from(done), len, writable: false });
            done += len;
        }
        let split_at = if self.join_status { into_len } else { into_len.saturating_sub(1) };
        let mut done = 0;
        while done < into_len {
            let limit = if done < split_at { split_at - done } else { into_len - done };
            let len = limit.min(self.segment.max(1));
            segments.push(Segment { addr: into + u64::from(done), len, writable: true });
            done += len;
        }
        segments
    }
}

/// The virtio-blk configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity: u64,
    /// Largest segment.
    pub size_max: u32,
    /// Most data segments of a request.
    pub seg_max: u32,
    /// Block size in bytes.
    pub blk_size: u32,
    /// Logical blocks of a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned block.
    pub alignment_offset: u8,
    /// Least efficient request, in blocks.
    pub min_io_size: u16,
    /// Best request, in blocks.
    pub opt_io_size: u32,
    /// Whether the cache is write-back.
    pub writeback: u8,
    /// Number of queues.
    pub num_queues: u16,
    /// Largest range of a discard.
    pub max_discard_sectors: u32,
    /// Most ranges of a discard.
    pub max_discard_seg: u32,
    /// Alignment of a discard in sectors.
    pub discard_sector_alignment: u32,
    /// Largest range of a write of zeroes.
    pub max_write_zeroes_sectors: u32,
    /// Most ranges of a write of zeroes.
    pub max_write_zeroes_seg: u32,
    /// Whether a write of zeroes may give space back.
    pub write_zeroes_may_unmap: u8,
}

impl Config {
    /// Bytes up to the last field known here.
    pub const LEN: u32 = 60;
    /// Offset of the write-back byte.
    pub const WRITEBACK_OFFSET: u32 = 32;

    /// Takes the space apart. Fields beyond the end of `bytes` are 0.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < 8 {
            return Err(Error::corrupt("configuration space without a capacity"));
        }
        let mut full = [0; Config::LEN as usize];
        let known = bytes.len().min(full.len());
        full[..known].copy_from_slice(&bytes[..known]);
        let u16_at = |at: usize| u16::from_le_bytes([full[at], full[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        Ok(Config {
            capacity: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            size_max: u32_at(8),
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            physical_block_exp: full[24],
            alignment_offset: full[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: full[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: full[56],
        })
    }

    /// Size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.capacity.saturating_mul(SECTOR_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(segments: &[Segment]) -> Vec<(u64, u32, bool)> {
        segments.iter().map(|s| (s.addr, s.len, s.writable)).collect()
    }

    #[test]
    fn the_usual_layout_has_three_descriptors() {
        let read = Layout::default().cut(0x100, 16, 0x1000, 4097);
        assert_eq!(shape(&read), [(0x100, 16, false), (0x1000, 4096, true), (0x2000, 1, true)]);
        let flush = Layout::default().cut(0x100, 16, 0x1000, 1);
        assert_eq!(shape(&flush), [(0x100, 16, false), (0x1000, 1, true)]);
    }

    #[test]
    fn streams_can_be_cut_anywhere() {
        let layout =
            Layout { readable: vec![3, 0, 14], segment: 300, join_status: true, indirect: false };
        let cut = layout.cut(0, 16 + 512, 0x1000, 513);
        assert_eq!(
            shape(&cut),
            [
                (0, 3, false),
                (3, 14, false),
                (17, 300, false),
                (317, 211, false),
                (0x1000, 300, true),
                (0x1000 + 300, 213, true)
            ]
        );
    }

    #[test]
    fn short_configuration_spaces_are_understood() {
        let mut bytes = vec![0; 36];
        bytes[0] = 8;
        bytes[21] = 2;
        bytes[34] = 4;
        let config = Config::parse(&bytes).unwrap();
        assert_eq!((config.bytes(), config.blk_size, config.num_queues), (4096, 512, 4));
        assert_eq!(config.max_discard_seg, 0);
        assert!(Config::parse(&[0; 7]).is_err());
    }

    #[test]
    fn ranges_are_in_sectors() {
        let request = Request::write_zeroes(&[(1024, 4096)], true);
        assert_eq!(request.out[0], 2);
        assert_eq!(request.out[8], 8);
        assert_eq!(request.out[12], 1);
        assert_eq!(request.readable().len(), 32);
    }
}
