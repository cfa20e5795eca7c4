//! The configured node list, from corosync's map.

use std::collections::BTreeMap;
use std::ffi::CStr;

use super::super::transport::HostNode;
use super::ffi::Value;

/// Where the list is, for the map's functions.
pub(super) const PREFIX: &CStr = c"nodelist.";

/// What the map has of a node: id, name and first address.
type NodeParts = (Option<u32>, Option<String>, Option<String>);

/// The hosts of the list in the order of their node ids; empty if there is none, or if a node lacks
/// its id: nobody then knows all hosts.
pub(super) fn hosts(values: &[(String, Value)]) -> Vec<HostNode> {
    let mut nodes: BTreeMap<&str, NodeParts> = BTreeMap::new();
    for (key, value) in values {
        let Some((index, name)) = key.strip_prefix("nodelist.node.").and_then(|rest| rest.split_once('.')) else {
            continue;
        };
        let node = nodes.entry(index).or_default();
        match (name, value) {
            ("nodeid", Value::Number(id)) => node.0 = Some(*id),
            ("name", Value::Text(name)) => node.1 = Some(name.clone()),
            ("ring0_addr", Value::Text(address)) => node.2 = Some(address.clone()),
            _ => {}
        }
    }
    let host = |(node, name, address)| Some(HostNode { node: node?, name, address });
    let mut hosts = nodes.into_values().map(host).collect::<Option<Vec<_>>>().unwrap_or_default();
    hosts.sort_by_key(|host| host.node);
    hosts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(key: &str, value: &str) -> (String, Value) {
        (key.to_owned(), Value::Text(value.to_owned()))
    }

    fn number(key: &str, value: u32) -> (String, Value) {
        (key.to_owned(), Value::Number(value))
    }

    #[test]
    fn the_list_has_all_nodes_or_none() {
        let mut values = vec![
            text("nodelist.local_node_pos", "0"),
            number("nodelist.node.1.nodeid", 1),
            text("nodelist.node.1.ring0_addr", "10.0.0.1"),
            text("nodelist.node.0.name", "beta"),
            number("nodelist.node.0.nodeid", 7),
            number("nodelist.node.0.quorum_votes", 1),
        ];
        let alpha = HostNode { node: 1, name: None, address: Some("10.0.0.1".to_owned()) };
        let beta = HostNode { node: 7, name: Some("beta".to_owned()), address: None };
        assert_eq!(hosts(&values), [alpha, beta]);
        // corosync makes up an id where none is configured, and does not put it here.
        values.push(text("nodelist.node.2.ring0_addr", "10.0.0.3"));
        assert_eq!(hosts(&values), []);
        assert_eq!(hosts(&[]), []);
    }
}
