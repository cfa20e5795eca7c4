//! Frames that are not requests, and doubtful frames: all of them pass, each with its reason.

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6FlowLabel,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, PacketBuilder,
};
use fence_common::boundary::{ABI_VERSION, Config};
use fence_common::hash::HashKind;
use fence_common::verdict::{Counters, Verdict};
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::frames::*;
use crate::program::{Program, SHORTEST, listener};

fn program() -> Program {
    Program::load(&listener(HashKind::Sha256, true), Some(&key()))
}

#[test]
fn good_requests_are_delivered() {
    let mut program = program();
    program.expect(&good_v4(), Verdict::Delivered);
    program.expect(&good_v6(), Verdict::Delivered);
    // A priority tag does not change the segment.
    program.expect(&ipv4(tagged(0), signed(&key(), request_v4()).as_bytes()), Verdict::Delivered);
    program.expect(&ipv6(tagged(0), signed(&key(), request_v6()).as_bytes()), Verdict::Delivered);
    // A service tag is a VLAN tag.
    let service = with(ipv4(tagged(0), signed(&key(), request_v4()).as_bytes()), 12, &[0x88, 0xa8]);
    program.expect(&service, Verdict::Delivered);
    // Padding and a trailer belong to the link layer.
    for rest in [1, 4, 60] {
        let mut padded = good_v4();
        padded.extend(vec![0xaa; rest]);
        program.expect(&padded, Verdict::Delivered);
    }
}

#[test]
fn cut_frames_pass_at_every_length() {
    let mut program = program();
    let tagged_v4 = ipv4(tagged(0), signed(&key(), request_v4()).as_bytes());
    let tagged_v6 = ipv6(tagged(0), signed(&key(), request_v6()).as_bytes());
    for (frame, ip, ip_header) in [(good_v4(), 14, 20), (good_v6(), 14, 40), (tagged_v4, 18, 20), (tagged_v6, 18, 40)] {
        for len in 0..frame.len() {
            // Before the IP header is complete, the frame cannot be assigned. After that its
            // lengths do not match the frame.
            let expected = if len < ip + ip_header { Verdict::NotOurs } else { Verdict::Malformed };
            if len < SHORTEST {
                assert_eq!(program.user_space(&frame[..len]), expected);
            } else {
                program.expect(&frame[..len], expected);
            }
        }
    }
}

#[test]
fn other_traffic_passes_uncounted() {
    let mut program = program();
    let request = signed(&key(), request_v4());
    let payload = request.as_bytes();
    let mut others = vec![
        ipv4_to(UNTAGGED, [224, 0, 0, 12], DEFAULT_PORT, payload),
        ipv4_to(UNTAGGED, [192, 168, 122, 1], DEFAULT_PORT, payload),
        ipv4_to(UNTAGGED, DEFAULT_GROUP_V4, DEFAULT_PORT + 1, payload),
        // The port in the wrong byte order.
        ipv4_to(UNTAGGED, DEFAULT_GROUP_V4, DEFAULT_PORT.swap_bytes(), payload),
        ipv6_to(UNTAGGED, [0xff; 16], DEFAULT_PORT, payload),
        ipv6_to(UNTAGGED, DEFAULT_GROUP_V6, DEFAULT_PORT + 1, payload),
        // TCP to the group, ICMPv6 to the group.
        with(good_v4(), ETHERNET + 9, &[6]),
        with(good_v6(), ETHERNET + 6, &[58]),
        // ARP, 802.3 lengths, LLDP.
        with(good_v4(), 12, &[0x08, 0x06]),
        with(good_v4(), 12, &[0x00, 0xcc]),
        with(good_v4(), 12, &[0x88, 0xcc]),
        // This family's header under the other family's Ethernet type.
        with(good_v4(), 12, &[0x86, 0xdd]),
        // The program does not look into two tags.
        ipv4(double_tagged(0, 0), payload),
        ipv4(double_tagged(3, 0), payload),
        // The host's own local multicast has no Ethernet header.
        good_v4().split_off(ETHERNET),
        good_v6().split_off(ETHERNET),
        vec![0; SHORTEST],
        vec![0xff; 1400],
    ];
    others.push(ipv4_to(tagged(5), [224, 0, 0, 12], DEFAULT_PORT, payload));
    for frame in others {
        program.expect(&frame, Verdict::NotOurs);
    }
    assert_eq!(program.counters(), Counters::default());
}

#[test]
fn ipv4_options_pass() {
    let mut program = program();
    let request = signed(&key(), request_v4());
    for len in (4..=40).step_by(4) {
        let mut header =
            Ipv4Header::new(8 + 176, 2, IpNumber::UDP, GUEST_V4, DEFAULT_GROUP_V4).expect("a short payload");
        // Router alert, then end of options.
        let mut options = vec![0; len];
        options[..4].copy_from_slice(&[148, 4, 0, 0]);
        header.options = Ipv4Options::try_from(options.as_slice()).expect("a multiple of four");
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [3; 6])
            .ip(IpHeaders::Ipv4(header, Ipv4Extensions::default()))
            .udp(40_000, DEFAULT_PORT)
            .write(&mut frame, request.as_bytes())
            .expect("a write to memory");
        program.expect(&frame, Verdict::Options);
    }
}

#[test]
fn ipv4_fragments_pass_and_the_other_flags_do_not_make_one() {
    let mut program = program();
    let flags = |bits: u16| with(good_v4(), ETHERNET + 6, &bits.to_be_bytes());
    // First, middle and last fragment; the smallest and the largest offset.
    for bits in [0x2000, 0x2000 | 10, 10, 1, 0x1fff] {
        program.expect(&flags(bits), Verdict::Fragment);
    }
    // "Don't fragment", and the reserved bit.
    for bits in [0, 0x4000, 0x8000] {
        program.expect(&flags(bits), Verdict::Delivered);
    }
}

#[test]
fn ipv6_extension_headers_pass() {
    let mut program = program();
    let request = signed(&key(), request_v6());
    let raw = || Ipv6RawExtHeader::new_raw(IpNumber::UDP, &[1, 4, 0, 0, 0, 0]).expect("eight bytes");
    let fragment =
        || Ipv6FragmentHeader::new(IpNumber::UDP, IpFragOffset::try_new(0).expect("thirteen bits"), true, 77);
    for extensions in [
        Ipv6Extensions { hop_by_hop_options: Some(raw()), ..Ipv6Extensions::default() },
        Ipv6Extensions { destination_options: Some(raw()), ..Ipv6Extensions::default() },
        Ipv6Extensions { fragment: Some(fragment()), ..Ipv6Extensions::default() },
    ] {
        let header = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: 0,
            next_header: IpNumber::UDP,
            hop_limit: 2,
            source: GUEST_V6,
            destination: DEFAULT_GROUP_V6,
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [3; 6])
            .ip(IpHeaders::Ipv6(header, extensions))
            .udp(40_000, DEFAULT_PORT)
            .write(&mut frame, request.as_bytes())
            .expect("a write to memory");
        program.expect(&frame, Verdict::Extension);
    }
    for next in [0, 43, 44, 50, 51, 60, 135, 139, 140, 253, 254] {
        program.expect(&with(good_v6(), ETHERNET + 6, &[next]), Verdict::Extension);
    }
}

#[test]
fn contradicting_lengths_pass() {
    let mut program = program();
    for total in [0, 19, 20, 27, 205, 1500, 0xffff_u16] {
        program.expect(&with(good_v4(), ETHERNET + 2, &total.to_be_bytes()), Verdict::Malformed);
    }
    for payload in [0, 7, 185, 1500, 0xffff_u16] {
        program.expect(&with(good_v6(), ETHERNET + 4, &payload.to_be_bytes()), Verdict::Malformed);
    }
    // UDP length 0: a jumbogram to an IPv6 stack, invalid to an IPv4 stack. The stack decides.
    program.expect(&with(good_v4(), ETHERNET + 20 + 4, &[0, 0]), Verdict::Malformed);
    program.expect(&with(good_v6(), ETHERNET + 40 + 4, &[0, 0]), Verdict::Malformed);
    // An IP version other than the Ethernet type's, or a header that is too short.
    for first in [0x00, 0x40, 0x44, 0x55, 0x65, 0xff] {
        program.expect(&with(good_v4(), ETHERNET, &[first]), Verdict::Malformed);
    }
    for first in [0x00, 0x45, 0x70] {
        program.expect(&with(good_v6(), ETHERNET, &[first]), Verdict::Malformed);
    }
}

#[test]
fn a_family_that_is_not_served_passes() {
    let mut program = program();
    program.configure(Config::new(&fence_common::boundary::Listener {
        group_v6: None,
        ..listener(HashKind::Sha256, true)
    }));
    program.expect(&good_v4(), Verdict::Delivered);
    program.expect(&good_v6(), Verdict::NotOurs);
    program.configure(Config::new(&fence_common::boundary::Listener {
        group_v4: None,
        ..listener(HashKind::Sha256, true)
    }));
    program.expect(&good_v4(), Verdict::NotOurs);
    program.expect(&good_v6(), Verdict::Delivered);
}

#[test]
fn without_a_configuration_of_its_version_the_program_passes_all() {
    let mut program = program();
    let good = Config::new(&listener(HashKind::Sha256, true));
    for config in [
        Config::new_zeroed(),
        Config { abi: ABI_VERSION + 1, ..good },
        Config { abi: 0, ..good },
        Config { enabled: 0, ..good },
        Config { enabled: 0xff, ..good },
        Config { min_hash: 4, ..good },
    ] {
        program.configure(config);
        program.expect(&good_v4(), Verdict::NotOurs);
        program.expect(&ipv4(UNTAGGED, &[0; 3]), Verdict::NotOurs);
    }
}
