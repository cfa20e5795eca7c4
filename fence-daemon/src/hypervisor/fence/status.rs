//! Status and presence: what is only asked, without a lock.

use std::sync::Arc;

use fence_common::target::Target;
use fence_common::wire::Reply;

use super::outcome::{Detail, Identity, Outcome};
use crate::clock::Moment;
use crate::hypervisor::known::disproof;
use crate::hypervisor::known::events::refresh;
use crate::hypervisor::known::presumed;
use crate::hypervisor::known::query_all::{Found, Survey};
use crate::hypervisor::known::table::Instance;
use crate::hypervisor::libvirt::domain::{Power, Seen};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::{Inner, Presence};

/// Asks only: no lock, so that it never waits behind a kill.
pub(crate) async fn status(inner: &Inner, target: &Target) -> Outcome {
    refresh(&inner.uris, target, inner.limits.grace).await;
    if let Some(outcome) = lives(inner, target) {
        return outcome;
    }
    let survey = disproof::ask(inner, target, |seen| matches!(seen.power, Power::Active(_))).await;
    // In this order: what runs anywhere is on; where something may run elsewhere nothing is said; and only then it is off.
    let is_on = |found: &&Found| matches!(found.seen.power, Power::Active(_));
    let is_here = |found: &&Found| !inner.uris[found.place].table.is_elsewhere(found.seen.uuid);
    let on = survey.found.iter().filter(is_on).find(is_here).map(|found| (found, None));
    let moving = survey.found.iter().find(is_on).map(|found| (found, Some(Detail::Migrating)));
    let moved = survey.found.iter().find(|found| found.seen.power == Power::MovedAway);
    let moved = moved.map(|found| (found, Some(Detail::MovedAway)));
    let remembered = survey.remembered.first();
    let remembered = remembered.map(|(found, error)| (found, Some(last_word(inner, found, error.clone()))));
    let off = survey.found.first().map(|found| (found, None));
    if on.is_none()
        && remembered.is_some()
        && let Some(outcome) = presumed::unknown_status(inner, target).await
    {
        return outcome;
    }
    let Some((found, doubt)) = on.or(moving).or(moved).or(remembered).or(off) else {
        let why = nowhere(survey);
        if let Some(outcome) = presumed::unknown_status(inner, target).await {
            return outcome;
        }
        // As stock answers for a domain that positively nobody here knows.
        return if why == Detail::Unknown { Outcome::found(Reply::Off, why) } else { Outcome::failure(why) };
    };
    let outcome = match (doubt, found.seen.power) {
        (Some(doubt), _) => Outcome::failure(doubt),
        (None, Power::Active(state)) => Outcome::found(Reply::Success, Detail::Active(state)),
        // Each of them: the first may be at a URI that speaks of another host, and the next one be lost here.
        (None, Power::Off) => return presumed::status(inner, &survey.found).await,
        (None, Power::MovedAway) => Outcome::failure(Detail::MovedAway),
    };
    match found.identity(&inner.uris) {
        Some(domain) => outcome.about(domain),
        None => outcome,
    }
}

/// What a living process says by itself. libvirt need not be asked, and is not: it says nothing about a domain that it is destroying.
fn lives(inner: &Inner, target: &Target) -> Option<Outcome> {
    inner.uris.iter().find_map(|uri| {
        let (uuid, entry) = uri.table.find(target)?;
        let instance = entry.instance.filter(|instance| instance.living().is_some())?;
        if uri.table.is_elsewhere(uuid) {
            return None;
        }
        let domain = Identity { uri: Arc::clone(&uri.text), uuid, name: entry.name };
        Some(Outcome::found(Reply::Success, Detail::Active(instance.state)).about(domain))
    })
}

/// What a domain is to this host. One that is only defined here may run on another one, which then is the one to answer.
pub(crate) async fn presence(inner: &Inner, target: &Target, now: Moment) -> Presence {
    fn runs(seen: &Seen) -> bool {
        matches!(seen.power, Power::Active(_))
    }
    refresh(&inner.uris, target, inner.limits.grace).await;
    let instances = inner.uris.iter().filter_map(|uri| {
        let (uuid, entry) = uri.table.find(target)?;
        let instance = entry.instance?;
        // What is dead runs no longer, before libvirt has noticed as well. A silent URI's word is no word of this moment.
        let counts = if instance.victim.is_some() { instance.living().is_some() } else { uri.is_lively() };
        counts.then(|| (uri.table.is_leaving(uuid), instance))
    });
    let known: Vec<_> = instances.collect();
    // Where it comes from it can be fenced, and here it cannot; or the other way round.
    let is_elsewhere = |(leaving, known): &(bool, Instance)| *leaving || known.is_arriving();
    let restart = inner.restarts.are_fresh(target, now);
    if known.iter().any(|known| !is_elsewhere(known)) || restart == Some(true) {
        return Presence::Runs;
    }
    if !known.is_empty() {
        return Presence::Unknown;
    }
    if restart == Some(false) {
        return Presence::Defined;
    }
    // The table may be a moment behind.
    let Survey { found, remembered, .. } = disproof::ask(inner, target, runs).await;
    let is_off = |found: &&Found| found.seen.power == Power::Off;
    let mut lives_on = false;
    for found in found.iter().filter(is_off) {
        lives_on |= presumed::lives(inner, found).await;
    }
    if lives_on || found.iter().any(|found| runs(&found.seen)) {
        Presence::Runs
    } else if remembered.is_empty() && found.iter().any(|found| found.seen.power == Power::Off) {
        Presence::Defined
    } else {
        Presence::Unknown
    }
}

/// Why a target was found nowhere: unknown if every URI says so, else a doubt.
pub(crate) fn nowhere(survey: Survey) -> Detail {
    match survey.doubts.into_iter().next() {
        None => Detail::Unknown,
        Some((uri, error)) => Detail::Doubt { uri, error },
    }
}

/// Why nothing is said of a domain at a silent URI.
pub(crate) fn last_word(inner: &Inner, found: &Found, error: CallError) -> Detail {
    match (found.seen.power, inner.uris.get(found.place)) {
        (Power::Active(_), Some(uri)) => Detail::LastActive { uri: Arc::clone(&uri.text), error },
        _ => Detail::MovedAway,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::libvirt::error::CallError;

    #[test]
    fn silence_is_a_doubt() {
        assert_eq!(nowhere(Survey::default()), Detail::Unknown);
        let doubts = vec![("x:///".into(), CallError::Overdue)];
        assert!(matches!(nowhere(Survey { doubts, ..Survey::default() }), Detail::Doubt { .. }));
    }
}
