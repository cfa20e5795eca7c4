//! Parses the output of `iptables-save` and `ip6tables-save`. An unknown part becomes
//! [`Test::Other`] or [`RuleAction::Other`].

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::rules::{Chain, Hook, Match, Rule, RuleAction, Rules, Test};

/// Parses the rules; `family` is `ip` or `ip6`.
#[must_use]
pub(super) fn parse(text: &str, family: &str) -> Rules {
    let mut rules = Rules::default();
    let mut table = "";
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_whitespace();
            let (name, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            rules.chains.push(Chain {
                family: family.to_owned(),
                table: table.to_owned(),
                name: name.to_owned(),
                hook: hook_of(table, name),
                drops: policy == "DROP",
                rules: Vec::new(),
            });
        } else if line.starts_with("-A ") {
            let words = split(line);
            let chain = words.get(1).map(String::as_str).unwrap_or_default();
            let found = rules.chains.iter_mut().find(|known| known.table == table && known.name == chain);
            if let Some(known) = found {
                known.rules.push(read_rule(line, words.get(2..).unwrap_or_default()));
            }
        } else if line.contains("is incompatible, use 'nft' tool") {
            // Only nft can show these tables.
            rules.others.push(line.trim_start_matches("# ").to_owned());
        }
    }
    rules
}

fn hook_of(table: &str, chain: &str) -> Option<(Hook, i64)> {
    let priority = match table {
        "raw" => -300,
        "mangle" => -150,
        "filter" => 0,
        "security" => 50,
        // Translation drops nothing.
        _ => return None,
    };
    let hook = match chain {
        "PREROUTING" => Hook::Prerouting,
        "INPUT" => Hook::Input,
        "OUTPUT" => Hook::Output,
        "POSTROUTING" => Hook::Postrouting,
        _ => return None,
    };
    Some((hook, priority))
}

/// Splits a line into words, some of them in double quotes.
fn split(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let (mut quoted, mut escaped) = (false, false);
    for character in line.chars() {
        let Some(word) = words.last_mut() else { break };
        match character {
            _ if escaped => {
                word.push(character);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => word.push(character),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn read_rule(line: &str, words: &[String]) -> Rule {
    let mut matches = Vec::new();
    let mut action = RuleAction::Nothing;
    let mut negated = false;
    let mut words = words.iter().map(String::as_str);
    while let Some(option) = words.next() {
        if option == "!" {
            negated = true;
            continue;
        }
        let mut value = || words.next().unwrap_or_default();
        let test = match option {
            "-i" => Some(Test::Device(true, vec![pattern(value())])),
            "-o" => Some(Test::Device(false, vec![pattern(value())])),
            "-p" => Some(Test::Protocol(vec![value().to_owned()])),
            "-s" | "-d" => Some(network(value()).map_or(Test::Other, |net| Test::Address(option == "-s", vec![net]))),
            "--dport" | "--dports" => Some(ports(value()).map_or(Test::Other, |ports| Test::Port(false, ports))),
            "--sport" | "--sports" => Some(ports(value()).map_or(Test::Other, |ports| Test::Port(true, ports))),
            "--ctstate" | "--state" => Some(Test::State(value().split(',').map(str::to_owned).collect())),
            "--comment" | "--log-prefix" | "--log-level" | "--reject-with" => {
                value();
                None
            }
            // The options of the module follow as separate words.
            "-m" => {
                value();
                None
            }
            "-j" => {
                action = target(value());
                None
            }
            "-g" => {
                action = RuleAction::Goto(value().to_owned());
                None
            }
            // The values of an unknown option are no options, and add no information.
            word if word.starts_with('-') => Some(Test::Other),
            _ => None,
        };
        if let Some(test) = test {
            // An unknown test stays unknown when negated.
            matches.push(Match { negated: negated && test != Test::Other, test });
            negated = false;
        }
    }
    Rule { matches, action, name: format!("`{line}`") }
}

fn pattern(name: &str) -> String {
    name.strip_suffix('+').map_or_else(|| name.to_owned(), |start| format!("{start}*"))
}

fn target(name: &str) -> RuleAction {
    match name {
        "ACCEPT" => RuleAction::Accept,
        "DROP" | "REJECT" => RuleAction::Drop,
        "RETURN" => RuleAction::Return,
        "LOG" | "NFLOG" | "MARK" | "CONNMARK" | "CHECKSUM" | "TCPMSS" | "DSCP" | "TOS" | "CT" | "NOTRACK" | "SET"
        | "CLASSIFY" => RuleAction::Nothing,
        "QUEUE" | "NFQUEUE" | "TPROXY" | "SYNPROXY" => RuleAction::Other,
        chain => RuleAction::Jump(chain.to_owned()),
    }
}

fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse().ok().map(|address: IpAddr| address.into()))
}

fn ports(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let range = |part: &str| match part.split_once(':') {
        Some((from, to)) => Some(from.parse().ok()?..=to.parse().ok()?),
        None => part.parse().ok().map(|port: u16| port..=port),
    };
    text.split(',').map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::super::rules::{Fate, Packet, UDP};
    use super::*;

    fn fate(policy: &str, rules: &[&str]) -> &'static str {
        let text = format!(
            "# Generated\n*filter\n:INPUT {policy} [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n:LIBVIRT_INP - [0:0]\n\
             -A LIBVIRT_INP -i virbr0 -p udp -m udp --dport 53 -j ACCEPT\n{}\nCOMMIT\n",
            rules.join("\n")
        );
        let packet = Packet {
            inbound: true,
            device: "virbr0".to_owned(),
            protocol: UDP,
            source: Some("192.168.122.1/24".parse().unwrap()),
            destination: Some(IpAddr::from([225, 0, 0, 12]).into()),
            source_port: None,
            destination_port: Some(1229),
            state: "new",
            v4: true,
        };
        match parse(&text, "ip").fate(&packet) {
            Fate::Passes => "passes",
            Fate::Dropped(_) => "dropped",
            Fate::Unclear(_) => "unclear",
        }
    }

    #[test]
    fn rules_are_understood_or_doubted() {
        assert_eq!(fate("ACCEPT", &["-A INPUT -j LIBVIRT_INP"]), "passes");
        assert_eq!(fate("DROP", &["-A INPUT -j LIBVIRT_INP"]), "dropped");
        for (rule, expected) in [
            (
                "-A INPUT -i virbr+ -p udp -m udp --dport 1229 -m comment --comment \"-j ACCEPT of \\\"x\\\"\" -j DROP",
                "dropped",
            ),
            ("-A INPUT ! -i virbr0 -j DROP", "passes"),
            ("-A INPUT ! -i eth0 -j DROP", "dropped"),
            ("-A INPUT -p tcp -m tcp --dport 1229 -j DROP", "passes"),
            (
                "-A INPUT -p udp -m multiport --dports 53,1000:2000 -j REJECT --reject-with icmp-port-unreachable",
                "dropped",
            ),
            ("-A INPUT -s 192.168.122.0/24 -j DROP", "dropped"),
            ("-A INPUT -s 192.168.122.9/32 -j DROP", "unclear"),
            ("-A INPUT -m conntrack --ctstate INVALID,NEW -j DROP", "dropped"),
            ("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j DROP", "passes"),
            ("-A INPUT -m limit --limit 3/min -j DROP", "unclear"),
            ("-A INPUT -m set ! --match-set bad src -j DROP", "unclear"),
            ("-A INPUT -j LOG --log-prefix \"all: \"", "passes"),
            ("-A INPUT -g NOWHERE", "unclear"),
        ] {
            assert_eq!(fate("ACCEPT", &[rule]), expected, "{rule}");
        }
    }

    #[test]
    fn tables_that_only_nft_can_show_are_named() {
        let rules = parse("# Table `firewalld' is incompatible, use 'nft' tool.\n", "ip");
        assert_eq!(rules.others, ["Table `firewalld' is incompatible, use 'nft' tool."]);
    }
}
