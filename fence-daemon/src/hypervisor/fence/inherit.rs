//! Restarts that an earlier daemon has left.
//!
//! The daemon that killed a domain for a reboot may die before it has started it again. The next one finds that on record
//! ([`record`](super::record)), and by then somebody may have started the domain elsewhere, by hand. So:
//!
//! | the domain died | what the next daemon does |
//! |---|---|
//! | at most a minute ago (and the `reboot_pause`), or was not proven dead and the record is as young | it looks whether it runs at any URI, and starts it if not |
//! | longer ago | it starts nothing: `status` and the log tell of it, until an `on` or `off`, or until it runs somewhere |
//! | and was transient, and not proven dead | nothing: it may have moved to another host |
//!
//! A restart or a crash of the daemon takes seconds, so the first row is the rule. A record stays on disk until its end is known, and
//! a reboot of the host ends them all.

use std::sync::Arc;
use std::time::Duration;

use fence_common::target::Target;
use tokio::time::{Instant, timeout_at};

use super::outcome::Identity;
use super::record::Inherited;
use super::restart::{Plan, schedule};
use crate::clock::Moment;
use crate::hypervisor::Inner;
use crate::hypervisor::known::disproof;
use crate::hypervisor::known::query_all::{Survey, survey};
use crate::hypervisor::libvirt::domain::{Power, Seen, Source};

/// How long after its death a domain is started by the next daemon.
const RECENT: Duration = Duration::from_secs(60);

/// How often it is looked whether what is held runs somewhere.
const LOOK: Duration = Duration::from_secs(10);

/// Takes over the restarts that dead daemons have left. Before any request is served: a later `off` must find them.
pub(crate) fn inherit(inner: &Arc<Inner>) {
    let now = Moment::now();
    for Inherited { record, kept, age } in inner.records.take_over() {
        let Some((place, uri)) = inner.uris.iter().enumerate().find(|(_, uri)| *uri.text == *record.uri) else {
            let (uri, domain) = (&record.uri, record.name.escape_debug());
            tracing::error!(%uri, %domain, "killed by an earlier daemon and not started again, and its URI is not configured any more");
            kept.remove();
            continue;
        };
        let domain = Identity { uri: Arc::clone(&uri.text), uuid: record.uuid, name: record.name.clone() };
        // A transient domain that was not proven dead may have gone in another way: to another host.
        if record.xml.is_some() && !record.killed {
            tracing::error!(%domain, "an earlier daemon has died when it was about to reboot it: see whether it runs, here or elsewhere");
            kept.remove();
            continue;
        }
        let source = record.xml.clone().map_or(Source::Definition, Source::Xml);
        // A time in the future is no time of this boot.
        let died = record.died.map(Moment::from_ktime).filter(|died| *died <= now);
        let age = died.map_or(age, |died| now.since(died));
        let held = age > RECENT + inner.reboot_pause;
        if held {
            tracing::error!(%domain, ?age, "an earlier daemon has died in the middle of its reboot, too long ago to start it unasked: see that it runs nowhere else, then fence it with `on`, or with `off` to leave it off");
        } else {
            tracing::warn!(%domain, ?age, "an earlier daemon has died in the middle of its reboot: it will be started again");
        }
        // Of one that was not proven dead only the age of its record is known.
        let died = died.or_else(|| held.then(|| now.before(age)));
        let dead = record.instance;
        let plan = Plan { place, domain, source, dead, died, kept: Some(kept), inherited: true, held };
        schedule(inner, plan, Instant::now());
    }
}

/// Waits until each URI was tried once, or is silent: a daemon that has just begun has asked nobody yet.
pub(crate) async fn first_round(inner: &Inner) {
    let by = Instant::now() + inner.limits.look_up;
    for uri in &inner.uris {
        let _ = timeout_at(by, uri.state().wait_for(|state| state.tried > 0)).await;
    }
}

/// Where a domain that is to be started runs already.
pub(crate) enum Look {
    /// Nowhere, as far as all URIs say.
    Free,
    /// There.
    Runs(Identity),
    /// It may: why.
    Doubt(String),
}

/// Looks whether a domain runs at any URI. The instance that was killed does not count, nor what its own URI says, which is asked anyway
/// before the start.
pub(crate) async fn look(inner: &Inner, plan: &Plan) -> Look {
    if inner.uris.len() < 2 {
        return Look::Free;
    }
    let target = Target::Uuid(plan.domain.uuid);
    let Survey { found, remembered, .. } = disproof::ask(inner, &target, |_| false).await;
    let is_active = |power| matches!(power, Power::Active(_));
    if let Some(there) = found.iter().find(|found| found.place != plan.place && is_active(found.seen.power))
        && let Some(there) = there.identity(&inner.uris)
    {
        return Look::Runs(there);
    }
    match remembered.iter().find(|(found, _)| found.place != plan.place && is_active(found.seen.power)) {
        Some((found, error)) => {
            let uri = inner.uris.get(found.place).map_or("", |uri| &*uri.text);
            Look::Doubt(format!("it ran at {uri} when that was last heard of, and there is no answer: {error}"))
        }
        None => Look::Free,
    }
}

/// Tells of a restart that is not carried out unasked, until somebody has seen to it.
pub(crate) async fn hold(inner: Arc<Inner>, plan: Arc<Plan>) {
    let (uuid, target) = (plan.domain.uuid, Target::Uuid(plan.domain.uuid));
    let runs = |seen: &Seen| matches!(seen.power, Power::Active(_));
    let mut pause = Duration::ZERO;
    first_round(&inner).await;
    while inner.restarts.stands(&plan) {
        inner.restarts.rest(&inner, &plan, pause).await;
        let lock = inner.locks.uuid(uuid).await;
        let found = survey(&inner.uris, &target, &inner.limits, runs).await.found;
        let is_another = |seen: &Seen| runs(seen) && (seen.id != plan.dead || inner.lives_on(&plan));
        if inner.restarts.stands(&plan)
            && found.iter().any(|found| found.place != plan.place && runs(&found.seen) || is_another(&found.seen))
        {
            tracing::info!(domain = %plan.domain, "it runs: nothing is left to be done of its reboot");
            inner.restarts.cancel(plan.place, uuid);
        }
        drop(lock);
        pause = LOOK.min(inner.limits.restart_pause);
    }
}

/// What whoever ends the daemon must know of a domain that is not started again yet. `kept`: whether it is on record for the next one.
pub(crate) fn farewell(kept: bool, died: Option<Moment>, pause: Duration, now: Moment) -> String {
    let left = died.map_or(RECENT, |died| died.plus(RECENT + pause).since(now));
    if kept && !left.is_zero() {
        let seconds = left.as_secs().saturating_add(u64::from(left.subsec_nanos() > 0));
        format!("the next daemon will start it, if it comes within {seconds} s: not by hand before that")
    } else {
        "start it by hand, once it is certain that it runs nowhere else".to_owned()
    }
}
