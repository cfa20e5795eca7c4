//! A real libvirtd inside a lab, with the QEMU and LXC drivers and nothing of the host's.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::lab::{COMMAND_LIMIT, Hypervisor};
use crate::process::{Finished, Process, poll_until, run, send};
use crate::tools;

/// QEMU and containers run as root without confinement: the lab confines them, and its files belong
/// to root. Logs go to files, so virtlogd is not needed.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\nremember_owner = 0\nsecurity_driver = \"none\"\n\
                         swtpm_user = \"root\"\nswtpm_group = \"root\"\nstdio_handler = \"file\"\n";
const QEMU_CONF_FILE: &str = "/etc/libvirt/qemu.conf";
/// Machines share the lab's /dev.
const SHARED_DEV: &str = "namespaces = []\n";
/// Each machine has a /dev of its own: libvirt's default.
const PRIVATE_DEV: &str = "namespaces = [\"mount\"]\n";
const LIBVIRTD_CONF: &str = "auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n";

/// Enters the lab's own cgroups, which a process from outside is not in, and becomes tini. Without
/// a parent that reaps them, dead QEMUs stay zombies, and libvirt's destroy waits up to 2 s more.
const START: &str = "for procs in /sys/fs/cgroup/init/cgroup.procs /sys/fs/cgroup/*/init/cgroup.procs; do
    if [ -e \"$procs\" ]; then echo $$ > \"$procs\"; fi
done
exec tini -s -- libvirtd \"$@\"";

/// Where it serves.
const SOCKET: &str = "/run/libvirt/libvirt-sock";

/// A running libvirtd. Dropping it kills it; its machines end with the lab.
#[derive(Debug)]
pub struct Libvirtd {
    // Drops before the lab: the lab's end waits for its unreaped processes.
    process: Process,
    hypervisor: Hypervisor,
    /// How it was started, for the next start.
    config: String,
    arguments: Vec<String>,
}

/// Lines for libvirtd.conf of a hypervisor that others migrate machines to, for
/// [`Libvirtd::start_with`] with [`LISTEN`]. libvirt tells hosts apart by UUID, and all labs have
/// this machine's, so each `number` has its own.
#[must_use]
pub fn listening(number: usize) -> String {
    format!(
        "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nhost_uuid = \"00000000-0000-4000-8000-{number:012}\"\n"
    )
}

/// The argument of a libvirtd that others connect to.
pub const LISTEN: &str = "--listen";

impl Libvirtd {
    /// Starts it on the hypervisor and waits until it serves.
    ///
    /// # Errors
    /// A tool is missing, or it does not serve; the error has what it logged.
    pub fn start(hypervisor: &Hypervisor) -> Result<Self> {
        Self::start_with(hypervisor, "", &[])
    }

    /// As [`Self::start`], and each machine gets a /dev of its own, as by libvirt's default.
    pub fn start_with_private_dev(hypervisor: &Hypervisor) -> Result<Self> {
        hypervisor.write(QEMU_CONF_FILE, format!("{QEMU_CONF}{PRIVATE_DEV}").as_bytes())?;
        Self::start(hypervisor)
    }

    /// As [`Self::start`], with more lines for libvirtd.conf and more arguments.
    pub fn start_with(hypervisor: &Hypervisor, config: &str, arguments: &[&str]) -> Result<Self> {
        tools::require(&["libvirtd", "virsh", "tini"])?;
        if !hypervisor.outside(QEMU_CONF_FILE).exists() {
            hypervisor.write(QEMU_CONF_FILE, format!("{QEMU_CONF}{SHARED_DEV}").as_bytes())?;
        }
        hypervisor.write("/etc/libvirt/libvirtd.conf", format!("{LIBVIRTD_CONF}{config}").as_bytes())?;
        // One that a killed libvirtd has left says nothing.
        let _ = std::fs::remove_file(hypervisor.outside(SOCKET));
        let mut command = Command::new("sh");
        command.args(["-c", START, "sh"]).args(arguments);
        let process = Process::start(hypervisor.space(), &mut command)?;
        let (config, arguments) = (config.to_owned(), arguments.iter().map(|&argument| argument.to_owned()).collect());
        let mut libvirtd = Self { process, hypervisor: hypervisor.clone(), config, arguments };
        poll_until("libvirtd", Duration::from_secs(60), || {
            if !libvirtd.process.is_running()? {
                bail!("it has ended");
            }
            Ok(hypervisor.outside(SOCKET).exists().then_some(()))
        })
        .with_context(|| format!("its log: {}", libvirtd.process.stderr().text()))?;
        Ok(libvirtd)
    }

    /// Sends libvirtd itself a signal; its machines get none.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let children = format!("/proc/{0}/task/{0}/children", self.process.id());
        let children = std::fs::read_to_string(&children).with_context(|| children)?;
        for child in children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()) {
            // Its machines' processes are adopted by the same parent.
            let name = std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if name.trim() == "libvirtd" {
                // Its parent reaps it only when it has ended: until then the number is its own.
                return send(Pid::from_raw(child), signal).context("sending libvirtd a signal");
            }
        }
        bail!("there is no libvirtd: {}", self.process.stderr().text())
    }

    /// Resumes libvirtd after SIGSTOP, or starts it after [`Self::kill`], and waits until it
    /// answers.
    ///
    /// libvirtd 9.0 sometimes crashes there, when it cleans up after many clients. This starts it
    /// again, as a supervisor would.
    pub fn go_on(&mut self, uri: &str) -> Result<()> {
        if self.process.is_running()? {
            self.signal(Signal::SIGCONT)?;
        }
        poll_until("libvirtd to go on", Duration::from_secs(60), || {
            if !self.process.is_running()? {
                eprintln!("libvirtd has ended, and is started again: {}", self.process.stderr().text());
                self.start_again()?;
            }
            Ok(self.virsh(uri, &["list"]).is_ok().then_some(()))
        })
    }

    /// Starts it after [`Self::kill`] or [`Self::stop`], as it was started before.
    pub fn start_again(&mut self) -> Result<()> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        *self = Self::start_with(&self.hypervisor, &self.config, &arguments)?;
        Ok(())
    }

    /// Kills it as if it had crashed: its machines live on.
    pub fn crash(mut self) -> Result<()> {
        self.kill()
    }

    /// As [`Self::crash`], for [`Self::go_on`].
    pub fn kill(&mut self) -> Result<()> {
        self.end_by(Signal::SIGKILL)
    }

    /// Ends it in order, as a package's upgrade does, for [`Self::go_on`]. Its machines live on.
    pub fn stop(&mut self) -> Result<()> {
        self.end_by(Signal::SIGTERM)
    }

    fn end_by(&mut self, signal: Signal) -> Result<()> {
        self.signal(signal)?;
        ensure!(self.process.ends_within(COMMAND_LIMIT)?, "libvirtd does not end");
        Ok(())
    }

    /// Runs virsh against a driver of this libvirtd.
    pub fn virsh(&self, uri: &str, arguments: &[&str]) -> Result<Finished> {
        run(self.hypervisor.space(), Command::new("virsh").args(["-q", "-c", uri]).args(arguments), COMMAND_LIMIT)
            .and_then(Finished::success)
            .with_context(|| format!("virsh -c {uri} {}", arguments.join(" ")))
            .with_context(|| {
                let ended = matches!(self.process.ends_within(Duration::ZERO), Ok(true));
                let log = self.process.stderr().text();
                format!("libvirtd {}, its log: {log}", if ended { "has ended" } else { "runs" })
            })
    }

    /// Defines a domain, replacing one of that name.
    pub fn define(&self, uri: &str, name: &str, xml: &str) -> Result<()> {
        let file = self.hypervisor.write(&format!("{name}.xml"), xml.as_bytes())?;
        self.virsh(uri, &["define", &file])?;
        Ok(())
    }

    /// Starts a defined domain.
    pub fn start_domain(&self, uri: &str, name: &str) -> Result<()> {
        self.virsh(uri, &["start", name])?;
        Ok(())
    }

    /// The domain's state in virsh's words (`running`, `shut off`, ...).
    pub fn state(&self, uri: &str, name: &str) -> Result<String> {
        Ok(self.virsh(uri, &["domstate", name])?.stdout.trim().to_owned())
    }

    /// The domain's state and why it is in it, in virsh's words (`shut off (destroyed)`).
    pub fn state_and_reason(&self, uri: &str, name: &str) -> Result<String> {
        Ok(self.virsh(uri, &["domstate", "--reason", name])?.stdout.trim().to_owned())
    }

    /// Waits until libvirt reports `state`, at most half a minute. libvirt notices a death later
    /// than the kernel.
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
