//! Interfaces that come and go, for XDP and for the socket. The daemon waits for them at the start,
//! leaves them when they go, and listens again when they return.

mod beginning;
mod company;
mod several;
mod way_back;

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_common::hash::HashKind;
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::kernel::{Program, program_on};
use fence_lab::lab::{BRIDGE, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use zerocopy::IntoBytes;

use crate::bench::{Bench, DOMAIN, key};

/// The longest time for the daemon to notice a change, on a loaded machine.
const NOTICE: Duration = Duration::from_secs(30);

/// How requests reach the daemon, and over which address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    family: Family,
    attach: &'static str,
}

impl Way {
    const ALL: [Self; 5] = [
        Self { family: Family::V4, attach: "auto" },
        Self { family: Family::V4, attach: "generic" },
        Self { family: Family::V4, attach: "off" },
        Self { family: Family::V6, attach: "auto" },
        Self { family: Family::V6, attach: "off" },
    ];

    fn config(self, bench: &Bench) -> Config {
        Config { family: self.family, ..bench.config(self.attach) }
    }

    fn via(self) -> &'static str {
        if self.attach == "off" { "socket" } else { "kernel" }
    }

    /// The log's words for how the program is attached to a bridge.
    fn shown(self) -> String {
        format!("program={}", if self.attach == "auto" { "generic" } else { self.attach })
    }

    fn status(self, bench: &Bench) -> Client {
        self.status_of(bench, DOMAIN)
    }

    fn status_of(self, bench: &Bench, domain: &str) -> Client {
        bench.client("status").domain(domain).family(self.family).hash(HashKind::Sha256)
    }

    /// Checks that a guest is answered, and how its request reached the daemon.
    fn is_served(self, bench: &Bench, server: &Server) -> Result<()> {
        bench.expect_via(server, &self.status(bench), 0, self.via()).map(drop).with_context(|| format!("{self:?}"))
    }

    /// The program on the bridge. Fails if ours is missing where it belongs, or is there where it
    /// does not.
    fn program(self, bench: &Bench) -> Result<Option<Program>> {
        let program = program_on(&bench.hypervisor, BRIDGE)?;
        match (&program, self.via()) {
            (Some(program), "kernel") if program.is_ours() => {}
            (None, "socket") => {}
            _ => bail!("{self:?}: {program:?}"),
        }
        Ok(program)
    }
}

/// Waits for a log line with all of `words`.
fn wait_line(server: &Server, position: usize, words: &[&str]) -> Result<()> {
    let wanted = |line: &str| words.iter().all(|word| line.contains(word)).then_some(());
    server
        .wait_log(position, NOTICE, wanted)
        .with_context(|| format!("no line with {words:?} in the log: {}", server.log()))
}

fn number_of(hypervisor: &Hypervisor, interface: &str) -> Result<u32> {
    let text = hypervisor.space().must("sh", &["-c", &format!("ip -o link show dev {interface}")])?.stdout;
    Ok(text.split(':').next().context("nothing shown")?.trim().parse()?)
}

/// The memberships of the group's address on all interfaces, one per line.
fn memberships(bench: &Bench, family: Family) -> Result<Vec<String>> {
    let (table, group) = match family {
        Family::V4 => ("igmp", "0C0000E1"),
        Family::V6 => ("igmp6", "ff050000000000000000000000030001"),
    };
    let table = bench.hypervisor.proc_net(table)?;
    Ok(table.lines().filter(|line| line.contains(group)).map(str::to_owned).collect())
}

fn recreate(bench: &Bench, number: Option<u32>) -> Result<()> {
    bench.hypervisor.delete_bridge()?;
    bench.hypervisor.make_bridge(number)?;
    bench.hypervisor.plug(&bench.guest)
}

#[test]
fn a_bridge_that_is_recreated_is_listened_on_again() -> Result<()> {
    for way in Way::ALL {
        let bench = Bench::new()?;
        let server = bench.serve(&way.config(&bench))?;
        way.is_served(&bench, &server)?;
        let before = way.program(&bench)?;
        let old = number_of(&bench.hypervisor, BRIDGE)?;

        let position = server.log_position();
        bench.hypervisor.delete_bridge()?;
        wait_line(&server, position, &["ERROR", BRIDGE, "gone", "until it is back"])?;
        bench.hypervisor.make_bridge(None)?;
        bench.hypervisor.plug(&bench.guest)?;
        wait_line(&server, position, &["INFO", BRIDGE, "is there", &way.shown()])?;
        ensure!(number_of(&bench.hypervisor, BRIDGE)? != old, "the new bridge has the old number");
        way.is_served(&bench, &server)?;
        // The same program with the same maps stays in use, so its counters go on.
        ensure!(way.program(&bench)? == before, "another program than before: {}", server.log());
        ensure!(memberships(&bench, way.family)?.len() == 1, "{:?}", memberships(&bench, way.family)?);
        if way.via() == "kernel" {
            ensure!(bench.counters()?.get("delivered")? >= 2, "{:?}", bench.counters()?.nonzero());
        }
        let ended = server.stop(Signal::SIGTERM)?;
        ensure!(ended.code == Some(0) && memberships(&bench, way.family)?.is_empty(), "{}", ended.stderr);
        ensure!(program_on(&bench.hypervisor, BRIDGE)?.is_none(), "still attached");
    }
    Ok(())
}

/// `virsh net-destroy` takes the bridge down and deletes it, and with it the attachment. The daemon
/// may look at any moment of that.
#[test]
fn nobody_is_blamed_for_a_network_that_is_destroyed() -> Result<()> {
    const ROUNDS: usize = 12;
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    let destroy =
        bench.hypervisor.write("destroy", format!("link set {BRIDGE} down\nlink del {BRIDGE}\n").as_bytes())?;
    for _ in 0..ROUNDS {
        let position = server.log_position();
        poll_until("the program", NOTICE, || Ok(program_on(&bench.hypervisor, BRIDGE)?.map(drop)))?;
        bench.hypervisor.ip(&["-batch", &destroy])?;
        wait_line(&server, position, &["ERROR", BRIDGE, "gone"])?;
        bench.hypervisor.make_bridge(None)?;
        wait_line(&server, position, &["INFO", BRIDGE, "requests are heard"])?;
    }
    ensure!(!server.log().contains("somebody else"), "{}", server.log());
    Ok(())
}

/// An interface with the same number may be another one, and it may exist again when the daemon
/// looks.
#[test]
fn a_bridge_that_is_recreated_with_the_same_number_is_another_one() -> Result<()> {
    for way in Way::ALL {
        let bench = Bench::new()?;
        let mut server = bench.serve(&way.config(&bench))?;
        let number = number_of(&bench.hypervisor, BRIDGE)?;
        for round in 0..4 {
            let position = server.log_position();
            let unseen = round % 2 == 0;
            if unseen {
                server.process().signal(Signal::SIGSTOP)?;
            }
            if round == 2 {
                // More messages than the kernel keeps for a stopped reader, so the daemon cannot
                // know what happened.
                overflow(&bench)?;
            }
            recreate(&bench, Some(number))?;
            if unseen {
                server.process().signal(Signal::SIGCONT)?;
            }
            match round {
                0 => wait_line(&server, position, &["INFO", BRIDGE, "was recreated"])?,
                2 => poll_until("the membership", NOTICE, || {
                    Ok((memberships(&bench, way.family)?.len() == 1).then_some(()))
                })?,
                _ => wait_line(&server, position, &["INFO", BRIDGE, "requests are heard"])?,
            }
            if way.via() == "kernel" {
                poll_until("the program", NOTICE, || Ok(program_on(&bench.hypervisor, BRIDGE)?.map(drop)))?;
            }
            way.is_served(&bench, &server).with_context(|| format!("round {round}"))?;
            way.program(&bench)?;
        }
        ensure!(memberships(&bench, way.family)?.len() == 1);
    }
    Ok(())
}

/// Makes the kernel send more messages about the bridge than a socket's buffer holds.
fn overflow(bench: &Bench) -> Result<()> {
    let changes: String = (0..400).map(|n| format!("link set {BRIDGE} txqueuelen {}\n", 900 + n % 7)).collect();
    let file = bench.hypervisor.write("changes", changes.as_bytes())?;
    bench.hypervisor.ip(&["-batch", &file]).map(drop)
}

/// The kernel keeps memberships of deleted interfaces until the socket leaves them, and limits
/// their number.
#[test]
fn thirty_bridges_one_after_the_other_leave_nothing_behind() -> Result<()> {
    for way in Way::ALL {
        let bench = Bench::new()?;
        bench.hypervisor.space().must("sh", &["-c", "echo 20 > /proc/sys/net/ipv4/igmp_max_memberships"])?;
        let server = bench.serve(&way.config(&bench))?;
        let number = number_of(&bench.hypervisor, BRIDGE)?;
        for round in 0..30_u32 {
            // Every other time the daemon gets no time to see each bridge.
            let same = (round % 3 == 0).then_some(number + 100);
            bench.hypervisor.delete_bridge()?;
            bench.hypervisor.make_bridge(same)?;
            if round % 2 == 0 {
                poll_until(
                    "the membership",
                    NOTICE,
                    || Ok((memberships(&bench, way.family)?.len() == 1).then_some(())),
                )
                .with_context(|| format!("{way:?}, round {round}: {}", server.log()))?;
            }
        }
        bench.hypervisor.plug(&bench.guest)?;
        poll_until("the membership", NOTICE, || Ok((memberships(&bench, way.family)?.len() == 1).then_some(())))?;
        if way.via() == "kernel" {
            poll_until("the program", NOTICE, || {
                Ok(program_on(&bench.hypervisor, BRIDGE)?.map(|program| program.is_ours()))
            })?;
        }
        way.is_served(&bench, &server)?;
        ensure!(!server.log().contains("cannot join") && !server.log().contains("panicked"), "{}", server.log());
    }
    Ok(())
}

#[test]
fn a_name_that_is_given_away_and_comes_back_is_followed() -> Result<()> {
    for way in Way::ALL {
        let bench = Bench::new()?;
        let server = bench.serve(&way.config(&bench))?;
        let before = way.program(&bench)?;
        let position = server.log_position();
        let ip = |arguments: &str| bench.hypervisor.ip(&arguments.split(' ').collect::<Vec<_>>()).map(drop);
        ip("link set virbr0 down")?;
        ip("link set virbr0 name virbr8")?;
        ip("link set virbr8 up")?;
        wait_line(&server, position, &["ERROR", BRIDGE, "gone"])?;
        poll_until("the program and the membership to go", NOTICE, || {
            let gone =
                program_on(&bench.hypervisor, "virbr8")?.is_none() && memberships(&bench, way.family)?.is_empty();
            Ok(gone.then_some(()))
        })?;
        // Another bridge gets the name, and then the first one gets it back.
        ip("link add virbr0 type bridge")?;
        ip("link set virbr0 up")?;
        wait_line(&server, position, &["INFO", BRIDGE, "is there"])?;
        ensure!(way.program(&bench)? == before);
        ip("link set virbr0 down")?;
        ip("link set virbr0 name virbr9")?;
        ip("link set virbr8 down")?;
        let position = server.log_position();
        ip("link set virbr8 name virbr0")?;
        ip("link set virbr0 up")?;
        bench.hypervisor.address_bridge()?;
        wait_line(&server, position, &["INFO", BRIDGE, "is there"])?;
        way.is_served(&bench, &server)?;
        ensure!(program_on(&bench.hypervisor, "virbr9")?.is_none() && way.program(&bench)? == before);
    }
    Ok(())
}

#[test]
fn a_bridge_that_is_switched_off_and_on_again_is_reported_and_served() -> Result<()> {
    for way in Way::ALL {
        let bench = Bench::new()?;
        let server = bench.serve(&way.config(&bench))?;
        let before = way.program(&bench)?;
        let position = server.log_position();
        bench.hypervisor.ip(&["link", "set", BRIDGE, "down"])?;
        wait_line(&server, position, &["WARN", BRIDGE, "is down", "ip link set virbr0 up"])?;
        bench.hypervisor.ip(&["link", "set", BRIDGE, "up"])?;
        bench.hypervisor.address_bridge()?;
        wait_line(&server, position, &["INFO", BRIDGE, "up again"])?;
        way.is_served(&bench, &server)?;
        ensure!(way.program(&bench)? == before);
        if way.family == Family::V6 {
            // An MTU below IPv6's minimum removes the membership while the interface stays.
            let members = || -> Result<usize> { Ok(memberships(&bench, way.family)?.len()) };
            bench.hypervisor.ip(&["link", "set", BRIDGE, "mtu", "1279"])?;
            poll_until("the membership to go", NOTICE, || Ok((members()? == 0).then_some(())))?;
            bench.hypervisor.ip(&["link", "set", BRIDGE, "mtu", "1500"])?;
            let back = poll_until("the membership to be back", NOTICE, || Ok((members()? == 1).then_some(())));
            back.with_context(|| format!("{way:?}: {}", server.log()))?;
        }
    }
    Ok(())
}

/// A socket for a link-local group is bound to its interface, so a new interface needs a new
/// socket.
#[test]
fn a_group_of_the_link_is_followed_by_a_socket_of_its_own() -> Result<()> {
    const GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 3, 1);
    for attach in ["auto", "off"] {
        let bench = Bench::new()?;
        bench.hypervisor.delete_bridge()?;
        let address = format!("{BRIDGE}\";\n\t\taddress = \"{GROUP}");
        let config = Config { family: Family::V6, interface: address, ..bench.config(attach) };
        let mut server = Server::spawn(&bench.hypervisor, &Which::ours()?, &config, &[])?;
        wait_line(&server, 0, &["waiting for the interface virbr0"])?;
        bench.hypervisor.make_bridge(None)?;
        bench.hypervisor.plug(&bench.guest)?;
        server.wait_ready(START_LIMIT)?;
        let number = number_of(&bench.hypervisor, BRIDGE)?;
        let peer = Peer::new(&bench.guest, &key(), Family::V6)?;
        let sender = bench.guest.space().in_network(|| {
            let sender = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
            sender.set_multicast_if_v6(nix::net::if_::if_nametoindex("eth0")?)?;
            Ok(sender)
        })?;
        for same in [None, Some(None), Some(Some(number))] {
            if let Some(number) = same {
                let position = server.log_position();
                recreate(&bench, number)?;
                wait_line(&server, position, &["INFO", "requests are heard"])?;
            }
            let position = server.log_position();
            let request = peer.sign(peer.request(Op::Status, DOMAIN)?)?;
            sender.send_to(request.as_bytes(), &SocketAddr::from((GROUP, 1229)).into())?;
            let call = peer.called_back(NOTICE)?;
            let reply = call.with_context(|| format!("no callback: {}", server.log()))?.converse()?;
            ensure!(reply == 0, "{reply}: {}", server.log());
            let via = server.next_fence(position)?.get("via").map(str::to_owned);
            ensure!(via.as_deref() == Some(if attach == "off" { "socket" } else { "kernel" }), "{via:?}");
        }
    }
    Ok(())
}

/// The network is destroyed and made again and again while guests send requests. Once it stays,
/// each guest is answered.
#[test]
fn a_flapping_bridge_costs_nothing_but_what_is_asked_meanwhile() -> Result<()> {
    for way in Way::ALL {
        let bench = Bench::new()?;
        let mut server = bench.serve(&way.config(&bench))?;
        let asking = way.status(&bench).retransmit(2).start(bench.guest.space())?;
        for round in 0..15 {
            match round % 3 {
                0 => recreate(&bench, None)?,
                1 => recreate(&bench, Some(number_of(&bench.hypervisor, BRIDGE)?))?,
                _ => {
                    bench.hypervisor.ip(&["link", "set", BRIDGE, "down"])?;
                    bench.hypervisor.ip(&["link", "set", BRIDGE, "up"])?;
                    bench.hypervisor.address_bridge()?;
                }
            }
        }
        // The request was answered in between or is answered now, and its port is free then.
        let _ = asking.finish(Duration::from_secs(60))?;
        ensure!(server.is_running()?, "{}", server.log());
        poll_until("the membership", NOTICE, || Ok((memberships(&bench, way.family)?.len() == 1).then_some(())))?;
        if way.via() == "kernel" {
            poll_until("the program", NOTICE, || Ok(program_on(&bench.hypervisor, BRIDGE)?.map(drop)))?;
        }
        way.is_served(&bench, &server)?;
        way.program(&bench)?;
        ensure!(!server.log().contains("panicked"), "{}", server.log());
    }
    Ok(())
}
