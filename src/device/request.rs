//! Parses a chain into a virtio-blk request, and answers it.
//!
//! A request is a stream of bytes, however the guest cut it into descriptors:
//!
//! ```text
//! readable: ┌ type u32 · reserved u32 · sector u64 ┬ data of a write, or segments ┐
//! writable:                                        ┌ data of a read, or the serial ┬ status u8 ┐
//! ```
//!
//! The header is the first 16 readable bytes, the status the last writable byte, and the data what
//! lies between, cut out of the chain's ranges without a copy. A request that cannot be done is
//! answered at once ([`Parsed::Done`]); one that can has passed every check against the disk's
//! [`Limits`], so the layers below see legal requests only.
//!
//! What [`Request::finish`] returns for the used ring: the bytes written from the start of the
//! writable part plus the status byte for a read or GET_ID that succeeded; 1, the status byte
//! alone, for all others; 0 if there was no place for a status. (The bytes between the data's
//! start and the status may have been written in part by a read that failed; the guest is told of
//! none of them.)

#![allow(unsafe_code)]

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::chain::{Chain, read_two};
use super::config_space::{MAX_RANGE_SECTORS, MAX_RANGE_SEGMENTS};
use super::dirty_log::DirtyLog;
use super::features;
use super::memory::GuestMemory;
use crate::io::Buffers;
use crate::io::buf::slice_iovecs;
use crate::units::{ByteRange, SECTOR_SIZE};

/// Size of the header.
const HEADER: u64 = 16;
/// Size of a segment of a discard or write-zeroes request.
const SEGMENT: u64 = 16;
/// Length of the serial that GET_ID answers with.
pub const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Most data in one request: what one system call moves, and, with the status, what fits the
/// 32 bits of the used ring.
pub const MAX_DATA_LEN: u64 = 0x7fff_f000;

/// How a request ended, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// Nothing that this device does.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub capacity: u64,
    /// Logical block size in bytes, a power of two from 512: ranges are multiples of it.
    pub block_size: u32,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// Whether DISCARD was offered and negotiated.
    pub discard: bool,
    /// Whether WRITE_ZEROES was offered and negotiated.
    pub write_zeroes: bool,
    /// Sectors in one segment of a discard.
    pub max_discard_sectors: u32,
    /// Sectors in one segment of a write-zeroes.
    pub max_write_zeroes_sectors: u32,
    /// Segments in one discard or write-zeroes request.
    pub max_segments: u32,
}

impl Limits {
    /// The limits that the config space announces, for a disk of `capacity` bytes and the
    /// negotiated virtio features.
    pub fn new(capacity: u64, block_size: u32, read_only: bool, features: u64) -> Limits {
        Limits {
            capacity,
            block_size,
            read_only,
            discard: features & features::DISCARD != 0,
            write_zeroes: features & features::WRITE_ZEROES != 0,
            max_discard_sectors: MAX_RANGE_SECTORS,
            max_write_zeroes_sectors: MAX_RANGE_SECTORS,
            max_segments: MAX_RANGE_SEGMENTS,
        }
    }

    /// The range of `len` bytes from `sector`, if it lies on the disk in whole blocks.
    #[inline]
    fn range(&self, sector: u64, len: u64) -> Result<ByteRange, Status> {
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr)?;
        // Written so that nothing overflows.
        let inside = offset <= self.capacity && len <= self.capacity - offset;
        let aligned = (offset | len) & (u64::from(self.block_size) - 1) == 0;
        if inside && aligned { Ok(ByteRange { offset, len }) } else { Err(Status::IoErr) }
    }
}

/// What a request wants. Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read from `offset` into the data ranges.
    Read {
        /// Where on the disk.
        offset: u64,
    },
    /// Write the data ranges to `offset`.
    Write {
        /// Where on the disk.
        offset: u64,
    },
    /// Make all that was completed durable.
    Flush,
    /// Give up the content of the segments.
    Discard,
    /// Zero the segments.
    WriteZeroes,
    /// Write the serial into the data ranges: [`Request::write_id`].
    GetId,
}

/// A range of a discard or write-zeroes request: on the disk, in whole blocks, not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where on the disk, in bytes.
    pub range: ByteRange,
    /// Whether zeroes may be made by giving space back. Never set for a discard.
    pub unmap: bool,
}

/// Answer of [`Request::parse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Parsed {
    /// The request is to be done, then finished.
    Submit,
    /// There is nothing to do but to finish it with this status.
    Done(Status),
}

/// A parsed request. Reused; see the module's documentation.
#[derive(Debug)]
pub struct Request {
    /// What it wants.
    pub kind: Kind,
    /// The data of a read, write or GET_ID: ranges of guest memory.
    pub data: Vec<libc::iovec>,
    /// Bytes in `data`.
    pub data_len: u64,
    /// The segments of a discard or write-zeroes.
    pub segments: Vec<Segment>,
    /// Where the status goes.
    status: Option<*mut u8>,
}

// SAFETY: pointers to guest memory; whoever follows them must keep that memory mapped, on
// whichever thread.
unsafe impl Send for Request {}

impl Default for Request {
    fn default() -> Self {
        Request::new()
    }
}

impl Request {
    /// A request with nothing in it.
    pub fn new() -> Request {
        Request {
            kind: Kind::Flush,
            data: Vec::with_capacity(64),
            data_len: 0,
            segments: Vec::new(),
            status: None,
        }
    }

    /// Fills the request with what `chain` says, checked against `limits`.
    ///
    /// # Safety
    /// The memory that the chain was walked in must be mapped.
    #[inline]
    pub unsafe fn parse(&mut self, chain: &Chain, limits: &Limits) -> Parsed {
        self.data.clear();
        self.data_len = 0;
        self.segments.clear();
        self.status = last_byte(chain.writable());
        if self.status.is_none() {
            // Nothing could be told about it, so nothing may be done either.
            return Parsed::Done(Status::IoErr);
        }
        // SAFETY: as promised by the caller.
        match unsafe { self.parse_body(chain, limits) } {
            Ok(()) => Parsed::Submit,
            Err(status) => {
                self.data.clear();
                self.data_len = 0;
                self.segments.clear();
                Parsed::Done(status)
            }
        }
    }

    /// # Safety
    /// As [`Request::parse`]. The chain has a status byte.
    #[inline]
    unsafe fn parse_body(&mut self, chain: &Chain, limits: &Limits) -> Result<(), Status> {
        // SAFETY: as promised by the caller.
        let header = unsafe { read_16(chain.readable(), 0) }.ok_or(Status::IoErr)?;
        let sector = header[1];
        let readable = chain.readable_len() - HEADER;
        let writable = chain.writable_len() - 1;
        match header[0] as u32 {
            VIRTIO_BLK_T_IN => {
                let range = limits.range(sector, data_len(writable)?)?;
                self.kind = Kind::Read { offset: range.offset };
                self.take_data(chain.writable(), 0, writable)
            }
            VIRTIO_BLK_T_OUT => {
                if limits.read_only {
                    return Err(Status::IoErr);
                }
                let range = limits.range(sector, data_len(readable)?)?;
                self.kind = Kind::Write { offset: range.offset };
                self.take_data(chain.readable(), HEADER, readable)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.kind = Kind::Flush;
                Ok(())
            }
            VIRTIO_BLK_T_GET_ID => {
                self.kind = Kind::GetId;
                self.take_data(chain.writable(), 0, writable.min(ID_LEN as u64))
            }
            VIRTIO_BLK_T_DISCARD => {
                self.kind = Kind::Discard;
                let max_sectors = limits.discard.then_some(limits.max_discard_sectors);
                // SAFETY: as promised by the caller.
                unsafe { self.take_segments(chain, max_sectors, 0, limits) }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.kind = Kind::WriteZeroes;
                let max_sectors = limits.write_zeroes.then_some(limits.max_write_zeroes_sectors);
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                // SAFETY: as promised by the caller.
                unsafe { self.take_segments(chain, max_sectors, flags, limits) }
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Cuts the data out of the chain's ranges. A request for nothing is done.
    #[inline]
    fn take_data(&mut self, iovs: &[libc::iovec], offset: u64, len: u64) -> Result<(), Status> {
        if len == 0 {
            return Err(Status::Ok);
        }
        slice_iovecs(iovs, offset, len, &mut self.data);
        self.data_len = len;
        Ok(())
    }

    /// Reads and checks the segments of a discard or write-zeroes; `max_sectors` is `None` if the
    /// feature was not negotiated. All are checked before any is done; empty ones are left out.
    ///
    /// # Safety
    /// As [`Request::parse`].
    #[cold]
    unsafe fn take_segments(
        &mut self,
        chain: &Chain,
        max_sectors: Option<u32>,
        known_flags: u32,
        limits: &Limits,
    ) -> Result<(), Status> {
        if limits.read_only {
            return Err(Status::IoErr);
        }
        let max_sectors = max_sectors.ok_or(Status::Unsupported)?;
        let len = chain.readable_len() - HEADER;
        let count = len / SEGMENT;
        if count == 0 || !len.is_multiple_of(SEGMENT) || count > limits.max_segments.into() {
            return Err(Status::IoErr);
        }
        for index in 0..count {
            // SAFETY: as promised by the caller.
            let words = unsafe { read_16(chain.readable(), HEADER + index * SEGMENT) };
            let [sector, rest] = words.ok_or(Status::IoErr)?;
            let (sectors, flags) = (rest as u32, (rest >> 32) as u32);
            if flags & !known_flags != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Status::IoErr);
            }
            let range = limits.range(sector, u64::from(sectors) * SECTOR_SIZE)?;
            if !range.is_empty() {
                self.segments.push(Segment { range, unmap: flags != 0 });
            }
        }
        if self.segments.is_empty() { Err(Status::Ok) } else { Ok(()) }
    }

    /// The data ranges with the memory that keeps them alive, for I/O that outlives this call.
    ///
    /// # Safety
    /// The request must have been parsed from a chain that was walked in `memory`.
    pub unsafe fn buffers(&self, memory: &Arc<GuestMemory>) -> Buffers {
        // SAFETY: by the caller's promise the ranges lie in regions that `memory` keeps mapped.
        unsafe { Buffers::from_raw(self.data.clone(), Arc::clone(memory) as _) }
    }

    /// Answers GET_ID: as much of the serial as the guest has room for.
    ///
    /// # Safety
    /// The memory that the chain was walked in must be mapped.
    pub unsafe fn write_id(&self, serial: &[u8; ID_LEN]) {
        let mut rest = &serial[..];
        for iov in &self.data {
            let n = iov.iov_len.min(rest.len());
            for (i, byte) in rest[..n].iter().enumerate() {
                // SAFETY: inside a range of guest memory.
                unsafe { iov.iov_base.cast::<u8>().add(i).write_volatile(*byte) };
            }
            rest = &rest[n..];
        }
    }

    /// Writes the status, and returns the length for the used ring (see the module's
    /// documentation). To be called once, after all data was written.
    ///
    /// # Safety
    /// The memory that the chain was walked in must be mapped.
    #[inline]
    pub unsafe fn finish(&self, status: Status) -> u32 {
        let Some(ptr) = self.status else { return 0 };
        // SAFETY: the last byte of a range of guest memory.
        unsafe { ptr.write_volatile(status as u8) };
        match self.kind {
            // At most `MAX_DATA_LEN`, or the data would not have been taken.
            Kind::Read { .. } | Kind::GetId if status == Status::Ok => self.data_len as u32 + 1,
            _ => 1,
        }
    }

    /// Marks what was written for this request in the migration log: the data of a read or
    /// GET_ID, and the status. To be called after [`Request::finish`] and before the head is
    /// completed, while there is a log.
    #[cold]
    pub fn mark_dirty(&self, memory: &GuestMemory, log: &DirtyLog) {
        if matches!(self.kind, Kind::Read { .. } | Kind::GetId) {
            memory.mark_dirty(&self.data, self.data_len, log);
        }
        if let Some(status) = self.status {
            let iov = libc::iovec { iov_base: status.cast(), iov_len: 1 };
            memory.mark_dirty(&[iov], 1, log);
        }
    }
}

/// The serial as GET_ID answers it: padded with zeros, cut to fit.
pub fn id_bytes(serial: &str) -> [u8; ID_LEN] {
    let mut id = [0; ID_LEN];
    let n = serial.len().min(ID_LEN);
    id[..n].copy_from_slice(&serial.as_bytes()[..n]);
    id
}

/// `len` if that much data can be moved at once.
#[inline]
fn data_len(len: u64) -> Result<u64, Status> {
    if len <= MAX_DATA_LEN { Ok(len) } else { Err(Status::IoErr) }
}

/// Pointer to the last byte of `iovs`; ranges are never empty.
#[inline]
fn last_byte(iovs: &[libc::iovec]) -> Option<*mut u8> {
    let iov = iovs.last()?;
    Some(iov.iov_base.cast::<u8>().wrapping_add(iov.iov_len - 1))
}

/// 16 bytes of `iovs` from `offset` as two little-endian words, each byte read once; `None` if
/// there are not as many.
///
/// # Safety
/// The ranges must be mapped.
#[inline]
unsafe fn read_16(iovs: &[libc::iovec], mut offset: u64) -> Option<[u64; 2]> {
    if let Some(iov) = iovs.first()
        && offset == 0
        && iov.iov_len >= 16
    {
        // SAFETY: as promised by the caller.
        return Some(unsafe { read_two(iov.iov_base.cast()) });
    }
    let mut bytes = [0; 16];
    let mut done = 0;
    for iov in iovs {
        let len = iov.iov_len as u64;
        if offset >= len {
            offset -= len;
            continue;
        }
        while offset < len && done < bytes.len() {
            // SAFETY: inside the range.
            bytes[done] = unsafe { iov.iov_base.cast::<u8>().add(offset as usize).read_volatile() };
            done += 1;
            offset += 1;
        }
        if done == bytes.len() {
            let word =
                |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
            return Some([word(0), word(8)]);
        }
        offset = 0;
    }
    None
}
