//! `cargo xtask setup --fetch`: what tests download when they first need it, downloaded now, by the
//! tests' own code.

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, bail};

use crate::bpf;
use crate::privilege::Privilege;
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
    build(workspace, &object)?;
    let mut program = program(workspace)?;
    say(format!("running {}", progress::line(&program)));
    let status = program.status().with_context(|| format!("cannot start {PROGRAM}"))?;
    if !status.success() {
        bail!("not all of it could be had");
    }
    Ok(())
}

fn build(workspace: &Workspace, object: &Path) -> anyhow::Result<()> {
    let mut cargo = workspace.cargo(object);
    cargo.args(["build", "--package", "fence-lab", "--bin", PROGRAM]);
    progress::shown("building what fetches", cargo)
}

fn program(workspace: &Workspace) -> anyhow::Result<std::process::Command> {
    let program = Privilege::of_this_process().command(workspace.binary(PROGRAM, false));
    program.context("the nodes' root directory is made as root: run this as root")
}

/// The same beside the tests that need nothing of it. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Fetching {
    child: Child,
    said: Option<JoinHandle<String>>,
}

impl Fetching {
    /// Begins.
    ///
    /// # Errors
    /// If what fetches cannot be built or started.
    pub(crate) fn start(workspace: &Workspace, object: &Path) -> anyhow::Result<Self> {
        build(workspace, object)?;
        let mut program = program(workspace)?;
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = program.spawn().with_context(|| format!("cannot start {PROGRAM}"))?;
        say("fetching what guests and nodes of clusters are made of, beside the first tests");
        let said = child.stderr.take().map(|mut pipe| {
            thread::spawn(move || {
                let mut said = Vec::new();
                // What was said so far is told all the same.
                let _ = pipe.read_to_end(&mut said);
                String::from_utf8_lossy(&said).into_owned()
            })
        });
        Ok(Self { child, said })
    }

    /// Waits for its end. That it failed is told here and is no error: the tests that need what it
    /// did not get will say so.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_none() {
            say("waiting for what is still being fetched");
        }
        let status = self.child.wait()?;
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        if !status.success() {
            eprintln!("{said}");
        }
        Ok(())
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        // It has ended, or nobody wants any more what it gets; half of something is not kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
