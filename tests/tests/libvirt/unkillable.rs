//! Machines that cannot die because their storage does not answer: no client may get a success.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::container;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::witness::Witness;

use super::KEY;
use super::fuse::Disk;
use super::site::{SOON, Site};

/// A stock client's own time limit. The daemon must answer earlier.
const CLIENT_GIVES_UP: Duration = Duration::from_secs(30);

/// A machine that writes to the test's disk.
pub(crate) fn writer(site: &Site, name: &str, io: &str) -> Result<Disk> {
    let disk = Disk::serve(&site.hypervisor, name, writing_disk())?;
    Machine::new(name).disk(&disk.path(), io).start(&site.libvirtd)?;
    disk.wait_written()?;
    Ok(disk)
}

#[test]
fn a_machine_that_cannot_die_is_no_success() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = writer(&site, "stuck", "threads")?;
    let rebooted = writer(&site, "rebooted", "threads")?;
    let machines = [site.machine("stuck")?, site.machine("rebooted")?];
    disk.hold()?;
    rebooted.hold()?;

    let position = site.server.log_position();
    let begun = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let off = scope.spawn(|| site.observer.ask(&KEY, Op::Off, "stuck"));
        let reboot = scope.spawn(|| site.observer.ask(&KEY, Op::Reboot, "rebooted"));
        // The daemon logs during the request what blocks the death.
        site.logs(position, "not dead yet: ")?;
        let why = |line: &str| line.contains("killed, and not dead yet").then(|| line.to_owned());
        let line = site.server.wait_log(position, SOON, why).context("the line has disappeared from the log")?;
        ensure!(line.contains("in state D at "), "what blocks: {line}");
        // Other requests are served.
        qemu::start_idle(&site.libvirtd, "other")?;
        site.off_directly("other")?;
        ensure!(site.observer.list()?.code == Some(0));
        ensure!(site.observer.fence("status", "stuck")?.code != Some(2), "the machine lives, and status calls it off");
        for asked in [off, reboot] {
            let reply = asked.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(reply == 1, "a definite failure, not {reply}: {}", site.server.log());
        }
        ensure!(begun.elapsed() < CLIENT_GIVES_UP, "too late for a stock client: {:?}", begun.elapsed());
        Ok(())
    })?;
    ensure!(!machines[0].is_dead()? && !machines[1].is_dead()?, "the test does not keep the machines alive");

    // The kill is pending: the machines die as soon as they can, without another request.
    disk.release();
    ensure!(machines[0].dies_within(SOON)?);
    site.expect("off", "stuck", 0)?;
    site.libvirtd.wait_state(qemu::URI, "stuck", "shut off")?;

    // The same holds for the reboot that was answered with failure: it goes on, and starts the
    // machine only after its death.
    ensure!(!machines[1].is_dead()? && site.machine("rebooted")?.pid == machines[1].pid);
    rebooted.release();
    ensure!(machines[1].dies_within(SOON)?);
    site.logs(position, "started again after its reboot")?;
    ensure!(site.machine("rebooted")?.pid != machines[1].pid);
    rebooted.wait_written()?;
    site.expect("off", "rebooted", 0)
}

#[test]
fn a_success_waits_for_the_kernels_last_write() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = writer(&site, "ring", "io_uring")?;
    let machine = site.machine("ring")?;
    let ring = std::fs::read_dir(format!("/proc/{}/fd", machine.pid))?.flatten();
    let has_ring =
        |fd: &std::fs::DirEntry| std::fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("anon_inode:[io_uring]"));
    ensure!(ring.into_iter().any(|fd| has_ring(&fd)), "QEMU does not use io_uring here");
    disk.hold_in_flight(machine.pid)?;
    let written = disk.written();
    let position = site.server.log_position();
    let mut off = site.observer.start("off", "ring")?;
    // Unlike in the other cases, the process is gone while its write goes on.
    ensure!(machine.dies_within(SOON)?, "its death waits for its write: this kernel has no such case");
    site.logs(position, "the kernel has not done with its disk writes yet")?;
    ensure!(off.waits()?, "answered while a write is under way");
    ensure!(disk.written() == written);
    disk.release();
    let answer = off.finish()?;
    ensure!(answer.code == Some(0), "{answer:?}: {}", site.server.log());
    Ok(())
}

#[test]
fn unwritten_words_are_kept() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = writer(&site, "ring", "io_uring")?;
    let machine = site.machine("ring")?;
    disk.hold_in_flight(machine.pid)?;
    // The process dies, and libvirt says "shut off". Neither the first client nor the next one may
    // get that answer.
    for _ in 0..2 {
        let reply = site.observer.ask(&KEY, Op::Off, "ring")?;
        ensure!(machine.dies_within(SOON)?, "its death waits for its write: this kernel has no such case");
        ensure!(reply == 1, "a definite failure, not {reply}: {}", site.server.log());
    }
    site.libvirtd.wait_state(qemu::URI, "ring", "shut off")?;
    disk.release();
    site.expect("off", "ring", 0)
}

/// More than the number of concurrent calls for actions.
const MANY: usize = 14;

#[test]
fn a_domain_that_cannot_die_does_not_delay_starts() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let names: Vec<_> = (0..MANY).map(|number| format!("stuck{number}")).collect();
    let disks = names.iter().map(|name| writer(&site, name, "threads")).collect::<Result<Vec<_>>>()?;
    qemu::define_idle(&site.libvirtd, "other")?;
    qemu::start_idle(&site.libvirtd, "rebooted")?;
    for name in names.iter().map(String::as_str).chain(["rebooted"]) {
        site.server.wait_domain(name, "running")?;
    }
    let before = site.machine("rebooted")?;
    for disk in &disks {
        disk.hold()?;
    }
    std::thread::scope(|scope| -> Result<()> {
        let position = site.server.log_position();
        let asked: Vec<_> = names.iter().map(|name| scope.spawn(|| site.observer.ask(&KEY, Op::Off, name))).collect();
        let told = |line: &str| line.contains("killed, and not dead yet").then_some(());
        site.server.wait_log(position, SOON, told).context("no kill has begun")?;
        std::thread::sleep(Duration::from_secs(1));

        let begun = Instant::now();
        let others = || -> Result<()> {
            site.expect("on", "other", 0)?;
            site.server.wait_domain("other", "running")?;
            site.expect("reboot", "rebooted", 0)?;
            site.logs(position, "started again after its reboot")?;
            ensure!(begun.elapsed() < Duration::from_secs(10), "after {:?}", begun.elapsed());
            Ok(())
        };
        let others = others();
        // Whatever the result was, the machines can die now.
        disks.iter().for_each(Disk::release);
        for asked in asked {
            asked.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        }
        others
    })?;
    ensure!(before.is_dead()?);
    site.off_directly("other")
}

/// A child process writes to the test's disk: a container is dead only when everything in it is
/// dead.
const WRITER: &str = "#!/bin/sh\ntrap '' TERM INT\n\
    while :; do /bin/busybox dd if=/dev/zero of=/data/disk bs=512 count=1 conv=notrunc 2>/dev/null; /bin/busybox sleep 0.1; done\n";

#[test]
fn a_container_that_cannot_die_is_no_success() -> Result<()> {
    let site = Site::new(&[container::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "data", vec![0; 4096])?;
    let path = disk.path();
    let directory = path.rsplit_once('/').context("the path has no directory")?.0;
    container::start_with(&site.libvirtd, "stuck", WRITER, Some(directory))?;
    disk.wait_written()?;
    site.wait_status("stuck", 0)?;
    let container = Witness::of_container(&site.hypervisor, "stuck")?;
    disk.hold()?;
    let position = site.server.log_position();
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "a definite failure, not {reply}: {}", site.server.log());
    ensure!(!container.is_dead()?, "the test does not keep the container alive");
    site.logs(position, "killed, and not dead yet")?;
    ensure!(site.observer.fence("status", "stuck")?.code != Some(2), "the container lives, and status calls it off");
    disk.release();
    ensure!(container.dies_within(SOON)?, "the kill had no effect");
    site.expect("off", "stuck", 0)
}

/// Moves a process to the control groups of the lab's own processes.
fn leave_group(site: &Site, process: &str) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root)?.flatten().map(|entry| entry.path()).chain([root.to_owned()]);
    let groups = hierarchies.map(|hierarchy| hierarchy.join(site.hypervisor.name()).join("init/cgroup.procs"));
    let groups: Vec<_> = groups.filter(|group| group.exists()).collect();
    ensure!(!groups.is_empty(), "the lab has no control group");
    groups.iter().try_for_each(|group| Ok(std::fs::write(group, process)?))
}

/// libvirt calls a container off whose control group is empty. Here its first process waits for a
/// child that is in another group. The kernel has taken its group and memory, so that nothing but
/// its pidfd tells that it lives.
#[test]
fn a_container_whose_control_group_is_empty_is_no_success_while_it_lives() -> Result<()> {
    let site = Site::new(&[container::URI], &[("kill", "libvirt")])?;
    let disk = Disk::serve(&site.hypervisor, "data", vec![0; 4096])?;
    let path = disk.path();
    let directory = path.rsplit_once('/').context("the path has no directory")?.0;
    container::start_with(&site.libvirtd, "stuck", WRITER, Some(directory))?;
    disk.wait_written()?;
    site.wait_status("stuck", 0)?;
    let container = Witness::of_container(&site.hypervisor, "stuck")?;
    disk.hold()?;
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", container.pid))?;
    let child = children.split_whitespace().next().context("it has no child")?;
    leave_group(&site, child)?;
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "a definite failure, not {reply}: {}", site.server.log());
    ensure!(!container.is_dead()?, "the test does not keep the container alive");
    ensure!(site.observer.fence("status", "stuck")?.code != Some(2), "the container lives, and status calls it off");
    ensure!(site.observer.ask(&KEY, Op::Off, "stuck")? == 1, "the second time: {}", site.server.log());
    disk.release();
    ensure!(container.dies_within(SOON)?, "the kill had no effect");
    site.expect("off", "stuck", 0)
}

/// libvirt learns of a container's end from its controller's connection. Under load libvirt can
/// miss it, and calls the container running for ever. The test holds the connection open too, so
/// libvirt misses it here.
#[test]
fn a_container_whose_end_libvirt_misses_is_started_again() -> Result<()> {
    let site = Site::new(&[container::URI], &[])?;
    container::start(&site.libvirtd, "missed")?;
    site.wait_status("missed", 0)?;
    let before = Witness::of_container(&site.hypervisor, "missed")?;
    let controller = parent(before.pid)?;
    let connections = sockets(controller)?;
    ensure!(!connections.is_empty(), "the controller has no connection");

    let position = site.server.log_position();
    site.expect("reboot", "missed", 0)?;
    poll_until("the controller's end", SOON, || {
        Ok((!Path::new(&format!("/proc/{controller}")).exists()).then_some(()))
    })?;
    site.logs(position, "was asked to clear up")?;
    site.logs(position, "started again after its reboot")?;
    let after = Witness::of_container(&site.hypervisor, "missed")?;
    ensure!(after.pid != before.pid && !after.is_dead()?);
    drop(connections);
    site.off_directly("missed")
}

fn parent(pid: u32) -> Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?.trim().parse()?)
}

/// Duplicates of a process's sockets in this process.
pub(crate) fn sockets(pid: i32) -> Result<Vec<OwnedFd>> {
    let process = rustix::process::Pid::from_raw(pid).context("no process number")?;
    let process = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty())?;
    let mut sockets = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        if std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")) {
            let number = path.file_name().and_then(|name| name.to_str()).context("a number")?.parse()?;
            sockets.push(rustix::process::pidfd_getfd(&process, number, rustix::process::PidfdGetfdFlags::empty())?);
        }
    }
    Ok(sockets)
}
