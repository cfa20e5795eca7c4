//! A record of the ring buffer. Our own program writes it, but perhaps in another version.

use fence_common::admit::Source;
use fence_common::boundary::{ABI_VERSION, Event};
use fence_common::wire::{FAMILY_V4, FAMILY_V6};
use zerocopy::IntoBytes as _;

/// Checks everything that must hold for a record of these bytes, and for one of this version with
/// these bytes.
///
/// # Panics
/// If something does not hold.
pub fn check(bytes: &[u8]) {
    record(bytes);
    // Few inputs have the right length and version, so these get them.
    let mut event = [0; size_of::<Event>()];
    let len = bytes.len().min(event.len());
    event[..len].copy_from_slice(&bytes[..len]);
    let version = std::mem::offset_of!(Event, abi);
    event[version..version + 4].copy_from_slice(&ABI_VERSION.to_ne_bytes());
    record(&event);
}

fn record(bytes: &[u8]) {
    match Event::decode(bytes) {
        Ok(event) => {
            assert_eq!(event.as_bytes(), bytes, "something was added or lost");
            assert_eq!(event.abi, ABI_VERSION);
            match event.source() {
                Source::V4(octets) => assert!(event.family == FAMILY_V4 && octets == event.source[..4]),
                Source::V6(octets) => assert!(event.family == FAMILY_V6 && octets == event.source),
            }
            crate::request::judged(&event.request, event.source());
        }
        Err(error) => {
            let right = bytes.len() == size_of::<Event>()
                && bytes[8..12] == ABI_VERSION.to_ne_bytes()
                && [FAMILY_V4, FAMILY_V6].iter().any(|family| bytes[16..20] == family.to_ne_bytes());
            assert!(!right, "a good record was refused: {error}");
        }
    }
}
