//! `cargo xtask run`: the daemon on a hypervisor, the lab on any other machine.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, bail};

use crate::bpf;
use crate::hypervisor::{self, Hypervisor, StockConfig};
use crate::own_config::{self, OwnConfig};
use crate::privilege::Privilege;
use crate::progress::{self, say};
use crate::setup::{self, Profile};
use crate::workspace::Workspace;

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
    let root = Path::new("/");
    match Hypervisor::detect(root) {
        Ok(_) if options.lab => {
            say("running the lab: its bridge is in its own network namespace, this hypervisor's stays unchanged");
            lab(workspace, options)
        }
        Ok(_) if options.once => bail!("--once is an option of the lab, and this machine is a hypervisor: add --lab"),
        Ok(found) => {
            say(format!("this machine is a hypervisor ({} and virbr0)", found.socket.display()));
            daemon(workspace, options, root)
        }
        Err(why) => {
            if !options.lab {
                say(format!("this machine is no hypervisor ({why}): running the lab"));
            }
            lab(workspace, options)
        }
    }
}

fn daemon(workspace: &Workspace, options: &RunOptions, root: &Path) -> anyhow::Result<ExitCode> {
    let stock = stock_config(root)?;
    // Checked before the build, which takes minutes the first time.
    let port = stock.as_ref().map_or(hypervisor::PORT, |stock| stock.port);
    if hypervisor::udp_port_taken(root, port) {
        if hypervisor::stock_daemon_runs(root) {
            bail!("fence_virtd runs on this machine: stop it (systemctl disable --now fence_virtd) and run this again");
        }
        bail!(
            "UDP port {port} is in use: `ss -ulnp 'sport = :{port}'` shows the process. Only one daemon can serve it"
        );
    }
    if !options.no_build {
        build(workspace, !options.debug, Profile::Build, &["--package", "fence-daemon", "--bin", "fence-daemon"])?;
    }

    let config = match stock {
        Some(stock) if stock.key_exists => {
            say(format!("using {} and its key {}", stock.file.display(), stock.key.display()));
            stock.file
        }
        found => {
            if let Some(stock) = found {
                say(format!(
                    "{} names the key {}, which does not exist: not using it",
                    stock.file.display(),
                    stock.key.display()
                ));
            }
            own_config()?
        }
    };
    let mut arguments = vec![OsString::from("-F"), "-f".into(), config.into()];
    arguments.extend_from_slice(&options.arguments);
    become_root_program(&workspace.binary("fence-daemon", !options.debug), arguments)
}

/// The configuration of fence_virtd, read with root's rights if needed: Debian's package makes it
/// readable for root only.
fn stock_config(root: &Path) -> anyhow::Result<Option<StockConfig>> {
    let error = match StockConfig::read(root) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => error,
        read => return read.with_context(|| format!("cannot read /{}", hypervisor::STOCK_CONFIG)),
    };
    let Some(mut cat) = Privilege::of_this_process().command("cat") else {
        return Err(error).with_context(|| {
            format!(
                "cannot read /{} without root's rights, and sudo does not work here: run this as root",
                hypervisor::STOCK_CONFIG
            )
        });
    };
    let read = cat.arg(root.join(hypervisor::STOCK_CONFIG)).stderr(Stdio::inherit()).output();
    let read = read.with_context(|| format!("cannot start {}", progress::line(&cat)))?;
    if !read.status.success() {
        bail!("`{}` failed ({})", progress::line(&cat), read.status);
    }
    Ok(Some(StockConfig::of(root, &read.stdout)))
}

/// Our own configuration, and the way its key gets to the guests.
fn own_config() -> anyhow::Result<PathBuf> {
    let own = OwnConfig::ensure(&own_config::folder()?)?;
    let (file, key) = (own.file.display(), own.key.display());
    if own.is_new {
        say(format!("no configuration with a key in /etc: made {file} and a random key {key}"));
    } else {
        say(format!("no configuration with a key in /etc: using our own {file} and {key}"));
    }
    say("copy that key to each guest that may fence:");
    eprintln!(
        "      scp {key} root@GUEST:/etc/cluster/fence_xvm.key   (mkdir -p /etc/cluster there before, chmod 600 after)"
    );
    eprintln!("      then, in the guest: fence_xvm -o list");
    Ok(own.file)
}

fn lab(workspace: &Workspace, options: &RunOptions) -> anyhow::Result<ExitCode> {
    let binaries =
        ["--package", "fence-daemon", "--package", "fence-lab", "--bin", "fence-daemon", "--bin", "fence-lab"];
    if !options.no_build {
        build(workspace, !options.debug, Profile::Lab, &binaries)?;
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
