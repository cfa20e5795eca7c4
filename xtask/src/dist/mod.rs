//! `cargo xtask dist`: the packages for hypervisors and for cluster nodes, as .deb and as .rpm.
//!
//! The distributions' own tools build them (debhelper, rpmbuild) from `dist/debian` and `dist/rpm`.
//! They know what their systems expect of a package, and an administrator can read what they read.
//! This module compiles, and lays out one directory for both: [`tree`].

mod bill;
mod deb;
mod rpm;
mod tree;
mod verify;

use std::env;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;

use crate::bpf;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::Workspace;

/// The digests of the packages, beside them.
const DIGESTS: &str = "SHA256SUMS";
/// The directory of the finished packages, from the workspace's root.
const OUT: &str = "target/dist";
/// That of packages without optimisation, so that tests never replace finished ones.
const OUT_FOR_TESTS: &str = "target/dist-debug";
/// The time of everything in a package, in seconds. All tools of the field read this variable.
const EPOCH: &str = "SOURCE_DATE_EPOCH";
/// Tells the tests where the packages are.
pub(crate) const VARIABLE: &str = "FENCE_PACKAGES";
/// Writes manual pages and completions.
const MANUAL: &str = "fence-manual";
/// The version of all packages.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A format of packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For Debian and Ubuntu
    Deb,
    /// For Fedora, RHEL and SUSE
    Rpm,
}

/// Options of `cargo xtask dist`.
#[derive(Debug, clap::Args)]
pub(crate) struct DistOptions {
    /// The formats of the packages [default: all]
    #[arg(value_enum, value_name = "FORMAT")]
    formats: Vec<Format>,
    /// Pack a build without optimisation, as the tests do: target/dist-debug
    #[arg(long)]
    debug: bool,
    /// Then build them again from a copy of the tree in another directory, and compare
    #[arg(long, conflicts_with = "debug")]
    verify: bool,
}

/// What goes into the packages, compiled.
struct Built {
    /// The directory of the executables.
    executables: PathBuf,
    /// The directory of manual pages and completions.
    manual: PathBuf,
}

/// Builds the packages, and prints their names and digests.
///
/// # Errors
/// A tool is missing, or a build fails.
pub(crate) fn run(workspace: &Workspace, options: &DistOptions) -> anyhow::Result<ExitCode> {
    setup::ensure(workspace, Profile::Dist)?;
    let formats = if options.formats.is_empty() { Format::value_variants() } else { &options.formats };
    let out = build(workspace, formats.contains(&Format::Deb), formats.contains(&Format::Rpm), !options.debug)?;
    let mut digests = Command::new("sha256sum");
    digests.current_dir(&out).args(packages(&out)?);
    let digests = digests.output().context("cannot run sha256sum")?;
    ensure!(digests.status.success(), "sha256sum failed");
    fs::write(out.join(DIGESTS), &digests.stdout).context("cannot write the digests")?;
    io::stdout().write_all(&digests.stdout).context("cannot print the digests")?;
    say(format!("the packages are in {}", out.display()));
    if options.verify {
        verify::run(workspace, formats, epoch(workspace.root())?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the packages for the tests, from the build that the tests use. Returns their directory.
///
/// # Errors
/// A build fails.
pub(crate) fn for_tests(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    build(workspace, true, true, false)
}

fn build(workspace: &Workspace, deb: bool, rpm: bool, release: bool) -> anyhow::Result<PathBuf> {
    let root = workspace.root();
    let epoch = epoch(root)?;
    let out = root.join(if release { OUT } else { OUT_FOR_TESTS });
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let built = compile(workspace, &out, epoch, release)?;
    let stage = out.join("stage");
    tree::lay_out(workspace, &built, &stage)?;
    tree::set_times(&stage, epoch)?;
    if deb {
        deb::build(root, &out, &stage, epoch, release)?;
    }
    if rpm {
        rpm::build(root, &out, &stage, epoch, release)?;
    }
    Ok(out)
}

/// Compiles the executables and writes the manual pages.
fn compile(workspace: &Workspace, out: &Path, epoch: u64, release: bool) -> anyhow::Result<Built> {
    let object = bpf::build(workspace.root())?;
    // The same selection as that of the tests: see `Suite::selection`.
    let mut cargo = workspace.cargo(&object);
    cargo.args(["build", "--locked", "--bin", MANUAL]);
    if !release {
        cargo.args(bins());
    }
    progress::shown("building the writer of manual pages", cargo)?;
    let manual = out.join("manual");
    let mut pages = Command::new(workspace.binary(MANUAL, false));
    pages.arg(&manual).arg(date(epoch, "+%F")?).current_dir(workspace.root());
    progress::shown("writing manual pages and completions", pages)?;
    if !release {
        let executables = workspace.binary(MANUAL, false);
        return Ok(Built { executables: executables.parent().map(Path::to_owned).unwrap_or_default(), manual });
    }

    let mut cargo = workspace.cargo(&object);
    cargo.args(["build", "--locked", "--release", "--package", "fence-daemon", "--package", "fence-client"]);
    let target = workspace.root().join("target/dist-build");
    cargo.args(bins()).arg("--target-dir").arg(&target);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", bpf::without_paths(workspace.root()).join("\x1f"));
    progress::shown("building the executables (some minutes the first time)", cargo)?;
    Ok(Built { executables: target.join("release"), manual })
}

/// Cargo's arguments for the executables.
fn bins() -> impl Iterator<Item = &'static str> {
    tree::EXECUTABLES.into_iter().flat_map(|(name, _)| ["--bin", name])
}

/// The time that everything in the packages has: the variable's, or the last commit's.
fn epoch(root: &Path) -> anyhow::Result<u64> {
    let text = match env::var(EPOCH) {
        Ok(text) => text,
        Err(_) => {
            let mut git = Command::new("git");
            git.args(["log", "-1", "--format=%ct"]).current_dir(root);
            let output = git.output().context("cannot run git")?;
            ensure!(output.status.success(), "this is no clone: set {EPOCH} to the time of the packages");
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
    };
    text.trim().parse().with_context(|| format!("{EPOCH} is no number of seconds: {text:?}"))
}

/// The time in a form that `date` knows.
fn date(epoch: u64, form: &str) -> anyhow::Result<String> {
    let mut date = Command::new("date");
    let output = date.args(["-u", "-d", &format!("@{epoch}"), form]).env("LC_ALL", "C").output().context("no date")?;
    ensure!(output.status.success(), "{EPOCH} is no time: {epoch}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The names of the packages in a directory, sorted.
fn packages(directory: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".deb") || name.ends_with(".rpm") {
            names.push(name);
        }
    }
    names.sort_unstable();
    if names.is_empty() {
        bail!("no package in {}", directory.display());
    }
    Ok(names)
}
