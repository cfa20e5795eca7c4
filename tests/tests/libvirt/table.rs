//! The daemon knows domains of every origin, and kills each directly by its process.

use anyhow::{Context, Result, ensure};
use fence_lab::container;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::qemu;
use fence_lab::witness::Witness;

use super::site::Site;

/// A name that needs quoting in every format.
const ODD_NAME: &str = "Gäste-VM <1> & \"zwei\" 日本";

fn xml_escaped(name: &str) -> String {
    name.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}

#[test]
fn domains_of_every_origin_are_killed_directly() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    for name in ["before", "crashed-over", "renamed-after"] {
        qemu::start_idle(&libvirtd, name)?;
    }
    Machine::new("transient-before").create_transient(&libvirtd)?;
    let mut site = Site::on(hypervisor, libvirtd, &[qemu::URI, container::URI], &[])?;
    for name in ["undefined", "paused", "to-be-renamed"] {
        qemu::start_idle(&site.libvirtd, name)?;
    }
    Machine::new("transient-after").create_transient(&site.libvirtd)?;
    Machine::new(&xml_escaped(ODD_NAME)).create_transient(&site.libvirtd)?;
    container::start(&site.libvirtd, "frozen")?;
    let virsh = |site: &Site, arguments: &[&str]| site.libvirtd.virsh(qemu::URI, arguments);

    // Started before and after the daemon, persistent and transient.
    site.off_directly("before")?;
    site.off_directly("transient-before")?;
    site.expect("status", "transient-before", 2)?;
    site.off_directly("transient-after")?;

    // The machine runs on without its definition.
    virsh(&site, &["undefine", "undefined"])?;
    site.off_directly("undefined")?;
    site.wait_status("undefined", 2)?;

    // The daemon knows the new name, and not the old one any more.
    virsh(&site, &["destroy", "to-be-renamed"])?;
    virsh(&site, &["domrename", "to-be-renamed", "renamed"])?;
    virsh(&site, &["start", "renamed"])?;
    let renamed = site.machine("renamed")?;
    site.expect("off", "to-be-renamed", 1)?;
    ensure!(!renamed.is_dead()?);
    site.off_directly("renamed")?;

    // Paused guests die as well.
    virsh(&site, &["suspend", "paused"])?;
    site.off_directly("paused")?;
    site.libvirtd.virsh(container::URI, &["suspend", "frozen"])?;
    site.off_directly("frozen")?;
    site.libvirtd.wait_state(container::URI, "frozen", "shut off")?;

    site.off_directly(ODD_NAME)?;
    site.not_logged(0, "it will be fenced by libvirt alone")?;

    // The machine outlives one libvirtd, and the next one knows it.
    let Site { server, libvirtd, observer, config, hypervisor } = site;
    libvirtd.crash()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    site = Site { server, libvirtd, observer, config, hypervisor };
    let position = site.server.log_position();
    site.wait_status("renamed-after", 0)?;
    site.off_directly("crashed-over")?;
    site.expect("reboot", "renamed-after", 0)?;
    site.logs(position, "started again after its reboot")?;
    site.off_directly("renamed-after")
}

#[test]
fn a_domain_at_two_uris_is_killed_once() -> Result<()> {
    let site = Site::new(&[qemu::URI, "qemu+unix:///system"], &[])?;
    qemu::start_idle(&site.libvirtd, "twice")?;
    site.wait_status("twice", 0)?;
    site.off_directly("twice")?;
    site.wait_status("twice", 2)?;
    site.expect("on", "twice", 0)?;
    let before = site.machine("twice")?;
    let position = site.server.log_position();
    site.expect("reboot", "twice", 0)?;
    site.logs(position, "started again after its reboot")?;
    site.wait_status("twice", 0)?;
    ensure!(before.is_dead()?);
    // Both URIs plan the restart; one starts the domain, the other finds it running.
    let after = site.machine("twice")?;
    site.logs(position, "somebody else started it again after its reboot")?;
    ensure!(!after.is_dead()?, "started, and then killed for the other URI");
    Ok(())
}

#[test]
fn one_name_at_two_drivers_is_every_machine_of_that_name() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "namesake")?;
    container::start(&site.libvirtd, "namesake")?;
    let both = Witness::of_all(&site.hypervisor, "namesake")?;
    ensure!(both.len() == 2, "{both:?}");
    // The observer judges both machines.
    site.off_directly("namesake")?;

    // Only one of them runs.
    for (uri, other) in [(qemu::URI, container::URI), (container::URI, qemu::URI)] {
        site.libvirtd.wait_state(uri, "namesake", "shut off")?;
        site.libvirtd.wait_state(other, "namesake", "shut off")?;
        site.libvirtd.start_domain(uri, "namesake")?;
        site.off_directly("namesake").with_context(|| format!("only at {uri}"))?;
        site.wait_status("namesake", 2)?;
    }
    Ok(())
}
