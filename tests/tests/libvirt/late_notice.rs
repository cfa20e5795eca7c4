//! A libvirt that calls a dead machine running: the reboot goes on until the machine runs again.

use anyhow::{Result, ensure};
use fence_lab::qemu;
use nix::sys::signal::Signal;

use super::site::{SOON, Site};
use super::turns::Turn;
use super::unkillable::sockets;

/// libvirt learns of a machine's end from the monitor connection, which the test holds open here.
/// The daemon has not seen the machine alive, so it knows no dead instance.
#[test]
fn a_reboot_of_which_libvirt_has_not_noticed_the_kill_is_not_dropped() -> Result<()> {
    let _turn = Turn::without_writes();
    let mut site = Site::new(&[qemu::URI], &[])?;
    qemu::start_idle(&site.libvirtd, "missed")?;
    site.wait_status("missed", 0)?;
    let before = site.machine("missed")?;
    site.kill_daemon()?;
    let monitor = sockets(i32::try_from(before.pid)?)?;
    ensure!(!monitor.is_empty(), "the machine has no monitor connection");
    site.libvirtd.signal(Signal::SIGSTOP)?;
    site.next_daemon()?;

    let position = site.server.log_position();
    site.expect("reboot", "missed", 0)?;
    ensure!(before.dies_within(SOON)?);
    site.libvirtd.go_on(qemu::URI)?;
    ensure!(
        site.libvirtd.state(qemu::URI, "missed")? == "running",
        "libvirt has noticed the death, so this case proves nothing"
    );
    site.logs(position, "libvirt has not noticed yet that it is dead")?;
    drop(monitor);
    site.logs(position, "started again after its reboot")?;
    let after = site.machine("missed")?;
    ensure!(after.pid != before.pid && !after.is_dead()?);
    site.not_logged(position, "somebody else")
}
