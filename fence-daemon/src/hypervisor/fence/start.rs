//! Starting a domain.

use std::path::Path;
use std::time::Instant;

use uuid::Uuid;

use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{NOTICES_WITHIN, Table};
use crate::hypervisor::libvirt::{CallError, Connect, Domain, Power, State};
use crate::hypervisor::process::Driver;

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

/// Starts the domain unless it is active, and asks afresh whether it is.
///
/// `xml` starts a transient domain that is gone. `dead` is the instance that is known to be dead,
/// whatever libvirt says. `nothing_lives` is this host's own word that no process of it lives here.
pub(crate) fn start(
    connect: &Connect,
    uuid: Uuid,
    xml: Option<&str>,
    dead: Option<u32>,
    table: &Table,
    nothing_lives: impl Fn() -> Result<(), CallError>,
    deadline: &Deadline,
) -> Result<Started, CallError> {
    let is_known_to_live = || table.instance(uuid).is_some_and(|instance| instance.living().is_some());
    let may_start = || {
        nothing_lives()?;
        // From here on it may run again, whatever was seen to die.
        table.deaths.forget(uuid);
        Ok::<_, CallError>(deadline.check()?)
    };
    let domain = match (Domain::find(connect, uuid)?, xml) {
        (Some(domain), _) => {
            match domain.power()? {
                None => return Ok(Started::Gone),
                Some(Power::Active(_)) if let Some(id) = dead.filter(|dead| domain.id() == Some(*dead)) => {
                    clear_up(&domain, uuid, id, table);
                    return Ok(Started::NotYet);
                }
                // It was killed, and libvirt has not noticed. Which instance that was is not known.
                Some(Power::Active(_)) if table.driver.is_some() && !is_known_to_live() && nothing_lives().is_ok() => {
                    return Ok(Started::NotYet);
                }
                Some(Power::Active(state)) => return Ok(Started::Already(state)),
                Some(Power::MovedAway) => return Ok(Started::MovedAway),
                Some(Power::Off) if table.is_leaving(uuid) => return Ok(Started::MovedAway),
                Some(Power::Off) => table.stale.forget(uuid),
            }
            // A saved image would bring back the very guest that was fenced, with all that it
            // believed.
            let saved = domain.has_saved_image();
            may_start()?;
            domain.start(saved)?;
            domain
        }
        (None, Some(xml)) if !xml.contains('\0') => {
            may_start()?;
            Domain::start_transient(connect, xml)?
        }
        (None, _) => return Ok(Started::Gone),
    };
    Ok(match domain.power()? {
        Some(Power::Active(state)) => Started::Now(state),
        Some(Power::Off | Power::MovedAway) => Started::NotActive,
        None => Started::Gone,
    })
}

/// libvirt calls this dead instance active. If it does not notice by itself, the daemon asks it to
/// clear up what is left. The domain is off after that, and not before.
///
/// Called with the domain's lock held, so that nobody here starts it meanwhile.
fn clear_up(domain: &Domain, uuid: Uuid, id: u32, table: &Table) {
    // A dead QEMU may have moved elsewhere, and libvirt sees its end by other means.
    if table.driver != Some(Driver::Lxc) || !table.stale.note(uuid, id, Instant::now()) {
        return;
    }
    // The controller's process number is the instance's. As long as there is such a process, the
    // container may be about to end.
    if Path::new(&format!("/proc/{id}")).exists() {
        return;
    }
    let error = domain.destroy().err().map(tracing::field::display);
    table.stale.forget(uuid);
    tracing::warn!(%uuid, error, "libvirt has not noticed for {NOTICES_WITHIN:?} that nothing of this container is left, so it was asked to clear up");
}
