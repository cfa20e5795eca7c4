//! A reboot by reset: the machine starts again in the same process.
//!
//! A reset is for a domain that runs. libvirt also resets a machine that stands still (paused,
//! stopped by an error of its storage, crashed and kept), and it stands still afterwards. So the
//! state is asked for right before the reset, and again after the event that tells of it. In every
//! doubt the domain is powered off and started instead.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::clock::Moment;
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{Identity, Uri};
use crate::hypervisor::libvirt::{CallError, Connect, Domain, Lane, State};

/// What libvirt did about a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It took the order for the running instance with this number.
    Taken(Option<u32>),
    /// It was not asked, as the domain is in this state.
    StandsStill(State),
}

/// Resets the domain through libvirt, and waits for the word that it *was* reset: the call only
/// asks for it. `None`: that is not known, and the domain is to be killed and started.
///
/// A call that has not ended by then is left in `pending`. It may still take effect, and must not
/// hit what is started next.
pub(super) async fn reset(
    uri: &Arc<Uri>,
    domain: &Identity,
    limit: Duration,
    deadline: &Deadline,
    pending: &mut Option<JoinHandle<Result<Asked, CallError>>>,
) -> Option<Moment> {
    let reset = try_reset(uri, domain.uuid, limit, deadline, pending).await;
    reset.inspect_err(|why| tracing::warn!(%domain, "{why}: killed and started instead")).ok()
}

async fn try_reset(
    uri: &Arc<Uri>,
    uuid: Uuid,
    limit: Duration,
    deadline: &Deadline,
    pending: &mut Option<JoinHandle<Result<Asked, CallError>>>,
) -> Result<Moment, String> {
    if !uri.table.is_told_of_resets() {
        return Err("libvirt would not tell that it was reset".to_owned());
    }
    let before = uri.table.resets(uuid);
    let deadline = deadline.not_after(Instant::now() + limit);
    let by = deadline.by();
    let caller = Arc::clone(uri);
    let ask = async move { caller.call(Lane::Kill, by, move |connect| ask(connect, uuid, &deadline)).await };
    let mut asked = tokio::spawn(ask);
    let id = match timeout_at(by, &mut asked).await.map(|answer| answer.unwrap_or(Err(CallError::NotBegun))) {
        Ok(Ok(Asked::Taken(id))) => id,
        Ok(Ok(Asked::StandsStill(state))) => return Err(format!("it is {state}, and a reset would not make it run")),
        Ok(Err(error)) => return Err(format!("it cannot be reset ({error})")),
        Err(_) => {
            *pending = Some(asked);
            return Err("libvirt does not answer to a reset".to_owned());
        }
    };
    if !uri.table.reset_again(uuid, before, by).await {
        return Err(format!("it was not reset within {limit:?}"));
    }
    let at = Moment::now();
    match timeout_at(by, uri.call(Lane::Query, by, move |connect| running(connect, uuid))).await {
        Ok(Ok(Some(now))) if id == Some(now) => Ok(at),
        Ok(Ok(_)) => Err("it was reset, and does not run".to_owned()),
        Ok(Err(error)) => Err(format!("it was reset, and libvirt does not say that it runs ({error})")),
        Err(_) => Err("it was reset, and libvirt does not answer whether it runs".to_owned()),
    }
}

/// Asks the driver to reset the domain if it runs. An event tells that it *was* reset.
pub(crate) fn ask(connect: &Connect, uuid: Uuid, deadline: &Deadline) -> Result<Asked, CallError> {
    let domain = Domain::get(connect, uuid)?;
    match domain.state()? {
        Some(State::RUNNING) => {}
        other => return Ok(Asked::StandsStill(other.unwrap_or(State::SHUT_OFF))),
    }
    deadline.check()?;
    domain.reset()?;
    Ok(Asked::Taken(domain.id()))
}

/// The number of the instance that is in state "running". `None`: another state.
fn running(connect: &Connect, uuid: Uuid) -> Result<Option<u32>, CallError> {
    let domain = Domain::get(connect, uuid)?;
    Ok(domain.id().filter(|_| matches!(domain.state(), Ok(Some(State::RUNNING)))))
}
