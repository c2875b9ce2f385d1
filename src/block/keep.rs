//! Keeps what must outlive the process but not the power.
//!
//! A guest lives on when vublk is killed, and never repeats a write that it saw completed
//! (design rule 7). Data written to the image's file is in the host's page cache by then; metadata
//! whose place on disk must wait for a flush is not. A [`Keep`] holds it meanwhile, in a file on
//! tmpfs: gone with the power, as everything that was not flushed may be, but not with the process.
//!
//! ```text
//! begin(nonce)          a guest's session starts: the keep is empty and bears the session's name
//!   append(record)      before a request completes that changed metadata not yet on disk
//!   append(record)
//!   rotate()            a flush starts: records from here on belong to the next one
//!   append(record)
//!   release()           the flush is durable: what was appended before rotate() is dropped
//!      ╳  kill -9
//! open(), take_over(nonce)   the same guest is back: here are the records, oldest first
//!   … redo them, flush …
//! reset(), begin(new nonce)
//! ```
//!
//! What a record means is the owner's business. It must be safe to redo records whose effect is on
//! disk already, in order, on top of what later requests wrote; so a request that touches what a
//! kept record covers must be recorded too, even if by itself it would not need to be. An owner
//! whose redo is not idempotent puts a sequence number into its records.
//!
//! A keep belongs to an image (device, inode number and time of birth), a format, a boot of the host and a
//! session (a random nonce, which the device puts into the in-flight region that the front-end
//! hands back). Records of anything else are never given out.
//!
//! # The file
//!
//! ```text
//! 0      header: magic, boot id, image, format, nonce, and of each half: generation, committed;
//!        when the image was born
//! 4096   half 0: records ▏length, CRC32C, payload, padding to 8▕ …
//! 4096+N half 1: the same; the half with the higher generation is the one appended to
//! ```
//!
//! An append copies the record into the mapped file and then stores, as one aligned word, the
//! committed length: no system call (but one in `RESERVE` bytes, to make sure of the memory).
//! Killed anywhere in between, the record does not exist, and neither did the completion it was to
//! precede. `release` sets the committed length of the older half to 0, again one word.
//! The CRC covers generation and position, so nothing stale passes for a record.
//!
//! Invariants: `rotate` is called only while nothing of the half before the current one is left;
//! every committed record stays until `release`, `reset`, `begin` or `discard`.

mod session;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};

use crate::block::open_gate;
use crate::crc32c;
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::io::{HostFile, SharedMemory};
use crate::units::align_up;
pub use session::{Keeper, begin_session};

/// Space for records between two flushes, in bytes, if the owner does not say otherwise.
pub const DEFAULT_CAPACITY: u64 = 16 << 20;

const MAGIC: &[u8; 8] = b"vublkKP1";
const HEADER_LEN: u64 = 4096;
/// How much memory is asked of the host at a time, in bytes. What was once asked for of each half
/// up to this much is never given back while the session runs.
const RESERVE: u64 = 128 << 10;
/// Length and CRC of a record.
const RECORD_HEADER: u64 = 8;

/// Where the header's fields lie.
mod at {
    pub const MAGIC: usize = 0;
    /// 1 while the header describes a session.
    pub const VALID: usize = 8;
    pub const BOOT_ID: usize = 16;
    pub const DEV: usize = 56;
    pub const INO: usize = 64;
    pub const FORMAT: usize = 72;
    pub const NONCE: usize = 104;
    pub const CAPACITY: usize = 120;
    /// Generation and committed length, twice.
    pub const HALVES: usize = 128;
    /// When the image's file was made, in nanoseconds since 1970; 0 if that is not known.
    pub const BORN: usize = 160;
    pub const END: usize = 168;
}

/// Keeps records of one image in memory that outlives the process. See the [module](self).
///
/// All methods block for no longer than a copy to memory takes, and may be called from any thread.
#[derive(Debug)]
pub struct Keep {
    path: PathBuf,
    /// Locked (flock) for as long as this lives.
    file: File,
    owner: Owner,
    /// Of one half.
    capacity: u64,
    state: Mutex<State>,
}

/// Whom a keep belongs to, besides the session.
#[derive(Debug)]
struct Owner {
    boot_id: [u8; 40],
    image: (u64, u64),
    /// When the image's file was made, in nanoseconds since 1970; 0 if that is not known.
    born_ns: i64,
    format: [u8; 32],
}

#[derive(Debug, Default)]
struct State {
    /// The session named in the file, if it is one of this image and boot.
    nonce: Option<u128>,
    halves: [Half; 2],
    /// Which half is appended to.
    active: usize,
    /// Space in the active half promised to [`Reservation`]s.
    reserved: u64,
    /// The file as memory, from `begin` on: records may be appended.
    memory: Option<SharedMemory>,
    /// Whether the guest of the session may come back, though nothing but its name is here.
    is_borne: bool,
}

impl State {
    /// Knows of no session any more. Reservations stay open: a job's write, say, may be under way.
    fn drop_session(&mut self) {
        *self = State { reserved: self.reserved, ..State::default() };
    }

    fn holds_records(&self) -> bool {
        self.halves.iter().any(|half| half.committed > 0)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Half {
    generation: u64,
    /// How many bytes of records are valid.
    committed: u64,
    /// For how many bytes the host has set memory aside.
    backed: u64,
}

impl Keep {
    /// Opens or makes the keep of an image in `dir`, which is made if need be. `image` is the
    /// image's device and inode number ([`HostFile::identity`](crate::io::HostFile::identity)).
    ///
    /// # Errors
    /// Kind [`Unsupported`](ErrorKind::Unsupported) if `dir` is not on tmpfs (its content would
    /// outlive the power, or cost as much as a flush), [`PermissionDenied`] if others may write
    /// to it, [`Busy`](ErrorKind::Busy) if another process keeps state for the same image.
    ///
    /// [`PermissionDenied`]: ErrorKind::PermissionDenied
    pub fn open(dir: &Path, image: (u64, u64), format: &str) -> Result<Keep> {
        Keep::open_with_capacity(dir, image, format, DEFAULT_CAPACITY)
    }

    /// As [`Keep::open`], for an image in this file: what was kept for a file that had its inode
    /// number before is void.
    pub fn open_for(dir: &Path, file: &HostFile, format: &str) -> Result<Keep> {
        Keep::open_born(dir, file.identity()?, file.born_ns(), format, DEFAULT_CAPACITY)
    }

    /// As [`Keep::open`], with room for `capacity` bytes of records between two flushes.
    pub fn open_with_capacity(
        dir: &Path,
        image: (u64, u64),
        format: &str,
        capacity: u64,
    ) -> Result<Keep> {
        Keep::open_born(dir, image, 0, format, capacity)
    }

    /// Where in `dir` records of an image in this file are that no process uses, if there are any: its
    /// guest is still to come back. Nothing is changed, and the directory may be somebody else's.
    pub fn left_in(dir: &Path, file: &HostFile, format: &str) -> Result<Option<PathBuf>> {
        let image = file.identity()?;
        let path = dir.join(file_name(image, format));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let there: File = match rustix::fs::open(&path, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            there => there.context(|| path.display().to_string())?.into(),
        };
        match rustix::fs::flock(&there, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            locked => locked.context(|| path.display().to_string())?,
        }
        let owner = Owner::new(image, file.born_ns(), format)?;
        let left = owner.read_header(&there).filter(|(state, _)| state.holds_records());
        Ok(left.map(|_| path))
    }

    fn open_born(
        dir: &Path,
        image: (u64, u64),
        born_ns: i64,
        format: &str,
        capacity: u64,
    ) -> Result<Keep> {
        assert!(format.len() <= 31, "format name too long");
        Keep::check_dir(dir)?;
        let path = dir.join(file_name(image, format));
        let keep = Keep::open_file(&path, image, born_ns, format, capacity)
            .context(|| format!("{}", path.display()))?;
        Ok(keep)
    }

    /// Makes the directory if need be, and checks that it can be used.
    ///
    /// # Errors
    /// As [`Keep::open`], but for what an image has to do with it.
    pub fn check_dir(dir: &Path) -> Result<()> {
        prepare_dir(dir).context(|| format!("state directory {}", dir.display()))
    }

    /// Whether there is a keep of the image in `dir`, without making one.
    pub fn is_there(dir: &Path, image: (u64, u64), format: &str) -> bool {
        dir.join(file_name(image, format)).exists()
    }

    fn open_file(
        path: &Path,
        image: (u64, u64),
        born_ns: i64,
        format: &str,
        capacity: u64,
    ) -> Result<Keep> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = loop {
            let file: File = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?.into();
            lock(&file)?;
            // Who held it may have removed it: then nobody would find what is kept in it.
            if is_at(&file, path) {
                break file;
            }
        };
        // The header must never fail to be written once a session runs.
        rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, HEADER_LEN)?;
        let owner = Owner::new(image, born_ns, format)?;
        let found = owner.read_header(&file);
        let (state, capacity) = found
            .unwrap_or_else(|| (State::default(), align_up(capacity, 4096).unwrap_or(capacity)));
        Ok(Keep { path: path.to_path_buf(), file, owner, capacity, state: Mutex::new(state) })
    }

    /// The state directory to use if the operator names none: `/run/vublk-keep` for root where `/run`
    /// is on tmpfs, else `$XDG_RUNTIME_DIR/vublk`, else `/dev/shm/vublk-UID`.
    pub fn default_dir() -> PathBuf {
        let uid = rustix::process::geteuid();
        if uid.is_root() && is_tmpfs(Path::new("/run")).unwrap_or(false) {
            // Not /run/vublk: sockets live there, which others must reach.
            return PathBuf::from("/run/vublk-keep");
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) if !dir.is_empty() && is_tmpfs(Path::new(&dir)).unwrap_or(false) => {
                Path::new(&dir).join("vublk")
            }
            _ => PathBuf::from(format!("/dev/shm/vublk-{}", uid.as_raw())),
        }
    }

    /// The file it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Room for records between two flushes, in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether a session runs, that is: whether records are wanted.
    pub fn is_recording(&self) -> bool {
        self.lock().memory.is_some()
    }

    /// Whether session `nonce` runs.
    pub fn is_recording_for(&self, nonce: u128) -> bool {
        let state = self.lock();
        state.memory.is_some() && state.nonce == Some(nonce)
    }

    /// Whether a record with this much payload fits an empty keep.
    pub fn can_ever_hold(&self, payload: u64) -> bool {
        record_len(payload) <= self.capacity
    }

    /// Starts a session: drops all that is kept, and from now on appends are allowed. `nonce` is
    /// what [`Keep::take_over`] will ask for. A session of that name that is here already is never
    /// gone in between.
    pub fn begin(&self, nonce: u128) -> Result<()> {
        let mut state = self.lock();
        self.begin_locked(&mut state, nonce).context(|| self.path.display().to_string())
    }

    /// Bears the name of a session that may go on here, and records nothing: who has flushed, and was
    /// left by an earlier process, is not there yet.
    pub fn bear(&self, nonce: u128) -> Result<()> {
        let mut state = self.lock();
        if state.nonce != Some(nonce) {
            let begun = self.begin_locked(&mut state, nonce);
            state.memory = None;
            begun.context(|| self.path.display().to_string())?;
        }
        state.is_borne = true;
        Ok(())
    }

    fn begin_locked(&self, state: &mut State, nonce: u128) -> Result<()> {
        if state.nonce == Some(nonce) {
            self.clear(state)?;
            state.is_borne = false;
            if state.memory.is_none() {
                state.memory = Some(self.map()?);
            }
            return Ok(());
        }
        // Killed within this, the keep holds nothing, which is what the caller wants.
        self.put(at::VALID, 0)?;
        state.drop_session();
        rustix::fs::ftruncate(&self.file, HEADER_LEN)?;
        let mut header = [0u8; at::END];
        header[at::MAGIC..at::MAGIC + 8].copy_from_slice(MAGIC);
        self.owner.put(&mut header);
        header[at::NONCE..at::NONCE + 16].copy_from_slice(&nonce.to_le_bytes());
        put_u64(&mut header, at::CAPACITY, self.capacity);
        state.halves[0].generation = 1;
        put_u64(&mut header, at::HALVES, 1);
        self.file.write_all_at(&header, 0)?;
        self.put(at::VALID, 1)?;
        state.nonce = Some(nonce);
        state.memory = Some(self.map()?);
        Ok(())
    }

    fn map(&self) -> Result<SharedMemory> {
        SharedMemory::map(&self.file, HEADER_LEN + 2 * self.capacity)
    }

    /// Sets room for one record aside, so that a later append cannot find the keep full. `None` if
    /// there is not enough left: flush first.
    pub fn reserve(&self, payload: u64) -> Option<Reservation<'_>> {
        let mut state = self.lock();
        let len = record_len(payload);
        let used = state.halves[state.active].committed + state.reserved;
        if used.checked_add(len)? > self.capacity {
            return None;
        }
        state.reserved += len;
        Some(Reservation { keep: self, len })
    }

    /// Appends a record, given in pieces. When this returns, the record survives `kill -9`.
    ///
    /// # Errors
    /// Kind [`NoSpace`](ErrorKind::NoSpace) if the keep or the tmpfs is full: flush, `release`, and
    /// try again (or do without the record, as it is flushed then). Kind
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) if no session runs: do without the record.
    pub fn append(&self, pieces: &[&[u8]]) -> Result<()> {
        self.append_and(pieces, || ())
    }

    /// As [`Keep::append`], and does `change` once the record is kept, as one step to
    /// [`Keep::rotate`]: either both come before it or none. `change` must be short.
    pub fn append_and(&self, pieces: &[&[u8]], change: impl FnOnce()) -> Result<()> {
        let payload = pieces.iter().map(|piece| piece.len() as u64).sum();
        let mut state = self.lock();
        let used = state.halves[state.active].committed + state.reserved;
        if used.checked_add(record_len(payload)).is_none_or(|used| used > self.capacity) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("{}: full ({} bytes)", self.path.display(), self.capacity),
            ));
        }
        self.append_locked(&mut state, pieces).context(|| self.path.display().to_string())?;
        change();
        Ok(())
    }

    fn append_locked(&self, state: &mut State, pieces: &[&[u8]]) -> Result<()> {
        // Of the guest that has left, whose last request is just ending.
        let memory = state.memory.as_ref().ok_or_else(|| Error::invalid("no session runs"))?;
        let payload: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        let half = &mut state.halves[state.active];
        let position = half.committed;
        let committed = position + record_len(payload);
        let start = HEADER_LEN + state.active as u64 * self.capacity;
        if committed > half.backed {
            let len = (committed - half.backed).next_multiple_of(RESERVE);
            let len = len.min(self.capacity - half.backed);
            SharedMemory::reserve(&self.file, start + half.backed, len)?;
            half.backed += len;
        }
        let mut header = [0u8; RECORD_HEADER as usize];
        header[..4].copy_from_slice(&(payload as u32).to_le_bytes());
        let crc = checksum(half.generation, position, pieces);
        header[4..].copy_from_slice(&crc.to_le_bytes());
        memory.copy_in(start + position, &header);
        let mut at = start + position + RECORD_HEADER;
        for piece in pieces {
            memory.copy_in(at, piece);
            at += piece.len() as u64;
        }
        memory.store((at::HALVES + 16 * state.active + 8) as u64, committed);
        half.committed = committed;
        Ok(())
    }

    /// A flush starts: records appended from now on belong to the next one. What was appended
    /// before stays until [`Keep::release`].
    ///
    /// # Panics
    /// If the flush before was not released, or a [`Reservation`] is still open.
    pub fn rotate(&self) -> Result<()> {
        let mut state = self.lock();
        let (old, new) = (state.active, 1 - state.active);
        assert_eq!(state.halves[new].committed, 0, "the flush before was not released");
        assert_eq!(state.reserved, 0, "a reservation is open");
        if state.halves[old].committed == 0 {
            return Ok(());
        }
        let generation = state.halves[old].generation + 1;
        self.put(at::HALVES + 16 * new, generation)?;
        state.halves[new].generation = generation;
        state.active = new;
        Ok(())
    }

    /// The flush that began at [`Keep::rotate`] is durable: drops the records from before it.
    pub fn release(&self) -> Result<()> {
        let mut state = self.lock();
        let old = 1 - state.active;
        self.clear_half(&mut state, old)
    }

    /// Drops all records; the session goes on. For owners that let nothing complete during a
    /// flush, instead of `rotate` and `release`.
    pub fn reset(&self) -> Result<()> {
        self.clear(&mut self.lock())
    }

    fn clear(&self, state: &mut State) -> Result<()> {
        // The older half first: killed in between, what is left is redone on top of more.
        self.clear_half(state, 1 - state.active)?;
        self.clear_half(state, state.active)
    }

    fn clear_half(&self, state: &mut State, half: usize) -> Result<()> {
        if state.halves[half].committed == 0 {
            return Ok(());
        }
        // A new generation for the next records of this half, unless it waits for its rotation.
        if half == state.active {
            self.put(at::HALVES + 16 * half + 8, 0)?;
            state.halves[half].generation += 1;
            self.put(at::HALVES + 16 * half, state.halves[half].generation)?;
        } else {
            self.put(at::HALVES + 16 * half + 8, 0)?;
        }
        state.halves[half].committed = 0;
        let backed = &mut state.halves[half].backed;
        if *backed > RESERVE {
            // Gives the memory back. Not vital.
            let start = HEADER_LEN + half as u64 * self.capacity + RESERVE;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = rustix::fs::fallocate(&self.file, flags, start, self.capacity - RESERVE);
            *backed = RESERVE;
        }
        Ok(())
    }

    /// The records of session `nonce`, oldest first; `None` if this keep holds nothing of it. They
    /// stay until [`Keep::reset`] or [`Keep::begin`], so a redo that is killed can be repeated.
    ///
    /// # Errors
    /// Kind [`Corrupt`](ErrorKind::Corrupt) if a record is damaged: none may be applied then.
    pub fn take_over(&self, nonce: u128) -> Result<Option<Vec<Vec<u8>>>> {
        let mut records = Vec::new();
        let found = self.take_over_each(nonce, |record| records.push(record.to_vec()))?;
        Ok(found.then_some(records))
    }

    /// As [`Keep::take_over`], for records of which only a digest is wanted in memory; false if
    /// this keep holds nothing of the session. After an error, what was handed over is void.
    pub fn take_over_each(&self, nonce: u128, mut each: impl FnMut(&[u8])) -> Result<bool> {
        let state = self.lock();
        if state.nonce != Some(nonce) {
            return Ok(false);
        }
        let mut order = [0, 1];
        order.sort_by_key(|half| state.halves[*half].generation);
        for half in order {
            self.read_half(&state, half, &mut each).context(|| self.path.display().to_string())?;
        }
        Ok(true)
    }

    /// The session that this keep is of, whether it holds records or not.
    pub fn session(&self) -> Option<u128> {
        self.lock().nonce
    }

    /// The session whose records are here, if there are any.
    pub fn found(&self) -> Option<u128> {
        let state = self.lock();
        state.nonce.filter(|_| state.holds_records())
    }

    /// The session of a guest that is still to come back: records of an earlier process are here that
    /// nobody has redone, so the image is not what that guest relies on.
    pub fn awaited(&self) -> Option<u128> {
        self.found().filter(|_| !self.is_recording())
    }

    fn read_half(&self, state: &State, half: usize, each: &mut impl FnMut(&[u8])) -> Result<()> {
        let Half { generation, committed, .. } = state.halves[half];
        let start = HEADER_LEN + half as u64 * self.capacity;
        let mut position = 0;
        let mut payload = Vec::new();
        while position < committed {
            let damaged = |what: &str| {
                Error::corrupt(format!(
                    "kept record at {position} of generation {generation} {what}; nothing was \
                     applied. To go on without what the guest had not flushed, stop the guest and \
                     remove this file"
                ))
            };
            let mut header = [0u8; RECORD_HEADER as usize];
            self.file.read_exact_at(&mut header, start + position)?;
            let len = u64::from(u32::from_le_bytes(header[..4].try_into().unwrap()));
            let crc = u32::from_le_bytes(header[4..].try_into().unwrap());
            if position + record_len(len) > committed {
                return Err(damaged("runs past the end"));
            }
            payload.resize(len as usize, 0);
            self.file.read_exact_at(&mut payload, start + position + RECORD_HEADER)?;
            if checksum(generation, position, &[&payload]) != crc {
                return Err(damaged("has a wrong checksum"));
            }
            each(&payload);
            position += record_len(len);
        }
        Ok(())
    }

    /// Drops what an earlier session left here, with a line in the log if there was anything.
    pub fn forget(&self) -> Result<()> {
        if let Some(nonce) = self.found() {
            tracing::warn!(
                path = %self.path.display(),
                session = format_args!("{nonce:032x}"),
                "a new guest starts: what an earlier guest had written but not flushed is dropped"
            );
        }
        let mut state = self.lock();
        self.put(at::VALID, 0)?;
        // Unmapped before the file is cut.
        state.drop_session();
        rustix::fs::ftruncate(&self.file, HEADER_LEN)?;
        Ok(())
    }

    /// Removes the file: the image was closed in order and nothing needs to be kept. What an
    /// earlier process kept for a guest that has not come back stays where it is, and be it but that
    /// guest's name: without it, the guest would be refused.
    pub fn discard(&self) -> Result<()> {
        if self.awaited().is_some() || self.lock().is_borne {
            tracing::info!(path = %self.path.display(), "kept for a guest that has not come back");
            return Ok(());
        }
        let mut state = self.lock();
        self.put(at::VALID, 0)?;
        state.drop_session();
        match std::fs::remove_file(&self.path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::from(err).context(self.path.display().to_string()))
            }
            _ => Ok(()),
        }
    }

    /// Removes a file that holds no session, and so nothing that anybody could want: an image that was
    /// opened and not served after all leaves nothing behind.
    fn remove_if_unused(&mut self) {
        let holds_a_session = self.state.get_mut().is_ok_and(|state| state.nonce.is_some());
        if !holds_a_session && is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Writes a header field as one aligned word.
    fn put(&self, at: usize, value: u64) -> Result<()> {
        self.file
            .write_all_at(&value.to_le_bytes(), at as u64)
            .context(|| self.path.display().to_string())
    }
}

impl Owner {
    fn new(image: (u64, u64), born_ns: i64, format: &str) -> Result<Owner> {
        let mut name = [0; 32];
        name[..format.len()].copy_from_slice(format.as_bytes());
        Ok(Owner { boot_id: read_boot_id()?, image, born_ns, format: name })
    }

    fn put(&self, header: &mut [u8]) {
        header[at::BOOT_ID..at::BOOT_ID + 40].copy_from_slice(&self.boot_id);
        put_u64(header, at::DEV, self.image.0);
        put_u64(header, at::INO, self.image.1);
        header[at::FORMAT..at::FORMAT + 32].copy_from_slice(&self.format);
        put_u64(header, at::BORN, self.born_ns as u64);
    }

    /// What an earlier process left in a keep, if it is of this image, format and boot; and the capacity.
    fn read_header(&self, file: &File) -> Option<(State, u64)> {
        let mut header = [0u8; at::END];
        file.read_exact_at(&mut header, 0).ok()?;
        let fits = header[at::MAGIC..at::MAGIC + 8] == *MAGIC
            && get_u64(&header, at::VALID) == 1
            && header[at::BOOT_ID..at::BOOT_ID + 40] == self.boot_id
            && (get_u64(&header, at::DEV), get_u64(&header, at::INO)) == self.image
            && header[at::FORMAT..at::FORMAT + 32] == self.format;
        // Versions before this field left zeros there.
        let born_ns = get_u64(&header, at::BORN) as i64;
        if !fits || (born_ns != self.born_ns && born_ns != 0 && self.born_ns != 0) {
            return None;
        }
        let nonce = u128::from_le_bytes(header[at::NONCE..at::NONCE + 16].try_into().ok()?);
        let half = |i: usize| Half {
            generation: get_u64(&header, at::HALVES + 16 * i),
            committed: get_u64(&header, at::HALVES + 16 * i + 8),
            backed: 0,
        };
        let halves = [half(0), half(1)];
        // The capacity is that of the process that wrote it.
        let capacity = get_u64(&header, at::CAPACITY);
        if !capacity.is_multiple_of(4096) || halves.iter().any(|half| half.committed > capacity) {
            return None;
        }
        let active = usize::from(halves[1].generation > halves[0].generation);
        let state = State { nonce: Some(nonce), halves, active, ..State::default() };
        Some((state, capacity))
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        self.remove_if_unused();
    }
}

/// Whether the file is the one at this path.
fn is_at(file: &File, path: &Path) -> bool {
    let id = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(file), Ok(there)) => id(file) == id(there),
        _ => false,
    }
}

fn file_name(image: (u64, u64), format: &str) -> String {
    format!("{format}-{:x}-{:x}.keep", image.0, image.1)
}

/// Room for one record, set aside by [`Keep::reserve`]. Dropping it gives the room back.
#[derive(Debug)]
#[must_use]
pub struct Reservation<'a> {
    keep: &'a Keep,
    len: u64,
}

impl Reservation<'_> {
    /// Appends the record; see [`Keep::append`]. Fails only if the tmpfs itself is full, or the
    /// session has ended meanwhile.
    ///
    /// # Panics
    /// If the record is longer than what was reserved.
    pub fn append(self, pieces: &[&[u8]]) -> Result<()> {
        let payload = pieces.iter().map(|piece| piece.len() as u64).sum();
        assert!(record_len(payload) <= self.len, "record longer than its reservation");
        let mut state = self.keep.lock();
        let result = self.keep.append_locked(&mut state, pieces);
        drop(state);
        result.context(|| self.keep.path.display().to_string())
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut state = self.keep.lock();
        state.reserved -= self.len.min(state.reserved);
    }
}

/// Space a record takes.
fn record_len(payload: u64) -> u64 {
    (RECORD_HEADER + payload).next_multiple_of(8)
}

fn checksum(generation: u64, position: u64, pieces: &[&[u8]]) -> u32 {
    // Most records are short, and one sum takes a third of what three take.
    let mut start = [0; 64];
    let mut len = 0;
    let mut gather = |piece: &[u8]| {
        let Some(room) = start[len..].get_mut(..piece.len()) else { return false };
        room.copy_from_slice(piece);
        len += piece.len();
        true
    };
    gather(&generation.to_le_bytes());
    gather(&position.to_le_bytes());
    let gathered = pieces.iter().take_while(|piece| gather(piece)).count();
    let crc = crc32c::crc32c(&start[..len]);
    pieces[gathered..].iter().fold(crc, |crc, piece| crc32c::crc32c_append(crc, piece))
}

fn put_u64(header: &mut [u8], at: usize, value: u64) {
    header[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get_u64(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"))
}

/// Locks the file against other processes. One that was just killed may still be going away.
fn lock(file: &File) -> Result<()> {
    const TRIES: u32 = 50;
    for _ in 0..TRIES {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            other => return Ok(other?),
        }
    }
    Err(Error::new(ErrorKind::Busy, "another process serves this image"))
}

/// Names this boot of the host.
/// Which boot of the host this is, in the kernel's words.
pub fn read_boot_id() -> Result<[u8; 40]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).context(|| PATH)?;
    let text = text.trim().as_bytes();
    let mut id = [0; 40];
    let len = text.len().min(id.len());
    id[..len].copy_from_slice(&text[..len]);
    Ok(id)
}

fn is_tmpfs(path: &Path) -> Result<bool> {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let fs = rustix::fs::statfs(path)?;
    Ok(matches!(fs.f_type, TMPFS | RAMFS))
}

/// Makes the directory if need be and checks that it is one of ours, in memory.
fn prepare_dir(dir: &Path) -> Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    let on_disk = || {
        Error::unsupported(
            "is not on tmpfs, so what is kept there would survive a power cut that the disk's \
             own content did not; name a directory on tmpfs with --state-dir",
        )
    };
    if std::fs::symlink_metadata(dir).is_err() && !is_tmpfs(open_gate::directory_of(dir))? {
        return Err(on_disk());
    }
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => return Err(err.into()),
        _ => {}
    }
    let open = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, open, Mode::empty())?;
    let meta = File::from(fd.as_fd().try_clone_to_owned()?).metadata()?;
    if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
        return Err(Error::new(
            ErrorKind::PermissionDenied,
            "belongs to, or can be written by, others; name another with --state-dir",
        ));
    }
    if !is_tmpfs(dir)? {
        return Err(on_disk());
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
