//! What a domain is to this host, for the other hosts of a cluster. They build an answer on it, so
//! it is as strict as a status, and knows what a status need not: a restart that is still to come.

use std::time::Duration;

use fence_common::target::Target;
use fence_common::wire::Reply;
use tokio::time::{Instant, sleep};

use super::status::{self, look_by_tables, status_of_off};
use super::{Detail, Outcome, Restarts};
use crate::hypervisor::known::{Identity, Known};
use crate::hypervisor::libvirt::Power;

/// What a domain is to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It runs here, or is about to be started again here.
    Runs(Option<Identity>),
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

/// Decides what the domain is to this host.
///
/// A domain on its way to or from here is waited for until `by`: its end on the other host ends it
/// here, or it arrives.
pub(crate) async fn standing(known: &Known, restarts: &Restarts, target: &Target, by: Instant) -> Standing {
    loop {
        // Before the question and after it: a restart that is done in between is seen by neither
        // alone.
        if let Some(plan) = restarts.of(target).first() {
            return Standing::Runs(Some(plan.domain.clone()));
        }
        let moved = moved(known, target).await;
        let has_moved = moved.is_some();
        let outcome = match moved {
            Some(outcome) => outcome,
            None => status::status(known, target).await,
        };
        if let Some(plan) = restarts.of(target).first() {
            return Standing::Runs(Some(plan.domain.clone()));
        }
        match (outcome.reply, outcome.detail) {
            (Reply::Success, _) => return Standing::Runs(outcome.domain),
            (Reply::Off, Detail::Unknown) => return Standing::Unknown,
            (Reply::Off, _) if has_moved => return Standing::Moved(outcome.domain),
            (Reply::Off, _) => return Standing::Off(outcome.domain),
            (Reply::Failure | Reply::PermissionDenied, Detail::Migrating) if Instant::now() + LOOK_AGAIN < by => {
                sleep(LOOK_AGAIN).await;
            }
            (Reply::Failure | Reply::PermissionDenied, detail) => return Standing::Unclear(detail.to_string()),
        }
    }
}

/// The status of a domain that has moved away from here, and of which nothing else is here. For a
/// host alone it is a failure, since only another host can tell. In a cluster that host is asked.
async fn moved(known: &Known, target: &Target) -> Option<Outcome> {
    let any = known.uris.iter().filter_map(|uri| uri.table.find(target));
    if !any.into_iter().any(|(_, entry)| entry.moved_away) {
        return None;
    }
    let answers = known.query(target, |seen| seen.power.is_active()).await;
    let is_gone = |power: Power| matches!(power, Power::Off | Power::MovedAway);
    let all_gone = answers.found.iter().all(|found| is_gone(found.seen.power));
    if answers.found.is_empty() || !all_gone || !answers.remembered.is_empty() || !answers.doubts.is_empty() {
        return None;
    }
    let look = look_by_tables(known, target).await;
    Some(status_of_off(known, &answers.found, look.as_deref()).await)
}
