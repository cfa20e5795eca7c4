//! Copies of a machine that are on their way in by migration.

use anyhow::{Context, Result, ensure};
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;

use super::{Hosts, UUID};
use crate::migration::filling;
use crate::site::SOON;

/// libvirt's record of the arriving copy cannot be read. Its host asks libvirt, waits for the end
/// of the migration, and calls no copy its machine. The host that it leaves kills the machine.
#[test]
fn a_copy_without_a_record_is_no_machine_of_the_host_that_it_comes_to() -> Result<()> {
    let hosts = Hosts::new(2)?;
    let filling = filling();
    for site in &hosts.sites {
        site.hypervisor.write("filling", &filling)?;
    }
    let source = &hosts.sites[0].libvirtd;
    Machine::new("nomad").uuid(UUID).filled(&hosts.sites[0].hypervisor.path("filling")).start(source)?;
    hosts.wait_known("nomad")?;
    let migration = hosts.migrate(0, 1, "nomad", &["--bandwidth", "1"])?;
    poll_until("a migration", SOON, || {
        let job = source.virsh(qemu::URI, &["domjobinfo", "nomad"])?.stdout;
        Ok((job.contains("Unbounded") && job.contains("Memory total")).then_some(()))
    })?;
    let both = [hosts.sites[0].machine("nomad")?, hosts.sites[1].machine("nomad")?];
    let record = hosts.sites[1].hypervisor.outside("/run/libvirt/qemu/nomad.xml");
    std::fs::write(&record, "").with_context(|| format!("{record:?}"))?;
    let position = hosts.sites[1].server.log_position();
    // The host that it comes to has the client.
    hosts.expect(1, "off", "nomad", &both[..1], 0)?;
    ensure!(both[1].dies_within(SOON)?, "the copy lives: {}", hosts.logs());
    hosts.sites[1].not_logged(position, "for the hosts")?;
    hosts.sites[0].libvirtd.wait_state(qemu::URI, "nomad", "shut off")?;
    hosts.expect(1, "status", "nomad", &[], 2)?;
    migration.ends_within(SOON).map(drop)
}
