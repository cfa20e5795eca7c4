//! Effects of configuration keys in a serving daemon, where no other test of this set covers them.
//! `fence-daemon/config/src/tests/effects.rs` lists all keys and their tests.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::kernel::program_on;
use fence_lab::lab::BRIDGE;
use fence_lab::peer::Peer;
use fence_lab::process::{Process, poll_until, run};
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use serde_json::Value;

use crate::bench::{Bench, DOMAIN, key};

/// How long an event that must come may take on a loaded machine.
const SURELY: Duration = Duration::from_secs(60);

/// The number of datagrams that a test of a limit sends at once.
const MANY: u64 = 20;

/// A daemon with these keys in section `fence_virtd`.
fn serve(bench: &Bench, keys: &[(&'static str, &'static str)]) -> Result<Server> {
    let mut config = bench.config("auto");
    config.daemon = keys.to_vec();
    bench.serve(&config)
}

/// Starts the daemon with these keys and only the options for its files, as an administrator's
/// script does.
fn start_plainly(bench: &Bench, keys: &[(&'static str, &'static str)]) -> Result<(Process, String)> {
    let mut config = bench.config("off");
    config.daemon = keys.to_vec();
    let file = bench.hypervisor.write("plain.conf", config.render().as_bytes())?;
    let pid_file = bench.hypervisor.path("plain.pid");
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let mut command = Command::new(daemon);
    command.args(["-f", &file, "-p", &pid_file]);
    Ok((Process::start(bench.hypervisor.space(), &mut command)?, pid_file))
}

#[test]
fn foreground_keeps_it_in_the_foreground() -> Result<()> {
    let bench = Bench::new()?;
    let (mut process, _) = start_plainly(&bench, &[("foreground", "1")])?;
    let ready = |line: &str| line.contains(" ready ").then_some(());
    process.stderr().wait_for(0, START_LIMIT, ready).with_context(|| process.stderr().text())?;
    ensure!(process.is_running()?, "{}", process.stderr().text());
    drop(process);

    let (process, pid_file) = start_plainly(&bench, &[("foreground", "0")])?;
    let started = process.finish(START_LIMIT)?;
    ensure!(started.code == Some(0) && !started.stderr.contains("ready"), "{started:?}");
    bench.about_domain("status").run(bench.guest.space())?.success()?;
    let pid = std::fs::read_to_string(bench.hypervisor.outside(&pid_file))?;
    bench.hypervisor.space().must("sh", &["-c", &format!("kill -KILL {}", pid.trim())]).map(drop)
}

#[test]
fn wait_for_init_and_its_old_name_wait_for_a_hypervisor() -> Result<()> {
    let bench = Bench::new()?;
    for (keys, waits) in [
        (&[("wait_for_init", "1")][..], true),
        (&[("wait_for_backend", "1")], true),
        (&[("wait_for_backend", "1"), ("wait_for_init", "0")], false),
        (&[("wait_for_init", "0")], false),
    ] {
        let mut config = bench.config("off");
        config.daemon = keys.to_vec();
        config.uris = vec!["qemu:///system".to_owned()];
        let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &config, &[])?;
        let words = if waits { "nothing is served yet (no hypervisor is connected" } else { "libvirt=0/1" };
        server
            .wait_log(0, SURELY, |line| line.contains(words).then_some(()))
            .with_context(|| format!("{keys:?}: {}", server.log()))?;
        ensure!(server.is_ready()? != waits && server.is_running()?, "{keys:?}: {}", server.log());
    }
    Ok(())
}

#[test]
fn debug_logs_more() -> Result<()> {
    let bench = Bench::new()?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    for (level, ours, others) in [("0", false, false), ("1", true, false), ("5", true, true)] {
        let server = serve(&bench, &[("debug", level)])?;
        // The first debug level reports a duplicate datagram, which the daemon ignores.
        let request = peer.request(Op::Status, DOMAIN)?;
        for _ in 0..2 {
            peer.send(request)?;
        }
        ensure!(peer.called_back(SURELY)?.context("no callback")?.converse()? == 0);
        poll_until("the answer's line", SURELY, || Ok(server.log().contains("op=status").then_some(())))?;
        let log = server.log();
        let has = |target: &dyn Fn(&str) -> bool| {
            log.lines().any(|line| {
                let rest = line.split_once(" DEBUG ").or_else(|| line.split_once(" TRACE "));
                rest.is_some_and(|(_, rest)| target(rest))
            })
        };
        let (found, elsewhere) =
            (has(&|rest| rest.starts_with("fence_daemon")), has(&|rest| !rest.starts_with("fence_daemon")));
        ensure!((!found || ours) && elsewhere == others, "{level}: {found} {elsewhere}: {log}");
        ensure!(log.contains(" fence_daemon::") == ours, "{level}: {log}");
    }
    Ok(())
}

#[test]
fn keys_that_only_fence_virtd_reads_cause_no_warning() -> Result<()> {
    let bench = Bench::new()?;
    let server = serve(&bench, &[("module_path", "/nowhere"), ("name_mode", "uuid")])?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    for word in ["module_path", "name_mode"] {
        ensure!(!server.log().contains(word), "{}", server.log());
    }
    Ok(())
}

#[test]
fn attach_decides_how_the_program_is_attached() -> Result<()> {
    let bench = Bench::new()?;
    // A bridge has no native XDP.
    for (value, expected) in
        [("auto", Some("generic")), ("tcx", Some("tcx")), ("generic", Some("generic")), ("native", None), ("off", None)]
    {
        let server = bench.serve(&bench.config(value))?;
        let (_, report) = server.status()?;
        let found = &report["listeners"][0]["interfaces"][0]["program"];
        ensure!(found.as_str().map(|mode| mode.trim_start_matches("xdp ")) == expected, "{value}: {found}");
        ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_some() == expected.is_some(), "{value}");
        ensure!(server.log().contains("WARN serving without the kernel program") == (value == "native"), "{value}");
    }
    Ok(())
}

#[test]
fn requests_are_heard_at_the_configured_port() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&Config { port: Some(1230), ..bench.config("auto") })?;
    bench.expect_via(&server, &bench.about_domain("status").port(1230), 0, "kernel")?;
    let position = server.log_position();
    let elsewhere = bench.about_domain("status").timeout(3).run(bench.guest.space())?;
    ensure!(elsewhere.code == Some(1), "a request to port 1229 was answered: {elsewhere:?}");
    let log = server.log();
    ensure!(!log.lines().skip(position).any(|line| line.contains("op=status")), "{log}");
    Ok(())
}

/// A daemon with these keys in section `rate_limit`, in the kernel or at the socket.
fn rate_limited(bench: &Bench, attach: &'static str, keys: &str) -> Result<Server> {
    let text = bench.config(attach).render();
    let text = text.replacen('{', &format!("{{\n\trate_limit {{ {keys} }}"), 1);
    let file = bench.hypervisor.write("rate_limit.conf", text.as_bytes())?;
    let mut server = Server::spawn_with_file(&bench.hypervisor, &Which::ours()?, &file, 1229, &[])?;
    server.wait_ready(START_LIMIT)?;
    Ok(server)
}

/// The daemon's counter of this name, kernel program and socket together.
fn counted(bench: &Bench, name: &str) -> Result<u64> {
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let mut command = Command::new(daemon);
    command.args(["-f", &bench.hypervisor.path("rate_limit.conf"), "status", "--json"]);
    let asked = run(bench.hypervisor.space(), &mut command, SURELY)?;
    let report: Value = serde_json::from_str(&asked.stdout).with_context(|| format!("{asked:?}"))?;
    let number = |pointer: &str| report.pointer(&format!("{pointer}/{name}")).and_then(Value::as_u64).unwrap_or(0);
    Ok(number("/socket") + number("/kernel/counters"))
}

/// Sends datagrams, waits until the daemon has judged all of them, and returns the increase of the
/// counter `name`.
fn refused(bench: &Bench, attach: &'static str, keys: &str, right: bool, name: &str) -> Result<u64> {
    // A sender that an earlier daemon trusts has its own bucket, which forged datagrams do not
    // drain.
    let _ = std::fs::remove_file(bench.hypervisor.outside("/run/fence-xdp/trusted"));
    let _server = rate_limited(bench, attach, keys)?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    for _ in 0..MANY {
        let request = peer.sign(peer.request(Op::Status, DOMAIN)?)?;
        let mut bytes = zerocopy::IntoBytes::as_bytes(&request).to_vec();
        if !right {
            bytes[120] ^= 1;
        }
        peer.send_bytes(&bytes)?;
    }
    let all = ["delivered", "drop_digest", "drop_source_limit", "drop_global_limit", "drop_delivery_limit"];
    poll_until("all datagrams to be judged", SURELY, || {
        let sum = all.iter().map(|name| counted(bench, name)).sum::<Result<u64>>()?;
        Ok((sum >= MANY).then_some(()))
    })
    .with_context(|| format!("{attach} {keys}"))?;
    counted(bench, name)
}

#[test]
fn the_program_gets_the_configured_rate_limits() -> Result<()> {
    let bench = Bench::new()?;
    let (wrong, right) = (false, true);
    for attach in ["generic", "off"] {
        // The least number of accepted datagrams; 0 stands for all.
        for (keys, sent, name, passes) in [
            // Either of the two limits accepts them.
            ("failure_rate = \"1\"; failure_burst = \"5\";", wrong, "drop_source_limit", Some(5)),
            ("failure_rate = \"1\"; failure_burst = \"1\";", wrong, "drop_source_limit", Some(1)),
            ("failure_rate = \"0\"; failure_burst = \"5\";", wrong, "drop_source_limit", None),
            ("failure_rate = \"1\"; failure_burst = \"500\";", wrong, "drop_source_limit", None),
            ("stranger_rate = \"5\";", wrong, "drop_global_limit", Some(5)),
            ("stranger_rate = \"0\";", wrong, "drop_global_limit", None),
            ("request_rate = \"1\"; request_burst = \"5\";", right, "drop_delivery_limit", Some(5)),
            ("request_rate = \"1\"; request_burst = \"1\";", right, "drop_delivery_limit", Some(1)),
            ("request_rate = \"0\"; request_burst = \"5\";", right, "drop_delivery_limit", None),
            ("request_rate = \"1\"; request_burst = \"500\";", right, "drop_delivery_limit", None),
        ] {
            let over = refused(&bench, attach, keys, sent, name)?;
            // One or two seconds may pass meanwhile, and each lets one or five more pass.
            let is_right = passes.map_or(over == 0, |passes| over > 0 && over <= MANY - passes);
            ensure!(is_right, "{attach} {keys}: {name} {over}");
        }
    }
    Ok(())
}

/// The daemon rejects a duplicate for as long as configured, and accepts it after that.
#[test]
fn a_copy_is_refused_within_the_replay_window_and_not_after_it() -> Result<()> {
    const SHORTEST: Duration = Duration::from_secs(60);
    let bench = Bench::new()?;
    let _server = rate_limited(&bench, "generic", "replay_window = \"1m\";")?;
    let peer = Peer::new(&bench.guest, &key(), Family::V4)?;
    let request = peer.sign(peer.request(Op::Status, DOMAIN)?)?;
    let send = || peer.send_bytes(zerocopy::IntoBytes::as_bytes(&request));
    send()?;
    ensure!(peer.called_back(SURELY)?.context("no callback")?.converse()? == 0);
    send()?;
    poll_until("the copy to be refused", SURELY, || Ok((counted(&bench, "drop_replay")? > 0).then_some(())))?;
    std::thread::sleep(SHORTEST + Duration::from_secs(2));
    send()?;
    poll_until("it to be accepted again", SURELY, || Ok((counted(&bench, "delivered")? > 1).then_some(())))
}
