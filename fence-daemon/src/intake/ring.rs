//! The ring buffer through which the kernel program hands over requests.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use fence_common::boundary::{Event, NO_KEY_SLOT, RING_BYTES};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::kernel;
use super::keyring::Keyring;
use super::request::{Origin, Verified};
use crate::clock::Moment;
use crate::observe::limit::SourceLimit;
use crate::observe::requests::{RETIRED_KEY, Requests, Via};

/// The ring buffer as something to wait for.
#[derive(Debug)]
pub struct RequestRing {
    records: AsyncFd<kernel::Ring>,
    reader: RecordReader,
}

impl RequestRing {
    /// Watches the ring buffer of a listener's kernel program. `requests` records what is rejected
    /// here. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The runtime cannot watch the file descriptor.
    pub fn new(ring: kernel::Ring, keys: Keyring, origin: Origin, requests: Arc<Requests>) -> io::Result<Self> {
        // SAFETY: needed because tokio has no safe way to watch a descriptor of a foreign type.
        // Sound because the ring owns its descriptor, which stays open and the same until the ring
        // is dropped, and the `AsyncFd` owns the ring.
        let watched = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        Ok(Self { records: watched?, reader: RecordReader::new(keys, origin, requests) })
    }

    /// The next request that the kernel program verified. Dropping the future loses none.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn next(&mut self) -> io::Result<Verified> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`next`](Self::next), for one task that waits for several rings.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Verified>> {
        loop {
            let mut guard = ready!(self.records.poll_read_ready_mut(context))?;
            match take(guard.get_inner_mut(), &self.reader) {
                // The readiness stays: there may be more.
                Some(request) => return Poll::Ready(Ok(request)),
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
            let Some(request) = take(self.records.get_mut(), &self.reader) else { return };
            each(request);
        }
    }
}

/// More records than the ring buffer holds.
const RECORDS_MAX: usize = RING_BYTES / size_of::<Event>();

fn take(ring: &mut kernel::Ring, reader: &RecordReader) -> Option<Verified> {
    loop {
        match ring.next()? {
            Ok(event) => {
                if let Some(request) = reader.request(&event) {
                    return Some(request);
                }
            }
            Err(error) => tracing::error!("{error}: a bug of fence-xdp"),
        }
    }
}

/// Makes requests of records.
#[derive(Debug)]
struct RecordReader {
    keys: Keyring,
    origin: Arc<Origin>,
    requests: Arc<Requests>,
    complaints: SourceLimit,
}

impl RecordReader {
    fn new(keys: Keyring, origin: Origin, requests: Arc<Requests>) -> Self {
        Self { keys, origin: Arc::new(origin), requests, complaints: SourceLimit::new(1, Duration::from_secs(1)) }
    }

    /// The request of a record, unless the keys have changed since the kernel program verified it.
    fn request(&self, event: &Event) -> Option<Verified> {
        let keys = self.keys.current();
        let key = if event.slot == NO_KEY_SLOT { keys.first() } else { keys.in_slot(event.slot) };
        let arrived = Moment::from_ktime(event.arrived_ns);
        let request = Verified::new(&event.request, key.cloned(), event.ifindex, Via::Kernel, arrived);
        let Some(request) = request else {
            tracing::error!("the kernel program passed a record that is no request: a bug of fence-xdp");
            return None;
        };
        if key.is_none() && event.slot != NO_KEY_SLOT {
            self.reject(&request);
            return None;
        }
        Some(request.sent_by(event.sender()).came_to(&self.origin))
    }

    /// Records a request whose key is no longer accepted.
    fn reject(&self, request: &Verified) {
        self.requests.retired_key(request.about());
        let source = request.caller().address();
        if let Some(held_back) = self.complaints.allow(source, Moment::now()) {
            let (op, seqno) = (request.op().name(), request.seqno());
            tracing::warn!(%op, %source, seqno, held_back, "rejected: {RETIRED_KEY}");
        }
    }
}

#[cfg(test)]
mod tests {
    use fence_common::boundary::KEY_SLOT_ACTIVE;
    use fence_common::ending::Ending;
    use fence_common::hash::HashKind;
    use fence_common::key::Key;
    use fence_common::keys::KeyPair;
    use fence_common::wire::{FAMILY_V4, Op, Request};
    use zerocopy::FromZeros;

    use super::*;
    use crate::observe::requests::Tally;

    fn pair(name: &str) -> KeyPair {
        Key::new(name.as_bytes()).unwrap().into()
    }

    #[test]
    fn a_request_whose_key_is_retired_meanwhile_is_counted_and_goes_no_further() {
        let mut event = Event::new_zeroed();
        event.slot = KEY_SLOT_ACTIVE;
        event.request.op = Op::Off.to_wire();
        event.request.family = FAMILY_V4.into();
        event.request.address[..4].copy_from_slice(&[127, 0, 0, 1]);
        event.request.port = 1229.into();
        Key::new(b"old").unwrap().sign(HashKind::Sha256, &mut event.request);
        let requests = Arc::new(Requests::default());
        let keys = Keyring::new(Some(pair("old")));
        let reader = RecordReader::new(keys.clone(), Origin::default(), Arc::clone(&requests));
        let request = reader.request(&event).unwrap();
        assert!(request.key().is_some_and(|key| key.verify(&event.request)));
        assert_eq!(requests.tally(), Tally::default());

        // The kernel program verified the record in this slot before the keys changed.
        keys.rotate(pair("new")).unwrap();
        let slot = (0..2).find(|slot| keys.current().in_slot(*slot).is_none()).unwrap();
        event.slot = slot;
        assert!(reader.request(&event).is_none());
        assert_eq!(requests.tally(), Tally { retired_key: 1, ..Tally::default() });
        let end = requests.recent().remove(0).end;
        assert!(matches!(&end, Some((_, Ending::RetiredKey, detail)) if detail == RETIRED_KEY), "{end:?}");

        // Without a digest there is no key to retire.
        event.slot = NO_KEY_SLOT;
        event.request = Request { hash_kind: 0, hash: [0; 64], ..event.request };
        assert!(reader.request(&event).is_some());
        assert_eq!(requests.tally().retired_key, 1);
    }
}
