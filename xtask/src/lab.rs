//! `cargo xtask lab`: something to play with, kept up until Ctrl-C.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::run;
use crate::setup::Profile;
use crate::workspace::Workspace;

/// What is kept up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Two containers with corosync and Pacemaker, fenced by the daemon
    Cluster,
}

/// What to keep up, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What is kept up
    #[arg(value_enum, default_value_t = Kind::Cluster, value_name = "KIND")]
    kind: Kind,
    /// Fenced by stock's fence_virtd instead, for comparison
    #[arg(long)]
    stock: bool,
    /// Show that it comes up, and exit
    #[arg(long)]
    once: bool,
    /// Run what was built before: needs neither network nor compiler
    #[arg(long)]
    no_build: bool,
}

/// Builds, and becomes the lab: its exit status is ours.
///
/// # Errors
/// If something is missing.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<ExitCode> {
    let program = match options.kind {
        Kind::Cluster => "fence-cluster",
    };
    if !options.no_build {
        let what = ["--package", "fence-daemon", "--package", "fence-lab", "--bin", "fence-daemon", "--bin", program];
        run::build(workspace, true, Profile::Test, &what)?;
    }
    let mut arguments: Vec<OsString> = Vec::new();
    if options.stock {
        arguments.push("--stock".into());
    } else {
        arguments.extend([OsString::from("--daemon"), workspace.binary("fence-daemon", true).into()]);
    }
    arguments.extend(options.once.then(|| "--once".into()));
    run::become_root_program(&workspace.binary(program, true), arguments)
}
