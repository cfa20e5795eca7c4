//! The shared secret and its digests: `H(key || message)`.
//!
//! User space uses the `sha1` and `sha2` crates. The kernel program's own code (`digest`) is tested
//! against this.

use alloc::vec::Vec;
use core::fmt;

use sha1::Sha1;
use sha2::digest::Digest;
use sha2::{Sha256, Sha512};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::hash::HashKind;
use crate::wire::{HASH_LEN, KEY_MAX, Request};

/// The label that a fingerprint's digest begins with, before the key.
const FINGERPRINT_LABEL: &[u8] = b"fence-xdp key fingerprint\n";

/// A key file's bytes: 1 to 4096. Wiped on drop and never printed.
#[derive(Clone)]
pub struct Key(Zeroizing<Vec<u8>>);

/// Why bytes are no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// An empty key would let anybody sign.
    #[error("the key is empty")]
    Empty,
}

impl Key {
    /// The key in a key file's bytes, verbatim: a trailing newline counts. Only the first 4096
    /// bytes count, as with stock peers.
    ///
    /// # Errors
    /// [`KeyError::Empty`] if there are none.
    pub fn new(bytes: &[u8]) -> Result<Self, KeyError> {
        if bytes.is_empty() {
            return Err(KeyError::Empty);
        }
        Ok(Self(Zeroizing::new(bytes[..bytes.len().min(KEY_MAX)].to_vec())))
    }

    /// The secret itself. Never log it, and never copy it into memory that is not wiped.
    #[must_use]
    pub fn dangerous_bytes(&self) -> &[u8] {
        &self.0
    }

    /// A short number by which people compare keys: the beginning of SHA-256 of a label and the
    /// key. The label goes first, so it is never a digest of the protocol.
    /// `docs/reference/doctor.md` has the same in shell.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 8] {
        let digest = Sha256::new_with_prefix(FINGERPRINT_LABEL).chain_update(&self.0[..]).finalize();
        let mut short = [0; 8];
        short.iter_mut().zip(digest).for_each(|(short, byte)| *short = byte);
        short
    }

    /// `H(key || parts...)`, zero-padded to 64 bytes. For [`HashKind::None`] all zero.
    #[must_use]
    pub fn digest(&self, kind: HashKind, parts: &[&[u8]]) -> [u8; HASH_LEN] {
        fn run<D: Digest>(key: &[u8], parts: &[&[u8]]) -> [u8; HASH_LEN] {
            let mut hasher = D::new_with_prefix(key);
            for part in parts {
                hasher.update(part);
            }
            let digest = hasher.finalize();
            let mut field = [0; HASH_LEN];
            field[..digest.len()].copy_from_slice(&digest);
            field
        }
        match kind {
            HashKind::None => [0; HASH_LEN],
            HashKind::Sha1 => run::<Sha1>(&self.0, parts),
            HashKind::Sha256 => run::<Sha256>(&self.0, parts),
            HashKind::Sha512 => run::<Sha512>(&self.0, parts),
        }
    }

    /// The digest that a request of this content must carry.
    #[must_use]
    pub fn request_digest(&self, kind: HashKind, request: &Request) -> [u8; HASH_LEN] {
        self.digest(kind, &[request.signed_part(), &[0; HASH_LEN]])
    }

    /// Writes kind and digest into a request, as a client does.
    pub fn sign(&self, kind: HashKind, request: &mut Request) {
        request.hash_kind = kind.to_wire();
        request.hash = self.request_digest(kind, request);
    }

    /// Whether the request's digest is right. Compares all 64 bytes in constant time. Never true
    /// for a request that names no digest or an unknown one.
    #[must_use]
    pub fn verify(&self, request: &Request) -> bool {
        match request.hash_kind() {
            None | Some(HashKind::None) => false,
            Some(kind) => self.request_digest(kind, request).ct_eq(&request.hash).into(),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn empty_is_no_key_and_only_4096_bytes_count() {
        assert_eq!(Key::new(b"").err(), Some(KeyError::Empty));
        let long = Key::new(&[7; KEY_MAX + 100]).unwrap();
        assert_eq!(long.dangerous_bytes().len(), KEY_MAX);
        assert_eq!(std::format!("{long:?}"), "Key(4096 bytes)");
    }

    #[test]
    fn one_flipped_bit_anywhere_is_refused() {
        let key = Key::new(b"secret\n").unwrap();
        for kind in [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512] {
            let mut request = Request::new_zeroed();
            key.sign(kind, &mut request);
            assert!(key.verify(&request));
            for byte in 0..size_of::<Request>() {
                // Byte 1 is the kind: a flip there may name no digest at all, which verifies
                // neither.
                let mut bytes: [u8; 176] = zerocopy::transmute!(request);
                bytes[byte] ^= 1;
                assert!(!key.verify(&zerocopy::transmute!(bytes)), "{kind:?}: byte {byte}");
            }
        }
    }

    #[test]
    fn no_digest_is_never_a_right_digest() {
        let key = Key::new(b"secret").unwrap();
        let mut request = Request::new_zeroed();
        key.sign(HashKind::None, &mut request);
        assert!(!key.verify(&request));
    }
}
