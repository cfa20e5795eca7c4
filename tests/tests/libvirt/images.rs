//! Writes that outlive their machine: the daemon answers "off" only after the last write, also if
//! it has not killed the machine itself.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::{Machine, writing_disk};
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::witness::Witness;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::KEY;
use super::block::Block;
use super::fuse::Disk;
use super::site::{SOON, Site};

/// The reply to a request that failed.
const FAILURE: u8 = 1;

impl Site {
    /// Kills the machine without the daemon.
    fn kill_by_hand(&self, domain: &str) -> Result<Witness> {
        let machine = self.machine(domain)?;
        // The process number cannot be a stranger's: the witness opened it while the machine ran.
        kill(Pid::from_raw(i32::try_from(machine.pid)?), Signal::SIGKILL)?;
        ensure!(machine.dies_within(SOON)?, "its death waits for its write: {}", threads(machine.pid));
        Ok(machine)
    }

    /// Checks that the daemon does not call the domain off.
    fn is_not_off(&self, domain: &str) -> Result<()> {
        let reply = self.observer.ask(&KEY, Op::Off, domain)?;
        ensure!(reply == FAILURE, "off answered {reply} while a write is under way: {}", self.server.log());
        let status = self.observer.fence("status", domain)?;
        ensure!(status.code != Some(2), "`off` by status while a write is under way: {}", self.server.log());
        Ok(())
    }

    /// Checks that the daemon calls the domain off.
    fn is_off(&self, domain: &str) -> Result<()> {
        self.expect("off", domain, 0)?;
        self.wait_status(domain, 2)
    }

    /// Checks that the domain is off once its own write is over. A new daemon cannot assign the
    /// writes of other labs' machines, whose processes it does not see. It may report those as
    /// doubtful, and nothing else.
    fn is_off_but_for_others(&self, domain: &str, image: &str) -> Result<()> {
        poll_until("the write's end", SOON, || {
            let position = self.server.log_position();
            if self.observer.ask(&KEY, Op::Off, domain)? == 0 {
                return Ok(Some(()));
            }
            let doubt = |line: &str| line.contains("and may be its: to ").then(|| !line.contains(image));
            Ok(self.server.wait_log(position, SOON, doubt).filter(|only_others| *only_others).map(drop))
        })
        .with_context(|| format!("the server: {}", self.server.log()))
    }

    /// Kills the daemon and starts another one.
    pub(crate) fn replace_daemon(&mut self) -> Result<()> {
        self.kill_daemon()?;
        self.next_daemon()?;
        self.logs(0, "connected to libvirt")
    }
}

/// The state of a process's threads, for failure messages.
fn threads(pid: u32) -> String {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default().replace('\n', " ");
    threads.map(|it| it.path()).map(|it| format!("{} at {}; ", read(it.join("comm")), read(it.join("stack")))).collect()
}

/// Starts a machine with io_uring and keeps one write of it unfinished.
pub(crate) fn stalled(site: &Site, name: &str) -> Result<Disk> {
    let disk = Disk::serve(&site.hypervisor, name, writing_disk())?;
    Machine::new(name).disk(&disk.path(), "io_uring").start(&site.libvirtd)?;
    disk.wait_written()?;
    site.wait_status(name, 0)?;
    disk.hold_in_flight(site.machine(name)?.pid)?;
    Ok(disk)
}

#[test]
fn a_write_of_a_machine_that_another_hand_has_killed_is_waited_for() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = stalled(&site, "ring")?;
    site.kill_by_hand("ring")?;
    site.is_not_off("ring")?;
    site.libvirtd.wait_state(qemu::URI, "ring", "shut off")?;
    site.is_not_off("ring")?;
    disk.release();
    site.is_off("ring")
}

#[test]
fn the_next_daemon_waits_for_a_write_as_well() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let disk = stalled(&site, "ring")?;
    let machine = site.machine("ring")?;
    for _ in 0..2 {
        let reply = site.observer.ask(&KEY, Op::Off, "ring")?;
        ensure!(machine.dies_within(SOON)?, "its death waits for its write: {}", threads(machine.pid));
        ensure!(reply == FAILURE, "{reply}: {}", site.server.log());
    }
    site.libvirtd.wait_state(qemu::URI, "ring", "shut off")?;
    site.replace_daemon()?;
    site.is_not_off("ring")?;
    disk.release();
    site.is_off("ring")
}

/// A machine on a block device, with libvirt's private /dev.
fn on_block_device(name: &str) -> Result<(Site, Disk, Block, String)> {
    let hypervisor = Hypervisor::new()?;
    let libvirtd = Libvirtd::start_with_private_dev(&hypervisor)?;
    let site = Site::on(hypervisor, libvirtd, &[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, name, writing_disk())?;
    let block = Block::on(&site.hypervisor, &disk.path())?;
    Machine::new(name).block_disk(block.path(), "io_uring").start(&site.libvirtd)?;
    disk.wait_written()?;
    site.wait_status(name, 0)?;
    let pid = site.machine(name)?.pid;
    let node = |path: String| -> Result<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        let about = std::fs::metadata(&path).context(path)?;
        Ok((about.dev(), about.ino()))
    };
    let (own, hosts) = (node(format!("/proc/{pid}/root{}", block.path()))?, node(block.path().to_owned())?);
    ensure!(own != hosts, "the machine has the host's own node: {own:?}");
    let image = locked_by(pid)?;
    Ok((site, disk, block, image))
}

/// The image that a machine has locked, as the kernel names it.
fn locked_by(pid: u32) -> Result<String> {
    let mut locked = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let about = std::fs::read_to_string(entry?.path()).unwrap_or_default();
        let locks = about.lines().filter(|line| line.contains("OFDLCK"));
        locked.extend(locks.filter_map(|line| line.split_whitespace().nth(6).map(str::to_owned)));
    }
    locked.sort_unstable();
    locked.dedup();
    ensure!(locked.len() == 1, "{locked:?}");
    locked.pop().context("no image")
}

#[test]
fn a_write_to_a_block_device_of_a_private_dev_is_waited_for_by_any_daemon() -> Result<()> {
    let (mut site, disk, _block, image) = on_block_device("lvm")?;
    disk.hold_writes_in_flight(site.machine("lvm")?.pid)?;
    site.kill_by_hand("lvm")?;
    site.libvirtd.wait_state(qemu::URI, "lvm", "shut off")?;
    site.is_not_off("lvm")?;
    site.replace_daemon()?;
    site.is_not_off("lvm")?;
    site.logs(0, &image)?;
    disk.release();
    site.is_off_but_for_others("lvm", &image)
}

#[test]
fn a_daemon_that_saw_a_machine_alive_knows_its_block_device() -> Result<()> {
    let (site, disk, _block, _) = on_block_device("lvm")?;
    disk.hold_writes_in_flight(site.machine("lvm")?.pid)?;
    site.kill_by_hand("lvm")?;
    site.libvirtd.wait_state(qemu::URI, "lvm", "shut off")?;
    site.is_not_off("lvm")?;
    disk.release();
    site.is_off("lvm")
}

#[test]
fn a_write_to_a_block_device_that_no_record_names_is_a_doubt() -> Result<()> {
    let (mut site, disk, _block, image) = on_block_device("lvm")?;
    qemu::define_idle(&site.libvirtd, "diskless")?;
    disk.hold_writes_in_flight(site.machine("lvm")?.pid)?;
    // No daemon has seen the machine die, and no record says which files were open.
    site.kill_daemon()?;
    std::fs::remove_dir_all(site.hypervisor.outside("/run/fence-xdp"))?;
    site.kill_by_hand("lvm")?;
    site.libvirtd.wait_state(qemu::URI, "lvm", "shut off")?;
    site.next_daemon()?;
    site.logs(0, "connected to libvirt")?;
    site.is_not_off("lvm")?;
    site.logs(0, &image)?;
    // A machine without a block device cannot be the writer.
    site.is_off("diskless")?;
    disk.release();
    site.is_off_but_for_others("lvm", &image)
}

/// libvirt has forgotten the machine, and a write is under way that no known machine can have made.
#[test]
fn a_seen_death_is_off_beside_anothers_write() -> Result<()> {
    let other = Site::new(&[qemu::URI], &[])?;
    let disk = stalled(&other, "ring")?;
    let site = Site::new(&[qemu::URI], &[])?;
    Machine::new("transient").create_transient(&site.libvirtd)?;
    site.wait_status("transient", 0)?;
    other.kill_by_hand("ring")?;
    site.expect("off", "transient", 0)?;
    for op in [("status", 2), ("off", 0), ("status", 2)] {
        site.expect(op.0, "transient", op.1)?;
    }
    other.is_not_off("ring")?;
    disk.release();
    other.is_off("ring")
}

/// A machine whose disk is on a server. The server may carry out the machine's writes after its
/// death.
#[test]
fn disks_whose_writes_cannot_be_seen_are_named() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let image = site.hypervisor.write("exported", &writing_disk())?;
    let socket = site.hypervisor.path("nbd.sock");
    let mut server = Command::new("qemu-storage-daemon");
    server.args(["--blockdev", &format!("driver=file,node-name=image,filename={image}")]);
    server.args(["--nbd-server", &format!("addr.type=unix,addr.path={socket}")]);
    server.args(["--export", "type=nbd,id=export,node-name=image,name=data,writable=on"]);
    let _server = Process::start(site.hypervisor.space(), &mut server)?;
    poll_until("the NBD server", SOON, || Ok(site.hypervisor.outside(&socket).exists().then_some(())))?;
    let disk = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='data'>\
         <host transport='unix' socket='{socket}'/></source><target dev='hda' bus='ide'/></disk>"
    );
    Machine::new("remote").device(&disk).start(&site.libvirtd)?;
    let named = format!("disk hda: nbd data at {socket}");
    let domain = site.server.wait_domain("remote", "running")?;
    ensure!(domain["unseen"] == serde_json::json!([named]), "{domain}");
    let position = site.server.log_position();
    site.off_directly("remote")?;
    site.logs(position, "a server may still carry out what it has sent")?;
    site.logs(position, &named)
}
