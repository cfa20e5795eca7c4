//! Frames to measure with: a request as a guest sends it, and what else is on a bridge.

use anyhow::{Context, Result};
use etherparse::PacketBuilder;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_PORT, FAMILY_V4, Op, Request};
use zerocopy::{FromZeros as _, IntoBytes as _, little_endian};

const GUEST: [u8; 4] = [192, 168, 122, 11];
const HOST: [u8; 4] = [192, 168, 122, 1];
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 11];
const HOST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const GROUP_MAC: [u8; 6] = [1, 0, 0x5e, 0, 0, 12];

/// A request of the guest's for `off`, signed with `key`.
#[must_use]
pub fn request(key: &Key, kind: HashKind) -> Request {
    let mut request = Request::new_zeroed();
    request.op = Op::Off.to_wire();
    request.hash_kind = kind.to_wire();
    request.addr_len = 4;
    request.domain[..5].copy_from_slice(b"node2");
    request.address[..4].copy_from_slice(&GUEST);
    request.port = little_endian::U16::new(DEFAULT_PORT);
    request.random = [1, 2, 3, 4, 5, 6];
    request.seqno = little_endian::U32::new(314_159);
    request.family = little_endian::U32::new(FAMILY_V4);
    key.sign(kind, &mut request);
    request
}

/// The frame that carries a request to the group.
pub fn to_group(request: &Request) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(GUEST_MAC, GROUP_MAC).ipv4(GUEST, DEFAULT_GROUP_V4, 2);
    builder.udp(40_000, DEFAULT_PORT).write(&mut frame, request.as_bytes()).context("a frame")?;
    Ok(frame)
}

/// A full TCP segment from the guest to the host.
pub fn tcp() -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC).ipv4(GUEST, HOST, 64);
    builder.tcp(40_000, 22, 1, 60_000).write(&mut frame, &[0xa5; 1448]).context("a frame")?;
    Ok(frame)
}

/// A TCP segment over IPv6.
pub fn tcp_v6() -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let address = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
    let builder = PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC).ipv6(address(11), address(1), 64);
    builder.tcp(40_000, 22, 1, 60_000).write(&mut frame, &[0xa5; 1428]).context("a frame")?;
    Ok(frame)
}

/// An ARP request.
#[must_use]
pub fn arp() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(GUEST_MAC);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(GUEST_MAC);
    frame.extend(GUEST);
    frame.extend([0; 6]);
    frame.extend(HOST);
    frame
}

/// Multicast DNS: what other multicast there is.
pub fn mdns() -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(GUEST_MAC, [1, 0, 0x5e, 0, 0, 0xfb]).ipv4(GUEST, [224, 0, 0, 251], 255);
    builder.udp(5353, 5353).write(&mut frame, &[0; 40]).context("a frame")?;
    Ok(frame)
}
