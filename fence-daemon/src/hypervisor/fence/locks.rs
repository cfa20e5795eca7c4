//! One lock per domain: orders for a domain are carried out in turn, and different domains do not
//! wait for each other.
//!
//! The UUID's lock counts. A request by name first takes the name's lock, which keeps requests of
//! one spelling in the order of their arrival while the UUID is looked up. Then it takes the UUIDs'
//! locks. Names before UUIDs, UUIDs ascending: no two requests can wait for each other.
//!
//! [`Settling`] is for starts alone: a call that is still under way in libvirt must not hit what is
//! started next. An off need not wait for that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use fence_common::sync::lock;
use fence_common::target::Target;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

type DomainLock = tokio::sync::Mutex<()>;

/// A domain's lock while it is held.
pub(crate) type Held = tokio::sync::OwnedMutexGuard<()>;

/// The locks. Only those in use exist.
#[derive(Default)]
pub(crate) struct Locks {
    slots: Mutex<HashMap<Target, Weak<DomainLock>>>,
}

impl Locks {
    /// Waits for the lock of a target, as spelled: first come, first served.
    pub(crate) async fn spelled(&self, target: &Target) -> Held {
        self.slot(target).lock_owned().await
    }

    /// Waits for the lock of a UUID.
    pub(crate) async fn uuid(&self, uuid: Uuid) -> Held {
        self.slot(&Target::Uuid(uuid)).lock_owned().await
    }

    fn slot(&self, target: &Target) -> Arc<DomainLock> {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(target).and_then(Weak::upgrade) {
            return slot;
        }
        // New spellings come from outside, if only from key holders. Unused slots must not pile up.
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(DomainLock::default());
        slots.insert(target.clone(), Arc::downgrade(&slot));
        slot
    }
}

/// Domains about which a call to libvirt is still under way.
#[derive(Debug, Default)]
pub(crate) struct Settling {
    busy: Mutex<HashMap<Uuid, usize>>,
    news: watch::Sender<()>,
}

/// A domain that must not be started as long as this is kept.
#[derive(Debug)]
pub(crate) struct Unsettled {
    all: Arc<Settling>,
    uuid: Uuid,
}

impl Settling {
    /// From now on the domain must not be started.
    pub(crate) fn enter(self: &Arc<Self>, uuid: Uuid) -> Unsettled {
        *lock(&self.busy).entry(uuid).or_default() += 1;
        Unsettled { all: Arc::clone(self), uuid }
    }

    /// Waits until the domain may be started. `false`: it may not by `by`.
    pub(crate) async fn over(&self, uuid: Uuid, by: Instant) -> bool {
        let mut news = self.news.subscribe();
        let is_busy = || lock(&self.busy).contains_key(&uuid);
        // An error means that the sender is gone, and it is ours.
        while is_busy() && matches!(timeout_at(by, news.changed()).await, Ok(Ok(()))) {}
        !is_busy()
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        let mut busy = lock(&self.all.busy);
        let left = busy.get(&self.uuid).copied().unwrap_or(0);
        if left > 1 {
            busy.insert(self.uuid, left - 1);
        } else {
            busy.remove(&self.uuid);
        }
        drop(busy);
        self.all.news.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_domain_is_settled_when_nobody_keeps_it_from_that() {
        let (all, one, other) = (Arc::new(Settling::default()), Uuid::from_u128(1), Uuid::from_u128(2));
        let now = || Instant::now() + Duration::from_millis(30);
        let (first, second) = (all.enter(one), all.enter(one));
        assert!(all.over(other, now()).await);
        drop(first);
        assert!(!all.over(one, now()).await);
        let waits = tokio::spawn({
            let all = Arc::clone(&all);
            async move { all.over(one, Instant::now() + Duration::from_secs(30)).await }
        });
        drop(second);
        assert!(waits.await.unwrap() && all.over(one, now()).await);
    }

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
