//! `cargo xtask lab`: keeps a lab for experiments running until Ctrl-C.

use std::ffi::OsString;
use std::process::ExitCode;

use crate::run;
use crate::setup::Profile;
use crate::workspace::{EXECUTABLES, Workspace};

/// A kind of lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Two containers with corosync and Pacemaker, fenced by the daemon
    Cluster,
}

/// Options of `cargo xtask lab`.
#[derive(Debug, clap::Args)]
pub(crate) struct LabOptions {
    /// The kind of lab
    #[arg(value_enum, default_value_t = Kind::Cluster, value_name = "KIND")]
    kind: Kind,
    /// Fence by stock's fence_virtd instead, for comparison
    #[arg(long)]
    stock: bool,
    /// Start the lab, show that it works, and exit
    #[arg(long)]
    once: bool,
    /// Run the existing build: needs neither network nor compiler
    #[arg(long)]
    no_build: bool,
}

/// Builds the lab and executes it, so its exit status is ours.
///
/// # Errors
/// A requirement is missing, or the build fails.
pub(crate) fn run(workspace: &Workspace, options: &LabOptions) -> anyhow::Result<ExitCode> {
    let program = match options.kind {
        Kind::Cluster => "fence-cluster",
    };
    if !options.no_build {
        let lab = ["--package", "fence-lab", "--bin", program];
        run::build(workspace, true, Profile::Test, &[&EXECUTABLES[..], &lab].concat())?;
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
