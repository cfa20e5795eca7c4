//! The .deb packages, by debhelper.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use super::{EPOCH, VERSION, date, packages};
use crate::progress;
use crate::tidy;

/// Who built the package, if the environment does not say so as Debian's tools have it.
const MAINTAINER: &str = "a local build <root@localhost>";

/// Packs what is below `stage` into `out`: `small`, or fast.
pub(super) fn build(root: &Path, out: &Path, stage: &Path, epoch: u64, small: bool) -> anyhow::Result<()> {
    let work = out.join("deb");
    let debian = work.join("debian");
    fs::create_dir_all(&debian).with_context(|| format!("cannot make {}", debian.display()))?;
    let from = root.join("dist/debian");
    for file in tidy::files(&from)? {
        let to = debian.join(file.strip_prefix(&from).unwrap_or(&file));
        fs::copy(&file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let maintainer = match (std::env::var("DEBFULLNAME"), std::env::var("DEBEMAIL")) {
        (Ok(name), Ok(address)) => format!("{name} <{address}>"),
        _ => MAINTAINER.to_owned(),
    };
    let control = debian.join("control");
    let text = fs::read_to_string(&control).context("no dist/debian/control")?;
    fs::write(&control, text.replace("@MAINTAINER@", &maintainer)).context("cannot write debian/control")?;
    let date = date(epoch, "-R")?;
    let changelog = format!(
        "fence-xdp ({VERSION}) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- {maintainer}  {date}\n"
    );
    fs::write(debian.join("changelog"), changelog).context("cannot write debian/changelog")?;
    std::os::unix::fs::symlink(stage, work.join("stage")).context("cannot link the staged files")?;

    let mut rules = Command::new(debian.join("rules"));
    rules
        .arg("binary")
        .args((!small).then_some("COMPRESSION=-Zgzip -z1"))
        .current_dir(&work)
        .env(EPOCH, epoch.to_string());
    // cargo's own variables for make would confuse debhelper's.
    for name in ["MAKEFLAGS", "MFLAGS", "CARGO_MAKEFLAGS"] {
        rules.env_remove(name);
    }
    progress::shown("building the .deb packages", rules)?;
    // debhelper puts them beside the directory of the source, which is `out`.
    packages(out).map(drop)
}
