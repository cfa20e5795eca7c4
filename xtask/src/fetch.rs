//! `cargo xtask setup --fetch`: downloads now, with the tests' own code, what the tests would
//! download when they first need it.

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

/// The program that downloads.
const PROGRAM: &str = "fence-fetch";

/// Downloads every file that is not there yet.
///
/// # Errors
/// Debian's archive cannot be reached, or does not match this machine's apt.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    setup::ensure(workspace, Profile::Test)?;
    let object = bpf::build(workspace.root())?;
    build(workspace, &object)?;
    let mut program = program(workspace)?;
    say(format!("running {}", progress::line(&program)));
    let status = program.status().with_context(|| format!("cannot start {PROGRAM}"))?;
    if !status.success() {
        bail!("some downloads failed: see above, and run `cargo xtask setup --fetch` again");
    }
    Ok(())
}

fn build(workspace: &Workspace, object: &Path) -> anyhow::Result<()> {
    let mut cargo = workspace.cargo(object);
    cargo.args(["build", "--package", "fence-lab", "--bin", PROGRAM]);
    progress::shown("building the downloader", cargo)
}

fn program(workspace: &Workspace) -> anyhow::Result<std::process::Command> {
    let program = Privilege::of_this_process().command(workspace.binary(PROGRAM, false));
    program.context("the nodes' root directory can only be made as root: run this as root")
}

/// The same download beside tests that do not need it. Dropping it ends the download.
#[derive(Debug)]
pub(crate) struct Fetching {
    child: Child,
    said: Option<JoinHandle<String>>,
}

impl Fetching {
    /// Starts the download.
    ///
    /// # Errors
    /// The downloader cannot be built or started.
    pub(crate) fn start(workspace: &Workspace, object: &Path) -> anyhow::Result<Self> {
        build(workspace, object)?;
        let mut program = program(workspace)?;
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = program.spawn().with_context(|| format!("cannot start {PROGRAM}"))?;
        say("downloading the files of guests and cluster nodes, beside the first tests");
        let said = child.stderr.take().map(|mut pipe| {
            thread::spawn(move || {
                let mut said = Vec::new();
                // Output from before this point is shown all the same.
                let _ = pipe.read_to_end(&mut said);
                String::from_utf8_lossy(&said).into_owned()
            })
        });
        Ok(Self { child, said })
    }

    /// Waits for the end of the download. A failure is reported here and is no error: the tests
    /// that need the missing files will fail and say so.
    ///
    /// # Errors
    /// The downloader's exit status cannot be read.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_none() {
            say("waiting for the download to finish");
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
        // The download has ended, or is not needed any more. Partial files are not kept.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
