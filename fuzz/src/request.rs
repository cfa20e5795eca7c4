//! The request: as a frame for the kernel program, and as a datagram from the socket.

use std::net::IpAddr;
use std::sync::LazyLock;

use fence_common::admit::{Rules, Source, admit};
use fence_common::boundary::{Config, Listener, empty_slot};
use fence_common::digest::PreparedKey;
use fence_common::frame::{classify, judge};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::ledger::RequestId;
use fence_common::memory_store::MemoryStore;
use fence_common::rate_limit::Limits;
use fence_common::replay_cache::DatagramId;
use fence_common::target::Target;
use fence_common::verdict::Verdict;
use fence_common::wire::{
    DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT, FAMILY_V4, FAMILY_V6, REQUEST_LEN, Request,
};
use zerocopy::FromBytes as _;

/// The key of the golden datagrams, with which the corpus begins.
static KEY: LazyLock<Option<(Key, PreparedKey)>> = LazyLock::new(|| {
    let key = Key::new(include_bytes!("../../fence-common/fixtures/keys/4096.key")).ok()?;
    let prepared = PreparedKey::new(&key);
    Some((key, prepared))
});

/// Checks everything that must hold for these bytes: as a frame, as a datagram of each family, and
/// as a datagram in a frame.
///
/// # Panics
/// If something does not hold.
pub fn check(bytes: &[u8]) {
    frame(bytes);
    let payload = bytes.get(..bytes.len().min(1400)).unwrap_or_default();
    frame(&in_ipv4(payload));
    frame(&in_ipv6(payload));
    if let Ok(request) = Request::read_from_bytes(bytes) {
        for source in
            [Source::V4([192, 168, 122, 11]), Source::V6(request_v6(&request)), Source::V4(request_v4(&request))]
        {
            judged(&request, source);
        }
    }
}

/// Checks everything that must hold for any request.
pub(crate) fn judged(request: &Request, source: Source) {
    for min_hash in [HashKind::None, HashKind::Sha1, HashKind::Sha256, HashKind::Sha512] {
        let lax = admit(request, &source, &Rules { min_hash, strict_source: false });
        let strict = admit(request, &source, &Rules { min_hash, strict_source: true });
        assert!(strict.is_err() || strict == lax, "strict {strict:?}, lax {lax:?}");
        let Ok(kind) = lax else { continue };
        assert!(kind.to_wire() >= min_hash.to_wire() && request.hash_kind() == Some(kind));
        assert!(request.op().is_some() && request.port.get() != 0);
        let family = if matches!(source, Source::V4(_)) { FAMILY_V4 } else { FAMILY_V6 };
        assert_eq!(request.family.get(), family);
        let ip = request.callback_ip();
        let callable = |ip: IpAddr| !ip.is_unspecified() && !ip.is_multicast();
        assert!(ip.is_some_and(callable), "nobody can be called back at {ip:?}");
        if strict.is_ok()
            && let (Source::V4(from), Some(ip)) = (source, ip)
        {
            assert_eq!(ip, IpAddr::from(from), "not the source");
        }
    }
    let text = request.domain_text();
    if let Some(target) = text.and_then(Target::parse) {
        let said = target.to_string();
        assert!(!said.chars().any(char::is_control), "a control character in a log line: {said:?}");
    }
    if let Some(op) = request.op() {
        assert_eq!(RequestId::of(op, request), RequestId::of(op, request));
    }
    assert_eq!(DatagramId::of(request), DatagramId::of(request));
}

fn frame(bytes: &[u8]) {
    for (min_hash, strict_source) in [(HashKind::None, false), (HashKind::Sha1, false), (HashKind::Sha512, true)] {
        let rules = Rules { min_hash, strict_source };
        let config = Config::new(&Listener {
            group_v4: Some(DEFAULT_GROUP_V4),
            group_v6: Some(DEFAULT_GROUP_V6),
            port: DEFAULT_PORT,
            rules,
            limits: Limits::NONE,
        });
        let without_key = judge(bytes, &config, &[&empty_slot()], &mut MemoryStore::default(), 0);
        let Some((key, prepared)) = &*KEY else { unreachable!("the key of the fixtures is none") };
        let verdict = judge(bytes, &config, &[prepared.dangerous_slot()], &mut MemoryStore::default(), 0);
        // User space's verdict on the datagram, if there is one.
        let expected =
            classify(&bytes, &config).map(|datagram| match admit(datagram.request, &datagram.source, &rules) {
                Ok(HashKind::None) => Ok(true),
                Ok(_) => Ok(key.verify(datagram.request)),
                Err(refusal) => Err(Verdict::from(refusal)),
            });
        match expected {
            Ok(Ok(true)) => assert!(verdict.is_ok()),
            Ok(Ok(false)) => assert!(verdict.is_err()),
            Ok(Err(other)) | Err(other) => assert_eq!(verdict, Err(other)),
        }
        if without_key.is_ok() {
            assert_eq!(min_hash, HashKind::None, "delivered without a key");
        }
    }
}

fn request_v4(request: &Request) -> [u8; 4] {
    let [a, b, c, d, ..] = request.address;
    [a, b, c, d]
}

fn request_v6(request: &Request) -> [u8; 16] {
    let mut octets = [0; 16];
    octets.copy_from_slice(&request.address[..16]);
    octets
}

/// The payload as a guest's datagram to the group. The source is the callback address in the
/// payload.
pub(crate) fn in_ipv4(payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap_or_default();
    let source = payload.get(68..72).unwrap_or(&[192, 168, 122, 11]);
    let mut frame = vec![0; 12];
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend(len.saturating_add(28).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 2, 17, 0, 0]);
    frame.extend(source);
    frame.extend(DEFAULT_GROUP_V4);
    udp(&mut frame, payload, len);
    frame
}

fn in_ipv6(payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap_or_default();
    let source = payload.get(68..84).unwrap_or(&[0xfd; 16]);
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(len.saturating_add(8).to_be_bytes());
    frame.extend([17, 2]);
    frame.extend(source);
    frame.extend(DEFAULT_GROUP_V6);
    udp(&mut frame, payload, len);
    frame
}

fn udp(frame: &mut Vec<u8>, payload: &[u8], len: u16) {
    frame.extend([0x9c, 0x40]);
    frame.extend(DEFAULT_PORT.to_be_bytes());
    frame.extend(len.saturating_add(8).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
}

// The frames assume payloads of this length.
const _: () = assert!(REQUEST_LEN == 176);
