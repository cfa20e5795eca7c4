//! The control group that libvirt puts a domain's processes into, as `/proc/PID/cgroup` names it.
//!
//! With systemd it is a scope, `machine-qemu\x2d3\x2dnode1.scope`. Without, it is a directory,
//! `/machine/qemu-3-node1.libvirt-qemu`. Both hold the driver, libvirt's number of the instance and
//! a shortened form of the domain's name. Only root can move a process to another group, and the
//! file can be read in every state of the process.

use std::io;
use std::path::Path;

use super::super::driver::Driver;
use super::super::proc;

/// The longest name of a machine, as libvirt builds it: driver, number and name together.
const MACHINE_NAME_MAX: usize = 64;

/// A libvirt domain's control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    /// Which driver made it.
    pub(crate) driver: Driver,
    /// libvirt's number of the instance; for a container the controller's process number.
    pub(crate) id: u32,
    /// What libvirt has left of the domain's name: see [`Scope::is_of`].
    name: String,
}

impl Scope {
    /// The group of a process, if libvirt made it. `directory`: the process's, in `/proc`.
    ///
    /// # Errors
    /// The process lives, and its group cannot be read.
    pub(super) fn read(directory: &Path) -> io::Result<Option<Self>> {
        Ok(proc::read_text(&directory.join("cgroup"))?.and_then(|groups| Self::of(&groups)))
    }

    /// Reads `/proc/PID/cgroup`. The outermost group counts: a guest names the ones below.
    pub(super) fn of(groups: &str) -> Option<Self> {
        let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        paths.filter_map(|path| path.split('/').find_map(Self::of_group)).next()
    }

    fn of_group(group: &str) -> Option<Self> {
        let unescaped;
        let machine = if let Some(machine) = group.strip_suffix(".scope").and_then(|name| name.strip_prefix("machine-"))
        {
            unescaped = unescape(machine);
            unescaped.as_str()
        } else {
            group.strip_suffix(".libvirt-qemu").or_else(|| group.strip_suffix(".libvirt-lxc"))?
        };
        let (driver, rest) = machine.split_once('-')?;
        let driver = match driver {
            "qemu" => Driver::Qemu,
            "lxc" => Driver::Lxc,
            _ => return None,
        };
        // libvirt writes the number alone where it can keep nothing of the name.
        let (id, name) = rest.split_once('-').unwrap_or((rest, ""));
        Some(Self { driver, id: id.parse().ok()?, name: name.to_owned() })
    }

    /// Whether it may be a domain of this name. Several names can have one form: libvirt leaves out
    /// what a host's name cannot hold, and cuts the rest.
    pub(crate) fn is_of(&self, driver: Driver, name: &str) -> bool {
        let taken = format!("{}-{}-", driver.name(), self.id).len();
        self.driver == driver && self.name == shortened(name, MACHINE_NAME_MAX.saturating_sub(taken))
    }
}

/// The machine's own part of a control group's path. libvirt's groups for the domain lie below it.
pub(super) fn group_of_machine(path: &str) -> Option<&str> {
    let mut end = 0;
    for group in path.split_inclusive('/') {
        end += group.len();
        let scope = Scope::of_group(group.trim_end_matches('/'));
        if scope.is_some_and(|scope| scope.driver == Driver::Qemu) {
            return path.get(..end).map(|path| path.trim_end_matches('/'));
        }
    }
    None
}

/// At most `room` bytes of what libvirt makes of a domain's name
/// (`virDomainMachineNameAppendValid`).
fn shortened(name: &str, room: usize) -> String {
    let mut kept = String::new();
    let mut skip = true;
    for character in name.chars() {
        if kept.len() >= room {
            break;
        }
        if matches!(character, '.' | '-') {
            if !skip {
                kept.push(character);
            }
            skip = true;
        } else {
            skip = false;
            if character.is_ascii_alphanumeric() {
                kept.push(character);
            }
        }
    }
    kept.trim_end_matches(['.', '-']).to_owned()
}

/// Undoes systemd's escapes (`\x2d`).
fn unescape(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    let mut rest = name;
    while let Some((before, after)) = rest.split_once("\\x") {
        text.push_str(before);
        match after.get(..2).and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) => {
                text.push(char::from(byte));
                rest = &after[2..];
            }
            None => {
                text.push_str("\\x");
                rest = after;
            }
        }
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(driver: Driver, id: u32, name: &str) -> Option<Scope> {
        Some(Scope { driver, id, name: name.to_owned() })
    }

    #[test]
    fn a_domains_group_is_read_in_each_of_its_forms() {
        for (groups, found) in [
            (
                "0::/machine.slice/machine-qemu\\x2d12\\x2dnode1.scope/libvirt/emulator",
                scope(Driver::Qemu, 12, "node1"),
            ),
            ("5:devices:/\n0::/machine/lxc-99-ct.1.libvirt-lxc", scope(Driver::Lxc, 99, "ct.1")),
            ("0::/machine/qemu-1-a-b.libvirt-qemu/vcpu0 (deleted)", scope(Driver::Qemu, 1, "a-b")),
            // A guest may name its own groups as it likes.
            ("0::/machine/lxc-9-ct.libvirt-lxc/qemu-1-x.libvirt-qemu", scope(Driver::Lxc, 9, "ct")),
            ("0::/machine.slice/machine-lxc\\x2d7.scope", scope(Driver::Lxc, 7, "")),
            ("0::/system.slice/libvirtd.service", None),
            ("0::/machine.slice/machine-xen\\x2d1\\x2da.scope", None),
            ("0::/user.slice/user-0.slice/session-1.scope", None),
            ("", None),
        ] {
            assert_eq!(Scope::of(groups), found, "{groups}");
        }
    }

    #[test]
    fn a_name_is_compared_as_libvirt_shortens_it() {
        let of = |group: &str| Scope::of_group(group).unwrap();
        assert!(of("lxc-7-a-b.libvirt-lxc").is_of(Driver::Lxc, "a-b"));
        assert!(of("lxc-7-ab.libvirt-lxc").is_of(Driver::Lxc, "a_b"));
        assert!(of("lxc-7.libvirt-lxc").is_of(Driver::Lxc, "東京"));
        assert!(!of("lxc-7-ab.libvirt-lxc").is_of(Driver::Qemu, "ab"));
        assert!(!of("lxc-7-ab.libvirt-lxc").is_of(Driver::Lxc, "abc"));
        assert!(of("qemu-7-a.b.libvirt-qemu").is_of(Driver::Qemu, "-a..b-"));
        let long = "n".repeat(100);
        let group = format!("qemu-7-{}.libvirt-qemu", "n".repeat(57));
        assert!(of(&group).is_of(Driver::Qemu, &long));
    }
}
