//! Off and reboot: all domains that are meant, and what they come to together.

use std::sync::Arc;
use std::time::Duration;

use fence_common::target::Target;
use fence_common::wire::Reply;
use fence_config::{Kill, RebootReply};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::{Detail, Dying, Fenced, Fencing, Foresight, Meant, OffAt, Orders, Outcome, Purpose, Refused, Requester};
use crate::clock::Moment;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{FoundDomain, sorted};

/// How long libvirt's own destroy may keep a domain from being started after the kill: longer than
/// its connection lives without an answer.
const DESTROY_LIMIT: Duration = Duration::from_secs(25);

/// How long after a destroy the domain is not started. libvirt (9.0) queues its reaction to the
/// closed monitor for a thread of its own, which does not look whether that was an earlier
/// instance's. A late reaction kills what was started meanwhile, and nothing tells when it has
/// come.
const SETTLED: Duration = Duration::from_millis(150);

impl Orders {
    /// `off`, or `reboot`.
    pub(super) async fn off(
        self: &Arc<Self>,
        target: &Target,
        reboot: bool,
        requester: Option<Requester>,
        mut foresight: Option<Foresight>,
        deadline: &Deadline,
    ) -> Outcome {
        let mut requested = Instant::now();
        if reboot {
            self.restarts.permit(target, requested);
        }
        loop {
            // Until it is done: what it finds is not to be cancelled under its hands.
            let _waiting = (!reboot).then(|| self.restarts.wait(target));
            if !reboot {
                // Before its turn comes, and beyond it if it never does: a stuck reboot must not
                // bring the domain back then.
                requested = self.restarts.forbid(target);
            }
            let done = self.fence(target, reboot, requester, requested, foresight.take(), deadline).await;
            if !reboot && done.as_ref().map_or(true, |outcome| outcome.detail != Detail::Occupied) {
                self.restarts.permit(target, requested);
            }
            match done {
                Ok(outcome) => return outcome,
                // The requester is being fenced itself: the end of that is waited for, with no lock
                // held.
                Err(dying) if !self.races.over(&dying, deadline.by()).await => {
                    return Outcome::failure(Detail::Condemned(dying.name));
                }
                Err(_) => {}
            }
        }
    }

    /// Enters the domains that are about to be killed, unless the requester is being fenced itself.
    fn enter(&self, all: &[Meant], requester: Option<Requester>) -> Result<Fencing, Refused> {
        let running = all.iter().filter(|meant| meant.power.is_active());
        let fenced = running.filter_map(|meant| {
            let uuid = meant.domain.uuid;
            let macs = self.known.uris.get(meant.index)?.table.get(uuid)?.macs;
            Some(Fenced { uuid, name: meant.domain.name.clone(), macs })
        });
        let running_with = |mac| self.known.uris.iter().flat_map(|uri| uri.table.running_with(mac)).collect();
        self.races.enter(requester, fenced.collect(), running_with)
    }

    /// Powers off all domains that are meant. With `reboot` they are started again in the
    /// background. `requested`: when the order was requested.
    ///
    /// # Errors
    /// The requester is being fenced itself, and nothing was done yet.
    async fn fence(
        self: &Arc<Self>,
        target: &Target,
        reboot: bool,
        requester: Option<Requester>,
        requested: Instant,
        foresight: Option<Foresight>,
        deadline: &Deadline,
    ) -> Result<Outcome, Dying> {
        let purpose = Purpose::Kill { direct: self.options.now().kill == Kill::Direct };
        // An off waits since before.
        let waiting = reboot.then(|| self.restarts.wait(target));
        let (held, all) = self.meant(target, deadline, purpose, foresight).await;
        drop(waiting);
        let all = match all {
            Ok(all) => all,
            Err(detail) => return Ok(Outcome::failure(detail)),
        };
        let fencing = match self.enter(&all, requester) {
            Ok(fencing) => fencing,
            Err(Refused::Dying(dying)) => return Err(dying),
            Err(Refused::Dead(name)) => return Ok(Outcome::failure(Detail::Condemned(name))),
        };
        let uuids = sorted(all.iter().map(|meant| meant.domain.uuid));
        // All at once: two domains of one name at two URIs are two kills.
        let kills: Vec<_> = all
            .into_iter()
            .map(|meant| {
                let (orders, deadline, domain) = (Arc::clone(self), deadline.clone(), meant.domain.clone());
                let kill = async move {
                    let has_a_say = meant.has_a_say(&orders.known).await;
                    if has_a_say { Some(orders.off_at(meant, reboot, deadline).await) } else { None }
                };
                (domain, tokio::spawn(kill))
            })
            .collect();
        let (mut outcomes, mut plans, mut pending) = (Vec::new(), Vec::new(), Vec::new());
        let mut destroyed = false;
        for (domain, kill) in kills {
            let at = kill.await.unwrap_or_else(|_| Some(OffAt::said(Outcome::failure(Detail::Broken))));
            let Some(OffAt { outcome, plan, pending: call, by_libvirt }) = at else { continue };
            destroyed |= by_libvirt;
            outcomes.push(outcome.about(domain));
            plans.extend(plan);
            pending.extend(call);
        }
        let outcome = together(outcomes);
        match outcome.proven_off {
            Some(at) => fencing.killed(at),
            None if outcome.may_have_killed() => fencing.killed(Moment::now()),
            None => drop(fencing),
        }
        let mut starting = Vec::new();
        for plan in plans {
            if outcome.reply == Reply::Success {
                starting.push((plan.index, plan.domain.uuid));
                self.restarter.schedule(plan, requested);
            } else {
                // Its namesake, which may be the same guest, is not known to be off.
                tracing::error!(domain = %plan.domain, "rebooted only in part: it is off and is not started again");
                plan.forget();
            }
        }
        // A call to libvirt that is under way must not hit what a later request starts.
        if destroyed || !pending.is_empty() {
            let unsettled: Vec<_> = uuids.into_iter().map(|uuid| self.settling.enter(uuid)).collect();
            tokio::spawn(async move {
                for call in pending {
                    // A lost task is over, too. One that hangs in libvirt must not hinder for ever.
                    let _ = timeout(DESTROY_LIMIT, call).await;
                }
                sleep(SETTLED).await;
                drop(unsettled);
            });
        }
        // Only now: a pending restart is entered with the lock held.
        drop(held);
        Ok(match self.options.now().reboot_reply {
            RebootReply::On if !starting.is_empty() => self.started(outcome, &starting, deadline.by()).await,
            RebootReply::Off | RebootReply::On => outcome,
        })
    }

    /// Waits until the domains of a reboot run again, and answers accordingly.
    async fn started(&self, outcome: Outcome, starting: &[(usize, Uuid)], by: Instant) -> Outcome {
        for (index, uuid) in starting {
            self.restarts.over(*index, *uuid, by).await;
            let answers = self.known.query_uris(&Target::Uuid(*uuid), |seen| seen.power.is_active()).await;
            if !answers.found.iter().any(FoundDomain::is_active) {
                return Outcome { reply: Reply::Failure, detail: Detail::NotStartedAgain, ..outcome };
            }
        }
        Outcome { detail: Detail::Rebooted, ..outcome }
    }
}

/// One outcome of several: a success only if all are.
fn together(mut outcomes: Vec<Outcome>) -> Outcome {
    // "It moved away from here" is no failure if the very domain, not a namesake, was killed at
    // another of our URIs: it moved there.
    let is_killed = |outcome: &&Outcome| matches!(outcome.detail, Detail::Destroyed { .. } | Detail::Rebooting { .. });
    let uuid = |outcome: &Outcome| outcome.domain.as_ref().map(|domain| domain.uuid);
    let killed: Vec<_> = outcomes.iter().filter(is_killed).filter_map(uuid).collect();
    let is_that = |outcome: &Outcome| uuid(outcome).is_some_and(|uuid| killed.contains(&uuid));
    outcomes.retain(|outcome| outcome.detail != Detail::MovedAway || !is_that(outcome));
    if let Some(failed) = outcomes.iter().position(|outcome| outcome.reply != Reply::Success) {
        return outcomes.swap_remove(failed);
    }
    let proven_off = outcomes.iter().filter_map(|outcome| outcome.proven_off).max();
    let tells_most = |outcome: &&Outcome| is_killed(outcome) || outcome.detail == Detail::Reset;
    match outcomes.iter().find(tells_most).or(outcomes.first()) {
        Some(outcome) => Outcome { proven_off, ..outcome.clone() },
        None => Outcome::failure(Detail::Broken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::known::Identity;
    use crate::hypervisor::libvirt::State;

    #[test]
    fn one_instance_that_is_not_off_makes_a_failure() {
        let (early, late) = (Moment::from_ktime(1), Moment::from_ktime(2));
        let off = |at| Outcome::off(at, Detail::AlreadyOff);
        let killed = |at| Outcome::off(at, Detail::Destroyed { was: State(1) });
        let bad = || Outcome::failure(Detail::Vanished);
        let moved = || Outcome::failure(Detail::MovedAway);
        assert_eq!(together(vec![off(late), bad()]).reply, Reply::Failure);
        assert_eq!(together(vec![bad(), killed(late)]).proven_off, None);
        let both = together(vec![off(late), killed(early)]);
        assert_eq!((both.reply, both.proven_off), (Reply::Success, Some(late)));
        assert_eq!(both.detail, Detail::Destroyed { was: State(1) });
        assert_eq!(together(vec![moved()]).reply, Reply::Failure);
        let of = |number, outcome: Outcome| {
            let (uri, name) = ("x:///".into(), "a".to_owned());
            outcome.about(Identity { uri, uuid: Uuid::from_u128(number), name })
        };
        assert_eq!(together(vec![of(1, moved()), of(1, killed(early))]).reply, Reply::Success);
        assert_eq!(together(vec![of(1, moved()), of(2, killed(early))]).reply, Reply::Failure, "a namesake");
        assert_eq!(together(vec![of(1, moved()), of(1, off(early))]).reply, Reply::Failure, "off here, and elsewhere?");
        assert_eq!(together(vec![]).reply, Reply::Failure);
    }
}
