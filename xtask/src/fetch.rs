//! `cargo xtask setup --fetch`: what tests download when they first need it, downloaded now, by the tests' own code.

use anyhow::{Context as _, bail};

use crate::bpf;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::Workspace;

/// Whose only job that is.
const PROGRAM: &str = "fence-fetch";

/// Downloads all of it that is not there.
///
/// # Errors
/// If Debian's archive cannot be reached, or is not what this machine's apt knows.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    setup::ensure(workspace, Profile::Test)?;
    let object = bpf::build(workspace.root())?;
    let mut cargo = workspace.cargo(&object);
    cargo.args(["build", "--package", "fence-tests", "--bin", PROGRAM]);
    progress::shown("building what fetches", cargo)?;
    let mut program = workspace.program(workspace.binary(PROGRAM, false));
    say(format!("running {}", progress::line(&program)));
    let status = program.status().with_context(|| format!("cannot start {PROGRAM}"))?;
    if !status.success() {
        bail!("not all of it could be had");
    }
    Ok(())
}
