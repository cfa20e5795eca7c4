//! The host list: all domains of all URIs.
//!
//! A cluster takes its targets from this list. If it fails, the cluster keeps the targets that it
//! has. If it is shorter than the truth, the cluster loses targets. So a successful list is never
//! too short:
//!
//! | the URI | its domains |
//! |---|---|
//! | answers | what it says; states of instances as the table has them |
//! | does not answer, and its table was filled before | what was last known; their states by their own processes |
//! | does not answer, and nothing was ever known of it | unknown: the list fails |
//! | answers that the hypervisor's driver is not there | none |
//! | does not answer, is this host's own, libvirt keeps no file of any domain there, and another URI answers | none |
//!
//! The last line is for an unused `lxc:///` whose daemon is not installed: it must not make every
//! list fail.
//!
//! On the wire a domain is on or off, and clients print "off" for everything that does not run. So
//! a domain that has moved away, or is leaving, is listed as running: nobody here knows that it is
//! off.

use std::sync::Arc;

use fence_common::domain_state::{RUNNING, SHUT_OFF};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{Entry, Instance, Known, Uri};
use crate::hypervisor::libvirt::{CallError, Connect, Lane, Row, State, domain};
use crate::hypervisor::process::{Driver, Remains};

/// One domain of a [`Listing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// libvirt's `virDomainState`.
    pub state: u8,
    /// The URI that has it.
    pub uri: Arc<str>,
    /// Whether it is off here, and runs as far as this host knows because it may run on another.
    pub elsewhere: bool,
}

/// All known domains.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// The domains, in the order of the configured URIs.
    pub domains: Vec<Listed>,
    /// The URIs that did not answer, and why. Their domains are listed as they were last known.
    pub remembered: Vec<(Arc<str>, CallError)>,
    /// The URIs that did not answer, and why. Nothing is known of their domains.
    pub failed: Vec<(Arc<str>, CallError)>,
}

/// Lists of one URI that may be under way. A domain that libvirt is busy with holds each of them
/// up, and other questions need threads as well.
pub(crate) const LISTS_AT_ONCE: usize = 2;

impl Known {
    /// Asks every URI for all its domains.
    pub(crate) async fn list(&self) -> Listing {
        let bound = Instant::now() + self.look_up;
        let mut asked: Vec<_> = Vec::new();
        for uri in &self.uris {
            let asks = Arc::clone(uri);
            asked.push((uri, tokio::spawn(async move { rows(&asks, bound).await })));
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
            let name = || Arc::clone(&uri.text);
            match answer {
                Ok(domains) => {
                    answered = true;
                    listing.domains.extend(domains.into_iter().map(|row| listed(uri, row)));
                }
                // There is no hypervisor of this kind, so there are no domains.
                Err(_) if uri.state().borrow().absent => {}
                Err(error) if uri.table.is_filled() => {
                    listing.domains.extend(last_known(uri));
                    answered = true;
                    listing.remembered.push((name(), error));
                }
                Err(error) if uri.table.driver.is_some_and(Driver::keeps_no_domain) => unused.push((name(), error)),
                Err(error) => listing.failed.push((name(), error)),
            }
        }
        if !answered {
            listing.failed.extend(unused);
        }
        self.correct(&mut listing).await;
        listing
    }

    /// Lists as running what is off by libvirt's word and lives on this host.
    async fn correct(&self, listing: &mut Listing) {
        let whom = |listed: &Listed| {
            let uri = self.uris.iter().find(|known| known.text == listed.uri)?;
            uri.table.whom(listed.uuid, &listed.name).filter(|_| listed.state == SHUT_OFF)
        };
        if !listing.domains.iter().any(|listed| whom(listed).is_some()) {
            return;
        }
        let look = self.host.look(Vec::new()).await;
        for listed in &mut listing.domains {
            if whom(listed).is_some_and(|whom| !matches!(look.remains(&whom), Remains::Nothing)) {
                listed.state = RUNNING;
            }
        }
    }
}

/// All domains of a URI. libvirt's QEMU driver holds a domain while it destroys it, and a list
/// waits for each domain. So libvirt is not asked about killed domains that cannot die: their own
/// processes tell.
async fn rows(uri: &Arc<Uri>, bound: Instant) -> Result<Vec<Row>, CallError> {
    let Some(known) = uri.table.dying() else {
        // The turn ends when libvirt has answered, not when the caller has given up.
        let turn = Arc::clone(&uri.lists).acquire_owned().await.map_err(|_| CallError::NotBegun)?;
        let states = uri.table.states();
        let list = move |connect: &Connect| {
            let _turn = turn;
            domain::list(connect, &states)
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

/// A row of a host list. A dead domain is listed as off, also before libvirt has noticed.
fn listed(uri: &Uri, row: Row) -> Listed {
    let Row { name, uuid, id, state: State(state) } = row;
    let state = match (uri.table.is_dead(uuid, id), uri.table.orphans(uuid).is_empty()) {
        (_, false) => RUNNING,
        (true, true) => SHUT_OFF,
        (false, true) => state,
    };
    let elsewhere = state == SHUT_OFF && uri.table.may_run_elsewhere(uuid);
    let state = if elsewhere { RUNNING } else { state };
    Listed { name, uuid, state, uri: Arc::clone(&uri.text), elsewhere }
}

/// What was last known of a URI's domains.
fn last_known(uri: &Uri) -> Vec<Listed> {
    let listed = |(uuid, entry): (_, Entry)| {
        let (state, elsewhere) = match entry.instance.filter(Instance::may_live) {
            _ if !uri.table.orphans(uuid).is_empty() => (RUNNING, false),
            Some(instance) => (instance.state.0, false),
            None if uri.table.may_run_elsewhere(uuid) => (RUNNING, true),
            None => (SHUT_OFF, false),
        };
        Listed { name: entry.name, uuid, state, uri: Arc::clone(&uri.text), elsewhere }
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
