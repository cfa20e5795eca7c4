//! What `/proc` says of one process.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::buffer::spare_capacity;
use rustix::io::pread;
use uuid::Uuid;

/// How much of a file is read at a time, in bytes.
const CHUNK: usize = 16 * 1024;

/// How much later than its PID file was written a process may seem to have been started: clocks
/// are coarse.
pub(super) const START_SLACK: Duration = Duration::from_secs(2);

/// A command line that names a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommandLine {
    /// Its `-uuid`.
    pub(crate) uuid: Uuid,
    /// Its `-name guest=`, which libvirt writes for each machine, and nobody types.
    pub(crate) name: Option<String>,
}

impl CommandLine {
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

/// The guest's name in the value of QEMU's `-name`. A comma within it is written twice.
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
    flags: u64,
    /// When it was started, in clock ticks since boot.
    pub(super) started: u64,
}

impl Stat {
    pub(super) fn of(text: &str) -> Option<Self> {
        // Behind the name, which may hold anything, come field 3 (state), 9 (flags), 22 (start).
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?.chars().next()?;
        let flags = fields.nth(5)?.parse().ok()?;
        let started = fields.nth(12)?.parse().ok()?;
        Some(Self { state, flags, started })
    }

    /// Reads it in a directory of `/proc`. `None`: the process has ended.
    pub(super) fn read(directory: &Path) -> io::Result<Option<Self>> {
        Ok(read_text(&directory.join("stat"))?.and_then(|text| Self::of(&text)))
    }

    /// Whether it is a thread of the kernel's own.
    pub(super) fn is_kernels(&self) -> bool {
        const PF_KTHREAD: u64 = 0x0020_0000;
        self.flags & PF_KTHREAD != 0
    }

    /// Whether it is ending, or its first thread has ended.
    pub(super) fn is_ending(&self) -> bool {
        const PF_EXITING: u64 = 4;
        self.flags & PF_EXITING != 0 || matches!(self.state, 'Z' | 'X')
    }

    /// When it was started, by the wall clock.
    pub(super) fn wall_clock(&self) -> SystemTime {
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        let since_boot = Duration::from_millis(self.started.saturating_mul(1000) / ticks);
        let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let up = Duration::new(u64::try_from(boot.tv_sec).unwrap_or(0), u32::try_from(boot.tv_nsec).unwrap_or(0));
        SystemTime::now() - up.saturating_sub(since_boot)
    }
}

/// Reads a small file of a process. `None`: the process has ended.
///
/// # Errors
/// The process lives, and this file of it cannot be read.
pub(super) fn read(path: &Path, into: &mut Vec<u8>) -> io::Result<Option<()>> {
    into.clear();
    into.reserve(CHUNK);
    // `take` for its plain loop: of such a file there is no size to be asked for beforehand.
    let fill = |into: &mut Vec<u8>| File::open(path)?.take(u64::MAX).read_to_end(into).map(drop);
    gone_is_none(fill(into))
}

/// Reads such a file from its beginning through an open handle.
///
/// # Errors
/// The process has ended (`ESRCH`), or the file cannot be read.
pub(super) fn read_again(file: &File, into: &mut Vec<u8>) -> io::Result<()> {
    into.clear();
    loop {
        into.reserve(CHUNK);
        let (at, room) = (u64::try_from(into.len()).map_err(io::Error::other)?, into.capacity() - into.len());
        // Less than there was room for: such a file ends there.
        if pread(file, spare_capacity(into), at)? < room {
            return Ok(());
        }
    }
}

/// The same as text.
pub(super) fn read_text(path: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    Ok(read(path, &mut bytes)?.map(|()| String::from_utf8_lossy(&bytes).into_owned()))
}

/// `None` for a process or a file of it that is gone. Any other error stays one.
pub(super) fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound || is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the kernel says that there is no such process.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ESRCH)
}

/// Whether a process is the first one of a PID namespace right below ours, by its `status`.
pub(super) fn is_first_of_container(status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let mut numbers = numbers.split_whitespace().skip(1);
    numbers.next() == Some("1") && numbers.next().is_none()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const UUID: &str = "5b3a3d3e-2c1f-4a69-8d3c-0a1b2c3d4e5f";

    fn line(arguments: &[&str]) -> Option<CommandLine> {
        CommandLine::of(format!("{}\0", arguments.join("\0")).as_bytes())
    }

    #[test]
    fn a_machine_is_told_by_its_arguments_and_not_by_its_program() {
        let uuid = Uuid::parse_str(UUID).unwrap();
        let named = |name: Option<&str>| Some(CommandLine { uuid, name: name.map(str::to_owned) });
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
        let stat = Stat::of(stat).unwrap();
        assert_eq!((stat.state, stat.is_kernels(), stat.started), ('S', true, 4242));
        let own = Stat::of(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        assert!(!own.is_kernels() && own.started > 0, "{own:?}");
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

    #[test]
    fn a_forbidden_file_is_an_error_and_a_missing_one_is_not() {
        let with = |kind: io::ErrorKind| gone_is_none::<()>(Err(kind.into()));
        assert!(matches!(with(io::ErrorKind::NotFound), Ok(None)));
        assert!(with(io::ErrorKind::PermissionDenied).is_err());
    }
}
