//! Parses the output of `nft -j list ruleset`. An unknown part becomes [`Test::Other`] or
//! [`RuleAction::Other`], never nothing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde_json::Value;

use super::rules::{Chain, Hook, Match, Rule, RuleAction, Rules, Test};

/// The elements of sets, by family, table and name.
type Sets = BTreeMap<[String; 3], Vec<Value>>;

/// Parses the output of `nft -j list ruleset`. Returns the rules, and whether iptables made some
/// that nft cannot read.
///
/// # Errors
/// The output is no JSON.
pub(super) fn parse(text: &str, family: &str) -> Result<(Rules, bool), serde_json::Error> {
    let listed: Value = serde_json::from_str(text)?;
    let objects = listed["nftables"].as_array().cloned().unwrap_or_default();
    let of = |kind: &'static str| objects.iter().map(move |object| &object[kind]).filter(|object| object.is_object());
    let sets: Sets = of("set").map(|set| (place(set, "name"), elements(&set["elem"]))).collect();
    let mut rules = Rules::default();
    for chain in of("chain") {
        if understood(chain) {
            rules.chains.push(read_chain(chain));
        }
    }
    for rule in of("rule") {
        let [family, table, name] = place(rule, "chain");
        if !understood(rule) {
            let table = format!("{family} {table}");
            if !rules.others.contains(&table) {
                rules.others.push(table);
            }
            continue;
        }
        let same = |chain: &&mut Chain| chain.family == family && chain.table == table && chain.name == name;
        if let Some(chain) = rules.chains.iter_mut().find(same) {
            chain.rules.extend(read_rule(rule, &sets));
        }
    }
    let is_xt = |rule: &Value| rule["expr"].as_array().into_iter().flatten().any(|part| part.get("xt").is_some());
    let by_iptables = of("rule").any(|rule| rule["family"] == family && is_xt(rule));
    Ok((rules, by_iptables))
}

fn text_of(object: &Value, key: &str) -> String {
    object[key].as_str().unwrap_or_default().to_owned()
}

fn place(object: &Value, name: &str) -> [String; 3] {
    [text_of(object, "family"), text_of(object, "table"), text_of(object, name)]
}

fn understood(object: &Value) -> bool {
    matches!(object["family"].as_str(), Some("ip" | "ip6" | "inet"))
}

fn read_chain(chain: &Value) -> Chain {
    let hook = match chain["hook"].as_str() {
        // Translating addresses drops nothing.
        _ if chain["type"] == "nat" => None,
        Some("prerouting") => Some(Hook::Prerouting),
        Some("input") => Some(Hook::Input),
        Some("output") => Some(Hook::Output),
        Some("postrouting") => Some(Hook::Postrouting),
        _ => None,
    };
    let priority = chain["prio"].as_i64().unwrap_or_default();
    let [family, table, name] = place(chain, "name");
    let drops = chain["policy"] == "drop";
    Chain { family, table, name, hook: hook.map(|hook| (hook, priority)), drops, rules: Vec::new() }
}

/// Parses a rule. One that looks something up in a map becomes several.
fn read_rule(rule: &Value, sets: &Sets) -> Vec<Rule> {
    let [family, table, _] = place(rule, "chain");
    let name = match rule["comment"].as_str() {
        Some(comment) => format!("rule {} ({comment})", rule["handle"]),
        None => format!("rule {}", rule["handle"]),
    };
    let set_of = |right: &Value| match right.as_str().and_then(|name| name.strip_prefix('@')) {
        Some(set) => sets.get(&[family.clone(), table.clone(), set.to_owned()]).cloned(),
        None => Some(elements(right)),
    };
    let mut matches = Vec::new();
    let mut found = Vec::new();
    for statement in rule["expr"].as_array().into_iter().flatten() {
        let Some((kind, body)) = statement.as_object().and_then(|object| object.iter().next()) else { continue };
        let end = |action, matches: &[Match]| Rule { matches: matches.to_vec(), action, name: name.clone() };
        match kind.as_str() {
            "match" => matches.extend(read_match(&body["left"], &body["op"], set_of(&body["right"]))),
            "counter" | "log" | "mangle" | "notrack" | "comment" => {}
            "vmap" => {
                for pair in map_pairs(&body["data"], &set_of) {
                    let [key, verdict] = pair;
                    let mut matches = matches.clone();
                    let key = (!key.is_null()).then(|| elements(&key));
                    matches.extend(read_match(&body["key"], &Value::from("=="), key));
                    found.push(end(action_of(&verdict), &matches));
                }
            }
            "accept" | "drop" | "return" | "jump" | "goto" | "continue" | "reject" => {
                found.push(end(action_of(statement), &matches));
            }
            // Translation and queues end the packet's way; limits and the rest let some packets
            // through.
            "queue" | "tproxy" | "synproxy" => found.push(end(RuleAction::Other, &matches)),
            "masquerade" | "snat" | "dnat" | "redirect" => {}
            // Only iptables can read its own targets.
            "xt" if body["type"] == "target" => found.push(end(RuleAction::Other, &matches)),
            _ => matches.push(Match::is(Test::Other)),
        }
    }
    found
}

fn action_of(verdict: &Value) -> RuleAction {
    let Some((kind, body)) = verdict.as_object().and_then(|object| object.iter().next()) else {
        return RuleAction::Other;
    };
    match kind.as_str() {
        "accept" => RuleAction::Accept,
        "drop" | "reject" => RuleAction::Drop,
        "return" => RuleAction::Return,
        "continue" => RuleAction::Nothing,
        "jump" => RuleAction::Jump(text_of(body, "target")),
        "goto" => RuleAction::Goto(text_of(body, "target")),
        _ => RuleAction::Other,
    }
}

/// The pairs of a verdict map. An unknown named map gives one pair with an unknown test.
fn map_pairs(data: &Value, set_of: &impl Fn(&Value) -> Option<Vec<Value>>) -> Vec<[Value; 2]> {
    let unknown = || vec![[Value::Null, Value::Null]];
    let Some(list) = set_of(data) else { return unknown() };
    let pair = |element: &Value| {
        let pair = element.as_array().filter(|pair| pair.len() == 2)?;
        Some([pair.first()?.clone(), pair.get(1)?.clone()])
    };
    let pairs: Option<Vec<_>> = list.iter().map(pair).collect();
    pairs.unwrap_or_else(unknown)
}

/// The elements of a set, or a single value.
fn elements(right: &Value) -> Vec<Value> {
    let list = match (right.as_array(), right["set"].as_array()) {
        (Some(list), _) | (None, Some(list)) => list.clone(),
        (None, None) if right.is_null() => Vec::new(),
        (None, None) => vec![right.clone()],
    };
    // An element may have a counter, a timeout or a comment.
    list.into_iter().map(|element| element["elem"].get("val").cloned().unwrap_or(element)).collect()
}

/// What a match tests. It may be two tests: a UDP port implies UDP.
fn read_match(left: &Value, op: &Value, right: Option<Vec<Value>>) -> Vec<Match> {
    let negated = op == "!=";
    let other = || vec![Match::is(Test::Other)];
    if !(negated || op == "==" || op == "in") {
        return other();
    }
    let Some(right) = right else { return other() };
    let Some((implied, test)) = read_test(left, &right) else { return other() };
    implied.into_iter().map(Match::is).chain([Match { test, negated }]).collect()
}

fn read_test(left: &Value, right: &[Value]) -> Option<(Vec<Test>, Test)> {
    let test = if let Some(key) = left["meta"]["key"].as_str() {
        match key {
            "iifname" | "iif" => Test::Device(true, words(right)?),
            "oifname" | "oif" => Test::Device(false, words(right)?),
            "l4proto" => Test::Protocol(words(right)?),
            "nfproto" | "protocol" => family_of(right)?,
            _ => return None,
        }
    } else if left["ct"]["key"] == "state" {
        Test::State(words(right)?)
    } else if left["ct"]["key"] == "status" && words(right)?.iter().all(|word| word == "dnat" || word == "snat") {
        // These packets' addresses are never translated.
        Test::State(Vec::new())
    } else {
        let payload = &left["payload"];
        let (protocol, field) = (payload["protocol"].as_str()?, payload["field"].as_str()?);
        return match (protocol, field) {
            ("udp" | "tcp", "dport" | "sport") => {
                Some((vec![Test::Protocol(vec![protocol.to_owned()])], Test::Port(field == "sport", ports(right)?)))
            }
            ("th", "dport" | "sport") => Some((Vec::new(), Test::Port(field == "sport", ports(right)?))),
            ("ip" | "ip6", "saddr" | "daddr") => {
                Some((vec![Test::Family(protocol == "ip")], Test::Address(field == "saddr", networks(right)?)))
            }
            ("ip", "protocol") | ("ip6", "nexthdr") => {
                Some((vec![Test::Family(protocol == "ip")], Test::Protocol(words(right)?)))
            }
            // An unknown field of a protocol still implies that protocol.
            ("ip" | "ip6", _) => Some((vec![Test::Family(protocol == "ip")], Test::Other)),
            ("th" | "ether" | "vlan" | "arp", _) => None,
            (_, _) => Some((vec![Test::Protocol(vec![protocol.to_owned()])], Test::Other)),
        };
    };
    Some((Vec::new(), test))
}

fn words(right: &[Value]) -> Option<Vec<String>> {
    let word = |value: &Value| match value.as_str() {
        Some(text) => Some(text.to_owned()),
        None => value.is_number().then(|| value.to_string()),
    };
    right.iter().map(word).collect()
}

fn family_of(right: &[Value]) -> Option<Test> {
    match words(right)?.as_slice() {
        [only] if only == "ipv4" || only == "ip" => Some(Test::Family(true)),
        [only] if only == "ipv6" || only == "ip6" => Some(Test::Family(false)),
        _ => None,
    }
}

fn ports(right: &[Value]) -> Option<Vec<RangeInclusive<u16>>> {
    let port = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    let range = |value: &Value| match value["range"].as_array().map(Vec::as_slice) {
        Some([from, to]) => Some(port(from)?..=port(to)?),
        _ => port(value).map(|port| port..=port),
    };
    right.iter().map(range).collect()
}

fn networks(right: &[Value]) -> Option<Vec<IpNet>> {
    let network = |value: &Value| {
        if let Some(address) = value.as_str() {
            return address.parse().ok().map(|address: IpAddr| address.into());
        }
        let prefix = &value["prefix"];
        let len = prefix["len"].as_u64()?;
        IpNet::new(prefix["addr"].as_str()?.parse().ok()?, u8::try_from(len).ok()?).ok()
    };
    right.iter().map(network).collect()
}

#[cfg(test)]
mod tests {
    use super::super::rules::{Fate, Packet, UDP};
    use super::*;

    /// A ruleset with one chain at `input` with these rules' expressions.
    fn input(policy: &str, rules: &[&str]) -> Rules {
        let mut objects = vec![
            r#"{"metainfo":{"json_schema_version":1}}"#.to_owned(),
            r#"{"table":{"family":"inet","name":"filter","handle":1}}"#.to_owned(),
            format!(r#"{{"chain":{{"family":"inet","table":"filter","name":"input","handle":1,"type":"filter","hook":"input","prio":0,"policy":"{policy}"}}}}"#),
            r#"{"chain":{"family":"inet","table":"filter","name":"guests","handle":9}}"#.to_owned(),
            r#"{"rule":{"family":"inet","table":"filter","chain":"guests","handle":10,"expr":[{"accept":null}]}}"#.to_owned(),
            r#"{"set":{"family":"inet","table":"filter","name":"open","type":"inet_service","handle":3,"elem":[22,{"range":[1200,1300]}]}}"#.to_owned(),
        ];
        objects.extend(rules.iter().map(|expr| {
            format!(r#"{{"rule":{{"family":"inet","table":"filter","chain":"input","handle":7,"expr":[{expr}]}}}}"#)
        }));
        parse(&format!(r#"{{"nftables":[{}]}}"#, objects.join(",")), "ip").unwrap().0
    }

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

    fn fate(policy: &str, rules: &[&str]) -> &'static str {
        match input(policy, rules).fate(&packet()) {
            Fate::Passes => "passes",
            Fate::Dropped(_) => "dropped",
            Fate::Unclear(_) => "unclear",
        }
    }

    const UDP_1229: &str =
        r#"{"match":{"op":"==","left":{"payload":{"protocol":"udp","field":"dport"}},"right":1229}}"#;
    const TCP_1229: &str =
        r#"{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":1229}}"#;

    #[test]
    fn ports_devices_addresses_and_states_are_understood() {
        let drop = |of: &str| format!(r#"{of},{{"counter":{{"packets":0,"bytes":0}}}},{{"drop":null}}"#);
        assert_eq!(fate("accept", &[&drop(UDP_1229)]), "dropped");
        assert_eq!(fate("accept", &[&drop(TCP_1229)]), "passes");
        for (left, right, expected) in [
            (r#"{"meta":{"key":"iifname"}}"#, r#""virbr0""#, "dropped"),
            (r#"{"meta":{"key":"iifname"}}"#, r#""virbr1""#, "passes"),
            (r#"{"meta":{"key":"iifname"}}"#, r#"{"set":["eth0","virbr*"]}"#, "dropped"),
            (r#"{"meta":{"key":"l4proto"}}"#, r#"{"set":["tcp","udp"]}"#, "dropped"),
            (r#"{"meta":{"key":"l4proto"}}"#, "6", "passes"),
            (r#"{"meta":{"key":"nfproto"}}"#, r#""ipv6""#, "passes"),
            (r#"{"payload":{"protocol":"th","field":"dport"}}"#, r#"{"range":[1000,2000]}"#, "dropped"),
            (r#"{"payload":{"protocol":"udp","field":"dport"}}"#, r#""@open""#, "dropped"),
            (r#"{"payload":{"protocol":"udp","field":"dport"}}"#, r#""@unknown""#, "unclear"),
            (r#"{"payload":{"protocol":"udp","field":"sport"}}"#, "53", "unclear"),
            (
                r#"{"payload":{"protocol":"ip","field":"saddr"}}"#,
                r#"{"prefix":{"addr":"192.168.0.0","len":16}}"#,
                "dropped",
            ),
            (r#"{"payload":{"protocol":"ip","field":"saddr"}}"#, r#""192.168.122.9""#, "unclear"),
            (r#"{"payload":{"protocol":"ip","field":"daddr"}}"#, r#""224.0.0.251""#, "passes"),
            (r#"{"ct":{"key":"state"}}"#, r#"["new","untracked"]"#, "dropped"),
            (r#"{"ct":{"key":"state"}}"#, r#"{"set":["established","related"]}"#, "passes"),
            (r#"{"meta":{"key":"mark"}}"#, "1", "unclear"),
            (r#"{"ct":{"key":"status"}}"#, r#""dnat""#, "passes"),
            (r#"{"payload":{"protocol":"icmpv6","field":"type"}}"#, r#""nd-router-advert""#, "passes"),
            (r#"{"payload":{"protocol":"ip","field":"ttl"}}"#, "1", "unclear"),
            (r#"{"payload":{"protocol":"ip6","field":"hoplimit"}}"#, "1", "passes"),
            (r#"{"payload":{"protocol":"tcp","field":"flags"}}"#, r#""syn""#, "passes"),
            (r#"{"ct":{"key":"status"}}"#, r#""assured""#, "unclear"),
        ] {
            let rule = drop(&format!(r#"{{"match":{{"op":"==","left":{left},"right":{right}}}}}"#));
            assert_eq!(fate("accept", &[&rule]), expected, "{left} {right}");
        }
        let not = drop(&UDP_1229.replace("==", "!="));
        assert_eq!(fate("accept", &[&not]), "passes");
    }

    #[test]
    fn verdict_maps_limits_and_rejects_are_understood_or_doubted() {
        let vmap = r#"{"vmap":{"key":{"ct":{"key":"state"}},"data":{"set":[["established",{"accept":null}],["invalid",{"drop":null}],["new",{"jump":{"target":"guests"}}]]}}}"#;
        assert_eq!(fate("drop", &[vmap]), "passes");
        let by_device =
            r#"{"vmap":{"key":{"meta":{"key":"iifname"}},"data":{"set":[["virbr0",{"goto":{"target":"guests"}}]]}}}"#;
        assert_eq!(fate("drop", &[by_device]), "passes");
        assert_eq!(fate("drop", &[r#"{"vmap":{"key":{"meta":{"key":"iifname"}},"data":"@zones"}}"#]), "unclear");
        assert_eq!(fate("accept", &[r#"{"reject":{"type":"icmpx","expr":"admin-prohibited"}}"#]), "dropped");
        assert_eq!(fate("accept", &[r#"{"limit":{"rate":1,"per":"second"}},{"drop":null}"#]), "unclear");
        assert_eq!(fate("accept", &[r#"{"xt":{"type":"match","name":"string"}},{"drop":null}"#]), "unclear");
        assert_eq!(fate("accept", &[r#"{"log":{"prefix":"x"}},{"counter":null}"#]), "passes");
    }

    #[test]
    fn translation_drops_nothing_and_other_families_are_named() {
        let text = r#"{"nftables":[
            {"chain":{"family":"ip","table":"nat","name":"PREROUTING","type":"nat","hook":"prerouting","prio":-100,"policy":"drop"}},
            {"chain":{"family":"bridge","table":"b","name":"input","type":"filter","hook":"input","prio":0,"policy":"accept"}},
            {"rule":{"family":"bridge","table":"b","chain":"input","handle":2,"expr":[{"drop":null}]}},
            {"rule":{"family":"bridge","table":"b","chain":"input","handle":3,"expr":[{"drop":null}]}}]}"#;
        let (rules, by_iptables) = parse(text, "ip").unwrap();
        assert!(!by_iptables);
        assert_eq!((rules.fate(&packet()), rules.others), (Fate::Passes, vec!["bridge b".to_owned()]));
        assert!(parse("nonsense", "ip").is_err());
        assert_eq!(parse("{}", "ip").unwrap(), (Rules::default(), false));
        let xt = r#"{"nftables":[{"rule":{"family":"ip","table":"filter","chain":"INPUT","handle":2,"expr":[{"xt":{"type":"target","name":"REJECT"}}]}}]}"#;
        assert_eq!((parse(xt, "ip").unwrap().1, parse(xt, "ip6").unwrap().1), (true, false));
    }
}
