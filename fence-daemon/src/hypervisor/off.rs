//! Powering a domain off at one place, by the short way or by libvirt, and what several places make of an order together.

use std::sync::Arc;

use fence_common::wire::Reply;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;
use virt::connect::Connect;

use super::act::Place;
use super::connection::Uri;
use super::domain::{self, Off, Power, Seen};
use super::kill::{self, Killed};
use super::link::Lane;
use super::outcome::{Detail, Identity, Outcome};
use super::record::{Kept, Record};
use super::restart::Plan;
use super::survey::survey;
use super::{Inner, RebootMethod};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::policy::Target;

/// Waits until what was killed for a reboot runs again, and answers accordingly.
pub(super) async fn started(inner: &Inner, outcome: Outcome, starting: &[(usize, Uuid)], by: Instant) -> Outcome {
    for (place, uuid) in starting {
        inner.restarts.over(*place, *uuid, by).await;
        let active = |seen: &Seen| matches!(seen.power, Power::Active(_));
        let survey = survey(&inner.uris, &Target::Uuid(*uuid), &inner.limits, active).await;
        if !survey.found.iter().any(|found| active(&found.seen)) {
            return Outcome { reply: Reply::Failure, detail: Detail::NotStartedAgain, ..outcome };
        }
    }
    Outcome { detail: Detail::Rebooted, ..outcome }
}

/// What came of an `off` at one place.
pub(super) struct At {
    pub(super) outcome: Outcome,
    /// What a restart needs, if it is to be started again.
    pub(super) plan: Option<Plan>,
    /// libvirt's book-keeping, still under way.
    pub(super) record: Option<JoinHandle<()>>,
}

impl At {
    pub(super) fn said(outcome: Outcome) -> Self {
        Self { outcome, plan: None, record: None }
    }
}

/// Powers the domain off at one place, with its lock held.
pub(super) async fn off_at(inner: Arc<Inner>, place: Place, reboot: bool, begin_by: Instant) -> At {
    let Place { number, domain, power, entry } = place;
    let Some(uri) = inner.uris.get(number) else { return At::said(Outcome::failure(Detail::Broken)) };
    // A reboot of a domain that waits for its restart is the same reboot: it will come back. An off ends that.
    let was_pending = if reboot {
        inner.restarts.get(number, domain.uuid).is_some()
    } else {
        inner.restarts.cancel(number, domain.uuid)
    };
    let already = match (was_pending, reboot) {
        (false, _) => Detail::AlreadyOff,
        (true, true) => Detail::RestartPending,
        (true, false) => Detail::RestartCancelled,
    };
    let may_reset = reboot && !was_pending && inner.reboot_method == RebootMethod::Reset;
    if may_reset
        && matches!(power, Power::Active(_))
        && let Some(at) = kill::reset(uri, &domain, inner.limits.reset).await
    {
        return At::said(Outcome { reply: Reply::Success, proven_off: Some(at), detail: Detail::Reset, domain: None });
    }
    let uuid = domain.uuid;
    let id = entry.as_ref().and_then(|entry| entry.instance.as_ref()).map(|instance| instance.id);
    let killed = match &entry {
        Some(entry) => kill::kill(&inner, uri, &domain, entry, reboot).await,
        None => None,
    };
    let (result, record, kept, dead) = match killed {
        Some(Killed { off, record, kept }) => (Ok(off), record, kept, id),
        None => {
            let kept = if reboot { foresee(&inner, uri, &domain) } else { None };
            let driver = uri.table.driver;
            let off = move |connect: &Connect| domain::power_off(connect, uuid, reboot, driver);
            (uri.call(Lane::Act, begin_by, off).await, None, kept, None)
        }
    };
    if let (Some(kept), false) = (&kept, matches!(result, Ok(Off::Proven { .. }))) {
        kept.remove();
    }
    let outcome = match result {
        Ok(Off::Already(at)) => Outcome::off(at, already),
        // A transient domain between its proven off and its restart: we know why it is gone.
        Ok(Off::Gone) if was_pending => Outcome::off(Moment::now(), already),
        Ok(Off::Gone) => Outcome::failure(Detail::Vanished),
        Ok(Off::MovedAway) => Outcome::failure(Detail::MovedAway),
        Ok(Off::Proven { was, at, .. }) if !reboot => Outcome::off(at, Detail::Destroyed { was }),
        Ok(Off::Proven { was, at, source }) => {
            let plan = Some(Plan { place: number, domain, source, dead, kept, inherited: false });
            return At { outcome: Outcome::off(at, Detail::Rebooting { was }), plan, record };
        }
        Ok(Off::Unproven { was, why }) => Outcome::failure(Detail::NotProvenOff { was, why }),
        Err(error) => Outcome::failure(Detail::Failed { uri: Arc::clone(&uri.text), error }),
    };
    At { outcome, plan: None, record }
}

/// Writes down what the next daemon needs if this one dies while libvirt destroys a domain that is to be started again. Of a transient one
/// nothing can be said before its XML is known, which is when it is about to be destroyed.
fn foresee(inner: &Inner, uri: &Uri, domain: &Identity) -> Option<Kept> {
    let entry = uri.table.get(domain.uuid).filter(|entry| entry.persistent)?;
    let instance = entry.instance?.id;
    let kept = inner.records.write(&Record::new(&domain.uri, domain.uuid, &domain.name, Some(instance), None));
    fault::point(Point::AfterRecord);
    kept
}

/// One outcome of several: a success only if all are.
pub(super) fn together(mut outcomes: Vec<Outcome>) -> Outcome {
    // "It moved away from here" is no failure if another of our URIs, where it moved to, has it off.
    if outcomes.iter().any(|outcome| outcome.reply == Reply::Success) {
        outcomes.retain(|outcome| outcome.detail != Detail::MovedAway);
    }
    if let Some(failed) = outcomes.iter().position(|outcome| outcome.reply != Reply::Success) {
        return outcomes.swap_remove(failed);
    }
    let proven_off = outcomes.iter().filter_map(|outcome| outcome.proven_off).max();
    let killed = outcomes
        .iter()
        .position(|outcome| {
            matches!(outcome.detail, Detail::Destroyed { .. } | Detail::Rebooting { .. } | Detail::Reset)
        })
        .unwrap_or(0);
    match outcomes.get(killed) {
        Some(outcome) => Outcome { proven_off, ..outcome.clone() },
        None => Outcome::failure(Detail::Broken),
    }
}

#[cfg(test)]
mod tests {
    use super::super::domain::State;
    use super::*;

    #[test]
    fn one_instance_that_is_not_off_spoils_the_success() {
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
        assert_eq!(together(vec![moved(), killed(early)]).reply, Reply::Success);
        assert_eq!(together(vec![]).reply, Reply::Failure);
    }
}
