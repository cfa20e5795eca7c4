//! Events of the ring buffer, and the program's behaviour when it is full.

use fence_common::admit::Source;
use fence_common::boundary::{ABI_VERSION, Event, KEY_SLOT_ACTIVE, RING_BYTES};
use fence_common::hash::HashKind;
use fence_common::rate_limit::Limits;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::Request;
use zerocopy::{IntoBytes as _, little_endian};

use crate::frames::*;
use crate::program::{Program, listener, now};

fn program() -> Program {
    Program::load(&listener(HashKind::Sha256, true), Some(&key()))
}

/// No rate limit; only the replay cache is active.
fn once() -> Limits {
    Limits { replay_window_ns: u64::MAX, ..Limits::NONE }
}

#[test]
fn an_event_holds_the_datagram_its_source_interface_and_time() {
    let mut program = program();
    let mut last = now();
    for (request, source, frame) in [
        (request_v4(), Source::V4(GUEST_V4), ipv4 as fn(_, &[u8]) -> Vec<u8>),
        (request_v6(), Source::V6(GUEST_V6), ipv6),
    ] {
        for seqno in 0..50 {
            let request = signed(&key(), Request { seqno: little_endian::U32::new(seqno), ..request });
            assert_eq!(program.run(&frame(UNTAGGED, request.as_bytes())), Verdict::Delivered);
            let event = program.event().expect("an event");
            assert_eq!(event.abi, ABI_VERSION);
            assert_eq!(event.request.as_bytes(), request.as_bytes());
            assert_eq!(event.source(), source);
            assert_eq!(event.slot, KEY_SLOT_ACTIVE);
            // A test run uses the loopback interface, the first one of every network namespace.
            assert_eq!(event.ifindex, 1);
            assert!(event.arrived_ns >= last, "time runs forward");
            last = event.arrived_ns;
            assert!(last <= now(), "and is that of CLOCK_MONOTONIC");
        }
    }
    // The bytes after an IPv4 source are zero, not left from an earlier record.
    assert_eq!(program.run(&good_v4()), Verdict::Delivered);
    assert_eq!(program.event().expect("an event").source[4..], [0; 12]);
}

#[test]
fn a_full_ring_passes_and_loses_nothing_that_is_in_it() {
    let mut program = program();
    program.limit(once());
    let room = RING_BYTES / (size_of::<Event>() + 8);
    // From many senders, as one cannot fill the ring. And no more of them than may become trusted
    // at once.
    let frame = |seqno: usize| {
        let seqno = u32::try_from(seqno).expect("few");
        let [.., high, low] = (seqno % 400).to_be_bytes();
        good_from([10, 1, high, low], 1, seqno)
    };
    for seqno in 0..room {
        assert_eq!(program.run(&frame(seqno)), Verdict::Delivered, "request {seqno} of {room}");
    }
    for seqno in room..room + 10 {
        assert_eq!(program.run(&frame(seqno)), Verdict::RingFull);
        assert_eq!(program.run(&frame(seqno)), Verdict::RingFull, "what was passed is not taken for a copy");
    }
    // A bad request is dropped all the same.
    assert_eq!(program.run(&forged(frame(room + 10))), Verdict::Digest);

    let expected = Counters { delivered: room as u64, pass_ring_full: 20, drop_digest: 1, ..Counters::default() };
    assert_eq!(program.counters(), expected);
    for seqno in 0..room {
        let event = program.event().expect("an event");
        assert_eq!(event.request.seqno.get() as usize, seqno);
    }
    assert!(program.event().is_none());
    assert_eq!(program.run(&frame(room)), Verdict::Delivered);
}
