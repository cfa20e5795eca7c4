//! A request over a client's own connection, as tcp and vsock read it, beside the same request as a
//! datagram with a callback address.

use std::net::IpAddr;

use fence_common::admit::{Rules, Source, admit, admit_stream};
use fence_common::boundary::{Config, Listener};
use fence_common::digest::PreparedKey;
use fence_common::frame::judge;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::memory_store::MemoryStore;
use fence_common::rate_limit::Limits;
use fence_common::replay_cache::DatagramId;
use fence_common::verdict::Verdict;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_PORT, FAMILY_V4, HASH_LEN, REQUEST_LEN, Request};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::request::in_ipv4;

/// Where the datagram's client is.
const CLIENT: [u8; 4] = [192, 168, 122, 11];
/// Where the domain begins, and the bytes that the name can have.
const DOMAIN: usize = 4;
/// Lengths of keys, for padding that begins at each place in a block.
const KEYS: usize = 130;

/// Checks everything that must hold for these bytes as the first ones of a connection.
///
/// # Panics
/// If something does not hold.
pub fn check(bytes: &[u8]) {
    let mut padded = [0; REQUEST_LEN];
    let len = bytes.len().min(REQUEST_LEN);
    padded[..len].copy_from_slice(&bytes[..len]);
    let Ok(request) = Request::read_from_bytes(&padded) else { unreachable!("176 bytes are a request") };
    by_one_way_only(&request);
    by_each_way(&request);
    let key_len = bytes.last().map_or(0, |&last| usize::from(last)) % KEYS;
    no_extension(&padded, key_len);
}

/// A request of one listener is none of the other's, so none can be repeated there.
fn by_one_way_only(request: &Request) {
    for min_hash in HashKind::ALL {
        let is_stream = admit_stream(request, min_hash).is_ok();
        let rules = Rules { min_hash, strict_source: false };
        let mut sources = vec![Source::V4(CLIENT), Source::V6([0xfd; 16]), Source::V4([127, 0, 0, 1])];
        sources.extend(request.callback_ip().map(|ip: IpAddr| Source::from(ip)));
        let is_datagram = sources.iter().any(|source| admit(request, source, &rules).is_ok());
        assert!(!is_stream || !is_datagram, "by each way");
    }
}

/// Apart from addresses, the verdict does not depend on the way.
fn by_each_way(request: &Request) {
    let Ok(key) = Key::new(b"a key of the fuzzer") else { return };
    let prepared = PreparedKey::new(&key);
    let mut stream = Request { address: [0; 28], port: 0.into(), family: 0.into(), ..*request };
    let mut datagram = Request { port: DEFAULT_PORT.into(), family: FAMILY_V4.into(), ..stream };
    datagram.address[..4].copy_from_slice(&CLIENT);
    for is_signed in [true, false] {
        if is_signed && let Some(kind) = request.hash_kind() {
            key.sign(kind, &mut stream);
            key.sign(kind, &mut datagram);
        }
        for min_hash in HashKind::ALL {
            let rules = Rules { min_hash, strict_source: true };
            let config = Config::new(&Listener {
                group_v4: Some(DEFAULT_GROUP_V4),
                group_v6: None,
                port: DEFAULT_PORT,
                rules,
                limits: Limits::NONE,
            });
            let frame = in_ipv4(datagram.as_bytes());
            let kernel = judge(&frame, &config, &[prepared.dangerous_slot()], &mut MemoryStore::default(), 0);
            let socket = verdict(admit(&datagram, &Source::V4(CLIENT), &rules), &key, &datagram);
            let tcp = verdict(admit_stream(&stream, min_hash), &key, &stream);
            assert_eq!(kernel.map(|_| ()), socket, "kernel and socket");
            // The one documented exception: a long name that may hide the padding of a hash.
            let is_hidden = request.domain[HASH_LEN - DOMAIN] == 0x80 && tcp == Err(Verdict::Domain);
            assert!(is_hidden || tcp == socket, "tcp: {tcp:?}, socket: {socket:?}");
            // What is accepted must be known again, unless it carries no digest.
            let is_known_again = DatagramId::of(&stream).is_some() || stream.hash_kind() == Some(HashKind::None);
            assert!(tcp.is_err() || is_known_again, "a request without an identity");
        }
    }
}

fn verdict<E>(admitted: Result<HashKind, E>, key: &Key, request: &Request) -> Result<(), Verdict>
where
    Verdict: From<E>,
{
    match admitted.map_err(Verdict::from)? {
        HashKind::None => Ok(()),
        HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512 if key.verify(request) => Ok(()),
        HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512 => Err(Verdict::Digest),
    }
}

/// The exam gives anybody `H(key || 64 bytes)`, which can be extended. No request that such an
/// extension signs is admitted, whatever the length of the key.
fn no_extension(bytes: &[u8; REQUEST_LEN], key_len: usize) {
    for (kind, block) in [(HashKind::Sha1, 64), (HashKind::Sha256, 64), (HashKind::Sha512, 128)] {
        let (hashed, count) = (key_len + HASH_LEN, block / 8);
        let zeros = (2 * block - count - 1 - hashed % block) % block;
        let bits = (hashed as u128 * 8).to_be_bytes();
        let padding = [&[0x80][..], &vec![0; zeros], &bits[bits.len() - count..]].concat();
        assert_eq!((hashed + padding.len()) % block, 0);
        let mut forged = *bytes;
        forged[1] = kind.to_wire();
        // The digest's field counts as zeros, so padding that reaches into it fits no key.
        let Some(place) = forged.get_mut(HASH_LEN..REQUEST_LEN - HASH_LEN) else { continue };
        let Some(place) = place.get_mut(..padding.len()) else { continue };
        place.copy_from_slice(&padding);
        let Ok(request) = Request::read_from_bytes(&forged) else { continue };
        assert!(admit_stream(&request, HashKind::None).is_err(), "forged without the key");
        for source in [Source::V4(CLIENT), Source::V6([0xfd; 16]), Source::V4([127, 0, 0, 1])] {
            let rules = Rules { min_hash: HashKind::None, strict_source: false };
            assert!(admit(&request, &source, &rules).is_err(), "forged without the key");
        }
    }
}
