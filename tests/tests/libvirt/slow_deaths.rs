//! Machines whose death takes seconds, and machines whose arguments `/proc` cannot show.
//!
//! The kernel first frees the memory of a killed process, and its command line with it. The rest
//! may take long: locked memory, or files whose close waits for storage.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::process::poll_until;
use fence_lab::qemu;
use nix::sys::signal::Signal;

use super::KEY;
use super::fuse::Disk;
use super::memory_lock::{MemoryLock, is_readable};
use super::site::{SOON, Site};

/// Longer than the daemon may stay in doubt about a process.
const SECONDS: Duration = Duration::from_secs(3);

/// Longer than the fence of a machine that dies at once, on a loaded host. Shorter than the daemon
/// waits for a machine that does not die.
const IN_TIME: Duration = Duration::from_secs(10);

/// A machine whose process maps a file of ours.
fn mapping(site: &Site, name: &str) -> Result<Disk> {
    let memory = Disk::serve(&site.hypervisor, &format!("{name}-memory"), writing_disk())?;
    Machine::new(name).mapping(&memory.path()).start(&site.libvirtd)?;
    site.server.wait_domain(name, "running")?;
    Ok(memory)
}

/// The machine has lost its command line, and dies only when its last file is closed.
#[test]
fn a_death_that_takes_seconds_is_waited_for() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "slow", writing_disk())?;
    Machine::new("slow").disk(&disk.path(), "threads").start(&site.libvirtd)?;
    disk.wait_written()?;
    site.server.wait_domain("slow", "running")?;
    let machine = site.machine("slow")?;
    // libvirt's destroy sends SIGTERM first, and QEMU would then keep its memory while it waits.
    site.libvirtd.signal(Signal::SIGSTOP)?;
    disk.hold_closes();
    let mut off = site.observer.start("off", "slow")?;
    let line = format!("/proc/{}/cmdline", machine.pid);
    poll_until("its command line to be gone", SOON, || Ok(std::fs::read(&line)?.is_empty().then_some(())))
        .with_context(|| format!("{}: {}", machine.describe(), site.server.log()))?;
    std::thread::sleep(SECONDS);
    ensure!(!machine.is_dead()?, "the test does not keep the machine alive");
    ensure!(off.waits()?, "answered before the machine is dead: {}", site.server.log());
    disk.release();
    let answer = off.finish()?;
    ensure!(answer.code == Some(0), "{answer:?}: {}", site.server.log());
    site.libvirtd.go_on(qemu::URI)?;
    site.wait_status("slow", 2)
}

/// A living machine holds its image locks itself. Only after its death do they tell of writes.
#[test]
fn writes_are_judged_when_the_machine_is_dead() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "ring", writing_disk())?;
    let memory = Disk::serve(&site.hypervisor, "memory", writing_disk())?;
    Machine::new("ring").disk(&disk.path(), "io_uring").mapping(&memory.path()).start(&site.libvirtd)?;
    disk.wait_written()?;
    site.server.wait_domain("ring", "running")?;
    let machine = site.machine("ring")?;
    disk.hold_in_flight(machine.pid)?;
    let lock = MemoryLock::hold(machine.pid, &memory)?;
    let position = site.server.log_position();
    let mut off = site.observer.start("off", "ring")?;
    site.logs(position, "not dead yet: ")?;
    ensure!(!machine.is_dead()?, "the test does not keep the machine alive");
    drop(lock);
    ensure!(machine.dies_within(SOON)?, "its death waits for its write: this kernel has no such case");
    site.logs(position, "the kernel has not done with its disk writes yet")?;
    ensure!(off.waits()?, "FALSE SUCCESS: answered while a write is under way: {}", site.server.log());
    disk.release();
    let answer = off.finish()?;
    ensure!(answer.code == Some(0), "{answer:?}: {}", site.server.log());
    Ok(())
}

#[test]
fn a_machine_whose_memory_is_locked_costs_nobody_else_anything() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    for name in ["first", "second"] {
        qemu::start_idle(&site.libvirtd, name)?;
        site.server.wait_domain(name, "running")?;
    }
    let memory = mapping(&site, "stuck")?;
    let machine = site.machine("stuck")?;
    let lock = MemoryLock::hold(machine.pid, &memory)?;
    let begun = Instant::now();
    site.off_directly("first")?;
    site.expect("on", "first", 0)?;
    ensure!(begun.elapsed() < 2 * IN_TIME, "{:?}: {}", begun.elapsed(), site.server.log());
    ensure!(site.observer.fence("status", "stuck")?.code == Some(0), "it lives");

    // The next daemon has never read the command line.
    site.replace_daemon()?;
    site.server.wait_domain("second", "running")?;
    for name in ["second", "first"] {
        let begun = Instant::now();
        site.expect("off", name, 0)?;
        ensure!(begun.elapsed() < IN_TIME, "{name}: {:?}: {}", begun.elapsed(), site.server.log());
    }
    ensure!(!is_readable(machine.pid)?, "the test is wrong: its command line can be read");

    // The machine cannot die meanwhile, and the client gets a failure.
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "a definite failure, not {reply}: {}", site.server.log());
    ensure!(!machine.is_dead()?, "the test does not keep the machine alive");
    ensure!(
        site.observer.fence("status", "stuck")?.code != Some(2),
        "the machine lives, and status calls it off: {}",
        site.server.log()
    );
    drop(lock);
    ensure!(machine.dies_within(SOON)?, "the kill had no effect: {}", site.server.log());
    site.expect("off", "stuck", 0)
}
