//! Other programs and devices on the interface: the daemon leaves them alone, and its program takes
//! over when they go.

use anyhow::{Context, Result, ensure};
use fence_lab::kernel::{Program, occupy, place, program_on, tcx_on, xdp_on};
use fence_lab::lab::BRIDGE;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use nix::sys::signal::Signal;

use super::{NOTICE, wait_line};
use crate::bench::Bench;

#[test]
fn the_program_takes_over_when_another_leaves() -> Result<()> {
    let bench = Bench::new()?;
    let another = occupy(&bench.hypervisor, BRIDGE)?;
    let server = bench.serve(&bench.config("generic"))?;
    ensure!(server.log().contains("already has an XDP program: id "), "{}", server.log());
    ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_some_and(|program| program.id == another));
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    // Later events on the interface do not repeat the message.
    for txqueuelen in ["900", "901", "902"] {
        bench.hypervisor.ip(&["link", "set", BRIDGE, "txqueuelen", txqueuelen])?;
    }
    let position = server.log_position();
    bench.hypervisor.space().must("bpftool", &["net", "detach", "xdpgeneric", "dev", BRIDGE])?;
    wait_line(&server, position, &["INFO", BRIDGE, "attached now", "generic"])?;
    ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_some_and(|program| program.id != another));
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    ensure!(server.log().matches("without the kernel program").count() == 1, "{}", server.log());
    Ok(())
}

/// A tc program works beside any other program. Ours is one while another XDP program has the
/// bridge, and `status` says why.
#[test]
fn beside_another_xdp_program_ours_is_a_tc_program() -> Result<()> {
    let bench = Bench::new()?;
    let another = occupy(&bench.hypervisor, BRIDGE)?;
    let beside = |server: &Server| -> Result<()> {
        bench.expect_via(server, &bench.about_domain("status"), 0, "kernel")?;
        ensure!(xdp_on(&bench.hypervisor, BRIDGE)?.is_some_and(|program| program.id == another));
        ensure!(tcx_on(&bench.hypervisor, BRIDGE)?.iter().any(Program::is_ours));
        Ok(())
    };
    let server = bench.serve(&bench.config("tcx"))?;
    beside(&server)?;
    server.stop(Signal::SIGTERM)?;
    let server = bench.serve(&bench.config("auto"))?;
    let mut position = 0;
    for _ in 0..2 {
        let why = format!("already has an XDP program: id {another}");
        wait_line(&server, position, &["INFO", BRIDGE, "program=tcx", "in another way", &why])?;
        beside(&server)?;
        let (_, report) = server.status()?;
        let interface = &report["listeners"][0]["interfaces"][0];
        ensure!(interface["program"] == "tcx", "{report:#}");
        ensure!(interface["reason"].as_str().is_some_and(|reason| reason.contains(&why)), "{report:#}");
        // It goes, and ours is XDP.
        position = server.log_position();
        bench.hypervisor.space().must("bpftool", &["net", "detach", "xdpgeneric", "dev", BRIDGE])?;
        wait_line(&server, position, &["INFO", BRIDGE, "program=generic", "attached now"])?;
        bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
        let ours = xdp_on(&bench.hypervisor, BRIDGE)?.context("no XDP program")?;
        ensure!(ours.is_ours() && ours.id != another && tcx_on(&bench.hypervisor, BRIDGE)?.is_empty());
        ensure!(server.status()?.1["listeners"][0]["interfaces"][0]["reason"].is_null());
        // Somebody takes it off and takes the place.
        position = server.log_position();
        detach(&bench, ours.id)?;
        ensure!(place(&bench.hypervisor, BRIDGE)? == another);
    }
    ensure!(!server.log().contains("panicked"), "{}", server.log());
    Ok(())
}

/// Takes an XDP program off that bpf_link attached.
fn detach(bench: &Bench, program: u64) -> Result<()> {
    let detach = "bpftool link detach id $(bpftool link show | sed -n 's/^\\([0-9]*\\): xdp  prog PROGRAM.*/\\1/p')";
    let detach = detach.replace("PROGRAM", &program.to_string());
    bench.hypervisor.space().must("sh", &["-c", &detach]).map(drop)
}

/// The kernel sends no message when a program goes that bpf_link attached.
#[test]
fn the_program_takes_over_without_a_link_message() -> Result<()> {
    let bench = Bench::new()?;
    let elsewhere = Config { port: Some(1230), ..bench.config("generic") };
    let pid_file = bench.hypervisor.path("another.pid");
    let mut other = Server::spawn(&bench.hypervisor, &Which::ours()?, &elsewhere, &["-p", &pid_file])?;
    other.wait_ready(START_LIMIT)?;
    let server = bench.serve(&bench.config("generic"))?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    let position = server.log_position();
    other.stop(Signal::SIGKILL)?;
    wait_line(&server, position, &["INFO", BRIDGE, "attached now", "generic"])?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}

/// A device on top of the interface misses the requests that the program takes out, also if it is
/// added later.
#[test]
fn the_program_leaves_an_interface_while_others_listen() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    let position = server.log_position();
    bench.hypervisor.ip(&["link", "add", "top0", "link", BRIDGE, "type", "macvlan"])?;
    wait_line(&server, position, &["WARN", "without the kernel program", "top0, a device on top of it"])?;
    ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none(), "{}", server.log());
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    bench.hypervisor.ip(&["link", "del", "top0"])?;
    wait_line(&server, position, &["INFO", BRIDGE, "attached now"])?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "kernel")?;
    Ok(())
}

#[test]
fn a_program_that_somebody_takes_off_is_reported_and_comes_back() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("generic"))?;
    let before = program_on(&bench.hypervisor, BRIDGE)?.context("not attached")?;
    let position = server.log_position();
    detach(&bench, before.id)?;
    // The kernel sends no message about this; the daemon notices it at the next check.
    bench.hypervisor.ip(&["link", "set", BRIDGE, "txqueuelen", "900"])?;
    wait_line(&server, position, &["WARN", "without the kernel program", "taken off the interface by somebody else"])?;
    bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
    wait_line(&server, position, &["INFO", BRIDGE, "attached now"])?;
    ensure!(program_on(&bench.hypervisor, BRIDGE)? == Some(before));
    Ok(())
}

/// A container takes the interface with the program on it, unless somebody detaches the program.
#[test]
fn an_interface_that_moves_to_another_namespace_is_let_go() -> Result<()> {
    let bench = Bench::new()?;
    let ip = |arguments: &str| bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop);
    ip("link add port9 type veth peer name guest9")?;
    ip("link set guest9 up")?;
    ip("link set port9 up")?;
    let server = bench.serve(&Config { interface: "port9".to_owned(), ..bench.config("auto") })?;
    let before = program_on(&bench.hypervisor, "port9")?.context("not attached")?;
    let position = server.log_position();
    ip("link set port9 netns guest1")?;
    wait_line(&server, position, &["ERROR", "port9", "gone"])?;
    poll_until("the program to be off", NOTICE, || {
        let shown = bench.guest.space().must("ip", &["-d", "link", "show", "dev", "port9"])?.stdout;
        Ok((!shown.contains("prog/xdp")).then_some(()))
    })?;
    bench.guest.space().must("ip", &["link", "set", "port9", "netns", "1"]).context("back")?;
    ip("link set port9 up")?;
    wait_line(&server, position, &["INFO", "port9", "is there"])?;
    ensure!(program_on(&bench.hypervisor, "port9")? == Some(before), "{}", server.log());
    Ok(())
}
