//! The daemon leaves nothing behind, however it ends.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::kernel::program_on;
use fence_lab::lab::{BRIDGE, Hypervisor};
use fence_lab::process::{self, poll_until};
use fence_lab::server::{START_LIMIT, STOP_LIMIT, Server, Which};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::bench::{Bench, DOMAIN};

/// 225.0.0.12 as /proc/net/igmp writes it on a little-endian machine.
const GROUP: &str = "0C0000E1";

fn is_member(hypervisor: &Hypervisor) -> Result<bool> {
    Ok(hypervisor.proc_net("igmp")?.contains(GROUP))
}

#[test]
fn sigterm_and_sigint_detach_leave_the_group_and_exit_with_0() -> Result<()> {
    let bench = Bench::new()?;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let server = bench.serve(&bench.config("auto"))?;
        bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
        ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_some() && is_member(&bench.hypervisor)?);
        let ended = server.stop(signal)?;
        ensure!(ended.code == Some(0), "{signal}: exit code {:?}: {}", ended.code, ended.stderr);
        ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none(), "{signal}: the program is still attached");
        ensure!(!is_member(&bench.hypervisor)?, "{signal}: still a member of the group");
    }
    Ok(())
}

#[test]
fn a_stop_while_the_program_is_being_loaded_leaves_nothing_either() -> Result<()> {
    let bench = Bench::new()?;
    let server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("auto"), &[])?;
    server.wait_log(0, START_LIMIT, |line| line.contains("program=loading").then_some(())).context("never ready")?;
    let ended = server.stop(Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    ensure!(!ended.stderr.contains("WARN serving") && !ended.stderr.contains("panicked"), "{}", ended.stderr);
    ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none() && !is_member(&bench.hypervisor)?);
    Ok(())
}

#[test]
fn sigterm_lets_a_conversation_finish() -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config("auto"))?;
    let peer = fence_lab::peer::Peer::new(&bench.guest, &crate::bench::key(), fence_lab::client::Family::V4)?;
    let mut call = peer.ask(fence_common::wire::Op::Status, DOMAIN)?;
    server.process().signal(Signal::SIGTERM)?;
    ensure!(call.converse()? == 0, "{}", server.log());
    let ended = server.finish(STOP_LIMIT)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    Ok(())
}

#[test]
fn sigkill_leaves_no_program_attached() -> Result<()> {
    let bench = Bench::new()?;
    for attach in ["tcx", "generic"] {
        let server = bench.serve(&bench.config(attach))?;
        ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_some());
        server.stop(Signal::SIGKILL)?;
        // The kernel lets go of a dead process's files a moment later.
        poll_until("the program to be detached", Duration::from_secs(10), || {
            Ok(program_on(&bench.hypervisor, BRIDGE)?.is_none().then_some(()))
        })?;
    }
    // A new daemon serves at once.
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}

#[test]
fn without_f_it_goes_into_the_background_when_it_serves() -> Result<()> {
    let bench = Bench::new()?;
    let file = bench.hypervisor.write("background.conf", bench.config("auto").render().as_bytes())?;
    let pid_file = bench.hypervisor.path("background.pid");
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let mut command = Command::new(daemon);
    command.args(["-f", &file, "-p", &pid_file]);
    let started = process::run(bench.hypervisor.space(), &mut command, START_LIMIT)?.success()?;
    ensure!(started.stdout.is_empty(), "{}", started.stdout);
    // No wait here: the daemon serves as soon as the command returns.
    bench.about_domain("status").run(bench.guest.space())?.success()?;

    let pid = std::fs::read_to_string(bench.hypervisor.outside(&pid_file))?;
    let pid = pid.trim();
    bench.hypervisor.space().must("sh", &["-c", &format!("kill -TERM {pid}")])?;
    poll_until("the daemon to be gone and its PID file with it", STOP_LIMIT, || {
        let gone = !bench.hypervisor.outside(&format!("/proc/{pid}")).exists();
        Ok((gone && !bench.hypervisor.outside(&pid_file).exists()).then_some(()))
    })?;
    ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none());
    Ok(())
}

#[test]
fn the_command_reports_a_failure_in_the_background() -> Result<()> {
    let bench = Bench::new()?;
    let config = bench.config("auto");
    let _other = bench.serve(&config)?;
    let file = bench.hypervisor.write("background.conf", config.render().as_bytes())?;
    let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
    let mut command = Command::new(daemon);
    command.args(["-f", &file, "-p", &bench.hypervisor.path("background.pid")]);
    let ended = process::run(bench.hypervisor.space(), &mut command, START_LIMIT)?;
    ensure!(
        ended.code == Some(1) && ended.stderr.contains("UDP port 1229 is taken"),
        "{:?}: {}",
        ended.code,
        ended.stderr
    );
    Ok(())
}

#[test]
fn the_program_has_a_name_and_readable_counters() -> Result<()> {
    let bench = Bench::new()?;
    let _server = bench.serve(&bench.config("auto"))?;
    let program = program_on(&bench.hypervisor, BRIDGE)?;
    ensure!(program.as_ref().is_some_and(|program| program.is_ours()), "{program:?}");
    let counters = bench.counters()?;
    for name in fence_common::verdict::Counters::NAMES {
        counters.get(name)?;
    }
    Ok(())
}

/// A daemon whose network was destroyed or recreated hears nothing, and must say so.
#[test]
fn an_interface_that_goes_is_reported() -> Result<()> {
    let bench = Bench::new()?;
    let mut server = bench.serve(&bench.config("auto"))?;
    let position = server.log_position();
    bench.hypervisor.ip(&["link", "del", BRIDGE])?;
    let told = |line: &str| (line.contains("ERROR") && line.contains(BRIDGE)).then_some(());
    ensure!(server.wait_log(position, Duration::from_secs(20), told).is_some(), "{}", server.log());
    ensure!(server.is_running()?, "{}", server.log());
    let ended = server.stop(Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{:?}: {}", ended.code, ended.stderr);
    Ok(())
}

#[test]
fn a_log_that_nobody_takes_keeps_nobody_waiting() -> Result<()> {
    let bench = Bench::new()?;
    let fifo = bench.hypervisor.path("log");
    let outside = bench.hypervisor.outside(&fifo);
    mkfifo(&outside, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let flags = OFlag::O_NONBLOCK.bits();
    let mut reader = File::options().read(true).write(true).custom_flags(flags).open(&outside)?;
    // The pipe is full to the last byte: no further line fits.
    while reader.write(&[b'-'; 4096]).is_ok() {}
    while reader.write(b"-").is_ok() {}

    let Which::Ours(daemon) = Which::ours()? else { bail!("asked for ours") };
    let script = format!("#!/bin/sh\nexec '{}' \"$@\" 2>'{fifo}'\n", daemon.display());
    let script = bench.hypervisor.write_mode("mute", script.as_bytes(), 0o755)?;
    let mut server = Server::spawn(&bench.hypervisor, &Which::Ours(script.into()), &bench.config("auto"), &[])?;
    poll_until("an answer", START_LIMIT, || {
        Ok((bench.about_domain("status").timeout(2).run(bench.guest.space())?.code == Some(0)).then_some(()))
    })?;
    for _ in 0..20 {
        ensure!(bench.about_domain("status").run(bench.guest.space())?.code == Some(0));
    }
    ensure!(server.is_running()?);
    let ended = server.stop(Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{ended:?}");
    Ok(())
}
