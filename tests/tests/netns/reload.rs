//! SIGHUP takes the whole configuration, or nothing of it. `rotation.rs` is about keys.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::client::{Client, Family};
use fence_lab::kernel::{self, tcx_on, xdp_on};
use fence_lab::lab::{BRIDGE, Guest, HYPERVISOR_V4};
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server, Which};
use nix::sys::signal::Signal;
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};
use crate::listeners::{second_network, unanswered};

const SOON: Duration = Duration::from_secs(60);
/// How often the configuration changes under load.
const RELOADS: usize = 200;

/// The usual configuration, with a group that lets the guest fence this domain.
fn grouped(bench: &Bench, domain: &str) -> Config {
    let more = format!("groups {{\n\tgroup {{ ip = \"{}\"; uuid = \"{domain}\"; }}\n}}\n", bench.guest.v4);
    Config { more, tcp: Some(vec![("address", "0.0.0.0".to_owned())]), ..bench.config("auto") }
}

/// A configuration with more sections of listeners.
fn with_sections(text: &str, sections: &[&str]) -> String {
    text.replacen("listeners {\n", &format!("listeners {{\n\t{}\n", sections.join("\n\t")), 1)
}

/// Replaces the configuration file and sends SIGHUP. Returns the log from then on, up to the line
/// with this text.
fn reload(bench: &Bench, server: &mut Server, text: &str, said: &str) -> Result<String> {
    bench.hypervisor.write("fence_virt.conf", text.as_bytes())?;
    let position = server.log_position();
    server.process().signal(Signal::SIGHUP)?;
    server
        .wait_log(position, SOON, |line| line.contains(said).then_some(()))
        .with_context(|| format!("the log does not say {said:?}: {}", server.log()))?;
    Ok(server.log().lines().skip(position).map(|line| format!("{line}\n")).collect())
}

#[test]
fn a_reload_takes_the_whole_configuration_or_nothing() -> Result<()> {
    let bench = Bench::new()?;
    let other = grouped(&bench, "other");
    let mut server = bench.serve(&other)?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let may_ask = |server: &Server| -> Result<bool> {
        let reply = peer.ask(Op::Status, DOMAIN)?.converse().with_context(|| server.log())?;
        Ok(reply == 0)
    };
    let limits = || kernel::dump(&bench.hypervisor, "fence_config");
    let before = limits()?;
    ensure!(!may_ask(&server)?, "{}", server.log());

    let ours = grouped(&bench, DOMAIN);
    let ours = Config { backend: vec![("kill", "libvirt")], ..ours }.render();
    let ours = ours.replacen('{', "{\n\trate_limit { request_rate = \"77\"; request_burst = \"777\"; }", 1);
    let said = "changed: groups, rate limits, how domains are killed and rebooted";
    let log = reload(&bench, &mut server, &ours, said)?;
    ensure!(log.contains("the keys were read again, and are the same") && !log.contains("ERROR"), "{log}");
    ensure!(may_ask(&server)?, "{}", server.log());
    let after = limits()?;
    ensure!(before != after, "the kernel program has the old limits: {after}");

    // Each of these would also let nobody ask, if anything of it were taken.
    let nobody = ours.replace("uuid = \"test\"", "uuid = \"other\"").replace("\"777\"", "\"7\"");
    for (old, new, said) in [
        ("\"libvirt\";\n\t}", "\"bluntly\";\n\t}", "`kill` has an unknown value: \"bluntly\""),
        ("interface = \"virbr0\"", "interface = \"virbr1\"", "there is no interface virbr1 now"),
        ("test:///default", "test:///elsewhere", "`uri` cannot change while the daemon runs"),
        ("fence.key\"", "no.key\"", "no.key does not exist"),
    ] {
        let text = nobody.replace(old, new);
        ensure!(text != nobody, "{old}: {nobody}");
        let log = reload(&bench, &mut server, &text, "the old keys stay in force, and the old configuration")?;
        ensure!(log.contains(said), "{said}: {log}");
        ensure!(may_ask(&server)? && limits()? == after, "{said}: {}", server.log());
        // The file's line, with a caret. A key file has none.
        if !said.contains("no.key") {
            let shown = |server: &Server| server.log().lines().rev().take(8).any(|line| line.contains('^'));
            poll_until("the line with a caret", SOON, || Ok(shown(&server).then_some(())))
                .with_context(|| server.log())?;
            ensure!(log.contains("fence_virt.conf:"), "{log}");
        }
    }
    Ok(())
}

/// Requests are sent once: what the daemon misses stays unanswered.
#[test]
fn no_request_is_lost_over_two_hundred_reloads() -> Result<()> {
    let bench = Bench::new()?;
    let config = |turn: usize| {
        // A second key comes and goes, and so do a group, limits and listeners.
        let second = bench.hypervisor.path("fence.key2");
        let base = grouped(&bench, DOMAIN);
        let config = if turn.is_multiple_of(2) {
            Config { key_file2: Some(second), ..base }
        } else {
            Config { more: base.more.replace("groups {", "groups {\n\tgroup { ip = \"::1\"; uuid = \"a\"; }"), ..base }
        };
        let rate = format!("{{\n\trate_limit {{ request_rate = \"{}\"; }}", 500 + turn);
        let text = config.render().replacen('{', &rate, 1);
        let [six, more] = [
            format!("multicast \"six\" {{ interface = \"virbr0\"; family = \"ipv6\"; key_file = \"{}\"; }}", bench.key),
            "tcp \"more\" { address = \"0.0.0.0\"; port = \"1230\"; }".to_owned(),
        ];
        match turn % 4 {
            0 => with_sections(&text, &[&six]),
            1 => text,
            2 => with_sections(&text, &[&more]),
            _ => with_sections(&text, &[&six, &more]),
        }
    };
    let mut server = bench.serve(&grouped(&bench, DOMAIN))?;
    bench.hypervisor.write("fence.key2", b"another key of some length")?;
    let over = AtomicBool::new(false);
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let (asked, connected) = std::thread::scope(|threads| {
        // By tcp, whose listener stays.
        let connecting = threads.spawn(|| -> Result<usize> {
            let (mut asked, at) = (0, (HYPERVISOR_V4, DEFAULT_PORT).into());
            while !over.load(Ordering::Relaxed) {
                let mut call = peer.connect(bench.guest.space(), at)?;
                call.write(peer.sign(peer.stream_request(Op::Status, DOMAIN)?)?.as_bytes())?;
                let reply = call.converse().with_context(|| format!("connection {asked}"))?;
                ensure!(reply == 0, "connection {asked}: {reply}");
                asked += 1;
            }
            Ok(asked)
        });
        let asking = threads.spawn(|| -> Result<usize> {
            let mut asked = 0;
            while !over.load(Ordering::Relaxed) {
                peer.send(peer.request(Op::Status, DOMAIN)?)?;
                let mut call = peer.called_back(SOON)?.with_context(|| format!("request {asked} is lost"))?;
                let reply = call.converse().with_context(|| format!("request {asked}"))?;
                ensure!(reply == 0, "request {asked}: {reply}");
                asked += 1;
            }
            Ok(asked)
        });
        let reloaded = (0..RELOADS).try_for_each(|turn| {
            ensure!(!asking.is_finished() && !connecting.is_finished(), "a request failed before reload {turn}");
            reload(&bench, &mut server, &config(turn), "the configuration was read again, and changed").map(drop)
        });
        over.store(true, Ordering::Relaxed);
        let asked = asking.join().unwrap_or_else(|_| anyhow::bail!("the client panicked"));
        let connected = connecting.join().unwrap_or_else(|_| anyhow::bail!("the connected client panicked"));
        let both = asked.and_then(|asked| Ok((asked, connected?))).with_context(|| server.log())?;
        reloaded.map(|()| both)
    })?;
    eprintln!("{asked} requests and {connected} connections beside {RELOADS} reloads");
    ensure!(asked.min(connected) > RELOADS / 20, "only {asked} requests, {connected} connections");
    let log = server.log();
    ensure!(!log.contains("ERROR"), "{log}");
    Ok(())
}

/// Listeners begin, end, and go to another interface, while others serve.
#[test]
fn a_reload_begins_moves_and_ends_listeners() -> Result<()> {
    let bench = Bench::new()?;
    let other = second_network(&bench)?;
    let keys = format!("key_file = \"{}\";", bench.key);
    let text = |listener: &str, sections: &str| {
        format!(
            "fence_virtd {{\n\tlistener = \"{listener}\";\n\tbackend = \"libvirt\";\n}}\n\
             listeners {{\n{sections}\n}}\nbackends {{\n\tlibvirt {{\n\t\turi = \"test:///default\";\n\t}}\n}}\n"
        )
    };
    let first = format!("multicast {{ interface = \"virbr0\"; {keys} }}");
    let file = bench.hypervisor.write("fence_virt.conf", text("multicast", &first).as_bytes())?;
    let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, DEFAULT_PORT, &[])?;
    server.wait_ready(SOON)?;
    let served = |server: &Server, guest: &Guest, client: &Client| bench.expect(server, guest.space(), client, 0);
    let asks = bench.about_domain("status");
    let by_tcp = asks.clone().tcp(&HYPERVISOR_V4.to_string());
    let count =
        |server: &Server| -> Result<usize> { Ok(server.status()?.1["listeners"].as_array().map_or(0, Vec::len)) };
    server
        .wait_log(0, SOON, |line| line.contains("the kernel program is attached now").then_some(()))
        .with_context(|| server.log())?;
    served(&server, &bench.guest, &asks)?;
    unanswered(&server, &other, &asks)?;

    // The same group elsewhere, and a port. The first one keeps its socket and its program.
    let both =
        format!("{first}\n\tmulticast \"b\" {{ interface = \"virbr1\"; {keys} }}\n\ttcp {{ address = \"0.0.0.0\"; }}");
    let log = reload(&bench, &mut server, &text("multicast,tcp", &both), "and changed: listeners")?;
    ensure!(log.contains("multicast \"b\": served from now on") && log.contains("loaded only at a start"), "{log}");
    for (guest, client, via) in
        [(&bench.guest, &asks, "kernel"), (&other, &asks, "socket:b"), (&bench.guest, &by_tcp, "tcp")]
    {
        let position = server.log_position();
        served(&server, guest, client)?;
        let fence = server.next_fence(position)?;
        ensure!(fence.get("via") == Some(via), "{fence:?}: {}", server.log());
    }
    ensure!(count(&server)? == 3, "{:#}", server.status()?.1);

    // All or nothing: a port is taken, an interface is not there.
    let _taken = bench.hypervisor.space().in_network(|| Ok(std::net::TcpListener::bind(("0.0.0.0", 1300))?))?;
    for (section, said) in [
        ("tcp \"c\" { address = \"0.0.0.0\"; port = \"1300\"; }", "TCP port 1300 is taken"),
        (&*format!("multicast \"c\" {{ interface = \"virbr7\"; {keys} }}"), "there is no interface virbr7 now"),
    ] {
        let wrong = format!("{both}\n\t{section}");
        let log = reload(&bench, &mut server, &text("multicast,tcp", &wrong), "the old keys stay in force")?;
        ensure!(log.contains(said) && log.contains("fence_virt.conf:9:"), "{log}");
        ensure!(count(&server)? == 3, "{:#}", server.status()?.1);
        served(&server, &other, &asks)?;
        served(&server, &bench.guest, &by_tcp)?;
    }

    reload(&bench, &mut server, &text("multicast", &first), "and changed: listeners")?;
    ensure!(count(&server)? == 1, "{:#}", server.status()?.1);
    served(&server, &bench.guest, &asks)?;
    unanswered(&server, &other, &asks)?;
    let refused = by_tcp.clone().timeout(3).run(bench.guest.space())?;
    ensure!(refused.code != Some(0), "{refused:?}: {}", server.log());

    // With its program.
    reload(&bench, &mut server, &text("multicast", &first.replace("virbr0", "virbr1")), "and changed: listeners")?;
    let position = server.log_position();
    served(&server, &other, &asks)?;
    ensure!(server.next_fence(position)?.get("via") == Some("kernel"), "{}", server.log());
    unanswered(&server, &bench.guest, &asks)?;
    ensure!(xdp_on(&bench.hypervisor, BRIDGE)?.is_none() && tcx_on(&bench.hypervisor, BRIDGE)?.is_empty());
    let (code, report) = server.status()?;
    ensure!(code == Some(0) && report["listeners"][0]["interface"] == "virbr1", "{report:#}");
    let log = server.log();
    ensure!(!log.contains("the interface is gone"), "{log}");
    Ok(())
}
