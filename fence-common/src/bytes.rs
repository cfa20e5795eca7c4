//! Words from places that are not aligned to them: a packet's.

/// The four bytes, as this machine reads a word.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
pub(crate) const fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_ne_bytes(*bytes)
}

/// The four bytes, as this machine reads a word: in one load. The compiler goes by bytes; it can be told that it need not, but then it does not
/// on the stack either, where the verifier insists on alignment. In a packet it does so only where the machine does, and there a word of
/// an IP packet is aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn word(bytes: &[u8; 4]) -> u32 {
    let word: u64;
    // SAFETY: there is no other way to this load. It reads the four bytes that the reference is to, and nothing else.
    unsafe {
        core::arch::asm!(
            "{word} = *(u32 *)({bytes} + 0)",
            word = out(reg) word, bytes = in(reg) bytes.as_ptr(), options(pure, readonly, nostack)
        );
    };
    #[allow(clippy::cast_possible_truncation, reason = "the load leaves the upper half zero")]
    let word = word as u32;
    word
}
