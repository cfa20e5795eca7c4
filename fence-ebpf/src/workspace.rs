//! The CPU's working memory, for one run of the program at a time.

use core::arch::asm;
use core::sync::atomic::{Ordering, compiler_fence};

use fence_common::boundary::Workspace;
use fence_common::digest::Scratch;

/// The working memory while it is ours. Given back when dropped, whichever way the run ends.
pub(crate) struct Guard {
    in_use: *mut u64,
    scratch: *mut Scratch,
}

impl Guard {
    /// Takes the working memory, unless a run that this one interrupted has it.
    ///
    /// # Safety
    /// `workspace` must be valid and aligned for as long as the guard lives, and be used through claims only.
    #[inline(always)]
    pub(crate) unsafe fn take(workspace: *mut Workspace) -> Option<Self> {
        // SAFETY: the caller vouches for the pointer, so its fields lie where it points. Nothing is read.
        let in_use = unsafe { &raw mut (*workspace).in_use };
        // SAFETY: as before.
        let scratch = unsafe { &raw mut (*workspace).scratch };
        // SAFETY: the word is valid and aligned, as the whole is, and used in this way only.
        let before = unsafe { exchange(in_use, 1) };
        // Only who took it may have a value whose drop gives it back.
        if before == 0 { Some(Self { in_use, scratch }) } else { None }
    }

    /// What is ours now.
    #[inline(always)]
    pub(crate) fn scratch(&mut self) -> &mut Scratch {
        // SAFETY: needed as maps give pointers only. The pointer is valid (see `take`), and whoever else comes to this memory finds
        // the word taken and turns back, so this is the only reference.
        unsafe { &mut *self.scratch }
    }
}

impl Drop for Guard {
    #[inline(always)]
    fn drop(&mut self) {
        // Nothing that was done here may be moved behind this; only this CPU looks, so the compiler's order is all that counts.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: the pointer is valid (see `take`). Volatile, as the compiler must not merge it with the next exchange; an aligned
        // word is written in one.
        unsafe { self.in_use.write_volatile(0) };
    }
}

/// Puts `new` into the word and says what was there, in one step that nothing can come between: BPF's `XCHG`, which kernels know since
/// 5.12. (`AtomicU64::swap` does not exist here: the compiler takes BPF for a target without such instructions.)
///
/// # Safety
/// `word` must be valid, aligned, and shared through this function only.
#[inline(always)]
unsafe fn exchange(word: *mut u64, new: u64) -> u64 {
    let mut value = new;
    // SAFETY: there is no safe way to this instruction. It reads and writes the eight bytes at `word`, for which the caller vouches,
    // and the one register that is declared; memory counts as clobbered, so no access is moved across.
    unsafe { asm!("{value} = xchg_64({word} + 0, {value})", word = in(reg) word, value = inout(reg) value) };
    value
}
