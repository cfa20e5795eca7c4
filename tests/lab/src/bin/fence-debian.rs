//! Runs a program in a root directory with another release of Debian: its libvirt, QEMU, fence-virt
//! and corosync, and this machine's kernel. `cargo xtask test trixie` has cargo start the test
//! programs by it.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};
use fence_lab::cluster::image::Image;
use fence_lab::{program, tools};

const ENTER: &str = include_str!("../assets/release.sh");

fn main() -> ExitCode {
    program::exit("fence-debian", become_program(env::args_os().skip(1)).map(|()| true))
}

/// Returns only if the program could not be started.
fn become_program(mut arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let usage = "usage: fence-debian RELEASE PROGRAM [ARGUMENT ...]";
    let release = arguments.next().context(usage)?.into_string().ok().context(usage)?;
    tools::require(&["unshare"])?;
    let image = Image::lab(&release)?;
    let [workspace, target] = [tools::workspace(), tools::target_directory()]
        .map(|path| path.canonicalize().with_context(|| path.display().to_string()));
    let target = target?;
    let place = target.join("lab-cache/mount");
    std::fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
    let mut command = Command::new(tools::find("unshare")?);
    command.args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "fence-debian"]);
    command.arg(image.root()).arg(&place).arg(workspace?).arg(&target).args(arguments);
    Err(command.exec()).context("unshare")
}
