//! A whole cluster in a lab: libvirtd, a fencing server, and two containers with corosync and
//! Pacemaker. Both nodes are online and run the service that must never run twice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::corosync::{KEY_PATH, Member, files};
use super::image::Image;
use super::node::Node;
use super::shell::{self, Shell as _};
use crate::container::URI;
use crate::lab::Hypervisor;
use crate::libvirtd::Libvirtd;
use crate::server::{Config, Server, Which};

/// The service that must never run twice.
pub const SERVICE: &str = "solo";
/// The key that all of them share: of the length that `dd bs=4k count=1` makes.
pub const KEY: [u8; 4096] = [0x5a; 4096];

/// How long a server may take to end: it finishes what it has begun.
const ENDS: Duration = Duration::from_secs(60);

/// A cluster of two. Dropping it removes it.
#[derive(Debug)]
pub struct Cluster {
    /// What fences.
    pub server: Server,
    /// How it is configured.
    pub config: Config,
    /// The hypervisor's libvirtd.
    pub libvirtd: Libvirtd,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The hypervisor of all this.
    pub hypervisor: Hypervisor,
}

/// The two nodes that every lab has: names of the cluster's that are not those of the hypervisor.
#[must_use]
pub fn members() -> Vec<Member> {
    vec![Member::new("alpha", 31, "web-one"), Member::new("beta", 32, "web-two")]
}

impl Cluster {
    /// Makes the cluster and waits until the service runs. An error says what is missing or does
    /// not start.
    pub fn start(which: &Which) -> Result<Self> {
        // Before the lab: it may take minutes.
        Image::get()?;
        let hypervisor = Hypervisor::new()?;
        let libvirtd = Libvirtd::start(&hypervisor)?;
        let mut config = Config::new(&hypervisor.write("fence.key", &KEY)?);
        config.uris = vec![URI.to_owned()];
        let members = members();
        let node = |me| {
            let node = Node::define(&libvirtd, me, &files(&members, me, &KEY))?;
            node.start(&libvirtd)?;
            Ok(node)
        };
        let nodes = members.iter().map(node).collect::<Result<Vec<_>>>()?;
        let server = Server::start(&hypervisor, which, &config)?;
        let cluster = Self { server, config, libvirtd, nodes, hypervisor };
        let first = cluster.node(0)?;
        cluster.wait_online()?;
        shell::configure(first, &members, &format!("key_file={KEY_PATH}"))?;
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// A node by its number.
    pub fn node(&self, number: usize) -> Result<&Node> {
        self.nodes.get(number).with_context(|| format!("no node {number}"))
    }

    /// A node's number by the cluster's name for it.
    pub fn number(&self, name: &str) -> Result<usize> {
        self.nodes.iter().position(|node| node.member().name == name).with_context(|| format!("no node {name}"))
    }

    /// Waits until each node that runs says that all of them are online.
    ///
    /// # Errors
    /// They are not in time.
    pub fn wait_online(&self) -> Result<()> {
        let names: Vec<_> = self.nodes.iter().map(|node| node.member().name.as_str()).collect();
        self.nodes.iter().try_for_each(|node| shell::wait_online(node, &names))
    }

    /// Waits until all nodes are online and the service and the fence device run: the number of the
    /// service's node.
    pub fn wait_ready(&self) -> Result<usize> {
        self.wait_online()?;
        let first = self.node(0)?;
        shell::wait_started(first, "fence")?;
        let name = shell::wait_started(first, SERVICE)?;
        shell::settle(first)?;
        let again = shell::wait_started(first, SERVICE)?;
        ensure!(name == again, "the service went from {name} to {again} with nothing broken");
        self.number(&name)
    }

    /// Ends the server and starts it again, with these keys in its backend.
    pub fn reconfigure_server(&mut self, which: &Which, backend: &[(&'static str, &'static str)]) -> Result<()> {
        self.server.process().signal(Signal::SIGTERM)?;
        ensure!(self.server.process().ends_within(ENDS)?, "the server does not end: {}", self.server.log());
        self.config.backend = backend.to_vec();
        self.start_server(which)
    }

    /// Starts the server again, when it is gone.
    pub fn start_server(&mut self, which: &Which) -> Result<()> {
        self.server = Server::start(&self.hypervisor, which, &self.config)?;
        Ok(())
    }
}
