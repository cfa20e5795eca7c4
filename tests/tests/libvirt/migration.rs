//! Migration between two hypervisors, each with its own libvirtd and daemon.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::{LISTEN, Libvirtd, listening};
use fence_lab::machine::{FILLING, Machine};
use fence_lab::process::{Finished, Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::KEY;
use super::site::{SOON, Site};

/// A hypervisor, and its address for the other one.
pub(crate) struct Host {
    pub(crate) site: Site,
    address: String,
}

/// Two hypervisors that can migrate to each other.
fn hosts() -> Result<[Host; 2]> {
    hosts_with(&Which::ours()?)
}

/// Two hypervisors with the given server.
pub(crate) fn hosts_with(which: &Which) -> Result<[Host; 2]> {
    let hypervisors = [Hypervisor::new()?, Hypervisor::new()?];
    let addresses = hypervisors[0].connect(&hypervisors[1])?;
    let host = |number: usize| -> Result<Host> {
        let hypervisor = hypervisors[number].clone();
        let libvirtd = Libvirtd::start_with(&hypervisor, &listening(number), &[LISTEN])?;
        let site = Site::with(which, hypervisor, libvirtd, &[qemu::URI], &[])?;
        Ok(Host { site, address: addresses[number].to_string() })
    };
    Ok([host(0)?, host(1)?])
}

/// What a machine can be [filled](Machine::filled) with: all pages differ, and none is empty.
pub(crate) fn filling() -> Vec<u8> {
    let pages = (0..FILLING / 8).map(|number| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    pages.flatten().collect()
}

impl Host {
    /// Begins the migration of a machine to another host.
    pub(crate) fn migrate(&self, to: &Self, name: &str, options: &[&str]) -> Result<Process> {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", qemu::URI, "migrate", "--live"]).args(options);
        command.args([name, &format!("qemu+tcp://{}/system", to.address), &format!("tcp://{}", to.address)]);
        Process::start(self.site.hypervisor.space(), &mut command)
    }

    /// Starts a machine whose migration takes a minute at libvirt's least bandwidth.
    pub(crate) fn start_heavy(&self, to: &Self, name: &str) -> Result<()> {
        let filling = filling();
        let file = self.site.hypervisor.write("filling", &filling)?;
        to.site.hypervisor.write("filling", &filling)?;
        Machine::new(name).filled(&file).start(&self.site.libvirtd)
    }

    /// Limits QEMU's migration bandwidth, so that the migration does not end.
    fn slow_down(&self, name: &str) -> Result<()> {
        let slow = r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":4096}}"#;
        self.site.libvirtd.virsh(qemu::URI, &["qemu-monitor-command", name, slow]).map(drop)
    }

    /// Begins a migration that never ends, and waits until both sides take part. Returns the
    /// machine's process on the other host.
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

    /// Migrates a machine by post-copy, until it runs there with a part of its memory still here.
    /// Returns its process there.
    fn hand_over(&self, to: &Self, name: &str) -> Result<(Process, Witness)> {
        let postcopy = r#"{"execute":"migrate-set-parameters","arguments":{"max-postcopy-bandwidth":4096}}"#;
        let (migration, twin) = self.migrate_for_ever_with(to, name, &["--postcopy"])?;
        self.site.libvirtd.virsh(qemu::URI, &["qemu-monitor-command", name, postcopy])?;
        self.site.libvirtd.virsh(qemu::URI, &["migrate-postcopy", name])?;
        poll_until("the machine to run there", SOON, || Ok(to.runs(name)?.then_some(())))?;
        Ok((migration, twin))
    }

    /// The state according to libvirt here; `None` if the domain is unknown.
    fn state(&self, name: &str) -> Result<Option<String>> {
        let names = self.site.libvirtd.virsh(qemu::URI, &["list", "--all", "--name"])?.stdout;
        if !names.lines().any(|line| line == name) {
            return Ok(None);
        }
        self.site.libvirtd.state_and_reason(qemu::URI, name).map(Some)
    }

    fn runs(&self, name: &str) -> Result<bool> {
        // The domain may disappear between two queries; then it does not run.
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

    // The destination host must stay silent.
    let position = there.site.server.log_position();
    there.site.expect("off", "traveller", 1)?;
    there.site.logs(position, "it is being migrated")?;
    ensure!(!process.is_dead()? && !twin.is_dead()?, "a request that fails must not kill anything");

    // The source host aborts the migration first.
    here.site.expect("off", "traveller", 0)?;
    ensure!(process.is_dead()?);
    ensure!(ended(migration)?.code != Some(0), "the migration has succeeded");
    ensure!(twin.dies_within(SOON)?, "the machine still lives on the destination");
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

    // Back again: the daemon knows the new process without a search, and kills it.
    ensure!(ended(there.migrate(&here, "nomad", &[])?)?.code == Some(0));
    ensure!(process.dies_within(SOON)?);
    there.site.expect("off", "nomad", 1)?;
    here.site.off_directly("nomad")?;
    ensure!(!there.runs("nomad")?);
    Ok(())
}

/// Whether a host's daemon has seen a domain's process dead, and not whose the writes of a dead
/// emulator are.
fn unproven(host: &Host, name: &str) -> bool {
    let log = host.site.server.log();
    log.lines().any(|line| line.contains(name) && line.contains("disk writes are under way, and may be its"))
}

/// In every phase of a migration, a success means that the domain runs on neither host.
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
        // virsh may wait for long after the domain is gone, so the test ends it, and the migration
        // with it.
        let arrived = migration.ends_within(SOON)? && ended(migration)?.code == Some(0);
        if reply == 0 {
            ensure!(!ran_there && !arrived && !there.runs(&name)?, "FALSE SUCCESS: {name} runs on the other host");
        } else if process.is_dead()? && unproven(&here, &name) {
            // Another test's dead emulator writes to a disk on this machine. So the death of this
            // one is no proof, and the domain may run nowhere.
            ensure!(!here.runs(&name)?, "round {round}: {}", here.site.server.log());
        } else {
            // After a failure the domain runs on one of the hosts, as soon as the two libvirtd have
            // ended or undone the migration.
            poll_until("the machine to run on one host", SOON, || {
                Ok((here.runs(&name)? != there.runs(&name)?).then_some(()))
            })
            .with_context(|| format!("round {round}: {}", here.site.server.log()))?;
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
    ensure!(!process.is_dead()? && !twin.is_dead()?, "a kill that proves nothing must not happen");
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
    // The other host can fence it. The process here waits for ever.
    there.site.off_directly("early")?;
    ensure!(twin.is_dead()? && !here.runs("early")?);
    ensure!(ended(migration)?.code != Some(0) && !here.runs("early")?, "the domain runs here again");
    Ok(())
}

/// The other host has taken over, and then the process here dies. libvirt here calls the domain
/// "shut off (crashed)", while it runs there.
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
    ensure!(!twin.is_dead()? && there.runs("early")?, "the domain does not run there any more");
    ensure!(ended(migration)?.code != Some(0));
    // An administrator who knows better starts it here; then it runs here.
    twin.kill()?;
    here.site.libvirtd.virsh(qemu::URI, &["start", "early"])?;
    here.site.wait_status("early", 0)?;
    here.site.off_directly("early")?;
    here.site.expect("off", "early", 0)
}

/// Kills a hypervisor's libvirtd and starts it again.
fn restart_libvirtd(host: Host) -> Result<Host> {
    let Host { site: Site { server, libvirtd, observer, config, hypervisor }, address } = host;
    let position = server.log_position();
    libvirtd.crash()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let site = Site { server, libvirtd, observer, config, hypervisor };
    site.logs(position, "connected to libvirt")?;
    Ok(Host { site, address })
}

/// libvirtd here dies between the machine's last moment here and its first one there. The next
/// libvirtd knows no migration: it calls the machine paused.
#[test]
fn a_machine_that_libvirt_has_lost_sight_of_on_its_way_is_not_off() -> Result<()> {
    let [here, there] = hosts()?;
    here.start_heavy(&there, "gone")?;
    let process = here.site.machine("gone")?;
    let (migration, twin) = here.migrate_for_ever(&there, "gone")?;
    // The libvirtd that would report the arrival is stopped for now.
    there.site.libvirtd.signal(Signal::SIGSTOP)?;
    let fast = r#"{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":10000000000}}"#;
    here.site.libvirtd.virsh(qemu::URI, &["qemu-monitor-command", "gone", fast])?;
    let record = here.site.hypervisor.outside("/run/libvirt/qemu/gone.xml");
    poll_until("the machine to have left", SOON, || {
        Ok(std::fs::read_to_string(&record)?.contains("phase='perform3_done'").then_some(()))
    })?;
    // libvirt records this before it sends the event. So the daemon knows it when it gets the next
    // answer.
    here.site.libvirtd.state_and_reason(qemu::URI, "gone")?;
    let mut here = restart_libvirtd(here)?;
    there.site.libvirtd.signal(Signal::SIGCONT)?;
    poll_until("the machine to run there", SOON, || Ok(there.runs("gone")?.then_some(())))?;
    ensure!(!process.is_dead()?, "the process here has ended, so this case proves nothing");

    // This holds for the old daemon, and for a new one.
    for _ in 0..2 {
        let position = here.site.server.log_position();
        here.site.expect("off", "gone", 1)?;
        here.site.logs(position, "it is being migrated")?;
        ensure!(!process.is_dead()? && !twin.is_dead()? && there.runs("gone")?);
        here.site.server.crash()?;
        here.site.next_daemon()?;
    }
    // It also holds after the remains here are removed.
    here.site.wait_status("gone", 1)?;
    here.site.libvirtd.virsh(qemu::URI, &["destroy", "gone"])?;
    here.site.expect("off", "gone", 1)?;
    ensure!(!twin.is_dead()? && there.runs("gone")?);
    there.site.off_directly("gone")?;
    ended(migration).map(drop)
}
