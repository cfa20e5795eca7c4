//! Reboots that kill no process.

use anyhow::{Result, ensure};
use fence_lab::machine::Machine;
use fence_lab::server::Which;

use super::{Hosts, UUID};

/// `reboot_method = "reset"`: the guest is dead, its process lives on, and all hosts agree on that.
#[test]
fn a_machine_of_another_host_is_rebooted_by_reset() -> Result<()> {
    let mut hosts = Hosts::new(2)?;
    for host in 0..2 {
        hosts.sites[host].config.backend.push(("reboot_method", "reset"));
        hosts.sites[host].server.crash()?;
        hosts.next_daemon(host, &Which::ours()?)?;
    }
    hosts.wait_whole()?;
    let machine = hosts.start(1, "vm-r")?;
    hosts.sites[1].server.wait_domain("vm-r", "running")?;
    for domain in ["vm-r", UUID] {
        let position = hosts.sites[1].server.log_position();
        hosts.expect(0, "reboot", domain, &[], 0)?;
        hosts.sites[1].logs(position, "for the hosts: reset")?;
        ensure!(!machine.is_dead()?, "it was killed: {}", hosts.logs());
    }
    // A second copy is killed by its host, and not reset: only one may run on.
    Machine::new("vm-r").uuid(UUID).start(&hosts.sites[0].libvirtd)?;
    let copy = hosts.sites[0].machine("vm-r")?;
    hosts.sites[0].server.wait_domain("vm-r", "running")?;
    hosts.expect(0, "reboot", "vm-r", &[], 0)?;
    ensure!(machine.is_dead()? != copy.is_dead()?, "one of two runs on: {}", hosts.logs());
    // Its process lives on after each reset, and dies by an off.
    hosts.expect(0, "off", "vm-r", &[machine, copy], 0)?;
    hosts.expect(1, "status", "vm-r", &[], 2).map(drop)
}
