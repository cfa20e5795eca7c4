//! What is known of a URI's domains, kept warm by libvirt's events, so that a fence needs no look-up before it acts.
//!
//! - Filled on every connect, after the registration for events and before the connection is used: nothing is missed in between.
//! - An event says only *which* domain: how it is now is asked anew each time (`domain::observe`). Events that are doubled, late or out of
//!   order do no harm, and there is no polling.
//! - Kept while the connection is lost: what a pidfd says is true without libvirt. So the table is good for finding a process to
//!   kill, and for saying that a domain is *on* whose process lives. That one is *off* is only ever said by a dead process or by
//!   libvirt, asked afresh.
//!
//! libvirt gives each start of a domain a new ID, which tells instances apart; after a restart of libvirtd numbers may come again, but then
//! the table is filled anew before anybody can compare.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::domain::State;
use super::victim::{Driver, Victim};
use crate::policy::Target;

/// A domain.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its name.
    pub(super) name: String,
    /// Whether it has a definition that outlives it.
    pub(super) persistent: bool,
    /// Whether it is off here because it moved to another host.
    pub(super) moved_away: bool,
    /// What runs, if it does.
    pub(super) instance: Option<Instance>,
}

impl Entry {
    /// The process that it runs as, where that is known.
    pub(super) fn victim(&self) -> Option<&Arc<Victim>> {
        self.instance.as_ref().and_then(|instance| instance.victim.as_ref())
    }
}

/// A running instance of a domain.
#[derive(Clone, Debug)]
pub(super) struct Instance {
    /// libvirt's number of it.
    pub(super) id: u32,
    /// Its state when it was last asked for.
    pub(super) state: State,
    /// Its process, where we know how to find it.
    pub(super) victim: Option<Arc<Victim>>,
}

impl Instance {
    /// Its process, if that lives.
    pub(super) fn living(&self) -> Option<&Arc<Victim>> {
        self.victim.as_ref().filter(|victim| !victim.is_dead())
    }
}

/// The domains of one URI.
pub(super) struct Table {
    /// Whose processes are looked for, if this URI's domains are processes of this host.
    pub(super) driver: Option<Driver>,
    domains: Mutex<HashMap<Uuid, Entry>>,
    /// How often each domain was seen to be reset.
    resets: Mutex<HashMap<Uuid, u64>>,
    news: watch::Sender<()>,
}

impl Table {
    /// An empty table for a URI.
    pub(super) fn new(uri: &str) -> Self {
        Self {
            driver: Driver::of(uri),
            domains: Mutex::default(),
            resets: Mutex::default(),
            news: watch::Sender::default(),
        }
    }

    fn domains(&self) -> MutexGuard<'_, HashMap<Uuid, Entry>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a domain.
    pub(super) fn get(&self, uuid: Uuid) -> Option<Entry> {
        self.domains().get(&uuid).cloned()
    }

    /// The domains that a target means: one, or none.
    pub(super) fn find(&self, target: &Target) -> Option<(Uuid, Entry)> {
        let domains = self.domains();
        let found = match target {
            Target::Uuid(uuid) => domains.get_key_value(uuid),
            Target::Name(name) => domains.iter().find(|(_, entry)| entry.name == *name),
        };
        found.map(|(uuid, entry)| (*uuid, entry.clone()))
    }

    /// All of them, if some of them are being killed and live still: libvirt cannot list its domains then.
    pub(super) fn dying(&self) -> Option<Vec<(Uuid, Entry)>> {
        let domains = self.domains();
        let is_dying = |entry: &Entry| entry.victim().is_some_and(|victim| victim.is_dying());
        let all = || domains.iter().map(|(uuid, entry)| (*uuid, entry.clone())).collect();
        domains.values().any(is_dying).then(all)
    }

    /// Enters what was observed of a domain; `None` takes it out.
    pub(super) fn put(&self, uuid: Uuid, entry: Option<Entry>) {
        match entry {
            Some(entry) => drop(self.domains().insert(uuid, entry)),
            None => drop(self.domains().remove(&uuid)),
        }
        self.news.send_replace(());
    }

    /// Everything anew.
    pub(super) fn replace(&self, all: HashMap<Uuid, Entry>) {
        *self.domains() = all;
        self.news.send_replace(());
    }

    /// Whether this very instance is dead, whatever libvirt says of it: its own process is the proof, and libvirt may take a moment to notice.
    pub(super) fn is_dead(&self, uuid: Uuid, id: Option<u32>) -> bool {
        let domains = self.domains();
        let instance = domains.get(&uuid).and_then(|entry| entry.instance.as_ref());
        instance
            .is_some_and(|known| Some(known.id) == id && known.victim.as_ref().is_some_and(|victim| victim.is_dead()))
    }

    /// Waits until libvirt no longer counts this instance as running, at most until `by`.
    pub(super) async fn forgotten(&self, uuid: Uuid, id: u32, by: Instant) {
        let mut news = self.news.subscribe();
        let counts = || self.get(uuid).and_then(|entry| entry.instance).is_some_and(|instance| instance.id == id);
        // An error means that the sender is gone, and it is ours.
        while counts() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
    }

    /// libvirt tells that a domain was reset.
    pub(super) fn note_reset(&self, uuid: Uuid) {
        *self.resets.lock().unwrap_or_else(PoisonError::into_inner).entry(uuid).or_default() += 1;
        self.news.send_replace(());
    }

    /// How often a domain was seen to be reset.
    pub(super) fn resets(&self, uuid: Uuid) -> u64 {
        self.resets.lock().unwrap_or_else(PoisonError::into_inner).get(&uuid).copied().unwrap_or(0)
    }

    /// Waits until a domain was reset more often than `before`. `false`: it was not, until `by`.
    pub(super) async fn reset_again(&self, uuid: Uuid, before: u64, by: Instant) -> bool {
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
