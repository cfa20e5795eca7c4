//! SHA-256's inner loop in BPF instructions.
//!
//! The state fills eight of the ten registers. The compiler alone multiplies to double a word,
//! interleaves several sums, and spills half of the state for them. Here each register has one use,
//! and only the pointer to the schedule is on the stack.
//!
//! A round depends on the previous one by one word, the new `e`: two steps double it, three rotate
//! it, one adds the result. All else is added off that path, at the price of one addition done
//! twice.

use core::arch::asm;

use super::{Schedule256, State32};

/// `x` rotated right by `A`, by `A + B`, and shifted right by `C`, all xored. BPF has no rotation,
/// but a shift is one if both halves of the register hold `x`.
#[inline(always)]
pub(super) fn rotated2<const A: u32, const B: u32, const C: u32>(x: u32) -> u32 {
    let mut sum = u64::from(x);
    // SAFETY: needed, as the compiler chooses other instructions. These are arithmetic on two
    // registers, without memory.
    unsafe {
        asm!(
            "{t} = {x}", "{t} <<= 32", "{t} |= {x}", "{x} >>= {c}",
            "{t} >>= {a}", "{x} ^= {t}", "{t} >>= {b}", "{x} ^= {t}",
            x = inout(reg) sum, t = out(reg) _, a = const A, b = const B, c = const C,
            options(pure, nomem, nostack)
        );
    };
    #[allow(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
    let sum = sum as u32;
    sum
}

/// One round. Each word comes with its register's names, whole and low half. Only two words change;
/// the order of the arguments renames the others.
macro_rules! round {
    ($word:expr; ($a:ident $ra:tt $wa:tt) ($b:ident $rb:tt $wb:tt) ($c:ident $rc:tt $wc:tt)
     ($d:ident $rd:tt $wd:tt) ($e:ident $re:tt $we:tt) ($f:ident $rf:tt $wf:tt)
     ($g:ident $rg:tt $wg:tt) ($h:ident $rh:tt $wh:tt)) => {
        // SAFETY: needed, as the compiler chooses other instructions. These are arithmetic on
        // registers, without memory.
        unsafe {
            asm!(
                concat!($wh, " += w8"),
                // The choice.
                concat!("w8 = ", $wf), concat!("w8 ^= ", $wg), concat!("w8 &= ", $we), concat!("w8 ^= ", $wg),
                concat!($wh, " += w8"),
                concat!($wd, " += ", $wh),
                // Three rotations; the second continues the first.
                concat!("r8 = ", $re), "r8 <<= 32", concat!("r8 |= ", $re),
                "r9 = r8", "r9 >>= 25", "r8 >>= 6", "w9 ^= w8", "r8 >>= 5", "w9 ^= w8",
                concat!($wd, " += w9"), concat!($wh, " += w9"),
                // The majority, as two sums that never share a bit.
                concat!("w8 = ", $wa), concat!("w8 ^= ", $wb), concat!("w8 &= ", $wc), concat!($wh, " += w8"),
                concat!("w8 = ", $wa), concat!("w8 &= ", $wb), concat!($wh, " += w8"),
                concat!("r8 = ", $ra), "r8 <<= 32", concat!("r8 |= ", $ra),
                "r9 = r8", "r9 >>= 22", "r8 >>= 2", "w9 ^= w8", "r8 >>= 11", "w9 ^= w8",
                concat!($wh, " += w9"),
                inout($rh) $h, inout($rd) $d,
                in($ra) $a, in($rb) $b, in($rc) $c, in($re) $e, in($rf) $f, in($rg) $g,
                inout("r8") u64::from($word) => _, out("r9") _,
                options(pure, nomem, nostack)
            );
        };
    };
}

/// One round for each number, with the words renamed after each.
macro_rules! rounds {
    ($words:ident; $a:tt $b:tt $c:tt $d:tt $e:tt $f:tt $g:tt $h:tt;) => {};
    ($words:ident; $a:tt $b:tt $c:tt $d:tt $e:tt $f:tt $g:tt $h:tt; $i:literal $($rest:literal)*) => {
        round!($words[$i]; $a $b $c $d $e $f $g $h);
        rounds!($words; $h $a $b $c $d $e $f $g; $($rest)*);
    };
}

/// Works a schedule into a state of SHA-256.
#[inline(always)]
pub fn rounds256(state: &mut State32, schedule: &Schedule256) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state.map(u64::from);
    let (eights, _) = schedule.as_chunks::<8>();
    for words in eights {
        rounds!(
            words;
            (a "r0" "w0") (b "r1" "w1") (c "r2" "w2") (d "r3" "w3")
            (e "r4" "w4") (f "r5" "w5") (g "r6" "w6") (h "r7" "w7");
            0 1 2 3 4 5 6 7
        );
    }
    #[allow(clippy::cast_possible_truncation, reason = "they have no more than 32 bits")]
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add as u32);
    }
}
