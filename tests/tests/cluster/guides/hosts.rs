//! Runs the commands of `docs/guide/several-hypervisors.md`: a cluster whose nodes are guests of
//! two hypervisors.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, ensure};
use fence_lab::cluster::corosync::{KEY_PATH, Member, files};
use fence_lab::cluster::lab::KEY;
use fence_lab::cluster::node::Node;
use fence_lab::cluster::shell::{self, Shell as _};
use fence_lab::guide::stage::Stage;
use fence_lab::guide::{Act, Guide};
use fence_lab::lab::Hypervisor;
use fence_lab::libvirtd::Libvirtd;
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::systemd::Booted;
use fence_lab::tools;
use fence_lab::witness::Witness;

use super::body::Body;
use crate::together::CHAPTER;

const PAGE: &str = "several-hypervisors.md";
/// The nodes' firewall as docs/guide/kvm-cluster.md leaves it. The rules are loaded before the
/// start, so corosync notices nothing.
const FIREWALL: &str = "firewall-offline-cmd --add-service=high-availability && \
    firewall-offline-cmd --add-rich-rule='rule family=\"ipv4\" source address=\"192.168.122.1\" port port=\"1229\" protocol=\"tcp\" accept' && \
    systemctl enable --now firewalld";
/// How long an operation of seconds may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(200);

/// The cluster's nodes. Each is the operating system of its own machine.
fn members() -> Vec<Member> {
    let member = |number: u8| {
        let name = format!("node{number}");
        Member { domain: name.clone(), name, address: Ipv4Addr::new(192, 168, 122, 10 + number) }
    };
    vec![member(1), member(2)]
}

struct HostsScene {
    bodies: Vec<Body>,
    nodes: Vec<Node>,
    libvirtds: Vec<Libvirtd>,
    stage: Stage,
    hypervisors: [Hypervisor; 2],
}

impl HostsScene {
    /// The state before the first command: two hosts with the daemon and the key, and a cluster
    /// with one guest on each.
    fn new() -> Result<Self> {
        let unit = std::fs::read(tools::workspace().join("dist/fence-daemon.service"))?;
        let (executables, members) = (Which::ours()?.executables()?, members());
        let [one, other] = Hypervisor::pair()?;
        let (mut stage, mut nodes, mut bodies, mut libvirtds) = (Stage::default(), Vec::new(), Vec::new(), Vec::new());
        let hypervisors = [Booted::start(&one, "host1", &[])?, Booted::start(&other, "host2", &[])?];
        let spaces = hypervisors.each_ref().map(|host| host.hypervisor().clone());
        for (number, (booted, me)) in (1..).zip(hypervisors.into_iter().zip(&members)) {
            let host = format!("host{number}");
            let hypervisor = &booted.hypervisor().clone();
            let libvirtd = Libvirtd::start(hypervisor)?;
            stage.add_host(&host, booted);
            for (place, content) in &executables {
                stage.install(&host, place, content)?;
            }
            stage.write(&host, "/etc/systemd/system/fence-daemon.service", &unit)?;
            stage.write(&host, KEY_PATH, &KEY)?;
            let machine = format!("vm{number}");
            let node = Node::define(&libvirtd, me, &files(&members, me, &KEY))?;
            qemu::start_idle(&libvirtd, &machine)?;
            stage.add_container(&me.name, hypervisor, &me.domain);
            bodies.push(Body::of(&machine, node.clone()));
            nodes.push(node);
            libvirtds.push(libvirtd);
        }
        bodies.iter().try_for_each(Body::wait_up)?;
        for node in &nodes {
            node.must(FIREWALL)?;
        }
        let names: Vec<_> = members.iter().map(|member| member.name.as_str()).collect();
        nodes.iter().try_for_each(|node| shell::wait_online(node, &names))?;
        Ok(Self { bodies, nodes, libvirtds, stage, hypervisors: spaces })
    }

    /// Defines each machine on the other host, too.
    fn define_on_both(&self) -> Result<()> {
        self.libvirtds
            .iter()
            .zip(["vm2", "vm1"])
            .try_for_each(|(libvirtd, machine)| qemu::define_idle(libvirtd, machine))
    }
}

#[test]
fn hosts_of_one_segment() -> Result<()> {
    let scene = HostsScene::new()?;
    // Another test plays the other chapter, whose hosts are a cluster.
    for step in &Guide::read_if(PAGE, &scene.stage.hosts(), |title| title != CHAPTER)?.steps {
        // Where machines are defined on both hosts, the second host gets its own port.
        if step.host == "host2" && matches!(step.act, Act::Write(..)) {
            scene.define_on_both()?;
        }
        scene.stage.step(step)?;
    }

    // The host with only a definition answers "off"; the daemon where the machine runs is stopped.
    scene.bodies[1].wait_up()?;
    let machine = Witness::of_qemu(&scene.hypervisors[1], "vm2")?;
    scene.stage.shell("host2", "root", "systemctl stop fence-daemon")?.success()?;
    let node = &scene.nodes[0];
    // A short time limit where no answer is expected.
    node.must("pcs stonith update fence-host2 timeout=3 && crm_resource --wait --timeout=60s")?;
    let fence = node.run("pcs stonith fence node2", LIMIT)?;
    ensure!(fence.code != Some(0) && !machine.is_dead()?, "a running machine was called off: {fence:?}");
    let asked = scene.stage.shell("host1", "root", "journalctl -u fence-daemon -n 100 -o cat")?.stdout;
    ensure!(asked.contains("op=off domain=vm2"), "the first host got no request: {asked}");
    Ok(())
}
