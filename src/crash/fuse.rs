//! States as plain files, through FUSE.
//!
//! One file for each worker, always the same: when a worker goes on to its next state, the kernel is
//! told which pages may have changed and keeps all others in its cache. So a checker reads what
//! differs from the state before, and the rest at the speed of memory.
//!
//! A killed process leaves its mount behind, without anything in it. The next one takes it away.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, Notifier, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};

use rustix::mount::UnmountFlags;

use crate::crash::disk::StateDisk;
use crate::crash::history::History;
use crate::crash::name::StateName;
use crate::crash::scratch::Scratch;
use crate::crash::syncer::Syncer;
use crate::error::{Error, Result, ResultExt};
use crate::units::ByteRange;

/// Attributes never change.
const FOREVER: Duration = Duration::from_secs(1 << 30);
/// How much the kernel may read that nobody has asked for, in bytes, where that counts.
const MAX_READAHEAD: u32 = 1;

/// What is told of what checkers read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// No more than they asked for, in whole pages: the kernel does not read ahead.
    Exact,
    /// Nothing that counts.
    Unknown,
}

/// Inode of the first worker's file.
const FIRST: u64 = 2;

/// The mounted directory. Dropping it unmounts and removes it.
#[derive(Debug)]
pub struct Mount {
    /// `None` only while dropping.
    session: Option<BackgroundSession>,
    dir: PathBuf,
    /// What it is in: below a mount, a lock could not be seen.
    _around: Scratch,
}

/// What the names of our directories begin with.
const DIR_PREFIX: &str = "vublk-states-";
/// What is mounted in one of them.
const MOUNTED: &str = "disks";

/// Takes away the mount that a killed process has left.
fn unmount(dir: &Path, _lock: &OwnedFd) {
    let mounted = dir.join(MOUNTED);
    // A link is not ours.
    let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    let _ = rustix::mount::unmount(&mounted, flags);
    let _ = std::fs::remove_dir(&mounted);
}

/// The file of one worker.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    inode: INodeNo,
    disk: Arc<Mutex<StateDisk>>,
    notifier: Notifier,
    syncer: Syncer,
}

impl Mount {
    /// Mounts a directory with a file for each disk, below the directory for temporary files.
    /// `reads` is what the files are asked to tell of them.
    ///
    /// # Errors
    /// If the host has no FUSE or does not let us use it.
    pub fn new(disks: Vec<StateDisk>, reads: Reads) -> Result<(Mount, Vec<StateFile>)> {
        let around = Scratch::new(DIR_PREFIX, unmount)?;
        let dir = around.path().join(MOUNTED);
        std::fs::create_dir(&dir).context(|| dir.display().to_string())?;
        let disks: Vec<_> = disks.into_iter().map(|disk| Arc::new(Mutex::new(disk))).collect();
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("vublk".into()),
            MountOption::NoAtime,
            MountOption::NoDev,
            MountOption::NoSuid,
        ];
        config.n_threads = Some(disks.len().clamp(1, 4));
        let session =
            match fuser::spawn_mount(States { disks: disks.clone(), reads }, &dir, &config) {
                Ok(session) => session,
                Err(err) => {
                    let _ = std::fs::remove_dir(&dir);
                    return Err(Error::from(err).context("FUSE"));
                }
            };
        let notifier = session.notifier();
        let mount = Mount { session: Some(session), dir: dir.clone(), _around: around };
        let file = |(i, disk): (usize, &Arc<Mutex<StateDisk>>)| -> Result<StateFile> {
            let path = dir.join(file_name(i));
            let syncer = Syncer::start(path.clone())?;
            let inode = INodeNo(FIRST + i as u64);
            Ok(StateFile {
                path,
                inode,
                disk: Arc::clone(disk),
                notifier: notifier.clone(),
                syncer,
            })
        };
        let files = disks.iter().enumerate().map(file).collect::<Result<_>>()?;
        Ok((mount, files))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(self.session.take());
        let _ = std::fs::remove_dir(&self.dir);
    }
}

impl StateFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The log that its states are of.
    pub fn history(&self) -> Arc<History> {
        Arc::clone(lock(&self.disk).history())
    }

    /// What was read of the state since it is shown; more may have been, but nothing that differs
    /// between states of its epoch.
    pub fn looked_at(&self) -> Vec<ByteRange> {
        lock(&self.disk).looked_at().to_vec()
    }

    /// A checker has ended: fetches what it wrote.
    ///
    /// # Errors
    /// If something that it read could not be read, or something that it wrote not be kept. Then
    /// its verdict says nothing of the state.
    pub fn settle(&self) -> Result<()> {
        let synced = self.syncer.sync();
        match lock(&self.disk).take_failure() {
            Some(err) => Err(err),
            None => synced.context(|| self.path.display().to_string()),
        }
    }

    /// Makes it the state `name`, fresh.
    ///
    /// # Errors
    /// If the log has no such state, or the kernel refuses.
    pub fn show(&self, name: &StateName) -> Result<()> {
        // Whoever wrote after its checker had ended: not to this state.
        self.syncer.sync().context(|| self.path.display().to_string())?;
        let changed = lock(&self.disk).show(name)?;
        for range in changed {
            // It is an error to forget what is not in the cache, and none to us.
            let _ = self.notifier.inval_inode(self.inode, range.offset as i64, range.len as i64);
        }
        Ok(())
    }
}

fn file_name(worker: usize) -> String {
    format!("{worker}.img")
}

/// A panic in one thread ends the process, so no lock is ever poisoned.
fn lock(disk: &Mutex<StateDisk>) -> MutexGuard<'_, StateDisk> {
    disk.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the kernel talks to.
#[derive(Debug)]
struct States {
    disks: Vec<Arc<Mutex<StateDisk>>>,
    reads: Reads,
}

impl States {
    fn disk(&self, inode: INodeNo) -> Option<MutexGuard<'_, StateDisk>> {
        let worker = inode.0.checked_sub(FIRST)?;
        self.disks.get(usize::try_from(worker).ok()?).map(|disk| lock(disk))
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = if inode == INodeNo::ROOT {
            (FileType::Directory, 0o700, 0)
        } else {
            (FileType::RegularFile, 0o600, self.disk(inode)?.size())
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for States {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // A recovery writes thousands of small blocks. The kernel gathers them in its cache, and we get
        // them a range at a time, or not at all if the next state comes first. A kernel that cannot do
        // that hands us each write.
        let _ = config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE);
        if self.reads == Reads::Exact {
            let _ = config.set_max_readahead(MAX_READAHEAD);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let worker = (0..self.disks.len()).find(|worker| *name == *file_name(*worker));
        let inode = worker.filter(|_| parent == INodeNo::ROOT).map(|i| INodeNo(FIRST + i as u64));
        match inode.and_then(|inode| self.attributes(inode)) {
            Some(attributes) => reply.entry(&FOREVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, inode: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Times and rights are ignored; the size of a disk stays.
    fn setattr(
        &self,
        _req: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.attributes(inode) {
            Some(attributes) if size.is_none_or(|size| size == attributes.size) => {
                reply.attr(&FOREVER, &attributes);
            }
            Some(_) => reply.error(Errno::EPERM),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _req: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(mut disk) = self.disk(inode) else { return reply.error(Errno::ENOENT) };
        match disk.read(ByteRange { offset, len: u64::from(size) }) {
            Ok(bytes) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _req: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(mut disk) = self.disk(inode) else { return reply.error(Errno::ENOENT) };
        match disk.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::ENOSPC),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _inode: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Nothing to do, and the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        _inode: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _req: &Request,
        inode: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if inode != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        for worker in (offset as usize)..self.disks.len() {
            let inode = INodeNo(FIRST + worker as u64);
            let next = worker as u64 + 1;
            if reply.add(inode, next, FileType::RegularFile, file_name(worker)) {
                break;
            }
        }
        reply.ok();
    }
}
