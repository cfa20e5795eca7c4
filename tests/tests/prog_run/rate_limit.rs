//! Rate limits per sender. The buckets of these tests refill within ten hours, so no test depends
//! on time.

use fence_common::boundary::{Event, RING_BYTES};
use fence_common::hash::HashKind;
use fence_common::rate_limit::{Limit, Limits, Sender};
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::Request;
use zerocopy::IntoBytes as _;

use crate::frames::*;
use crate::program::{Program, listener, now};

const HOUR: u64 = 3_600_000_000_000;
const ANN: [u8; 4] = [192, 168, 122, 21];
const BOB: [u8; 4] = [192, 168, 122, 22];
const EVE: [u8; 4] = [192, 168, 122, 66];

/// Exactly this number is accepted.
fn only(burst: u64) -> Limit {
    Limit { every_ns: 10 * HOUR, ahead_ns: 10 * HOUR * (burst - 1) }
}

fn program(limits: Limits) -> Program {
    let mut program = Program::load(&listener(HashKind::Sha256, true), Some(&key()));
    program.limit(limits);
    program
}

fn sender(ip: [u8; 4], mac: u8) -> Sender {
    let mut known = Sender { ip: [0; 16], mac: [0x52, 0x54, 0, 0, 0, mac], family: 2 };
    known.ip[..4].copy_from_slice(&ip);
    known
}

#[test]
fn a_sender_that_is_wrong_too_often_is_not_looked_at_and_nobody_else_suffers() {
    let mut program = program(Limits { failures: only(3), ..Limits::NONE });
    for n in 0..3 {
        program.expect(&forged(good_from(EVE, 66, n)), Verdict::Digest);
    }
    program.expect(&forged(good_from(EVE, 66, 3)), Verdict::SourceLimit);
    program.expect(&good_from(EVE, 66, 4), Verdict::SourceLimit);
    // Malformed requests take no token, and keep their own reason.
    program.expect(&sent_by(ipv4(UNTAGGED, &[0; 175]), EVE, 66), Verdict::Length);
    program.expect(&good_from(ANN, 21, 5), Verdict::Delivered);
    // A sender is both addresses: with one of them forged it is another sender.
    program.expect(&good_from(EVE, 67, 6), Verdict::Delivered);
    let known = program.known();
    assert_eq!(known.failed, [(sender(EVE, 66), [3, 2])].into());
    assert_eq!(known.strangers, [3, 0]);
    let expected =
        Counters { delivered: 2, drop_digest: 3, drop_source_limit: 2, drop_length: 1, ..Counters::default() };
    assert_eq!(program.counters(), expected);
}

#[test]
fn a_trusted_sender_has_a_reserve_in_a_flood() {
    let mut program = program(Limits { failures: only(4), strangers: only(10), ..Limits::NONE });
    program.expect(&good_from(ANN, 21, 0), Verdict::Delivered);
    for n in 0..10_u8 {
        program.expect(&forged(good_from([10, 0, 0, n], n, 1)), Verdict::Digest);
    }
    program.expect(&forged(good_from([10, 0, 0, 10], 10, 1)), Verdict::GlobalLimit);
    program.expect(&good_from(BOB, 22, 2), Verdict::GlobalLimit);
    program.expect(&good_from(ANN, 21, 3), Verdict::Delivered);
    // A sender that forges both addresses counts as the victim, but takes none of its tokens.
    for n in 0..14 {
        program.expect(&forged(good_from(ANN, 21, 10 + n)), Verdict::Digest);
    }
    program.expect(&good_from(ANN, 21, 30), Verdict::Delivered);
    let known = program.known();
    assert_eq!(known.trusted, [(sender(ANN, 21), [14, 0, 3])].into());
    assert_eq!((known.failed.len(), known.strangers), (10, [10, 2]));
}

#[test]
fn a_datagram_is_accepted_once_from_any_sender() {
    let mut program = program(Limits { replay_window_ns: HOUR, failures: only(1), ..Limits::NONE });
    let first = good_from(ANN, 21, 0);
    program.expect(&first, Verdict::Delivered);
    program.expect(&first, Verdict::Replay);
    let by_eve = with(first.clone(), 11, &[66]);
    for _ in 0..5 {
        // A duplicate costs no digest and so no token, and does not make its sender trusted.
        program.expect(&by_eve, Verdict::Replay);
        program.expect(&forged(by_eve.clone()), Verdict::Replay);
    }
    assert_eq!(program.known().trusted.len(), 1);
    assert!(program.known().failed.is_empty());
    program.expect(&good_from(ANN, 21, 1), Verdict::Delivered);
    program.expect(&good_v6(), Verdict::Delivered);
    program.expect(&good_v6(), Verdict::Replay);

    // A request that was accepted before the replay window is accepted again, once.
    let request = signed(&key(), Request { random: [9; 6], ..request_v4() });
    let frame = ipv4(UNTAGGED, request.as_bytes());
    program.set_accepted(&request, now() - HOUR / 2);
    program.expect(&frame, Verdict::Replay);
    program.set_accepted(&request, now().saturating_sub(2 * HOUR).max(1));
    if now() > 3 * HOUR {
        program.expect(&frame, Verdict::Delivered);
        program.expect(&frame, Verdict::Replay);
    }
    let in_the_future = signed(&key(), Request { random: [8; 6], ..request_v4() });
    program.set_accepted(&in_the_future, now() + HOUR);
    program.expect(&ipv4(UNTAGGED, in_the_future.as_bytes()), Verdict::Replay);
}

#[test]
fn a_noisy_sender_is_served_up_to_its_bound() {
    let limits = Limits { deliveries: only(256), replay_window_ns: HOUR, ..Limits::NONE };
    let mut program = program(limits);
    for n in 0..256 {
        program.expect(&good_from(EVE, 66, n), Verdict::Delivered);
    }
    let one_more = good_from(EVE, 66, 256);
    program.expect(&one_more, Verdict::DeliveryLimit);
    program.expect(&good_from(ANN, 21, 0), Verdict::Delivered);
    // A request that was not delivered does not count as accepted.
    program.limit(Limits { deliveries: only(300), ..limits });
    program.expect(&one_more, Verdict::Delivered);
    program.expect(&one_more, Verdict::Replay);
    assert_eq!(program.known().trusted[&sender(EVE, 66)], [0, 1, 257]);
}

/// The requests of a cluster that loses its quorum.
#[test]
fn the_defaults_let_a_storm_of_one_guest_pass_though_nobody_reads() {
    let program = program(Limits::default());
    for n in 0..512 {
        assert_eq!(program.run(&good_from(ANN, 21, n)), Verdict::Delivered, "{n}");
    }
    assert_eq!(program.run(&good_from(BOB, 22, 0)), Verdict::Delivered);
    assert_eq!(program.counters(), Counters { delivered: 513, ..Counters::default() });
}

#[test]
fn nobody_fills_the_second_half_of_the_ring_alone() {
    let mut program = program(Limits { deliveries: Limit::per_second(1_000_000, 1_000_000), ..Limits::NONE });
    let half = u32::try_from(RING_BYTES / 2 / (size_of::<Event>() + 8)).expect("few") + 1;
    for n in 0..half {
        assert_eq!(program.run(&good_from(EVE, 66, n)), Verdict::Delivered, "{n} of {half}");
    }
    // For the reserve the sender was quiet before, so it has some tokens of it.
    let more = (0..20).filter(|n| program.run(&good_from(EVE, 66, half + n)) == Verdict::Delivered).count();
    assert!((1..=10).contains(&more), "{more}");
    assert_eq!(program.run(&good_from(EVE, 66, half + 30)), Verdict::RingReserve);
    for n in 0..5 {
        assert_eq!(program.run(&good_from(ANN, 21, n)), Verdict::Delivered);
        assert_eq!(program.run(&good_from(BOB, 22, n)), Verdict::Delivered);
    }
    while program.event().is_some() {}
    // The reserve is used up for seconds ahead; a sender that has not used it is unaffected.
    assert_eq!(program.run(&good_from([10, 0, 0, 9], 9, 0)), Verdict::Delivered);
}

#[test]
fn unsigned_requests_have_no_share_of_the_reserve() {
    let mut program = program(Limits::NONE);
    program.configure(fence_common::boundary::Config::new(&listener(HashKind::None, true)));
    let unsigned = ipv4(UNTAGGED, Request { hash_kind: 0, ..request_v4() }.as_bytes());
    let half = RING_BYTES / 2 / (size_of::<Event>() + 8) + 1;
    for _ in 0..half {
        assert_eq!(program.run(&unsigned), Verdict::Delivered);
    }
    assert_eq!(program.run(&unsigned), Verdict::RingFull);
    assert_eq!(program.run(&good_v4()), Verdict::Delivered);
    assert_eq!(program.event().map(|event| event.slot), Some(fence_common::boundary::NO_KEY_SLOT));
}

#[test]
fn without_a_sign_of_life_what_is_right_passes_and_what_is_wrong_is_dropped() {
    let mut program = program(Limits { replay_window_ns: HOUR, ..Limits::NONE });
    let before = good_from(ANN, 21, 0);
    program.expect(&before, Verdict::Delivered);
    for beat in [0, now().saturating_sub(6_000_000_000)] {
        program.set_heartbeat(beat);
        for n in 1..3 {
            assert_eq!(program.run(&good_from(ANN, 21, n)), Verdict::Stale);
            assert!(program.event().is_none());
        }
        assert_eq!(program.run(&forged(good_from(ANN, 21, 5))), Verdict::Digest);
        assert_eq!(program.run(&before), Verdict::Replay);
    }
    program.set_heartbeat(now());
    // The request was not accepted before, so it is now.
    assert_eq!(program.run(&good_from(ANN, 21, 1)), Verdict::Delivered);
    assert_eq!(program.run(&good_from(ANN, 21, 1)), Verdict::Replay);
}

/// A sender with the key that invents addresses: at most 512 of them become trusted at once.
#[test]
fn a_holder_of_the_key_with_many_addresses_is_one_sender() {
    let mut program = program(Limits { strangers: only(10), deliveries: only(4), ..Limits::NONE });
    program.expect(&good_from(ANN, 21, 0), Verdict::Delivered);
    let made_up = |n: u32| {
        let [.., high, low] = n.to_be_bytes();
        [10, 1, high, low]
    };
    // One or two seconds may pass meanwhile, and one more sender becomes trusted in each.
    let delivered = (0..700).filter(|&n| program.run(&good_from(made_up(n), 66, n)) == Verdict::Delivered).count();
    assert!((515..=560).contains(&delivered), "{delivered}");
    for n in 0..10_u8 {
        let _ = program.run(&forged(good_from([10, 9, 9, n], 99, 1)));
    }
    assert_eq!(program.run(&good_from(BOB, 22, 2)), Verdict::GlobalLimit);
    assert_eq!(program.run(&good_from(ANN, 21, 3)), Verdict::Delivered, "a trusted sender was pushed out");
}
