//! A small Debian system with a layer in memory over it, for tools that need no systemd.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::image::Image;

/// Mounts the layer in a mount namespace that ends with the script, and runs the script after it.
const LAYER: &str = r#"
set -eu
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
root=$work/root
mount -t overlay -o "lowerdir=$image,upperdir=$work/upper,workdir=$work/work" overlay "$root"
mount --bind /proc "$root/proc"
mount --bind /dev "$root/dev"
"#;

/// Runs a line of shell with `$root`, a directory that is the image's until something writes to it,
/// and `$package`. Returns what it prints.
pub(crate) fn run(image: &Image, package: &Path, script: &str) -> Result<String> {
    let work = tempfile::tempdir()?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &format!("{LAYER}{script}")]);
    command.env("work", work.path()).env("image", image.root()).env("package", package).env("LC_ALL", "C");
    let done = command.output().context("cannot run unshare")?;
    let (out, errors) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    ensure!(done.status.success(), "{}: {out}{errors}", done.status);
    Ok(out.into_owned())
}
