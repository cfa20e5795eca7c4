//! Starting a domain.

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;

use super::{Power, State, known, power};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::stale;
use crate::hypervisor::known::table::Table;
use crate::hypervisor::libvirt::error::{CallError, LibvirtError};

/// What came of starting a domain.
#[derive(Debug)]
pub(crate) enum Started {
    /// It was active already.
    Already(State),
    /// It was off, was started and is active now.
    Now(State),
    /// libvirt started it without an error, but it is not active.
    NotActive,
    /// It is off here because it moved to another host: a second copy must not be started.
    MovedAway,
    /// libvirt does not know it.
    Gone,
    /// libvirt has not noticed yet that the instance that was killed is dead.
    NotYet,
}

/// Starts the domain unless it is active, and asks afresh whether it is. `xml` starts a transient one that is gone. `dead` is the instance
/// that is known to be dead, whatever libvirt says. `nothing_lives` is this host's own word for that no process of it lives here.
pub(crate) fn start(
    connect: &Connect,
    uuid: Uuid,
    xml: Option<&str>,
    dead: Option<u32>,
    table: &Table,
    nothing_lives: impl Fn() -> Result<(), CallError>,
    deadline: &Deadline,
) -> Result<Started, CallError> {
    let is_known_to_live =
        || table.get(uuid).and_then(|entry| entry.instance).is_some_and(|instance| instance.living().is_some());
    let domain = match (known(Domain::lookup_by_uuid(connect, uuid))?, xml) {
        (Some(domain), _) => {
            match known(power(&domain))? {
                None => return Ok(Started::Gone),
                Some(Power::Active(_)) if let Some(id) = dead.filter(|dead| domain.get_id() == Some(*dead)) => {
                    stale::clear_up(&domain, uuid, id, table);
                    return Ok(Started::NotYet);
                }
                // It was killed, and libvirt has not noticed. Which instance that was is known to nobody here.
                Some(Power::Active(_)) if table.driver.is_some() && !is_known_to_live() && nothing_lives().is_ok() => {
                    return Ok(Started::NotYet);
                }
                Some(Power::Active(state)) => return Ok(Started::Already(state)),
                Some(Power::MovedAway) => return Ok(Started::MovedAway),
                Some(Power::Off) if table.is_leaving(uuid) => return Ok(Started::MovedAway),
                Some(Power::Off) => table.unnoticed.forget(uuid),
            }
            nothing_lives()?;
            // From here on it may run again, whatever was seen to die.
            table.deaths.forget(uuid);
            // A saved image would bring back the very guest that was fenced, with all that it believed then.
            let saved = matches!(domain.has_managed_save(0), Ok(true));
            deadline.check()?;
            domain.create_with_flags(if saved { virt_sys::VIR_DOMAIN_START_FORCE_BOOT } else { 0 })?;
            domain
        }
        (None, Some(xml)) if !xml.contains('\0') => {
            nothing_lives()?;
            // From here on it may run again, whatever was seen to die.
            table.deaths.forget(uuid);
            deadline.check()?;
            Domain::create_xml(connect, xml, 0)
                .map_err(|error| CallError::Libvirt(LibvirtError::without_text(&error)))?
        }
        (None, _) => return Ok(Started::Gone),
    };
    Ok(match known(power(&domain))? {
        Some(Power::Active(state)) => Started::Now(state),
        Some(Power::Off | Power::MovedAway) => Started::NotActive,
        None => Started::Gone,
    })
}
