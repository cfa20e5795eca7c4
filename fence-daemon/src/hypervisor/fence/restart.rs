//! Starting a domain again after a reboot's off is proven, in the background.
//!
//! A pending restart belongs to its domain's lock: it is entered, attempted and removed only while that lock is held. So an `off`
//! that holds the lock and removes it knows that no attempt is under way and that none will follow. Nobody holds the lock while it pauses.
//!
//! A restart stands as long as the daemon lives. It is tried again after a pause that doubles up to a minute, and at once when its URI
//! is connected again. It ends when the domain runs, here or at another URI; when an `off` or `on` supersedes it; when the domain has
//! moved to another host; and when libvirt says twice that its definition is gone. What an earlier daemon has left has a rule of
//! its own: see [`inherit`](super::inherit).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fence_common::target::Target;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::inherit::{self, Look};
use super::outcome::Identity;
use super::pause;
use super::record::{Kept, Record};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::Inner;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::presumed;
use crate::hypervisor::libvirt::domain::{self, Source, Started};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;

/// The first pause between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(250);

/// How long a killed domain is nobody else's to start: whoever could do it elsewhere has to notice first.
pub(crate) const FRESH: Duration = Duration::from_secs(5);

/// How long libvirt may take to notice a death before it is asked to start the domain all the same.
const FORGET_WITHIN: Duration = Duration::from_millis(500);

/// A domain to be started again.
pub(crate) struct Plan {
    /// The URI's index.
    pub(crate) place: usize,
    pub(crate) domain: Identity,
    pub(crate) source: Source,
    /// The instance that was killed, where libvirt may not have noticed yet.
    pub(crate) dead: Option<u32>,
    /// When it died, if that is known.
    pub(crate) died: Option<Moment>,
    /// Its record on disk.
    pub(crate) kept: Option<Kept>,
    /// Whether another daemon has left it, which may have died before it killed.
    pub(crate) inherited: bool,
    /// Whether it is only told, and somebody has to see to it: it is too old to be carried out unasked, or its XML could not be had.
    pub(crate) held: bool,
}

impl Plan {
    fn is_for(&self, target: &Target) -> bool {
        match target {
            Target::Uuid(uuid) => self.domain.uuid == *uuid,
            Target::Name(name) => self.domain.name == *name,
        }
    }

    /// What the next daemon would need.
    fn record(&self) -> Record {
        let domain = &self.domain;
        Record::new(&domain.uri, domain.uuid, &domain.name, self.dead, self.source.xml()).of_dead(self.died)
    }

    /// Tries once, with the domain's lock held.
    pub(crate) async fn attempt(self: &Arc<Self>, inner: &Inner, deadline: &Deadline) -> Result<Started, CallError> {
        let Some(uri) = inner.uris.get(self.place) else {
            return Err(CallError::NotConnected("no such URI".to_owned()));
        };
        if !uri.table.strays(self.domain.uuid).is_empty() {
            return Err(CallError::Busy("its process runs on, although libvirt has lost it: `off` ends that"));
        }
        if !inner.settling.over(self.domain.uuid, deadline.by()).await {
            return Err(CallError::Busy("libvirt has not done with the instance before it yet"));
        }
        if let Some(dead) = self.dead.filter(|_| !uri.table.is_blind()) {
            // Only so long: libvirt's own word counts, and it is asked for next.
            let by = deadline.by().min(Instant::now() + FORGET_WITHIN);
            uri.table.forgotten(self.domain.uuid, dead, by).await;
        }
        let (plan, step, host) = (Arc::clone(self), deadline.clone(), inner.host.clone());
        let table = Arc::clone(&uri.table);
        // Not of its own URI alone: another one may have lost it, and it may run here.
        let whoms = presumed::whoms(&inner.uris, self.place, self.domain.uuid, &self.domain.name);
        uri.call(Lane::Start, deadline.by(), move |connect| {
            let nothing_lives = || whoms.iter().try_for_each(|(_, whom)| host.is_clear_of(whom));
            let xml = match &plan.source {
                Source::Definition => None,
                Source::Xml(xml) => Some(xml.as_str()),
                Source::Nothing(error) => return Err(error.clone()),
            };
            domain::start(connect, plan.domain.uuid, xml, plan.dead, &table, nothing_lives, &step)
        })
        .await
    }
}

/// A plan, and since when it stands.
struct Pending {
    plan: Arc<Plan>,
    since: Moment,
    not_before: Moment,
    attempts: u32,
    /// Why the last attempt did not start it.
    reason: Option<String>,
}

/// A pending restart, to be looked at.
pub(crate) struct Waiting {
    pub(crate) domain: Identity,
    /// Since when it stands.
    pub(crate) since: Moment,
    /// Until then it stays off.
    pub(crate) not_before: Moment,
    /// How often it was tried in vain, and why the last time.
    pub(crate) attempts: u32,
    pub(crate) reason: Option<String>,
    /// Its plan.
    pub(crate) plan: Arc<Plan>,
}

/// The pending restarts by URI index and UUID.
#[derive(Default)]
pub(crate) struct Restarts {
    pending: Mutex<HashMap<(usize, Uuid), Pending>>,
    /// Told when one is done, given up or superseded, and when no pause may be longer than until this moment, as the daemon is to end.
    news: watch::Sender<Option<Instant>>,
    /// Domains that were asked to be off while something else was being done to them, which may be a reboot that cannot kill.
    /// Since when: a reboot that is asked for later is somebody's newer wish.
    unwanted: Mutex<HashMap<Target, Instant>>,
}

impl Restarts {
    fn pending(&self) -> MutexGuard<'_, HashMap<(usize, Uuid), Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The restarts that a request for `target` is about, in the configuration's order. A transient domain that is off is known nowhere else.
    pub(crate) fn of(&self, target: &Target) -> Vec<Arc<Plan>> {
        let mut plans: Vec<_> =
            self.pending().values().map(|pending| &pending.plan).filter(|plan| plan.is_for(target)).cloned().collect();
        plans.sort_by_key(|plan| plan.place);
        plans
    }

    /// Whether the last of the domains that wait for their restart, and that a request for `target` is about, died a moment before `now`; `None` if
    /// there are none. One that has been dead for longer may have been started by somebody else, on another host.
    pub(crate) fn are_fresh(&self, target: &Target, now: Moment) -> Option<bool> {
        let pending = self.pending();
        let ours = pending.values().filter(|pending| pending.plan.is_for(target));
        ours.map(|pending| !pending.plan.held && now.since(pending.since) < FRESH).max()
    }

    /// The restart pending for a domain.
    pub(crate) fn get(&self, place: usize, uuid: Uuid) -> Option<Arc<Plan>> {
        self.pending().get(&(place, uuid)).map(|pending| Arc::clone(&pending.plan))
    }

    /// Removes a domain's restart, with its lock held: it will not be attempted any more.
    pub(crate) fn cancel(&self, place: usize, uuid: Uuid) -> bool {
        let pending = self.pending().remove(&(place, uuid));
        if let Some(kept) = pending.as_ref().and_then(|pending| pending.plan.kept.as_ref()) {
            kept.remove();
        }
        self.news.send_modify(|_| ());
        pending.is_some()
    }

    /// Whether `plan` has neither been cancelled nor replaced.
    pub(crate) fn stands(&self, plan: &Arc<Plan>) -> bool {
        self.get(plan.place, plan.domain.uuid).is_some_and(|pending| Arc::ptr_eq(&pending, plan))
    }

    fn unwanted(&self) -> MutexGuard<'_, HashMap<Target, Instant>> {
        self.unwanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody wants the domain off, and waits for his turn: what is being done to it must not end with its start. Since when that holds.
    pub(crate) fn forbid(&self, target: &Target) -> Instant {
        let now = Instant::now();
        self.unwanted().insert(target.clone(), now);
        now
    }

    /// It is off by that order, or somebody has asked for it since. What was forbidden after `by` stays so.
    pub(crate) fn permit(&self, target: &Target, by: Instant) {
        let mut unwanted = self.unwanted();
        if unwanted.get(target).is_some_and(|since| *since <= by) {
            unwanted.remove(target);
        }
    }

    /// Whether somebody has wanted the domain off since a reboot of it was asked for.
    fn is_forbidden(&self, domain: &Identity, asked: Instant) -> bool {
        let unwanted = self.unwanted();
        let targets = [Target::Uuid(domain.uuid), Target::Name(domain.name.clone())];
        targets.iter().any(|target| unwanted.get(target).is_some_and(|since| *since >= asked))
    }

    /// Waits until the restart of a domain is no longer pending, whatever became of it; at most until `by`.
    pub(crate) async fn over(&self, place: usize, uuid: Uuid, by: Instant) {
        let mut news = self.news.subscribe();
        // What is held is for somebody else to start.
        let waits = || self.get(place, uuid).is_some_and(|plan| !plan.held);
        while waits() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
    }

    /// The domains that wait for their restart.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> Vec<Identity> {
        self.pending().values().map(|pending| pending.plan.domain.clone()).collect()
    }

    /// The same, with all that is known of each.
    pub(crate) fn waits(&self) -> Vec<Waiting> {
        let told = |pending: &Pending| Waiting {
            domain: pending.plan.domain.clone(),
            since: pending.since,
            not_before: pending.not_before,
            attempts: pending.attempts,
            reason: pending.reason.clone(),
            plan: Arc::clone(&pending.plan),
        };
        self.pending().values().map(told).collect()
    }

    /// The daemon is to end: no pause of what is on no record may be longer than until `by`.
    pub(crate) fn end_pauses(&self, by: Instant) {
        self.news.send_replace(Some(by));
    }

    /// Notes that an attempt was in vain.
    fn note(&self, plan: &Arc<Plan>, reason: String) {
        if let Some(pending) = self.pending().get_mut(&(plan.place, plan.domain.uuid))
            && Arc::ptr_eq(&pending.plan, plan)
        {
            pending.attempts = pending.attempts.saturating_add(1);
            pending.reason = Some(reason);
        }
    }

    /// Waits for the next attempt: for `pause`, or until the URI is connected anew, or until `plan` no longer stands.
    pub(crate) async fn rest(&self, inner: &Inner, plan: &Arc<Plan>, pause: Duration) {
        let by = Instant::now() + pause;
        let mut news = self.news.subscribe();
        let Some(mut link) = inner.uris.get(plan.place).map(|uri| uri.state()) else { return };
        let was = link.borrow_and_update().since;
        while self.stands(plan) {
            tokio::select! {
                changed = timeout_at(by, news.changed()) => if !matches!(changed, Ok(Ok(()))) { return },
                Ok(()) = link.changed() => {
                    let now = link.borrow_and_update();
                    if now.connected && now.since != was {
                        return;
                    }
                }
            }
        }
    }

    /// Waits until `not_before`, or the end of all pauses, or until `plan` no longer stands.
    async fn pause(&self, plan: &Arc<Plan>, not_before: Moment) {
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

/// Enters `plan`, with its domain's lock held, and has it carried out once the lock is free. `asked`: when its reboot was asked for.
pub(crate) fn schedule(inner: &Arc<Inner>, mut plan: Plan, asked: Instant) {
    if inner.restarts.is_forbidden(&plan.domain, asked) {
        tracing::warn!(domain = %plan.domain, "killed for a reboot, and not started again: somebody has asked for it to be off meanwhile");
        if let Some(kept) = plan.kept {
            kept.remove();
        }
        return;
    }
    let mut reason = None;
    if let Source::Nothing(error) = &plan.source {
        tracing::error!(domain = %plan.domain, %error, "fenced, but its XML could not be had: start it by hand");
        reason = Some(format!("its XML could not be had: {error}"));
        // Told until it runs, or an `off` ends it. The next daemon could do no more.
        plan.held = true;
        if let Some(kept) = plan.kept.take() {
            kept.remove();
        }
    } else if plan.kept.is_none() {
        plan.kept = inner.records.write(&plan.record());
    }
    let (plan, now) = (Arc::new(plan), Moment::now());
    let since = plan.died.map_or(now, |died| died.min(now));
    let not_before = pause::end(inner.reboot_pause, plan.died);
    let pending = Pending { plan: Arc::clone(&plan), since, not_before, attempts: 0, reason };
    inner.restarts.pending().insert((plan.place, plan.domain.uuid), pending);
    if plan.held {
        tokio::spawn(inherit::hold(Arc::clone(inner), plan));
    } else {
        tokio::spawn(carry_out(Arc::clone(inner), plan, not_before));
    }
}

/// Tries, from `not_before` on, until the domain runs, the restart is superseded, or it is certain that it cannot run again.
async fn carry_out(inner: Arc<Inner>, plan: Arc<Plan>, not_before: Moment) {
    let begun = Instant::now();
    let left = not_before.since(Moment::now());
    if !left.is_zero() {
        tracing::info!(domain = %plan.domain, pause = ?left, "off, and to be started again after the pause");
        inner.restarts.pause(&plan, not_before).await;
    }
    if plan.inherited {
        inherit::first_round(&inner).await;
    }
    let (mut pause, mut gone) = (PAUSE_MIN, 0_u32);
    loop {
        let lock = inner.locks.uuid(plan.domain.uuid).await;
        if !inner.restarts.stands(&plan) {
            tracing::info!(domain = %plan.domain, "restart superseded by a later request");
            return;
        }
        let reason = match plan.turn(&inner, begun, &mut gone).await {
            Turn::Over => {
                inner.restarts.cancel(plan.place, plan.domain.uuid);
                return;
            }
            Turn::NotYet(reason) => reason,
        };
        drop(lock);
        tracing::warn!(domain = %plan.domain, reason, next = ?pause, "fenced, but not started again yet");
        inner.restarts.note(&plan, reason);
        inner.restarts.rest(&inner, &plan, pause).await;
        pause = (pause * 2).min(inner.limits.restart_pause);
    }
}

/// What came of an attempt.
enum Turn {
    /// There is nothing left to be done.
    Over,
    /// It is tried again; why.
    NotYet(String),
}

impl Plan {
    /// One attempt, with the domain's lock held. `gone` counts how often in a row libvirt had no definition.
    async fn turn(self: &Arc<Self>, inner: &Inner, begun: Instant, gone: &mut u32) -> Turn {
        let domain = &self.domain;
        // Nobody but us had the time to start it elsewhere after a kill that was ours and a moment ago.
        let is_ours = !self.inherited && begun.elapsed() < FRESH;
        if !is_ours {
            match inherit::look(inner, self).await {
                Look::Free => {}
                Look::Runs(there) => {
                    tracing::info!(%domain, %there, "somebody else has started it after its reboot");
                    return Turn::Over;
                }
                Look::Doubt(why) => return Turn::NotYet(why),
            }
        }
        fault::point(Point::BeforeRestart);
        // Bounded is only its beginning, not the call itself: while a start may still come into force, the lock must not be free.
        let deadline = Deadline::at(Instant::now() + inner.limits.look_up);
        let started = self.attempt(inner, &deadline).await;
        *gone = if matches!(started, Ok(Started::Gone)) { gone.saturating_add(1) } else { 0 };
        Turn::NotYet(match started {
            Ok(Started::Now(state)) => {
                fault::point(Point::AfterRestart);
                tracing::info!(%domain, %state, took = ?begun.elapsed(), "started again after its reboot");
                return Turn::Over;
            }
            Ok(Started::Already(state)) => {
                tracing::info!(%domain, %state, "somebody else started it again after its reboot");
                return Turn::Over;
            }
            Ok(Started::NotActive) => "started, but it is not running".to_owned(),
            Ok(Started::MovedAway) => {
                tracing::warn!(%domain, "not started again after its reboot: it has moved to another host since");
                return Turn::Over;
            }
            // Twice, since whoever changes a definition may take it away first.
            Ok(Started::Gone) if matches!(self.source, Source::Definition) && *gone > 1 => {
                tracing::error!(%domain, "fenced, and not started again: its definition is gone; define it and start it by hand");
                return Turn::Over;
            }
            Ok(Started::Gone) => "its definition is gone".to_owned(),
            Ok(Started::NotYet) if self.inherited && inner.lives_on(self) => {
                tracing::info!(%domain, "it was never killed, and runs on");
                return Turn::Over;
            }
            Ok(Started::NotYet) => "libvirt has not noticed yet that it is dead".to_owned(),
            Err(error) => error.to_string(),
        })
    }
}
