//! Prepares a key once in user space, so that the kernel need not do it per datagram.

use alloc::boxed::Box;
use core::fmt;

use zerocopy::FromZeros;
use zeroize::{Zeroize, Zeroizing};

use super::{KeySlot, Prepared1, Prepared256, Prepared512};
use crate::compress::{
    INITIAL_SHA1, INITIAL_SHA256, INITIAL_SHA512, expand1, expand256, expand512, rounds1, rounds256, rounds512,
};
use crate::key::Key;
use crate::wire::{HASH_OFFSET, REQUEST_LEN};

/// A prepared key for the kernel program. It stays in one place on the heap and is wiped on drop.
pub struct PreparedKey(Box<KeySlot>);

impl PreparedKey {
    /// Prepares a key.
    #[must_use]
    pub fn new(key: &Key) -> Self {
        // On the heap from the start: moving the box leaves no copy behind.
        let mut slot = Self(Box::new(KeySlot::new_zeroed()));
        let bytes = key.dangerous_bytes();
        slot.0.loaded = 1;
        prepare_sha1(&mut slot.0.sha1, bytes);
        prepare_sha256(&mut slot.0.sha256, bytes);
        prepare_sha512(&mut slot.0.sha512, bytes);
        slot
    }

    /// The prepared key with `loaded` 0: what a slot holds while another key is being written to
    /// it.
    #[must_use]
    pub fn unloaded(key: &Key) -> Self {
        let mut slot = Self::new(key);
        slot.0.loaded = 0;
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

/// What follows the key's whole blocks: at most 127 + 176 + 17 bytes, in whole blocks. The
/// request's signed part is zero.
type Rest = Zeroizing<[u8; 384]>;

/// Makes it. Returns it, the number of blocks that the signed part reaches into, and of all blocks.
fn lay_out(key_len: usize, tail: &[u8], block_len: usize, count_len: usize) -> (Rest, usize, usize) {
    let message_end = tail.len() + REQUEST_LEN;
    let open = (tail.len() + HASH_OFFSET).div_ceil(block_len);
    let blocks = (message_end + 1 + count_len).div_ceil(block_len);
    // The bits of 4096 bytes of key and of a request fit eight bytes, however wide the count is.
    let bits = ((key_len + REQUEST_LEN) as u64 * 8).to_be_bytes();
    let mut rest = Zeroizing::new([0; 384]);
    rest[..tail.len()].copy_from_slice(tail);
    rest[message_end] = 0x80;
    rest[blocks * block_len - 8..blocks * block_len].copy_from_slice(&bits);
    (rest, open, blocks)
}

/// A number of bytes or blocks, less than 128.
fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(0)
}

/// Copies big-endian bytes as numbers.
macro_rules! numbers {
    ($number:ty, $to:expr, $bytes:expr) => {
        let (words, _) = $bytes.as_chunks::<{ size_of::<$number>() }>();
        for (to, from) in $to.iter_mut().zip(words) {
            *to = <$number>::from_be_bytes(*from);
        }
    };
}

/// Prepares a key for one kind. `$open` receives the words around the request, `$closed` the
/// schedules behind it.
macro_rules! prepare {
    ($key:expr, $prepared:expr, $number:ty, $initial:expr, $count_len:literal, $expand:path, $rounds:path,
     $open:expr, $closed:expr) => {
        const BLOCK: usize = 16 * size_of::<$number>();
        let mut block: Zeroizing<[$number; 16]> = Zeroizing::new([0; 16]);
        let mut schedule = Zeroizing::new([0; _]);
        let (whole, tail) = $key.as_chunks::<BLOCK>();
        $prepared.midstate = $initial;
        for bytes in whole {
            numbers!($number, block, bytes);
            $expand(&mut block, &mut schedule);
            $rounds(&mut $prepared.midstate, &schedule);
        }
        let (rest, open, blocks) = lay_out($key.len(), tail, BLOCK, $count_len);
        numbers!($number, $open, rest);
        for (to, bytes) in $closed.iter_mut().zip(rest[open * BLOCK..blocks * BLOCK].as_chunks::<BLOCK>().0) {
            numbers!($number, block, bytes);
            $expand(&mut block, to);
        }
        $prepared.tail_len = count(tail.len());
        $prepared.open_blocks = count(open);
        $prepared.closed_blocks = count(blocks - open);
    };
}

fn prepare_sha1(prepared: &mut Prepared1, key: &[u8]) {
    prepare!(key, prepared, u32, INITIAL_SHA1, 8, expand1, rounds1, prepared.tail, prepared.closed);
}

fn prepare_sha256(prepared: &mut Prepared256, key: &[u8]) {
    prepare!(key, prepared, u32, INITIAL_SHA256, 8, expand256, rounds256, prepared.tail, prepared.closed);
}

fn prepare_sha512(prepared: &mut Prepared512, key: &[u8]) {
    let template = prepared.template.as_flattened_mut();
    let closed = core::slice::from_mut(&mut prepared.closed);
    prepare!(key, prepared, u64, INITIAL_SHA512, 16, expand512, rounds512, template, closed);
}
