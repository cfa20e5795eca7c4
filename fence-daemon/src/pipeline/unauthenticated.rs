//! Limits the requests without an authenticated peer: when all places are taken, the oldest of them
//! gives its place up.
//!
//! An honest client authenticates within milliseconds of its turn. A holder of the key could ask
//! from many addresses and stay silent at all of them. It would need as many requests in that time
//! as there are places.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use fence_common::sync::lock;
use tokio::sync::Notify;

/// The requests without an authenticated peer, in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Unauthenticated(Mutex<Seats>);

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    list: BTreeMap<u64, Arc<Notify>>,
}

/// A request in that list.
#[derive(Debug)]
pub(super) struct Seat {
    number: u64,
    /// Told when the place is given to another one.
    pub(super) displaced: Arc<Notify>,
}

impl Unauthenticated {
    /// Enters a request.
    pub(super) fn enter(&self) -> Seat {
        let mut inner = self.inner();
        let (number, displaced) = (inner.next, Arc::new(Notify::new()));
        inner.next = inner.next.wrapping_add(1);
        inner.list.insert(number, Arc::clone(&displaced));
        Seat { number, displaced }
    }

    /// The request has a peer, or is over.
    pub(super) fn leave(&self, seat: &Seat) {
        self.inner().list.remove(&seat.number);
    }

    /// Tells the oldest request to give its place up. `false` if there is none.
    pub(super) fn displace(&self) -> bool {
        let oldest = self.inner().list.pop_first();
        oldest.inspect(|(_, displaced)| displaced.notify_one()).is_some()
    }

    fn inner(&self) -> MutexGuard<'_, Seats> {
        lock(&self.0)
    }
}
