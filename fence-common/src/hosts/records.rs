//! What is known of each host beyond its presence: when it was heard, which domains it has told of,
//! and whether it is proven fenced.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use uuid::Uuid;

use super::message::GONE;
use super::{HostDomain, Member, NodeId};
use crate::target::Target;

/// How many names and UUIDs are remembered that some host has known once.
const KNEW_MAX: usize = 65_536;

/// A fencing of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fencing {
    /// The earliest moment at which it can have been.
    at: u64,
    /// Whether the host stays off until somebody switches it on.
    stays_off: bool,
}

/// What is known of one host.
#[derive(Clone, Debug, Default)]
pub(super) struct HostWords {
    /// When a message from it was delivered last, or a daemon of it joined.
    pub(super) heard: Option<u64>,
    /// The domains that its daemons have told of, by process ID.
    tables: BTreeMap<u32, BTreeMap<Uuid, HostDomain>>,
    fencing: Option<Fencing>,
    /// How often the tables may have changed.
    revision: u64,
}

/// The domain that a question is about: its target, and what hosts call it.
#[derive(Clone, Debug, Default)]
pub(super) struct Sought {
    pub(super) uuids: BTreeSet<Uuid>,
    pub(super) names: BTreeSet<String>,
}

impl Sought {
    pub(super) fn of(target: Option<&Target>) -> Self {
        let mut sought = Self::default();
        match target {
            Some(Target::Uuid(uuid)) => drop(sought.uuids.insert(*uuid)),
            Some(Target::Name(name)) => drop(sought.names.insert(name.clone())),
            None => {}
        }
        sought
    }

    pub(super) fn fits(&self, uuid: &Uuid, name: &str) -> bool {
        self.uuids.contains(uuid) || self.names.contains(name)
    }
}

impl HostWords {
    /// The domains that it has told of.
    pub(super) fn domains(&self) -> impl Iterator<Item = &HostDomain> {
        self.tables.values().flat_map(BTreeMap::values)
    }

    /// Whether its last word is that the domain runs there.
    pub(super) fn last_ran(&self, sought: &Sought) -> bool {
        self.tables
            .values()
            .flat_map(BTreeMap::values)
            .any(|domain| domain.runs() && sought.fits(&domain.uuid, &domain.name))
    }

    /// Whether it was dead for a moment that includes `now`.
    ///
    /// It was fenced after it was last heard. A fencing that ends with the host switched on counts
    /// only for `boot`: then the host may be up again, cut off, with its domains started. `refutes`
    /// says whether its own later word refutes the fencing.
    pub(super) fn is_fenced(&self, now: u64, boot: u64, stays: u64, refutes: bool) -> bool {
        self.fencing.is_some_and(|fencing| {
            let counts = if fencing.stays_off { stays } else { boot };
            self.heard.is_none_or(|heard| heard < fencing.at || !refutes) && now.saturating_sub(fencing.at) <= counts
        })
    }

    /// The moment of the last fencing.
    pub(super) fn fenced_at(&self) -> Option<u64> {
        self.fencing.map(|fencing| fencing.at)
    }

    /// A fencing was reported. Returns whether it is news.
    pub(super) fn fenced(&mut self, at: u64, stays_off: bool) -> bool {
        let is_news = self.fencing.is_none_or(|known| known.at < at);
        if is_news {
            self.fencing = Some(Fencing { at, stays_off });
        }
        if self.heard.is_none_or(|heard| heard < at) {
            self.revision += 1;
            // Whatever ran there is dead.
            for domain in self.tables.values_mut().flat_map(BTreeMap::values_mut) {
                domain.state = crate::domain_state::SHUT_OFF;
            }
        }
        is_news
    }
}

/// The records of all hosts.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    hosts: BTreeMap<NodeId, HostWords>,
    knew_uuids: BTreeSet<Uuid>,
    knew_names: BTreeSet<String>,
}

impl Records {
    pub(super) fn of(&self, node: NodeId) -> Option<&HostWords> {
        self.hosts.get(&node)
    }

    pub(super) fn of_mut(&mut self, node: NodeId) -> &mut HostWords {
        self.hosts.entry(node).or_default()
    }

    /// Grows when a table changes.
    pub(super) fn revision(&self) -> u64 {
        self.hosts.values().map(|words| words.revision).sum()
    }

    /// The domains of each host.
    pub(super) fn domains(&self) -> impl Iterator<Item = (NodeId, &HostDomain)> {
        self.hosts.iter().flat_map(|(node, words)| words.domains().map(|domain| (*node, domain)))
    }

    /// A daemon of the host was heard, or joined.
    pub(super) fn heard(&mut self, now: u64, node: NodeId) {
        self.of_mut(node).heard = Some(now);
    }

    /// A daemon tells of its domains. The word of daemons of its host that are gone (not in
    /// `present`) ends with a complete table.
    pub(super) fn told(&mut self, from: Member, is_complete: bool, domains: Vec<HostDomain>, present: &[u32]) {
        for domain in &domains {
            self.know(domain);
        }
        let words = self.of_mut(from.node);
        words.revision += 1;
        let tables = &mut words.tables;
        if is_complete {
            tables.retain(|pid, _| present.contains(pid));
            tables.insert(from.pid, BTreeMap::new());
        }
        let table = tables.entry(from.pid).or_default();
        for domain in domains {
            if domain.state == GONE {
                table.remove(&domain.uuid);
            } else {
                table.insert(domain.uuid, domain);
            }
        }
    }

    fn know(&mut self, domain: &HostDomain) {
        if self.knew_uuids.len() < KNEW_MAX {
            self.knew_uuids.insert(domain.uuid);
        }
        if self.knew_names.len() < KNEW_MAX && !self.knew_names.contains(&domain.name) {
            self.knew_names.insert(domain.name.clone());
        }
    }

    /// Whether some host knows the domain, or has known it.
    pub(super) fn knew(&self, sought: &Sought) -> bool {
        !sought.uuids.is_disjoint(&self.knew_uuids) || !sought.names.is_disjoint(&self.knew_names)
    }
}
