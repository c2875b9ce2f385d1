//! The sidecar of a log: what vublk knows of its entries and the log has no place for.
//!
//! ```text
//! 0      header    whose log it is: image, size, sector size; whether recording ended in order
//! 4096   record of entry 0 ▏64 bytes▕
//! 4160   record of entry 1
//! …
//! ```
//!
//! A record is written after its entry and before the request completes. It holds the entry's CRC,
//! so after the process was killed the records tell which entries that the superblock does not
//! count yet are whole; and in which order requests were submitted and completed, which a log of
//! entries in the order of their completion cannot tell.
//!
//! Nobody needs the sidecar to read the log. It is not flushed with each flush of the guest: after a
//! power cut the superblock's count is what holds, and records behind it mean nothing.
//!
//! The layout is described in `docs/write-log.md`; all integers are little-endian.

use std::path::PathBuf;
use std::sync::Arc;

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::crc32c;
use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, File};
use crate::units::ByteRange;
use crate::write_log::{Entry, Log};

/// What a sidecar begins with.
pub const MAGIC: [u8; 8] = *b"vublkWLS";
/// The version that this program writes.
pub const VERSION: u32 = 1;
/// Length of the header, in bytes.
pub const HEADER_LEN: u64 = 4096;
/// Length of a record, in bytes.
pub const RECORD_LEN: u64 = 64;
/// Longest path of an image that the header holds, in bytes.
const PATH_ROOM: usize = 1024;

/// Recording ended in order: the image was not written by us after the last entry.
const CLOSED: u32 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    /// CRC32C of the header's 4096 bytes, with this field zero.
    crc: U32,
    record_len: U32,
    sector_size: U32,
    flags: U32,
    path_len: U32,
    disk_size: U64,
    image_dev: U64,
    image_ino: U64,
    image_born_ns: I64,
    image_changed_ns: I64,
    first_entry: U64,
    boot_id: [u8; 40],
    path: [u8; PATH_ROOM],
    session: [u8; 16],
}

#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    /// CRC32C of the record's other 60 bytes.
    crc: U32,
    flags: U16,
    queue: U16,
    entry: U64,
    log_sector: U64,
    submitted: U64,
    completed: U64,
    entry_crc: U32,
    reserved: [u8; 20],
}

const _: () = assert!(size_of::<RawRecord>() == RECORD_LEN as usize);
const _: () = assert!(size_of::<RawHeader>() <= HEADER_LEN as usize);

/// Which file an image is in, so that a log is not continued for another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageIdentity {
    /// Device and inode number.
    pub file: (u64, u64),
    /// When the file was made, in nanoseconds since 1970; 0 if the host does not say. Tells apart
    /// files that got the same inode one after the other.
    pub born_ns: i64,
    /// Its path, for messages.
    pub path: PathBuf,
}

impl ImageIdentity {
    /// Whether both are the same file, wherever it is now.
    pub fn is_same(&self, other: &ImageIdentity) -> bool {
        let unknown = self.born_ns == 0 || other.born_ns == 0;
        self.file == other.file && (unknown || self.born_ns == other.born_ns)
    }
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The image whose writes are in the log.
    pub image: ImageIdentity,
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Size of a log sector in bytes.
    pub sector_size: u32,
    /// Entries before this one have no record: they were in the log before.
    pub first_entry: u64,
    /// Which boot of the host it was recorded in, as the kernel spells it.
    pub boot_id: [u8; 40],
    /// Names the notes of what is under way (`filters::write_log::under_way`); 0 if there are none.
    pub session: u128,
    /// When recording ended in order: when the image's file was last changed, in nanoseconds since
    /// 1970.
    pub closed: Option<i64>,
}

/// What a record says of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// The entry's number.
    pub entry: u64,
    /// The log sector of its header.
    pub log_sector: u64,
    /// When its request was submitted, counted in events (submissions and completions) of this log.
    pub submitted: u64,
    /// When it took its place in the log, in the same count. Increases with the entry's number.
    pub completed: u64,
    /// The queue it came from, if it came from one.
    pub queue: Option<u16>,
    /// CRC32C of header and data, or of the header alone if it says that the data are zeros.
    pub crc: u32,
    /// What the CRC covers, and whether the request was over.
    pub state: RecordState,
}

/// See [`Record::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// The CRC covers header and data.
    Whole,
    /// The data are zeros, a hole in the log, and the CRC covers the header alone.
    Zeros,
    /// A flush that has its place in the log, but had not ended when the record was written.
    Pending,
}

/// Bits of a record's `flags`.
mod bits {
    pub const VALID: u16 = 1;
    pub const ZEROS: u16 = 2;
    pub const PENDING: u16 = 4;
}

/// Stands for "from no queue".
const NO_QUEUE: u16 = u16::MAX;

impl Record {
    /// The record's bytes.
    pub fn to_bytes(&self) -> [u8; RECORD_LEN as usize] {
        let state = match self.state {
            RecordState::Whole => 0,
            RecordState::Zeros => bits::ZEROS,
            RecordState::Pending => bits::PENDING,
        };
        let mut raw = RawRecord {
            crc: 0.into(),
            flags: (bits::VALID | state).into(),
            queue: self.queue.unwrap_or(NO_QUEUE).into(),
            entry: self.entry.into(),
            log_sector: self.log_sector.into(),
            submitted: self.submitted.into(),
            completed: self.completed.into(),
            entry_crc: self.crc.into(),
            reserved: [0; 20],
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[4..]).into();
        let mut bytes = [0; RECORD_LEN as usize];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// The record in these bytes; `None` if there is none, or a damaged one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Record> {
        let raw = RawRecord::read_from_prefix(bytes).ok()?.0;
        if raw.crc.get() != crc32c::crc32c(&raw.as_bytes()[4..]) {
            return None;
        }
        let state = match raw.flags.get() {
            flags if flags == bits::VALID => RecordState::Whole,
            flags if flags == bits::VALID | bits::ZEROS => RecordState::Zeros,
            flags if flags == bits::VALID | bits::PENDING => RecordState::Pending,
            _ => return None,
        };
        Some(Record {
            entry: raw.entry.get(),
            log_sector: raw.log_sector.get(),
            submitted: raw.submitted.get(),
            completed: raw.completed.get(),
            queue: Some(raw.queue.get()).filter(|queue| *queue != NO_QUEUE),
            crc: raw.entry_crc.get(),
            state,
        })
    }

    /// Where the record of an entry lies in the sidecar.
    pub fn position(entry: u64) -> u64 {
        HEADER_LEN.saturating_add(entry.saturating_mul(RECORD_LEN))
    }
}

impl Header {
    /// The header's bytes.
    ///
    /// # Errors
    /// If the image's path is too long.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        use std::os::unix::ffi::OsStrExt;
        let path = self.image.path.as_os_str().as_bytes();
        let mut room = [0; PATH_ROOM];
        room.get_mut(..path.len())
            .ok_or_else(|| {
                Error::invalid(format!(
                    "{}: its path is too long for the log's sidecar ({PATH_ROOM} bytes)",
                    self.image.path.display()
                ))
            })?
            .copy_from_slice(path);
        let raw = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            crc: 0.into(),
            record_len: (RECORD_LEN as u32).into(),
            sector_size: self.sector_size.into(),
            flags: self.closed.map_or(0, |_| CLOSED).into(),
            path_len: (path.len() as u32).into(),
            disk_size: self.disk_size.into(),
            image_dev: self.image.file.0.into(),
            image_ino: self.image.file.1.into(),
            image_born_ns: self.image.born_ns.into(),
            image_changed_ns: self.closed.unwrap_or(0).into(),
            first_entry: self.first_entry.into(),
            boot_id: self.boot_id,
            path: room,
            session: self.session.to_le_bytes(),
        };
        let mut bytes = vec![0; HEADER_LEN as usize];
        bytes[..size_of::<RawHeader>()].copy_from_slice(raw.as_bytes());
        let crc = crc32c::crc32c(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    /// The header in these bytes.
    ///
    /// # Errors
    /// Says why it is none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Header> {
        use std::os::unix::ffi::OsStrExt;
        let bytes = bytes.get(..HEADER_LEN as usize);
        let bytes = bytes.ok_or_else(|| Error::corrupt("too short for the sidecar of a log"))?;
        let raw = RawHeader::read_from_prefix(bytes).map_err(|_| Error::corrupt("short read"))?.0;
        if raw.magic != MAGIC {
            return Err(Error::corrupt("not the sidecar of a log"));
        }
        if raw.version.get() != VERSION || u64::from(raw.record_len.get()) != RECORD_LEN {
            return Err(Error::unsupported(format!(
                "sidecar of version {} with records of {} bytes ({VERSION} and {RECORD_LEN} are \
                 known)",
                raw.version, raw.record_len
            )));
        }
        let mut zeroed = bytes.to_vec();
        zeroed[CRC_AT..CRC_AT + 4].fill(0);
        if raw.crc.get() != crc32c::crc32c(&zeroed) {
            return Err(Error::corrupt("the sidecar's header is damaged (CRC)"));
        }
        let path = raw.path.get(..raw.path_len.get() as usize).unwrap_or_default();
        Ok(Header {
            image: ImageIdentity {
                file: (raw.image_dev.get(), raw.image_ino.get()),
                born_ns: raw.image_born_ns.get(),
                path: std::ffi::OsStr::from_bytes(path).into(),
            },
            disk_size: raw.disk_size.get(),
            sector_size: raw.sector_size.get(),
            first_entry: raw.first_entry.get(),
            boot_id: raw.boot_id,
            session: u128::from_le_bytes(raw.session),
            closed: (raw.flags.get() & CLOSED != 0).then(|| raw.image_changed_ns.get()),
        })
    }
}

/// Where the header's CRC lies.
const CRC_AT: usize = 12;

/// How many records are read at a time.
const WINDOW: u64 = 1024;

/// What a sidecar has for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Nothing.
    Empty,
    /// Bytes that are no record of it: a torn one, or one of another entry.
    Broken,
    /// Its record.
    Record(Record),
}

/// A sidecar, for reading.
#[derive(Debug)]
pub struct Sidecar {
    file: Arc<dyn File>,
    header: Header,
    /// Length of the file, in bytes.
    len: u64,
    /// Records read last, and the number of the first of them.
    window: (u64, Vec<u8>),
}

impl Sidecar {
    /// Reads the header of the sidecar in `file`.
    pub async fn open(file: Arc<dyn File>) -> Result<Sidecar> {
        let name = file.name().to_string();
        let read = async {
            let len = file.len()?;
            let bytes = read_at(&*file, 0, HEADER_LEN.min(len)).await?;
            Ok((len, Header::from_bytes(&bytes)?))
        };
        let (len, header) = read.await.map_err(|err: Error| err.context(name))?;
        Ok(Sidecar { file, header, len, window: (0, Vec::new()) })
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Name of the file.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// The record of an entry; `None` if it has none that is whole.
    pub async fn record(&mut self, entry: u64) -> Result<Option<Record>> {
        Ok(match self.slot(entry).await? {
            Slot::Record(record) => Some(record),
            Slot::Empty | Slot::Broken => None,
        })
    }

    /// What there is for an entry.
    pub async fn slot(&mut self, entry: u64) -> Result<Slot> {
        let position = Record::position(entry);
        let end = position.saturating_add(RECORD_LEN);
        if entry < self.header.first_entry || end > self.len {
            return Ok(Slot::Empty);
        }
        let in_window = |window: &(u64, Vec<u8>)| {
            let at = usize::try_from(entry.checked_sub(window.0)?).ok()? * RECORD_LEN as usize;
            let bytes = window.1.get(at..at + RECORD_LEN as usize)?;
            Some(match Record::from_bytes(bytes).filter(|record| record.entry == entry) {
                Some(record) => Slot::Record(record),
                None if bytes.iter().all(|byte| *byte == 0) => Slot::Empty,
                None => Slot::Broken,
            })
        };
        let slot = match in_window(&self.window) {
            Some(slot) => slot,
            None => {
                let len = (WINDOW * RECORD_LEN).min(self.len - position);
                let bytes = read_at(&*self.file, position, len)
                    .await
                    .context(|| format!("{}: reading records", self.name()))?;
                self.window = (entry, bytes);
                in_window(&self.window).unwrap_or(Slot::Empty)
            }
        };
        Ok(slot)
    }
}

/// Reads a piece of a file without demands on alignment.
async fn read_at(file: &dyn File, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut buf = AlignedBuf::zeroed(len as usize, 512);
    file.read(offset, buf.buffers()).await?;
    Ok(buf.as_slice().to_vec())
}

/// Where the sidecar of the log at `log` lies, unless somebody says otherwise: beside it.
pub fn default_path(log: &std::path::Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".sidecar");
    name.into()
}

/// Whether an entry is what its record says: at that place, and with that CRC.
pub async fn matches(log: &Log, entry: &Entry, record: &Record) -> Result<bool> {
    const PIECE: u64 = 1 << 20;
    if record.log_sector != entry.log_sector() {
        return Ok(false);
    }
    let file = log.file();
    let header = ByteRange { offset: entry.position, len: log.sector_size() };
    let end = match record.state {
        RecordState::Whole => entry.end_position(),
        RecordState::Zeros | RecordState::Pending => header.end(),
    };
    let mut crc = 0;
    let mut at = header.offset;
    while at < end {
        let len = (end - at).min(PIECE);
        let bytes = log.read_bytes(ByteRange { offset: at, len }).await.context(|| {
            format!("{}: entry {}: reading it to check it", file.name(), entry.number)
        })?;
        crc = crc32c::crc32c_append(crc, &bytes);
        at += len;
    }
    Ok(crc == record.crc)
}
