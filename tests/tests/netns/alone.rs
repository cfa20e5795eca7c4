//! A domain that is off is answered for at once where no other hypervisor hears the request.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::Family;
use fence_lab::lab::{BRIDGE, Guest, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::server::{Config, Server, Which};

use crate::bench::{Bench, DOMAIN, key};

/// How long an event that must come may take on a loaded machine.
const SURELY: Duration = Duration::from_secs(60);

/// Asks for the status of the domain, which is off, and returns whether the answer was deferred.
fn is_deferred(server: &Server, peer: &Peer) -> Result<bool> {
    let position = server.log_position();
    peer.send(peer.request(Op::Status, DOMAIN)?)?;
    ensure!(peer.called_back(SURELY)?.context("no callback")?.converse()? == 2, "the domain is not off");
    let answered = |line: &str| line.contains("op=status").then(|| line.contains("other hosts were given time"));
    server.wait_log(position, SURELY, answered).context("no line about the answer")
}

/// Waits for what the log and `status` say of the bridge. `way` is its way out, if it has one.
fn wait_told(server: &Server, position: usize, alone: bool, way: Option<&str>) -> Result<()> {
    let line = match way {
        None => format!(" alone: {BRIDGE} leads nowhere"),
        Some(way) => format!("{BRIDGE} leads out by {way}"),
    };
    let told = server.wait_log(position, SURELY, |told| told.contains(&line).then_some(()));
    told.with_context(|| format!("no `{line}`: {}", server.log()))?;
    let report = server.status()?.1;
    let interface = &report["listeners"][0]["interfaces"][0];
    let is_told = interface["alone"] == alone && interface["way_out"].as_str() == way;
    ensure!(is_told && report["listeners"][0]["status"].to_string().contains(", alone") == alone, "{report:#}");
    Ok(())
}

/// A daemon that is asked by a peer, and whose domain is off.
fn off_on(hypervisor: &Hypervisor, guest: &Guest, config: &Config) -> Result<(Server, Peer)> {
    let server = Server::start(hypervisor, &Which::ours()?, config)?;
    let peer = Peer::new(guest, &key(), Family::V4)?;
    ensure!(peer.ask(Op::Off, DOMAIN)?.converse()? == 0);
    // The events of the domain's end come a moment later.
    server.wait_domain(DOMAIN, "shut off")?;
    Ok((server, peer))
}

/// Runs `ip` with each of these lines as arguments.
fn ip(bench: &Bench, lines: &[&str]) -> Result<()> {
    lines.iter().try_for_each(|line| bench.hypervisor.ip(&line.split(' ').collect::<Vec<_>>()).map(drop))
}

/// Each change counts for the next request: the kernel is asked at that moment.
#[test]
fn a_domain_that_is_off_is_deferred_while_the_bridge_leads_out() -> Result<()> {
    let bench = Bench::new()?;
    let (server, peer) = off_on(&bench.hypervisor, &bench.guest, &bench.config("auto"))?;
    ensure!(!is_deferred(&server, &peer)?, "{}", server.log());
    // No other host hears a guest's tap, in whatever way its hypervisor has made it.
    ip(&bench, &["tuntap add vnet90 mode tap", "link set vnet90 master virbr0 up"])?;
    ip(&bench, &["tuntap add machine mode tap vnet_hdr", "link set machine master virbr0 up"])?;
    ensure!(!is_deferred(&server, &peer)?, "{}", server.log());
    ip(&bench, &["link add card0 type veth peer name card1"])?;
    ip(&bench, &["netns add far", "link add far1 type veth peer name end1 netns far"])?;
    ip(&bench, &["-n far link add br1 type bridge", "-n far addr add 10.9.9.9/24 dev end1"])?;
    for (comes, goes) in [
        // What stands for a card, a tunnel, and a device on top of the bridge.
        ("link set card0 master virbr0", "link set card0 nomaster"),
        ("link add way0 master virbr0 type vxlan id 7 remote 192.0.2.1 dstport 4789", "link del way0"),
        ("link add link virbr0 name way1 type macvlan", "link del way1"),
        // The bridge of another namespace, an end without an address, and one on which something
        // else is.
        ("-n far link set end1 master br1", "-n far link set end1 nomaster"),
        ("-n far addr flush dev end1", "-n far addr add 10.9.9.9/24 dev end1"),
        ("-n far link add link end1 name up1 type macvlan", "-n far link del up1"),
    ] {
        if comes.starts_with("-n far") {
            ip(&bench, &["link set far1 master virbr0"])?;
            ensure!(!is_deferred(&server, &peer)?, "before {comes}: {}", server.log());
        }
        ip(&bench, &[comes])?;
        ensure!(is_deferred(&server, &peer)?, "{comes}: {}", server.log());
        ip(&bench, &[goes])?;
        ensure!(!is_deferred(&server, &peer)?, "{goes}: {}", server.log());
    }
    Ok(())
}

#[test]
fn the_log_and_status_say_where_the_bridge_leads() -> Result<()> {
    let bench = Bench::new()?;
    ip(&bench, &["link add card0 type veth peer name card1"])?;
    let server = bench.serve(&bench.config("auto"))?;
    wait_told(&server, 0, true, None)?;
    for way in ["card0 (a veth)"; 2] {
        let position = server.log_position();
        ip(&bench, &["link set card0 master virbr0"])?;
        wait_told(&server, position, false, Some(way))?;
        let position = server.log_position();
        ip(&bench, &["link set card0 nomaster"])?;
        wait_told(&server, position, true, None)?;
    }
    // A container's interface gets its address late, and no message about a link tells that.
    let position = server.log_position();
    ip(&bench, &["netns add late", "link add late1 master virbr0 type veth peer name eth0 netns late"])?;
    wait_told(&server, position, false, Some("late1 (its other end has no address)"))?;
    let position = server.log_position();
    ip(&bench, &["-n late addr add 10.9.9.9/24 dev eth0"])?;
    wait_told(&server, position, true, None)
}

#[test]
fn the_configuration_overrules_where_the_bridge_leads() -> Result<()> {
    let bench = Bench::new()?;
    ip(&bench, &["link add card0 type veth peer name card1"])?;
    for (alone, deferred) in [("yes", false), ("no", true)] {
        ip(&bench, &["link set card0 nomaster"])?;
        let config = Config { alone: Some(alone), ..bench.config("off") };
        let (server, peer) = off_on(&bench.hypervisor, &bench.guest, &config)?;
        ensure!(is_deferred(&server, &peer)? == deferred, "{alone}: {}", server.log());
        let position = server.log_position();
        ip(&bench, &["link set card0 master virbr0"])?;
        ensure!(is_deferred(&server, &peer)? == deferred, "{alone}: {}", server.log());
        if alone == "yes" {
            let warns = |line: &str| line.contains("WARN alone by the configuration").then_some(());
            server.wait_log(position, SURELY, warns).with_context(|| server.log())?;
        }
    }
    Ok(())
}

/// The cable between two hypervisors' bridges is a veth whose other end is in another namespace, as
/// a container's is.
#[test]
fn two_hypervisors_on_one_segment_are_not_alone() -> Result<()> {
    let [one, other] = Hypervisor::pair()?;
    for (number, hypervisor) in [(1, &one), (2, &other)] {
        let guest = hypervisor.guest(number)?;
        let file = hypervisor.write("fence.key", &key())?;
        let (server, peer) = off_on(hypervisor, &guest, &Config::new(&file))?;
        ensure!(is_deferred(&server, &peer)?, "{}", server.log());
    }
    Ok(())
}

/// With several interfaces, the one that a request came by decides.
#[test]
fn each_interface_decides_for_itself() -> Result<()> {
    let bench = Bench::new()?;
    ip(&bench, &["link add br9 type bridge forward_delay 0", "addr add 10.77.0.1/24 dev br9", "link set br9 up"])?;
    ip(&bench, &["link add port9 master br9 type veth peer name eth9 netns guest1", "link set port9 up"])?;
    ip(&bench, &["-n guest1 addr add 10.77.0.2/24 dev eth9", "-n guest1 link set eth9 up"])?;
    bench.hypervisor.wait_forwarding("port9")?;
    let config = Config { interface: "none".to_owned(), ..bench.config("auto") };
    let (server, peer) = off_on(&bench.hypervisor, &bench.guest, &config)?;
    let by_eth9 = Peer::at(bench.guest.space(), [10, 77, 0, 2].into(), &key())?;
    ensure!(!is_deferred(&server, &peer)? && !is_deferred(&server, &by_eth9)?, "{}", server.log());
    ip(&bench, &["link add card0 master br9 type veth peer name card1"])?;
    ensure!(!is_deferred(&server, &peer)? && is_deferred(&server, &by_eth9)?, "{}", server.log());
    ip(&bench, &[&format!("link set card0 master {BRIDGE}")])?;
    ensure!(is_deferred(&server, &peer)? && !is_deferred(&server, &by_eth9)?, "{}", server.log());
    Ok(())
}
