//! Runs the commands of the guides in docs and compares their output.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::{Item, Member};
use fence_lab::cluster::node::Node;
use fence_lab::guide::stage::{HOSTS, HYPERVISOR, NODES, Stage};
use fence_lab::guide::{Act, Guide};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::systemd::Booted;
use fence_lab::tools;

mod body;
mod firewalls;
mod hosts;
mod installation;

pub(crate) use body::Body;
pub(crate) use firewalls::{CLUSTER_NODE, LINE_NODE, PLACES, WAYS_IN};

/// Commands of the hypervisor that a lab cannot run: path, the script that stands in, and why. The
/// page's last section says so.
const STAND_INS: &[(&str, &str, &str)] = &[
    ("/usr/local/bin/cargo", include_str!("assets/guide/cargo.sh"), "a release build takes minutes"),
    ("/usr/bin/scp", include_str!("assets/guide/scp.sh"), "the nodes have no SSH server"),
    ("/usr/bin/mmdebstrap", include_str!("assets/guide/mmdebstrap.sh"), "it was run already: the image is its work"),
];

/// The path of this repository on a page.
const CLONE: &str = "/usr/src/fence-xdp";
/// A stand-in for stock's unit, which is not in the image.
const STOCK: &str = "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n";
const STOCK_UNIT: &str = "/etc/systemd/system/fence_virtd.service";

/// The stage of a guide, with its hypervisor in the state before the first command.
struct Scene {
    libvirtd: Libvirtd,
    stage: Stage,
    hypervisor: Hypervisor,
}

impl Scene {
    fn new() -> Result<Self> {
        let booted = Booted::start(&Hypervisor::new()?, HYPERVISOR, &[])?;
        let hypervisor = booted.hypervisor().clone();
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let stage = Stage::new(booted);
        stage.write(HYPERVISOR, STOCK_UNIT, STOCK.as_bytes())?;
        let scene = Self { libvirtd, stage, hypervisor };
        clone_repository(&scene.stage, HYPERVISOR)?;
        Ok(scene)
    }

    fn play(&self, page: &str) -> Result<()> {
        self.stage.play(&Guide::read(page, &self.stage.hosts())?).with_context(|| {
            let log = self.stage.shell(HYPERVISOR, "root", "journalctl -u fence-daemon -o cat");
            format!("the daemon's log: {}", log.map(|log| log.stdout).unwrap_or_default())
        })
    }
}

/// The clone of this repository that a page installs from, already built.
fn clone_repository(stage: &Stage, name: &str) -> Result<()> {
    let xtask = tools::target_directory().join("debug/xtask");
    ensure!(xtask.is_file(), "no {}: run this by `cargo xtask test cluster`", xtask.display());
    for (path, script, _) in STAND_INS {
        stage.install(name, path, script.as_bytes())?;
    }
    stage.install(name, "/run/guide/xtask", &std::fs::read(&xtask)?)?;
    for (place, content) in Which::ours()?.executables()? {
        let program = Path::new(place).file_name().context("a program has a name")?.to_string_lossy();
        stage.install(name, &format!("{CLONE}/target/release/{program}"), &content)?;
    }
    let workspace = tools::workspace();
    for path in files_below(&workspace.join("dist"))? {
        let place = Path::new(CLONE).join(path.strip_prefix(&workspace)?);
        stage.write(name, &place.to_string_lossy(), &std::fs::read(&path)?)?;
    }
    Ok(())
}

/// Installs firewalld's zone `libvirt`, and puts the bridge into it as libvirt does.
///
/// # Errors
/// libvirt's packages are missing.
fn bring_zone(stage: &Stage) -> Result<()> {
    const ZONE: &str = "/usr/lib/firewalld/zones/libvirt.xml";
    let zone = std::fs::read(ZONE).with_context(|| format!("{ZONE}, of libvirt's packages"))?;
    stage.write(HYPERVISOR, ZONE, &zone)?;
    stage.shell(HYPERVISOR, "root", "firewall-offline-cmd --zone=libvirt --add-interface=virbr0")?.success().map(drop)
}

fn files_below(directory: &PathBuf) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files_below(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

#[test]
fn kvm_cluster() -> Result<()> {
    let mut scene = Scene::new()?;
    bring_zone(&scene.stage)?;
    let line = "systemctl start firewalld";
    scene.stage.shell(HYPERVISOR, "root", line)?.success()?;
    let mut bodies = Vec::new();
    for number in 1..=2_u8 {
        let (name, machine) = (format!("node{number}"), format!("web{number}"));
        let address = std::net::Ipv4Addr::new(192, 168, 122, 10 + number);
        let hostname = Item { path: "/etc/hostname", mode: 0o644, content: format!("{name}\n").into_bytes() };
        let member = Member { name: name.clone(), address, domain: name.clone() };
        let node = Node::define(&scene.libvirtd, &member, &[hostname])?;
        qemu::start_idle(&scene.libvirtd, &machine)?;
        scene.stage.add_container(&name, &scene.hypervisor, &name);
        bodies.push(Body::of(&machine, node));
    }
    for body in &bodies {
        body.wait_up()?;
    }
    scene.play("kvm-cluster.md")
}

#[test]
fn lxc_cluster() -> Result<()> {
    let mut scene = Scene::new()?;
    let begin = include_bytes!("../../lab/src/assets/node.sh");
    scene.hypervisor.write("/run/guide/node.sh", begin)?;
    for name in ["node1", "node2"] {
        scene.stage.add_container(name, &scene.hypervisor, name);
    }
    scene.play("lxc-cluster.md")
}

/// Each page names the stand-ins that its test uses.
#[test]
fn pages_tell_what_stands_in() -> Result<()> {
    let hosts = [HYPERVISOR, "host1", "host2", HOSTS, "node1", "node2", NODES];
    for page in ["kvm-cluster.md", "lxc-cluster.md", "firewall.md", "several-hypervisors.md", "installation.md"] {
        let guide = Guide::read(page, &hosts)?;
        let text = std::fs::read_to_string(tools::workspace().join("docs/guide").join(page))?;
        let (_, told) = text
            .split_once("## How this page is tested")
            .with_context(|| format!("{page} does not say how it is tested"))?;
        for (path, ..) in STAND_INS {
            let name = path.rsplit('/').next().unwrap_or(path);
            let is_used = guide.steps.iter().any(|step| match &step.act {
                // The nodes of the clusters have the real programs.
                Act::Type(typed) => {
                    !step.host.starts_with("node") && typed.command.split_whitespace().any(|word| word == name)
                }
                Act::Write(..) => false,
            });
            ensure!(!is_used || told.contains(&format!("`{name}`")), "{page} does not say that {name} is a stand-in");
        }
    }
    Ok(())
}
