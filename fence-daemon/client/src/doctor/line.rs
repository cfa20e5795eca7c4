//! A serial line as a way in: what keeps the guest's end of it from working, and who else uses it.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use super::finding::Finding;
use super::program::Said;
use super::sight::{self, Owner};

/// The check's name.
pub(super) const CHECK: &str = "serial";

/// Where the kernel lists the devices that its messages go to.
const CONSOLES: &str = "/proc/consoles";
/// The clients, whose turn ends by itself.
const CLIENTS: [&str; 2] = ["fence_virt", "fence_xvm"];

/// What to do about a device that is not there.
const ABSENT: &str = "give this guest's domain a second serial port with a UNIX socket on the hypervisor, and start the domain again \
                      from power-off (docs/guide/ways-in.md, serial)";

/// What uses the line beside the cluster, and would take answers or send other bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Other {
    /// The kernel writes its messages there.
    Console,
    /// A process has it open.
    Process(Owner),
}

impl Other {
    /// Everything that uses this device.
    pub(super) fn of(device: &Path) -> Vec<Self> {
        let device = fs::canonicalize(device).unwrap_or_else(|_| device.to_owned());
        let is_console = is_console(&sight::text(CONSOLES).unwrap_or_default(), &device);
        let processes = sight::users(&device).into_iter().filter(|owner| !CLIENTS.contains(&owner.name.as_str()));
        is_console.then_some(Self::Console).into_iter().chain(processes.map(Self::Process)).collect()
    }

    fn finding(&self, device: &Path, is_answered: bool) -> Finding {
        let name = device.file_name().unwrap_or_default().to_string_lossy();
        let (seen, remedy, command) = match self {
            Self::Console => {
                let remedy = "its messages mix with requests and answers: name another device for them at boot, \
                              and the domain's second serial port here";
                (
                    format!("the kernel's console is on {}", device.display()),
                    remedy,
                    "grep -o 'console=[^ ]*' /proc/cmdline".to_owned(),
                )
            }
            Self::Process(Owner { pid, name: program }) => {
                let seen = format!("{program} (process {pid}) has {} open", device.display());
                let command = if program.contains("getty") || program == "login" {
                    format!("systemctl mask --now serial-getty@{name}.service")
                } else {
                    format!("kill {pid}")
                };
                (seen, "it may read the answers before the client does: stop it", command)
            }
        };
        let finding = if is_answered { Finding::warning } else { Finding::wrong };
        finding(CHECK, seen, remedy).command(command)
    }
}

/// Whether the kernel's table of consoles has this device.
fn is_console(table: &str, device: &Path) -> bool {
    let name = device.file_name().and_then(|name| name.to_str());
    table.lines().filter_map(|line| line.split_whitespace().next()).any(|console| Some(console) == name)
}

/// A finding for each other user of the line. They matter less where it is answered all the same.
pub(super) fn others(device: &Path, others: &[Other], is_answered: bool) -> Vec<Finding> {
    others.iter().map(|other| other.finding(device, is_answered)).collect()
}

/// What keeps the device from being asked over at all.
pub(super) fn obstacle(device: &Path) -> Option<Finding> {
    let shown = device.display();
    match fs::metadata(device) {
        Ok(about) if about.file_type().is_char_device() => None,
        Ok(_) => Some(Finding::wrong(CHECK, format!("{shown} is no device"), "name a serial port, such as /dev/ttyS1")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Some(Finding::wrong(CHECK, format!("there is no {shown}"), ABSENT))
        }
        Err(error) => Some(Finding::wrong(CHECK, format!("{shown}: {error}"), "ask as root")),
    }
}

/// Why `fence_virt` got no answer. `command` asks again.
pub(super) fn failed(device: &Path, said: &Said, command: String) -> Finding {
    let shown = device.display();
    let line = |words: &str| said.stderr.lines().find_map(|line| line.strip_prefix(words));
    let (seen, remedy) = if let Some(why) = line("tcsetattr: ") {
        // The kernel makes device files for ports that the machine does not have.
        let remedy = if why.contains("Input/output") { ABSENT } else { "name a serial port, such as /dev/ttyS1" };
        (format!("{shown} is no serial port of this machine ({why})"), remedy)
    } else if let Some(why) = line("Failed to lock serial port: ") {
        let remedy = "another client is asking by it: ask again when that has ended";
        (format!("{shown} is in use ({why})"), remedy)
    } else if let Some(why) = line("open: ") {
        (format!("{shown} cannot be opened ({why})"), "ask as root")
    } else if said.code == Some(3) {
        let remedy = "the daemon's `groups` let this domain ask nothing: write it there as `from = \"NAME\"`";
        (format!("{shown}: answered, and not permitted"), remedy)
    } else if said.code == Some(1) {
        let remedy = "the daemon answered that it failed: `fence-daemon status` on the hypervisor says why";
        (format!("{shown}: answered, and failed"), remedy)
    } else {
        let remedy = "the daemon does not hear this line. On the hypervisor it needs the listener `serial`, whose `path` is the \
                      directory of this port's socket. A domain's first serial port is its console, which is never heard. \
                      `fence-daemon status` there counts the lines";
        (format!("{shown}: no answer"), remedy)
    };
    Finding::wrong(CHECK, seen, remedy).command(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::State;

    const DEVICE: &str = "/dev/ttyS1";

    #[test]
    fn what_is_no_device_is_not_asked_over() {
        let folder = tempfile::tempdir().unwrap();
        let nothing = obstacle(&folder.path().join("ttyS1")).unwrap();
        assert!(nothing.seen.contains("there is no ") && nothing.remedy.unwrap().contains("second serial port"));
        assert!(obstacle(folder.path()).unwrap().seen.contains("is no device"));
        assert_eq!(obstacle(Path::new("/dev/null")), None);
    }

    /// As `fence_virt` 4.12.1 says it.
    #[test]
    fn each_failure_of_the_client_has_its_own_remedy() {
        let why = |code: i32, stderr: &str| {
            let said = Said { code: Some(code), stdout: String::new(), stderr: stderr.to_owned() };
            let finding = failed(Path::new(DEVICE), &said, "ask".to_owned());
            assert_eq!((finding.state, &finding.commands), (State::Wrong, &vec!["ask".to_owned()]));
            format!("{}: {}", finding.seen, finding.remedy.unwrap())
        };
        assert!(
            why(255, "tcsetattr: Input/output error\nopen_port: Invalid argument\n").contains("second serial port")
        );
        assert!(why(255, "tcsetattr: Inappropriate ioctl for device\n").contains("name a serial port"));
        assert!(why(255, "Failed to lock serial port: Resource temporarily unavailable\n").contains("another client"));
        assert!(why(255, "open: Permission denied\n").contains("as root"));
        assert!(why(3, "").contains("from = \"NAME\""));
        assert!(why(1, "").contains("answered, and failed"));
        // A device without modem lines makes a harmless remark.
        assert!(why(255, "ioctl1: Inappropriate ioctl for device\n").contains("does not hear this line"));
    }

    #[test]
    fn other_users_of_a_line_are_named() {
        let table = "ttyS1                -W- (EC  p a)    4:65\ntty0                 -WU (E   p  )    4:1\n";
        assert!(is_console(table, Path::new(DEVICE)) && !is_console(table, Path::new("/dev/ttyS10")));
        let getty = Other::Process(Owner { pid: 7, name: "agetty".to_owned() });
        let told = others(Path::new(DEVICE), &[Other::Console, getty.clone()], false);
        assert!(told.iter().all(|finding| finding.state == State::Wrong), "{told:?}");
        assert_eq!(told[1].commands, ["systemctl mask --now serial-getty@ttyS1.service"]);
        assert!(told[1].seen.contains("agetty (process 7) has /dev/ttyS1 open"));
        assert_eq!(others(Path::new(DEVICE), &[getty], true)[0].state, State::Warning);
        // This test's own descriptor.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("line");
        let _held = fs::File::create(&path).unwrap();
        let own = std::process::id();
        assert!(Other::of(&path).iter().any(|other| matches!(other, Other::Process(owner) if owner.pid == own)));
    }
}
