//! A cluster of two QEMU guests with corosync and Pacemaker from the nodes' image. Both read their
//! root from one disk, and keep what they write in memory.
//!
//! Their init is a script, because systemd takes minutes without KVM.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use fence_common::sync::lock;
use fence_lab::archive::Archive;
use fence_lab::cluster::corosync::{Item, KEY_PATH, Member, corosync, host_map, plain};
use fence_lab::cluster::image::Image;
use fence_lab::cluster::shell::{self, Shell};
use fence_lab::debian::{Kernel, Series};
use fence_lab::initramfs;
use fence_lab::lab::{COMMAND_LIMIT, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::{Finished, poll_until};
use fence_lab::qemu::{BOOT_LIMIT, Linux, LinuxGuest, URI};
use fence_lab::tools;
use fence_lab::witness::Witness;

use super::claims::{AGENT, AGENT_PATH, Claims};

/// What a node needs beside its network.
const MODULES: [&str; 2] = ["drivers/block/virtio_blk.ko", "fs/overlayfs/overlay.ko"];
/// A token that a guest without KVM on a loaded machine does not miss, in milliseconds.
const TOKEN: u32 = 4000;
/// Pacemaker's delay before it fences the first node. It fences the second at once, so in a fence
/// race the first survives.
const DELAY: Duration = Duration::from_secs(10);

/// The two nodes: names of the cluster's that are not those of the hypervisor.
#[must_use]
pub(super) fn members() -> [Member; 2] {
    [Member::new("alpha", 41, "vm-one"), Member::new("beta", 42, "vm-two")]
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) members: [Member; 2],
    /// The directory where each node's second serial port has its socket. Such nodes begin without
    /// a fence device.
    pub(super) lines: Option<String>,
}

impl Plan {
    /// The usual one: its nodes fence by multicast.
    fn usual() -> Self {
        Self { members: members(), lines: None }
    }

    /// The number of the serial port that a node's commands come by.
    fn console(&self) -> u8 {
        if self.lines.is_some() { 2 } else { 1 }
    }
}

/// A node.
#[derive(Debug)]
pub(super) struct GuestNode {
    member: Member,
    hypervisor: Hypervisor,
    /// Runs commands in it; `None` while it is not up.
    console: Mutex<Option<LinuxGuest>>,
}

impl GuestNode {
    /// Waits until it runs commands, after it was started (again).
    pub(super) fn wait_up(&self) -> Result<()> {
        let domain = &self.member.domain;
        let mut console = lock(&self.console);
        // The one of an earlier boot is closed.
        *console = None;
        let opened = poll_until(&format!("{domain}'s console"), BOOT_LIMIT, || {
            Ok(LinuxGuest::open(&self.hypervisor, domain).ok())
        })?;
        *console = Some(opened.wait_up()?);
        Ok(())
    }

    /// Its machine.
    pub(super) fn machine(&self) -> Result<Witness> {
        Witness::of_qemu(&self.hypervisor, &self.member.domain)
    }
}

impl Shell for GuestNode {
    fn member(&self) -> &Member {
        &self.member
    }

    fn run(&self, script: &str, limit: Duration) -> Result<Finished> {
        let mut console = lock(&self.console);
        console.as_mut().with_context(|| format!("{} is not up", self.member.name))?.command(script, limit)
    }
}

/// Two nodes.
#[derive(Debug)]
pub(super) struct Guests {
    hypervisor: Hypervisor,
    /// The nodes.
    pub(super) nodes: [GuestNode; 2],
    shared: String,
}

impl Guests {
    /// Boots two nodes, which begin to form a cluster. `key` is the fencing key.
    pub(super) fn boot(libvirtd: &Libvirtd, key: &[u8]) -> Result<Self> {
        Self::boot_as(libvirtd, key, &Plan::usual())
    }

    /// Like [`Self::boot`], and the cluster is this one.
    pub(super) fn boot_as(libvirtd: &Libvirtd, key: &[u8], plan: &Plan) -> Result<Self> {
        let hypervisor = libvirtd.hypervisor().clone();
        let (kernel, disk) = (Kernel::get(Series::Linux6_1)?, disk(Image::get()?.root())?);
        let shared = hypervisor.write("shared.disk", &vec![0; 1 << 20])?;
        for (number, member) in plan.members.iter().enumerate() {
            define(libvirtd, &kernel, &disk, &shared, plan, number, key)?;
            libvirtd.start_domain(URI, &member.domain)?;
        }
        let node = |member| GuestNode { member, hypervisor: hypervisor.clone(), console: Mutex::default() };
        let guests = Self { nodes: plan.members.clone().map(node), shared, hypervisor };
        guests.nodes.iter().try_for_each(GuestNode::wait_up)?;
        Ok(guests)
    }

    /// Waits until both are online, by the first one's word.
    ///
    /// # Errors
    /// They are not in time; the error has what they have logged.
    pub(super) fn wait_online(&self) -> Result<()> {
        let names: Vec<_> = self.nodes.iter().map(|node| node.member.name.as_str()).collect();
        shell::wait_online(&self.nodes[0], &names).with_context(|| self.logs())
    }

    /// What corosync and Pacemaker have logged on the nodes that are up.
    #[must_use]
    pub(super) fn logs(&self) -> String {
        let log = |node: &GuestNode| {
            let command = "tail -n 60 /run/cluster.log /var/log/corosync/corosync.log /var/log/pacemaker/pacemaker.log";
            let said = node.run(command, COMMAND_LIMIT);
            let said = said.map_or_else(|error| format!("{error:#}"), |finished| finished.stdout);
            format!("== {}\n{said}", node.member.name)
        };
        self.nodes.iter().map(log).collect()
    }

    /// Cuts the nodes off from each other, and from nothing else, until one of them restarts.
    pub(super) fn part(&self, libvirtd: &Libvirtd) -> Result<()> {
        for node in &self.nodes {
            let ports = libvirtd.virsh(URI, &["domiflist", &node.member.domain])?.stdout;
            let port = ports.split_whitespace().find(|word| word.starts_with("vnet")).context("no port")?;
            // Isolated ports reach every port of the bridge but isolated ones.
            self.hypervisor.ip(&["link", "set", port, "type", "bridge_slave", "isolated", "on"])?;
        }
        Ok(())
    }

    /// Begins to watch who runs the resource.
    pub(super) fn watch(&self) -> Result<Claims> {
        Claims::watch(&self.hypervisor, &self.shared, self.nodes.each_ref().map(|node| node.member.domain.clone()))
    }
}

/// A root directory as a disk beside it, made once.
fn disk(root: &Path) -> Result<PathBuf> {
    let (disk, making) = (root.with_extension("ext4"), root.with_extension("making"));
    // Tests run at the same time: one makes it, the others wait.
    let guard = File::create(root.with_extension("lock"))?;
    guard.lock().context("locking the nodes' disk")?;
    if !disk.is_file() {
        let (from, to) = (root.to_string_lossy(), making.to_string_lossy());
        let used = tools::output("du", &["-sm", "--apparent-size", &from], Path::new("/"))?;
        let used: u64 = used.split_whitespace().next().context("du says nothing")?.parse()?;
        let size = format!("{}M", used * 5 / 4 + 64);
        // A disk without writers needs no journal.
        let options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", &from, &to, &size];
        tools::output("mke2fs", &options, Path::new("/"))?;
        // Those of earlier images are of no use to anybody.
        for entry in std::fs::read_dir(root.parent().context("an image without a directory")?)? {
            let old = entry?.path();
            let is_disk = old.extension().is_some_and(|extension| extension == "ext4");
            if is_disk && !old.with_extension("").is_dir() {
                std::fs::remove_file(&old)?;
            }
        }
        std::fs::rename(&making, &disk)?;
    }
    Ok(disk)
}

fn define(
    libvirtd: &Libvirtd,
    kernel: &Kernel,
    disk: &Path,
    shared: &str,
    plan: &Plan,
    number: usize,
    key: &[u8],
) -> Result<()> {
    let mut devices = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/><readonly/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='raw' cache='writethrough'/><source file='{shared}'/>\
         <target dev='vdb' bus='virtio'/><shareable/></disk>",
        disk.display()
    );
    let name = &plan.members[number].domain;
    if let Some(lines) = &plan.lines {
        devices +=
            &format!("<serial type='unix'><source mode='bind' path='{lines}/{name}'/><target port='1'/></serial>");
    }
    let (initrd, address) = (initrd(kernel, plan, number, key)?, [1, u8::try_from(number)?]);
    let (initrd, devices, console) = (&initrd, devices.as_str(), plan.console());
    Linux { name, mebibytes: 384, kernel, initrd, address, devices, arguments: &[], console }.define(libvirtd)
}

/// What a node boots, with what makes it this node.
fn initrd(kernel: &Kernel, plan: &Plan, number: usize, key: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, include_bytes!("assets/guest-initrd.sh"));
    archive.copy(&tools::find("busybox")?, "/bin/busybox", 0o755)?;
    let order = archive.modules(kernel, initramfs::MODULES.iter().chain(&MODULES))?;
    archive.file("/modules/order", 0o644, (order.join("\n") + "\n").as_bytes());
    for Item { path, mode, content } in files(plan, number, key) {
        archive.file(&format!("/node{path}"), mode, &content);
    }
    for directory in ["proc", "sys", "dev"] {
        archive.directory(directory);
    }
    Ok(archive.finish())
}

/// The files that make a node from the image's root. The cluster's configuration is one of them,
/// because the tools that make one are slow without KVM.
fn files(plan: &Plan, number: usize, key: &[u8]) -> Vec<Item> {
    let members = &plan.members;
    let (me, console) = (&members[number], plan.console());
    let about = format!("NAME={}\nADDRESS={}\nSECTOR={number}\nCONSOLE=/dev/ttyS{console}\n", me.name, me.address);
    // A node waits for the other one at boot, so that it does not fence a node that is only slower.
    let corosync = corosync(members, TOKEN).replace("wait_for_all: 0", "wait_for_all: 1");
    let configuration = include_str!("assets/guests-cib.xml")
        .replace("@MAP@", &host_map(members))
        .replace("@KEY@", KEY_PATH)
        .replace("@DELAY@", &format!("{}:{}s;{}:0s", members[0].name, DELAY.as_secs(), members[1].name))
        .replace("@PLACE@", &members[1].name);
    let configuration = if plan.lines.is_some() { without_fencing(&configuration) } else { configuration };
    let mut items = plain(members, me, key);
    items.extend([
        Item { path: "/lab/init", mode: 0o755, content: include_bytes!("assets/guest-node.sh").to_vec() },
        Item { path: "/lab/node", mode: 0o644, content: about.into_bytes() },
        Item { path: "/etc/corosync/corosync.conf", mode: 0o644, content: corosync.into_bytes() },
        Item { path: "/etc/pacemaker/authkey", mode: 0o640, content: [b'a'; 128].to_vec() },
        Item { path: "/var/lib/pacemaker/cib/cib.xml", mode: 0o600, content: configuration.into_bytes() },
        Item { path: AGENT_PATH, mode: 0o755, content: AGENT.as_bytes().to_vec() },
    ]);
    items
}

/// A configuration of the cluster without its fence device.
fn without_fencing(configuration: &str) -> String {
    const BEGIN: &str = "<primitive id=\"fence\"";
    const END: &str = "</primitive>";
    let cut = || {
        let (before, device) = configuration.split_once(BEGIN)?;
        Some(format!("{before}{}", device.split_once(END)?.1))
    };
    cut().unwrap_or_else(|| configuration.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_waits_for_the_other_and_knows_its_place() {
        let items = files(&Plan::usual(), 1, b"key");
        let text = |path: &str| {
            let item = items.iter().find(|item| item.path.ends_with(path)).unwrap();
            String::from_utf8_lossy(&item.content).into_owned()
        };
        assert!(text("corosync.conf").contains("wait_for_all: 1"));
        assert!(text("cib.xml").contains("alpha:vm-one;beta:vm-two") && !text("cib.xml").contains('@'));
        assert!(text("lab/node").contains("NAME=beta\nADDRESS=192.168.122.42\nSECTOR=1\nCONSOLE=/dev/ttyS1"));
    }
}
