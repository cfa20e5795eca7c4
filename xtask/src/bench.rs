//! `cargo xtask bench`: builds the daemon as it is meant to run, and has `fence-bench` measure it beside stock's fence_virtd; or, with `shield`,
//! has `fence-shield` measure what the kernel program costs per frame.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::ValueEnum;

use crate::bpf;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::Workspace;

/// A bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The daemon beside fence_virtd: docs/benchmarks.md
    Servers,
    /// The kernel program per frame: docs/shield.md
    Shield,
}

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which bench
    #[arg(value_enum, default_value = "servers")]
    bench: Bench,
    /// How many rounds; all that is compared has its turn in each
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: u32,
    /// One short round that shows that the bench works; writes nothing
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Measure this alone (as often as wanted); writes nothing. `--only help` lists what there is
    #[arg(long, value_name = "FIGURE")]
    only: Vec<String>,
    /// Measure what was built before
    #[arg(long)]
    no_build: bool,
}

/// Builds, measures, and writes docs/benchmarks.md if all of it was measured.
///
/// # Errors
/// If something is missing, or a server said what is not so.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<ExitCode> {
    match options.bench {
        Bench::Servers => servers(workspace, options),
        Bench::Shield => shield(workspace, options),
    }
}

fn shield(workspace: &Workspace, options: &Options) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(options.only.is_empty(), "--only is for the bench of the servers");
    if !options.no_build {
        setup::ensure(workspace, Profile::Lab)?;
        let object = bpf::build(workspace.root())?;
        let mut cargo = workspace.cargo(&object);
        cargo.args(["build", "--release", "--package", "fence-tests", "--bin", "fence-shield"]);
        progress::shown("building the bench", cargo)?;
    }
    let program = workspace.binary("fence-shield", true);
    let bench = Privilege::of_this_process().command(&program);
    let mut bench = bench.context("BPF programs are run by root: run this as root")?;
    if options.quick {
        bench.args(["--rounds", "1"]);
    } else {
        bench.args(["--rounds", &options.rounds.to_string()]);
        bench.arg("--write").arg(workspace.root().join("docs"));
    }
    say(format!("running {}", progress::line(&bench)));
    let status = bench.status().with_context(|| format!("cannot start {}", program.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn servers(workspace: &Workspace, options: &Options) -> anyhow::Result<ExitCode> {
    if !options.no_build {
        setup::ensure(workspace, Profile::Test)?;
        let object = bpf::build(workspace.root())?;
        let mut cargo = workspace.cargo(&object);
        cargo.args(["build", "--release", "--package", "fence-daemon", "--bin", "fence-daemon"]);
        cargo.args(["--package", "fence-tests", "--bin", "fence-bench"]);
        progress::shown("building the daemon and the bench", cargo)?;
    }
    let program = workspace.binary("fence-bench", true);
    let bench = Privilege::of_this_process().command(&program);
    let mut bench = bench.context("the bench makes namespaces and kills machines in them: run it as root")?;
    bench.arg("--daemon").arg(workspace.binary("fence-daemon", true));
    for figure in &options.only {
        bench.arg("--only").arg(figure);
    }
    if options.quick {
        bench.arg("--quick");
    } else {
        bench.args(["--rounds", &options.rounds.to_string()]);
        if options.only.is_empty() {
            bench.arg("--write").arg(workspace.root().join("docs"));
        }
    }
    say(format!("running {}", progress::line(&bench)));
    let status = bench.status().with_context(|| format!("cannot start {}", program.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
