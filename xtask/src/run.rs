//! `cargo xtask run`: the daemon on a hypervisor, the lab on a machine that is none.

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

/// How to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run the lab, also on a hypervisor
    #[arg(long)]
    lab: bool,
    /// Lab: answer its requests, print the table, clean up, exit 0 if every one was answered as it
    /// should be
    #[arg(long)]
    once: bool,
    /// Build without optimisation
    #[arg(long)]
    debug: bool,
    /// Run what was built before: needs neither network nor compiler
    #[arg(long)]
    no_build: bool,
    /// Arguments for the daemon, or for the lab
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Builds, and becomes the daemon or the lab: its exit status is ours.
///
/// # Errors
/// If something is missing or in the way.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> anyhow::Result<ExitCode> {
    let root = Path::new("/");
    match Hypervisor::detect(root) {
        Ok(_) if options.lab => {
            say(
                "running the lab: it has its own bridge in a network namespace of its own, this hypervisor's is not touched",
            );
            lab(workspace, options)
        }
        Ok(_) if options.once => bail!("this machine is a hypervisor, and --once is the lab's: add --lab"),
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

fn daemon(workspace: &Workspace, options: &Options, root: &Path) -> anyhow::Result<ExitCode> {
    let stock = stock_config(root)?;
    // Before the build, which takes minutes the first time.
    let port = stock.as_ref().map_or(hypervisor::PORT, |stock| stock.port);
    if hypervisor::udp_port_taken(root, port) {
        if hypervisor::stock_daemon_runs(root) {
            bail!(
                "stock's fence_virtd runs here: stop it first (systemctl disable --now fence_virtd), then run this again"
            );
        }
        bail!("UDP port {port} is taken: `ss -ulnp 'sport = :{port}'` says by whom. One daemon at a time can serve it");
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
                    "{} names the key {}, which is not there: not using it",
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

/// Stock's configuration, read with root's rights where ours do not suffice: Debian's package makes
/// it for root only.
fn stock_config(root: &Path) -> anyhow::Result<Option<StockConfig>> {
    let error = match StockConfig::read(root) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => error,
        read => return read.with_context(|| format!("cannot read /{}", hypervisor::STOCK_CONFIG)),
    };
    let Some(mut cat) = Privilege::of_this_process().command("cat") else {
        return Err(error).with_context(|| {
            format!("cannot read /{}, and there is no sudo that works here: run this as root", hypervisor::STOCK_CONFIG)
        });
    };
    let read = cat.arg(root.join(hypervisor::STOCK_CONFIG)).stderr(Stdio::inherit()).output();
    let read = read.with_context(|| format!("cannot start {}", progress::line(&cat)))?;
    if !read.status.success() {
        bail!("`{}` failed ({})", progress::line(&cat), read.status);
    }
    Ok(Some(StockConfig::of(root, &read.stdout)))
}

/// Our own configuration, and how the guests get its key.
fn own_config() -> anyhow::Result<PathBuf> {
    let own = OwnConfig::ensure(&own_config::folder()?)?;
    let (file, key) = (own.file.display(), own.key.display());
    if own.is_new {
        say(format!("no configuration with a key in /etc: made {file} and a random key {key}"));
    } else {
        say(format!("no configuration with a key in /etc: using our own {file} and {key}"));
    }
    say("each guest that may fence needs a copy of that key:");
    eprintln!(
        "      scp {key} root@GUEST:/etc/cluster/fence_xvm.key   (mkdir -p /etc/cluster there before, chmod 600 after)"
    );
    eprintln!("      then, in the guest: fence_xvm -o list");
    Ok(own.file)
}

fn lab(workspace: &Workspace, options: &Options) -> anyhow::Result<ExitCode> {
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

/// Installs what `profile` needs and builds `what`.
///
/// # Errors
/// If either fails.
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
/// If it was not built, or there is no way to root's rights.
pub(crate) fn become_root_program(program: &Path, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    if !program.is_file() {
        bail!("{} was not built yet: run this without --no-build", program.display());
    }
    let command = Privilege::of_this_process().command(program);
    let mut command = command.with_context(|| {
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        format!(
            "it needs root, and there is no sudo that works here. As root: {} {}",
            program.display(),
            arguments.join(" ")
        )
    })?;
    command.args(arguments);
    say(format!("running {}", progress::line(&command)));
    Err(command.exec()).with_context(|| format!("cannot run {}", program.display()))
}
