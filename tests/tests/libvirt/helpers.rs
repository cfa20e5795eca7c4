//! Helper processes of a machine (virtiofsd, swtpm): the daemon answers "off" only when all of them
//! are dead.

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;
use fence_lab::fuse::Disk;
use fence_lab::machine::Machine;
use fence_lab::process::poll_until;
use fence_lab::qemu;
use fence_lab::witness::Witness;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::KEY;
use super::site::{SOON, Site};

/// A TPM device, whose state swtpm keeps.
pub(crate) const TPM: &str = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";

/// A directory of the host in the guest. `binary` replaces libvirt's choice of virtiofsd.
pub(crate) fn shared_directory(site: &Site, target: &str, binary: Option<&str>) -> Result<String> {
    let source = site.hypervisor.path(&format!("{target}.shared"));
    std::fs::create_dir_all(site.hypervisor.outside(&source))?;
    let binary = binary.map(|path| format!("<binary path='{path}'/>")).unwrap_or_default();
    Ok(format!(
        "<filesystem type='mount'><driver type='virtiofs'/>{binary}<source dir='{source}'/><target dir='{target}'/></filesystem>"
    ))
}

/// The path of the real virtiofsd.
fn virtiofsd() -> Result<&'static str> {
    let places = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];
    places
        .into_iter()
        .find(|path| std::path::Path::new(path).exists())
        .context("no virtiofsd: cargo xtask setup --for test")
}

/// Sends a signal to these processes, which must be alive.
pub(crate) fn signal(helpers: &[Witness], signal: Signal) -> Result<()> {
    for helper in helpers {
        kill(Pid::from_raw(i32::try_from(helper.pid)?), signal)?;
    }
    Ok(())
}

impl Site {
    /// Starts a machine with helpers, and returns the helpers.
    pub(crate) fn with_helpers(&self, name: &str, devices: &[&str], at_least: usize) -> Result<Vec<Witness>> {
        let machine = Machine::new(name).shared_memory();
        devices.iter().fold(machine, |machine, device| machine.device(device)).start(&self.libvirtd)?;
        self.wait_status(name, 0)?;
        self.helpers(name, at_least)
    }

    /// The processes in the machine's control group, the machine itself excepted.
    fn helpers(&self, name: &str, at_least: usize) -> Result<Vec<Witness>> {
        let machine = self.machine(name)?;
        let helpers = poll_until("the helpers", SOON, || {
            let helpers = machine.beside()?;
            Ok((helpers.len() >= at_least).then_some(helpers))
        })?;
        ensure!(helpers.iter().all(|helper| helper.pid != machine.pid));
        Ok(helpers)
    }

    /// An `off` that must succeed, with the machine and all helpers dead.
    pub(crate) fn off_with_helpers(&self, name: &str, helpers: Vec<Witness>) -> Result<()> {
        let mut victims = Witness::of_all(&self.hypervisor, name)?;
        ensure!(!victims.is_empty() && !helpers.is_empty(), "{name} does not run");
        victims.extend(helpers);
        let reply = self.observer.ask_about(&KEY, Op::Off, name, &victims);
        let reply = reply.with_context(|| format!("the server: {}", self.server.log()))?;
        ensure!(reply == 0, "off answered {reply}: {}", self.server.log());
        Ok(())
    }
}

#[test]
fn helpers_that_stand_still_are_dead_with_their_machine() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    let directory = shared_directory(&site, "data", None)?;
    // virtiofsd is two processes.
    for libvirtd_hangs in [false, true] {
        let name = if libvirtd_hangs { "hung" } else { "well" };
        let helpers = site.with_helpers(name, &[&directory, TPM], 3)?;
        signal(&helpers, Signal::SIGSTOP)?;
        if libvirtd_hangs {
            site.libvirtd.signal(Signal::SIGSTOP)?;
        }
        site.off_with_helpers(name, helpers)?;
    }
    Ok(())
}

#[test]
fn a_helper_that_came_later_is_dead_with_its_machine() -> Result<()> {
    let site = Site::new(&[qemu::URI], &[])?;
    Machine::new("plugged").shared_memory().start(&site.libvirtd)?;
    site.wait_status("plugged", 0)?;
    let device = shared_directory(&site, "later", None)?;
    let file = site.hypervisor.write("later.xml", device.as_bytes())?;
    site.libvirtd.virsh(qemu::URI, &["attach-device", "plugged", &file])?;
    let helpers = site.helpers("plugged", 2)?;
    signal(&helpers, Signal::SIGSTOP)?;
    site.libvirtd.signal(Signal::SIGSTOP)?;
    site.off_with_helpers("plugged", helpers)
}

#[test]
fn a_helper_that_cannot_die_is_no_success() -> Result<()> {
    let mut site = Site::new(&[qemu::URI], &[])?;
    let disk = Disk::serve(&site.hypervisor, "stuck", vec![0; 4096])?;
    // virtiofsd itself, with a child that writes to hung storage.
    let script = format!(
        "#!/bin/sh\nwhile :; do /bin/busybox dd if=/dev/zero of={} bs=512 count=1 conv=notrunc 2>/dev/null; sleep 0.1; done &\n\
         exec {} \"$@\"\n",
        disk.path(),
        virtiofsd()?
    );
    let binary = site.hypervisor.write_mode("virtiofsd", script.as_bytes(), 0o755)?;
    let directory = shared_directory(&site, "data", Some(&binary))?;
    site.with_helpers("stuck", &[&directory], 3)?;
    disk.wait_written()?;
    disk.hold()?;
    let helpers = site.helpers("stuck", 3)?;
    let position = site.server.log_position();
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "off answered {reply} while a helper lives: {}", site.server.log());
    let mut alive = false;
    for helper in &helpers {
        alive |= !helper.is_dead()?;
    }
    ensure!(alive, "the test does not keep the helper alive");
    site.logs(position, "(busybox)")?;
    ensure!(site.observer.fence("status", "stuck")?.code != Some(2), "a helper lives, and status calls the domain off");

    site.replace_daemon()?;
    ensure!(
        site.observer.fence("status", "stuck")?.code != Some(2),
        "a helper lives, and status calls the domain off: {}",
        site.server.log()
    );
    let reply = site.observer.ask(&KEY, Op::Off, "stuck")?;
    ensure!(reply == 1, "off answered {reply} while a helper lives: {}", site.server.log());
    disk.release();
    for helper in &helpers {
        ensure!(helper.dies_within(SOON)?);
    }
    site.expect("off", "stuck", 0)?;
    site.wait_status("stuck", 2)
}
