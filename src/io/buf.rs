//! Scattered memory that stays alive until the kernel is done with it.
//!
//! [`Buffers`] is a list of `iovec`s plus an owner that keeps what they point to alive: a guest's
//! memory map, or an [`AlignedBuf`] of our own. Cloning and slicing are cheap and share the owner,
//! so an I/O slot can hold its own copy after the future that started it is gone.

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Whatever keeps the memory behind some [`Buffers`] mapped. The promise: the memory that
/// `Buffers` made with this owner point to stays readable and writable while the owner lives.
pub trait BufferOwner: Any + Send + Sync {}

/// A list of memory ranges for one read or write, with the owner that keeps them alive.
///
/// The memory may be shared with a guest that changes it at any time: it is only ever reached
/// through raw pointers, never through references.
#[derive(Clone)]
pub struct Buffers {
    iovs: Vec<libc::iovec>,
    len: u64,
    /// Keeps the memory alive; never looked at.
    owner: Arc<dyn BufferOwner>,
}

// SAFETY: the pointers are to memory that `owner` (Send + Sync) keeps alive; no reference to that
// memory is ever formed, and concurrent access to it is the business of those who share it (as it
// is with any memory shared with a guest).
unsafe impl Send for Buffers {}
// SAFETY: as above; `&Buffers` gives no more than copies of the pointers.
unsafe impl Sync for Buffers {}

impl Buffers {
    /// Makes buffers of raw parts.
    ///
    /// # Safety
    /// Every `iovec` must describe memory that is readable and writable for as long as `owner`
    /// lives.
    pub unsafe fn from_raw(iovs: Vec<libc::iovec>, owner: Arc<dyn BufferOwner>) -> Self {
        let len = iovs.iter().map(|iov| iov.iov_len as u64).sum();
        Buffers { iovs, len, owner }
    }

    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory ranges, for a system call.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovs
    }

    /// The part of `len` bytes from `offset`, sharing the owner.
    ///
    /// # Panics
    /// If the part does not lie inside.
    pub fn slice(&self, offset: u64, len: u64) -> Buffers {
        let end = offset.checked_add(len).expect("slice end overflows");
        assert!(end <= self.len, "slice {offset}+{len} of {} bytes", self.len);
        let mut iovs = Vec::new();
        slice_iovecs(&self.iovs, offset, len, &mut iovs);
        Buffers { iovs, len, owner: Arc::clone(&self.owner) }
    }

    /// These parts one after the other, sharing the owner.
    ///
    /// # Panics
    /// If a part does not lie inside.
    pub fn parts(&self, parts: impl IntoIterator<Item = Range<u64>>) -> Buffers {
        let (mut iovs, mut len) = (Vec::new(), 0);
        for part in parts {
            assert!(part.end <= self.len, "part up to {} of {} bytes", part.end, self.len);
            slice_iovecs(&self.iovs, part.start, part.end - part.start, &mut iovs);
            len += part.end - part.start;
        }
        Buffers { iovs, len, owner: Arc::clone(&self.owner) }
    }

    /// All of these one after the other, keeping what each keeps.
    pub fn join(all: impl IntoIterator<Item = Buffers>) -> Buffers {
        struct Owners {
            _all: Vec<Arc<dyn BufferOwner>>,
        }
        impl BufferOwner for Owners {}
        let (mut iovs, mut owners, mut len) = (Vec::new(), Vec::new(), 0);
        for buf in all {
            iovs.extend_from_slice(&buf.iovs);
            owners.push(buf.owner);
            len += buf.len;
        }
        Buffers { iovs, len, owner: Arc::new(Owners { _all: owners }) }
    }

    /// Fills everything with zeros.
    pub fn fill_zero(&self) {
        for iov in &self.iovs {
            // SAFETY: the owner keeps the range writable; see `from_raw`.
            unsafe { std::ptr::write_bytes(iov.iov_base.cast::<u8>(), 0, iov.iov_len) };
        }
    }

    /// Copies `data` to the start of the buffers.
    ///
    /// # Panics
    /// If `data` is longer than the buffers.
    pub fn copy_from_slice(&self, data: &[u8]) {
        assert!(data.len() as u64 <= self.len);
        let mut rest = data;
        for iov in &self.iovs {
            let n = rest.len().min(iov.iov_len);
            // SAFETY: the owner keeps the range writable, and guest memory never overlaps a slice.
            unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), iov.iov_base.cast::<u8>(), n) };
            rest = &rest[n..];
        }
    }

    /// Copies the first `out.len()` bytes out.
    ///
    /// # Panics
    /// If `out` is longer than the buffers.
    pub fn copy_to_slice(&self, out: &mut [u8]) {
        // SAFETY: the owner keeps the ranges readable; see `from_raw`.
        unsafe { Scattered::new(&self.iovs) }.copy_to_slice(out);
    }

    /// Whether each range starts at a multiple of `address` and is a multiple of `length` long
    /// (powers of two), as O_DIRECT demands of memory.
    pub fn is_aligned(&self, address: usize, length: usize) -> bool {
        iovecs_aligned(&self.iovs, address, length)
    }

    /// Copies all bytes to other buffers of the same length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_to(&self, to: &Buffers) {
        assert_eq!(self.len, to.len);
        let mut into = to.iovs.iter();
        let mut room = 0;
        let mut at = std::ptr::null_mut::<u8>();
        for from in &self.iovs {
            let mut done = 0;
            while done < from.iov_len {
                if room == 0 {
                    let Some(next) = into.next() else { return };
                    (at, room) = (next.iov_base.cast(), next.iov_len);
                    continue;
                }
                let n = room.min(from.iov_len - done);
                // SAFETY: both owners keep their ranges alive, and `n` stays inside of both. A
                // guest may have made them overlap, and may change what is copied meanwhile.
                unsafe { std::ptr::copy(from.iov_base.cast::<u8>().add(done), at, n) };
                at = at.wrapping_add(n);
                done += n;
                room -= n;
            }
        }
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} bytes in {} parts)", self.len, self.iovs.len())
    }
}

/// Scattered memory for as long as a call takes: [`Buffers`] of somebody who keeps it alive himself.
#[derive(Clone, Copy)]
pub struct Scattered<'a> {
    iovs: &'a [libc::iovec],
}

impl<'a> Scattered<'a> {
    /// The memory that `iovs` describe.
    ///
    /// # Safety
    /// Each `iovec` must describe memory that is readable for as long as the result is used.
    #[inline]
    pub unsafe fn new(iovs: &'a [libc::iovec]) -> Scattered<'a> {
        Scattered { iovs }
    }

    /// Total length in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.iovs.iter().map(|iov| iov.iov_len as u64).sum()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the first `out.len()` bytes out.
    ///
    /// # Panics
    /// If `out` is longer than the memory.
    #[inline]
    pub fn copy_to_slice(&self, out: &mut [u8]) {
        let mut done = 0;
        for iov in self.iovs {
            let n = (out.len() - done).min(iov.iov_len);
            // SAFETY: readable, as `new` demands, and guest memory never overlaps a slice.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    iov.iov_base.cast::<u8>(),
                    out[done..].as_mut_ptr(),
                    n,
                )
            };
            done += n;
        }
        assert_eq!(done, out.len(), "more was wanted than there is");
    }
}

impl fmt::Debug for Scattered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scattered({} bytes in {} parts)", self.len(), self.iovs.len())
    }
}

/// Several owners as one.
impl BufferOwner for Vec<Arc<dyn BufferOwner>> {}

/// Puts together buffers from pieces of memory of our own, for one write.
#[derive(Default)]
pub struct Gather {
    iovs: Vec<libc::iovec>,
    owners: Vec<Arc<dyn BufferOwner>>,
}

impl Gather {
    /// Adds `len` bytes from `offset` of `memory`.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn push(&mut self, memory: &AlignedBuf, offset: usize, len: usize) {
        let end = offset.checked_add(len).expect("end overflows");
        assert!(end <= memory.len(), "{offset}+{len} of {} bytes", memory.len());
        let start = memory.inner.ptr.as_ptr().wrapping_add(offset);
        self.iovs.push(libc::iovec { iov_base: start.cast(), iov_len: len });
        self.owners.push(Arc::clone(&memory.inner) as Arc<dyn BufferOwner>);
    }

    /// All that was added, in order.
    pub fn finish(mut self) -> Buffers {
        let owner = match self.owners.len() {
            1 => self.owners.remove(0),
            _ => Arc::new(self.owners),
        };
        // SAFETY: each range lies inside of memory that one of the owners keeps alive.
        unsafe { Buffers::from_raw(self.iovs, owner) }
    }
}

/// Whether each range starts at a multiple of `address` and is a multiple of `length` long, both
/// powers of two. Disks may take memory at any address that is a multiple of four, say, but still
/// only whole blocks in each range.
#[inline]
pub fn iovecs_aligned(iovs: &[libc::iovec], address: usize, length: usize) -> bool {
    iovs.iter()
        .all(|iov| iov.iov_base as usize & (address - 1) == 0 && iov.iov_len & (length - 1) == 0)
}

/// Appends the part `offset..offset + len` of `iovs` to `out`. The part must lie inside.
pub fn slice_iovecs(
    iovs: &[libc::iovec],
    mut offset: u64,
    mut len: u64,
    out: &mut Vec<libc::iovec>,
) {
    for iov in iovs {
        if len == 0 {
            break;
        }
        let have = iov.iov_len as u64;
        if offset >= have {
            offset -= have;
            continue;
        }
        let n = (have - offset).min(len);
        out.push(libc::iovec {
            iov_base: iov.iov_base.cast::<u8>().wrapping_add(offset as usize).cast(),
            iov_len: n as usize,
        });
        offset = 0;
        len -= n;
    }
    debug_assert_eq!(len, 0, "part lies outside of the buffers");
}

/// Zeroed heap memory at an alignment that O_DIRECT accepts.
///
/// Shared as [`Buffers`] with [`AlignedBuf::buffers`]; taken back by [`AlignedBuf::as_slice`] when
/// the I/O is done.
pub struct AlignedBuf {
    inner: Arc<AlignedMem>,
}

struct AlignedMem {
    ptr: NonNull<u8>,
    layout: Layout,
    len: usize,
}

// SAFETY: plain heap memory, owned; see `Buffers` for concurrent access.
unsafe impl Send for AlignedMem {}
// SAFETY: as above.
unsafe impl Sync for AlignedMem {}

impl BufferOwner for AlignedMem {}

impl Drop for AlignedMem {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout in `AlignedBuf::zeroed`.
        unsafe { std::alloc::dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

impl AlignedBuf {
    /// `len` zero bytes at a multiple of `align`, a power of two.
    pub fn zeroed(len: usize, align: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), align.max(1)).expect("buffer layout");
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { std::alloc::handle_alloc_error(layout) };
        AlignedBuf { inner: Arc::new(AlignedMem { ptr, layout, len }) }
    }

    /// `data` copied to memory at a multiple of `align`.
    pub fn from_slice(data: &[u8], align: usize) -> Self {
        let buf = AlignedBuf::zeroed(data.len(), align);
        buf.buffers().copy_from_slice(data);
        buf
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.inner.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Whether no [`Buffers`] of this memory exist, so that [`AlignedBuf::as_slice`] may be called.
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.inner) == 1
    }

    /// The whole memory for a read or write.
    pub fn buffers(&self) -> Buffers {
        let iov = libc::iovec { iov_base: self.inner.ptr.as_ptr().cast(), iov_len: self.inner.len };
        // SAFETY: the Arc keeps the memory alive.
        unsafe { Buffers::from_raw(vec![iov], Arc::clone(&self.inner) as Arc<dyn BufferOwner>) }
    }

    /// The bytes, once no I/O shares them any more.
    ///
    /// # Panics
    /// If [`Buffers`] of this memory still exist: its bytes could change under the slice.
    pub fn as_slice(&mut self) -> &mut [u8] {
        let mem = Arc::get_mut(&mut self.inner).expect("buffer still in use by an I/O");
        // SAFETY: `len` bytes were allocated and zeroed, and `get_mut` proves nobody shares them.
        unsafe { std::slice::from_raw_parts_mut(mem.ptr.as_ptr(), mem.len) }
    }

    /// A copy of the bytes; works while others share them.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len()];
        self.buffers().copy_to_slice(&mut out);
        out
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three separate pieces of memory of these lengths, as one `Buffers`.
    fn pieces(lens: &[usize]) -> Buffers {
        let whole = AlignedBuf::zeroed(lens.iter().sum(), 4096);
        let all = whole.buffers();
        let mut iovs = Vec::new();
        let mut at = 0;
        for len in lens {
            slice_iovecs(all.iovecs(), at, *len as u64, &mut iovs);
            at += *len as u64;
        }
        // SAFETY: parts of `whole`, which is the owner.
        unsafe { Buffers::from_raw(iovs, whole.inner.clone()) }
    }

    #[test]
    fn slices_cut_through_the_parts() {
        let bufs = pieces(&[3, 5, 7]);
        bufs.copy_from_slice(b"abcdefghijklmno");
        let part = bufs.slice(2, 8);
        assert_eq!(part.iovecs().len(), 3);
        let mut out = [0; 8];
        part.copy_to_slice(&mut out);
        assert_eq!(&out, b"cdefghij");
        part.fill_zero();
        let mut out = [0; 15];
        bufs.copy_to_slice(&mut out);
        assert_eq!(&out, b"ab\0\0\0\0\0\0\0\0klmno");
        assert_eq!(bufs.slice(15, 0).iovecs().len(), 0);
    }

    #[test]
    fn parts_come_in_their_own_order() {
        let bufs = pieces(&[3, 5, 7]);
        bufs.parts([9..12, 0..4]).copy_from_slice(b"ABCDEFG");
        let mut out = [0; 15];
        bufs.copy_to_slice(&mut out);
        assert_eq!(&out, b"DEFG\0\0\0\0\0ABC\0\0\0");
    }

    #[test]
    #[should_panic(expected = "slice 10+6 of 15 bytes")]
    fn slices_stay_inside() {
        pieces(&[3, 5, 7]).slice(10, 6);
    }

    #[test]
    fn alignment_counts_length_and_address() {
        let buf = AlignedBuf::zeroed(8192, 4096);
        assert!(buf.buffers().is_aligned(4096, 4096));
        assert!(!buf.buffers().slice(512, 512).is_aligned(4096, 512));
        assert!(!buf.buffers().slice(4096, 512).is_aligned(4096, 4096));
        assert!(buf.buffers().slice(512, 512).is_aligned(512, 512));
        // Addresses that a disk takes, in ranges that are no whole blocks.
        assert!(!pieces(&[100, 412]).is_aligned(4, 512));
        assert!(pieces(&[512, 1024]).is_aligned(4, 512));
    }

    #[test]
    fn copies_between_different_parts() {
        let (from, to) = (pieces(&[3, 5, 7]), pieces(&[1, 13, 1]));
        from.copy_from_slice(b"abcdefghijklmno");
        from.copy_to(&to);
        let mut out = [0; 15];
        to.copy_to_slice(&mut out);
        assert_eq!(&out, b"abcdefghijklmno");
    }
}
