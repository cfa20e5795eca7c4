//! Checking `H(key || request with a zero hash field)` where the key is up to 4096 bytes and time is short.
//!
//! User space absorbs the key's whole blocks once ([`PreparedKey`]) and lays out what follows them: the key's tail, a gap of 112
//! bytes for the request's signed part, the 64 zero bytes of the hash field, the padding and the bit count. All of that depends on
//! the key only. What is left to do for a datagram is to copy the template, lay its 112 bytes into the gap and absorb two to four blocks.
//!
//! A midstate is worth as much as the key: it is a secret, wherever it lies.

use core::hint::black_box;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::compress::{Block32, Block64, State32, State64, compress1, compress256, compress512};
use crate::hash::HashKind;
use crate::wire::{HASH_LEN, HASH_OFFSET, Request};

/// Most blocks of 64 bytes that can follow the key's whole blocks: (63 + 176 + 9) / 64.
pub const BLOCKS32: usize = 4;
/// Most blocks of 128 bytes that can follow the key's whole blocks: (127 + 176 + 17) / 128.
pub const BLOCKS64: usize = 3;

/// A key prepared for SHA-1 or SHA-256.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "user", derive(zeroize::Zeroize))]
#[repr(C)]
pub struct Prepared32 {
    /// The state after the key's whole blocks.
    pub midstate: State32,
    /// What follows them, with a gap at `tail_len` for the request.
    pub template: [Block32; BLOCKS32],
    /// Length of the key's tail: 0 to 63.
    pub tail_len: u32,
    /// How many blocks of the template count: 3 or 4.
    pub blocks: u32,
}

/// A key prepared for SHA-512.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "user", derive(zeroize::Zeroize))]
#[repr(C)]
pub struct Prepared64 {
    /// The state after the key's whole blocks.
    pub midstate: State64,
    /// What follows them, with a gap at `tail_len` for the request.
    pub template: [Block64; BLOCKS64],
    /// Length of the key's tail: 0 to 127.
    pub tail_len: u32,
    /// How many blocks of the template count: 2 or 3.
    pub blocks: u32,
}

/// One key as it lies in the map: ready for every kind of digest. All zero is a slot without a key, which verifies nothing.
///
/// No `Debug`: its content is as secret as the key.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "user", derive(zeroize::Zeroize))]
#[repr(C)]
pub struct KeySlot {
    /// 1 where a key is loaded.
    pub loaded: u32,
    /// Zero.
    pub reserved: u32,
    /// For SHA-1.
    pub sha1: Prepared32,
    /// For SHA-256.
    pub sha256: Prepared32,
    /// For SHA-512.
    pub sha512: Prepared64,
}

/// Working memory of one verification; in the kernel it lies in a per-CPU map, as the stack is too small.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Scratch {
    state32: State32,
    state64: State64,
    blocks32: [Block32; BLOCKS32],
    blocks64: [Block64; BLOCKS64],
}

/// The block function and the layout of one kind.
macro_rules! verify_with {
    ($prepared:expr, $request:expr, $state:expr, $blocks:expr, $compress:path, $tail_mask:expr) => {{
        // `copy_from_slice` says that they do not overlap: else it would be a `memmove`, which libbpf cannot link.
        $blocks.copy_from_slice(&$prepared.template);
        // The mask changes nothing in what user space prepared; it is what shows the verifier that the gap lies inside.
        let tail = ($prepared.tail_len & $tail_mask) as usize;
        let Some(gap) = $blocks.as_mut_bytes().get_mut(tail..tail + HASH_OFFSET) else { return false };
        gap.copy_from_slice(signed_part($request));
        $state.copy_from_slice(&$prepared.midstate);
        for (index, block) in (0_u32..).zip($blocks.iter_mut()) {
            if index >= $prepared.blocks {
                break;
            }
            $compress($state, block);
        }
    }};
}

/// Whether the request carries the right digest of this kind. All 64 bytes are compared, in constant time.
/// Never so for [`HashKind::None`], which is no digest, and without a key.
#[inline(always)]
#[must_use]
pub fn verify(slot: &KeySlot, kind: HashKind, request: &Request, scratch: &mut Scratch) -> bool {
    if slot.loaded != 1 {
        return false;
    }
    let Scratch { state32, state64, blocks32, blocks64 } = scratch;
    match kind {
        HashKind::None => false,
        HashKind::Sha1 => {
            verify_with!(slot.sha1, request, state32, blocks32, compress1, 63);
            none(differences32::<5>(state32, &request.hash).into())
        }
        HashKind::Sha256 => {
            verify_with!(slot.sha256, request, state32, blocks32, compress256, 63);
            none(differences32::<8>(state32, &request.hash).into())
        }
        HashKind::Sha512 => {
            verify_with!(slot.sha512, request, state64, blocks64, compress512, 127);
            let (words, _) = request.hash.as_chunks::<8>();
            none(words.iter().zip(state64).fold(0, |all, (word, state)| all | (u64::from_be_bytes(*word) ^ *state)))
        }
    }
}

/// Whether there is no difference. The barrier keeps the compiler from leaving at the first one, which it does without.
#[inline(always)]
fn none(differences: u64) -> bool {
    black_box(differences) == 0
}

/// The bits in which the hash field differs from a digest of `WORDS` words, followed by zeros.
#[inline(always)]
fn differences32<const WORDS: usize>(state: &State32, hash: &[u8; HASH_LEN]) -> u32 {
    let (words, _) = hash.as_chunks::<4>();
    let (digest, padding) = words.split_at(WORDS);
    let wrong = digest.iter().zip(state).fold(0, |all, (word, state)| all | (u32::from_be_bytes(*word) ^ *state));
    padding.iter().fold(wrong, |all, word| all | u32::from_be_bytes(*word))
}

/// The bytes under the digest, at the length that the types know.
#[inline(always)]
fn signed_part(request: &Request) -> &[u8; HASH_OFFSET] {
    let bytes: &[u8; HASH_OFFSET + HASH_LEN] = zerocopy::transmute_ref!(request);
    // Cannot fail, and the compiler sees it.
    bytes.first_chunk().unwrap_or(&[0; HASH_OFFSET])
}

#[cfg(feature = "user")]
pub use prepare::PreparedKey;

#[cfg(feature = "user")]
mod prepare {
    use alloc::boxed::Box;
    use core::fmt;

    use zerocopy::{FromZeros, IntoBytes};
    use zeroize::{Zeroize, Zeroizing};

    use super::{KeySlot, Prepared32, Prepared64};
    use crate::compress::{INITIAL_SHA1, INITIAL_SHA256, INITIAL_SHA512, State32, compress1, compress256, compress512};
    use crate::key::Key;
    use crate::wire::REQUEST_LEN;

    /// A key as the kernel program wants it. Lives on the heap, in one place, and is wiped when dropped.
    pub struct PreparedKey(Box<KeySlot>);

    impl PreparedKey {
        /// Absorbs the key's whole blocks and lays out the templates.
        #[must_use]
        pub fn new(key: &Key) -> Self {
            // On the heap from the start: a move of the box leaves no copy behind.
            let mut slot = Self(Box::new(KeySlot::new_zeroed()));
            let bytes = key.dangerous_bytes();
            slot.0.loaded = 1;
            prepare32(&mut slot.0.sha1, bytes, INITIAL_SHA1, compress1);
            prepare32(&mut slot.0.sha256, bytes, INITIAL_SHA256, compress256);
            prepare64(&mut slot.0.sha512, bytes);
            slot
        }

        /// The secret itself, to be written to the map.
        #[must_use]
        pub fn dangerous_slot(&self) -> &KeySlot {
            &self.0
        }
    }

    impl Drop for PreparedKey {
        fn drop(&mut self) {
            self.0.zeroize();
        }
    }

    impl fmt::Debug for PreparedKey {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("PreparedKey(..)")
        }
    }

    fn prepare32(out: &mut Prepared32, key: &[u8], initial: State32, compress: fn(&mut State32, &mut [u32; 16])) {
        out.midstate = initial;
        let (whole, tail) = key.as_chunks::<64>();
        let mut block = Zeroizing::new([0_u32; 16]);
        for bytes in whole {
            block.as_mut_bytes().copy_from_slice(bytes);
            compress(&mut out.midstate, &mut block);
        }
        out.blocks = lay_out(out.template.as_mut_bytes(), key.len(), tail, 64, 8);
        out.tail_len = length(tail);
    }

    fn prepare64(out: &mut Prepared64, key: &[u8]) {
        out.midstate = INITIAL_SHA512;
        let (whole, tail) = key.as_chunks::<128>();
        let mut block = Zeroizing::new([0_u64; 16]);
        for bytes in whole {
            block.as_mut_bytes().copy_from_slice(bytes);
            compress512(&mut out.midstate, &mut block);
        }
        out.blocks = lay_out(out.template.as_mut_bytes(), key.len(), tail, 128, 16);
        out.tail_len = length(tail);
    }

    /// Writes tail, padding and bit count into a template that is zero otherwise; says how many blocks it takes.
    fn lay_out(template: &mut [u8], key_len: usize, tail: &[u8], block_len: usize, count_len: usize) -> u32 {
        let message_end = tail.len() + REQUEST_LEN;
        let blocks = (message_end + 1 + count_len).div_ceil(block_len);
        // A request's bits and those of 4096 bytes of key fit eight bytes whatever the width of the count.
        let bits = ((key_len + REQUEST_LEN) as u64 * 8).to_be_bytes();
        template[..tail.len()].copy_from_slice(tail);
        template[message_end] = 0x80;
        template[blocks * block_len - 8..blocks * block_len].copy_from_slice(&bits);
        u32::try_from(blocks).unwrap_or(0)
    }

    /// The length of a tail, which is less than 128.
    fn length(tail: &[u8]) -> u32 {
        u32::try_from(tail.len()).unwrap_or(0)
    }
}

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

    /// Verifies with the scratch left dirty by whatever came before, as in the kernel.
    fn check(slot: &KeySlot, request: &Request) -> bool {
        let mut scratch = Scratch::new_zeroed();
        scratch.as_mut_bytes().fill(0xa5);
        verify(slot, request.hash_kind().unwrap(), request, &mut scratch)
    }

    #[test]
    fn layouts_are_pinned() {
        assert_eq!((size_of::<Prepared32>(), align_of::<Prepared32>()), (296, 4));
        assert_eq!((size_of::<Prepared64>(), align_of::<Prepared64>()), (456, 8));
        assert_eq!((size_of::<KeySlot>(), align_of::<KeySlot>()), (1056, 8));
        assert_eq!(offset_of!(KeySlot, sha1), 8);
        assert_eq!(offset_of!(KeySlot, sha256), 304);
        assert_eq!(offset_of!(KeySlot, sha512), 600);
        assert_eq!((size_of::<Scratch>(), align_of::<Scratch>()), (736, 8));
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
