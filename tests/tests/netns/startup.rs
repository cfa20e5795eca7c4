//! Failed starts and starts into a degraded mode: each has one clear message, never a panic, never
//! silence.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::kernel::{occupy, program_on};
use fence_lab::lab::BRIDGE;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::tools;

use crate::bench::{Bench, DOMAIN, listed};

/// Checks that the daemon does not start, and says why in few lines that name `culprit`.
fn expect_refusal(bench: &Bench, config: &Config, culprit: &str) -> Result<()> {
    expect_refusal_with(bench, config, &[], culprit)
}

/// A log without lines that depend on the test machine: it may forbid locked memory, a higher
/// priority, or protection from the OOM killer.
fn but_for_stress(log: &str) -> String {
    let about =
        |line: &&str| ["CAP_IPC_LOCK", "CAP_SYS_NICE", "CAP_SYS_RESOURCE"].iter().any(|name| line.contains(name));
    log.lines().filter(|line| !about(line)).map(|line| format!("{line}\n")).collect()
}

fn expect_refusal_with(bench: &Bench, config: &Config, arguments: &[&str], culprit: &str) -> Result<()> {
    let server = Server::spawn(&bench.hypervisor, &Which::ours()?, config, arguments)?;
    let ended = server.finish(START_LIMIT)?;
    ensure!(ended.code.is_some_and(|code| code != 0), "exit code {:?}: {}", ended.code, ended.stderr);
    ensure!(ended.stderr.contains(culprit), "nothing about {culprit}: {}", ended.stderr);
    ensure!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let errors =
        but_for_stress(&ended.stderr).to_ascii_lowercase().lines().filter(|line| line.contains("error")).count();
    ensure!(errors <= 1, "one error, not {errors}: {}", ended.stderr);
    ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none());
    Ok(())
}

#[test]
fn without_a_usable_key_it_does_not_start() -> Result<()> {
    let bench = Bench::new()?;
    let missing = bench.hypervisor.path("missing.key");
    expect_refusal(&bench, &Config::new(&missing), &missing)?;
    let empty = bench.hypervisor.write("empty.key", b"")?;
    expect_refusal(&bench, &Config::new(&empty), &empty)?;
    bench.hypervisor.write("directory.key/x", b"x")?;
    let directory = bench.hypervisor.path("directory.key");
    expect_refusal(&bench, &Config::new(&directory), &directory)
}

/// Debian starts the server with `-w`, and many files name an `lxc:///` without a server.
#[test]
fn with_w_one_hypervisor_is_enough() -> Result<()> {
    let bench = Bench::new()?;
    let uris = vec!["qemu:///system".to_owned(), "test:///default".to_owned()];
    let mut server =
        Server::spawn(&bench.hypervisor, &Which::ours()?, &Config { uris, ..bench.config("auto") }, &["-w"])?;
    server.wait_ready(START_LIMIT)?;
    ensure!(server.log().contains("libvirt=1/2"), "{}", server.log());
    bench.expect(&server, bench.guest.space(), &bench.about_domain("off"), 0)?;
    Ok(())
}

#[test]
fn with_w_and_no_hypervisor_it_waits_and_a_stop_ends_that() -> Result<()> {
    let bench = Bench::new()?;
    let config = Config { uris: vec!["qemu:///system".to_owned()], ..bench.config("auto") };
    let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &config, &["-w"])?;
    server
        .wait_log(0, START_LIMIT, |line| line.contains("qemu:///system").then_some(()))
        .with_context(|| format!("it does not say what it waits for: {}", server.log()))?;
    std::thread::sleep(Duration::from_secs(4));
    ensure!(server.is_running()? && !server.is_ready()?, "{}", server.log());
    let ended = server.stop(nix::sys::signal::Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    Ok(())
}

#[test]
fn with_its_port_in_use_it_does_not_start() -> Result<()> {
    let bench = Bench::new()?;
    let config = bench.config("auto");
    let _stock = Server::start(&bench.hypervisor, &Which::Stock, &config)?;
    // The PID file of fence_virtd is checked first; where that is elsewhere, the port shows the
    // conflict.
    expect_refusal(&bench, &config, "already running")?;
    let pid_file = bench.hypervisor.path("other.pid");
    expect_refusal_with(&bench, &config, &["-p", &pid_file], "UDP port 1229 is taken")
}

#[test]
fn it_is_ready_before_the_program_is_loaded_and_says_when_that_serves() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let log = server.log();
    let at = |words: &str| log.lines().position(|line| line.contains(words)).with_context(|| format!("{words}: {log}"));
    ensure!(at("program=loading")? == at("ready")?, "{log}");
    ensure!(at("ready")? < at("the kernel program is attached")?, "{log}");
    ensure!(!log.contains("WARN serving"), "{log}");
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}

#[test]
fn beside_another_xdp_program_it_serves_through_the_socket_and_says_so() -> Result<()> {
    let bench = Bench::new()?;
    let another = occupy(&bench.hypervisor, BRIDGE)?;
    let server = bench.serve(&bench.config("generic"))?;
    let program = program_on(&bench.hypervisor, BRIDGE)?;
    ensure!(program.is_some_and(|program| program.id == another), "the other program must stay");
    ensure!(server.log().contains("without the kernel program"), "it does not say so: {}", server.log());
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    Ok(())
}

/// Starts the daemon as root without some capabilities, as in a container or under a strict unit
/// file.
fn serve_without(bench: &Bench, capabilities: &str) -> Result<Server> {
    tools::require(&["setpriv"])?;
    let Which::Ours(daemon) = Which::ours()? else { bail!("not ours") };
    let script = format!("#!/bin/sh\nexec setpriv --bounding-set={capabilities} '{}' \"$@\"\n", daemon.display());
    let script = bench.hypervisor.write_mode("confined", script.as_bytes(), 0o700)?;
    Server::start(&bench.hypervisor, &Which::Ours(script.into()), &bench.config("auto"))
}

#[test]
fn where_the_kernel_refuses_bpf_it_gives_the_same_answers_through_the_socket() -> Result<()> {
    let bench = Bench::new()?;
    // No BPF at all; no maps of this kind; no XDP program; not this program.
    for missing in
        ["-bpf,-perfmon,-net_admin,-sys_admin", "-bpf,-sys_admin", "-net_admin,-sys_admin", "-perfmon,-sys_admin"]
    {
        let server = serve_without(&bench, missing)?;
        let log = but_for_stress(&server.log());
        ensure!(log.matches("WARN").count() == 1 && !log.contains("ERROR"), "{missing}: one warning: {log}");
        // The program loads while the daemon starts, so the order of the lines varies.
        let line = |words: &str| log.lines().find(|line| line.contains(words)).context(log.clone());
        let (warning, ready) = (line("WARN")?, line("ready")?);
        ensure!(log.lines().filter(|line| *line != warning).all(|line| line.contains("INFO")), "of one line: {log}");
        ensure!(ready.contains("program=loading") || ready.contains("program=off"), "{missing}: {ready}");
        for part in ["serving without the kernel program", "not permitted", "CAP_BPF"] {
            ensure!(warning.contains(part), "{missing}: nothing about {part}: {warning}");
        }
        ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none(), "{log}");
        for (op, code) in [("status", 0), ("off", 0), ("status", 2), ("on", 0), ("status", 0)] {
            bench.expect_via(&server, &bench.about_domain(op), code, "socket")?;
        }
        let list = bench.expect_via(&server, &bench.client("list"), 0, "socket")?;
        ensure!(listed(&list)? == "on", "{list:?}");
    }
    Ok(())
}

#[test]
fn three_capabilities_are_enough_for_xdp() -> Result<()> {
    let bench = Bench::new()?;
    let server = serve_without(&bench, "-all,+bpf,+perfmon,+net_admin")?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}

#[test]
fn without_libvirt_it_serves_and_answers_with_failure() -> Result<()> {
    let bench = Bench::new()?;
    let config = Config { uris: vec!["qemu:///system".to_owned()], ..bench.config("auto") };
    let mut server = bench.serve(&config)?;
    ensure!(server.log().contains("qemu:///system"), "it does not say what it cannot reach: {}", server.log());
    for op in ["off", "on", "reboot"] {
        let answer = bench.expect(&server, bench.guest.space(), &bench.client(op).domain(DOMAIN), 1)?;
        ensure!(answer.elapsed < Duration::from_secs(25), "{op}: {:?}", answer.elapsed);
    }
    // A list or a status without libvirt must not look like a fact about the domain.
    let status = bench.about_domain("status").run(bench.guest.space())?;
    ensure!(status.code == Some(1), "status: {:?}: {}", status.code, server.log());
    let monitor = bench.client("monitor").run(bench.guest.space())?;
    ensure!(monitor.code == Some(1), "monitor: {:?}: {}", monitor.code, server.log());
    let list = bench.client("list").run(bench.guest.space())?;
    ensure!(list.elapsed < Duration::from_secs(25) && !list.stdout.contains(DOMAIN), "{list:?}");
    ensure!(server.is_running()?);
    Ok(())
}

#[test]
fn one_dead_uri_does_not_hinder_the_others() -> Result<()> {
    let bench = Bench::new()?;
    let config =
        Config { uris: vec!["qemu:///system".to_owned(), "test:///default".to_owned()], ..bench.config("auto") };
    let server = bench.serve(&config)?;
    poll_until("the domain of the URI that lives", Duration::from_secs(60), || {
        Ok((bench.about_domain("status").run(bench.guest.space())?.code == Some(0)).then_some(()))
    })?;
    let off = bench.expect(&server, bench.guest.space(), &bench.about_domain("off"), 0)?;
    ensure!(off.elapsed < Duration::from_secs(5), "{:?}", off.elapsed);
    Ok(())
}
