//! Fence races: a domain that is being fenced sends a request to fence another one.

use anyhow::{Context, Result, ensure};
use fence_lab::lab::BRIDGE;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::observer::Observer;
use fence_lab::process::poll_until;
use fence_lab::qemu;

use super::fuse::Disk;
use super::site::{GUEST, SOON, Site};

/// The Ethernet address of an interface that is plugged into a running machine.
const ADDRESS: &str = "52:54:00:00:77:01";

#[test]
fn a_victim_is_recognised_by_a_hotplugged_interface() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "doomed", writing_disk())?;
    // An interface can be plugged in only with ACPI.
    let machine = Machine::new("doomed").disk(&disk.path(), "threads").xml()?;
    let machine = machine.replace("</os>", "</os><features><acpi/></features>");
    site.libvirtd.define(qemu::URI, "doomed", &machine)?;
    site.libvirtd.start_domain(qemu::URI, "doomed")?;
    disk.wait_written()?;
    site.server.wait_domain("doomed", "running")?;
    let interface = format!(
        "<interface type='bridge'><source bridge='{BRIDGE}'/><mac address='{ADDRESS}'/><rom enabled='no'/></interface>"
    );
    let interface = site.hypervisor.write("interface.xml", interface.as_bytes())?;
    site.libvirtd.virsh(qemu::URI, &["attach-device", "doomed", &interface, "--live"])?;
    // libvirt's events are handled in order, so the daemon knows the interface after this.
    qemu::start_idle(&site.libvirtd, "other")?;
    site.server.wait_domain("other", "running")?;
    // The machine has no operating system, so a guest of the lab sends the request in its place.
    let guest = site.hypervisor.guest(GUEST + 1)?;
    guest.space().must("ip", &["link", "set", "eth0", "address", ADDRESS])?;
    let asker = Observer::new(&site.hypervisor, guest, &site.key());

    // The machine is killed, and its disk keeps it from dying.
    disk.hold()?;
    let (machine, other) = (site.machine("doomed")?, site.machine("other")?);
    let position = site.server.log_position();
    let mut fence = site.observer.start("off", "doomed")?;
    site.logs(position, "not dead yet: ")?;
    let mut asked = asker.start("off", "other")?;
    poll_until("its order", SOON, || {
        let (_, report) = site.server.status()?;
        let recent = report["requests"]["recent"].as_array().cloned().unwrap_or_default();
        let order = recent.into_iter().find(|order| order["op"] == "off" && order["domain"] == "other");
        let order = order.filter(|order| !order["steps"]["called_back_us"].is_null());
        order.map(|order| order["result"].is_null().then_some(()).context("the request did not wait")).transpose()
    })
    .with_context(|| site.server.log())?;
    ensure!(asked.waits()? && fence.waits()? && !machine.is_dead()? && !other.is_dead()?, "{}", site.server.log());
    disk.release();
    ensure!(fence.finish()?.code == Some(0), "{}", site.server.log());
    ensure!(asked.finish()?.code == Some(1), "{}", site.server.log());
    site.logs(position, "the client is doomed, which is being fenced itself")?;
    ensure!(!other.is_dead()?, "a domain that was being fenced has killed another one: {}", site.server.log());
    site.off_directly("other")
}
