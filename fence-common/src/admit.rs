//! The rules for a request before its digest is checked: the same in the kernel and at the socket.

use crate::bytes::word;
use crate::hash::HashKind;
use crate::wire::{DOMAIN_LEN, FAMILY_V4, FAMILY_V6, HASH_LEN, Request};

/// The IP source address of a datagram, in network order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// An IPv4 address.
    V4([u8; 4]),
    /// An IPv6 address.
    V6([u8; 16]),
}

impl From<core::net::IpAddr> for Source {
    /// An IPv4-mapped IPv6 address counts as IPv4: sockets of both families show IPv4 peers so.
    fn from(ip: core::net::IpAddr) -> Self {
        match ip.to_canonical() {
            core::net::IpAddr::V4(ip) => Self::V4(ip.octets()),
            core::net::IpAddr::V6(ip) => Self::V6(ip.octets()),
        }
    }
}

impl From<Source> for core::net::IpAddr {
    fn from(source: Source) -> Self {
        match source {
            Source::V4(octets) => octets.into(),
            Source::V6(octets) => octets.into(),
        }
    }
}

/// The administrator's rules for requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The weakest digest that is accepted.
    pub min_hash: HashKind,
    /// Whether an IPv4 callback address must be the datagram's source. IPv6 is exempt: the stock
    /// client leaves the choice of its source address to routing.
    pub strict_source: bool,
}

/// Why a request is rejected. Each reason is the peer's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "user", derive(thiserror::Error))]
pub enum Rejection {
    /// Not 176 bytes of UDP payload.
    #[cfg_attr(feature = "user", error("not a request of 176 bytes"))]
    Length,
    /// The operation is unknown.
    #[cfg_attr(feature = "user", error("unknown operation"))]
    Op,
    /// The kind of digest is unknown.
    #[cfg_attr(feature = "user", error("unknown kind of digest"))]
    HashUnknown,
    /// No digest, where one is required.
    #[cfg_attr(feature = "user", error("no digest"))]
    Unsigned,
    /// A weaker digest than the configured minimum.
    #[cfg_attr(feature = "user", error("weaker digest than configured"))]
    HashWeak,
    /// The domain has no NUL.
    #[cfg_attr(feature = "user", error("domain name without end"))]
    Domain,
    /// Callback port 0.
    #[cfg_attr(feature = "user", error("callback port 0"))]
    Port,
    /// The family is unknown or not that of the datagram.
    #[cfg_attr(feature = "user", error("address family is not the datagram's"))]
    Family,
    /// No host can have the callback address.
    #[cfg_attr(feature = "user", error("callback address that no host has"))]
    Address,
    /// The callback address is a loopback address, and the datagram's source is not.
    #[cfg_attr(feature = "user", error("loopback address as callback address"))]
    Loopback,
    /// The IPv4 callback address is not the datagram's source (`strict_source`).
    #[cfg_attr(feature = "user", error("callback address is not the datagram's source"))]
    Source,
    /// The digest is wrong, or there is no key to check it with.
    #[cfg_attr(feature = "user", error("wrong digest"))]
    Digest,
}

/// Checks everything about a request but its digest, and returns the kind of digest to check.
///
/// It returns [`HashKind::None`] only where `rules` allow it. Then there is no digest to check.
///
/// # Errors
/// The first [`Rejection`] in this order: operation, digest kind, domain, port, family, address,
/// loopback, source.
#[inline(always)]
pub fn admit(request: &Request, source: &Source, rules: &Rules) -> Result<HashKind, Rejection> {
    let kind = admit_content(request, rules.min_hash)?;
    if request.port.get() == 0 {
        return Err(Rejection::Port);
    }
    let [a0, a1, a2, a3, ..] = request.address;
    match *source {
        Source::V4(from) => {
            if request.family.get() != FAMILY_V4 {
                return Err(Rejection::Family);
            }
            if !usable_v4(a0) {
                return Err(Rejection::Address);
            }
            // A loopback address stands for any client on this host. A guest must not act in such a
            // client's name. The network stack drops frames from outside whose source is one.
            if a0 == 127 && from[0] != 127 {
                return Err(Rejection::Loopback);
            }
            if rules.strict_source && [a0, a1, a2, a3] != from {
                return Err(Rejection::Source);
            }
        }
        Source::V6(from) => {
            if request.family.get() != FAMILY_V6 {
                return Err(Rejection::Family);
            }
            if !usable_v6(&request.address) {
                return Err(Rejection::Address);
            }
            // The only usable address with this first byte is ::1.
            if a0 == 0 && !is_localhost_v6(&from) {
                return Err(Rejection::Loopback);
            }
        }
    }
    Ok(kind)
}

/// Checks what every listener demands: operation, digest kind, and the end of the domain.
#[inline(always)]
fn admit_content(request: &Request, min_hash: HashKind) -> Result<HashKind, Rejection> {
    if request.op().is_none() {
        return Err(Rejection::Op);
    }
    let Some(kind) = request.hash_kind() else { return Err(Rejection::HashUnknown) };
    if kind.to_wire() < min_hash.to_wire() {
        return Err(if matches!(kind, HashKind::None) { Rejection::Unsigned } else { Rejection::HashWeak });
    }
    if !has_nul(&request.domain) { Err(Rejection::Domain) } else { Ok(kind) }
}

/// As [`admit`], for a request that came over a connection of its client. Such a request has no
/// callback address: stock clients send zeros.
///
/// A request of one listener is thus never one of another.
///
/// # Errors
/// The first [`Rejection`] in this order: operation, digest kind, domain, port, family, address.
pub fn admit_stream(request: &Request, min_hash: HashKind) -> Result<HashKind, Rejection> {
    let kind = admit_content(request, min_hash)?;
    // See below: the padding of an extended hash begins at this byte of the request.
    if request.domain[EXTENSION_OFFSET - DOMAIN_OFFSET] == EXTENSION {
        return Err(Rejection::Domain);
    }
    if request.port.get() != 0 {
        return Err(Rejection::Port);
    }
    if request.family.get() != 0 {
        return Err(Rejection::Family);
    }
    if request.address != [0; 28] { Err(Rejection::Address) } else { Ok(kind) }
}

// A prefix hash can be extended. A host's half of the callback exchange gives H(key || 64 bytes of
// the peer's choice). From that the peer computes H(key || those 64 bytes || SHA padding || more)
// without the key, which may be a request's digest.
//
// In such a request the padding begins at offset 64: 0x80, zeros, and a bit count of at least 520
// in its last two bytes. It is at least 9 bytes long, so the address at offset 68 starts with a
// zero byte and is never ::1. Rejecting 0.0.0.0/8 and ::/8 therefore rejects every such forgery.
// These addresses must never be allowed, whatever use they may have.
//
// A request over a connection has zeros for its address, which hide the padding of a key of 20 to
// 28 bytes (modulo 64). So `admit_stream` rejects the padding's first byte itself. It costs clients
// only the names of at least 61 bytes whose 61st byte is 0x80.

/// Offset of the domain in a request.
const DOMAIN_OFFSET: usize = 4;
/// Where the padding behind a challenge begins in a request.
const EXTENSION_OFFSET: usize = HASH_LEN;
/// The padding's first byte.
const EXTENSION: u8 = 0x80;

/// Whether a host may have an IPv4 address with this first byte. Not 0.0.0.0/8, multicast or
/// 240.0.0.0/4, which includes broadcast.
#[inline(always)]
const fn usable_v4(first: u8) -> bool {
    first != 0 && first < 224
}

/// Whether a host may have this IPv6 address (the first 16 bytes). Not multicast, and not ::/8
/// except ::1.
#[inline(always)]
fn usable_v6(address: &[u8; 28]) -> bool {
    match address[0] {
        0xff => false,
        0 => is_localhost_v6(address),
        _ => true,
    }
}

/// Whether the first 16 bytes are ::1.
#[inline(always)]
fn is_localhost_v6(address: &[u8]) -> bool {
    address
        .get(..16)
        .is_some_and(|address| address[..15].iter().fold(0, |all, &byte| all | byte) == 0 && address[15] == 1)
}

/// Whether there is a zero byte. It reads all bytes: leaving a loop early costs the verifier a path
/// per step.
#[inline(always)]
fn has_nul(domain: &[u8; DOMAIN_LEN]) -> bool {
    const ONES: u32 = 0x0101_0101;
    let (words, _) = domain.as_chunks::<4>();
    let mut found = 0;
    for bytes in words {
        let word = word(bytes);
        // The lowest zero byte borrows from its own top bit. A borrow further up needs a zero byte
        // below it.
        found |= word.wrapping_sub(ONES) & !word & (ONES << 7);
    }
    found != 0
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;
    use crate::wire::Op;
    use zerocopy::little_endian;

    const STRICT: Rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
    const FROM_V4: Source = Source::V4([192, 168, 122, 11]);
    const FROM_V6: Source = Source::V6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);

    fn good_v4() -> Request {
        let mut request = Request::new_zeroed();
        request.op = Op::Off.to_wire();
        request.hash_kind = HashKind::Sha256.to_wire();
        request.domain[..5].copy_from_slice(b"node1");
        request.address[..4].copy_from_slice(&[192, 168, 122, 11]);
        request.port = little_endian::U16::new(1229);
        request.family = little_endian::U32::new(FAMILY_V4);
        request
    }

    fn good_v6() -> Request {
        let mut request = good_v4();
        request.address[0] = 0xfd;
        request.family = little_endian::U32::new(FAMILY_V6);
        request
    }

    #[track_caller]
    fn refused(request: &Request, why: Rejection) {
        assert_eq!(admit(request, &FROM_V4, &STRICT), Err(why));
    }

    #[test]
    fn good_ones_are_admitted_with_the_digest_to_check() {
        assert_eq!(admit(&good_v4(), &FROM_V4, &STRICT), Ok(HashKind::Sha256));
        assert_eq!(admit(&good_v6(), &FROM_V6, &STRICT), Ok(HashKind::Sha256));
        let stronger = Request { hash_kind: 3, ..good_v4() };
        assert_eq!(admit(&stronger, &FROM_V4, &STRICT), Ok(HashKind::Sha512));
    }

    #[test]
    fn each_fault_has_its_own_rejection() {
        for op in 7..=u8::MAX {
            refused(&Request { op, ..good_v4() }, Rejection::Op);
        }
        for hash_kind in 4..=u8::MAX {
            refused(&Request { hash_kind, ..good_v4() }, Rejection::HashUnknown);
        }
        refused(&Request { hash_kind: 0, ..good_v4() }, Rejection::Unsigned);
        refused(&Request { hash_kind: 1, ..good_v4() }, Rejection::HashWeak);
        refused(&Request { domain: [b'x'; DOMAIN_LEN], ..good_v4() }, Rejection::Domain);
        refused(&Request { port: little_endian::U16::new(0), ..good_v4() }, Rejection::Port);
        for family in [0, 1, 3, FAMILY_V6, 0x0200_0000, u32::MAX] {
            refused(&Request { family: little_endian::U32::new(family), ..good_v4() }, Rejection::Family);
        }
        assert_eq!(admit(&good_v4(), &FROM_V6, &STRICT), Err(Rejection::Family));
        let mut elsewhere = good_v4();
        elsewhere.address[3] = 12;
        refused(&elsewhere, Rejection::Source);
        assert_eq!(admit(&elsewhere, &FROM_V4, &Rules { strict_source: false, ..STRICT }), Ok(HashKind::Sha256));
    }

    #[test]
    fn a_nul_anywhere_ends_the_domain() {
        for at in 0..DOMAIN_LEN {
            let mut domain = [b'x'; DOMAIN_LEN];
            domain[at] = 0;
            assert!(has_nul(&domain), "{at}");
        }
        assert!(!has_nul(&[0xff; DOMAIN_LEN]));
        assert!(!has_nul(&[1; DOMAIN_LEN]));
    }

    #[test]
    fn addresses_that_no_host_has() {
        for first in 0..=u8::MAX {
            let mut request = good_v4();
            request.address[0] = first;
            let loose = Rules { strict_source: false, ..STRICT };
            let expected = match first {
                0 | 224.. => Err(Rejection::Address),
                127 => Err(Rejection::Loopback),
                _ => Ok(HashKind::Sha256),
            };
            assert_eq!(admit(&request, &FROM_V4, &loose), expected, "{first}.x");
        }
        let v6 = |text: &str| {
            let mut request = good_v6();
            let ip: core::net::Ipv6Addr = text.parse().unwrap();
            request.address[..16].copy_from_slice(&ip.octets());
            admit(&request, &FROM_V6, &STRICT)
        };
        assert_eq!(v6("::1"), Err(Rejection::Loopback));
        for good in ["fd00::1", "2001:db8::1", "fe80::1"] {
            assert_eq!(v6(good), Ok(HashKind::Sha256), "{good}");
        }
        for bad in ["::", "::2", "::ffff:192.168.122.11", "0:0:0:1::1", "ff02::1", "64::1"] {
            assert_eq!(v6(bad), Err(Rejection::Address), "{bad}");
        }
    }

    /// The client on this host itself asks from the loopback interface.
    #[test]
    fn a_loopback_address_is_called_back_for_a_loopback_source_only() {
        let ask = |callback: &str, source: &str| {
            let (callback, source): (core::net::IpAddr, core::net::IpAddr) =
                (callback.parse().unwrap(), source.parse().unwrap());
            let mut request = if callback.is_ipv4() { good_v4() } else { good_v6() };
            match callback {
                core::net::IpAddr::V4(ip) => request.address[..4].copy_from_slice(&ip.octets()),
                core::net::IpAddr::V6(ip) => request.address[..16].copy_from_slice(&ip.octets()),
            }
            [true, false].map(|strict_source| admit(&request, &source.into(), &Rules { strict_source, ..STRICT }))
        };
        for (callback, source) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1")] {
            assert_eq!(ask(callback, source), [Ok(HashKind::Sha256); 2], "{callback} from {source}");
        }
        for (callback, source) in [
            ("127.0.0.1", "192.168.122.11"),
            ("127.9.9.9", "10.0.0.1"),
            ("::1", "fd00::9"),
            ("::1", "::"),
            ("::1", "100::1"),
        ] {
            assert_eq!(ask(callback, source), [Err(Rejection::Loopback); 2], "{callback} from {source}");
        }
    }

    #[test]
    fn unsigned_requests_need_a_rule_that_allows_them() {
        let none = Request { hash_kind: 0, ..good_v4() };
        let open = Rules { min_hash: HashKind::None, strict_source: true };
        assert_eq!(admit(&none, &FROM_V4, &open), Ok(HashKind::None));
        assert_eq!(admit(&good_v4(), &FROM_V4, &open), Ok(HashKind::Sha256));
    }

    fn good_stream() -> Request {
        Request { address: [0; 28], port: 0.into(), family: 0.into(), ..good_v4() }
    }

    #[test]
    fn a_connection_carries_requests_without_a_callback_address_only() {
        let admitted = |request: &Request| admit_stream(request, HashKind::Sha256);
        assert_eq!(admitted(&good_stream()), Ok(HashKind::Sha256));
        assert_eq!(admitted(&Request { hash_kind: 3, ..good_stream() }), Ok(HashKind::Sha512));
        assert_eq!(admitted(&Request { op: 7, ..good_stream() }), Err(Rejection::Op));
        assert_eq!(admitted(&Request { hash_kind: 4, ..good_stream() }), Err(Rejection::HashUnknown));
        assert_eq!(admitted(&Request { hash_kind: 0, ..good_stream() }), Err(Rejection::Unsigned));
        assert_eq!(admitted(&Request { hash_kind: 1, ..good_stream() }), Err(Rejection::HashWeak));
        assert_eq!(admitted(&Request { domain: [b'x'; DOMAIN_LEN], ..good_stream() }), Err(Rejection::Domain));
        assert_eq!(admitted(&Request { port: 1229.into(), ..good_stream() }), Err(Rejection::Port));
        assert_eq!(admitted(&Request { family: FAMILY_V4.into(), ..good_stream() }), Err(Rejection::Family));
        for at in 0..28 {
            let mut request = good_stream();
            request.address[at] = 1;
            assert_eq!(admitted(&request), Err(Rejection::Address), "{at}");
        }
        // The other way round.
        for source in [FROM_V4, FROM_V6] {
            assert!(admit(&good_stream(), &source, &Rules { strict_source: false, ..STRICT }).is_err());
        }
        let longest = Request { domain: [[b'n'; 63].as_slice(), &[0]].concat().try_into().unwrap(), ..good_stream() };
        assert_eq!(admitted(&longest), Ok(HashKind::Sha256));
    }

    /// The request that can be forged from the answer to a chosen challenge, for every key length.
    #[test]
    fn a_length_extended_challenge_is_never_admitted() {
        for (block, count_len) in [(64, 8), (128, 16)] {
            for key_len in 1..=crate::wire::KEY_MAX {
                let hashed = key_len + 64;
                let padded = (hashed + 1 + count_len).next_multiple_of(block);
                for (good, source) in [(good_v4(), FROM_V4), (good_v6(), FROM_V6), (good_stream(), FROM_V4)] {
                    // The forger chooses everything but the padding, ::1 included.
                    for mut bytes in [zerocopy::transmute!(good), {
                        let mut local: [u8; 176] = zerocopy::transmute!(good);
                        local[68..84].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
                        local
                    }] {
                        let end = (64 + padded - hashed).min(176);
                        let mut padding = [0_u8; 256];
                        padding[0] = 0x80;
                        let bits = u64::try_from(hashed * 8).unwrap().to_be_bytes();
                        padding[padded - hashed - 8..padded - hashed].copy_from_slice(&bits);
                        bytes[64..end].copy_from_slice(&padding[..end - 64]);
                        let forged: Request = zerocopy::transmute!(bytes);
                        let loose = Rules { strict_source: false, ..STRICT };
                        assert!(admit(&forged, &source, &loose).is_err(), "key of {key_len}, block of {block}");
                        let is_forged = admit_stream(&forged, HashKind::Sha256).is_ok();
                        assert!(!is_forged, "over a connection: key of {key_len}, block of {block}");
                    }
                }
            }
        }
    }
}
