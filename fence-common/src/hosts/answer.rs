//! What the group answers to a question.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use super::message::NoMessage;
use super::{HostDomain, NodeId};

/// The domains of one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostList {
    /// The host.
    pub node: NodeId,
    /// Its name in corosync's node list.
    pub name: String,
    /// Its domains.
    pub domains: Vec<HostDomain>,
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupAnswer {
    /// It is done. For `status`: the domain runs.
    Success,
    /// Only for `status`: the domain runs nowhere.
    Off,
    /// For `list`: the domains of all hosts, in the order of their node IDs.
    List(Vec<HostList>),
    /// It is not done, or not proven.
    Failure(NoAnswer),
}

/// Hosts by name, as messages have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostNames(pub Vec<String>);

impl fmt::Display for HostNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, name) in self.0.iter().enumerate() {
            let comma = if at > 0 { ", " } else { "" };
            // Names come from outside: quotes and control characters must not shape a log line.
            write!(f, "{comma}{}", name.escape_debug())?;
        }
        Ok(())
    }
}

/// Why a question has no good answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// corosync is down, or this daemon has not joined the group yet.
    #[error("this daemon is not in corosync's group of hosts")]
    NotJoined,
    /// This host's part of the cluster of hosts is the smaller one.
    #[error("this host has no quorum")]
    NoQuorum,
    /// corosync's node list is empty.
    #[error("corosync's node list names no host")]
    NoHosts,
    /// No host knows the domain, or ever did.
    #[error("no host knows the domain")]
    Unknown,
    /// No host that is there has a definition of the domain.
    #[error("no host that is there can start the domain")]
    NotDefined,
    /// A host is in doubt.
    #[error("{host} cannot tell: {}", reason.escape_debug())]
    CannotTell {
        /// The host.
        host: HostNames,
        /// Its reason.
        reason: String,
    },
    /// A host has tried, and failed.
    #[error("{host} failed: {}", reason.escape_debug())]
    Failed {
        /// The host.
        host: HostNames,
        /// Its reason.
        reason: String,
    },
    /// Configured hosts that are not there, and are not proven fenced.
    #[error("it may run on a host that is not there and not proven fenced: {0}")]
    Unproven(HostNames),
    /// Hosts that are there, and did not answer in time.
    #[error("no answer in time: {0}")]
    Silent(HostNames),
    /// A host has another version or another key.
    #[error("{host}: {trouble}")]
    Foreign {
        /// The host.
        host: HostNames,
        /// What is wrong with its messages.
        trouble: NoMessage,
    },
    /// Configured hosts that are not there. For `list` and `monitor`.
    #[error("configured hosts are not there: {0}")]
    Missing(HostNames),
    /// The host that should start the domain has left.
    #[error("{0} has left while it should start the domain")]
    Left(HostNames),
    /// The domain, or the group, changed each time the hosts were asked.
    #[error("the domain's place, or the hosts, changed too often")]
    Unsettled,
    /// This daemon stood still, and has lost messages.
    #[error("this daemon stood still for too long")]
    Stalled,
    /// So many questions are open that there is no room for another one.
    #[error("too many questions are open")]
    Full,
}
