//! Kernel and user space give the same verdict on random frames.

use std::cell::RefCell;

use fence_common::boundary::Config;
use fence_common::hash::HashKind;
use fence_common::rate_limit::{Limit, Limits};
use fence_common::verdict::Verdict;
use fence_common::wire::Request;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config as Proptest, TestRunner};
use zerocopy::IntoBytes as _;

use crate::frames::*;
use crate::program::{Form, Program, SHORTEST, listener};

/// A change to a good frame.
#[derive(Clone, Debug)]
enum Mutation {
    /// A bit flipped, anywhere.
    Flip(prop::sample::Index, u8),
    /// A byte set in the first 80, where the headers are.
    Header(usize, u8),
    /// A byte set in the request, counted from the frame's end.
    Request(usize, u8),
    /// Cut to a length.
    Cut(prop::sample::Index),
    /// Bytes appended.
    Pad(Vec<u8>),
    /// Bytes taken out.
    Remove(prop::sample::Index, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let byte = || prop_oneof![any::<u8>(), select(vec![0, 1, 4, 6, 17, 0x45, 0x46, 0x60, 0x81, 0x88, 0xff])];
    prop_oneof![
        2 => (any::<prop::sample::Index>(), 0..8_u8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        4 => (12..80_usize, byte()).prop_map(|(at, byte)| Mutation::Header(at, byte)),
        2 => (1..=176_usize, byte()).prop_map(|(at, byte)| Mutation::Request(at, byte)),
        // Bytes with a meaning: operation, kind, address, port, family.
        4 => (select(vec![0, 1, 68, 69, 71, 96, 97, 108, 109]), byte())
            .prop_map(|(at, byte)| Mutation::Request(176 - at, byte)),
        // A callback address that nobody has: seldom come upon by chance.
        1 => select(vec![0, 127, 224, 255]).prop_map(|byte| Mutation::Request(176 - 68, byte)),
        1 => any::<prop::sample::Index>().prop_map(Mutation::Cut),
        1 => prop::collection::vec(any::<u8>(), 1..64).prop_map(Mutation::Pad),
        1 => (any::<prop::sample::Index>(), 1..8_usize).prop_map(|(at, len)| Mutation::Remove(at, len)),
    ]
}

fn mutate(frame: &mut Vec<u8>, mutation: &Mutation) {
    let len = frame.len();
    match mutation {
        Mutation::Flip(at, bit) => frame[at.index(len)] ^= 1 << bit,
        Mutation::Header(at, byte) if *at < len => frame[*at] = *byte,
        Mutation::Request(from_end, byte) if *from_end <= len => frame[len - from_end] = *byte,
        Mutation::Header(..) | Mutation::Request(..) => {}
        Mutation::Cut(at) => frame.truncate(at.index(len)),
        Mutation::Pad(bytes) => frame.extend(bytes),
        Mutation::Remove(at, count) => {
            let start = at.index(len);
            frame.drain(start..(start + count).min(len));
        }
    }
    // The kernel's test run rejects shorter frames, and every mutation needs a byte to change.
    frame.resize(frame.len().max(SHORTEST), 0);
}

#[test]
fn kernel_and_user_space_agree_on_mutated_frames() {
    for form in Form::ALL {
        agree(form);
    }
}

fn agree(form: Form) {
    let program = RefCell::new(Program::load_as(form, &listener(HashKind::Sha256, true), Some(&key())));
    let tags = vec![UNTAGGED, UNTAGGED, tagged(0), tagged(9), double_tagged(0, 1)];
    let strategy = (
        (any::<bool>(), select(tags), select(HashKind::ALL.to_vec()), 0..=6_u8),
        prop::collection::vec(mutation(), 0..4),
        (select(HashKind::ALL.to_vec()), any::<bool>()),
        // A request is mutated before signing (then its digest is right) or after.
        any::<bool>(),
    );
    let seen = RefCell::new(std::collections::HashMap::<Verdict, u32>::new());
    let mut runner = TestRunner::new(Proptest { cases: 3000, failure_persistence: None, ..Proptest::default() });
    let result = runner.run(&strategy, |((v6, tag, kind, op), mutations, (minimum, strict), sign_last)| {
        let base = if v6 { request_v6() } else { request_v4() };
        let mut request = Request { op, hash_kind: kind.to_wire(), ..base };
        if sign_last {
            for mutation in &mutations {
                if let Mutation::Request(at, byte) = mutation {
                    request.as_mut_bytes()[176 - at] = *byte;
                }
            }
        }
        let request = signed(&key(), request);
        let mut frame = if v6 { ipv6(tag, request.as_bytes()) } else { ipv4(tag, request.as_bytes()) };
        for mutation in &mutations {
            if !(sign_last && matches!(mutation, Mutation::Request(..))) {
                mutate(&mut frame, mutation);
            }
        }
        frame.resize(frame.len().max(form.shortest()), 0);
        let mut program = program.borrow_mut();
        program.configure(Config::new(&listener(minimum, strict)));
        let expected = program.user_space(&frame);
        *seen.borrow_mut().entry(expected).or_default() += 1;
        prop_assert_eq!(program.run(&frame), expected);
        let event = program.event();
        prop_assert_eq!(event.is_some(), expected == Verdict::Delivered);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{form:?}: {error}");
    }
    // Cases of one kind only would prove little.
    let seen = seen.into_inner();
    for verdict in [
        Verdict::Delivered,
        Verdict::NotOurs,
        Verdict::Digest,
        Verdict::HashWeak,
        Verdict::Malformed,
        Verdict::ForeignVlan,
        Verdict::Length,
        Verdict::Fragment,
        Verdict::Family,
        Verdict::Source,
        Verdict::Address,
    ] {
        assert!(seen.contains_key(&verdict), "{form:?}: no case came to {verdict:?}: {seen:?}");
    }
}

/// The next datagram of one of four senders (two IP addresses, two MAC addresses).
#[derive(Clone, Debug)]
enum Step {
    /// A new request.
    Right,
    /// A request that any sender has sent before.
    Again(prop::sample::Index),
    /// A new one with a wrong digest.
    Wrong,
    /// A request that was sent before, with a wrong digest that begins like the right one.
    AlmostAgain(prop::sample::Index),
    /// A request that is too short.
    Short,
    /// A request with another sender's address.
    Elsewhere,
}

fn step() -> impl Strategy<Value = (usize, Step)> {
    let index = any::<prop::sample::Index>;
    let step = prop_oneof![
        4 => Just(Step::Right),
        2 => index().prop_map(Step::Again),
        3 => Just(Step::Wrong),
        1 => index().prop_map(Step::AlmostAgain),
        1 => Just(Step::Short),
        1 => Just(Step::Elsewhere),
    ];
    (0..4_usize, step)
}

/// The memories are empty at first, and the buckets hold a few tokens. No test runs long enough to
/// refill them.
#[test]
fn kernel_and_user_space_agree_on_what_senders_may_still_do() {
    const ADDRESSES: [[u8; 4]; 2] = [[192, 168, 122, 31], [192, 168, 122, 32]];
    let hour = 3_600_000_000_000;
    let only = |burst: u64| Limit { every_ns: 10 * hour, ahead_ns: 10 * hour * (burst - 1) };
    let limits = Limits { failures: only(2), strangers: only(3), deliveries: only(4), replay_window_ns: hour };
    let program = RefCell::new(Program::load(&listener(HashKind::Sha256, true), Some(&key())));
    program.borrow_mut().limit(limits);
    let seen = RefCell::new(std::collections::HashMap::<Verdict, u32>::new());
    let number = std::cell::Cell::new(0_u32);
    let next = || number.replace(number.get() + 1);
    let mut runner = TestRunner::new(Proptest { cases: 200, failure_persistence: None, ..Proptest::default() });
    let result = runner.run(&prop::collection::vec(step(), 1..40), |steps| {
        let mut program = program.borrow_mut();
        program.forget();
        let mut sent: Vec<Vec<u8>> = Vec::new();
        for (who, step) in steps {
            let (ip, mac) = (ADDRESSES[who / 2], 40 + u8::from(who % 2 == 1));
            let frame = match step {
                Step::Right => good_from(ip, mac, next()),
                Step::Wrong => forged(good_from(ip, mac, next())),
                Step::Short => sent_by(ipv4(UNTAGGED, &[0; 175]), ip, mac),
                Step::Elsewhere => sent_by(good_from([192, 168, 122, 99], mac, next()), ip, mac),
                Step::Again(_) | Step::AlmostAgain(_) if sent.is_empty() => continue,
                Step::Again(index) => with(index.get(&sent).clone(), 11, &[mac]),
                Step::AlmostAgain(index) => forged(with(index.get(&sent).clone(), 11, &[mac])),
            };
            let expected = program.user_space(&frame);
            *seen.borrow_mut().entry(expected).or_default() += 1;
            prop_assert_eq!(program.run(&frame), expected);
            prop_assert_eq!(program.event().is_some(), expected == Verdict::Delivered);
            sent.push(frame);
        }
        // Both know the same senders.
        let _ = program.known();
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let seen = seen.into_inner();
    for verdict in [
        Verdict::Delivered,
        Verdict::Length,
        Verdict::Source,
        Verdict::Digest,
        Verdict::Replay,
        Verdict::SourceLimit,
        Verdict::GlobalLimit,
        Verdict::DeliveryLimit,
    ] {
        assert!(seen.contains_key(&verdict), "no case came to {verdict:?}: {seen:?}");
    }
}
