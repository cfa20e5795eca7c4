//! The pending restarts: the domains that were killed for a reboot and do not run again yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fence_common::sync::lock;
use fence_common::target::Target;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{Record, RecordFile, Source};
use crate::clock::Moment;
use crate::hypervisor::known::Identity;

/// How long after its kill a domain is nobody else's to start. Another host has to notice first.
pub(crate) const FRESH: Duration = Duration::from_secs(5);

/// A domain to be started again.
pub(crate) struct Plan {
    /// The URI's index.
    pub(crate) index: usize,
    pub(crate) domain: Identity,
    pub(crate) source: Source,
    /// The instance that was killed, if libvirt may not have noticed yet.
    pub(crate) dead: Option<u32>,
    /// When it died, if that is known.
    pub(crate) died: Option<Moment>,
    /// Its record on disk.
    pub(crate) kept: Option<RecordFile>,
    /// Whether an earlier daemon has left it. That one may have died before it killed.
    pub(crate) inherited: bool,
    /// Whether it is only reported, and somebody has to see to it: it is too old to be carried out
    /// unasked, or its XML could not be had.
    pub(crate) held: bool,
}

impl Plan {
    fn is_for(&self, target: &Target) -> bool {
        match target {
            Target::Uuid(uuid) => self.domain.uuid == *uuid,
            Target::Name(name) => self.domain.name == *name,
        }
    }

    /// The plan is not to be carried out: removes its record.
    pub(super) fn forget(&self) {
        if let Some(kept) = &self.kept {
            kept.remove();
        }
    }

    /// What the next daemon would need.
    pub(super) fn record(&self) -> Record {
        let domain = &self.domain;
        Record::new(&domain.uri, domain.uuid, &domain.name, self.dead, self.source.xml()).of_dead(self.died)
    }
}

/// A pending restart.
#[derive(Clone)]
pub(crate) struct Pending {
    pub(crate) plan: Arc<Plan>,
    /// Since when it is pending.
    pub(crate) since: Moment,
    /// Until then the domain stays off.
    pub(crate) not_before: Moment,
    /// How often it was tried in vain.
    pub(crate) attempts: u32,
    /// Why the last attempt did not start it.
    pub(crate) reason: Option<String>,
}

/// The pending restarts by URI index and UUID.
#[derive(Default)]
pub(crate) struct Restarts {
    pending: Mutex<HashMap<(usize, Uuid), Pending>>,
    /// Tells that a restart is done, given up or superseded. Its value: the daemon is to end, and
    /// no pause may be longer than until this moment.
    pub(super) news: watch::Sender<Option<Instant>>,
    /// Domains that an off was requested for while another order was carried out, which may be a
    /// reboot that cannot kill. Since when: a reboot that is requested later is a newer wish.
    unwanted: Mutex<HashMap<Target, Instant>>,
    /// How many orders wait for a domain's lock to power it off. A start that holds the lock is to
    /// make way.
    waiting: Mutex<HashMap<Target, usize>>,
}

/// An order that waits for a domain's lock to power it off.
pub(super) struct Overtaking<'a> {
    restarts: &'a Restarts,
    target: &'a Target,
}

impl Drop for Overtaking<'_> {
    fn drop(&mut self) {
        let mut waiting = lock(&self.restarts.waiting);
        match waiting.get_mut(self.target) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) | None => drop(waiting.remove(self.target)),
        }
    }
}

impl Restarts {
    fn pending(&self) -> MutexGuard<'_, HashMap<(usize, Uuid), Pending>> {
        lock(&self.pending)
    }

    /// The restarts that a request for `target` is about, in the configuration's order. A transient
    /// domain that is off is known nowhere else.
    pub(crate) fn of(&self, target: &Target) -> Vec<Arc<Plan>> {
        let mut plans: Vec<_> =
            self.pending().values().map(|pending| &pending.plan).filter(|plan| plan.is_for(target)).cloned().collect();
        plans.sort_by_key(|plan| plan.index);
        plans
    }

    /// Whether one of the pending restarts that a request for `target` is about began a moment
    /// before `now`. `None`: there are none. A domain that has been dead for longer may have been
    /// started on another host.
    pub(crate) fn are_fresh(&self, target: &Target, now: Moment) -> Option<bool> {
        let pending = self.pending();
        let ours = pending.values().filter(|pending| pending.plan.is_for(target));
        ours.map(|pending| !pending.plan.held && now.since(pending.since) < FRESH).max()
    }

    /// The restart pending for a domain.
    pub(crate) fn get(&self, index: usize, uuid: Uuid) -> Option<Arc<Plan>> {
        self.pending().get(&(index, uuid)).map(|pending| Arc::clone(&pending.plan))
    }

    /// All of them, the oldest first.
    pub(crate) fn all(&self) -> Vec<Pending> {
        let mut all: Vec<_> = self.pending().values().cloned().collect();
        all.sort_by_key(|pending| pending.since);
        all
    }

    /// Enters a restart, with its domain's lock held.
    pub(super) fn enter(&self, pending: Pending) {
        let key = (pending.plan.index, pending.plan.domain.uuid);
        self.pending().insert(key, pending);
    }

    /// Removes a domain's restart, with its lock held: no attempt follows.
    pub(crate) fn cancel(&self, index: usize, uuid: Uuid) {
        let pending = self.pending().remove(&(index, uuid));
        if let Some(pending) = pending {
            pending.plan.forget();
        }
        self.news.send_modify(|_| ());
    }

    /// Whether `plan` has neither been cancelled nor replaced.
    pub(super) fn stands(&self, plan: &Arc<Plan>) -> bool {
        self.get(plan.index, plan.domain.uuid).is_some_and(|pending| Arc::ptr_eq(&pending, plan))
    }

    /// A request wants the domain off, and waits for its turn. What is being done to the domain
    /// must not end with its start. Returns since when that holds.
    pub(crate) fn forbid(&self, target: &Target) -> Instant {
        let now = Instant::now();
        lock(&self.unwanted).insert(target.clone(), now);
        now
    }

    /// The domain is off by that request, or a newer one wants it on. A later [`Self::forbid`]
    /// stands.
    pub(crate) fn permit(&self, target: &Target, by: Instant) {
        let mut unwanted = lock(&self.unwanted);
        if unwanted.get(target).is_some_and(|since| *since <= by) {
            unwanted.remove(target);
        }
    }

    /// An order waits for its turn to power the domain off, as long as the result is kept.
    pub(super) fn wait<'a>(&'a self, target: &'a Target) -> Overtaking<'a> {
        *lock(&self.waiting).entry(target.clone()).or_default() += 1;
        self.news.send_modify(|_| ());
        Overtaking { restarts: self, target }
    }

    /// Whether a start of the domain is to make way: an order that is newer than `requested` wants
    /// the domain off.
    pub(super) fn is_overtaken(&self, domain: &Identity, requested: Instant) -> bool {
        self.is_waited_for(domain) || self.is_forbidden(domain, requested)
    }

    /// Whether an order waits for its turn to power the domain off.
    pub(super) fn is_waited_for(&self, domain: &Identity) -> bool {
        let waiting = lock(&self.waiting);
        [Target::Uuid(domain.uuid), Target::Name(domain.name.clone())].iter().any(|target| waiting.contains_key(target))
    }

    /// Whether a request has wanted the domain off since a reboot of it was requested.
    pub(super) fn is_forbidden(&self, domain: &Identity, requested: Instant) -> bool {
        let unwanted = lock(&self.unwanted);
        let targets = [Target::Uuid(domain.uuid), Target::Name(domain.name.clone())];
        targets.iter().any(|target| unwanted.get(target).is_some_and(|since| *since >= requested))
    }

    /// Waits until the restart of a domain is no longer pending, however it ends; at most until
    /// `by`.
    pub(crate) async fn over(&self, index: usize, uuid: Uuid, by: Instant) {
        let mut news = self.news.subscribe();
        // A held restart is for somebody else to start.
        let waits = || self.get(index, uuid).is_some_and(|plan| !plan.held);
        while waits() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
    }

    /// The daemon is to end. No pause of a restart without a record may be longer than until `by`.
    pub(crate) fn end_pauses(&self, by: Instant) {
        self.news.send_replace(Some(by));
    }

    /// Notes that an attempt was in vain.
    pub(super) fn note(&self, plan: &Arc<Plan>, reason: String) {
        if let Some(pending) = self.pending().get_mut(&(plan.index, plan.domain.uuid))
            && Arc::ptr_eq(&pending.plan, plan)
        {
            pending.attempts = pending.attempts.saturating_add(1);
            pending.reason = Some(reason);
        }
    }

    /// Waits until `not_before`, or the end of all pauses, or until `plan` no longer stands.
    pub(super) async fn pause(&self, plan: &Arc<Plan>, not_before: Moment) {
        let end = Instant::now() + not_before.since(Moment::now());
        let mut news = self.news.subscribe();
        loop {
            let last = (*news.borrow_and_update()).filter(|_| plan.kept.is_none());
            let by = last.map_or(end, |last| last.min(end));
            if !self.stands(plan) || !matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {
                return;
            }
        }
    }
}
