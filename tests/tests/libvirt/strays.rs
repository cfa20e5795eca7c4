//! Domains that libvirt has lost while they run on: its word is not enough.

use anyhow::{Result, ensure};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu;

use super::site::Site;

/// Makes libvirtd forget a machine that runs on: its own record of it cannot be read when it starts
/// again.
fn lose(site: Site, domain: &str) -> Result<Site> {
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    std::fs::write(hypervisor.outside(&format!("/run/libvirt/qemu/{domain}.xml")), "<damaged")?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    libvirtd.wait_state(qemu::URI, domain, "shut off")?;
    Ok(Site { server, libvirtd, observer, config, hypervisor })
}

#[test]
fn what_libvirt_has_lost_is_on_until_it_is_dead() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    for domain in ["known", "switched-on"] {
        qemu::start_idle(&site.libvirtd, domain)?;
        site.wait_status(domain, 0)?;
    }
    let (known, other) = (site.machine("known")?, site.machine("switched-on")?);
    let mut site = site;
    for domain in ["known", "switched-on"] {
        let position = site.server.log_position();
        site = lose(site, domain)?;
        site.logs(position, "connected to libvirt")?;
    }
    ensure!(!known.is_dead()? && !other.is_dead()?, "the machines must outlive their libvirtd");

    site.expect("status", "known", 0)?;
    site.expect("off", "known", 0)?;
    ensure!(known.is_dead()?, "told to be off, and alive: {}", site.server.log());
    site.wait_status("known", 2)?;

    // A second copy of what runs must not be started.
    site.expect("on", "switched-on", 1)?;
    ensure!(!other.is_dead()?);
    site.expect("reboot", "switched-on", 0)?;
    ensure!(other.is_dead()?);
    Ok(())
}

#[test]
fn what_was_lost_before_the_daemon_came_is_found_by_its_process() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "lost")?;
    site.wait_status("lost", 0)?;
    let lost = site.machine("lost")?;
    site.server.crash()?;
    let mut site = lose(site, "lost")?;
    site.next_daemon()?;
    let position = site.server.log_position();
    site.expect("off", "lost", 0)?;
    ensure!(lost.is_dead()?, "told to be off, and alive: {}", site.server.log());
    site.logs(position, "a process of the domain lives: killed")
}
