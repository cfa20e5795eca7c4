//! Where "off" passes: each word for it, libvirt's or a dead process's, is put before this host's own processes ([`host`](super::host)).

use std::sync::Arc;

use fence_common::wire::Reply;
use uuid::Uuid;

use super::connection::Uri;
use super::deadline::Deadline;
use super::domain::{Off, Source, State, Unproven};
use super::error::CallError;
use super::host::{Cleared, Left, Look, Remains, Whom};
use super::outcome::{Detail, Identity, Outcome};
use super::survey::Found;
use super::victim::{Driver, Job};
use super::{Inner, Listing};
use crate::policy::Target;

/// `VIR_DOMAIN_RUNNING`: what a domain is whose process lives, and of which libvirt knows no state.
const RUNNING: u8 = 1;
/// `VIR_DOMAIN_SHUTOFF`, as a host list has it.
const SHUT_OFF: u8 = 5;

/// How long after the last moment to begin what this host finds may take to die: an answer must still be in time.
const CLEAR: std::time::Duration = std::time::Duration::from_secs(3);

/// An order's "off" passes only where nothing of the domain lives on this host. What libvirt has lost is killed. `had_strays`: some of that
/// has been killed for this order before.
pub(super) async fn off(
    inner: &Inner,
    uri: &Uri,
    domain: &Identity,
    said: Result<Off, CallError>,
    had_strays: bool,
    deadline: &Deadline,
) -> Result<Off, CallError> {
    let was = match &said {
        Ok(Off::Proven { was, .. }) => *was,
        Ok(Off::Already(_) | Off::Gone) => State(RUNNING),
        Ok(Off::MovedAway | Off::Unproven { .. }) | Err(_) => return said,
    };
    let Some(whom) = Whom::at(&uri.table, domain.uuid, &domain.name) else { return said };
    // It may be on its way here since that was said.
    if matches!(Job::on_record(whom.driver, &whom.name), Job::Leaving | Job::Arriving) {
        return Ok(Off::Unproven { was, why: Unproven::Migrating });
    }
    Ok(match (inner.host.clear(&whom, None, deadline, deadline.by() + CLEAR).await, said?) {
        (Err(left), _) => Off::Unproven { was, why: Unproven::Left(left) },
        // Of a domain that libvirt has lost nothing but a definition can be started again.
        (Ok(Cleared { at, killed }), Off::Already(_) | Off::Gone) if had_strays || !killed.is_empty() => {
            Off::Proven { was, at, source: Source::Definition }
        }
        (Ok(Cleared { at, .. }), Off::Already(_)) => Off::Already(at),
        (Ok(Cleared { at, .. }), Off::Proven { source, .. }) => Off::Proven { was, at, source },
        (Ok(_), said) => said,
    })
}

/// Whether no more than one process of a domain lives here: a reset ends nothing but what that one was doing.
pub(super) async fn is_alone(inner: &Inner, uri: &Uri, domain: &Identity) -> bool {
    if !uri.table.strays(domain.uuid).is_empty() {
        return false;
    }
    let Some(whom) = Whom::at(&uri.table, domain.uuid, &domain.name) else { return true };
    matches!(inner.host.remains_now(&whom).await, Remains::Living(found) if found.len() == 1)
}

/// Whom a word about a domain at a URI is put before, each once, with the index of the URI: the domain there; and a machine of this host
/// with that UUID, since a URI without a driver may speak of it too. A container is told by its own URI alone.
pub(super) fn whoms(uris: &[Arc<Uri>], place: usize, uuid: Uuid, name: &str) -> Vec<(usize, Whom)> {
    let driver = |number: usize| uris.get(number).and_then(|uri| uri.table.driver);
    let machines = (0..uris.len()).filter(|number| driver(*number) == Some(Driver::Qemu));
    let others = machines.filter(|_| driver(place) != Some(Driver::Lxc));
    let mut whoms: Vec<(usize, Whom)> = Vec::new();
    for number in std::iter::once(place).chain(others) {
        let whom = uris.get(number).and_then(|uri| Whom::at(&uri.table, uuid, name));
        if let Some(whom) = whom.filter(|whom| !whoms.iter().any(|(_, known)| known == whom)) {
            whoms.push((number, whom));
        }
    }
    whoms
}

/// What `status` makes of an "off" at these places: on, or a failure, if this host says so of any of them.
pub(super) async fn status(inner: &Inner, found: &[Found]) -> Outcome {
    let mut asked: Vec<Whom> = Vec::new();
    for Found { place, seen } in found {
        for (number, whom) in whoms(&inner.uris, *place, seen.uuid, &seen.name) {
            if asked.contains(&whom) {
                continue;
            }
            if let Some(outcome) = status_of(inner, &whom).await {
                let uri = inner.uris.get(number).map(|uri| Arc::clone(&uri.text));
                let domain = uri.map(|uri| Identity { uri, uuid: whom.uuid, name: whom.name });
                return Outcome { domain, ..outcome };
            }
            asked.push(whom);
        }
    }
    let domain = found.first().and_then(|found| found.identity(&inner.uris));
    Outcome { domain, ..Outcome::found(Reply::Off, Detail::ShutOff) }
}

/// On where something of the domain lives, a failure where that cannot be told, `None` where nothing does.
async fn status_of(inner: &Inner, whom: &Whom) -> Option<Outcome> {
    match inner.host.remains(whom).await {
        Remains::Nothing => None,
        Remains::Living(_) => Some(Outcome::found(Reply::Success, Detail::Active(State(RUNNING)))),
        Remains::Doubt(why) => {
            let (was, why) = (State(RUNNING), Unproven::Left(Left::Doubt(why)));
            Some(Outcome::failure(Detail::NotProvenOff { was, why }))
        }
    }
}

/// What `status` says of a target that no URI speaks of: on where this host has a process of it.
pub(super) async fn unknown_status(inner: &Inner, target: &Target) -> Option<Outcome> {
    for Unknown { place, domain } in unknown(inner, target, false).await {
        let whom = Whom::at(&inner.uris.get(place)?.table, domain.uuid, &domain.name)?;
        if let Some(outcome) = status_of(inner, &whom).await {
            return Some(outcome.about(domain));
        }
    }
    None
}

/// Whether something of a domain that is off by libvirt's word lives here, for people who ask how things are.
pub(super) async fn lives(inner: &Inner, found: &Found) -> bool {
    for (_, whom) in whoms(&inner.uris, found.place, found.seen.uuid, &found.seen.name) {
        if !matches!(inner.host.remains_now(&whom).await, Remains::Nothing) {
            return true;
        }
    }
    false
}

/// A domain that no URI speaks of, and of which this host has processes.
pub(super) struct Unknown {
    /// The URI's index.
    pub(super) place: usize,
    pub(super) domain: Identity,
}

/// The domains that a target means by this host's own processes. `to_kill`: not those that may be on their way to or from another
/// host, by libvirt's status files.
pub(super) async fn unknown(inner: &Inner, target: &Target, to_kill: bool) -> Vec<Unknown> {
    let look = inner.host.look(Vec::new()).await;
    let mut all: Vec<Unknown> = Vec::new();
    for (driver, uuid, name) in look.domains() {
        let is_meant = match target {
            Target::Uuid(wanted) => uuid == *wanted,
            Target::Name(wanted) => name == Some(wanted.as_str()),
        };
        let place = inner.uris.iter().position(|uri| uri.table.driver == Some(driver));
        let Some(place) = place.filter(|_| is_meant && !all.iter().any(|known| known.domain.uuid == uuid)) else {
            continue;
        };
        let name = name.map_or_else(|| uuid.to_string(), str::to_owned);
        let uri = &inner.uris[place];
        // A URI that answers has lost it, and its file with it; one that does not may be in the middle of a migration.
        let job = Job::on_record(driver, &name);
        let may_be_elsewhere = match job {
            Job::None => false,
            Job::Unknown => !uri.is_lively(),
            Job::Leaving | Job::Arriving => true,
        };
        if to_kill && (may_be_elsewhere || uri.table.is_elsewhere(uuid)) {
            tracing::warn!(domain = %name.escape_debug(), ?job, "a process of it lives, and it may be on its way to or from another host");
            continue;
        }
        all.push(Unknown { place, domain: Identity { uri: Arc::clone(&uri.text), uuid, name } });
    }
    all
}

/// Shows as running what is off by libvirt's word and lives.
pub(super) async fn correct(inner: &Inner, listing: &mut Listing) {
    let local =
        |uri: &str| inner.uris.iter().find(|known| *known.text == *uri).filter(|known| known.table.driver.is_some());
    if !listing.domains.iter().any(|listed| listed.state == SHUT_OFF && local(&listed.uri).is_some()) {
        return;
    }
    let look = inner.host.look(Vec::new()).await;
    for listed in listing.domains.iter_mut().filter(|listed| listed.state == SHUT_OFF) {
        if let Some(uri) = local(&listed.uri)
            && may_live(&look, uri, listed.uuid, &listed.name)
        {
            listed.state = RUNNING;
        }
    }
}

fn may_live(look: &Look, uri: &Uri, uuid: Uuid, name: &str) -> bool {
    Whom::at(&uri.table, uuid, name).is_some_and(|whom| !matches!(look.remains(&whom), Remains::Nothing))
}
