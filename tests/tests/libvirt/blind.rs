//! A libvirt without events, or one that has yet to list its domains: the daemon looks at a domain
//! before it acts.

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu;

use super::proxy::Proxy;
use super::site::Site;

#[test]
fn a_libvirt_without_events_is_looked_at_all_the_same() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::define_idle(&libvirtd, "vm")?;
    qemu::start_idle(&libvirtd, "gone")?;
    let proxy = Proxy::start(&hypervisor)?;
    proxy.refuse_events();
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[("reboot_method", "reset")])?;
    site.logs(0, "libvirt tells no events there")?;
    site.server.wait_domain("vm", "shut off")?;

    // No event comes. The next request finds the present state and kills the process directly, not
    // through libvirt.
    for _ in 0..3 {
        site.libvirtd.start_domain(qemu::URI, "vm")?;
        site.off_directly("vm").context("started by another hand a moment ago")?;
        site.libvirtd.wait_state(qemu::URI, "vm", "shut off")?;
    }
    // A name can pass to another domain.
    site.libvirtd.virsh(qemu::URI, &["destroy", "gone"])?;
    site.libvirtd.virsh(qemu::URI, &["undefine", "gone"])?;
    qemu::start_idle(&site.libvirtd, "gone")?;
    site.off_directly("gone")?;

    // The poll finds other changes a little later.
    site.libvirtd.start_domain(qemu::URI, "vm")?;
    site.server.wait_domain("vm", "running")?;
    site.libvirtd.virsh(qemu::URI, &["undefine", "gone"])?;
    let uris = |report: &serde_json::Value| report["uris"].to_string();
    fence_lab::process::poll_until("`gone` to be gone", super::site::SOON, || {
        Ok((!uris(&site.server.status()?.1).contains("\"gone\"")).then_some(()))
    })?;

    // No event would report the reset, so the daemon does not wait for one.
    let before = site.machine("vm")?;
    let position = site.server.log_position();
    site.expect("reboot", "vm", 0)?;
    ensure!(before.is_dead()?);
    site.logs(position, "libvirt would not tell that it was reset")?;
    site.logs(position, "started again after its reboot")
}

/// Right after a start the table lacks most of a thousand domains. The wait for libvirt's destroy
/// would take 200 ms.
#[test]
fn a_domain_that_is_not_in_the_table_yet_is_killed_directly() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "vm")?;
    let proxy = Proxy::start(&hypervisor)?;
    proxy.withhold_lists();
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[])?;
    site.off_directly("vm")?;
    // libvirt asks QEMU to end first, and QEMU's log tells who asked. SIGKILL leaves it no time.
    let log = std::fs::read_to_string(site.hypervisor.outside("/var/log/libvirt/qemu/vm.log"))?;
    ensure!(log.contains("-name guest=vm") && !log.contains("terminating on signal"), "destroyed by libvirt: {log}");
    Ok(())
}
