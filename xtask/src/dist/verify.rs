//! `cargo xtask dist --verify`: the packages again, from a copy of the tree in another directory.
//!
//! Two builds of one source have the same bytes. So anybody can check that a package is made of
//! what it claims. A path of the machine would betray itself here, and so would a time.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::{DIGESTS, EPOCH, Format, OUT};
use crate::name_of;
use crate::progress::{self, say};
use crate::workspace::Workspace;

/// The copy, from the workspace's root: a longer path, so that nothing depends on its length.
const ELSEWHERE: &str = "target/verify/somewhere/else";

/// Builds the same packages from a copy and compares their digests.
///
/// # Errors
/// The build fails, or packages differ.
pub(super) fn run(workspace: &Workspace, formats: &[Format], epoch: u64) -> anyhow::Result<()> {
    let root = workspace.root();
    let copy = root.join(ELSEWHERE);
    let _ = fs::remove_dir_all(&copy);
    copy_tree(workspace, &copy)?;
    let mut cargo = workspace.program(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&copy).args(["run", "--quiet", "--locked", "--package", "xtask", "--", "dist"]);
    cargo.args(formats.iter().map(name_of)).env(EPOCH, epoch.to_string()).env_remove("CARGO_TARGET_DIR");
    progress::shown("building the packages again, elsewhere", cargo)?;
    let digests = |root: &Path| -> anyhow::Result<BTreeSet<String>> {
        let path = root.join(OUT).join(DIGESTS);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let (here, there) = (digests(root)?, digests(&copy)?);
    if here != there {
        let differ: Vec<_> = here.difference(&there).map(String::as_str).collect();
        bail!("other bytes than in {}: compare these by diffoscope:\n{}", copy.display(), differ.join("\n"));
    }
    say(format!("{} packages are the same, built twice", here.len()));
    fs::remove_dir_all(root.join("target/verify")).context("cannot remove the copy")
}

/// Copies the files of the clone, as they are now.
fn copy_tree(workspace: &Workspace, to: &Path) -> anyhow::Result<()> {
    let mut git = workspace.program("git");
    let listed = git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).output();
    let listed = listed.context("cannot run git")?;
    ensure!(listed.status.success(), "this is no clone: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).context("a file's name is no text")?;
    let files: Vec<PathBuf> = names.split_terminator('\0').map(PathBuf::from).collect();
    for file in files.iter().filter(|file| workspace.root().join(file).exists()) {
        let place = to.join(file);
        let folder = place.parent().context("a place has a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        fs::copy(workspace.root().join(file), &place).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    Ok(())
}
