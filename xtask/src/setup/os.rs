//! The operating system, as /etc/os-release describes it.

use std::fmt;
use std::fs;
use std::path::Path;

/// The kinds of operating system that setup distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// Debian, Ubuntu and their derivatives: setup installs with apt.
    Debian,
    /// Fedora, RHEL and their derivatives: setup names dnf's packages.
    Fedora,
    /// Any other system: setup names its requirements.
    Other,
}

/// A system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Os {
    pub(crate) family: Family,
    name: String,
}

impl Os {
    /// The system with root directory `root`.
    pub(crate) fn of(root: &Path) -> Self {
        let files = ["etc/os-release", "usr/lib/os-release"];
        Self::parse(&files.iter().find_map(|file| fs::read_to_string(root.join(file)).ok()).unwrap_or_default())
    }

    /// Parses an os-release file (os-release(5): shell assignments).
    pub(crate) fn parse(text: &str) -> Self {
        let value = |key: &str| {
            let assigned = text.lines().filter_map(|line| line.trim().split_once('=')).rfind(|(name, _)| *name == key);
            assigned.map(|(_, value)| value.trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
        };
        let ids = format!("{} {}", value("ID").unwrap_or_default(), value("ID_LIKE").unwrap_or_default());
        let is = |known: &[&str]| ids.split_whitespace().any(|id| known.contains(&id));
        let family = if is(&["debian", "ubuntu"]) {
            Family::Debian
        } else if is(&["fedora", "rhel", "centos"]) {
            Family::Fedora
        } else {
            Family::Other
        };
        let name = value("PRETTY_NAME").or_else(|| value("NAME")).unwrap_or_else(|| "an unknown system".to_owned());
        Self { family, name }
    }
}

impl fmt::Display for Os {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_told_by_id_and_by_what_it_is_like() {
        let family = |text| Os::parse(text).family;
        assert_eq!(family("ID=debian\n"), Family::Debian);
        assert_eq!(family("NAME=x\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"), Family::Debian);
        assert_eq!(family("ID='fedora'"), Family::Fedora);
        assert_eq!(family("ID=\"almalinux\"\nID_LIKE=\"rhel centos fedora\""), Family::Fedora);
        assert_eq!(family("ID=arch"), Family::Other);
        // VARIANT_ID and the like are other keys.
        assert_eq!(family("VARIANT_ID=debian\nID=nixos"), Family::Other);
        assert_eq!(family(""), Family::Other);
    }

    #[test]
    fn the_name_is_the_pretty_one() {
        let os = Os::parse("PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME=\"Debian GNU/Linux\"\nID=debian\n");
        assert_eq!(os.to_string(), "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(Os::parse("# nothing").to_string(), "an unknown system");
    }
}
