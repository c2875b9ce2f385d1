//! Reading a log: the superblock once, the entries one after the other.
//!
//! [`Log::open`] checks the superblock, [`Log::walk`] streams the headers through a small buffer,
//! and [`Entry::data`] says where in the log's file an entry's data lies, for whoever wants to read
//! it. [`Index::read`] keeps all headers in memory (about 40 bytes each) for callers that jump
//! about.
//!
//! A log may come from anywhere, so nothing in it is believed: sums are checked, every entry must
//! lie inside the file, and what is allocated depends on the entries that are really there, never
//! on a number that a header claims. Errors name the file and the entry.

use std::fmt;
use std::sync::Arc;

use zerocopy::FromBytes;

use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, Buffers, File};
use crate::units::{ByteRange, align_down, align_up};
use crate::write_log::layout::{
    ENTRY_LEN, Flags, MAGIC, MAX_SECTOR_SIZE, RawEntry, RawSuperblock, SUPERBLOCK_LEN, Superblock,
    VERSION, is_sector_size,
};

/// How much of the log a walk over headers reads at a time. Small entries share a read, and of
/// large ones little is read in vain.
const HEADER_WINDOW: u64 = 64 << 10;
/// How much a walk reads at a time whose caller wants the data, too.
const DATA_WINDOW: u64 = 1 << 20;
/// The most data that such a walk reads with its header: where entries are larger, most of a window
/// would be read in vain, and headers are read alone.
const SMALL_DATA: u64 = DATA_WINDOW / 4;

/// An open log.
///
/// May be read while it is still written to: entries that the superblock counts do not change.
#[derive(Clone)]
pub struct Log {
    file: Arc<dyn File>,
    superblock: Superblock,
    /// Length of the file, in bytes.
    len: u64,
}

/// What an entry stands for. An entry may be durable data and a flush at once: the flush comes
/// first then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write, with its data in the log.
    Write,
    /// A discard.
    Discard,
    /// A flush without data.
    Flush,
    /// A mark.
    Mark,
}

/// The header of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number, from 0.
    pub number: u64,
    /// Where its header lies in the log's file, in bytes.
    pub position: u64,
    /// What it is.
    pub flags: Flags,
    /// The range on the disk that is written or discarded, in bytes. Empty for marks and for
    /// flushes without data; their position is what the log has and means nothing.
    pub target: ByteRange,
    /// Length of a mark's text in bytes, 0 for other entries.
    pub mark_len: u32,
    /// Size of a log sector in bytes.
    sector_size: u32,
}

impl Entry {
    /// What it stands for.
    pub fn kind(&self) -> Kind {
        match self.flags {
            flags if flags.has(Flags::DISCARD) => Kind::Discard,
            flags if flags.has(Flags::MARK) => Kind::Mark,
            _ if self.target.is_empty() => Kind::Flush,
            _ => Kind::Write,
        }
    }

    /// Whether everything before it was made durable.
    pub fn is_flush(&self) -> bool {
        self.flags.has(Flags::FLUSH)
    }

    /// Where its data lies in the log's file, for [`Kind::Write`].
    pub fn data(&self) -> Option<ByteRange> {
        (self.kind() == Kind::Write)
            .then(|| ByteRange { offset: self.data_position(), len: self.target.len })
    }

    /// Start on the disk in log sectors, as the log has it.
    pub fn sector(&self) -> u64 {
        self.target.offset / u64::from(self.sector_size)
    }

    /// Length in log sectors.
    pub fn sectors(&self) -> u64 {
        self.target.len / u64::from(self.sector_size)
    }

    /// The log sector of the header.
    pub fn log_sector(&self) -> u64 {
        self.position / u64::from(self.sector_size)
    }

    /// The log sector just after the header.
    pub fn data_sector(&self) -> u64 {
        self.data_position() / u64::from(self.sector_size)
    }

    /// The log sector just after the entry.
    pub fn end_sector(&self) -> u64 {
        self.end_position() / u64::from(self.sector_size)
    }

    /// The byte just after the entry.
    pub fn end_position(&self) -> u64 {
        self.data_position() + self.data().map_or(0, |data| data.len)
    }

    fn data_position(&self) -> u64 {
        self.position + u64::from(self.sector_size)
    }
}

/// A mark: a name for a place in the log.
#[derive(Clone, PartialEq, Eq)]
pub struct Mark(pub Vec<u8>);

impl fmt::Display for Mark {
    /// The text, with anything but printable characters escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_control() => write!(f, "{}", c.escape_default())?,
                    c => write!(f, "{c}")?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl Log {
    /// Opens the log in `file`.
    ///
    /// # Errors
    /// Kind [`Corrupt`](crate::ErrorKind::Corrupt) or [`Unsupported`](crate::ErrorKind::Unsupported)
    /// if it is not a log that can be read; names the file.
    pub async fn open(file: Arc<dyn File>) -> Result<Log> {
        let name = file.name().to_string();
        Log::open_unnamed(file).await.context(|| name)
    }

    async fn open_unnamed(file: Arc<dyn File>) -> Result<Log> {
        let len = file.len()?;
        if len < SUPERBLOCK_LEN as u64 {
            return Err(Error::corrupt(format!("log too short for a superblock ({len} bytes)")));
        }
        let head = read_at(&*file, ByteRange { offset: 0, len: SUPERBLOCK_LEN as u64 }, len)
            .await
            .context(|| "reading the superblock")?;
        let superblock = parse_superblock(&head, len)?;
        Ok(Log { file, superblock, len })
    }

    /// The file.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }

    /// Name of the file, for messages.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// The superblock, as of the opening.
    pub fn superblock(&self) -> Superblock {
        self.superblock
    }

    /// Size of a log sector in bytes.
    pub fn sector_size(&self) -> u64 {
        u64::from(self.superblock.sector_size)
    }

    /// How many entries there are.
    pub fn entries(&self) -> u64 {
        self.superblock.entries
    }

    /// Length of the log's file in bytes. It may be longer than its entries.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// The entries from the first one on.
    pub fn walk(&self) -> Walk<'_> {
        Walk {
            log: self,
            number: 0,
            position: self.sector_size(),
            wants_data: false,
            window: Window { reach: HEADER_WINDOW, ..Window::default() },
            header: Vec::new(),
            mark: Mark(Vec::new()),
        }
    }

    /// The entries after `entry`.
    pub fn walk_after(&self, entry: &Entry) -> Walk<'_> {
        Walk { number: entry.number + 1, position: entry.end_position(), ..self.walk() }
    }

    /// The entry whose header lies at `position`, even if the superblock does not count it.
    pub async fn entry_at(&self, number: u64, position: u64) -> Result<Entry> {
        Walk { number, position, ..self.walk() }.read_entry(number).await
    }

    /// Reads a range of the log's file, whatever alignment the file demands. The range must lie
    /// inside the file, and be short.
    pub async fn read_bytes(&self, range: ByteRange) -> Result<Vec<u8>> {
        read_at(&*self.file, range, self.len).await
    }

    /// The text of a mark.
    pub async fn read_mark(&self, entry: &Entry) -> Result<Mark> {
        let offset = entry.position + ENTRY_LEN as u64;
        let text = ByteRange { offset, len: u64::from(entry.mark_len) };
        read_at(&*self.file, text, self.len)
            .await
            .map(Mark)
            .context(|| format!("{}: entry {}: reading its mark", self.name(), entry.number))
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Log({}, {:?})", self.name(), self.superblock)
    }
}

/// Goes through the entries of a log in order.
#[derive(Debug)]
pub struct Walk<'a> {
    log: &'a Log,
    /// Number of the next entry.
    number: u64,
    /// Where it lies in the file, in bytes.
    position: u64,
    /// Whether the caller wants data of small entries as well.
    wants_data: bool,
    window: Window,
    /// The header that was read last.
    header: Vec<u8>,
    /// Text of the entry that was read last.
    mark: Mark,
}

impl Walk<'_> {
    /// The next entry, or `None` after the last one that the superblock counts.
    ///
    /// # Errors
    /// Names the entry that breaks the format. The walk is at its end then.
    pub async fn next(&mut self) -> Result<Option<Entry>> {
        if self.number >= self.log.entries() {
            return Ok(None);
        }
        let number = self.number;
        // Should this fail, or be dropped: no second try from a place that is wrong.
        self.number = u64::MAX;
        let entry = self
            .read_entry(number)
            .await
            .map_err(|err| err.context(format!("{}: entry {number}", self.log.name())))?;
        (self.number, self.position) = (number + 1, entry.end_position());
        // As this one was, so the next will be.
        let (window, small) = match self.wants_data {
            true => (DATA_WINDOW, SMALL_DATA),
            false => (HEADER_WINDOW, HEADER_WINDOW),
        };
        self.window.reach = match entry.data() {
            Some(data) if data.len > small => self.log.sector_size().max(4096),
            _ => window,
        };
        Ok(Some(entry))
    }

    /// The same walk, for a caller who wants the data as well: reads more at a time, for
    /// [`Walk::buffered`].
    pub fn with_data(mut self) -> Self {
        self.wants_data = true;
        self.window.reach = DATA_WINDOW;
        self
    }

    /// A range of the log's file, if the walk happens to have it in memory.
    pub fn buffered(&self, range: ByteRange) -> Option<Buffers> {
        self.window.has(range).then(|| self.window.slice(range))
    }

    /// The text of the mark that [`Walk::next`] has just given.
    pub fn mark(&self) -> &Mark {
        &self.mark
    }

    /// The log sector where the next entry begins.
    pub fn sector(&self) -> u64 {
        self.position / self.log.sector_size()
    }

    async fn read_entry(&mut self, number: u64) -> Result<Entry> {
        let sector = ByteRange::new(self.position, self.log.sector_size())
            .filter(|range| range.end() <= self.log.len)
            .ok_or_else(|| Error::corrupt("its header lies past the end of the log"))?;
        let header = &mut self.header;
        header.resize(self.log.sector_size() as usize, 0);
        self.window.copy(self.log, sector, header).await.context(|| "reading its header")?;
        let entry = parse_entry(header, number, self.position, self.log)?;
        self.mark.0.clear();
        self.mark.0.extend_from_slice(&header[ENTRY_LEN..ENTRY_LEN + entry.mark_len as usize]);
        Ok(entry)
    }
}

/// A piece of the log's file in memory.
#[derive(Debug)]
struct Window {
    /// How much is read at a time, in bytes.
    reach: u64,
    /// What is in memory, and where it lies in the file.
    range: ByteRange,
    bytes: AlignedBuf,
}

impl Default for Window {
    fn default() -> Self {
        let (range, bytes) = (ByteRange::default(), AlignedBuf::zeroed(0, 512));
        Window { reach: HEADER_WINDOW, range, bytes }
    }
}

impl Window {
    fn has(&self, range: ByteRange) -> bool {
        range.offset >= self.range.offset && range.end() <= self.range.end()
    }

    /// A range that is in memory.
    fn slice(&self, range: ByteRange) -> Buffers {
        self.bytes.buffers().slice(range.offset - self.range.offset, range.len)
    }

    /// Copies a range that is no longer than the reach, reading it if it is not in memory.
    async fn copy(&mut self, log: &Log, range: ByteRange, out: &mut [u8]) -> Result<()> {
        if !self.has(range) {
            let end = range.offset.saturating_add(self.reach).min(log.len);
            let wanted = ByteRange::between(range.offset, end);
            (self.range, self.bytes) = read_around(&*log.file, wanted, log.len).await?;
        }
        self.slice(range).copy_to_slice(out);
        Ok(())
    }
}

const _: () = assert!(HEADER_WINDOW >= MAX_SECTOR_SIZE as u64);

/// Reads a range of a file that is `file_len` long, and around it what the file's alignment
/// demands. Returns what was read, too.
async fn read_around(
    file: &dyn File,
    range: ByteRange,
    file_len: u64,
) -> Result<(ByteRange, AlignedBuf)> {
    let unit = file.alignment();
    let end = align_up(range.end(), unit.request).unwrap_or(file_len).min(file_len);
    let whole = ByteRange::between(align_down(range.offset, unit.request), end);
    let buf = AlignedBuf::zeroed(whole.len as usize, unit.memory.max(512));
    file.read(whole.offset, buf.buffers()).await?;
    Ok((whole, buf))
}

/// Reads a range of a file that is `file_len` long, whatever alignment the file demands.
async fn read_at(file: &dyn File, range: ByteRange, file_len: u64) -> Result<Vec<u8>> {
    let (whole, mut buf) = read_around(file, range, file_len).await?;
    let skip = (range.offset - whole.offset) as usize;
    Ok(buf.as_slice()[skip..skip + range.len as usize].to_vec())
}

/// Checks the superblock of a log in a file of `len` bytes.
fn parse_superblock(head: &[u8], len: u64) -> Result<Superblock> {
    let raw = RawSuperblock::read_from_prefix(head).map_err(|_| Error::corrupt("short read"))?.0;
    if raw.magic.get() != MAGIC {
        return Err(Error::corrupt(format!(
            "not a dm-log-writes log (magic {:#018x}, not {MAGIC:#018x})",
            raw.magic
        )));
    }
    if raw.version.get() != VERSION {
        return Err(Error::unsupported(format!("unsupported log version {}", raw.version)));
    }
    let sector_size = raw.sectorsize.get();
    if !is_sector_size(sector_size) {
        return Err(Error::corrupt(format!(
            "invalid log sector size {sector_size} (a power of two from 512 to 65536 is expected)"
        )));
    }
    let entries = raw.nr_entries.get();
    let room = (len / u64::from(sector_size)).saturating_sub(1);
    if entries > room {
        return Err(Error::corrupt(format!(
            "superblock claims {entries} entries but the file holds at most {room} sectors of \
             {sector_size} bytes for them"
        )));
    }
    Ok(Superblock { entries, sector_size })
}

/// Checks an entry's header, which lies at `position` of `log`.
fn parse_entry(header: &[u8], number: u64, position: u64, log: &Log) -> Result<Entry> {
    let sector_size = log.sector_size();
    let raw = RawEntry::read_from_prefix(header).map_err(|_| Error::corrupt("short read"))?.0;
    let (nr_sectors, data_len) = (raw.nr_sectors.get(), raw.data_len.get());
    let flags = Flags(raw.flags.get());
    if flags.unknown() != 0 {
        return Err(Error::corrupt(format!("unknown flags {:#x}", flags.unknown())));
    }
    if flags == Flags::NONE && nr_sectors == 0 {
        return Err(Error::corrupt("empty entry (neither data nor flags)"));
    }
    let others = Flags::FLUSH.and(Flags::FUA).and(Flags::MARK);
    if flags.has(Flags::DISCARD) && flags.0 & others.0 != 0 {
        return Err(Error::corrupt(format!("a discard cannot be {flags}")));
    }
    if flags != Flags::MARK && header[ENTRY_LEN] != 0 {
        return Err(Error::corrupt("its header is not padded with zeros"));
    }
    let target = nr_sectors
        .checked_mul(sector_size)
        .and_then(|len| ByteRange::new(raw.sector.get().checked_mul(sector_size)?, len))
        .ok_or_else(|| {
            Error::corrupt(format!(
                "its {nr_sectors} sectors from {} on lie beyond what any disk can have",
                raw.sector
            ))
        })?;
    let mark_len = check_data_len(flags, nr_sectors, data_len, target.len, sector_size)?;
    let sector_size = log.superblock.sector_size;
    let entry = Entry { number, position, flags, target, mark_len, sector_size };
    if let Some(data) = entry.data() {
        ByteRange::new(data.offset, data.len)
            .filter(|data| data.end() <= log.len)
            .ok_or_else(|| Error::corrupt("data runs past the end of the log"))?;
    }
    Ok(entry)
}

/// Checks the field that is the length of a mark's text, and nearly meaningless otherwise. Returns
/// the length of the text.
fn check_data_len(
    flags: Flags,
    nr_sectors: u64,
    data_len: u64,
    target_len: u64,
    sector_size: u64,
) -> Result<u32> {
    if flags.has(Flags::MARK) {
        if nr_sectors != 0 {
            return Err(Error::corrupt(format!("a mark cannot have data ({nr_sectors} sectors)")));
        }
        let room = sector_size - ENTRY_LEN as u64;
        if data_len > room {
            return Err(Error::corrupt(format!(
                "a mark of {data_len} bytes does not fit the {room} of its header"
            )));
        }
        return Ok(data_len as u32);
    }
    if data_len > target_len {
        return Err(Error::corrupt(format!(
            "its data length of {data_len} bytes is more than its {nr_sectors} sectors hold"
        )));
    }
    Ok(0)
}

/// All entries of a log, for callers that do not go through them in order.
#[derive(Clone, Debug, Default)]
pub struct Index {
    entries: Vec<Entry>,
    marks: Vec<(u64, Mark)>,
}

impl Index {
    /// Reads the headers of all entries.
    pub async fn read(log: &Log) -> Result<Index> {
        let mut index = Index::default();
        let mut walk = log.walk();
        while let Some(entry) = walk.next().await? {
            index.entries.push(entry);
            if entry.kind() == Kind::Mark {
                index.marks.push((entry.number, walk.mark().clone()));
            }
        }
        Ok(index)
    }

    /// Forgets all entries from number `len` on.
    pub fn truncate(&mut self, len: u64) {
        self.entries.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        self.marks.truncate(self.marks.partition_point(|(at, _)| *at < len));
    }

    /// The entries; each one's number is its place.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The marks with the numbers of their entries, in order.
    pub fn marks(&self) -> &[(u64, Mark)] {
        &self.marks
    }

    /// The last mark before entry `number`.
    pub fn mark_before(&self, number: u64) -> Option<&(u64, Mark)> {
        self.marks[..self.marks.partition_point(|(at, _)| *at < number)].last()
    }

    /// The first mark at or after entry `number`.
    pub fn mark_after(&self, number: u64) -> Option<&(u64, Mark)> {
        self.marks.get(self.marks.partition_point(|(at, _)| *at < number))
    }

    /// One past the last byte of the disk that any entry touches.
    pub fn highest_byte(&self) -> u64 {
        let touching = self.entries.iter().filter(|entry| !entry.target.is_empty());
        touching.map(|entry| entry.target.end()).max().unwrap_or(0)
    }
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
