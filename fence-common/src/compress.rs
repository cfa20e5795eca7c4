//! The block functions of SHA-1, SHA-256 and SHA-512, written for BPF: ten registers, 512 bytes of
//! stack, no rotate instruction.
//!
//! A block function has two halves. `expand` makes a block's schedule: its words and those derived
//! from them, each with its round's constant added. `rounds` works a schedule into a state. They
//! are apart because some blocks are known before the message: their schedules are made once.
//!
//! The table shows what was tried for a wrong SHA-256 digest and a key of 4096 bytes. It counts ns
//! per frame, less those of an empty program (kernel 6.18, Zen 5). There three compressions by the
//! `sha2` crate in portable Rust take 620 ns, and by plain C 680 ns.
//!
//! | | ns |
//! |---|--:|
//! | `compress256` of `sha2` 0.11.1 (`sha2_backend="soft"`, compact) | 1180 |
//! | sixteen rolling words, three blocks, compiled | 960 |
//! | the same with 32-bit arithmetic and loads of unaligned words | 850 |
//! | the last block's schedule from the map, rounds apart from it, compiled | 900 |
//! | the rotations by hand | 780 |
//! | whole rounds by hand, each register with its use | 670 |
//! | the request laid into its blocks by words; its NUL searched for by words | 620 |
//! | the shortest dependency from round to round: see `compress/bpf.rs` | 545 |
//!
//! `compress256` unrolled, and `compress512`, cannot be linked for BPF. In the fourth variant the
//! compiler puts half of the state on the stack.
//!
//! The `sha1` crate exports no block function. User space uses this module to prepare keys, and in
//! the tests that compare the kernel with user space. All else there uses `sha1` and `sha2`, which
//! this module is tested against.

use core::sync::atomic::{Ordering, compiler_fence};

use crate::compress::constants::{K1, K32, K64};

#[cfg(target_arch = "bpf")]
mod bpf;
mod constants;
#[cfg(not(target_arch = "bpf"))]
mod portable;

#[cfg(target_arch = "bpf")]
use bpf::rotated2;
#[cfg(target_arch = "bpf")]
pub use bpf::rounds256;
#[cfg(not(target_arch = "bpf"))]
use portable::rotated2;
#[cfg(not(target_arch = "bpf"))]
pub use portable::rounds256;

pub use constants::{INITIAL_SHA1, INITIAL_SHA256, INITIAL_SHA512};

/// A state of SHA-256 (all eight words), or of SHA-1 (the first five; the others stay as they are).
pub type State32 = [u32; 8];
/// A state of SHA-512.
pub type State64 = [u64; 8];
/// A block of SHA-1 or SHA-256 in host byte order.
pub type Block32 = [u32; 16];
/// A block of SHA-512 in host byte order.
pub type Block64 = [u64; 16];
/// The schedule of a block of SHA-1.
pub type Schedule1 = [u32; 80];
/// The schedule of a block of SHA-256.
pub type Schedule256 = [u32; 64];
/// The schedule of a block of SHA-512.
pub type Schedule512 = [u64; 80];

/// Keeps the compiler from moving memory accesses across. With ten registers it would load words
/// long before their use and spill them all to the stack. No instruction comes of it.
#[inline(always)]
pub(crate) fn compiler_barrier() {
    compiler_fence(Ordering::SeqCst);
}

/// One round of SHA-512. Only two words change; the order of the arguments renames the others.
macro_rules! round512 {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $word:expr) => {
        $h = $h
            .wrapping_add($word)
            .wrapping_add($g ^ ($e & ($f ^ $g)))
            .wrapping_add($e.rotate_right(14) ^ $e.rotate_right(18) ^ $e.rotate_right(41));
        $d = $d.wrapping_add($h);
        $h = $h
            .wrapping_add(($a & $b).wrapping_add($c & ($a ^ $b)))
            .wrapping_add($a.rotate_right(28) ^ $a.rotate_right(34) ^ $a.rotate_right(39));
        compiler_barrier();
    };
}

/// Works a schedule into a state, eight rounds at a time.
macro_rules! rounds {
    ($round:ident, $state:ident, $schedule:ident) => {
        let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *$state;
        let (eights, _) = $schedule.as_chunks::<8>();
        for words in eights {
            $round!(a b c d e f g h, words[0]);
            $round!(h a b c d e f g, words[1]);
            $round!(g h a b c d e f, words[2]);
            $round!(f g h a b c d e, words[3]);
            $round!(e f g h a b c d, words[4]);
            $round!(d e f g h a b c, words[5]);
            $round!(c d e f g h a b, words[6]);
            $round!(b c d e f g h a, words[7]);
        }
        for (word, add) in $state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *word = word.wrapping_add(add);
        }
    };
}

/// Makes a schedule: the sixteen words, then their successors in their place, each plus its
/// constant.
macro_rules! expand {
    ($w:ident, $out:ident, $k:ident, $small0:expr, $small1:expr, $($i:literal)+) => {
        let ((out, _), (k, _)) = ($out.as_chunks_mut::<16>(), $k.as_chunks::<16>());
        let mut groups = out.iter_mut().zip(k);
        if let Some((out, k)) = groups.next() {
            $(out[$i] = $w[$i].wrapping_add(k[$i]);
            compiler_barrier();)+
        }
        for (out, k) in groups {
            $(let word = $small0($w[($i + 1) % 16])
                .wrapping_add($w[$i])
                .wrapping_add($w[($i + 9) % 16])
                .wrapping_add($small1($w[($i + 14) % 16]));
            $w[$i] = word;
            out[$i] = word.wrapping_add(k[$i]);
            compiler_barrier();)+
        }
    };
}

/// Makes the schedule of a block of SHA-256. Overwrites the block.
#[inline(always)]
pub fn expand256(w: &mut Block32, out: &mut Schedule256) {
    expand!(w, out, K32, rotated2::<7, 11, 3>, rotated2::<17, 2, 10>, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
}

/// Makes the schedule of a block of SHA-512. Overwrites the block.
#[inline(always)]
pub fn expand512(w: &mut Block64, out: &mut Schedule512) {
    expand!(
        w,
        out,
        K64,
        |x: u64| x.rotate_right(1) ^ x.rotate_right(8) ^ x >> 7,
        |x: u64| x.rotate_right(19) ^ x.rotate_right(61) ^ x >> 6,
        0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
    );
}

/// Works a schedule into a state of SHA-512.
#[inline(always)]
pub fn rounds512(state: &mut State64, schedule: &Schedule512) {
    rounds!(round512, state, schedule);
}

/// `x` rotated left.
#[inline(always)]
const fn left(x: u32, n: u32) -> u32 {
    x.rotate_left(n)
}

/// Makes the schedule of a block of SHA-1.
#[inline(always)]
pub fn expand1(w: &mut Block32, out: &mut Schedule1) {
    out[..16].copy_from_slice(w);
    for i in 16..80 {
        out[i] = left(out[i - 3] ^ out[i - 8] ^ out[i - 14] ^ out[i - 16], 1);
    }
    let (twenties, _) = out.as_chunks_mut::<20>();
    for (words, k) in twenties.iter_mut().zip(K1) {
        for word in words {
            *word = word.wrapping_add(k);
        }
    }
}

/// One round of SHA-1.
macro_rules! round1 {
    ($a:ident $b:ident $c:ident $d:ident $e:ident, $function:ident, $word:expr) => {
        $e = $e.wrapping_add($word).wrapping_add($function($b, $c, $d)).wrapping_add(left($a, 5));
        $b = left($b, 30);
        compiler_barrier();
    };
}

/// Works a schedule into a state of SHA-1.
#[inline(always)]
pub fn rounds1(state: &mut State32, schedule: &Schedule1) {
    #[inline(always)]
    const fn choice(b: u32, c: u32, d: u32) -> u32 {
        d ^ (b & (c ^ d))
    }
    #[inline(always)]
    const fn parity(b: u32, c: u32, d: u32) -> u32 {
        b ^ c ^ d
    }
    #[inline(always)]
    const fn majority(b: u32, c: u32, d: u32) -> u32 {
        (b & c).wrapping_add(d & (b ^ c))
    }
    let [mut a, mut b, mut c, mut d, mut e, ..] = *state;
    macro_rules! twenty {
        ($from:literal, $function:ident) => {
            let (fives, _) = schedule[$from..$from + 20].as_chunks::<5>();
            for words in fives {
                round1!(a b c d e, $function, words[0]);
                round1!(e a b c d, $function, words[1]);
                round1!(d e a b c, $function, words[2]);
                round1!(c d e a b, $function, words[3]);
                round1!(b c d e a, $function, words[4]);
            }
        };
    }
    twenty!(0, choice);
    twenty!(20, parity);
    twenty!(40, majority);
    twenty!(60, parity);
    for (word, add) in state.iter_mut().zip([a, b, c, d, e]) {
        *word = word.wrapping_add(add);
    }
}
