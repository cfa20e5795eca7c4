//! The programs of the host that the lab needs, and which package brings each.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

/// Program and the Debian package that has it.
const PACKAGES: &[(&str, &str)] = &[
    ("apt-cache", "apt"),
    ("apt-get", "apt"),
    ("bpftool", "bpftool"),
    ("busybox", "busybox-static"),
    ("corosync", "corosync"),
    ("corosync-quorumtool", "corosync"),
    ("dpkg-deb", "dpkg"),
    ("fence_virtd", "fence-virtd"),
    ("fence_xvm", "fence-virt"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("journalctl", "systemd"),
    ("ldd", "libc-bin"),
    ("libvirtd", "libvirt-daemon"),
    ("mke2fs", "e2fsprogs"),
    ("mmdebstrap", "mmdebstrap"),
    ("nft", "nftables"),
    ("prometheus", "prometheus"),
    ("promtool", "prometheus"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("setpriv", "util-linux"),
    ("tini", "tini"),
    ("unshare", "util-linux"),
    ("virsh", "libvirt-clients"),
];

/// Directories to search beside `PATH`. A user's `PATH` often lacks the administrator's
/// directories.
const SYSTEM_DIRECTORIES: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The full path of a program.
///
/// # Errors
/// It is not installed; the error names its package and the command that installs it.
pub fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file());
    if let Some(found) = found {
        return Ok(found);
    }
    match PACKAGES.iter().find(|(name, _)| *name == program) {
        Some((_, package)) => {
            bail!("`{program}` is missing (Debian package {package}): run `cargo xtask setup --for test`")
        }
        None => bail!("`{program}` is missing: run `cargo xtask setup --for test`"),
    }
}

/// What a program prints on standard output.
///
/// # Errors
/// It is missing, or failed: the error has what it printed on standard error.
pub fn output(program: &str, arguments: &[&str], directory: &Path) -> Result<String> {
    let output = Command::new(find(program)?).args(arguments).current_dir(directory).output()?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Checks that all of `programs` are there, and that this process may make namespaces.
pub fn require(programs: &[&str]) -> Result<()> {
    for program in programs {
        find(program)?;
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "the lab makes namespaces and loads BPF programs, which needs root: run it as root, or `sudo -E cargo xtask test`"
        );
    }
    Ok(())
}

/// So many random bytes.
pub fn random_bytes(count: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// The workspace's root.
#[must_use]
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_path_buf()
}

/// The directory that cargo builds into.
#[must_use]
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_missing_program_is_reported_with_its_remedy() {
        let error = super::find("no-such-program").unwrap_err().to_string();
        assert!(error.contains("cargo xtask setup --for test"), "{error}");
        assert!(super::find("sh").unwrap().is_absolute());
    }
}
