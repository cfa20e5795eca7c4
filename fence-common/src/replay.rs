//! Datagrams that came once and come again, sent by somebody who has heard them on the segment and has no key.
//!
//! Every datagram of a stock client is new, retransmissions included: each carries random bytes of its own, and so a digest of its
//! own. So a digest that was seen before, right as it is, proves nothing about who sends it now. Without this memory a replayed
//! `off` would be called back whenever any client listens at its old place, and would supersede what that client really asks.

use alloc::collections::{BTreeSet, VecDeque};

use crate::hash::HashKind;
use crate::wire::Request;

/// How many datagrams are remembered. Only holders of the key can add one; with a `monitor` each minute by each of 16 guests with two
/// addresses it is a day and a half.
pub const SEEN_MAX: usize = 1 << 16;

/// What tells a signed datagram from all others: the beginning of its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(test, derive(Hash))]
pub struct Mark([u8; 16]);

impl Mark {
    /// The mark of a datagram; `None` if it carries no digest, so that anybody could have made it anew.
    #[must_use]
    pub fn of(request: &Request) -> Option<Self> {
        match request.hash_kind() {
            None | Some(HashKind::None) => None,
            Some(HashKind::Sha1 | HashKind::Sha256 | HashKind::Sha512) => request.hash.first_chunk().copied().map(Self),
        }
    }
}

/// The datagrams that were seen, oldest first.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub struct Replays {
    seen: BTreeSet<Mark>,
    order: VecDeque<Mark>,
}

impl Replays {
    /// Notes a datagram whose digest is right. `false` if it has been seen before.
    #[must_use]
    pub fn is_new(&mut self, mark: Mark) -> bool {
        if !self.seen.insert(mark) {
            return false;
        }
        self.order.push_back(mark);
        if self.order.len() > SEEN_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Key;
    use zerocopy::FromZeros;

    #[test]
    fn a_datagram_is_new_once_and_a_retransmission_is_another_one() {
        let key = Key::new(b"secret").unwrap();
        for kind in [HashKind::Sha1, HashKind::Sha256, HashKind::Sha512] {
            let mut replays = Replays::default();
            let mut request = Request::new_zeroed();
            key.sign(kind, &mut request);
            let mark = Mark::of(&request).unwrap();
            assert!(replays.is_new(mark) && !replays.is_new(mark));
            request.random[5] = 1;
            key.sign(kind, &mut request);
            assert!(replays.is_new(Mark::of(&request).unwrap()));
        }
    }

    #[test]
    fn without_a_digest_nothing_is_told_apart() {
        assert_eq!(Mark::of(&Request::new_zeroed()), None);
    }

    #[test]
    fn the_memory_is_bounded_and_loses_the_oldest() {
        let mut replays = Replays::default();
        let mark = |n: usize| Mark(u128::try_from(n).unwrap().to_be_bytes());
        assert!((0..=SEEN_MAX).all(|n| replays.is_new(mark(n))));
        assert_eq!((replays.seen.len(), replays.order.len()), (SEEN_MAX, SEEN_MAX));
        assert!(!replays.is_new(mark(1)) && replays.is_new(mark(0)));
    }
}
