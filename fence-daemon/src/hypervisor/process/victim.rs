//! The process that a local domain runs as: found while libvirt says that it runs, held by a pidfd, killed and proven dead by it.
//!
//! - QEMU: the process whose number libvirt keeps in `/run/libvirt/qemu/NAME.pid` and whose command line has the domain's UUID. It may be a launcher
//!   with QEMU below it: what else has that UUID is found when it is killed (see [`host`](super::host)).
//! - LXC: the container's first process, a child of the controller in `/run/libvirt/lxc/NAME.pid`. It is process 1 of the container's PID
//!   namespace: when it is killed the kernel kills everything else in there, and only then is it dead itself (`zap_pid_ns_processes`
//!   in kernel/pid_namespace.c waits for the last one), so that its pidfd is proof for all of them.
//!
//! A pidfd cannot come to mean another process, however long it is kept. What it means is settled when it is opened: the caller asks
//! libvirt before and after whether the same instance of the domain runs (see `table`), and here the process's command line, parent and
//! start are looked at *after* the pidfd was opened and the pidfd is found alive *after* that, so that what was looked at is
//! the process that the pidfd holds.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use uuid::Uuid;

/// Where libvirt's system daemons keep what they know about running domains.
const RUN: &str = "/run/libvirt";

/// Where they keep the definitions of domains.
const DEFINITIONS: &str = "/etc/libvirt";

/// How much later than its PID file was written a process may seem to have been started: clocks are coarse.
pub(crate) const START_SLACK: Duration = Duration::from_secs(2);

/// Which of libvirt's drivers runs domains as processes of this host that we know how to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    /// The system's QEMU driver.
    Qemu,
    /// The LXC driver.
    Lxc,
}

impl Driver {
    /// The driver behind a URI, if its domains are processes of this host. Only the system's own daemons on their own sockets: another
    /// socket may lead anywhere, and a user's session keeps its files where that user can write them.
    pub(crate) fn of(uri: &str) -> Option<Self> {
        match uri {
            "qemu:///system" | "qemu+unix:///system" => Some(Self::Qemu),
            "lxc:///" | "lxc:///system" | "lxc+unix:///" | "lxc+unix:///system" => Some(Self::Lxc),
            _ => None,
        }
    }

    fn directory(self) -> PathBuf {
        Path::new(RUN).join(self.folder())
    }

    fn folder(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Lxc => "lxc",
        }
    }

    /// Whether libvirt keeps no file of any domain of this driver: neither a definition nor a record of one that runs. What cannot be
    /// read is no proof.
    pub(crate) fn keeps_no_domain(self) -> bool {
        [DEFINITIONS, RUN].iter().all(|place| has_no_domain_file(&Path::new(place).join(self.folder())))
    }
}

/// Whether a folder of libvirt's holds no domain's XML, or is not there.
fn has_no_domain_file(folder: &Path) -> bool {
    let is_xml = |entry: io::Result<fs::DirEntry>| {
        entry.map_or(true, |entry| entry.path().extension().is_some_and(|extension| extension == "xml"))
    };
    match fs::read_dir(folder) {
        Ok(entries) => !entries.into_iter().any(is_xml),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Why a running domain's process is not at hand. It is then fenced by libvirt alone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VictimError {
    /// A file under /run or /proc could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        error: io::Error,
    },
    /// A file does not say what it should.
    #[error("{} holds {what}", path.display())]
    Strange { path: PathBuf, what: &'static str },
    /// No pidfd: the process is gone, or the kernel refuses.
    #[error("cannot open a pidfd of process {pid}: {error}")]
    Pidfd {
        pid: i32,
        #[source]
        error: io::Error,
    },
    /// The process is not the domain's.
    #[error("process {pid} is not the domain's: {why}")]
    NotIt { pid: i32, why: &'static str },
    /// It ended while it was looked at.
    #[error("process {0} has just ended")]
    Ended(i32),
}

impl VictimError {
    /// Whether libvirt speaks of a container whose controller is gone, as it does for ever after a destroy that failed because something in it
    /// could not die, and when it has missed the end. The controller's process number is the instance's number: where there is no such process, no other
    /// instance has that number, and the first process that we know of that instance is still the one. A controller that ends in peace takes its PID file
    /// with it.
    pub(crate) fn is_of_ended_controller(&self, driver: Driver, instance: u32) -> bool {
        driver == Driver::Lxc
            && match self {
                Self::Pidfd { pid, error } => {
                    u32::try_from(*pid) == Ok(instance) && error.raw_os_error() == Some(nix::libc::ESRCH)
                }
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
    pid: Pid,
    pidfd: OwnedFd,
    /// Whether it was killed, and is to die as soon as it can.
    killed: AtomicBool,
}

impl Victim {
    /// Finds the process of a domain that libvirt says is running. Reads a few small files.
    pub(crate) fn open(driver: Driver, name: &str, uuid: Uuid) -> Result<Self, VictimError> {
        let file = driver.directory().join(format!("{}.pid", xml_escaped(name)));
        let number: i32 = read(&file)?
            .trim()
            .parse()
            .map_err(|_| VictimError::Strange { path: file.clone(), what: "no process number" })?;
        let (first, held) = hold(&file, number)?;
        let arguments = arguments(number)?;
        let says = |flag: &str, value: &str| arguments.windows(2).any(|pair| pair[0] == flag && pair[1] == value);
        let (it, why) = match driver {
            Driver::Qemu => (says("-uuid", &uuid.to_string()), "its command line does not have the domain's UUID"),
            Driver::Lxc => (says("--name", name), "its command line does not have the domain's name"),
        };
        if !it {
            return Err(VictimError::NotIt { pid: number, why });
        }
        let written = fs::metadata(&file).and_then(|about| about.modified());
        let written = written.map_err(|error| VictimError::Unreadable { path: file.clone(), error })?;
        // By the wall clock, which may have been set since: then libvirt's own record of the number has to do.
        if started(number)? > written + START_SLACK && recorded(driver, name) != Some(number) {
            return Err(VictimError::NotIt { pid: number, why: "it was started after its PID file was written" });
        }
        if is_dead(&held) {
            return Err(VictimError::Ended(number));
        }
        let (pid, pidfd) = match driver {
            Driver::Qemu => (first, held),
            Driver::Lxc => first_of_container(number, &held)?,
        };
        Ok(Self { driver, name: name.to_owned(), pid, pidfd, killed: AtomicBool::new(false) })
    }

    /// Whether all of it is dead: every thread, and for a container every process.
    pub(crate) fn is_dead(&self) -> bool {
        is_dead(&self.pidfd)
    }

    /// Whether it was killed, by whomever, as the kernel knows: threads that wait for storage take SIGKILL when that comes back.
    pub(crate) fn is_doomed(&self) -> bool {
        let file = |name| fs::read_to_string(format!("/proc/{}/{name}", self.pid()));
        // What is not there to be read is dead.
        let doomed = file("status").and_then(|status| Ok(is_doomed(&status, &file("stat")?)));
        doomed.unwrap_or(true)
    }

    /// The domain's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its process number, for people.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends SIGKILL. That it is dead already is no error: whoever kills waits for the proof anyway.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.killed.store(true, Ordering::Release);
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it was killed by us and is not dead yet. Until it is, libvirt answers no question about it.
    pub(crate) fn is_dying(&self) -> bool {
        self.killed.load(Ordering::Acquire) && !self.is_dead()
    }

    /// Waits until all of it is dead.
    ///
    /// # Errors
    /// The pidfd cannot be watched.
    pub(crate) async fn death(&self) -> io::Result<()> {
        // A descriptor of its own, as one and the same cannot be watched by two who wait.
        let own = self.pidfd.try_clone()?;
        // SAFETY: needed because a pidfd tells a death by becoming readable, and tokio wants the promise that the descriptor stays open and
        // the same. Sound because the watch owns the descriptor: nobody else has it, and `OwnedFd` neither replaces nor closes it before its end.
        let pidfd = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }?;
        loop {
            let mut ready = pidfd.readable().await?;
            // Readiness may be spurious: the proof is what the kernel says now.
            if self.is_dead() {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// What libvirt has on record about a job of this domain: it writes its record before a job's first step.
    pub(crate) fn job(&self) -> Job {
        Job::on_record(self.driver, &self.name)
    }

    /// Whether libvirt's own record of the domain is about this very process.
    pub(crate) fn is_on_record(&self) -> bool {
        recorded(self.driver, &self.name) == Some(self.pid())
    }

    /// What keeps its threads from dying, for people.
    pub(crate) fn obstacle(&self) -> String {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let stuck: Vec<_> = threads
            .filter_map(|thread| {
                let status = fs::read_to_string(thread.path().join("stat")).ok()?;
                let state = status.rsplit_once(") ")?.1.chars().next()?;
                let place = fs::read_to_string(thread.path().join("wchan")).unwrap_or_default();
                let name = thread.file_name();
                (state != 'Z').then(|| format!("{} in state {state} at {}", name.display(), place.trim()))
            })
            .take(4)
            .collect();
        if stuck.is_empty() { "the kernel is taking it apart".to_owned() } else { stuck.join(", ") }
    }
}

/// A name as libvirt writes it in XML, and in the name of a domain's PID file (`virPidFileBuildPath`); not in that of its status file.
fn xml_escaped(name: &str) -> String {
    let mut escaped = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A job that libvirt may be doing with a domain, as far as it matters to a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// None, or one that leaves the domain where it is.
    None,
    /// The domain is on its way to another host, or was when libvirt lost sight of it: the death of this process may not be the domain's.
    Leaving,
    /// It is on its way here from another host: the death of this process is not the domain's.
    Arriving,
    /// It is going back to a snapshot, in another process, or libvirt's record cannot be read or understood.
    Unknown,
}

impl Job {
    /// Reads libvirt's record of a domain that runs, or whose end libvirt has not noticed yet: after that there is none.
    pub(crate) fn on_record(driver: Driver, name: &str) -> Self {
        match driver {
            // The driver has no migration.
            Driver::Lxc => Self::None,
            Driver::Qemu => {
                let file = driver.directory().join(format!("{name}.xml"));
                read(&file).map_or(Self::Unknown, |status| Self::of(&status))
            }
        }
    }

    /// Reads libvirt's status file. Its job, if there is one, comes before the domain's definition, which may hold anything.
    fn of(status: &str) -> Self {
        let Some((head, _)) = status.split_once("<domain ").filter(|(head, _)| head.contains("<domstatus ")) else {
            return Self::Unknown;
        };
        // Why it stands still is kept beyond the job: who has not come back here may run there.
        let stopped = ["migration'", "post-copy"].map(|why| format!(" state='paused' reason='{why}"));
        let here = if stopped.iter().any(|stopped| head.contains(stopped)) { Self::Leaving } else { Self::None };
        let Some((_, job)) = head.split_once("<job ") else { return here };
        let job = job.split('>').next().unwrap_or_default();
        let kind = job.split_once("async='").and_then(|(_, rest)| rest.split_once('\'')).map(|(kind, _)| kind);
        match kind {
            Some("migration out") => Self::Leaving,
            // By post-copy it runs here, and whatever becomes of it, never there again.
            Some("migration in") if head.contains(" state='running' reason='post-copy") => Self::None,
            Some("migration in") => Self::Arriving,
            // Not "save": what is killed at its end would be resumed from the image, by whoever starts it.
            Some("none" | "dump" | "snapshot" | "backup") => here,
            // Else it is going back to a snapshot, for which its process is replaced by another.
            Some("start") if head.contains(" state='paused' reason='starting up'") => here,
            _ => Self::Unknown,
        }
    }
}

/// The process number in a domain's PID file, if there is one.
pub(crate) fn pid_in_file(driver: Driver, name: &str) -> Option<i32> {
    read(&driver.directory().join(format!("{}.pid", xml_escaped(name)))).ok()?.trim().parse().ok()
}

/// Opens a pidfd of the process that a file names.
fn hold(file: &Path, number: i32) -> Result<(Pid, OwnedFd), VictimError> {
    // Number 1 is the init of the system or of a container that we run in, and no machine.
    let pid = if number > 1 { Pid::from_raw(number) } else { None };
    let pid = pid.ok_or_else(|| VictimError::Strange { path: file.to_owned(), what: "no machine's process number" })?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())
        .map_err(|error| VictimError::Pidfd { pid: number, error: error.into() })?;
    Ok((pid, pidfd))
}

/// The process number in libvirt's own record of a running domain.
fn recorded(driver: Driver, name: &str) -> Option<i32> {
    let status = read(&driver.directory().join(format!("{name}.xml"))).ok()?;
    let (_, head) =
        status.split_once("<domain ").map_or(("", ""), |(head, _)| head.split_once("<domstatus ").unwrap_or_default());
    head.split('>').next()?.split_once("pid='")?.1.split_once('\'')?.0.parse().ok()
}

/// The process among a controller's children that is number 1 in a PID namespace of its own.
fn first_of_container(controller: i32, held: &OwnedFd) -> Result<(Pid, OwnedFd), VictimError> {
    let children = PathBuf::from(format!("/proc/{controller}/task/{controller}/children"));
    for child in read(&children)?.split_whitespace().filter_map(|child| child.parse().ok()) {
        let (pid, pidfd) = hold(&children, child)?;
        let status = read(Path::new(&format!("/proc/{child}/status")))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let is_its_child = field("PPid:").trim() == controller.to_string();
        let numbers: Vec<_> = field("NSpid:").split_whitespace().collect();
        let is_first = numbers.len() > 1 && numbers.last() == Some(&"1");
        if is_its_child && is_first && !is_dead(&pidfd) && !is_dead(held) {
            return Ok((pid, pidfd));
        }
    }
    Err(VictimError::NotIt { pid: controller, why: "it has no child that is the first process of a container" })
}

fn is_dead(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    // An error is no proof of anything.
    matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().contains(PollFlags::IN)
}

/// Whether the kernel's words about a process mean that SIGKILL has been sent to it or that it is ending.
fn is_doomed(status: &str, stat: &str) -> bool {
    const SIGKILL: u64 = 1 << 8;
    const PF_EXITING: u64 = 4;
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    let killed = pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok()).any(|mask| mask & SIGKILL != 0);
    // Behind the name, which may hold anything, come the state (field 3) and so on; field 9 are the flags.
    let mut fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ')).into_iter().flatten();
    let ended = fields.next().is_some_and(|state| matches!(state, "Z" | "X"));
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok()).unwrap_or(0);
    killed || ended || flags & PF_EXITING != 0
}

fn read(path: &Path) -> Result<String, VictimError> {
    let bytes = fs::read(path).map_err(|error| VictimError::Unreadable { path: path.to_owned(), error })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn arguments(pid: i32) -> Result<Vec<String>, VictimError> {
    Ok(read(Path::new(&format!("/proc/{pid}/cmdline")))?.split('\0').map(str::to_owned).collect())
}

/// When a process was started, by the wall clock.
fn started(pid: i32) -> Result<SystemTime, VictimError> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let stat = read(&path)?;
    // Behind the name, which may hold anything, come the state (field 3) and so on; field 22 is the start in clock ticks since boot.
    let ticks = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19)?.parse::<u64>().ok());
    let ticks = ticks.ok_or(VictimError::Strange { path, what: "no start time" })?;
    Ok(wall_clock(ticks))
}

/// A moment in clock ticks since the host's boot, by the wall clock.
pub(crate) fn wall_clock(ticks: u64) -> SystemTime {
    let since_boot = Duration::from_millis(ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second().max(1));
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = Duration::new(u64::try_from(boot.tv_sec).unwrap_or(0), u32::try_from(boot.tv_nsec).unwrap_or(0));
    SystemTime::now() - up.saturating_sub(since_boot)
}

#[cfg(test)]
mod tests {
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
    fn a_driver_has_no_domains_where_libvirt_keeps_no_file_of_one() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("lxc");
        assert!(has_no_domain_file(&folder), "the driver is not installed");
        fs::create_dir_all(folder.join("networks")).unwrap();
        fs::write(folder.join("ct.pid"), b"7").unwrap();
        assert!(has_no_domain_file(&folder));
        fs::write(folder.join("ct.xml"), b"<domain/>").unwrap();
        assert!(!has_no_domain_file(&folder), "one is defined, or runs");
        assert!(!has_no_domain_file(&folder.join("ct.xml")), "what cannot be listed is no proof");
    }

    #[test]
    fn only_the_systems_own_daemons_have_processes_that_we_know() {
        assert_eq!(Driver::of("qemu:///system"), Some(Driver::Qemu));
        assert_eq!(Driver::of("lxc:///"), Some(Driver::Lxc));
        for uri in [
            "qemu+ssh://host/system",
            "qemu://host/system",
            "qemu:///session",
            "qemu:///system?socket=/tmp/x",
            "qemu+unix:///system?socket=/tmp/x",
            "test:///default",
            "xen:///system",
            "lxc://host/",
        ] {
            assert_eq!(Driver::of(uri), None, "{uri}");
        }
    }

    #[test]
    fn a_pid_files_name_is_the_domains_as_in_xml() {
        assert_eq!(xml_escaped("node 1 ü"), "node 1 ü");
        assert_eq!(xml_escaped("<a> & \"b's\""), "&lt;a&gt; &amp; &quot;b&apos;s&quot;");
    }

    #[test]
    fn libvirts_record_of_a_job_is_understood_or_doubted() {
        let status = |job: &str| {
            format!(
                "<domstatus state='running' reason='booted' pid='7'>\n  {job}\n  <domain type='qemu' id='1'>\n<job async='none'/>"
            )
        };
        for (job, meaning) in [
            ("<job type='none' async='none'/>", Job::None),
            ("<job type='none' async='backup' phase='none'>\n    <x/>\n  </job>", Job::None),
            ("<job type='none' async='migration out' phase='perform3' flags='0x3'/>", Job::Leaving),
            ("<job type='modify' async='migration in' phase='prepare'/>", Job::Arriving),
            ("<job type='none' async='something new'/>", Job::Unknown),
            ("<job type='none'/>", Job::Unknown),
            ("", Job::None),
        ] {
            assert_eq!(Job::of(&status(job)), meaning, "{job}");
        }
        for (reason, meaning) in [
            ("user", Job::None),
            ("migration", Job::Leaving),
            ("post-copy", Job::Leaving),
            ("post-copy failed", Job::Leaving),
        ] {
            for job in ["", "<job type='none' async='none'/>"] {
                let status = status(job).replace("'running' reason='booted'", &format!("'paused' reason='{reason}'"));
                assert_eq!(Job::of(&status), meaning, "{status}");
            }
        }
        let arrived = status("<job type='none' async='migration in' phase='finish3'/>");
        for (reason, meaning) in
            [("migrated", Job::Arriving), ("post-copy", Job::None), ("post-copy failed", Job::None)]
        {
            assert_eq!(Job::of(&arrived.replace("booted", reason)), meaning, "{reason}");
        }
        let starting = status("<job type='none' async='start'/>");
        assert_eq!(Job::of(&starting), Job::Unknown, "back to a snapshot");
        let starting = starting.replace("'running' reason='booted'", "'paused' reason='starting up'");
        assert_eq!(Job::of(&starting), Job::None);
        // Cut off in the middle, or something else altogether.
        for status in ["", "<domstatus state='running'>", "<domain type='qemu'>", "<jobs><domain "] {
            assert_eq!(Job::of(status), Job::Unknown, "{status}");
        }
    }

    #[test]
    fn a_process_is_dead_when_it_is_and_its_start_is_known() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let number = i32::try_from(child.id()).unwrap();
        let (pid, pidfd) = hold(Path::new("x"), number).unwrap();
        let age = SystemTime::now().duration_since(started(number).unwrap()).unwrap();
        assert!(age < Duration::from_secs(60), "{age:?}");
        let victim = Victim { driver: Driver::Qemu, name: "x".to_owned(), pid, pidfd, killed: AtomicBool::new(false) };
        assert!(!victim.is_dead() && !victim.is_doomed());
        victim.kill().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        // Two may wait for one death.
        let (one, other) = runtime.block_on(async { tokio::join!(victim.death(), victim.death()) });
        assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
        assert!(victim.is_dead() && victim.is_doomed());
        // Not yet waited for by its parent: dead all the same, and killing it again is no error.
        victim.kill().unwrap();
        child.wait().unwrap();
        victim.kill().unwrap();
        assert!(victim.is_dead());
        assert!(matches!(hold(Path::new("x"), number), Err(VictimError::Pidfd { .. })));
    }

    #[test]
    fn a_process_that_waits_for_storage_is_doomed_once_it_is_killed() {
        let status =
            |own: &str, shared: &str| format!("Name:\tqemu\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigCgt:\t0100\n");
        let stat = |state: &str, flags: u32| format!("7 (a) b) {state} 1 7 7 0 -1 {flags} 0 0");
        let (none, kill, others) = ("0000000000000000", "0000000000000100", "0000000000004002");
        assert!(!is_doomed(&status(none, others), &stat("D", 4_194_560)));
        assert!(is_doomed(&status(kill, none), &stat("D", 4_194_560)), "sent to the thread");
        assert!(is_doomed(&status(none, kill), &stat("S", 4_194_560)), "sent to the process");
        assert!(is_doomed(&status(none, none), &stat("R", 4_194_564)), "it is ending");
        assert!(is_doomed(&status(none, none), &stat("Z", 4_194_560)), "its first thread has ended");
    }

    #[test]
    fn init_and_nonsense_are_no_machines() {
        for number in [i32::MIN, -1, 0, 1] {
            assert!(matches!(hold(Path::new("x"), number), Err(VictimError::Strange { .. })), "{number}");
        }
    }
}
