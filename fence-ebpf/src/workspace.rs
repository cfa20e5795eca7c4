//! The CPU's working memory, for one run of the program at a time.

use core::arch::asm;
use core::sync::atomic::{Ordering, compiler_fence};

use fence_common::boundary::Workspace;
use fence_common::digest::Scratch;

/// The working memory while this run has it. Released on drop, however the run ends.
pub(crate) struct Guard {
    in_use: *mut u64,
    scratch: *mut Scratch,
}

impl Guard {
    /// Takes the working memory, unless a run that this one interrupted has it.
    ///
    /// # Safety
    /// `workspace` must be valid and aligned as long as the guard lives, and be used through guards
    /// only.
    #[inline(always)]
    pub(crate) unsafe fn take(workspace: *mut Workspace) -> Option<Self> {
        // SAFETY: the caller vouches for the pointer, so the field lies inside. Nothing is read.
        let in_use = unsafe { &raw mut (*workspace).in_use };
        // SAFETY: as above.
        let scratch = unsafe { &raw mut (*workspace).scratch };
        // SAFETY: the word is valid and aligned, as the whole is, and is changed in this way only.
        let before = unsafe { exchange(in_use, 1) };
        // Only the run that took it may have a guard, since dropping the guard releases it.
        if before == 0 { Some(Self { in_use, scratch }) } else { None }
    }

    /// The memory that this run has taken.
    #[inline(always)]
    pub(crate) fn scratch(&mut self) -> &mut Scratch {
        // SAFETY: needed, as maps give pointers only. The pointer is valid (see `take`). Any other
        // run finds the word taken and turns back, so this is the only reference.
        unsafe { &mut *self.scratch }
    }
}

impl Drop for Guard {
    #[inline(always)]
    fn drop(&mut self) {
        // No access may move behind the release. Only this CPU looks, so the compiler's order is
        // enough.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the pointer is valid (see `take`). The write is volatile so that the compiler
        // does not merge it with the next exchange. An aligned word is written at once.
        unsafe { self.in_use.write_volatile(0) };
    }
}

/// Writes `new` into the word and returns the old value, in one step that nothing can interrupt:
/// BPF's `XCHG` (Linux 5.12). `AtomicU64::swap` does not exist here: the compiler takes BPF for a
/// target without such instructions.
///
/// # Safety
/// `word` must be valid, aligned, and shared through this function only.
#[inline(always)]
unsafe fn exchange(word: *mut u64, new: u64) -> u64 {
    let mut value = new;
    // SAFETY: needed, as there is no safe way to this instruction. It reads and writes the eight
    // bytes at `word`, for which the caller vouches, and the one declared register. Memory counts
    // as clobbered, so no access moves across.
    unsafe { asm!("{value} = xchg_64({word} + 0, {value})", word = in(reg) word, value = inout(reg) value) };
    value
}
