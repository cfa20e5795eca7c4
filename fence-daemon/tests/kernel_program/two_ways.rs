//! The same frames without and with the program, through a real bridge, stack and socket.
//!
//! A request that the socket delivers without the program must also arrive with it, by either way,
//! and once.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT};
use fence_daemon::clock::Moment;
use fence_daemon::intake::kernel::{KernelProgram, Mode, Ring};
use fence_daemon::intake::socket::RequestSocket;
use fence_net::interface::Interface;

use crate::bench::{RULES, in_namespace, ip, key, load};
use crate::frames::{Cable, Frame, UdpChecksum};

/// The way in which a request is expected to arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It does not arrive.
    Refused,
    /// Without the program through the socket, with it through the ring buffer.
    Ring,
    /// Through the socket, with the program or without it.
    Socket,
    /// Only with the program, through the ring buffer: the stack rejects a header field that the
    /// program does not check. The digest is right, so the sender has the key.
    RingOnly,
    /// Only without the program: the one known difference of this kind, see the end of
    /// `fence_common::frame`'s `udp`. A tc program gets such a frame marked as to be segmented.
    Lost,
}

fn cases(v6: bool, mode: Mode) -> Vec<(&'static str, Frame, Way)> {
    let good = || Frame::new(v6);
    let mut all = vec![
        ("as the client sends it", good(), Way::Ring),
        ("a wrong digest", Frame { forged: true, ..good() }, Way::Refused),
        ("to everybody's MAC address", Frame { mac: Some([0xff; 6]), ..good() }, Way::Ring),
        ("to the bridge's MAC address", Frame { mac: Some(BRIDGE_MAC), ..good() }, Way::Ring),
        ("to another's MAC address", Frame { mac: Some([2, 0, 0, 0, 0, 99]), ..good() }, Way::Refused),
        ("a priority tag", Frame { tags: vec![[0x8100, 0xa000]], ..good() }, Way::Ring),
        ("a priority tag, the provider's", Frame { tags: vec![[0x88a8, 0xa000]], ..good() }, Way::Ring),
        // On a bridge the tag is out of the frame, where only tc sees it.
        (
            "another VLAN",
            Frame { tags: vec![[0x8100, 5]], ..good() },
            if mode == Mode::Tcx { Way::Refused } else { Way::RingOnly },
        ),
        ("TTL 0", Frame { ttl: 0, ..good() }, Way::Ring),
        ("TTL 255", Frame { ttl: 255, ..good() }, Way::Ring),
        ("source port 0", Frame { source_port: 0, ..good() }, Way::Ring),
        ("a trailer", Frame { trailer: 40, ..good() }, Way::Ring),
        ("a wrong UDP checksum", Frame { udp_checksum: UdpChecksum::Wrong, ..good() }, Way::RingOnly),
        ("more IP than UDP", Frame { ip_len: 4, trailer: 4, ..good() }, Way::Ring),
        ("more UDP than IP", Frame { udp_len: 4, ..good() }, Way::Refused),
        // To an IPv6 stack this is a jumbogram.
        ("a UDP length of 0", Frame { udp_len: -184, ..good() }, if v6 { Way::Socket } else { Way::Refused }),
        ("cut IP", Frame { ip_len: -4, ..good() }, Way::Refused),
        ("claimed IP", Frame { ip_len: 4, ..good() }, Way::Refused),
        ("two requests to be cut apart", Frame { segments: 2, ..good() }, Way::Socket),
        (
            "a request and a rest to be cut apart",
            Frame { more: 20, ..good() },
            if mode == Mode::Tcx { Way::Socket } else { Way::Lost },
        ),
        ("five requests to be cut apart", Frame { segments: 5, ..good() }, Way::Socket),
    ];
    let from = |source: &str| Frame { source: source.parse().unwrap(), ..Frame::new(v6) };
    if v6 {
        all.extend([
            ("no UDP checksum", Frame { udp_checksum: UdpChecksum::Zero, ..good() }, Way::RingOnly),
            ("from a link-local address", from("fe80::11"), Way::Ring),
            ("from elsewhere", from("2001:db8::1"), Way::Ring),
            ("from the host itself", from("fd00:122::1"), Way::Ring),
            ("from loopback", from("::1"), Way::Refused),
            ("from nowhere", Frame { callback: Some(crate::frames::guest(true)), ..from("::") }, Way::Socket),
            ("from a group", Frame { callback: Some(crate::frames::guest(true)), ..from("ff02::1") }, Way::Refused),
            ("called back elsewhere", Frame { callback: Some("fd00:122::99".parse().unwrap()), ..good() }, Way::Ring),
            (
                "hop-by-hop options",
                Frame { options: vec![17, 0, 1, 4, 0, 0, 0, 0], extension: 0, ..good() },
                Way::Socket,
            ),
            (
                "destination options",
                Frame { options: vec![17, 0, 1, 4, 0, 0, 0, 0], extension: 60, ..good() },
                Way::Socket,
            ),
            (
                "an atomic fragment",
                Frame { options: vec![17, 0, 0, 0, 0, 0, 0, 9], extension: 44, ..good() },
                Way::Socket,
            ),
        ]);
    } else {
        all.extend([
            ("no UDP checksum", Frame { udp_checksum: UdpChecksum::Zero, ..good() }, Way::Ring),
            // The bridge itself drops it.
            ("a wrong IP checksum", Frame { ip_checksum: 1, ..good() }, Way::Refused),
            ("not to be fragmented", Frame { fragment: 0x4000, ..good() }, Way::Ring),
            ("the reserved flag", Frame { fragment: 0x8000, ..good() }, Way::Ring),
            ("a lonely fragment", Frame { fragment: 0x2000, ..good() }, Way::Refused),
            ("options", Frame { options: vec![1; 4], ..good() }, Way::Socket),
            ("router alert", Frame { options: vec![148, 4, 0, 0], ..good() }, Way::Socket),
            ("from elsewhere", from("10.9.8.7"), Way::Ring),
            ("from the host itself", from("192.168.122.1"), Way::RingOnly),
            ("from the network's broadcast", from("192.168.122.255"), Way::Ring),
            ("from loopback", from("127.0.0.1"), Way::Refused),
            ("from nowhere", from("0.0.0.0"), Way::Refused),
            ("from a group", from("225.0.0.12"), Way::Refused),
            ("from everybody", from("255.255.255.255"), Way::Refused),
            (
                "called back elsewhere",
                Frame { callback: Some(IpAddr::from([192, 168, 122, 99])), ..good() },
                Way::Refused,
            ),
        ]);
    }
    all
}

const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The number of arrivals of each request.
#[derive(Debug, Default)]
struct Heard {
    socket: BTreeMap<u32, u32>,
    ring: BTreeMap<u32, u32>,
}

/// Sends the frames, numbered, and collects arrivals until no more come.
fn exchange(v6: bool, frames: &[Frame], mut ring: Option<&mut Ring>) -> Heard {
    let group = if v6 { IpAddr::from(DEFAULT_GROUP_V6) } else { IpAddr::from(DEFAULT_GROUP_V4) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = runtime.enter();
    let socket = RequestSocket::open(group, DEFAULT_PORT, RULES, Some(key())).unwrap();
    socket.join(&Interface::named("virbr0").unwrap()).unwrap();
    let cable = Cable::to("guest0");
    let mut heard = Heard::default();
    for (seqno, frame) in (0..).zip(frames) {
        cable.send(frame, seqno);
        // One after the other, so that no buffer overflows.
        while let Ok(request) =
            runtime.block_on(async { tokio::time::timeout(Duration::from_millis(30), socket.next()).await })
        {
            *heard.socket.entry(request.seqno()).or_default() += 1;
        }
        while let Some(event) = ring.as_deref_mut().and_then(Ring::next) {
            *heard.ring.entry(event.unwrap().request.seqno.get()).or_default() += 1;
        }
    }
    heard
}

fn bridged() {
    ip("link set port0 master virbr0");
    ip("link set virbr0 address 02:00:00:00:00:01");
    ip("addr add 192.168.122.1/24 dev virbr0");
    ip("addr add fd00:122::1/64 dev virbr0 nodad");
    // The guest's end needs no addresses: it would answer by itself.
    ip("addr flush dev guest0");
    // A port forwards a moment after its link is up.
    while !ip("-d link show port0").contains("state forwarding") {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn attached(mode: Mode) -> (KernelProgram, Ring) {
    let mut program = load();
    let mut ring = program.take_ring().unwrap().unwrap();
    // The test has no daemon that shows signs of life.
    ring.beat(Moment::now().plus(Duration::from_secs(3600)));
    program.attach("virbr0", mode).unwrap();
    (program, ring)
}

fn compare(v6: bool, mode: Mode) {
    bridged();
    let cases = cases(v6, mode);
    let frames: Vec<_> = cases.iter().map(|(_, frame, _)| frame.clone()).collect();
    let without = exchange(v6, &frames, None);
    let (program, mut ring) = attached(mode);
    let with = exchange(v6, &frames, Some(&mut ring));
    let mut wrong = Vec::new();
    for (seqno, (name, frame, way)) in (0..).zip(&cases) {
        let count = |heard: &BTreeMap<u32, u32>| heard.get(&seqno).copied().unwrap_or(0);
        let came = (count(&without.socket), count(&with.socket), count(&with.ring));
        let times = u32::try_from(frame.segments).unwrap();
        let expected = match way {
            Way::Refused => (0, 0, 0),
            Way::Ring => (times, 0, times),
            Way::Socket => (times, times, 0),
            Way::RingOnly => (0, 0, times),
            Way::Lost => (times, 0, 0),
        };
        if came != expected {
            wrong.push(format!("{name}: {came:?} instead of {expected:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "(by the socket without the program, by the socket with it, by the ring): {wrong:#?}\n{:?}",
        program.counters()
    );
}

#[test]
fn ipv4_requests_come_with_the_program_as_without() {
    in_namespace(|| compare(false, Mode::Generic));
}

#[test]
fn ipv6_requests_come_with_the_program_as_without() {
    in_namespace(|| compare(true, Mode::Generic));
}

#[test]
fn ipv4_requests_come_with_the_tc_program_as_without() {
    in_namespace(|| compare(false, Mode::Tcx));
}

#[test]
fn ipv6_requests_come_with_the_tc_program_as_without() {
    in_namespace(|| compare(true, Mode::Tcx));
}
