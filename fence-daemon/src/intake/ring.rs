//! The ring buffer through which the kernel program hands over requests.

use std::io;
use std::sync::Arc;

use fence_common::boundary::{Event, NO_KEY_SLOT, RING_BYTES};
use fence_common::key::Key;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::kernel;
use super::keyring::Keyring;
use super::request::Verified;
use crate::clock::Moment;
use crate::observe::requests::Via;

/// The loopback interface's number in every network namespace.
const LOOPBACK: u32 = 1;

/// The ring buffer as something to wait for.
#[derive(Debug)]
pub struct Ring {
    records: AsyncFd<kernel::Ring>,
    keys: Keyring,
}

impl Ring {
    /// Watches a ring buffer. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The runtime cannot watch the file descriptor.
    pub fn new(ring: kernel::Ring, keys: Keyring) -> io::Result<Self> {
        // SAFETY: needed because tokio has no safe way to watch a descriptor of a foreign type.
        // Sound because the ring owns its descriptor, which stays open and the same until the ring
        // is dropped, and the `AsyncFd` owns the ring.
        let watched = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        Ok(Self { records: watched?, keys })
    }

    /// The next request that the kernel program verified. Dropping the future loses none.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn next(&mut self) -> io::Result<Verified> {
        loop {
            let mut guard = self.records.readable_mut().await?;
            match take(guard.get_inner_mut(), &self.keys) {
                // The readiness stays: there may be more.
                Some(request) => return Ok(request),
                None => guard.clear_ready(),
            }
        }
    }

    /// Sends the heartbeat to the kernel program.
    pub fn beat(&mut self) {
        self.records.get_mut().beat(Moment::now());
    }

    /// Hands each request that is in the ring to `each`, even if the runtime has not noticed it
    /// yet.
    pub fn take_waiting(&mut self, mut each: impl FnMut(Verified)) {
        // One full ring holds all that was there at the beginning. The bound keeps a fast sender
        // from holding the loop.
        for _ in 0..RECORDS_MAX {
            let Some(request) = take(self.records.get_mut(), &self.keys) else { return };
            each(request);
        }
    }
}

/// More records than the ring buffer holds.
const RECORDS_MAX: usize = RING_BYTES / size_of::<Event>();

fn take(ring: &mut kernel::Ring, keys: &Keyring) -> Option<Verified> {
    loop {
        match ring.next()? {
            Ok(event) => {
                let keys = keys.current();
                let key = if event.slot == NO_KEY_SLOT { keys.first() } else { keys.in_slot(event.slot) };
                if key.is_none() && event.slot != NO_KEY_SLOT {
                    tracing::debug!(slot = event.slot, "signed with a key that is not accepted any more");
                    continue;
                }
                match verified(&event, key.cloned()) {
                    // On any other interface the program sees only frames from outside, whatever
                    // their source says.
                    Some(request) if request.may_be_called(event.ifindex == LOOPBACK) => return Some(request),
                    Some(_) => {}
                    None => {
                        tracing::error!("the kernel program passed a record that is no request: a bug of fence-xdp");
                    }
                }
            }
            Err(error) => tracing::error!("{error}: a bug of fence-xdp"),
        }
    }
}

fn verified(event: &Event, key: Option<Arc<Key>>) -> Option<Verified> {
    let arrived = Moment::from_ktime(event.arrived_ns);
    Verified::new(&event.request, key, event.ifindex, Via::Kernel, arrived)
        .map(|request| request.sent_by(event.sender()))
}
