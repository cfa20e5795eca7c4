//! `cargo xtask soak`: builds the daemon optimised, and lets load, floods and faults loose on it.

use std::process::ExitCode;

use crate::bench;
use crate::workspace::Workspace;

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
    let mut soak = bench::program(workspace, options.no_build)?;
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
    bench::finish(soak)
}
