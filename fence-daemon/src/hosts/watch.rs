//! What is known of the group, for reports and for messages about hosts.

use fence_common::hosts::{ConfiguredHost, GroupView, NoMessage, NodeId, VERSION};
use tracing::info;

use super::transport::{Event, HostNode, Member};
use super::view::{HostView, Shown, View};
use crate::clock::Moment;

/// What is known of the group beside the machine.
pub(super) struct GroupWatch {
    shown: Shown,
    ours: Option<Member>,
    lost: Option<String>,
    quorate: bool,
    configured: Vec<HostNode>,
    members: Vec<Member>,
    stock: Vec<Member>,
}

impl GroupWatch {
    pub(super) fn new(shown: Shown) -> Self {
        let (configured, members, stock) = (Vec::new(), Vec::new(), Vec::new());
        Self { shown, ours: None, lost: None, quorate: false, configured, members, stock }
    }

    /// Takes note of an event. The transport has logged it, but for who has come.
    pub(super) fn hear(&mut self, event: &Event) {
        match event {
            Event::Joined(ours) => (self.ours, self.lost) = (Some(*ours), None),
            Event::Lost(why) => {
                (self.ours, self.quorate, self.lost) = (None, false, Some(why.clone()));
                self.members.clear();
            }
            Event::Configured(hosts) => self.configured.clone_from(hosts),
            Event::Quorum(quorate) => self.quorate = *quorate,
            Event::Members { all, .. } => {
                let is_new = |member: &&Member| !self.members.contains(member) && Some(**member) != self.ours;
                for member in all.iter().filter(is_new) {
                    info!(host = %self.called(NodeId(member.node)), process = member.pid, "its daemon is in the group");
                }
                self.members.clone_from(all);
            }
            Event::Stock(stock) => self.stock.clone_from(stock),
            Event::Stalled(_) | Event::Message { .. } | Event::Alive(_) => {}
        }
    }

    pub(super) fn is_quorate(&self) -> bool {
        self.quorate
    }

    /// The hosts that corosync sees.
    pub(super) fn ring(&self) -> Vec<NodeId> {
        self.members.iter().map(|member| NodeId(member.node)).collect()
    }

    /// The configured hosts, for the machine.
    pub(super) fn configured(&self) -> Vec<ConfiguredHost> {
        let host = |host: &HostNode| ConfiguredHost { node: NodeId(host.node), name: self.called(NodeId(host.node)) };
        self.configured.iter().map(host).collect()
    }

    /// The name that Pacemaker knows a host by.
    pub(super) fn name_of(&self, node: NodeId) -> Option<String> {
        self.configured.iter().find(|host| host.node == node.0)?.name.clone()
    }

    /// A host, for people.
    pub(super) fn called(&self, node: NodeId) -> String {
        let known = self.configured.iter().find(|host| host.node == node.0);
        known.map_or_else(|| node.to_string(), ToString::to_string)
    }

    /// Shows reports how it is now.
    pub(super) fn show(&self, machine: Option<GroupView>) {
        let heard = machine.map(|machine| machine.hosts).unwrap_or_default();
        let view = |host: &HostNode| {
            let words = heard.iter().find(|words| words.node.0 == host.node);
            let trouble = words.and_then(|words| words.trouble);
            let at = words.and_then(|words| words.heard);
            HostView {
                node: host.node,
                name: host.name.clone(),
                present: self.members.iter().any(|member| member.node == host.node),
                heard: at.map(Moment::from_ktime),
                version: match trouble {
                    Some(NoMessage::Version(version)) => Some(version.into()),
                    Some(_) => None,
                    None => at.map(|_| VERSION.into()),
                },
                key_agrees: match trouble {
                    Some(NoMessage::Key) => Some(false),
                    Some(_) => None,
                    None => at.map(|_| true),
                },
                domains: words.map_or(0, |words| words.domains),
            }
        };
        let mut hosts: Vec<_> = self.configured.iter().map(view).collect();
        hosts.sort_by_key(|host| host.node);
        let (ours, lost, quorate, stock) = (self.ours, self.lost.clone(), self.is_quorate(), self.stock.clone());
        self.shown.set(View { ours, lost, quorate, hosts, stock });
    }
}
