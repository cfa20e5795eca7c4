//! The tcp listener: stock's `fence_virt`, peers that misbehave, and what one listener knows of the
//! other.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::hash::HashKind;
use fence_common::wire::{DEFAULT_PORT, Op, Request};
use fence_lab::client::{Client, Family};
use fence_lab::lab::{BRIDGE, HYPERVISOR_V4, HYPERVISOR_V6};
use fence_lab::peer::{CallBack, Peer};
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server};
use serde_json::Value;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// On a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

const ANY: &[(&str, &str)] = &[("address", "0.0.0.0")];
const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(HYPERVISOR_V4), DEFAULT_PORT);

fn by_tcp(bench: &Bench, op: &str) -> Client {
    bench.about_domain(op).tcp(&HYPERVISOR_V4.to_string())
}

fn peer(bench: &Bench) -> Result<Peer> {
    Peer::new(&bench.guest, &key(), Family::V4)
}

/// A connection over which this request was sent as it is.
fn sent(bench: &Bench, peer: &Peer, request: &Request) -> Result<CallBack> {
    let mut connection = peer.connect(bench.guest.space(), HERE)?;
    connection.write(request.as_bytes())?;
    Ok(connection)
}

/// Checks that the daemon closes a connection without a word.
fn closed(connection: &mut CallBack, server: &Server) -> Result<()> {
    let said = connection.rest()?;
    ensure!(said.is_empty(), "it said {said:02x?}: {}", server.log());
    Ok(())
}

/// Checks that both listeners answer another guest before they give up any of the silent peers.
fn others_are_served_at_once(bench: &Bench, server: &Server, number: u8, silent: &[&CallBack]) -> Result<()> {
    let guest = bench.hypervisor.guest(number)?;
    for client in [by_tcp(bench, "status"), bench.about_domain("status")] {
        bench.expect(server, guest.space(), &client, 0)?;
        for peer in silent {
            ensure!(peer.is_open()?, "answered only after a silent peer was given up: {}", server.log());
        }
    }
    Ok(())
}

/// The tcp listener in a report.
fn listener(report: &Value) -> &Value {
    let mut listeners = report["listeners"].as_array().into_iter().flatten();
    listeners.find(|listener| listener["kind"] == "tcp").unwrap_or(&Value::Null)
}

/// A counter of the tcp listener.
fn counter(server: &Server, name: &str) -> Result<u64> {
    let (_, report) = server.status()?;
    listener(&report)["counters"][name].as_u64().with_context(|| format!("no counter {name}: {report}"))
}

#[test]
fn each_operation_is_answered_on_the_clients_own_connection() -> Result<()> {
    let bench = Bench::new()?;
    // Nothing can reach the guest that it has not asked for.
    let closed = "table inet t { chain c { type filter hook input priority 0; policy drop; \
                  ct state established,related accept; icmpv6 type { 133, 134, 135, 136 } accept; }; }";
    bench.guest.space().must("nft", &[closed])?;
    let server = bench.serve(&bench.with_tcp(ANY))?;
    for (op, code) in [("status", 0), ("off", 0), ("status", 2), ("off", 0), ("on", 0), ("reboot", 0), ("status", 0)] {
        bench.expect_via(&server, &by_tcp(&bench, op), code, "tcp")?;
    }
    for (op, code) in [("monitor", 0), ("list", 0)] {
        let answer = bench.expect_via(&server, &bench.client(op).tcp(&HYPERVISOR_V4.to_string()), code, "tcp")?;
        ensure!(op != "list" || answer.stdout.contains(DOMAIN), "{}", answer.stdout);
    }
    let unknown = bench.client("off").domain("nobody").tcp(&HYPERVISOR_V4.to_string());
    bench.expect_via(&server, &unknown, 1, "tcp")?;
    let (code, report) = server.status()?;
    ensure!(code == Some(0) && listener(&report)["hears"] == true, "{report}");
    ensure!(report["requests"]["recent"][0]["via"] == "tcp", "{report}");
    Ok(())
}

#[test]
fn each_key_of_the_listener_has_its_effect() -> Result<()> {
    let bench = Bench::new()?;
    let ipv6 = HYPERVISOR_V6.to_string();
    let status = |address: &str| bench.about_domain("status").tcp(address);
    let v4 = || status(&HYPERVISOR_V4.to_string());
    let key = bench.key.as_str();
    type Keys<'k> = &'k [(&'static str, &'k str)];
    let cases: [(Keys<'_>, Client, i32); 10] = [
        // Only this host itself can connect by default.
        (&[], v4(), 1),
        (&[("address", "192.168.122.1"), ("port", "4464"), ("key_file", key), ("auth", "sha256")], v4().port(4464), 0),
        (&[("address", "192.168.122.1"), ("port", "4464")], v4(), 1),
        (&[("address", "0.0.0.0"), ("interface", "virbr0")], v4(), 0),
        (&[("address", "0.0.0.0"), ("interface", "lo")], v4(), 1),
        (&[("address", "0.0.0.0"), ("hash", "sha512")], v4(), 1),
        (&[("address", "0.0.0.0"), ("hash", "sha512")], v4().hash(HashKind::Sha512), 0),
        (&[("address", "0.0.0.0"), ("hash", "none")], v4().hash(HashKind::None), 0),
        (&[("address", "::"), ("family", "ipv6")], status(&ipv6), 0),
        // A socket of both families.
        (&[("address", "::")], v4(), 0),
    ];
    for (keys, client, code) in cases {
        let server = bench.serve(&bench.with_tcp(keys))?;
        bench.expect(&server, bench.guest.space(), &client, code).with_context(|| format!("{keys:?}"))?;
    }
    Ok(())
}

#[test]
fn silent_connections_and_slow_writers_delay_nobody() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(ANY))?;
    let peer = peer(&bench)?;
    let mut silent = Vec::new();
    for number in 0..1000 {
        let mut connection = peer.connect(bench.guest.space(), HERE)?;
        if number % 10 == 0 {
            connection.write(&[1; 100])?;
        }
        silent.push(connection);
    }
    // From their own address as well: the oldest one makes room. One after the other, the silent
    // ones would take a thousand seconds, and no client waits so long.
    bench.expect(&server, bench.guest.space(), &by_tcp(&bench, "status"), 0)?;
    others_are_served_at_once(&bench, &server, 2, &[])?;
    // Each is closed without another word of it.
    for connection in &mut silent {
        closed(connection, &server)?;
    }
    ensure!(counter(&server, "drop_length")? == 1000, "{}", server.log());
    Ok(())
}

#[test]
fn many_clients_of_one_address_at_once_are_all_answered() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(ANY))?;
    let _silent = peer(&bench)?.connect(bench.guest.space(), HERE)?;
    let status = by_tcp(&bench, "status");
    let mut clients: Vec<_> = (0..50).map(|_| status.start(bench.guest.space())).collect::<Result<_>>()?;
    for client in clients.drain(..) {
        let ended = client.finish(LIMIT)?;
        ensure!(ended.code == Some(0), "{ended:?}: {}", server.log());
    }
    Ok(())
}

#[test]
fn silence_after_a_request_delays_nobody() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(ANY))?;
    let peer = peer(&bench)?;
    let request = || peer.sign(peer.stream_request(Op::Status, DOMAIN)?);
    let without_a_challenge = sent(&bench, &peer, &request()?)?;
    let mut without_a_response = sent(&bench, &peer, &request()?)?;
    without_a_response.challenge()?;
    // This one never reads its answer.
    let mut unread = sent(&bench, &peer, &peer.sign(peer.stream_request(Op::HostList, "")?)?)?;
    unread.challenge()?;
    unread.respond()?;
    others_are_served_at_once(&bench, &server, 2, &[&without_a_challenge, &without_a_response])
}

#[test]
fn what_is_no_request_is_closed_counted_and_not_logged() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(ANY))?;
    let peer = peer(&bench)?;
    let good = || peer.stream_request(Op::Off, DOMAIN);
    let signed = |request: Request| peer.sign(request);
    let stranger = Peer::new(&bench.guest, b"another key", Family::V4)?;
    let with_address = signed(peer.request(Op::Off, DOMAIN)?)?;
    let mut wrong = signed(good()?)?;
    wrong.hash[0] ^= 1;
    let position = server.log_position();
    for (request, name) in [
        (signed(Request { op: 9, ..good()? })?, "drop_operation"),
        (Request { hash_kind: 9, ..good()? }, "drop_hash_unknown"),
        (Request { hash_kind: 0, ..good()? }, "drop_unsigned"),
        (signed(Request { domain: [b'x'; 64], ..good()? })?, "drop_domain"),
        (signed(Request { family: 2.into(), ..good()? })?, "drop_family"),
        (signed(Request { address: [1; 28], ..good()? })?, "drop_address"),
        (with_address, "drop_port"),
        (wrong, "drop_digest"),
        (stranger.sign(good()?)?, "drop_digest"),
    ] {
        let before = counter(&server, name)?;
        closed(&mut sent(&bench, &peer, &request)?, &server)?;
        ensure!(counter(&server, name)? == before + 1, "{name}: {}", server.log());
    }
    let mut short = peer.connect(bench.guest.space(), HERE)?;
    short.write(&signed(good()?)?.as_bytes()[..175])?;
    short.stop_writing()?;
    closed(&mut short, &server)?;
    ensure!(counter(&server, "drop_length")? == 1, "{}", server.log());
    bench.expect(&server, bench.guest.space(), &by_tcp(&bench, "status"), 0)?;
    let fence = server.next_fence(position)?;
    ensure!(fence.get("op") == Some("status"), "something else was logged: {}", server.log());
    Ok(())
}

#[test]
fn a_request_acts_once_whichever_way_it_comes_again() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&Config { attach: Some("auto"), ..bench.with_tcp(ANY) })?;
    let peer = peer(&bench)?;
    let off = peer.sign(peer.stream_request(Op::Off, DOMAIN)?)?;
    let mut original = sent(&bench, &peer, &off)?;
    original.challenge()?;
    // While the original is open, and after its answer.
    closed(&mut sent(&bench, &peer, &off)?, &server)?;
    original.respond()?;
    ensure!(original.reply()? == Some(0), "{}", server.log());
    bench.expect(&server, bench.guest.space(), &by_tcp(&bench, "on"), 0)?;
    closed(&mut sent(&bench, &peer, &off)?, &server)?;
    // A new datagram of the same request by multicast.
    let again = Request { seqno: off.seqno, ..peer.request(Op::Off, DOMAIN)? };
    peer.send(again)?;
    ensure!(peer.called_back(Duration::from_secs(3))?.is_none(), "called back: {}", server.log());
    // And the other way round.
    let request = peer.request(Op::Off, DOMAIN)?;
    peer.send(request)?;
    let mut call = peer.called_back(LIMIT)?.context("no callback")?;
    ensure!(call.converse()? == 0, "{}", server.log());
    bench.expect(&server, bench.guest.space(), &by_tcp(&bench, "on"), 0)?;
    let again = Request { seqno: request.seqno, ..peer.stream_request(Op::Off, DOMAIN)? };
    closed(&mut sent(&bench, &peer, &peer.sign(again)?)?, &server)?;
    bench.expect(&server, bench.guest.space(), &by_tcp(&bench, "status"), 0)?;
    Ok(())
}

#[test]
fn a_challenge_of_one_listener_is_answered_by_none() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.with_tcp(ANY))?;
    let peer = peer(&bench)?;
    let by_tcp = || sent(&bench, &peer, &peer.sign(peer.stream_request(Op::Off, DOMAIN)?)?);
    let by_multicast = || peer.ask(Op::Off, DOMAIN);
    type Ask<'a> = &'a dyn Fn() -> Result<CallBack>;
    let pairs: [[Ask<'_>; 2]; 3] = [[&by_tcp, &by_multicast], [&by_multicast, &by_tcp], [&by_tcp, &by_tcp]];
    // One pair after the other: a second request by multicast supersedes the first.
    for [ask, mirror] in pairs {
        let (mut asked, mut mirror) = (ask()?, mirror()?);
        asked.challenge()?;
        let challenge = asked.read_block()?;
        mirror.write(&challenge)?;
        closed(&mut mirror, &server)?;
    }
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    Ok(())
}

#[test]
fn groups_go_by_the_address_of_the_connection() -> Result<()> {
    let bench = Bench::new()?;
    let other = bench.hypervisor.guest(2)?;
    for (ip, address) in [("192.168.122.11", "0.0.0.0"), ("192.168.122.11", "::"), ("::ffff:192.168.122.11", "0.0.0.0")]
    {
        let more = format!("groups {{ group {{ ip = \"{ip}\"; uuid = \"{DOMAIN}\"; }} }}\n");
        ensure!(bench.guest.v4.to_string() == "192.168.122.11", "the lab has other addresses now");
        let server = bench.serve(&Config { more, ..bench.with_tcp(&[("address", address)]) })?;
        bench.expect(&server, bench.guest.space(), &by_tcp(&bench, "status"), 0)?;
        bench.expect(&server, other.space(), &by_tcp(&bench, "status"), 3)?;
    }
    Ok(())
}

#[test]
fn a_taken_port_or_a_missing_address_costs_multicast_nothing() -> Result<()> {
    let bench = Bench::new()?;
    let taken = bench.hypervisor.space().in_network(|| Ok(std::net::TcpListener::bind(("0.0.0.0", DEFAULT_PORT))?))?;
    let problem = |server: &Server, words: &str| {
        poll_until(words, LIMIT, || {
            let (_, report) = server.status()?;
            let problems = report["problems"].as_array().into_iter().flatten().filter_map(|problem| problem.as_str());
            let found = problems.into_iter().any(|problem| problem.contains(words));
            Ok((found && listener(&report)["hears"] == false).then_some(()))
        })
    };
    let served = |server: &Server, address: &str| {
        poll_until("a client to be served", LIMIT, || {
            let status = bench.about_domain("status").tcp(address).run(bench.guest.space())?;
            Ok((status.code == Some(0)).then_some(()))
        })
        .with_context(|| server.log())
    };
    let server = bench.serve(&bench.with_tcp(ANY))?;
    problem(&server, "TCP port 1229 is taken")?;
    drop(taken);
    served(&server, &HYPERVISOR_V4.to_string())?;
    drop(server);
    let server = bench.serve(&bench.with_tcp(&[("address", "192.168.122.7"), ("interface", "virbr0")]))?;
    problem(&server, "192.168.122.7 is no address of this host")?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    bench.hypervisor.ip(&["address", "add", "192.168.122.7/24", "dev", BRIDGE])?;
    served(&server, "192.168.122.7")
}
