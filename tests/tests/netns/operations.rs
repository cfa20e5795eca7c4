//! Every operation, digest and address family of the stock client, through XDP and through the
//! socket.

use anyhow::{Result, ensure};
use fence_common::hash::HashKind;
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::peer::Peer;
use fence_lab::server::{Config, Server, Which};

use crate::bench::{Bench, DOMAIN, key, listed};

/// A server's answer to each operation in turn. The domain runs at the start and at the end.
const STEPS: [(Op, i32); 14] = [
    (Op::Status, 0),
    (Op::Null, 1),
    (Op::DevStatus, 0),
    (Op::On, 0),
    (Op::Off, 0),
    (Op::Status, 2),
    (Op::Off, 0),
    (Op::Reboot, 0),
    (Op::Status, 2),
    (Op::On, 0),
    (Op::Status, 0),
    (Op::Reboot, 0),
    (Op::Status, 0),
    (Op::HostList, 0),
];

/// The UUID of the test driver's domain.
pub(crate) const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

#[test]
fn every_operation_is_answered_as_stock_answers_it() -> Result<()> {
    let bench = Bench::new()?;
    let server = Server::start(&bench.hypervisor, &Which::from_env()?, &Config::new(&bench.key))?;
    for (op, code) in STEPS {
        let client = if op.names_a_domain() { bench.about_domain(op.name()) } else { bench.client(op.name()) };
        let answer = bench.expect(&server, bench.guest.space(), &client, code)?;
        if op == Op::HostList {
            ensure!(listed(&answer)? == "on");
            ensure!(answer.stdout.contains(UUID), "{}", answer.stdout);
        }
    }
    // By UUID, with and without the flag.
    bench.expect(&server, bench.guest.space(), &bench.client("status").domain(UUID).uuid(), 0)?;
    bench.expect(&server, bench.guest.space(), &bench.client("off").domain(UUID), 0)?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 2)?;
    ensure!(listed(&bench.client("list").run(bench.guest.space())?)? == "off");
    // Unknown domains.
    for (op, code) in [("off", 1), ("on", 1), ("reboot", 1), ("status", 2)] {
        bench.expect(&server, bench.guest.space(), &bench.client(op).domain("nobody"), code)?;
    }
    Ok(())
}

/// Most hosts run the daemon of one driver only. Another configured URI must not remove Pacemaker's
/// targets.
#[test]
fn a_uri_without_a_daemon_fails_the_list_only_where_it_may_have_domains() -> Result<()> {
    let bench = Bench::new()?;
    let uris = vec!["test:///default".to_owned(), "lxc:///".to_owned()];
    let server = Server::start(&bench.hypervisor, &Which::ours()?, &Config { uris, ..Config::new(&bench.key) })?;
    let answer = bench.expect(&server, bench.guest.space(), &bench.client("list"), 0)?;
    ensure!(listed(&answer)? == "on", "{}", answer.stdout);
    bench.hypervisor.write("/etc/libvirt/lxc/ct.xml", b"<domain type='lxc'><name>ct</name></domain>")?;
    let answer = bench.client("list").run(bench.guest.space())?;
    ensure!(answer.code != Some(0), "a list without the container is a success: {}", answer.stdout);
    Ok(())
}

#[test]
fn every_hash_and_family_is_served() -> Result<()> {
    let bench = Bench::new()?;
    let which = Which::from_env()?;
    for family in [Family::V4, Family::V6] {
        for kind in HashKind::ALL {
            let config = Config { family, hash: kind, auth: kind, ..Config::new(&bench.key) };
            let server = Server::start(&bench.hypervisor, &which, &config)?;
            let client = |op| bench.about_domain(op).family(family).hash(kind).auth(kind);
            bench.expect(&server, bench.guest.space(), &client("status"), 0)?;
            bench.expect(&server, bench.guest.space(), &client("off"), 0)?;
            bench.expect(&server, bench.guest.space(), &client("status"), 2)?;
        }
    }
    Ok(())
}

#[test]
fn a_stronger_hash_than_configured_is_served_and_a_weaker_is_not() -> Result<()> {
    let bench = Bench::new()?;
    let server = Server::start(&bench.hypervisor, &Which::from_env()?, &Config::new(&bench.key))?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status").hash(HashKind::Sha512), 0)?;
    for weak in [HashKind::Sha1, HashKind::None] {
        let client = bench.about_domain("off").hash(weak).timeout(3);
        let answer = client.run(bench.guest.space())?;
        ensure!(answer.code != Some(0), "{} was accepted", weak.name());
    }
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    Ok(())
}

#[test]
fn a_list_asked_for_on_the_hypervisor_itself_is_answered() -> Result<()> {
    let bench = Bench::new()?;
    let server = Server::start(&bench.hypervisor, &Which::from_env()?, &Config::new(&bench.key))?;
    let list = bench.expect(&server, bench.hypervisor.space(), &bench.client("list"), 0)?;
    ensure!(listed(&list)? == "on");
    Ok(())
}

#[test]
fn requests_come_through_the_ring_buffer_where_xdp_is_attached() -> Result<()> {
    let bench = Bench::new()?;
    for family in [Family::V4, Family::V6] {
        for kind in HashKind::ALL {
            let config = Config { family, hash: kind, auth: kind, ..bench.config("auto") };
            let server = bench.serve(&config)?;
            let client = |op: &str| bench.client(op).family(family).hash(kind).auth(kind);
            let before = bench.counters()?;
            bench.expect_via(&server, &client("off").domain(DOMAIN), 0, "kernel")?;
            bench.expect_via(&server, &client("status").domain(DOMAIN), 2, "kernel")?;
            let list = bench.expect_via(&server, &client("list"), 0, "kernel")?;
            ensure!(listed(&list)? == "off");
            let counted = &bench.counters()? - &before;
            ensure!(counted.nonzero() == [("delivered", 3)], "{}: {:?}", kind.name(), counted.nonzero());
        }
    }
    Ok(())
}

#[test]
fn requests_come_through_the_socket_where_xdp_is_off() -> Result<()> {
    let bench = Bench::new()?;
    for family in [Family::V4, Family::V6] {
        for kind in HashKind::ALL {
            let config = Config { family, hash: kind, auth: kind, ..bench.config("off") };
            let server = bench.serve(&config)?;
            ensure!(fence_lab::kernel::program_on(&bench.hypervisor, fence_lab::lab::BRIDGE)?.is_none());
            let client = |op: &str| bench.client(op).family(family).hash(kind).auth(kind);
            bench.expect_via(&server, &client("off").domain(DOMAIN), 0, "socket")?;
            bench.expect_via(&server, &client("status").domain(DOMAIN), 2, "socket")?;
            let list = bench.expect_via(&server, &client("list"), 0, "socket")?;
            ensure!(listed(&list)? == "off");
        }
    }
    Ok(())
}

#[test]
fn a_request_from_the_hypervisor_itself_comes_through_the_socket_although_xdp_is_attached() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let (before, position) = (bench.counters()?, server.log_position());
    bench.expect(&server, bench.hypervisor.space(), &bench.client("list"), 0)?;
    ensure!(server.next_fence(position)?.get("via") == Some("socket"), "{}", server.log());
    ensure!((&bench.counters()? - &before).nonzero().is_empty());
    Ok(())
}

#[test]
fn the_log_tells_each_step_in_its_order() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let position = server.log_position();
    bench.expect(&server, bench.guest.space(), &bench.about_domain("off"), 0)?;
    let fence = server.next_fence(position)?;
    let field = |name| fence.get(name).unwrap_or("nothing");
    ensure!(field("op") == "off" && field("domain") == DOMAIN && field("reply") == "success", "{fence:?}");
    ensure!(field("source") == bench.guest.v4.to_string() && field("via") == "kernel", "{fence:?}");
    let steps: Vec<_> = ["verified", "called_back", "dead", "replied"].iter().map(|step| fence.step(step)).collect();
    ensure!(steps.iter().all(Option::is_some) && steps.is_sorted(), "{fence:?}");
    Ok(())
}

#[test]
fn a_client_of_our_own_is_served_like_the_stock_one() -> Result<()> {
    // The tests of misbehaviour build on this client. Without the misbehaviour it must work, also
    // with fence_virtd.
    let bench = Bench::new()?;
    let which = Which::from_env()?;
    for family in [Family::V4, Family::V6] {
        let config = Config { family, ..Config::new(&bench.key) };
        let server = Server::start(&bench.hypervisor, &which, &config)?;
        let peer = Peer::new(&bench.guest, &key(), family)?;
        for (op, reply) in [(Op::Status, 0), (Op::Off, 0), (Op::Status, 2), (Op::Null, 1), (Op::HostList, 253)] {
            let answer = peer.ask(op, DOMAIN)?.converse()?;
            ensure!(answer == reply, "{}: {answer} instead of {reply}: {}", op.name(), server.log());
        }
    }
    Ok(())
}
