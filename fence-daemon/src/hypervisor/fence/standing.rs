//! What a domain is to this host, for the other hosts of a cluster. They build an answer on it, so
//! it is as strict as a status, and knows what a status need not: a restart that is still to come.

use std::time::Duration;

use fence_common::target::Target;
use fence_common::wire::Reply;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use super::status::{self, look_by_tables, status_of_off};
use super::{Detail, Outcome, Restarts};
use crate::hypervisor::known::{Identity, Known};
use crate::hypervisor::libvirt::{CallError, Direction, Domain, Lane, Power};
use crate::hypervisor::process::Job;

/// What a domain is to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It runs here, or is about to be started again here.
    Runs(Option<Identity>),
    /// It is on its way here by migration, and runs on the other host as long as that lasts.
    Arriving(Option<Identity>),
    /// It is active here, and nobody can tell whether it is still on its way in.
    MayBeArriving(Option<Identity>),
    /// It is known here, and nothing of it runs here.
    Off(Option<Identity>),
    /// It has moved to another host, and nothing of it is left here. This host does not start it.
    Moved(Option<Identity>),
    /// Nobody here knows it.
    Unknown,
    /// Nobody here can tell, for this reason.
    Unclear(String),
}

/// How often a domain that is on its way between two hosts is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often a domain is looked at again that is active, and of whose arrival nothing is known.
const UNRECORDED: u32 = 4;

/// Decides what the domain is to this host.
///
/// A domain on its way to or from here is waited for until `by`: its end on the other host ends it
/// here, or it arrives.
pub(crate) async fn standing(known: &Known, restarts: &Restarts, target: &Target, by: Instant) -> Standing {
    let mut unrecorded = 0;
    loop {
        // Before the question and after it: a restart that is done in between is seen by neither
        // alone.
        if let Some(plan) = restarts.of(target).first() {
            return Standing::Runs(Some(plan.domain.clone()));
        }
        let (outcome, has_moved) = status_or_moved(known, target).await;
        if let Some(plan) = restarts.of(target).first() {
            return Standing::Runs(Some(plan.domain.clone()));
        }
        let may_wait = Instant::now() + LOOK_AGAIN < by;
        match (outcome.reply, outcome.detail) {
            (Reply::Success, _) => match arrival(known, outcome.domain.as_ref(), by).await {
                Arrival::Over => return Standing::Runs(outcome.domain),
                Arrival::Unknown if unrecorded >= UNRECORDED => return Standing::MayBeArriving(outcome.domain),
                Arrival::Unknown => unrecorded += 1,
                Arrival::UnderWay if !may_wait => return Standing::Arriving(outcome.domain),
                Arrival::UnderWay => {}
            },
            (Reply::Off, Detail::Unknown) => return Standing::Unknown,
            (Reply::Off, _) if has_moved => return Standing::Moved(outcome.domain),
            (Reply::Off, _) => return Standing::Off(outcome.domain),
            (Reply::Failure | Reply::PermissionDenied, Detail::Migrating) if may_wait => {}
            (Reply::Failure | Reply::PermissionDenied, detail) => return Standing::Unclear(detail.to_string()),
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Whether an active domain is still on its way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// It is not, or not any more.
    Over,
    UnderWay,
    /// Nothing says so. A copy that was on its way in may have gone a moment ago.
    Unknown,
}

/// Whether a domain that is active here is on its way in. Its table may be a moment behind, and
/// know nothing of a copy that libvirt has begun to take in.
async fn arrival(known: &Known, domain: Option<&Identity>, by: Instant) -> Arrival {
    let Some(Identity { uri, uuid, name }) = domain else { return Arrival::Over };
    let Some(uri) = known.uris.iter().find(|one| one.text == *uri) else { return Arrival::Over };
    match uri.table.driver.map_or(Job::Unknown, |driver| Job::on_record(driver, name)) {
        Job::Arriving => return Arrival::UnderWay,
        Job::None | Job::Leaving => return Arrival::Over,
        // There is no record here, or none that can be read. That a process lives says nothing: a
        // copy on its way in has one.
        Job::Unknown => {}
    }
    let uuid = *uuid;
    let migration = move |connect: &_| {
        let Some(domain) = Domain::find(connect, uuid)? else { return Ok(None) };
        let direction = domain.migration()?;
        // A copy that has gone meanwhile has no job either.
        Ok(domain.power()?.filter(|power| power.is_active()).map(|_| direction))
    };
    match uri.call(Lane::Query, by, migration).await {
        Ok(Some(Direction::In)) => Arrival::UnderWay,
        // A driver without jobs, as of containers or of tests, has no migration either.
        Ok(Some(Direction::None | Direction::Out)) => Arrival::Over,
        Ok(None) | Err(_) => Arrival::Unknown,
    }
}

/// The domain's status, and whether it is that of one that has moved away. For a host alone that is
/// a failure, since only another host can tell. In a cluster that host is asked.
///
/// Also one that has ended here on its way counts as moved: its process has died after the other
/// host went on with it, or might have.
async fn status_or_moved(known: &Known, target: &Target) -> (Outcome, bool) {
    if has_moved_by_tables(known, target)
        && let Some(outcome) = left_behind(known, target).await
    {
        return (outcome, true);
    }
    let outcome = status::status(known, target).await;
    if outcome.detail == Detail::MovedAway
        && let Some(left) = left_behind(known, target).await
    {
        return (left, true);
    }
    (outcome, false)
}

fn has_moved_by_tables(known: &Known, target: &Target) -> bool {
    known.uris.iter().filter_map(|uri| uri.table.find(target)).any(|(_, entry)| entry.moved_away)
}

/// The status of what is left here of a domain that may run on another host. `None`: it is not off
/// here by the word of all.
async fn left_behind(known: &Known, target: &Target) -> Option<Outcome> {
    let answers = known.query(target, |seen| seen.power.is_active()).await;
    let is_gone = |power: Power| matches!(power, Power::Off | Power::MovedAway);
    let all_gone = answers.found.iter().all(|found| is_gone(found.seen.power));
    if answers.found.is_empty() || !all_gone || !answers.remembered.is_empty() || !answers.doubts.is_empty() {
        return None;
    }
    let look = look_by_tables(known, target).await;
    Some(status_of_off(known, &answers.found, look.as_deref()).await)
}

/// Whether a domain that is off here has a definition to start it from. A transient one has none
/// when it is gone. Every doubt counts as yes: the start will show it.
pub(crate) async fn is_defined(known: &Known, uuid: Uuid) -> bool {
    let by = Instant::now() + known.grace;
    for uri in &known.uris {
        let is_persistent = move |connect: &_| match Domain::find(connect, uuid)? {
            Some(domain) => Ok::<_, CallError>(domain.is_persistent()? == Some(true)),
            None => Ok(false),
        };
        if !matches!(timeout_at(by, uri.call(Lane::Query, by, is_persistent)).await, Ok(Ok(false))) {
            return true;
        }
    }
    false
}
