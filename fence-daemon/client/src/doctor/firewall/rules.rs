//! A firewall's rules, and a packet's way through them, in three values: a rule applies, does not,
//! or is unclear.
//!
//! An unclear rule is followed both ways. So the verdict is exact: the packet passes in any case,
//! is dropped in any case, or it depends.

use std::ops::RangeInclusive;

use ipnet::IpNet;

/// How many nested jumps are followed: the kernel allows 16.
const DEPTH: usize = 16;

/// A packet, as far as it is known beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    /// Whether it comes in by the interface; otherwise it goes out by it.
    pub(super) inbound: bool,
    /// The interface.
    pub(super) device: String,
    /// UDP or TCP.
    pub(super) protocol: Protocol,
    /// A network that contains its source.
    pub(super) source: Option<IpNet>,
    /// A network that contains its destination.
    pub(super) destination: Option<IpNet>,
    /// Its source port, if known.
    pub(super) source_port: Option<u16>,
    /// Its destination port, if known.
    pub(super) destination_port: Option<u16>,
    /// Its state in connection tracking.
    pub(super) state: &'static str,
    /// Whether IPv4.
    pub v4: bool,
}

/// A transport protocol, by name and by number.
pub(super) type Protocol = [&'static str; 2];
/// UDP.
pub(super) const UDP: Protocol = ["udp", "17"];
/// TCP.
pub(super) const TCP: Protocol = ["tcp", "6"];

/// Whether all addresses of `own` are in `other` or none is; `None` if some are.
fn within(own: IpNet, other: IpNet) -> Option<bool> {
    if other.contains(&own) { Some(true) } else { (!own.contains(&other)).then_some(false) }
}

/// Whether any part is true; `None` if that depends on unclear ones.
fn any(mut parts: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let mut unclear = false;
    let found = parts.any(|part| {
        unclear |= part.is_none();
        part == Some(true)
    });
    (found || !unclear).then_some(found)
}

/// What a rule tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test {
    /// The interface that a packet comes in by (`true`) or goes out by. A name may end in `*`.
    Device(bool, Vec<String>),
    /// The transport protocol, in names or numbers.
    Protocol(Vec<String>),
    /// Whether IPv4 (`true`) or IPv6.
    Family(bool),
    /// The source port (`true`) or the destination port.
    Port(bool, Vec<RangeInclusive<u16>>),
    /// The source address (`true`) or the destination address.
    Address(bool, Vec<IpNet>),
    /// The state in connection tracking.
    State(Vec<String>),
    /// An unknown test.
    Other,
}

/// A test, perhaps negated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Match {
    /// The test.
    pub(super) test: Test,
    /// Whether it is negated.
    pub(super) negated: bool,
}

impl Match {
    /// A test that is not negated.
    #[must_use]
    pub(super) fn is(test: Test) -> Self {
        Self { test, negated: false }
    }

    fn judge(&self, packet: &Packet) -> Option<bool> {
        self.test.judge(packet).map(|known| known != self.negated)
    }
}

impl Test {
    /// Whether it applies; `None` if that is unclear.
    fn judge(&self, packet: &Packet) -> Option<bool> {
        match self {
            Self::Device(inbound, names) => {
                // An inbound packet goes out by no interface, and the other way about.
                Some(*inbound == packet.inbound && names.iter().any(|name| is_named(name, &packet.device)))
            }
            Self::Protocol(names) => Some(names.iter().any(|name| packet.protocol.contains(&name.as_str()))),
            Self::Family(v4) => Some(*v4 == packet.v4),
            Self::Port(source, ranges) => {
                let port = if *source { packet.source_port } else { packet.destination_port };
                port.map(|port| ranges.iter().any(|range| range.contains(&port)))
            }
            Self::Address(source, networks) => {
                let own = if *source { packet.source } else { packet.destination };
                own.and_then(|own| any(networks.iter().map(|network| within(own, *network))))
            }
            Self::State(names) => Some(names.iter().any(|name| name.eq_ignore_ascii_case(packet.state))),
            Self::Other => None,
        }
    }
}

fn is_named(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RuleAction {
    /// Accepts the packet.
    Accept,
    /// Drops or rejects the packet.
    Drop,
    /// Returns to the calling chain.
    Return,
    /// Calls another chain, and returns.
    Jump(String),
    /// Goes to another chain, and does not return.
    Goto(String),
    /// Counts or logs the packet. The next rule follows.
    Nothing,
    /// An unknown action, which may end the packet's way.
    Other,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// All of these must match.
    pub(super) matches: Vec<Match>,
    /// What it does to a packet that matches.
    pub(super) action: RuleAction,
    /// Its name in messages.
    pub(super) name: String,
}

/// A list of rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    /// `ip`, `ip6`, `inet`, ...
    pub(super) family: String,
    /// Its table.
    pub(super) table: String,
    /// Its name.
    pub(super) name: String,
    /// Its hook and priority; `None` if only other rules call it.
    pub(super) hook: Option<(Hook, i64)>,
    /// Whether the policy is to drop.
    pub(super) drops: bool,
    /// Its rules.
    pub(super) rules: Vec<Rule>,
}

/// A hook of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hook {
    /// All packets that arrive.
    Prerouting,
    /// Packets to this host.
    Input,
    /// Packets from this host.
    Output,
    /// All packets that leave.
    Postrouting,
}

/// The rule or policy that decides about a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blame {
    /// `ip`, `ip6`, `inet`, ...
    pub(super) family: String,
    /// The table.
    pub(super) table: String,
    /// The chain with the hook.
    pub(super) chain: String,
    /// The rule, or the chain's policy.
    pub(super) rule: String,
}

/// The fate of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It passes in any case.
    Passes,
    /// It is dropped in any case.
    Dropped(Blame),
    /// It depends on what is unknown here.
    Unclear(Blame),
}

/// The possible results of a chain.
#[derive(Default)]
struct Flow {
    accepts: bool,
    drops: Option<String>,
    /// Whether the packet may reach the end, or return.
    goes_on: bool,
}

impl Flow {
    fn join(&mut self, other: &Self) {
        self.accepts |= other.accepts;
        if self.drops.is_none() {
            self.drops.clone_from(&other.drops);
        }
    }
}

/// The rules of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules {
    /// All chains of the known families.
    pub(super) chains: Vec<Chain>,
    /// Tables of other families (`bridge`, `netdev`), which are not evaluated.
    pub(super) others: Vec<String>,
}

impl Rules {
    /// The fate of a packet.
    #[must_use]
    pub(super) fn fate(&self, packet: &Packet) -> Fate {
        let on_the_way = |hook| match hook {
            Hook::Prerouting | Hook::Input => packet.inbound,
            Hook::Output | Hook::Postrouting => !packet.inbound,
        };
        let sees = |family: &str| match family {
            "ip" => packet.v4,
            "ip6" => !packet.v4,
            family => family == "inet",
        };
        let mut bases: Vec<_> = self.chains.iter().filter(|chain| sees(&chain.family)).collect();
        bases.retain(|chain| chain.hook.is_some_and(|(hook, _)| on_the_way(hook)));
        bases.sort_by_key(|chain| chain.hook);
        let mut unclear = None;
        for base in bases {
            let mut flow = self.run(base, packet, DEPTH);
            if flow.goes_on && base.drops {
                flow.drops.get_or_insert_with(|| "the chain's policy".to_owned());
            }
            let passes = flow.accepts || (flow.goes_on && !base.drops);
            let Some(rule) = flow.drops else { continue };
            let blame =
                Blame { family: base.family.clone(), table: base.table.clone(), chain: base.name.clone(), rule };
            if !passes {
                return Fate::Dropped(blame);
            }
            unclear.get_or_insert(blame);
        }
        unclear.map_or(Fate::Passes, Fate::Unclear)
    }

    fn run(&self, chain: &Chain, packet: &Packet, depth: usize) -> Flow {
        let mut flow = Flow::default();
        for rule in &chain.rules {
            let differs = any(rule.matches.iter().map(|part| part.judge(packet).map(|applies| !applies)));
            if differs == Some(true) {
                continue;
            }
            let does = self.does(chain, rule, packet, depth);
            let ends = match &rule.action {
                RuleAction::Return => {
                    flow.goes_on = true;
                    true
                }
                // The end of that chain is the end of this chain too.
                RuleAction::Goto(_) => {
                    flow.goes_on |= does.goes_on;
                    true
                }
                RuleAction::Accept
                | RuleAction::Drop
                | RuleAction::Jump(_)
                | RuleAction::Nothing
                | RuleAction::Other => !does.goes_on,
            };
            flow.join(&does);
            if ends && differs == Some(false) {
                return flow;
            }
        }
        flow.goes_on = true;
        flow
    }

    fn does(&self, chain: &Chain, rule: &Rule, packet: &Packet, depth: usize) -> Flow {
        let blamed = || Some(rule.name.clone());
        match &rule.action {
            RuleAction::Accept => Flow { accepts: true, ..Flow::default() },
            RuleAction::Drop => Flow { drops: blamed(), ..Flow::default() },
            RuleAction::Return | RuleAction::Nothing => Flow { goes_on: true, ..Flow::default() },
            RuleAction::Other => Flow { accepts: true, drops: blamed(), goes_on: true },
            RuleAction::Jump(name) | RuleAction::Goto(name) => {
                let same =
                    |other: &&Chain| other.family == chain.family && other.table == chain.table && other.name == *name;
                match self.chains.iter().find(same) {
                    Some(called) if depth > 0 => self.run(called, packet, depth - 1),
                    _ => Flow { accepts: true, drops: blamed(), goes_on: true },
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn packet() -> Packet {
        Packet {
            inbound: true,
            device: "virbr0".to_owned(),
            protocol: UDP,
            source: Some("192.168.122.1/24".parse().unwrap()),
            destination: Some(IpAddr::from([225, 0, 0, 12]).into()),
            source_port: None,
            destination_port: Some(1229),
            state: "new",
            v4: true,
        }
    }

    fn rule(tests: Vec<Test>, action: RuleAction) -> Rule {
        Rule { matches: tests.into_iter().map(Match::is).collect(), action, name: "the rule".to_owned() }
    }

    fn chain(name: &str, hook: Option<(Hook, i64)>, drops: bool, rules: Vec<Rule>) -> Chain {
        Chain { family: "inet".to_owned(), table: "filter".to_owned(), name: name.to_owned(), hook, drops, rules }
    }

    fn fate(drops: bool, rules: Vec<Rule>) -> Fate {
        Rules { chains: vec![chain("input", Some((Hook::Input, 0)), drops, rules)], ..Rules::default() }.fate(&packet())
    }

    fn port(port: u16) -> Test {
        Test::Port(false, vec![port..=port])
    }

    #[test]
    fn the_first_rule_that_applies_decides_and_else_the_policy() {
        assert_eq!(fate(false, vec![]), Fate::Passes);
        assert!(matches!(fate(true, vec![]), Fate::Dropped(blame) if blame.rule == "the chain's policy"));
        assert_eq!(fate(true, vec![rule(vec![port(1229)], RuleAction::Accept)]), Fate::Passes);
        assert!(matches!(fate(true, vec![rule(vec![port(1230)], RuleAction::Accept)]), Fate::Dropped(_)));
        let order = vec![rule(vec![port(1229)], RuleAction::Drop), rule(vec![], RuleAction::Accept)];
        assert!(matches!(fate(false, order), Fate::Dropped(_)));
        assert_eq!(
            fate(false, vec![rule(vec![Test::Device(true, vec!["eth*".to_owned()])], RuleAction::Drop)]),
            Fate::Passes
        );
        assert!(matches!(
            fate(false, vec![rule(vec![Test::Device(true, vec!["virbr*".to_owned()])], RuleAction::Drop)]),
            Fate::Dropped(_)
        ));
    }

    #[test]
    fn an_unknown_rule_counts_only_if_it_changes_the_verdict() {
        let doubtful = || vec![Test::Other];
        assert!(matches!(fate(false, vec![rule(doubtful(), RuleAction::Drop)]), Fate::Unclear(_)));
        assert_eq!(fate(false, vec![rule(doubtful(), RuleAction::Accept)]), Fate::Passes);
        assert!(matches!(fate(true, vec![rule(doubtful(), RuleAction::Drop)]), Fate::Dropped(_)));
        assert!(matches!(fate(true, vec![rule(doubtful(), RuleAction::Accept)]), Fate::Unclear(_)));
        assert!(matches!(fate(false, vec![rule(vec![], RuleAction::Other)]), Fate::Unclear(_)));
        let rest = vec![rule(vec![port(1229)], RuleAction::Accept), rule(doubtful(), RuleAction::Drop)];
        assert_eq!(fate(true, rest), Fate::Passes, "decided before");
    }

    #[test]
    fn chains_are_called_and_come_back() {
        let inner = |action| chain("inner", None, false, vec![rule(vec![port(1229)], action)]);
        let outer = |call: RuleAction, last: RuleAction| {
            chain("input", Some((Hook::Input, 0)), false, vec![rule(vec![], call), rule(vec![], last)])
        };
        let fate = |call, inner: Chain, last| {
            Rules { chains: vec![outer(call, last), inner], ..Rules::default() }.fate(&packet())
        };
        let (jump, goto) = (|| RuleAction::Jump("inner".to_owned()), || RuleAction::Goto("inner".to_owned()));
        assert_eq!(fate(jump(), inner(RuleAction::Accept), RuleAction::Drop), Fate::Passes);
        assert!(matches!(fate(jump(), inner(RuleAction::Return), RuleAction::Drop), Fate::Dropped(_)));
        assert_eq!(
            fate(goto(), inner(RuleAction::Return), RuleAction::Drop),
            Fate::Passes,
            "the policy, not the rule behind it"
        );
        assert!(matches!(fate(jump(), inner(RuleAction::Drop), RuleAction::Accept), Fate::Dropped(_)));
        // A chain that calls itself, which the kernel refuses, and one that is not there.
        assert!(matches!(fate(jump(), inner(jump()), RuleAction::Accept), Fate::Unclear(_)));
        assert!(matches!(
            fate(RuleAction::Jump("nowhere".to_owned()), inner(RuleAction::Accept), RuleAction::Accept),
            Fate::Unclear(_)
        ));
    }

    #[test]
    fn every_table_of_the_hook_and_family_counts() {
        let accept = || vec![rule(vec![], RuleAction::Accept)];
        let drop = || vec![rule(vec![], RuleAction::Drop)];
        let fate = |chains: Vec<Chain>| Rules { chains, ..Rules::default() }.fate(&packet());
        let first = chain("a", Some((Hook::Input, -10)), false, accept());
        let second = chain("b", Some((Hook::Input, 10)), false, drop());
        assert!(matches!(fate(vec![second.clone(), first]), Fate::Dropped(blame) if blame.chain == "b"));
        assert_eq!(fate(vec![Chain { hook: Some((Hook::Output, 0)), ..second.clone() }]), Fate::Passes);
        assert_eq!(fate(vec![Chain { family: "ip6".to_owned(), ..second.clone() }]), Fate::Passes);
        assert!(matches!(fate(vec![Chain { family: "ip".to_owned(), ..second }]), Fate::Dropped(_)));
    }

    #[test]
    fn addresses_are_in_a_network_out_of_it_or_partly_in_it() {
        let within = |address: [u8; 4], prefix| {
            let net = |address, prefix| IpNet::new_assert(IpAddr::from(address), prefix);
            within(net([192, 168, 122, 1], 24), net(address, prefix))
        };
        assert_eq!(within([192, 168, 0, 0], 16), Some(true));
        assert_eq!(within([192, 168, 122, 0], 24), Some(true));
        assert_eq!(within([192, 168, 122, 7], 32), None);
        assert_eq!(within([10, 0, 0, 0], 8), Some(false));
        assert_eq!(within([0, 0, 0, 0], 0), Some(true));
    }
}
