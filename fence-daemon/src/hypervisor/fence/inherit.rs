//! Restarts that an earlier daemon has left.
//!
//! The daemon that killed a domain for a reboot may die before it has started it again. The next
//! one finds that on record ([`record`](super::record)). By then somebody may have started the
//! domain elsewhere, by hand. So:
//!
//! | the domain died | what the next daemon does |
//! |---|---|
//! | at most a minute ago (and the `reboot_pause`), or was not proven dead and the record is as young | it looks whether it runs at any URI, and starts it if not |
//! | longer ago | it starts nothing: `status` and the log report it, until an `on` or `off`, or until it runs somewhere |
//! | and was transient, and not proven dead | nothing: it may have moved to another host |
//!
//! A restart or a crash of the daemon takes seconds, so the first row is the rule. A record stays
//! on disk until its end is known. A reboot of the host ends them all.

use std::sync::Arc;
use std::time::Duration;

use fence_common::target::Target;
use tokio::time::{Instant, timeout_at};

use super::{Inherited, Plan, Restarter, Source};
use crate::clock::Moment;
use crate::hypervisor::known::{Answers, Identity, Known};
use crate::hypervisor::libvirt::Seen;

/// How long after its death a domain is started by the next daemon.
const RECENT: Duration = Duration::from_secs(60);

/// How often the daemon looks whether a held domain runs somewhere.
const LOOK: Duration = Duration::from_secs(10);

/// Where a domain that is to be started runs already.
pub(super) enum RunsWhere {
    /// Nowhere, by the word of all URIs.
    Free,
    /// There.
    Runs(Identity),
    /// It may: why.
    Doubt(String),
}

/// Waits until each URI was tried once, or is silent: a new daemon has asked none yet.
pub(super) async fn first_round(known: &Known) {
    let by = Instant::now() + known.look_up;
    for uri in &known.uris {
        let _ = timeout_at(by, uri.state().wait_for(|state| state.tried > 0)).await;
    }
}

/// Looks whether a domain runs at another URI than its own, which is asked anyway before the start.
pub(super) async fn look(known: &Known, plan: &Plan) -> RunsWhere {
    if known.uris.len() < 2 {
        return RunsWhere::Free;
    }
    let target = Target::Uuid(plan.domain.uuid);
    let Answers { found, remembered, .. } = known.query(&target, |_| false).await;
    if let Some(there) = found.iter().find(|found| found.index != plan.index && found.is_active())
        && let Some(there) = known.identity(there)
    {
        return RunsWhere::Runs(there);
    }
    match remembered.iter().find(|(found, _)| found.index != plan.index && found.is_active()) {
        Some((found, error)) => {
            let uri = known.uris.get(found.index).map_or("", |uri| &*uri.text);
            RunsWhere::Doubt(format!("it ran at {uri} by the last word from there, and there is no answer: {error}"))
        }
        None => RunsWhere::Free,
    }
}

impl Restarter {
    /// Takes over the restarts that dead daemons have left. Before any request is served: a later
    /// `off` must find them.
    pub(crate) fn inherit(self: &Arc<Self>) {
        let now = Moment::now();
        for Inherited { record, kept, age } in self.records.take_over() {
            let uris = self.known.uris.iter().enumerate();
            let Some((index, uri)) = uris.into_iter().find(|(_, uri)| *uri.text == *record.uri) else {
                let (uri, domain) = (&record.uri, record.name.escape_debug());
                tracing::error!(%uri, %domain, "an earlier daemon killed it and did not start it again, and its URI is not configured any more");
                kept.remove();
                continue;
            };
            let domain = uri.identity(record.uuid, &record.name);
            // A transient domain that was not proven dead may have moved to another host instead.
            if record.xml.is_some() && !record.killed {
                tracing::error!(%domain, "an earlier daemon has died when it was about to reboot it: see whether it runs, here or elsewhere");
                kept.remove();
                continue;
            }
            let source = record.xml.clone().map_or(Source::Definition, Source::Xml);
            // A time in the future is no time of this boot.
            let died = record.died.map(Moment::from_ktime).filter(|died| *died <= now);
            let age = died.map_or(age, |died| now.since(died));
            let held = age > RECENT + self.options.now().reboot_pause;
            if held {
                tracing::error!(%domain, ?age, "an earlier daemon has died in the middle of its reboot, too long ago to start it unasked: see that it runs nowhere else, then fence it with `on`, or with `off` to leave it off");
            } else {
                tracing::warn!(%domain, ?age, "an earlier daemon has died in the middle of its reboot: it will be started again");
            }
            // Of a domain that was not proven dead only the age of its record is known.
            let died = died.or_else(|| held.then(|| now.before(age)));
            let dead = record.instance;
            let plan = Plan { index, domain, source, dead, died, kept: Some(kept), inherited: true, held };
            self.schedule(plan, Instant::now());
        }
    }

    /// Keeps a restart that is not carried out unasked, until somebody has seen to it.
    pub(super) async fn hold(&self, plan: Arc<Plan>) {
        let (uuid, target) = (plan.domain.uuid, Target::Uuid(plan.domain.uuid));
        let runs = |seen: &Seen| seen.power.is_active();
        let mut pause = Duration::ZERO;
        first_round(&self.known).await;
        while self.restarts.stands(&plan) {
            self.rest(&plan, pause).await;
            let lock = self.locks.uuid(uuid).await;
            let found = self.known.query_uris(&target, runs).await.found;
            let is_another = |seen: &Seen| seen.id != plan.dead || self.lives_on(&plan);
            if self.restarts.stands(&plan)
                && found.iter().any(|it| it.is_active() && (it.index != plan.index || is_another(&it.seen)))
            {
                tracing::info!(domain = %plan.domain, "it runs: nothing is left to be done of its reboot");
                self.restarts.cancel(plan.index, uuid);
            }
            drop(lock);
            pause = LOOK.min(self.attempt_pause_max);
        }
    }
}

/// What the log says at the daemon's end of a domain that is not started again yet. `kept`:
/// whether it is on record for the next daemon.
pub(crate) fn farewell(kept: bool, died: Option<Moment>, pause: Duration, now: Moment) -> String {
    let left = died.map_or(RECENT, |died| died.plus(RECENT + pause).since(now));
    if kept && !left.is_zero() {
        let seconds = left.as_secs().saturating_add(u64::from(left.subsec_nanos() > 0));
        format!("the next daemon starts it, if that comes within {seconds} s: not by hand before that")
    } else {
        "start it by hand, once it is certain that it runs nowhere else".to_owned()
    }
}
