//! Which code stays in memory: what a request needs, and not what only the start needed.
//!
//! A fence must not wait for the disk that the daemon's own code is on, so all of it is brought in.
//! libvirt's library brings two dozen others along (TLS, Kerberos, SSH, XML, ...). Their
//! initialisation alone touches 10 MB of code, which memory locks would keep for good.
//!
//! In one run the daemon had some 25 MB in memory without this and 18.9 with it, and `fence_virtd`
//! had 22.1 (`cargo xtask bench`). A smaller daemon would not do: all of its own 3.6 MB of code are
//! there in any case. The kernel maps 64 KiB around each page that is used.

use std::path::Path;
use std::ptr;

use nix::libc::{MADV_DONTNEED, MADV_POPULATE_READ, madvise, malloc_trim};

/// Of these libraries a request is likely to use what was used once: libvirt's calls, memory,
/// threads.
const KEPT: [&str; 3] = ["libvirt", "libc.", "ld-"];

/// A mapping of code.
struct Code<'m> {
    start: usize,
    len: usize,
    path: &'m Path,
}

/// Gives back what the start has freed: the loader of the kernel program leaves 2.6 MB behind.
///
/// Then it brings in the daemon's own code, and lets go of the libraries' that is in memory. What
/// is used again comes back by itself. Both are advice: a kernel that does not know one ignores it.
pub fn settle() {
    // SAFETY: needed because no safe wrapper has the call. Sound because the kernel gets only pages
    // back that the allocator has not handed out.
    unsafe { malloc_trim(0) };
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let own = std::env::current_exe().unwrap_or_default();
    for code in maps.lines().filter_map(code).filter(|code| !is_kept(code.path)) {
        let advice = if code.path == own { MADV_POPULATE_READ } else { MADV_DONTNEED };
        // SAFETY: needed because advice on memory is given by address. Sound because the mapping is
        // a file's code that nobody may write: its pages are the file's own, and come back from
        // there. Advice that comes too late, for a library that is gone, is an error without
        // effect.
        unsafe { madvise(ptr::without_provenance_mut(code.start), code.len, advice) };
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

fn is_kept(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    KEPT.iter().any(|kept| name.starts_with(kept))
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
    fn the_programs_own_code_is_there_and_what_only_the_start_used_is_not() {
        let library = "/libgnutls.so";
        let own = std::env::current_exe().unwrap();
        // Loaded with libvirt's library, and initialised: some of it was used.
        let (_, before) = resident(library);
        settle();
        let (_, after) = resident(library);
        assert!(before > 0 && after < before, "{before} {after}");
        let (all, there) = resident(own.to_str().unwrap());
        assert!(all > 0 && there == all, "{there} of {all}");
        // What was let go comes back when it is called.
        assert!(virt::connect::Connect::get_version().is_ok());
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
        assert!(is_kept(Path::new("/usr/lib/libvirt.so.0")) && is_kept(Path::new("/lib/libc.so.6")));
        assert!(!is_kept(Path::new("/usr/lib/libcrypto.so.3")));
    }
}
