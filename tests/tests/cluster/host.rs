//! A hypervisor whose systemd runs the daemon by the unit of dist.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_lab::client::Client;
use fence_lab::cluster::corosync::{Item, KEY_PATH};
use fence_lab::cluster::lab::KEY;
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::{Finished, poll_until};
use fence_lab::server::{Config, Which};
use fence_lab::systemd::Booted;

/// How long an operation of one second may take on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);
/// Its name.
pub(crate) const NAME: &str = "hypervisor";
pub(crate) const UNIT: &str = include_str!("../../../dist/fence-daemon.service");
pub(crate) const UNIT_PATH: &str = "/etc/systemd/system/fence-daemon.service";
const GENERATOR: &str = include_str!("../../../dist/fence-daemon-generator");
const GENERATOR_PATH: &str = "/etc/systemd/system-generators/fence-daemon-generator";
const SOCKET_UNIT: &str = include_str!("../../../dist/fence-daemon.socket");
pub(crate) const SOCKET_UNIT_PATH: &str = "/etc/systemd/system/fence-daemon.socket";
const STOCK: &[u8] = b"[Service]\nExecStart=/bin/sleep infinity\n";

/// The hypervisor, with the daemon installed, and a libvirtd beside systemd.
pub(crate) struct Host {
    /// Ends before systemd.
    pub(crate) libvirtd: Libvirtd,
    pub(crate) booted: Booted,
}

pub(crate) fn file(path: &'static str, mode: u32, content: &[u8]) -> Item {
    Item { path, mode, content: content.to_vec() }
}

/// The daemon, installed, and what has the boot start these units.
pub(crate) fn files(config: &Config, units: &str) -> Result<Vec<Item>> {
    let [daemon, commands] = Which::ours()?.executables()?;
    let wants = format!("[Unit]\nWants={units}\n");
    Ok(vec![
        file(daemon.0, 0o755, &daemon.1),
        file(commands.0, 0o755, &commands.1),
        file(UNIT_PATH, 0o644, UNIT.as_bytes()),
        file(GENERATOR_PATH, 0o755, GENERATOR.as_bytes()),
        file(SOCKET_UNIT_PATH, 0o644, SOCKET_UNIT.as_bytes()),
        file(KEY_PATH, 0o600, &KEY),
        file("/etc/fence_virt.conf", 0o600, config.render().as_bytes()),
        file("/etc/systemd/system/multi-user.target.d/lab.conf", 0o644, wants.as_bytes()),
    ])
}

impl Host {
    /// A host on which nobody has started the daemon.
    pub(crate) fn new(config: &Config) -> Result<Self> {
        Self::booting(config, "")
    }

    /// A host whose boot starts these units.
    pub(crate) fn booting(config: &Config, units: &str) -> Result<Self> {
        let mut files = files(config, units)?;
        // In place of stock's unit, which is not in the image.
        files.push(file("/etc/systemd/system/fence_virtd.service", 0o644, STOCK));
        let booted = Booted::start(&Hypervisor::new()?, NAME, &files)?;
        Ok(Self { libvirtd: Libvirtd::start(booted.hypervisor())?, booted })
    }

    /// A host that serves this configuration.
    pub(crate) fn serving(config: &Config) -> Result<Self> {
        let host = Self::new(config)?;
        host.must("systemctl enable --now fence-daemon")?;
        host.wait_serving("0")?;
        Ok(host)
    }

    pub(crate) fn hypervisor(&self) -> &Hypervisor {
        self.booted.hypervisor()
    }

    /// Runs a line of shell there.
    pub(crate) fn run(&self, line: &str) -> Result<Finished> {
        self.booted.shell(&[], line, LIMIT)
    }

    /// As [`Self::run`]; it must succeed.
    pub(crate) fn must(&self, line: &str) -> Result<String> {
        self.booted.must(line).with_context(|| self.log())
    }

    /// Writes a drop-in of the unit. It counts from the daemon's next start on.
    pub(crate) fn drop_in(&self, name: &str, text: &str) -> Result<()> {
        let path = format!("{}{UNIT_PATH}.d/{name}.conf", self.booted.root());
        self.hypervisor().write_mode(&path, text.as_bytes(), 0o644)?;
        self.must("systemctl daemon-reload").map(drop)
    }

    /// A property of the unit.
    pub(crate) fn property(&self, name: &str) -> Result<String> {
        let shown = self.booted.must(&format!("systemctl show --value --property={name} fence-daemon"))?;
        Ok(shown.trim().to_owned())
    }

    /// What the daemon has logged, as an administrator reads it.
    pub(crate) fn log(&self) -> String {
        self.booted.must("journalctl --no-pager --unit=fence-daemon").unwrap_or_default()
    }

    pub(crate) fn wait_log(&self, words: &str, times: usize) -> Result<()> {
        poll_until(words, LIMIT, || Ok((self.log().matches(words).count() >= times).then_some(())))
            .with_context(|| self.log())
    }

    /// The serving daemon's process, if it differs from `but`.
    pub(crate) fn wait_serving(&self, but: &str) -> Result<String> {
        let waited = poll_until("the daemon", LIMIT, || {
            let now = self.property("MainPID")?;
            let serves = now != "0" && now != but && self.property("ActiveState")? == "active";
            Ok((serves && self.run("fence-daemon status")?.code == Some(0)).then_some(now))
        });
        waited.with_context(|| self.log())
    }

    /// The daemon's report.
    pub(crate) fn report(&self) -> Result<serde_json::Value> {
        let asked = self.run("fence-daemon status --json")?;
        serde_json::from_str(&asked.stdout).with_context(|| format!("{asked:?}"))
    }

    /// Waits until the daemon is connected to this many URIs, which are all.
    pub(crate) fn wait_connected(&self, count: usize) -> Result<()> {
        let connected = poll_until("each URI to be connected", LIMIT, || {
            let report = self.report()?;
            let all = report["uris"].as_array().context("no URIs")?;
            Ok((all.len() == count && all.iter().all(|uri| uri["connected"] == true)).then_some(()))
        });
        connected.with_context(|| self.log())
    }

    /// Lets root reach this host by ssh without a password.
    pub(crate) fn allow_ssh(&self) -> Result<()> {
        self.must(&format!(
            "mkdir -p -m 700 ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && \
             cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys && systemctl start ssh && \
             ssh-keyscan -t ed25519 {NAME} > ~/.ssh/known_hosts 2> /dev/null && \
             ssh -o BatchMode=yes root@{NAME} true"
        ))
        .map(drop)
    }

    /// Runs the stock client in a guest, and checks its exit code.
    pub(crate) fn expect(&self, guest: &Guest, op: &str, domain: &str, code: i32) -> Result<()> {
        let key = self.hypervisor().write("fence.key", &KEY)?;
        let asked = Client::new(op, &key).domain(domain).run(guest.space())?;
        ensure!(asked.code == Some(code), "{op}: {asked:?}; {}", self.log());
        Ok(())
    }
}
