//! The root directory of all cluster nodes: a small Debian with corosync, Pacemaker, and the
//! commands that people type on nodes.
//!
//! `mmdebstrap` makes it once from the archives of this machine's apt, in cargo's target directory.
//! Nodes never write to it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2_portable::{Digest, Sha256};

use crate::program::progress;
use crate::tools;

/// The packages of a node beside the essential ones and apt. Dependencies come along, recommended
/// packages do not.
const PACKAGES: &str = include_str!("../assets/node-packages.txt");

/// Runs on the finished tree. It disables timers and services that are not configured. corosync and
/// Pacemaker stay enabled, as in Debian's packages, because nodes are configured before they start.
const AFTERWARDS: &str = concat!("\n", include_str!("../assets/node-image.sh"));

/// A node's root directory before anybody has changed anything in it.
#[derive(Clone, Debug)]
pub struct Image {
    root: PathBuf,
}

impl Image {
    /// The image from the cache; makes it the first time, which takes a minute or two.
    pub fn get() -> Result<Self> {
        let suite = suite()?;
        let cache = tools::target_directory().join("lab-cache");
        fs::create_dir_all(&cache)?;
        let root = cache.join(format!("node-{suite}-{}", key(&suite)));
        // Several test programs want it at once: one makes it, the others wait.
        let lock = File::create(cache.join("node.lock"))?;
        if lock.try_lock().is_err() {
            progress("waiting for the nodes' image, which somebody else makes");
            lock.lock().context("locking the lab's cache")?;
        }
        if !root.is_dir() {
            make(&suite, &cache, &root).context("the root directory of clusters' nodes")?;
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
fn key(suite: &str) -> String {
    let digest = Sha256::digest(format!("{suite} {} {AFTERWARDS}", PACKAGES.lines().collect::<Vec<_>>().join(" ")));
    digest.iter().take(6).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The distribution's own archives among those that apt uses here, as lines for a sources.list.
fn sources() -> Result<Vec<String>> {
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

fn make(suite: &str, cache: &Path, into: &Path) -> Result<()> {
    tools::require(&["mmdebstrap", "setpriv", "unshare"])?;
    let work = cache.join("node.work");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    progress(&format!("making the root directory of clusters' nodes from {suite}'s packages: a minute or two, once"));
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
    command.arg(format!("--include={}", PACKAGES.lines().collect::<Vec<_>>().join(",")));
    command.arg(format!("--customize-hook={AFTERWARDS}"));
    command.arg(suite).arg(&work).args(sources()?);
    run(command)?;
    // Those of an earlier list of packages are of no use to anybody.
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name().to_string_lossy().starts_with("node-") {
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
        assert_ne!(key("bookworm"), key("trixie"));
        assert_eq!(key("bookworm").len(), 12);
    }
}
