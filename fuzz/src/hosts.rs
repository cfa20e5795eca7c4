//! What a member of the hosts' group sends: anything, signed or not.

use fence_common::hosts::{
    ConfiguredHost, Envelope, HEADER_LEN, Hosts, HostsOptions, Incarnation, MAGIC, Member, NoMessage, NodeId, Output,
    SIGNATURE_LEN, VERSION, signature,
};
use fence_common::key::Key;
use fence_common::keys::{KeyPair, Keys};

const ME: Member = Member { node: NodeId(1), pid: 10 };
const OTHER: Member = Member { node: NodeId(2), pid: 20 };

/// Checks these bytes as a message, and as kind and body of a signed one.
///
/// # Panics
/// If something does not hold.
pub fn check(bytes: &[u8]) {
    let Ok(key) = Key::new(b"a key of hosts") else { unreachable!("a key") };
    let keys = Keys::from(KeyPair::from(key.clone()));
    assert!(Envelope::open(bytes, OTHER, &keys).is_err(), "nobody signs by chance");
    let signed = sealed(&key, bytes);
    let opened = Envelope::open(&signed, OTHER, &keys);
    match &opened {
        Ok(envelope) => {
            assert_eq!(envelope.seal(&key), signed, "two forms of one message");
            assert_eq!(Envelope::open(&signed, ME, &keys), Err(NoMessage::Sender));
        }
        Err(reason) => assert_eq!(*reason, NoMessage::Malformed),
    }
    let mut flipped = signed.clone();
    if let Some(byte) = flipped.get_mut(bytes.len() % signed.len()) {
        *byte ^= 1;
    }
    assert!(Envelope::open(&flipped, OTHER, &keys).is_err(), "a changed message was accepted");
    taken(keys, &signed, opened.is_ok());
}

/// Kind and body as a message of [`OTHER`].
fn sealed(key: &Key, bytes: &[u8]) -> Vec<u8> {
    let (kind, body) = bytes.split_first().map_or((0, bytes), |(kind, body)| (*kind, body));
    let length = u32::try_from(HEADER_LEN + body.len() + SIGNATURE_LEN).unwrap_or(u32::MAX);
    let mut message = MAGIC.to_vec();
    message.extend_from_slice(&VERSION.to_le_bytes());
    message.extend_from_slice(&[kind, 0]);
    for number in [length, OTHER.node.0, OTHER.pid] {
        message.extend_from_slice(&number.to_le_bytes());
    }
    message.extend_from_slice(&[7; 16]);
    message.extend_from_slice(&1_u64.to_le_bytes());
    assert_eq!(message.len(), HEADER_LEN);
    message.extend_from_slice(body);
    let signed = signature(key, &message);
    message.extend_from_slice(&signed);
    message
}

/// A daemon takes the message. It never acts before it has looked, and counts it once.
fn taken(keys: Keys, signed: &[u8], is_good: bool) {
    let mut hosts = Hosts::new(ME, Incarnation([1; 16]), keys, HostsOptions::default());
    let host = |node| ConfiguredHost { node, name: "a host".into() };
    hosts.configured(1, [host(ME.node), host(OTHER.node)]);
    hosts.membership(1, &[ME, OTHER]);
    hosts.quorum(1, true, &[ME.node, OTHER.node]);
    let drain = |hosts: &mut Hosts| {
        let mut outputs = Vec::new();
        while let Some(output) = hosts.poll() {
            assert!(!matches!(output, Output::Act(_) | Output::Answer { .. }), "{output:?}");
            outputs.push(output);
        }
        outputs
    };
    drain(&mut hosts);
    for _ in 0..2 {
        hosts.message(2, OTHER, Some(2), signed);
        let outputs = drain(&mut hosts);
        assert!(outputs.len() < 4, "{outputs:?}");
        let is_foreign = hosts.view().hosts.iter().any(|host| host.trouble.is_some());
        assert_eq!(is_foreign, !is_good);
    }
    hosts.tick(u64::MAX);
    hosts.disconnected(u64::MAX);
    while hosts.poll().is_some() {}
}
