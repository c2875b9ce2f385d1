//! A log in memory, made from the writes it is to hold: for tests, and for whoever has writes from
//! somewhere else than a guest. Recording a guest is the business of the filter.

use crate::units::ByteRange;
use crate::write_log::layout::{self, Flags, RawEntry, Superblock};

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct LogBuilder {
    sector_size: u32,
    entries: u64,
    /// Everything after the superblock.
    body: Vec<u8>,
}

impl LogBuilder {
    /// An empty log.
    pub fn new(sector_size: u32) -> LogBuilder {
        LogBuilder { sector_size, entries: 0, body: Vec::new() }
    }

    /// Adds an entry with any flags; `data` may be empty. Offset and length must be whole sectors.
    pub fn entry(self, flags: Flags, offset: u64, data: &[u8]) -> Self {
        let range = ByteRange { offset, len: data.len() as u64 };
        self.header(flags, range, 0, &[]).bytes(data)
    }

    /// Adds a write.
    pub fn write(self, offset: u64, data: &[u8]) -> Self {
        self.entry(Flags::NONE, offset, data)
    }

    /// Adds a discard.
    pub fn discard(self, range: ByteRange) -> Self {
        self.header(Flags::DISCARD, range, 0, &[])
    }

    /// Adds a flush.
    pub fn flush(self) -> Self {
        self.entry(Flags::FLUSH, 0, &[])
    }

    /// Adds a mark.
    pub fn mark(self, text: &str) -> Self {
        self.header(Flags::MARK, ByteRange::default(), text.len() as u64, text.as_bytes())
    }

    /// How many entries there are so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The log, with all entries counted.
    pub fn finish(&self) -> Vec<u8> {
        let superblock = Superblock { entries: self.entries, sector_size: self.sector_size };
        let mut log = superblock.to_sector();
        log.extend_from_slice(&self.body);
        log
    }

    fn header(mut self, flags: Flags, range: ByteRange, data_len: u64, text: &[u8]) -> Self {
        let unit = u64::from(self.sector_size);
        assert!(range.is_aligned(unit), "{range}: not whole sectors of {unit} bytes");
        let raw = RawEntry {
            sector: (range.offset / unit).into(),
            nr_sectors: (range.len / unit).into(),
            flags: flags.0.into(),
            data_len: data_len.into(),
        };
        self.entries += 1;
        let header = layout::header_sector(&raw, text, self.sector_size);
        self.bytes(&header)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.body.extend_from_slice(bytes);
        self
    }
}
