//! Image locks that QEMU understands.
//!
//! QEMU guards an image with open-file-description locks on single bytes: a read lock on byte
//! `100 + i` for each right `i` it holds, and on `200 + i` for each right it does not share with
//! others. Before relying on a right it asks (`F_OFD_GETLK`) whether somebody holds a lock on the
//! counterpart. We do the same, so that QEMU and vublk refuse each other's disks.
//!
//! The locks belong to the open file description and go away with it, however the process dies.

#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::error::{Error, ErrorKind, Result};

/// A set of rights on a node or image file.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Rights(u8);

impl Rights {
    /// No right at all.
    pub const NONE: Rights = Rights(0);
    /// Read, and rely on the content not changing behind one's back.
    pub const CONSISTENT_READ: Rights = Rights(1);
    /// Change the content.
    pub const WRITE: Rights = Rights(2);
    /// Rewrite without changing what is read (allocate, move).
    pub const WRITE_UNCHANGED: Rights = Rights(4);
    /// Change the size.
    pub const RESIZE: Rights = Rights(8);
    /// Change what is below or above a node. Between users in this process only: no lock on the
    /// host stands for it, and [`Rights::ALL`] is without it, so that whoever holds a node
    /// and does not say otherwise keeps the graph around it as it is.
    pub const GRAPH: Rights = Rights(16);
    /// All that the host's locks stand for.
    pub const ALL: Rights = Rights(15);

    /// Each single right with QEMU's word for it, in the order of the lock bytes.
    const EACH: [(Rights, &'static str); 4] = [
        (Rights::CONSISTENT_READ, "consistent read"),
        (Rights::WRITE, "write"),
        (Rights::WRITE_UNCHANGED, "write unchanged"),
        (Rights::RESIZE, "resize"),
    ];

    /// Both sets together.
    pub const fn and(self, other: Rights) -> Rights {
        Rights(self.0 | other.0)
    }

    /// This set without those of `other`.
    pub const fn without(self, other: Rights) -> Rights {
        Rights(self.0 & !other.0)
    }

    /// Whether all rights of `other` are in this set.
    pub const fn contains(self, other: Rights) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The names of the rights in the set.
    pub fn names(self) -> Vec<&'static str> {
        let graph = (Rights::GRAPH, "graph change");
        let each = Rights::EACH.iter().chain([&graph]);
        each.filter(|(r, _)| self.contains(*r)).map(|(_, n)| *n).collect()
    }
}

impl fmt::Debug for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rights({})", self.names().join(" + "))
    }
}

/// First byte of the locks for rights that are held.
const HELD_BASE: i64 = 100;
/// First byte of the locks for rights that are not shared.
const UNSHARED_BASE: i64 = 200;

/// The byte that is locked by who changes what is remembered of a file beside its content. QEMU has no
/// such lock.
const NOTES_BYTE: i64 = 300;

/// Locks `fd` for someone who holds `held` and lets others hold `shared`.
///
/// # Errors
/// Kind [`Busy`](ErrorKind::Busy) if another process (QEMU or vublk) holds a right that is not
/// shared here, or does not share one that is held here; the message names the right. On error
/// the locks taken so far are released.
pub fn lock(fd: BorrowedFd<'_>, held: Rights, shared: Rights) -> Result<()> {
    let result = take(fd, held, shared);
    if result.is_err() {
        unlock(fd);
    }
    result
}

/// Goes over from the locks of (`held`, `shared`) in `from` to those in `to`, without ever being
/// without a lock that both have.
///
/// # Errors
/// As for [`lock`]; then the locks are those of `from`.
pub fn relock(fd: BorrowedFd<'_>, from: (Rights, Rights), to: (Rights, Rights)) -> Result<()> {
    let result = take(fd, to.0, to.1);
    let keep = if result.is_ok() { to } else { from };
    for (i, (right, _)) in Rights::EACH.iter().enumerate() {
        let unset = |byte| fcntl_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte, 1);
        if !keep.0.contains(*right) {
            let _ = unset(HELD_BASE + i as i64);
        }
        if keep.1.contains(*right) {
            let _ = unset(UNSHARED_BASE + i as i64);
        }
    }
    result
}

/// Releases all image locks of this open file description.
pub fn unlock(fd: BorrowedFd<'_>) {
    for base in [HELD_BASE, UNSHARED_BASE] {
        // Unlocking what is not locked is not an error, and a failure leaves a lock that the
        // close of the file drops.
        let _ = fcntl_lock(fd, libc::F_OFD_SETLK, libc::F_UNLCK, base, Rights::EACH.len() as i64);
    }
}

/// Takes the locks that another open file of ours has, which is about to be unlocked: without a look
/// for others, since that would find ours, and while it has them nobody else can be in the way.
///
/// # Errors
/// As for [`lock`].
pub fn lock_beside(fd: BorrowedFd<'_>, held: Rights, shared: Rights) -> Result<()> {
    set_all(fd, held, shared).inspect_err(|_| unlock(fd))
}

fn set_all(fd: BorrowedFd<'_>, held: Rights, shared: Rights) -> Result<()> {
    for (i, (right, _)) in Rights::EACH.iter().enumerate() {
        if held.contains(*right) {
            set(fd, HELD_BASE + i as i64)?;
        }
        if !shared.contains(*right) {
            set(fd, UNSHARED_BASE + i as i64)?;
        }
    }
    Ok(())
}

fn take(fd: BorrowedFd<'_>, held: Rights, shared: Rights) -> Result<()> {
    set_all(fd, held, shared)?;
    for (i, (right, name)) in Rights::EACH.iter().enumerate() {
        if held.contains(*right) && is_locked(fd, UNSHARED_BASE + i as i64)? {
            return Err(busy(format!("another process does not share the right '{name}'")));
        }
        if !shared.contains(*right) && is_locked(fd, HELD_BASE + i as i64)? {
            return Err(busy(format!("another process holds the right '{name}'")));
        }
    }
    Ok(())
}

fn busy(why: String) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("{why} (is a virtual machine or another tool using this image?)"),
    )
}

/// Takes the lock of who changes what is remembered of a file, if nobody has it; it goes with the open file
/// description, which must be one for writing. Returns whether it was free.
///
/// # Errors
/// If the host has no such lock.
pub fn lock_notes(fd: BorrowedFd<'_>) -> Result<bool> {
    match fcntl_lock(fd, libc::F_OFD_SETLK, libc::F_WRLCK, NOTES_BYTE, 1) {
        Ok(_) => Ok(true),
        Err(err) if matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

/// Takes a read lock on one byte. Read locks never conflict with each other.
fn set(fd: BorrowedFd<'_>, byte: i64) -> Result<()> {
    match fcntl_lock(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte, 1) {
        Ok(_) => Ok(()),
        Err(err) if matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(busy("another process has locked the image exclusively".into()))
        }
        Err(err) => Err(Error::from(err).context("cannot lock the image")),
    }
}

/// Whether someone else's lock would conflict with a write lock on this byte.
fn is_locked(fd: BorrowedFd<'_>, byte: i64) -> Result<bool> {
    let answer = fcntl_lock(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)
        .map_err(|err| Error::from(err).context("cannot query image locks"))?;
    Ok(answer != libc::F_UNLCK)
}

/// One fcntl(2) lock call; returns the lock type the kernel left in the argument.
fn fcntl_lock(
    fd: BorrowedFd<'_>,
    cmd: libc::c_int,
    kind: libc::c_int,
    start: i64,
    len: i64,
) -> std::io::Result<libc::c_int> {
    let mut flock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: `flock` is a valid, exclusively borrowed structure for the duration of the call.
    if unsafe { libc::fcntl(fd.as_raw_fd(), cmd, &mut flock) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(libc::c_int::from(flock.l_type))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    const WRITER: Rights = Rights::CONSISTENT_READ.and(Rights::WRITE).and(Rights::RESIZE);

    fn open_twice() -> (std::fs::File, std::fs::File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let again = std::fs::OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
        (file.into_file(), again)
    }

    #[test]
    fn two_writers_refuse_each_other() {
        let (a, b) = open_twice();
        lock(a.as_fd(), WRITER, Rights::CONSISTENT_READ).unwrap();
        let err = lock(b.as_fd(), WRITER, Rights::CONSISTENT_READ).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        assert!(err.to_string().contains("write"), "{err}");
        // The refused one left nothing behind.
        unlock(a.as_fd());
        lock(a.as_fd(), WRITER, Rights::CONSISTENT_READ).unwrap();
    }

    #[test]
    fn readers_share_and_keep_writers_out() {
        let (a, b) = open_twice();
        let reader_shares = Rights::CONSISTENT_READ.and(Rights::WRITE_UNCHANGED);
        lock(a.as_fd(), Rights::CONSISTENT_READ, reader_shares).unwrap();
        lock(b.as_fd(), Rights::CONSISTENT_READ, reader_shares).unwrap();
        unlock(b.as_fd());
        lock(b.as_fd(), WRITER, Rights::CONSISTENT_READ).unwrap_err();
    }
}
