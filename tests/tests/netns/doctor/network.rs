//! Faults of the interface and the bridge.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use fence_lab::kernel::occupy;
use fence_lab::lab::BRIDGE;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server, Which};

use super::{LIMIT, ask, mend, on_hypervisor, says};
use crate::bench::Bench;

/// A configuration without a running daemon.
fn configured(config: impl Fn(&Bench) -> Config) -> Result<Bench> {
    let bench = Bench::new()?;
    bench.hypervisor.write("fence_virt.conf", config(&bench).render().as_bytes())?;
    Ok(bench)
}

#[test]
fn an_interface_that_nothing_can_be_heard_on_is_reported_for_what_it_lacks() -> Result<()> {
    let bench = configured(|bench| bench.config("auto"))?;
    on_hypervisor(&bench)?.find("interface", "ok")?;
    for (broken, words) in [(["down"].as_slice(), "switched off"), (&["multicast", "off"], "cannot multicast")] {
        bench.hypervisor.ip(&[&["link", "set", BRIDGE], broken].concat())?;
        let told = on_hypervisor(&bench)?;
        let finding = told.find("interface", "wrong")?;
        says(finding, &[BRIDGE, words])?;
        mend(bench.hypervisor.space(), finding)?;
        // A bridge that was down has no carrier for a moment.
        poll_until("the interface", LIMIT, || {
            Ok(on_hypervisor(&bench)?.find("interface", "ok").is_ok().then_some(()))
        })?;
    }
    bench.hypervisor.ip(&["addr", "flush", "dev", BRIDGE])?;
    says(on_hypervisor(&bench)?.find("interface", "wrong")?, &["no IPv4 address", "ip addr add"])?;
    bench.hypervisor.delete_bridge()?;
    says(on_hypervisor(&bench)?.find("interface", "wrong")?, &["there is no interface virbr0", "virsh net-start"])?;
    Ok(())
}

#[test]
fn without_a_named_interface_one_suitable_is_enough() -> Result<()> {
    let bench = configured(|bench| Config { interface: "none".to_owned(), ..bench.config("auto") })?;
    says(on_hypervisor(&bench)?.find("interface", "ok")?, &[BRIDGE])?;
    bench.hypervisor.delete_bridge()?;
    says(on_hypervisor(&bench)?.find("interface", "wrong")?, &["no interface is up", "`interface`"])?;
    Ok(())
}

/// A label (`ip addr add ... label virbr0:1`, also by `ifconfig virbr0:1`) names an address, not an
/// interface.
#[test]
fn an_address_with_a_label_belongs_to_its_interface() -> Result<()> {
    let bench = Bench::new()?;
    bench.hypervisor.ip(&["addr", "flush", "dev", BRIDGE])?;
    let label = format!("{BRIDGE}:1");
    bench.hypervisor.ip(&["addr", "add", "192.168.122.1/24", "dev", BRIDGE, "label", &label])?;
    for interface in [BRIDGE, "none"] {
        let config = Config { interface: interface.to_owned(), ..bench.config("auto") };
        let server = bench.serve(&config)?;
        bench.expect(&server, bench.guest.space(), &bench.about_domain("status"), 0)?;
        let told = on_hypervisor(&bench)?;
        told.is_quiet()?;
        says(told.find("interface", "ok")?, &[BRIDGE])?;
        says(told.find("membership", "ok")?, &[&format!("joined on {BRIDGE}\"")])?;
        says(told.find("program", "ok")?, &[&format!("attached to {BRIDGE} ")])?;
    }
    Ok(())
}

/// A frame that arrives at a port belongs to the bridge, whatever address the port has.
#[test]
fn a_ports_finding_names_its_bridge() -> Result<()> {
    let bench = configured(|bench| Config { interface: "vnet1".to_owned(), ..bench.config("auto") })?;
    for address in [None, Some("192.168.122.2/24")] {
        if let Some(address) = address {
            bench.hypervisor.ip(&["addr", "add", address, "dev", "vnet1"])?;
        }
        let told = on_hypervisor(&bench)?;
        let finding = told.find("interface", "wrong")?;
        says(finding, &["vnet1 is a port of the bridge virbr0", "interface = \\\"virbr0\\\";"])?;
        ensure!(!finding.to_string().contains("ip addr add"), "{finding:#}");
    }
    Ok(())
}

/// Frames of a macvtap go to the guest that has its `/dev/tap*` open.
#[test]
fn a_macvtap_is_no_interface_to_listen_on() -> Result<()> {
    let bench = configured(|bench| Config { interface: "tap0".to_owned(), ..bench.config("auto") })?;
    bench.hypervisor.ip(&["link", "add", "link", BRIDGE, "name", "tap0", "type", "macvtap", "mode", "bridge"])?;
    bench.hypervisor.ip(&["link", "set", "tap0", "up"])?;
    says(on_hypervisor(&bench)?.find("interface", "wrong")?, &["tap0 is a guest's macvtap", BRIDGE])?;
    Ok(())
}

/// The kernel's limit of memberships.
#[test]
fn a_membership_that_the_daemon_does_not_get_is_missed() -> Result<()> {
    let bench = Bench::new()?;
    let limit = |number: &str| {
        bench
            .hypervisor
            .space()
            .must("sh", &["-c", &format!("echo {number} > /proc/sys/net/ipv4/igmp_max_memberships")])
    };
    limit("0")?;
    let _server = Server::spawn(&bench.hypervisor, &Which::ours()?, &bench.config("auto"), &[])?;
    let waiting = |state: &'static str| {
        poll_until(&format!("a membership that is {state}"), LIMIT, || {
            let told = on_hypervisor(&bench)?;
            let Ok(finding) = told.find("membership", state) else { return Ok(None) };
            Ok(Some(finding.clone()))
        })
    };
    says(&waiting("wrong")?, &["225.0.0.12", BRIDGE, "although the daemon runs", "too many memberships"])?;
    limit("20")?;
    // The daemon tries again by itself.
    waiting("ok")?;
    Ok(())
}

#[test]
fn a_bridge_that_snoops_leads_on_and_asks_nobody_is_doubtful() -> Result<()> {
    let bench = configured(|bench| bench.config("auto"))?;
    says(on_hypervisor(&bench)?.find("snooping", "ok")?, &["leads to no other host"])?;
    let hypervisor = &bench.hypervisor;
    hypervisor.ip(&["link", "add", "way0", "type", "vxlan", "id", "7", "remote", "192.0.2.1", "dstport", "4789"])?;
    hypervisor.ip(&["link", "set", "way0", "master", BRIDGE])?;
    let told = on_hypervisor(&bench)?;
    let finding = told.find("snooping", "warning")?;
    says(finding, &["way0", "without a querier", "forget memberships"])?;
    mend(hypervisor.space(), finding)?;
    says(on_hypervisor(&bench)?.find("snooping", "ok")?, &["its own querier"])?;
    hypervisor.ip(&["link", "set", BRIDGE, "type", "bridge", "mcast_querier", "0", "mcast_snooping", "0"])?;
    says(on_hypervisor(&bench)?.find("snooping", "ok")?, &["does not snoop"])?;

    // An interface that is a port of that bridge leads to the same finding.
    hypervisor.ip(&["link", "set", BRIDGE, "type", "bridge", "mcast_snooping", "1"])?;
    let port = Config { interface: "vnet1".to_owned(), ..bench.config("auto") };
    let file = hypervisor.write("port.conf", port.render().as_bytes())?;
    says(ask(hypervisor.space(), &["-f", &file, "doctor"])?.find("snooping", "warning")?, &[BRIDGE, "way0"])?;
    Ok(())
}

/// Linux floods multicast once it has forgotten the membership for want of queries. So a bridge
/// that leads nowhere needs no querier, as the doctor says.
#[test]
fn without_a_querier_linux_forgets_the_membership_and_requests_come_all_the_same() -> Result<()> {
    let bench = Bench::new()?;
    let set = |name: &str, value: &str| bench.hypervisor.ip(&["link", "set", BRIDGE, "type", "bridge", name, value]);
    // In hundredths of a second; the default is 260 s.
    set("mcast_membership_interval", "100")?;
    let server = bench.serve(&bench.config("off"))?;
    poll_until("the membership to be forgotten", Duration::from_secs(60), || {
        let groups = bench.hypervisor.space().must("bridge", &["mdb", "show", "dev", BRIDGE])?;
        Ok((!groups.stdout.contains("225.0.0.12")).then_some(()))
    })?;
    on_hypervisor(&bench)?.is_quiet()?;
    bench.expect_via(&server, &bench.about_domain("status"), 0, "socket")?;
    Ok(())
}

#[test]
fn a_strict_reverse_path_filter_is_doubtful_once_it_has_eaten_something() -> Result<()> {
    let bench = Bench::new()?;
    // Without a membership the packet does not get as far as the filter.
    let _server = bench.serve(&bench.config("off"))?;
    bench.hypervisor.space().must("sysctl", &["-qw", &format!("net.ipv4.conf.{BRIDGE}.rp_filter=1")])?;
    says(on_hypervisor(&bench)?.find("rp_filter", "ok")?, &["strict", "dropped nothing"])?;
    // From an address that the hypervisor has no route to over this interface.
    bench.guest.space().must("ip", &["addr", "add", "10.77.0.9/24", "dev", "eth0"])?;
    let group = SocketAddr::new(IpAddr::from([225, 0, 0, 12]), 1229);
    bench.guest.space().in_network(|| {
        let socket = UdpSocket::bind("10.77.0.9:0")?;
        socket.send_to(b"x", group)?;
        Ok(())
    })?;
    let eaten = poll_until("the filter to drop a packet", LIMIT, || {
        Ok(on_hypervisor(&bench)?.find("rp_filter", "warning").ok().cloned())
    })?;
    says(&eaten, &[BRIDGE, "strict", "packets were dropped"])?;
    mend(bench.hypervisor.space(), &eaten)?;
    says(on_hypervisor(&bench)?.find("rp_filter", "ok")?, &["not strict"])?;
    Ok(())
}

#[test]
fn another_xdp_program_is_named() -> Result<()> {
    let bench = Bench::new()?;
    let another = occupy(&bench.hypervisor, BRIDGE)?;
    let _server = bench.serve(&bench.config("generic"))?;
    let told = on_hypervisor(&bench)?;
    let finding = told.find("program", "warning")?;
    says(finding, &["another XDP program", &format!("id {another}"), "flood"])?;
    mend(bench.hypervisor.space(), finding)?;

    // A device on top of the interface misses the requests that the program takes out.
    let bench = Bench::new()?;
    bench.hypervisor.ip(&["link", "add", "top0", "link", BRIDGE, "type", "macvlan"])?;
    let _server = bench.serve(&bench.config("auto"))?;
    says(on_hypervisor(&bench)?.find("program", "warning")?, &["missed by top0"])?;
    bench.hypervisor.ip(&["link", "del", "top0"])?;
    poll_until("the program", LIMIT, || Ok(on_hypervisor(&bench)?.find("program", "ok").is_ok().then_some(())))?;
    Ok(())
}
