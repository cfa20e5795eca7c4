//! Machines on the move between two hypervisors, each with a libvirtd and a daemon of its own.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{FILLING, Machine};
use fence_lab::process::{Finished, Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::KEY;
use super::site::{SOON, Site};

/// A hypervisor and where the other one reaches it.
pub(crate) struct Host {
    pub(crate) site: Site,
    address: String,
}

/// Two hypervisors that migrate to each other.
fn hosts() -> Result<[Host; 2]> {
    hosts_with(&Which::ours()?)
}

/// The same with either server.
pub(crate) fn hosts_with(which: &Which) -> Result<[Host; 2]> {
    let hypervisors = [Hypervisor::new()?, Hypervisor::new()?];
    let addresses = hypervisors[0].connect(&hypervisors[1])?;
    let host = |number: usize| -> Result<Host> {
        // Two labs are two hosts for libvirt if they say so: the machine's own UUID is the same.
        let config = format!(
            "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nhost_uuid = \"00000000-0000-4000-8000-00000000000{number}\"\n"
        );
        let hypervisor = hypervisors[number].clone();
        let libvirtd = Libvirtd::start_with(&hypervisor, &config, &["--listen"])?;
        let site = Site::with(which, hypervisor, libvirtd, &[qemu::URI], &[])?;
        Ok(Host { site, address: addresses[number].to_string() })
    };
    Ok([host(0)?, host(1)?])
}

impl Host {
    /// Begins to migrate a machine to another host.
    pub(crate) fn migrate(&self, to: &Self, name: &str, options: &[&str]) -> Result<Process> {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", qemu::URI, "migrate", "--live"]).args(options);
        command.args([name, &format!("qemu+tcp://{}/system", to.address), &format!("tcp://{}", to.address)]);
        Process::start(self.site.hypervisor.space(), &mut command)
    }

    /// Starts a machine whose migration takes a minute at the least bandwidth that libvirt knows.
    pub(crate) fn start_heavy(&self, to: &Self, name: &str) -> Result<()> {
        // No two pages alike, and none that is empty.
        let pages = (0..FILLING / 8).map(|number| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        let filling: Vec<u8> = pages.flatten().collect();
        let file = self.site.hypervisor.write("filling", &filling)?;
        to.site.hypervisor.write("filling", &filling)?;
        Machine::new(name).filled(&file).start(&self.site.libvirtd)
    }

    /// Has QEMU migrate a machine as slowly as it can, so that it does not come to an end.
    fn slow_down(&self, name: &str) -> Result<()> {
        let slow = r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":4096}}"#;
        self.site.libvirtd.virsh(qemu::URI, &["qemu-monitor-command", name, slow]).map(drop)
    }

    /// Begins a migration that takes for ever, and waits until it is under way on both sides. The
    /// machine's process there.
    pub(crate) fn migrate_for_ever(&self, to: &Self, name: &str) -> Result<(Process, Witness)> {
        self.migrate_for_ever_with(to, name, &[])
    }

    fn migrate_for_ever_with(&self, to: &Self, name: &str, options: &[&str]) -> Result<(Process, Witness)> {
        let migration = self.migrate(to, name, &[&["--bandwidth", "1"], options].concat())?;
        poll_until("a migration", SOON, || {
            ensure!(!migration.ends_within(Duration::ZERO)?, "it has ended: {}", migration.stderr().text());
            let job = self.site.libvirtd.virsh(qemu::URI, &["domjobinfo", name])?.stdout;
            Ok((job.contains("Unbounded") && job.contains("Memory total")).then_some(()))
        })?;
        self.slow_down(name)?;
        let there = to.site.machine(name)?;
        Ok((migration, there))
    }

    /// Migrates a machine by post-copy, until it runs there and a part of its memory is still here.
    /// Its process there.
    fn hand_over(&self, to: &Self, name: &str) -> Result<(Process, Witness)> {
        let postcopy = r#"{"execute":"migrate-set-parameters","arguments":{"max-postcopy-bandwidth":4096}}"#;
        let (migration, twin) = self.migrate_for_ever_with(to, name, &["--postcopy"])?;
        self.site.libvirtd.virsh(qemu::URI, &["qemu-monitor-command", name, postcopy])?;
        self.site.libvirtd.virsh(qemu::URI, &["migrate-postcopy", name])?;
        poll_until("the machine to run there", SOON, || Ok(to.runs(name)?.then_some(())))?;
        Ok((migration, twin))
    }

    /// Its state by libvirt here; `None` if it is not known.
    fn state(&self, name: &str) -> Result<Option<String>> {
        let names = self.site.libvirtd.virsh(qemu::URI, &["list", "--all", "--name"])?.stdout;
        if !names.lines().any(|line| line == name) {
            return Ok(None);
        }
        self.site.libvirtd.state_and_reason(qemu::URI, name).map(Some)
    }

    fn runs(&self, name: &str) -> Result<bool> {
        // Known and gone again between two questions is not running.
        Ok(self.state(name).unwrap_or(None).is_some_and(|state| state.starts_with("running")))
    }
}

pub(crate) fn ended(migration: Process) -> Result<Finished> {
    migration.finish(SOON).context("the migration")
}

#[test]
fn a_machine_that_is_on_its_way_is_held_back_or_left_alone() -> Result<()> {
    let [here, there] = hosts()?;
    here.start_heavy(&there, "traveller")?;
    let process = here.site.machine("traveller")?;
    let (migration, twin) = here.migrate_for_ever(&there, "traveller")?;

    // The host that it is on its way to cannot say anything.
    let position = there.site.server.log_position();
    there.site.expect("off", "traveller", 1)?;
    there.site.logs(position, "it is being migrated")?;
    ensure!(!process.is_dead()? && !twin.is_dead()?, "nothing is done by half");

    // The host that it is on ends the migration first.
    here.site.expect("off", "traveller", 0)?;
    ensure!(process.is_dead()?);
    ensure!(ended(migration)?.code != Some(0), "the migration has come through");
    ensure!(twin.dies_within(SOON)?, "it lives on there");
    ensure!(!there.runs("traveller")?);
    Ok(())
}

#[test]
fn a_machine_that_has_moved_is_the_other_hosts() -> Result<()> {
    let [here, there] = hosts()?;
    Machine::new("nomad").start(&here.site.libvirtd)?;
    ensure!(ended(here.migrate(&there, "nomad", &[])?)?.code == Some(0));
    let process = there.site.machine("nomad")?;
    here.site.expect("off", "nomad", 1)?;
    here.site.expect("reboot", "nomad", 1)?;
    here.site.expect("on", "nomad", 1)?;
    ensure!(!process.is_dead()?);

    // And back: found without being looked for, and killed by its new process.
    ensure!(ended(there.migrate(&here, "nomad", &[])?)?.code == Some(0));
    ensure!(process.dies_within(SOON)?);
    there.site.expect("off", "nomad", 1)?;
    here.site.off_directly("nomad")?;
    ensure!(!there.runs("nomad")?);
    Ok(())
}

/// Whatever the phase that a migration is in when it is asked for: a success means that it runs
/// nowhere.
#[test]
fn a_success_during_a_migration_means_that_it_runs_nowhere() -> Result<()> {
    let [here, there] = hosts()?;
    for round in 0..10 {
        let name = format!("racer{round}");
        Machine::new(&name).create_transient(&here.site.libvirtd)?;
        let process = here.site.machine(&name)?;
        let migration = here.migrate(&there, &name, &[])?;
        std::thread::sleep(Duration::from_millis(round * 70));
        let reply = here.site.observer.ask_about(&KEY, Op::Off, &name, std::slice::from_ref(&process))?;
        let ran_there = there.runs(&name)?;
        // Where its domain went from under it virsh may wait for long: it is ended then, and its
        // migration with it.
        let arrived = migration.ends_within(SOON)? && ended(migration)?.code == Some(0);
        if reply == 0 {
            ensure!(!ran_there && !arrived && !there.runs(&name)?, "FALSE SUCCESS: {name} runs on the other host");
        } else {
            // Nothing was done by half: it runs on one of them.
            ensure!(here.runs(&name)? != there.runs(&name)?, "round {round}: {}", here.site.server.log());
        }
        for host in [&here, &there] {
            if host.state(&name)?.is_some() {
                let _ = host.site.libvirtd.virsh(qemu::URI, &["destroy", &name]);
            }
        }
    }
    Ok(())
}

#[test]
fn a_machine_on_its_way_is_no_success_while_libvirt_is_silent() -> Result<()> {
    let [here, there] = hosts()?;
    here.start_heavy(&there, "traveller")?;
    let (_migration, twin) = here.migrate_for_ever(&there, "traveller")?;
    let process = here.site.machine("traveller")?;
    here.site.libvirtd.signal(Signal::SIGSTOP)?;
    here.site.expect("off", "traveller", 1)?;
    ensure!(!process.is_dead()? && !twin.is_dead()?, "nothing is done that proves nothing");
    here.site.libvirtd.signal(Signal::SIGCONT)
}

#[test]
fn a_machine_that_runs_there_already_is_not_ours_to_kill() -> Result<()> {
    let [here, there] = hosts()?;
    here.start_heavy(&there, "early")?;
    let process = here.site.machine("early")?;
    let (migration, twin) = here.hand_over(&there, "early")?;
    let position = here.site.server.log_position();
    here.site.expect("off", "early", 1)?;
    ensure!(!process.is_dead()? && !twin.is_dead()?);
    here.site.logs(position, "it is being migrated")?;
    here.site.logs(position, "other hosts were given time to answer first")?;
    // There it can be fenced, and that is all of it: the process here waits for ever.
    there.site.off_directly("early")?;
    ensure!(twin.is_dead()? && !here.runs("early")?);
    ensure!(ended(migration)?.code != Some(0) && !here.runs("early")?, "it has come back");
    Ok(())
}

/// The other host has taken over, and then the process here dies. libvirt calls the machine "shut
/// off (crashed)" here, and it runs there.
#[test]
fn a_machine_that_runs_there_already_is_not_off_when_its_process_here_dies() -> Result<()> {
    let [here, there] = hosts()?;
    here.start_heavy(&there, "early")?;
    let process = here.site.machine("early")?;
    let (migration, twin) = here.hand_over(&there, "early")?;
    process.kill()?;
    ensure!(process.dies_within(SOON)?);
    here.site.libvirtd.wait_state(qemu::URI, "early", "shut off")?;
    for op in ["off", "reboot", "on"] {
        let position = here.site.server.log_position();
        here.site.expect(op, "early", 1)?;
        here.site.logs(position, "it has moved to another host")?;
    }
    ensure!(!twin.is_dead()? && there.runs("early")?, "who else has ended it?");
    ensure!(ended(migration)?.code != Some(0));
    // Whoever knows better starts it here; then it is here.
    twin.kill()?;
    here.site.libvirtd.virsh(qemu::URI, &["start", "early"])?;
    here.site.wait_status("early", 0)?;
    here.site.off_directly("early")?;
    here.site.expect("off", "early", 0)
}

/// Crashes a hypervisor's libvirtd, and starts it again.
fn restart_libvirtd(host: Host) -> Result<Host> {
    let Host { site: Site { server, libvirtd, observer, config, hypervisor }, address } = host;
    let position = server.log_position();
    libvirtd.crash()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let site = Site { server, libvirtd, observer, config, hypervisor };
    site.logs(position, "connected to libvirt")?;
    Ok(Host { site, address })
}

/// libvirtd dies here between the machine's last moment here and its first one there. The next one
/// knows of no migration any more: it calls the machine paused, and leaves it to others to find out
/// where it is.
#[test]
fn a_machine_that_libvirt_has_lost_sight_of_on_its_way_is_not_off() -> Result<()> {
    let [here, there] = hosts()?;
    here.start_heavy(&there, "gone")?;
    let process = here.site.machine("gone")?;
    let (migration, twin) = here.migrate_for_ever(&there, "gone")?;
    // Who is to say that it has arrived says nothing for now.
    there.site.libvirtd.signal(Signal::SIGSTOP)?;
    let fast = r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":10000000000}}"#;
    here.site.libvirtd.virsh(qemu::URI, &["qemu-monitor-command", "gone", fast])?;
    let record = here.site.hypervisor.outside("/run/libvirt/qemu/gone.xml");
    poll_until("the machine to have left", SOON, || {
        Ok(std::fs::read_to_string(&record)?.contains("phase='perform3_done'").then_some(()))
    })?;
    // libvirt writes that down before it tells those who wait for it: they have heard it when it
    // answers the next question.
    here.site.libvirtd.state_and_reason(qemu::URI, "gone")?;
    let mut here = restart_libvirtd(here)?;
    there.site.libvirtd.signal(Signal::SIGCONT)?;
    poll_until("the machine to run there", SOON, || Ok(there.runs("gone")?.then_some(())))?;
    ensure!(!process.is_dead()?, "it is not there any more, and nobody can be wrong about it");

    // Neither the daemon that was there, nor one that comes now.
    for _ in 0..2 {
        let position = here.site.server.log_position();
        here.site.expect("off", "gone", 1)?;
        here.site.logs(position, "it is being migrated")?;
        ensure!(!process.is_dead()? && !twin.is_dead()? && there.runs("gone")?);
        here.site.server.crash()?;
        here.site.next_daemon()?;
    }
    // Nor when it has been cleared away here.
    here.site.wait_status("gone", 1)?;
    here.site.libvirtd.virsh(qemu::URI, &["destroy", "gone"])?;
    here.site.expect("off", "gone", 1)?;
    ensure!(!twin.is_dead()? && there.runs("gone")?);
    there.site.off_directly("gone")?;
    ended(migration).map(drop)
}
