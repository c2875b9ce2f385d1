//! Starting a log, or going on with one.
//!
//! | the log's file | sidecar | what happens |
//! |---|---|---|
//! | empty, or begins with zeros | | a new log |
//! | a log | of this image, ended in order, image unchanged since | goes on |
//! | a log | of this image, not ended, same boot of the host | goes on, after counting in what is whole |
//! | a log | of this image, not ended, and the disk holds something else | refused, unless told to append or overwrite |
//! | a log | none, or of another image, or the host went down | the same |
//! | anything else | | refused, unless told to overwrite |
//!
//! *Counting in*: a process that was killed had entries that the superblock does not count yet, and
//! the guest, which may live on, saw their requests completed. Each has a record with its CRC; they
//! are taken over one by one as long as entry and record agree. What comes after was completed to
//! nobody. A log in that state is never overwritten while the host is up, whatever was asked for:
//! the same command line is what restarts a process under a living guest.
//!
//! *Something else*: whatever is in the log was on the disk before, and a kill takes nothing from it.
//! So what the last entries wrote must be there (`compare`), or somebody else has changed the disk since,
//! and a replay would not make it.
//!
//! After the host went down the log may know of writes that the disk has lost, and the disk may
//! have writes that the log does not count, so going on would make a log that never was.

use std::path::PathBuf;
use std::sync::Arc;

use crate::block::RangeLock;
use crate::block::driver::Driver;
use crate::crc32c;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::write_log::compare::{Difference, find_difference};
use crate::filters::write_log::recorder::{Recorder, Start};
use crate::filters::write_log::tail::Place;
use crate::filters::write_log::under_way::{Left, UnderWay};
use crate::filters::write_log::{Order, Recording, WriteLog};
use crate::io::{AlignedBuf, File, HostFile};
use crate::units::{MIB, align_down};
use crate::write_log::layout::{
    DEFAULT_SECTOR_SIZE, END_MARK, Flags, MAGIC, RawEntry, header_sector, is_sector_size,
};
use crate::write_log::sidecar::{self, Header, ImageIdentity, Record, RecordState, Sidecar};
use crate::write_log::{Kind, Log, Superblock};

/// What to do with a log that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Go on with it if it is this image's, else refuse.
    #[default]
    Continue,
    /// Go on with it, whatever it was.
    Append,
    /// Start anew.
    Overwrite,
}

/// How to record.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Size of a log sector in bytes, for a new log.
    pub sector_size: Option<u32>,
    /// What to do with a log that is there.
    pub existing: Existing,
    /// The superblock is written at least every so many entries.
    pub interval: u64,
    /// Where flushes stand.
    pub order: Order,
}

/// How often the superblock is written, unless somebody says otherwise: as in QEMU.
pub const DEFAULT_INTERVAL: u64 = 4096;

impl Default for Settings {
    fn default() -> Self {
        Settings {
            sector_size: None,
            existing: Existing::Continue,
            interval: DEFAULT_INTERVAL,
            order: Order::Strict,
        }
    }
}

/// What is recorded.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The disk.
    pub below: Arc<dyn Driver>,
    /// Which file it is in.
    pub image: ImageIdentity,
    /// The file, to tell whether it was changed while nobody recorded.
    pub file: Option<Arc<HostFile>>,
    /// Whether all that is in the file is the disk.
    pub is_raw: bool,
    /// Where is noted, on tmpfs, what may be on the disk and not in the log, should the process be
    /// killed. Without that, the next one cannot tell whether somebody else has changed the disk.
    pub notes: Option<PathBuf>,
    /// Size of the guest's blocks in bytes, if there is a guest: a request is whole log sectors.
    pub block_size: Option<u64>,
}

/// How recording began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Began {
    /// With an empty log.
    New,
    /// After so many entries that were there; of these, so many that the superblock did not count.
    After {
        /// All entries.
        entries: u64,
        /// Those that were counted in.
        counted_in: u64,
    },
}

/// Opens a log for recording.
///
/// # Errors
/// Names the log or its sidecar, and the way out. Nothing is changed then.
pub async fn open(
    subject: Subject,
    log: Arc<dyn File>,
    sidecar: Arc<dyn File>,
    settings: Settings,
) -> Result<(WriteLog, Began)> {
    let name = log.name().to_string();
    let opening = Opening { subject: &subject, log: &log, sidecar: &sidecar, settings };
    let found = opening.find().await.context(|| name.clone())?;
    if found.as_ref().is_none_or(|found| found.sidecar.is_none()) {
        opening.check_disk_is_whole().context(|| name.clone())?;
    }
    let closed_before = match settings.existing {
        Existing::Continue => found.as_ref().and_then(Found::closed),
        Existing::Append | Existing::Overwrite => None,
    };
    let (start, header, began) = match found {
        None => opening.start().await.context(|| name)?,
        Some(found) => opening.go_on(found).await.context(|| name)?,
    };
    let under_way = subject.begin_notes(header.session, &start);
    let is_new = began == Began::New;
    let recording = Recording {
        recorder: Recorder::new(start),
        order: settings.order,
        goes_on: !is_new,
        in_flight: Arc::new(RangeLock::new()),
        under_way,
        has_grown: is_new.into(),
        has_ended: false.into(),
        closing: Closed { header, image: subject.file, closed_before },
    };
    Ok((WriteLog { below: subject.below, recording: Arc::new(recording) }, began))
}

impl Subject {
    /// Begins to note what is under way.
    fn begin_notes(&self, session: u128, start: &Start) -> UnderWay {
        let Some(path) = &self.notes else { return UnderWay::default() };
        UnderWay::begin(path, session, start.end.entry).unwrap_or_else(|err| {
            tracing::warn!(
                "{}: should this process be killed, the next one cannot tell whether the disk was \
                 changed by others: {err}",
                start.log.name()
            );
            UnderWay::default()
        })
    }
}

/// A log that is to be continued.
struct Found {
    log: Log,
    /// Its sidecar, if it is this image's.
    sidecar: Option<Sidecar>,
    end: End,
}

struct Opening<'a> {
    subject: &'a Subject,
    log: &'a Arc<dyn File>,
    sidecar: &'a Arc<dyn File>,
    settings: Settings,
}

/// The refusal of a log whose sectors are larger than the blocks of the guest, whose writes would
/// fail; `option` sets the latter.
pub fn sectors_too_large(sector_size: u64, block_size: u64, option: &str) -> Error {
    /// The largest blocks that a guest can have, in bytes.
    const LARGEST_BLOCK: u64 = 4096;
    let larger_blocks = match sector_size {
        0..=LARGEST_BLOCK => format!("{option}{sector_size}, or "),
        _ => String::new(),
    };
    Error::invalid(format!(
        "log sectors of {sector_size} bytes are larger than the guest's blocks of {block_size}; use \
         {larger_blocks}a log with smaller sectors"
    ))
}

impl Opening<'_> {
    /// The log to go on with; `None` if a new one is to be started.
    async fn find(&self) -> Result<Option<Found>> {
        let overwrite = self.settings.existing == Existing::Overwrite;
        match self.look().await? {
            Content::Nothing => Ok(None),
            Content::Other if overwrite => Ok(None),
            Content::Other => Err(Error::new(
                ErrorKind::InvalidArgument,
                "is neither empty nor a log of writes; overwriting it must be asked for \
                 (--log-overwrite)",
            )),
            Content::Log => match Log::open(Arc::clone(self.log)).await {
                Ok(log) => self.decide(log).await,
                Err(_) if overwrite => Ok(None),
                Err(err) => Err(err.context(
                    "holds a log that nothing can be added to (--log-overwrite starts anew)",
                )),
            },
        }
    }

    /// Refuses a disk that does not show yet all that its guest relies on: what a recording begins
    /// with could not be told.
    fn check_disk_is_whole(&self) -> Result<()> {
        let Subject { below, image, .. } = self.subject;
        let Some(keep) = below.keep().filter(|keep| keep.awaited().is_some()) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Busy,
            format!(
                "cannot begin with {}: the process that served it was killed, its guest has not come \
                 back yet, and what that completed last is in {} and not in the image. Serve it \
                 without a log until the guest is back; if it never will, remove that file",
                image.path.display(),
                keep.path().display()
            ),
        ))
    }

    /// What to do with a log that is there.
    async fn decide(&self, log: Log) -> Result<Option<Found>> {
        let found = match self.look_at_sidecar(&log).await {
            Ok(sidecar) => {
                let is_over = sidecar.header().closed.is_some();
                let mut found = match Found::of_this_image(log.clone(), sidecar).await {
                    Err(_) if is_over && self.settings.existing == Existing::Overwrite => {
                        return Ok(None);
                    }
                    found => found?,
                };
                self.check_disk(&mut found).await.map(|()| found)
            }
            Err(err) => Err(err),
        };
        match (found, self.settings.existing) {
            (Ok(found), Existing::Overwrite) if !found.is_unfinished() => Ok(None),
            (Ok(found), existing) => {
                if existing == Existing::Overwrite {
                    tracing::warn!(
                        "{}: its recording was not ended in order, and its guest may live on: \
                         going on with it. To start anew all the same, remove the file",
                        log.name()
                    );
                }
                Ok(Some(found))
            }
            (Err(_), Existing::Overwrite) => Ok(None),
            (Err(_), Existing::Append) => {
                let end = End { place: walk_to_end(&log).await?, ..End::default() };
                Ok(Some(Found { log, sidecar: None, end }))
            }
            (Err(err), Existing::Continue) => Err(cannot_go_on(&err)),
        }
    }

    /// The sidecar, if it says that the log can be continued; else why not.
    async fn look_at_sidecar(&self, log: &Log) -> Result<Sidecar> {
        let refuse = |why: String| Err(Error::invalid(why));
        // It was made just now if it was not there.
        if self.sidecar.len()? == 0 {
            return refuse(format!(
                "there is no sidecar {}, which would say which image it is of",
                self.sidecar.name()
            ));
        }
        let mut sidecar = Sidecar::open(Arc::clone(self.sidecar)).await?;
        let (header, image) = (sidecar.header().clone(), &self.subject.image);
        if !header.image.is_same(image) {
            let (path, own) = (header.image.path.display(), image.path.display());
            return refuse(format!("it is of another image, {path}, and not of {own}"));
        }
        if u64::from(header.sector_size) != log.sector_size() {
            return refuse(format!("{} does not belong to it", sidecar.name()));
        }
        match header.closed {
            Some(then) if is_changed(then, self.changed_ns()) => Err(was_changed(image)),
            None if self.is_changed_since(log) => refuse(format!(
                "{} was changed after the last entry, while nobody recorded",
                image.path.display()
            )),
            None if header.boot_id != boot_id() => refuse(
                "the host went down while it was recorded, so the disk may not be what the log \
                 ends with"
                    .into(),
            ),
            Some(_) if !knows_all(log, &mut sidecar).await? => refuse(format!(
                "{} does not belong to it, or the log is an older copy of what that was ended with",
                sidecar.name()
            )),
            _ => Ok(sidecar),
        }
    }

    /// Refuses a disk that is not what the log ends with.
    async fn check_disk(&self, found: &mut Found) -> Result<()> {
        let Subject { below, image, notes, .. } = self.subject;
        let (true, Some(sidecar)) = (found.is_unfinished(), &mut found.sidecar) else {
            return Ok(());
        };
        let session = sidecar.header().session;
        let Some(left) = notes.as_ref().and_then(|path| Left::read(path, session)) else {
            return Ok(());
        };
        // Some of what was completed is still to be redone: the disk is not itself yet.
        if below.keep().is_some_and(|keep| keep.awaited().is_some()) {
            return Ok(());
        }
        let end = found.end.place.entry;
        match find_difference(&found.log, sidecar, end, &left, &**below).await? {
            None => Ok(()),
            Some(Difference { entry, at }) => Err(Error::invalid(format!(
                "{} was changed while nobody recorded: at byte {at} of the disk there is not what \
                 entry {entry} wrote, the last one to write there. Put the disk back as it was, or \
                 record it in a new log, with a copy of it as it is now for a base",
                image.path.display()
            ))),
        }
    }

    /// Whether a raw image was written to after its log, by more than what was in flight when the
    /// recording process was killed. (Other formats change their files without a guest.)
    fn is_changed_since(&self, log: &Log) -> bool {
        /// What is in flight is on the disk by then, in nanoseconds.
        const IN_FLIGHT: i64 = 15_000_000_000;
        let file = self.subject.file.as_ref().filter(|_| self.subject.is_raw);
        let changed = file.map_or(0, |file| file.modified_before_ns());
        let logged = [log.file(), self.sidecar]
            .map(|file| file.as_host().map_or(i64::MAX, |file| file.modified_before_ns()));
        let last = logged[0].max(logged[1]);
        last != 0 && changed.saturating_sub(IN_FLIGHT) > last
    }

    /// When the image was last changed.
    fn changed_ns(&self) -> i64 {
        self.subject.file.as_ref().map_or(0, |file| file.modified_ns())
    }

    /// What the log's file begins with.
    async fn look(&self) -> Result<Content> {
        let head = self.read(0).await?;
        if head.starts_with(&MAGIC.to_le_bytes()) {
            return Ok(Content::Log);
        }
        // A file system may begin with zeros. It has something in the first MiB, or in the last.
        let tail = self.read(self.log.len()?.saturating_sub(MIB)).await?;
        let is_nothing = head.iter().chain(&tail).all(|byte| *byte == 0);
        Ok(if is_nothing { Content::Nothing } else { Content::Other })
    }

    /// A MiB of the log's file from about `offset` on, or what there is.
    async fn read(&self, offset: u64) -> Result<Vec<u8>> {
        let alignment = self.log.alignment();
        let unit = alignment.request.max(1);
        let offset = align_down(offset, unit);
        let len = (self.log.len()? - offset).min(2 * MIB);
        if len == 0 {
            return Ok(Vec::new());
        }
        let len = if len > unit { align_down(len, unit) } else { len };
        let mut bytes = AlignedBuf::zeroed(len as usize, alignment.memory.max(512));
        self.log.read(offset, bytes.buffers()).await?;
        Ok(bytes.as_slice().to_vec())
    }

    /// Starts a new log.
    async fn start(&self) -> Result<(Start, Header, Began)> {
        let sector_size = self.settings.sector_size.unwrap_or(DEFAULT_SECTOR_SIZE);
        self.check_sector_size(sector_size)?;
        let header = self.header(sector_size, 0);
        if self.settings.existing == Existing::Overwrite {
            // Whoever is killed before this is over must not leave the old log with a sidecar that says
            // that it is to be continued.
            self.sidecar.set_len(0).await?;
            write_superblock(self.log, Superblock { entries: 0, sector_size }).await?;
        }
        // A sidecar without a log means nothing; a log without its sidecar could not be continued.
        self.write_header(&header, 0).await?;
        write_superblock(self.log, Superblock { entries: 0, sector_size }).await?;
        let start = Start {
            log: Arc::clone(self.log),
            sidecar: Arc::clone(self.sidecar),
            sector_size,
            end: Place { entry: 0, sector: 1 },
            counted: 0,
            event: 0,
            interval: self.settings.interval,
        };
        Ok((start, header, Began::New))
    }

    /// Goes on with a log.
    async fn go_on(&self, found: Found) -> Result<(Start, Header, Began)> {
        let Found { log, sidecar, end } = found;
        let counted = log.entries();
        let sector_size = log.superblock().sector_size;
        self.check_sector_size(sector_size)?;
        let first_entry = sidecar.map_or(counted, |sidecar| sidecar.header().first_entry);
        for record in &end.pending {
            self.turn_into_mark(record, sector_size).await?;
        }
        let entries = end.place.entry;
        let header = self.header(sector_size, first_entry);
        self.write_header(&header, entries).await?;
        if entries > counted {
            self.log.flush().await?;
            write_superblock(self.log, Superblock { entries, sector_size }).await?;
        }
        let start = Start {
            log: Arc::clone(self.log),
            sidecar: Arc::clone(self.sidecar),
            sector_size,
            end: end.place,
            counted: entries,
            event: end.event,
            interval: self.settings.interval,
        };
        Ok((start, header, Began::After { entries, counted_in: entries - counted }))
    }

    /// A flush that had not ended when the process was killed promised nothing.
    async fn turn_into_mark(&self, record: &Record, sector_size: u32) -> Result<()> {
        const TEXT: &[u8] = b"flush interrupted";
        let header = RawEntry {
            flags: Flags::MARK.0.into(),
            data_len: (TEXT.len() as u64).into(),
            ..RawEntry::default()
        };
        let sector = header_sector(&header, TEXT, sector_size);
        let record = Record { crc: crc32c::crc32c(&sector), state: RecordState::Whole, ..*record };
        let at = record.log_sector * u64::from(sector_size);
        self.log.write(at, AlignedBuf::from_slice(&sector, 4096).buffers(), false).await?;
        let bytes = AlignedBuf::from_slice(&record.to_bytes(), 64);
        self.sidecar.write(Record::position(record.entry), bytes.buffers(), false).await
    }

    fn check_sector_size(&self, sector_size: u32) -> Result<()> {
        if !is_sector_size(sector_size) {
            return Err(Error::invalid(format!(
                "invalid log sector size {sector_size} (a power of two from 512 to 65536 is \
                 expected)"
            )));
        }
        if let Some(block_size) = self.subject.block_size.filter(|n| u64::from(sector_size) > *n) {
            return Err(sectors_too_large(sector_size.into(), block_size, "--block-size "));
        }
        let unit = self.log.alignment().request;
        if u64::from(sector_size) < unit {
            return Err(Error::unsupported(format!(
                "the host takes direct I/O on it only in units of {unit} bytes, more than a log \
                 sector of {sector_size}; use --log-sector-size {unit} or --cache writeback"
            )));
        }
        Ok(())
    }

    fn header(&self, sector_size: u32, first_entry: u64) -> Header {
        Header {
            image: self.subject.image.clone(),
            disk_size: self.subject.below.limits().size,
            sector_size,
            first_entry,
            boot_id: boot_id(),
            session: uuid::Uuid::new_v4().as_u128(),
            closed: None,
        }
    }

    /// Writes the sidecar's header and drops all records from `entries` on.
    async fn write_header(&self, header: &Header, entries: u64) -> Result<()> {
        let write = async {
            self.sidecar.set_len(Record::position(entries)).await?;
            let bytes = AlignedBuf::from_slice(&header.to_bytes()?, 4096);
            self.sidecar.write(0, bytes.buffers(), false).await?;
            self.sidecar.flush().await
        };
        write.await.context(|| format!("its sidecar {}", self.sidecar.name()))
    }
}

/// What a file begins with.
enum Content {
    Nothing,
    Log,
    Other,
}

impl Found {
    /// The log of the image that is recorded, with its sidecar.
    async fn of_this_image(log: Log, mut sidecar: Sidecar) -> Result<Found> {
        let mut end = End::default();
        end.find(&log, &mut sidecar).await?;
        if sidecar.header().closed.is_none() {
            end.count_in(&log, &mut sidecar).await?;
        }
        Ok(Found { log, sidecar: Some(sidecar), end })
    }

    /// Whether the process that recorded it was killed.
    fn is_unfinished(&self) -> bool {
        self.sidecar.is_some() && self.closed().is_none()
    }

    /// If it was ended in order: when the image was last changed then.
    fn closed(&self) -> Option<i64> {
        self.sidecar.as_ref().and_then(|sidecar| sidecar.header().closed)
    }
}

/// Where a log ends, and what was learned on the way.
struct End {
    place: Place,
    /// The next event.
    event: u64,
    /// Flushes that had not ended.
    pending: Vec<Record>,
}

impl Default for End {
    /// The end of an empty log.
    fn default() -> End {
        End { place: Place { entry: 0, sector: 1 }, event: 0, pending: Vec::new() }
    }
}

impl End {
    /// Finds the end of what is counted: by the last record, or else by way of all entries.
    async fn find(&mut self, log: &Log, sidecar: &mut Sidecar) -> Result<()> {
        let Some(last) = log.entries().checked_sub(1) else { return Ok(()) };
        if let Some(record) = sidecar.record(last).await? {
            self.event = record.completed.max(record.submitted).saturating_add(1);
            let position = record.log_sector.saturating_mul(log.sector_size());
            if let Ok(entry) = log.entry_at(last, position).await
                && sidecar::matches(log, &entry, &record).await?
            {
                self.place = Place { entry: last + 1, sector: entry.end_sector() };
                return Ok(());
            }
        }
        self.place = walk_to_end(log).await?;
        Ok(())
    }

    /// Takes over entries behind the count, as long as their records say that they are whole.
    async fn count_in(&mut self, log: &Log, sidecar: &mut Sidecar) -> Result<()> {
        while let Some(record) = sidecar.record(self.place.entry).await? {
            let position = self.place.sector.saturating_mul(log.sector_size());
            // Records of an earlier attempt at the same place have older numbers.
            if record.log_sector != self.place.sector || record.completed < self.event {
                break;
            }
            let Ok(entry) = log.entry_at(self.place.entry, position).await else { break };
            if !sidecar::matches(log, &entry, &record).await? {
                break;
            }
            if record.state == RecordState::Pending && entry.kind() == Kind::Flush {
                self.pending.push(record);
            }
            self.event = record.completed.saturating_add(1);
            self.place = Place { entry: self.place.entry + 1, sector: entry.end_sector() };
        }
        Ok(())
    }
}

/// Whether an image was changed between two times that it tells; 0 says nothing.
fn is_changed(then: i64, now: i64) -> bool {
    then != 0 && now != 0 && then != now
}

fn was_changed(image: &ImageIdentity) -> Error {
    Error::invalid(format!("{} was changed after recording ended", image.path.display()))
}

fn cannot_go_on(why: &Error) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!(
            "holds a log already, which cannot be continued: {why}. --log-append goes on with it all \
             the same, --log-overwrite starts anew"
        ),
    )
}

/// Whether a log is the one that its sidecar was ended with, as far as the sidecar tells.
async fn knows_all(log: &Log, sidecar: &mut Sidecar) -> Result<bool> {
    let next = sidecar.record(log.entries()).await?;
    let Some(last) = log.entries().checked_sub(1) else { return Ok(next.is_none()) };
    let Some(record) = sidecar.record(last).await? else { return Ok(next.is_none()) };
    // What could not be logged may have left a record behind the end, which is older then.
    if next.is_some_and(|next| next.completed > record.completed) {
        return Ok(false);
    }
    let position = record.log_sector.saturating_mul(log.sector_size());
    match log.entry_at(last, position).await {
        Ok(entry) => sidecar::matches(log, &entry, &record).await,
        Err(_) => Ok(false),
    }
}

async fn walk_to_end(log: &Log) -> Result<Place> {
    let mut walk = log.walk();
    while walk.next().await?.is_some() {}
    Ok(Place { entry: log.entries(), sector: walk.sector() })
}

async fn write_superblock(log: &Arc<dyn File>, superblock: Superblock) -> Result<()> {
    let sector = AlignedBuf::from_slice(&superblock.to_sector(), 4096);
    log.write(0, sector.buffers(), false).await?;
    log.flush().await
}

/// Which boot of the host this is; zeros if the host does not say.
fn boot_id() -> [u8; 40] {
    crate::block::keep::read_boot_id().unwrap_or([0; 40])
}

/// What is to be said in the log when recording ends in order.
#[derive(Debug)]
pub struct Closed {
    header: Header,
    image: Option<Arc<HostFile>>,
    /// What the header said of this before, if the log goes on because of that.
    closed_before: Option<i64>,
}

impl Closed {
    /// Makes sure that the image is still what the log ended with: a guest that writes without being
    /// recorded may have done so since that was looked at. Nobody may write to it now.
    pub(super) async fn check_unchanged(&self, recorder: &Recorder) -> Result<()> {
        let now = self.image.as_ref().map_or(0, |file| file.modified_ns());
        match self.closed_before {
            Some(then) if is_changed(then, now) => {
                // As it was: so the next one is refused, too.
                self.write(recorder, then).await?;
                Err(cannot_go_on(&was_changed(&self.header.image)).context(recorder.log_name()))
            }
            _ => Ok(()),
        }
    }

    /// Ends the log; with a mark, as the kernel does, if it has grown.
    pub(super) async fn end(&self, recorder: &Recorder, has_grown: bool) -> Result<()> {
        if has_grown {
            let end = recorder.append(recorder.mark(END_MARK)).await?;
            recorder.publish(end.entry).await?;
        }
        self.write(recorder, self.image.as_ref().map_or(0, |file| file.modified_ns())).await
    }

    /// The recording has ended in order, and the image was last changed then.
    async fn write(&self, recorder: &Recorder, changed: i64) -> Result<()> {
        let header = Header { closed: Some(changed), ..self.header.clone() };
        let bytes = AlignedBuf::from_slice(&header.to_bytes()?, 4096);
        let sidecar = recorder.sidecar();
        let write = async {
            sidecar.flush().await?;
            sidecar.write(0, bytes.buffers(), false).await?;
            sidecar.flush().await
        };
        write.await.context(|| sidecar.name().to_string())
    }
}
