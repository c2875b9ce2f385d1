//! Files and block devices of the host.

#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FileType, Mode, OFlags};

use super::buf::AlignedBuf;
use super::engine::{Op, OpCode, blocking};
use super::file::{Alignment, File, Fut, Hole};
use super::flushes::Flushes;
use super::lock::{self, Rights};
use super::slow_calls::SlowCalls;
use super::{Buffers, reactor};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::units::{ByteRange, align_down, align_up};

/// How to open a host file.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Open for writing too.
    pub write: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Create it; an existing file is an error unless `truncate`.
    pub create: bool,
    /// With `create`: empty an existing file instead of refusing it.
    pub truncate: bool,
}

/// What kind of thing a host file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// An open file or block device of the host.
///
/// Its reads and writes go through the reactor of the calling thread; on a thread without one they
/// are plain blocking calls.
pub struct HostFile {
    /// Shared with operations in flight, which must not meet another file of the same number.
    fd: Arc<OpenFile>,
    path: PathBuf,
    /// The path as text, for messages.
    name: String,
    kind: HostKind,
    direct: bool,
    writable: bool,
    alignment: Alignment,
    /// Identifies the open file within the process; never reused.
    id: u32,
    flushes: Arc<Flushes>,
    /// Whether reads / writes are better done by plain calls than by the ring, which would only
    /// hand them to a kernel worker.
    inline: Inline,
    /// Whether a plain call can read from the page cache without waiting.
    reads_nowait: bool,
    /// See [`HostFile::modified_before_ns`].
    modified_before_ns: i64,
    /// Whether plain calls hold up whoever makes them.
    slow_calls: SlowCalls,
}

/// In which directions plain calls beat the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inline {
    /// Reads.
    pub reads: bool,
    /// Writes.
    pub writes: bool,
}

/// The open file itself. The last holder, which may be an operation that nobody waits for any more,
/// releases the image locks.
#[derive(Debug)]
pub(super) struct OpenFile(pub(super) OwnedFd);

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for OpenFile {
    /// Releases the image locks now. The close that follows need not: an io_uring that had the file
    /// registered keeps it open until the kernel has cleared up after the ring, which may be long
    /// after the process has ended.
    fn drop(&mut self) {
        lock::unlock(self.0.as_fd());
    }
}

/// Largest bounce buffer of a request; a multiple of what any O_DIRECT demands.
const BOUNCE_LEN: u64 = 256 << 10;

static NEXT_ID: AtomicU32 = AtomicU32::new(0);

impl HostFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// Names the path. Refuses what is neither a regular file nor a block device, and files that
    /// O_DIRECT does not work on.
    pub fn open(path: &Path, options: OpenOptions) -> Result<HostFile> {
        let name = path.display().to_string();
        HostFile::open_named(path, name.clone(), options).context(|| name)
    }

    fn open_named(path: &Path, name: String, options: OpenOptions) -> Result<HostFile> {
        let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY;
        flags |= if options.write { OFlags::RDWR } else { OFlags::RDONLY };
        if options.direct {
            flags |= OFlags::DIRECT;
        }
        if options.create {
            flags |= OFlags::CREATE;
            flags |= if options.truncate { OFlags::TRUNC } else { OFlags::EXCL };
        } else if let Ok(meta) = std::fs::metadata(path) {
            // A FIFO would block in open(2), and a directory gives a puzzling error for writers.
            check_type(FileType::from_raw_mode(mode_of(&meta)))?;
        }
        let fd =
            rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map_err(|errno| {
                match (errno, options.direct) {
                    (rustix::io::Errno::INVAL, true) => Error::unsupported(
                        "its file system does not support O_DIRECT; use --cache writeback (of vublk convert: -T, -t)",
                    ),
                    _ => Error::from(errno),
                }
            })?;
        HostFile::from_fd(fd, path.to_path_buf(), name, options)
    }

    fn from_fd(fd: OwnedFd, path: PathBuf, name: String, options: OpenOptions) -> Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        let kind = check_type(FileType::from_raw_mode(stat.st_mode))?;
        if kind == HostKind::BlockDevice && options.write && is_read_only_device(fd.as_fd()) {
            return Err(Error::new(ErrorKind::ReadOnly, "is a read-only block device"));
        }
        let alignment = if options.direct {
            direct_alignment(fd.as_fd(), kind)?
        } else {
            // Through the page cache any alignment works, on devices too.
            Alignment::NONE
        };
        let flushes = Arc::default();
        if options.direct && options.write {
            drop_page_cache(fd.as_fd(), &flushes);
        }
        keep_access_time(fd.as_fd());
        let (inline, reads_nowait) = probe_inline(fd.as_fd(), kind, options.direct);
        Ok(HostFile {
            fd: Arc::new(OpenFile(fd)),
            path,
            name,
            kind,
            direct: options.direct,
            writable: options.write,
            alignment,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            flushes,
            inline,
            reads_nowait,
            modified_before_ns: modified_ns(&stat),
            slow_calls: SlowCalls::default(),
        })
    }

    /// The same open file, with its locks, by way of the page cache from now on. The one that was
    /// opened for direct I/O must not be used for more than its name and locks any more.
    pub fn buffered(&self) -> Result<HostFile> {
        if self.direct {
            let flags = rustix::fs::fcntl_getfl(&self.fd)?;
            rustix::fs::fcntl_setfl(&self.fd, flags - OFlags::DIRECT)?;
        }
        let (inline, reads_nowait) = probe_inline(self.fd.as_fd(), self.kind, false);
        Ok(HostFile {
            fd: Arc::clone(&self.fd),
            path: self.path.clone(),
            name: self.name.clone(),
            kind: self.kind,
            direct: false,
            writable: self.writable,
            alignment: Alignment::NONE,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            flushes: Arc::clone(&self.flushes),
            inline,
            reads_nowait,
            modified_before_ns: self.modified_before_ns,
            slow_calls: SlowCalls::default(),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Regular file or block device.
    pub fn kind(&self) -> HostKind {
        self.kind
    }

    /// Whether it bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// A number that no other open file of this process has or had.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The syncs of this file, which take turns.
    pub fn flushes(&self) -> &Arc<Flushes> {
        &self.flushes
    }

    /// In which directions plain calls are to be preferred right now.
    pub fn inline(&self) -> Inline {
        if (self.inline.reads || self.inline.writes) && self.slow_calls.are_suspended() {
            return Inline::default();
        }
        self.inline
    }

    /// Whether a plain call can read from the page cache without waiting.
    #[inline]
    pub fn reads_nowait(&self) -> bool {
        self.reads_nowait
    }

    /// Performs a transfer in place. Those that sleep for long (the host throttles the writer, say)
    /// suspend such calls for a while: the next requests go through the ring, where they hold up
    /// nobody else.
    ///
    /// # Safety
    /// As for [`blocking`].
    #[inline]
    pub unsafe fn inline_call(&self, op: &Op) -> i32 {
        // SAFETY: passed on to the caller.
        self.slow_calls.make(|| unsafe { blocking(op) })
    }

    /// Writes all of `data` in place, in as many plain calls as it takes; for files of which
    /// [`HostFile::inline`] says so.
    ///
    /// # Errors
    /// As the host's. Part of the data may have been written then.
    #[inline]
    pub fn write_in_place(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            let iov = libc::iovec { iov_base: rest.as_ptr() as *mut _, iov_len: rest.len() };
            let op = Op {
                code: OpCode::Write { dsync: false },
                fd: self.as_raw_fd(),
                file_id: self.id,
                offset: offset + done as u64,
                len: 0,
                iovs: &iov,
                n_iovs: 1,
            };
            // SAFETY: `rest` lives until the call is over, and a write does not change it.
            match unsafe { self.inline_call(&op) } {
                n if n > 0 => done += n as usize,
                0 => return Err(reactor::short_file(self, offset + done as u64)),
                e if e == -libc::EAGAIN || e == -libc::EINTR => {}
                e => return Err(Error::from_errno(-e)),
            }
        }
        Ok(())
    }

    /// Copies bytes of another file to `offset`, within the host: shares them where it can, and has
    /// one copy fewer than a read and a write otherwise. Blocks. Returns how many were copied, from
    /// the first on; fewer than `range.len` where the host cannot, and then a read and a write are
    /// what is left.
    ///
    /// # Errors
    /// As the host's, for a disk that is full, say.
    pub fn copy_from(&self, offset: u64, from: &HostFile, range: ByteRange) -> Result<u64> {
        use rustix::io::Errno;
        if self.direct || from.direct {
            return Ok(0);
        }
        let mut done = 0;
        while done < range.len {
            let (mut source, mut target) = (range.offset + done, offset + done);
            let left = (range.len - done).try_into().unwrap_or(usize::MAX);
            let copy = rustix::fs::copy_file_range(
                &from.fd,
                Some(&mut source),
                &self.fd,
                Some(&mut target),
                left,
            );
            match copy {
                Ok(0) => break,
                Ok(count) => done += count as u64,
                Err(Errno::INTR | Errno::AGAIN) => {}
                // Not between these two files, or not by this host.
                Err(
                    Errno::XDEV
                    | Errno::INVAL
                    | Errno::OPNOTSUPP
                    | Errno::NOSYS
                    | Errno::PERM
                    | Errno::TXTBSY,
                ) => break,
                Err(err) => return Err(err.into()),
            }
        }
        Ok(done)
    }

    /// Has the host begin to write to the disk what is in its page cache of a range, so that a flush
    /// later finds less to do. Waits for nothing but a place in the disk's queue, and promises nothing.
    pub fn begin_writeback(&self, range: ByteRange) {
        let (offset, len) = (range.offset as i64, range.len as i64);
        if !self.direct {
            // A hint: where it fails, the flush does it all.
            // SAFETY: no memory is involved.
            unsafe {
                libc::sync_file_range(self.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE)
            };
        }
    }

    /// The descriptor, shared with an operation.
    pub(super) fn share_fd(&self) -> Arc<OpenFile> {
        Arc::clone(&self.fd)
    }

    /// Takes image locks; see [`lock::lock`]. They go with this object and its
    /// last operation.
    pub fn lock(&self, held: Rights, shared: Rights) -> Result<()> {
        lock::lock(self.as_fd(), held, shared).context(|| self.name.clone())
    }

    /// Takes image locks that another open file of ours has; see [`lock::lock_beside`].
    pub fn lock_beside(&self, held: Rights, shared: Rights) -> Result<()> {
        lock::lock_beside(self.as_fd(), held, shared).context(|| self.name.clone())
    }

    /// Changes the image locks from (held, shared) rights to others; see [`lock::relock`].
    pub fn relock(&self, from: (Rights, Rights), to: (Rights, Rights)) -> Result<()> {
        lock::relock(self.as_fd(), from, to).context(|| self.name.clone())
    }

    /// Releases the image locks.
    pub fn unlock(&self) {
        lock::unlock(self.as_fd());
    }

    /// Device and inode number: tells whether two files are the same one.
    pub fn identity(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.fd)?;
        let dev = if self.kind == HostKind::BlockDevice { stat.st_rdev } else { stat.st_dev };
        Ok((dev, stat.st_ino))
    }

    /// Length and allocated space in bytes, as far as the host says.
    pub fn extent(&self) -> (u64, u64) {
        let stat = rustix::fs::fstat(&self.fd);
        stat.map_or((0, 0), |stat| (stat.st_size as u64, stat.st_blocks as u64 * 512))
    }

    /// Whether the file has no name on the host any more.
    pub fn is_unlinked(&self) -> bool {
        rustix::fs::fstat(&self.fd).is_ok_and(|stat| stat.st_nlink == 0)
    }

    /// Takes from a file that was just made, and is to hold what `other` holds, the rights of the group
    /// and of others that `other` does not give. File systems without rights of their own get a line in
    /// the log.
    pub fn open_no_wider_than(&self, other: &HostFile) {
        const NOT_THE_OWNERS: u32 = 0o077;
        let rights = |file: &HostFile| rustix::fs::fstat(&file.fd).map(|stat| stat.st_mode & 0o777);
        let narrow = |own: u32, allowed: u32| match own & (allowed | !NOT_THE_OWNERS) {
            narrow if narrow == own => Ok(()),
            narrow => rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(narrow)),
        };
        let narrowed = rights(self).and_then(|own| narrow(own, rights(other)?));
        if let Err(err) = narrowed {
            let (name, other) = (&self.name, &other.name);
            tracing::warn!("{name}: may be open to more users than {other}: {err}");
        }
    }

    /// When the file was last written to, in nanoseconds since 1970; 0 for block devices, whose
    /// writers leave no trace, and where the host does not say.
    pub fn modified_ns(&self) -> i64 {
        match self.kind {
            HostKind::BlockDevice => 0,
            HostKind::Regular => rustix::fs::fstat(&self.fd).map_or(0, |stat| modified_ns(&stat)),
        }
    }

    /// The same, as it was when it was opened here.
    pub fn modified_before_ns(&self) -> i64 {
        match self.kind {
            HostKind::BlockDevice => 0,
            HostKind::Regular => self.modified_before_ns,
        }
    }

    /// When the file was made, in nanoseconds since 1970; 0 where the host does not say. Inode
    /// numbers are used again, so this tells a file from one that was there before it.
    pub fn born_ns(&self) -> i64 {
        use rustix::fs::{AtFlags, StatxFlags};
        match rustix::fs::statx(&self.fd, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME) {
            Ok(stat) if stat.stx_mask & StatxFlags::BTIME.bits() != 0 => {
                let born = stat.stx_btime;
                born.tv_sec.saturating_mul(1_000_000_000).saturating_add(i64::from(born.tv_nsec))
            }
            _ => 0,
        }
    }

    /// Logical block size of a block device; 1 for files, whose writes may have any size.
    pub fn logical_block_size(&self) -> Result<u64> {
        match self.kind {
            HostKind::Regular => Ok(1),
            HostKind::BlockDevice => Ok(u64::from(rustix::fs::ioctl_blksszget(&self.fd)?)),
        }
    }

    /// Preferred I/O size of the host in bytes.
    pub fn preferred_io_size(&self) -> u64 {
        rustix::fs::fstat(&self.fd).map_or(0, |stat| stat.st_blksize as u64)
    }

    /// Space it takes on the host, in bytes.
    pub fn allocated_size(&self) -> Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_blocks as u64 * 512)
    }

    /// Whether the request meets the demands of O_DIRECT as it is.
    fn fits_direct(&self, buf: &Buffers) -> bool {
        buf.is_aligned(self.alignment.memory, self.alignment.request as usize)
    }

    async fn rw(&self, dir: reactor::Dir, offset: u64, buf: Buffers, fua: bool) -> Result<()> {
        if !self.direct || self.fits_direct(&buf) {
            return reactor::rw(self, dir, offset, buf, fua).await;
        }
        // O_DIRECT cannot use this memory: go through a bounce buffer. Of bounded size, because a
        // guest can have many requests in flight that name the same memory again and again.
        let bounce = AlignedBuf::zeroed(buf.len().min(BOUNCE_LEN) as usize, self.alignment.memory);
        let mut done = 0;
        while done < buf.len() {
            let len = (buf.len() - done).min(BOUNCE_LEN);
            let (part, bounce) = (buf.slice(done, len), bounce.buffers().slice(0, len));
            if dir == reactor::Dir::Write {
                part.copy_to(&bounce);
            }
            reactor::rw(self, dir, offset + done, bounce.clone(), fua).await?;
            if dir == reactor::Dir::Read {
                bounce.copy_to(&part);
            }
            done += len;
        }
        Ok(())
    }

    /// Writes zeros where the host cannot make them by itself.
    pub(super) async fn write_plain_zeroes(&self, range: ByteRange) -> Result<()> {
        const CHUNK: u64 = 1 << 20;
        let zeros =
            AlignedBuf::zeroed(range.len.min(CHUNK) as usize, self.alignment.memory.max(512));
        let mut offset = range.offset;
        while offset < range.end() {
            let len = (range.end() - offset).min(CHUNK);
            self.rw(reactor::Dir::Write, offset, zeros.buffers().slice(0, len), false).await?;
            offset += len;
            // The write may have been done in place, and there may be gigabytes of them.
            reactor::yield_now().await;
        }
        Ok(())
    }
}

fn mode_of(meta: &std::fs::Metadata) -> u32 {
    std::os::unix::fs::MetadataExt::mode(meta)
}

/// Refuses what cannot be a disk.
fn check_type(file_type: FileType) -> Result<HostKind> {
    match file_type {
        FileType::RegularFile => Ok(HostKind::Regular),
        FileType::BlockDevice => Ok(HostKind::BlockDevice),
        FileType::Directory => Err(Error::invalid("is a directory, not an image")),
        _ => Err(Error::invalid("is neither a regular file nor a block device")),
    }
}

/// Whether a block device refuses writes, which the kernel says only of each write, not when the
/// device is opened for them.
fn is_read_only_device(fd: BorrowedFd<'_>) -> bool {
    /// `_IO(0x12, 94)`.
    const BLKROGET: libc::c_ulong = 0x125e;
    let mut answer: libc::c_int = 0;
    // SAFETY: the kernel writes one int, which lives until the call is over.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), BLKROGET as _, &mut answer) };
    rc == 0 && answer != 0
}

/// What O_DIRECT demands of this file.
fn direct_alignment(fd: BorrowedFd<'_>, kind: HostKind) -> Result<Alignment> {
    const FALLBACK: Alignment = Alignment { request: 4096, memory: 4096 };
    if kind == HostKind::BlockDevice {
        let block = rustix::fs::ioctl_blksszget(fd)?;
        return Ok(Alignment { request: u64::from(block), memory: block as usize });
    }
    // SAFETY: a zeroed statx is a valid one, and the kernel fills it within its size.
    let (rc, stx) = unsafe {
        let mut stx: libc::statx = std::mem::zeroed();
        let rc = libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut stx,
        );
        (rc, stx)
    };
    if rc != 0 || stx.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(FALLBACK);
    }
    if stx.stx_dio_offset_align == 0 {
        return Err(Error::unsupported(
            "its file system does not support O_DIRECT on this file; use --cache writeback (of vublk \
             convert: -T, -t)",
        ));
    }
    Ok(Alignment {
        request: u64::from(stx.stx_dio_offset_align),
        // At least what says that the host has demands at all.
        memory: (stx.stx_dio_mem_align as usize).max(2),
    })
}

fn modified_ns(stat: &rustix::fs::Stat) -> i64 {
    stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec as i64)
}

/// Has reads leave the file's access time alone, which nobody asks of an image and each read looks
/// at. Only its owner may say so; others do without.
fn keep_access_time(fd: BorrowedFd<'_>) {
    if let Ok(flags) = rustix::fs::fcntl_getfl(fd) {
        let _ = rustix::fs::fcntl_setfl(fd, flags | OFlags::NOATIME);
    }
}

/// A page left in the cache makes a direct NOWAIT write fail and go to a kernel worker.
fn drop_page_cache(fd: BorrowedFd<'_>, flushes: &Arc<Flushes>) {
    let synced = rustix::fs::fdatasync(fd);
    // What a process before this one has written may be lost, and the host tells that once.
    if let Some(turn) = flushes.try_begin() {
        turn.end(synced.map_or_else(|errno| errno.raw_os_error(), |()| 0));
    }
    let _ = rustix::fs::fadvise(fd, 0, None, rustix::fs::Advice::DontNeed);
}

/// Finds the directions in which the ring could only hand requests to a kernel worker: the file
/// has no NOWAIT there, so a plain call by the worker itself is cheaper.
fn probe_inline(fd: BorrowedFd<'_>, kind: HostKind, direct: bool) -> (Inline, bool) {
    if direct || kind == HostKind::BlockDevice {
        return (Inline::default(), false);
    }
    // Asking for one byte without waiting does no harm and says whether the file knows NOWAIT.
    let mut byte = [0u8];
    let mut parts = [std::io::IoSliceMut::new(&mut byte)];
    let answer = rustix::io::preadv2(fd, &mut parts, 0, rustix::io::ReadWriteFlags::NOWAIT);
    let reads = matches!(answer, Err(rustix::io::Errno::OPNOTSUPP));
    // The same question for writes would change the file, so ask the file system for its name.
    // xfs and btrfs take buffered NOWAIT writes; ext4, tmpfs and most others do not.
    const XFS: i64 = 0x5846_5342;
    const BTRFS: i64 = 0x9123_683e;
    let writes = match rustix::fs::fstatfs(fd) {
        Ok(fs) => !matches!(fs.f_type, XFS | BTRFS),
        Err(_) => false,
    };
    (Inline { reads, writes }, !reads)
}

impl File for HostFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        match self.kind {
            HostKind::Regular => Ok(rustix::fs::fstat(&self.fd)?.st_size as u64),
            HostKind::BlockDevice => Ok(rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0))?),
        }
    }

    fn alignment(&self) -> Alignment {
        self.alignment
    }

    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        Box::pin(self.rw(reactor::Dir::Read, offset, buf, false))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        Box::pin(async move {
            self.rw(reactor::Dir::Write, offset, buf, fua && self.direct).await?;
            // Through the page cache a durable write is a sync of the file, and one for many.
            if fua && !self.direct { self.flush().await } else { Ok(()) }
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(async move {
            if self.kind == HostKind::BlockDevice && !range.is_aligned(self.logical_block_size()?) {
                // The page cache takes parts of blocks; zeroing by the device does not.
                return self.write_plain_zeroes(range).await;
            }
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let mode = if may_unmap {
                punch
            } else {
                // Not KEEP_SIZE: a write at the end of a file extends it, and so does this.
                libc::FALLOC_FL_ZERO_RANGE
            };
            // Punching does not extend a file, so a range past its end needs the other way.
            let mode = match self.kind {
                HostKind::Regular if may_unmap && range.end() > self.len()? => {
                    libc::FALLOC_FL_ZERO_RANGE
                }
                _ => mode,
            };
            match reactor::fallocate(self, mode, range).await {
                // No zero ranges on this file system (tmpfs, say).
                Err(err) if err.kind() == ErrorKind::Unsupported => {
                    self.write_plain_zeroes(range).await
                }
                other => other,
            }
        })
    }

    fn reserve<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(async move {
            let inside = range.intersect(&ByteRange { offset: 0, len: self.len()? });
            if self.kind == HostKind::BlockDevice || inside.is_empty() {
                return Ok(());
            }
            match reactor::fallocate(self, 0, inside).await {
                Err(err) if err.kind() == ErrorKind::Unsupported => Ok(()),
                other => other,
            }
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        Box::pin(async move {
            // Only whole blocks are worth a call: the rest would be zeroed, not freed.
            let granularity = self.discard_granularity();
            let start = align_up(range.offset, granularity).unwrap_or(u64::MAX);
            let inner = ByteRange::between(start, align_down(range.end(), granularity));
            if inner.is_empty() {
                return Ok(());
            }
            let discarded = match self.kind {
                HostKind::Regular => {
                    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                    reactor::fallocate(self, punch, inner).await
                }
                // To punch a hole into a device is to zero it. Many can discard and not zero, and the
                // kernel finds out when it has dropped what was still to be written there: then what
                // is found is older than what was discarded.
                HostKind::BlockDevice => reactor::discard(self, inner).await,
            };
            match discarded {
                Err(err) if err.kind() == ErrorKind::Unsupported => Ok(()),
                other => other,
            }
        })
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async move {
            let Some(turn) = self.flushes.wait().await? else { return Ok(()) };
            reactor::fdatasync(self, Arc::new(turn)).await
        })
    }

    fn set_len<'a>(&'a self, len: u64) -> Fut<'a, ()> {
        Box::pin(async move {
            match self.kind {
                HostKind::Regular => Ok(rustix::fs::ftruncate(&self.fd, len)?),
                HostKind::BlockDevice if len == self.len()? => Ok(()),
                HostKind::BlockDevice => Err(Error::unsupported(
                    "the size of a block device cannot be changed from here: change it on the host, \
                     and then send SIGHUP to the process that serves it",
                )),
            }
        })
    }

    fn hole_at(&self, offset: u64) -> Result<Hole> {
        let len = self.len()?;
        if offset >= len {
            return Err(reactor::short_file(self, offset));
        }
        let to_end = Hole { range: ByteRange::between(offset, len), is_hole: false };
        if self.kind == HostKind::BlockDevice {
            return Ok(to_end);
        }
        use rustix::fs::SeekFrom;
        match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => {
                Ok(Hole { range: ByteRange::between(offset, data.min(len)), is_hole: true })
            }
            Ok(_) => {
                let hole = rustix::fs::seek(&self.fd, SeekFrom::Hole(offset))?;
                Ok(Hole { range: ByteRange::between(offset, hole.min(len)), is_hole: false })
            }
            // No data from here to the end.
            Err(rustix::io::Errno::NXIO) => Ok(Hole { is_hole: true, ..to_end }),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(to_end),
            Err(errno) => Err(errno.into()),
        }
    }

    fn as_host(&self) -> Option<&HostFile> {
        Some(self)
    }
}

impl HostFile {
    /// The unit in which the host frees space, in bytes.
    pub fn discard_granularity(&self) -> u64 {
        let unit = self.preferred_io_size().max(512);
        if unit.is_power_of_two() { unit.min(1 << 20) } else { 4096 }
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.0.as_raw_fd()
    }
}

impl fmt::Debug for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostFile({}{})", self.name, if self.direct { ", direct" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_process_could_not_write_fails_a_flush() {
        // A file that cannot be synced.
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let flushes = Arc::default();
        drop_page_cache(file.as_fd(), &flushes);
        assert!(flushes.try_begin().is_none(), "the failure is forgotten");
    }
}
