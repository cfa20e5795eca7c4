//! The .rpm packages, by rpmbuild.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use super::{EPOCH, VERSION, tree};
use crate::progress;

/// Directories that only these packages have, with all below them. All others belong to the system.
const OWN: [&str; 4] =
    ["usr/libexec/fence-xdp", "usr/share/fence-xdp", "usr/share/doc/fence-xdp", "usr/share/doc/fence-xdp-node"];

/// Packs what is below `stage` into `out`: `small`, or fast.
pub(super) fn build(root: &Path, out: &Path, stage: &Path, epoch: u64, small: bool) -> anyhow::Result<()> {
    for package in tree::PACKAGES {
        let list = stage.join(format!("{package}.files"));
        fs::write(&list, list_of(&stage.join(package))?).with_context(|| format!("cannot write {}", list.display()))?;
    }
    let work = out.join("rpm");
    let mut rpmbuild = Command::new("rpmbuild");
    rpmbuild.arg("-bb").args(tree::PACKAGES.map(|package| root.join(format!("dist/rpm/{package}.spec"))));
    rpmbuild.env(EPOCH, epoch.to_string());
    for (name, value) in [
        ("_topdir", work.display().to_string()),
        ("_rpmdir", work.join("packages").display().to_string()),
        // The database of this machine's packages is not asked: on Debian it knows none.
        ("_dbpath", work.join("database").display().to_string()),
        ("_buildhost", "localhost".to_owned()),
        ("use_source_date_epoch_as_buildtime", "1".to_owned()),
        ("clamp_mtime_to_source_date_epoch", "1".to_owned()),
        ("stage", stage.display().to_string()),
        ("tree_version", VERSION.to_owned()),
        ("_binary_payload", if small { "w9.xzdio" } else { "w1.gzdio" }.to_owned()),
    ] {
        rpmbuild.arg("--define").arg(format!("{name} {value}"));
    }
    progress::shown("building the .rpm packages", rpmbuild)?;
    for package in crate::tidy::files(&work.join("packages"))? {
        let to = out.join(package.file_name().unwrap_or_default());
        fs::rename(&package, &to).with_context(|| format!("cannot move {}", package.display()))?;
    }
    Ok(())
}

/// The files of a package's tree as rpmbuild's `%files -f` reads them.
fn list_of(tree: &Path) -> anyhow::Result<String> {
    let mut text = "%defattr(-,root,root)\n".to_owned();
    let mut folders = vec![tree.to_owned()];
    let mut lines: Vec<PathBuf> = Vec::new();
    let mut own: Vec<PathBuf> = Vec::new();
    while let Some(folder) = folders.pop() {
        if let Ok(place) = folder.strip_prefix(tree)
            && OWN.iter().any(|own| place.starts_with(own))
        {
            own.push(place.to_owned());
        }
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                lines.push(entry.path());
            }
        }
    }
    lines.sort_unstable();
    own.sort_unstable();
    for own in own {
        let _ = writeln!(text, "%dir /{}", own.display());
    }
    for path in lines {
        let place = path.strip_prefix(tree).unwrap_or(&path);
        let mode = path.symlink_metadata()?.mode() & 0o7777;
        let attributes = if path.is_symlink() { String::new() } else { format!("%attr({mode:o},root,root) ") };
        let _ = writeln!(text, "{attributes}\"/{}\"", place.display());
    }
    Ok(text)
}
