//! The host list: all domains of all URIs.
//!
//! A cluster takes its targets from this list. One that fails lets the cluster keep those that it
//! has; one that is shorter than the truth takes them away. So a list is never shorter as a
//! success:
//!
//! | the URI | its domains |
//! |---|---|
//! | answers | what it says |
//! | does not answer, and its table was filled before | what was last known; their states by their own processes |
//! | does not answer, and nothing was ever known of it | unknown: the list fails |
//! | answers that the hypervisor's driver is not there | none |
//! | does not answer, is this host's own, libvirt keeps no file of any domain there, and another URI answers | none |
//!
//! The last line is for an unused `lxc:///` whose daemon is not installed: it must not make every list fail.
//!
//! On the wire a domain is on or off, and clients print "off" of everything that does not run. So a
//! domain that has moved away, or is leaving, is listed as running: "off" would be more than
//! anybody here knows.

use std::sync::Arc;

use tokio::time::{Instant, timeout_at};
use virt::connect::Connect;

use super::query_all::{RUNNING, SHUT_OFF};
use crate::hypervisor::libvirt::connection::Uri;
use crate::hypervisor::libvirt::domain::{self, Row, State};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;
use crate::hypervisor::process::victim::Driver;
use crate::hypervisor::{Limits, Listed, Listing};

/// Lists of one URI that may be under way. One domain that libvirt is busy with holds each of them up, and
/// the threads for questions are needed for others.
pub(crate) const LISTS_AT_ONCE: usize = 2;

/// Asks every URI for all its domains.
pub(crate) async fn list(uris: &[Arc<Uri>], limits: &Limits) -> Listing {
    let bound = Instant::now() + limits.look_up;
    let mut asked: Vec<_> = Vec::new();
    for uri in uris {
        let uri = Arc::clone(uri);
        let task = tokio::spawn({
            let uri = Arc::clone(&uri);
            async move { rows(&uri, bound).await }
        });
        asked.push((uri, task));
    }
    let mut listing = Listing::default();
    let (mut answered, mut unused) = (false, Vec::new());
    for (uri, mut task) in asked {
        let answer = match timeout_at(bound, &mut task).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(CallError::NotBegun),
            Err(_) => {
                task.abort();
                Err(CallError::Overdue)
            }
        };
        match answer {
            Ok(domains) => {
                answered = true;
                listing.domains.extend(domains.into_iter().map(|row| listed(&uri, row)));
            }
            // There is no hypervisor of this kind, so there are no domains.
            Err(_) if uri.state().borrow().absent => {}
            Err(error) if !uri.table.is_filled() && uri.table.driver.is_some_and(Driver::keeps_no_domain) => {
                unused.push((Arc::clone(&uri.text), error));
            }
            Err(error) if uri.table.is_filled() => {
                listing.domains.extend(last_known(&uri));
                answered = true;
                listing.remembered.push((Arc::clone(&uri.text), error));
            }
            Err(error) => listing.failed.push((Arc::clone(&uri.text), error)),
        }
    }
    if !answered {
        listing.failed.extend(unused);
    }
    listing
}

/// All domains of a URI. libvirt's QEMU driver holds a domain for as long as it destroys it, and a
/// list waits for each: so while there are some that are killed and cannot die, they are left out
/// of what it is asked, and told by their own processes.
async fn rows(uri: &Arc<Uri>, bound: Instant) -> Result<Vec<Row>, CallError> {
    let Some(known) = uri.table.dying() else {
        // It ends when libvirt has answered, and not when nobody waits for that any more.
        let turn = Arc::clone(&uri.lists).acquire_owned().await.map_err(|_| CallError::NotBegun)?;
        let list = move |connect: &Connect| {
            let _turn = turn;
            domain::list(connect)
        };
        return uri.call(Lane::Query, bound, list).await;
    };
    if !uri.table.is_filled() {
        return Err(CallError::Busy(
            "it does not list its domains while one of them is killed, and not all were seen before",
        ));
    }
    let (dying, others): (Vec<_>, Vec<_>) =
        known.into_iter().partition(|(_, entry)| entry.victim().is_some_and(|victim| victim.is_dying()));
    let others = others.into_iter().map(|(uuid, _)| uuid).collect();
    let mut rows = uri.call(Lane::Query, bound, move |connect| domain::list_each(connect, others)).await?;
    rows.extend(dying.into_iter().filter_map(|(uuid, entry)| {
        let instance = entry.instance?;
        Some(Row { name: entry.name, uuid, id: Some(instance.id), state: instance.state })
    }));
    Ok(rows)
}

/// A row of a host list. What is dead is shown so, even where libvirt has not noticed yet.
fn listed(uri: &Uri, row: Row) -> Listed {
    let Row { name, uuid, id, state: State(state) } = row;
    let state = match (uri.table.is_dead(uuid, id), uri.table.strays(uuid).is_empty()) {
        (_, false) => RUNNING,
        (true, true) => SHUT_OFF,
        (false, true) => state,
    };
    let state = if state == SHUT_OFF && uri.table.may_run_elsewhere(uuid) { RUNNING } else { state };
    Listed { name, uuid, state, uri: Arc::clone(&uri.text) }
}

/// What was last known of a URI's domains. One that ran and whose process is not known counts as
/// running.
fn last_known(uri: &Uri) -> Vec<Listed> {
    let listed = |(uuid, entry): (_, super::table::Entry)| {
        let alive = entry.instance.filter(|known| known.victim.is_none() || known.living().is_some());
        let state = match alive {
            _ if !uri.table.strays(uuid).is_empty() => RUNNING,
            Some(instance) => instance.state.0,
            None if uri.table.may_run_elsewhere(uuid) => RUNNING,
            None => SHUT_OFF,
        };
        Listed { name: entry.name, uuid, state, uri: Arc::clone(&uri.text) }
    };
    let mut domains: Vec<_> = uri.table.all().into_iter().map(listed).collect();
    domains.sort_by(|one, other| one.name.cmp(&other.name));
    domains
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_that_hang_leave_threads_for_others() {
        for is_remote in [false, true] {
            assert!(LISTS_AT_ONCE < Lane::Query.calls(is_remote));
        }
    }
}
