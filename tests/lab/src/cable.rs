//! Cables between hypervisors: one for migrations, and one that joins their bridges to one segment.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;

use anyhow::{Result, bail};

use crate::lab::{BRIDGE, HYPERVISOR_V4, HYPERVISOR_V6, Hypervisor};
use crate::tools;

/// A hypervisor's end of the cable to another one.
const CABLE: &str = "mig0";
/// The port of [`BRIDGE`] that leads to another hypervisor's.
const UPLINK: &str = "uplink";

impl Hypervisor {
    /// Lays a cable to another hypervisor, for migrations: the addresses of both ends.
    pub fn connect(&self, other: &Self) -> Result<[Ipv4Addr; 2]> {
        lay_cable((CABLE, self), (CABLE, other))?;
        let addresses = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];
        for (hypervisor, address) in [self, other].into_iter().zip(addresses) {
            hypervisor.ip(&["addr", "add", &format!("{address}/24"), "dev", CABLE])?;
            hypervisor.ip(&["link", "set", CABLE, "up"])?;
        }
        Ok(addresses)
    }

    /// Two hypervisors whose bridges are one segment. The first has [`HYPERVISOR_V4`] and
    /// [`HYPERVISOR_V6`], the second the next addresses. Their guests need different numbers.
    pub fn pair() -> Result<[Self; 2]> {
        let after_v4 = Ipv4Addr::from_bits(HYPERVISOR_V4.to_bits() + 1);
        let after_v6 = Ipv6Addr::from_bits(HYPERVISOR_V6.to_bits() + 1);
        let pair = [Self::new()?, Self::at(after_v4, after_v6)?];
        lay_cable((UPLINK, &pair[0]), (UPLINK, &pair[1]))?;
        for hypervisor in &pair {
            hypervisor.ip(&["link", "set", UPLINK, "master", BRIDGE, "up"])?;
        }
        for hypervisor in &pair {
            hypervisor.wait_forwarding(UPLINK)?;
        }
        Ok(pair)
    }
}

/// Makes a bridge of this name on both hypervisors, without addresses. Both are one segment.
pub fn lay_segment(bridge: &str, hypervisors: [&Hypervisor; 2]) -> Result<()> {
    let uplink = uplink(bridge);
    for hypervisor in hypervisors {
        hypervisor.ip(&["link", "add", bridge, "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"])?;
    }
    lay_cable((&uplink, hypervisors[0]), (&uplink, hypervisors[1]))?;
    for hypervisor in hypervisors {
        hypervisor.ip(&["link", "set", &uplink, "master", bridge, "up"])?;
        hypervisor.ip(&["link", "set", bridge, "up"])?;
    }
    Ok(())
}

/// Pulls the cable of such a bridge.
pub fn cut_segment(bridge: &str, hypervisor: &Hypervisor) -> Result<()> {
    hypervisor.ip(&["link", "set", &uplink(bridge), "down"]).map(drop)
}

/// The port that leads to the other hypervisor.
fn uplink(bridge: &str) -> String {
    format!("{bridge}-up")
}

/// Makes a cable between two hypervisors: the name of its end on each.
pub(crate) fn lay_cable(one: (&str, &Hypervisor), other: (&str, &Hypervisor)) -> Result<()> {
    let holders = [one.1.holder().to_string(), other.1.holder().to_string()];
    let mut add = Command::new(tools::find("ip")?);
    add.args(["link", "add", one.0, "netns", &holders[0], "type", "veth"]);
    add.args(["peer", "name", other.0, "netns", &holders[1]]);
    let added = add.output()?;
    if !added.status.success() {
        bail!("a cable between two labs: {}", String::from_utf8_lossy(&added.stderr));
    }
    Ok(())
}
