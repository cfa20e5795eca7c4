//! A daemon dies at each step of a request about a machine of another host: first the owner's, then
//! that of the host that has the client.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;
use fence_lab::client::{Client, Family};
use fence_lab::machine::Machine;
use fence_lab::peer::Peer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::witness::Witness;

use super::super::KEY;
use super::super::site::SOON;
use super::{Hosts, UUID};

const ASKER: usize = 0;
const OWNER: usize = 1;
/// The machine, which is defined on both hosts.
const NAME: &str = "vm-b";

/// What has happened to the machine when a daemon dies at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nothing.
    Lives,
    /// It was killed.
    Dead,
    /// It was killed, and runs again.
    Again,
    /// Nothing or death.
    Open,
}

impl Hosts {
    /// Has the next daemon of a host be one that dies at this step. Nothing is asked of it: it
    /// would die of that.
    fn next_mortal(&mut self, host: usize, point: &str) -> Result<()> {
        let Which::Ours(daemon) = Which::ours()? else { bail!("no daemon of ours") };
        let faults = daemon.with_file_name("fence-daemon-faults");
        let script = format!("#!/bin/sh\nFENCE_FAULT={point} exec '{}' \"$@\"\n", faults.display());
        let hypervisor = self.sites[host].hypervisor.clone();
        hypervisor.write_mode("mortal", script.as_bytes(), 0o755)?;
        self.sites[host].server.crash()?;
        self.next_daemon(host, &Which::Ours(PathBuf::from(hypervisor.path("mortal"))))?;
        let other = &self.sites[1 - host];
        poll_until("the other host to be well", SOON, || {
            Ok((Client::new("monitor", &other.key()).run(self.guest(other))?.code == Some(0)).then_some(()))
        })
        .with_context(|| self.logs())
    }

    /// The machine on its host, started if it does not run.
    fn running(&self) -> Result<Witness> {
        let libvirtd = &self.sites[OWNER].libvirtd;
        if libvirtd.state(qemu::URI, NAME)? != "running" {
            libvirtd.start_domain(qemu::URI, NAME)?;
        }
        self.wait_known(NAME)?;
        self.sites[OWNER].machine(NAME)
    }

    /// A daemon dies at this step of a request; another one follows.
    fn die(&mut self, mortal: usize, point: &str, op: &str, target: &str, fate: Fate) -> Result<()> {
        let what = format!("{op} of {target}, host {} dies {point}", mortal + 1);
        let machine = self.running()?;
        self.next_mortal(mortal, point)?;
        let answer = if mortal == ASKER {
            self.ask_of_mortal(op, target, &machine)?
        } else {
            self.ask(ASKER, op, target, std::slice::from_ref(&machine))?.code
        };
        let server = &mut self.sites[mortal].server;
        poll_until("the daemon's death", SOON, || Ok((!server.is_running()?).then_some(())))
            .with_context(|| format!("{what}: the daemon has not come to this step: {}", self.logs()))?;
        // The owner's death is no proof. What it has proven before, or the asker answered, counts.
        let may_succeed = matches!(point, "after-reply" | "before-restart" | "after-restart");
        ensure!(answer != Some(0) || may_succeed, "{what}: {answer:?}: {}", self.logs());
        if fate == Fate::Lives {
            ensure!(!machine.is_dead()?, "{what}: it was killed: {}", self.logs());
        } else if fate != Fate::Open {
            ensure!(machine.dies_within(SOON)?, "{what}: it lives: {}", self.logs());
        }
        self.next_daemon(mortal, &Which::ours()?)?;
        self.wait_whole()?;
        if fate == Fate::Again || (op == "reboot" && machine.is_dead()?) {
            // The next daemon, or the one that lives, has it run again, once.
            let libvirtd = &self.sites[OWNER].libvirtd;
            libvirtd.wait_state(qemu::URI, NAME, "running").with_context(|| format!("{what}: {}", self.logs()))?;
            let next = self.running()?;
            let is_elsewhere = self.sites[ASKER].libvirtd.state(qemu::URI, NAME)? == "running";
            ensure!(!is_elsewhere, "{what}: it was started on both hosts: {}", self.logs());
            self.expect(ASKER, "off", target, &[next], 0)?;
        } else {
            self.expect(ASKER, "off", target, std::slice::from_ref(&machine), 0)?;
        }
        ensure!(machine.is_dead()?, "{what}: off was answered with success");
        self.sites[OWNER].libvirtd.wait_state(qemu::URI, NAME, "shut off")
    }

    /// Asks a daemon that is about to die: the reply, if one comes. Each request that comes again
    /// would be another life's, so there is one datagram.
    fn ask_of_mortal(&self, op: &str, target: &str, machine: &Witness) -> Result<Option<i32>> {
        let peer = Peer::new(self.sites[ASKER].observer.guest(), &KEY, Family::V4)?;
        let op = if op == "off" { Op::Off } else { Op::Reboot };
        peer.send(peer.request(op, target)?)?;
        // At the first steps it dies before it calls back.
        let Some(mut call) = peer.called_back(std::time::Duration::from_secs(3))? else { return Ok(None) };
        let reply = call.converse().ok();
        ensure!(reply != Some(0) || machine.is_dead()?, "FALSE SUCCESS: {}", self.logs());
        Ok(reply.map(i32::from))
    }
}

fn hosts() -> Result<Hosts> {
    let hosts = Hosts::new(2)?;
    for site in &hosts.sites {
        Machine::new(NAME).uuid(UUID).define(&site.libvirtd)?;
    }
    Ok(hosts)
}

#[test]
fn an_owner_that_dies_at_any_step_is_no_success() -> Result<()> {
    let mut hosts = hosts()?;
    for (target, op, point, fate) in [
        (NAME, "off", "after-note", Fate::Lives),
        (UUID, "off", "after-kill", Fate::Dead),
        (NAME, "off", "after-proof", Fate::Dead),
        (UUID, "reboot", "after-note", Fate::Lives),
        (NAME, "reboot", "after-record", Fate::Open),
        (UUID, "reboot", "after-kill", Fate::Again),
        (NAME, "reboot", "after-proof", Fate::Again),
        (UUID, "reboot", "before-restart", Fate::Again),
        (NAME, "reboot", "after-restart", Fate::Again),
    ] {
        hosts.die(OWNER, point, op, target, fate)?;
    }
    Ok(())
}

#[test]
fn an_asker_that_dies_at_any_step_is_no_false_success() -> Result<()> {
    let mut hosts = hosts()?;
    for (target, op, point, fate) in [
        (NAME, "off", "after-verify", Fate::Lives),
        (UUID, "off", "after-connect", Fate::Lives),
        (NAME, "off", "after-authentication", Fate::Lives),
        (UUID, "reboot", "after-claim", Fate::Lives),
        (NAME, "reboot", "after-note", Fate::Lives),
        (UUID, "off", "before-reply", Fate::Dead),
        (NAME, "reboot", "before-reply", Fate::Again),
        (UUID, "off", "after-reply", Fate::Dead),
        (NAME, "reboot", "after-reply", Fate::Again),
    ] {
        hosts.die(ASKER, point, op, target, fate)?;
    }
    Ok(())
}
