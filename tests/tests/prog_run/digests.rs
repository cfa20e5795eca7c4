//! Digests: every kind, with keys of every interesting length and every possible wrong bit.

use fence_common::hash::HashKind;
use fence_common::verdict::Verdict;
use fence_common::wire::{HASH_OFFSET, REQUEST_LEN, Request};
use zerocopy::IntoBytes as _;

use crate::frames::*;
use crate::program::{Program, listener};

const KEY_LENGTHS: [usize; 18] = [1, 7, 8, 55, 56, 63, 64, 65, 111, 112, 115, 119, 120, 127, 128, 512, 4095, 4096];
const KINDS: [HashKind; 3] = [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512];

#[test]
fn every_digest_with_every_interesting_key_length() {
    let mut program = Program::load(&listener(HashKind::Sha1, true), None);
    for len in KEY_LENGTHS {
        let key = key_of(len);
        program.set_key(Some(&key));
        for kind in KINDS {
            for request in [request_v4(), request_v6()] {
                let good = signed(&key, Request { hash_kind: kind.to_wire(), ..request });
                let frame = |request: &Request| match request.addr_len {
                    4 => ipv4(UNTAGGED, request.as_bytes()),
                    _ => ipv6(UNTAGGED, request.as_bytes()),
                };
                program.expect(&frame(&good), Verdict::Delivered);
                let mut bad = good;
                bad.hash[len % kind.digest_len()] ^= 0x10;
                program.expect(&frame(&bad), Verdict::Digest);
                program.expect(&frame(&signed(&key_of(len ^ 1 | 2), good)), Verdict::Digest);
            }
        }
    }
}

#[test]
fn one_wrong_bit_in_any_byte_of_the_hash_field_is_a_wrong_digest() {
    let mut program = Program::load(&listener(HashKind::Sha1, true), Some(&key()));
    for kind in KINDS {
        let good = signed(&key(), Request { hash_kind: kind.to_wire(), ..request_v4() });
        for byte in 0..good.hash.len() {
            for bit in 0..8 {
                let mut bad = good;
                bad.hash[byte] ^= 1 << bit;
                program.expect(&ipv4(UNTAGGED, bad.as_bytes()), Verdict::Digest);
            }
        }
    }
}

#[test]
fn one_wrong_bit_in_any_byte_under_the_digest_is_never_delivered() {
    let mut program = Program::load(&listener(HashKind::Sha1, true), Some(&key()));
    for kind in KINDS {
        let good = ipv4(UNTAGGED, signed(&key(), Request { hash_kind: kind.to_wire(), ..request_v4() }).as_bytes());
        assert_eq!(good.len(), PAYLOAD_V4 + REQUEST_LEN);
        for byte in 0..HASH_OFFSET {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[PAYLOAD_V4 + byte] ^= 1 << bit;
                let verdict = program.user_space(&bad);
                assert_ne!(verdict, Verdict::Delivered, "{kind:?}: bit {bit} of byte {byte}");
                program.expect(&bad, verdict);
            }
        }
    }
}

#[test]
fn the_digest_of_another_kind_is_wrong() {
    let mut program = Program::load(&listener(HashKind::Sha1, true), Some(&key()));
    for made in KINDS {
        for claimed in KINDS.into_iter().filter(|kind| *kind != made) {
            let mut request = Request { hash_kind: claimed.to_wire(), ..request_v4() };
            request.hash = key().request_digest(made, &request);
            program.expect(&ipv4(UNTAGGED, request.as_bytes()), Verdict::Digest);
        }
    }
}

#[test]
fn either_of_two_keys_is_good_and_the_event_says_which() {
    let mut program = Program::load(&listener(HashKind::Sha1, true), Some(&key_of(64)));
    let (old, new, other) = (key_of(64), key_of(512), key_of(20));
    let frame = |key, kind: HashKind, request: Request| {
        let request = signed(key, Request { hash_kind: kind.to_wire(), ..request });
        if request.addr_len == 4 { ipv4(UNTAGGED, request.as_bytes()) } else { ipv6(UNTAGGED, request.as_bytes()) }
    };
    // As in a rotation: the old key alone, both, the new one alone; and again with the slots
    // exchanged.
    let steps = [
        ([Some(&old), None], [Some(0), None]),
        ([Some(&old), Some(&new)], [Some(0), Some(1)]),
        ([None, Some(&new)], [None, Some(1)]),
        ([Some(&old), Some(&new)], [Some(0), Some(1)]),
        ([Some(&new), Some(&old)], [Some(1), Some(0)]),
        ([None, None], [None, None]),
    ];
    for (slots, good) in steps {
        for (index, key) in (0..).zip(slots) {
            program.set_slot(index, key);
        }
        for kind in KINDS {
            for request in [request_v4(), request_v6()] {
                for (key, slot) in [(&old, good[0]), (&new, good[1]), (&other, None)] {
                    let frame = frame(key, kind, request);
                    let expected = if slot.is_some() { Verdict::Delivered } else { Verdict::Digest };
                    assert_eq!(program.user_space(&frame), expected);
                    assert_eq!(program.run(&frame), expected);
                    assert_eq!(program.event().map(|event| event.slot), slot);
                }
            }
        }
    }
}
