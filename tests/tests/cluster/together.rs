//! Two hypervisors that answer together (`backend = "cpg"`): corosync and Pacemaker on the hosts,
//! and a second Pacemaker cluster whose nodes are guests of both.
//!
//! Each host has a NAT network of its own with the same addresses, as libvirt's default network
//! has. So a guest reaches the daemon of its own host alone. The guests' cluster has a network for
//! itself, where no host has an address.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fence_lab::cable::{cut_segment, lay_segment};
use fence_lab::cluster::corosync::{Item, KEY_PATH, Member, files};
use fence_lab::cluster::image::Image;
use fence_lab::cluster::lab::KEY;
use fence_lab::cluster::node::{Nic, Node};
use fence_lab::cluster::shell::{self, Shell};
use fence_lab::corosync::{HostRing, host_name};
use fence_lab::guide::stage::Stage;
use fence_lab::guide::{Guide, Step};
use fence_lab::lab::{BRIDGE, HYPERVISOR_V4, Hypervisor};
use fence_lab::libvirtd::Libvirtd;
use fence_lab::process::{Finished, poll_until};
use fence_lab::qemu;
use fence_lab::server::Which;
use fence_lab::systemd::Booted;
use fence_lab::tools;
use fence_lab::witness::Witness;

use crate::guides::Body;

mod power;

use power::{PowerOrder, PowerSwitch};

const PAGE: &str = "several-hypervisors.md";
/// The page's chapter that is played here.
pub(crate) const CHAPTER: &str = "Hypervisors that answer together";
/// The network of the guests' cluster.
const LAN: &str = "lan0";
/// How long an operation of seconds may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(200);
const CONF_PATH: &str = "/etc/fence_virt.conf";
/// Ends a request that is not answered.
const NO_ANSWER: Duration = Duration::from_secs(6);

/// A host, as its Pacemaker knows it.
struct ClusterHost<'a> {
    stage: &'a Stage,
    member: Member,
}

impl Shell for ClusterHost<'_> {
    fn member(&self) -> &Member {
        &self.member
    }

    fn run(&self, script: &str, _: Duration) -> Result<Finished> {
        self.stage.shell(&self.member.name, "root", script)
    }
}

/// The hosts, and the cluster of their guests.
pub(crate) struct Together {
    bodies: Vec<Body>,
    nodes: Vec<Node>,
    libvirtds: Vec<Option<Libvirtd>>,
    pub(crate) stage: Stage,
    hypervisors: Vec<Hypervisor>,
    power: PowerSwitch,
    ring: HostRing,
}

/// What starts with one host.
struct Begun {
    booted: Booted,
    libvirtd: Libvirtd,
    node: Node,
    body: Body,
}

impl Together {
    /// Both clusters are up. No daemon runs yet: the hosts have program, unit and key.
    pub(crate) fn new() -> Result<Self> {
        // Before the lab: it may take minutes.
        Image::get()?;
        let ring = HostRing::silent(2)?;
        let power = PowerSwitch::start(&ring)?;
        let labs: Vec<Hypervisor> = ring.hosts.iter().map(|host| host.hypervisor.clone()).collect();
        let [one, other] = labs.as_slice() else { bail!("two hosts") };
        lay_segment(LAN, [one, other])?;
        let members: Vec<Member> = (1..=2).map(member).collect();
        let conf = ring.conf();
        // Both at once: each waits mostly for its own systemd.
        let begun = std::thread::scope(|scope| {
            let start = |(number, lab): (usize, &Hypervisor)| {
                let (lab, conf, members) = (lab.clone(), conf.as_str(), members.as_slice());
                scope.spawn(move || begin(number, &lab, conf, members).with_context(|| host_name(number)))
            };
            let threads: Vec<_> = labs.iter().enumerate().map(start).collect();
            let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
            joined.collect::<Result<Vec<Begun>>>()
        })?;
        let (mut stage, mut nodes, mut bodies, mut libvirtds) = (Stage::default(), Vec::new(), Vec::new(), Vec::new());
        let mut hypervisors = Vec::new();
        for (number, Begun { booted, libvirtd, node, body }) in begun.into_iter().enumerate() {
            hypervisors.push(booted.hypervisor().clone());
            stage.add_container(&node.member().name, booted.hypervisor(), &node.member().domain);
            stage.add_host(&host_name(number), booted);
            libvirtds.push(Some(libvirtd));
            nodes.push(node);
            bodies.push(body);
        }
        let all = Self { bodies, nodes, libvirtds, stage, hypervisors, power, ring };
        all.wait_hosts()?;
        all.wait_nodes()?;
        Ok(all)
    }

    /// Waits until the hosts are one cluster whose fence device runs.
    fn wait_hosts(&self) -> Result<()> {
        for number in 0..2 {
            shell::wait_online(&self.host(number), &[&host_name(0), &host_name(1)])?;
        }
        shell::wait_started(&self.host(0), "power").map(drop)
    }

    /// Waits until the guests are one cluster.
    fn wait_nodes(&self) -> Result<()> {
        self.bodies.iter().try_for_each(Body::wait_up)?;
        let names: Vec<_> = self.nodes.iter().map(|node| node.member().name.as_str()).collect();
        self.nodes.iter().try_for_each(|node| shell::wait_online(node, &names))
    }

    fn host(&self, number: usize) -> ClusterHost<'_> {
        let (name, address) = (host_name(number), self.ring.hosts[number].address);
        ClusterHost { stage: &self.stage, member: Member { name, address, domain: String::new() } }
    }

    /// Starts the daemons with this configuration, and waits until each hears the other.
    fn serve(&self, conf: &str) -> Result<()> {
        for number in 0..2 {
            self.stage.write(&host_name(number), CONF_PATH, conf.as_bytes())?;
            self.host(number).must("systemctl start fence-daemon")?;
        }
        for number in 0..2 {
            poll_until("both daemons to answer together", LIMIT, || {
                let asked = self.stage.shell(&host_name(number), "root", "fence-daemon status")?;
                Ok((asked.code == Some(0) && asked.stdout.contains("2 of 2 hosts present, quorate")).then_some(()))
            })
            .with_context(|| self.logs())?;
        }
        Ok(())
    }

    /// The process of a host's machine.
    fn machine(&self, number: usize) -> Result<Witness> {
        Witness::of_qemu(&self.hypervisors[number], &machine(number + 1))
    }

    /// What a daemon has logged.
    fn log(&self, number: usize) -> String {
        let log = self.stage.shell(&host_name(number), "root", "journalctl -u fence-daemon -o cat");
        log.map_or_else(|error| format!("{error:#}"), |log| log.stdout)
    }

    fn logs(&self) -> String {
        format!("host1: {}\nhost2: {}", self.log(0), self.log(1))
    }

    /// Cuts a host off from the other one and from the power switch, and its guest from the other
    /// guest.
    fn cut_off(&self, number: usize) -> Result<()> {
        self.ring.partition(&[number])?;
        cut_segment(LAN, &self.hypervisors[number])
    }

    /// Does what the power switch was asked for: all that runs on the host dies.
    fn power_off(&mut self, number: usize, order: PowerOrder, machine: &Witness) -> Result<()> {
        ensure!(order.text.ends_with(&host_name(number)), "the power switch was asked for: {}", order.text);
        self.stage.cut_power(&host_name(number))?;
        // Reaps what this process has started there.
        drop(self.libvirtds[number].take());
        ensure!(machine.dies_within(LIMIT)?, "the machine outlives its host");
        order.done()
    }
}

/// The address of a guest on the network of its cluster.
fn lan(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + number)
}

/// A node: the operating system of a machine of its own.
fn member(number: u8) -> Member {
    Member { name: format!("node{number}"), address: lan(number), domain: format!("node{number}") }
}

/// The machine of a host.
fn machine(number: usize) -> String {
    format!("vm{number}")
}

/// Starts a host, its libvirtd and its guest.
fn begin(number: usize, lab: &Hypervisor, conf: &str, members: &[Member]) -> Result<Begun> {
    let [daemon, commands] = Which::ours()?.executables()?;
    let unit = std::fs::read(tools::workspace().join("dist/fence-daemon.service"))?;
    let file = |path, mode, content: &[u8]| Item { path, mode, content: content.to_vec() };
    let booted = Booted::start(
        lab,
        &host_name(number),
        &[
            file(daemon.0, 0o755, &daemon.1),
            file(commands.0, 0o755, &commands.1),
            file("/etc/systemd/system/fence-daemon.service", 0o644, &unit),
            file(KEY_PATH, 0o600, &KEY),
            file("/usr/sbin/fence_power", 0o755, include_bytes!("assets/fence-power.sh")),
            file("/etc/corosync/corosync.conf", 0o644, conf.as_bytes()),
            file("/etc/pacemaker/authkey", 0o640, &[b'h'; 128]),
            file("/etc/default/pacemaker", 0o644, b"PCMK_logpriority=notice\nPCMK_shutdown_delay=0\n"),
            file("/usr/local/share/lab/cib.xml", 0o644, include_bytes!("assets/hosts-cib.xml")),
        ],
    )?;
    // A hypervisor of the lab is no cluster node by itself. The first configuration is there before
    // Pacemaker is.
    booted.must(
        "install -o hacluster -g haclient -m 600 /usr/local/share/lab/cib.xml /var/lib/pacemaker/cib/cib.xml && \
         chgrp haclient /etc/pacemaker/authkey && \
         systemctl unmask corosync pacemaker && systemctl start --no-block corosync pacemaker",
    )?;
    let libvirtd = Libvirtd::start(booted.hypervisor())?;
    let me = members.get(number).context("no such member")?;
    let last = 10 + u8::try_from(number + 1)?;
    let nat = Nic { bridge: BRIDGE, address: Ipv4Addr::new(192, 168, 122, last), gateway: Some(HYPERVISOR_V4) };
    let own = Nic { bridge: LAN, address: me.address, gateway: None };
    let node = Node::define_with(&libvirtd, me, &files(members, me, &KEY), &[nat, own])?;
    let machine = machine(number + 1);
    qemu::start_idle(&libvirtd, &machine)?;
    let body = Body::of(&machine, node.clone());
    Ok(Begun { booted, libvirtd, node, body })
}

/// Whether a step is about a host's own end: the power switch has to be there for it.
fn cuts_power(step: &Step) -> bool {
    step.types("pcs stonith fence host2")
}

#[test]
fn the_page_of_hypervisors_that_answer_together() -> Result<()> {
    let mut all = Together::new()?;
    let guide = Guide::read_if(PAGE, &all.stage.hosts(), |title| title == CHAPTER)?;
    let mut has_cut = false;
    for step in &guide.steps {
        if !cuts_power(step) {
            all.stage.step(step).with_context(|| all.logs())?;
            continue;
        }
        let machine = all.machine(1)?;
        let typed = all.stage.clone();
        std::thread::scope(|scope| {
            let typing = scope.spawn(|| typed.step(step));
            let order = all.power.order(LIMIT)?;
            all.power_off(1, order, &machine)?;
            typing.join().map_err(|_| anyhow!("a thread panicked"))?
        })?;
        has_cut = true;
    }
    ensure!(has_cut, "the page does not fence a host");
    Ok(())
}

/// By tcp. The host of the second node is cut off with all that runs there: nothing of it counts as
/// off until the hosts' own Pacemaker has fenced it.
#[test]
fn machines_of_a_lost_host_are_off_when_the_hosts_own_pacemaker_has_fenced_it() -> Result<()> {
    let mut all = Together::new()?;
    all.serve(
        "fence_virtd {\n\tlistener = \"multicast,tcp\";\n\tbackend = \"cpg\";\n}\n\
         listeners {\n\tmulticast {\n\t\tinterface = \"virbr0\";\n\t}\n\ttcp {\n\t\taddress = \"192.168.122.1\";\n\t}\n}\n\
         backends {\n\tcpg {\n\t\turi = \"qemu:///system\";\n\t}\n}\n",
    )?;
    let asker = all.nodes[0].clone();
    asker.must("pcs stonith create fence fence_virt ipaddr=192.168.122.1 pcmk_host_map=\"node1:vm1;node2:vm2\"")?;
    shell::wait_started(&asker, "fence")?;

    // The node of the other host, by the first host's daemon.
    let machine = all.machine(1)?;
    asker.must("stonith_admin --reboot node2 --timeout 60").with_context(|| all.logs())?;
    ensure!(machine.is_dead()?, "node2 counts as fenced, and its machine lives: {}", all.logs());
    let told = |log: &str, reply: &str| {
        log.lines().any(|line| line.contains("domain=vm2") && line.contains("via=tcp") && line.contains(reply))
    };
    ensure!(told(&all.log(0), "reply=success"), "not by tcp: {}", all.logs());
    let machine = machine.wait_next(&all.hypervisors[1], "vm2")?;
    all.wait_nodes()?;

    all.cut_off(1)?;
    // The hosts' Pacemaker wants the host to be dead. Until that is so, no request succeeds, of the
    // guests' Pacemaker or anybody's.
    let order = all.power.order(LIMIT)?;
    let short = format!("fence_virt -T 192.168.122.1 -o off -H vm2 -t {}", NO_ANSWER.as_secs());
    let answer = asker.run(&format!("timeout {} {short}", 2 * NO_ANSWER.as_secs()), LIMIT)?;
    ensure!(
        answer.code != Some(0) && !machine.is_dead()?,
        "a living machine is called off: {answer:?}: {}",
        all.logs()
    );
    let history = asker.must("stonith_admin --history node2 --verbose")?;
    ensure!(!machine.is_dead()? && history.matches("succe").count() <= 1, "{history}: {}", all.logs());

    // A request that waits meanwhile is answered as soon as the host is proven dead.
    let asked = asker.spawn("stonith_admin --reboot node2 --timeout 120")?;
    all.power_off(1, order, &machine)?;
    let answer = asked.finish(LIMIT)?;
    ensure!(answer.code == Some(0), "its host is dead, and it is not: {answer:?}: {}", all.log(0));
    poll_until("the cluster to have node2 fenced", LIMIT, || {
        let status = shell::status(&asker)?;
        Ok((shell::online(&status) == ["node1"] && !status.contains("UNCLEAN")).then_some(()))
    })
    .with_context(|| all.log(0))?;
    let log = all.log(0);
    ensure!(log.contains("Pacemaker has fenced this host"), "{log}");
    Ok(())
}
