//! Fence races: two guests of two hosts fence each other. At most one dies.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::lab::BRIDGE;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::qemu;

use super::super::KEY;
use super::Hosts;
use crate::fuse::Disk;
use crate::site::SOON;

/// The Ethernet addresses of the two guests.
const ADDRESSES: [&str; 2] = ["52:54:00:00:77:01", "52:54:00:00:77:02"];

impl Hosts {
    /// A machine on a host whose guest of the lab asks in its place: the machine has no operating
    /// system, and both have one Ethernet address.
    fn racer(&self, host: usize, name: &str, disk: Option<&Disk>) -> Result<()> {
        let address = ADDRESSES[host];
        let card = format!(
            "<interface type='bridge'><source bridge='{BRIDGE}'/><mac address='{address}'/><rom enabled='no'/></interface>"
        );
        let machine = Machine::new(name).device(&card);
        let machine = disk.iter().fold(machine, |machine, disk| machine.disk(&disk.path(), "threads"));
        let site = &self.sites[host];
        machine.start(&site.libvirtd)?;
        self.guest(site).must("ip", &["link", "set", "eth0", "address", address])?;
        site.hypervisor.ip(&["neigh", "flush", "dev", BRIDGE])?;
        self.wait_known(name)
    }
}

#[test]
fn a_guest_that_is_being_fenced_fences_no_guest_of_another_host() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let disk = Disk::serve(&hosts.sites[1].hypervisor, "doomed", writing_disk())?;
    hosts.racer(0, "first", None)?;
    hosts.racer(1, "doomed", Some(&disk))?;
    disk.wait_written()?;
    let (first, doomed) = (hosts.sites[0].machine("first")?, hosts.sites[1].machine("doomed")?);
    let ask = |host: usize, domain: &str| {
        let site = &hosts.sites[host];
        Client::new("off", &site.key()).domain(domain).start(hosts.guest(site))
    };
    // The victim is killed, and its disk keeps it from dying.
    disk.hold()?;
    let position = hosts.sites[1].server.log_position();
    let fence = ask(0, "doomed")?;
    hosts.sites[1].logs(position, "not dead yet: ").with_context(|| hosts.logs())?;
    // Meanwhile it asks for the other one's death, on its own host.
    let revenge = ask(1, "first")?;
    poll_until("its order", SOON, || {
        let (_, report) = hosts.sites[1].server.status()?;
        let recent = report["requests"]["recent"].as_array().cloned().unwrap_or_default();
        let order = recent.into_iter().find(|order| order["op"] == "off" && order["domain"] == "first");
        let order = order.filter(|order| !order["steps"]["called_back_us"].is_null());
        order.map(|order| order["result"].is_null().then_some(()).context("the request did not wait")).transpose()
    })
    .with_context(|| hosts.logs())?;
    ensure!(!doomed.is_dead()? && !first.is_dead()?, "{}", hosts.logs());
    disk.release();
    let end = fence.finish(SOON)?;
    ensure!(end.code == Some(0) && doomed.is_dead()?, "{end:?}: {}", hosts.logs());
    let end = revenge.finish(SOON)?;
    ensure!(end.code == Some(1), "{end:?}: {}", hosts.logs());
    ensure!(!first.is_dead()?, "a guest that was being fenced has killed another one: {}", hosts.logs());
    hosts.sites[1].logs(0, "its client is fenced itself (a fence race)")?;
    // Its next life's orders count.
    hosts.expect(0, "on", "doomed", &[], 0)?;
    hosts.wait_known("doomed")?;
    hosts.expect(1, "off", "first", &[first], 0).map(drop)
}

/// A guest asks, and is dead before its request is looked at. Its host tells the others that it has
/// ended, and libvirt has no machine any more with its Ethernet address.
#[test]
fn a_guest_that_has_died_since_it_asked_fences_no_guest_of_another_host() -> Result<()> {
    let hosts = Hosts::new(2)?;
    hosts.racer(0, "first", None)?;
    hosts.racer(1, "doomed", None)?;
    hosts.sites[1].server.wait_domain("doomed", "running")?;
    let (first, doomed) = (hosts.sites[0].machine("first")?, hosts.sites[1].machine("doomed")?);
    // It is called back, and takes its time.
    let peer = Peer::new(hosts.sites[1].observer.guest(), &KEY, Family::V4)?;
    peer.send(peer.request(Op::Off, "first")?)?;
    let mut call = peer.called_back(SOON)?.context("no callback")?;
    hosts.expect(0, "off", "doomed", std::slice::from_ref(&doomed), 0)?;
    hosts.sites[1].libvirtd.wait_state(qemu::URI, "doomed", "shut off")?;
    // The hosts tell each other of their machines within a quarter of a second.
    std::thread::sleep(Duration::from_secs(1));
    let reply = call.converse()?;
    ensure!(!first.is_dead()?, "a dead guest has killed another one ({reply}): {}", hosts.logs());
    ensure!(reply == 1, "{reply}: {}", hosts.logs());
    hosts.sites[1].logs(0, "its client is fenced itself (a fence race)")
}
