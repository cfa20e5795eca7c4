//! Status and presence. They only ask, and take no lock, so they never wait behind a kill.

use std::sync::Arc;

use fence_common::target::Target;
use fence_common::wire::Reply;

use super::foresight::{Foreseen, ask};
use super::{Detail, Outcome, Restarts, Unproven};
use crate::clock::Moment;
use crate::hypervisor::known::{Answers, FoundDomain, Identity, Instance, Known};
use crate::hypervisor::libvirt::{CallError, Power, Seen, State};
use crate::hypervisor::process::{Left, Look, Remains, Whom};

/// What a domain is to this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It runs here, or did a moment ago and is about to again.
    Runs,
    /// It is known here and shut off, or has been waiting for its restart for a while. It may run
    /// on another host, or nowhere.
    Defined,
    /// This host knows nothing good of it: no URI knows it, or it has moved to another host, or is
    /// on its way here from one, or libvirt is silent.
    Unknown,
}

/// The reply to a status request.
pub(crate) async fn status(known: &Known, target: &Target) -> Outcome {
    status_foreseen(known, target, None).await
}

/// The same, where the questions may have been asked already.
pub(super) async fn status_foreseen(known: &Known, target: &Target, foreseen: Option<Foreseen>) -> Outcome {
    known.refresh(target).await;
    if let Some(outcome) = lives(known, target) {
        return outcome;
    }
    let Foreseen { answers, look } = match foreseen {
        Some(foreseen) => foreseen,
        None => ask(known, target).await,
    };
    // It may have been started meanwhile.
    if let Some(outcome) = lives(known, target) {
        return outcome;
    }
    // In this order: a domain that runs anywhere is on; of one that may run elsewhere nothing is
    // said; only then it is off.
    let is_on = |found: &&FoundDomain| found.is_active();
    let is_here = |found: &&FoundDomain| !known.uris[found.index].table.is_elsewhere(found.seen.uuid);
    let on = answers.found.iter().filter(is_on).find(is_here).map(|found| (found, None));
    let moving = answers.found.iter().find(is_on).map(|found| (found, Some(Detail::Migrating)));
    let moved = answers.found.iter().find(|found| found.seen.power == Power::MovedAway);
    let moved = moved.map(|found| (found, Some(Detail::MovedAway)));
    let remembered = answers.remembered.first();
    let remembered = remembered.map(|(found, error)| (found, Some(last_word(known, found, error.clone()))));
    let off = answers.found.first().map(|found| (found, None));
    if on.is_none()
        && remembered.is_some()
        && let Some(outcome) = unknown_status(known, target).await
    {
        return outcome;
    }
    let Some((found, doubt)) = on.or(moving).or(moved).or(remembered).or(off) else {
        let why = nowhere(answers);
        if let Some(outcome) = unknown_status(known, target).await {
            return outcome;
        }
        // As fence_virtd answers about a domain that no URI knows.
        return if why == Detail::Unknown { Outcome::found(Reply::Off, why) } else { Outcome::failure(why) };
    };
    let outcome = match (doubt, found.seen.power) {
        (Some(doubt), _) => Outcome::failure(doubt),
        (None, Power::Active(state)) => Outcome::found(Reply::Success, Detail::Active(state)),
        // Each of them: the first may be at a URI that speaks of another host, and the next one be
        // an orphan here.
        (None, Power::Off) => return status_of_off(known, &answers.found, look.as_deref()).await,
        (None, Power::MovedAway) => Outcome::failure(Detail::MovedAway),
    };
    Outcome { domain: known.identity(found), ..outcome }
}

/// What a living process says by itself. libvirt need not be asked, and is not: it says nothing
/// about a domain that it is destroying.
fn lives(known: &Known, target: &Target) -> Option<Outcome> {
    known.uris.iter().find_map(|uri| {
        let (uuid, entry) = uri.table.find(target)?;
        let instance = entry.instance.filter(|instance| instance.living().is_some())?;
        if uri.table.is_elsewhere(uuid) {
            return None;
        }
        let outcome = Outcome::found(Reply::Success, Detail::Active(instance.state));
        Some(outcome.about(uri.identity(uuid, &entry.name)))
    })
}

/// The status of a domain that is off by libvirt's word at these URIs: on, or a failure, if this
/// host says so of any of them.
pub(super) async fn status_of_off(known: &Known, found: &[FoundDomain], look: Option<&Look>) -> Outcome {
    let mut asked: Vec<Whom> = Vec::new();
    for FoundDomain { index, seen } in found {
        for (index, whom) in known.whoms(*index, seen.uuid, &seen.name) {
            if asked.contains(&whom) {
                continue;
            }
            if let Some(outcome) = status_of(known, &whom, look).await {
                let domain = known.uris.get(index).map(|uri| uri.identity(whom.uuid, &whom.name));
                return Outcome { domain, ..outcome };
            }
            asked.push(whom);
        }
    }
    let domain = found.first().and_then(|found| known.identity(found));
    Outcome { domain, ..Outcome::found(Reply::Off, Detail::ShutOff) }
}

/// A look at this host for the domains that the tables know by this target. `None`: they know none.
pub(super) async fn look_by_tables(known: &Known, target: &Target) -> Option<Arc<Look>> {
    let known_here = known.uris.iter().enumerate().filter_map(|(index, uri)| {
        let (uuid, entry) = uri.table.find(target)?;
        Some(known.whoms(index, uuid, &entry.name).into_iter().map(|(_, whom)| whom))
    });
    let wanted: Vec<_> = known_here.flatten().collect();
    if wanted.is_empty() { None } else { Some(known.host.look(wanted).await) }
}

/// On if something of the domain lives here, a failure if that is not known. `None`: nothing does.
/// `look` spares a further look at the host if it found nothing of the domain.
async fn status_of(known: &Known, whom: &Whom, look: Option<&Look>) -> Option<Outcome> {
    match known.host.remains_by(look, whom).await {
        Remains::Nothing => None,
        Remains::Living(_) => Some(Outcome::found(Reply::Success, Detail::Active(State::RUNNING))),
        Remains::Doubt(why) => Some(Outcome::failure(doubt(why))),
    }
}

/// The status of a target that no URI speaks of: on if this host has a process of it.
async fn unknown_status(known: &Known, target: &Target) -> Option<Outcome> {
    let look = known.host.look(Vec::new()).await;
    for unknown in known.unknown(&look, target, &[]) {
        let Identity { uuid, name, .. } = &unknown.domain;
        let whom = known.uris.get(unknown.index)?.table.whom(*uuid, name)?;
        if let Some(outcome) = status_of(known, &whom, None).await {
            return Some(outcome.about(unknown.domain));
        }
    }
    None
}

/// What a domain is to this host. A domain that is only defined here may run on another host, which
/// then has to answer.
pub(crate) async fn presence(known: &Known, restarts: &Restarts, target: &Target, now: Moment) -> Presence {
    known.refresh(target).await;
    let instances = known.uris.iter().filter_map(|uri| {
        let (uuid, entry) = uri.table.find(target)?;
        let instance = entry.instance?;
        // A dead instance does not run, also before libvirt has noticed. A silent URI's word is no
        // word of this moment.
        let counts = if instance.victim.is_some() { instance.living().is_some() } else { uri.is_lively() };
        counts.then(|| (uri.table.is_leaving(uuid), instance))
    });
    let instances: Vec<_> = instances.collect();
    // While it arrives it can be fenced where it comes from, and not here; or the other way round.
    let is_elsewhere = |(leaving, instance): &(bool, Instance)| *leaving || instance.is_arriving();
    let restart = restarts.are_fresh(target, now);
    if instances.iter().any(|instance| !is_elsewhere(instance)) || restart == Some(true) {
        return Presence::Runs;
    }
    if !instances.is_empty() {
        return Presence::Unknown;
    }
    if restart == Some(false) {
        return Presence::Defined;
    }
    // The table may be a moment behind.
    let Answers { found, remembered, .. } = known.query(target, |seen: &Seen| seen.power.is_active()).await;
    let (mut is_off, mut runs) = (false, found.iter().any(FoundDomain::is_active));
    for found in found.iter().filter(|found| found.seen.power == Power::Off) {
        is_off = true;
        runs = runs || known.lives(found).await;
    }
    match (runs, is_off) {
        (true, _) => Presence::Runs,
        (false, true) if remembered.is_empty() => Presence::Defined,
        (false, _) => Presence::Unknown,
    }
}

/// Whether the tables alone say that the domain is known here and off, and nothing speaks against
/// it. That is a reason to call back at once where no other host hears the request, and never an
/// answer: the tables may be a moment behind.
pub(crate) fn is_off_by_tables(known: &Known, restarts: &Restarts, target: &Target, now: Moment) -> bool {
    let (mut is_known, mut speaks_against) = (false, restarts.are_fresh(target, now).is_some());
    for uri in &known.uris {
        let table = &uri.table;
        // What such a URI has to say, only a question shows.
        let is_behind = !uri.is_lively() || !table.is_filled() || table.is_blind();
        speaks_against |= is_behind || table.recalled.find(target).is_some() || table.orphaned_as(target).is_some();
        let Some((uuid, entry)) = table.find(target) else { continue };
        is_known = true;
        speaks_against |= entry.instance.is_some() || entry.generation != table.generation();
        speaks_against |= !table.orphans(uuid).is_empty() || table.may_run_elsewhere(uuid);
    }
    is_known && !speaks_against
}

/// Why a target was found nowhere: unknown if every URI says so, else a doubt.
pub(super) fn nowhere(answers: Answers) -> Detail {
    match answers.doubts.into_iter().next() {
        None => Detail::Unknown,
        Some((uri, error)) => Detail::Doubt { uri, error },
    }
}

/// Why nothing is said of a domain at a silent URI.
pub(super) fn last_word(known: &Known, found: &FoundDomain, error: CallError) -> Detail {
    match (found.seen.power, known.uris.get(found.index)) {
        (Power::Active(_), Some(uri)) => Detail::LastActive { uri: Arc::clone(&uri.text), error },
        _ => Detail::MovedAway,
    }
}

/// Why nobody says that a domain is off.
pub(super) fn doubt(why: String) -> Detail {
    Detail::NotProvenOff { was: State::RUNNING, why: Unproven::Left(Left::Doubt(why)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_a_doubt() {
        assert_eq!(nowhere(Answers::default()), Detail::Unknown);
        let doubts = vec![("x:///".into(), CallError::Overdue)];
        assert!(matches!(nowhere(Answers { doubts, ..Answers::default() }), Detail::Doubt { .. }));
    }
}
