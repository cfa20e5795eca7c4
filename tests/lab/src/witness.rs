//! Whether a machine is dead, by the kernel's word and not libvirt's: a pidfd of its process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::lab::Hypervisor;
use crate::process::{poll_until, wait_pidfd};

/// How long a domain may take until it is started again, on a loaded machine.
const NEXT_LIMIT: Duration = Duration::from_secs(30);

/// A running machine's process, held so that its number cannot become another's.
#[derive(Debug)]
pub struct Witness {
    pidfd: OwnedFd,
    /// A container's PID namespace: all of its processes are in it.
    inside: Option<PathBuf>,
    /// The process as the host numbers it.
    pub pid: u32,
}

impl Witness {
    /// The process of a running QEMU domain.
    pub fn of_qemu(hypervisor: &Hypervisor, domain: &str) -> Result<Self> {
        Self::of_pid_file(hypervisor, &pid_file("qemu", domain))
    }

    /// The first process of a running container: what dies when the container dies.
    pub fn of_container(hypervisor: &Hypervisor, domain: &str) -> Result<Self> {
        let controller = Self::of_pid_file(hypervisor, &pid_file("lxc", domain))?;
        poll_until("the container's first process", Duration::from_secs(10), || {
            let children = format!("/proc/{0}/task/{0}/children", controller.pid);
            let children = std::fs::read_to_string(&children).with_context(|| children)?;
            children.split_whitespace().next().map(|child| Self::of_pid(child.parse()?)).transpose()
        })
        .map(|first| Self { inside: pid_namespace(first.pid), ..first })
    }

    /// The processes of whatever runs under this name now, of either driver.
    pub fn of_all(hypervisor: &Hypervisor, domain: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for (file, find) in [
            (pid_file("qemu", domain), Self::of_qemu as fn(&Hypervisor, &str) -> Result<Self>),
            (pid_file("lxc", domain), Self::of_container),
        ] {
            // A file may stay behind for a moment: what counts is whether its process lives.
            let mut attempts = 50;
            while hypervisor.outside(&file).exists() {
                let error = match find(hypervisor, domain) {
                    Ok(witness) => {
                        all.push(witness);
                        break;
                    }
                    Err(error) => error,
                };
                // It may have been started again while we looked at what was before.
                attempts -= 1;
                match Self::of_pid_file(hypervisor, &file) {
                    // Between two instances there is no process.
                    Ok(_) if attempts > 0 => std::thread::sleep(Duration::from_millis(10)),
                    Ok(_) => return Err(error),
                    Err(_) => break,
                }
            }
        }
        Ok(all)
    }

    /// Waits until another process than this one runs the domain, after a reboot, at most half a
    /// minute. libvirt cannot tell: it calls the domain running until it notices the death.
    pub fn wait_next(&self, hypervisor: &Hypervisor, domain: &str) -> Result<Self> {
        poll_until(&format!("the next process of {domain}"), NEXT_LIMIT, || {
            Ok(Self::of_all(hypervisor, domain)?.into_iter().find(|now| now.pid != self.pid))
        })
    }

    /// The helpers of this machine: the other processes in its control group, and their
    /// descendants.
    pub fn beside(&self) -> Result<Vec<Self>> {
        let own = machine_group(self.pid).context("it has no control group")?;
        let pids = processes();
        let mut found: Vec<u32> =
            pids.iter().copied().filter(|&pid| machine_group(pid).as_ref() == Some(&own)).collect();
        let mut known = 0;
        while known < found.len() {
            known = found.len();
            let is_new =
                |pid: &&u32| !found.contains(pid) && parent(**pid).is_some_and(|parent| found.contains(&parent));
            let children: Vec<u32> = pids.iter().filter(is_new).copied().collect();
            found.extend(children);
        }
        // They may end meanwhile.
        Ok(found.into_iter().filter(|&pid| pid != self.pid).filter_map(|pid| Self::of_pid(pid).ok()).collect())
    }

    /// All processes with a machine's UUID in their command line, whatever libvirt knows of them.
    pub fn of_uuid(uuid: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for pid in processes() {
            let has = || {
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let arguments: Vec<_> = line.split(|byte| *byte == 0).collect();
                arguments.windows(2).any(|pair| pair == [&b"-uuid"[..], uuid.as_bytes()])
            };
            // It may have ended before it was held.
            if has()
                && let Ok(witness) = Self::of_pid(pid)
                && has()
                && !witness.is_dead()?
            {
                all.push(witness);
            }
        }
        Ok(all)
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

    /// A process by the host's number for it, which the caller keeps from changing hands.
    pub fn of_pid(pid: u32) -> Result<Self> {
        let raw = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no process number")?;
        let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()).context("pidfd_open")?;
        Ok(Self { pidfd, inside: None, pid })
    }

    /// Sends it SIGKILL: for showing how long a death takes without any server.
    pub fn kill(&self) -> Result<()> {
        rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL).context("SIGKILL")
    }

    /// Whether every thread of the process has ended, and for a container every process in it.
    pub fn is_dead(&self) -> Result<bool> {
        Ok(self.dies_within(Duration::ZERO)? && self.inside.as_ref().is_none_or(|inside| !has_processes(inside)))
    }

    /// What the kernel says of it, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let about = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let wanted = ["Name:", "State:", "PPid:", "NSpid:"];
        let lines = about.lines().filter(|line| wanted.iter().any(|field| line.starts_with(field)));
        format!("process {} {:?} {:?}", self.pid, lines.collect::<Vec<_>>(), self.inside)
    }

    /// As [`Self::is_dead`], waiting for it at most `limit`.
    pub fn dies_within(&self, limit: Duration) -> Result<bool> {
        wait_pidfd(&self.pidfd, limit)
    }
}

impl AsFd for Witness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// The host's processes by their numbers.
fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A process's PID namespace, as the kernel names it; `None` once the process is dead.
fn pid_namespace(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// Whether a process of the host is in this PID namespace.
fn has_processes(namespace: &PathBuf) -> bool {
    processes().into_iter().any(|pid| pid_namespace(pid).as_ref() == Some(namespace) && has_living_threads(pid))
}

/// A process's parent.
fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// The part of a process's control group that names the machine and its lab.
fn machine_group(pid: u32) -> Option<String> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let of_machine = |line: &str| {
        let path = line.splitn(3, ':').nth(2)?;
        let (before, after) = path.split_once(".libvirt-qemu").or_else(|| path.split_once(".scope"))?;
        (before.contains("qemu") && (after.is_empty() || after.starts_with('/'))).then(|| before.to_owned())
    };
    groups.lines().find_map(of_machine)
}

/// Whether more of a process is left than its exit status.
fn has_living_threads(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    stats.into_iter().any(|stat| {
        // Behind the name, which may hold anything.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        !matches!(state, Some('Z' | 'X'))
    })
}

/// How libvirt names a domain's PID file: as it would write the name in XML.
fn pid_file(driver: &str, domain: &str) -> String {
    let mut name = domain.replace('&', "&amp;");
    for (character, escaped) in [("<", "&lt;"), (">", "&gt;"), ("\"", "&quot;"), ("'", "&apos;")] {
        name = name.replace(character, escaped);
    }
    format!("/run/libvirt/{driver}/{name}.pid")
}

/// The host's number of the process that the lab numbers `inside`.
fn outside_pid(hypervisor: &Hypervisor, inside: u32) -> Result<u32> {
    let lab = pid_namespace(hypervisor.first()).context("the lab is gone")?;
    for pid in processes() {
        // Processes may end while we look; those are not the one.
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        let last = numbers.split_whitespace().last().and_then(|number| number.parse::<u32>().ok());
        if last == Some(inside) && pid_namespace(pid).as_ref() == Some(&lab) {
            return Ok(pid);
        }
    }
    bail!("the lab has no process {inside}")
}
