//! `cargo xtask bench`: builds the daemon as it is meant to run, and has `fence-bench` measure it beside stock's fence_virtd.

use std::process::ExitCode;

use anyhow::Context as _;

use crate::bpf;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::Workspace;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many rounds; both servers have their turn in each
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
