//! The block functions of SHA-1, SHA-256 and SHA-512, written for BPF: ten registers, 512 bytes of stack, no rotate instruction.
//!
//! The `sha2` crate's own (`block_api`, 0.11.1, `sha2_backend="soft"`) were tried under BPF first. `compress512` has its whole schedule
//! of 640 bytes on the stack and cannot be linked; unrolled, neither can `compress256`. The compact `compress256` passes the verifier but
//! takes 1212 ns a request where this one takes 935 (three blocks, kernel 6.18), and `sha1` shows no block function. In user space
//! only the preparation of keys uses these; everything else is on `sha1` and `sha2`, which these are tested against.
//!
//! A block is passed as words in memory order (big-endian numbers), as that keeps it aligned: BPF reads unaligned words bytewise.
//! It is overwritten by the message schedule, for which the stack has no room.

use core::sync::atomic::{Ordering, compiler_fence};

/// State of SHA-1 in five of the eight words (the others stay zero), of SHA-256 in all.
pub type State32 = [u32; 8];
/// State of SHA-512.
pub type State64 = [u64; 8];
/// A block of SHA-1 or SHA-256: 64 bytes.
pub type Block32 = [u32; 16];
/// A block of SHA-512: 128 bytes.
pub type Block64 = [u64; 16];

/// What SHA-1 begins with.
pub const INITIAL_SHA1: State32 = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0, 0, 0, 0];
/// What SHA-256 begins with.
pub const INITIAL_SHA256: State32 =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
/// What SHA-512 begins with.
pub const INITIAL_SHA512: State64 = [
    0x6a09_e667_f3bc_c908,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1,
    0x9b05_688c_2b3e_6c1f,
    0x1f83_d9ab_fb41_bd6b,
    0x5be0_cd19_137e_2179,
];

const K32: [[u32; 16]; 4] = [
    [
        0x428a_2f98,
        0x7137_4491,
        0xb5c0_fbcf,
        0xe9b5_dba5,
        0x3956_c25b,
        0x59f1_11f1,
        0x923f_82a4,
        0xab1c_5ed5,
        0xd807_aa98,
        0x1283_5b01,
        0x2431_85be,
        0x550c_7dc3,
        0x72be_5d74,
        0x80de_b1fe,
        0x9bdc_06a7,
        0xc19b_f174,
    ],
    [
        0xe49b_69c1,
        0xefbe_4786,
        0x0fc1_9dc6,
        0x240c_a1cc,
        0x2de9_2c6f,
        0x4a74_84aa,
        0x5cb0_a9dc,
        0x76f9_88da,
        0x983e_5152,
        0xa831_c66d,
        0xb003_27c8,
        0xbf59_7fc7,
        0xc6e0_0bf3,
        0xd5a7_9147,
        0x06ca_6351,
        0x1429_2967,
    ],
    [
        0x27b7_0a85,
        0x2e1b_2138,
        0x4d2c_6dfc,
        0x5338_0d13,
        0x650a_7354,
        0x766a_0abb,
        0x81c2_c92e,
        0x9272_2c85,
        0xa2bf_e8a1,
        0xa81a_664b,
        0xc24b_8b70,
        0xc76c_51a3,
        0xd192_e819,
        0xd699_0624,
        0xf40e_3585,
        0x106a_a070,
    ],
    [
        0x19a4_c116,
        0x1e37_6c08,
        0x2748_774c,
        0x34b0_bcb5,
        0x391c_0cb3,
        0x4ed8_aa4a,
        0x5b9c_ca4f,
        0x682e_6ff3,
        0x748f_82ee,
        0x78a5_636f,
        0x84c8_7814,
        0x8cc7_0208,
        0x90be_fffa,
        0xa450_6ceb,
        0xbef9_a3f7,
        0xc671_78f2,
    ],
];
const K64: [[u64; 16]; 5] = [
    [
        0x428a_2f98_d728_ae22,
        0x7137_4491_23ef_65cd,
        0xb5c0_fbcf_ec4d_3b2f,
        0xe9b5_dba5_8189_dbbc,
        0x3956_c25b_f348_b538,
        0x59f1_11f1_b605_d019,
        0x923f_82a4_af19_4f9b,
        0xab1c_5ed5_da6d_8118,
        0xd807_aa98_a303_0242,
        0x1283_5b01_4570_6fbe,
        0x2431_85be_4ee4_b28c,
        0x550c_7dc3_d5ff_b4e2,
        0x72be_5d74_f27b_896f,
        0x80de_b1fe_3b16_96b1,
        0x9bdc_06a7_25c7_1235,
        0xc19b_f174_cf69_2694,
    ],
    [
        0xe49b_69c1_9ef1_4ad2,
        0xefbe_4786_384f_25e3,
        0x0fc1_9dc6_8b8c_d5b5,
        0x240c_a1cc_77ac_9c65,
        0x2de9_2c6f_592b_0275,
        0x4a74_84aa_6ea6_e483,
        0x5cb0_a9dc_bd41_fbd4,
        0x76f9_88da_8311_53b5,
        0x983e_5152_ee66_dfab,
        0xa831_c66d_2db4_3210,
        0xb003_27c8_98fb_213f,
        0xbf59_7fc7_beef_0ee4,
        0xc6e0_0bf3_3da8_8fc2,
        0xd5a7_9147_930a_a725,
        0x06ca_6351_e003_826f,
        0x1429_2967_0a0e_6e70,
    ],
    [
        0x27b7_0a85_46d2_2ffc,
        0x2e1b_2138_5c26_c926,
        0x4d2c_6dfc_5ac4_2aed,
        0x5338_0d13_9d95_b3df,
        0x650a_7354_8baf_63de,
        0x766a_0abb_3c77_b2a8,
        0x81c2_c92e_47ed_aee6,
        0x9272_2c85_1482_353b,
        0xa2bf_e8a1_4cf1_0364,
        0xa81a_664b_bc42_3001,
        0xc24b_8b70_d0f8_9791,
        0xc76c_51a3_0654_be30,
        0xd192_e819_d6ef_5218,
        0xd699_0624_5565_a910,
        0xf40e_3585_5771_202a,
        0x106a_a070_32bb_d1b8,
    ],
    [
        0x19a4_c116_b8d2_d0c8,
        0x1e37_6c08_5141_ab53,
        0x2748_774c_df8e_eb99,
        0x34b0_bcb5_e19b_48a8,
        0x391c_0cb3_c5c9_5a63,
        0x4ed8_aa4a_e341_8acb,
        0x5b9c_ca4f_7763_e373,
        0x682e_6ff3_d6b2_b8a3,
        0x748f_82ee_5def_b2fc,
        0x78a5_636f_4317_2f60,
        0x84c8_7814_a1f0_ab72,
        0x8cc7_0208_1a64_39ec,
        0x90be_fffa_2363_1e28,
        0xa450_6ceb_de82_bde9,
        0xbef9_a3f7_b2c6_7915,
        0xc671_78f2_e372_532b,
    ],
    [
        0xca27_3ece_ea26_619c,
        0xd186_b8c7_21c0_c207,
        0xeada_7dd6_cde0_eb1e,
        0xf57d_4f7f_ee6e_d178,
        0x06f0_67aa_7217_6fba,
        0x0a63_7dc5_a2c8_98a6,
        0x113f_9804_bef9_0dae,
        0x1b71_0b35_131c_471b,
        0x28db_77f5_2304_7d84,
        0x32ca_ab7b_40c7_2493,
        0x3c9e_be0a_15c9_bebc,
        0x431d_67c4_9c10_0d4c,
        0x4cc5_d4be_cb3e_42b6,
        0x597f_299c_fc65_7e2a,
        0x5fcb_6fab_3ad6_faec,
        0x6c44_198c_4a47_5817,
    ],
];

/// Keeps the compiler from fetching words long before they are needed: on a machine with ten registers it would put them all on the
/// stack. No instruction comes of it.
#[inline(always)]
fn step_by_step() {
    compiler_fence(Ordering::SeqCst);
}

/// A word beside itself: what was a rotation of `x` by `n` is then one shift, `doubled(x) >> n`, where the target has no rotate.
#[inline(always)]
const fn doubled(x: u32) -> u64 {
    (x as u64) << 32 | x as u64
}

/// `x` rotated right by each of the distances, and the results xored.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
const fn rotated3(x: u32, n: [u32; 3]) -> u32 {
    let x = doubled(x);
    (x >> n[0] ^ x >> n[1] ^ x >> n[2]) as u32
}

/// `x` rotated right by two distances and shifted by a third, and the results xored.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
const fn rotated2(x: u32, n: [u32; 2], shift: u32) -> u32 {
    let y = doubled(x);
    (y >> n[0] ^ y >> n[1]) as u32 ^ x >> shift
}

/// Sixteen rounds: `$step` with the eight words in each of their positions, twice.
macro_rules! sixteen {
    ($step:ident, $k:ident, $w:ident, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
        $step!($a $b $c $d $e $f $g $h, $k[0], $w[0]);
        $step!($h $a $b $c $d $e $f $g, $k[1], $w[1]);
        $step!($g $h $a $b $c $d $e $f, $k[2], $w[2]);
        $step!($f $g $h $a $b $c $d $e, $k[3], $w[3]);
        $step!($e $f $g $h $a $b $c $d, $k[4], $w[4]);
        $step!($d $e $f $g $h $a $b $c, $k[5], $w[5]);
        $step!($c $d $e $f $g $h $a $b, $k[6], $w[6]);
        $step!($b $c $d $e $f $g $h $a, $k[7], $w[7]);
        $step!($a $b $c $d $e $f $g $h, $k[8], $w[8]);
        $step!($h $a $b $c $d $e $f $g, $k[9], $w[9]);
        $step!($g $h $a $b $c $d $e $f, $k[10], $w[10]);
        $step!($f $g $h $a $b $c $d $e, $k[11], $w[11]);
        $step!($e $f $g $h $a $b $c $d, $k[12], $w[12]);
        $step!($d $e $f $g $h $a $b $c, $k[13], $w[13]);
        $step!($c $d $e $f $g $h $a $b, $k[14], $w[14]);
        $step!($b $c $d $e $f $g $h $a, $k[15], $w[15]);
    };
}

/// The message schedule's next sixteen words, in the place of the last sixteen.
macro_rules! next_words {
    ($w:ident, $small0:path, $small1:path; $($i:literal)+) => {
        $($w[$i] = $w[$i]
            .wrapping_add($small0($w[($i + 1) % 16]))
            .wrapping_add($w[($i + 9) % 16])
            .wrapping_add($small1($w[($i + 14) % 16]));
        step_by_step();)+
    };
}

#[inline(always)]
const fn small0_256(x: u32) -> u32 {
    rotated2(x, [7, 18], 3)
}

#[inline(always)]
const fn small1_256(x: u32) -> u32 {
    rotated2(x, [17, 19], 10)
}

#[inline(always)]
const fn small0_512(x: u64) -> u64 {
    x.rotate_right(1) ^ x.rotate_right(8) ^ x >> 7
}

#[inline(always)]
const fn small1_512(x: u64) -> u64 {
    x.rotate_right(19) ^ x.rotate_right(61) ^ x >> 6
}

/// One round of SHA-256. Only two words change; the renaming of the others is in the order of the arguments.
macro_rules! step256 {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr, $w:expr) => {
        let t = $h
            .wrapping_add(rotated3($e, [6, 11, 25]))
            .wrapping_add($g ^ ($e & ($f ^ $g)))
            .wrapping_add($k)
            .wrapping_add($w);
        $d = $d.wrapping_add(t);
        $h = t.wrapping_add(rotated3($a, [2, 13, 22])).wrapping_add(($a & $b) | ($c & ($a | $b)));
        step_by_step();
    };
}

/// One round of SHA-512, as [`step256`].
macro_rules! step512 {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr, $w:expr) => {
        let t = $h
            .wrapping_add($e.rotate_right(14) ^ $e.rotate_right(18) ^ $e.rotate_right(41))
            .wrapping_add($g ^ ($e & ($f ^ $g)))
            .wrapping_add($k)
            .wrapping_add($w);
        $d = $d.wrapping_add(t);
        $h = t
            .wrapping_add($a.rotate_right(28) ^ $a.rotate_right(34) ^ $a.rotate_right(39))
            .wrapping_add(($a & $b) | ($c & ($a | $b)));
        step_by_step();
    };
}

/// Absorbs one block into a SHA-256 state.
#[inline(never)]
pub fn compress256(state: &mut State32, w: &mut Block32) {
    for word in w.iter_mut() {
        *word = u32::from_be(*word);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for k in &K32 {
        sixteen!(step256, k, w, a b c d e f g h);
        next_words!(w, small0_256, small1_256; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

/// Absorbs one block into a SHA-512 state.
#[inline(never)]
pub fn compress512(state: &mut State64, w: &mut Block64) {
    for word in w.iter_mut() {
        *word = u64::from_be(*word);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for k in &K64 {
        sixteen!(step512, k, w, a b c d e f g h);
        next_words!(w, small0_512, small1_512; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

/// Twenty rounds of SHA-1 with one function and one constant.
macro_rules! twenty {
    ($from:literal, $k:literal, $w:ident, $s:ident, |$b:ident, $c:ident, $d:ident| $function:expr) => {
        for round in $from..$from + 20 {
            let word = if round < 16 {
                $w[round & 15]
            } else {
                let mixed = $w[(round + 13) & 15] ^ $w[(round + 8) & 15] ^ $w[(round + 2) & 15] ^ $w[round & 15];
                let word = mixed.rotate_left(1);
                $w[round & 15] = word;
                word
            };
            let [a, $b, $c, $d, e] = $s;
            let sum = a.rotate_left(5).wrapping_add($function).wrapping_add(e).wrapping_add($k).wrapping_add(word);
            $s = [sum, a, $b.rotate_left(30), $c, $d];
        }
    };
}

/// Absorbs one block into a SHA-1 state.
#[inline(never)]
pub fn compress1(state: &mut State32, w: &mut Block32) {
    for word in w.iter_mut() {
        *word = u32::from_be(*word);
    }
    let mut s = [state[0], state[1], state[2], state[3], state[4]];
    twenty!(0, 0x5a82_7999_u32, w, s, |b, c, d| d ^ (b & (c ^ d)));
    twenty!(20, 0x6ed9_eba1_u32, w, s, |b, c, d| b ^ c ^ d);
    twenty!(40, 0x8f1b_bcdc_u32, w, s, |b, c, d| (b & c) | (d & (b | c)));
    twenty!(60, 0xca62_c1d6_u32, w, s, |b, c, d| b ^ c ^ d);
    for (word, add) in state.iter_mut().zip(s) {
        *word = word.wrapping_add(add);
    }
}
