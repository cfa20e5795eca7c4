//! Without `interface` in the configuration the daemon listens on several interfaces, each with the
//! program. A change of one does not affect the others.

use anyhow::{Context, Result, ensure};
use fence_lab::kernel::{Program, program_on, tcx_on, xdp_on};
use fence_lab::lab::{BRIDGE, Guest};
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server};
use nix::sys::signal::Signal;

use super::{NOTICE, number_of, wait_line};
use crate::bench::Bench;

/// A hypervisor with one guest on its bridge and one on a cable of its own. The daemon's
/// configuration names neither interface.
struct Networks {
    bench: Bench,
    second: Guest,
}

/// The hypervisor's end of the second guest's cable.
const CABLE: &str = "port9";

impl Networks {
    fn new() -> Result<Self> {
        let bench = Bench::new()?;
        let second = bench.hypervisor.guest(2)?;
        let networks = Self { bench, second };
        networks.ip("link del vnet2")?;
        networks.lay_cable(None)?;
        Ok(networks)
    }

    fn serve(&self, attach: &'static str) -> Result<Server> {
        self.bench.serve(&Config { interface: "none".to_owned(), ..self.bench.config(attach) })
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        self.bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop)
    }

    fn ip_of_second(&self, arguments: &str) -> Result<()> {
        self.second.space().must("ip", &arguments.split(' ').collect::<Vec<_>>()).map(drop)
    }

    fn lay_cable(&self, number: Option<u32>) -> Result<()> {
        let number = number.map_or_else(String::new, |number| format!(" index {number}"));
        self.ip(&format!("link add {CABLE}{number} type veth peer name eth9 netns {}", self.second.name))?;
        self.ip_of_second("addr add 192.168.123.12/24 dev eth9")?;
        self.ip_of_second("link set eth9 up")?;
        self.ip_of_second("route add 224.0.0.0/4 dev eth9")?;
        self.address(CABLE)
    }

    /// Gives an interface the address that it needs for listening.
    fn address(&self, interface: &str) -> Result<()> {
        self.ip(&format!("addr replace 192.168.123.1/24 dev {interface}"))?;
        self.ip(&format!("link set {interface} up"))
    }

    fn first_is_served(&self, server: &Server) -> Result<()> {
        self.bench.expect_via(server, &self.bench.about_domain("status"), 0, "kernel").map(drop)
    }

    fn second_is_served(&self, server: &Server, via: &str) -> Result<()> {
        let position = server.log_position();
        // A newly plugged cable loses its first packets.
        let client = self.bench.about_domain("status").retransmit(2);
        self.bench.expect(server, self.second.space(), &client, 0)?;
        let fence = server.next_fence(position)?;
        ensure!(fence.get("via") == Some(via), "came via {:?}, not {via}: {}", fence.get("via"), server.log());
        Ok(())
    }
}

#[test]
fn two_networks_are_served_by_one_program_with_one_sum() -> Result<()> {
    let networks = Networks::new()?;
    let hypervisor = &networks.bench.hypervisor;
    let server = networks.serve("auto")?;
    wait_line(&server, 0, &["INFO", BRIDGE, "program=generic", "attached now"])?;
    wait_line(&server, 0, &["INFO", CABLE, "program=tcx", "attached now"])?;
    networks.first_is_served(&server)?;
    networks.second_is_served(&server, "kernel")?;
    ensure!(networks.bench.counters()?.get("delivered")? == 2, "{:?}", networks.bench.counters()?.nonzero());
    ensure!(xdp_on(hypervisor, BRIDGE)?.is_some_and(|program| program.is_ours()));
    ensure!(tcx_on(hypervisor, CABLE)?.iter().any(Program::is_ours));
    let ended = server.stop(Signal::SIGTERM)?;
    ensure!(ended.code == Some(0), "{}", ended.stderr);
    for interface in [BRIDGE, CABLE] {
        ensure!(program_on(hypervisor, interface)?.is_none(), "still attached to {interface}");
    }
    Ok(())
}

/// A bridge has no native XDP: the socket serves it, and the program serves the other interface.
#[test]
fn each_interface_gets_what_it_can() -> Result<()> {
    let networks = Networks::new()?;
    let server = networks.serve("native")?;
    wait_line(&server, 0, &["WARN", BRIDGE, "without the kernel program"])?;
    wait_line(&server, 0, &["INFO", CABLE, "program=native", "attached now"])?;
    networks.bench.expect_via(&server, &networks.bench.about_domain("status"), 0, "socket")?;
    networks.second_is_served(&server, "kernel")?;
    ensure!(xdp_on(&networks.bench.hypervisor, CABLE)?.is_some_and(|program| program.is_ours()));
    Ok(())
}

/// One interface is deleted, recreated, renamed, switched off, and moved to another namespace and
/// back. The other one's guest notices nothing, and the daemon never restarts.
#[test]
fn interfaces_are_followed_independently() -> Result<()> {
    for (attach, shown) in [("auto", "program=tcx"), ("generic", "program=generic")] {
        let networks = Networks::new()?;
        let hypervisor = &networks.bench.hypervisor;
        let mut server = networks.serve(attach)?;
        networks.second_is_served(&server, "kernel")?;
        let program = program_on(hypervisor, CABLE)?;
        let number = number_of(hypervisor, CABLE)?;
        let position = std::cell::Cell::new(0);
        let expect = |words: &[&str]| wait_line(&server, position.get(), words);
        for step in ["recreated", "recreated with its number", "renamed", "switched off and on", "moved away and back"]
        {
            position.set(server.log_position());
            match step {
                "recreated" | "recreated with its number" => {
                    networks.ip(&format!("link del {CABLE}"))?;
                    expect(&["INFO", CABLE, "is gone"])?;
                    networks.first_is_served(&server)?;
                    networks.lay_cable((step != "recreated").then_some(number))?;
                }
                "renamed" => {
                    networks.ip(&format!("link set {CABLE} down"))?;
                    networks.ip(&format!("link set {CABLE} name other9"))?;
                    networks.address("other9")?;
                    expect(&["INFO", "other9", "requests are heard", shown])?;
                    networks.second_is_served(&server, "kernel")?;
                    networks.ip("link set other9 down")?;
                    networks.ip(&format!("link set other9 name {CABLE}"))?;
                    position.set(server.log_position());
                    networks.address(CABLE)?;
                }
                "switched off and on" => {
                    networks.ip(&format!("link set {CABLE} down"))?;
                    expect(&["INFO", CABLE, "is gone"])?;
                    networks.address(CABLE)?;
                }
                _ => {
                    networks.ip(&format!("link set {CABLE} netns guest1"))?;
                    expect(&["INFO", CABLE, "is gone"])?;
                    poll_until("the program to be off", NOTICE, || {
                        let away = networks.bench.guest.space();
                        let shown = away.must("ip", &["-d", "link", "show", "dev", CABLE])?.stdout;
                        Ok((!shown.contains("prog/xdp")).then_some(()))
                    })?;
                    networks.bench.guest.space().must("ip", &["link", "set", CABLE, "netns", "1"]).context("back")?;
                    networks.address(CABLE)?;
                }
            }
            expect(&["INFO", CABLE, "requests are heard", shown])
                .and_then(|()| networks.second_is_served(&server, "kernel"))
                .and_then(|()| networks.first_is_served(&server))
                .with_context(|| format!("{attach}, {step}"))?;
            ensure!(program_on(hypervisor, CABLE)? == program, "{step}: another program");
        }
        ensure!(server.is_running()? && !server.log().contains("panicked"), "{}", server.log());
    }
    Ok(())
}

/// A cable between two bridges makes one network: each request arrives over both.
#[test]
fn a_request_that_comes_by_two_interfaces_is_served_once() -> Result<()> {
    for attach in ["auto", "generic", "off"] {
        let networks = Networks::new()?;
        networks.ip("link add virbr1 type bridge forward_delay 0")?;
        networks.ip("link add cable0 type veth peer name cable1")?;
        for (port, bridge) in [("cable0", BRIDGE), ("cable1", "virbr1")] {
            networks.ip(&format!("link set {port} master {bridge} up"))?;
        }
        networks.ip("addr add 192.168.124.1/24 dev virbr1")?;
        networks.ip("link set virbr1 up")?;
        let server = networks.serve(attach)?;
        if attach != "off" {
            wait_line(&server, 0, &["INFO", BRIDGE, "attached now"])?;
            wait_line(&server, 0, &["INFO", "virbr1", "attached now"])?;
        }
        let bench = &networks.bench;
        // Until the cable works for good.
        for op in ["status", "reboot", "status"] {
            let position = server.log_position();
            bench.expect(&server, bench.guest.space(), &bench.about_domain(op), 0)?;
            server.next_fence(position)?;
        }
        let position = server.log_position();
        bench.expect(&server, bench.guest.space(), &bench.about_domain("off"), 0)?;
        server.next_fence(position)?;
        let fences = server.log().lines().filter(|line| line.contains("op=off") && line.contains("reply=")).count();
        ensure!(fences == 1, "{attach}: {fences} answers: {}", server.log());
        let ended = server.stop(Signal::SIGTERM)?;
        // The request did arrive over both: the daemon counted more datagrams than were sent.
        let heard = ended.stderr.lines().find(|line| line.contains("stopping:")).context("no line about the stop")?;
        ensure!(counted(heard)? >= 8, "{attach}: heard by one alone: {heard}");
    }
    Ok(())
}

/// The total of datagrams in the daemon's last log line, whatever their way and result.
fn counted(line: &str) -> Result<u64> {
    let (_, told) = line.split_once("stopping:").context("not the line about the stop")?;
    let numbers = told.split(|c: char| !c.is_ascii_alphanumeric()).filter_map(|word| word.parse::<u64>().ok());
    Ok(numbers.sum())
}
