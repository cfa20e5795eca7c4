//! The wire format and the digests against what the stock client really sent: see
//! `fixtures/README.md`.

use std::net::IpAddr;
use std::path::PathBuf;

use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{HASH_LEN, KEY_MAX, Op, REQUEST_LEN, Request};
use zerocopy::FromBytes;

#[cfg(test)]
fn fixture(path: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A line of the index, and the files that it names.
struct Golden {
    file: String,
    key_bytes: Vec<u8>,
    request: Request,
    op: Op,
    hash: HashKind,
    flags: u8,
    domain: String,
    address: IpAddr,
    port: u16,
}

#[cfg(test)]
fn golden() -> Vec<Golden> {
    let index = String::from_utf8(fixture("datagrams.tsv")).unwrap();
    index.lines().filter(|line| !line.starts_with('#')).map(parse).collect()
}

#[cfg(test)]
fn parse(line: &str) -> Golden {
    let columns: Vec<&str> = line.split('\t').collect();
    let [file, key, op, hash, flags, domain, address, port, command] = columns[..] else {
        panic!("nine columns, not {line:?}")
    };
    assert!(command.starts_with("fence_xvm "));
    Golden {
        file: file.to_owned(),
        key_bytes: fixture(&format!("keys/{key}")),
        request: Request::read_from_bytes(&fixture(&format!("datagrams/{file}"))[..]).expect("176 bytes"),
        op: Op::ALL.into_iter().find(|known| known.name() == op).unwrap(),
        hash: HashKind::from_name(hash).unwrap(),
        flags: flags.parse().unwrap(),
        domain: if domain == "-" { String::new() } else { domain.to_owned() },
        address: address.parse().unwrap(),
        port: port.parse().unwrap(),
    }
}

#[test]
fn every_field_of_every_datagram_is_read() {
    for golden in golden() {
        let (file, request) = (&golden.file, &golden.request);
        assert_eq!(request.op(), Some(golden.op), "{file}");
        assert_eq!(request.hash_kind(), Some(golden.hash), "{file}");
        assert_eq!(request.flags, golden.flags, "{file}");
        assert_eq!(request.domain_text(), Some(golden.domain.as_bytes()), "{file}");
        assert_eq!(request.callback_ip(), Some(golden.address), "{file}");
        assert_eq!(request.addr_len, if golden.address.is_ipv4() { 4 } else { 16 }, "{file}");
        assert_eq!(request.port.get(), golden.port, "{file}");
        assert!(request.seqno.get() < 1_000_000, "{file}: the microseconds of the time of day");
    }
}

#[test]
fn every_digest_is_right_with_its_key_and_wrong_with_any_other() {
    for golden in golden().into_iter().filter(|golden| golden.hash != HashKind::None) {
        let (file, request) = (&golden.file, &golden.request);
        assert!(Key::new(&golden.key_bytes).unwrap().verify(request), "{file}");

        let used = golden.key_bytes.len().min(KEY_MAX);
        let mut changed = golden.key_bytes.clone();
        changed[used - 1] ^= 1;
        assert!(!Key::new(&changed).unwrap().verify(request), "{file}: last bit of the key");
        assert!(!Key::new(b"another").unwrap().verify(request), "{file}: another key");
        if used > 1 {
            assert!(!Key::new(&golden.key_bytes[..used - 1]).unwrap().verify(request), "{file}: a shorter key");
        }
    }
}

#[test]
fn a_digest_covers_every_byte_before_it_and_is_compared_in_full() {
    for golden in golden().into_iter().filter(|golden| golden.hash != HashKind::None) {
        let key = Key::new(&golden.key_bytes).unwrap();
        let bytes: [u8; REQUEST_LEN] = zerocopy::transmute!(golden.request);
        for byte in 0..REQUEST_LEN {
            let mut flipped = bytes;
            flipped[byte] ^= 0x80;
            assert!(!key.verify(&zerocopy::transmute!(flipped)), "{}: byte {byte}", golden.file);
        }
    }
}

#[test]
fn without_a_digest_the_field_is_zero_and_nothing_is_proven() {
    let all = golden();
    let mut unsigned = all.iter().filter(|golden| golden.hash == HashKind::None).peekable();
    assert!(unsigned.peek().is_some());
    for golden in unsigned {
        assert_eq!(golden.request.hash, [0; HASH_LEN], "{}", golden.file);
        assert!(!Key::new(&golden.key_bytes).unwrap().verify(&golden.request), "{}", golden.file);
    }
}

#[test]
fn signing_again_gives_the_stock_clients_bytes() {
    for golden in golden() {
        let mut again = golden.request;
        again.hash = [0xaa; HASH_LEN];
        Key::new(&golden.key_bytes).unwrap().sign(golden.hash, &mut again);
        assert!(again == golden.request, "{}", golden.file);
    }
}

#[test]
fn the_collection_has_every_hash_family_key_length_and_operation() {
    let all = golden();
    for hash in HashKind::ALL {
        for v4 in [true, false] {
            for flags in [0, 1] {
                let found = all.iter().any(|g| g.hash == hash && g.address.is_ipv4() == v4 && g.flags == flags);
                assert!(found, "{} v4={v4} flags={flags}", hash.name());
            }
            for length in [1, 12, 115, 512, 4096, 5000] {
                let found =
                    all.iter().any(|g| g.hash == hash && g.address.is_ipv4() == v4 && g.key_bytes.len() == length);
                assert!(found || hash == HashKind::None, "{} v4={v4} key of {length}", hash.name());
            }
        }
    }
    for op in Op::ALL {
        assert!(all.iter().any(|golden| golden.op == op), "{}", op.name());
    }
    assert!(all.iter().any(|golden| golden.domain.len() == 63));
}
