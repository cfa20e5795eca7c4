//! Checks multicast snooping. Such bridges and switches forward multicast to members only, and
//! forget members unless a querier keeps asking.

use std::fs;
use std::path::PathBuf;

use fence_net::interface::Interface;
use fence_net::way_out;

use super::finding::Finding;
use super::sight;

const CHECK: &str = "snooping";

/// A bridge's snooping.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bridge {
    name: String,
    snooping: bool,
    /// Whether the bridge itself is a querier.
    querier: bool,
    /// What leads beyond the guests of this host.
    ways_out: Vec<String>,
}

/// Checks the bridge that an interface is, or is a port of.
#[must_use]
pub fn check(interface: &str) -> Option<Finding> {
    look(interface).map(|bridge| judge(&bridge))
}

fn of(interface: &str, part: &str) -> PathBuf {
    ["/sys/class/net", interface, part].iter().collect()
}

fn look(interface: &str) -> Option<Bridge> {
    let name = if of(interface, "bridge").exists() {
        interface.to_owned()
    } else {
        let master = fs::read_link(of(interface, "brport/bridge")).ok()?;
        master.file_name()?.to_str()?.to_owned()
    };
    let set = |part: &str| sight::number(of(&name, part)).is_some_and(|number| number != 0);
    let ways_out = way_out::of(Interface::named(&name)?.index).ok()?;
    Some(Bridge {
        snooping: set("bridge/multicast_snooping"),
        querier: set("bridge/multicast_querier"),
        ways_out: ways_out.iter().map(ToString::to_string).collect(),
        name,
    })
}

fn judge(bridge: &Bridge) -> Finding {
    let name = &bridge.name;
    if !bridge.snooping {
        return Finding::ok(CHECK, format!("{name} does not snoop: multicast goes to all of its ports"));
    }
    if bridge.querier {
        return Finding::ok(CHECK, format!("{name} snoops, and is its own querier"));
    }
    if bridge.ways_out.is_empty() {
        return Finding::ok(
            CHECK,
            format!("{name} snoops without a querier, and leads to no other host: Linux then floods multicast"),
        );
    }
    Finding::warning(
        CHECK,
        format!("{name} snoops without a querier, and leads to other hosts through {}", bridge.ways_out.join(", ")),
        "switches on the way forget memberships after some minutes (260 s, mostly) if nobody asks for them, and requests of guests on other hosts \
         stop coming: have this bridge ask, unless a router or a switch of that network does",
    )
    .command(format!("ip link set {name} type bridge mcast_querier 1"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    #[test]
    fn snooping_is_doubtful_without_a_querier_and_with_a_way_out() {
        let state = |snooping, querier, out: &[&str]| {
            let ways_out = out.iter().map(|&port| port.to_owned()).collect();
            judge(&Bridge { name: "br0".to_owned(), snooping, querier, ways_out }).state
        };
        assert_eq!(state(true, false, &["eth0"]), State::Warning);
        assert_eq!(state(true, false, &[]), State::Ok);
        assert_eq!(state(true, true, &["eth0"]), State::Ok);
        assert_eq!(state(false, false, &["eth0"]), State::Ok);
    }

    #[test]
    fn only_bridges_have_findings() {
        assert_eq!(check("lo"), None);
        assert_eq!(check("no-such-if"), None);
    }
}
