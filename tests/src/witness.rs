//! Whether a machine is dead, asked of the kernel and not of libvirt: a pidfd of the process that runs it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab::Hypervisor;
use crate::process::{poll_until, wait_pidfd};

/// A running machine's process, held so that its number cannot become another's.
#[derive(Debug)]
pub struct Witness {
    pidfd: OwnedFd,
    /// The process as the host numbers it.
    pub pid: u32,
}

impl Witness {
    /// The process of a running QEMU domain.
    ///
    /// # Errors
    /// There is none.
    pub fn of_qemu(hypervisor: &Hypervisor, domain: &str) -> Result<Self> {
        Self::of_pid_file(hypervisor, &format!("/run/libvirt/qemu/{domain}.pid"))
    }

    /// The first process of a running container: what dies when the container dies.
    ///
    /// # Errors
    /// There is none.
    pub fn of_container(hypervisor: &Hypervisor, domain: &str) -> Result<Self> {
        let controller = Self::of_pid_file(hypervisor, &format!("/run/libvirt/lxc/{domain}.pid"))?;
        poll_until("the container's first process", Duration::from_secs(10), || {
            let children = format!("/proc/{0}/task/{0}/children", controller.pid);
            let children = std::fs::read_to_string(&children).with_context(|| children)?;
            children.split_whitespace().next().map(|child| Self::of_pid(child.parse()?)).transpose()
        })
    }

    fn of_pid_file(hypervisor: &Hypervisor, file: &str) -> Result<Self> {
        let text = std::fs::read_to_string(hypervisor.outside(file)).with_context(|| format!("reading {file}"))?;
        let inside: u32 = text.trim().parse().with_context(|| format!("{file}: no process number in {text:?}"))?;
        let witness = Self::of_pid(outside_pid(hypervisor, inside)?)?;
        // The pidfd was opened by number: the number must not have changed hands in between.
        if outside_pid(hypervisor, inside)? != witness.pid {
            bail!("{file}: the process ended while it was looked for");
        }
        Ok(witness)
    }

    fn of_pid(pid: u32) -> Result<Self> {
        let raw = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no process number")?;
        let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()).context("pidfd_open")?;
        Ok(Self { pidfd, pid })
    }

    /// Sends it SIGKILL: for showing how long a death takes without any server.
    ///
    /// # Errors
    /// It has ended already.
    pub fn kill(&self) -> Result<()> {
        rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL).context("SIGKILL")
    }

    /// Whether every thread of the process has ended.
    ///
    /// # Errors
    /// The system call failed.
    pub fn is_dead(&self) -> Result<bool> {
        self.dies_within(Duration::ZERO)
    }

    /// As [`Self::is_dead`], waiting for it at most `limit`.
    ///
    /// # Errors
    /// The system call failed.
    pub fn dies_within(&self, limit: Duration) -> Result<bool> {
        wait_pidfd(&self.pidfd, limit)
    }
}

/// The host's number of the process that the lab numbers `inside`.
fn outside_pid(hypervisor: &Hypervisor, inside: u32) -> Result<u32> {
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let lab = namespace(hypervisor.holder()).context("the lab is gone")?;
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // Processes may end while we look; those are not the one.
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        let last = numbers.split_whitespace().last().and_then(|number| number.parse::<u32>().ok());
        if last == Some(inside) && namespace(pid).as_ref() == Some(&lab) {
            return Ok(pid);
        }
    }
    bail!("the lab has no process {inside}")
}
