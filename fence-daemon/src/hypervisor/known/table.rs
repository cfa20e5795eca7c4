//! What is known of a URI's domains, kept warm by libvirt's events, so that a fence needs no look-up before it acts.
//!
//! - Filled on every connect, after the registration for events, one domain at a time: one that libvirt does not answer about costs the
//!   others nothing, and what is not in the table yet is looked up.
//! - An event says only *which* domain: how it is now is asked anew each time (`domain::observe`). Events that are doubled, late or out of
//!   order do no harm, and there is no polling.
//! - Where libvirt tells no events the table is *blind*: all domains are looked at every few seconds, and
//!   those that a request is about right before its table is used (`events::refresh`).
//! - Kept while the connection is lost: what a pidfd says is true without libvirt. So the table is good for finding a process to
//!   kill, and for saying that a domain is *on* whose process lives. That one is *off* is only ever said by a dead process or by
//!   libvirt, asked afresh.
//!
//! libvirt gives each start of a domain a new ID, which tells instances apart as long as libvirtd lives. Its numbers may come again after
//! that, so what was observed over an earlier connection is compared with nothing.
//!
//! libvirtd can lose a domain that runs on: when it is restarted and cannot read its own record of it. A process that was a domain's and lives is
//! therefore not let go of when libvirt stops speaking of it (a *stray*): as long as it lives the domain is not off.

mod words;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fence_common::target::Target;
use fence_net::neighbour::Mac;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::deaths::Deaths;
use super::last_words::Recalled;
use super::stale::Unnoticed;
use crate::hypervisor::libvirt::domain::State;
use crate::hypervisor::libvirt::link::Told;
use crate::hypervisor::process::host::{Belongings, Disks, Running};
use crate::hypervisor::process::victim::{Driver, Job, Victim};

/// A domain.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Its name.
    pub(crate) name: String,
    /// Whether it has a definition that outlives it.
    pub(crate) persistent: bool,
    /// Whether it is off here because it moved to another host.
    pub(crate) moved_away: bool,
    /// What runs, if it does.
    pub(crate) instance: Option<Instance>,
    /// The Ethernet addresses of its interfaces while it runs, as far as its XML tells.
    pub(crate) macs: Arc<[Mac]>,
    /// Over which connection that was observed.
    pub(crate) generation: u64,
}

impl Entry {
    /// The process that it runs as, where that is known.
    pub(crate) fn victim(&self) -> Option<&Arc<Victim>> {
        self.instance.as_ref().and_then(|instance| instance.victim.as_ref())
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

    /// Whether it is on its way here from another host, where it runs still. (It does not run here until it has arrived, and libvirt's record need
    /// not be read of one that does.)
    pub(crate) fn is_arriving(&self) -> bool {
        u32::from(self.state.0) == virt_sys::VIR_DOMAIN_PAUSED
            && self.living().is_some_and(|victim| victim.job() == Job::Arriving)
    }
}

/// See [`Table::note_leaving`].
#[derive(Debug, Default)]
struct Leaving {
    domains: HashSet<Uuid>,
    /// How often each was noted.
    departures: HashMap<Uuid, u64>,
}

impl Leaving {
    fn note(&mut self, uuid: Uuid, leaving: bool) {
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
    /// Whose processes are looked for, if this URI's domains are processes of this host.
    pub(crate) driver: Option<Driver>,
    domains: Mutex<HashMap<Uuid, Entry>>,
    /// Processes that were domains' and that libvirt no longer speaks of.
    strays: Mutex<HashMap<Uuid, Vec<Arc<Victim>>>>,
    /// Whether every domain was seen that libvirt had once.
    filled: AtomicBool,
    /// Whether libvirt tells nothing of what happens to domains: then this table is a while behind.
    blind: AtomicBool,
    /// Whether libvirt tells that a domain was reset.
    told_of_resets: AtomicBool,
    /// What the domains have beside their processes.
    pub(crate) belongings: Arc<Belongings>,
    /// The number of the present connection.
    generation: AtomicU64,
    /// How often each domain was seen to be reset.
    resets: Mutex<HashMap<Uuid, u64>>,
    /// Domains that were stopped here for another host to go on with them. If one is off after that, it may run there.
    leaving: Mutex<Leaving>,
    /// Dead instances that libvirt calls active still.
    pub(crate) unnoticed: Unnoticed,
    /// The XML of transient domains that run, with their secrets: in memory only, wiped when it goes, and never shown.
    xmls: Mutex<HashMap<Uuid, Arc<Zeroizing<String>>>>,
    /// What was seen to die.
    pub(crate) deaths: Deaths,
    /// What an earlier daemon knew, of domains that this one has not seen yet.
    pub(crate) recalled: Recalled,
    news: watch::Sender<()>,
}

impl Table {
    /// An empty table for a URI.
    pub(crate) fn new(uri: &str) -> Self {
        Self {
            driver: Driver::of(uri),
            domains: Mutex::default(),
            strays: Mutex::default(),
            filled: AtomicBool::new(false),
            blind: AtomicBool::new(false),
            told_of_resets: AtomicBool::new(false),
            belongings: Arc::default(),
            generation: AtomicU64::new(0),
            resets: Mutex::default(),
            leaving: Mutex::default(),
            unnoticed: Unnoticed::default(),
            xmls: Mutex::default(),
            deaths: Deaths::default(),
            recalled: Recalled::default(),
            news: watch::Sender::default(),
        }
    }

    fn domains(&self) -> MutexGuard<'_, HashMap<Uuid, Entry>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a domain.
    pub(crate) fn get(&self, uuid: Uuid) -> Option<Entry> {
        self.domains().get(&uuid).cloned()
    }

    /// The domains that a target means: one, or none.
    pub(crate) fn find(&self, target: &Target) -> Option<(Uuid, Entry)> {
        let domains = self.domains();
        let found = match target {
            Target::Uuid(uuid) => domains.get_key_value(uuid),
            Target::Name(name) => domains.iter().find(|(_, entry)| entry.name == *name),
        };
        found.map(|(uuid, entry)| (*uuid, entry.clone()))
    }

    /// All of them, if some of them are being killed and live still: libvirt cannot list its domains then.
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

    /// The domains that run and have an interface with this Ethernet address.
    pub(crate) fn running_with(&self, mac: Mac) -> Vec<Uuid> {
        let runs = |entry: &Entry| {
            let lives = |known: &Instance| known.victim.is_none() || known.living().is_some();
            entry.macs.contains(&mac) && entry.instance.as_ref().is_some_and(lives)
        };
        self.domains().iter().filter(|(_, entry)| runs(entry)).map(|(uuid, _)| *uuid).collect()
    }

    /// All UUIDs that are known, or were to an earlier daemon.
    pub(crate) fn uuids(&self) -> Vec<Uuid> {
        let known: Vec<_> = self.domains().keys().copied().collect();
        known.into_iter().chain(self.recalled.all().into_iter().map(|(uuid, _)| uuid)).collect()
    }

    /// Whether libvirt tells nothing of what happens to domains. What this table says has to be looked at afresh then.
    pub(crate) fn is_blind(&self) -> bool {
        self.blind.load(Ordering::Acquire)
    }

    /// Whether libvirt would tell that a domain was reset.
    pub(crate) fn is_told_of_resets(&self) -> bool {
        self.told_of_resets.load(Ordering::Acquire)
    }

    /// Every domain was seen that libvirt has.
    pub(crate) fn note_filled(&self) {
        self.filled.store(true, Ordering::Release);
    }

    /// Whether every domain was seen that libvirt had, over this connection or an earlier one of this daemon's.
    pub(crate) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Tells when something has changed.
    pub(crate) fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// Enters what was observed of a domain; `None` takes it out.
    pub(crate) fn put(&self, uuid: Uuid, entry: Option<Entry>) {
        let now = entry.as_ref().and_then(Entry::victim).map(|victim| victim.pid());
        self.recalled.forget(uuid);
        self.deaths.observe(uuid, entry.as_ref());
        let old = match entry {
            Some(entry) => self.domains().insert(uuid, entry),
            None => self.domains().remove(&uuid),
        };
        // What lives is not let go of, whatever libvirt says.
        let lost = old.as_ref().and_then(Entry::victim).filter(|victim| !victim.is_dead());
        // Two that live and have one number are one process.
        if let Some(lost) = lost.filter(|lost| Some(lost.pid()) != now) {
            let mut strays = self.strays.lock().unwrap_or_else(PoisonError::into_inner);
            strays.entry(uuid).or_default().push(Arc::clone(lost));
        }
        self.news.send_replace(());
    }

    /// Notes the XML of a transient domain that runs; `None` of one that does not.
    pub(crate) fn note_xml(&self, uuid: Uuid, xml: Option<Arc<Zeroizing<String>>>) {
        let mut xmls = self.xmls.lock().unwrap_or_else(PoisonError::into_inner);
        match xml {
            Some(xml) => drop(xmls.insert(uuid, xml)),
            None => drop(xmls.remove(&uuid)),
        }
    }

    /// The XML of a transient domain, as it was when libvirt last spoke of it.
    pub(crate) fn xml(&self, uuid: Uuid) -> Option<Arc<Zeroizing<String>>> {
        self.xmls.lock().unwrap_or_else(PoisonError::into_inner).get(&uuid).cloned()
    }

    /// The processes of a domain that live although libvirt no longer speaks of them.
    pub(crate) fn strays(&self, uuid: Uuid) -> Vec<Arc<Victim>> {
        let mut strays = self.strays.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(of_domain) = strays.get_mut(&uuid) else { return Vec::new() };
        of_domain.retain(|victim| !victim.is_dead());
        let living = of_domain.clone();
        if living.is_empty() {
            strays.remove(&uuid);
        }
        living
    }

    /// All of them, of domains that are not in the table any more.
    pub(crate) fn lost(&self) -> Vec<(Uuid, Vec<Arc<Victim>>)> {
        let known = self.uuids();
        let strays = self.strays.lock().unwrap_or_else(PoisonError::into_inner);
        let lost: Vec<_> = strays.iter().filter(|(uuid, _)| !known.contains(uuid)).map(|(uuid, _)| *uuid).collect();
        drop(strays);
        lost.into_iter().map(|uuid| (uuid, self.strays(uuid))).filter(|(_, strays)| !strays.is_empty()).collect()
    }

    /// Notes what a domain has beside its process, as it was observed.
    pub(crate) fn observe_belongings(&self, uuid: Uuid, entry: Option<&Entry>, disks: Option<Disks>) {
        let Some(entry) = entry else { return self.belongings.forget(uuid) };
        let instance = entry.instance.as_ref().filter(|_| self.driver == Some(Driver::Qemu));
        let running = instance.and_then(|known| Some(Running { id: known.id, pid: known.living()?.pid() }));
        self.belongings.observe(uuid, &entry.name, running, disks, entry.generation);
    }

    /// Right before a domain's process is killed: notes what may outlive it.
    ///
    /// # Errors
    /// We may not look into the process.
    pub(crate) fn note_kill(&self, uuid: Uuid, victim: &Victim) -> io::Result<()> {
        match self.driver {
            Some(Driver::Qemu) => self.belongings.note_kill(uuid, victim.pid()),
            Some(Driver::Lxc) | None => Ok(()),
        }
    }

    /// A new connection is there: what was observed over an earlier one is not compared with what is observed over this one.
    pub(crate) fn begin_generation(&self, told: Told) {
        self.blind.store(!told.changes, Ordering::Release);
        self.told_of_resets.store(told.resets, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// The number of the present connection.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether this very instance is dead, whatever libvirt says of it: its own process is the proof, and libvirt may take a moment to notice.
    pub(crate) fn is_dead(&self, uuid: Uuid, id: Option<u32>) -> bool {
        let domains = self.domains();
        let is_it = |entry: &Entry, known: &Instance| Some(known.id) == id && entry.generation == self.generation();
        let dead = |known: &Instance| known.victim.as_ref().is_some_and(|victim| victim.is_dead());
        domains
            .get(&uuid)
            .is_some_and(|entry| entry.instance.as_ref().is_some_and(|known| is_it(entry, known) && dead(known)))
    }

    /// The instance of a domain that is dead by its own process, and not known to be gone yet.
    pub(crate) fn dead_instance(&self, uuid: Uuid) -> Option<u32> {
        let instance = self.get(uuid)?.instance?;
        self.is_dead(uuid, Some(instance.id)).then_some(instance.id)
    }

    /// Waits until libvirt no longer counts this instance as running, at most until `by`.
    pub(crate) async fn forgotten(&self, uuid: Uuid, id: u32, by: Instant) {
        let mut news = self.news.subscribe();
        let counts = || self.get(uuid).and_then(|entry| entry.instance).is_some_and(|instance| instance.id == id);
        // An error means that the sender is gone, and it is ours.
        while counts() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
    }

    /// Notes whether a domain was stopped here for another host to go on with it. It was not (any more) when it runs here, and when it was
    /// destroyed here with no migration under way.
    pub(crate) fn note_leaving(&self, uuid: Uuid, leaving: bool) {
        self.leaving().note(uuid, leaving);
        if leaving {
            self.deaths.forget(uuid);
        }
        self.news.send_replace(());
    }

    /// To be taken before a look, for [`Self::note_seen`] after it.
    pub(crate) fn departures(&self, uuid: Uuid) -> u64 {
        self.leaving().departures.get(&uuid).copied().unwrap_or(0)
    }

    /// As [`Self::note_leaving`], of a look that began after so many [`Self::departures`]. What it saw may be older than what libvirt has told
    /// meanwhile: that a domain runs here does not count then, and the next look will say it again.
    pub(crate) fn note_seen(&self, uuid: Uuid, leaving: bool, departures: u64) {
        let mut all = self.leaving();
        if leaving || departures == all.departures.get(&uuid).copied().unwrap_or(0) {
            all.note(uuid, leaving);
        }
    }

    fn leaving(&self) -> MutexGuard<'_, Leaving> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was, when libvirt last spoke of it: that its process is dead, or that libvirt calls it shut off, says nothing about the other
    /// host then.
    pub(crate) fn is_leaving(&self, uuid: Uuid) -> bool {
        self.leaving().domains.contains(&uuid)
    }

    /// Whether a domain that is active here is another host's to speak of: it was stopped here for that one, or has not arrived yet.
    pub(crate) fn is_elsewhere(&self, uuid: Uuid) -> bool {
        let arrives = || self.get(uuid).and_then(|entry| entry.instance).is_some_and(|known| known.is_arriving());
        self.is_leaving(uuid) || arrives()
    }

    /// libvirt tells that a domain was reset.
    pub(crate) fn note_reset(&self, uuid: Uuid) {
        *self.resets.lock().unwrap_or_else(PoisonError::into_inner).entry(uuid).or_default() += 1;
        self.news.send_replace(());
    }

    /// How often a domain was seen to be reset.
    pub(crate) fn resets(&self, uuid: Uuid) -> u64 {
        self.resets.lock().unwrap_or_else(PoisonError::into_inner).get(&uuid).copied().unwrap_or(0)
    }

    /// Waits until a domain was reset more often than `before`. `false`: it was not, until `by`.
    pub(crate) async fn reset_again(&self, uuid: Uuid, before: u64, by: Instant) -> bool {
        let mut news = self.news.subscribe();
        loop {
            if self.resets(uuid) > before {
                return true;
            }
            if !matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {
                return self.resets(uuid) > before;
            }
        }
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
        // Another one's departure is no matter: nothing might happen to this one for it to be looked at again.
        let departures = table.departures(uuid);
        table.note_leaving(Uuid::from_u128(2), true);
        table.note_seen(uuid, false, departures);
        assert!(!table.is_leaving(uuid), "it runs here again");
        table.note_seen(uuid, true, before);
        assert!(table.is_leaving(uuid));
    }
}
