//! Machines that revert to a snapshot.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use fence_lab::machine::Machine;
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::witness::Witness;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::site::{SOON, Site};

/// A disk image of 1 MiB that can hold snapshots, and is empty.
fn snapshot_disk() -> Vec<u8> {
    const CLUSTER: usize = 1 << 16;
    // Cluster 0 is the header, 1 the refcount table, 2 the refcounts of these four clusters, 3 the
    // L1 table.
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x02");
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(2 * CLUSTER, &[0, 1, 0, 1, 0, 1, 0, 1]);
    image
}

/// libvirt ends the process and starts another one, which continues from the snapshot.
#[test]
fn a_machine_that_goes_back_to_a_snapshot_is_not_off_by_the_death_of_its_process() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let disk = site.hypervisor.write("back.qcow2", &snapshot_disk())?;
    let machine = Machine::new("back").disk(&disk, "threads").xml()?.replace("type='raw'", "type='qcow2'");
    site.libvirtd.define(qemu::URI, "back", &machine)?;
    site.libvirtd.start_domain(qemu::URI, "back")?;
    site.libvirtd.virsh(qemu::URI, &["snapshot-create-as", "back", "before"])?;
    site.server.wait_domain("back", "running")?;
    let old = site.machine("back")?;
    // The machine ignores a request to shut down.
    let pid = Pid::from_raw(i32::try_from(old.pid)?);
    kill(pid, Signal::SIGSTOP)?;
    let mut revert = Command::new("virsh");
    revert.args(["-q", "-c", qemu::URI, "snapshot-revert", "back", "before", "--force"]);
    let revert = Process::start(site.hypervisor.space(), &mut revert)?;
    let record = site.hypervisor.outside("/run/libvirt/qemu/back.xml");
    poll_until("the reversion to begin", SOON, || {
        ensure!(!revert.ends_within(Duration::ZERO)?, "{}", revert.stderr().text());
        let record = std::fs::read_to_string(&record)?;
        // libvirt 9.0 calls it the one, and 11.3 the other.
        Ok(["start", "snapshot"].iter().any(|job| record.contains(&format!("async='{job}'"))).then_some(()))
    })?;
    let position = site.server.log_position();
    let off = site.observer.start("off", "back")?;
    poll_until("the daemon's reaction", SOON, || {
        let left =
            site.server.wait_log(position, Duration::ZERO, |line| line.contains("left to libvirt").then_some(()));
        Ok((left.is_some() || old.is_dead()?).then_some(()))
    })?;
    // After a kill it is already gone.
    let _ = kill(pid, Signal::SIGCONT);
    let answer = off.finish()?;
    let way_back = revert.finish(SOON)?;
    let lives = Witness::of_all(&site.hypervisor, "back")?.iter().any(|now| !now.is_dead().unwrap_or(false));
    ensure!(answer.code != Some(0) || !lives, "FALSE SUCCESS, {way_back:?}: {}", site.server.log());
    ensure!(old.is_dead()?);
    Ok(())
}
