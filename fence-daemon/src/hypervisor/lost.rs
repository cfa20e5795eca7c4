//! Domains that libvirt calls off because it has lost them, while their processes run on.

use std::time::Duration;

use uuid::Uuid;
use virt::domain::Domain;

use super::deadline::Deadline;
use super::domain::{Off, Source, State, Unproven};
use super::error::CallError;
use super::victim::{Driver, Victim};
use crate::clock::Moment;

/// How long a process that libvirt has lost may take to die.
const STRAY_LIMIT: Duration = Duration::from_secs(10);

/// A domain that libvirt calls off. It may have lost it: where the process that its own PID file names is the domain's, and lives, the domain is on.
pub(super) fn off(domain: &Domain, uuid: Uuid, driver: Option<Driver>, deadline: &Deadline) -> Result<Off, CallError> {
    let name = domain.get_name()?;
    let was = State(u8::try_from(virt_sys::VIR_DOMAIN_RUNNING).unwrap_or(1));
    let victim = match driver.map(|driver| Victim::open(driver, &name, uuid)) {
        Some(Ok(victim)) => victim,
        Some(Err(error)) if error.is_doubt() => {
            tracing::error!(domain = %name.escape_debug(), %error, "libvirt calls it shut off, but something of it may live");
            return Ok(Off::Unproven { was, why: Unproven::Stray });
        }
        Some(Err(_)) | None => return Ok(Off::Already(Moment::now())),
    };
    deadline.check()?;
    let pid = victim.pid();
    tracing::warn!(domain = %name.escape_debug(), pid, "libvirt calls it shut off, but its process lives: killed");
    if victim.kill().is_ok() && victim.dies_within(STRAY_LIMIT) {
        return Ok(Off::Proven { was, at: Moment::now(), source: Source::Definition });
    }
    Ok(Off::Unproven { was, why: Unproven::Stray })
}
