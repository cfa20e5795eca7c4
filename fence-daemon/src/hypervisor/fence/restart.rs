//! Starting a domain again in the background, after a reboot's off is proven.
//!
//! A pending restart belongs to its domain's lock: it is entered, attempted and removed only while
//! that lock is held. So an `off` that holds the lock and removes it knows that no attempt is under
//! way and that none follows. The lock is free while a restart pauses.
//!
//! A restart stands as long as the daemon lives. It is tried again after a pause that doubles up to
//! a minute, and at once when its URI is connected again. It ends when
//!
//! - the domain runs, here or at another URI;
//! - an `off` or `on` supersedes it;
//! - the domain has moved to another host;
//! - libvirt says twice that its definition is gone.
//!
//! A restart that an earlier daemon has left has its own rule: see [`inherit`](super::inherit).

use std::sync::Arc;
use std::time::Duration;

use fence_common::sync::Current;
use fence_config::Options;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use super::inherit::{self, RunsWhere};
use super::{FRESH, Locks, Pending, Plan, Records, Restarts, Settling, Source, Started, pause, start};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::Known;
use crate::hypervisor::libvirt::{CallError, Domain, Lane};

/// The first pause between attempts.
const ATTEMPT_PAUSE_MIN: Duration = Duration::from_millis(250);

/// How long libvirt may take to notice a death before it is asked to start the domain all the same.
const FORGET_WITHIN: Duration = Duration::from_millis(500);

/// Carries restarts out.
pub(crate) struct Restarter {
    pub(crate) known: Arc<Known>,
    pub(crate) restarts: Arc<Restarts>,
    pub(crate) records: Records,
    pub(crate) locks: Arc<Locks>,
    pub(crate) settling: Arc<Settling>,
    /// How long a domain stays off in a reboot, at least.
    pub(crate) options: Current<Options>,
    /// The longest pause between two attempts.
    pub(crate) attempt_pause_max: Duration,
}

/// What came of an attempt.
enum Attempt {
    /// Nothing is left to be done.
    Over,
    /// It is tried again: why.
    NotYet(String),
}

impl Restarter {
    /// Enters `plan`, with its domain's lock held, and has it carried out once the lock is free.
    /// `requested`: when its reboot was requested.
    pub(crate) fn schedule(self: &Arc<Self>, mut plan: Plan, requested: Instant) {
        if self.restarts.is_forbidden(&plan.domain, requested) {
            tracing::warn!(domain = %plan.domain, "killed for a reboot, and not started again: an off was requested meanwhile");
            return plan.forget();
        }
        let mut reason = None;
        if let Source::Nothing(error) = &plan.source {
            tracing::error!(domain = %plan.domain, %error, "fenced, but its XML could not be had: start it by hand");
            reason = Some(format!("its XML could not be had: {error}"));
            // Reported until it runs, or an `off` ends it. The next daemon could do no more.
            plan.held = true;
            plan.forget();
            plan.kept = None;
        } else if plan.kept.is_none() {
            plan.kept = self.records.write(&plan.record());
        }
        let (plan, now) = (Arc::new(plan), Moment::now());
        let since = plan.died.map_or(now, |died| died.min(now));
        let not_before = pause::end(self.options.now().reboot_pause, plan.died);
        self.restarts.enter(Pending { plan: Arc::clone(&plan), since, not_before, attempts: 0, reason });
        let restarter = Arc::clone(self);
        if plan.held {
            tokio::spawn(async move { restarter.hold(plan).await });
        } else {
            tokio::spawn(async move { restarter.carry_out(plan, requested, not_before).await });
        }
    }

    /// Tries, from `not_before` on, until the domain runs, the restart is superseded, or it is
    /// certain that the domain cannot run again. `requested`: when its reboot was requested.
    async fn carry_out(&self, plan: Arc<Plan>, requested: Instant, not_before: Moment) {
        let begun = Instant::now();
        let left = not_before.since(Moment::now());
        if !left.is_zero() {
            tracing::info!(domain = %plan.domain, pause = ?left, "off, and to be started again after the pause");
            self.restarts.pause(&plan, not_before).await;
        }
        if plan.inherited {
            inherit::first_round(&self.known).await;
        }
        let (mut pause, mut gone) = (ATTEMPT_PAUSE_MIN, 0_u32);
        loop {
            let lock = self.locks.uuid(plan.domain.uuid).await;
            if !self.restarts.stands(&plan) {
                tracing::info!(domain = %plan.domain, "restart superseded by a later request");
                return;
            }
            if self.restarts.is_waited_for(&plan.domain) && self.restarts.is_forbidden(&plan.domain, requested) {
                // That off ends the restart itself, and says so.
                drop(lock);
                self.rest(&plan, pause).await;
                continue;
            }
            if self.restarts.is_forbidden(&plan.domain, requested) {
                tracing::warn!(domain = %plan.domain, "killed for a reboot, and not started again: an off was requested meanwhile");
                return self.restarts.cancel(plan.index, plan.domain.uuid);
            }
            let reason = match self.attempt(&plan, requested, begun, &mut gone).await {
                Attempt::Over => return self.restarts.cancel(plan.index, plan.domain.uuid),
                Attempt::NotYet(reason) => reason,
            };
            drop(lock);
            tracing::warn!(domain = %plan.domain, reason, next = ?pause, "fenced, but not started again yet");
            self.restarts.note(&plan, reason);
            self.rest(&plan, pause).await;
            pause = (pause * 2).min(self.attempt_pause_max);
        }
    }

    /// Waits for the next attempt: for `pause`, or until the URI is connected again, or until
    /// `plan` no longer stands.
    pub(super) async fn rest(&self, plan: &Arc<Plan>, pause: Duration) {
        let by = Instant::now() + pause;
        let mut news = self.restarts.news.subscribe();
        let Some(mut link) = self.known.uris.get(plan.index).map(|uri| uri.state()) else { return };
        let was = link.borrow_and_update().since;
        while self.restarts.stands(plan) {
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

    /// One attempt, with the domain's lock held. `gone` counts how often in a row libvirt had no
    /// definition.
    async fn attempt(&self, plan: &Arc<Plan>, requested: Instant, begun: Instant, gone: &mut u32) -> Attempt {
        let domain = &plan.domain;
        // A moment after our own kill nobody else had the time to start it elsewhere.
        if plan.inherited || begun.elapsed() >= FRESH {
            match inherit::look(&self.known, plan).await {
                RunsWhere::Free => {}
                RunsWhere::Runs(there) => {
                    tracing::info!(%domain, %there, "somebody else has started it after its reboot");
                    return Attempt::Over;
                }
                RunsWhere::Doubt(why) => return Attempt::NotYet(why),
            }
        }
        fault::point(Point::BeforeRestart);
        // Only the start of the call is bounded. Once begun it may still take effect, and the lock
        // must not be free until then.
        let deadline = Deadline::at(Instant::now() + self.known.look_up);
        let started = self.start(plan, requested, true, &deadline).await;
        *gone = if matches!(started, Ok(Started::Gone)) { gone.saturating_add(1) } else { 0 };
        Attempt::NotYet(match started {
            Ok(Started::Now(state)) => {
                fault::point(Point::AfterRestart);
                tracing::info!(%domain, %state, took = ?begun.elapsed(), "started again after its reboot");
                return Attempt::Over;
            }
            Ok(Started::Already(state)) => {
                tracing::info!(%domain, %state, "somebody else started it again after its reboot");
                return Attempt::Over;
            }
            Ok(Started::NotActive) => "started, but it is not running".to_owned(),
            Ok(Started::MovedAway) => {
                tracing::warn!(%domain, "not started again after its reboot: it has moved to another host since");
                return Attempt::Over;
            }
            // Twice, since a change of the definition may take it away first.
            Ok(Started::Gone) if matches!(plan.source, Source::Definition) && *gone > 1 => {
                tracing::error!(%domain, "fenced, and not started again: its definition is gone; define it and start it by hand");
                return Attempt::Over;
            }
            Ok(Started::Gone) => "its definition is gone".to_owned(),
            Ok(Started::NotYet) if plan.inherited && self.lives_on(plan) => {
                tracing::info!(%domain, "it was never killed, and runs on");
                return Attempt::Over;
            }
            Ok(Started::NotYet) => "libvirt has not noticed yet that it is dead".to_owned(),
            Err(error) => error.to_string(),
        })
    }

    /// Starts the domain of a plan once, with its lock held. An order that came after `requested`
    /// and wants the domain off cuts the start short. `is_owed`: a reboot has killed it, and nobody
    /// has asked for more.
    pub(super) async fn start(
        &self,
        plan: &Arc<Plan>,
        requested: Instant,
        is_owed: bool,
        deadline: &Deadline,
    ) -> Result<Started, CallError> {
        let Some(uri) = self.known.uris.get(plan.index) else {
            return Err(CallError::NotConnected("no such URI".to_owned()));
        };
        let uuid = plan.domain.uuid;
        if !uri.table.orphans(uuid).is_empty() {
            return Err(CallError::Busy("its process runs on, although libvirt has lost it: `off` ends that"));
        }
        if !self.settling.over(uuid, deadline.by()).await {
            return Err(CallError::Busy("a call to libvirt about the instance before it is still under way"));
        }
        if let Some(dead) = plan.dead.filter(|_| !uri.table.is_blind()) {
            // Only so long: libvirt's own word counts, and it is asked for next.
            let by = deadline.by().min(Instant::now() + FORGET_WITHIN);
            uri.table.forgotten(uuid, dead, by).await;
        }
        let (domain, step, host) = (plan.domain.clone(), deadline.clone(), self.known.host.clone());
        let plan = Arc::clone(plan);
        let (table, runtime) = (Arc::clone(&uri.table), Handle::current());
        // Not only of its own URI: another one may have lost it, and it may run here.
        let whoms = self.known.whoms(plan.index, uuid, &plan.domain.name);
        let call = uri.call(Lane::Start, deadline.by(), move |connect| {
            let nothing_lives = || {
                whoms
                    .iter()
                    .try_for_each(|(_, whom)| runtime.block_on(host.is_clear_of(whom)).map_err(CallError::Lives))
            };
            let xml = match &plan.source {
                Source::Definition => None,
                Source::Xml(xml) => Some(xml.as_str()),
                Source::Nothing(error) => return Err(error.clone()),
            };
            let owed = is_owed.then(|| table.appearances.owed_start(uuid));
            let started = start::start(connect, uuid, xml, plan.dead, &table, nothing_lives, &step)?;
            if let (Started::Now(_), Some(owed)) = (&started, owed) {
                owed.end(Domain::find(connect, uuid).ok().flatten().and_then(|domain| domain.id()));
            }
            Ok(started)
        });
        self.unless_overtaken(uri, &domain, (requested, is_owed), deadline, call).await
    }

    /// Whether the instance of a plan still lives: by its own process if that is known, else by
    /// libvirt's word that it is active.
    pub(super) fn lives_on(&self, plan: &Plan) -> bool {
        let Some(uri) = self.known.uris.get(plan.index) else { return false };
        let instance = uri.table.instance(plan.domain.uuid).filter(|known| Some(known.id) == plan.dead);
        // Killed and not dead yet: it must come back when it is dead.
        let lives = instance.is_some_and(|known| known.living().is_some_and(|victim| !victim.is_kill_pending()));
        uri.table.driver.is_none() || lives
    }
}
