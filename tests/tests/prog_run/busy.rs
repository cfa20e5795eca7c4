//! A run that interrupts another one on the same CPU: without working memory, it passes every frame
//! that needs some.

use fence_common::hash::HashKind;
use fence_common::verdict::{Counters, Verdict};
use zerocopy::IntoBytes as _;

use crate::frames::*;
use crate::program::{Program, listener};

#[test]
fn while_the_working_memory_is_in_use_requests_pass_right_or_wrong() {
    let mut program = Program::load(&listener(HashKind::Sha1, true), Some(&key()));
    let frames: Vec<_> = [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512]
        .into_iter()
        .flat_map(|kind| {
            let [v4, v6] = [request_v4(), request_v6()].map(|mut request| {
                request.hash_kind = kind.to_wire();
                signed(&key(), request)
            });
            let mut forged = v4;
            forged.hash[0] ^= 1;
            [
                (ipv4(UNTAGGED, v4.as_bytes()), Verdict::Delivered),
                (ipv6(UNTAGGED, v6.as_bytes()), Verdict::Delivered),
                (ipv4(UNTAGGED, forged.as_bytes()), Verdict::Digest),
            ]
        })
        .collect();
    program.set_in_use(true);
    for (frame, _) in &frames {
        // `run` also checks that only the owner releases the working memory.
        assert_eq!(program.run(frame), Verdict::Busy);
        assert!(program.event().is_none());
    }
    // Frames that need no working memory are judged as usual.
    program.expect(&ipv4(UNTAGGED, &[0; 175]), Verdict::Length);
    program.expect(&ipv4_to(UNTAGGED, [224, 0, 0, 12], 1229, &[0; 176]), Verdict::NotOurs);
    let expected = Counters { pass_busy: frames.len() as u64, drop_length: 1, ..Counters::default() };
    assert_eq!(program.counters(), expected);

    program.set_in_use(false);
    for (frame, verdict) in &frames {
        program.expect(frame, *verdict);
    }
}
