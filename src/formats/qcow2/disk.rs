//! Access to the image's file for payload and for metadata, whatever alignment the file demands.
//!
//! Three things stand between a caller and the [`File`]:
//! * *Alignment*: a request that the file would refuse (O_DIRECT on 4096-byte sectors, a cluster
//!   of 512) is read, changed and written back as a whole, alone on its sectors.
//! * *The end of the file*: an image's last cluster need not be there in full; what is missing
//!   reads as zeros.
//! * *Tracking*: dropping a write's future does not stop what the kernel was told to do. A
//!   [`Token`] travels with the write's memory and goes away when the engine lets go of it, so the
//!   [`Tracker`] knows which parts of the file may still change.
//!
//! Invariant: the memory handed to the file is always such that the file needs no bounce buffer of
//! its own, else the token would go away before the write has happened.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use crate::block::RangeLock;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuf, BufferOwner, Buffers, File};
use crate::units::{ByteRange, align_down, align_up};

/// Reads `len` bytes at `offset`; zeros where the file ends before.
pub async fn read_bytes(file: &dyn File, offset: u64, len: usize) -> Result<Vec<u8>> {
    let buf = AlignedBuf::zeroed(len, file.alignment().memory.max(512));
    read_to(file, offset, buf.buffers()).await?;
    Ok(buf.to_vec())
}

/// Fills `buf` from `offset`; zeros where the file ends before.
async fn read_to(file: &dyn File, offset: u64, buf: Buffers) -> Result<()> {
    let align = file.alignment().request;
    let len = file.len()?;
    let have = len.saturating_sub(offset).min(buf.len());
    if have < buf.len() {
        buf.slice(have, buf.len() - have).fill_zero();
    }
    if have == 0 {
        return Ok(());
    }
    let wanted = ByteRange { offset, len: have };
    if wanted.is_aligned(align) {
        return file.read(offset, buf.slice(0, have)).await;
    }
    let start = align_down(offset, align);
    let end = align_up(wanted.end(), align).ok_or_else(out_of_range)?;
    let bounce = AlignedBuf::zeroed((end - start) as usize, file.alignment().memory.max(512));
    let whole = align_down(len, align).clamp(start, end);
    if whole > start {
        file.read(start, bounce.buffers().slice(0, whole - start)).await?;
    }
    if whole < end {
        // The sector that the file ends in: its bytes arrive, and then the read ends early.
        match file.read(whole, bounce.buffers().slice(whole - start, end - whole)).await {
            Err(err)
                if matches!(err.kind(), ErrorKind::OutOfRange | ErrorKind::InvalidArgument) => {}
            other => other?,
        }
    }
    copy(&bounce.buffers().slice(offset - start, have), &buf.slice(0, have));
    Ok(())
}

fn out_of_range() -> Error {
    Error::new(ErrorKind::OutOfRange, "offset beyond what a file can hold")
}

/// Copies between two buffers of the same length.
fn copy(from: &Buffers, to: &Buffers) {
    let mut at = 0;
    for iov in from.iovecs() {
        // SAFETY: `from` keeps its memory alive and initialised; a guest that changes it meanwhile
        // changes bytes that are only copied.
        let bytes = unsafe { std::slice::from_raw_parts(iov.iov_base.cast::<u8>(), iov.iov_len) };
        to.slice(at, iov.iov_len as u64).copy_from_slice(bytes);
        at += iov.iov_len as u64;
    }
}

/// A copy that nobody else shares, at an alignment that suits the file.
pub fn private_copy(buf: &Buffers, alignment: usize) -> AlignedBuf {
    let own = AlignedBuf::zeroed(buf.len() as usize, alignment.max(512));
    copy(buf, &own.buffers());
    own
}

/// Knows which parts of the file may still be written to by requests handed to the kernel.
#[derive(Debug, Default)]
pub struct Tracker {
    state: Mutex<Tracked>,
}

#[derive(Debug, Default)]
struct Tracked {
    next: u64,
    live: BTreeMap<u64, ByteRange>,
    waiters: Vec<Waker>,
}

/// A write that is under way, until dropped.
#[derive(Debug)]
pub struct Token {
    tracker: Arc<Tracker>,
    id: u64,
}

impl Drop for Token {
    fn drop(&mut self) {
        let waiters = {
            let mut state = self.tracker.state.lock().unwrap();
            state.live.remove(&self.id);
            std::mem::take(&mut state.waiters)
        };
        waiters.into_iter().for_each(Waker::wake);
    }
}

impl Tracker {
    /// Announces a write to a range of the file.
    pub fn begin(self: &Arc<Self>, range: ByteRange) -> Token {
        let mut state = self.state.lock().unwrap();
        let id = state.next;
        state.next += 1;
        state.live.insert(id, range);
        Token { tracker: Arc::clone(self), id }
    }

    /// Waits until the writes that are under way now and touch `range` have ended.
    pub async fn settle(&self, range: ByteRange) {
        self.settle_below(range, u64::MAX).await;
    }

    /// Whether a write older than number `below` touches `range`.
    fn is_busy_below(&self, range: ByteRange, below: u64) -> bool {
        let state = self.state.lock().unwrap();
        state.live.range(..below).any(|(_, live)| live.overlaps(&range))
    }

    /// As [`Tracker::settle`], for the writes older than number `below`.
    async fn settle_below(&self, range: ByteRange, below: u64) {
        let mut waited: Option<Vec<u64>> = None;
        poll_fn(|cx| {
            let mut state = self.state.lock().unwrap();
            let waited = waited.get_or_insert_with(|| {
                let older = state.live.range(..below);
                older.filter(|(_, live)| live.overlaps(&range)).map(|(id, _)| *id).collect()
            });
            if waited.iter().any(|id| state.live.contains_key(id)) {
                state.waiters.push(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }
}

/// The range of everything.
pub const ALL: ByteRange = ByteRange { offset: 0, len: u64::MAX };

/// Memory of a write, with the token that says that it is under way.
struct TrackedMemory {
    /// Keeps the memory alive.
    _memory: Buffers,
    /// End with the last user of the memory.
    _tokens: (Token, Option<Token>),
}

impl BufferOwner for TrackedMemory {}

fn track(buf: &Buffers, token: Token, second: Option<Token>) -> Buffers {
    let iovs = buf.iovecs().to_vec();
    let owner = TrackedMemory { _memory: buf.clone(), _tokens: (token, second) };
    // SAFETY: the new owner holds `buf`, whose own owner keeps this memory alive.
    unsafe { Buffers::from_raw(iovs, Arc::new(owner)) }
}

/// The image's file.
pub struct Disk {
    file: Arc<dyn File>,
    /// A lower bound of the file's length, to save asking.
    known_len: AtomicU64,
    /// Writes of payload under way.
    pub payload: Arc<Tracker>,
    /// Writes planned without a lock, under way.
    planned: Arc<Tracker>,
    /// Keeps read-change-write cycles alone on their sectors. Taken last of all locks.
    sectors: RangeLock,
    /// How many such cycles run.
    cycles: AtomicUsize,
    /// The writes at the end of such cycles: their future may be gone, and its lock with it, while
    /// the kernel still writes whole sectors.
    cycle_writes: Arc<Tracker>,
}

impl Disk {
    pub fn new(file: Arc<dyn File>) -> Disk {
        Disk {
            file,
            known_len: AtomicU64::new(0),
            payload: Arc::default(),
            planned: Arc::default(),
            sectors: RangeLock::new(),
            cycles: AtomicUsize::new(0),
            cycle_writes: Arc::default(),
        }
    }

    /// The file itself, for flushes and names.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }

    /// Whether the range lies inside the file, as far as is known without asking.
    pub fn surely_has(&self, range: ByteRange) -> bool {
        range.end() <= self.known_len.load(Ordering::Relaxed)
    }

    /// The file's length now.
    pub fn len(&self) -> Result<u64> {
        let len = self.file.len()?;
        self.known_len.fetch_max(len, Ordering::Relaxed);
        Ok(len)
    }

    /// Announces a write that goes to the file as it is, past [`Disk::write`]; `None` if it cannot.
    pub fn plan_write(&self, range: ByteRange) -> Option<(Token, Token)> {
        if !range.is_aligned(self.file.alignment().request) {
            return None;
        }
        // Announced first: a cycle that starts after the look at the counter waits for us.
        let tokens = (self.planned.begin(range), self.payload.begin(range));
        let alone = self.cycles.load(Ordering::SeqCst) == 0
            && !self.payload.is_busy_below(range, tokens.1.id);
        alone.then_some(tokens)
    }

    /// Fills `buf` from `offset`; zeros beyond the end of the file.
    pub async fn read(&self, offset: u64, buf: Buffers) -> Result<()> {
        let range = ByteRange { offset, len: buf.len() };
        if self.surely_has(range) && range.is_aligned(self.file.alignment().request) {
            return self.file.read(offset, buf).await;
        }
        read_to(&*self.file, offset, buf).await?;
        self.len()?;
        Ok(())
    }

    /// Writes `buf`; `token` tells when the kernel is done with it, even if this future is dropped.
    /// Waits for older writes to the same place, so that the last one started is the last to land:
    /// a dropped one must not overwrite what came after it.
    pub async fn write(&self, offset: u64, buf: Buffers, token: Token) -> Result<()> {
        let alignment = self.file.alignment();
        let range = ByteRange { offset, len: buf.len() };
        token.tracker.settle_below(range, token.id).await;
        if range.is_aligned(alignment.request) {
            // Only requests smaller than the file's sectors need keeping apart.
            let _shared = match alignment.request > 512 {
                true => Some(self.sectors.shared(range).await),
                false => None,
            };
            if alignment.request > 512 {
                self.cycle_writes.settle(range).await;
            }
            let buf = match buf.is_aligned(alignment.memory, alignment.request as usize) {
                true => buf,
                false => private_copy(&buf, alignment.memory).buffers(),
            };
            self.file.write(offset, track(&buf, token, None), false).await?;
        } else {
            let start = align_down(offset, alignment.request);
            let end = align_up(range.end(), alignment.request).ok_or_else(out_of_range)?;
            let whole = ByteRange::between(start, end);
            let _cycle = Cycle::begin(&self.cycles);
            let _alone = self.sectors.exclusive(whole).await;
            // What was let through without a lock before the cycle was announced, and what a
            // dropped cycle left under way.
            self.planned.settle(whole).await;
            self.cycle_writes.settle(whole).await;
            let bounce = AlignedBuf::zeroed(whole.len as usize, alignment.memory.max(512));
            read_to(&*self.file, start, bounce.buffers()).await?;
            copy(&buf, &bounce.buffers().slice(offset - start, buf.len()));
            let second = Some(self.cycle_writes.begin(whole));
            self.file.write(start, track(&bounce.buffers(), token, second), false).await?;
        }
        self.known_len.fetch_max(range.end(), Ordering::Relaxed);
        Ok(())
    }
}

/// Counts a read-change-write cycle while it lives.
struct Cycle<'a>(&'a AtomicUsize);

impl<'a> Cycle<'a> {
    fn begin(cycles: &'a AtomicUsize) -> Cycle<'a> {
        cycles.fetch_add(1, Ordering::SeqCst);
        Cycle(cycles)
    }
}

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disk({:?})", self.file)
    }
}
