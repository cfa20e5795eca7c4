//! Stale libvirt state: containers that libvirt still calls active although nothing of them is
//! left.
//!
//! libvirt learns of a container's end from its controller's connection. libvirt 9.0 has been seen
//! to miss that on a loaded host, and it never looks again.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fence_common::sync::lock;
use uuid::Uuid;

/// How long libvirt may take to notice a death by itself. What it does then does not look which
/// instance that was. If it came late, after our word for it, it would end the instance that has
/// been started since.
pub(crate) const NOTICES_WITHIN: Duration = Duration::from_secs(3);

/// The dead instances that libvirt still calls active, and since when that is known.
#[derive(Debug, Default)]
pub(crate) struct Stale(Mutex<HashMap<Uuid, (u32, Instant)>>);

impl Stale {
    /// Notes that libvirt still calls this dead instance active. Returns whether it has done so for
    /// too long.
    pub(crate) fn note(&self, uuid: Uuid, id: u32, now: Instant) -> bool {
        let mut all = lock(&self.0);
        let known = all.entry(uuid).or_insert((id, now));
        if known.0 != id {
            *known = (id, now);
        }
        now.duration_since(known.1) >= NOTICES_WITHIN
    }

    /// The domain is not active, or another instance of it is.
    pub(crate) fn forget(&self, uuid: Uuid) {
        lock(&self.0).remove(&uuid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_instance_becomes_overdue() {
        let (all, uuid, now) = (Stale::default(), Uuid::from_u128(1), Instant::now());
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
