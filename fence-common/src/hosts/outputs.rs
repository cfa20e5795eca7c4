//! What the group wants of the daemon, and what it tells people.

use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::vec::Vec;

use super::Hosts;
use super::answer::GroupAnswer;
use super::inputs::{HostDomain, Member, NodeId};
use super::message::NoMessage;
use super::records::HostWords;
use crate::ledger::RequestId;
use crate::target::Target;
use crate::wire::Op;

/// An order to act on a domain of this host. Its message was signed with the shared key, and the
/// coordinator has authorized its client. Only [`Hosts`](super::Hosts) makes one.
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(feature = "model", derive(Clone))]
pub struct GroupOrder {
    pub(super) act: u64,
    pub(super) request: RequestId,
    pub(super) op: Op,
    pub(super) target: Target,
    pub(super) coordinator: Member,
    pub(super) by: u64,
}

impl GroupOrder {
    /// The number of this act, for [`Hosts::acted`](super::Hosts::acted).
    #[must_use]
    pub const fn act(&self) -> u64 {
        self.act
    }

    /// The client's request. Record it before the act, for
    /// [`Hosts::remember`](super::Hosts::remember).
    #[must_use]
    pub const fn request(&self) -> RequestId {
        self.request
    }

    /// `off`, `reboot` or `on`.
    #[must_use]
    pub const fn op(&self) -> Op {
        self.op
    }

    /// The domain.
    #[must_use]
    pub const fn target(&self) -> &Target {
        &self.target
    }

    /// The member that asks on behalf of the client.
    #[must_use]
    pub const fn coordinator(&self) -> Member {
        self.coordinator
    }

    /// Begin no dangerous step after this moment.
    #[must_use]
    pub const fn by(&self) -> u64 {
        self.by
    }
}

/// What the daemon shall do.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Send these bytes to the group.
    Send(Vec<u8>),
    /// Call the client of this request back, and then report
    /// [`Hosts::answered`](super::Hosts::answered).
    CallBack {
        /// The request.
        request: RequestId,
        /// Whether no other host calls back. If not, wait as without a group: others go first.
        is_certain: bool,
    },
    /// Look what a domain is to this host, and report [`Hosts::looked`](super::Hosts::looked).
    Look {
        /// The number of this look.
        look: u64,
        /// The domain.
        target: Target,
        /// Why: the operation that was asked for.
        op: Op,
    },
    /// List all domains, and report [`Hosts::listed`](super::Hosts::listed).
    List {
        /// The number of this look.
        look: u64,
    },
    /// See whether this host's libvirt is well, and report
    /// [`Hosts::checked`](super::Hosts::checked).
    Check {
        /// The number of this look.
        look: u64,
    },
    /// Act on a domain of this host, and report [`Hosts::acted`](super::Hosts::acted).
    Act(GroupOrder),
    /// Answer a question of this host.
    Answer {
        /// The number that [`Hosts::ask`](super::Hosts::ask) has returned.
        question: u64,
        /// The answer.
        answer: GroupAnswer,
    },
    /// Find out whether a host was fenced, and report [`Hosts::fenced`](super::Hosts::fenced).
    AskFencing {
        /// The host.
        node: NodeId,
        /// When it was last heard, or seen in a ring. Older fencings prove nothing.
        since: Option<u64>,
    },
    /// Something for the log.
    Note(GroupNote),
}

/// Something for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupNote {
    /// A member has joined.
    Joined(Member),
    /// A member has left.
    Left(Member),
    /// A member's messages do not count. Said once while that lasts.
    Foreign(Member, NoMessage),
    /// A host is proven fenced.
    Fenced(NodeId),
}

/// A host, for people.
#[derive(Clone, Debug)]
pub struct HostView {
    /// Its number.
    pub node: NodeId,
    /// Its name in the node list. `None` if it is not configured.
    pub name: Option<String>,
    /// The process IDs of its daemons in the group.
    pub daemons: Vec<u32>,
    /// When it was heard last.
    pub heard: Option<u64>,
    /// Why its messages do not count.
    pub trouble: Option<NoMessage>,
    /// When it was fenced last.
    pub fenced: Option<u64>,
}

/// The group, for people.
#[derive(Clone, Debug)]
pub struct GroupView {
    /// Whether this daemon is in the group.
    pub joined: bool,
    /// Whether this host has quorum.
    pub quorate: bool,
    /// The hosts, by node ID.
    pub hosts: Vec<HostView>,
    /// How many questions of this host are open.
    pub questions: usize,
}

impl Hosts {
    /// The group, for people.
    #[must_use]
    pub fn view(&self) -> GroupView {
        let present = self.members.keys().map(|member| member.node);
        let nodes: BTreeSet<_> = self.configured.keys().copied().chain(present).collect();
        let view = |node: NodeId| {
            let words = self.records.of(node);
            HostView {
                node,
                name: self.configured.get(&node).cloned(),
                daemons: self.pids(node).collect(),
                heard: words.and_then(|words| words.heard),
                trouble: self.members.iter().filter(|(member, _)| member.node == node).find_map(|(_, one)| one.trouble),
                fenced: words.and_then(HostWords::fenced_at),
            }
        };
        let hosts = nodes.into_iter().map(view).collect();
        GroupView { joined: self.is_joined(), quorate: self.is_quorate, hosts, questions: self.asked.len() }
    }

    /// The domains that each host has told of, for people.
    pub fn known_domains(&self) -> impl Iterator<Item = (NodeId, &HostDomain)> {
        self.records.domains()
    }

    /// Grows when [`Hosts::known_domains`] changes.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.records.revision()
    }
}
