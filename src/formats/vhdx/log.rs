//! The log: reading entries, finding those that count, and making new ones.
//!
//! The log is a circular buffer of entries in units of 4 KiB. An entry holds whole pages of
//! metadata and where they belong. Which entries count is found without any pointer into the log:
//!
//! ```text
//!      stale      ┌──────────── one chain: each valid, seq + 1, end to start ───────────┐
//!  ┊ seq 71 ┊ … ┊ │ seq 5 │ seq 6 │ seq 7 (tail) │ seq 8 │ seq 9: "tail is at seq 7" │ ┊ garbage
//!                                  └──────────── these are replayed ───────────────────┘
//! ```
//!
//! A chain counts only if its last entry's tail is in it; of several, the one with the greatest
//! sequence number wins.
//!
//! Invariant that keeps the search linear: valid entries cannot overlap, because each of their
//! sectors starts with a signature of its own kind. So an entry is followed by one other at most,
//! and follows one other at most.

use std::collections::HashMap;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::disk;
use super::layout::{
    Guid, LOG_DATA_DESCRIPTOR, LOG_DATA_SIGNATURE, LOG_DESCRIPTOR_LEN, LOG_ENTRY_HEADER_LEN,
    LOG_ENTRY_SIGNATURE, LOG_SECTOR, LOG_ZERO_DESCRIPTOR, PAGE, RawLogData, RawLogDescriptor,
    RawLogHeader,
};
use crate::crc32c;
use crate::error::{Error, Result};
use crate::io::{AlignedBuf, File};
use crate::units::{ByteRange, align_down};

/// How much of the log is read at once, in bytes. So much of it is in memory at a time.
const PIECE: u64 = 256 << 10;

/// A valid entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it starts, from the start of the log.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Where the oldest entry is that was needed when this one was written.
    pub tail: u64,
    /// Its place in the order.
    pub sequence: u64,
    /// How many descriptors it has.
    pub descriptors: u64,
    /// The file was durably this long when the entry was written.
    pub flushed_file_offset: u64,
    /// The file must be this long when the entry is applied.
    pub last_file_offset: u64,
}

/// What an entry does to a part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Puts a page at `offset`.
    Page {
        /// Where in the file.
        offset: u64,
        /// Where it comes from.
        source: PageSource,
    },
    /// Puts zeros.
    Zeros(ByteRange),
}

/// A page as the log holds it: most of it in a data sector, both ends in the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSource {
    /// Place of the data sector in the file.
    pub sector: u64,
    leading: [u8; 8],
    trailing: [u8; 4],
}

impl PageSource {
    /// Makes a page of its data sector.
    fn complete(&self, sector: &mut [u8]) {
        sector[..8].copy_from_slice(&self.leading);
        sector[LOG_SECTOR as usize - 4..].copy_from_slice(&self.trailing);
    }

    /// Puts pages together, one after the other, at the start of `pages`, which nobody else uses and
    /// which has room for them. Those whose sectors lie side by side come with one read, each into its
    /// place.
    pub async fn read_all(
        sources: &[PageSource],
        file: &Arc<dyn File>,
        pages: &mut AlignedBuf,
    ) -> Result<()> {
        let mut order: Vec<usize> = (0..sources.len()).collect();
        order.sort_unstable_by_key(|i| sources[*i].sector);
        for run in order.chunk_by(|a, b| sources[*a].sector + LOG_SECTOR == sources[*b].sector) {
            let places = run.iter().map(|i| *i as u64 * PAGE..(*i as u64 + 1) * PAGE);
            file.read(sources[run[0]].sector, pages.buffers().parts(places)).await?;
        }
        for (source, page) in sources.iter().zip(pages.as_slice().chunks_exact_mut(PAGE as usize)) {
            source.complete(page);
        }
        Ok(())
    }
}

/// What is to be replayed of a log.
pub struct Active {
    /// The entries, oldest first. There is at least one.
    pub entries: Vec<Entry>,
    /// Sequence numbers of the first and the last whole entry that is later than those.
    pub cut_off: Option<(u64, u64)>,
}

/// Reads a log.
pub struct LogReader<'a> {
    file: &'a Arc<dyn File>,
    /// Where the log is in the file.
    log: ByteRange,
    guid: Guid,
    /// What is in memory.
    piece: Option<Piece>,
    /// Up to where the part of the log that is being looked at was written, and a hole may begin.
    data_until: u64,
    /// The descriptors of the valid entries that were found, by the place of the entry: a 128th of
    /// what the entries take, mostly, and what makes one pass enough.
    descriptors: HashMap<u64, Vec<RawLogDescriptor>>,
}

/// A part of the log in memory.
struct Piece {
    start: u64,
    len: u64,
    /// As long as a piece can be.
    bytes: AlignedBuf,
}

impl<'a> LogReader<'a> {
    /// A reader of the entries with this GUID.
    pub fn new(file: &'a Arc<dyn File>, log: ByteRange, guid: Guid) -> LogReader<'a> {
        LogReader { file, log, guid, piece: None, data_until: 0, descriptors: HashMap::new() }
    }

    /// The entries to replay.
    ///
    /// # Errors
    /// Kind [`Corrupt`](crate::ErrorKind::Corrupt) if no entry counts.
    pub async fn active(&mut self) -> Result<Active> {
        let valid = self.valid_entries().await?;
        let best = chains(&valid, self.log.len)
            .into_iter()
            .filter_map(|chain| {
                let last = chain.last()?;
                let from = chain.iter().position(|entry| entry.offset == last.tail)?;
                Some(chain[from..].to_vec())
            })
            .max_by_key(|chain| chain.last().map(|entry| entry.sequence));
        let entries = best.ok_or_else(|| {
            Error::corrupt(format!(
                "the header says that the log of {} must be replayed, but it holds no valid \
                 sequence of entries ({} valid ones)",
                self.log,
                valid.len()
            ))
        })?;
        let last = entries.last().map_or(0, |entry| entry.sequence);
        let later = || valid.iter().map(|entry| entry.sequence).filter(|sequence| *sequence > last);
        Ok(Active { cut_off: later().min().zip(later().max()), entries })
    }

    /// All valid entries, whether or not they count.
    pub async fn valid_entries(&mut self) -> Result<Vec<Entry>> {
        let mut found = Vec::new();
        let mut offset = 0;
        while offset < self.log.len {
            if let Some(end) = self.hole_at(offset)? {
                offset = end;
                continue;
            }
            let entry = self.entry(offset).await?;
            // What is inside a valid entry is no other one's start.
            offset += entry.map_or(LOG_SECTOR, |entry| entry.len);
            found.extend(entry);
        }
        Ok(found)
    }

    /// The end of the hole of the file at `offset`, where no entry begins, if a sector or more lies in
    /// one there. In a log that never went around, that is most of it.
    fn hole_at(&mut self, offset: u64) -> Result<Option<u64>> {
        if offset < self.data_until {
            return Ok(None);
        }
        let hole = self.file.hole_at(self.log.offset + offset)?;
        let end = (hole.range.end() - self.log.offset).min(self.log.len);
        if hole.is_hole && align_down(end, LOG_SECTOR) > offset {
            return Ok(Some(align_down(end, LOG_SECTOR)));
        }
        self.data_until = end.max(offset + 1).next_multiple_of(LOG_SECTOR);
        Ok(None)
    }

    /// What an entry changes, in order. It is one of those that were found last, and is asked for once.
    ///
    /// # Errors
    /// Kind [`Corrupt`](crate::ErrorKind::Corrupt) if it zeroes what has no end.
    pub fn changes(&mut self, entry: &Entry) -> Result<Vec<Change>> {
        let descriptors = self.descriptors.remove(&entry.offset).unwrap_or_default();
        let mut data_sector = entry.offset + descriptor_sectors(entry.descriptors) * LOG_SECTOR;
        let mut change = |descriptor: RawLogDescriptor| {
            let RawLogDescriptor { leading, trailing, .. } = descriptor;
            let offset = descriptor.file_offset.get();
            if descriptor.signature == *LOG_DATA_DESCRIPTOR {
                let sector = self.log.offset + data_sector % self.log.len;
                data_sector += LOG_SECTOR;
                let source = PageSource { sector, leading, trailing };
                return Ok(Change::Page { offset, source });
            }
            let len = u64::from_le_bytes(leading);
            let range = ByteRange::new(offset, len)
                .ok_or_else(|| Error::corrupt(format!("the log zeroes {len} bytes at {offset}")))?;
            Ok(Change::Zeros(range))
        };
        descriptors.into_iter().map(&mut change).collect()
    }

    /// The valid entry at `offset`, if there is one.
    async fn entry(&mut self, offset: u64) -> Result<Option<Entry>> {
        let first = self.sector(offset).await?;
        let Ok((header, _)) = RawLogHeader::read_from_prefix(first) else { return Ok(None) };
        let len = u64::from(header.entry_length.get());
        let count = u64::from(header.descriptor_count.get());
        let sequence = header.sequence.get();
        let plausible = header.signature == *LOG_ENTRY_SIGNATURE
            && header.log_guid == self.guid
            && sequence > 0
            && len > 0
            && len <= self.log.len
            && len.is_multiple_of(LOG_SECTOR)
            && u64::from(header.tail.get()).is_multiple_of(LOG_SECTOR)
            && u64::from(header.tail.get()) < self.log.len
            && descriptor_sectors(count) * LOG_SECTOR <= len;
        if !plausible {
            return Ok(None);
        }
        let Some((descriptors, crc)) = self.body(offset, len, count, sequence).await? else {
            return Ok(None);
        };
        if crc != header.checksum.get() {
            return Ok(None);
        }
        self.descriptors.insert(offset, descriptors);
        Ok(Some(Entry {
            offset,
            len,
            tail: header.tail.get().into(),
            sequence,
            descriptors: count,
            flushed_file_offset: header.flushed_file_offset.get(),
            last_file_offset: header.last_file_offset.get(),
        }))
    }

    /// The descriptors of an entry and its checksum, by one pass over it. `None` unless all its
    /// descriptors and data sectors are there and carry its number.
    async fn body(
        &mut self,
        offset: u64,
        len: u64,
        count: u64,
        sequence: u64,
    ) -> Result<Option<(Vec<RawLogDescriptor>, u32)>> {
        let first_data = descriptor_sectors(count);
        let mut descriptors = Vec::new();
        let mut data_sectors = 0;
        let mut crc = 0;
        for i in 0..len / LOG_SECTOR {
            let sector = self.sector(offset + i * LOG_SECTOR).await?;
            crc = match i {
                // Its own field counts as zero.
                0 => {
                    let crc = crc32c::crc32c_append(crc32c::crc32c(&sector[..4]), &[0; 4]);
                    crc32c::crc32c_append(crc, &sector[8..])
                }
                _ => crc32c::crc32c_append(crc, sector),
            };
            if i >= first_data {
                if !is_data_of(sector, sequence) {
                    return Ok(None);
                }
                continue;
            }
            let head = if i == 0 { LOG_ENTRY_HEADER_LEN as usize } else { 0 };
            let missing = count as usize - descriptors.len();
            for bytes in sector[head..].chunks_exact(LOG_DESCRIPTOR_LEN as usize).take(missing) {
                let Ok(descriptor) = RawLogDescriptor::read_from_bytes(bytes) else {
                    return Ok(None);
                };
                if !is_descriptor_of(&descriptor, sequence) {
                    return Ok(None);
                }
                data_sectors += u64::from(descriptor.signature == *LOG_DATA_DESCRIPTOR);
                descriptors.push(descriptor);
            }
            if i + 1 == first_data && (first_data + data_sectors) * LOG_SECTOR != len {
                return Ok(None);
            }
        }
        Ok(Some((descriptors, crc)))
    }

    /// The sector at `offset` of the log, which goes on from its end to its start.
    async fn sector(&mut self, offset: u64) -> Result<&[u8]> {
        let offset = offset % self.log.len;
        let has = |piece: &Piece| offset >= piece.start && offset < piece.start + piece.len;
        if !self.piece.as_ref().is_some_and(has) {
            let mut end = (offset + PIECE).min(self.log.len);
            if offset < self.data_until {
                // Nothing of the hole behind it: the host would fill memory with zeros, far ahead.
                end = end.min(self.data_until);
            }
            // The memory of the piece before serves again.
            let before = self.piece.take().map(|piece| piece.bytes);
            let bytes = before.unwrap_or_else(|| disk::memory(PIECE.min(self.log.len)));
            let len = end - offset;
            self.file.read(self.log.offset + offset, bytes.buffers().slice(0, len)).await?;
            self.piece = Some(Piece { start: offset, len, bytes });
        }
        let piece = self.piece.as_mut().expect("just filled");
        let from = (offset - piece.start) as usize;
        Ok(&piece.bytes.as_slice()[from..from + LOG_SECTOR as usize])
    }
}

/// Whether a descriptor is one of the entry with this number.
fn is_descriptor_of(descriptor: &RawLogDescriptor, sequence: u64) -> bool {
    let zeros = u64::from_le_bytes(descriptor.leading);
    let fits = match &descriptor.signature {
        LOG_DATA_DESCRIPTOR => true,
        LOG_ZERO_DESCRIPTOR => zeros.is_multiple_of(PAGE),
        _ => false,
    };
    fits && descriptor.file_offset.get().is_multiple_of(PAGE)
        && descriptor.sequence.get() == sequence
}

/// Whether a sector holds a page of the entry with this number.
fn is_data_of(sector: &[u8], sequence: u64) -> bool {
    RawLogData::ref_from_bytes(sector).is_ok_and(|data| {
        let number = u64::from(data.sequence_high.get()) << 32 | u64::from(data.sequence_low.get());
        data.signature == *LOG_DATA_SIGNATURE && number == sequence
    })
}

/// How many sectors the header and the descriptors of an entry take.
fn descriptor_sectors(count: u64) -> u64 {
    (LOG_ENTRY_HEADER_LEN + count * LOG_DESCRIPTOR_LEN).div_ceil(LOG_SECTOR)
}

/// Sorts entries into chains: each follows the one before in place and in number.
fn chains(entries: &[Entry], log_len: u64) -> Vec<Vec<Entry>> {
    let by_offset: HashMap<u64, &Entry> = entries.iter().map(|e| (e.offset, e)).collect();
    let next = |entry: &Entry| {
        let after = by_offset.get(&((entry.offset + entry.len) % log_len)).copied()?;
        (Some(after.sequence) == entry.sequence.checked_add(1)).then_some(after)
    };
    let followers: std::collections::HashSet<u64> =
        entries.iter().filter_map(|entry| next(entry).map(|after| after.offset)).collect();
    let starts = entries.iter().filter(|entry| !followers.contains(&entry.offset));
    starts
        .map(|start| std::iter::successors(Some(start), |entry| next(entry)).copied().collect())
        .collect()
}

/// What a new entry needs besides its pages.
#[derive(Clone, Copy, Debug)]
pub struct NewEntry {
    /// The header's LogGuid.
    pub guid: Guid,
    /// One more than that of the entry before.
    pub sequence: u64,
    /// Where the oldest entry is that is still needed, from the start of the log.
    pub tail: u64,
    /// The file's length as of the last flush.
    pub flushed_file_offset: u64,
    /// The file's length now.
    pub last_file_offset: u64,
}

/// Length of an entry with this many pages.
pub fn entry_len(pages: u64) -> u64 {
    (descriptor_sectors(pages) + pages) * LOG_SECTOR
}

impl NewEntry {
    /// The bytes of an entry that puts these pages (offset in the file, 4 KiB each) in place.
    pub fn encode(&self, pages: &[(u64, &[u8])]) -> Vec<u8> {
        let len = entry_len(pages.len() as u64);
        let mut bytes = Vec::with_capacity(len as usize);
        let header = RawLogHeader {
            signature: *LOG_ENTRY_SIGNATURE,
            checksum: 0.into(),
            entry_length: (len as u32).into(),
            tail: (self.tail as u32).into(),
            sequence: self.sequence.into(),
            descriptor_count: (pages.len() as u32).into(),
            reserved: 0.into(),
            log_guid: self.guid,
            flushed_file_offset: self.flushed_file_offset.into(),
            last_file_offset: self.last_file_offset.into(),
        };
        bytes.extend_from_slice(header.as_bytes());
        for (offset, page) in pages {
            let descriptor = RawLogDescriptor {
                signature: *LOG_DATA_DESCRIPTOR,
                trailing: page[PAGE as usize - 4..].try_into().expect("4 bytes"),
                leading: page[..8].try_into().expect("8 bytes"),
                file_offset: (*offset).into(),
                sequence: self.sequence.into(),
            };
            bytes.extend_from_slice(descriptor.as_bytes());
        }
        bytes.resize((descriptor_sectors(pages.len() as u64) * LOG_SECTOR) as usize, 0);
        for (_, page) in pages {
            bytes.extend_from_slice(LOG_DATA_SIGNATURE);
            bytes.extend_from_slice(&((self.sequence >> 32) as u32).to_le_bytes());
            bytes.extend_from_slice(&page[8..PAGE as usize - 4]);
            bytes.extend_from_slice(&(self.sequence as u32).to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::block_on;
    use crate::io::sim::{SimFile, SimOp};
    use crate::units::MIB;

    const LOG: ByteRange = ByteRange { offset: MIB, len: 64 << 10 };
    const GUID: Guid = Guid([5; 16]);

    fn new(sequence: u64, tail: u64) -> NewEntry {
        let (flushed_file_offset, last_file_offset) = (2 * MIB, 4 * MIB);
        NewEntry { guid: GUID, sequence, tail, flushed_file_offset, last_file_offset }
    }

    fn page(fill: u8) -> Vec<u8> {
        let mut page = vec![fill; PAGE as usize];
        page[0] = 0xaa;
        page[4095] = 0xbb;
        page
    }

    /// A log with these entries at these places.
    fn file(entries: &[(u64, Vec<u8>)]) -> Arc<dyn File> {
        let mut content = vec![0; 4 << 20];
        for (offset, bytes) in entries {
            for (i, byte) in bytes.iter().enumerate() {
                content[(LOG.offset + (offset + i as u64) % LOG.len) as usize] = *byte;
            }
        }
        Arc::new(SimFile::from_bytes("test.vhdx", content))
    }

    fn active(entries: &[(u64, Vec<u8>)]) -> Result<Vec<u64>> {
        let file = file(entries);
        let found = block_on(LogReader::new(&file, LOG, GUID).active())?;
        Ok(found.entries.iter().map(|entry| entry.sequence).collect())
    }

    fn empty(sequence: u64, tail: u64) -> Vec<u8> {
        new(sequence, tail).encode(&[])
    }

    #[test]
    fn pages_come_out_as_they_went_in() {
        let pages = [page(1), page(2), page(3)];
        let listed: Vec<(u64, &[u8])> = pages
            .iter()
            .zip([3 * MIB, 3 * MIB + 4096, 2 * MIB])
            .map(|(p, o)| (o, &p[..]))
            .collect();
        // Wraps around the end of the log.
        let file = file(&[(56 << 10, new(u64::from(u32::MAX) + 9, 56 << 10).encode(&listed))]);
        block_on(async {
            let mut reader = LogReader::new(&file, LOG, GUID);
            let found = reader.active().await.unwrap().entries;
            assert_eq!((found.len(), found[0].last_file_offset), (1, 4 * MIB));
            let changes = reader.changes(&found[0]).unwrap();
            assert_eq!(changes.len(), listed.len());
            for (change, (offset, page)) in changes.iter().zip(&listed) {
                let Change::Page { offset: at, source } = change else { panic!("{change:?}") };
                assert_eq!(at, offset);
                let mut read = disk::memory(PAGE);
                PageSource::read_all(&[*source], &file, &mut read).await.unwrap();
                assert_eq!(read.as_slice(), *page);
            }
        });
    }

    #[test]
    fn replay_starts_at_the_tail() {
        let at = |i: u64| i * 4096;
        let chain = [(at(0), empty(5, 0)), (at(1), empty(6, 0)), (at(2), empty(7, at(1)))];
        assert_eq!(active(&chain).unwrap(), [6, 7]);
        // Torn: the entry before is the last one.
        assert_eq!(active(&chain[..2]).unwrap(), [5, 6]);
        // A hole in the chain: what comes after has no tail.
        let damaged = [chain[0].clone(), chain[2].clone(), (at(3), empty(8, at(1)))];
        assert_eq!(active(&damaged).unwrap(), [5]);
        let found = block_on(LogReader::new(&file(&damaged), LOG, GUID).active()).unwrap();
        assert_eq!(found.cut_off, Some((7, 8)));
        let found = block_on(LogReader::new(&file(&chain), LOG, GUID).active()).unwrap();
        assert_eq!(found.cut_off, None);
        // Nothing counts.
        let err = active(&chain[2..]).unwrap_err().to_string();
        assert!(err.contains("no valid sequence of entries (1 valid ones)"), "{err}");
    }

    #[test]
    fn chains_go_around_the_end() {
        let last = LOG.len - 4096;
        let chain = [(last, empty(8, last)), (0, empty(9, last)), (4096, empty(10, last))];
        assert_eq!(active(&chain).unwrap(), [8, 9, 10]);
        // Older entries after the newest do not belong to it.
        let mut with_old = chain.to_vec();
        with_old.push((8192, empty(3, 8192)));
        assert_eq!(active(&with_old).unwrap(), [8, 9, 10]);
    }

    #[test]
    fn damage_makes_an_entry_invalid() {
        let body = page(7);
        let whole = new(1, 0).encode(&[(3 * MIB, &body)]);
        assert!(active(&[(0, whole.clone())]).is_ok());
        for at in [0, 5, 9, 13, 17, 40, 64, 70, 84, 90, 3000, 4096, 4100, 6000, 8191] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x40;
            assert!(active(&[(0, damaged)]).is_err(), "byte {at}");
        }
        let other = NewEntry { guid: Guid([6; 16]), ..new(1, 0) };
        assert!(active(&[(0, other.encode(&[]))]).is_err());
    }

    #[test]
    fn a_log_full_of_heads_is_searched_quickly() {
        // Each sector claims to be an entry of the whole log.
        let mut liar = empty(1, 0);
        liar[8..12].copy_from_slice(&(LOG.len as u32).to_le_bytes());
        let entries: Vec<_> = (0..16).map(|i| (i * 4096, liar.clone())).collect();
        assert!(active(&entries).is_err());
    }

    #[test]
    fn what_was_written_of_a_log_is_read_once() {
        const LONG: ByteRange = ByteRange { offset: MIB, len: 8 * MIB };
        let body = page(3);
        // More than one sector of descriptors.
        let pages: Vec<_> = (0..130).map(|n| (LONG.end() + n * PAGE, body.as_slice())).collect();
        let mut content = vec![0; 16 << 20];
        let mut at = LONG.offset as usize;
        for sequence in 1..=15 {
            let bytes = new(sequence, 0).encode(&pages);
            content[at..at + bytes.len()].copy_from_slice(&bytes);
            at += bytes.len();
        }
        let sim = SimFile::from_bytes("test.vhdx", content);
        let file: Arc<dyn File> = Arc::new(sim.clone());
        let mut reader = LogReader::new(&file, LONG, GUID);
        let found = block_on(reader.active()).unwrap();
        assert_eq!(found.entries.len(), 15);
        for entry in &found.entries {
            let changes = reader.changes(entry).unwrap();
            let places: Vec<u64> = changes
                .iter()
                .map(|change| match change {
                    Change::Page { offset, .. } => *offset,
                    Change::Zeros(range) => panic!("{range}"),
                })
                .collect();
            assert!(places.iter().eq(pages.iter().map(|(offset, _)| offset)));
        }
        let written = at as u64 - LONG.offset;
        assert_eq!(sim.count(SimOp::Read), written.div_ceil(PIECE));
        assert!(written.div_ceil(PIECE) < LONG.len / PIECE);
    }
}
