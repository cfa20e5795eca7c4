//! The main task on real machines: a stock client in one guest fences another guest, which is dead
//! afterwards.
//!
//! With `FENCE_LAB_SERVER=stock` these tests run against Debian's fence_virtd. Those with both
//! drivers at once are ours alone: fence_virtd prints no list over two connections.

#[cfg(test)]
mod a_soak;
#[cfg(test)]
mod blind;
#[cfg(test)]
mod block;
#[cfg(test)]
mod concurrency;
#[cfg(test)]
mod configured;
#[cfg(test)]
mod connections;
#[cfg(test)]
mod crashes;
#[cfg(test)]
mod definitions;
#[cfg(test)]
mod doctor;
#[cfg(test)]
mod fence_races;
#[cfg(test)]
mod fence_virtd;
#[cfg(test)]
mod fuse;
#[cfg(test)]
mod group;
#[cfg(test)]
mod helpers;
#[cfg(test)]
mod hosts;
#[cfg(test)]
mod images;
#[cfg(test)]
mod inspect;
#[cfg(test)]
mod late;
#[cfg(test)]
mod late_notice;
#[cfg(test)]
mod lines;
#[cfg(test)]
mod lists;
#[cfg(test)]
mod memory_lock;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod orphans;
#[cfg(test)]
mod outages;
#[cfg(test)]
mod proxy;
#[cfg(test)]
mod reboot;
#[cfg(test)]
mod records;
#[cfg(test)]
mod remains;
#[cfg(test)]
mod resets;
#[cfg(test)]
mod seen_dead;
#[cfg(test)]
mod serial;
#[cfg(test)]
mod silence;
#[cfg(test)]
mod site;
#[cfg(test)]
mod slow_deaths;
#[cfg(test)]
mod slow_starts;
#[cfg(test)]
mod snapshots;
#[cfg(test)]
mod stops;
#[cfg(test)]
mod table;
#[cfg(test)]
mod tcp;
#[cfg(test)]
mod turns;
#[cfg(test)]
mod unkillable;
#[cfg(test)]
mod unseen;
#[cfg(test)]
mod xtask_run;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::container;
use fence_lab::initramfs;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::observer::Observer;
use fence_lab::process::{Finished, poll_until};
use fence_lab::qemu::{self, LinuxGuest};
use fence_lab::server::{Config, Server, Which};
use fence_lab::witness::Witness;

/// The content does not matter; the length is that of Debian's key.
const KEY: [u8; 4096] = [0x5a; 4096];

struct Lab {
    hypervisor: Hypervisor,
    libvirtd: Libvirtd,
    server: Server,
    key: String,
}

/// A hypervisor with libvirtd and a server that uses `uris`.
fn lab(which: &Which, uris: &[&str]) -> Result<Lab> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let key = hypervisor.write("fence.key", &KEY)?;
    let mut config = Config::new(&key);
    config.uris = uris.iter().map(|&uri| uri.to_owned()).collect();
    let server = Server::start(&hypervisor, which, &config)?;
    Ok(Lab { hypervisor, libvirtd, server, key })
}

/// Checks the client's exit code; on a mismatch, shows the output of client and server.
fn expect(answer: &Finished, code: i32, what: &str, server: &Server) -> Result<()> {
    ensure!(
        answer.code == Some(code),
        "{what}: exit code {:?} instead of {code}; the client: {}{}\nthe server: {}",
        answer.code,
        answer.stdout,
        answer.stderr,
        server.log(),
    );
    Ok(())
}

/// Checks that a list shows a domain in this state.
fn expect_listed(list: &Finished, domain: &str, state: &str) -> Result<()> {
    let line = list.stdout.lines().find(|line| line.split_whitespace().next() == Some(domain));
    let listed = line.with_context(|| format!("{domain} is not in the list: {}", list.stdout))?;
    ensure!(listed.split_whitespace().last() == Some(state), "{domain} should be {state}: {listed}");
    Ok(())
}

#[test]
fn a_qemu_guest_fences_another() -> Result<()> {
    let Lab { hypervisor, libvirtd, server, .. } = lab(&Which::from_env()?, &[qemu::URI])?;
    let mut asker = LinuxGuest::boot(&libvirtd, "asker", 1, &KEY)?;
    let victim = LinuxGuest::boot(&libvirtd, "victim", 2, &KEY)?;
    drop(victim);
    let bystander = Witness::of_qemu(&hypervisor, "asker")?;
    let client = |op| Client::new(op, initramfs::KEY);

    let list = asker.fence(&client("list"))?;
    expect(&list, 0, "list", &server)?;
    expect_listed(&list, "asker", "on")?;
    expect_listed(&list, "victim", "on")?;
    expect(&asker.fence(&client("status").domain("victim"))?, 0, "status of a running guest", &server)?;

    let before = Witness::of_qemu(&hypervisor, "victim")?;
    ensure!(!before.is_dead()?);
    let position = server.log_position();
    expect(&asker.fence(&client("off").domain("victim"))?, 0, "off", &server)?;
    if server.tells_times() {
        let fence = server.next_fence(position)?;
        ensure!(
            fence.get("via") == Some("kernel"),
            "a guest's request comes through the program on virbr0: {}",
            server.log()
        );
    }
    ensure!(before.is_dead()?, "the client got a success and QEMU still lives");
    libvirtd.wait_state(qemu::URI, "victim", "shut off")?;
    expect(&asker.fence(&client("status").domain("victim"))?, 2, "status of a guest that is off", &server)?;
    expect_listed(&asker.fence(&client("list"))?, "victim", "off")?;
    expect(&asker.fence(&client("off").domain("victim"))?, 0, "off of a guest that is off", &server)?;

    expect(&asker.fence(&client("on").domain("victim"))?, 0, "on", &server)?;
    libvirtd.wait_state(qemu::URI, "victim", "running")?;
    let before = Witness::of_qemu(&hypervisor, "victim")?;
    LinuxGuest::connect(&hypervisor, "victim").context("the guest boots after on")?;
    expect(&asker.fence(&client("on").domain("victim"))?, 0, "on of a running guest", &server)?;
    ensure!(!before.is_dead()?, "on of a running guest must leave it alone");

    expect(&asker.fence(&client("reboot").domain("victim"))?, 0, "reboot", &server)?;
    ensure!(before.is_dead()?, "the client got a success and the old QEMU still lives");
    let after = before.wait_next(&hypervisor, "victim")?;
    libvirtd.wait_state(qemu::URI, "victim", "running")?;
    ensure!(!after.is_dead()?);
    LinuxGuest::connect(&hypervisor, "victim").context("the guest boots after reboot")?;

    let uuid = libvirtd.virsh(qemu::URI, &["domuuid", "victim"])?.stdout;
    expect(&asker.fence(&client("off").domain(uuid.trim()).uuid())?, 0, "off by UUID", &server)?;
    ensure!(after.is_dead()?);

    expect(&asker.fence(&client("off").domain("nobody"))?, 1, "off of an unknown guest", &server)?;
    ensure!(!bystander.is_dead()?, "the client's own guest was killed");
    Ok(())
}

#[test]
fn a_container_is_fenced() -> Result<()> {
    let Lab { hypervisor, libvirtd, server, key } = lab(&Which::from_env()?, &[container::URI])?;
    let guest = hypervisor.guest(1)?;
    container::start(&libvirtd, "ct1")?;
    container::start(&libvirtd, "bystander")?;
    let bystander = Witness::of_container(&hypervisor, "bystander")?;
    let observer = Observer::new(&hypervisor, guest, &key);
    let fence = |op, domain| observer.fence(op, domain);

    let list = observer.list()?;
    expect(&list, 0, "list", &server)?;
    expect_listed(&list, "ct1", "on")?;
    expect(&fence("status", "ct1")?, 0, "status", &server)?;

    let before = Witness::of_container(&hypervisor, "ct1")?;
    ensure!(!before.is_dead()?);
    expect(&fence("off", "ct1")?, 0, "off", &server)?;
    ensure!(before.is_dead()?, "the client got a success and the container still lives");
    libvirtd.wait_state(container::URI, "ct1", "shut off")?;
    expect(&fence("status", "ct1")?, 2, "status of a container that is off", &server)?;

    expect(&fence("on", "ct1")?, 0, "on", &server)?;
    libvirtd.wait_state(container::URI, "ct1", "running")?;
    let before = Witness::of_container(&hypervisor, "ct1")?;

    expect(&fence("reboot", "ct1")?, 0, "reboot", &server)?;
    ensure!(before.is_dead()?, "the client got a success and the old container still lives");
    let after = before.wait_next(&hypervisor, "ct1")?;
    libvirtd.wait_state(container::URI, "ct1", "running")?;
    ensure!(!after.is_dead()?);
    ensure!(!bystander.is_dead()?);
    Ok(())
}

#[test]
fn both_drivers_are_served_at_once() -> Result<()> {
    let Lab { hypervisor, libvirtd, server, key } = lab(&Which::ours()?, &[qemu::URI, container::URI])?;
    let guest = hypervisor.guest(1)?;
    let observer = Observer::new(&hypervisor, guest, &key);
    container::start(&libvirtd, "ct1")?;
    qemu::start_idle(&libvirtd, "vm1")?;

    let list = observer.list()?;
    expect(&list, 0, "list", &server)?;
    expect_listed(&list, "ct1", "on")?;
    expect_listed(&list, "vm1", "on")?;
    let (machine, in_container) = (Witness::of_qemu(&hypervisor, "vm1")?, Witness::of_container(&hypervisor, "ct1")?);
    for domain in ["vm1", "ct1"] {
        expect(&observer.fence("off", domain)?, 0, domain, &server)?;
    }
    ensure!(machine.is_dead()? && in_container.is_dead()?);
    Ok(())
}

#[test]
fn a_libvirtd_that_comes_later_is_used() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let key = hypervisor.write("fence.key", &KEY)?;
    let guest = hypervisor.guest(1)?;
    let mut config = Config::new(&key);
    config.uris = vec![qemu::URI.to_owned()];
    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let off = Client::new("off", &key).domain("vm1").run(guest.space())?;
    expect(&off, 1, "off without libvirt", &server)?;
    let list = Client::new("list", &key).run(guest.space())?;
    expect(&list, 1, "a list before the first connection", &server)?;
    ensure!(list.said() == "Operation failed\n", "{list:?}");

    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "vm1")?;
    let machine = Witness::of_qemu(&hypervisor, "vm1")?;
    poll_until("a status that succeeds", Duration::from_secs(60), || {
        let status = Client::new("status", &key).domain("vm1").run(guest.space())?;
        Ok((status.code == Some(0)).then_some(()))
    })?;
    let off = Observer::new(&hypervisor, guest, &key).fence("off", "vm1")?;
    expect(&off, 0, "off", &server)?;
    ensure!(machine.is_dead()?);
    Ok(())
}
