//! Host lists while libvirt does not list. The daemon never answers a shorter list as a success: a
//! cluster would forget its targets.

use std::process::Command;

use anyhow::{Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;

use super::expect_listed;
use super::fuse::Disk;
use super::site::{SOON, Site};

/// Makes libvirt destroy a machine that cannot die. Until it is dead, libvirt holds the domain and
/// lists nothing.
pub(crate) fn destroyed_for_long(site: &Site, disk: &Disk, name: &str) -> Result<Process> {
    disk.hold()?;
    let mut destroy = Command::new("virsh");
    destroy.args(["-q", "-c", qemu::URI, "destroy", name]);
    let destroy = Process::start(site.hypervisor.space(), &mut destroy)?;
    poll_until("libvirt to list nothing", SOON, || {
        let mut list = Command::new("timeout");
        list.args(["1", "virsh", "-q", "-c", qemu::URI, "list", "--all"]);
        let mut list = Process::start(site.hypervisor.space(), &mut list)?;
        let ended = list.ends_within(SOON)?;
        ensure!(ended && !list.is_running()?);
        Ok((list.finish(SOON)?.code == Some(124)).then_some(()))
    })?;
    Ok(destroy)
}

#[test]
fn a_list_is_whole_while_libvirt_is_held_up_by_one_domain() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "runs")?;
    qemu::define_idle(&libvirtd, "never-on")?;
    let disk = Disk::serve(&hypervisor, "stuck", writing_disk())?;
    Machine::new("stuck").disk(&disk.path(), "threads").start(&libvirtd)?;
    disk.wait_written()?;
    let mut site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[])?;
    site.server.wait_domain("never-on", "shut off")?;
    site.server.wait_domain("runs", "running")?;
    site.server.wait_domain("stuck", "running")?;
    let destroy = destroyed_for_long(&site, &disk, "stuck")?;

    let list = site.observer.list()?;
    ensure!(list.code == Some(0), "{list:?}: {}", site.server.log());
    for (domain, state) in [("runs", "on"), ("never-on", "off"), ("stuck", "on")] {
        expect_listed(&list, domain, state)?;
    }

    // A new daemon has never seen the domains, so it has no list.
    site.server.crash()?;
    site.next_daemon()?;
    let list = site.observer.list()?;
    ensure!(list.code == Some(1) && list.said() == "Operation failed\n", "{list:?}: {}", site.server.log());
    site.logs(0, "no list, as qemu:///system was never seen")?;

    disk.release();
    destroy.finish(SOON)?;
    poll_until("a list", SOON, || Ok((site.observer.list()?.code == Some(0)).then_some(())))?;
    expect_listed(&site.observer.list()?, "stuck", "off")
}
