//! A slow libvirt: after the client got "failure", the daemon does not begin the kill any more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::proxy::Proxy;
use fence_lab::qemu;

use super::KEY;
use super::site::Site;

/// The delay of each answer about an action; queries are answered at once. Five of them exceed a
/// client's limit; none exceeds the keepalive timeout.
const DELAY: Duration = Duration::from_millis(4600);

/// Longer than all calls of an action together.
const ALL: Duration = Duration::from_secs(40);

#[test]
fn a_kill_does_not_begin_after_its_client_was_told_of_a_failure() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "vm")?;
    let proxy = Proxy::start(&hypervisor)?;
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[("kill", "libvirt")])?;
    site.wait_status("vm", 0)?;
    std::thread::sleep(Duration::from_secs(1));
    let machine = site.machine("vm")?;
    proxy.delay_answers(DELAY);
    let begun = Instant::now();
    let reply = site.observer.ask(&KEY, Op::Off, "vm")?;
    let told = begun.elapsed();
    ensure!(reply == 1, "{reply} after {told:?}: {}", site.server.log());
    ensure!(!machine.is_dead()?, "the kill was in time, so this case proves nothing: {told:?}");
    let left = ALL.saturating_sub(told);
    let died = machine.dies_within(left).context("waiting for a death")?;
    ensure!(!died, "killed after its client got a failure, {told:?} after its request: {}", site.server.log());
    Ok(())
}
