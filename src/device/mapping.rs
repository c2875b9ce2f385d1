//! A shared mapping of a file that somebody else gave us: guest memory, the in-flight region, the
//! dirty log.
//!
//! A mapping is checked against the size of its file when it is made, is left out of core dumps
//! and children, and is registered with [`sigbus`](super::sigbus) so that a file truncated later
//! breaks nothing but its own device. The memory behind it changes under us at any time: it is
//! reached through raw pointers, atomics and volatile accesses only.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::ptr::NonNull;

use super::sigbus::Registration;
use crate::error::{Error, Result, ResultExt};

/// One shared mapping; unmapped on drop.
pub struct Mapping {
    /// Start of the mapping, at a multiple of the page size.
    base: NonNull<u8>,
    /// Length of the mapping, a multiple of the page size.
    mapped_len: usize,
    /// Where in the mapping the part asked for starts.
    skip: usize,
    /// Length of the part asked for.
    len: usize,
    /// The place in the SIGBUS table; taken out before the memory is unmapped.
    registration: Option<Registration>,
}

// SAFETY: the memory is shared with other processes anyway; nothing here forms references to it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from `offset` of `file`, readable and writable. The file is not needed
    /// afterwards. `what` names the area in errors.
    ///
    /// Refused are areas of zero length, areas that reach past the end of the file, and files
    /// that are neither regular (memfd, shm, hugetlbfs) nor a character device (device memory,
    /// which checks for itself). `offset` need not be aligned.
    pub fn new(file: &File, offset: u64, len: u64, what: &str) -> Result<Mapping> {
        if len == 0 {
            return Err(Error::invalid(format!("{what}: size is zero")));
        }
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= i64::MAX as u64)
            .ok_or_else(|| Error::invalid(format!("{what}: {offset:#x}+{len:#x} overflows")))?;
        let meta = file.metadata().context(|| format!("{what}: cannot stat its file"))?;
        let kind = meta.file_type();
        if kind.is_file() {
            if end > meta.size() {
                return Err(Error::invalid(format!(
                    "{what}: ends at {end:#x} of a file of only {:#x} bytes",
                    meta.size()
                )));
            }
        } else if !kind.is_char_device() {
            return Err(Error::invalid(format!("{what}: not a file that can be memory")));
        }
        let page = page_size(file).context(|| format!("{what}: cannot stat its file system"))?;
        let skip = offset % page;
        // Cannot overflow: `end` is below 2^63.
        let mapped_len = (skip + len).next_multiple_of(page) as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                (offset - skip) as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            let err = Error::from(std::io::Error::last_os_error());
            return Err(err.context(format!("{what}: cannot map {len:#x} bytes")));
        }
        let base = NonNull::new(base.cast::<u8>()).expect("mmap returned null");
        let mut mapping = Mapping {
            base,
            mapped_len,
            skip: skip as usize,
            len: len as usize,
            registration: None,
        };
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // A kernel that knows no such advice has lost nothing but comfort.
            // SAFETY: the range was just mapped.
            unsafe { libc::madvise(base.as_ptr().cast(), mapped_len, advice) };
        }
        // SAFETY: our own mapping, aligned to its pages, unmapped after the registration is
        // dropped (`Drop` below).
        let registration =
            unsafe { Registration::new(base.as_ptr() as usize, mapped_len, page as usize) }
                .context(|| what.to_string())?;
        mapping.registration = Some(registration);
        Ok(mapping)
    }

    /// The first byte of the area. Valid for [`Mapping::len`] bytes while the mapping lives.
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: `skip` lies inside the mapping.
        unsafe { self.base.as_ptr().add(self.skip) }
    }

    /// Length of the area in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty area is refused.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether the file was truncated and a part of the area is now private zeros.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.registration.as_ref().is_some_and(Registration::is_broken)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.registration = None;
        // SAFETY: mapped with this very length in `new`; whoever uses the pointers holds us.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped_len) };
    }
}

impl std::fmt::Debug for Mapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mapping({:p}+{:#x})", self.as_ptr(), self.len)
    }
}

/// Size of the pages behind a mapping of `file`: huge ones on hugetlbfs, where offset and length
/// of a mapping must be multiples of it.
fn page_size(file: &File) -> Result<u64> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    // SAFETY: no preconditions.
    let normal = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let stat = rustix::fs::fstatfs(file)?;
    let huge = stat.f_bsize as u64;
    if stat.f_type as i64 == HUGETLBFS_MAGIC && huge.is_power_of_two() && huge > normal {
        return Ok(huge);
    }
    Ok(normal)
}

/// A memfd of `len` zero bytes, for areas that we give to the front-end (and for tests). With
/// `sealed` nobody can change its size afterwards.
pub fn memfd_create(name: &str, len: u64, sealed: bool) -> Result<File> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.set_len(len)?;
    if sealed {
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
    }
    Ok(file)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A memfd of this size.
    pub(crate) fn memfd(len: u64) -> File {
        memfd_create("vublk-test", len, false).unwrap()
    }

    /// A mapping that must succeed.
    pub(crate) fn mapping_of(file: &File, offset: u64, len: u64) -> Mapping {
        Mapping::new(file, offset, len, "test area").unwrap()
    }

    fn refusal(file: &File, offset: u64, len: u64) -> String {
        Mapping::new(file, offset, len, "area").unwrap_err().to_string()
    }

    #[test]
    fn areas_that_do_not_fit_their_file_are_refused() {
        let file = memfd(8192);
        assert_eq!(refusal(&file, 0, 0), "area: size is zero");
        assert_eq!(
            refusal(&file, 4096, 4097),
            "area: ends at 0x2001 of a file of only 0x2000 bytes"
        );
        assert_eq!(refusal(&file, u64::MAX, 2), "area: 0xffffffffffffffff+0x2 overflows");
        assert!(refusal(&file, 1 << 63, 1).contains("overflows"));
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = File::from(std::os::fd::OwnedFd::from(socket));
        assert_eq!(refusal(&socket, 0, 4096), "area: not a file that can be memory");
        let read_only = File::open("/proc/self/exe").unwrap();
        assert_eq!(
            refusal(&read_only, 0, 4096),
            "area: cannot map 0x1000 bytes: Permission denied"
        );
    }

    #[test]
    fn offsets_need_no_alignment() {
        use std::os::unix::fs::FileExt;
        let file = memfd(8192);
        file.write_all_at(b"xyz", 5000).unwrap();
        let mapping = mapping_of(&file, 5000, 3);
        // SAFETY: three bytes are mapped.
        assert_eq!(unsafe { mapping.as_ptr().cast::<[u8; 3]>().read_volatile() }, *b"xyz");
    }

    /// A core dump would hold the guest's memory, and a child keep it from being given back.
    #[test]
    fn memory_of_others_goes_into_no_core_dump_and_no_child() {
        let mapping = mapping_of(&memfd(8192), 0, 8192);
        let start = format!("{:x}-", mapping.as_ptr() as usize);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("its flags");
        for flag in ["dd", "dc"] {
            assert!(flags.split_whitespace().any(|has| has == flag), "no {flag} in {flags}");
        }
    }

    #[test]
    fn a_sealed_memfd_keeps_its_size() {
        let file = memfd_create("vublk-test", 4096, true).unwrap();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(8192).is_err());
    }
}
