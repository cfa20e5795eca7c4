//! A hypervisor whose first process is the real systemd.
//!
//! Its root directory is the nodes' image under a layer in memory. It has a PID namespace and
//! mounts of its own, and the lab's network, cgroups and `/run`. libvirtd and the machines run in
//! that PID namespace too, so a daemon that systemd starts sees them as on a real host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::corosync::Item;
use crate::cluster::image::Image;
use crate::lab::{Hypervisor, Space};
use crate::process::{Finished, Process, poll_until, run};

/// How long systemd may take until everything is started, on a loaded machine.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// The lab's programs run in this PID namespace from now on. Then [`BOOT`] with mounts of its own.
const BEGIN: &str = "mount -t proc proc /proc && \
    exec unshare --mount --propagation unchanged --uts sh -c \"$1\" \"$0\" \"$2\"";
const BOOT: &str = include_str!("assets/systemd/boot.sh");
const ROOT: &str = include_str!("assets/systemd/root.sh");
/// What a shell has after a login.
pub const ENVIRONMENT: &[&str] =
    &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C", "COLUMNS=200"];

/// The first process of a PID namespace.
#[derive(Debug)]
pub(crate) struct First {
    /// As the host numbers it.
    pub(crate) pid: u32,
    pidfd: OwnedFd,
}

impl First {
    fn new(pid: u32) -> Result<Self> {
        let raw = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no process number")?;
        let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()).context("pidfd_open")?;
        Ok(Self { pid, pidfd })
    }
}

impl First {
    /// Kills it, and with it its PID namespace.
    pub(crate) fn kill(&self) -> Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL)?)
    }
}

impl AsFd for First {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A hypervisor that systemd has booted. Dropping it kills all that runs there, libvirtd included.
#[derive(Debug)]
pub struct Booted {
    /// `unshare`, whose child is systemd and dies with it.
    process: Process,
    /// Its programs run in systemd's PID namespace.
    hypervisor: Hypervisor,
    /// systemd's own namespaces.
    inside: Space,
    root: String,
}

impl Booted {
    /// Boots systemd on a hypervisor where nothing runs yet. It finds these files.
    ///
    /// # Errors
    /// The kernel refuses the mounts, or systemd does not come up.
    pub fn start(hypervisor: &Hypervisor, name: &str, files: &[Item]) -> Result<Self> {
        Self::of(&Image::get()?, hypervisor, name, files)
    }

    /// As [`Self::start`], from another image.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn of(image: &Image, hypervisor: &Hypervisor, name: &str, files: &[Item]) -> Result<Self> {
        let root = hypervisor.path(&format!("roots/{name}"));
        hypervisor.space().must("sh", &["-c", ROOT, name, &image.root().to_string_lossy(), &root])?;
        for Item { path, mode, content } in files {
            hypervisor.write_mode(&format!("{root}{path}"), content, *mode)?;
        }
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "sh", "-c", BEGIN, name, BOOT, &root]);
        let mut process = Process::start(hypervisor.space(), &mut command)?;
        let children = format!("/proc/{0}/task/{0}/children", process.id());
        let pid = poll_until("the hypervisor's first process", BOOT_LIMIT, || {
            let children = std::fs::read_to_string(&children).with_context(|| children.clone())?;
            Ok(children.split_whitespace().next().map(str::parse).transpose()?)
        })?;
        // Its child until it ends, so the number cannot become another's.
        ensure!(process.is_running()?, "it has ended: {}", process.stderr().text());
        let first = First::new(pid)?;
        let inside = hypervisor.space().inside(first.as_fd().try_clone_to_owned()?);
        let booted = Self { hypervisor: hypervisor.below(first), inside, root, process };
        booted.wait_up()?;
        Ok(booted)
    }

    fn wait_up(&self) -> Result<()> {
        let mut last = String::new();
        let waited = poll_until("systemd to be up", BOOT_LIMIT, || {
            // It has no root directory of its own at first.
            if let Ok(answer) = self.shell(&[], "systemctl is-system-running", BOOT_LIMIT) {
                last = format!("{}{}", answer.stdout.trim(), answer.stderr.trim());
            }
            Ok(matches!(last.as_str(), "running" | "degraded").then_some(()))
        });
        waited.with_context(|| format!("systemd says: {last}; {}", self.process.stderr().text()))
    }

    /// Kills all that runs there at once, as a power switch does. What this process has started
    /// there is reaped when its owner drops it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn cut_power(&self) -> Result<()> {
        self.hypervisor.kill_first().context("killing the hypervisor's first process")
    }

    /// The hypervisor, for what is to run beside systemd: libvirtd, guests.
    #[must_use]
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// Its root directory, as the lab's programs see it.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Runs a line of shell there, through these words (`setpriv ...`) if there are any.
    ///
    /// # Errors
    /// It does not end within `limit`.
    pub fn shell(&self, through: &[&str], line: &str, limit: Duration) -> Result<Finished> {
        let mut command = Command::new("chroot");
        command.args([self.root(), "env", "-i"]).args(ENVIRONMENT).args(through).args(["bash", "-c", line]);
        run(&self.inside, &mut command, limit)
    }

    /// What a line of shell prints there; an exit code other than 0 is an error.
    ///
    /// # Errors
    /// As [`Self::shell`], or it fails.
    pub fn must(&self, line: &str) -> Result<String> {
        let done = self.shell(&[], line, BOOT_LIMIT)?;
        Ok(done.success().with_context(|| line.to_owned())?.stdout)
    }
}
