//! Signs the messages between hosts: HMAC-SHA256 (RFC 2104) with the shared key.
//!
//! A label goes before each message. So no signature is a digest of the fence_xvm protocol, which
//! is `H(key || message)` of the same key.

use sha2::Sha256;
use sha2::digest::Digest;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::key::Key;

/// The length of a signature in bytes.
pub const SIGNATURE_LEN: usize = 32;

/// SHA-256's block in bytes.
const BLOCK: usize = 64;

/// What is signed before each message.
const LABEL: &[u8] = b"fence-xdp hosts\n";

/// The signature of a message: HMAC-SHA256 of a label and the message.
#[must_use]
pub fn signature(key: &Key, message: &[u8]) -> [u8; SIGNATURE_LEN] {
    hmac(key.dangerous_bytes(), &[LABEL, message])
}

/// Whether this is the signature of a message. Takes the same time for every wrong one.
pub(super) fn is_signed(key: &Key, message: &[u8], by: &[u8; SIGNATURE_LEN]) -> bool {
    signature(key, message).ct_eq(by).into()
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; SIGNATURE_LEN] {
    let mut block = Zeroizing::new([0_u8; BLOCK]);
    if key.len() > BLOCK {
        let short: [u8; SIGNATURE_LEN] = Sha256::digest(key).into();
        block.iter_mut().zip(short).for_each(|(to, from)| *to = from);
    } else {
        block.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
    }
    let pad = |with: u8| Zeroizing::new(block.map(|byte| byte ^ with));
    let mut inner = Sha256::new_with_prefix(&pad(0x36)[..]);
    parts.iter().for_each(|part| inner.update(part));
    Sha256::new_with_prefix(&pad(0x5c)[..]).chain_update(inner.finalize()).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test cases 2 and 6: a short key, and one that is longer than a block.
    #[test]
    fn it_is_the_hmac_of_the_standard() {
        let hex =
            |bytes: [u8; 32]| bytes.iter().map(|byte| std::format!("{byte:02x}")).collect::<std::string::String>();
        let short = hmac(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        assert_eq!(hex(short), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        let long = hmac(&[0xaa; 131], &[b"Test Using Larger Than Block-Size Key - Hash Key First"]);
        assert_eq!(hex(long), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
    }

    #[test]
    fn another_key_and_another_message_are_not_signed() {
        let (key, other) = (Key::new(b"secret").unwrap(), Key::new(b"other").unwrap());
        let signed = signature(&key, b"message");
        assert!(is_signed(&key, b"message", &signed));
        assert!(!is_signed(&other, b"message", &signed) && !is_signed(&key, b"massage", &signed));
    }
}
