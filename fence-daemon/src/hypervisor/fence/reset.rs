//! A reboot by reset: the machine begins anew, and its process goes on.
//!
//! A reset is for what runs. libvirt resets a machine that stands still as well (paused, stopped by
//! an error of its storage, crashed and kept), and it stands still afterwards. So the state is
//! asked for right before the reset, and again after the event that tells of it. In every doubt the
//! domain is powered off and started instead.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;

use super::outcome::Identity;
use crate::clock::Moment;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::libvirt::connection::Uri;
use crate::hypervisor::libvirt::domain::{State, state_of};
use crate::hypervisor::libvirt::error::CallError;
use crate::hypervisor::libvirt::link::Lane;

/// What libvirt did about a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It took the order for the running instance with this number.
    Taken(Option<u32>),
    /// It was not asked, as the domain is in this state.
    StandsStill(State),
}

/// Resets the domain through libvirt and waits for the word that it *was* reset: the call only asks
/// for it. `None`: it does not run, there is no such word within `limit`, or it does not run after
/// it, so nothing is known.
///
/// A call that has not ended by then is left in `pending`: it may still come into force, and must
/// not hit what is started next.
pub(crate) async fn reset(
    uri: &Arc<Uri>,
    domain: &Identity,
    limit: Duration,
    deadline: &Deadline,
    pending: &mut Option<JoinHandle<Result<Asked, CallError>>>,
) -> Option<Moment> {
    if !uri.table.is_told_of_resets() {
        tracing::info!(%domain, "libvirt would not tell that it was reset: killed and started instead");
        return None;
    }
    let uuid = domain.uuid;
    let before = uri.table.resets(uuid);
    let deadline = deadline.not_after(Instant::now() + limit);
    let by = deadline.by();
    let asker = Arc::clone(uri);
    let asked = async move { asker.call(Lane::Kill, by, move |connect| ask(connect, uuid, &deadline)).await };
    let mut asked = tokio::spawn(asked);
    let answer = timeout_at(by, &mut asked).await;
    if answer.is_err() {
        *pending = Some(asked);
    }
    let id = match answer.map(|answer| answer.unwrap_or(Err(CallError::NotBegun))) {
        Ok(Ok(Asked::Taken(id))) => id,
        Ok(Ok(Asked::StandsStill(state))) => {
            tracing::info!(%domain, %state, "a reset would not make it run: killed and started instead");
            return None;
        }
        Ok(Err(error)) => {
            tracing::info!(%domain, %error, "cannot be reset: killed and started instead");
            return None;
        }
        Err(_) => {
            tracing::warn!(%domain, "libvirt does not answer to a reset: killed and started instead");
            return None;
        }
    };
    if !uri.table.reset_again(uuid, before, by).await {
        tracing::warn!(%domain, "was not reset within {limit:?}: killed and started instead");
        return None;
    }
    let at = Moment::now();
    let look = uri.call(Lane::Query, by, move |connect| running(connect, uuid));
    match timeout_at(by, look).await {
        Ok(Ok(Some(now))) if id.is_some() && id == Some(now) => return Some(at),
        Ok(Ok(_)) => tracing::warn!(%domain, "was reset, and does not run: killed and started instead"),
        Ok(Err(error)) => {
            tracing::warn!(%domain, %error, "was reset, and libvirt does not say that it runs: killed and started instead");
        }
        Err(_) => {
            tracing::warn!(%domain, "was reset, and libvirt does not answer whether it runs: killed and started instead");
        }
    }
    None
}

/// Asks the driver to reset the domain if it runs. An event tells that it *was* reset.
pub(crate) fn ask(connect: &Connect, uuid: Uuid, deadline: &Deadline) -> Result<Asked, CallError> {
    let domain = Domain::lookup_by_uuid(connect, uuid)?;
    let (state, _) = domain.get_state()?;
    if state != virt_sys::VIR_DOMAIN_RUNNING {
        return Ok(Asked::StandsStill(state_of(state)));
    }
    deadline.check()?;
    domain.reset()?;
    Ok(Asked::Taken(domain.get_id()))
}

/// The number of the instance that is in state "running"; `None` in any other state.
fn running(connect: &Connect, uuid: Uuid) -> Result<Option<u32>, CallError> {
    let domain = Domain::lookup_by_uuid(connect, uuid)?;
    let (state, _) = domain.get_state()?;
    Ok(domain.get_id().filter(|_| state == virt_sys::VIR_DOMAIN_RUNNING))
}
