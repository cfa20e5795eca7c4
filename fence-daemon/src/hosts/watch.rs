//! What happens in the group, for the log and for reports: one line for each change.

use fence_common::hosts::{ConfiguredHost, GroupView, NoMessage, NodeId, VERSION};
use tracing::{info, warn};

use super::transport::{Departure, Event, HostNode, Member};
use super::view::{HostView, Shown, View};
use crate::clock::Moment;

/// What is known of the group beside the machine.
pub(super) struct GroupWatch {
    shown: Shown,
    ours: Option<Member>,
    lost: Option<String>,
    quorate: Option<bool>,
    configured: Vec<HostNode>,
    members: Vec<Member>,
    stock: Vec<Member>,
}

impl GroupWatch {
    pub(super) fn new(shown: Shown) -> Self {
        let (configured, members, stock) = (Vec::new(), Vec::new(), Vec::new());
        Self { shown, ours: None, lost: None, quorate: None, configured, members, stock }
    }

    /// Takes note of an event, and logs what is new.
    pub(super) fn hear(&mut self, event: &Event) {
        match event {
            Event::Joined(ours) => {
                info!(node = ours.node, "this host has joined the group of hosts");
                (self.ours, self.lost) = (Some(*ours), None);
            }
            Event::Lost(why) => self.lose(why),
            Event::Configured(hosts) => self.configure(hosts),
            Event::Quorum(quorate) => self.count(*quorate),
            Event::Members { all, left } => self.meet(all, left),
            Event::Stock(stock) => self.see_stock(stock),
            Event::Stalled(how_long) => {
                warn!(
                    "messages of the other hosts came {:.1} s late: what they asked is not done",
                    how_long.as_secs_f32()
                );
            }
            Event::Message { .. } | Event::Alive(_) => {}
        }
    }

    fn lose(&mut self, why: &str) {
        if self.lost.as_deref() != Some(why) {
            let what = "the other hosts cannot be asked: only what runs here can be fenced";
            warn!("{what} until corosync is there ({why})");
        }
        (self.ours, self.quorate, self.lost) = (None, None, Some(why.to_owned()));
        self.members.clear();
    }

    fn configure(&mut self, hosts: &[HostNode]) {
        if hosts == self.configured.as_slice() {
            return;
        }
        let names: Vec<_> = hosts.iter().map(ToString::to_string).collect();
        match names.as_slice() {
            [] => warn!(
                "corosync's node list names no host: nobody knows who could run a domain, and every question fails"
            ),
            names => info!(hosts = %names.join(", "), "the configured hosts"),
        }
        hosts.clone_into(&mut self.configured);
    }

    fn count(&mut self, quorate: bool) {
        match (self.quorate, quorate) {
            (Some(true), true) | (Some(false), false) => {}
            (_, true) => info!("this host has quorum"),
            (_, false) => warn!("this host has no quorum: nothing is fenced until it has"),
        }
        self.quorate = Some(quorate);
    }

    fn meet(&mut self, all: &[Member], left: &[(Member, Departure)]) {
        for (member, why) in left {
            let host = self.called(NodeId(member.node));
            warn!(%host, process = member.pid, "its daemon is in the group no more ({why}): its domains may run");
        }
        for member in all.iter().filter(|member| !self.members.contains(member) && Some(**member) != self.ours) {
            info!(host = %self.called(NodeId(member.node)), process = member.pid, "its daemon is in the group");
        }
        all.clone_into(&mut self.members);
    }

    fn see_stock(&mut self, stock: &[Member]) {
        for member in stock.iter().filter(|member| !self.stock.contains(member)) {
            warn!(
                host = %self.called(NodeId(member.node)),
                process = member.pid,
                "fence_virtd answers in this cluster, too, and takes silence for death: it calls machines off that run. Stop it on \
                 every host"
            );
        }
        for member in self.stock.iter().filter(|member| !stock.contains(member)) {
            info!(host = %self.called(NodeId(member.node)), process = member.pid, "fence_virtd has gone");
        }
        stock.clone_into(&mut self.stock);
    }

    pub(super) fn is_quorate(&self) -> bool {
        self.quorate == Some(true)
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
