//! Many fences at once, and many of one domain.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use fence_common::wire::Op;
use fence_lab::container;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::observer::Observer;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::timings::Fence;
use fence_lab::witness::Witness;

use super::KEY;
use super::fuse::Disk;
use super::site::{SOON, Site};

/// One more than there are threads for libvirt's part of a kill.
const STORM: usize = 17;
/// Kills that hang.
const STUCK: usize = 10;

#[test]
fn a_storm_of_fences_is_all_successes() -> Result<()> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let names: Vec<String> = (0..STORM).map(|number| format!("node{number}")).collect();
    for name in &names {
        qemu::start_idle(&libvirtd, name)?;
    }
    container::start(&libvirtd, "ct")?;
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI, container::URI], &[])?;
    let witnesses: Vec<Vec<Witness>> =
        names.iter().map(|name| Witness::of_all(&site.hypervisor, name)).collect::<Result<_>>()?;
    ensure!(witnesses.iter().all(|of_one| of_one.len() == 1));
    std::thread::scope(|scope| -> Result<()> {
        let asked: Vec<_> = names
            .iter()
            .zip(&witnesses)
            .map(|(name, of_one)| {
                let observer = &site.observer;
                scope.spawn(move || observer.ask_about(&KEY, Op::Off, name, of_one))
            })
            .collect();
        for asked in asked {
            let reply = asked.join().map_err(|_| anyhow!("panicked"))??;
            ensure!(reply == 0, "{}", site.server.log());
        }
        Ok(())
    })?;
    site.off_directly("ct")
}

#[test]
fn orders_for_one_domain_are_carried_out_in_order() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "vm")?;
    site.wait_status("vm", 0)?;
    // One request after the other, without a pause. The last answered one decides.
    let orders = [Op::Off, Op::On, Op::Reboot, Op::Off, Op::Reboot, Op::On, Op::Reboot, Op::Reboot, Op::Off, Op::On];
    for round in 0..5 {
        for op in &orders {
            let reply = site.observer.ask(&KEY, *op, "vm")?;
            ensure!(reply == 0, "{} in round {round}: {}", op.name(), site.server.log());
            // A domain that starts after a reboot may be seen as on or off; after `off` or `on` it
            // may not.
            let living = Witness::of_all(&site.hypervisor, "vm")?.iter().any(|one| !one.is_dead().unwrap_or(false));
            let wanted = [(Op::Off, false), (Op::On, true)].into_iter().find(|(of, _)| of == op);
            ensure!(
                wanted.is_none_or(|(_, wanted)| wanted == living),
                "{} in round {round}, and then {living}",
                op.name()
            );
        }
    }
    site.wait_status("vm", 0)?;

    // At once, from two clients: the last request decides the final state.
    for last in [Op::Off, Op::On] {
        std::thread::scope(|scope| -> Result<()> {
            let asked: Vec<_> = orders
                .iter()
                .map(|op| {
                    let observer = &site.observer;
                    scope.spawn(move || observer.ask_about(&KEY, *op, "vm", &[]))
                })
                .collect();
            for asked in asked {
                let reply = asked.join().map_err(|_| anyhow!("panicked"))??;
                ensure!(reply == 0, "{}", site.server.log());
            }
            Ok(())
        })?;
        ensure!(site.observer.ask(&KEY, last, "vm")? == 0);
        let (state, code) = if last == Op::Off { ("shut off", 2) } else { ("running", 0) };
        site.libvirtd.wait_state(qemu::URI, "vm", state)?;
        let before = Witness::of_all(&site.hypervisor, "vm")?;
        // Longer than the first retries of a restart: no later retry may change the state.
        std::thread::sleep(Duration::from_secs(1));
        ensure!(site.libvirtd.state(qemu::URI, "vm")? == state);
        site.expect("status", "vm", code)?;
        let pids = |all: &[Witness]| all.iter().map(|one| one.pid).collect::<Vec<_>>();
        ensure!(pids(&before) == pids(&Witness::of_all(&site.hypervisor, "vm")?));
    }
    Ok(())
}

/// All stock clients of a guest listen on one callback address and port. A second client can listen
/// there once the first has its connection. The first one keeps waiting, and each gets its own
/// answer.
#[test]
fn clients_of_one_guest_that_run_at_once_have_each_its_own_answer() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let names = ["slow", "slower"];
    let disks: Vec<Disk> =
        names.iter().map(|name| Disk::serve(&site.hypervisor, name, writing_disk())).collect::<Result<_>>()?;
    for (name, disk) in names.iter().zip(&disks) {
        Machine::new(name).disk(&disk.path(), "threads").start(&site.libvirtd)?;
    }
    qemu::start_idle(&site.libvirtd, "quick")?;
    for disk in &disks {
        disk.wait_written()?;
        disk.hold()?;
    }
    site.wait_status("quick", 0)?;
    let position = site.server.log_position();
    let mut waiting = Vec::new();
    for name in names {
        waiting.push(site.observer.start("off", name)?);
        // The first client has its callback connection, and waits for its answer.
        site.server
            .wait_log(position, SOON, |line| (line.contains("not dead yet") && line.contains(name)).then_some(()))
            .with_context(|| format!("{name}: {}", site.server.log()))?;
        site.expect("status", name, 0)?;
    }
    // The success of a `status` must not pass for that of an `off`, nor the reverse.
    site.expect("off", "quick", 0)?;
    site.expect("status", "quick", 2)?;
    ensure!(site.observer.list()?.code == Some(0));
    for client in &mut waiting {
        ensure!(client.waits()?, "a client got an answer too early, or lost its connection: {}", site.server.log());
    }
    // The newest request is answered first.
    for (disk, client) in disks.iter().zip(waiting).rev() {
        disk.release();
        let answer = client.finish()?;
        ensure!(answer.code == Some(0), "{answer:?}: {}", site.server.log());
    }
    Ok(())
}

#[test]
fn questions_never_wait_behind_kills() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let names: Vec<String> = (0..STUCK).map(|number| format!("stuck{number}")).collect();
    let mut disks = Vec::new();
    for name in &names {
        let disk = Disk::serve(&site.hypervisor, name, writing_disk())?;
        Machine::new(name).disk(&disk.path(), "threads").start(&site.libvirtd)?;
        disks.push(disk);
    }
    qemu::start_idle(&site.libvirtd, "free")?;
    for disk in &disks {
        disk.wait_written()?;
        disk.hold()?;
    }
    let witnesses: Vec<Witness> = names.iter().map(|name| site.machine(name)).collect::<Result<_>>()?;
    let position = site.server.log_position();
    std::thread::scope(|scope| -> Result<()> {
        let asked: Vec<_> = names
            .iter()
            .zip(&witnesses)
            .map(|(name, witness)| {
                let observer: &Observer = &site.observer;
                scope.spawn(move || observer.ask_about(&KEY, Op::Off, name, std::slice::from_ref(witness)))
            })
            .collect();
        site.logs(position, "not dead yet")?;
        // All kills have begun and none has finished.
        let answered = |line: &str| Fence::parse(line).filter(|fence| fence.get("op") == Some("off"));
        for _ in 0..3 {
            ensure!(site.observer.fence("status", "free")?.code == Some(0));
            ensure!(site.observer.list()?.stdout.contains("free"));
            ensure!(site.observer.ask(&KEY, Op::DevStatus, "")? == 0, "monitor");
        }
        ensure!(site.server.wait_log(position, Duration::ZERO, answered).is_none(), "the answer waited for a kill");
        site.off_directly("free")?;
        disks.iter().for_each(Disk::release);
        for asked in asked {
            let reply = asked.join().map_err(|_| anyhow!("panicked"))??;
            ensure!(reply == 0, "released in time: {}", site.server.log());
        }
        Ok(())
    })?;
    poll_until("all to be off", SOON, || Ok(witnesses.iter().all(|one| one.is_dead().unwrap_or(false)).then_some(())))
        .context("released")
}
