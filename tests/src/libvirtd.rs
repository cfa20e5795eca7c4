//! A real libvirtd inside a lab, with the QEMU and LXC drivers and nothing of the host's.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab::{COMMAND_LIMIT, Hypervisor};
use crate::process::{Finished, Process, poll_until, run};
use crate::tools;

/// QEMU and containers as root without any confinement: the lab is confinement enough, and its files belong to root.
/// Logs go to files, which spares a virtlogd.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\nremember_owner = 0\nsecurity_driver = \"none\"\n\
                         namespaces = []\nstdio_handler = \"file\"\n";
const LIBVIRTD_CONF: &str = "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n";

/// Enters the lab's own cgroups (what a process started from outside is not in), then becomes tini: without a parent that
/// reaps them, dead QEMUs stay zombies and libvirt's destroy waits for up to two seconds more.
const START: &str = "for procs in /sys/fs/cgroup/init/cgroup.procs /sys/fs/cgroup/*/init/cgroup.procs; do
    if [ -e \"$procs\" ]; then echo $$ > \"$procs\"; fi
done
exec tini -s -- libvirtd";

/// A running libvirtd. Dropping it kills it; its machines end with the lab.
#[derive(Debug)]
pub struct Libvirtd {
    // Before the lab, which may be the last to stand for it: its end waits for those of its processes that nobody has reaped.
    process: Process,
    hypervisor: Hypervisor,
}

impl Libvirtd {
    /// Starts it on the hypervisor and waits until it serves.
    ///
    /// # Errors
    /// A tool is missing, or it does not serve; the error has what it logged.
    pub fn start(hypervisor: &Hypervisor) -> Result<Self> {
        tools::require(&["libvirtd", "virsh", "tini"])?;
        hypervisor.write("/etc/libvirt/qemu.conf", QEMU_CONF.as_bytes())?;
        hypervisor.write("/etc/libvirt/libvirtd.conf", LIBVIRTD_CONF.as_bytes())?;
        let process = Process::start(hypervisor.space(), Command::new("sh").args(["-c", START]))?;
        let mut libvirtd = Self { process, hypervisor: hypervisor.clone() };
        poll_until("libvirtd", Duration::from_secs(60), || {
            if !libvirtd.process.is_running()? {
                bail!("it has ended");
            }
            Ok(hypervisor.outside("/run/libvirt/libvirt-sock").exists().then_some(()))
        })
        .with_context(|| format!("its log: {}", libvirtd.process.stderr().text()))?;
        Ok(libvirtd)
    }

    /// Runs virsh against a driver of this libvirtd.
    ///
    /// # Errors
    /// It failed.
    pub fn virsh(&self, uri: &str, arguments: &[&str]) -> Result<Finished> {
        run(self.hypervisor.space(), Command::new("virsh").args(["-q", "-c", uri]).args(arguments), COMMAND_LIMIT)
            .and_then(Finished::success)
            .with_context(|| format!("virsh -c {uri} {}", arguments.join(" ")))
            .with_context(|| format!("libvirtd's log: {}", self.process.stderr().text()))
    }

    /// Defines a domain, replacing one of that name.
    ///
    /// # Errors
    /// libvirt refuses the XML.
    pub fn define(&self, uri: &str, name: &str, xml: &str) -> Result<()> {
        let file = self.hypervisor.write(&format!("{name}.xml"), xml.as_bytes())?;
        self.virsh(uri, &["define", &file])?;
        Ok(())
    }

    /// Starts a defined domain.
    ///
    /// # Errors
    /// libvirt cannot.
    pub fn start_domain(&self, uri: &str, name: &str) -> Result<()> {
        self.virsh(uri, &["start", name])?;
        Ok(())
    }

    /// The domain's state in virsh's words (`running`, `shut off`, ...).
    ///
    /// # Errors
    /// No such domain.
    pub fn state(&self, uri: &str, name: &str) -> Result<String> {
        Ok(self.virsh(uri, &["domstate", name])?.stdout.trim().to_owned())
    }

    /// Waits until libvirt says `state` of the domain: it learns of a death a moment after the kernel.
    ///
    /// # Errors
    /// It does not within half a minute.
    pub fn wait_state(&self, uri: &str, name: &str, state: &str) -> Result<()> {
        poll_until(&format!("{name} to be {state}"), Duration::from_secs(30), || {
            Ok((self.state(uri, name)? == state).then_some(()))
        })
    }

    /// The hypervisor that it runs on.
    #[must_use]
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }
}
