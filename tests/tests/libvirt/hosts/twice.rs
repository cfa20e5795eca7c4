//! A machine that two hosts call running: all of it is killed, and each host proves its part.

use anyhow::{Result, ensure};
use fence_lab::machine::Machine;

use super::{Hosts, UUID};
use crate::site::SOON;

/// Split-brain: one UUID, two machines. One of them does not die for now.
#[test]
fn two_copies_are_off_when_each_host_has_proven_its_own() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let disk = crate::fuse::Disk::serve(&hosts.sites[1].hypervisor, "twin", fence_lab::machine::writing_disk())?;
    Machine::new("twin").uuid(UUID).start(&hosts.sites[0].libvirtd)?;
    Machine::new("twin").uuid(UUID).disk(&disk.path(), "threads").start(&hosts.sites[1].libvirtd)?;
    disk.wait_written()?;
    hosts.wait_known("twin")?;
    hosts.sites[1].server.wait_domain("twin", "running")?;
    let both = [hosts.sites[0].machine("twin")?, hosts.sites[1].machine("twin")?];
    disk.hold()?;
    // The first copy is dead at once; the second one is killed and lives.
    hosts.expect(0, "off", "twin", &both, 1)?;
    ensure!(both[0].is_dead()? && !both[1].is_dead()?, "{}", hosts.logs());
    disk.release();
    ensure!(both[1].dies_within(SOON)?);
    hosts.expect(0, "off", "twin", &both, 0)?;
    hosts.expect(1, "status", "twin", &[], 2).map(drop)
}
