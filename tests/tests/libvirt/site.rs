//! The usual setup of these tests: a hypervisor with libvirtd and a server, and a guest that sends
//! requests.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::observer::Observer;
use fence_lab::process::poll_until;
use fence_lab::server::{Config, Server, Which};
use fence_lab::timings::Fence;
use fence_lab::witness::Witness;

use super::KEY;

/// The client's guest. libvirt numbers the ports of its own machines from 0.
pub(crate) const GUEST: u8 = 90;
/// How long an operation of milliseconds may take on a loaded machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Site {
    pub(crate) server: Server,
    pub(crate) libvirtd: Libvirtd,
    pub(crate) observer: Observer,
    pub(crate) config: Config,
    pub(crate) hypervisor: Hypervisor,
}

impl Site {
    /// A site with our daemon, which uses `uris` and has these keys in its backend.
    pub(crate) fn new(uris: &[&str], backend: &[(&'static str, &'static str)]) -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        Self::on(hypervisor, libvirtd, uris, backend)
    }

    /// A site with an existing libvirtd and its domains.
    pub(crate) fn on(
        hypervisor: Hypervisor,
        libvirtd: Libvirtd,
        uris: &[&str],
        backend: &[(&'static str, &'static str)],
    ) -> Result<Self> {
        Self::with(&Which::ours()?, hypervisor, libvirtd, uris, backend)
    }

    /// A site with the given server.
    pub(crate) fn with(
        which: &Which,
        hypervisor: Hypervisor,
        libvirtd: Libvirtd,
        uris: &[&str],
        backend: &[(&'static str, &'static str)],
    ) -> Result<Self> {
        let key = hypervisor.write("fence.key", &KEY)?;
        let mut config = Config::new(&key);
        config.uris = uris.iter().map(|&uri| uri.to_owned()).collect();
        config.backend = backend.to_vec();
        let server = Server::start(&hypervisor, which, &config)?;
        let observer = Observer::new(&hypervisor, hypervisor.guest(GUEST)?, &key);
        Ok(Self { server, libvirtd, observer, config, hypervisor })
    }

    /// Sends a request that must end with this exit code; shows the log if it does not.
    pub(crate) fn expect(&self, op: &str, domain: &str, code: i32) -> Result<()> {
        self.observer.expect(op, domain, code).map(drop).with_context(|| format!("the server: {}", self.server.log()))
    }

    /// The process of a running QEMU domain.
    pub(crate) fn machine(&self, domain: &str) -> Result<Witness> {
        Witness::of_qemu(&self.hypervisor, domain)
    }

    /// Sends an `off` that must succeed by a direct kill, not through libvirt.
    pub(crate) fn off_directly(&self, domain: &str) -> Result<()> {
        ensure!(!Witness::of_all(&self.hypervisor, domain)?.is_empty(), "{domain} does not run");
        let position = self.server.log_position();
        self.expect("off", domain, 0)?;
        let off = |line: &str| Fence::parse(line).filter(|fence| fence.get("op") == Some("off"));
        let fence = self.server.wait_log(position, SOON, off).context("no line about the off")?;
        ensure!(fence.step("dead").is_some(), "no death in {fence:?}");
        self.not_logged(position, "left to libvirt")
    }

    /// Waits for a line that contains `part`.
    pub(crate) fn logs(&self, position: usize, part: &str) -> Result<()> {
        let found = self.server.wait_log(position, SOON, |line| line.contains(part).then_some(()));
        found.with_context(|| format!("`{part}` is not in the log: {}", self.server.log()))
    }

    /// No line from `position` on contains `part`.
    pub(crate) fn not_logged(&self, position: usize, part: &str) -> Result<()> {
        let found = self.server.wait_log(position, Duration::ZERO, |line| line.contains(part).then(|| line.to_owned()));
        ensure!(found.is_none(), "{found:?}");
        Ok(())
    }

    /// Waits until the daemon's status of the domain is this exit code.
    pub(crate) fn wait_status(&self, domain: &str, code: i32) -> Result<()> {
        poll_until(&format!("status {code} of {domain}"), SOON, || {
            Ok((self.observer.fence("status", domain)?.code == Some(code)).then_some(()))
        })
        .with_context(|| format!("the server: {}", self.server.log()))
    }

    /// The key file of the clients.
    pub(crate) fn key(&self) -> String {
        self.config.key_file.clone()
    }

    /// Starts the next daemon after the death of this one.
    pub(crate) fn next_daemon(&mut self) -> Result<()> {
        self.server = Server::start(&self.hypervisor, &Which::ours()?, &self.config)?;
        Ok(())
    }
}
