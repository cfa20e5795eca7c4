//! The packages that each purpose needs, and which of them dpkg does not have.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use super::Profile;

/// One requirement of the system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requirement {
    /// A program whose presence suffices, whatever package it came from.
    tool: Option<&'static str>,
    /// The packages of Debian and Ubuntu that bring it; the first that exists is taken.
    pub(crate) apt: &'static [&'static str],
    /// The package of Fedora and RHEL.
    pub(crate) dnf: &'static str,
}

const fn tool(tool: &'static str, apt: &'static [&'static str], dnf: &'static str) -> Requirement {
    Requirement { tool: Some(tool), apt, dnf }
}

const fn package(apt: &'static [&'static str], dnf: &'static str) -> Requirement {
    Requirement { tool: None, apt, dnf }
}

/// For compiling. The BPF toolchain is [`super::toolchain`]'s.
const BUILD: &[Requirement] = &[
    package(&["libvirt-dev"], "libvirt-devel"),
    tool("pkg-config", &["pkg-config"], "pkgconf-pkg-config"),
    tool("cc", &["gcc"], "gcc"),
];

/// For checking scripts, and pip for the checkers that Debian lacks.
const LINT: &[Requirement] =
    &[tool("shellcheck", &["shellcheck"], "ShellCheck"), tool("pip3", &["python3-pip"], "python3-pip")];

/// For building packages.
const DIST: &[Requirement] = &[
    tool("dh", &["debhelper"], "debhelper"),
    tool("rpmbuild", &["rpm"], "rpm-build"),
    tool("strip", &["binutils"], "binutils"),
    tool("git", &["git"], "git-core"),
];

/// For running the lab: namespaces, tools to look inside, and the stock client. The lab uses
/// libvirt's in-process driver, so it needs no libvirtd.
const LAB: &[Requirement] = &[
    tool("ip", &["iproute2"], "iproute"),
    tool("bpftool", &["bpftool", "linux-tools-common"], "bpftool"),
    tool("fence_xvm", &["fence-virt"], "fence-virt"),
    tool("tini", &["tini"], "tini"),
    tool("unshare", &["util-linux"], "util-linux-core"),
];

/// For tests with a real libvirtd, QEMU, LXC and fence_virtd.
const TEST: &[Requirement] = &[
    tool("fence_virtd", &["fence-virtd"], "fence-virtd fence-virtd-libvirt fence-virtd-multicast"),
    package(&["libvirt-daemon"], "libvirt-daemon"),
    package(&["libvirt-daemon-system"], "libvirt-daemon-config-network"),
    package(&["libvirt-daemon-driver-qemu"], "libvirt-daemon-driver-qemu"),
    package(&["libvirt-daemon-driver-lxc"], "libvirt-daemon-driver-lxc"),
    tool("virsh", &["libvirt-clients"], "libvirt-client"),
    tool("qemu-system-x86_64", &["qemu-system-x86"], "qemu-system-x86"),
    // Programs that libvirt runs beside a machine.
    tool("swtpm", &["swtpm"], "swtpm"),
    tool("nbdkit", &["nbdkit"], "nbdkit-server nbdkit-basic-plugins"),
    tool("swtpm_setup", &["swtpm-tools"], "swtpm-tools"),
    // Debian 12 has it in qemu-system-common.
    package(&["virtiofsd", "qemu-system-common"], "virtiofsd"),
    // The guests' whole user space, so busybox must be statically linked.
    package(&["busybox-static"], "busybox"),
    // The cluster of hosts. Its libraries, which the daemon loads, come with it.
    tool("corosync", &["corosync"], "corosync"),
    tool("tcpdump", &["tcpdump"], "tcpdump"),
    // Firewalls that block fencing, for the doctor to find.
    tool("nft", &["nftables"], "nftables"),
    tool("iptables", &["iptables"], "iptables-nft"),
    // Checks the packages' manual pages.
    tool("mandoc", &["mandoc"], "mandoc"),
    // The pages pipe JSON into it.
    tool("jq", &["jq"], "jq"),
    // Checks the journal's catalogue.
    tool("journalctl", &["systemd"], "systemd"),
    // Reads the metrics, and checks them (promtool).
    tool("prometheus", &["prometheus"], "golang-github-prometheus"),
    // For the root directory of cluster nodes, and a disk made of it.
    tool("mmdebstrap", &["mmdebstrap"], "mmdebstrap"),
    tool("mke2fs", &["e2fsprogs"], "e2fsprogs"),
];

/// The requirements of `profile`.
pub(crate) fn requirements(profile: Profile) -> Vec<Requirement> {
    let parts: &[&[Requirement]] = match profile {
        Profile::Build => &[BUILD],
        Profile::Lint => &[BUILD, LINT],
        Profile::Dist => &[BUILD, DIST],
        Profile::Lab => &[BUILD, LAB],
        Profile::Test => &[BUILD, LAB, DIST, TEST],
    };
    parts.concat()
}

/// The part of `required` that is neither there as a tool (by `is_tool`) nor as a package.
pub(crate) fn missing(
    required: &[Requirement],
    installed: &BTreeSet<String>,
    is_tool: impl Fn(&str) -> bool,
) -> Vec<Requirement> {
    let there =
        |one: &Requirement| one.tool.is_some_and(&is_tool) || one.apt.iter().any(|name| installed.contains(*name));
    required.iter().filter(|one| !there(one)).copied().collect()
}

/// The packages of `names` that dpkg has installed; none without dpkg.
pub(crate) fn installed<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${db:Status-Abbrev} ${Package}\n", "--"]).args(names);
    // dpkg-query fails for an unknown name, and prints the others all the same.
    let output = query.stdin(Stdio::null()).stderr(Stdio::null()).output();
    output.map(|output| parse_installed(&String::from_utf8_lossy(&output.stdout))).unwrap_or_default()
}

/// Parses lines of a status abbreviation (`ii `: wanted, and installed) and a name.
fn parse_installed(text: &str) -> BTreeSet<String> {
    let line = |line: &str| {
        let (status, name) = line.split_once(' ')?;
        status.ends_with('i').then(|| name.trim().to_owned())
    };
    text.lines().filter_map(line).collect()
}

/// For each of `names`, the version that apt would install, if there is one.
pub(crate) fn candidates(names: &[&str]) -> Vec<Option<String>> {
    let output = Command::new("apt-cache").arg("policy").args(names).env("LC_ALL", "C").stdin(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    names.iter().map(|name| parse_candidate(&text, name)).collect()
}

/// The candidate version of `name` in the output of `apt-cache policy`.
fn parse_candidate(text: &str, name: &str) -> Option<String> {
    let block = text.lines().skip_while(|line| line.strip_suffix(':') != Some(name)).skip(1);
    let mut own = block.take_while(|line| line.starts_with(' '));
    let version = own.find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let text = "ii  gcc\nrc  fence-virtd\nun  kmod\nhi  tini\niU  libvirt-dev\n";
        assert_eq!(parse_installed(text), BTreeSet::from(["gcc".to_owned(), "tini".to_owned()]));
    }

    #[test]
    fn a_tool_is_missing_if_dpkg_and_the_path_lack_it() {
        let required = requirements(Profile::Lab);
        let installed = BTreeSet::from(["libvirt-dev".to_owned(), "linux-tools-common".to_owned()]);
        let missing = missing(&required, &installed, |tool| matches!(tool, "cc" | "ip"));
        let names: Vec<_> = missing.iter().map(|one| one.apt[0]).collect();
        assert_eq!(names, ["pkg-config", "fence-virt", "tini", "util-linux"]);
    }

    #[test]
    fn building_and_the_lab_never_ask_for_a_daemon() {
        for profile in [Profile::Build, Profile::Lint, Profile::Dist, Profile::Lab] {
            for one in requirements(profile) {
                assert!(
                    !one.apt.iter().any(|name| name.contains("daemon") || *name == "fence-virtd"),
                    "{profile:?}: {one:?}"
                );
            }
        }
    }

    /// The quoted programs in `text` between `start` and `end`.
    fn quoted<'a>(text: &'a str, start: &str, end: &str) -> Vec<&'a str> {
        let list = text.split_once(start).and_then(|(_, rest)| rest.split_once(end)).unwrap().0;
        list.split('"').skip(1).step_by(2).collect()
    }

    #[test]
    fn setup_installs_what_the_lab_needs() {
        // Part of every Debian and Ubuntu.
        const ESSENTIAL: [&str; 4] = ["apt-cache", "apt-get", "dpkg-deb", "ldd"];
        let brings = |profile, name: &str| {
            ESSENTIAL.contains(&name)
                || requirements(profile).iter().any(|one| one.tool == Some(name) || one.apt.contains(&name))
        };
        for text in
            [include_str!("../../../tests/lab/src/lab.rs"), include_str!("../../../tests/lab/src/bin/fence-lab.rs")]
        {
            for program in quoted(text, "tools::require(&[", "])") {
                assert!(brings(Profile::Lab, program), "the lab needs {program}");
            }
        }
        let text = quoted(include_str!("../../../tests/lab/src/tools.rs"), "PACKAGES: &[(&str, &str)] = &[", "];");
        assert!(text.len() > 10 && text.len().is_multiple_of(2), "{text:?}");
        for pair in text.chunks(2) {
            let [program, package] = pair else { unreachable!() };
            assert!(brings(Profile::Test, program) || brings(Profile::Test, package), "the tests need {program}");
        }
    }

    #[test]
    fn candidates_are_read_per_package() {
        let text = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n\
                    cargo-web:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert_eq!(parse_candidate(text, "rustc-web").as_deref(), Some("1.96.0+dfsg1-1~deb12u2"));
        assert_eq!(parse_candidate(text, "cargo-web"), None);
        assert_eq!(parse_candidate(text, "rust"), None);
    }
}
