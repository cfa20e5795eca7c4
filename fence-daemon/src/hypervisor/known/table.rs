//! What is known of a URI's domains. libvirt's events keep it warm, so a fence acts without a
//! look-up.
//!
//! - Every connect fills it, after the registration for events, one domain at a time. A domain that
//!   libvirt does not answer about costs the others nothing. A domain that is not in the table yet
//!   is looked up.
//! - An event says only *which* domain. The domain's present state is asked afresh each time
//!   (`observe`). Doubled, late or unordered events do no harm, and there is no polling.
//! - If libvirt tells no events, the table is *blind*. All domains are looked at every few seconds,
//!   and those of a request right before its table is used (`events`).
//! - It is kept while the connection is lost: what a pidfd says is true without libvirt. So it can
//!   find a process to kill, and say that a domain is *on* whose process lives. *Off* is only ever
//!   said by a dead process, or by libvirt when asked afresh.
//!
//! libvirt gives each start of a domain a new ID, which tells instances apart as long as libvirtd
//! lives. After that its numbers may come again. So observations of an earlier connection are
//! compared with nothing.
//!
//! libvirtd can lose a domain that runs on: it restarts and cannot read its own record. The table
//! keeps the domain's process as an *orphan*. As long as that lives the domain is not off.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use fence_common::domain_state;
use fence_common::sync::lock;
use fence_common::target::Target;
use fence_net::neighbour::Mac;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{appearances::Appearances, deaths::Deaths, last_words::Recalled, sockets::Sockets, stale::Stale};
use crate::hypervisor::libvirt::{State, Told};
use crate::hypervisor::process::{Belongings, Disks, Driver, Job, Running, Victim, Whom};

/// A domain.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// Whether it has a definition that outlives it.
    pub(crate) persistent: bool,
    /// Whether it is off here because it moved to another host.
    pub(crate) moved_away: bool,
    /// What runs, if it does.
    pub(crate) instance: Option<Instance>,
    /// The Ethernet addresses of its interfaces while it runs, by its XML.
    pub(crate) macs: Arc<[Mac]>,
    /// Its vsock number while it runs, by its XML.
    pub(crate) cid: Option<u32>,
    /// The number of the connection over which that was observed.
    pub(crate) generation: u64,
}

impl Entry {
    /// The process that it runs as, where that is known.
    pub(crate) fn victim(&self) -> Option<&Arc<Victim>> {
        self.instance.as_ref().and_then(|instance| instance.victim.as_ref())
    }

    pub(super) fn may_live(&self) -> bool {
        self.instance.as_ref().is_some_and(Instance::may_live)
    }
}

/// A running instance of a domain.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    /// libvirt's number of it.
    pub(crate) id: u32,
    /// Its state when it was last asked for.
    pub(crate) state: State,
    /// Its process, where we know how to find it.
    pub(crate) victim: Option<Arc<Victim>>,
}

impl Instance {
    /// Its process, if that lives.
    pub(crate) fn living(&self) -> Option<&Arc<Victim>> {
        self.victim.as_ref().filter(|victim| !victim.is_dead())
    }

    /// Whether it runs, as far as is known. An instance whose process is not known counts as
    /// running.
    pub(crate) fn may_live(&self) -> bool {
        self.victim.is_none() || self.living().is_some()
    }

    /// Whether it is on its way here from another host, where it still runs. It is paused here
    /// until it has arrived, so libvirt's record need not be read of one that runs.
    pub(crate) fn is_arriving(&self) -> bool {
        self.state.0 == domain_state::PAUSED && self.living().is_some_and(|victim| victim.job() == Job::Arriving)
    }
}

/// See [`Table::note_leaving`].
#[derive(Debug, Default)]
pub(super) struct Leaving {
    domains: HashSet<Uuid>,
    /// How often each was noted.
    departures: HashMap<Uuid, u64>,
}

impl Leaving {
    pub(super) fn note(&mut self, uuid: Uuid, leaving: bool) {
        if leaving {
            *self.departures.entry(uuid).or_default() += 1;
            self.domains.insert(uuid);
        } else {
            self.domains.remove(&uuid);
        }
    }
}

/// The domains of one URI.
pub(crate) struct Table {
    /// The driver, if this URI's domains are processes of this host.
    pub(crate) driver: Option<Driver>,
    domains: Mutex<HashMap<Uuid, Entry>>,
    /// Processes that were domains', of which libvirt no longer speaks.
    orphans: Mutex<HashMap<Uuid, Vec<Arc<Victim>>>>,
    /// Whether every domain that libvirt had has been seen once.
    filled: AtomicBool,
    /// Whether libvirt tells no events. Then this table is a while behind.
    blind: AtomicBool,
    /// Whether libvirt tells that a domain was reset.
    told_of_resets: AtomicBool,
    /// What the domains have beside their processes.
    pub(crate) belongings: Arc<Belongings>,
    /// The number of the present connection.
    generation: AtomicU64,
    /// How often each domain was seen to be reset.
    resets: Mutex<HashMap<Uuid, u64>>,
    /// Domains that were stopped here for another host to go on with them. One that is off after
    /// that may run there.
    leaving: Mutex<Leaving>,
    /// Dead instances that libvirt still calls active.
    pub(crate) stale: Stale,
    /// The XML of transient domains that run, with their secrets: in memory only, wiped when it
    /// goes, and never shown.
    xmls: Mutex<HashMap<Uuid, Arc<Zeroizing<String>>>>,
    /// Where the devices of running domains listen.
    pub(super) sockets: Sockets,
    /// How often domains appeared.
    pub(crate) appearances: Appearances,
    /// What was seen to die.
    pub(crate) deaths: Deaths,
    /// What an earlier daemon knew of domains that this one has not seen yet.
    pub(crate) recalled: Recalled,
    news: watch::Sender<()>,
}

impl Table {
    /// An empty table for a URI.
    pub(crate) fn new(uri: &str) -> Self {
        Self {
            driver: Driver::of(uri),
            domains: Mutex::default(),
            orphans: Mutex::default(),
            filled: AtomicBool::new(false),
            blind: AtomicBool::new(false),
            told_of_resets: AtomicBool::new(false),
            belongings: Arc::default(),
            generation: AtomicU64::new(0),
            resets: Mutex::default(),
            leaving: Mutex::default(),
            stale: Stale::default(),
            xmls: Mutex::default(),
            sockets: Sockets::default(),
            appearances: Appearances::default(),
            deaths: Deaths::default(),
            recalled: Recalled::default(),
            news: watch::Sender::default(),
        }
    }

    /// Whether this URI's domains are QEMU processes of this host.
    pub(crate) fn runs_machines(&self) -> bool {
        self.driver == Some(Driver::Qemu)
    }

    /// A domain whose processes are to be looked for, if they are processes of this host.
    pub(crate) fn whom(&self, uuid: Uuid, name: &str) -> Option<Whom> {
        let ids = self.instance(uuid).map(|instance| instance.id);
        let proven_dead = self.is_proven_dead(uuid);
        Some(Whom { driver: self.driver?, uuid, name: name.to_owned(), ids: ids.into_iter().collect(), proven_dead })
    }

    pub(super) fn domains(&self) -> MutexGuard<'_, HashMap<Uuid, Entry>> {
        lock(&self.domains)
    }

    /// What is known of a domain.
    pub(crate) fn get(&self, uuid: Uuid) -> Option<Entry> {
        self.domains().get(&uuid).cloned()
    }

    /// What runs of a domain.
    pub(crate) fn instance(&self, uuid: Uuid) -> Option<Instance> {
        self.domains().get(&uuid)?.instance.clone()
    }

    /// The domain that a target means.
    pub(crate) fn find(&self, target: &Target) -> Option<(Uuid, Entry)> {
        let domains = self.domains();
        let found = match target {
            Target::Uuid(uuid) => domains.get_key_value(uuid),
            Target::Name(name) => domains.iter().find(|(_, entry)| entry.name == *name),
        };
        found.map(|(uuid, entry)| (*uuid, entry.clone()))
    }

    /// All domains, if one of them is killed and still lives. libvirt cannot list its domains then.
    pub(crate) fn dying(&self) -> Option<Vec<(Uuid, Entry)>> {
        let domains = self.domains();
        let is_dying = |entry: &Entry| entry.victim().is_some_and(|victim| victim.is_dying());
        let all = || domains.iter().map(|(uuid, entry)| (*uuid, entry.clone())).collect();
        domains.values().any(is_dying).then(all)
    }

    /// All that is known.
    pub(crate) fn all(&self) -> Vec<(Uuid, Entry)> {
        self.domains().iter().map(|(uuid, entry)| (*uuid, entry.clone())).collect()
    }

    /// The states of running instances, as events keep them: of none where there are no events.
    pub(crate) fn states(&self) -> HashMap<(Uuid, u32), State> {
        let (generation, is_blind) = (self.generation(), self.is_blind());
        let state = |(uuid, entry): (&Uuid, &Entry)| {
            let instance = entry.instance.as_ref().filter(|_| entry.generation == generation && !is_blind)?;
            Some(((*uuid, instance.id), instance.state))
        };
        self.domains().iter().filter_map(state).collect()
    }

    /// All UUIDs that are known, or were to an earlier daemon.
    pub(crate) fn uuids(&self) -> Vec<Uuid> {
        let known: Vec<_> = self.domains().keys().copied().collect();
        known.into_iter().chain(self.recalled.all().into_iter().map(|(uuid, _)| uuid)).collect()
    }

    /// Whether libvirt tells no events. Then the domain of a request has to be looked at afresh.
    pub(crate) fn is_blind(&self) -> bool {
        self.blind.load(Ordering::Acquire)
    }

    /// Whether libvirt would tell that a domain was reset.
    pub(crate) fn is_told_of_resets(&self) -> bool {
        self.told_of_resets.load(Ordering::Acquire)
    }

    /// Every domain that libvirt has was seen.
    pub(crate) fn note_filled(&self) {
        self.filled.store(true, Ordering::Release);
        self.news.send_replace(());
    }

    /// Whether every domain that libvirt had was seen once, over this connection or an earlier one.
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Becomes as before anything was seen.
    #[cfg(test)]
    pub(crate) fn forget_for_test(&self) {
        self.domains().clear();
        self.filled.store(false, Ordering::Release);
    }

    /// Tells when something has changed.
    pub(crate) fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// Enters what was observed of a domain. `None` takes it out.
    pub(crate) fn put(&self, uuid: Uuid, entry: Option<Entry>) {
        let now = entry.as_ref().and_then(Entry::victim).map(|victim| victim.pid());
        self.recalled.forget(uuid);
        self.appearances.observe(uuid, entry.as_ref());
        self.deaths.observe(uuid, entry.as_ref());
        let old = match entry {
            Some(entry) => self.domains().insert(uuid, entry),
            None => self.domains().remove(&uuid),
        };
        // A process that lives is kept, whatever libvirt says.
        let lost = old.as_ref().and_then(Entry::victim).filter(|victim| !victim.is_dead());
        // Two living processes with one number are one process.
        if let Some(lost) = lost.filter(|lost| Some(lost.pid()) != now) {
            lock(&self.orphans).entry(uuid).or_default().push(Arc::clone(lost));
        }
        self.news.send_replace(());
    }

    /// Notes the XML of a transient domain that runs. `None`: it does not, or is persistent.
    pub(crate) fn note_xml(&self, uuid: Uuid, xml: Option<Arc<Zeroizing<String>>>) {
        match xml {
            Some(xml) => drop(lock(&self.xmls).insert(uuid, xml)),
            None => drop(lock(&self.xmls).remove(&uuid)),
        }
    }

    /// A copy of a transient domain's XML, as it was when libvirt last spoke of it.
    pub(crate) fn xml(&self, uuid: Uuid) -> Option<Zeroizing<String>> {
        lock(&self.xmls).get(&uuid).map(|xml| Zeroizing::clone(xml))
    }

    /// The processes of a domain that live although libvirt no longer speaks of them.
    pub(crate) fn orphans(&self, uuid: Uuid) -> Vec<Arc<Victim>> {
        let mut orphans = lock(&self.orphans);
        let Some(of_domain) = orphans.get_mut(&uuid) else { return Vec::new() };
        of_domain.retain(|victim| !victim.is_dead());
        let living = of_domain.clone();
        if living.is_empty() {
            orphans.remove(&uuid);
        }
        living
    }

    /// All orphans of domains that are not in the table any more.
    pub(crate) fn all_orphans(&self) -> Vec<(Uuid, Vec<Arc<Victim>>)> {
        let known = self.uuids();
        let lost: Vec<_> = lock(&self.orphans).keys().filter(|uuid| !known.contains(uuid)).copied().collect();
        let orphans = lost.into_iter().map(|uuid| (uuid, self.orphans(uuid)));
        orphans.filter(|(_, orphans)| !orphans.is_empty()).collect()
    }

    /// Notes what a domain has beside its process, as it was observed.
    pub(crate) fn observe_belongings(&self, uuid: Uuid, entry: Option<&Entry>, disks: Option<Disks>) {
        let Some(entry) = entry else { return self.belongings.forget(uuid) };
        let instance = entry.instance.as_ref().filter(|_| self.runs_machines());
        let running = instance.and_then(|known| Some(Running { id: known.id, pid: known.living()?.pid() }));
        self.belongings.observe(uuid, &entry.name, running, disks, entry.generation);
    }

    /// Right before a domain's process is killed: notes what may outlive the process.
    ///
    /// # Errors
    /// We may not look into the process.
    pub(crate) fn note_kill(&self, uuid: Uuid, victim: &Victim) -> io::Result<()> {
        if self.runs_machines() { self.belongings.note_kill(uuid, victim.pid()) } else { Ok(()) }
    }

    /// A new connection is there. Observations of an earlier one are not compared with those of
    /// this one.
    pub(crate) fn begin_generation(&self, told: Told) {
        self.blind.store(!told.changes, Ordering::Release);
        self.told_of_resets.store(told.resets, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of the present connection.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether this very instance is dead, whatever libvirt says of it. Its own process is the
    /// proof, and libvirt may take a moment to notice.
    pub(crate) fn is_dead(&self, uuid: Uuid, id: Option<u32>) -> bool {
        let Some(entry) = self.get(uuid).filter(|entry| entry.generation == self.generation()) else { return false };
        entry.instance.is_some_and(|known| Some(known.id) == id && !known.may_live())
    }

    /// The instance of a domain that is dead by its own process, and that libvirt still speaks of.
    pub(crate) fn dead_instance(&self, uuid: Uuid) -> Option<u32> {
        let instance = self.instance(uuid)?;
        self.is_dead(uuid, Some(instance.id)).then_some(instance.id)
    }

    /// Waits until libvirt no longer counts this instance as running, at most until `by`.
    pub(crate) async fn forgotten(&self, uuid: Uuid, id: u32, by: Instant) {
        let mut news = self.news.subscribe();
        let counts = || self.instance(uuid).is_some_and(|instance| instance.id == id);
        // An error means that the sender is gone, and it is ours.
        while counts() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
    }

    /// Notes whether a domain was stopped here for another host to go on with it. It was not (any
    /// more) when it runs here, and when it was destroyed here with no migration under way.
    pub(crate) fn note_leaving(&self, uuid: Uuid, leaving: bool) {
        self.leaving().note(uuid, leaving);
        if leaving {
            self.deaths.forget(uuid);
        }
        self.news.send_replace(());
    }

    /// How often it was noted to leave: taken before a look, for [`Self::note_seen`] after it.
    pub(crate) fn departures(&self, uuid: Uuid) -> u64 {
        self.leaving().departures.get(&uuid).copied().unwrap_or(0)
    }

    /// As [`Self::note_leaving`], of a look that began after so many [`Self::departures`]. What it
    /// saw may be older than what libvirt has told meanwhile. Then "it runs here" does not count,
    /// and the next look says it again.
    pub(crate) fn note_seen(&self, uuid: Uuid, leaving: bool, departures: u64) {
        let mut all = self.leaving();
        if leaving || departures == all.departures.get(&uuid).copied().unwrap_or(0) {
            all.note(uuid, leaving);
        }
    }

    pub(super) fn leaving(&self) -> MutexGuard<'_, Leaving> {
        lock(&self.leaving)
    }

    /// Whether a domain was stopped for another host, when libvirt last spoke of it. Then a dead
    /// process, or libvirt's "shut off", says nothing about the other host.
    pub(crate) fn is_leaving(&self, uuid: Uuid) -> bool {
        self.leaving().domains.contains(&uuid)
    }

    /// Whether another host speaks of a domain that is active here: it was stopped here for that
    /// host, or has not arrived yet.
    pub(crate) fn is_elsewhere(&self, uuid: Uuid) -> bool {
        self.is_leaving(uuid) || self.instance(uuid).is_some_and(|known| known.is_arriving())
    }

    /// libvirt tells that a domain was reset.
    pub(crate) fn note_reset(&self, uuid: Uuid) {
        *lock(&self.resets).entry(uuid).or_default() += 1;
        self.news.send_replace(());
    }

    /// How often a domain was seen to be reset.
    pub(crate) fn resets(&self, uuid: Uuid) -> u64 {
        lock(&self.resets).get(&uuid).copied().unwrap_or(0)
    }

    /// Waits until a domain was reset more often than `before`. `false`: it was not by `by`.
    pub(crate) async fn reset_again(&self, uuid: Uuid, before: u64, by: Instant) -> bool {
        let mut news = self.news.subscribe();
        while self.resets(uuid) <= before && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
        self.resets(uuid) > before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_from_before_a_departure_does_not_undo_it() {
        let (table, uuid) = (Table::new("qemu:///system"), Uuid::from_u128(1));
        let before = table.departures(uuid);
        table.note_leaving(uuid, true);
        table.note_seen(uuid, false, before);
        assert!(table.is_leaving(uuid));
        // Another domain's departure does not count: nothing might cause another look at this one.
        let departures = table.departures(uuid);
        table.note_leaving(Uuid::from_u128(2), true);
        table.note_seen(uuid, false, departures);
        assert!(!table.is_leaving(uuid), "it runs here again");
        table.note_seen(uuid, true, before);
        assert!(table.is_leaving(uuid));
    }
}
