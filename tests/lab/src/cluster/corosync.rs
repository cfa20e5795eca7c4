//! Configuration files of cluster nodes of any kind: corosync, Pacemaker, names, and the fencing
//! key.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::lab::HYPERVISOR_V4;

/// The resource agent that must never run twice, where Pacemaker looks for `ocf:lab:solo`.
pub const AGENT_PATH: &str = "/usr/lib/ocf/resource.d/lab/solo";
/// Its text.
pub const AGENT: &str = include_str!("../assets/solo.sh");
/// The stock client's key file.
pub const KEY_PATH: &str = "/etc/cluster/fence_xvm.key";
/// Where nodes of one hypervisor have a directory in common.
pub const SHARED: &str = "/shared";

/// A node as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its host name, and the cluster's name for it.
    pub name: String,
    /// Its address on the cluster's network.
    pub address: Ipv4Addr,
    /// The hypervisor's name for it.
    pub domain: String,
}

impl Member {
    /// A node whose address on the bridge ends with `last`.
    #[must_use]
    pub fn new(name: &str, last: u8, domain: &str) -> Self {
        let [a, b, c, _] = HYPERVISOR_V4.octets();
        Self { name: name.to_owned(), address: Ipv4Addr::new(a, b, c, last), domain: domain.to_owned() }
    }
}

/// A file of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Where.
    pub path: &'static str,
    /// Its permissions.
    pub mode: u32,
    /// Its content.
    pub content: Vec<u8>,
}

/// Pacemaker's first configuration. systemd-tmpfiles copies it with its owner. Without it a new
/// cluster waits 20 s for other nodes before it elects a leader.
const FIRST_CIB: &str = include_str!("../assets/first-cib.xml");
const FIRST_CIB_PATH: &str = "/usr/local/share/lab/cib.xml";
const TMPFILES: &str = "C /var/lib/pacemaker/cib/cib.xml 0600 hacluster haclient - /usr/local/share/lab/cib.xml\n";

/// corosync's token timeout in milliseconds: short, because tests wait for it.
pub const TOKEN: u32 = 1000;

/// corosync.conf for `members`: unicast, without encryption. A cluster of two goes on when one node
/// is lost, and starts without the other.
#[must_use]
pub fn corosync(members: &[Member], token: u32) -> String {
    let mut text = include_str!("../assets/corosync.conf")
        .replace("@TOKEN@", &token.to_string())
        .replace("@TWO@", if members.len() == 2 { "1" } else { "0" });
    for (number, member) in (1..).zip(members) {
        let _ = write!(
            text,
            "    node {{\n        nodeid: {number}\n        name: {}\n        ring0_addr: {}\n    }}\n",
            member.name, member.address
        );
    }
    text.push_str("}\n");
    text
}

/// /etc/hosts with all of them.
#[must_use]
pub fn hosts(members: &[Member]) -> String {
    let lines = members.iter().map(|member| format!("{} {}\n", member.address, member.name));
    "127.0.0.1 localhost\n".to_owned() + &lines.collect::<String>()
}

/// The files of node `me` in a cluster that starts with the node. `key` is the fencing key.
#[must_use]
pub fn files(members: &[Member], me: &Member, key: &[u8]) -> Vec<Item> {
    let text = |path, content: String| Item { path, mode: 0o644, content: content.into_bytes() };
    let mut items = plain(members, me, key);
    items.extend([
        text("/etc/corosync/corosync.conf", corosync(members, TOKEN)),
        text(FIRST_CIB_PATH, FIRST_CIB.to_owned()),
        text("/etc/tmpfiles.d/lab.conf", TMPFILES.to_owned()),
        text("/etc/default/pacemaker", "PCMK_logpriority=notice\nPCMK_shutdown_delay=0\n".to_owned()),
        Item { path: "/etc/pacemaker/authkey", mode: 0o640, content: [b'a'; 128].to_vec() },
        Item { path: AGENT_PATH, mode: 0o755, content: AGENT.as_bytes().to_vec() },
    ]);
    items
}

/// The files of a node without a cluster: its name, the other names, and the fencing key.
#[must_use]
pub fn plain(members: &[Member], me: &Member, key: &[u8]) -> Vec<Item> {
    let text = |path, content: String| Item { path, mode: 0o644, content: content.into_bytes() };
    vec![
        text("/etc/hostname", format!("{}\n", me.name)),
        text("/etc/hosts", hosts(members)),
        Item { path: KEY_PATH, mode: 0o600, content: key.to_vec() },
    ]
}

/// What `pcmk_host_map` says: the cluster's names and the hypervisor's.
#[must_use]
pub fn host_map(members: &[Member]) -> String {
    let pairs = members.iter().map(|member| format!("{}:{}", member.name, member.domain));
    pairs.collect::<Vec<_>>().join(";")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members() -> Vec<Member> {
        vec![Member::new("alpha", 31, "ct-1"), Member::new("beta", 32, "ct-2")]
    }

    #[test]
    fn two_nodes_are_a_cluster_of_two() {
        let text = corosync(&members(), 1000);
        for part in ["two_node: 1", "nodeid: 2\n        name: beta\n        ring0_addr: 192.168.122.32", "token: 1000"]
        {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert_eq!(text.matches('{').count(), text.matches('}').count());
        assert_eq!(host_map(&members()), "alpha:ct-1;beta:ct-2");
        assert!(hosts(&members()).ends_with("192.168.122.32 beta\n"));
    }

    #[test]
    fn keys_are_for_root_and_each_file_is_there_once() {
        let members = members();
        let items = files(&members, &members[0], b"key");
        let mut paths: Vec<_> = items.iter().map(|item| item.path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), items.len());
        assert!(TMPFILES.contains(FIRST_CIB_PATH));
        assert!(items.iter().filter(|item| item.path.contains("key")).all(|item| item.mode & 0o007 == 0));
    }
}
