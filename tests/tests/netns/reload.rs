//! SIGHUP takes the whole configuration, or nothing of it. `rotation.rs` is about keys.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::kernel;
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server};
use nix::sys::signal::Signal;

use crate::bench::{Bench, DOMAIN, key};

const SOON: Duration = Duration::from_secs(60);
/// How often the configuration changes under load.
const RELOADS: usize = 200;

/// The usual configuration, with a group that lets the guest fence this domain.
fn grouped(bench: &Bench, domain: &str) -> Config {
    let more = format!("groups {{\n\tgroup {{ ip = \"{}\"; uuid = \"{domain}\"; }}\n}}\n", bench.guest.v4);
    Config { more, ..bench.config("auto") }
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
        ("interface = \"virbr0\"", "interface = \"virbr1\"", "`interface` cannot change while the daemon runs"),
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
        // A second key comes and goes, and so do a group and limits.
        let second = bench.hypervisor.path("fence.key2");
        let base = grouped(&bench, DOMAIN);
        let config = if turn.is_multiple_of(2) {
            Config { key_file2: Some(second), ..base }
        } else {
            Config { more: base.more.replace("groups {", "groups {\n\tgroup { ip = \"::1\"; uuid = \"a\"; }"), ..base }
        };
        let rate = format!("{{\n\trate_limit {{ request_rate = \"{}\"; }}", 500 + turn);
        config.render().replacen('{', &rate, 1)
    };
    let mut server = bench.serve(&grouped(&bench, DOMAIN))?;
    bench.hypervisor.write("fence.key2", b"another key of some length")?;
    let over = AtomicBool::new(false);
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let asked = std::thread::scope(|threads| {
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
            ensure!(!asking.is_finished(), "a request failed before reload {turn}");
            reload(&bench, &mut server, &config(turn), "the configuration was read again, and changed").map(drop)
        });
        over.store(true, Ordering::Relaxed);
        let asked = asking.join().unwrap_or_else(|_| anyhow::bail!("the client panicked"));
        let asked = asked.with_context(|| server.log())?;
        reloaded.map(|()| asked)
    })?;
    ensure!(asked > RELOADS / 4, "only {asked} requests beside {RELOADS} reloads");
    let log = server.log();
    ensure!(!log.contains("ERROR"), "{log}");
    Ok(())
}
