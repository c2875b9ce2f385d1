//! Gives memory back that only starting needed.
//!
//! A daemon starts once and then runs the same few functions for weeks. What starting has left
//! behind, most of the program's text among it, would count as its resident memory for ever.

#![allow(unsafe_code)]

/// Hands free heap pages back, and forgets which pages of program text are mapped: those still
/// needed are found in the page cache again at their next use. Does nothing where the host does not
/// say what is mapped.
pub fn give_back_start_up() {
    // SAFETY: no argument is a pointer.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
    for (start, end) in std::fs::read_to_string("/proc/self/maps")
        .unwrap_or_default()
        .lines()
        .filter_map(program_text)
    {
        // SAFETY: executable pages of a file that cannot be written through this mapping, so they
        // hold what the file holds, and the next access maps just that again.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
        }
    }
}

/// The address range of a line of `/proc/self/maps`, if it is the text of a program or library.
fn program_text(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    if fields.next()? != "r-xp" || !fields.nth(3)?.starts_with('/') {
        return None;
    }
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_text_of_files_is_given_back() {
        let text =
            "55d0c000-55d10000 r-xp 00001000 fe:00 1234                       /usr/bin/vublk";
        assert_eq!(program_text(text), Some((0x55d0_c000, 0x55d1_0000)));
        for line in [
            "55d0c000-55d10000 r--p 00001000 fe:00 1234                       /usr/bin/vublk",
            "55d0c000-55d10000 rw-p 00001000 fe:00 1234                       /usr/bin/vublk",
            "7ffd2000-7ffd4000 r-xp 00000000 00:00 0                          [vdso]",
            "7ffd2000-7ffd4000 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(program_text(line), None, "{line}");
        }
    }

    #[test]
    fn the_program_goes_on() {
        let kept = vec![7u8; 1 << 20];
        give_back_start_up();
        assert!(kept.iter().all(|byte| *byte == 7));
    }
}
