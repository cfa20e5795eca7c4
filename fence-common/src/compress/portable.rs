//! The same functions as `compress/bpf.rs`, for targets where the compiler does them well.

use super::{Schedule256, State32};

/// `x` rotated right by `A`, by `A + B`, and shifted right by `C`, all xored.
#[inline(always)]
pub(super) const fn rotated2<const A: u32, const B: u32, const C: u32>(x: u32) -> u32 {
    x.rotate_right(A) ^ x.rotate_right(A + B) ^ x >> C
}

/// Works a schedule into a state of SHA-256.
#[inline(always)]
pub fn rounds256(state: &mut State32, schedule: &Schedule256) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for word in schedule {
        let first = h
            .wrapping_add(*word)
            .wrapping_add(g ^ (e & (f ^ g)))
            .wrapping_add(e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25));
        let second = (a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22))
            .wrapping_add((a & b).wrapping_add(c & (a ^ b)));
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}
