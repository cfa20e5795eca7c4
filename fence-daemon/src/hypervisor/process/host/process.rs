//! What `/proc` says of one process, and the process held by a pidfd.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use uuid::Uuid;

use super::scope::Scope;

/// How much of a file is read at a time.
const CHUNK: usize = 16 * 1024;

/// A command line that names a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// Its `-uuid`.
    pub(crate) uuid: Uuid,
    /// Its `-name guest=`, which libvirt writes for each machine, and nobody types.
    pub(crate) name: Option<String>,
}

impl Line {
    /// Reads the arguments of a process. Of several `-uuid` QEMU takes the last.
    pub(super) fn of(arguments: &[u8]) -> Option<Self> {
        let value_of = |flag: &[u8]| {
            let mut all = arguments.split(|byte| *byte == 0);
            let mut value = None;
            while let Some(argument) = all.next() {
                if argument == flag {
                    value = all.clone().next().or(value);
                }
            }
            value
        };
        let uuid = Uuid::try_parse_ascii(value_of(b"-uuid")?).ok()?;
        let name = value_of(b"-name").map(String::from_utf8_lossy).and_then(|value| guest(&value));
        Some(Self { uuid, name })
    }
}

/// The guest's name in the value of QEMU's `-name`: a comma within it is written twice.
fn guest(value: &str) -> Option<String> {
    let mut name = String::new();
    let mut rest = value.strip_prefix("guest=")?.chars().peekable();
    while let Some(character) = rest.next() {
        if character == ',' && rest.next_if_eq(&',').is_none() {
            break;
        }
        name.push(character);
    }
    Some(name)
}

/// What `/proc/PID/stat` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// The state of its first thread.
    pub(super) state: char,
    /// Whether it is a thread of the kernel's own.
    pub(super) is_kernels: bool,
    /// When it was started, in clock ticks since boot.
    pub(super) started: u64,
}

impl Stat {
    pub(super) fn of(text: &str) -> Option<Self> {
        const PF_KTHREAD: u64 = 0x0020_0000;
        // Behind the name, which may hold anything, come the state (field 3) and so on; field 9 are the flags, 22 is the start.
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?.chars().next()?;
        let flags: u64 = fields.nth(5)?.parse().ok()?;
        let started = fields.nth(12)?.parse().ok()?;
        Some(Self { state, is_kernels: flags & PF_KTHREAD != 0, started })
    }
}

/// Reads a small file of a process: `None` if the process has ended.
///
/// # Errors
/// It lives, and this file of it cannot be read.
pub(super) fn read(path: &Path, into: &mut Vec<u8>) -> io::Result<Option<()>> {
    into.clear();
    into.reserve(CHUNK);
    // `take` for its plain loop: of such a file there is no size to be asked for beforehand.
    let fill = |into: &mut Vec<u8>| File::open(path)?.take(u64::MAX).read_to_end(into).map(drop);
    match fill(into) {
        Ok(()) => Ok(Some(())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The same as text.
pub(super) fn read_text(path: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    Ok(read(path, &mut bytes)?.map(|()| String::from_utf8_lossy(&bytes).into_owned()))
}

/// The control group of a process, if it is one that libvirt made.
pub(super) fn scope(directory: &Path) -> io::Result<Option<Scope>> {
    Ok(read_text(&directory.join("cgroup"))?.and_then(|groups| Scope::of(&groups)))
}

/// Whether a process is the first one of a PID namespace right below ours, by its `/proc/PID/status`.
pub(super) fn is_first_of_container(status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let mut numbers = numbers.split_whitespace().skip(1);
    numbers.next() == Some("1") && numbers.next().is_none()
}

/// A process of a domain, held: the number cannot come to mean another one.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens a pidfd. What the process is must be looked at after that, and the process be found alive after that.
    ///
    /// # Errors
    /// It has ended (`ESRCH`), or cannot be held.
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        // Number 1 is the init of the system or of a container that we run in, and no machine.
        let pid = if pid > 1 { Pid::from_raw(pid) } else { None };
        let pid = pid.ok_or_else(|| io::Error::other("it is no machine's process number"))?;
        Ok(Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Its number, for people.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether every thread of it is dead, and for the first process of a container every process in there.
    pub(crate) fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error is no proof of anything.
        matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().contains(PollFlags::IN)
    }

    /// Sends SIGKILL. That it is dead already is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it is dead.
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

    /// A line about it, for people: its number, program and user.
    pub(crate) fn describe(&self) -> String {
        describe(self.pid())
    }
}

/// A line about a process, for people. Reads nothing that could wait for the process.
pub(super) fn describe(pid: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{pid} ({})", name.trim().escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "5b3a3d3e-2c1f-4a69-8d3c-0a1b2c3d4e5f";

    fn line(arguments: &[&str]) -> Option<Line> {
        Line::of(format!("{}\0", arguments.join("\0")).as_bytes())
    }

    #[test]
    fn a_machine_is_told_by_its_arguments_and_not_by_its_program() {
        let uuid = Uuid::parse_str(UUID).unwrap();
        let named = |name: Option<&str>| Some(Line { uuid, name: name.map(str::to_owned) });
        let as_libvirt = ["-name", "guest=a,,b,debug-threads=on", "-S", "-uuid", UUID];
        for program in ["/usr/bin/qemu-system-x86_64", ".qemu-system-x86_64-wrapped", "/bin/sh", "strace", ""] {
            assert_eq!(line(&[&[program], &as_libvirt[..]].concat()), named(Some("a,b")), "{program}");
        }
        assert_eq!(line(&["grep", "-uuid", UUID]), named(None));
        assert_eq!(line(&["qemu", "-uuid", &UUID.to_uppercase()]), named(None));
        assert_eq!(line(&["qemu", "-name", "x", "-uuid", UUID]), named(None));
        for other in [
            &["sh", "-c", "qemu -uuid 5b3a3d3e-2c1f-4a69-8d3c-0a1b2c3d4e5f"][..],
            &["qemu", "-uuid"],
            &["-uuid", "x"],
            &[],
        ] {
            assert_eq!(line(other), None, "{other:?}");
        }
        let other = Uuid::from_u128(1).to_string();
        assert_eq!(line(&["qemu", "-uuid", &other, "-uuid", UUID]), named(None), "the last one counts");
    }

    #[test]
    fn a_process_is_read_whatever_its_name_holds() {
        let stat = "7 (a) b) S 1 7 7 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(Stat::of(stat), Some(Stat { state: 'S', is_kernels: true, started: 4242 }));
        let own = Stat::of(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert!(!own.is_kernels && own.started > 0, "{own:?}");
        assert_eq!(Stat::of("7 (a"), None);
    }

    #[test]
    fn a_containers_first_process_has_two_numbers_and_the_last_is_one() {
        for (status, is_it) in [
            ("Name:\tx\nNSpid:\t17\t1\n", true),
            ("NSpid:\t17\n", false),
            ("NSpid:\t1\n", false),
            ("NSpid:\t17\t3\n", false),
            ("NSpid:\t17\t9\t1\n", false),
            ("", false),
        ] {
            assert_eq!(is_first_of_container(status), is_it, "{status:?}");
        }
    }
}
