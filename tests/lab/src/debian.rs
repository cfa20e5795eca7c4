//! Debian's cloud kernels, which QEMU guests boot. They are small and have no drivers for real
//! hardware.
//!
//! `apt-get download` fetches them from Debian's archive and checks the signatures. Cargo's target
//! directory keeps them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::tools;

const FLAVOUR: &str = "-cloud-amd64";

/// A series of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// Debian 12's own.
    Linux6_1,
    /// Debian 13's, which Debian 12 has among its security updates.
    Linux6_12,
}

impl Series {
    /// All of them, oldest first.
    pub const ALL: [Self; 2] = [Self::Linux6_1, Self::Linux6_12];

    /// Its number.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Linux6_1 => "6.1",
            Self::Linux6_12 => "6.12",
        }
    }

    /// How packages of it begin; a number follows, and the highest is the newest.
    fn prefix(self) -> &'static str {
        match self {
            // The number is the ABI's here, and the stable release's there.
            Self::Linux6_1 => "linux-image-6.1.0-",
            Self::Linux6_12 => "linux-image-6.12.",
        }
    }

    /// The number of a package's kernel, if it is one of this series.
    fn number(self, package: &str) -> Option<u32> {
        let rest = package.strip_prefix(self.prefix())?.strip_suffix(FLAVOUR)?;
        rest.split_once('+').map_or(rest, |(number, _)| number).parse().ok()
    }
}

/// A kernel with its modules, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The kernel image.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of a series from the cache; downloads it the first time.
    pub fn get(series: Series) -> Result<Self> {
        let cache = tools::target_directory().join("lab-cache");
        std::fs::create_dir_all(&cache)?;
        // Tests run at the same time: one downloads, the others wait.
        let lock = File::create(cache.join("lock"))?;
        lock.lock().context("locking the lab's cache")?;
        let unpacked = cache.join(format!("kernel-{}", series.name()));
        if !unpacked.is_dir() {
            download(series, &cache, &unpacked)?;
        }
        let boot = only_entry(&unpacked.join("boot"), "vmlinuz-")?;
        let modules = only_entry(&unpacked.join("lib/modules"), "")?.join("kernel");
        Ok(Self { image: boot, modules })
    }

    /// A module's content, by its path in the modules' `kernel` directory without compression.
    pub fn module(&self, path: &str) -> Result<Vec<u8>> {
        let plain = self.modules.join(path);
        if plain.is_file() {
            return std::fs::read(&plain).with_context(|| format!("reading {}", plain.display()));
        }
        let compressed = self.modules.join(format!("{path}.xz"));
        let output = Command::new(tools::find("busybox")?).arg("xzcat").arg(&compressed).output()?;
        if !output.status.success() {
            bail!("no module {}: {}", plain.display(), String::from_utf8_lossy(&output.stderr));
        }
        Ok(output.stdout)
    }

    /// What it calls itself.
    #[must_use]
    pub fn release(&self) -> String {
        let name = self.image.file_name().unwrap_or_default().to_string_lossy();
        name.trim_start_matches("vmlinuz-").to_owned()
    }
}

/// The one entry of a directory whose name begins with `prefix`.
fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?;
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("nothing like {prefix}* in {}", directory.display()))
}

fn download(series: Series, cache: &Path, into: &Path) -> Result<()> {
    let known = tools::output("apt-cache", &["pkgnames", series.prefix()], cache)?;
    let newest = known.lines().filter_map(|name| Some((series.number(name)?, name))).max().map(|(_, name)| name);
    let newest = newest.with_context(|| {
        format!(
            "apt knows no {}*{FLAVOUR}: run `apt-get update` (Debian 12 has Linux 6.1 in its main archive and 6.12 in \
             bookworm-security)",
            series.prefix()
        )
    })?;
    let work = cache.join("download");
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    std::fs::create_dir_all(&work)?;
    tools::output("apt-get", &["download", newest], &work).with_context(|| {
        format!("downloading {newest} from Debian's archive: is there a network, and are the lists of `apt-get update` of today?")
    })?;
    let package = only_entry(&work, series.prefix())?;
    tools::output("dpkg-deb", &["-x", &package.to_string_lossy(), "unpacked"], &work)?;
    // The rename comes last and is one step, so whatever has this name is complete.
    std::fs::rename(work.join("unpacked"), into)?;
    std::fs::remove_dir_all(&work)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_told_by_their_series_and_number() {
        assert_eq!(Series::Linux6_1.number("linux-image-6.1.0-56-cloud-amd64"), Some(56));
        assert_eq!(Series::Linux6_12.number("linux-image-6.12.117+deb12-cloud-amd64"), Some(117));
        assert_eq!(Series::Linux6_12.number("linux-image-6.12.9+deb13-cloud-amd64"), Some(9));
        for other in
            ["linux-image-6.12-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64-dbg", "linux-image-6.1.0-56-amd64"]
        {
            assert!(Series::ALL.iter().all(|series| series.number(other).is_none()), "{other}");
        }
    }
}
