//! What is known of the group, for reports and for messages about hosts.

use std::collections::BTreeMap;
use std::sync::Arc;

use fence_common::hosts::{ConfiguredHost, HostDomain, Hosts as Machine, NoMessage, NodeId, VERSION};
use tracing::info;

use super::transport::{ClockGap, Event, HostNode, Member, Software, Vitals};
use super::view::{HostView, Shown, View};
use crate::clock::Moment;

/// What is known of the group beside the machine.
pub(super) struct GroupWatch {
    shown: Shown,
    ours: Option<Member>,
    lost: Option<String>,
    quorate: bool,
    ring: Vec<NodeId>,
    configured: Vec<HostNode>,
    members: Vec<Member>,
    stock: Vec<Member>,
    vitals: BTreeMap<Member, Vitals>,
    /// The domains that each host has told of, and of which revision.
    domains: BTreeMap<NodeId, Arc<[HostDomain]>>,
    revision: u64,
}

impl GroupWatch {
    pub(super) fn new(shown: Shown) -> Self {
        Self {
            shown,
            ours: None,
            lost: None,
            quorate: false,
            ring: Vec::new(),
            configured: Vec::new(),
            members: Vec::new(),
            stock: Vec::new(),
            vitals: BTreeMap::new(),
            domains: BTreeMap::new(),
            revision: 0,
        }
    }

    /// Takes note of an event. The transport has logged it, but for who has come.
    pub(super) fn hear(&mut self, event: &Event) {
        match event {
            Event::Joined(ours) => {
                (self.ours, self.lost) = (Some(*ours), None);
                // The machine may be another one.
                self.revision = u64::MAX;
            }
            Event::Lost(why) => {
                (self.ours, self.quorate, self.lost) = (None, false, Some(why.clone()));
                self.members.clear();
                self.vitals.clear();
                self.ring.clear();
            }
            Event::Configured(hosts) => self.configured.clone_from(hosts),
            Event::Quorum { quorate, ring } => {
                self.quorate = *quorate;
                self.ring = ring.iter().copied().map(NodeId).collect();
            }
            Event::Members { all, .. } => {
                let is_new = |member: &&Member| !self.members.contains(member) && Some(**member) != self.ours;
                for member in all.iter().filter(is_new) {
                    info!(host = %self.called(NodeId(member.node)), process = member.pid, "its daemon is in the group");
                }
                self.members.clone_from(all);
                self.vitals.retain(|member, _| all.contains(member));
            }
            Event::Alive(member, Some(vitals)) => drop(self.vitals.insert(*member, *vitals)),
            Event::Stock(stock) => self.stock.clone_from(stock),
            Event::Stalled(_) | Event::Message { .. } | Event::Alive(_, None) => {}
        }
    }

    pub(super) fn is_quorate(&self) -> bool {
        self.quorate
    }

    /// The hosts of corosync's ring, with or without a daemon of ours.
    pub(super) fn ring(&self) -> &[NodeId] {
        &self.ring
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

    /// Takes the domains of all hosts, if they have changed.
    fn know(&mut self, machine: &Machine) {
        if self.revision == machine.revision() {
            return;
        }
        self.revision = machine.revision();
        let mut domains: BTreeMap<NodeId, Vec<HostDomain>> = BTreeMap::new();
        for (node, domain) in machine.known_domains() {
            domains.entry(node).or_default().push(domain.clone());
        }
        let sorted = |(node, mut domains): (NodeId, Vec<HostDomain>)| {
            domains.sort_by(|one, other| one.name.cmp(&other.name));
            (node, Arc::from(domains))
        };
        self.domains = domains.into_iter().map(sorted).collect();
    }

    /// Shows reports how it is now.
    pub(super) fn show(&mut self, machine: Option<&Machine>) {
        if let Some(machine) = machine {
            self.know(machine);
        }
        let heard = machine.map(|machine| machine.view().hosts).unwrap_or_default();
        let view = |host: &HostNode| {
            let words = heard.iter().find(|words| words.node.0 == host.node);
            let trouble = words.and_then(|words| words.trouble);
            let at = words.and_then(|words| words.heard);
            let is_ours = self.ours.is_some_and(|ours| ours.node == host.node);
            let vitals = self.vitals.iter().find(|(member, _)| member.node == host.node).map(|(_, vitals)| vitals);
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
                domains: self.domains.get(&NodeId(host.node)).cloned().unwrap_or_default(),
                software: if is_ours { Some(Software::OURS) } else { vitals.map(|vitals| vitals.software) },
                clock_ahead_ms: vitals.and_then(|vitals| vitals.clock).map(ClockGap::ahead_ms),
                fenced: words.and_then(|words| words.fenced).map(Moment::from_ktime),
            }
        };
        let mut hosts: Vec<_> = self.configured.iter().map(view).collect();
        hosts.sort_by_key(|host| host.node);
        let (ours, lost, quorate, stock) = (self.ours, self.lost.clone(), self.is_quorate(), self.stock.clone());
        self.shown.set(View { ours, lost, quorate, hosts, stock });
    }
}
