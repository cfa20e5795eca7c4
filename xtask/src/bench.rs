//! `cargo xtask bench`: builds the daemon optimised and measures it beside fence_virtd, or the cost
//! of its kernel program.

use std::process::{Command, ExitCode};

use anyhow::Context as _;

use crate::bpf;
use crate::name_of;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::{EXECUTABLES, Workspace};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Subject {
    /// The daemon beside stock's fence_virtd: docs/measured/benchmarks.md
    Daemon,
    /// The eight ratios that tell most, in less than two minutes; writes nothing
    Quick,
    /// The kernel program's time per frame: docs/measured/rate-limit.md
    #[value(alias = "shield")]
    RateLimit,
    /// The kernel program's cost for other traffic: docs/measured/bystanders.md
    Bystanders,
    /// What fences take in real clusters, with the daemon and with stock's fence_virtd:
    /// docs/measured/clusters.md
    Clusters,
}

impl Subject {
    /// How many rounds it takes, if nobody says.
    fn rounds(self) -> u32 {
        match self {
            Self::Quick => 1,
            Self::Daemon | Self::RateLimit => 5,
            Self::Bystanders => 400,
            Self::Clusters => 3,
        }
    }
}

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchOptions {
    /// What is measured
    #[arg(value_enum, default_value_t = Subject::Daemon, value_name = "SUBJECT")]
    subject: Subject,
    /// How many rounds; all that is compared has its turn in each [default: 5; bystanders: 400;
    /// clusters: 3]
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
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

/// Builds, measures, and writes the subject's page in docs if all of it was measured.
///
/// # Errors
/// If something is missing, or a server said what is not so.
pub(crate) fn run(workspace: &Workspace, options: &BenchOptions) -> anyhow::Result<ExitCode> {
    let mut bench = program(workspace, options.no_build)?;
    bench.arg(name_of(&options.subject)).arg("--daemon").arg(workspace.binary("fence-daemon", true));
    if !matches!(options.subject, Subject::Daemon | Subject::Clusters) && !options.only.is_empty() {
        anyhow::bail!("`--only` is for `cargo xtask bench daemon` and `cargo xtask bench clusters`");
    }
    for figure in &options.only {
        bench.arg("--only").arg(figure);
    }
    if options.subject == Subject::Quick {
        anyhow::ensure!(!options.quick && options.rounds.is_none(), "`cargo xtask bench quick` takes no such option");
    } else if options.quick {
        bench.arg("--quick");
    } else {
        bench.args(["--rounds", &options.rounds.unwrap_or(options.subject.rounds()).to_string()]);
        if options.only.is_empty() {
            bench.arg("--write").arg(workspace.root().join("docs/measured"));
        }
    }
    finish(bench)
}

/// The program that measures and soaks, as root. It and the daemon are built first, unless
/// `is_built`.
pub(crate) fn program(workspace: &Workspace, is_built: bool) -> anyhow::Result<Command> {
    if !is_built {
        setup::ensure(workspace, Profile::Test)?;
        let object = bpf::build(workspace.root())?;
        let mut cargo = workspace.cargo(&object);
        cargo.args(["build", "--release"]).args(EXECUTABLES);
        cargo.args(["--package", "fence-bench", "--bin", "fence-bench"]);
        progress::shown("building the daemon and the bench", cargo)?;
    }
    let program = Privilege::of_this_process().command(workspace.binary("fence-bench", true));
    program.context("it makes namespaces and kills machines in them: run it as root")
}

/// Runs that program to its end.
pub(crate) fn finish(mut program: Command) -> anyhow::Result<ExitCode> {
    let typed = progress::line(&program);
    say(format!("running {typed}"));
    let status = program.status().with_context(|| format!("cannot start {typed}"))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
