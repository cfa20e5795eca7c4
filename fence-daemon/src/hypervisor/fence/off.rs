//! Powering a domain off at one place, by the short way or by libvirt, and what several places make of an order together.

use std::sync::Arc;

use fence_common::target::Target;
use fence_common::wire::Reply;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;
use virt::connect::Connect;
use zeroize::Zeroizing;

use super::act::Place;
use super::kill::{self, Killed};
use super::outcome::{Detail, Identity, Outcome};
use super::record::{Kept, Record};
use super::reset;
use super::restart::Plan;
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::deaths::SeenDead;
use crate::hypervisor::known::presumed;
use crate::hypervisor::known::query_all::survey;
use crate::hypervisor::libvirt::connection::Uri;
use crate::hypervisor::libvirt::domain::{self, Off, Power, Seen, Source, State, Unproven};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;
use crate::hypervisor::process::victim::Driver;
use crate::hypervisor::{Inner, RebootMethod};

/// Waits until what was killed for a reboot runs again, and answers accordingly.
pub(crate) async fn started(inner: &Inner, outcome: Outcome, starting: &[(usize, Uuid)], by: Instant) -> Outcome {
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
pub(crate) struct At {
    pub(crate) outcome: Outcome,
    /// What a restart needs, if it is to be started again.
    pub(crate) plan: Option<Plan>,
    /// libvirt's book-keeping, still under way.
    pub(crate) record: Option<JoinHandle<()>>,
    /// Whether libvirt was asked to destroy it.
    pub(crate) by_libvirt: bool,
}

impl At {
    pub(crate) fn said(outcome: Outcome) -> Self {
        Self { outcome, plan: None, record: None, by_libvirt: false }
    }
}

/// Powers the domain off at one place, with its lock held.
pub(crate) async fn off_at(inner: Arc<Inner>, place: Place, reboot: bool, deadline: Deadline) -> At {
    let Place { number, domain, power, entry, veto, by_host } = place;
    if let Some(veto) = veto {
        return At::said(Outcome::failure(veto));
    }
    let Some(uri) = inner.uris.get(number) else { return At::said(Outcome::failure(Detail::Broken)) };
    // A reboot of a domain that waits for its restart is the same reboot: it will come back. An off ends that.
    let was_pending = match inner.restarts.get(number, domain.uuid) {
        None => Pending::No,
        Some(plan) if plan.inherited => Pending::Inherited,
        Some(_) => Pending::Ours,
    };
    if !reboot {
        inner.restarts.cancel(number, domain.uuid);
    }
    let already = match (was_pending, reboot) {
        (Pending::No, _) => Detail::AlreadyOff,
        (Pending::Ours | Pending::Inherited, true) => Detail::RestartPending,
        (Pending::Ours | Pending::Inherited, false) => Detail::RestartCancelled,
    };
    let mut resetting = None;
    let may_reset = reboot && was_pending == Pending::No && inner.reboot_method == RebootMethod::Reset;
    if may_reset
        && matches!(power, Power::Active(_))
        && presumed::is_alone(&inner, uri, &domain).await
        && let Some(at) = reset::reset(uri, &domain, inner.limits.reset, &deadline, &mut resetting).await
    {
        return At::said(Outcome { reply: Reply::Success, proven_off: Some(at), detail: Detail::Reset, domain: None });
    }
    let uuid = domain.uuid;
    let strays = uri.table.strays(uuid);
    let had_strays = !strays.is_empty();
    // Where it was going it may run, and what is left here may be what it runs from.
    if had_strays && uri.table.is_leaving(uuid) {
        let (was, why) = (State(0), Unproven::Migrating);
        return At::said(Outcome::failure(Detail::NotProvenOff { was, why }));
    }
    if had_strays && !kill::strays(&domain, &strays, &deadline).await {
        let (was, why) = (State(0), Unproven::Stray);
        return At::said(Outcome::failure(Detail::NotProvenOff { was, why }));
    }
    let id = uri.table.get(uuid).and_then(|entry| entry.instance).map(|instance| instance.id);
    let killed = match &entry {
        Some(entry) => kill::kill(&inner, uri, &domain, entry, reboot, &deadline).await,
        None => None,
    };
    let (result, record, kept, dead, by_libvirt) = match killed {
        Some(Killed { off, record, kept }) => {
            let by_libvirt = record.is_some();
            (Ok(off), record, kept, id, by_libvirt)
        }
        None => {
            let foreseen = if reboot { foresee(&inner, uri, &domain) } else { None };
            let seen_dead = uri.table.seen_dead(&Target::Uuid(uuid));
            let dead = seen_dead.as_ref().and_then(|seen| seen.unnoticed.as_ref()).map(|instance| instance.id);
            let result = match seen_dead {
                Some(seen) => Ok(by_its_death(uri, uuid, &seen, reboot)),
                None if by_host => Ok(Off::Gone),
                None => by_libvirt(uri, uuid, reboot, &deadline).await,
            };
            let result = presumed::off(&inner, uri, &domain, result, had_strays, &deadline).await;
            let kept = foreseen.map(|(record, kept)| match &result {
                Ok(Off::Proven { at, .. }) => inner.records.confirm(record, kept, *at),
                _ => kept,
            });
            let destroyed = !uri.is_in_process() && !matches!(result, Ok(Off::Already(_) | Off::Gone | Off::MovedAway));
            (result, None, kept, dead, destroyed)
        }
    };
    if matches!(result, Ok(Off::Proven { .. })) && uri.table.driver.is_some() {
        uri.table.note_death(uuid, &domain.name, id.or(dead));
    }
    if let (Some(kept), false) = (&kept, matches!(result, Ok(Off::Proven { .. }))) {
        kept.remove();
    }
    // What libvirt was asked to reset and has not answered about is waited for like its destroy.
    let record = match resetting {
        Some(resetting) => Some(tokio::spawn(async move {
            let _ = resetting.await;
            if let Some(record) = record {
                let _ = record.await;
            }
        })),
        None => record,
    };
    if matches!(result, Ok(Off::Already(_) | Off::Proven { .. })) {
        tell_unseen(uri, &domain);
    }
    let outcome = match result {
        Ok(Off::Already(at)) => Outcome::off(at, already),
        // A transient domain between its proven off and its restart: we know why it is gone.
        Ok(Off::Gone) if was_pending == Pending::Ours => Outcome::off(Moment::now(), already),
        Ok(Off::Gone) => Outcome::failure(Detail::Vanished),
        Ok(Off::MovedAway) => Outcome::failure(Detail::MovedAway),
        Ok(Off::Proven { was, at, .. }) if !reboot => Outcome::off(at, Detail::Destroyed { was }),
        Ok(Off::Proven { was, at, source }) => {
            let plan =
                Some(Plan { place: number, domain, source, dead, died: Some(at), kept, inherited: false, held: false });
            return At { outcome: Outcome::off(at, Detail::Rebooting { was }), plan, record, by_libvirt };
        }
        Ok(Off::Unproven { was, why }) => Outcome::failure(Detail::NotProvenOff { was, why }),
        Err(error) => Outcome::failure(Detail::Failed { uri: Arc::clone(&uri.text), error }),
    };
    At { outcome, plan: None, record, by_libvirt }
}

/// Names the disks of a fenced domain whose writes cannot be seen from this host.
fn tell_unseen(uri: &Uri, domain: &Identity) {
    let unseen = uri.table.belongings.unseen(domain.uuid);
    if !unseen.is_empty() {
        tracing::warn!(%domain, unseen = unseen.join("; "), "fenced, but a server may still carry out what it has sent to these: fence it at the storage, too");
    }
}

/// Whether a domain waits for its restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    No,
    /// After a kill that was proven here.
    Ours,
    /// By the word of an earlier daemon.
    Inherited,
}

/// What was seen to die here is off without libvirt's word, which may hang. A reboot of what has died
/// by itself, unnoticed, brings it back.
fn by_its_death(uri: &Uri, uuid: Uuid, seen: &SeenDead, reboot: bool) -> Off {
    let at = Moment::now();
    let xml = uri.table.xml(uuid).map(|xml| Source::Xml(Zeroizing::clone(&xml)));
    match &seen.unnoticed {
        Some(instance) if reboot => Off::Proven { was: instance.state, at, source: xml.unwrap_or(Source::Definition) },
        Some(_) | None => Off::Already(at),
    }
}

/// libvirt's way.
async fn by_libvirt(uri: &Arc<Uri>, uuid: Uuid, reboot: bool, deadline: &Deadline) -> Result<Off, CallError> {
    let instance = uri.table.get(uuid).and_then(|entry| entry.instance);
    if let Some(victim) = instance.as_ref().and_then(|instance| instance.living()) {
        // If it cannot be looked at, what was seen of it before has to do.
        let _ = uri.table.note_kill(uuid, victim);
    }
    let (table, step) = (Arc::clone(&uri.table), deadline.clone());
    let power_off = move |connect: &Connect| domain::power_off(connect, uuid, reboot, &table, &step);
    let mut off = uri.call(Lane::Kill, deadline.by(), power_off).await;
    if may_overrule(uri.table.driver, &off)
        && let Ok(Some(id)) = uri.call(Lane::Query, deadline.by(), move |connect| domain::id(connect, uuid)).await
        && uri.table.is_dead(uuid, Some(id))
    {
        off = Ok(Off::Already(Moment::now()));
    }
    off
}

/// Whether the death of its process may make a domain off that libvirt still calls active. libvirt goes on for ever to speak of a container that
/// it could not kill in time. Of containers only: the death of a QEMU that is on its way to another host proves nothing.
fn may_overrule(driver: Option<Driver>, off: &Result<Off, CallError>) -> bool {
    driver == Some(Driver::Lxc) && matches!(off, Ok(Off::Unproven { why: Unproven::Active(..), .. }))
}

/// Writes down what the next daemon needs if this one dies while libvirt destroys a domain that is to be started again. Of a transient one
/// nothing can be said before its XML is known, which is when it is about to be destroyed.
fn foresee(inner: &Inner, uri: &Uri, domain: &Identity) -> Option<(Record, Kept)> {
    let entry = uri.table.get(domain.uuid).filter(|entry| entry.persistent)?;
    let instance = entry.instance?.id;
    let record = Record::new(&domain.uri, domain.uuid, &domain.name, Some(instance), None);
    let kept = inner.records.write(&record);
    fault::point(Point::AfterRecord);
    Some((record, kept?))
}

/// One outcome of several: a success only if all are.
pub(crate) fn together(mut outcomes: Vec<Outcome>) -> Outcome {
    // "It moved away from here" is no failure if it was killed at another of our URIs, where it moved to: the very domain, not a namesake.
    let killed: Vec<_> = outcomes
        .iter()
        .filter(|outcome| matches!(outcome.detail, Detail::Destroyed { .. } | Detail::Rebooting { .. }))
        .filter_map(|outcome| outcome.domain.as_ref().map(|domain| domain.uuid))
        .collect();
    let is_that = |outcome: &Outcome| outcome.domain.as_ref().is_some_and(|domain| killed.contains(&domain.uuid));
    outcomes.retain(|outcome| outcome.detail != Detail::MovedAway || !is_that(outcome));
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
    use super::*;

    #[test]
    fn a_dead_process_overrules_libvirt_about_containers_that_it_calls_active_and_about_nothing_else() {
        let unproven = |why| Ok(Off::Unproven { was: State(1), why });
        let active = || unproven(Unproven::Active(State(3), None));
        assert!(may_overrule(Some(Driver::Lxc), &active()));
        for driver in [Some(Driver::Qemu), None] {
            assert!(!may_overrule(driver, &active()), "{driver:?}");
        }
        let others = [
            unproven(Unproven::Migrating),
            unproven(Unproven::MovedAway),
            unproven(Unproven::Vanished(None)),
            unproven(Unproven::Stray),
            unproven(Unproven::Unknown(CallError::Overdue)),
            Ok(Off::MovedAway),
            Ok(Off::Gone),
            Err(CallError::Overdue),
        ];
        for driver in [Some(Driver::Lxc), Some(Driver::Qemu), None] {
            assert!(others.iter().all(|off| !may_overrule(driver, off)), "{driver:?}");
        }
    }

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
