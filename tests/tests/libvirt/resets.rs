//! `reboot_method="reset"` of a domain that does not run: after libvirt's reset it would still not
//! run.

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::machine::{Machine, panicking_disk, writing_disk};
use fence_lab::process::poll_until;
use fence_lab::qemu;

use super::fuse::Disk;
use super::remains::{all_dead, forget, processes, remove_run_files};
use super::site::{SOON, Site};

impl Site {
    /// Reboots a stopped domain: its process must die, and another one must run.
    fn reboots_what_stands_still(&self, name: &str, state: &str) -> Result<()> {
        self.libvirtd.wait_state(qemu::URI, name, state)?;
        let before = self.machine(name)?;
        let position = self.server.log_position();
        self.expect("reboot", name, 0)?;
        ensure!(before.is_dead()?, "success was answered, and the domain is still stopped: {}", self.server.log());
        self.logs(position, "a reset would not make it run")?;
        let back = || Ok(self.machine(name).is_ok_and(|now| now.pid != before.pid).then_some(()));
        poll_until("another process", SOON, back)
    }
}

/// Every state in which a QEMU machine is stopped.
fn what_stands_still_is_started_again(reply: &'static str) -> Result<()> {
    let site = Site::new(&[qemu::URI], &[("reboot_method", "reset"), ("reboot_reply", reply)])?;
    qemu::start_idle(&site.libvirtd, "paused")?;
    site.wait_status("paused", 0)?;
    site.libvirtd.virsh(qemu::URI, &["suspend", "paused"])?;
    site.reboots_what_stands_still("paused", "paused").context("paused")?;
    site.libvirtd.wait_state(qemu::URI, "paused", "running")?;

    let disk = Disk::serve(&site.hypervisor, "full", writing_disk())?;
    Machine::new("full").disk(&disk.path(), "threads").start(&site.libvirtd)?;
    disk.wait_written()?;
    disk.fill();
    site.libvirtd.wait_state(qemu::URI, "full", "paused")?;
    let reason = site.libvirtd.state_and_reason(qemu::URI, "full")?;
    ensure!(reason.contains("I/O error"), "{reason}");
    disk.make_room();
    site.reboots_what_stands_still("full", "paused").context("stopped for want of room")?;
    disk.wait_written()?;

    let disk = Disk::serve(&site.hypervisor, "panics", panicking_disk())?;
    Machine::new("panics").disk(&disk.path(), "threads").kept_after_panic().start(&site.libvirtd)?;
    site.reboots_what_stands_still("panics", "crashed").context("crashed and kept")
}

#[test]
fn a_paused_domain_is_restarted_instead_of_reset() -> Result<()> {
    what_stands_still_is_started_again("off")
}

#[test]
fn a_paused_domain_runs_after_a_reboot_that_answers_on() -> Result<()> {
    what_stands_still_is_started_again("on")
}

/// A reset reaches only one instance, and libvirt knows only one of the two.
#[test]
fn a_domain_that_runs_twice_is_not_reset() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[("reboot_method", "reset")])?;
    qemu::start_idle(&site.libvirtd, "twice")?;
    site = forget(site, "twice", |hypervisor| remove_run_files(hypervisor, "twice"))?;
    site.libvirtd.start_domain(qemu::URI, "twice")?;
    let both = processes(&site, "twice", 2)?;
    site.server.wait_domain("twice", "running")?;
    let position = site.server.log_position();
    site.expect("reboot", "twice", 0)?;
    all_dead(&both, &site)?;
    site.logs(position, "started again after its reboot")?;
    // A single instance is reset, and its process goes on.
    let one = processes(&site, "twice", 1)?;
    site.wait_status("twice", 0)?;
    let reboot = Client::new("reboot", &site.key()).domain("twice").run(site.observer.guest().space())?;
    ensure!(reboot.code == Some(0) && !one[0].is_dead()?, "the domain was not reset: {}", site.server.log());
    Ok(())
}
