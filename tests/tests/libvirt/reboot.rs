//! Reboots: no answer comes before the death, and the domain returns, whatever happens in between.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fence_lab::client::Client;
use fence_lab::container;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{BOOTED, Machine, writing_disk};
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::{Server, Which};
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::site::{SOON, Site};

impl Site {
    /// A machine with a removable disk image, and the image's path for the test.
    fn with_disk(&self, name: &str) -> Result<(Machine, PathBuf)> {
        let path = self.hypervisor.write(&format!("{name}.img"), &writing_disk())?;
        Ok((Machine::new(name).disk(&path, "threads"), self.hypervisor.outside(&path)))
    }

    /// Waits until another process than `before` runs the domain.
    fn wait_back(&self, name: &str, before: &Witness) -> Result<()> {
        before.wait_next(&self.hypervisor, name).map(drop)
    }

    pub(crate) fn kill_daemon(&mut self) -> Result<()> {
        self.server.crash()
    }
}

#[test]
fn a_rebooted_domain_dies_first_and_comes_back() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    Machine::new("transient").create_transient(&site.libvirtd)?;
    container::start(&site.libvirtd, "ct")?;
    for (uri, name) in [(qemu::URI, "vm"), (qemu::URI, "transient"), (container::URI, "ct")] {
        site.wait_status(name, 0)?;
        let before = Witness::of_all(&site.hypervisor, name)?;
        ensure!(before.len() == 1);
        site.expect("reboot", name, 0)?;
        site.wait_back(name, &before[0])?;
        site.libvirtd.wait_state(uri, name, "running")?;
        site.off_directly(name)?;
    }
    Ok(())
}

#[test]
fn reboot_reply_on_answers_when_the_domain_runs() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[("reboot_reply", "on")])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    container::start(&site.libvirtd, "ct")?;
    for name in ["vm", "ct"] {
        site.wait_status(name, 0)?;
        let before = Witness::of_all(&site.hypervisor, name)?;
        site.expect("reboot", name, 0)?;
        let after = Witness::of_all(&site.hypervisor, name)?;
        ensure!(after.len() == 1 && after[0].pid != before[0].pid && !after[0].is_dead()?, "{name} does not run");
    }
    // A machine that cannot start is a failure, although it is off.
    let (machine, disk) = site.with_disk("broken")?;
    machine.start(&site.libvirtd)?;
    let before = site.machine("broken")?;
    std::fs::remove_file(disk)?;
    let position = site.server.log_position();
    site.expect("reboot", "broken", 1)?;
    ensure!(before.is_dead()?);
    site.logs(position, "not started again in time")
}

#[test]
fn a_reset_is_told_when_it_was_done_and_spares_the_process() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[("reboot_method", "reset"), ("reboot_pause", "2")])?;
    let (machine, _disk) = site.with_disk("vm")?;
    let serial = site.hypervisor.path("vm.serial");
    machine.serial(&serial).start(&site.libvirtd)?;
    let boots = || -> Result<usize> {
        Ok(std::fs::read(site.hypervisor.outside(&serial))?.into_iter().filter(|&byte| byte == BOOTED).count())
    };
    poll_until("a boot", SOON, || Ok((boots()? == 1).then_some(())))?;
    let process = site.machine("vm")?;
    // The victim survives a reset, so its death cannot be the criterion.
    let reset = |domain: &str| {
        let client = Client::new("reboot", &site.key()).domain(domain);
        site.observer.start_with(client, "reboot", domain, Vec::new())?.finish()
    };
    let position = site.server.log_position();
    ensure!(reset("vm")?.code == Some(0), "{}", site.server.log());
    site.logs(position, "reset: vm")?;
    poll_until("another boot", SOON, || Ok((boots()? == 2).then_some(())))?;
    ensure!(!process.is_dead()? && site.machine("vm")?.pid == process.pid, "the reset has ended the process");

    site.not_logged(position, "after the pause")?;

    // The LXC driver has no reset.
    container::start(&site.libvirtd, "ct")?;
    site.wait_status("ct", 0)?;
    let before = Witness::of_container(&site.hypervisor, "ct")?;
    let position = site.server.log_position();
    site.expect("reboot", "ct", 0)?;
    site.logs(position, "killed and started instead")?;
    site.logs(position, "after the pause")?;
    ensure!(before.is_dead()?);
    site.wait_back("ct", &before)
}

#[test]
fn a_pause_is_kept_also_by_the_next_daemon() -> Result<()> {
    /// Long enough for the next daemon to start within it, on a loaded machine.
    const PAUSE: (&str, Duration) = ("6.5", Duration::from_millis(6500));
    let mut site = Site::new(&[qemu::URI, container::URI], &[("reboot_pause", PAUSE.0)])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    Machine::new("transient").create_transient(&site.libvirtd)?;
    container::start(&site.libvirtd, "ct")?;
    let names = ["vm", "transient", "ct"];
    let mut before = Vec::new();
    for name in names {
        site.wait_status(name, 0)?;
        before.extend(Witness::of_all(&site.hypervisor, name)?);
    }
    ensure!(before.len() == names.len());
    // The death comes later than the request, so the measured time never exceeds the pause for this
    // reason.
    let asked = Instant::now();
    for name in names {
        site.expect("reboot", name, 0)?;
    }
    site.kill_daemon()?;
    site.next_daemon()?;
    site.logs(0, "off, and to be started again after the pause")?;
    for (name, before) in names.into_iter().zip(&before) {
        site.wait_back(name, before)?;
        let after = asked.elapsed();
        ensure!(after >= PAUSE.1, "{name} was back after {after:?}");
    }
    Ok(())
}

#[test]
fn off_and_on_do_not_wait_for_the_pause() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[("reboot_pause", "60")])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    container::start(&site.libvirtd, "ct")?;
    for (uri, name) in [(qemu::URI, "vm"), (container::URI, "ct")] {
        site.wait_status(name, 0)?;
        let before = Witness::of_all(&site.hypervisor, name)?;
        ensure!(before.len() == 1);
        site.expect("reboot", name, 0)?;
        // The same reboot.
        site.expect("reboot", name, 0)?;
        ensure!(Witness::of_all(&site.hypervisor, name)?.is_empty(), "{name} is to be off");
        let position = site.server.log_position();
        site.expect("on", name, 0)?;
        site.wait_back(name, &before[0])?;
        site.logs(position, "restart superseded by a later request")?;
        site.wait_status(name, 0)?;

        site.expect("reboot", name, 0)?;
        let position = site.server.log_position();
        site.expect("off", name, 0)?;
        site.logs(position, "restart superseded by a later request")?;
        ensure!(site.libvirtd.state(uri, name)? == "shut off");
    }
    Ok(())
}

#[test]
fn a_start_that_fails_is_tried_on_and_loudly() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let (machine, disk) = site.with_disk("vm")?;
    machine.start(&site.libvirtd)?;
    let before = site.machine("vm")?;
    std::fs::remove_file(&disk)?;
    let position = site.server.log_position();
    site.expect("reboot", "vm", 0)?;
    for pause in ["next=250ms", "next=500ms", "next=1s"] {
        let again =
            |line: &str| (line.contains("fenced, but not started again yet") && line.contains(pause)).then_some(());
        ensure!(site.server.wait_log(position, SOON, again).is_some(), "{pause}: {}", site.server.log());
    }
    std::fs::write(&disk, writing_disk())?;
    site.wait_back("vm", &before)?;
    site.logs(position, "started again after its reboot")?;
    site.off_directly("vm")?;

    // The retries end once the domain is to be off.
    site.expect("on", "vm", 0)?;
    std::fs::remove_file(&disk)?;
    site.expect("reboot", "vm", 0)?;
    let position = site.server.log_position();
    site.expect("off", "vm", 0)?;
    std::fs::write(&disk, writing_disk())?;
    site.logs(position, "restart superseded by a later request")?;
    ensure!(site.libvirtd.state(qemu::URI, "vm")? == "shut off");
    Ok(())
}

#[test]
fn the_next_daemon_finishes_a_reboot() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let (persistent, disk) = site.with_disk("persistent")?;
    let (transient, other) = site.with_disk("transient")?;
    persistent.start(&site.libvirtd)?;
    transient.create_transient(&site.libvirtd)?;
    let before = [site.machine("persistent")?, site.machine("transient")?];
    // Without their disks the machines cannot start before this daemon is dead.
    for disk in [&disk, &other] {
        std::fs::remove_file(disk)?;
    }
    site.wait_status("transient", 0)?;
    for name in ["persistent", "transient"] {
        site.expect("reboot", name, 0)?;
    }
    site.kill_daemon()?;
    for disk in [&disk, &other] {
        std::fs::write(disk, writing_disk())?;
    }
    site.next_daemon()?;
    site.logs(0, "an earlier daemon has died in the middle of its reboot")?;
    for (name, before) in ["persistent", "transient"].into_iter().zip(&before) {
        site.wait_back(name, before)?;
        site.libvirtd.wait_state(qemu::URI, name, "running")?;
    }

    // At whatever moment the daemon dies.
    for _ in 0..5 {
        let before = site.machine("persistent")?;
        site.wait_status("persistent", 0)?;
        site.expect("reboot", "persistent", 0)?;
        site.kill_daemon()?;
        site.next_daemon()?;
        site.wait_back("persistent", &before)?;
        site.wait_status("persistent", 0)?;
    }
    Ok(())
}

#[test]
fn a_saved_guest_does_not_come_back_by_a_reboot() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let disk = hypervisor.write("vm.img", &writing_disk())?;
    let serial = hypervisor.path("vm.serial");
    Machine::new("vm").disk(&disk, "threads").serial(&serial).start(&libvirtd)?;
    let boots = || -> Result<usize> {
        Ok(std::fs::read(hypervisor.outside(&serial))?.into_iter().filter(|&byte| byte == BOOTED).count())
    };
    poll_until("a boot", SOON, || Ok((boots()? == 1).then_some(())))?;
    // A saved image of a running guest: libvirt would find it at the start, and resume it.
    libvirtd.virsh(qemu::URI, &["managedsave", "vm"])?;
    let image = hypervisor.outside("/var/lib/libvirt/qemu/save/vm.save");
    let saved = std::fs::read(&image)?;
    libvirtd.start_domain(qemu::URI, "vm")?;
    libvirtd.crash()?;
    std::fs::write(&image, saved)?;
    let site = Site::on(hypervisor.clone(), Libvirtd::start(&hypervisor)?, &[qemu::URI], &[])?;
    ensure!(boots()? == 0, "the guest booted instead of resuming");
    let before = site.machine("vm")?;
    site.wait_status("vm", 0)?;
    let domain = site.libvirtd.virsh(qemu::URI, &["dominfo", "vm"])?;
    ensure!(domain.stdout.contains("Managed save:   yes"), "{}", domain.stdout);

    site.expect("reboot", "vm", 0)?;
    site.wait_back("vm", &before)?;
    poll_until("a fresh boot instead of a resume", SOON, || Ok((boots()? == 1).then_some(())))?;
    site.off_directly("vm")
}

#[test]
fn a_transient_machine_comes_back_although_libvirtd_hangs() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let devices = Machine::new("fleeting").serial(&site.hypervisor.path("console"));
    devices.create_transient(&site.libvirtd)?;
    site.wait_status("fleeting", 0)?;
    site.server.wait_domain("fleeting", "running")?;
    let before = site.machine("fleeting")?;
    site.libvirtd.signal(Signal::SIGSTOP)?;
    let position = site.server.log_position();
    site.expect("reboot", "fleeting", 0)?;
    ensure!(before.is_dead()?);
    site.logs(position, "not started again yet")?;
    let (_, report) = site.server.status()?;
    ensure!(report["restarts"][0]["name"] == "fleeting", "{report}");
    site.libvirtd.go_on(qemu::URI)?;
    site.wait_status("fleeting", 0)?;
    ensure!(site.machine("fleeting")?.pid != before.pid);
    let xml = site.libvirtd.virsh(qemu::URI, &["dumpxml", "fleeting"])?.stdout;
    ensure!(xml.contains("console"), "the machine came back with another definition: {xml}");
    let known = site.libvirtd.virsh(qemu::URI, &["dominfo", "fleeting"])?.stdout;
    ensure!(known.contains("Persistent:") && !known.contains("yes"), "{known}");
    Ok(())
}

#[test]
fn a_stop_logs_that_the_next_daemon_starts_the_domain() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    Machine::new("waiting").start(&site.libvirtd)?;
    site.wait_status("waiting", 0)?;
    let before = site.machine("waiting")?;
    site.libvirtd.signal(Signal::SIGSTOP)?;
    let position = site.server.log_position();
    site.expect("reboot", "waiting", 0)?;
    ensure!(before.is_dead()?);
    site.logs(position, "not started again yet")?;
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    let stopped = server.stop(Signal::SIGTERM)?;
    let said = "fenced, but not started again before this daemon ends: the next daemon starts it";
    ensure!(stopped.stderr.contains(said) && !stopped.stderr.contains("start it by hand"), "{}", stopped.stderr);

    let server = Server::start(&hypervisor, &Which::ours()?, &config)?;
    let mut site = Site { server, libvirtd, observer, config, hypervisor };
    site.logs(0, "it will be started again")?;
    site.libvirtd.go_on(qemu::URI)?;
    site.wait_status("waiting", 0)?;
    ensure!(site.machine("waiting")?.pid != before.pid);
    Ok(())
}
