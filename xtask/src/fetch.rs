//! `cargo xtask setup --fetch`: downloads now, with the tests' own code, what the tests would
//! download when they first need it.

use anyhow::Context as _;

use crate::bpf;
use crate::privilege::Privilege;
use crate::progress::{self, Running};
use crate::setup::{self, Profile};
use crate::workspace::Workspace;

/// The program that downloads.
const PROGRAM: &str = "fence-fetch";

/// Downloads every file that is not there yet.
///
/// # Errors
/// Debian's archive cannot be reached, or does not match this machine's apt.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    start(workspace)?.finish()
}

/// Starts the download. It mostly waits for the archive, so that other work can go on beside it.
///
/// # Errors
/// The downloader cannot be built or started.
pub(crate) fn start(workspace: &Workspace) -> anyhow::Result<Running> {
    setup::ensure(workspace, Profile::Test)?;
    let mut cargo = workspace.cargo(&bpf::build(workspace.root())?);
    cargo.args(["build", "--bin", PROGRAM]);
    progress::shown("building the downloader", cargo)?;
    let program = Privilege::of_this_process().command(workspace.binary(PROGRAM, false));
    let program = program.context("the nodes' root directory can only be made as root: run this as root")?;
    Running::start("downloading the files of guests and cluster nodes", program)
}
