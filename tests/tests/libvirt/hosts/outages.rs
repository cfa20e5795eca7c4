//! corosync and libvirtd are down, hang, come late, or restart. A host that cannot ask the others
//! fences what runs on it, and calls nothing else off; it joins again by itself.

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::corosync::HostRing;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::witness::Witness;
use nix::sys::signal::Signal;

use super::super::site::SOON;
use super::Hosts;

/// Starts a machine on a host whose daemon cannot ask the others: its process.
fn start_alone(hosts: &Hosts, host: usize, name: &str) -> Result<Witness> {
    let site = &hosts.sites[host];
    Machine::new(name).start(&site.libvirtd)?;
    poll_until("the daemon to know it", SOON, || {
        Ok((hosts.ask(host, "status", name, &[])?.code == Some(0)).then_some(()))
    })
    .with_context(|| hosts.logs())?;
    site.machine(name)
}

/// The first host fences what runs on it, and nothing else; `far` runs on the other one.
fn fences_its_own(hosts: &Hosts, name: &str, far: (&str, &Witness)) -> Result<()> {
    let here = start_alone(hosts, 0, name)?;
    hosts.expect(0, "off", name, &[here], 0)?;
    // It is off here, and may run elsewhere.
    hosts.expect(0, "off", name, &[], 1)?;
    for reply in
        hosts.ask_all(0, &[(Op::Off, far.0), (Op::Reboot, far.0), (Op::On, far.0)], std::slice::from_ref(far.1))?
    {
        ensure!(reply == 1, "{} is answered with {reply}: {}", far.0, hosts.logs());
    }
    ensure!(!far.1.is_dead()?, "{} was killed: {}", far.0, hosts.logs());
    Ok(())
}

#[test]
fn corosync_that_comes_late_hangs_or_restarts_is_joined_again() -> Result<()> {
    // It comes after the daemons.
    let mut hosts = Hosts::on(&Which::ours()?, HostRing::silent(2)?)?;
    let far = start_alone(&hosts, 1, "far")?;
    fences_its_own(&hosts, "early", ("far", &far))?;
    for host in 0..2 {
        hosts.ring.start(host)?;
    }
    hosts.wait_whole()?;

    // It dies, and is started again.
    hosts.ring.kill(0)?;
    fences_its_own(&hosts, "orphan", ("far", &far))?;
    hosts.ring.start(0)?;
    hosts.wait_whole()?;

    // It hangs, and goes on.
    hosts.ring.signal(0, Signal::SIGSTOP)?;
    fences_its_own(&hosts, "held", ("far", &far))?;
    // It hangs already when the daemon starts.
    hosts.sites[0].server.crash()?;
    hosts.next_daemon(0, &Which::ours()?)?;
    fences_its_own(&hosts, "begun", ("far", &far))?;
    hosts.ring.signal(0, Signal::SIGCONT)?;
    hosts.wait_whole()?;
    hosts.expect(0, "off", "far", &[far], 0).map(drop)
}

#[test]
fn a_libvirtd_that_is_silent_makes_nothing_off() -> Result<()> {
    let mut hosts = Hosts::new(2)?;
    let (first, second) = (hosts.start_other(1, "first")?, hosts.start_other(1, "second")?);
    // The owner's hangs: whatever is said is true.
    hosts.sites[1].libvirtd.signal(Signal::SIGSTOP)?;
    let answer = hosts.ask(0, "off", "first", std::slice::from_ref(&first))?;
    ensure!((answer.code == Some(0)) == first.is_dead()?, "{answer:?}: {}", hosts.logs());
    // A name that only a libvirt that is silent could know.
    hosts.expect(0, "off", "nobody", &[], 1)?;
    hosts.sites[1].libvirtd.go_on(qemu::URI)?;
    hosts.wait_whole()?;
    // The asking host's hangs, and then is gone.
    for is_gone in [false, true] {
        let libvirtd = &mut hosts.sites[0].libvirtd;
        if is_gone {
            libvirtd.kill()?;
        } else {
            libvirtd.signal(Signal::SIGSTOP)?;
        }
        let answer = hosts.ask(0, "off", "second", std::slice::from_ref(&second))?;
        ensure!(answer.code != Some(0) || second.is_dead()?, "{answer:?}: {}", hosts.logs());
        let status = hosts.ask(0, "status", "second", &[])?;
        ensure!(status.code != Some(2) || second.is_dead()?, "{status:?}: {}", hosts.logs());
        hosts.sites[0].libvirtd.go_on(qemu::URI)?;
        hosts.wait_whole()?;
    }
    hosts.expect(0, "off", "second", &[second], 0).map(drop)
}
