//! Gives memory back that only starting needed.
//!
//! A daemon starts once and then runs the same few functions for weeks. What starting has left
//! behind would count as its memory for ever: pages of the heap and of the stack, and most of the
//! program's text and constants, which other processes share or the page cache has anyway.

#![allow(unsafe_code)]

use std::ffi::CStr;

/// Pages are at least this large. Where they are larger the host refuses what is not aligned to
/// them, and nothing is given back.
const PAGE: usize = 4096;

/// Hands back what the heap and this thread's stack do not use now, and forgets which pages of
/// text and constants are mapped: those still needed are found in the page cache again at their
/// next use.
pub fn give_back_start_up() {
    // SAFETY: no argument is a pointer.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: the callback keeps nothing of what it is shown, and does not unwind.
    unsafe { libc::dl_iterate_phdr(Some(forget_what_files_hold), std::ptr::null_mut()) };
    give_back_stack();
}

/// Unmaps the pages of those segments of a program or library that are never written to.
unsafe extern "C" fn forget_what_files_hold(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the loader shows an object whose name and headers stay where they are meanwhile.
    let (base, name, headers) = unsafe {
        let object = &*object;
        let name = CStr::from_ptr(object.dlpi_name);
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into());
        (object.dlpi_addr as usize, name, headers)
    };
    // The kernel's own object is in no file.
    if name.to_bytes().starts_with(b"linux-") {
        return 0;
    }
    let constant = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(constant) {
        let start = base + header.p_vaddr as usize;
        let end = (start + header.p_memsz as usize).next_multiple_of(PAGE);
        let start = start & !(PAGE - 1);
        // SAFETY: nobody can write to these pages, so they hold what the file holds, and the next
        // access maps just that again.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
    0
}

/// Hands back the pages of this thread's stack that deeper calls have used before.
#[inline(never)]
fn give_back_stack() {
    /// Below this frame: far more than the system call's own.
    const KEPT: usize = 2 * PAGE;
    let Some(lowest) = lowest_of_stack() else { return };
    let here = (&raw const lowest) as usize;
    let end = (here - KEPT) & !(PAGE - 1);
    // The main thread's stack may grow to megabytes and is mapped as far as it was used.
    let start = lowest.max(end.saturating_sub(1 << 20)).next_multiple_of(PAGE);
    if start < end {
        // SAFETY: this thread's stack, below all that any frame uses now. What is not mapped there
        // is passed over.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

/// The lowest address of this thread's stack.
fn lowest_of_stack() -> Option<usize> {
    let mut attributes = std::mem::MaybeUninit::uninit();
    let (mut lowest, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the attributes are used only if the first call has filled them, and freed once.
    let found = unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return None;
        }
        let found = libc::pthread_attr_getstack(attributes.as_ptr(), &mut lowest, &mut size);
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        found
    };
    (found == 0 && !lowest.is_null()).then_some(lowest as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_program_goes_on() {
        let kept = vec![7u8; 1 << 20];
        let local = std::hint::black_box([8u8; 4096]);
        give_back_start_up();
        assert!(kept.iter().all(|byte| *byte == 7));
        assert!(local.iter().all(|byte| *byte == 8));
    }

    /// Uses a lot of stack, and says where.
    #[inline(never)]
    fn deep() -> u64 {
        let used = std::hint::black_box([9u8; 256 << 10]);
        std::hint::black_box(&used).as_ptr() as u64 + (128 << 10)
    }

    #[test]
    fn what_deeper_calls_have_used_is_given_back() {
        // Looking does not touch.
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        let byte_at = |address| {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, address).unwrap();
            byte[0]
        };
        let address = deep();
        assert_eq!(byte_at(address), 9);
        give_back_stack();
        assert_eq!(byte_at(address), 0);
    }
}
