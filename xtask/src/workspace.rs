//! Paths of the workspace and its target directory, and the cargo command of every task.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

/// Names the BPF object for the daemon's build script and the tests.
pub(crate) const OBJECT_VARIABLE: &str = "FENCE_EBPF_OBJECT";

/// Cargo's selection of the daemon's executables. `fence-daemon` becomes the other one for all
/// commands.
pub(crate) const EXECUTABLES: [&str; 6] =
    ["--package", "fence-daemon", "--bin", "fence-daemon", "--bin", "fence-daemon-commands"];

/// The default target of the shell's compiler.
///
/// # Errors
/// rustc cannot be run.
pub(crate) fn host() -> anyhow::Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run `rustc -vV`")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: ")).context("`rustc -vV` prints no host")?;
    Ok(host.to_owned())
}

/// The tree that this xtask belongs to.
#[derive(Debug)]
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Finds the tree by xtask's manifest directory, which cargo sets at run time or at compile
    /// time.
    ///
    /// # Errors
    /// That directory has no parent, or is gone.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = manifest.parent().context("xtask's directory has no parent")?;
        let root = root.canonicalize().with_context(|| format!("the workspace {} is gone", root.display()))?;
        // Cargo resolves a relative CARGO_TARGET_DIR against its working directory, which is the
        // root for every cargo that xtask starts.
        let target = env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty());
        let target = root.join(target.unwrap_or_else(|| "target".into()));
        Ok(Self { root, target })
    }

    /// The absolute path of the workspace's root.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The absolute path of cargo's binary `name`.
    pub(crate) fn binary(&self, name: &str, release: bool) -> PathBuf {
        self.target.join(if release { "release" } else { "debug" }).join(name)
    }

    /// Cargo in the root of the workspace, with the BPF object at `object` for the daemon's build
    /// script and the tests.
    ///
    /// Every cargo gets the same environment: a different one would make it build the daemon again.
    pub(crate) fn cargo(&self, object: &Path) -> Command {
        let mut cargo = self.program(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.env(OBJECT_VARIABLE, object);
        cargo
    }

    /// A program in the root of the workspace, without the variables that cargo set for this xtask.
    pub(crate) fn program(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
                command.env_remove(&name);
            }
        }
        command
    }
}
