//! One look at corosync from outside of the daemon, for the doctor. Nothing is joined or changed.

use std::ffi::CStr;
use std::sync::mpsc;
use std::time::Duration;

use super::super::transport::HostNode;
use super::ffi::{Groups, Libraries, Map, Value, Votes};
use super::no_group::NoGroup;
use super::nodes;

/// Where corosync 3 and corosync 2 show whom they see, for the map's functions.
const SEEN: [&CStr; 2] = [c"runtime.members.", c"runtime.totem.pg.mrp.srp.members."];

/// What corosync says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorosyncLook {
    /// This host's node ID.
    pub ours: u32,
    /// Whether somebody counts votes.
    pub has_provider: bool,
    /// Whether this host's part of the cluster has quorum.
    pub quorate: bool,
    /// The configured hosts; empty if one lacks its node ID.
    pub hosts: Vec<HostNode>,
    /// The node IDs that corosync sees.
    pub seen: Vec<u32>,
}

/// Why corosync says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoLook {
    /// Its libraries are not there.
    #[error("{0}")]
    NoLibrary(String),
    /// It does not run, or refuses.
    #[error("{0}")]
    Failed(String),
    /// It did not answer in time.
    #[error("corosync did not answer in time")]
    Overdue,
}

impl From<NoGroup> for NoLook {
    fn from(why: NoGroup) -> Self {
        match why {
            NoGroup::NoLibrary(why) => Self::NoLibrary(why),
            other @ (NoGroup::Call { .. }
            | NoGroup::Closed
            | NoGroup::Deaf(_)
            | NoGroup::Hangs(_)
            | NoGroup::Full(_)
            | NoGroup::NotMember
            | NoGroup::System(_)
            | NoGroup::Ended) => Self::Failed(other.to_string()),
        }
    }
}

/// Asks corosync, which has `within` for its answer. A call that hangs stays where it is: the
/// caller must end the process without waiting ([`crate::process::leave`]).
///
/// # Errors
/// See [`NoLook`].
pub fn look(within: Duration) -> Result<CorosyncLook, NoLook> {
    let (sender, answer) = mpsc::channel();
    // Fails only if the caller has given up.
    let ask = move || drop(sender.send(ask()));
    let spawned = std::thread::Builder::new().name("corosync-look".to_owned()).spawn(ask);
    spawned.map_err(|error| NoLook::Failed(error.to_string()))?;
    answer.recv_timeout(within).unwrap_or(Err(NoLook::Overdue))
}

fn ask() -> Result<CorosyncLook, NoLook> {
    let libraries = Libraries::load()?;
    let votes = Votes::connect(libraries)?;
    let map = Map::connect(libraries, nodes::PREFIX)?;
    let hosts = nodes::hosts(&map.read(nodes::PREFIX)?);
    let mut found = Vec::new();
    for prefix in SEEN {
        found.extend(seen(prefix, &map.read(prefix)?));
    }
    let ours = Groups::connect(libraries)?.node()?;
    Ok(CorosyncLook { ours, has_provider: votes.has_provider(), quorate: votes.is_quorate()?, hosts, seen: found })
}

/// The node IDs whose status is "joined".
fn seen(prefix: &CStr, values: &[(String, Value)]) -> Vec<u32> {
    let prefix = prefix.to_string_lossy();
    let node = |(key, value): &(String, Value)| {
        let (node, name) = key.strip_prefix(&*prefix)?.split_once('.')?;
        (name == "status" && *value == Value::Text("joined".to_owned())).then(|| node.parse().ok()).flatten()
    };
    values.iter().filter_map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corosync_sees_those_who_have_joined() {
        let text = |key: &str, value: &str| (key.to_owned(), Value::Text(value.to_owned()));
        let values = [
            text("runtime.members.1.ip", "r(0) ip(10.0.0.1)"),
            text("runtime.members.1.status", "joined"),
            text("runtime.members.2.status", "left"),
            text("runtime.members.30.status", "joined"),
            ("runtime.members.3.join_count".to_owned(), Value::Number(1)),
        ];
        assert_eq!(seen(SEEN[0], &values), [1, 30]);
        assert_eq!(seen(SEEN[1], &values), Vec::<u32>::new());
    }

    #[test]
    fn a_missing_library_is_not_a_corosync_that_is_down() {
        assert!(matches!(NoLook::from(NoGroup::NoLibrary("x".to_owned())), NoLook::NoLibrary(_)));
        assert!(matches!(NoLook::from(NoGroup::Closed), NoLook::Failed(why) if why.contains("corosync")));
    }
}
