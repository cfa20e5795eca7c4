//! `cargo xtask run`: the daemon on a hypervisor, the lab on any other machine.

use std::env;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

use crate::bpf;
use crate::hypervisor;
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::{EXECUTABLES, Workspace};

/// Options of `cargo xtask run`.
#[derive(Debug, clap::Args)]
pub(crate) struct RunOptions {
    /// Run the lab, also on a hypervisor
    #[arg(long)]
    lab: bool,
    /// Lab: answer its requests, print the table, clean up, and exit 0 if every answer was right
    #[arg(long)]
    once: bool,
    /// Build without optimisation
    #[arg(long)]
    debug: bool,
    /// Run the existing build: needs neither network nor compiler
    #[arg(long)]
    no_build: bool,
    /// Arguments for the daemon, or for the lab
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Builds the daemon or the lab and executes it, so its exit status is ours.
///
/// # Errors
/// A requirement is missing, or another daemon is in the way.
pub(crate) fn run(workspace: &Workspace, options: &RunOptions) -> anyhow::Result<ExitCode> {
    match hypervisor::detect(Path::new("/")) {
        Ok(_) if options.lab => {
            say("running the lab: its bridge is in its own network namespace, this hypervisor's stays unchanged");
            lab(workspace, options)
        }
        Ok(_) if options.once => bail!("--once is an option of the lab, and this machine is a hypervisor: add --lab"),
        Ok(socket) => {
            say(format!("this machine is a hypervisor ({} and virbr0)", socket.display()));
            daemon(workspace, options)
        }
        Err(why) => {
            if !options.lab {
                say(format!("this machine is no hypervisor ({why}): running the lab"));
            }
            lab(workspace, options)
        }
    }
}

/// Runs the daemon with the machine's configuration, or with one of our own.
fn daemon(workspace: &Workspace, options: &RunOptions) -> anyhow::Result<ExitCode> {
    if !options.no_build {
        build(workspace, !options.debug, Profile::Build, &EXECUTABLES)?;
    }
    let program = workspace.binary("fence-daemon", !options.debug);
    let stock = Path::new("/etc/fence_virt.conf");
    let config = if stock.exists() { stock.to_owned() } else { own_config(&program)? };
    say(format!("using {}", config.display()));
    let mut arguments = vec![OsString::from("-F"), "-f".into(), config.into()];
    arguments.extend_from_slice(&options.arguments);
    become_root_program(&program, arguments)
}

/// Our own configuration and its key, in the user's directory and never in /etc. The daemon's `-c`
/// makes them and says how guests get the key. Existing files stay: guests have copies of the key.
fn own_config(program: &Path) -> anyhow::Result<PathBuf> {
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    let folder = state.context("no directory for the key: set XDG_STATE_HOME or HOME")?.join("fence-xdp");
    let file = folder.join("fence_virt.conf");
    if !file.exists() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.with_context(|| format!("cannot make {}", folder.display()))?;
        let mut configure = Command::new(program);
        configure.args(["-c", "--yes", "--interface", "virbr0", "--create-key", "--key-file"]);
        configure.arg(folder.join("fence_xvm.key")).arg("-f").arg(&file);
        progress::shown("making a configuration and a key, as /etc has none", configure)?;
    }
    Ok(file)
}

fn lab(workspace: &Workspace, options: &RunOptions) -> anyhow::Result<ExitCode> {
    if !options.no_build {
        let lab = ["--package", "fence-lab", "--bin", "fence-lab"];
        build(workspace, !options.debug, Profile::Lab, &[&EXECUTABLES[..], &lab].concat())?;
    }
    let mut arguments = vec![OsString::from("--daemon"), workspace.binary("fence-daemon", !options.debug).into()];
    arguments.extend(options.once.then(|| "--once".into()));
    arguments.extend_from_slice(&options.arguments);
    become_root_program(&workspace.binary("fence-lab", !options.debug), arguments)
}

/// Installs the requirements of `profile` and builds `what`.
///
/// # Errors
/// Setup or the build fails.
pub(crate) fn build(workspace: &Workspace, release: bool, profile: Profile, what: &[&str]) -> anyhow::Result<()> {
    setup::ensure(workspace, profile)?;
    let object = bpf::build(workspace.root())?;
    let mut cargo = workspace.cargo(&object);
    cargo.arg("build").args(release.then_some("--release")).args(what);
    progress::shown("building the daemon", cargo)
}

/// Replaces this process, so that signals and the exit status are the program's own.
///
/// # Errors
/// The program was not built, or there is no way to root's rights.
pub(crate) fn become_root_program(program: &Path, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    if !program.is_file() {
        bail!("{} is not built yet: run this without --no-build", program.display());
    }
    let command = Privilege::of_this_process().command(program);
    let mut command = command.with_context(|| {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        format!(
            "the program needs root, and sudo does not work here. As root: {} {}",
            program.display(),
            arguments.join(" ")
        )
    })?;
    command.args(arguments);
    say(format!("running {}", progress::line(&command)));
    Err(command.exec()).with_context(|| format!("cannot run {}", program.display()))
}
