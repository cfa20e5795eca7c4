//! Words from unaligned bytes, as in a packet.

/// The four bytes as a word in host byte order.
#[cfg(not(target_arch = "bpf"))]
#[inline(always)]
pub(crate) const fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_ne_bytes(*bytes)
}

/// The four bytes as a word in host byte order, read in one load.
///
/// The compiler would load them bytewise. An option forbids that, but then not on the stack
/// either, where the verifier demands alignment. In a packet the verifier demands it only where the
/// machine does, and there an IP packet's words are aligned.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn word(bytes: &[u8; 4]) -> u32 {
    let word: u64;
    // SAFETY: needed, as the language has no such load. It reads the four bytes behind the
    // reference, and nothing else.
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
