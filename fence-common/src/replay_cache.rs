//! The replay cache: datagrams that were accepted before.
//!
//! Anybody on the segment can hear a datagram and send it again, without the key. A stock client
//! puts random bytes into each datagram, so no two have the same digest, retransmissions included.
//! A digest that was seen before therefore proves nothing about its sender.
//!
//! Without this cache a replayed `off` would be called back whenever a client listens at the old
//! address. It would also supersede that client's own request.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::hash::HashKind;
use crate::wire::{HASH_LEN, Request};

/// The identity of a signed datagram: the beginning of its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DatagramId {
    /// The digest's first bytes.
    pub digest: [u8; 16],
}

impl DatagramId {
    /// The identity of a datagram. `None` if it carries no digest, since anybody could have made
    /// it.
    #[inline(always)]
    #[must_use]
    pub fn of(request: &Request) -> Option<&Self> {
        match request.hash_kind() {
            None | Some(HashKind::None) => None,
            Some(HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512) => Some(Self::at(request)),
        }
    }

    /// The identity of a datagram that is known to carry a digest.
    #[inline(always)]
    #[must_use]
    pub(crate) fn at(request: &Request) -> &Self {
        let parts: &[[u8; 16]; HASH_LEN / 16] = zerocopy::transmute_ref!(&request.hash);
        let [first, ..] = parts;
        zerocopy::transmute_ref!(first)
    }
}

#[cfg(feature = "user")]
pub use memory::ReplayCache;

#[cfg(feature = "user")]
mod memory {
    use alloc::collections::{BTreeMap, VecDeque};

    use super::DatagramId;
    use crate::rate_limit::REPLAY_CACHE_MAX;

    /// The accepted datagrams, each with its time.
    #[derive(Debug, Default)]
    #[cfg_attr(feature = "model", derive(Clone, PartialEq, Eq, Hash))]
    pub struct ReplayCache {
        seen: BTreeMap<DatagramId, u64>,
        /// Oldest first. A datagram that was accepted again after its window is here twice; the
        /// later one counts.
        order: VecDeque<(DatagramId, u64)>,
    }

    impl ReplayCache {
        /// Adds a datagram with a right digest. `false` if it was accepted less than `window`
        /// nanoseconds ago.
        #[must_use]
        pub fn is_new(&mut self, datagram_id: DatagramId, now: u64, window: u64) -> bool {
            if self.accepted_at(&datagram_id).is_some_and(|at| now.saturating_sub(at) < window) {
                return false;
            }
            self.note(datagram_id, now);
            true
        }

        /// Adds a datagram, known or not, with its time in nanoseconds.
        pub fn note(&mut self, datagram_id: DatagramId, at: u64) {
            self.seen.insert(datagram_id, at);
            self.order.push_back((datagram_id, at));
            if self.order.len() > REPLAY_CACHE_MAX
                && let Some((oldest, at)) = self.order.pop_front()
                && self.seen.get(&oldest) == Some(&at)
            {
                self.seen.remove(&oldest);
            }
        }

        /// When a datagram was accepted last, if it is in the cache.
        #[must_use]
        pub fn accepted_at(&self, datagram_id: &DatagramId) -> Option<u64> {
            self.seen.get(datagram_id).copied()
        }

        /// All datagrams in the cache, oldest first.
        pub fn iter(&self) -> impl Iterator<Item = (DatagramId, u64)> + '_ {
            self.order.iter().copied().filter(|(datagram_id, at)| self.seen.get(datagram_id) == Some(at))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::key::Key;
    use crate::rate_limit::REPLAY_CACHE_MAX;
    use zerocopy::FromZeros;

    const DAY: u64 = 24 * 3_600_000_000_000;

    fn datagram_id(n: usize) -> DatagramId {
        DatagramId { digest: u128::try_from(n).unwrap().to_be_bytes() }
    }

    #[test]
    fn a_datagram_is_new_once_and_a_retransmission_is_another_one() {
        let key = Key::new(b"secret").unwrap();
        for kind in [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512] {
            let mut replay_cache = ReplayCache::default();
            let mut request = Request::new_zeroed();
            key.sign(kind, &mut request);
            let datagram_id = *DatagramId::of(&request).unwrap();
            assert!(replay_cache.is_new(datagram_id, 0, DAY) && !replay_cache.is_new(datagram_id, 0, DAY));
            request.random[5] = 1;
            key.sign(kind, &mut request);
            assert!(replay_cache.is_new(*DatagramId::of(&request).unwrap(), 0, DAY));
        }
    }

    #[test]
    fn without_a_digest_nothing_is_told_apart() {
        assert_eq!(DatagramId::of(&Request::new_zeroed()), None);
    }

    #[test]
    fn a_datagram_is_new_again_when_its_time_is_over() {
        let mut replay_cache = ReplayCache::default();
        assert!(replay_cache.is_new(datagram_id(1), 5, DAY));
        assert!(!replay_cache.is_new(datagram_id(1), 4, DAY), "by a clock that is a little behind");
        assert!(!replay_cache.is_new(datagram_id(1), 5 + DAY - 1, DAY));
        assert!(replay_cache.is_new(datagram_id(1), 5 + DAY, DAY));
        assert!(!replay_cache.is_new(datagram_id(1), 5 + DAY + 1, DAY));
        assert_eq!(replay_cache.iter().collect::<Vec<_>>(), [(datagram_id(1), 5 + DAY)]);
    }

    #[test]
    fn the_memory_is_bounded_and_loses_the_oldest() {
        let mut replay_cache = ReplayCache::default();
        assert!((0..=REPLAY_CACHE_MAX).all(|n| replay_cache.is_new(datagram_id(n), 1, DAY)));
        assert_eq!(replay_cache.iter().count(), REPLAY_CACHE_MAX);
        assert!(!replay_cache.is_new(datagram_id(1), 1, DAY) && replay_cache.is_new(datagram_id(0), 1, DAY));
        // A datagram that is accepted again is not evicted with its first time.
        let (mut replay_cache, later) = (ReplayCache::default(), 2 * DAY);
        assert!(replay_cache.is_new(datagram_id(0), 1, DAY) && replay_cache.is_new(datagram_id(0), later, DAY));
        assert!((1..REPLAY_CACHE_MAX).all(|n| replay_cache.is_new(datagram_id(n), later, DAY)));
        assert!(!replay_cache.is_new(datagram_id(0), later, DAY));
    }
}
