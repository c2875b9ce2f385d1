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
        // Of no kind that is counted, until that is known.
        self.kind = Kind::GetId;
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
                self.kind = Kind::Read { offset: 0 };
                let range = limits.range(sector, data_len(writable)?)?;
                self.kind = Kind::Read { offset: range.offset };
                self.take_data(chain.writable(), 0, writable)
            }
            VIRTIO_BLK_T_OUT => {
                self.kind = Kind::Write { offset: 0 };
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

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, INDIRECT, NEXT, SECOND, WRITE, guest_ranges};
    use super::*;
    use crate::device::chain::ChainError;
    use crate::device::ring::Ring;

    /// Where the tests keep the header, the status byte and data.
    struct Place {
        guest: Guest,
        ring: Ring,
        chain: Chain,
        request: Request,
        limits: Limits,
        header: u64,
        status: u64,
        data: u64,
    }

    impl Place {
        fn new() -> Place {
            let guest = Guest::new(16);
            let ring = guest.ring(true);
            let header = guest.free_addr();
            Place {
                ring,
                chain: Chain::new(),
                request: Request::new(),
                limits: Limits::new(1 << 20, 512, false, u64::MAX),
                header,
                status: header + 0x100,
                data: header + 0x1000,
                guest,
            }
        }

        fn write_header(&self, kind: u32, sector: u64) {
            self.guest.write(self.header, &kind.to_le_bytes());
            self.guest.write(self.header + 8, &sector.to_le_bytes());
            self.guest.write(self.status, &[0xff]);
        }

        /// Offers what is at descriptor 0 and takes it as far as it goes.
        fn serve(&mut self) -> (Result<(), ChainError>, Parsed) {
            self.guest.offer(0);
            let head = self.ring.pop().unwrap().unwrap();
            let walked = self.ring.walk(head, &mut self.chain);
            // SAFETY: the guest's memory is mapped.
            let parsed = unsafe { self.request.parse(&self.chain, &self.limits) };
            self.ring.complete(head, 0);
            let _interrupt = self.ring.publish();
            (walked, parsed)
        }

        /// The same for a chain of header, these parts, and status.
        fn ask(&mut self, kind: u32, sector: u64, parts: &[(u64, u32, bool)]) -> Parsed {
            self.write_header(kind, sector);
            let mut all = vec![(self.header, 16, false)];
            all.extend_from_slice(parts);
            all.push((self.status, 1, true));
            self.guest.chain(0, &all);
            let (walked, parsed) = self.serve();
            walked.unwrap();
            parsed
        }

        /// The same for segments of (sector, sectors, flags).
        fn ask_segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> Parsed {
            for (i, (sector, sectors, flags)) in segments.iter().enumerate() {
                let at = self.data + 16 * i as u64;
                self.guest.write(at, &sector.to_le_bytes());
                self.guest.write(at + 8, &sectors.to_le_bytes());
                self.guest.write(at + 12, &flags.to_le_bytes());
            }
            self.ask(kind, 0, &[(self.data, 16 * segments.len() as u32, false)])
        }

        /// Finishes the request; the used length and the status byte the guest sees.
        fn finish(&self, status: Status) -> (u32, u8) {
            // SAFETY: the guest's memory is mapped.
            let len = unsafe { self.request.finish(status) };
            (len, self.guest.read::<1>(self.status)[0])
        }

        fn data(&self) -> Vec<(u64, usize)> {
            guest_ranges(&self.guest.memory, &self.request.data)
        }
    }

    const IN: u32 = VIRTIO_BLK_T_IN;
    const OUT: u32 = VIRTIO_BLK_T_OUT;
    const IOERR: Parsed = Parsed::Done(Status::IoErr);
    const UNSUPP: Parsed = Parsed::Done(Status::Unsupported);

    #[test]
    fn reads_and_writes() {
        let mut p = Place::new();
        let data = p.data;
        assert_eq!(p.ask(IN, 8, &[(data, 512, true), (data + 0x2000, 1024, true)]), Parsed::Submit);
        assert_eq!(p.request.kind, Kind::Read { offset: 4096 });
        assert_eq!(p.data(), [(data, 512), (data + 0x2000, 1024)]);
        assert_eq!(p.request.data_len, 1536);
        assert_eq!(p.finish(Status::Ok), (1537, 0));
        assert_eq!(p.finish(Status::IoErr), (1, 1));
        assert_eq!(p.ask(OUT, 2047, &[(data, 512, false)]), Parsed::Submit);
        assert_eq!(p.request.kind, Kind::Write { offset: 2047 * 512 });
        assert_eq!(p.data(), [(data, 512)]);
        assert_eq!(p.finish(Status::Ok), (1, 0));
        // SAFETY: that is the memory the chain was walked in.
        assert_eq!(unsafe { p.request.buffers(&p.guest.memory) }.len(), 512);
    }

    #[test]
    fn ranges_are_checked() {
        let mut p = Place::new();
        let data = p.data;
        let mut read = |sector, len| p.ask(IN, sector, &[(data, len, true)]);
        assert_eq!(read(2047, 1024), IOERR);
        assert_eq!(read(2048, 512), IOERR);
        assert_eq!(read(u64::MAX, 512), IOERR);
        assert_eq!(read(u64::MAX / 512, 512), IOERR);
        assert_eq!(read(0, 513), IOERR);
        assert_eq!(read(0, 511), IOERR);
        assert_eq!(read(2048, 0), Parsed::Done(Status::Ok));
        assert_eq!(read(2049, 0), IOERR);
        p.limits.block_size = 4096;
        let mut read = |sector, len| p.ask(IN, sector, &[(data, len, true)]);
        assert_eq!(read(8, 4096), Parsed::Submit);
        assert_eq!(read(1, 4096), IOERR);
        assert_eq!(read(0, 512), IOERR);
        assert_eq!(p.finish(Status::IoErr), (1, 1));
    }

    #[test]
    fn a_read_only_disk_is_only_read() {
        let mut p = Place::new();
        let data = p.data;
        p.limits.read_only = true;
        assert_eq!(p.ask(IN, 0, &[(data, 512, true)]), Parsed::Submit);
        assert_eq!(p.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), Parsed::Submit);
        assert_eq!(p.ask(OUT, 0, &[(data, 512, false)]), IOERR);
        assert_eq!(p.ask_segments(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0)]), IOERR);
        assert_eq!(p.ask_segments(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    }

    #[test]
    fn segments() {
        let mut p = Place::new();
        let range = |offset, len| ByteRange { offset, len };
        let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
        assert_eq!(p.ask_segments(discard, &[(8, 8, 0), (0, 0, 0), (2040, 8, 0)]), Parsed::Submit);
        assert_eq!(p.request.kind, Kind::Discard);
        let want = [(4096, 4096), (2040 * 512, 4096)]
            .map(|(offset, len)| Segment { range: range(offset, len), unmap: false });
        assert_eq!(p.request.segments, want);
        assert_eq!(p.finish(Status::Ok), (1, 0));
        assert_eq!(p.ask_segments(discard, &[(8, 8, 1)]), UNSUPP);
        assert_eq!(p.ask_segments(zeroes, &[(8, 8, 1), (16, 8, 0)]), Parsed::Submit);
        assert_eq!(p.request.kind, Kind::WriteZeroes);
        assert_eq!(p.request.segments.iter().map(|s| s.unmap).collect::<Vec<_>>(), [true, false]);
        assert_eq!(p.ask_segments(zeroes, &[(8, 8, 2)]), UNSUPP);
        assert_eq!(p.ask_segments(zeroes, &[(8, 8, 0x8000_0001)]), UNSUPP);
        assert_eq!(p.ask_segments(zeroes, &[(0, 1, 0), (2048, 1, 0)]), IOERR);
        assert!(p.request.segments.is_empty());
        assert_eq!(p.ask_segments(zeroes, &[(u64::MAX, u32::MAX, 0)]), IOERR);
        assert_eq!(p.ask_segments(zeroes, &[(0, 0, 0)]), Parsed::Done(Status::Ok));
        assert_eq!(p.ask_segments(zeroes, &[(0, 1, 0); 32]), Parsed::Submit);
        assert_eq!(p.ask_segments(zeroes, &[(0, 1, 0); 33]), IOERR);
        assert_eq!(p.ask_segments(zeroes, &[]), IOERR);
        let data = p.data;
        assert_eq!(p.ask(discard, 0, &[(data, 15, false)]), IOERR);
        assert_eq!(p.ask(discard, 0, &[(data, 17, false)]), IOERR);
        p.limits.max_discard_sectors = 7;
        assert_eq!(p.ask_segments(discard, &[(8, 8, 0)]), IOERR);
        assert_eq!(p.ask_segments(zeroes, &[(8, 8, 0)]), Parsed::Submit);
        p.limits.discard = false;
        assert_eq!(p.ask_segments(discard, &[(8, 1, 0)]), UNSUPP);
    }

    #[test]
    fn the_serial() {
        let mut p = Place::new();
        let data = p.data;
        let id = id_bytes("vublk-serial-0123456789");
        assert_eq!(&id, b"vublk-serial-0123456");
        for (room, used) in [(20, 21), (7, 8), (100, 21)] {
            p.guest.write(data, &[0xee; 100]);
            assert_eq!(p.ask(VIRTIO_BLK_T_GET_ID, 0, &[(data, room, true)]), Parsed::Submit);
            assert_eq!(p.request.kind, Kind::GetId);
            // SAFETY: the guest's memory is mapped.
            unsafe { p.request.write_id(&id) };
            assert_eq!(p.finish(Status::Ok), (used, 0));
            let n = used as usize - 1;
            let got = p.guest.read::<100>(data);
            assert_eq!(got[..n], id[..n]);
            assert!(got[n..].iter().all(|b| *b == 0xee));
        }
        assert_eq!(p.ask(VIRTIO_BLK_T_GET_ID, 0, &[]), Parsed::Done(Status::Ok));
    }

    #[test]
    fn unknown_types_are_unsupported() {
        let mut p = Place::new();
        for kind in [2, 3, 5, 9, 10, 12, 14, 15, 0x8000_0000, u32::MAX] {
            assert_eq!(p.ask(kind, 0, &[]), UNSUPP);
            assert_eq!(p.finish(Status::Unsupported), (1, 2));
        }
    }

    #[test]
    fn any_layout_will_do() {
        let mut p = Place::new();
        // The header in five parts (one empty, one with data behind it), at odd addresses.
        p.write_header(OUT, 3);
        let header = p.guest.read::<16>(p.header);
        let base = p.data + 1;
        p.guest.write(base, &header[..3]);
        p.guest.write(base + 0x100, &header[3..4]);
        p.guest.write(base + 0x200, &header[4..15]);
        p.guest.write(base + 0x300, &header[15..]);
        let parts = [
            (base, 3, false),
            (base + 0x100, 1, false),
            (base + 0x400, 0, false),
            (base + 0x200, 11, false),
            (base + 0x300, 1 + 500, false),
            (base + 0x600, 12, false),
            (p.status - 40, 20, true),
            (p.status - 20, 21, true),
            (base + 0x700, 0, true),
        ];
        p.guest.chain(0, &parts);
        assert_eq!(p.serve(), (Ok(()), Parsed::Submit));
        assert_eq!(p.request.kind, Kind::Write { offset: 1536 });
        assert_eq!(p.data(), [(base + 0x301, 500), (base + 0x600, 12)]);
        assert_eq!(p.finish(Status::Ok), (1, 0));
        // A read with status and data in one descriptor that crosses into the second region.
        p.write_header(IN, 3);
        p.guest.chain(0, &[(p.header, 16, false), (SECOND - 500, 513, true)]);
        assert_eq!(p.serve(), (Ok(()), Parsed::Submit));
        assert_eq!(p.data(), [(SECOND - 500, 500), (SECOND, 12)]);
        p.finish(Status::IoErr);
        assert_eq!(p.guest.read::<1>(SECOND + 12), [1]);
    }

    #[test]
    fn indirect_tables() {
        let mut p = Place::new();
        p.write_header(IN, 0);
        // Unaligned on purpose.
        let table = p.data + 0x1004;
        p.guest.desc_in(table, 0, p.header, 16, NEXT, 2);
        p.guest.desc_in(table, 2, p.data, 512, NEXT | WRITE, 1);
        p.guest.desc_in(table, 1, p.status, 1, WRITE, 0);
        p.guest.desc(0, table, 48, INDIRECT, 0);
        assert_eq!(p.serve(), (Ok(()), Parsed::Submit));
        assert_eq!(p.data(), [(p.data, 512)]);
        // After a direct descriptor.
        p.guest.desc(0, p.header, 16, NEXT, 1);
        p.guest.desc(1, table + 16, 32, INDIRECT | WRITE, 0);
        p.guest.desc_in(table, 1, p.data, 512, NEXT | WRITE, 1);
        p.guest.desc_in(table, 2, p.status, 1, WRITE, 0);
        assert_eq!(p.serve(), (Ok(()), Parsed::Submit));
        // A table that crosses into the second region.
        let table = SECOND - 16;
        p.guest.desc_in(table, 0, p.header, 16, NEXT, 1);
        p.guest.desc_in(table, 1, p.data, 512, NEXT | WRITE, 2);
        p.guest.desc_in(table, 2, p.status, 1, WRITE, 0);
        p.guest.desc(0, table, 48, INDIRECT, 0);
        assert_eq!(p.serve(), (Ok(()), Parsed::Submit));
        assert_eq!(p.data(), [(p.data, 512)]);
    }

    #[test]
    fn bad_chains_fail_alone() {
        let mut p = Place::new();
        let (header, status, data) = (p.header, p.status, p.data);
        p.write_header(IN, 0);
        // Data outside of memory: the status is still told.
        p.guest.chain(0, &[(header, 16, false), (0x10, 512, true), (status, 1, true)]);
        let (walked, parsed) = p.serve();
        assert!(matches!(walked, Err(ChainError::Unmapped(_))));
        assert_eq!(parsed, IOERR);
        assert_eq!(p.finish(Status::IoErr), (1, 1));
        // Readable after writable.
        p.guest.chain(0, &[(header, 16, false), (data, 512, true), (data, 1, false)]);
        assert_eq!(p.serve(), (Err(ChainError::ReadableAfterWritable), IOERR));
        // A circle.
        p.guest.chain(0, &[(header, 16, false), (data, 512, true), (status, 1, true)]);
        p.guest.desc(2, status, 1, WRITE | NEXT, 0);
        assert!(matches!(p.serve().0, Err(ChainError::ReadableAfterWritable)));
        p.guest.desc(2, status, 1, WRITE | NEXT, 1);
        assert_eq!(p.serve(), (Err(ChainError::Endless(16)), IOERR));
        assert_eq!(p.finish(Status::IoErr).0, 0, "no place for a status");
        // Out of the table.
        p.guest.desc(2, status, 1, WRITE | NEXT, 16);
        assert_eq!(p.serve(), (Err(ChainError::BadIndex { index: 16, len: 16 }), IOERR));
        // Indirect tables: empty, cut, nested, with a successor, outside of memory.
        for (len, flags) in [(0, 0), (17, 0), (15, 0)] {
            p.guest.desc(0, data, len, INDIRECT | flags, 0);
            assert_eq!(p.serve(), (Err(ChainError::IndirectLength(len)), IOERR));
        }
        p.guest.desc(0, data, 16, INDIRECT | NEXT, 1);
        assert_eq!(p.serve(), (Err(ChainError::IndirectMisplaced), IOERR));
        p.guest.desc(0, data, 16, INDIRECT, 0);
        p.guest.desc_in(data, 0, data, 16, INDIRECT, 0);
        assert_eq!(p.serve(), (Err(ChainError::IndirectMisplaced), IOERR));
        p.guest.desc(0, 0x10, 16, INDIRECT, 0);
        assert!(matches!(p.serve(), (Err(ChainError::Unmapped(_)), IOERR)));
        // A circle in an indirect table of a million entries.
        p.guest.desc_in(data, 0, data, 16, NEXT, 0);
        p.guest.desc(0, data, 16, INDIRECT, 0);
        assert_eq!(p.serve(), (Err(ChainError::Endless(1)), IOERR));
        // Too short for a header; nothing to write a status to; more data than one request moves.
        p.guest.chain(0, &[(header, 15, false), (status, 1, true)]);
        assert_eq!(p.serve(), (Ok(()), IOERR));
        assert_eq!(p.finish(Status::IoErr), (1, 1));
        p.guest.chain(0, &[(header, 16, false)]);
        assert_eq!(p.serve(), (Ok(()), IOERR));
        assert_eq!(p.finish(Status::IoErr).0, 0);
        // And the ring goes on.
        assert_eq!(p.ask(IN, 0, &[(data, 512, true)]), Parsed::Submit);
    }

    #[test]
    fn indirect_must_be_negotiated() {
        let mut p = Place::new();
        p.ring = Ring::new(p.guest.config(0)).unwrap().0;
        p.guest.desc(0, p.data, 16, INDIRECT, 0);
        assert_eq!(p.serve(), (Err(ChainError::IndirectNotNegotiated), IOERR));
    }

    #[test]
    fn what_was_written_is_logged() {
        use std::os::unix::fs::FileExt;
        let mut p = Place::new();
        let file = crate::device::mapping::tests::memfd(4096);
        let log = DirtyLog::new(file.try_clone().unwrap(), 0, 4096).unwrap();
        let data = p.data + 0x1000;
        let marked = || {
            let mut map = [0u8; 4096];
            file.read_exact_at(&mut map, 0).unwrap();
            file.write_all_at(&[0; 4096], 0).unwrap();
            (0..32768u64).filter(|i| map[*i as usize / 8] & 1 << (i % 8) != 0).collect::<Vec<_>>()
        };
        assert_eq!(p.ask(IN, 0, &[(data, 8192, true)]), Parsed::Submit);
        p.request.mark_dirty(&p.guest.memory, &log);
        assert_eq!(marked(), [p.status / 4096, data / 4096, data / 4096 + 1]);
        assert_eq!(p.ask(OUT, 0, &[(data, 8192, false)]), Parsed::Submit);
        p.request.mark_dirty(&p.guest.memory, &log);
        assert_eq!(marked(), [p.status / 4096]);
    }

    /// A request that is refused is counted as one of its kind, not as whatever its place held before.
    #[test]
    fn what_is_refused_is_of_its_own_kind() {
        let mut place = Place::new();
        let data = place.data;
        let beyond = 1 << 40;
        for (kind, is_its_own) in [
            (VIRTIO_BLK_T_IN, (|kind| matches!(kind, Kind::Read { .. })) as fn(Kind) -> bool),
            (VIRTIO_BLK_T_OUT, |kind| matches!(kind, Kind::Write { .. })),
            (99, |kind| kind == Kind::GetId),
        ] {
            for before in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
                let part = |kind| [(data, 512, kind == VIRTIO_BLK_T_IN)];
                assert_eq!(place.ask(before, 0, &part(before)), Parsed::Submit);
                assert!(matches!(place.ask(kind, beyond, &part(kind)), Parsed::Done(_)));
                assert!(is_its_own(place.request.kind), "{kind}: {:?}", place.request.kind);
            }
        }
    }
}
