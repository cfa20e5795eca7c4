//! A slow libvirt: after the client got "failure", the daemon does not begin the kill any more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fence_common::wire::Op;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu;

use super::KEY;
use super::proxy::Proxy;
use super::site::Site;

/// The delay of each answer about an action; queries are answered at once. Five of them exceed a
/// client's limit; none exceeds the keepalive timeout.
const DELAY: Duration = Duration::from_millis(4600);

/// Longer than all calls of an action together.
const ALL: Duration = Duration::from_secs(40);

/// Longer than the daemon keeps a connection without calls.
const IDLE: Duration = Duration::from_secs(12);

/// How often the case is tried: a look for the table at the wrong moment spoils it.
const ATTEMPTS: usize = 4;

#[test]
fn a_kill_does_not_begin_after_its_client_received_a_failure() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    qemu::start_idle(&libvirtd, "vm")?;
    let proxy = Proxy::start(&hypervisor)?;
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[("kill", "libvirt")])?;
    for _ in 0..ATTEMPTS {
        // Connections for queries that came at once are closed by then.
        std::thread::sleep(IDLE);
        site.wait_status("vm", 0)?;
        let machine = site.machine("vm")?;
        proxy.delay_answers(DELAY);
        let begun = Instant::now();
        let reply = site.observer.ask(&KEY, Op::Off, "vm")?;
        let told = begun.elapsed();
        if reply == 1 && !machine.is_dead()? {
            let died = machine.dies_within(ALL.saturating_sub(told)).context("waiting for a death")?;
            ensure!(!died, "killed after its client got a failure, {told:?} after its request: {}", site.server.log());
            return Ok(());
        }
        // The kill was in time, or the daemon took libvirt for silent: that proves nothing.
        ensure!(machine.is_dead()?, "FALSE SUCCESS: {reply} after {told:?}: {}", site.server.log());
        proxy.delay_answers(Duration::ZERO);
        site.libvirtd.wait_state(qemu::URI, "vm", "shut off")?;
        site.libvirtd.start_domain(qemu::URI, "vm")?;
    }
    bail!("each of {ATTEMPTS} kills was in time: {}", site.server.log())
}
