//! Containers that libvirt goes on to call active although nothing of them is left. It learns of a container's end from its controller's connection, and
//! libvirt 9.0 has been seen to miss that on a loaded host. It never looks again.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use virt::domain::Domain;

use super::table::Table;
use crate::hypervisor::process::victim::Driver;

/// How long libvirt may take to notice a death by itself. What it does about one does not look which instance that was: if it came late, after our word for
/// it, it would end the one that has been started since.
const NOTICES_WITHIN: Duration = Duration::from_secs(3);

/// The dead instances that libvirt calls active, and since when that is known.
#[derive(Debug, Default)]
pub(crate) struct Unnoticed(Mutex<HashMap<Uuid, (u32, Instant)>>);

impl Unnoticed {
    /// Notes that libvirt calls this dead instance active still. Whether it has done so for too long.
    fn note(&self, uuid: Uuid, id: u32, now: Instant) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.entry(uuid).or_insert((id, now));
        if known.0 != id {
            *known = (id, now);
        }
        now.duration_since(known.1) >= NOTICES_WITHIN
    }

    /// The domain is not active, or another instance of it is.
    pub(crate) fn forget(&self, uuid: Uuid) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&uuid);
    }
}

/// libvirt calls this dead instance active. Where it is not about to notice, it is told to clear up what is left of it; the domain is off after that, and not before.
///
/// Called with the domain's lock held, so that nobody here starts it meanwhile.
pub(crate) fn clear_up(domain: &Domain, uuid: Uuid, id: u32, table: &Table) {
    // A dead QEMU may have moved elsewhere, and libvirt sees its end by other means.
    if table.driver != Some(Driver::Lxc) || !table.unnoticed.note(uuid, id, Instant::now()) {
        return;
    }
    // The controller's process number is the instance's. While there is one the container may be about to end.
    if Path::new(&format!("/proc/{id}")).exists() {
        return;
    }
    let cleared = domain.destroy();
    table.unnoticed.forget(uuid);
    let error = cleared.err().map(tracing::field::display);
    tracing::warn!(%uuid, error, "libvirt has not noticed for {NOTICES_WITHIN:?} that nothing of this container is left, and was told to clear up");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_instance_becomes_overdue() {
        let (all, uuid, now) = (Unnoticed::default(), Uuid::from_u128(1), Instant::now());
        let later = now + NOTICES_WITHIN;
        assert!(!all.note(uuid, 7, now));
        assert!(!all.note(uuid, 7, later - Duration::from_nanos(1)));
        assert!(!all.note(Uuid::from_u128(2), 7, later), "another domain");
        assert!(all.note(uuid, 7, later));
        assert!(!all.note(uuid, 8, later), "another instance");
        assert!(all.note(uuid, 8, later + NOTICES_WITHIN));
        all.forget(uuid);
        assert!(!all.note(uuid, 8, later + NOTICES_WITHIN));
    }
}
