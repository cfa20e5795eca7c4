//! Stale libvirt state: domains that libvirt has lost while they run on. Its answer alone proves
//! nothing.

use anyhow::{Result, ensure};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu;

use super::site::Site;

/// Makes libvirtd forget a running machine: at its next start it cannot read its own record of it.
fn lose(site: Site, domain: &str) -> Result<Site> {
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    std::fs::write(hypervisor.outside(&format!("/run/libvirt/qemu/{domain}.xml")), "<damaged")?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    libvirtd.wait_state(qemu::URI, domain, "shut off")?;
    Ok(Site { server, libvirtd, observer, config, hypervisor })
}

#[test]
fn a_domain_that_libvirt_lost_is_on_until_it_is_dead() -> Result<()> {
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
    ensure!(known.is_dead()?, "the answer was off, and the machine lives: {}", site.server.log());
    site.wait_status("known", 2)?;

    // The daemon must not start a second copy of a running domain.
    site.expect("on", "switched-on", 1)?;
    ensure!(!other.is_dead()?);
    site.expect("reboot", "switched-on", 0)?;
    ensure!(other.is_dead()?);
    Ok(())
}

#[test]
fn an_orphan_older_than_the_daemon_is_found() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "lost")?;
    site.wait_status("lost", 0)?;
    let lost = site.machine("lost")?;
    site.server.crash()?;
    let mut site = lose(site, "lost")?;
    site.next_daemon()?;
    let position = site.server.log_position();
    site.expect("off", "lost", 0)?;
    ensure!(lost.is_dead()?, "the answer was off, and the machine lives: {}", site.server.log());
    site.logs(position, "a process of the domain lives: killed")
}
