//! Requests and the frames that carry them.

use etherparse::{DoubleVlanHeader, EtherType, PacketBuilder, SingleVlanHeader, VlanHeader, VlanId, VlanPcp};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, FAMILY_V4, FAMILY_V6, Op, Request};
use zerocopy::{FromZeros as _, IntoBytes as _, little_endian};

/// The guest's address.
pub(crate) const GUEST_V4: [u8; 4] = [192, 168, 122, 11];
/// The guest's IPv6 address.
pub(crate) const GUEST_V6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];

/// Length of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
/// Where the UDP payload of an untagged IPv4 frame starts.
pub(crate) const PAYLOAD_V4: usize = ETHERNET + 20 + 8;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 11];
const GROUP_MAC: [u8; 6] = [1, 0, 0x5e, 0, 0, 12];

/// The tests' usual key.
pub(crate) fn key() -> Key {
    key_of(115)
}

/// A key of some length.
pub(crate) fn key_of(len: usize) -> Key {
    let bytes: Vec<u8> = (0..=u8::MAX).cycle().map(|byte| byte.wrapping_mul(37)).skip(len).take(len).collect();
    Key::new(&bytes).expect("a length of 1 to 4096")
}

/// An unsigned request as the guest's stock client makes it.
pub(crate) fn request_v4() -> Request {
    let mut request = Request::new_zeroed();
    request.op = Op::Off.to_wire();
    request.hash_kind = HashKind::Sha256.to_wire();
    request.addr_len = 4;
    request.domain[..5].copy_from_slice(b"node2");
    request.address[..4].copy_from_slice(&GUEST_V4);
    request.port = little_endian::U16::new(DEFAULT_PORT);
    request.random = [1, 2, 3, 4, 5, 6];
    request.seqno = little_endian::U32::new(314_159);
    request.family = little_endian::U32::new(FAMILY_V4);
    request
}

/// The same over IPv6.
pub(crate) fn request_v6() -> Request {
    let mut request = request_v4();
    request.addr_len = 16;
    request.address[..16].copy_from_slice(&GUEST_V6);
    request.family = little_endian::U32::new(FAMILY_V6);
    request
}

/// The request with a digest of the kind that it names.
pub(crate) fn signed(key: &Key, mut request: Request) -> Request {
    request.hash = key.request_digest(request.hash_kind().unwrap_or(HashKind::Sha256), &request);
    request
}

/// No tag.
pub(crate) const UNTAGGED: Option<VlanHeader> = None;

/// One tag with this VLAN number.
pub(crate) fn tagged(vlan: u16) -> Option<VlanHeader> {
    Some(VlanHeader::Single(single(vlan)))
}

/// Two tags.
pub(crate) fn double_tagged(outer: u16, inner: u16) -> Option<VlanHeader> {
    Some(VlanHeader::Double(DoubleVlanHeader { outer: single(outer), inner: single(inner) }))
}

fn single(vlan: u16) -> SingleVlanHeader {
    SingleVlanHeader {
        pcp: VlanPcp::try_new(5).expect("three bits"),
        drop_eligible_indicator: true,
        vlan_id: VlanId::try_new(vlan).expect("twelve bits"),
        ether_type: EtherType(0),
    }
}

/// An IPv4 frame from the guest to the group's address and port.
pub(crate) fn ipv4(vlan: Option<VlanHeader>, payload: &[u8]) -> Vec<u8> {
    ipv4_to(vlan, DEFAULT_GROUP_V4, DEFAULT_PORT, payload)
}

/// An IPv4 frame from the guest to any address.
pub(crate) fn ipv4_to(vlan: Option<VlanHeader>, to: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let ethernet = PacketBuilder::ethernet2(GUEST_MAC, GROUP_MAC);
    match vlan {
        None => ethernet.ipv4(GUEST_V4, to, 2).udp(40_000, port).write(&mut frame, payload),
        Some(vlan) => ethernet.vlan(vlan).ipv4(GUEST_V4, to, 2).udp(40_000, port).write(&mut frame, payload),
    }
    .expect("a write to memory");
    frame
}

/// An IPv6 frame from the guest to the group's address and port.
pub(crate) fn ipv6(vlan: Option<VlanHeader>, payload: &[u8]) -> Vec<u8> {
    ipv6_to(vlan, DEFAULT_GROUP_V6, DEFAULT_PORT, payload)
}

/// An IPv6 frame from the guest to any address.
pub(crate) fn ipv6_to(vlan: Option<VlanHeader>, to: [u8; 16], port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let ethernet = PacketBuilder::ethernet2(GUEST_MAC, GROUP_MAC);
    match vlan {
        None => ethernet.ipv6(GUEST_V6, to, 2).udp(40_000, port).write(&mut frame, payload),
        Some(vlan) => ethernet.vlan(vlan).ipv6(GUEST_V6, to, 2).udp(40_000, port).write(&mut frame, payload),
    }
    .expect("a write to memory");
    frame
}

/// A good IPv4 frame, signed with [`key`].
pub(crate) fn good_v4() -> Vec<u8> {
    ipv4(UNTAGGED, signed(&key(), request_v4()).as_bytes())
}

/// A good IPv6 frame, signed with [`key`].
pub(crate) fn good_v6() -> Vec<u8> {
    ipv6(UNTAGGED, signed(&key(), request_v6()).as_bytes())
}

/// The frame with some bytes overwritten.
pub(crate) fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

/// A good IPv4 frame, the `n`th of a guest with this address and this last byte of its MAC address.
pub(crate) fn good_from(ip: [u8; 4], mac: u8, n: u32) -> Vec<u8> {
    let mut request = Request { seqno: little_endian::U32::new(n), ..request_v4() };
    request.address[..4].copy_from_slice(&ip);
    sent_by(ipv4(UNTAGGED, signed(&key(), request).as_bytes()), ip, mac)
}

/// The frame with another IPv4 source and another last byte of the MAC address.
pub(crate) fn sent_by(frame: Vec<u8>, ip: [u8; 4], mac: u8) -> Vec<u8> {
    with(with(frame, ETHERNET + 12, &ip), 11, &[mac])
}

/// The frame with a wrong last byte; in a request this is the end of the hash field.
pub(crate) fn forged(mut frame: Vec<u8>) -> Vec<u8> {
    *frame.last_mut().expect("a frame") ^= 1;
    frame
}
