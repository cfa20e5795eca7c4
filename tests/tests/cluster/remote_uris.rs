//! Fences under the real unit through URIs other than this host's system libvirtd: `qemu+ssh://`,
//! and the socket of a user's own libvirtd.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::machine::Machine;
use fence_lab::process::{Process, poll_until};
use fence_lab::qemu;
use fence_lab::server::{Config, Which};
use fence_lab::systemd::Booted;
use fence_lab::tools;
use fence_lab::witness::Witness;

/// How long an operation of one second may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(90);
const NAME: &str = "hypervisor";
const BY_SSH: &str = "qemu+ssh://root@hypervisor/system";
/// `nobody`: libvirt looks up the user's name.
const USER: u32 = 65_534;
const UUID: &str = "5e55109e-0000-4000-8000-000000000001";

/// The processes in use, in the order of their end.
struct Scene {
    libvirtd: Libvirtd,
    _users: Process,
    booted: Booted,
    session: String,
}

impl Scene {
    fn new() -> Result<Self> {
        let image = Image::get()?;
        let booted = Booted::start(&Hypervisor::new()?, NAME, image.root())?;
        let libvirtd = Libvirtd::start(booted.hypervisor())?;
        let (users, session) = session(booted.hypervisor())?;
        let scene = Self { libvirtd, _users: users, booted, session };
        scene.allow_ssh()?;
        scene.start_daemon()?;
        Ok(scene)
    }

    fn allow_ssh(&self) -> Result<()> {
        self.booted
            .must(&format!(
                "mkdir -p -m 700 ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && \
                 cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys && systemctl start ssh && \
                 ssh-keyscan -t ed25519 {NAME} > ~/.ssh/known_hosts 2> /dev/null && \
                 ssh -o BatchMode=yes root@{NAME} true"
            ))
            .map(drop)
    }

    fn start_daemon(&self) -> Result<()> {
        let Which::Ours(daemon) = Which::ours()? else { bail!("ours is not ours") };
        let mut config = Config::new(KEY_PATH);
        config.uris = vec![BY_SSH.to_owned(), self.session.clone()];
        let unit = std::fs::read(tools::workspace().join("dist/fence-daemon.service"))?;
        for (path, content, mode) in [
            ("/usr/sbin/fence-daemon", std::fs::read(daemon)?, 0o755),
            ("/etc/systemd/system/fence-daemon.service", unit, 0o644),
            (KEY_PATH, KEY.to_vec(), 0o600),
            ("/etc/fence_virt.conf", config.render().into_bytes(), 0o600),
        ] {
            self.booted.hypervisor().write_mode(&format!("{}{path}", self.booted.root()), &content, mode)?;
        }
        self.booted.must("systemctl enable --now fence-daemon")?;
        let connected = poll_until("each URI to be connected", LIMIT, || {
            let report = self.booted.shell(&[], "fence-daemon status --json", LIMIT)?.stdout;
            let report: serde_json::Value = serde_json::from_str(&report).context(report)?;
            let all = report["uris"].as_array().context("no URIs")?;
            Ok((all.len() == 2 && all.iter().all(|uri| uri["connected"] == true)).then_some(()))
        });
        connected.with_context(|| self.log())
    }

    fn log(&self) -> String {
        self.booted.must("journalctl --no-pager -u fence-daemon -o cat").unwrap_or_default()
    }

    /// A success that leaves the machine alive must never occur.
    fn off(&self, domain: &str, machine: &Witness) -> Result<()> {
        let asked = self.booted.shell(&[], &format!("fence_xvm -o off -H {domain}"), LIMIT)?;
        ensure!(machine.is_dead()?, "{domain} lives: {asked:?}; {}", self.log());
        ensure!(asked.code == Some(0), "{asked:?}; {}", self.log());
        let status = self.booted.shell(&[], &format!("fence_xvm -o status -H {domain}"), LIMIT)?;
        ensure!(status.code == Some(2), "{status:?}; {}", self.log());
        Ok(())
    }
}

/// A user's own libvirtd, and its URI.
fn session(hypervisor: &Hypervisor) -> Result<(Process, String)> {
    let directory = format!("/run/user/{USER}");
    let make = format!(
        "mkdir -p /run/user && install -d -m 700 -o {USER} -g {USER} {directory} {directory}/.config {directory}/.config/libvirt"
    );
    hypervisor.space().must("sh", &["-c", &make])?;
    hypervisor.write_mode(&format!("{directory}/.config/libvirt/qemu.conf"), b"stdio_handler = \"file\"\n", 0o644)?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--clear-groups", "libvirtd"]);
    command.env("HOME", &directory).env("XDG_RUNTIME_DIR", &directory).env_remove("XDG_CONFIG_HOME");
    let mut process = Process::start(hypervisor.space(), &mut command)?;
    let socket = format!("{directory}/libvirt/libvirt-sock");
    poll_until("a user's libvirtd", LIMIT, || {
        ensure!(process.is_running()?, "the user's libvirtd has ended");
        Ok(hypervisor.outside(&socket).exists().then_some(()))
    })
    .with_context(|| process.stderr().text())?;
    Ok((process, format!("qemu:///session?socket={socket}")))
}

#[test]
fn off_by_ssh_and_by_a_users_socket_under_the_unit() -> Result<()> {
    let scene = Scene::new()?;
    qemu::start_idle(&scene.libvirtd, "far")?;
    let far = Witness::of_qemu(scene.booted.hypervisor(), "far")?;
    scene.libvirtd.define(&scene.session, "mine", &Machine::new("mine").uuid(UUID).xml()?)?;
    scene.libvirtd.start_domain(&scene.session, "mine")?;
    let [mine] = <[Witness; 1]>::try_from(Witness::of_uuid(UUID)?)
        .map_err(|all| anyhow::anyhow!("{} processes of one machine", all.len()))?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", mine.pid))?;
    ensure!(
        status.lines().any(|line| line.starts_with(&format!("Uid:\t{USER}\t"))),
        "the machine runs as root: {status}"
    );

    scene.off("far", &far)?;
    scene.off("mine", &mine)
}
