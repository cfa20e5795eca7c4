//! libvirt's own record of a domain after a fence (`virsh domstate --reason`), as
//! docs/reference/configuration.md describes it.

use anyhow::{Context, Result, ensure};
use fence_lab::container;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;

use super::site::{SOON, Site};

impl Site {
    /// Waits until libvirt's record of a domain is one of `wanted`.
    fn recorded(&self, uri: &str, domain: &str, wanted: &[&str]) -> Result<()> {
        let mut last = String::new();
        poll_until("libvirt's record", SOON, || {
            last = self.libvirtd.state_and_reason(uri, domain)?;
            Ok(wanted.contains(&last.as_str()).then_some(()))
        })
        .with_context(|| format!("{domain} is {last}, not {wanted:?}"))
    }
}

#[test]
fn the_short_way_leaves_the_records_that_are_documented() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    container::start(&site.libvirtd, "ct")?;

    site.off_directly("vm")?;
    // libvirt's destroy began before the kill, unless libvirt was too slow.
    site.recorded(qemu::URI, "vm", &["shut off (destroyed)", "shut off (crashed)"])?;
    site.expect("on", "vm", 0)?;
    site.recorded(qemu::URI, "vm", &["running (booted)"])?;
    let position = site.server.log_position();
    site.expect("reboot", "vm", 0)?;
    site.logs(position, "started again after its reboot")?;
    site.recorded(qemu::URI, "vm", &["running (booted)"])?;

    site.off_directly("ct")?;
    site.recorded(container::URI, "ct", &["shut off (destroyed)", "shut off (shutdown)"])?;
    site.expect("on", "ct", 0)?;
    site.recorded(container::URI, "ct", &["running (booted)"])?;
    let position = site.server.log_position();
    site.expect("reboot", "ct", 0)?;
    site.logs(position, "started again after its reboot")?;
    site.recorded(container::URI, "ct", &["running (booted)"])
}

#[test]
fn libvirts_way_leaves_its_own_records() -> Result<()> {
    let site = Site::new(&[qemu::URI, container::URI], &[("kill", "libvirt")])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    Machine::new("gone").create_transient(&site.libvirtd)?;
    container::start(&site.libvirtd, "ct")?;
    site.expect("off", "vm", 0)?;
    site.recorded(qemu::URI, "vm", &["shut off (destroyed)"])?;
    site.expect("off", "ct", 0)?;
    site.recorded(container::URI, "ct", &["shut off (destroyed)"])?;
    let position = site.server.log_position();
    site.expect("reboot", "gone", 0)?;
    site.logs(position, "started again after its reboot")?;
    site.expect("off", "gone", 0)?;
    ensure!(site.observer.fence("status", "gone")?.code == Some(2), "a transient domain is gone");
    Ok(())
}
