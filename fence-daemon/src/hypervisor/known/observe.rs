//! A look at one domain for its URI's table: what libvirt says of it, and its process held by a
//! pidfd.

use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Entry, Instance, Table, Uri};
use crate::hypervisor::libvirt::xml::{self, DeviceSocket};
use crate::hypervisor::libvirt::{CallError, Connect, Domain, Lane, Power, domain};
use crate::hypervisor::process::{Disks, Victim, VictimError};

/// What was observed of a domain.
#[derive(Default)]
struct Observed {
    /// How it is. `None`: there is no such domain.
    entry: Option<Entry>,
    /// Why its process is not at hand although it runs.
    lacking: Option<VictimError>,
    /// Whether it has been stopped for another host to go on with it. `None`: not known.
    leaving: Option<bool>,
    /// The XML of a transient domain that runs. Without it a reboot could not bring the domain back
    /// while libvirt is silent.
    xml: Option<Arc<Zeroizing<String>>>,
    /// Its disks by its definition, if that could be had.
    disks: Option<Disks>,
    /// Where its devices listen while it runs.
    sockets: Vec<DeviceSocket>,
}

/// Looks at one domain, and enters how it is. Returns why its process is not at hand although it
/// runs.
pub(super) async fn observe(uri: &Uri, uuid: Uuid, begin_by: Instant) -> Result<Option<VictimError>, CallError> {
    let table = Arc::clone(&uri.table);
    let generation = table.generation();
    let look = move |connect: &Connect| {
        let (old, departures) = (table.get(uuid), table.departures(uuid));
        let Observed { entry, lacking, leaving, xml, disks, sockets } =
            look_at(connect, uuid, &table, old.as_ref(), generation)?;
        // Nothing is entered that was seen over an earlier connection.
        if table.generation() == generation {
            if let Some(leaving) = leaving {
                table.note_seen(uuid, leaving, departures);
            }
            // First: a reader that finds the domain in the table must find all of it.
            table.observe_belongings(uuid, entry.as_ref(), disks);
            table.sockets.note(uuid, sockets);
            table.put(uuid, entry);
            table.note_xml(uuid, xml);
        }
        Ok(lacking)
    };
    uri.call(Lane::Look, begin_by, look).await
}

/// How a domain is now. Its process is opened while libvirt says before and after that the same
/// instance runs. `old` is what was known before: a process that lives is not looked for again.
fn look_at(
    connect: &Connect,
    uuid: Uuid,
    table: &Table,
    old: Option<&Entry>,
    generation: u64,
) -> Result<Observed, CallError> {
    // A domain can come and go between two calls. The next look says what is so.
    for _ in 0..3 {
        let Some(domain) = Domain::find(connect, uuid)? else { return Ok(Observed::default()) };
        let (Some(power), Some(persistent)) = (domain.power()?, domain.is_persistent()?) else { continue };
        let name = domain.name()?;
        let leaving = domain.is_leaving()?.flatten();
        let mut lacking = None;
        let instance = match (power, domain.id()) {
            (Power::Active(state), Some(id)) => {
                let known = old.and_then(|old| old.instance.as_ref()).filter(|known| known.id == id);
                let living = known.filter(|_| old.is_some_and(|old| old.generation == generation));
                let victim = match (living.and_then(Instance::living), table.driver) {
                    (Some(victim), _) => Some(Arc::clone(victim)),
                    (None, None) => None,
                    (None, Some(driver)) => match Victim::open(driver, &name, uuid) {
                        Ok(victim) => Some(Arc::new(victim)),
                        Err(error) => {
                            let kept = known.filter(|_| error.is_of_ended_controller(driver, id));
                            let kept = kept.and_then(|known| known.victim.clone());
                            lacking = kept.is_none().then_some(error);
                            kept
                        }
                    },
                };
                if domain::id(connect, uuid)? != Some(id) {
                    continue;
                }
                Some(Instance { id, state, victim })
            }
            _ => None,
        };
        // Also of a domain that is off: its disks tell whose writes may be under way.
        let transient = instance.is_some() && !persistent;
        let xml = if transient { domain.xml() } else { domain.plain_xml() };
        let xml = xml.inspect_err(|error| tracing::debug!(%error, "a domain's XML cannot be had")).ok();
        let disks = xml.as_ref().and_then(|xml| Disks::of(xml).ok());
        // Without its Ethernet addresses a domain is fenced all the same.
        let running = xml.as_ref().filter(|_| instance.is_some());
        let macs = running.map(|xml| xml::macs(xml).unwrap_or_default());
        let cid = running.and_then(|xml| xml::cid(xml));
        let sockets = running.and_then(|xml| xml::device_sockets(xml).ok()).unwrap_or_default();
        let (moved_away, macs) = (power == Power::MovedAway, macs.unwrap_or_default());
        let entry = Entry { name, persistent, moved_away, instance, macs, cid, generation };
        // A persistent domain is started from its definition.
        let xml = xml.filter(|_| transient).map(Arc::new);
        return Ok(Observed { entry: Some(entry), lacking, leaving, xml, disks, sockets });
    }
    Err(CallError::Overdue)
}
