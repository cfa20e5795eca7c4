//! A Debian hypervisor with fence_virtd and a libvirtd, and the packages at hand.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::Item;
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::guide::stage::Stage;
use fence_lab::guide::{Guide, Step};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::observer::Observer;
use fence_lab::packaged;
use fence_lab::process::{Finished, poll_until};
use fence_lab::qemu;
use fence_lab::server::Config;
use fence_lab::systemd::Booted;
use fence_lab::tools;

/// How long a daemon may take until it serves or answers on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const CONFIG: &str = "/etc/fence_virt.conf";
/// The page that is typed, its chapter, and its machines.
const PAGE: &str = "installation.md";
const CHAPTER: &str = "Install the packages";
pub(crate) const HYPERVISOR: &str = "hypervisor";
pub(crate) const NODE: &str = "node1";
/// Where the packages lie on that page.
const PLACE: &str = "/usr/src/fence-xdp/target/dist";
/// The command of the page that made them.
const MAKES_PACKAGES: &str = "cargo xtask dist";
/// Keeps apt from asking.
const APT: &str = "DEBIAN_FRONTEND=noninteractive apt-get --yes -o Dpkg::Use-Pty=0";

/// A package, by the beginning and the end of its file's name.
pub(crate) fn package(begin: &str, end: &str) -> Result<PathBuf> {
    let directory =
        std::env::var_os("FENCE_PACKAGES").context("no packages: run this by `cargo xtask test packages`")?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(begin) && name.ends_with(end) {
            found.push(path);
        }
    }
    ensure!(found.len() == 1, "{begin}*{end}: {found:?}");
    found.pop().context("no package")
}

/// A machine of a release of Debian.
pub(crate) struct Debian {
    /// Ends before systemd.
    libvirtd: Libvirtd,
    stage: Stage,
    observer: Observer,
    name: &'static str,
    root: PathBuf,
}

impl Debian {
    /// A hypervisor whose fence_virtd is configured and serves, as its package brings it.
    pub(crate) fn with_stock(suite: &str) -> Result<Self> {
        let mut config = Config::new(packaged::KEY);
        config.uris = vec![qemu::URI.to_owned()];
        let file = |path, mode, content: &[u8]| Item { path, mode, content: content.to_vec() };
        let files = [file(packaged::KEY, 0o600, &KEY), file(CONFIG, 0o640, config.render().as_bytes())];
        let debian = Self::boot(HYPERVISOR, suite, &files)?;
        debian.must("systemctl enable --now fence_virtd")?;
        Ok(debian)
    }

    /// A machine of that name where fence_virtd has never been configured.
    pub(crate) fn without_stock(name: &'static str, suite: &str) -> Result<Self> {
        let debian = Self::boot(name, suite, &[])?;
        debian.must("dpkg --purge fence-virtd")?;
        ensure!(debian.run(&format!("ls {CONFIG}"))?.code != Some(0), "a configuration is left");
        Ok(debian)
    }

    fn boot(name: &'static str, suite: &str, files: &[Item]) -> Result<Self> {
        let booted = Booted::of(&Image::hypervisor(suite)?, &Hypervisor::new()?, name, files)?;
        let hypervisor = booted.hypervisor().clone();
        let root = hypervisor.outside(booted.root());
        let libvirtd = Libvirtd::start(&hypervisor)?;
        qemu::start_idle(&libvirtd, "vm")?;
        let observer = Observer::new(&hypervisor, hypervisor.guest(1)?, &hypervisor.write("fence.key", &KEY)?);
        let mut stage = Stage::default();
        stage.add_host(name, booted);
        let debian = Self { libvirtd, stage, observer, name, root };
        // The lists of its archive, which is a directory.
        debian.apt("update")?;
        Ok(debian)
    }

    /// What the page says to do on this machine. The packages that it makes first are at hand.
    pub(crate) fn steps(&self) -> Result<Vec<Step>> {
        for name in ["fence-xdp_", "fence-xdp-node_"] {
            self.bring(&package(name, ".deb")?)?;
        }
        let steps = Guide::read_if(PAGE, &[HYPERVISOR, NODE], |title| title == CHAPTER)?.steps;
        let is_here = |step: &Step| step.host == self.name && !step.types(MAKES_PACKAGES);
        Ok(steps.into_iter().filter(is_here).collect())
    }

    /// Does one thing that the page says.
    pub(crate) fn step(&self, step: &Step) -> Result<()> {
        self.stage.step(step).with_context(|| self.log())
    }

    /// Copies a package there. Returns its path there.
    pub(crate) fn bring(&self, package: &Path) -> Result<String> {
        let name = package.file_name().context("a package has a name")?.to_string_lossy();
        let place = format!("{PLACE}/{name}");
        self.stage.write(self.name, &place, &std::fs::read(package)?)?;
        Ok(place)
    }

    /// Writes a file there.
    pub(crate) fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        self.stage.write(self.name, path, content)
    }

    /// Copies the files below a directory of the workspace.
    pub(crate) fn write_tree(&self, from: &str, to: &str) -> Result<()> {
        for entry in std::fs::read_dir(tools::workspace().join(from)).with_context(|| from.to_owned())? {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a name that is no text")?;
            let (from, to) = (format!("{from}/{name}"), format!("{to}/{name}"));
            if entry.file_type()?.is_dir() {
                self.write_tree(&from, &to)?;
            } else {
                self.write(&to, &std::fs::read(entry.path())?)?;
            }
        }
        Ok(())
    }

    /// Whether there is a file or a link at this path.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.root.join(path.trim_start_matches('/')).symlink_metadata().is_ok()
    }

    /// Runs a line of shell there.
    pub(crate) fn run(&self, line: &str) -> Result<Finished> {
        self.stage.shell(self.name, "root", line)
    }

    /// As [`Self::run`]; it must succeed.
    pub(crate) fn must(&self, line: &str) -> Result<String> {
        let done = self.run(line)?;
        ensure!(done.code == Some(0), "{line}: {done:?}\n{}", self.log());
        Ok(done.stdout)
    }

    /// Runs apt, as an administrator would.
    pub(crate) fn apt(&self, arguments: &str) -> Result<String> {
        let done = self.run(&format!("{APT} {arguments} 2>&1"))?;
        ensure!(done.code == Some(0), "apt-get {arguments}: {}\n{}", done.stdout, self.log());
        Ok(done.stdout)
    }

    /// Whether a unit is active.
    pub(crate) fn is_active(&self, unit: &str) -> Result<bool> {
        Ok(self.run(&format!("systemctl is-active {unit}"))?.stdout.trim() == "active")
    }

    /// Whether dpkg has a package installed.
    pub(crate) fn is_installed(&self, package: &str) -> Result<bool> {
        let status = self.run(&format!("dpkg-query --show --showformat='${{db:Status-Abbrev}}' {package}"))?;
        Ok(status.stdout.starts_with("ii"))
    }

    /// The digests of configuration and key.
    pub(crate) fn settings(&self) -> Result<String> {
        self.must(&format!("sha256sum {CONFIG} {}", packaged::KEY))
    }

    /// Waits until the daemon serves, and says so.
    pub(crate) fn wait_serving(&self) -> Result<()> {
        let mut last = String::new();
        let waited = poll_until("the daemon to serve", LIMIT, || {
            let asked = self.run("fence-daemon status")?;
            last = format!("{}{}", asked.stdout, asked.stderr);
            Ok((asked.code == Some(0)).then_some(()))
        });
        waited.with_context(|| format!("{last}\n{}", self.log()))
    }

    /// Fences the machine: the client hears a success, and the kernel says that the machine is
    /// dead. Then it is started again.
    pub(crate) fn fences(&self) -> Result<()> {
        self.observer.expect("off", "vm", 0).with_context(|| self.log())?;
        // libvirt may hear of the death after the client.
        self.libvirtd.wait_state(qemu::URI, "vm", "shut off")?;
        self.libvirtd.start_domain(qemu::URI, "vm")
    }

    /// Waits until a guest gets an answer about the machine.
    pub(crate) fn wait_answer(&self) -> Result<()> {
        let answered =
            poll_until("an answer", LIMIT, || Ok((self.observer.fence("status", "vm")?.code == Some(0)).then_some(())));
        answered.with_context(|| self.log())
    }

    /// What both servers have logged.
    pub(crate) fn log(&self) -> String {
        let log = self.run("journalctl --no-pager --unit=fence-daemon --unit=fence_virtd --lines=60");
        log.map(|log| log.stdout).unwrap_or_default()
    }
}
