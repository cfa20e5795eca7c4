//! The process that a local domain runs as.
//!
//! It is found while libvirt says that the domain runs, held by a pidfd, killed and proven dead.
//!
//! - QEMU: the process whose number libvirt keeps in `/run/libvirt/qemu/NAME.pid`, and whose
//!   command line has the domain's UUID. It may be a launcher with QEMU below it. Other processes
//!   with that UUID are found when it is killed (see [`host`](super::host)).
//! - LXC: the container's first process, a child of the controller in `/run/libvirt/lxc/NAME.pid`.
//!   It is process 1 of the container's PID namespace. When it is killed, the kernel kills
//!   everything else in there, and only then is it dead itself (`zap_pid_ns_processes` in
//!   kernel/pid_namespace.c waits for the last one). So its pidfd is proof for all of them.
//!
//! The caller asks libvirt before and after whether the same instance of the domain runs.

use std::fs;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use super::pidfd::Process;
use super::proc::{self, START_SLACK, Stat};
use super::{Driver, Job};

/// Why a running domain's process is not at hand. The domain is then fenced by libvirt alone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VictimError {
    /// A file under /run or /proc could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    /// A file does not say what it should.
    #[error("{} holds {what}", path.display())]
    Strange { path: PathBuf, what: &'static str },
    /// No pidfd: the process is gone, or the kernel refuses.
    #[error("cannot open a pidfd of process {pid}: {error}")]
    Pidfd { pid: i32, error: io::Error },
    /// The process is not the domain's.
    #[error("process {pid} is not the domain's: {why}")]
    NotIt { pid: i32, why: &'static str },
    /// It ended while it was looked at.
    #[error("process {0} has just ended")]
    Ended(i32),
}

impl VictimError {
    /// Whether libvirt speaks of a container whose controller is gone. It does so for ever after a
    /// destroy that failed because something in the container could not die, and when it has
    /// missed the end.
    ///
    /// The controller's process number is the instance's number. Where there is no such process,
    /// no other instance has that number, and the first process that we know of that instance is
    /// still the one. A controller that ends in peace takes its PID file with it.
    pub(crate) fn is_of_ended_controller(&self, driver: Driver, instance: u32) -> bool {
        driver == Driver::Lxc
            && match self {
                Self::Pidfd { pid, error } => u32::try_from(*pid) == Ok(instance) && proc::is_gone(error),
                Self::Unreadable { error, .. } => {
                    error.kind() == io::ErrorKind::NotFound && !Path::new(&format!("/proc/{instance}")).exists()
                }
                Self::Strange { .. } | Self::NotIt { .. } | Self::Ended(_) => false,
            }
    }
}

/// A domain's process.
#[derive(Debug)]
pub(crate) struct Victim {
    driver: Driver,
    name: String,
    process: Process,
    /// Whether we have killed it.
    killed: AtomicBool,
}

/// All but [`Victim::kill`] is the process's own.
impl Deref for Victim {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl Victim {
    /// Finds the process of a domain that libvirt says is running. Reads a few small files.
    pub(crate) fn open(driver: Driver, name: &str, uuid: Uuid) -> Result<Self, VictimError> {
        let file = driver.pid_file(name);
        let number = read(&file)?.trim().parse::<i32>();
        let number = number.map_err(|_| VictimError::Strange { path: file.clone(), what: "no process number" })?;
        let first = hold(&file, number)?;
        let arguments = read(Path::new(&format!("/proc/{number}/cmdline")))?;
        let arguments: Vec<_> = arguments.split('\0').collect();
        let says = |flag: &str, value: &str| arguments.windows(2).any(|pair| pair == [flag, value]);
        let (it, why) = match driver {
            Driver::Qemu => (says("-uuid", &uuid.to_string()), "its command line does not have the domain's UUID"),
            Driver::Lxc => (says("--name", name), "its command line does not have the domain's name"),
        };
        if !it {
            return Err(VictimError::NotIt { pid: number, why });
        }
        let written = fs::metadata(&file).and_then(|about| about.modified());
        let written = written.map_err(|error| VictimError::Unreadable { path: file, error })?;
        let path = PathBuf::from(format!("/proc/{number}/stat"));
        let stat = Stat::of(&read(&path)?).ok_or(VictimError::Strange { path, what: "no start time" })?;
        // The wall clock may have been set since: then libvirt's record of the number decides.
        if stat.wall_clock() > written + START_SLACK && driver.recorded_pid(name) != Some(number) {
            return Err(VictimError::NotIt { pid: number, why: "it was started after its PID file was written" });
        }
        if first.is_dead() {
            return Err(VictimError::Ended(number));
        }
        let process = match driver {
            Driver::Qemu => first,
            Driver::Lxc => first_of_container(number, &first)?,
        };
        Ok(Self { driver, name: name.to_owned(), process, killed: AtomicBool::new(false) })
    }

    /// A child of this test's, as if it were a domain's process.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(driver: Driver, name: &str, child: &std::process::Child) -> Self {
        let process = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        Self { driver, name: name.to_owned(), process, killed: AtomicBool::new(false) }
    }

    /// Whether somebody has killed it, as the kernel knows. Threads that wait for storage take
    /// SIGKILL only when that comes back.
    pub(crate) fn is_kill_pending(&self) -> bool {
        let file = |name| fs::read_to_string(format!("/proc/{}/{name}", self.pid()));
        // Without these files the process is dead.
        let pending = file("status").and_then(|status| Ok(is_kill_pending(&status, &file("stat")?)));
        pending.unwrap_or(true)
    }

    /// The driver that runs it.
    pub(super) fn driver(&self) -> Driver {
        self.driver
    }

    /// The domain's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sends SIGKILL, as [`Process::kill`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.killed.store(true, Ordering::Release);
        self.process.kill()
    }

    /// Whether we have killed it and it is not dead yet. Until it is, libvirt does not answer
    /// questions about it.
    pub(crate) fn is_dying(&self) -> bool {
        self.killed.load(Ordering::Acquire) && !self.is_dead()
    }

    /// libvirt's record of a job of this domain. libvirt writes it before a job's first step.
    pub(crate) fn job(&self) -> Job {
        Job::on_record(self.driver, &self.name)
    }

    /// Whether libvirt's own record of the domain is about this very process.
    pub(crate) fn is_on_record(&self) -> bool {
        self.driver.recorded_pid(&self.name) == Some(self.pid())
    }

    /// What keeps its threads from dying, for people.
    pub(crate) fn obstacle(&self) -> String {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let stuck: Vec<_> = threads
            .filter_map(|thread| {
                let state = Stat::read(&thread.path()).ok()??.state;
                let place = fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
                let name = thread.file_name();
                (state != 'Z').then(|| format!("{} in state {state} at {}", name.display(), place.trim()))
            })
            .take(4)
            .collect();
        if stuck.is_empty() { "the kernel is taking it apart".to_owned() } else { stuck.join(", ") }
    }
}

/// Opens a pidfd of the process that a file names.
fn hold(file: &Path, pid: i32) -> Result<Process, VictimError> {
    if pid <= 1 {
        return Err(VictimError::Strange { path: file.to_owned(), what: "no machine's process number" });
    }
    Process::open(pid).map_err(|error| VictimError::Pidfd { pid, error })
}

/// The process among a controller's children that is number 1 in a PID namespace of its own.
fn first_of_container(controller: i32, held: &Process) -> Result<Process, VictimError> {
    let children = PathBuf::from(format!("/proc/{controller}/task/{controller}/children"));
    for child in read(&children)?.split_whitespace().filter_map(|child| child.parse().ok()) {
        let process = hold(&children, child)?;
        let status = read(Path::new(&format!("/proc/{child}/status")))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or_default();
        let is_its_child = parent.trim() == controller.to_string();
        if is_its_child && proc::is_first_of_container(&status) && !process.is_dead() && !held.is_dead() {
            return Ok(process);
        }
    }
    Err(VictimError::NotIt { pid: controller, why: "it has no child that is the first process of a container" })
}

/// Whether SIGKILL has been sent to a process, or it is ending, by its files in `/proc`.
fn is_kill_pending(status: &str, stat: &str) -> bool {
    const SIGKILL: u64 = 1 << 8;
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let mut masks = pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    masks.any(|mask| mask & SIGKILL != 0) || Stat::of(stat).is_some_and(|stat| stat.is_ending())
}

fn read(path: &Path) -> Result<String, VictimError> {
    let bytes = fs::read(path).map_err(|error| VictimError::Unreadable { path: path.to_owned(), error })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn a_controller_has_ended_where_its_number_is_nobodys() {
        let gone = |error| VictimError::Unreadable { path: "/run/libvirt/lxc/ct.pid".into(), error };
        let missing = || gone(io::ErrorKind::NotFound.into());
        assert!(missing().is_of_ended_controller(Driver::Lxc, u32::MAX));
        assert!(!missing().is_of_ended_controller(Driver::Lxc, std::process::id()), "somebody has the number");
        assert!(!missing().is_of_ended_controller(Driver::Qemu, u32::MAX));
        let forbidden = gone(io::ErrorKind::PermissionDenied.into());
        assert!(!forbidden.is_of_ended_controller(Driver::Lxc, u32::MAX));
    }

    #[test]
    fn a_process_is_dead_when_it_is_and_its_start_is_known() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let number = i32::try_from(child.id()).unwrap();
        let process = hold(Path::new("x"), number).unwrap();
        let stat = Stat::read(Path::new(&format!("/proc/{number}"))).unwrap().unwrap();
        let age = SystemTime::now().duration_since(stat.wall_clock()).unwrap();
        assert!(age < Duration::from_secs(60), "{age:?}");
        let victim = Victim { driver: Driver::Qemu, name: "x".to_owned(), process, killed: AtomicBool::new(false) };
        assert!(!victim.is_dead() && !victim.is_kill_pending());
        victim.kill().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        // Two may wait for one death.
        let (one, other) = runtime.block_on(async { tokio::join!(victim.death(), victim.death()) });
        assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
        assert!(victim.is_dead() && victim.is_kill_pending());
        // Not yet waited for by its parent: dead all the same, and killing it again is no error.
        victim.kill().unwrap();
        child.wait().unwrap();
        victim.kill().unwrap();
        assert!(victim.is_dead());
        assert!(matches!(hold(Path::new("x"), number), Err(VictimError::Pidfd { .. })));
    }

    #[test]
    fn a_process_that_waits_for_storage_is_kill_pending_once_it_is_killed() {
        let status =
            |own: &str, shared: &str| format!("Name:\tqemu\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigCgt:\t0100\n");
        let stat =
            |state: &str, flags: u32| format!("7 (a) b) {state} 1 7 7 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 4242 0");
        let (none, kill, others) = ("0000000000000000", "0000000000000100", "0000000000004002");
        assert!(!is_kill_pending(&status(none, others), &stat("D", 4_194_560)));
        assert!(is_kill_pending(&status(kill, none), &stat("D", 4_194_560)), "sent to the thread");
        assert!(is_kill_pending(&status(none, kill), &stat("S", 4_194_560)), "sent to the process");
        assert!(is_kill_pending(&status(none, none), &stat("R", 4_194_564)), "it is ending");
        assert!(is_kill_pending(&status(none, none), &stat("Z", 4_194_560)), "its first thread has ended");
    }

    #[test]
    fn init_and_nonsense_are_no_machines() {
        for number in [i32::MIN, -1, 0, 1] {
            assert!(matches!(hold(Path::new("x"), number), Err(VictimError::Strange { .. })), "{number}");
        }
    }
}
