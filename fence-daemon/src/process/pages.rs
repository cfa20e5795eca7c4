//! Which pages of code stay in memory: those that a request needs, not those that only the start needed.
//!
//! libvirt's library brings two dozen others along (TLS, Kerberos, SSH, XML, ...), whose initialisation alone touches megabytes. With memory
//! locked ([`super::stress`]) they would stay for good.

use std::ffi::{CStr, c_int, c_void};
use std::{ptr, slice};

use nix::libc::{self, MADV_DONTNEED_LOCKED, MADV_POPULATE_READ, dl_phdr_info};

/// Of these, what was used once is likely to be used by a request: calls of libvirt, and memory, files and threads.
const KEPT: [&str; 3] = ["libvirt", "libc.", "ld-"];

/// What an entry of a dynamic section means (ELF's `Elf64_Dyn`): a tag and a value.
#[repr(C)]
struct Dynamic {
    tag: usize,
    value: usize,
}

const DT_NULL: usize = 0;
const DT_TEXTREL: usize = 22;
const DT_FLAGS: usize = 30;
const DF_TEXTREL: usize = 4;

/// Lets go of the code that only the start has used, and gets all of the daemon's own into memory before the first request wants it. Both are
/// advice: a kernel that knows one of them not (before 5.18, 5.14) leaves everything as it was.
pub fn settle() {
    let mut first = true;
    // SAFETY: needed because no wrapper here has the call. Sound because `look` has the type that is asked for, keeps nothing of what it is
    // shown, and `first` outlives the call, which is the only one that uses it.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut first).cast()) };
}

/// Is shown one loaded object after the other, the program itself first, while the loader keeps all of them where they are.
extern "C" fn look(info: *mut dl_phdr_info, _size: usize, first: *mut c_void) -> c_int {
    // SAFETY: needed because the loader hands over a pointer. Sound because what it leads to stays as it is until this returns.
    let info = unsafe { &*info };
    // SAFETY: needed because it came through C. Sound because it is what `settle` gave, which nobody else uses meanwhile.
    let first = unsafe { &mut *first.cast::<bool>() };
    let advice = if std::mem::take(first) { MADV_POPULATE_READ } else { MADV_DONTNEED_LOCKED };
    if info.dlpi_name.is_null() || info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: needed because the loader's names are C's. Sound because they end with a zero and stay until this returns.
    let path = unsafe { CStr::from_ptr(info.dlpi_name) }.to_string_lossy();
    let name = path.rsplit('/').next().unwrap_or_default();
    if advice == MADV_DONTNEED_LOCKED && KEPT.iter().any(|kept| name.starts_with(kept)) {
        return 0;
    }
    // SAFETY: needed because the loader hands over a pointer and a number. Sound because it has that many headers there.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    // What was changed in memory is not in the file, and would be lost.
    if headers.iter().any(|header| header.p_type == libc::PT_DYNAMIC && has_changed_text(info, header)) {
        return 0;
    }
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0) {
        let (Ok(at), Ok(length)) = (usize::try_from(header.p_vaddr), usize::try_from(header.p_memsz)) else { continue };
        let Ok(base) = usize::try_from(info.dlpi_addr) else { continue };
        let page = page_size();
        let begin = base.wrapping_add(at) & !(page - 1);
        let end = base.wrapping_add(at).wrapping_add(length).next_multiple_of(page);
        // SAFETY: needed because no wrapper here knows this advice. Sound because the range is what the loader has mapped of the file without
        // the right to write, and never changed: what is let go is read from the file again, and what is got changes nothing.
        unsafe { libc::madvise(ptr::with_exposed_provenance_mut(begin), end - begin, advice) };
    }
    0
}

/// Whether the loader has written into the code of an object: the mark of what was not compiled to be loaded anywhere.
fn has_changed_text(info: &dl_phdr_info, dynamic: &libc::Elf64_Phdr) -> bool {
    let Ok(size) = usize::try_from(dynamic.p_memsz) else { return true };
    let Some(at) = info.dlpi_addr.checked_add(dynamic.p_vaddr).and_then(|at| usize::try_from(at).ok()) else {
        return true;
    };
    // SAFETY: needed because the section is only known by its address. Sound because it is mapped for as long as the object is, is not
    // written any more once the object is loaded, and has entries of this form, as the header says.
    let entries =
        unsafe { slice::from_raw_parts(ptr::with_exposed_provenance::<Dynamic>(at), size / size_of::<Dynamic>()) };
    let mut entries = entries.iter().take_while(|entry| entry.tag != DT_NULL);
    entries.any(|entry| entry.tag == DT_TEXTREL || (entry.tag == DT_FLAGS && entry.value & DF_TEXTREL != 0))
}

fn page_size() -> usize {
    rustix::param::page_size()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The resident and all of this program's own code, and what is resident of a library's, in KiB.
    fn resident(name: &str) -> (u64, u64) {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut counts = (0, 0);
        let mut here = false;
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let number = |words: &mut std::str::SplitWhitespace<'_>| words.next().unwrap().parse::<u64>().unwrap();
            match words.next().unwrap() {
                "Size:" if here => counts.0 += number(&mut words),
                "Rss:" if here => counts.1 += number(&mut words),
                range if range.contains('-') => {
                    here = line.contains(name) && words.next().is_some_and(|rights| rights.starts_with("r-x"));
                }
                _ => {}
            }
        }
        counts
    }

    #[test]
    fn the_programs_own_code_is_there_and_what_only_the_start_used_is_not() {
        let library = "/libgnutls.so";
        let own = std::env::current_exe().unwrap();
        let own = own.to_str().unwrap();
        // Loaded with libvirt's library, and initialised: some of it was used.
        let (_, before) = resident(library);
        settle();
        let (_, after) = resident(library);
        assert!(before > 0 && after < before, "{before} {after}");
        let (all, there) = resident(own);
        assert!(all > 0 && there == all, "{there} of {all}");
        // What was let go comes back when it is called.
        assert!(virt::connect::Connect::get_version().is_ok());
    }
}
