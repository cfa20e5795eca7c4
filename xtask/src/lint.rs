//! `cargo xtask lint` checks formatting, clippy on every crate (the BPF program for its own
//! target), and the documentation's links. It also runs shellcheck on installed scripts, the rules
//! of [`crate::tidy`], and the checks of [`crate::hygiene`].

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};

use crate::bpf;
use crate::hygiene;
use crate::progress::{self, say};
use crate::setup::toolchain::Toolchain;
use crate::setup::{self, Profile};
use crate::tidy;
use crate::workspace::Workspace;

/// Runs every check, also after one has failed. Fails if any check failed.
///
/// # Errors
/// Setup fails, or the build of the BPF object, which the daemon's crate includes.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<ExitCode> {
    setup::ensure(workspace, Profile::Lint)?;
    let object = bpf::build(workspace.root())?;

    let mut format = workspace.cargo(&object);
    format.args(["fmt", "--all", "--check"]);
    let mut clippy = workspace.cargo(&object);
    clippy.args([
        "clippy",
        "--workspace",
        "--exclude",
        "fence-ebpf",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]);
    let mut documentation = workspace.cargo(&object);
    documentation.args(["doc", "--no-deps", "--workspace", "--exclude", "fence-ebpf", "--quiet"]);
    documentation.env("RUSTDOCFLAGS", "-D warnings");
    let checks = [
        ("tidy", check_tree(workspace.root())),
        ("format", progress::shown("cargo fmt --check", format)),
        ("clippy", progress::shown("clippy for the host", clippy)),
        ("bpf", check_program(workspace)),
        ("doc", progress::shown("cargo doc", documentation)),
        ("scripts", check_scripts(workspace.root())),
        ("spelling", hygiene::spelling(workspace.root())),
        ("crates", hygiene::crates(workspace)),
        ("advisories", hygiene::advisories(workspace)),
        ("compiler", hygiene::oldest_compiler(workspace)),
    ];
    let mut complaints = 0;
    for (name, check) in checks {
        if let Err(error) = check {
            say(format!("lint: {name}: {error:#}"));
            complaints += 1;
        }
    }
    if complaints > 0 {
        return Ok(ExitCode::FAILURE);
    }
    say("lint: every check passed");
    Ok(ExitCode::SUCCESS)
}

/// Runs only the rules of [`crate::tidy`], which takes a second.
///
/// # Errors
/// A rule is broken.
pub(crate) fn tidy(workspace: &Workspace) -> anyhow::Result<ExitCode> {
    check_tree(workspace.root())?;
    say("lint: the tree's own rules are kept");
    Ok(ExitCode::SUCCESS)
}

fn check_tree(root: &Path) -> anyhow::Result<()> {
    let (findings, rooms) = tidy::check(root)?;
    say(format!("lint: what each room of fence-daemon imports, from the ground up:\n{}", rooms.trim_end()));
    for finding in &findings {
        eprintln!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        1 => bail!("1 place breaks the tree's rules: see above"),
        many => bail!("{many} places break the tree's rules: see above"),
    }
}

/// Runs shellcheck on the scripts in dist, which are installed on other machines.
fn check_scripts(root: &Path) -> anyhow::Result<()> {
    let is_script = |path: &Path| fs::read(path).is_ok_and(|text| text.starts_with(b"#!/bin/sh\n"));
    let scripts: Vec<_> = tidy::files(&root.join("dist"))?.into_iter().filter(|path| is_script(path)).collect();
    ensure!(!scripts.is_empty(), "no script found in dist");
    let mut shellcheck = Command::new("shellcheck");
    shellcheck.arg("--shell=sh").args(&scripts);
    progress::shown("shellcheck", shellcheck)
}

/// Clippy for the BPF target, with the toolchain that compiles for it. Without a clippy there, the
/// compiler's own warnings have to do.
fn check_program(workspace: &Workspace) -> anyhow::Result<()> {
    let toolchain = Toolchain::find().context("no toolchain for the BPF target")?;
    let has_clippy = Command::new(toolchain.cargo.with_file_name("cargo-clippy")).arg("--version").output();
    let has_clippy = has_clippy.is_ok_and(|output| output.status.success());
    let mut cargo = toolchain.cargo(workspace.root());
    let title = if has_clippy {
        cargo.arg("clippy");
        "clippy for the BPF target"
    } else {
        say(format!(
            "{} has no clippy: checking the BPF program with the compiler's own warnings only",
            toolchain.rustc.display()
        ));
        cargo.args(["rustc", "--profile", "check"]);
        "rustc for the BPF target"
    };
    cargo.args([
        "--quiet",
        "--package",
        "fence-ebpf",
        "--bin",
        "fence-xdp",
        "--target",
        bpf::TARGET,
        "-Z",
        "build-std=core",
    ]);
    cargo.arg("--target-dir").arg(workspace.root().join("target/bpf-lint"));
    cargo.args(["--", "-D", "warnings"]);
    // Of two clippys cargo takes the first on PATH: it must be this toolchain's.
    let path = env::var_os("PATH").unwrap_or_default();
    let path = toolchain.cargo.parent().map(Path::to_owned).into_iter().chain(env::split_paths(&path));
    cargo.env("PATH", env::join_paths(path).context("PATH has an odd entry")?);
    progress::shown(title, cargo)
}
