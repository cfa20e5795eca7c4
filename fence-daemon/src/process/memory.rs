//! What the allocator keeps of memory that is not used any more.

use super::stress;

/// From which size on the allocator gives back what is free at its end, in bytes: its own default. Said explicitly it stays so; else it grows with
/// the largest block that was ever freed, and that is the kernel's types.
#[cfg(target_env = "gnu")]
const TRIM_FROM: i32 = 128 * 1024;

/// Large enough for the allocator to look at what is free, and too small to be mapped by itself, in bytes.
const LARGE: usize = 100 * 1024;

/// Does work that takes much memory for a short time, and gives that back to the kernel afterwards. Memory that is `locked` is so again then;
/// meanwhile it is not, because the kernel takes back nothing that is locked.
///
/// It is done on a thread of its own, with which what the allocator keeps for each thread goes.
pub fn with_much_memory<T: Send>(locked: bool, work: impl FnOnce() -> T + Send) -> T {
    if locked {
        // If nothing was locked, nothing changes.
        let _ = nix::sys::mman::munlockall();
    }
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: needed because no wrapper here has the call. Sound because it takes numbers alone, and takes the allocator's own lock.
        unsafe { nix::libc::mallopt(nix::libc::M_TRIM_THRESHOLD, TRIM_FROM) };
    }
    let done = std::thread::scope(|scope| {
        let work = || {
            let done = work();
            // The allocator looks for what is free at the end of a thread's memory only when something large is freed.
            drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGE)));
            done
        };
        scope.spawn(work).join()
    });
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: needed because no wrapper here has the call. Sound because it takes no pointer and may be called by any thread at any time:
        // it gives back only what the allocator holds as free.
        unsafe { nix::libc::malloc_trim(0) };
    }
    if locked {
        // What keeps it from being locked did so at the start as well, and was told then.
        let _ = stress::lock_memory();
    }
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
