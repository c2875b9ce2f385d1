//! The log being written: its files, its end, and its superblock.
//!
//! The superblock's count is what other programs and the next process trust, so it only ever
//! covers what is durable: entries, `fdatasync`, superblock, `fdatasync`. It is written when
//! something must be durable (a flush, a FUA write, a mark), at the end, and every so many entries.
//! Several that want it at once get it from one write.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::write_log::batch::Pending;
use crate::filters::write_log::copies::Copies;
use crate::filters::write_log::tail::{Place, Reserved, Tail};
use crate::io::{AlignedBuf, File, HostFile};
use crate::units::ByteRange;
use crate::write_log::layout::{Flags, RawEntry, mark_room};
use crate::write_log::sidecar::{self, Record, RecordState, Sidecar};
use crate::write_log::{Log, Superblock};

/// Numbers logs within this process.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// A log that is being written. Usable from any thread with a reactor.
#[derive(Debug)]
pub struct Recorder {
    id: u64,
    log: Arc<dyn File>,
    sidecar: Arc<dyn File>,
    sector_size: u32,
    tail: Tail,
    copies: Arc<Copies>,
    superblock: Mutex<Counting>,
    /// The superblock is written at least every so many entries.
    interval: u64,
    /// How many entries the superblock counts; a copy of what is in `superblock`.
    counted: AtomicU64,
    /// Whether the log's file has a name on the host when recording begins.
    had_name: bool,
    /// The log's file as it was when it was last looked at.
    seen: Mutex<Seen>,
}

/// See [`Recorder::look_at_file`].
#[derive(Debug, Default)]
struct Seen {
    /// Had it no name from the start, or was it told that it has lost it?
    is_nameless: bool,
    len: u64,
    /// In bytes.
    allocated: u64,
}

/// What the superblock on disk says, and who is changing it.
#[derive(Debug)]
struct Counting {
    count: u64,
    is_busy: bool,
    waiters: Vec<Waker>,
    /// Why nothing can be counted any more: what a failed flush lost is unknown.
    failure: Option<String>,
}

/// What a recorder starts from.
#[derive(Debug)]
pub struct Start {
    /// The log.
    pub log: Arc<dyn File>,
    /// Its sidecar.
    pub sidecar: Arc<dyn File>,
    /// Size of a log sector in bytes.
    pub sector_size: u32,
    /// Where the log goes on.
    pub end: Place,
    /// How many entries the superblock counts.
    pub counted: u64,
    /// The next event.
    pub event: u64,
    /// The superblock is written at least every so many entries.
    pub interval: u64,
}

impl Recorder {
    /// Goes on writing a log.
    pub fn new(start: Start) -> Recorder {
        let (len, allocated) = start.log.as_host().map_or((0, 0), HostFile::extent);
        let is_nameless = start.log.as_host().is_none_or(HostFile::is_unlinked);
        Recorder {
            had_name: !is_nameless,
            seen: Mutex::new(Seen { is_nameless, len, allocated }),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            tail: Tail::new(start.log.name(), start.end, start.event),
            log: start.log,
            sidecar: start.sidecar,
            sector_size: start.sector_size,
            copies: Copies::new(start.sector_size),
            superblock: Mutex::new(Counting {
                count: start.counted,
                is_busy: false,
                waiters: Vec::new(),
                failure: None,
            }),
            interval: start.interval.max(1),
            counted: AtomicU64::new(start.counted),
        }
    }

    /// Tells logs apart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The log's file.
    pub fn log(&self) -> &Arc<dyn File> {
        &self.log
    }

    /// The log's name.
    pub fn log_name(&self) -> String {
        self.log.name().to_string()
    }

    /// The sidecar's file.
    pub fn sidecar(&self) -> &Arc<dyn File> {
        &self.sidecar
    }

    /// The log's end.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// Memory for entries.
    pub fn copies(&self) -> &Arc<Copies> {
        &self.copies
    }

    /// Size of a log sector in bytes.
    pub fn sector_size(&self) -> u32 {
        self.sector_size
    }

    /// How many entries the superblock counts.
    pub fn counted(&self) -> u64 {
        self.counted.load(Ordering::Relaxed)
    }

    /// Log sectors in bytes.
    pub fn offset(&self, sectors: u64) -> u64 {
        sectors * u64::from(self.sector_size)
    }

    /// The header of an entry.
    pub fn header(&self, flags: Flags, range: ByteRange, data_len: u64) -> RawEntry {
        let unit = u64::from(self.sector_size);
        RawEntry {
            sector: (range.offset / unit).into(),
            nr_sectors: (range.len / unit).into(),
            flags: flags.0.into(),
            data_len: data_len.into(),
        }
    }

    /// A mark's header. A text that is too long is cut, as the kernel does; but not within a character, or
    /// nobody could type what is left.
    pub fn mark(&self, text: &[u8]) -> Pending {
        let room = mark_room(self.sector_size);
        let text = match text.get(..room) {
            Some(cut) => match std::str::from_utf8(cut) {
                Err(err) if err.error_len().is_none() => &cut[..err.valid_up_to()],
                _ => cut,
            },
            None => text,
        };
        let header = self.header(Flags::MARK, ByteRange::default(), text.len() as u64);
        Pending {
            copy: self.copies.header(&header, text),
            data_sectors: 0,
            zeros: false,
            submitted: self.tail.event(),
            queue: None,
        }
    }

    /// Gives a flush its place, before it starts.
    pub async fn begin_flush(&self, submitted: u64, queue: Option<u16>) -> Result<FlushEntry<'_>> {
        let header = self.header(Flags::FLUSH, ByteRange::default(), 0);
        let copy = self.copies.header(&header, &[]);
        let pending = Pending { copy, data_sectors: 0, zeros: false, submitted, queue };
        let reserved = self.tail.reserve_flush()?;
        let (place, crc) = (reserved.first, pending.copy.crc);
        let record = Record {
            entry: place.entry,
            log_sector: place.sector,
            submitted,
            completed: reserved.completed,
            queue,
            crc,
            state: RecordState::Pending,
        };
        let mut flush = FlushEntry { recorder: self, record, is_over: false };
        let result = self.write_flush(&pending, &reserved, &record).await;
        match reserved.settle(result).await {
            Ok(()) => Ok(flush),
            Err(err) => {
                // The tail has forgotten it. Of the flushes before it nothing is known yet, and its number
                // may be another's by now.
                flush.is_over = true;
                Err(err)
            }
        }
    }

    async fn write_flush(
        &self,
        pending: &Pending,
        reserved: &Reserved<'_>,
        record: &Record,
    ) -> Result<()> {
        let at = self.offset(reserved.first.sector);
        self.log.write(at, pending.copy.whole(), false).await.context(|| self.log_name())?;
        self.write_record(record).await
    }

    async fn write_record(&self, record: &Record) -> Result<()> {
        let bytes = AlignedBuf::from_slice(&record.to_bytes(), 64);
        let sidecar = &self.sidecar;
        let at = Record::position(record.entry);
        sidecar.write(at, bytes.buffers(), false).await.context(|| sidecar.name().to_string())
    }

    /// Makes all entries before `entry` durable and counts them. They must be complete.
    pub async fn publish(&self, entry: u64) -> Result<()> {
        self.tail.wait_countable(entry).await?;
        let Some(_turn) = self.my_turn(entry).await? else { return Ok(()) };
        let count = self.tail.countable();
        let result = match self.look_at_file().await {
            Ok(()) => self.write_superblock(count).await,
            Err(err) => Err(err),
        };
        let mut counting = self.superblock.lock().unwrap();
        match &result {
            Ok(()) => {
                counting.count = count;
                self.counted.store(count, Ordering::Relaxed);
            }
            Err(err) => counting.failure = Some(err.to_string()),
        }
        result
    }

    /// Looks whether the log is still what was written. Costs no I/O, unless space has gone from
    /// the file.
    ///
    /// # Errors
    /// If what was counted is not there any more: a count must not cover holes.
    async fn look_at_file(&self) -> Result<()> {
        let Some(file) = self.log.as_host() else { return Ok(()) };
        let (len, allocated) = file.extent();
        let (is_smaller, is_news) = {
            let mut seen = self.seen.lock().unwrap();
            let is_smaller = len < seen.len || allocated < seen.allocated;
            let is_nameless = seen.is_nameless || file.is_unlinked();
            let is_news = is_nameless && !seen.is_nameless;
            *seen = Seen { is_nameless, len, allocated };
            (is_smaller, is_news)
        };
        if is_news {
            tracing::error!("{}", self.removed());
        }
        if is_smaller && !self.is_whole().await? {
            return Err(Error::corrupt(format!(
                "{}: was truncated or written to by others while it is recorded",
                self.log.name()
            )));
        }
        Ok(())
    }

    /// Whether superblock and last counted entry are as they were written.
    async fn is_whole(&self) -> Result<bool> {
        let Ok(log) = Log::open(Arc::clone(&self.log)).await else { return Ok(false) };
        if log.entries() != self.counted() {
            return Ok(false);
        }
        let Some(last) = log.entries().checked_sub(1) else { return Ok(true) };
        let mut sidecar = Sidecar::open(Arc::clone(&self.sidecar)).await?;
        let Some(record) = sidecar.record(last).await? else { return Ok(true) };
        let at = self.offset(record.log_sector);
        match log.entry_at(last, at).await {
            Ok(entry) => sidecar::matches(&log, &entry, &record).await,
            Err(_) => Ok(false),
        }
    }

    /// # Errors
    /// If the log has lost its name: nobody will find it.
    pub fn check_has_name(&self) -> Result<()> {
        let is_lost = |file: &HostFile| self.had_name && file.is_unlinked();
        match self.log.as_host().is_some_and(is_lost) {
            true => Err(Error::new(ErrorKind::NotFound, self.removed())),
            false => Ok(()),
        }
    }

    fn removed(&self) -> String {
        let name = self.log.name();
        format!("{name}: was removed while it is recorded, and is gone when this process ends")
    }

    /// Publishes if many entries are complete and not counted, and nobody else is at it.
    pub async fn publish_now_and_then(&self) -> Result<()> {
        if self.is_due() { self.publish(self.counted() + self.interval).await } else { Ok(()) }
    }

    /// Whether many entries are complete and not counted, and nobody is at it.
    pub fn is_due(&self) -> bool {
        self.tail.countable().saturating_sub(self.counted()) >= self.interval
            && !self.superblock.lock().unwrap().is_busy
    }

    async fn write_superblock(&self, count: u64) -> Result<()> {
        let superblock = Superblock { entries: count, sector_size: self.sector_size };
        let sector = AlignedBuf::from_slice(&superblock.to_sector(), 4096);
        let write = async {
            self.log.flush().await?;
            self.log.write(0, sector.buffers(), false).await?;
            self.log.flush().await
        };
        write.await.context(|| format!("{}: writing the superblock", self.log.name()))
    }

    /// Waits until it may change the superblock, or `None` once it counts `entry`.
    async fn my_turn(&self, entry: u64) -> Result<Option<Turn<'_>>> {
        poll_fn(|cx| {
            let mut counting = self.superblock.lock().unwrap();
            if let Some(failure) = &counting.failure {
                let message = format!("nothing is counted any more after a failure: {failure}");
                return Poll::Ready(Err(Error::new(ErrorKind::Poisoned, message)));
            }
            if counting.count >= entry {
                return Poll::Ready(Ok(None));
            }
            if counting.is_busy {
                counting.waiters.push(cx.waker().clone());
                return Poll::Pending;
            }
            counting.is_busy = true;
            Poll::Ready(Ok(Some(Turn(self))))
        })
        .await
    }
}

/// The entry of a flush that is under way. Dropped before the flush is over, nothing from here on
/// is counted any more: nobody knows what became of it.
#[derive(Debug)]
#[must_use]
pub struct FlushEntry<'a> {
    recorder: &'a Recorder,
    record: Record,
    is_over: bool,
}

impl FlushEntry<'_> {
    /// Its number.
    pub fn entry(&self) -> u64 {
        self.record.entry
    }

    /// The flush has succeeded: from now on its entry may be counted.
    pub async fn succeeded(mut self) -> Result<()> {
        let record = Record { state: RecordState::Whole, ..self.record };
        let written = self.recorder.write_record(&record).await;
        self.is_over = true;
        self.recorder.tail.flush_over(self.record.entry);
        written
    }

    /// The flush has failed: its entry becomes a mark that says so.
    pub async fn failed(mut self, err: &Error) -> Result<()> {
        let recorder = self.recorder;
        let mark = recorder.mark(format!("flush failed: {err}").as_bytes());
        let at = recorder.offset(self.record.log_sector);
        let record = Record { state: RecordState::Whole, crc: mark.copy.crc, ..self.record };
        let write = async {
            let header = mark.copy.whole();
            recorder.log.write(at, header, false).await.context(|| recorder.log_name())?;
            recorder.write_record(&record).await
        };
        write.await?;
        self.is_over = true;
        recorder.tail.flush_failed(self.record.entry);
        Ok(())
    }
}

impl Drop for FlushEntry<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.recorder.tail.flush_abandoned();
        }
    }
}

/// The right to change the superblock.
struct Turn<'a>(&'a Recorder);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut counting = self.0.superblock.lock().unwrap();
        counting.is_busy = false;
        for waiter in counting.waiters.drain(..) {
            waiter.wake();
        }
    }
}
