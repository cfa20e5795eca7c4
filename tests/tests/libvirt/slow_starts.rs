//! Starts that take longer than an order may wait: an `off` or a `reboot` cuts them short.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::witness::Witness;

use super::site::{SOON, Site};

/// Within the lab: while this file exists, no start comes to its end.
const HELD: &str = "/run/lab/held";
/// Within the lab: says that a start hangs.
const HANGS: &str = "/run/lab/hangs";
/// An emulator that stands still at its start, as one that waits for its memory or its disks.
const EMULATOR: &str = "#!/bin/sh
case \" $* \" in *' guest='*) if [ -e /run/lab/held ]; then : > /run/lab/hangs; kill -STOP $$; fi ;; esac
exec qemu-system-x86_64 \"$@\"
";
/// A hook of libvirt's that stands still before there is any process of the machine.
const HOOK: &str = "#!/bin/sh
if [ \"$2\" = prepare ] && [ -e /run/lab/held ]; then
    : > /run/lab/hangs
    while [ -e /run/lab/held ]; do sleep 0.1; done
fi
";
/// How long an order may take that waits for nothing but a kill, on a loaded machine: less than
/// the 15 s after which it gives up.
const CUT_SHORT: Duration = Duration::from_secs(12);

/// A site, and what makes starts hang there.
fn site(with_hook: bool) -> Result<(Site, Starts)> {
    let hypervisor = Hypervisor::new()?;
    if with_hook {
        hypervisor.write_mode("/etc/libvirt/hooks/qemu", HOOK.as_bytes(), 0o755)?;
    }
    let libvirtd = Libvirtd::start(&hypervisor)?;
    let site = Site::on(hypervisor.clone(), libvirtd, &[qemu::URI], &[])?;
    Ok((site, Starts { held: hypervisor.outside(HELD), hangs: hypervisor.outside(HANGS) }))
}

/// What makes starts hang.
struct Starts {
    held: PathBuf,
    hangs: PathBuf,
}

impl Starts {
    fn hold(&self) -> Result<()> {
        Ok(std::fs::write(&self.held, "")?)
    }

    fn wait_hangs(&self, site: &Site) -> Result<()> {
        poll_until("a start that hangs", SOON, || Ok(self.hangs.exists().then_some(())))
            .with_context(|| site.server.log())?;
        Ok(std::fs::remove_file(&self.hangs)?)
    }

    fn let_go(&self) -> Result<()> {
        Ok(std::fs::remove_file(&self.held)?)
    }
}

/// Starts a machine with [`EMULATOR`].
fn start(site: &Site) -> Result<()> {
    let emulator = site.hypervisor.write_mode("emulator", EMULATOR.as_bytes(), 0o755)?;
    let xml = Machine::new("vm").xml()?.replace(&qemu::emulator()?, &emulator);
    site.libvirtd.define(qemu::URI, "vm", &xml)?;
    site.libvirtd.start_domain(qemu::URI, "vm")?;
    site.wait_status("vm", 0)
}

/// Sends a request that must succeed long before it would give up.
fn cuts_short(site: &Site, op: &str) -> Result<()> {
    let position = site.server.log_position();
    let asked = Instant::now();
    site.expect(op, "vm", 0)?;
    let took = asked.elapsed();
    ensure!(took < CUT_SHORT, "{op} took {took:?}: {}", site.server.log());
    site.logs(position, "its start is cut short")
}

#[test]
fn an_off_cuts_a_restart_short() -> Result<()> {
    let (site, held) = site(false)?;
    start(&site)?;
    held.hold()?;
    site.expect("reboot", "vm", 0)?;
    held.wait_hangs(&site)?;
    cuts_short(&site, "off")?;
    ensure!(site.libvirtd.state(qemu::URI, "vm")? == "shut off");
    held.let_go()?;
    // Longer than the pauses between attempts.
    std::thread::sleep(Duration::from_secs(2));
    ensure!(Witness::of_all(&site.hypervisor, "vm")?.is_empty(), "it is back: {}", site.server.log());
    site.wait_status("vm", 2)?;

    // The start of an `on`, too. Its own client is told that it failed.
    held.hold()?;
    let on = site.observer.start("on", "vm")?;
    held.wait_hangs(&site)?;
    cuts_short(&site, "off")?;
    ensure!(on.finish()?.code == Some(1), "{}", site.server.log());
    held.let_go()?;
    site.expect("on", "vm", 0)
}

#[test]
fn a_reboot_cuts_the_restart_before_it_short() -> Result<()> {
    let (site, held) = site(false)?;
    start(&site)?;
    held.hold()?;
    site.expect("reboot", "vm", 0)?;
    held.wait_hangs(&site)?;
    cuts_short(&site, "reboot")?;
    held.let_go()?;
    site.wait_status("vm", 0)?;
    site.off_directly("vm")
}

/// An `off` that cannot wait any longer fails. What comes of the start later is killed all the
/// same.
#[test]
fn what_comes_up_after_a_failed_off_is_killed() -> Result<()> {
    let (site, held) = site(true)?;
    start(&site)?;
    held.hold()?;
    site.expect("reboot", "vm", 0)?;
    held.wait_hangs(&site)?;
    let position = site.server.log_position();
    site.expect("off", "vm", 1)?;
    held.let_go()?;
    site.logs(position, "not started again: an off was requested meanwhile")?;
    poll_until("the machine's end", SOON, || Ok(Witness::of_all(&site.hypervisor, "vm")?.is_empty().then_some(())))?;
    site.wait_status("vm", 2)?;
    site.expect("off", "vm", 0)?;
    site.expect("on", "vm", 0)
}
