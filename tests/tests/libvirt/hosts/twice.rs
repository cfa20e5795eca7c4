//! A machine that two hosts call running: all of it is killed, and each host proves its part.

use anyhow::{Result, ensure};
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;

use super::{Hosts, UUID};
use crate::migration::filling;
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

/// Post-copy: the machine runs on the second host, and its process on the first one dies. libvirt
/// there calls it crashed, and only the second host knows better.
#[test]
fn a_machine_that_left_by_post_copy_is_fenced_when_its_process_here_has_died() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let filling = filling();
    for site in &hosts.sites {
        site.hypervisor.write("filling", &filling)?;
    }
    let source = &hosts.sites[0].libvirtd;
    let file = hosts.sites[0].hypervisor.path("filling");
    Machine::new("early").uuid(UUID).filled(&file).start(source)?;
    hosts.wait_known("early")?;
    let process = hosts.sites[0].machine("early")?;
    let migration = hosts.migrate(0, 1, "early", &["--bandwidth", "1", "--postcopy"])?;
    poll_until("a migration", SOON, || {
        let job = source.virsh(qemu::URI, &["domjobinfo", "early"])?.stdout;
        Ok((job.contains("Unbounded") && job.contains("Memory total")).then_some(()))
    })?;
    let slow = r#"{"execute":"migrate-set-parameters","arguments":{"max-postcopy-bandwidth":4096}}"#;
    source.virsh(qemu::URI, &["qemu-monitor-command", "early", slow])?;
    source.virsh(qemu::URI, &["migrate-postcopy", "early"])?;
    poll_until("the machine to run there", SOON, || Ok(hosts.runs_on(1, "early").then_some(())))?;
    let twin = hosts.sites[1].machine("early")?;
    process.kill()?;
    ensure!(process.dies_within(SOON)?);
    source.wait_state(qemu::URI, "early", "shut off")?;
    ensure!(!twin.is_dead()?, "there is nothing to fence: {}", hosts.logs());
    // The host that it has left has the client.
    hosts.expect(0, "off", "early", &[twin], 0)?;
    hosts.expect(0, "status", "early", &[], 2)?;
    ensure!(hosts.runners("early").is_empty());
    migration.ends_within(SOON).map(drop)
}
