//! What libvirt says of a domain's migration.
//!
//! From the moment when a domain is stopped here for another host to go on with it, its end here,
//! of whatever kind, says nothing about it. libvirt calls a domain "shut off (crashed)" that ends
//! in the middle of a post-copy migration and runs on there. libvirt's events tell that moment (see
//! `known::table`), and it counts until the domain runs here again.

use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use super::ffi;

/// Where to a domain is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    None,
    Out,
    In,
}

/// The migration that is under way.
pub(super) fn direction(domain: &Domain) -> Result<Direction, Error> {
    let (kind, operation) = match ffi::job(domain) {
        Ok(job) => job,
        // Drivers without jobs have no migration either.
        Err(error) if error.code() == ErrorNumber::NoSupport => return Ok(Direction::None),
        // What QEMU's driver says of a domain that is on its way to here.
        Err(error) if error.code() == ErrorNumber::OperationUnsupported => return Ok(Direction::In),
        // It ended while we asked. The next question tells what became of it.
        Err(error) if error.code() == ErrorNumber::OperationInvalid && !domain.is_active()? => {
            return Ok(Direction::None);
        }
        Err(error) => return Err(error),
    };
    let operation = operation.and_then(|operation| u32::try_from(operation).ok());
    Ok(match (u32::try_from(kind), operation) {
        (Ok(virt_sys::VIR_DOMAIN_JOB_NONE), _) => Direction::None,
        // A job that does not say what it is may be a migration.
        (_, Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT) | None) => Direction::Out,
        (_, Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN)) => Direction::In,
        _ => Direction::None,
    })
}

/// Whether a domain in this state has been stopped for another host to go on with it. `None`: the
/// state does not say.
fn of_state(state: u32, reason: i32) -> Option<bool> {
    match (state, u32::try_from(reason).ok()) {
        (
            virt_sys::VIR_DOMAIN_PAUSED,
            Some(virt_sys::VIR_DOMAIN_PAUSED_POSTCOPY | virt_sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED),
        ) => Some(true),
        // Either way: on its way to another host, or from one.
        (virt_sys::VIR_DOMAIN_PAUSED, Some(virt_sys::VIR_DOMAIN_PAUSED_MIGRATION)) => None,
        (virt_sys::VIR_DOMAIN_SHUTOFF | virt_sys::VIR_DOMAIN_CRASHED, _) => None,
        _ => Some(false),
    }
}

/// Whether a domain has been stopped here for another host to go on with it. `None`: libvirt does
/// not say, as of a domain that is off. A libvirt that was restarted in the middle of a migration
/// knows of none any more. Of the domain it knows only that it was stopped for one.
pub(super) fn is_leaving(domain: &Domain) -> Result<Option<bool>, Error> {
    let (state, reason) = domain.get_state()?;
    if !is_stopped_for_migration(state, reason) {
        return Ok(of_state(state, reason));
    }
    let direction = direction(domain)?;
    // It may have arrived, or have come back, before the job was asked for.
    let (state, reason) = domain.get_state()?;
    Ok(match direction {
        Direction::None | Direction::Out if is_stopped_for_migration(state, reason) => Some(true),
        Direction::None | Direction::Out | Direction::In => of_state(state, reason),
    })
}

fn is_stopped_for_migration(state: u32, reason: i32) -> bool {
    let migrating = (virt_sys::VIR_DOMAIN_PAUSED, Ok(virt_sys::VIR_DOMAIN_PAUSED_MIGRATION));
    (state, u32::try_from(reason)) == migrating
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_that_another_host_may_go_on_with_is_told_from_one_that_runs_here() {
        use virt_sys::*;
        let of = |state, reason: u32| of_state(state, i32::try_from(reason).unwrap());
        assert_eq!(of(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_POSTCOPY), Some(true));
        assert_eq!(of(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_POSTCOPY_FAILED), Some(true));
        assert_eq!(of(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_MIGRATION), None);
        assert_eq!(of(VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_SHUTOFF_CRASHED), None, "what it was before its end counts");
        assert_eq!(of(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_USER), Some(false));
        assert_eq!(of(VIR_DOMAIN_RUNNING, VIR_DOMAIN_RUNNING_MIGRATION_CANCELED), Some(false));
    }
}
