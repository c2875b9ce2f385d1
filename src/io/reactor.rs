//! The reactor of a thread. (Blocking stand-in until the engine lands.)

#![allow(unsafe_code)]

use std::future::Future;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::{Buffers, HostFile};
use crate::error::{Error, ErrorKind, Result};
use crate::units::ByteRange;

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dir {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// Runs a future to its end on this thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(out) = future.as_mut().poll(&mut cx) {
            return out;
        }
    }
}

pub(super) async fn rw(
    file: &HostFile,
    dir: Dir,
    mut offset: u64,
    buf: Buffers,
    fua: bool,
) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = buf.slice(done, buf.len() - done);
        let iovs = rest.iovecs();
        let n = iovs.len().min(1024) as i32;
        let fd = file.as_raw_fd();
        let flags = if fua { libc::RWF_DSYNC } else { 0 };
        // SAFETY: `rest` keeps its memory alive during the call.
        let rc = unsafe {
            match dir {
                Dir::Read => libc::preadv2(fd, iovs.as_ptr(), n, offset as i64, 0),
                Dir::Write => libc::pwritev2(fd, iovs.as_ptr(), n, offset as i64, flags),
            }
        };
        match rc {
            0 => return Err(Error::new(ErrorKind::OutOfRange, "file is shorter than expected")),
            n if n > 0 => {
                done += n as u64;
                offset += n as u64;
            }
            _ => {
                let err = std::io::Error::last_os_error();
                if err.raw_os_error() != Some(libc::EINTR) {
                    return Err(err.into());
                }
            }
        }
    }
    Ok(())
}

pub(super) async fn fallocate(file: &HostFile, mode: i32, range: ByteRange) -> Result<()> {
    // SAFETY: no memory is passed.
    let rc =
        unsafe { libc::fallocate(file.as_raw_fd(), mode, range.offset as i64, range.len as i64) };
    if rc == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

pub(super) async fn fdatasync(file: &HostFile) -> Result<()> {
    Ok(rustix::fs::fdatasync(file)?)
}
