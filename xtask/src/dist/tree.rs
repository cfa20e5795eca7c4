//! The files of each package, at the places where they are installed.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;

use super::{Built, bill};
use crate::progress;
use crate::tidy;
use crate::workspace::Workspace;

/// The package for hypervisors, and that for cluster nodes.
pub(super) const HOST: &str = "fence-xdp";
pub(super) const NODE: &str = "fence-xdp-node";
pub(super) const PACKAGES: [&str; 2] = [HOST, NODE];

/// The executables, and where the package for hypervisors has each. The package for nodes has
/// [`GUEST`] alone, at the daemon's place.
pub(super) const EXECUTABLES: [(&str, &str); 3] = [
    ("fence-daemon", "usr/sbin/fence-daemon"),
    ("fence-daemon-commands", "usr/libexec/fence-xdp/fence-daemon-commands"),
    (GUEST, ""),
];
const GUEST: &str = "fence-daemon-node";

const EXECUTABLE: u32 = 0o755;
const DATA: u32 = 0o644;

/// The tree of a package.
struct Tree(PathBuf);

impl Tree {
    fn place(&self, to: &str) -> anyhow::Result<PathBuf> {
        let path = self.0.join(to);
        let folder = path.parent().context("a place has a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(path)
    }

    fn write(&self, to: &str, content: &[u8], mode: u32) -> anyhow::Result<()> {
        let path = self.place(to)?;
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("cannot set the mode of {}", path.display()))
    }

    fn copy(&self, from: &Path, to: &str, mode: u32) -> anyhow::Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.write(to, &content, mode)
    }

    /// An executable without its debug information.
    fn executable(&self, from: &Path, to: &str) -> anyhow::Result<()> {
        let mut strip = Command::new("strip");
        strip.arg("--strip-unneeded").arg("-o").arg(self.place(to)?).arg(from);
        progress::shown("strip", strip)
    }

    /// Every file of a folder of `dist`, but for those that only tests read.
    fn folder(&self, from: &Path, to: &str) -> anyhow::Result<()> {
        let is_installed = |path: &PathBuf| !path.to_string_lossy().ends_with(".test.yml");
        // Parts of the project bring them one by one.
        let files = if from.is_dir() { tidy::files(from)? } else { Vec::new() };
        for file in files.into_iter().filter(is_installed) {
            let below = file.strip_prefix(from).unwrap_or(&file).display();
            self.copy(&file, &format!("{to}/{below}"), DATA)?;
        }
        Ok(())
    }

    fn link(&self, at: &str, to: &str) -> anyhow::Result<()> {
        let path = self.place(at)?;
        symlink(to, &path).with_context(|| format!("cannot make {}", path.display()))
    }
}

/// Lays out both packages below `stage`.
pub(super) fn lay_out(workspace: &Workspace, built: &Built, stage: &Path) -> anyhow::Result<()> {
    let root = workspace.root();
    let (host, node) = (Tree(stage.join(HOST)), Tree(stage.join(NODE)));
    for (name, to) in EXECUTABLES.iter().filter(|(_, to)| !to.is_empty()) {
        host.executable(&built.executables.join(name), to)?;
    }
    node.executable(&built.executables.join(GUEST), "usr/sbin/fence-daemon")?;
    // Scripts that call the server by its old name find it. pcs knows the name as no fence agent's.
    host.link("usr/sbin/fence_virtd", "fence-daemon")?;

    let catalog = root.join("dist/fence-daemon.catalog");
    if catalog.is_file() {
        host.copy(&catalog, "usr/lib/systemd/catalog/fence-daemon.catalog", DATA)?;
    }
    for unit in ["fence-daemon.service", "fence-daemon.socket"] {
        host.copy(&root.join("dist").join(unit), &format!("usr/lib/systemd/system/{unit}"), DATA)?;
    }
    let generator = "fence-daemon-generator";
    let place = format!("usr/lib/systemd/system-generators/{generator}");
    host.copy(&root.join("dist").join(generator), &place, EXECUTABLE)?;
    let module = "usr/share/selinux/packages/fence-xdp.cil";
    host.copy(&root.join("dist/selinux/fence-xdp.cil"), module, DATA)?;
    host.copy(&root.join("dist/firewalld/fence-xdp.xml"), "usr/lib/firewalld/services/fence-xdp.xml", DATA)?;
    for tree in [&host, &node] {
        let guest = "fence-xdp-guest.xml";
        tree.copy(&root.join("dist/firewalld").join(guest), &format!("usr/lib/firewalld/services/{guest}"), DATA)?;
        let plugin = "stonith/external/fence-xdp";
        let place = "usr/lib/stonith/plugins/external/fence-xdp";
        tree.copy(&root.join("dist").join(plugin), place, EXECUTABLE)?;
    }
    for folder in ["ansible", "grafana", "prometheus"] {
        host.folder(&root.join("dist").join(folder), &format!("usr/share/fence-xdp/{folder}"))?;
    }
    manual(&built.manual, &host, &node)?;
    documents(workspace, &host, &node)
}

/// The manual pages and completions.
fn manual(from: &Path, host: &Tree, node: &Tree) -> anyhow::Result<()> {
    for page in tidy::files(&from.join("man"))? {
        let name = page.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let section = name.rsplit('.').next().unwrap_or_default();
        host.copy(&page, &format!("usr/share/man/man{section}/{name}"), DATA)?;
        if name == "fence-daemon-doctor.8" {
            node.copy(&page, &format!("usr/share/man/man{section}/{name}"), DATA)?;
        }
    }
    host.link("usr/share/man/man8/fence_virtd.8", "fence-daemon.8")?;
    let completions = from.join("completions");
    for (script, to) in [
        ("bash/fence-daemon", "usr/share/bash-completion/completions/fence-daemon"),
        ("zsh/_fence-daemon", "usr/share/zsh/vendor-completions/_fence-daemon"),
        ("fish/fence-daemon.fish", "usr/share/fish/vendor_completions.d/fence-daemon.fish"),
    ] {
        host.copy(&completions.join(script), to, DATA)?;
    }
    Ok(())
}

/// The pages of this repository, the licences of all that is inside, and the list of it.
fn documents(workspace: &Workspace, host: &Tree, node: &Tree) -> anyhow::Result<()> {
    let root = workspace.root();
    let bill = bill::Bill::of(workspace)?;
    for (tree, name) in [(host, HOST), (node, NODE)] {
        let folder = format!("usr/share/doc/{name}");
        for page in ["LICENSE-MIT", "LICENSE-APACHE"] {
            tree.copy(&root.join(page), &format!("{folder}/{page}"), DATA)?;
        }
        tree.write(&format!("{folder}/THIRD-PARTY-LICENSES.txt"), bill.licences()?.as_bytes(), DATA)?;
        tree.write(&format!("{folder}/sbom.cdx.json"), bill.cyclone_dx(name).as_bytes(), DATA)?;
    }
    for page in ["README.md", "CHANGELOG.md", "SECURITY.md", "GLOSSARY.md"] {
        host.copy(&root.join(page), &format!("usr/share/doc/{HOST}/{page}"), DATA)?;
    }
    for page in tidy::files(&root.join("docs"))? {
        let below = page.strip_prefix(root).unwrap_or(&page);
        host.copy(&page, &format!("usr/share/doc/{HOST}/{}", below.display()), DATA)?;
    }
    Ok(())
}

/// Gives every file the same time, so that two builds are the same.
pub(super) fn set_times(stage: &Path, epoch: u64) -> anyhow::Result<()> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(epoch);
    for file in tidy::files(stage)? {
        let opened =
            File::options().write(true).open(&file).with_context(|| format!("cannot open {}", file.display()))?;
        opened.set_modified(time).with_context(|| format!("cannot set the time of {}", file.display()))?;
    }
    Ok(())
}
