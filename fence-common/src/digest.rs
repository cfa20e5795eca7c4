//! Checks `H(key || request with a zero hash field)`, quickly, for keys of up to 4096 bytes.
//!
//! User space prepares a key once ([`PreparedKey`]). It absorbs the key's whole blocks and lays out
//! the rest: the key's tail, a gap of 112 bytes for the request's signed part, the hash field's 64
//! zero bytes, the padding and the bit count. Only the blocks with the gap depend on the request.
//! The schedules of the blocks behind it are made in advance.
//!
//! Per datagram, the kernel lays the 112 bytes into the gap, and absorbs one to three blocks and up
//! to two schedules.
//!
//! A prepared key is worth as much as the key: it is a secret, wherever it lies.

use core::hint::black_box;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bytes::word;
use crate::compress::{
    Block32, Block64, Schedule1, Schedule256, Schedule512, State32, State64, compiler_barrier, expand1, expand256,
    expand512, rounds1, rounds256, rounds512,
};
use crate::hash::HashKind;
use crate::wire::{HASH_OFFSET, REQUEST_LEN, Request};

/// Most 64-byte blocks that the signed part reaches into: (63 + 112) / 64, rounded up.
const OPEN32: usize = 3;
/// Most 128-byte blocks that the signed part reaches into: (127 + 112) / 128, rounded up.
const OPEN64: usize = 2;
/// Most 64-byte blocks behind those.
const CLOSED32: usize = 2;
/// The number of 32-bit words in a request.
const WORDS: usize = REQUEST_LEN / 4;
/// The number of words in the signed part.
const SIGNED: usize = HASH_OFFSET / 4;

/// A key prepared for a digest with blocks of 64 bytes.
macro_rules! prepared32 {
    ($(#[doc = $doc:literal])+ $name:ident, $schedule:ty) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[cfg_attr(feature = "user", derive(zeroize::Zeroize))]
        #[repr(C)]
        pub struct $name {
            /// The state after the key's whole blocks.
            pub midstate: State32,
            /// The key's tail, then zeros, in host byte order.
            pub tail: Block32,
            /// The schedules of the blocks behind the request's signed part.
            pub closed: [$schedule; CLOSED32],
            /// Length of the key's tail in bytes: 0 to 63.
            pub tail_len: u32,
            /// The number of blocks that the signed part reaches into, the tail's included: 2 or 3.
            pub open_blocks: u32,
            /// The number of blocks behind them: 1 or 2.
            pub closed_blocks: u32,
            /// Zero.
            pub reserved: u32,
        }
    };
}

prepared32!(
    /// A key prepared for SHA-1.
    Prepared1,
    Schedule1
);
prepared32!(
    /// A key prepared for SHA-256.
    Prepared256,
    Schedule256
);

/// A key prepared for SHA-512.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "user", derive(zeroize::Zeroize))]
#[repr(C)]
pub struct Prepared512 {
    /// The state after the key's whole blocks.
    pub midstate: State64,
    /// The key's tail, a gap at `tail_len` for the request, and the padding, in host byte order.
    pub template: [Block64; OPEN64],
    /// The schedule of the block behind the request's signed part, if there is one.
    pub closed: Schedule512,
    /// Length of the key's tail in bytes: 0 to 127.
    pub tail_len: u32,
    /// The number of blocks that the signed part reaches into, the tail's included: 1 or 2.
    pub open_blocks: u32,
    /// The number of blocks behind them: 0 or 1.
    pub closed_blocks: u32,
    /// Zero.
    pub reserved: u32,
}

/// One key in the map, prepared for every kind of digest. All zero is a slot without a key, which
/// verifies nothing.
///
/// No `Debug`: the content is as secret as the key.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "user", derive(zeroize::Zeroize))]
#[repr(C)]
pub struct KeySlot {
    /// 1 if a key is loaded.
    pub loaded: u32,
    /// Zero.
    pub reserved: u32,
    /// For SHA-1.
    pub sha1: Prepared1,
    /// For SHA-256.
    pub sha256: Prepared256,
    /// For SHA-512.
    pub sha512: Prepared512,
}

/// Working memory of one verification. In the kernel it is in a per-CPU map, as the stack is too
/// small.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Scratch {
    /// The request in host byte order.
    request: [u32; WORDS],
    state32: State32,
    blocks32: [Block32; OPEN32],
    schedule1: Schedule1,
    schedule256: Schedule256,
    state64: State64,
    blocks64: [Block64; OPEN64],
    schedule512: Schedule512,
}

/// Whether the request's digest of this kind is right. Compares all 64 bytes in constant time.
/// Never true for [`HashKind::None`] or without a key.
#[inline(always)]
#[must_use]
pub fn verify(slot: &KeySlot, kind: HashKind, request: &Request, scratch: &mut Scratch) -> bool {
    stage(request, scratch);
    matches(slot, kind, scratch)
}

/// Stores the request for [`matches()`].
#[inline(always)]
pub fn stage(request: &Request, scratch: &mut Scratch) {
    let bytes: &[[u8; 4]; WORDS] = zerocopy::transmute_ref!(request);
    for (to, from) in scratch.request.iter_mut().zip(bytes) {
        *to = u32::from_be(word(from));
    }
}

/// Whether the [staged](stage) request's digest is right, as [`verify()`] says it.
#[inline(always)]
#[must_use]
pub fn matches(slot: &KeySlot, kind: HashKind, scratch: &mut Scratch) -> bool {
    if slot.loaded != 1 {
        return false;
    }
    match kind {
        HashKind::None => false,
        HashKind::Sha1 => apart::fence_sha1(slot, scratch),
        HashKind::Sha256 => apart::fence_sha256(slot, scratch),
        HashKind::Sha512 => apart::fence_sha512(slot, scratch),
    }
}

/// The three checks. In the kernel each is a BPF global function, which the verifier checks once
/// for any arguments. Otherwise it would check all rounds once per path that leads there.
mod apart {
    use super::{KeySlot, Scratch};

    macro_rules! apart {
        ($($name:ident)+) => {$(
            #[cfg(not(target_arch = "bpf"))]
            pub(super) fn $name(slot: &KeySlot, scratch: &mut Scratch) -> bool {
                super::$name(slot, scratch)
            }

            #[cfg(target_arch = "bpf")]
            #[inline(always)]
            pub(super) fn $name(slot: &KeySlot, scratch: &mut Scratch) -> bool {
                global::$name(slot, scratch) != 0
            }
        )+

            #[cfg(target_arch = "bpf")]
            mod global {
                use super::{KeySlot, Scratch};
                $(
                    // SAFETY: the verifier finds a global function by its symbol. No other object
                    // is linked, so the name cannot clash.
                    #[unsafe(no_mangle)]
                    #[inline(never)]
                    pub(super) extern "C" fn $name(slot: *const KeySlot, scratch: *mut Scratch) -> u32 {
                        // SAFETY: needed, as the verifier gives global functions raw pointers only.
                        // The callers pass references.
                        let Some(slot) = (unsafe { slot.as_ref() }) else { return 0 };
                        // SAFETY: as above; the caller's reference is the only one to it.
                        let Some(scratch) = (unsafe { scratch.as_mut() }) else { return 0 };
                        u32::from(super::super::$name(slot, scratch))
                    }
                )+
            }
        };
    }
    apart!(fence_sha1 fence_sha256 fence_sha512);
}

/// Lays the key's tail and the request's signed part into the blocks.
#[inline(always)]
fn lay32(tail: &Block32, tail_len: u32, request: &[u32; WORDS], blocks: &mut [Block32; OPEN32]) {
    let blocks = blocks.as_flattened_mut();
    // Around the gap: the tail before it, zeros behind it.
    blocks[..tail.len()].copy_from_slice(tail);
    for word in &mut blocks[SIGNED..] {
        *word = 0;
        // Otherwise the loop becomes a call of `memset`, which goes bytewise here.
        compiler_barrier();
    }
    // The masks do not change a prepared key. They show the verifier that the gap is inside.
    let (at, shift) = (((tail_len >> 2) & 15) as usize, (tail_len & 3) * 8);
    let Some(gap) = blocks.get_mut(at..).and_then(<[u32]>::first_chunk_mut::<{ SIGNED + 1 }>) else { return };
    gap[0] |= request[0] >> shift;
    let mut window = u64::from(request[0]);
    for index in 1..SIGNED {
        window = window << 32 | u64::from(request[index]);
        gap[index] = low(window >> shift);
    }
    gap[SIGNED] = low(window << 32 >> shift);
}

/// As [`lay32`]. The template has the padding too, since a block with the gap may be the last one.
#[inline(always)]
fn lay64(template: &[Block64; OPEN64], tail_len: u32, request: &[u32; WORDS], blocks: &mut [Block64; OPEN64]) {
    *blocks = *template;
    let blocks = blocks.as_flattened_mut();
    let (at, shift) = (((tail_len >> 3) & 15) as usize, (tail_len & 7) * 8);
    let Some(gap) = blocks.get_mut(at..).and_then(<[u64]>::first_chunk_mut::<{ SIGNED / 2 + 1 }>) else { return };
    let mut before = 0;
    for index in 0..SIGNED / 2 {
        let word = u64::from(request[2 * index]) << 32 | u64::from(request[2 * index + 1]);
        // In two steps, as a shift by the whole width does not exist.
        gap[index] |= word >> shift | before << 1 << (63 - shift);
        before = word;
    }
    gap[SIGNED / 2] |= before << 1 << (63 - shift);
}

/// Absorbs the blocks with the request, then those behind it.
macro_rules! absorb {
    ($prepared:expr, $state:expr, $blocks:expr, $schedule:expr, $closed:expr, $expand:path, $rounds:path) => {
        $state.copy_from_slice(&$prepared.midstate);
        for (index, block) in (0_u32..).zip($blocks.iter_mut()) {
            if index >= $prepared.open_blocks {
                break;
            }
            $expand(block, $schedule);
            $rounds($state, $schedule);
        }
        for (index, schedule) in (0_u32..).zip($closed) {
            if index >= $prepared.closed_blocks {
                break;
            }
            $rounds($state, schedule);
        }
    };
}

#[inline(always)]
fn fence_sha1(slot: &KeySlot, scratch: &mut Scratch) -> bool {
    let (prepared, Scratch { request, state32, blocks32, schedule1, .. }) = (&slot.sha1, scratch);
    lay32(&prepared.tail, prepared.tail_len, request, blocks32);
    absorb!(prepared, state32, blocks32, schedule1, &prepared.closed, expand1, rounds1);
    none(differences::<5>(state32, request).into())
}

#[inline(always)]
fn fence_sha256(slot: &KeySlot, scratch: &mut Scratch) -> bool {
    let (prepared, Scratch { request, state32, blocks32, schedule256, .. }) = (&slot.sha256, scratch);
    lay32(&prepared.tail, prepared.tail_len, request, blocks32);
    absorb!(prepared, state32, blocks32, schedule256, &prepared.closed, expand256, rounds256);
    none(differences::<8>(state32, request).into())
}

#[inline(always)]
fn fence_sha512(slot: &KeySlot, scratch: &mut Scratch) -> bool {
    let (prepared, Scratch { request, state64, blocks64, schedule512, .. }) = (&slot.sha512, scratch);
    lay64(&prepared.template, prepared.tail_len, request, blocks64);
    absorb!(prepared, state64, blocks64, schedule512, [&prepared.closed], expand512, rounds512);
    let (pairs, _) = request[SIGNED..].as_chunks::<2>();
    let digest = pairs.iter().zip(state64);
    none(digest.fold(0, |all, ([high, low], word)| all | ((u64::from(*high) << 32 | u64::from(*low)) ^ *word)))
}

/// Whether there is no difference. Without the barrier the compiler leaves at the first difference.
#[inline(always)]
fn none(differences: u64) -> bool {
    black_box(differences) == 0
}

/// The bits in which the hash field differs from a digest of `LEN` words, padded with zeros.
#[inline(always)]
fn differences<const LEN: usize>(state: &State32, request: &[u32; WORDS]) -> u32 {
    let (digest, padding) = request[SIGNED..].split_at(LEN);
    let wrong = digest.iter().zip(state).fold(0, |all, (word, state)| all | (word ^ state));
    padding.iter().fold(wrong, |all, word| all | word)
}

#[allow(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
#[inline(always)]
const fn low(x: u64) -> u32 {
    x as u32
}

#[cfg(feature = "user")]
pub use prepare::PreparedKey;

#[cfg(feature = "user")]
mod prepare;

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of, size_of};
    use std::{format, vec};

    use proptest::prelude::*;
    use zerocopy::FromZeros;

    use super::*;
    use crate::key::Key;

    const EDGES: [usize; 16] = [1, 7, 8, 55, 56, 63, 64, 65, 111, 112, 115, 127, 128, 512, 4095, 4096];
    const KINDS: [HashKind; 3] = [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512];

    fn key(len: usize, seed: u8) -> Key {
        let bytes: vec::Vec<u8> =
            (0..=u8::MAX).cycle().map(|byte| byte.wrapping_mul(31).wrapping_add(seed)).take(len).collect();
        Key::new(&bytes).unwrap()
    }

    fn request(seed: u8) -> Request {
        let mut byte = seed;
        let bytes: [u8; 176] = core::array::from_fn(|_| {
            byte = byte.wrapping_add(57);
            byte
        });
        zerocopy::transmute!(bytes)
    }

    /// Verifies with a dirty scratch, as in the kernel.
    fn check(slot: &KeySlot, request: &Request) -> bool {
        let mut scratch = Scratch::new_zeroed();
        scratch.as_mut_bytes().fill(0xa5);
        verify(slot, request.hash_kind().unwrap(), request, &mut scratch)
    }

    #[test]
    fn layouts_are_pinned() {
        assert_eq!((size_of::<Prepared1>(), align_of::<Prepared1>()), (752, 4));
        assert_eq!((size_of::<Prepared256>(), align_of::<Prepared256>()), (624, 4));
        assert_eq!((size_of::<Prepared512>(), align_of::<Prepared512>()), (976, 8));
        assert_eq!((size_of::<KeySlot>(), align_of::<KeySlot>()), (2360, 8));
        assert_eq!(offset_of!(KeySlot, sha1), 8);
        assert_eq!(offset_of!(KeySlot, sha256), 760);
        assert_eq!(offset_of!(KeySlot, sha512), 1384);
        assert_eq!((size_of::<Scratch>(), align_of::<Scratch>()), (1936, 8));
    }

    #[test]
    fn every_key_length_agrees_with_the_crates() {
        for len in 1..=crate::wire::KEY_MAX {
            let key = key(len, 3);
            let prepared = PreparedKey::new(&key);
            for kind in KINDS {
                let mut request = request(len.to_le_bytes()[0]);
                key.sign(kind, &mut request);
                assert!(check(prepared.dangerous_slot(), &request), "{kind:?}, key of {len}");
                request.hash[len % 64] ^= 1 << (len % 8);
                assert!(!check(prepared.dangerous_slot(), &request), "{kind:?}, key of {len}");
            }
        }
    }

    #[test]
    fn one_flipped_bit_anywhere_is_seen() {
        for len in EDGES {
            let key = key(len, 9);
            let prepared = PreparedKey::new(&key);
            for kind in KINDS {
                let mut good = request(1);
                key.sign(kind, &mut good);
                for byte in (0..176).filter(|&byte| byte != 1) {
                    let mut bytes: [u8; 176] = zerocopy::transmute!(good);
                    bytes[byte] ^= 1 << (byte % 8);
                    assert!(!check(prepared.dangerous_slot(), &zerocopy::transmute!(bytes)), "{kind:?} {len} {byte}");
                }
            }
        }
    }

    #[test]
    fn without_a_key_or_a_digest_nothing_is_right() {
        let empty = KeySlot::new_zeroed();
        let key = key(20, 1);
        for kind in KINDS {
            let mut request = request(4);
            key.sign(kind, &mut request);
            assert!(!check(&empty, &request));
        }
        let mut request = request(4);
        key.sign(HashKind::None, &mut request);
        assert!(!check(PreparedKey::new(&key).dangerous_slot(), &request));
    }

    #[test]
    fn a_prepared_key_is_not_printed() {
        assert_eq!(format!("{:?}", PreparedKey::new(&key(20, 1))), "PreparedKey(..)");
    }

    proptest! {
        #[test]
        fn any_key_and_request_agree_with_the_crates(
            key in proptest::collection::vec(any::<u8>(), 1..=4096),
            bytes in any::<[u8; 32]>(),
            kind in 1..=3_usize,
            flip in proptest::option::of(0..512_usize),
        ) {
            let key = Key::new(&key).unwrap();
            let kind = HashKind::ALL[kind];
            let mut request = request(bytes[0]);
            request.domain[..32].copy_from_slice(&bytes);
            key.sign(kind, &mut request);
            if let Some(bit) = flip {
                request.hash[bit / 8] ^= 1 << (bit % 8);
            }
            prop_assert_eq!(check(PreparedKey::new(&key).dangerous_slot(), &request), key.verify(&request));
        }
    }
}
