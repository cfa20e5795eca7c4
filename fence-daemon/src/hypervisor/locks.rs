//! One lock per domain, so that what is done to a domain is done in order and different domains do not wait for each other.
//!
//! The lock that counts is the UUID's. A request by name first takes the name's lock, which keeps requests of one spelling in the order
//! of their arrival while the UUID is looked up, and then the UUIDs' in ascending order. Names before UUIDs, UUIDs ascending:
//! no two requests can wait for each other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use uuid::Uuid;

use crate::policy::Target;

type Slot = tokio::sync::Mutex<()>;

/// A domain's lock while it is held.
pub(super) type Held = tokio::sync::OwnedMutexGuard<()>;

/// The locks. Nobody holds a domain that nobody is busy with, so only those in use exist.
#[derive(Default)]
pub(super) struct Locks {
    slots: Mutex<HashMap<Target, Weak<Slot>>>,
}

impl Locks {
    /// Waits for the lock of a target, as spelled: first come, first served.
    pub(super) async fn spelled(&self, target: &Target) -> Held {
        self.slot(target).lock_owned().await
    }

    /// Waits for the lock of a UUID.
    pub(super) async fn uuid(&self, uuid: Uuid) -> Held {
        self.slot(&Target::Uuid(uuid)).lock_owned().await
    }

    fn slot(&self, target: &Target) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(target).and_then(Weak::upgrade) {
            return slot;
        }
        // New spellings come from outside (from key holders, but still): what is no longer used must not pile up.
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(Slot::default());
        slots.insert(target.clone(), Arc::downgrade(&slot));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_lock_is_one_domain_s_and_leaves_nothing_behind() {
        let locks = Locks::default();
        let held = locks.uuid(Uuid::from_u128(1)).await;
        locks.uuid(Uuid::from_u128(2)).await;
        let blocked = timeout(Duration::from_millis(30), locks.spelled(&Target::Uuid(Uuid::from_u128(1)))).await;
        assert!(blocked.is_err());
        drop(held);
        locks.uuid(Uuid::from_u128(1)).await;
        locks.spelled(&Target::Name("a".to_owned())).await;
        assert_eq!(locks.slots.lock().unwrap().len(), 1);
    }
}
