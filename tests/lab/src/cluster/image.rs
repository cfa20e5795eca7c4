//! Root directories of small Debian systems. That of all cluster nodes has corosync, Pacemaker, and
//! the commands that people type on nodes. That of a hypervisor has Debian's fence-virtd. That of
//! the lab has what the tests need of their machine, of another release than this machine's.
//!
//! `mmdebstrap` makes each once from the archives of this machine's apt, in cargo's target
//! directory. Nobody writes to it afterwards.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2_portable::{Digest, Sha256};

use crate::program::progress;
use crate::tools;

/// What a root directory is made of.
struct Recipe {
    /// What the directory is called.
    name: &'static str,
    /// The packages beside the essential ones and apt. Dependencies come along, recommended
    /// packages do not.
    packages: &'static str,
    /// Runs on the finished tree.
    afterwards: &'static str,
}

/// A cluster node. Its script disables timers and services that are not configured. corosync and
/// Pacemaker stay enabled, as in Debian's packages, because nodes are configured before they start.
const NODE: Recipe = Recipe {
    name: "node",
    packages: include_str!("../assets/node-packages.txt"),
    afterwards: concat!("\n", include_str!("../assets/node-image.sh")),
};

/// A hypervisor with Debian's fence-virtd.
const HYPERVISOR: Recipe = Recipe {
    name: "hypervisor",
    packages: include_str!("../assets/hypervisor-packages.txt"),
    afterwards: concat!("\n", include_str!("../assets/hypervisor-image.sh")),
};

/// A machine where the lab itself runs, with all that `cargo xtask setup --for test` installs for
/// it.
const LAB: Recipe = Recipe {
    name: "lab",
    packages: include_str!("../assets/lab-packages.txt"),
    afterwards: concat!("\n", include_str!("../assets/lab-image.sh")),
};

/// A root directory before anybody has changed anything in it.
#[derive(Clone, Debug)]
pub struct Image {
    root: PathBuf,
}

impl Image {
    /// The cluster nodes' image from the cache; makes it the first time, which takes a minute or
    /// two.
    pub fn get() -> Result<Self> {
        Self::of(&NODE, &suite()?)
    }

    /// The image of a hypervisor with fence-virtd, of a release of Debian (`bookworm`). Its archive
    /// has that package alone, so apt needs no network.
    pub fn hypervisor(suite: &str) -> Result<Self> {
        Self::of(&HYPERVISOR, suite)
    }

    /// The image of a machine of a release of Debian where the tests' own programs run.
    pub fn lab(suite: &str) -> Result<Self> {
        Self::of(&LAB, suite)
    }

    fn of(recipe: &Recipe, suite: &str) -> Result<Self> {
        let name = recipe.name;
        let cache = tools::target_directory().join("lab-cache");
        fs::create_dir_all(&cache)?;
        let root = cache.join(format!("{name}-{suite}-{}", key(recipe, suite)));
        // Several test programs want it at once: one makes it, the others wait.
        let lock = File::create(cache.join(format!("{name}-{suite}.lock")))?;
        if lock.try_lock().is_err() {
            progress(&format!("waiting for the image {name}-{suite}, which somebody else makes"));
            lock.lock().context("locking the lab's cache")?;
        }
        if !root.is_dir() {
            make(recipe, suite, &cache, &root).with_context(|| format!("the root directory {name}-{suite}"))?;
        }
        Ok(Self { root })
    }

    /// The directory, which is read-only by agreement.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// The name of this distribution's release, whose packages the nodes get.
fn suite() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("which distribution is this?")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = name.context("clusters' nodes are made of Debian's or Ubuntu's packages, and this is neither")?;
    Ok(name.trim_matches('"').to_owned())
}

/// Changes with what the image is made of.
fn key(recipe: &Recipe, suite: &str) -> String {
    let Recipe { packages, afterwards, .. } = recipe;
    let digest = Sha256::digest(format!("{suite} {} {afterwards}", packages.lines().collect::<Vec<_>>().join(" ")));
    digest.iter().take(6).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The distribution's own archives among those that apt uses here, as lines for a sources.list. For
/// another release they are this release's main archive by the other name.
fn sources(suite: &str) -> Result<Vec<String>> {
    let own = self::suite()?;
    let mut lines = own_sources()?;
    if suite != own {
        let (from, to) = (format!(" {own} "), format!(" {suite} "));
        lines = lines.iter().filter(|line| line.contains(&from)).map(|line| line.replace(&from, &to)).collect();
    }
    ensure!(!lines.is_empty(), "apt knows no archive of {own} here");
    Ok(lines)
}

/// This release's archives.
fn own_sources() -> Result<Vec<String>> {
    const FORMAT: &str = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)";
    let targets =
        tools::output("apt-get", &["indextargets", "--format", FORMAT, "Created-By: Packages"], Path::new("/"))?;
    let mut lines: Vec<_> = targets.lines().filter_map(source).collect();
    lines.sort_unstable();
    lines.dedup();
    ensure!(!lines.is_empty(), "apt knows no archive of Debian's or Ubuntu's: run `apt-get update`");
    Ok(lines)
}

fn source(target: &str) -> Option<String> {
    let [origin, uri, release, component, key] = target.split('|').collect::<Vec<_>>().try_into().ok()?;
    let option = if key.starts_with('/') { format!(" [signed-by={key}]") } else { String::new() };
    matches!(origin, "Debian" | "Ubuntu").then(|| format!("deb{option} {uri} {release} {component}"))
}

fn make(recipe: &Recipe, suite: &str, cache: &Path, into: &Path) -> Result<()> {
    tools::require(&["mmdebstrap", "setpriv", "unshare"])?;
    let Recipe { name, packages, afterwards } = recipe;
    let work = cache.join(format!("{name}-{suite}.work"));
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    progress(&format!("making the root directory {name} from {suite}'s packages: a minute or two, once"));
    // mmdebstrap mounts the host's /dev and /sys into the tree. It dies with this process and takes
    // the mounts along, so removing what it left cannot reach the host.
    let mut command = Command::new(tools::find("setpriv")?);
    command.args(["--pdeathsig", "KILL"]).arg(tools::find("unshare")?);
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(tools::find("mmdebstrap")?);
    command.args(["--mode=root", "--variant=apt", "--format=directory", "--skip=cleanup/tmp"]);
    command.args(["--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/locale/*"]);
    command.args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Retries \"3\""]);
    // The manuals' readers (man-db) are absent. crmsh needs the agents' metadata and no manuals.
    command.args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*"]);
    command.arg(format!("--include={}", packages.lines().collect::<Vec<_>>().join(",")));
    command.arg(format!("--customize-hook={afterwards}"));
    command.arg(suite).arg(&work).args(sources(suite)?);
    run(command)?;
    // Those of an earlier list of packages are of no use to anybody.
    let prefix = format!("{name}-{suite}-");
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name().to_string_lossy().starts_with(&prefix) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    // The rename comes last and is one step, so whatever has this name is complete.
    fs::rename(&work, into)?;
    Ok(())
}

/// Runs mmdebstrap, and prints its progress.
fn run(mut command: Command) -> Result<()> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut said = Vec::new();
    for line in BufReader::new(child.stderr.take().context("no pipe")?).lines() {
        let line = line?;
        if line.starts_with("I:") {
            progress(&format!("  {line}"));
        }
        said.push(line);
    }
    if !child.wait()?.success() {
        let from = said.len().saturating_sub(30);
        bail!(
            "mmdebstrap failed; is there a network, and are the lists of `apt-get update` of today?\n{}",
            said[from..].join("\n")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_distributions_own_archives_are_used() {
        assert_eq!(
            source("Debian|http://deb.example/debian/|bookworm|main|/usr/share/keyrings/a.gpg").as_deref(),
            Some("deb [signed-by=/usr/share/keyrings/a.gpg] http://deb.example/debian/ bookworm main")
        );
        assert_eq!(
            source("Ubuntu|http://u.example/|noble|universe|").as_deref(),
            Some("deb http://u.example/ noble universe")
        );
        assert_eq!(source("Somebody|http://s.example/|x|main|"), None);
        assert_eq!(source(""), None);
    }

    #[test]
    fn another_suite_is_another_image() {
        assert_ne!(key(&NODE, "bookworm"), key(&NODE, "trixie"));
        assert_ne!(key(&NODE, "bookworm"), key(&HYPERVISOR, "bookworm"));
        assert_eq!(key(&NODE, "bookworm").len(), 12);
    }
}
