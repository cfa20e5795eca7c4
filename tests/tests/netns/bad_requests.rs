//! Bad requests: the kernel program drops each and counts it once. None is called back or changes
//! anything.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::{FAMILY_V6, Op, Request};
use fence_lab::client::Family;
use fence_lab::peer::{Peer, set_address};
use fence_lab::process::poll_until;
use fence_lab::server::Config;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// A bad request: what is wrong, the counter that rises, the payload.
type Bad = (&'static str, &'static str, Vec<u8>);

/// Every bad request. Each is made from a good one that would switch the domain off.
fn bad_requests(peer: &Peer, other_guest: Ipv4Addr) -> Result<Vec<Bad>> {
    let good = || peer.request(Op::Off, DOMAIN);
    let key = peer.key();
    let signed = |mut request: Request| {
        key.sign(HashKind::Sha256, &mut request);
        request.as_bytes().to_vec()
    };
    let changed = |change: &dyn Fn(&mut Request)| -> Result<Vec<u8>> {
        let mut request = good()?;
        change(&mut request);
        Ok(signed(request))
    };
    let flipped = |byte: usize| -> Result<Vec<u8>> {
        let mut payload = signed(good()?);
        payload[byte] ^= 1;
        Ok(payload)
    };
    let hashed = |kind| -> Result<Vec<u8>> {
        let mut request = good()?;
        key.sign(kind, &mut request);
        Ok(request.as_bytes().to_vec())
    };
    let mut unknown_hash = signed(good()?);
    unknown_hash[1] = 4;
    let mut foreign = good()?;
    Key::new(b"another key")?.sign(HashKind::Sha256, &mut foreign);
    let mut long = signed(good()?);
    long.push(0);
    let short = signed(good()?)[..175].to_vec();
    let set = |address: IpAddr| changed(&move |request| set_address(request, address));
    Ok(vec![
        ("a byte too short", "drop_length", short),
        ("a byte too long", "drop_length", long),
        ("empty", "drop_length", Vec::new()),
        ("the metadata operation, which clients never send", "drop_operation", changed(&|request| request.op = 7)?),
        ("an unknown operation", "drop_operation", changed(&|request| request.op = 255)?),
        ("an unknown hash", "drop_hash_unknown", unknown_hash),
        ("SHA-1, weaker than the configured SHA-256", "drop_hash_weak", hashed(HashKind::Sha1)?),
        ("no digest", "drop_unsigned", hashed(HashKind::None)?),
        ("a name without NUL", "drop_domain", changed(&|request| request.domain = [b'x'; 64])?),
        ("callback port 0", "drop_port", changed(&|request| request.port = 0.into())?),
        ("IPv6 callback in an IPv4 datagram", "drop_family", changed(&|request| request.family = FAMILY_V6.into())?),
        ("an unknown address family", "drop_family", changed(&|request| request.family = 77.into())?),
        ("callback to nowhere", "drop_address", set(Ipv4Addr::UNSPECIFIED.into())?),
        ("callback to a group", "drop_address", set(Ipv4Addr::new(225, 0, 0, 12).into())?),
        ("callback to the hypervisor's loopback", "drop_loopback", set(Ipv4Addr::LOCALHOST.into())?),
        ("callback to somebody else", "drop_source", set(other_guest.into())?),
        ("a bit of the domain flipped", "drop_digest", flipped(4)?),
        ("a bit of the digest flipped", "drop_digest", flipped(112)?),
        ("a bit after the digest flipped", "drop_digest", flipped(175)?),
        ("signed with another key", "drop_digest", foreign.as_bytes().to_vec()),
    ])
}

#[test]
fn each_bad_request_is_counted_once_and_has_no_effect() -> Result<()> {
    let bench = Bench::new()?;
    let other = bench.hypervisor.guest(2)?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let server = bench.serve(&bench.config("auto"))?;
    for (what, counter, payload) in bad_requests(&peer, other.v4)? {
        let before = bench.counters()?;
        peer.send_bytes(&payload)?;
        let counted = poll_until(what, Duration::from_secs(10), || {
            let counted = &bench.counters()? - &before;
            Ok((!counted.nonzero().is_empty()).then_some(counted))
        })?;
        ensure!(counted.nonzero() == [(counter, 1)], "{what}: {:?} instead of one {counter}", counted.nonzero());
    }
    let log = server.log();
    ensure!(peer.called_back(Duration::from_secs(1))?.is_none(), "a bad request was called back: {log}");
    // The good request that they were made from works: each was dropped for its own fault.
    ensure!(peer.ask(Op::Status, DOMAIN)?.converse()? == 0, "a good request failed: {}", server.log());
    ensure!(peer.ask(Op::Off, DOMAIN)?.converse()? == 0);
    ensure!(peer.ask(Op::Status, DOMAIN)?.converse()? == 2);
    Ok(())
}

#[test]
fn the_socket_refuses_the_same() -> Result<()> {
    let bench = Bench::new()?;
    let other = bench.hypervisor.guest(2)?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let server = bench.serve(&bench.config("off"))?;
    let position = server.log_position();
    for (_, _, payload) in bad_requests(&peer, other.v4)? {
        peer.send_bytes(&payload)?;
    }
    ensure!(peer.called_back(Duration::from_secs(1))?.is_none(), "a bad request was called back: {}", server.log());
    let lines = server.log_position() - position;
    ensure!(lines <= 2, "bad packets must not be logged one by one: {lines} lines: {}", server.log());
    ensure!(peer.ask(Op::Status, DOMAIN)?.converse()? == 0, "a good request failed: {}", server.log());
    ensure!(peer.ask(Op::Off, DOMAIN)?.converse()? == 0);
    ensure!(peer.ask(Op::Status, DOMAIN)?.converse()? == 2);
    Ok(())
}

#[test]
fn a_guest_behind_nat_is_served_where_the_source_need_not_match() -> Result<()> {
    let bench = Bench::new()?;
    let behind = bench.hypervisor.guest(2)?;
    for attach in ["auto", "off"] {
        let server = bench.serve(&Config { strict_source: Some("no"), ..bench.config(attach) })?;
        // As behind a NAT, the request names guest 2's listener and comes from guest 1's address.
        let (front, listener) = (Peer::new(&bench.guest, &key(), Family::V4)?, Peer::new(&behind, &key(), Family::V4)?);
        front.send(listener.request(Op::Status, DOMAIN)?)?;
        let call = listener.called_back(Duration::from_secs(20))?;
        let mut call = call.with_context(|| format!("attach={attach}: no callback: {}", server.log()))?;
        ensure!(call.converse()? == 0);
    }
    Ok(())
}
