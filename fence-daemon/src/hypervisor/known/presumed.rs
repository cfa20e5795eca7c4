//! Where "off" passes: each word for it, libvirt's or a dead process's, is put before this host's own processes ([`host`](crate::hypervisor::process::host)).

use std::sync::Arc;

use fence_common::target::Target;
use fence_common::wire::Reply;
use uuid::Uuid;

use super::query_all::Found;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::fence::act::Place;
use crate::hypervisor::fence::outcome::{Detail, Identity, Outcome};
use crate::hypervisor::libvirt::connection::Uri;
use crate::hypervisor::libvirt::domain::{Off, Power, Source, State, Unproven};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::process::host::{Cleared, Left, Look, Remains, Whom};
use crate::hypervisor::process::victim::{Driver, Job};
use crate::hypervisor::{Inner, Listing};

/// `VIR_DOMAIN_RUNNING`: what a domain is whose process lives, and of which libvirt knows no state.
const RUNNING: u8 = 1;
/// `VIR_DOMAIN_SHUTOFF`, as a host list has it.
const SHUT_OFF: u8 = 5;

/// How long after the last moment to begin what this host finds may take to die: an answer must still be in time.
const CLEAR: std::time::Duration = std::time::Duration::from_secs(3);

/// An order's "off" passes only where nothing of the domain lives on this host. What libvirt has lost is killed. `had_strays`: some of that
/// has been killed for this order before.
pub(crate) async fn off(
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
pub(crate) async fn is_alone(inner: &Inner, uri: &Uri, domain: &Identity) -> bool {
    if !uri.table.strays(domain.uuid).is_empty() {
        return false;
    }
    let Some(whom) = Whom::at(&uri.table, domain.uuid, &domain.name) else { return true };
    matches!(inner.host.remains_now(&whom).await, Remains::Living(found) if found.len() == 1)
}

/// Whom a word about a domain at a URI is put before, each once, with the index of the URI: the domain there; and a machine of this host
/// with that UUID, since a URI without a driver may speak of it too. A container is told by its own URI alone.
pub(crate) fn whoms(uris: &[Arc<Uri>], place: usize, uuid: Uuid, name: &str) -> Vec<(usize, Whom)> {
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
pub(crate) async fn status(inner: &Inner, found: &[Found]) -> Outcome {
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
        Remains::Doubt(why) => Some(Outcome::failure(doubt(why))),
    }
}

/// What `status` says of a target that no URI speaks of: on where this host has a process of it.
pub(crate) async fn unknown_status(inner: &Inner, target: &Target) -> Option<Outcome> {
    let look = inner.host.look(Vec::new()).await;
    for Unknown { place, domain, .. } in unknown(inner, &look, target, &[]) {
        let whom = Whom::at(&inner.uris.get(place)?.table, domain.uuid, &domain.name)?;
        if let Some(outcome) = status_of(inner, &whom).await {
            return Some(outcome.about(domain));
        }
    }
    None
}

/// Whether something of a domain that is off by libvirt's word lives here, for people who ask how things are.
pub(crate) async fn lives(inner: &Inner, found: &Found) -> bool {
    for (_, whom) in whoms(&inner.uris, found.place, found.seen.uuid, &found.seen.name) {
        if !matches!(inner.host.remains_now(&whom).await, Remains::Nothing) {
            return true;
        }
    }
    false
}

/// A domain of which this host has processes, whatever the URIs say of it.
struct Unknown {
    /// The URI's index.
    place: usize,
    domain: Identity,
    /// Whether it may be on its way to or from another host, by libvirt's status files: it is not to be killed then.
    may_be_elsewhere: bool,
}

/// The domains that a target means by this host's own processes, and the machines with these UUIDs.
fn unknown(inner: &Inner, look: &Look, target: &Target, machines: &[Uuid]) -> Vec<Unknown> {
    let mut all: Vec<Unknown> = Vec::new();
    for (driver, uuid, name) in look.domains() {
        let is_meant = match target {
            Target::Uuid(wanted) => uuid == *wanted,
            Target::Name(wanted) => name == Some(wanted.as_str()),
        };
        let is_meant = is_meant || driver == Driver::Qemu && machines.contains(&uuid);
        let Some(place) = inner.uris.iter().position(|uri| uri.table.driver == Some(driver)) else { continue };
        if !is_meant || all.iter().any(|known| known.place == place && known.domain.uuid == uuid) {
            continue;
        }
        let name = name.map_or_else(|| uuid.to_string(), str::to_owned);
        let uri = &inner.uris[place];
        // A URI that answers has lost it, and its file with it; one that does not may be in the middle of a migration.
        let may_be_elsewhere = match Job::on_record(driver, &name) {
            Job::None => false,
            Job::Unknown => !uri.is_lively(),
            Job::Leaving | Job::Arriving => true,
        };
        let may_be_elsewhere = may_be_elsewhere || uri.table.is_elsewhere(uuid);
        all.push(Unknown { place, domain: Identity { uri: Arc::clone(&uri.text), uuid, name }, may_be_elsewhere });
    }
    all
}

/// Adds to the places of an order to kill what only this host's own processes speak of: what libvirt has lost, or cannot speak of now.
///
/// Where nobody speaks of the target all that it means by its processes is added. Beside a URI's word only the very domain counts: a
/// machine with the UUID that this URI speaks of, and what a silent URI spoke of last. A namesake is another domain.
pub(crate) async fn add_unknown(inner: &Inner, target: &Target, places: &mut Vec<Place>) {
    let driver = |number: usize| inner.uris.get(number).and_then(|uri| uri.table.driver);
    let nobody_speaks = places.iter().all(|place| place.veto.is_some());
    // A container is no machine.
    let machines = places.iter().filter(|place| driver(place.number) != Some(Driver::Lxc));
    let machines = super::query_all::sorted(machines.map(|place| place.domain.uuid));
    let is_spoken_of = |places: &[Place], of: Driver, uuid| {
        places.iter().any(|it| it.veto.is_none() && it.domain.uuid == uuid && driver(it.number) == Some(of))
    };
    let runs_machines = inner.uris.iter().any(|uri| uri.table.driver == Some(Driver::Qemu));
    let is_lost = runs_machines && machines.iter().any(|uuid| !is_spoken_of(places, Driver::Qemu, *uuid));
    let is_silent = places.iter().any(|place| place.veto.is_some() && driver(place.number).is_some());
    if !nobody_speaks && !is_lost && !is_silent {
        return;
    }
    let look = inner.host.look(Vec::new()).await;
    for Unknown { place: number, domain, may_be_elsewhere } in unknown(inner, &look, target, &machines) {
        let Some(of) = driver(number) else { continue };
        let is_it = |place: &Place| place.domain.uuid == domain.uuid && driver(place.number) == Some(of);
        let is_the_very_one =
            places.iter().any(is_it) || of == Driver::Qemu && machines.contains(&domain.uuid) || nobody_speaks;
        if is_spoken_of(places, of, domain.uuid) || !is_the_very_one {
            continue;
        }
        let mut place =
            Place { number, domain, power: Power::Active(State(RUNNING)), entry: None, veto: None, by_host: true };
        let is_it = |known: &Place| known.domain.uuid == place.domain.uuid && driver(known.number) == Some(of);
        // It lives, so that nobody may say that it is off; and another host may go on with it, so that its death says nothing.
        let has_moved = places.iter().any(|known| is_it(known) && known.power == Power::MovedAway);
        if has_moved || may_be_elsewhere {
            tracing::warn!(domain = %place.domain, "a process of it lives, and it may be on its way to or from another host");
            if !places.iter().any(is_it) {
                let why = "a process of it lives here, and it may be on its way to or from another host".to_owned();
                place.veto = Some(doubt(why));
                places.push(place);
            }
            continue;
        }
        places.retain(|known| !is_it(known));
        places.push(place);
    }
    // Where the processes could not be looked at nobody may say that nothing of it lives here.
    let Some(number) = inner.uris.iter().position(|uri| uri.table.driver == Some(Driver::Qemu)) else { return };
    for uuid in machines {
        let here = |place: &&Place| place.domain.uuid == uuid && driver(place.number) == Some(Driver::Qemu);
        let spoken =
            places.iter().find(|place| place.domain.uuid == uuid).filter(|_| !places.iter().any(|it| here(&it)));
        let Some(domain) = spoken.map(|place| place.domain.clone()) else { continue };
        let uri = &inner.uris[number];
        let Some(whom) = Whom::at(&uri.table, uuid, &domain.name) else { continue };
        if !matches!(look.remains(&whom), Remains::Nothing)
            && let Some(why) = doubtful(inner.host.remains(&whom).await)
        {
            let (power, veto) = (Power::Active(State(RUNNING)), Some(doubt(why)));
            let domain = Identity { uri: Arc::clone(&uri.text), ..domain };
            places.push(Place { number, domain, power, entry: None, veto, by_host: true });
        }
    }
}

/// Why it cannot be said that nothing is left, after a look that could not tell.
fn doubtful(remains: Remains) -> Option<String> {
    match remains {
        Remains::Nothing => None,
        Remains::Living(_) => Some("a process of it has only now been found".to_owned()),
        Remains::Doubt(why) => Some(why),
    }
}

/// Why nobody says that a domain is off.
fn doubt(why: String) -> Detail {
    Detail::NotProvenOff { was: State(RUNNING), why: Unproven::Left(Left::Doubt(why)) }
}

/// Shows as running what is off by libvirt's word and lives.
pub(crate) async fn correct(inner: &Inner, listing: &mut Listing) {
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
