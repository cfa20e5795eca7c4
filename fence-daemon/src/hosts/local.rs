//! What this host does for the cluster: it says what a domain is to it, and carries out.

use std::time::Duration;

use fence_common::domain_state::{RUNNING, SHUT_OFF};
use fence_common::hosts::{ActEnd, HostDomain, LocalState, Look};
use fence_common::target::Target;
use fence_common::wire::{Op, Reply};
use tokio::time::Instant;

use crate::clock::Moment;
use crate::hypervisor::{Deadline, Detail, DomainState, Hypervisors, Outcome, Requester, Standing};
use crate::policy::Authorized;

/// What came of an order, from all hosts together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The client's reply.
    pub reply: Reply,
    /// Since when the domain is known to be off, or was reset, if that was proven on this host.
    pub proven_off: Option<Moment>,
    /// Why, for people.
    pub detail: String,
    /// Whether the domain is known to somebody.
    pub is_known: bool,
}

impl Verdict {
    /// A failure for this reason.
    #[must_use]
    pub fn failure(detail: impl Into<String>) -> Self {
        Self { reply: Reply::Failure, proven_off: None, detail: detail.into(), is_known: true }
    }
}

impl From<&Outcome> for Verdict {
    fn from(outcome: &Outcome) -> Self {
        let Outcome { reply, proven_off, detail, domain } = outcome;
        let is_known = *detail != Detail::Unknown;
        let detail = match domain {
            Some(domain) => format!("{detail}: {domain}"),
            None => detail.to_string(),
        };
        Self { reply: *reply, proven_off: *proven_off, detail, is_known }
    }
}

/// How long a domain's way between two hosts is waited for before nothing is said of it.
pub(super) const ON_ITS_WAY: Duration = Duration::from_secs(8);

/// How long a host waits for a connection to a libvirt that restarts before it says that it has
/// none.
const RENEWAL: Duration = Duration::from_secs(5);

/// Carries an order out on a host that cannot ask the others: `why`. Only what runs here is known.
/// An off of it is proven by its death. Everything else may be otherwise on another host.
pub(super) async fn alone(
    hypervisors: &Hypervisors,
    order: &Authorized,
    requester: Option<Requester>,
    deadline: &Deadline,
    why: &str,
) -> Verdict {
    let by = deadline.by().min(Instant::now() + ON_ITS_WAY);
    let unasked = |here: &str| Verdict::failure(format!("{here}, and the other hosts cannot be asked: {why}"));
    let may_be_arriving = "it may be on its way here from another host";
    let mut is_certain = true;
    match hypervisors.standing(order.target(), by).await {
        Standing::Runs(_) => {}
        // What there is may be killed, and nothing may be started beside its source.
        Standing::MayBeArriving(_) if order.op() == Op::Reboot => return unasked(may_be_arriving),
        Standing::MayBeArriving(_) => is_certain = false,
        Standing::Off(_) => return unasked("it does not run here"),
        Standing::Arriving(_) => return unasked("it is on its way here from another host"),
        Standing::Moved(_) => return unasked("it has moved to another host"),
        Standing::Unknown => return unasked("no such domain here"),
        Standing::Unclear(doubt) => return unasked(&doubt),
    }
    let outcome = hypervisors.carry_out(order, requester, deadline).await;
    match order.op() {
        Op::Off if outcome.reply == Reply::Success && !is_certain => unasked(may_be_arriving),
        Op::Off | Op::Reboot if outcome.reply == Reply::Success && !outcome.has_died() => {
            unasked("it ended here before it was fenced")
        }
        Op::Status if outcome.reply == Reply::Off => unasked("it ended here meanwhile"),
        Op::Off | Op::Reboot | Op::Status | Op::On => Verdict::from(&outcome),
        Op::Null | Op::DevStatus | Op::HostList => Verdict::failure("the operation is not about a domain"),
    }
}

/// What the domain is to this host.
pub(super) async fn look(hypervisors: &Hypervisors, target: &Target, is_start: bool) -> Look {
    // Before the look: what appears from now on changes the count.
    let changes = hypervisors.appearances(target);
    let standing = hypervisors.standing(target, Instant::now() + ON_ITS_WAY).await;
    let (state, domain) = match standing {
        // A start that nobody has decided on will not come by itself.
        Standing::Runs(Some(domain)) if is_start && hypervisors.is_restart_held(domain.uuid) => {
            (LocalState::CannotTell("its restart waits for a decision there".to_owned()), Some(domain))
        }
        Standing::Runs(domain) => (LocalState::RunsHere, domain),
        Standing::Arriving(domain) => (LocalState::Arriving, domain),
        Standing::MayBeArriving(domain) => (LocalState::MayBeArriving, domain),
        // Another host starts it.
        Standing::Moved(domain) if is_start => (LocalState::NotHere, domain),
        Standing::Off(Some(domain)) if is_start && !hypervisors.is_defined(domain.uuid).await => {
            (LocalState::NotHere, Some(domain))
        }
        Standing::Off(domain) | Standing::Moved(domain) => (LocalState::DefinedHere, domain),
        Standing::Unknown => (LocalState::NotHere, None),
        Standing::Unclear(doubt) => (LocalState::CannotTell(doubt), None),
    };
    let (uuid, name) = domain.map(|domain| (domain.uuid, domain.name)).unzip();
    Look { state, uuid, name, changes }
}

/// All domains of this host, asked afresh. What may run on another host is off here: that host
/// speaks for itself.
///
/// # Errors
/// Why the list would be shorter than the truth.
pub(super) async fn list(hypervisors: &Hypervisors) -> Result<Vec<HostDomain>, String> {
    let listing = hypervisors.list().await;
    if let Some((uri, error)) = listing.failed.first() {
        return Err(format!("{uri} was never seen: {error}"));
    }
    let domain = |listed: crate::hypervisor::Listed| {
        let state = if listed.elsewhere { SHUT_OFF } else { listed.state };
        HostDomain { uuid: listed.uuid, name: listed.name, state }
    };
    Ok(listing.domains.into_iter().map(domain).collect())
}

/// All domains that the tables know, for the other hosts to remember.
pub(super) fn known(hypervisors: &Hypervisors) -> Vec<HostDomain> {
    let domains = hypervisors.view().into_iter().flat_map(|uri| uri.domains);
    let domain = |domain: crate::hypervisor::DomainView| {
        let state = match domain.state {
            DomainState::Active(_) | DomainState::Dying | DomainState::Lost => RUNNING,
            DomainState::Off | DomainState::MovedAway | DomainState::Dead => SHUT_OFF,
        };
        HostDomain { uuid: domain.uuid, name: domain.name, state }
    };
    let mut all: Vec<_> = domains.map(domain).collect();
    all.sort_by_key(|domain| (domain.uuid, domain.state));
    // Two URIs may lead to one hypervisor.
    all.dedup_by_key(|domain| domain.uuid);
    all
}

/// Whether libvirt is well here.
///
/// # Errors
/// It is not.
pub(super) async fn check(hypervisors: &Hypervisors) -> Result<(), String> {
    if hypervisors.any_connected_within(RENEWAL).await { Ok(()) } else { Err("no hypervisor is connected".to_owned()) }
}

/// How an act ended, for the other hosts.
pub(super) fn end(op: Op, outcome: &Outcome) -> ActEnd {
    match (op, outcome.reply) {
        (Op::Off | Op::Reboot, Reply::Success) if outcome.has_died() => ActEnd::ProvenOff,
        // It ran here when it was looked for. It may have been a copy that was on its way in.
        (Op::Off | Op::Reboot, Reply::Success) => ActEnd::Gone,
        (_, Reply::Success) => ActEnd::Done,
        (Op::Off | Op::Reboot, _) if outcome.may_have_killed() => ActEnd::Unproven(Verdict::from(outcome).detail),
        (_, Reply::Failure | Reply::Off | Reply::PermissionDenied) => ActEnd::Failed(Verdict::from(outcome).detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{CallError, State, Unproven};

    #[test]
    fn an_off_that_found_nothing_is_no_proof_and_one_that_failed_may_have_killed() {
        let was = State::RUNNING;
        let end_of = |reply, detail| {
            let outcome = Outcome { reply, proven_off: None, detail, domain: None };
            match end(Op::Off, &outcome) {
                ActEnd::ProvenOff => "proven",
                ActEnd::Gone => "gone",
                ActEnd::Failed(_) => "failed",
                ActEnd::Unproven(_) => "unproven",
                ActEnd::Done => "done",
            }
        };
        for (detail, expected) in [
            (Detail::Destroyed { was }, "proven"),
            (Detail::SeenDead, "proven"),
            (Detail::RestartCancelled, "proven"),
            (Detail::AlreadyOff, "gone"),
        ] {
            assert_eq!(end_of(Reply::Success, detail), expected);
        }
        let failed = |error| Detail::Failed { uri: "x:///".into(), error };
        for (detail, expected) in [
            (Detail::NotProvenOff { was, why: Unproven::Orphan }, "unproven"),
            (Detail::Late, "unproven"),
            (failed(CallError::Overdue), "unproven"),
            (failed(CallError::NotBegun), "failed"),
            (Detail::NotProvenOff { was, why: Unproven::Migrating }, "failed"),
            (Detail::MovedAway, "failed"),
            (Detail::Occupied, "failed"),
        ] {
            assert_eq!(end_of(Reply::Failure, detail), expected);
        }
    }
}
