//! A cluster node: a libvirt-LXC container with an init system, on an overlay of the common image.
//! Its address on the lab's bridge is fixed.
//!
//! Its files survive its restarts, as on a disk, and vanish with the lab.

use std::fs::Permissions;
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::container::{self, URI};
use crate::lab::{BRIDGE, HYPERVISOR_V4, Hypervisor, Space};
use crate::libvirtd::Libvirtd;
use crate::process::{Finished, Process, poll_until, run};
use crate::witness::Witness;

use super::corosync::{Item, Member, SHARED};
use super::image::Image;
use super::shell::Shell;

/// The time limit for a container's start on a loaded machine. An idle one takes about a second.
pub const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// Where programs are looked for in a node.
pub const NODE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container begins with.
const INIT_PATH: &str = "/usr/local/sbin/begin";
const INIT: &str = include_str!("../assets/node.sh");

/// A network interface of a node. The first one is `eth0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nic<'a> {
    /// The hypervisor's bridge.
    pub bridge: &'a str,
    /// Its address, with 24 bits of network.
    pub address: Ipv4Addr,
    /// The default route.
    pub gateway: Option<Ipv4Addr>,
}

/// A node. It stays defined and running when this is dropped: it ends with its lab.
#[derive(Clone, Debug)]
pub struct Node {
    hypervisor: Hypervisor,
    member: Member,
    /// Its root directory, as the lab's programs see it.
    root: String,
}

impl Node {
    /// Makes the node's root directory with these files, and defines the container `member.domain`
    /// without starting it. The nodes of one lab need different addresses, and share the directory
    /// [`SHARED`].
    pub fn define(libvirtd: &Libvirtd, member: &Member, files: &[Item]) -> Result<Self> {
        let nic = Nic { bridge: BRIDGE, address: member.address, gateway: Some(HYPERVISOR_V4) };
        Self::define_with(libvirtd, member, files, &[nic])
    }

    /// As [`Self::define`], with these interfaces.
    pub fn define_with(libvirtd: &Libvirtd, member: &Member, files: &[Item], nics: &[Nic<'_>]) -> Result<Self> {
        let hypervisor = libvirtd.hypervisor().clone();
        let root = overlay(&hypervisor, &Image::get()?, &member.domain)?;
        let node = Self { hypervisor, member: member.clone(), root };
        node.write(INIT_PATH, INIT.as_bytes(), 0o755)?;
        for Item { path, mode, content } in files {
            node.write(path, content, *mode)?;
        }
        libvirtd.define(URI, &member.domain, &node.xml(nics)?)?;
        Ok(node)
    }

    fn xml(&self, nics: &[Nic<'_>]) -> Result<String> {
        let Self { member: Member { domain, .. }, root, hypervisor } = self;
        let shared = hypervisor.path("shared");
        std::fs::create_dir_all(hypervisor.outside(&shared))?;
        let emulator = container::emulator()?;
        let nic = |(number, Nic { bridge, address, gateway }): (usize, &Nic<'_>)| {
            // The first bridge port has the domain's name, so commands can name the port.
            let port = if number == 0 { format!("<target dev='{}'/>", self.port()) } else { String::new() };
            let route = gateway
                .map(|gateway| format!("<route family='ipv4' address='0.0.0.0' prefix='0' gateway='{gateway}'/>"));
            format!(
                "<interface type='bridge'><source bridge='{bridge}'/>{port}<guest dev='eth{number}'/>\
                 <ip address='{address}' prefix='24'/>{}</interface>",
                route.unwrap_or_default()
            )
        };
        let nics: String = nics.iter().enumerate().map(nic).collect();
        Ok(format!(
            "<domain type='lxc'><name>{domain}</name><memory unit='MiB'>1024</memory><vcpu>1</vcpu>\
             <os><type>exe</type><init>{INIT_PATH}</init></os>\
             <devices><emulator>{emulator}</emulator>\
             <filesystem type='mount' accessmode='passthrough'><source dir='{root}'/><target dir='/'/></filesystem>\
             <filesystem type='mount'><source dir='{shared}'/><target dir='{SHARED}'/></filesystem>\
             {nics}<console type='pty'/></devices></domain>",
        ))
    }

    /// The node's port on the bridge, while it runs.
    #[must_use]
    pub fn port(&self) -> String {
        let name: String = self.member.domain.chars().filter(char::is_ascii_alphanumeric).take(10).collect();
        format!("port-{name}")
    }

    /// Starts the container.
    pub fn start(&self, libvirtd: &Libvirtd) -> Result<()> {
        libvirtd.start_domain(URI, &self.member.domain)
    }

    /// Writes a file of the node's, as its administrator would; directories are made.
    pub fn write(&self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        let inside = self.hypervisor.write_mode(&format!("{}{path}", self.root), content, mode)?;
        // The mode of a file that was there already is what it was.
        std::fs::set_permissions(self.hypervisor.outside(&inside), Permissions::from_mode(mode))?;
        Ok(())
    }

    /// A file of the node's, for this process; also while the node is off.
    #[must_use]
    pub fn outside(&self, path: &str) -> PathBuf {
        self.hypervisor.outside(&format!("{}{path}", self.root))
    }

    /// The first process, whose death is the node's.
    pub fn witness(&self) -> Result<Witness> {
        Witness::of_container(&self.hypervisor, &self.member.domain)
    }

    /// Where the node's commands run, as long as it runs.
    pub fn space(&self) -> Result<Space> {
        Ok(self.hypervisor.space().inside(self.witness()?.as_fd().try_clone_to_owned()?))
    }

    /// Starts a command line in the node and does not wait.
    pub fn spawn(&self, script: &str) -> Result<Process> {
        Process::start(&self.space()?, &mut command(script))
    }

    /// Sends every process in the node that has this name a signal (`STOP`, `KILL`, ...).
    pub fn signal(&self, signal: &str, name: &str) -> Result<()> {
        // The node has its own PID namespace, so this cannot hit another process.
        self.must(&format!("pkill -{signal} -x {name}")).map(drop)
    }

    /// Waits until its init has started all that it is to start.
    pub fn wait_up(&self) -> Result<()> {
        let mut last = String::new();
        let waited = poll_until(&format!("{} to be up", self.member.name), BOOT_LIMIT, || {
            if let Ok(answer) = self.run("systemctl is-system-running", Duration::from_secs(20)) {
                last = answer.stdout.trim().to_owned();
            }
            // Degraded means that a service has failed. Other checks report that.
            Ok(matches!(last.as_str(), "running" | "degraded").then_some(()))
        });
        waited.with_context(|| format!("systemd says: {last}"))
    }

    /// The lab's hypervisor that it runs on.
    #[must_use]
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }
}

impl Shell for Node {
    fn member(&self) -> &Member {
        &self.member
    }

    fn run(&self, script: &str, limit: Duration) -> Result<Finished> {
        run(&self.space()?, &mut command(script), limit).with_context(|| format!("in {}: {script}", self.member.name))
    }
}

fn command(script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).current_dir("/").env_clear();
    command.envs([("PATH", NODE_PATH), ("HOME", "/root"), ("LC_ALL", "C.UTF-8"), ("TERM", "dumb")]);
    command
}

/// A writable view of the image in the lab: its path there.
fn overlay(hypervisor: &Hypervisor, image: &Image, name: &str) -> Result<String> {
    let path = |part: &str| hypervisor.path(&format!("nodes/{name}/{part}"));
    let (root, upper, work) = (path("root"), path("upper"), path("work"));
    for directory in [&root, &upper, &work] {
        std::fs::create_dir_all(hypervisor.outside(directory))?;
    }
    let lower = image.root().canonicalize()?.display().to_string();
    ensure!(
        !lower.contains([':', ',']),
        "{lower}: overlayfs takes no path with a colon or a comma: set CARGO_TARGET_DIR"
    );
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    hypervisor.space().in_mounts(|| {
        mount(Some("overlay"), Path::new(&root), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("mounting {name}'s root directory over {lower}"))
    })?;
    Ok(root)
}
