//! A domain that this daemon saw die is off, also while libvirt cannot say so.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use nix::sys::signal::Signal;

use super::site::{SOON, Site};

/// Far below the 15 s that it takes to notice a hung libvirt.
const AT_ONCE: Duration = Duration::from_secs(5);

impl Site {
    /// A success that waits for nothing.
    fn at_once(&self, op: &str, domain: &str) -> Result<()> {
        let begun = Instant::now();
        self.expect(op, domain, 0)?;
        ensure!(begun.elapsed() < AT_ONCE, "{op} of {domain} took {:?}: {}", begun.elapsed(), self.server.log());
        Ok(())
    }
}

fn site() -> Result<Site> {
    let site = Site::new(&[qemu::URI], &[])?;
    for name in ["one", "two", "three"] {
        qemu::start_idle(&site.libvirtd, name)?;
        site.wait_status(name, 0)?;
    }
    Machine::new("transient").create_transient(&site.libvirtd)?;
    site.wait_status("transient", 0)?;
    for name in ["one", "two", "three", "transient"] {
        site.server.wait_domain(name, "running")?;
    }
    Ok(site)
}

#[test]
fn a_second_off_is_as_good_as_the_first_while_libvirtd_hangs() -> Result<()> {
    let mut site = site()?;
    site.libvirtd.signal(Signal::SIGSTOP)?;
    for name in ["one", "transient"] {
        site.off_directly(name)?;
        site.at_once("off", name)?;
        // A reboot of a domain that is off works as usual.
        site.at_once("off", name)?;
    }
    // The machine dies by itself, and the daemon learns it from its pidfd.
    let two = site.machine("two")?;
    two.kill()?;
    ensure!(two.dies_within(SOON)?);
    site.at_once("off", "two")?;
    let three = site.machine("three")?;
    three.kill()?;
    ensure!(three.dies_within(SOON)?);
    let position = site.server.log_position();
    site.at_once("reboot", "three")?;
    site.libvirtd.go_on(qemu::URI)?;
    site.logs(position, "started again after its reboot")?;
    site.wait_status("three", 0)?;
    for name in ["one", "two"] {
        site.wait_status(name, 2)?;
    }
    Ok(())
}

#[test]
fn a_second_off_is_as_good_as_the_first_while_libvirtd_is_gone() -> Result<()> {
    let mut site = site()?;
    let two = site.machine("two")?;
    site.libvirtd.kill()?;
    poll_until("the daemon to notice the lost connection", SOON, || {
        Ok((site.server.status()?.1["uris"][0]["connected"] == false).then_some(()))
    })?;
    site.off_directly("one")?;
    site.at_once("off", "one")?;
    two.kill()?;
    ensure!(two.dies_within(SOON)?);
    site.at_once("off", "two")?;
    site.expect("status", "one", 2)
}

/// libvirt does not know a transient machine that is off.
#[test]
fn a_transient_machine_that_was_killed_stays_off() -> Result<()> {
    let site = site()?;
    site.off_directly("transient")?;
    site.at_once("off", "transient")?;
    std::thread::sleep(Duration::from_secs(1));
    site.at_once("off", "transient")?;
    site.expect("status", "transient", 2)?;
    // Until it is started again.
    Machine::new("transient").create_transient(&site.libvirtd)?;
    site.wait_status("transient", 0)?;
    let again = site.machine("transient")?;
    site.expect("off", "transient", 0)?;
    ensure!(again.is_dead()?);
    Ok(())
}
