//! Survives a front-end that truncates memory it shares with us.
//!
//! Touching a shared mapping past the end of its file raises SIGBUS, which kills the process with
//! every other disk it serves. So each mapping of foreign memory is entered in a fixed table, and
//! a process-wide handler looks there: if the fault lies in one of ours, it maps anonymous zero
//! pages from the faulting page to the end of that mapping, sets the mapping's broken flag, and
//! returns; the access then reads zeros. The owner finds the flag and stops its own device. Any
//! other SIGBUS gets the default action, as if this module did not exist.
//!
//! Invariants:
//! * The handler calls nothing but `mmap`, `sigaction` and `raise`, and touches nothing but
//!   atomics.
//! * A slot of the table is read under a sequence number, so a slot that another thread fills or
//!   empties meanwhile is never taken for the faulting mapping (whose own slot cannot change:
//!   whoever touches the memory keeps it mapped).
//! * A slot is emptied before its memory is unmapped.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once, PoisonError};

use crate::error::{Error, ErrorKind, Result};

/// How many mappings can be registered at once: 509 slots of memory for each of a dozen guests.
const SLOTS: usize = 8192;

/// One registered mapping.
struct Slot {
    /// Even while the slot is stable, odd while it changes.
    sequence: AtomicU32,
    /// Whether a fault was mapped over.
    broken: AtomicBool,
    /// First address; 0 if the slot is free.
    start: AtomicUsize,
    /// One past the last address.
    end: AtomicUsize,
    /// Size of the pages behind the mapping, a power of two.
    page: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        sequence: AtomicU32::new(0),
        broken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
    }
}; SLOTS];

/// Slots ever used: the handler looks no further.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);
/// Faults mapped over since the process started.
static FAULTS: AtomicU64 = AtomicU64::new(0);
/// Free slots below the high-water mark. Taken by those who register, never by the handler.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
static INSTALL: Once = Once::new();

/// How many faults were mapped over since the process started. While it stays the same no
/// mapping can have become broken, so a worker compares this one number once per batch.
#[inline]
pub fn faults() -> u64 {
    FAULTS.load(Ordering::Relaxed)
}

/// A mapping's place in the handler's table, given up on drop.
#[derive(Debug)]
pub struct Registration {
    slot: usize,
}

impl Registration {
    /// Enters the mapping `start..start + len` with pages of `page` bytes, and installs the
    /// handler if it is the first.
    ///
    /// # Safety
    /// The range must be a mapping that the caller owns, starting at a multiple of `page`, and
    /// must stay mapped until the registration is dropped. The caller agrees that its content may
    /// become private zero pages.
    pub unsafe fn new(start: usize, len: usize, page: usize) -> Result<Registration> {
        assert!(page.is_power_of_two() && start.is_multiple_of(page) && start != 0);
        INSTALL.call_once(install);
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match free.pop() {
            Some(index) => index,
            None => {
                let index = HIGH_WATER.load(Ordering::Relaxed);
                if index == SLOTS {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("more than {SLOTS} shared memory areas at once"),
                    ));
                }
                HIGH_WATER.store(index + 1, Ordering::Release);
                index
            }
        };
        TABLE[index].set(start, start + len, page);
        Ok(Registration { slot: index })
    }

    /// Whether a part of the mapping had to be replaced by zero pages.
    #[inline]
    pub fn is_broken(&self) -> bool {
        TABLE[self.slot].broken.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.slot].set(0, 0, 0);
        free.push(self.slot);
    }
}

impl Slot {
    /// Fills or empties the slot. The lock on [`FREE`] keeps other writers out.
    fn set(&self, start: usize, end: usize, page: usize) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// The page of `address` and the end of the mapping, if the slot holds that address.
    fn find(&self, address: usize) -> Option<(usize, usize)> {
        let before = self.sequence.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let stable = before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before;
        (stable && start <= address && address < end).then(|| (address & !(page - 1), end))
    }
}

/// Installs the handler.
fn install() {
    // SAFETY: `sigaction` is plain data for which zero bytes are valid; the handler keeps to what
    // a signal handler may do, and runs on the thread's alternate stack where there is one.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        // Fails only for a bad signal number.
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

/// The handler: maps over a hole in one of our mappings, and hands anything else to the default
/// action.
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: errno is the interrupted code's and is put back before returning to it.
    let saved_errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid `siginfo_t` to an SA_SIGINFO handler.
    let info = unsafe { &*info };
    // Only these come from an access that can be repeated; the address of a SIGBUS sent by kill(2)
    // means nothing.
    let from_access = matches!(info.si_code, libc::BUS_ADRERR | BUS_MCEERR_AR);
    // SAFETY: `si_addr` is what the kernel fills in for these codes.
    if from_access && map_over(unsafe { info.si_addr() } as usize) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = saved_errno };
        return;
    }
    // SAFETY: both are async-signal-safe. The signal is blocked while its handler runs, so it
    // strikes, with the default action, as soon as this returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// An uncorrectable memory error that the access ran into (missing from libc on some targets).
const BUS_MCEERR_AR: i32 = 4;

/// Maps zero pages from the page of `address` to the end of the mapping that holds it; false if it
/// is none of ours. Async-signal-safe.
fn map_over(address: usize) -> bool {
    let used = HIGH_WATER.load(Ordering::Acquire);
    for slot in &TABLE[..used] {
        let Some((from, end)) = slot.find(address) else { continue };
        // The system call itself: a libc's `mmap` may take locks.
        // SAFETY: the range lies inside a mapping whose owner agreed to this (`Registration::new`)
        // and keeps it mapped, as it is touching it right now.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mmap,
                from,
                end - from,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if result == -1 {
            return false;
        }
        slot.broken.store(true, Ordering::Release);
        FAULTS.fetch_add(1, Ordering::Release);
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use crate::device::mapping::tests::{mapping_of, memfd};

    use super::*;

    #[test]
    fn a_truncated_file_breaks_its_own_mapping_only() {
        let (file, other_file) = (memfd(64 << 10), memfd(64 << 10));
        let mapping = mapping_of(&file, 0, 64 << 10);
        let other = mapping_of(&other_file, 0, 64 << 10);
        let base = mapping.as_ptr();
        // SAFETY: inside the mappings.
        unsafe {
            base.add(100).write_volatile(7);
            other.as_ptr().add(100).write_volatile(8);
        }
        let before = faults();
        file.set_len(8 << 10).unwrap();
        // SAFETY: inside the mapping; the hole raises SIGBUS, which is what this tests.
        unsafe {
            assert_eq!(base.add(40 << 10).read_volatile(), 0);
            base.add(41 << 10).write_volatile(9);
            assert_eq!(base.add(41 << 10).read_volatile(), 9);
            // What the file still has is untouched.
            assert_eq!(base.add(100).read_volatile(), 7);
        }
        assert!(mapping.is_broken());
        assert!(!other.is_broken());
        assert!(faults() > before);
        // SAFETY: inside the mapping. A second hole, before the first.
        unsafe { assert_eq!(base.add(9 << 10).read_volatile(), 0) };
        // SAFETY: inside the mapping.
        unsafe { assert_eq!(other.as_ptr().add(100).read_volatile(), 8) };
        drop(mapping);
        assert!(!mapping_of(&other_file, 0, 4096).is_broken(), "a reused slot starts whole");
    }

    #[test]
    fn every_mapping_may_break_at_once() {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    for _ in 0..50 {
                        let file = memfd(16 << 10);
                        let mapping = mapping_of(&file, 0, 16 << 10);
                        file.set_len(0).unwrap();
                        // SAFETY: inside the mapping.
                        unsafe { assert_eq!(mapping.as_ptr().add(5000).read_volatile(), 0) };
                        assert!(mapping.is_broken());
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    /// Runs as a child of the next test, and only then.
    #[test]
    fn child_with_a_foreign_sigbus() {
        let Ok(how) = std::env::var("VUBLK_TEST_SIGBUS") else { return };
        let file = memfd(4096);
        let _ours = mapping_of(&file, 0, 4096);
        if how == "raise" {
            // SAFETY: a signal to ourselves, to die of.
            unsafe { libc::raise(libc::SIGBUS) };
        } else {
            // SAFETY: a fresh mapping past the end of the file, to die of.
            unsafe {
                let ptr = libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ,
                    libc::MAP_SHARED,
                    std::os::fd::AsRawFd::as_raw_fd(&file),
                    4096,
                );
                assert_ne!(ptr, libc::MAP_FAILED);
                ptr.cast::<u8>().read_volatile();
            }
        }
        std::process::exit(0);
    }

    #[test]
    fn a_foreign_sigbus_still_kills() {
        for how in ["raise", "touch"] {
            let status = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "device::sigbus::tests::child_with_a_foreign_sigbus"])
                .env("VUBLK_TEST_SIGBUS", how)
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert_eq!(status.signal(), Some(libc::SIGBUS), "{how}");
        }
    }
}
