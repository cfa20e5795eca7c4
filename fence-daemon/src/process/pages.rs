//! Which memory stays: the daemon's own code, and not what only the start needed.
//!
//! A fence must not wait for the disk that the daemon's own code is on, so all of it is brought in.
//! Nearly all of it is there in any case: the kernel maps 64 KiB around each page that is used. In
//! one run 0.4 MB were missing.
//!
//! What libvirt's libraries touched in their initialisation stays as well (`cargo xtask bench` has
//! the price). To let go of it by advice would only hide it: it comes back when it is used, from
//! the disk.

use std::path::Path;
use std::ptr;

use nix::libc::{MADV_POPULATE_READ, madvise, malloc_trim};

/// A mapping of code.
struct Code<'m> {
    start: usize,
    len: usize,
    path: &'m Path,
}

/// Gives back what the start has freed: the loader of the kernel program leaves 2.6 MB behind.
///
/// Then it brings in the daemon's own code. That is advice: a kernel that does not know it ignores
/// it.
pub fn settle() {
    // SAFETY: needed because no safe wrapper has the call. Sound because the kernel gets only pages
    // back that the allocator has not handed out.
    unsafe { malloc_trim(0) };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let own = std::env::current_exe().unwrap_or_default();
    for code in maps.lines().filter_map(code).filter(|code| code.path == own) {
        // SAFETY: needed because advice on memory is given by address. Sound because this advice
        // changes no page: it has the kernel read those of a file's code as a use of them would.
        unsafe { madvise(ptr::without_provenance_mut(code.start), code.len, MADV_POPULATE_READ) };
    }
}

/// A line of `/proc/self/maps`, if it is a file's code: `START-END r-xp OFFSET DEVICE INODE PATH`.
fn code(line: &str) -> Option<Code<'_>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let path = Path::new(words.nth(3)?);
    let number = |digits| usize::from_str_radix(digits, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    (rights == "r-xp" && path.is_absolute()).then_some(Code { start, len: end.checked_sub(start)?, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of a file's code, and what of it is resident, in KiB.
    fn resident(name: &str) -> (u64, u64) {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut here = false;
        let (mut all, mut there) = (0, 0);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next().unwrap() {
                "Size:" if here => all += words.next().unwrap().parse::<u64>().unwrap(),
                "Rss:" if here => there += words.next().unwrap().parse::<u64>().unwrap(),
                range if range.contains('-') => here = code(line).is_some() && line.contains(name),
                _ => {}
            }
        }
        (all, there)
    }

    #[test]
    fn the_programs_own_code_is_there_and_no_library_was_let_go_of() {
        let library = "/libgnutls.so";
        let own = std::env::current_exe().unwrap();
        // Loaded with libvirt's library, and initialised: some of it was used.
        let (_, before) = resident(library);
        settle();
        let (_, after) = resident(library);
        // The kernel itself may have taken some back.
        assert!(before > 0 && after > before / 2, "{before} {after}");
        let (all, there) = resident(own.to_str().unwrap());
        assert!(all > 0 && there == all, "{there} of {all}");
    }

    #[test]
    fn only_code_of_files_is_taken_for_it() {
        let line = "7f00-8f00 r-xp 00001000 fe:00 12 /usr/lib/libtls.so";
        let found = code(line).unwrap();
        assert_eq!((found.start, found.len, found.path), (0x7f00, 0x1000, Path::new("/usr/lib/libtls.so")));
        for other in [
            line.replace("r-xp", "rwxp"),
            line.replace("r-xp", "r--p"),
            line.replace("r-xp", "rw-p"),
            line.replace("/usr/lib/libtls.so", "[vdso]"),
            line.replace(" /usr/lib/libtls.so", ""),
            String::new(),
        ] {
            assert!(code(&other).is_none(), "{other}");
        }
    }
}
