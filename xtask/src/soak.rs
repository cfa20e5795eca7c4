//! `cargo xtask soak`: builds the daemon optimised, and lets load, floods and faults loose on it.

use std::process::ExitCode;

use anyhow::Context as _;

use crate::bpf;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::{EXECUTABLES, Workspace};

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct SoakOptions {
    /// For how long, without the exam at the end
    #[arg(long, default_value_t = 60, value_name = "N")]
    minutes: u64,
    /// Repeat the choices of the run that printed this seed
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Write docs/measured/soak.md and its picture, if all rules were kept
    #[arg(long)]
    write: bool,
    /// A sentence for that page: what else ran on the machine
    #[arg(long, value_name = "TEXT", requires = "write")]
    beside: Option<String>,
    /// Soak what was built before
    #[arg(long)]
    no_build: bool,
}

/// Builds and soaks. The exit status is a failure if a rule was broken.
///
/// # Errors
/// Something is missing, or the build fails.
pub(crate) fn run(workspace: &Workspace, options: &SoakOptions) -> anyhow::Result<ExitCode> {
    if !options.no_build {
        setup::ensure(workspace, Profile::Test)?;
        let object = bpf::build(workspace.root())?;
        let mut cargo = workspace.cargo(&object);
        cargo.args(["build", "--release"]).args(EXECUTABLES);
        cargo.args(["--package", "fence-bench", "--bin", "fence-bench"]);
        progress::shown("building the daemon and the soak", cargo)?;
    }
    let program = workspace.binary("fence-bench", true);
    let soak = Privilege::of_this_process().command(&program);
    let mut soak = soak.context("the soak makes namespaces and kills machines in them: run it as root")?;
    soak.arg("soak").arg("--daemon").arg(workspace.binary("fence-daemon", true));
    soak.args(["--minutes", &options.minutes.to_string()]);
    if let Some(seed) = options.seed {
        soak.args(["--seed", &seed.to_string()]);
    }
    if options.write {
        soak.arg("--write").arg(workspace.root().join("docs/measured"));
    }
    if let Some(beside) = &options.beside {
        soak.arg("--beside").arg(beside);
    }
    say(format!("running {}", progress::line(&soak)));
    let status = soak.status().with_context(|| format!("cannot start {}", program.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
