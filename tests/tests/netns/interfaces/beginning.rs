//! The start: the daemon waits for its interface, says so, and reports ready once it serves.

use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_lab::kernel::program_on;
use fence_lab::lab::BRIDGE;
use fence_lab::process::{Process, poll_until};
use fence_lab::server::{Config, START_LIMIT, STOP_LIMIT, Server, Which};
use nix::sys::signal::Signal;

use super::{NOTICE, Way, memberships, wait_line};
use crate::bench::Bench;

/// Long enough for a wrong action to happen.
const A_WHILE: Duration = Duration::from_millis(1500);

/// A lab whose network is not started yet.
fn without_bridge() -> Result<Bench> {
    let bench = Bench::new()?;
    bench.hypervisor.delete_bridge()?;
    Ok(bench)
}

fn start_network(bench: &Bench) -> Result<()> {
    bench.hypervisor.make_bridge(None)?;
    bench.hypervisor.plug(&bench.guest)
}

#[test]
fn it_waits_for_its_interface_and_is_ready_when_it_serves() -> Result<()> {
    for way in Way::ALL {
        let bench = without_bridge()?;
        let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &way.config(&bench), &[])?;
        wait_line(&server, 0, &["WARN", "waiting for the interface virbr0", "virsh net-start default"])?;
        std::thread::sleep(A_WHILE);
        ensure!(server.is_running()? && !server.is_ready()?, "{}", server.log());
        start_network(&bench)?;
        server.wait_ready(START_LIMIT)?;
        ensure!(memberships(&bench, way.family)?.len() == 1, "the daemon reported ready before it joined the group");
        way.program(&bench)?;
        way.is_served(&bench, &server)?;
        ensure!(
            server.log().matches("waiting for the interface").count() == 1,
            "the log must say it once: {}",
            server.log()
        );
    }
    Ok(())
}

#[test]
fn an_interface_that_is_down_is_waited_for_too() -> Result<()> {
    let bench = Bench::new()?;
    bench.hypervisor.ip(&["link", "set", BRIDGE, "down"])?;
    let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("auto"), &[])?;
    wait_line(&server, 0, &["WARN", BRIDGE, "is down", "ip link set virbr0 up"])?;
    std::thread::sleep(A_WHILE);
    ensure!(server.is_running()? && !server.is_ready()?, "{}", server.log());
    bench.hypervisor.ip(&["link", "set", BRIDGE, "up"])?;
    server.wait_ready(START_LIMIT)?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}

fn in_background(bench: &Bench) -> Result<(Process, String)> {
    let file = bench.hypervisor.write("background.conf", bench.config("auto").render().as_bytes())?;
    let pid_file = bench.hypervisor.path("background.pid");
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let mut command = Command::new(daemon);
    command.args(["-f", &file, "-p", &pid_file]);
    let mut process = Process::start(bench.hypervisor.space(), &mut command)?;
    let said =
        process.stderr().wait_for(0, NOTICE, |line| line.contains("waiting for the interface virbr0").then_some(()));
    ensure!(said.is_some(), "it does not say what it waits for: {}", process.stderr().text());
    std::thread::sleep(A_WHILE);
    ensure!(process.is_running()?, "the command returned before the daemon serves: {}", process.stderr().text());
    Ok((process, pid_file))
}

#[test]
fn on_the_way_to_the_background_the_command_waits_as_well() -> Result<()> {
    let bench = without_bridge()?;
    let (process, pid_file) = in_background(&bench)?;
    start_network(&bench)?;
    let started = process.finish(START_LIMIT)?;
    ensure!(started.code == Some(0), "{:?}: {}", started.code, started.stderr);
    // The daemon serves as soon as the command returns, unless the machine was too slow.
    if !started.stderr.contains("nothing is served yet") {
        bench.about_domain("status").run(bench.guest.space())?.success()?;
    }
    poll_until("the program", START_LIMIT, || Ok(program_on(&bench.hypervisor, BRIDGE)?.map(drop)))?;
    stop_by(&bench, &pid_file)?;
    Ok(())
}

fn stop_by(bench: &Bench, pid_file: &str) -> Result<()> {
    let pid = std::fs::read_to_string(bench.hypervisor.outside(pid_file))?;
    bench.hypervisor.space().must("sh", &["-c", &format!("kill -TERM {}", pid.trim())])?;
    poll_until("the daemon to be gone and its PID file with it", STOP_LIMIT, || {
        Ok((!bench.hypervisor.outside(pid_file).exists()).then_some(()))
    })
}

#[test]
fn a_stop_ends_the_waiting() -> Result<()> {
    let bench = without_bridge()?;
    let server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("auto"), &[])?;
    wait_line(&server, 0, &["waiting"])?;
    let ended = server.stop(Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    // A stop also works later, when the daemon waits for the interface alone.
    let server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("auto"), &[])?;
    wait_line(&server, 0, &["waiting"])?;
    std::thread::sleep(Duration::from_secs(4));
    let ended = server.stop(Signal::SIGINT)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);

    let (process, pid_file) = in_background(&bench)?;
    stop_by(&bench, &pid_file)?;
    let ended = process.finish(STOP_LIMIT)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    Ok(())
}

/// Guests start after the daemon at boot, so an interface that never comes must not delay the boot.
#[test]
fn the_command_is_back_when_the_interface_does_not_come() -> Result<()> {
    let bench = without_bridge()?;
    let (process, pid_file) = in_background(&bench)?;
    let started = process.finish(START_LIMIT)?;
    ensure!(started.code == Some(0), "{:?}: {}", started.code, started.stderr);
    for part in ["nothing is served yet", "interface virbr0 is not there", "in the background"] {
        ensure!(started.stderr.contains(part), "no `{part}`: {}", started.stderr);
    }
    start_network(&bench)?;
    poll_until("the program", START_LIMIT, || Ok(program_on(&bench.hypervisor, BRIDGE)?.map(drop)))?;
    bench.about_domain("status").run(bench.guest.space())?.success()?;
    stop_by(&bench, &pid_file)
}

#[test]
fn systemd_gets_a_status_and_is_released_after_a_short_time() -> Result<()> {
    let bench = without_bridge()?;
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let path = bench.hypervisor.path("notify");
    let script = format!("#!/bin/sh\nNOTIFY_SOCKET={path} exec '{}' \"$@\"\n", daemon.display());
    let script = bench.hypervisor.write_mode("notifying", script.as_bytes(), 0o700)?;
    let socket = UnixDatagram::bind(bench.hypervisor.outside(&path)).context("the notification socket")?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut told = Vec::new();
    let mut listen = |wanted: &str, limit: Duration| -> Result<bool> {
        let deadline = Instant::now() + limit;
        let mut buffer = [0; 4096];
        while Instant::now() < deadline && !told.iter().any(|text: &String| text.contains(wanted)) {
            if let Ok(len) = socket.recv(&mut buffer) {
                told.push(String::from_utf8_lossy(&buffer[..len]).into_owned());
            }
        }
        Ok(told.iter().any(|text| text.contains(wanted)))
    };
    let server = Server::spawn(&bench.hypervisor, &Which::Ours(script.into()), &bench.config("auto"), &[])?;
    ensure!(listen("STATUS=interface virbr0 is not there", NOTICE)?, "{}", server.log());
    ensure!(!listen("READY=1", A_WHILE)?, "{}", server.log());
    ensure!(listen("READY=1", START_LIMIT)?, "{}", server.log());
    // The log has a thread of its own: its line may come after the word to systemd.
    wait_line(&server, 0, &["nothing is served yet"])?;
    ensure!(!server.is_ready()?, "{}", server.log());
    let (code, report) = server.status()?;
    ensure!(code == Some(1) && report["health"] == "starting", "{code:?} {report:#}");
    start_network(&bench)?;
    ensure!(listen("STATUS=serving virbr0 (xdp generic)", NOTICE)?, "{}", server.log());
    bench.hypervisor.delete_bridge()?;
    told.clear();
    let gone = poll_until("the status", NOTICE, || {
        let mut buffer = [0; 4096];
        let len = socket.recv(&mut buffer).unwrap_or(0);
        Ok(String::from_utf8_lossy(&buffer[..len]).contains("STATUS=interface virbr0 is not there").then_some(()))
    });
    gone.with_context(|| server.log())
}

/// Too many memberships: an administrator can raise the limit while the daemon runs.
#[test]
fn a_membership_that_cannot_be_had_is_reported_with_its_remedy_and_tried_again() -> Result<()> {
    let bench = Bench::new()?;
    let limit = |number: u32| {
        let command = format!("echo {number} > /proc/sys/net/ipv4/igmp_max_memberships");
        bench.hypervisor.space().must("sh", &["-c", &command]).map(drop)
    };
    limit(0)?;
    let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("off"), &[])?;
    wait_line(&server, 0, &["ERROR", "cannot join 225.0.0.12 on virbr0", "igmp_max_memberships"])?;
    // Longer than until the next try: the log says it once all the same.
    std::thread::sleep(Duration::from_secs(6));
    ensure!(server.is_running()? && !server.is_ready()?, "{}", server.log());
    ensure!(server.log().lines().filter(|line| line.contains("ERROR")).count() == 1, "{}", server.log());
    limit(20)?;
    server.wait_ready(START_LIMIT)?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    Ok(())
}

#[test]
fn without_a_configured_interface_each_new_one_is_joined() -> Result<()> {
    let bench = without_bridge()?;
    let config = Config { interface: "none".to_owned(), ..bench.config("auto") };
    let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &config, &[])?;
    wait_line(&server, 0, &["WARN", "waiting for an interface that is up"])?;
    std::thread::sleep(A_WHILE);
    ensure!(server.is_running()? && !server.is_ready()?, "{}", server.log());
    start_network(&bench)?;
    server.wait_ready(START_LIMIT)?;
    server.wait_settled(START_LIMIT)?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;

    let position = server.log_position();
    let ip = |arguments: &str| bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop);
    ip("link add virbr1 type bridge")?;
    ip("link set virbr1 up")?;
    ip("addr add 192.168.123.1/24 dev virbr1")?;
    wait_line(&server, position, &["INFO", "virbr1", "is there"])?;
    ensure!(memberships(&bench, fence_lab::client::Family::V4)?.len() == 2);
    ip("addr del 192.168.123.1/24 dev virbr1")?;
    wait_line(&server, position, &["INFO", "virbr1", "gone"])?;
    ensure!(memberships(&bench, fence_lab::client::Family::V4)?.len() == 1);
    bench.hypervisor.delete_bridge()?;
    wait_line(&server, position, &["ERROR", "the last interface is gone"])?;
    start_network(&bench)?;
    wait_line(&server, position, &["INFO", BRIDGE, "is there"])?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}
