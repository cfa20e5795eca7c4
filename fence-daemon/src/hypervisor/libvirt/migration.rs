//! Domains on the move: their death here proves nothing once the other host may have taken over.
//!
//! A migration out is ended first, through libvirt. Once libvirt says that there is no such job any more, the domain is either here and
//! nowhere else, and can be destroyed, or it has left, and nothing is said about it. What cannot be settled is a failure. A migration in
//! is not ours to end: as long as it lasts the domain runs on the other host.
//!
//! From the moment when a domain is stopped here for the other host to go on with it, its end here, of whatever kind, says nothing about
//! it: libvirt calls a domain "shut off (crashed)" that ends in the middle of a post-copy migration and runs on there. Libvirt's
//! events tell that moment (`table`), and it counts until the domain runs here again.

use std::thread::sleep;
use std::time::Duration;

use tokio::time::Instant;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};

use super::error::CallError;
use super::ffi;
use crate::hypervisor::deadline::Deadline;

/// How long a migration may take to end. A job that cannot be aborted (the last phase, post-copy) is over by then, or is left alone.
const SETTLE: Duration = Duration::from_secs(8);
/// How often it is asked after.
const LOOK: Duration = Duration::from_millis(20);

/// Ends a migration of the domain to another host, if there is one. `true`: no migration is under way (any more).
///
/// # Errors
/// libvirt cannot say.
pub(crate) fn settle(domain: &Domain, deadline: &Deadline) -> Result<bool, CallError> {
    let until = deadline.not_after(Instant::now() + SETTLE);
    let mut aborted = false;
    loop {
        match job(domain)? {
            Direction::None => return Ok(true),
            Direction::In => return Ok(false),
            Direction::Out if !aborted => {
                aborted = true;
                deadline.check()?;
                // It may have ended in between, or be in a phase in which it cannot be: asking again shows which.
                if let Err(error) = ffi::abort_job(domain) {
                    tracing::debug!(error = error.message(), "the migration is not ended");
                }
            }
            Direction::Out => {}
        }
        if until.check().is_err() {
            return Ok(false);
        }
        sleep(LOOK);
    }
}

/// Where to a domain is on its way.
enum Direction {
    None,
    Out,
    In,
}

fn job(domain: &Domain) -> Result<Direction, Error> {
    let (kind, operation) = match ffi::job(domain) {
        Ok(job) => job,
        // Drivers without jobs have no migration either.
        Err(error) if error.code() == ErrorNumber::NoSupport => return Ok(Direction::None),
        // What QEMU's driver says of a domain that is on its way to here.
        Err(error) if error.code() == ErrorNumber::OperationUnsupported => return Ok(Direction::In),
        // It ended while we asked; what became of it is for the next question.
        Err(error) if error.code() == ErrorNumber::OperationInvalid && !domain.is_active()? => {
            return Ok(Direction::None);
        }
        Err(error) => return Err(error),
    };
    let operation = operation.and_then(|operation| u32::try_from(operation).ok());
    Ok(match (u32::try_from(kind), operation) {
        (Ok(virt_sys::VIR_DOMAIN_JOB_NONE), _) => Direction::None,
        // A job that does not say what it is may be one.
        (_, Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT) | None) => Direction::Out,
        (_, Some(virt_sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN)) => Direction::In,
        _ => Direction::None,
    })
}

/// Whether a domain in this state has been stopped for another host to go on with it; `None` where the state does not say.
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

/// Whether a domain has been stopped here for another host to go on with it; `None` where libvirt does not say, as of one that is off. Where
/// libvirt itself was restarted in the middle of a migration it knows of none any more, and of the domain only that it was stopped for one.
///
/// # Errors
/// libvirt cannot say.
pub(crate) fn is_leaving(domain: &Domain) -> Result<Option<bool>, Error> {
    let (state, reason) = domain.get_state()?;
    if !is_stopped_for_migration(state, reason) {
        return Ok(of_state(state, reason));
    }
    let direction = job(domain)?;
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

/// Says why a domain that libvirt calls off is not.
pub(crate) fn warn_of(name: &str) {
    tracing::warn!(
        domain = %name.escape_debug(),
        "libvirt calls it shut off, but it ended on its way to another host, which may have gone on with it: fence it there, or start it here"
    );
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
