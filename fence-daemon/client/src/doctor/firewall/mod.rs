//! Checks what the firewall does with requests, callbacks and their answers, as far as its rules
//! can be followed.

mod iptables;
mod nft;
mod rules;

use std::net::IpAddr;
use std::time::Duration;

use self::rules::{Blame, Fate, Packet, Rules, TCP, UDP};
use super::finding::Finding;
use super::interface::InterfaceFacts;
use super::program::{self, Silence};
use super::sight;

/// The check's name.
pub const CHECK: &str = "firewall";

/// How long `nft` and the like may take.
const BOUND: Duration = Duration::from_secs(10);

/// The traffic that must pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Requests to the hypervisor.
    RequestIn,
    /// The callback, from the hypervisor.
    CallOut,
    /// The guest's answers during the callback, to the hypervisor.
    AnswerIn,
    /// Requests from the guest.
    RequestOut,
    /// The callback, to the guest.
    CallIn,
    /// The guest's answers during the callback, from the guest.
    AnswerOut,
}

/// The traffic of fencing, and its interface.
#[derive(Clone, Debug)]
pub struct Traffic<'t> {
    /// The interface.
    pub seen: &'t InterfaceFacts,
    /// The multicast group.
    pub group: IpAddr,
    /// The port, of UDP and of TCP.
    pub port: u16,
}

/// Checks the hypervisor's firewall. With `attached`, the kernel program is on the interface, so
/// requests do not reach the firewall.
#[must_use]
pub fn hypervisor(traffic: &Traffic<'_>, attached: bool) -> Vec<Finding> {
    check(traffic, &[Way::RequestIn, Way::CallOut, Way::AnswerIn], attached)
}

/// Checks a guest's firewall.
#[must_use]
pub fn guest(traffic: &Traffic<'_>) -> Vec<Finding> {
    check(traffic, &[Way::RequestOut, Way::CallIn, Way::AnswerOut], false)
}

fn check(traffic: &Traffic<'_>, ways: &[Way], attached: bool) -> Vec<Finding> {
    let rules = match read(traffic.group.is_ipv4()) {
        Ok(rules) => rules,
        Err(why) => {
            let remedy = "the rules cannot be read: docs/reference/doctor.md lists what must be open";
            return vec![Finding::unknown(CHECK, why, remedy).command("apt-get install nftables")];
        }
    };
    let mut findings: Vec<_> = ways.iter().filter_map(|way| judge(*way, traffic, &rules, attached)).collect();
    if findings.is_empty() {
        findings.push(if rules.others.is_empty() {
            Finding::ok(CHECK, format!("lets requests and callbacks through on {}", traffic.seen.name))
        } else {
            let seen = format!(
                "lets requests and callbacks through on {}, apart from what was not checked: {}",
                traffic.seen.name,
                rules.others.join(", ")
            );
            Finding::unknown(CHECK, seen, "see whether these rules mean UDP or TCP of that port")
        });
    }
    findings
}

/// The rules of this network namespace.
fn read(v4: bool) -> Result<Rules, String> {
    let legacy_table = if v4 { "/proc/net/ip_tables_names" } else { "/proc/net/ip6_tables_names" };
    let has_legacy = sight::text(legacy_table).is_some_and(|names| !names.is_empty());
    let (family, plain, legacy) = if v4 {
        ("ip", "iptables-save", "iptables-legacy-save")
    } else {
        ("ip6", "ip6tables-save", "ip6tables-legacy-save")
    };
    let saved = |program: &str| -> Result<Rules, String> {
        let said = program::run(program, &[] as &[&str], BOUND).map_err(|error| error.to_string())?;
        if said.code == Some(0) {
            Ok(iptables::parse(&said.stdout, family))
        } else {
            Err(format!("{program}: {}", said.first_line()))
        }
    };
    let (mut rules, by_iptables) = match program::run("nft", &["-j", "list", "ruleset"], BOUND) {
        Ok(said) if said.code == Some(0) => {
            nft::parse(&said.stdout, family).map_err(|error| format!("nft's rules are not understood: {error}"))?
        }
        Ok(said) => return Err(format!("nft: {}", said.first_line())),
        // iptables knows its own rules only, and says that there are others.
        Err(Silence::Missing(_)) => {
            return saved(plain).map_err(|why| format!("there is neither nft nor {plain} ({why})"));
        }
        Err(error) => return Err(error.to_string()),
    };
    // nft cannot read some parts of rules that iptables made: iptables prints them.
    if by_iptables && let Ok(own) = saved(plain) {
        rules
            .chains
            .retain(|chain| !own.chains.iter().any(|told| told.family == chain.family && told.table == chain.table));
        rules.chains.extend(own.chains);
    }
    if has_legacy {
        // Legacy iptables works beside nftables and decides too.
        rules.chains.extend(saved(legacy)?.chains);
    }
    Ok(rules)
}

impl Way {
    fn packet(self, traffic: &Traffic<'_>) -> Packet {
        let v4 = traffic.group.is_ipv4();
        let net = traffic.seen.networks.first().copied();
        let own = net.map(|net| net.addr().into());
        let group = Some(traffic.group.into());
        let port = Some(traffic.port);
        let (inbound, protocol, source, destination, source_port, destination_port, state) = match self {
            Self::RequestIn => (true, UDP, net, group, None, port, "new"),
            Self::RequestOut => (false, UDP, own, group, None, port, "new"),
            Self::CallOut => (false, TCP, own, net, None, port, "new"),
            Self::CallIn => (true, TCP, net, own, None, port, "new"),
            Self::AnswerIn => (true, TCP, net, own, port, None, "established"),
            Self::AnswerOut => (false, TCP, own, net, port, None, "established"),
        };
        let device = traffic.seen.name.clone();
        Packet { inbound, device, protocol, source, destination, source_port, destination_port, state, v4 }
    }

    /// The name of the traffic, for messages.
    fn told(self, port: u16) -> String {
        match self {
            Self::RequestIn => format!("requests (UDP {port}, in)"),
            Self::RequestOut => format!("requests (UDP {port}, out)"),
            Self::CallOut => format!("the callback (TCP to the guests' port {port}, out)"),
            Self::CallIn => format!("the callback (TCP {port}, in)"),
            Self::AnswerIn => format!("the guests' packets of the callback (TCP from their port {port}, in)"),
            Self::AnswerOut => format!("this guest's packets of the callback (TCP from port {port}, out)"),
        }
    }
}

fn judge(way: Way, traffic: &Traffic<'_>, rules: &Rules, attached: bool) -> Option<Finding> {
    let packet = way.packet(traffic);
    let (what, name) = (way.told(traffic.port), &traffic.seen.name);
    let at =
        |blame: &Blame| format!("{} of chain {} in table {} {}", blame.rule, blame.chain, blame.family, blame.table);
    // The program runs before the firewall. Requests of this host itself come over the loopback,
    // which firewalls accept.
    let bypassed = attached && way == Way::RequestIn;
    match rules.fate(&packet) {
        Fate::Passes => None,
        Fate::Dropped(_) if bypassed => Some(Finding::ok(
            CHECK,
            format!(
                "{what} on {name}: the firewall would drop it; harmless while the kernel program is attached, which runs first"
            ),
        )),
        Fate::Unclear(_) if bypassed => None,
        Fate::Dropped(blame) => {
            let seen = format!("{what} on {name}: dropped by {}", at(&blame));
            let remedy = "fencing fails that way: open it now, and in the file that loads the rules at boot";
            let finding = Finding::wrong(CHECK, seen, remedy);
            Some(remedies(&packet, &blame).into_iter().fold(finding, Finding::command))
        }
        Fate::Unclear(blame) => {
            let seen = format!("{what} on {name}: may be dropped, it depends on {}", at(&blame));
            let remedy = "the doctor cannot evaluate that rule: see whether it matches this traffic";
            let look = if find_nft() {
                format!("nft -a list chain {} {} {}", blame.family, blame.table, blame.chain)
            } else {
                "iptables-save".to_owned()
            };
            Some(Finding::unknown(CHECK, seen, remedy).command(look))
        }
    }
}

fn find_nft() -> bool {
    program::find("nft").is_some()
}

/// The commands that open the way, for the tool that manages the rules.
fn remedies(packet: &Packet, blame: &Blame) -> Vec<String> {
    let (device, [protocol, _]) = (&packet.device, packet.protocol);
    let (which, port) = match (packet.destination_port, packet.source_port) {
        (Some(port), _) => ("dport", port),
        (None, port) => ("sport", port.unwrap_or_default()),
    };
    if blame.table == "firewalld" && packet.inbound && which == "dport" {
        let zone = zone_of(device);
        return vec![
            format!("firewall-cmd --zone={zone} --add-port={port}/{protocol}"),
            format!("firewall-cmd --permanent --zone={zone} --add-port={port}/{protocol}"),
        ];
    }
    let is_iptables =
        matches!(blame.family.as_str(), "ip" | "ip6") && matches!(blame.table.as_str(), "filter" | "mangle" | "raw");
    if is_iptables && blame.chain.chars().all(|c| c.is_ascii_uppercase()) {
        let program = if packet.v4 { "iptables" } else { "ip6tables" };
        let table = if blame.table == "filter" { String::new() } else { format!(" -t {}", blame.table) };
        let way = if packet.inbound { "-i" } else { "-o" };
        return vec![format!(
            "{program}{table} -I {} {way} {device} -p {protocol} --{which} {port} -j ACCEPT",
            blame.chain
        )];
    }
    let way = if packet.inbound { "iifname" } else { "oifname" };
    vec![format!(
        "nft insert rule {} {} {} {way} {device} {protocol} {which} {port} accept",
        blame.family, blame.table, blame.chain
    )]
}

/// firewalld's zone of an interface.
fn zone_of(interface: &str) -> String {
    let asked = |arguments: &[&str]| {
        let said = program::run("firewall-cmd", arguments, BOUND).ok().filter(|said| said.code == Some(0))?;
        Some(said.stdout.trim().to_owned()).filter(|zone| !zone.is_empty())
    };
    asked(&[&format!("--get-zone-of-interface={interface}")])
        .or_else(|| asked(&["--get-default-zone"]))
        .unwrap_or_else(|| "public".to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::rules::{Chain, Hook, Match, Rule, RuleAction, Test};
    use super::*;

    fn seen() -> InterfaceFacts {
        let networks = vec!["192.168.122.1/24".parse().unwrap()];
        InterfaceFacts { name: "virbr0".to_owned(), up: true, running: true, multicast: true, networks, taker: None }
    }

    fn judged(way: Way, hook: Hook, tests: Vec<Test>, table: &str, attached: bool) -> Option<Finding> {
        let rule = Rule {
            matches: tests.into_iter().map(Match::is).collect(),
            action: RuleAction::Drop,
            name: "rule 7".to_owned(),
        };
        let chain = Chain {
            family: "inet".to_owned(),
            table: table.to_owned(),
            name: "base".to_owned(),
            hook: Some((hook, 0)),
            drops: false,
            rules: vec![rule],
        };
        let rules = Rules { chains: vec![chain], others: Vec::new() };
        let seen = seen();
        let traffic = Traffic { seen: &seen, group: IpAddr::from([225, 0, 0, 12]), port: 1229 };
        judge(way, &traffic, &rules, attached)
    }

    #[test]
    fn each_direction_has_its_own_packet_and_command() {
        let port = |source| Test::Port(source, vec![1229..=1229]);
        for (way, hook, test, command) in [
            (
                Way::RequestIn,
                Hook::Input,
                port(false),
                "nft insert rule inet t base iifname virbr0 udp dport 1229 accept",
            ),
            (
                Way::RequestOut,
                Hook::Output,
                port(false),
                "nft insert rule inet t base oifname virbr0 udp dport 1229 accept",
            ),
            (
                Way::CallOut,
                Hook::Output,
                port(false),
                "nft insert rule inet t base oifname virbr0 tcp dport 1229 accept",
            ),
            (Way::CallIn, Hook::Input, port(false), "nft insert rule inet t base iifname virbr0 tcp dport 1229 accept"),
            (
                Way::AnswerIn,
                Hook::Input,
                port(true),
                "nft insert rule inet t base iifname virbr0 tcp sport 1229 accept",
            ),
            (
                Way::AnswerOut,
                Hook::Output,
                port(true),
                "nft insert rule inet t base oifname virbr0 tcp sport 1229 accept",
            ),
        ] {
            let finding = judged(way, hook, vec![test.clone()], "t", false).unwrap();
            assert_eq!((finding.state, finding.commands), (State::Wrong, vec![command.to_owned()]), "{way:?}");
            let elsewhere = if hook == Hook::Input { Hook::Output } else { Hook::Input };
            assert_eq!(judged(way, elsewhere, vec![test], "t", false), None);
        }
    }

    #[test]
    fn the_kernel_program_is_before_the_firewall_and_the_call_back_is_not() {
        let state = |way, hook, attached| judged(way, hook, vec![], "t", attached).map(|finding| finding.state);
        assert_eq!(state(Way::RequestIn, Hook::Input, false), Some(State::Wrong));
        assert_eq!(state(Way::RequestIn, Hook::Input, true), Some(State::Ok));
        assert_eq!(state(Way::CallOut, Hook::Output, true), Some(State::Wrong));
        let doubt = judged(Way::CallOut, Hook::Output, vec![Test::Other], "t", true).unwrap();
        assert!(doubt.state == State::Unknown && doubt.seen.contains("rule 7"), "{doubt:?}");
    }

    #[test]
    fn the_remedy_is_for_the_tool_that_owns_the_rule() {
        let blame = |family: &str, table: &str, chain: &str| Blame {
            family: family.to_owned(),
            table: table.to_owned(),
            chain: chain.to_owned(),
            rule: String::new(),
        };
        let seen = seen();
        let traffic = Traffic { seen: &seen, group: IpAddr::from([225, 0, 0, 12]), port: 1229 };
        let packet = Way::RequestIn.packet(&traffic);
        assert_eq!(
            remedies(&packet, &blame("ip", "filter", "INPUT")),
            ["iptables -I INPUT -i virbr0 -p udp --dport 1229 -j ACCEPT"]
        );
        let firewalld = remedies(&packet, &blame("inet", "firewalld", "filter_INPUT"));
        assert!(
            firewalld[0].starts_with("firewall-cmd --zone=") && firewalld[0].ends_with("--add-port=1229/udp"),
            "{firewalld:?}"
        );
        assert!(firewalld[1].contains("--permanent"), "{firewalld:?}");
    }
}
