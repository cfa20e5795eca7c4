//! Every drop reason, and requests that are not dropped as they belong to another segment.

use fence_common::hash::HashKind;
use fence_common::verdict::Verdict;
use fence_common::wire::{DOMAIN_LEN, FAMILY_V4, FAMILY_V6, Request};
use zerocopy::{IntoBytes as _, little_endian};

use crate::frames::*;
use crate::program::{Program, listener};

fn strict() -> Program {
    Program::load(&listener(HashKind::Sha256, true), Some(&key()))
}

/// Every fault of a request, with its verdict. The digests are right, so this is the only fault.
fn faulty() -> Vec<(Request, Verdict)> {
    let good = request_v4();
    let address = |first_four: [u8; 4]| {
        let mut request = good;
        request.address[..4].copy_from_slice(&first_four);
        request
    };
    let mut wrong = signed(&key(), good);
    wrong.hash[31] ^= 1;
    let mut all = vec![
        (Request { domain: [b'x'; DOMAIN_LEN], ..good }, Verdict::Domain),
        (Request { port: little_endian::U16::new(0), ..good }, Verdict::Port),
        (Request { family: little_endian::U32::new(FAMILY_V6), ..good }, Verdict::Family),
        (Request { family: little_endian::U32::new(0), ..good }, Verdict::Family),
        (address([192, 168, 122, 12]), Verdict::Source),
        (address([127, 0, 0, 1]), Verdict::Loopback),
    ];
    for op in [7, 8, 9, 0xff] {
        all.push((Request { op, ..good }, Verdict::Op));
    }
    for hash_kind in [4, 5, 0xff] {
        all.push((Request { hash_kind, ..good }, Verdict::HashUnknown));
    }
    all.push((Request { hash_kind: 0, ..good }, Verdict::Unsigned));
    all.push((Request { hash_kind: 1, ..good }, Verdict::HashWeak));
    for nobody in [[0; 4], [0, 1, 2, 3], [224, 0, 0, 1], [225, 0, 0, 12], [240, 0, 0, 1], [255; 4]] {
        all.push((address(nobody), Verdict::Address));
    }
    let mut all: Vec<_> = all.into_iter().map(|(request, verdict)| (signed(&key(), request), verdict)).collect();
    all.push((wrong, Verdict::Digest));
    all
}

#[test]
fn each_fault_is_dropped_and_counted_by_its_reason() {
    let mut program = strict();
    for (request, verdict) in faulty() {
        program.expect(&ipv4(UNTAGGED, request.as_bytes()), verdict);
        program.expect(&ipv4(tagged(0), request.as_bytes()), verdict);
    }
}

#[test]
fn frames_of_another_vlan_are_passed() {
    let mut program = strict();
    for vlan in [1, 7, 4095] {
        for (request, _) in faulty() {
            program.expect(&ipv4(tagged(vlan), request.as_bytes()), Verdict::ForeignVlan);
        }
        program.expect(&ipv4(tagged(vlan), &[0; 175]), Verdict::ForeignVlan);
        program.expect(&ipv4(tagged(vlan), signed(&key(), request_v4()).as_bytes()), Verdict::ForeignVlan);
        program.expect(&ipv6(tagged(vlan), signed(&key(), request_v6()).as_bytes()), Verdict::ForeignVlan);
    }
}

#[test]
fn a_source_elsewhere_is_taken_where_the_configuration_says_so() {
    let mut program = Program::load(&listener(HashKind::Sha256, false), Some(&key()));
    for (request, verdict) in faulty() {
        let expected = if verdict == Verdict::Source { Verdict::Delivered } else { verdict };
        program.expect(&ipv4(UNTAGGED, request.as_bytes()), expected);
    }
}

#[test]
fn ipv6_requests_are_refused_for_the_same_reasons_but_the_source() {
    let mut program = strict();
    let good = request_v6();
    let ip = |text: &str| {
        let mut request = good;
        let ip: std::net::Ipv6Addr = text.parse().expect("an address");
        request.address[..16].copy_from_slice(&ip.octets());
        request
    };
    for (request, verdict) in [
        (good, Verdict::Delivered),
        (ip("fd00::99"), Verdict::Delivered),
        (ip("::1"), Verdict::Loopback),
        (ip("::"), Verdict::Address),
        (ip("::2"), Verdict::Address),
        (ip("::ffff:192.168.122.11"), Verdict::Address),
        (ip("ff02::1"), Verdict::Address),
        (Request { family: little_endian::U32::new(FAMILY_V4), ..good }, Verdict::Family),
        (Request { op: 7, ..good }, Verdict::Op),
    ] {
        program.expect(&ipv6(UNTAGGED, signed(&key(), request).as_bytes()), verdict);
    }
}

#[test]
fn another_length_is_dropped() {
    let mut program = strict();
    let request = signed(&key(), request_v4());
    let mut long = request.as_bytes().to_vec();
    for len in (0..176).chain(177..=351).chain([353, 1400]) {
        long.resize(len, 0);
        program.expect(&ipv4(UNTAGGED, &long), Verdict::Length);
        program.expect(&ipv6(UNTAGGED, &long), Verdict::Length);
    }
}

#[test]
fn a_frame_from_an_impossible_source_passes() {
    // With any callback address allowed, and with a digest that is right: the source is all that
    // is odd.
    let mut program = Program::load(&listener(HashKind::Sha256, false), Some(&key()));
    for (first, verdict) in (0..=u8::MAX).map(|first| match first {
        0 | 127 | 224.. => (first, Verdict::Martian),
        _ => (first, Verdict::Delivered),
    }) {
        // The stack checks the header's checksum.
        program.expect(&with(good_v4(), ETHERNET + 12, &[first]), verdict);
    }
    for (source, verdict) in [
        ("::1", Verdict::Martian),
        ("::", Verdict::Martian),
        ("::ffff:192.168.122.11", Verdict::Martian),
        ("ff02::1", Verdict::Martian),
        ("fe80::1", Verdict::Delivered),
        ("2001:db8::1", Verdict::Delivered),
    ] {
        let source: std::net::Ipv6Addr = source.parse().expect("an address");
        program.expect(&with(good_v6(), ETHERNET + 8, &source.octets()), verdict);
    }
}

#[test]
fn several_requests_in_one_frame_pass() {
    let mut program = strict();
    let [v4, v6] = [request_v4(), request_v6()].map(|request| signed(&key(), request));
    for count in [2, 3, 8] {
        program.expect(&ipv4(UNTAGGED, &v4.as_bytes().repeat(count)), Verdict::Gso);
        program.expect(&ipv6(UNTAGGED, &v6.as_bytes().repeat(count)), Verdict::Gso);
        program.expect(&ipv4(tagged(7), &v4.as_bytes().repeat(count)), Verdict::Gso);
        program.expect(&ipv4(UNTAGGED, &v4.as_bytes().repeat(count)[1..]), Verdict::Length);
    }
    // The UDP length must fit into the IP length, also with several requests in a frame.
    let two = ipv4(UNTAGGED, &v4.as_bytes().repeat(2));
    program.expect(&with(two, ETHERNET + 2, &u16::to_be_bytes(20 + 8 + 351)), Verdict::Length);
}

#[test]
fn a_udp_length_that_does_not_fit_is_dropped_and_one_that_leaves_a_rest_is_not() {
    let mut program = strict();
    let request = signed(&key(), request_v4());
    // UDP says 176 bytes, IP has room for only 175, and the frame for all of them.
    let total = u16::to_be_bytes(20 + 8 + 175);
    program.expect(&with(good_v4(), ETHERNET + 2, &total), Verdict::Length);
    // IP has four bytes more than UDP claims: the program cuts them off like the stack.
    let mut longer = request.as_bytes().to_vec();
    longer.extend([0xee; 4]);
    let frame = ipv4(UNTAGGED, &longer);
    program.expect(&with(frame, ETHERNET + 20 + 4, &184_u16.to_be_bytes()), Verdict::Delivered);
}

#[test]
fn without_a_key_only_what_needs_none_is_taken() {
    let mut program = Program::load(&listener(HashKind::None, true), None);
    for kind in [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512] {
        let request = signed(&key(), Request { hash_kind: kind.to_wire(), ..request_v4() });
        program.expect(&ipv4(UNTAGGED, request.as_bytes()), Verdict::Digest);
    }
    program.expect(&ipv4(UNTAGGED, Request { hash_kind: 0, ..request_v4() }.as_bytes()), Verdict::Delivered);
}

#[test]
fn the_minimum_is_a_minimum() {
    let mut program = Program::load(&listener(HashKind::Sha256, true), Some(&key()));
    for minimum in HashKind::ALL {
        program.configure(fence_common::boundary::Config::new(&listener(minimum, true)));
        for kind in HashKind::ALL {
            let request = signed(&key(), Request { hash_kind: kind.to_wire(), ..request_v4() });
            let expected = match kind {
                _ if kind >= minimum => Verdict::Delivered,
                HashKind::None => Verdict::Unsigned,
                HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512 => Verdict::HashWeak,
            };
            program.expect(&ipv4(UNTAGGED, request.as_bytes()), expected);
        }
    }
}
