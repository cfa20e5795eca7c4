//! Finds the request in a frame and judges it: the same code in the kernel program and in user
//! space.
//!
//! Only a frame that is certainly a datagram to our group and port is judged. In doubt the frame is
//! passed to the stack, and the daemon's socket judges what comes out of it.

use zerocopy::FromZeros;

use crate::admit::{Source, admit};
use crate::boundary::{Config, NO_KEY_SLOT, SERVE_V4, SERVE_V6};
use crate::digest::{KeySlot, Scratch, verify};
use crate::hash::HashKind;
use crate::rate_limit::{self, Admission, Check, Room, Sender, Store};
use crate::replay_cache::DatagramId;
use crate::verdict::Verdict;
use crate::wire::{REQUEST_LEN, Request};

/// A frame, read with bounds checks. In the kernel it is the packet itself.
pub trait Packet {
    /// The `N` bytes at `offset`, if the frame has all of them.
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]>;

    /// Whether the frame is at least `len` bytes long.
    fn holds(&self, len: usize) -> bool;
}

impl Packet for &[u8] {
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        self.get(offset..)?.first_chunk()
    }

    fn holds(&self, len: usize) -> bool {
        self.len() >= len
    }
}

/// A datagram of the right length to our group and port.
#[derive(Clone, Copy)]
pub struct Datagram<'p> {
    /// The payload.
    pub request: &'p Request,
    /// The IP source address.
    pub source: Source,
    /// The Ethernet source address.
    pub mac: &'p [u8; 6],
}

/// Checks a request's digest with the accepted keys.
pub trait Verifier {
    /// The slot of the key that the request's digest of this kind is right with.
    fn matching_slot(&self, kind: HashKind, request: &Request, scratch: &mut Scratch) -> Option<u32>;
}

impl Verifier for &[&KeySlot] {
    fn matching_slot(&self, kind: HashKind, request: &Request, scratch: &mut Scratch) -> Option<u32> {
        (0_u32..).zip(*self).find(|(_, slot)| verify(slot, kind, request, scratch)).map(|(index, _)| index)
    }
}

const SOURCE_MAC: usize = 6;
const ETHERNET_LEN: usize = 14;
const VLAN_TAG_LEN: usize = 4;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const UDP_LEN: usize = 8;
const DATAGRAM_LEN: usize = UDP_LEN + REQUEST_LEN;

/// The length in bytes of the longest frame that can hold a request.
#[allow(clippy::cast_possible_truncation, reason = "242")]
pub const FRAME_MAX: u32 = (ETHERNET_LEN + VLAN_TAG_LEN + IPV6_LEN + DATAGRAM_LEN) as u32;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const VLAN_SERVICE: u16 = 0x88a8;

const PROTOCOL_UDP: u8 = 17;

impl Datagram<'_> {
    /// The sender.
    #[inline(always)]
    #[must_use]
    pub fn sender(&self) -> Sender {
        Sender::new(&self.source, *self.mac)
    }

    /// The datagram's identity. Meaningless if it carries no digest.
    #[inline(always)]
    #[must_use]
    pub fn datagram_id(&self) -> &DatagramId {
        DatagramId::at(self.request)
    }
}

/// Finds the request in a frame.
///
/// # Errors
/// The [`Verdict`] on a frame without a request to judge.
#[inline(always)]
pub fn classify<'p, P: Packet>(packet: &'p P, config: &Config) -> Result<Datagram<'p>, Verdict> {
    let Some(ether_type) = packet.bytes::<2>(ETHERNET_LEN - 2) else { return Err(Verdict::NotOurs) };
    match u16::from_be_bytes(*ether_type) {
        IPV4 => ipv4(packet, ETHERNET_LEN, config, false),
        IPV6 => ipv6(packet, ETHERNET_LEN, config, false),
        VLAN | VLAN_SERVICE => {
            let Some(&[tag_high, tag_low, type_high, type_low]) = packet.bytes::<4>(ETHERNET_LEN) else {
                return Err(Verdict::NotOurs);
            };
            // VLAN 0 is no VLAN: such a tag carries a priority only.
            let foreign = u16::from_be_bytes([tag_high, tag_low]) & 0x0fff != 0;
            match u16::from_be_bytes([type_high, type_low]) {
                IPV4 => ipv4(packet, ETHERNET_LEN + VLAN_TAG_LEN, config, foreign),
                IPV6 => ipv6(packet, ETHERNET_LEN + VLAN_TAG_LEN, config, foreign),
                _ => Err(Verdict::NotOurs),
            }
        }
        _ => Err(Verdict::NotOurs),
    }
}

#[inline(always)]
fn ipv4<'p, P: Packet>(packet: &'p P, start: usize, config: &Config, foreign: bool) -> Result<Datagram<'p>, Verdict> {
    let Some(header) = packet.bytes::<IPV4_LEN>(start) else { return Err(Verdict::NotOurs) };
    // The destination first: most other traffic leaves here.
    if header[16] != config.group_v4[0] || header[16..20] != config.group_v4 || config.families & SERVE_V4 == 0 {
        return Err(Verdict::NotOurs);
    }
    if header[9] != PROTOCOL_UDP {
        return Err(Verdict::NotOurs);
    }
    match header[0] {
        0x45 => {}
        0x46..=0x4f => return Err(Verdict::Options),
        _ => return Err(Verdict::Malformed),
    }
    // More fragments, or an offset. The two bits above do not concern fragments.
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(Verdict::Fragment);
    }
    let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if total_len < IPV4_LEN + UDP_LEN || !packet.holds(start + total_len) {
        return Err(Verdict::Malformed);
    }
    let source = [header[12], header[13], header[14], header[15]];
    let payload = total_len - IPV4_LEN;
    let request = udp(packet, start + IPV4_LEN, payload, config).map_err(|verdict| verdict.on_segment(foreign))?;
    // 0.0.0.0/8, loopback, multicast and above.
    if matches!(source[0], 0 | 127 | 224..) {
        return Err(Verdict::Martian);
    }
    let Some(mac) = packet.bytes(SOURCE_MAC) else { return Err(Verdict::Malformed) };
    if foreign {
        return Err(Verdict::ForeignVlan);
    }
    Ok(Datagram { request, source: Source::V4(source), mac })
}

#[inline(always)]
fn ipv6<'p, P: Packet>(packet: &'p P, start: usize, config: &Config, foreign: bool) -> Result<Datagram<'p>, Verdict> {
    let Some(header) = packet.bytes::<IPV6_LEN>(start) else { return Err(Verdict::NotOurs) };
    // The first byte decides for nearly all frames; comparing sixteen takes sixteen times as long.
    if header[24] != config.group_v6[0] || header[24..40] != config.group_v6 || config.families & SERVE_V6 == 0 {
        return Err(Verdict::NotOurs);
    }
    if header[0] >> 4 != 6 {
        return Err(Verdict::Malformed);
    }
    match header[6] {
        PROTOCOL_UDP => {}
        // Hop-by-hop, routing, fragment, ESP, AH, destination options, mobility, HIP, shim6,
        // experiments.
        0 | 43 | 44 | 50 | 51 | 60 | 135 | 139 | 140 | 253 | 254 => return Err(Verdict::Extension),
        _ => return Err(Verdict::NotOurs),
    }
    let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if payload < UDP_LEN || !packet.holds(start + IPV6_LEN + payload) {
        return Err(Verdict::Malformed);
    }
    let mut source = [0; 16];
    source.copy_from_slice(&header[8..24]);
    let request = udp(packet, start + IPV6_LEN, payload, config).map_err(|verdict| verdict.on_segment(foreign))?;
    // Multicast, and all that begins with a zero byte, loopback included.
    if matches!(source[0], 0 | 0xff) {
        return Err(Verdict::Martian);
    }
    let Some(mac) = packet.bytes(SOURCE_MAC) else { return Err(Verdict::Malformed) };
    if foreign {
        return Err(Verdict::ForeignVlan);
    }
    Ok(Datagram { request, source: Source::V6(source), mac })
}

/// The request behind the UDP header at `start`. The frame holds `payload` bytes of IP payload.
#[inline(always)]
fn udp<'p, P: Packet>(packet: &'p P, start: usize, payload: usize, config: &Config) -> Result<&'p Request, Verdict> {
    let Some(&[_, _, port_high, port_low, len_high, len_low, ..]) = packet.bytes::<UDP_LEN>(start) else {
        return Err(Verdict::Malformed);
    };
    if u16::from_be_bytes([port_high, port_low]) != config.port {
        return Err(Verdict::NotOurs);
    }
    let len = usize::from(u16::from_be_bytes([len_high, len_low]));
    if len == 0 {
        // An IPv6 stack takes it for a jumbogram, whose length is the payload's.
        return Err(Verdict::Malformed);
    }
    if len > payload {
        return Err(Verdict::Length);
    }
    if len != DATAGRAM_LEN {
        // GSO may have joined datagrams of one length, and nothing in the frame says so. (The last
        // one may be shorter, but then it is no request, and no client sends it.)
        let joined = len > DATAGRAM_LEN && (len - UDP_LEN).is_multiple_of(REQUEST_LEN);
        return Err(if joined { Verdict::Gso } else { Verdict::Length });
    }
    let Some(bytes) = packet.bytes::<REQUEST_LEN>(start + UDP_LEN) else { return Err(Verdict::Malformed) };
    Ok(zerocopy::transmute_ref!(bytes))
}

/// Judges a request: the slot of the key that its digest is right with, or [`NO_KEY_SLOT`] if it
/// needs none. The caller then delivers it, if [`rate_limit::before_delivery`] and
/// [`rate_limit::accept`] allow it. A request without a digest needs neither.
///
/// # Errors
/// The [`Verdict`] on a request that must not act.
#[inline(always)]
pub fn decide<A: Admission, K: Verifier>(
    datagram: &Datagram<'_>,
    config: &Config,
    admission: &mut A,
    keys: &K,
    scratch: &mut Scratch,
) -> Result<u32, Verdict> {
    let Some(rules) = config.rules() else { return Err(Verdict::NotOurs) };
    match admit(datagram.request, &datagram.source, &rules)? {
        // Only where the configuration says `none`: any sender can make it, and no two differ.
        HashKind::None => Ok(NO_KEY_SLOT),
        kind @ (HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512) => {
            admission.before_digest()?;
            keys.matching_slot(kind, datagram.request, scratch).ok_or_else(|| {
                admission.after_failure();
                Verdict::Digest
            })
        }
    }
}

/// The whole judgement of a frame. The kernel program agrees while its ring buffer has room, its
/// working memory is free and the daemon's heartbeat is recent.
///
/// # Errors
/// The [`Verdict`] on a frame that is not delivered. Else the slot, as from [`decide`].
pub fn judge<M: Store>(
    frame: &[u8],
    config: &Config,
    slots: &[&KeySlot],
    memory: &mut M,
    now: u64,
) -> Result<u32, Verdict> {
    if config.rules().is_none() {
        return Err(Verdict::NotOurs);
    }
    let datagram = classify(&frame, config)?;
    let (sender, limits, datagram_id) = (datagram.sender(), &config.limits, datagram.datagram_id());
    let mut check = Check { memory, sender: &sender, datagram_id, limits, now };
    let slot = decide(&datagram, config, &mut check, &slots, &mut Scratch::new_zeroed())?;
    if slot != NO_KEY_SLOT {
        rate_limit::before_delivery(memory, &sender, Room::Ample, limits, now)?;
        if !rate_limit::accept(memory, datagram_id, limits, now) {
            return Err(Verdict::Replay);
        }
    }
    Ok(slot)
}

// The set `prog_run` tries every form and fault of a frame against this code and the kernel
// program. These tests need no kernel.
#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;
    use crate::admit::Rules;
    use crate::boundary::{Listener, empty_slot};
    use crate::digest::PreparedKey;
    use crate::key::Key;
    use crate::memory_store::MemoryStore;
    use crate::rate_limit::Limits;
    use crate::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, FAMILY_V4, HASH_OFFSET};

    const GUEST: [u8; 4] = [192, 168, 122, 11];

    fn config() -> Config {
        Config::new(&Listener {
            group_v4: Some(DEFAULT_GROUP_V4),
            group_v6: Some(DEFAULT_GROUP_V6),
            port: DEFAULT_PORT,
            rules: Rules { min_hash: HashKind::Sha256, strict_source: true },
            limits: Limits::default(),
        })
    }

    /// With a store of its own.
    fn judge(frame: &[u8], config: &Config, slots: &[&KeySlot]) -> Result<u32, Verdict> {
        super::judge(frame, config, slots, &mut MemoryStore::default(), 0)
    }

    fn frame(key: &Key) -> Vec<u8> {
        let mut request = Request::new_zeroed();
        request.op = 1;
        request.address[..4].copy_from_slice(&GUEST);
        request.port.set(DEFAULT_PORT);
        request.family.set(FAMILY_V4);
        key.sign(HashKind::Sha256, &mut request);

        let mut frame = std::vec![0; 12];
        frame.extend(IPV4.to_be_bytes());
        frame.extend([0x45, 0, 0, 204, 0, 0, 0x40, 0, 2, PROTOCOL_UDP, 0, 0]);
        frame.extend(GUEST);
        frame.extend(DEFAULT_GROUP_V4);
        frame.extend([0x9c, 0x40, 0x04, 0xcd, 0, 184, 0, 0]);
        frame.extend(request.as_bytes());
        frame
    }

    #[test]
    fn a_good_request_is_delivered_a_forged_one_dropped_a_cut_one_passed() {
        let key = Key::new(b"secret\n").unwrap();
        let prepared = PreparedKey::new(&key);
        let good = frame(&key);
        let (slot, empty) = (prepared.dangerous_slot(), empty_slot());
        assert_eq!(judge(&good, &config(), &[slot, &empty]), Ok(0));
        assert_eq!(judge(&good, &config(), &[&empty, slot]), Ok(1));
        assert_eq!(judge(&good, &config(), &[&empty, &empty]), Err(Verdict::Digest));
        assert_eq!(judge(&good, &Config::new_zeroed(), &[slot]), Err(Verdict::NotOurs));
        let mut forged = good.clone();
        forged[42 + HASH_OFFSET] ^= 1;
        assert_eq!(judge(&forged, &config(), &[slot]), Err(Verdict::Digest));
        for len in 0..good.len() {
            let expected = if len < 34 { Verdict::NotOurs } else { Verdict::Malformed };
            assert_eq!(judge(&good[..len], &config(), &[slot]), Err(expected), "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_delivered_without_the_key(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            keep in 0..42_usize,
        ) {
            let key = Key::new(b"secret\n").unwrap();
            let mut frame = frame(&key);
            // The beginning of the headers is right, the rest is arbitrary.
            frame.truncate(keep);
            frame.extend(bytes);
            prop_assert!(judge(&frame, &config(), &[PreparedKey::new(&key).dangerous_slot()]).is_err());
        }
    }
}
