//! Hypervisors with a corosync each: one cluster of hosts.
//!
//! Their corosync talks over cables to a switch, which has a place of its own. A partition puts
//! cables on another bridge of the switch: frames are lost, and no host notices a cable.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::cable::lay_cable;
use crate::cluster::corosync::{self, Member};
use crate::lab::{COMMAND_LIMIT, Hypervisor};
use crate::process::{Process, poll_until, run};
use crate::tools;

/// The end of a cable at a host.
const RING: &str = "ring0";
/// The bridges of the switch: all hosts, and those that a partition has cut off.
const BRIDGES: [&str; 2] = ["together", "apart"];
const CONF: &str = "/etc/corosync/corosync.conf";
const LOG: &str = "/var/log/corosync/corosync.log";
/// How long a membership may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);
/// The token timeout in milliseconds.
const TOKEN: u32 = 1500;

/// The private directories of a host's corosync. libqb's sockets are abstract, so they belong to
/// the host's network.
const PLACES: &str = "for place in /dev/shm /var/lib/corosync /var/log/corosync /etc/corosync; do
    mkdir -p \"$place\" && mount -t tmpfs -o mode=755 tmpfs \"$place\"
done";

/// What each corosync.conf of the lab has as well: real-time priority would take the processor from
/// the tests, and a move to another cgroup would leave the lab.
const SYSTEM: &str = "system {\n    sched_rr: no\n    move_to_root_cgroup: no\n}\n";

/// A host of a [`HostRing`].
#[derive(Debug)]
pub struct RingHost {
    // Drops before the hypervisor.
    corosync: Option<Process>,
    /// Where its other programs run.
    pub hypervisor: Hypervisor,
    /// Its address among the hosts.
    pub address: Ipv4Addr,
}

/// Hypervisors that are a corosync cluster. Their node ids count from 1.
#[derive(Debug)]
pub struct HostRing {
    /// The hosts; that with node id 1 is the first.
    pub hosts: Vec<RingHost>,
    switch: Hypervisor,
}

/// The name of the host with this index, for corosync.
#[must_use]
pub fn host_name(index: usize) -> String {
    format!("host{}", index + 1)
}

impl HostRing {
    /// So many hosts, whose corosync runs and which are one membership.
    pub fn new(count: u8) -> Result<Self> {
        let mut ring = Self::silent(count)?;
        for index in 0..usize::from(count) {
            ring.start(index)?;
        }
        ring.wait_members(&(0..usize::from(count)).collect::<Vec<_>>())?;
        Ok(ring)
    }

    /// So many hosts, whose corosync does not run.
    pub fn silent(count: u8) -> Result<Self> {
        tools::require(&["corosync", "corosync-quorumtool"])?;
        let switch = Hypervisor::new()?;
        for bridge in BRIDGES {
            switch.ip(&["link", "add", bridge, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"])?;
            switch.ip(&["link", "set", bridge, "up"])?;
        }
        let mut ring = Self { hosts: Vec::new(), switch };
        for index in 0..count {
            let hypervisor = Hypervisor::new()?;
            hypervisor.space().must("sh", &["-c", PLACES])?;
            let address = Ipv4Addr::new(10, 88, 0, index + 1);
            lay_cable((RING, &hypervisor), (&port(usize::from(index)), &ring.switch))?;
            hypervisor.ip(&["addr", "add", &format!("{address}/24"), "dev", RING])?;
            hypervisor.ip(&["link", "set", RING, "up"])?;
            ring.hosts.push(RingHost { corosync: None, hypervisor, address });
        }
        ring.heal()?;
        let conf = ring.conf();
        for host in &ring.hosts {
            host.hypervisor.write(CONF, conf.as_bytes())?;
        }
        Ok(ring)
    }

    /// The switch with an address among the hosts, for what is to serve them there. Hosts that are
    /// cut off do not reach it.
    pub fn switch_at(&self, address: Ipv4Addr) -> Result<&Hypervisor> {
        self.switch.ip(&["addr", "add", &format!("{address}/24"), "dev", BRIDGES[0]])?;
        Ok(&self.switch)
    }

    /// The configuration of all.
    #[must_use]
    pub fn conf(&self) -> String {
        let member = |(index, host): (usize, &RingHost)| Member {
            name: host_name(index),
            address: host.address,
            domain: String::new(),
        };
        let members: Vec<Member> = self.hosts.iter().enumerate().map(member).collect();
        corosync::corosync(&members, TOKEN) + SYSTEM
    }

    /// Writes another configuration to all hosts, for the next start or [`Self::reload`].
    pub fn configure(&self, conf: &str) -> Result<()> {
        self.hosts.iter().try_for_each(|host| host.hypervisor.write(CONF, conf.as_bytes()).map(drop))
    }

    /// Has the hosts' corosync read its configuration again.
    pub fn reload(&self, index: usize) -> Result<()> {
        self.host(index)?.hypervisor.space().must("corosync-cfgtool", &["-R"]).map(drop)
    }

    fn host(&self, index: usize) -> Result<&RingHost> {
        self.hosts.get(index).with_context(|| format!("no host {index}"))
    }

    fn process(&mut self, index: usize) -> Result<&mut Process> {
        let host = self.hosts.get_mut(index).with_context(|| format!("no host {index}"))?;
        host.corosync.as_mut().with_context(|| format!("no corosync on host {index}"))
    }

    /// Starts a host's corosync and waits until it serves.
    pub fn start(&mut self, index: usize) -> Result<()> {
        let space = self.host(index)?.hypervisor.space().clone();
        let mut command = Command::new("corosync");
        command.args(["-f", "-c", CONF]);
        let process = Process::start(&space, &mut command)?;
        if let Some(host) = self.hosts.get_mut(index) {
            host.corosync = Some(process);
        }
        poll_until("corosync", LIMIT, || {
            if !self.process(index)?.is_running()? {
                bail!("it has ended");
            }
            let space = self.host(index)?.hypervisor.space();
            let status = run(space, Command::new("corosync-cfgtool").arg("-s"), COMMAND_LIMIT)?;
            Ok((status.code == Some(0)).then_some(()))
        })
        .with_context(|| self.log(index))
    }

    /// Kills a host's corosync, as a crash does.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        let process = self.process(index)?;
        process.signal(Signal::SIGKILL)?;
        ensure!(process.ends_within(COMMAND_LIMIT)? && !process.is_running()?, "corosync does not end");
        Ok(())
    }

    /// Sends a host's corosync a signal.
    pub fn signal(&mut self, index: usize, signal: Signal) -> Result<()> {
        self.process(index)?.signal(signal)
    }

    /// Puts these hosts on one side, and the others on the other.
    pub fn partition(&self, apart: &[usize]) -> Result<()> {
        for index in 0..self.hosts.len() {
            let bridge = BRIDGES[usize::from(apart.contains(&index))];
            self.switch.ip(&["link", "set", &port(index), "master", bridge, "up"])?;
        }
        Ok(())
    }

    /// Joins all hosts again.
    pub fn heal(&self) -> Result<()> {
        self.partition(&[])
    }

    /// The node ids of a host's membership; none if its corosync does not serve.
    pub fn members(&self, index: usize) -> Result<Vec<u32>> {
        let tool = run(
            self.host(index)?.hypervisor.space(),
            Command::new("corosync-quorumtool").args(["-l", "-i"]),
            COMMAND_LIMIT,
        )?;
        Ok(nodes(&tool.stdout))
    }

    /// Waits until these hosts are one membership, and no other host is in it.
    pub fn wait_members(&self, indices: &[usize]) -> Result<()> {
        let wanted = indices.iter().map(|index| u32::try_from(index + 1).map_err(Into::into));
        let wanted = wanted.collect::<Result<Vec<u32>>>()?;
        for index in indices {
            let what = format!("{} to have the members {wanted:?}", host_name(*index));
            poll_until(&what, LIMIT, || Ok((self.members(*index)? == wanted).then_some(())))
                .with_context(|| self.log(*index))?;
        }
        Ok(())
    }

    /// What a host's corosync has logged.
    #[must_use]
    pub fn log(&self, index: usize) -> String {
        let host = self.hosts.get(index);
        let file = host.and_then(|host| std::fs::read_to_string(host.hypervisor.outside(LOG)).ok());
        let stderr = host.and_then(|host| host.corosync.as_ref()).map(|process| process.stderr().text());
        format!("{}'s corosync: {}{}", host_name(index), file.unwrap_or_default(), stderr.unwrap_or_default())
    }
}

/// The switch's end of a host's cable.
fn port(index: usize) -> String {
    format!("port{index}")
}

/// The node ids in the list that corosync-quorumtool prints.
fn nodes(list: &str) -> Vec<u32> {
    let lines = list.lines().skip_while(|line| !line.contains("Nodeid")).skip(1);
    let mut nodes: Vec<u32> = lines.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    nodes.sort_unstable();
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_of_a_list() {
        let list = "\nMembership information\n----------------------\n    Nodeid      Votes Name\n         2          1 10.88.0.2\n         1          1 10.88.0.1 (local)\n";
        assert_eq!(nodes(list), [1, 2]);
        assert_eq!(nodes("Cannot initialize QUORUM service\n"), Vec::<u32>::new());
    }
}
