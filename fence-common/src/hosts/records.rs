//! What is known of each host beyond its presence: when it was heard, which domains it has told of,
//! and whether it is proven fenced.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use uuid::Uuid;

use super::message::GONE;
use super::{GroupNote, GuestAddress, HostDomain, Hosts, HostsRule, Member, NodeId, Output, Word, nanos};
use crate::caller::Vouched;
use crate::target::Target;

/// How many names and UUIDs are remembered that some host has known once.
const KNEW_MAX: usize = 65_536;

/// How much later a fencing must be than the known one to be another one, in nanoseconds. The
/// moment of a fencing is reckoned anew with each report.
const ANOTHER: u64 = 2_000_000_000;

/// How many addresses of machines that have gone from a host are remembered.
const FORMER_MAX: usize = 4096;

/// For how long they are, in nanoseconds. Nothing is done for a request that is older.
const FORMER_FOR: u64 = 30_000_000_000;

/// A fencing of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fencing {
    /// The earliest moment at which it can have been.
    at: u64,
    /// Whether the host stays off until somebody switches it on.
    stays_off: bool,
    /// When the history said so last.
    said: u64,
}

/// What makes a fencing a proof.
#[derive(Clone, Copy, Debug)]
struct ProofRules {
    /// For how long a fencing proves that the host is dead, whatever comes after.
    brief: u64,
    /// For how long a fencing that leaves the host off does.
    stays: u64,
    /// For how long the history's word about a host that was left off counts.
    fresh: u64,
    /// Until how long after the fencing the rings may have been unseen. `None`: always.
    unseen: Option<u64>,
    /// Since when each ring was seen.
    seen_since: Option<u64>,
    /// Whether a later message of the host refutes its fencing.
    message_refutes: bool,
    /// Whether a later ring with the host refutes its fencing.
    ring_refutes: bool,
}

/// What is known of one host.
#[derive(Clone, Debug, Default)]
pub(super) struct HostWords {
    /// When a message from it was delivered last, or a daemon of it joined.
    pub(super) heard: Option<u64>,
    /// When corosync formed a ring with it last.
    pub(super) in_ring: Option<u64>,
    /// The domains that its daemons have told of, by process ID.
    tables: BTreeMap<u32, BTreeMap<Uuid, HostDomain>>,
    /// The addresses of the machines that run there, by the daemon that has told of them.
    addresses: BTreeMap<u32, Vec<GuestAddress>>,
    /// The addresses that were taken back, and when: of machines that have ended or moved.
    former: Vec<(GuestAddress, u64)>,
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
    /// It was fenced after it was last heard or seen. A fencing proves that for some seconds: then
    /// the host may be up again, cut off, with its domains started. A host that was left off is
    /// dead for longer, if the history still says so, and if no ring can have had it unseen.
    fn is_fenced(&self, now: u64, rules: &ProofRules) -> bool {
        self.fencing.is_some_and(|Fencing { at, stays_off, said }| {
            let is_later = |word: Option<u64>, refutes: bool| word.is_none_or(|word| word < at || !refutes);
            let age = now.saturating_sub(at);
            let is_watched = rules
                .unseen
                .is_none_or(|unseen| rules.seen_since.is_some_and(|since| since <= at.saturating_add(unseen)));
            let is_still_off = stays_off && now.saturating_sub(said) <= rules.fresh && is_watched;
            is_later(self.heard, rules.message_refutes)
                && is_later(self.in_ring, rules.ring_refutes)
                && (age <= rules.brief || (is_still_off && age <= rules.stays))
        })
    }

    /// The machines with these addresses are not there any more. Their requests may still be under
    /// way.
    fn took_back(&mut self, now: u64, gone: impl Iterator<Item = GuestAddress>) {
        self.former.retain(|(_, at)| at.saturating_add(FORMER_FOR) > now);
        self.former.extend(gone.map(|one| (one, now)));
        let surplus = self.former.len().saturating_sub(FORMER_MAX);
        self.former.drain(..surplus);
    }

    /// The moment of the last fencing.
    pub(super) fn fenced_at(&self) -> Option<u64> {
        self.fencing.map(|fencing| fencing.at)
    }

    /// The history said at this moment that the host was fenced `at`. Returns whether it is news.
    pub(super) fn fenced(&mut self, said: u64, at: u64, stays_off: bool) -> bool {
        let known = self.fencing.filter(|known| at <= known.at.saturating_add(ANOTHER));
        self.fencing = Some(match known {
            Some(known) => {
                Fencing { at: at.max(known.at), stays_off: stays_off && known.stays_off, said: said.max(known.said) }
            }
            None => Fencing { at, stays_off, said },
        });
        if self.heard.is_none_or(|heard| heard < at) {
            self.revision += 1;
            // Whatever ran there is dead.
            for domain in self.tables.values_mut().flat_map(BTreeMap::values_mut) {
                domain.state = crate::domain_state::SHUT_OFF;
            }
        }
        known.is_none()
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

    /// corosync has formed a ring with the host.
    pub(super) fn in_ring(&mut self, now: u64, node: NodeId) {
        self.of_mut(node).in_ring = Some(now);
    }

    /// A daemon tells of its domains. The word of daemons of its host that are gone (not in
    /// `present`) ends with a complete table.
    pub(super) fn told(
        &mut self,
        now: u64,
        from: Member,
        is_complete: bool,
        domains: Vec<HostDomain>,
        present: &[u32],
    ) {
        for domain in &domains {
            self.know(domain);
        }
        let words = self.of_mut(from.node);
        words.revision += 1;
        if is_complete {
            words.tables.retain(|pid, _| present.contains(pid));
            words.tables.insert(from.pid, BTreeMap::new());
            let gone: Vec<_> = words.addresses.extract_if(.., |pid, _| !present.contains(pid)).collect();
            words.took_back(now, gone.into_iter().flat_map(|(_, guests)| guests));
        }
        let table = words.tables.entry(from.pid).or_default();
        for domain in domains {
            if domain.state == GONE {
                table.remove(&domain.uuid);
            } else {
                table.insert(domain.uuid, domain);
            }
        }
    }

    /// A daemon tells of its machines' addresses.
    pub(super) fn addresses(&mut self, now: u64, from: Member, guests: Vec<GuestAddress>) {
        let words = self.of_mut(from.node);
        let told = words.addresses.insert(from.pid, guests.clone()).unwrap_or_default();
        words.took_back(now, told.into_iter().filter(|one| !guests.contains(one)));
    }

    /// The one machine that has any of these addresses, by all that was told. If none that runs has
    /// one, and `with_dead`, it is the one that had: it may have ended since it asked.
    pub(super) fn guest_of(&self, now: u64, macs: &[[u8; 6]], with_dead: bool) -> Option<Vouched> {
        let has_it = |one: &&GuestAddress| macs.contains(&one.mac);
        let told = self.hosts.values().flat_map(|host| host.addresses.values()).flatten().filter(has_it);
        let is_recent = |at: u64| with_dead && at.saturating_add(FORMER_FOR) > now;
        let former = self.hosts.values().flat_map(|host| &host.former).filter(|(_, at)| is_recent(*at));
        let former = former.map(|(one, _)| one).filter(has_it);
        let running: Vec<_> = told.map(|one| &one.guest).collect();
        let guests = if running.is_empty() { former.map(|one| &one.guest).collect() } else { running };
        let first = guests.first()?;
        guests.iter().all(|other| other.uuid == first.uuid).then(|| Vouched::clone(first))
    }

    /// A daemon has said that a domain runs there.
    fn runs(&mut self, from: Member, domain: HostDomain) {
        self.know(&domain);
        let words = self.of_mut(from.node);
        words.revision += 1;
        words.tables.entry(from.pid).or_default().insert(domain.uuid, domain);
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

impl Hosts {
    /// The history of fencings said at the moment `said` that a host was fenced, at most `ago`
    /// before, and that nothing else was done to it since. `stays_off` if it was switched off,
    /// rather than rebooted.
    pub fn fenced(&mut self, now: u64, node: NodeId, said: u64, ago: Duration, stays_off: bool) {
        if self.records.of_mut(node).fenced(said, said.saturating_sub(nanos(ago)), stays_off) {
            self.outputs.push_back(Output::Note(GroupNote::Fenced(node)));
        }
        self.judge_all(now);
    }

    /// Whether a host was dead at a moment that includes `now`. A host that corosync sees is not.
    pub(super) fn is_fenced(&self, now: u64, node: NodeId) -> bool {
        let (boot, stays) = (nanos(self.options.boot), nanos(self.options.stays_off));
        let ring_refutes = self.holds(HostsRule::RingRefutes);
        let rules = ProofRules {
            brief: if self.holds(HostsRule::BootLimited) { boot } else { stays },
            stays,
            fresh: if self.holds(HostsRule::HistoryFresh) { boot } else { stays },
            unseen: self.holds(HostsRule::RingsSeen).then_some(boot),
            seen_since: self.rings_since,
            message_refutes: self.holds(HostsRule::HeardRefutes),
            ring_refutes,
        };
        let refuted = self.is_present(node) || (ring_refutes && self.ring.contains(&node));
        !refuted && self.records.of(node).is_some_and(|words| words.is_fenced(now, &rules))
    }
}

impl Hosts {
    /// A daemon has said whether a domain runs there. It may be lost before its table tells that.
    pub(super) fn said_to_run(&mut self, from: Member, word: &Word, uuid: Option<Uuid>, name: Option<&str>) {
        let (Word::RunsHere, Some(uuid), Some(name)) = (word, uuid, name) else { return };
        let domain = HostDomain { uuid, name: name.into(), state: crate::domain_state::RUNNING };
        // What this host tells next is compared with its own word.
        if let Some(told) = self.told.as_mut().filter(|_| from == self.me) {
            told.insert(uuid, domain.clone());
        }
        self.records.runs(from, domain);
    }
}
