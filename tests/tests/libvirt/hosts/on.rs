//! `on`: of all hosts that could start a machine exactly one does, and none while it may run.

use anyhow::{Result, ensure};
use fence_lab::client::Client;
use fence_lab::machine::Machine;
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;

use super::{Hosts, UUID};
use crate::site::SOON;

impl Hosts {
    pub(super) fn runs_on(&self, host: usize, name: &str) -> bool {
        self.sites[host].libvirtd.state(qemu::URI, name).is_ok_and(|state| state == "running")
    }

    /// The hosts that a machine runs on.
    pub(super) fn runners(&self, name: &str) -> Vec<usize> {
        (0..self.sites.len()).filter(|host| self.runs_on(*host, name)).collect()
    }

    /// Migrates a machine to its end.
    fn move_to(&self, from: usize, to: usize, name: &str, options: &[&str]) -> Result<()> {
        let migration = self.migrate(from, to, name, options)?;
        let end = migration.finish(SOON)?;
        ensure!(end.code == Some(0), "the migration: {end:?}");
        poll_until("all hosts to have seen it", SOON, || {
            Ok((self.ask(from, "status", name, &[])?.code == Some(0)).then_some(()))
        })
    }

    fn starts_asking(&self, host: usize, op: &str, domain: &str) -> Result<Process> {
        let site = &self.sites[host];
        Client::new(op, &site.key()).domain(domain).start(self.guest(site))
    }
}

#[test]
fn of_two_hosts_that_define_a_machine_one_starts_it() -> Result<()> {
    let hosts = Hosts::new(2)?;
    for site in &hosts.sites {
        Machine::new("twin").uuid(UUID).define(&site.libvirtd)?;
    }
    for round in 0..4 {
        poll_until("the machine to be off", SOON, || {
            Ok((hosts.ask(0, "status", "twin", &[])?.code == Some(2)).then_some(()))
        })?;
        // Each host has a client that wants it on, at once. One names it by its UUID.
        let clients = [hosts.starts_asking(0, "on", "twin")?, hosts.starts_asking(1, "on", UUID)?];
        let mut codes = Vec::new();
        for client in clients {
            codes.push(client.finish(SOON)?.code);
        }
        let runners = hosts.runners("twin");
        ensure!(runners.len() == 1, "round {round}: it runs on {runners:?}: {}", hosts.logs());
        ensure!(codes.contains(&Some(0)), "round {round}: nobody started it: {codes:?}: {}", hosts.logs());
        // It runs on one host: a further "on" of the other one is done already.
        let (runner, other) = (runners[0], 1 - runners[0]);
        hosts.expect(other, "on", "twin", &[], 0)?;
        ensure!(hosts.runners("twin") == [runner], "round {round}: {}", hosts.logs());
        let machine = hosts.sites[runner].machine("twin")?;
        hosts.expect(round % 2, "off", "twin", &[machine], 0)?;
    }
    Ok(())
}

#[test]
fn a_definition_that_its_machine_has_left_starts_nothing() -> Result<()> {
    let hosts = Hosts::new(2)?;
    Machine::new("nomad").uuid(UUID).start(&hosts.sites[0].libvirtd)?;
    hosts.wait_known("nomad")?;
    // It moves with its definition, and the old one stays.
    hosts.move_to(0, 1, "nomad", &["--persistent"])?;
    hosts.expect(0, "on", "nomad", &[], 0)?;
    ensure!(hosts.runners("nomad") == [1], "on starts no second copy: {}", hosts.logs());
    let machine = hosts.sites[1].machine("nomad")?;
    hosts.expect(0, "off", "nomad", &[machine], 0)?;
    hosts.expect(0, "on", "nomad", &[], 0)?;
    ensure!(hosts.runners("nomad") == [1], "it is started where it was: {}", hosts.logs());
    let machine = hosts.sites[1].machine("nomad")?;
    hosts.expect(1, "off", "nomad", &[machine], 0)?;

    // It moves without a definition. When it is off, no host has one that counts.
    Machine::new("guest").start(&hosts.sites[0].libvirtd)?;
    hosts.wait_known("guest")?;
    hosts.move_to(0, 1, "guest", &[])?;
    hosts.expect(0, "on", "guest", &[], 0)?;
    ensure!(hosts.runners("guest") == [1], "{}", hosts.logs());
    let machine = hosts.sites[1].machine("guest")?;
    hosts.expect(0, "off", "guest", &[machine], 0)?;
    for host in 0..2 {
        hosts.expect(host, "on", "guest", &[], 1)?;
    }
    ensure!(hosts.runners("guest").is_empty(), "{}", hosts.logs());

    // The first host has seen one die that had no definition there. Another host has one.
    let elsewhere = "7d3c9a52-51c1-4a0e-9d0c-2a4b6c8d0e03";
    Machine::new("brief").uuid(elsewhere).create_transient(&hosts.sites[0].libvirtd)?;
    hosts.wait_known("brief")?;
    let machine = hosts.sites[0].machine("brief")?;
    hosts.expect(0, "off", "brief", &[machine], 0)?;
    Machine::new("brief").uuid(elsewhere).define(&hosts.sites[1].libvirtd)?;
    hosts.expect(0, "on", "brief", &[], 0)?;
    ensure!(hosts.runners("brief") == [1], "{}", hosts.logs());
    Ok(())
}
