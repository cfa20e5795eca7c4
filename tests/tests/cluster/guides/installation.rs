//! Runs the commands of `docs/guide/installation.md` but for the packages: the hypervisor's part
//! under systemd, the node's part beside a fencing daemon.

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::{KEY_PATH, Member, plain};
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::cluster::node::Node;
use fence_lab::container::{self, URI};
use fence_lab::guide::stage::{HYPERVISOR, Stage};
use fence_lab::guide::{Act, Guide};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::server::{Config, Server, Which};
use fence_lab::systemd::Booted;
use fence_lab::witness::Witness;

use super::{STOCK, STOCK_UNIT, clone_repository};

const PAGE: &str = "installation.md";
/// The chapter that `tests/tests/packages` plays.
const PACKAGES: &str = "Install the packages";
const NODE: &str = "node1";
const CONFIG: &str = "/etc/fence_virt.conf";
/// The drop-in that the page writes.
const STATE: &str = "/srv/fence-state";
/// The machine for a part of the page, with a clone of this repository.
struct InstallationScene {
    libvirtd: Libvirtd,
    stage: Stage,
    guide: Guide,
    hypervisor: Hypervisor,
}

impl InstallationScene {
    fn on_the_hypervisor() -> Result<Self> {
        let booted = Booted::start(&Hypervisor::new()?, HYPERVISOR, &[])?;
        let hypervisor = booted.hypervisor().clone();
        let libvirtd = Libvirtd::start(&hypervisor)?;
        Self::of(Stage::new(booted), HYPERVISOR, hypervisor, libvirtd)
    }

    /// A container that fences another one.
    fn on_a_node(name: &str, domain: &str) -> Result<Self> {
        Image::get()?;
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let me = Member { name: name.to_owned(), address: [192, 168, 122, 41].into(), domain: domain.to_owned() };
        let node = Node::define(&libvirtd, &me, &plain(std::slice::from_ref(&me), &me, &KEY))?;
        node.start(&libvirtd)?;
        node.wait_up()?;
        let mut stage = Stage::default();
        stage.add_container(name, &hypervisor, domain);
        Self::of(stage, name, hypervisor, libvirtd)
    }

    fn of(stage: Stage, name: &str, hypervisor: Hypervisor, libvirtd: Libvirtd) -> Result<Self> {
        clone_repository(&stage, name)?;
        let guide = Guide::read_if(PAGE, &[HYPERVISOR, NODE], |title| title != PACKAGES)?;
        Ok(Self { libvirtd, stage, guide, hypervisor })
    }

    /// Runs a command on the hypervisor.
    fn must(&self, line: &str) -> Result<String> {
        Ok(self.stage.shell(HYPERVISOR, "root", line)?.success().with_context(|| line.to_owned())?.stdout)
    }
}

#[test]
fn installation_on_the_hypervisor() -> Result<()> {
    let scene = InstallationScene::on_the_hypervisor()?;
    let config = Config::new(KEY_PATH).render();
    scene.stage.write(HYPERVISOR, KEY_PATH, &KEY)?;
    scene.stage.write(HYPERVISOR, CONFIG, config.as_bytes())?;
    scene.stage.write(HYPERVISOR, STOCK_UNIT, STOCK.as_bytes())?;
    scene.must("systemctl daemon-reload && systemctl enable --now fence_virtd")?;
    // The page restarts the daemon for other reasons as well.
    let mut is_moved = false;
    for step in scene.guide.steps.iter().filter(|step| step.host == HYPERVISOR) {
        let typed = match &step.act {
            Act::Type(typed) => typed.command.as_str(),
            Act::Write(..) => "",
        };
        is_moved |= typed.starts_with("mkdir ") && typed.ends_with(STATE);
        if is_moved && typed == "systemctl restart fence-daemon" {
            let elsewhere = config.replacen('{', &format!("{{\n\tstate_directory = \"{STATE}\";"), 1);
            scene.stage.write(HYPERVISOR, CONFIG, elsewhere.as_bytes())?;
        }
        scene.stage.step(step)?;
        if is_moved && typed == "systemctl restart fence-daemon" {
            scene.must(&format!("test -e {STATE}/replays")).context("the state is not at the page's path")?;
        }
    }
    ensure!(scene.must("systemctl is-active fence_virtd")?.trim() == "active");
    let left = scene.stage.shell(HYPERVISOR, "root", "systemctl cat fence-daemon")?;
    ensure!(left.code != Some(0), "the unit is still there: {}", left.stdout);
    Ok(())
}

#[test]
fn installation_on_a_node() -> Result<()> {
    let scene = InstallationScene::on_a_node(NODE, "ct1")?;
    container::start(&scene.libvirtd, "ct2")?;
    let mut config = Config::new(&scene.hypervisor.write("fence.key", &KEY)?);
    config.uris = vec![URI.to_owned()];
    let server = Server::start(&scene.hypervisor, &Which::ours()?, &config)?;
    let victim = Witness::of_container(&scene.hypervisor, "ct2")?;
    for step in scene.guide.steps.iter().filter(|step| step.host == NODE) {
        scene.stage.step(step).with_context(|| server.log())?;
    }
    ensure!(victim.is_dead()?, "{}", server.log());
    victim.wait_next(&scene.hypervisor, "ct2")?;
    scene.libvirtd.wait_state(URI, "ct2", "running")
}
