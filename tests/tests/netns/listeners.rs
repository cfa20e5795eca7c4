//! Several listeners in one daemon: families, keys, networks, and what one knows of the other.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::client::{Client, Family};
use fence_lab::kernel::{tcx_on, xdp_on};
use fence_lab::lab::{BRIDGE, Guest, HYPERVISOR_V4, HYPERVISOR_V6};
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::server::{Server, Which};
use nix::sys::signal::Signal;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// On a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

const OF_B: &[u8] = b"the key of cluster b, of some length";

/// Starts `fence-daemon` with these listeners, and waits until it serves.
pub(crate) fn serve(bench: &Bench, listener: &str, sections: &str) -> Result<Server> {
    let text = format!(
        "fence_virtd {{\n\t{listener};\n\tbackend = \"libvirt\";\n}}\n\
         listeners {{\n{sections}\n}}\nbackends {{\n\tlibvirt {{\n\t\turi = \"test:///default\";\n\t}}\n}}\n"
    );
    let file = bench.hypervisor.write("fence_virt.conf", text.as_bytes())?;
    let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, DEFAULT_PORT, &[])?;
    server.wait_ready(LIMIT)?;
    Ok(server)
}

/// Waits for a line with all these words.
pub(crate) fn wait_line(server: &Server, words: &[&str]) -> Result<()> {
    let found = server.wait_log(0, LIMIT, |line| words.iter().all(|word| line.contains(word)).then_some(()));
    found.with_context(|| format!("no line with {words:?}: {}", server.log()))
}

/// Asks about the domain, and checks how the request came.
pub(crate) fn expect_via(bench: &Bench, server: &Server, guest: &Guest, client: &Client, via: &str) -> Result<()> {
    // Each section loads a program of its own, and serves by the socket until then.
    if let Some(section) = via.strip_prefix("kernel:") {
        wait_line(server, &[&format!("multicast \"{section}\": the kernel program is attached now")])?;
    }
    let position = server.log_position();
    bench.expect(server, guest.space(), client, 0)?;
    let fence = server.next_fence(position)?;
    ensure!(fence.get("via") == Some(via), "came via {:?}, not {via}: {}", fence.get("via"), server.log());
    Ok(())
}

/// Checks that nobody answers the client.
pub(crate) fn unanswered(server: &Server, guest: &Guest, client: &Client) -> Result<()> {
    let client = client.clone().retransmit(5).timeout(3);
    let answer = client.run(guest.space())?;
    ensure!(answer.code != Some(0), "answered: {}\n{}", answer.stdout, server.log());
    Ok(())
}

/// A second bridge, and the guest behind it.
pub(crate) fn second_network(bench: &Bench) -> Result<Guest> {
    let ip = |arguments: &str| bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop);
    let guest = bench.hypervisor.guest(2)?;
    ip("link del vnet2")?;
    ip("link add virbr1 type bridge")?;
    ip("addr add 192.168.123.1/24 dev virbr1")?;
    ip("link set virbr1 up")?;
    ip(&format!("link add vnet9 type veth peer name eth9 netns {}", guest.name))?;
    ip("link set vnet9 master virbr1")?;
    ip("link set vnet9 up")?;
    for arguments in ["addr add 192.168.123.12/24 dev eth9", "link set eth9 up", "route add 224.0.0.0/4 dev eth9"] {
        guest.space().must("ip", &arguments.split(' ').collect::<Vec<_>>())?;
    }
    bench.hypervisor.wait_forwarding("vnet9")?;
    Ok(guest)
}

#[test]
fn tcp_serves_without_multicast_and_its_interface() -> Result<()> {
    let bench = Bench::new()?;
    let (key, second) = (&bench.key, bench.hypervisor.path("second.key"));
    let section = format!("tcp {{ address = \"0.0.0.0\"; key_file = \"{key}\"; key_file2 = \"{second}\"; }}");
    let mut server = serve(&bench, "listener = \"tcp\"", &section)?;
    let client = bench.about_domain("status").tcp(&HYPERVISOR_V4.to_string());
    expect_via(&bench, &server, &bench.guest, &client, "tcp")?;
    unanswered(&server, &bench.guest, &bench.about_domain("status"))?;
    for table in ["udp", "udp6"] {
        let sockets = bench.hypervisor.proc_net(table)?;
        ensure!(!sockets.contains(&format!(":{DEFAULT_PORT:04X} ")), "a socket for multicast: {sockets}");
    }
    ensure!(xdp_on(&bench.hypervisor, BRIDGE)?.is_none() && tcx_on(&bench.hypervisor, BRIDGE)?.is_empty());
    let (code, report) = server.status()?;
    let listeners = report["listeners"].as_array().context("no list")?;
    ensure!(code == Some(0) && listeners.len() == 1 && listeners[0]["kind"] == "tcp", "{report:#}");
    ensure!(report["kernel"].is_null(), "{report:#}");

    // SIGHUP reads its own second key.
    bench.hypervisor.write("second.key", OF_B)?;
    let position = server.log_position();
    server.process().signal(Signal::SIGHUP)?;
    let changed = server.wait_log(position, LIMIT, |line| line.contains("SIGHUP: ").then(|| line.to_owned()));
    ensure!(changed.is_some_and(|line| line.contains("accepted=2")), "{}", server.log());
    let other = bench.hypervisor.write("other.key", OF_B)?;
    let client = Client::new("status", &other).domain(DOMAIN).tcp(&HYPERVISOR_V4.to_string());
    expect_via(&bench, &server, &bench.guest, &client, "tcp")
}

/// One bridge has one place for XDP: the second program is tcx, and both families are verified in
/// the kernel.
#[test]
fn both_families_of_one_cluster_are_served_by_one_daemon() -> Result<()> {
    let bench = Bench::new()?;
    let keys = format!("interface = \"{BRIDGE}\"; key_file = \"{}\";", bench.key);
    let sections = format!("multicast {{ {keys} }}\nmulticast \"six\" {{ family = \"ipv6\"; {keys} }}");
    let server = serve(&bench, "listener = \"multicast\"", &sections)?;
    wait_line(&server, &["multicast: ", "the kernel program is attached now", "program=generic"])?;
    wait_line(&server, &["multicast \"six\": ", "the kernel program is attached now", "program=tcx"])?;
    for (family, via) in [(Family::V4, "kernel"), (Family::V6, "kernel:six")] {
        let client = bench.about_domain("status").family(family);
        expect_via(&bench, &server, &bench.guest, &client, via)?;
    }
    let (code, report) = server.status()?;
    ensure!(code == Some(0) && report["listeners"][1]["name"] == "six", "{report:#}");
    ensure!(report["kernel"]["counters"]["delivered"].as_u64() >= Some(2), "both programs count: {report:#}");
    let ended = server.stop(Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{}", ended.stderr);
    ensure!(xdp_on(&bench.hypervisor, BRIDGE)?.is_none() && tcx_on(&bench.hypervisor, BRIDGE)?.is_empty());
    Ok(())
}

/// Both clusters use fence_xvm's defaults, each on its own bridge with its own key.
#[test]
fn two_clusters_with_two_keys_on_two_bridges_share_one_daemon() -> Result<()> {
    for attach in ["auto", "off"] {
        let bench = Bench::new()?;
        let guest_b = second_network(&bench)?;
        let (a, b) = (&bench.key, bench.hypervisor.write("b.key", OF_B)?);
        let section = |name: &str, interface: &str, key: &str| {
            format!(
                "multicast \"{name}\" {{ interface = \"{interface}\"; key_file = \"{key}\"; attach = \"{attach}\"; }}\n"
            )
        };
        let sections = [section("a", BRIDGE, a), section("b", "virbr1", &b)].concat();
        let mut server = serve(&bench, "listener = \"multicast\"", &sections)?;
        let via = if attach == "auto" { "kernel" } else { "socket" };
        if attach == "auto" {
            for name in ["a", "b"] {
                wait_line(&server, &[&format!("multicast \"{name}\": "), "the kernel program is attached now"])?;
            }
        }
        let ask = |key: &str| Client::new("status", key).domain(DOMAIN);
        let (via_a, via_b) = (format!("{via}:a"), format!("{via}:b"));
        expect_via(&bench, &server, &bench.guest, &ask(a), &via_a)?;
        expect_via(&bench, &server, &guest_b, &ask(&b), &via_b)?;
        unanswered(&server, &bench.guest, &ask(&b))?;
        unanswered(&server, &guest_b, &ask(a))?;

        // Each listener's keys rotate, and only there.
        let new = bench.hypervisor.write("new.key", b"the new key of cluster b, of some length")?;
        bench.hypervisor.space().must("cp", &[&new, &b])?;
        let position = server.log_position();
        server.process().signal(Signal::SIGHUP)?;
        let line = server.wait_log(position, LIMIT, |line| line.contains("SIGHUP: ").then(|| line.to_owned()));
        ensure!(line.as_ref().is_some_and(|line| line.contains("accepted=2 added=1 dropped=1")), "{line:?}");
        expect_via(&bench, &server, &guest_b, &ask(&new), &via_b)?;
        expect_via(&bench, &server, &bench.guest, &ask(a), &via_a)?;
    }
    Ok(())
}

/// The same key at both, so that only the shared memory can tell.
#[test]
fn a_request_of_one_listener_does_nothing_at_another() -> Result<()> {
    let bench = Bench::new()?;
    for attach in ["auto", "off"] {
        let keys = format!("interface = \"{BRIDGE}\"; key_file = \"{}\"; attach = \"{attach}\";", bench.key);
        let sections = format!("multicast {{ {keys} }}\nmulticast \"other\" {{ port = \"1230\"; {keys} }}");
        let server = serve(&bench, "listener = \"multicast\"", &sections)?;
        let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
        let request = peer.sign(peer.request(Op::Off, DOMAIN)?)?;
        peer.send_bytes(request.as_bytes())?;
        let mut call = peer.called_back(LIMIT)?.context("no callback")?;
        ensure!(call.converse()? == 0, "{}", server.log());
        bench.expect(&server, bench.guest.space(), &bench.about_domain("on"), 0)?;
        let replayed = |server: &Server| -> Result<u64> {
            let (_, report) = server.status()?;
            let drops = report["kernel"]["counters"]["drop_replay"].as_u64().unwrap_or(0);
            let at_socket = report["socket"]["drop_replay"].as_u64().unwrap_or(0);
            Ok(drops + at_socket + report["requests"]["replays"].as_u64().unwrap_or(0))
        };
        ensure!(replayed(&server)? == 0, "{}", server.log());
        peer.send_bytes_to_port(request.as_bytes(), 1230)?;
        poll_until("the replay to be counted", LIMIT, || Ok((replayed(&server)? > 0).then_some(())))
            .with_context(|| server.log())?;
        ensure!(peer.called_back(Duration::from_secs(2))?.is_none(), "a replay was called back: {}", server.log());
        bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
        // A new request is served there, by the label of its listener.
        let client = bench.about_domain("status").port(1230);
        bench.expect(&server, bench.guest.space(), &client, 0)?;
        let (_, report) = server.status()?;
        let newest = &report["requests"]["recent"][0];
        ensure!(newest["listener"] == "other", "{newest:#}");
    }
    Ok(())
}

/// A missing interface costs its own guests fencing, and nobody else.
#[test]
fn a_listener_that_hears_nothing_keeps_no_other_from_serving() -> Result<()> {
    let bench = Bench::new()?;
    let key = format!("key_file = \"{}\";", bench.key);
    let sections = format!(
        "multicast {{ interface = \"{BRIDGE}\"; {key} }}\nmulticast \"late\" {{ interface = \"virbr1\"; {key} }}\n\
         tcp {{ address = \"192.0.2.99\"; {key} }}"
    );
    let server = serve(&bench, "listener = \"multicast,tcp\"", &sections)?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    wait_line(&server, &["multicast \"late\": ", "waiting for the interface virbr1"])?;
    let (code, report) = server.status()?;
    let problems = report["problems"].to_string();
    ensure!(code == Some(1) && problems.contains("late") && problems.contains("by tcp"), "{report:#}");
    let guest = second_network(&bench)?;
    wait_line(&server, &["requests are heard now", "late", "virbr1"])?;
    bench.expect(&server, guest.space(), &bench.about_domain("status").retransmit(2), 0)?;
    Ok(())
}

/// Addresses that name the right cluster, so that only the key and the group can tell.
#[test]
fn a_group_keeps_two_clusters_of_one_daemon_apart() -> Result<()> {
    let bench = Bench::new()?;
    let (a, b) = (&bench.key, bench.hypervisor.write("b.key", OF_B)?);
    let listeners = format!(
        "multicast \"a\" {{ interface = \"{BRIDGE}\"; key_file = \"{a}\"; }}\n\
         multicast \"b\" {{ interface = \"{BRIDGE}\"; port = \"1230\"; key_file = \"{b}\"; }}"
    );
    let group = |listener: &str| format!("group {{\n{listener}\nip = \"192.168.122.11\"; uuid = \"{DOMAIN}\"; }}");
    let served = |groups: &str| serve(&bench, "listener = \"multicast\"", &format!("{listeners}\n}}\n{groups}"));
    let of_a = || bench.about_domain("status");
    let of_b = || Client::new("status", &b).domain(DOMAIN).port(1230);

    // `serve` closes the section of the listeners, and so the one of the groups.
    let server = served("groups {\ngroup { ip = \"192.168.122.99\"; uuid = \"nobody\"; }")?;
    wait_line(&server, &["multicast \"a\" and multicast \"b\"", "different keys"])?;
    server.stop(Signal::SIGTERM)?;

    let server = served(&format!("groups {{\n{}", group("listener = \"a\";")))?;
    expect_via(&bench, &server, &bench.guest, &of_a(), "kernel:a")?;
    let position = server.log_position();
    // Permission denied.
    bench.expect(&server, bench.guest.space(), &of_b(), 3)?;
    let refused =
        server.wait_log(position, LIMIT, |line| line.contains("does not count at this listener").then_some(()));
    refused.with_context(|| server.log())?;
    ensure!(!server.log().contains("different keys"), "{}", server.log());
    let list = Client::new("list", &b).port(1230).run(bench.guest.space())?;
    ensure!(list.code == Some(0) && !list.stdout.contains(DOMAIN), "{list:?}");
    server.stop(Signal::SIGTERM)?;

    let both = [group("listener = \"a\";"), group("listener = \"b\";")].concat();
    let server = served(&format!("groups {{\n{both}"))?;
    expect_via(&bench, &server, &bench.guest, &of_a(), "kernel:a")?;
    expect_via(&bench, &server, &bench.guest, &of_b(), "kernel:b")?;
    Ok(())
}

/// Four requests to each of two listeners, where five may come at once in all.
#[test]
fn a_sender_has_one_budget_at_all_listeners() -> Result<()> {
    let bench = Bench::new()?;
    let keys = format!("interface = \"{BRIDGE}\"; key_file = \"{}\";", bench.key);
    let sections = format!("multicast {{ {keys} }}\nmulticast \"other\" {{ port = \"1230\"; {keys} }}");
    // A token a minute at most, so that none comes back meanwhile.
    let limits = "listener = \"multicast\";\nrate_limit { request_rate = \"1\"; request_burst = \"5\"; }\n#";
    let server = serve(&bench, limits, &sections)?;
    for name in ["multicast: ", "multicast \"other\": "] {
        wait_line(&server, &[name, "the kernel program is attached now"])?;
    }
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    for port in [DEFAULT_PORT, 1230] {
        for _ in 0..8 {
            peer.send_bytes_to_port(peer.sign(peer.request(Op::Status, DOMAIN)?)?.as_bytes(), port)?;
        }
    }
    let counter = |name: &str| -> Result<u64> {
        let (_, report) = server.status()?;
        report["kernel"]["counters"][name].as_u64().with_context(|| format!("no {name}: {report:#}"))
    };
    let counted = || anyhow::Ok((counter("delivered")?, counter("drop_delivery_limit").unwrap_or(0)));
    poll_until("all to be counted", LIMIT, || {
        let (delivered, dropped) = counted()?;
        Ok((delivered + dropped == 16).then_some(()))
    })
    .with_context(|| format!("{:?}", counted().ok()))?;
    let (delivered, _) = counted()?;
    // A second's token may have come back.
    ensure!((5..=8).contains(&delivered), "{delivered} of 16 were delivered: {}", server.log());
    let (_, report) = server.status()?;
    ensure!(report["sources"].as_array().map(Vec::len) == Some(1), "{:#}", report["sources"]);
    Ok(())
}

/// A file of this name and these addresses, as the resolver reads it.
fn hosts(bench: &Bench, addresses: &[&str]) -> Result<()> {
    let lines: String = addresses.iter().map(|address| format!("{address} fencing.example\n")).collect();
    bench.hypervisor.write("hosts", lines.as_bytes()).map(drop)
}

#[test]
fn tcp_listens_at_each_address_of_a_name_and_follows_it() -> Result<()> {
    let bench = Bench::new()?;
    hosts(&bench, &[])?;
    bench.hypervisor.write("nsswitch.conf", b"hosts: files\n")?;
    for file in ["hosts", "nsswitch.conf"] {
        bench.hypervisor.space().must("mount", &["--bind", &bench.hypervisor.path(file), &format!("/etc/{file}")])?;
    }
    let keys = format!("key_file = \"{}\";", bench.key);
    let sections =
        format!("multicast {{ interface = \"{BRIDGE}\"; {keys} }}\ntcp {{ address = \"fencing.example\"; {keys} }}");
    let mut server = serve(&bench, "listener = \"multicast,tcp\"", &sections)?;
    // A name without an address keeps no other listener from serving.
    wait_line(&server, &["tcp: fencing.example cannot be looked up", "no client can connect", "trying again"])?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    let (code, report) = server.status()?;
    ensure!(code == Some(1) && report["problems"].to_string().contains("fencing.example"), "{report:#}");

    // It is looked up again without being told, and each address counts.
    let (v4, v6) = (HYPERVISOR_V4.to_string(), HYPERVISOR_V6.to_string());
    hosts(&bench, &[&v4, &v6])?;
    for address in [&v4, &v6] {
        wait_line(&server, &["tcp: clients can connect", address])?;
        let client = bench.about_domain("status").tcp(address);
        expect_via(&bench, &server, &bench.guest, &client, "tcp")?;
    }
    let (code, report) = server.status()?;
    ensure!(code == Some(0) && report["listeners"][1]["address"] == "fencing.example", "{report:#}");

    // SIGHUP looks it up once more. What is gone is closed.
    hosts(&bench, &[&v6])?;
    server.process().signal(Signal::SIGHUP)?;
    wait_line(&server, &["tcp: closed", &v4])?;
    let refused = bench.about_domain("status").tcp(&v4).run(bench.guest.space())?;
    ensure!(refused.code == Some(1), "{refused:?}");
    expect_via(&bench, &server, &bench.guest, &bench.about_domain("status").tcp(&v6), "tcp")?;

    // Without an answer the last addresses stay.
    hosts(&bench, &[])?;
    server.process().signal(Signal::SIGHUP)?;
    wait_line(&server, &["tcp: fencing.example cannot be looked up", "its last addresses stay"])?;
    expect_via(&bench, &server, &bench.guest, &bench.about_domain("status").tcp(&v6), "tcp")?;
    hosts(&bench, &["127.0.0.1"])?;
    server.process().signal(Signal::SIGHUP)?;
    wait_line(&server, &["only this host itself can connect", "127.0.0.1"])?;
    Ok(())
}
