//! Checks the guests' interface: existence, state, address, multicast, membership, and the settings
//! that drop its packets.

use std::net::{IpAddr, Ipv4Addr};

use fence_config::Multicast;
use fence_net::interface::{Interface, Wanted};
use fence_net::taker::Taker;
use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use super::finding::Finding;
use super::sight;

/// The facts about an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceFacts {
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// Whether it has a carrier. A bridge has that of its ports.
    pub running: bool,
    /// Whether it supports multicast.
    pub multicast: bool,
    /// Its addresses of the group's family.
    pub networks: Vec<IpNet>,
    /// What takes its frames before this host's IP stack, if anything.
    pub taker: Option<Taker>,
}

impl InterfaceFacts {
    /// Whether this is one of its names.
    #[must_use]
    pub fn is_named(&self, name: &str) -> bool {
        Interface::meant_by(name).is_some_and(|meant| meant.name == self.name)
    }
}

/// Looks at an interface; `None` if it does not exist.
#[must_use]
pub fn look(name: &str, v4: bool) -> Option<InterfaceFacts> {
    let interface = Interface::meant_by(name)?;
    let taker = Taker::of(&interface);
    let Interface { name, index } = interface;
    let mut seen = InterfaceFacts { name, up: false, running: false, multicast: false, networks: Vec::new(), taker };
    let is_its = |label: &str| Interface::named(label).is_some_and(|named| named.index == index);
    for address in getifaddrs().into_iter().flatten().filter(|address| is_its(&address.interface_name)) {
        seen.up = address.flags.contains(InterfaceFlags::IFF_UP);
        seen.running = address.flags.contains(InterfaceFlags::IFF_RUNNING);
        seen.multicast = address.flags.contains(InterfaceFlags::IFF_MULTICAST);
        let ip = |storage: Option<nix::sys::socket::SockaddrStorage>| {
            let storage = storage?;
            let of_v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            of_v4.or_else(|| storage.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        };
        if let Some(own) = ip(address.address).filter(|own| own.is_ipv4() == v4) {
            let network = ip(address.netmask).and_then(|mask| IpNet::with_netmask(own, mask).ok());
            seen.networks.push(network.unwrap_or_else(|| own.into()));
        }
    }
    Some(seen)
}

/// The configured interfaces that exist, and the findings about them.
#[must_use]
pub fn check(multicast: &Multicast) -> (Vec<InterfaceFacts>, Vec<Finding>) {
    let v4 = multicast.group.is_ipv4();
    match &multicast.interface {
        Some(name) => {
            let seen = look(name, v4);
            let finding = judge_named(name, seen.as_ref(), v4);
            (seen.into_iter().collect(), vec![finding])
        }
        None => {
            let there = Wanted::Suitable(multicast.group).there();
            let seen: Vec<_> = there.iter().filter_map(|present| look(&present.interface.name, v4)).collect();
            let finding = judge_any(&seen, v4);
            (seen, vec![finding])
        }
    }
}

const CHECK: &str = "interface";

fn family(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}

fn judge_named(name: &str, seen: Option<&InterfaceFacts>, v4: bool) -> Finding {
    let Some(seen) = seen else {
        let remedy = "the daemon waits for it: libvirt makes its bridge with its network, others come with the host's network configuration \
                      (`interface` in the multicast section has the name)";
        return Finding::wrong(CHECK, format!("there is no interface {name}"), remedy)
            .command("virsh net-start default");
    };
    if let Some(taker) = &seen.taker {
        return Finding::wrong(CHECK, format!("{name} is {taker}"), taker.help());
    }
    if !seen.up {
        return Finding::wrong(CHECK, format!("{name} is switched off"), "nothing is heard on it")
            .command(format!("ip link set {name} up"));
    }
    if !seen.multicast {
        let remedy = "requests are multicast, and this interface receives none";
        return Finding::wrong(CHECK, format!("{name} cannot multicast"), remedy)
            .command(format!("ip link set {name} multicast on"));
    }
    if seen.networks.is_empty() {
        let family = family(v4);
        let remedy = format!(
            "guests are called back from there: give it an address of their network (`ip addr add ... dev {name}`, or in libvirt's network)"
        );
        return Finding::wrong(CHECK, format!("{name} has no {family} address"), remedy);
    }
    let addresses: Vec<_> = seen.networks.iter().map(ToString::to_string).collect();
    let addresses = addresses.join(", ");
    if !seen.running {
        let remedy = "no guest is connected, or the cable is unplugged: normal while no guest runs";
        return Finding::warning(CHECK, format!("{name} is up ({addresses}) and has no carrier"), remedy);
    }
    Finding::ok(CHECK, format!("{name} is up, {addresses}"))
}

fn judge_any(seen: &[InterfaceFacts], v4: bool) -> Finding {
    if seen.is_empty() {
        let seen = format!("no interface is up, can multicast and has an {} address", family(v4));
        return Finding::wrong(
            CHECK,
            seen,
            "the daemon waits for one: name the guests' by `interface` in the multicast section",
        );
    }
    let names: Vec<_> = seen.iter().map(|seen| seen.name.as_str()).collect();
    Finding::ok(CHECK, format!("none is named: {}", names.join(", ")))
}

/// Checks whether the interfaces have joined the group, by `/proc/net/igmp` and `igmp6`.
#[must_use]
pub fn membership(group: IpAddr, seen: &[InterfaceFacts], daemon_runs: bool) -> Vec<Finding> {
    let table = sight::text(if group.is_ipv4() { "/proc/net/igmp" } else { "/proc/net/igmp6" });
    let judge = |seen: &InterfaceFacts| judge_membership(group, &seen.name, table.as_deref(), daemon_runs);
    seen.iter().map(judge).collect()
}

fn judge_membership(group: IpAddr, name: &str, table: Option<&str>, daemon_runs: bool) -> Finding {
    const CHECK: &str = "membership";
    let Some(table) = table else {
        return Finding::unknown(CHECK, "the kernel's table of memberships cannot be read", "see `ip maddr show`");
    };
    let joined = match group {
        IpAddr::V4(group) => is_member_v4(table, name, group),
        IpAddr::V6(group) => {
            let digits: String = group.octets().iter().map(|byte| format!("{byte:02x}")).collect();
            let is_it = |line: &str| {
                let words: Vec<_> = line.split_whitespace().take(3).collect();
                matches!(words.as_slice(), [_, device, address] if *device == name && *address == digits)
            };
            table.lines().any(is_it)
        }
    };
    match (joined, daemon_runs) {
        (true, _) => Finding::ok(CHECK, format!("{group} is joined on {name}")),
        (false, false) => Finding::unknown(CHECK, format!("{group} is not joined on {name}"), "the daemon joins it when it runs"),
        (false, true) => Finding::wrong(
            CHECK,
            format!("{group} is not joined on {name}, although the daemon runs"),
            "no request is heard there: the daemon's log says why (too many memberships, another configuration), and it tries again every 5 s",
        )
        .command(format!("ip maddr show dev {name}")),
    }
}

/// The table has a line for each interface, with its name before a colon, and below it a line for
/// each group.
fn is_member_v4(table: &str, name: &str, group: Ipv4Addr) -> bool {
    // The kernel prints the address as a number in this machine's byte order.
    let digits = format!("{:08X}", u32::from_ne_bytes(group.octets()));
    let mut here = false;
    table.lines().skip(1).any(|line| {
        if line.starts_with(char::is_whitespace) {
            return here && line.split_whitespace().next() == Some(digits.as_str());
        }
        let device = line.split_whitespace().nth(1).unwrap_or_default();
        here = device.trim_end_matches(':') == name;
        false
    })
}

/// Checks reverse path filtering. It drops packets from senders whose answers would leave by
/// another interface.
#[must_use]
pub fn rp_filter(name: &str) -> Finding {
    let set = |which: &str| sight::number(format!("/proc/sys/net/ipv4/conf/{which}/rp_filter")).unwrap_or(0);
    let netstat = sight::text("/proc/net/netstat").unwrap_or_default();
    judge_rp_filter(name, set("all").max(set(name)), counter(&netstat, "IPReversePathFilter"))
}

/// A counter of `/proc/net/netstat`. Each line of names has a line of numbers below it.
fn counter(table: &str, name: &str) -> Option<u64> {
    let lines: Vec<_> = table.lines().collect();
    lines.chunks(2).find_map(|pair| {
        let [names, numbers] = pair else { return None };
        let place = names.split_whitespace().position(|word| word == name)?;
        numbers.split_whitespace().nth(place)?.parse().ok()
    })
}

fn judge_rp_filter(name: &str, mode: u64, eaten: Option<u64>) -> Finding {
    const CHECK: &str = "rp_filter";
    const STRICT: u64 = 1;
    match (mode, eaten) {
        (STRICT, Some(eaten)) if eaten > 0 => Finding::warning(
            CHECK,
            format!("strict on {name}, and {eaten} packets were dropped for it (on all interfaces, since the boot)"),
            "requests from addresses that this host would answer by another interface are lost where they come by the socket (the kernel program is \
             before it), and so are answers to callbacks: give the host a route to them by that interface, or filter loosely",
        )
        .command(format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2")),
        (STRICT, _) => Finding::ok(CHECK, format!("strict on {name}, and has dropped nothing")),
        (_, _) => Finding::ok(CHECK, format!("not strict on {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    fn seen() -> InterfaceFacts {
        let networks = vec!["192.168.122.1/24".parse().unwrap()];
        InterfaceFacts { name: "virbr0".to_owned(), up: true, running: true, multicast: true, networks, taker: None }
    }

    #[test]
    fn an_interface_is_judged_by_what_it_lacks_first() {
        let state = |seen: Option<&InterfaceFacts>| judge_named("virbr0", seen, true).state;
        assert_eq!(state(Some(&seen())), State::Ok);
        assert_eq!(state(None), State::Wrong);
        let lacking = [
            InterfaceFacts { up: false, ..seen() },
            InterfaceFacts { multicast: false, ..seen() },
            InterfaceFacts { networks: Vec::new(), ..seen() },
            InterfaceFacts { taker: Some(Taker::Guest { lower: None }), ..seen() },
        ];
        for lacking in lacking {
            assert_eq!(state(Some(&lacking)), State::Wrong, "{lacking:?}");
        }
        assert_eq!(state(Some(&InterfaceFacts { running: false, ..seen() })), State::Warning);
        assert_eq!(judge_any(&[], true).state, State::Wrong);
        assert_eq!(judge_any(&[seen()], true).state, State::Ok);
        let lo = look("lo", true).unwrap();
        assert!(lo.up && !lo.multicast && lo.networks.contains(&"127.0.0.1/8".parse().unwrap()), "{lo:?}");
    }

    const IGMP: &str = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
        1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
        3\tvirbr0    :     2      V3\n\t\t\t\t0C0000E1     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
        4\tfifteen-letters:     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";

    #[cfg(target_endian = "little")]
    #[test]
    fn a_membership_counts_on_its_own_interface_only() {
        let group = Ipv4Addr::new(225, 0, 0, 12);
        assert!(is_member_v4(IGMP, "virbr0", group));
        assert!(!is_member_v4(IGMP, "lo", group) && !is_member_v4(IGMP, "fifteen-letters", group));
        assert!(is_member_v4(IGMP, "fifteen-letters", Ipv4Addr::new(224, 0, 0, 1)));
        let state = |runs, name: &str| judge_membership(group.into(), name, Some(IGMP), runs).state;
        assert_eq!(
            (state(true, "virbr0"), state(true, "lo"), state(false, "lo")),
            (State::Ok, State::Wrong, State::Unknown)
        );
        let v6 = "3    virbr0          ff050000000000000000000000030001     1 00000004 0\n";
        let group: IpAddr = "ff05::3:1".parse().unwrap();
        assert_eq!(judge_membership(group, "virbr0", Some(v6), true).state, State::Ok);
        assert_eq!(judge_membership(group, "lo", Some(v6), true).state, State::Wrong);
        assert_eq!(judge_membership(group, "lo", None, true).state, State::Unknown);
    }

    #[test]
    fn a_strict_filter_is_doubtful_only_when_it_has_eaten_something() {
        let netstat = "TcpExt: A IPReversePathFilter B\nTcpExt: 1 7 2\nIpExt: C\nIpExt: 3\n";
        assert_eq!(counter(netstat, "IPReversePathFilter"), Some(7));
        assert_eq!(counter(netstat, "Other"), None);
        let state = |mode, eaten| judge_rp_filter("virbr0", mode, eaten).state;
        assert_eq!((state(1, Some(7)), state(1, Some(0)), state(1, None)), (State::Warning, State::Ok, State::Ok));
        assert_eq!((state(2, Some(7)), state(0, Some(7))), (State::Ok, State::Ok));
    }
}
