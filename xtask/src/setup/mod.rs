//! `cargo xtask setup`: checks the requirements of a purpose, and installs missing ones on Debian
//! and Ubuntu.
//!
//! Setup checks first and changes nothing if nothing is missing. This takes a fraction of a second,
//! as every other task calls it. It reports what it cannot get before it installs anything. It
//! starts no service on any system: a build must not give a hypervisor a second fencing daemon.

pub(crate) mod os;
pub(crate) mod packages;
pub(crate) mod toolchain;
pub(crate) mod wheels;

use std::env;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use self::os::{Family, Os};
use self::packages::Requirement;
use self::toolchain::{BPF_LINKER, LINKER_LLVM, Toolchain, Version};
use crate::hypervisor;
use crate::name_of;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::workspace::Workspace;

/// The purpose of a machine. Of the purposes that tests name, a later one includes the earlier
/// ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Profile {
    /// Compile everything, the BPF program included
    Build,
    /// Compile, and run clippy on the BPF program
    Lint,
    /// Compile, and build packages
    Dist,
    /// Compile, and run the lab of `cargo xtask run`
    Lab,
    /// Compile, run the lab, and test against a real libvirtd, QEMU and LXC
    Test,
}

/// Debian's second Rust toolchain, with the library's source.
const RUST_WEB: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// The package of that toolchain's clippy.
const CLIPPY_WEB: &str = "rust-web-clippy";
/// The same of [`RUST`].
const CLIPPY: &str = "rust-clippy";
/// Debian's first toolchain, where it is new enough, with the library's source.
const RUST: [&str; 3] = ["rustc", "cargo", "rust-src"];
/// Each toolchain, and the packages that it cannot be beside.
const TOOLCHAINS: [([&str; 3], &[&str]); 2] =
    [(RUST, &["rustup", "rustc-web"]), (RUST_WEB, &["rustc", "cargo", "rustup"])];

/// A script that runs as root with the packages as arguments. No service starts: a policy-rc.d (the
/// system's own hook) refuses while packages are installed, unless the system has one. A second
/// fencing daemon, corosync and Prometheus would also start at the next boot, so the script
/// disables them. apt may not remove other packages to make room. One exception is qemu-utils from
/// backports, which lack the emulator: it is brought to the installed QEMU's version, as apt would
/// remove it. An unreachable repository is fatal only if a package is missing for it.
const INSTALL: &str = r#"
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ] || grep -q 'fence-xdp setup' "$policy"; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\n# fence-xdp setup: no service is started while it installs.\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
case " $* " in *' qemu-system-x86 '*)
    wanted=$(LC_ALL=C apt-cache policy qemu-system-common | sed -n 's/^  Candidate: //p')
    there=$(dpkg-query --show --showformat '${Version}' qemu-utils 2>/dev/null || true)
    if [ -n "$there" ] && dpkg --compare-versions "$there" gt "$wanted"; then
        echo "qemu-utils $there cannot be beside QEMU $wanted, and is brought to that version"
        set -- --allow-downgrades "qemu-utils=$wanted" "$@"
    fi ;;
esac
apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 install --yes --no-install-recommends --no-remove "$@"
for unit in fence_virtd.service:fence-virtd corosync.service:corosync prometheus.service:prometheus; do
    case " $* " in *" ${unit#*:} "*)
        if [ -d /run/systemd/system ]; then systemctl disable --quiet "${unit%:*}"; fi ;;
    esac
done
"#;

/// Another apt may hold the lock of the lists, which apt itself does not wait for.
const UPDATE: &str = r"
for attempt in 1 2 3; do
    if apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update; then exit 0; fi
    sleep 5
done
exit 1
";

/// The profile of `cargo xtask setup` without arguments: everything, except on a hypervisor, which
/// must not get test servers unasked.
pub(crate) fn default_profile() -> Profile {
    match hypervisor::detect(Path::new("/")) {
        Ok(_) => {
            say(
                "this machine is a hypervisor: setting it up for builds only (`--for test` adds QEMU, LXC and fence_virtd for the tests)",
            );
            Profile::Build
        }
        Err(_) => Profile::Test,
    }
}

/// Installs the requirements of `profile`.
///
/// # Errors
/// A requirement is missing that setup cannot install. The error has the remedy.
pub(crate) fn ensure(workspace: &Workspace, profile: Profile) -> anyhow::Result<()> {
    let missing = Missing::look(workspace, profile);
    if missing.is_empty() {
        say(format!("setup for {}: nothing is missing", name_of(&profile)));
        return Ok(());
    }
    let os = Os::of(Path::new("/"));
    match os.family {
        Family::Debian if tool("apt-get").is_some() => missing.install(workspace, &os)?,
        Family::Debian | Family::Fedora | Family::Other => bail!("{}", missing.remedy(&os)),
    }
    let mut still = Missing::look(workspace, profile);
    if std::mem::take(&mut still.clippy) {
        say(format!(
            "{os} has no clippy for its toolchain: lint will compile the BPF program with warnings denied instead"
        ));
    }
    if !still.is_empty() {
        bail!("setup succeeded, but requirements are still missing: {}", still.remedy(&os));
    }
    say(format!("setup for {}: nothing is missing now", name_of(&profile)));
    Ok(())
}

/// The path of a program on PATH, or in the directories that only root's PATH has.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut places = env::split_paths(&path).chain(sbin).map(|folder| folder.join(name));
    places.find(|place| place.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0))
}

/// The missing requirements of a purpose on this machine.
#[derive(Debug)]
struct Missing {
    system: Vec<Requirement>,
    /// No compiler with the library's source.
    rust: bool,
    /// No linker for the BPF target, or a version that is too old.
    linker: bool,
    /// No clippy for the distribution's toolchain.
    clippy: bool,
    /// Not every checker that pip installs.
    wheels: bool,
    /// LLVM's major version of the compiler, if there is one.
    llvm: Option<u32>,
}

impl Missing {
    fn look(workspace: &Workspace, profile: Profile) -> Self {
        let required = packages::requirements(profile);
        let installed = packages::installed(required.iter().flat_map(|one| one.apt).copied());
        let toolchain = Toolchain::find();
        let debians = toolchain.as_ref().is_none_or(Toolchain::is_system);
        Self {
            system: packages::missing(&required, &installed, |name| tool(name).is_some()),
            rust: toolchain.is_none(),
            linker: toolchain::bpf_linker().is_none_or(|linker| linker.version < BPF_LINKER),
            clippy: profile == Profile::Lint && debians && !Path::new("/usr/bin/cargo-clippy").exists(),
            wheels: profile == Profile::Lint && !wheels::are_there(workspace.root()),
            llvm: toolchain.map(|toolchain| toolchain.llvm),
        }
    }

    fn is_empty(&self) -> bool {
        self.system.is_empty() && !self.rust && !self.linker && !self.clippy && !self.wheels
    }

    /// Installs all of it with apt and cargo. If it cannot get a part, it says so before it
    /// installs anything.
    fn install(&self, workspace: &Workspace, os: &Os) -> anyhow::Result<()> {
        let privilege = Privilege::of_this_process();
        let linker_needs: Vec<String> = LINKER_LLVM.iter().map(|llvm| format!("llvm-{llvm}-dev")).collect();
        let linker_needs: Vec<&str> = linker_needs.iter().map(String::as_str).collect();
        let llvm_there = self.linker_llvm(|llvm| Path::new(&format!("/usr/lib/llvm-{llvm}/bin/llvm-config")).exists());
        let needs_apt = !self.system.is_empty()
            || self.rust
            || self.clippy
            || (self.linker && (llvm_there.is_none() || tool("c++").is_none()));

        if needs_apt {
            let mut update = privilege.command("sh").with_context(|| self.remedy(os))?;
            update.args(["-c", UPDATE]);
            if let Err(error) = progress::shown("apt-get update", update) {
                say(format!("{error:#}; continuing with the old package lists"));
            }
        }
        let known = |name: &&str| packages::candidates(&[name]).pop().flatten();
        let mut names = Vec::new();
        let mut unknown = Vec::new();
        for one in &self.system {
            match one.apt.iter().find(|name| known(name).is_some()) {
                Some(name) => names.push((*name).to_owned()),
                None => unknown.push(format!("no package {}", one.apt.join(" or "))),
            }
        }
        let debians =
            debians_toolchain(|name| known(&name), |names| packages::installed(names.iter().copied()).is_empty());
        let rustup = self.rust && debians.is_none();
        if self.rust {
            names.extend(debians.into_iter().flatten().map(str::to_owned));
        }
        if rustup && tool("rustup").is_none() {
            unknown.push(format!(
                "no Rust {} or newer with its library's source: get rustup (https://rustup.rs)",
                Version::minimum_rust()
            ));
        }
        if self.clippy && !rustup {
            // Without clippy, lint compiles the program with warnings denied, and says so.
            let second = debians == Some(RUST_WEB) || !packages::installed([RUST_WEB[0]]).is_empty();
            let clippy = if second { CLIPPY_WEB } else { CLIPPY };
            names.extend(known(&clippy).map(|_| clippy.to_owned()));
        }
        let mut llvm = llvm_there;
        if self.linker && llvm.is_none() {
            let available = packages::candidates(&linker_needs);
            let position = |llvm: u32| LINKER_LLVM.iter().position(|one| *one == llvm);
            llvm = self.linker_llvm(|llvm| position(llvm).is_some_and(|at| matches!(available.get(at), Some(Some(_)))));
            match llvm {
                Some(llvm) => names.push(format!("llvm-{llvm}-dev")),
                None => unknown.push(format!(
                    "no package {} for bpf-linker {BPF_LINKER}: get LLVM from https://apt.llvm.org, or put a released bpf-linker on PATH",
                    linker_needs.join(" or ")
                )),
            }
        }
        if self.linker && tool("c++").is_none() {
            names.push("g++".to_owned());
        }
        if !unknown.is_empty() {
            bail!("{os} lacks requirements, so nothing was installed:\n  {}", unknown.join("\n  "));
        }

        if !names.is_empty() {
            let mut install = privilege.command("sh").with_context(|| self.remedy(os))?;
            install.args(["-c", INSTALL, "setup"]).args(&names);
            say(format!("installing {}", names.join(" ")));
            progress::shown("apt-get install", install)?;
        }
        if self.wheels {
            wheels::install(workspace.root())?;
        }
        if rustup {
            let mut component = Command::new("rustup");
            component.args(["component", "add", "rust-src"]);
            progress::shown("adding the library's source to the Rust toolchain", component)?;
        }
        if let Some(llvm) = llvm.filter(|_| self.linker) {
            let mut cargo = workspace.program("cargo");
            cargo.env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"));
            cargo.args(["install", "bpf-linker", "--locked", "--version", &BPF_LINKER.to_string()]);
            cargo.args(["--no-default-features", "--features", &format!("llvm-{llvm}")]);
            progress::shown(&format!("compiling bpf-linker {BPF_LINKER} (about a minute)"), cargo)?;
        }
        Ok(())
    }

    /// The oldest `available` LLVM for bpf-linker that is not older than the compiler's.
    fn linker_llvm(&self, available: impl Fn(u32) -> bool) -> Option<u32> {
        // The distribution's toolchain, about to be installed, uses the first.
        let least = self.llvm.or_else(toolchain::default_llvm).unwrap_or(0);
        LINKER_LLVM.iter().copied().find(|llvm| *llvm >= least && available(*llvm))
    }

    /// The missing requirements, and how an administrator of `os` gets them.
    fn remedy(&self, os: &Os) -> String {
        let mut lines = Vec::new();
        let packages = |names: Vec<&str>| names.join(" ");
        if os.family == Family::Fedora {
            let mut names: Vec<&str> = self.system.iter().map(|one| one.dnf).collect();
            if self.linker {
                names.extend(["llvm-devel", "gcc-c++"]);
            }
            if !names.is_empty() {
                lines.push(format!("sudo dnf install {}", packages(names)));
            }
        } else {
            let mut names: Vec<&str> = self.system.iter().filter_map(|one| one.apt.first()).copied().collect();
            if self.rust && os.family == Family::Debian {
                names.extend(RUST_WEB);
            }
            if self.clippy && os.family == Family::Debian {
                names.push(CLIPPY_WEB);
            }
            if self.linker {
                names.extend(["llvm-22-dev", "g++"]);
            }
            if !names.is_empty() && os.family == Family::Debian {
                lines.push(format!("sudo apt-get install --no-install-recommends {}", packages(names)));
            } else if !names.is_empty() {
                lines.push(format!("your system's packages for what Debian calls: {}", packages(names)));
            }
        }
        if self.rust && os.family == Family::Debian {
            let (packages, rust) = (RUST.join(" "), Version::minimum_rust());
            lines.push(format!("or, in place of {}, where they are {rust} or newer: {packages}", RUST_WEB.join(" ")));
        }
        if self.wheels {
            lines.push("python3-pip, and a way to PyPI (xtask/src/setup/wheels.txt)".to_owned());
        }
        if self.rust && os.family != Family::Debian {
            let rust = Version::minimum_rust();
            lines.push(format!("rustup toolchain install {rust} && rustup component add rust-src   (Rust {rust} or newer; https://rustup.rs)"));
        }
        if self.linker {
            lines.push(format!(
                "LLVM_PREFIX=<where LLVM 22 is> cargo install bpf-linker --locked --version {BPF_LINKER} --no-default-features --features llvm-22"
            ));
        }
        format!(
            "this machine ({os}) lacks requirements that setup cannot install here. As an administrator:\n  {}",
            lines.join("\n  ")
        )
    }
}

/// The packages of Debian's toolchain that is new enough (by the versions that apt would install)
/// and conflicts with no installed package.
fn debians_toolchain(
    candidate: impl Fn(&'static str) -> Option<String>,
    none_installed: impl Fn(&'static [&'static str]) -> bool,
) -> Option<[&'static str; 3]> {
    let is_new = |name: &&'static str| {
        candidate(name).as_deref().and_then(Version::parse).is_some_and(|version| version >= Version::minimum_rust())
    };
    // rust-src and rust-web-src are of the compiler's own version.
    let fits = |(names, conflicts): &([&'static str; 3], &'static [&'static str])| {
        names.iter().all(is_new) && none_installed(conflicts)
    };
    TOOLCHAINS.into_iter().find(fits).map(|(names, _)| names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_missing() -> Missing {
        Missing {
            system: packages::requirements(Profile::Test),
            rust: true,
            linker: true,
            clippy: false,
            wheels: false,
            llvm: Some(22),
        }
    }

    #[test]
    fn each_family_gets_its_own_remedy() {
        let fedora = Os::parse("ID=fedora");
        let text = all_missing().remedy(&fedora);
        assert!(
            text.contains("dnf install libvirt-devel") && text.contains("rust-src") && text.contains("bpf-linker"),
            "{text}"
        );
        assert!(!text.contains("apt-get"), "{text}");
        let debian = Os::parse("ID=debian");
        let text = all_missing().remedy(&debian);
        assert!(text.contains("apt-get install") && text.contains("rustc-web") && !text.contains("dnf"), "{text}");
        let other = Os::parse("ID=arch");
        let text = all_missing().remedy(&other);
        assert!(text.contains("rustup") && text.contains("libvirt-dev") && !text.contains("apt-get"), "{text}");
    }

    #[test]
    fn the_linkers_llvm_is_not_older_than_the_compilers() {
        assert_eq!(all_missing().linker_llvm(|_| true), Some(22));
        assert_eq!(all_missing().linker_llvm(|llvm| llvm == 23), Some(23));
        assert_eq!(Missing { llvm: Some(23), ..all_missing() }.linker_llvm(|_| true), Some(23));
        assert_eq!(Missing { llvm: Some(24), ..all_missing() }.linker_llvm(|_| true), None);
    }

    #[test]
    fn the_first_toolchain_that_is_new_enough_is_taken() {
        let chosen = |versions: &[(&str, &str)], installed: &[&str]| {
            let candidate = |name: &str| {
                versions.iter().find(|(known, _)| *known == name).map(|(_, version)| (*version).to_owned())
            };
            debians_toolchain(candidate, |names| !names.iter().any(|name| installed.contains(name)))
        };
        let first = |version| RUST.map(|name| (name, version));
        let second = |version| RUST_WEB.map(|name| (name, version));
        let both = [first("1.63.0+dfsg1-2"), second("1.96.0+dfsg1-1~deb12u2")].concat();
        assert_eq!(chosen(&both, &[]), Some(RUST_WEB), "Debian 12");
        assert_eq!(chosen(&both, &["rustc"]), None, "they cannot be beside each other");
        // Where the compiler is installed, only the source may be missing.
        assert_eq!(chosen(&first("1.96.1+dfsg1-1"), &["rustc", "cargo"]), Some(RUST), "sid");
        assert_eq!(chosen(&first("1.96.1+dfsg1-1"), &["rustup"]), None);
        assert_eq!(chosen(&first("1.96.1+dfsg1-1")[..2], &[]), None, "no source");
        assert_eq!(chosen(&second("1.85.0+dfsg3-1~deb12u3"), &[]), None, "too old");
        assert_eq!(chosen(&[], &[]), None);
    }
}
