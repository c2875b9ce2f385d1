//! The host storage under a format: positional asynchronous I/O on scattered memory.

use std::fmt;
use std::future::Future;
use std::pin::Pin;

use super::Buffers;
use super::host::HostFile;
use crate::error::Result;
use crate::units::ByteRange;

/// A boxed local future. Not `Send`: it runs on the thread whose reactor it uses.
pub type Fut<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// What a file demands of requests, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of offsets and lengths.
    pub request: u64,
    /// Of memory addresses and of each memory part's length.
    pub memory: usize,
}

impl Alignment {
    /// No demands, as with the page cache.
    pub const NONE: Alignment = Alignment { request: 1, memory: 1 };
}

/// What the host knows of a run of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// Where the answer applies; starts at the offset asked about, never empty.
    pub range: ByteRange,
    /// Whether the run is a hole, that is: reads as zeros and takes no space.
    pub is_hole: bool,
}

/// Host storage. Implemented by [`HostFile`], and by a simulation that loses, tears and reorders
/// what was not flushed.
///
/// All methods may be called from any thread that has a reactor. Dropping a future does not stop
/// what was already handed to the host: the operation may still happen, and its memory stays
/// alive until it has. Requests that overlap in flight have no defined order.
// A length of zero is not worth a method.
#[allow(clippy::len_without_is_empty)]
pub trait File: Send + Sync + fmt::Debug {
    /// What to call the file in messages: its path as the operator gave it.
    fn name(&self) -> &str;

    /// Current length in bytes. Cheap for callers to ask now and then, but a system call.
    fn len(&self) -> Result<u64>;

    /// Demands on requests. Reads and writes that do not meet them go through a bounce buffer;
    /// `offset` and `len` must meet [`Alignment::request`] always.
    fn alignment(&self) -> Alignment;

    /// Reads exactly `buf.len()` bytes at `offset`. Beyond the end of the file is an error of kind
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) ("file is shorter than it was").
    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()>;

    /// Writes exactly `buf.len()` bytes at `offset`, extending a regular file if need be. With
    /// `fua` they are durable on completion.
    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()>;

    /// Makes the range read as zeros. With `may_unmap` its space may be given back to the host,
    /// without it the space stays allocated.
    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()>;

    /// Has the host set space aside for what will be written to the range, which is in the file, so that it
    /// finds room later. What is there stays. Does nothing where the host cannot do it.
    fn reserve<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        let _ = range;
        Box::pin(async { Ok(()) })
    }

    /// Gives the range's space back if that is cheap; what it reads as afterwards is zeros or old
    /// data. Does nothing where the host cannot do it.
    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()>;

    /// Makes everything that completed before this call durable.
    fn flush<'a>(&'a self) -> Fut<'a, ()>;

    /// Changes the length; new space reads as zeros.
    fn set_len<'a>(&'a self, len: u64) -> Fut<'a, ()>;

    /// Whether there is a hole at `offset`, and how far that answer goes (at most to the end of
    /// the file). `offset` must be inside the file.
    fn hole_at(&self, offset: u64) -> Result<Hole>;

    /// The host file behind this, for the planned path; `None` for simulations.
    fn as_host(&self) -> Option<&HostFile> {
        None
    }
}
