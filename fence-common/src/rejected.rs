//! The last senders that were rejected before the digest, and why: they name a misconfigured guest.
//!
//! A guest without its key file sends requests without a digest, and gets no answer. A counter does
//! not say which guest that is. So a few records keep senders. Sender and reason choose the record,
//! and a later sender may overwrite it. Anybody can do that, and nothing is decided by them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::rate_limit::Sender;
use crate::verdict::{COUNTERS, Verdict};

/// How many records each CPU has: a power of two.
pub const REJECTED_MAX: usize = 16;
const _: () = assert!(REJECTED_MAX == 1 << (u8::BITS - 4));

/// One record. All zero: unused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Rejected {
    /// The IP source address, as in [`Sender`].
    pub ip: [u8; 16],
    /// The Ethernet source address, as in [`Sender`].
    pub mac: [u8; 6],
    /// The IP version, as in [`Sender`].
    pub family: u16,
    /// When it was rejected last, on the program's clock.
    pub last_ns: u64,
    /// How often it was rejected for this reason, as long as the record is its own.
    pub count: u64,
    /// The reason: the number of a [`Verdict`].
    pub verdict: u32,
    /// Zero.
    pub reserved: u32,
}

impl Rejected {
    /// The index of the record for a sender and a reason: less than [`REJECTED_MAX`].
    #[inline(always)]
    #[must_use]
    pub const fn index(sender: &Sender, verdict: Verdict) -> u32 {
        let [a, b, c] = words(sender);
        // Any of these bytes may be the one that tells neighbours apart.
        let mixed = (a ^ b.rotate_left(17) ^ c.rotate_left(31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let [.., high] = (mixed ^ ((verdict as u64) << 60)).to_le_bytes();
        // The upper four bits: one of sixteen records.
        high as u32 >> 4
    }

    /// Records a rejection.
    #[inline(always)]
    pub fn note(&mut self, sender: &Sender, verdict: Verdict, now: u64) {
        let number = u32::from(verdict as u8);
        let same = words(&self.sender()) == words(sender) && self.verdict == number;
        let count = if same { self.count } else { 0 };
        *self = Self {
            ip: sender.ip,
            mac: sender.mac,
            family: sender.family,
            last_ns: now,
            count: count.wrapping_add(1),
            verdict: number,
            reserved: 0,
        };
    }

    /// The sender.
    #[inline(always)]
    #[must_use]
    pub const fn sender(&self) -> Sender {
        Sender { ip: self.ip, mac: self.mac, family: self.family }
    }

    /// The reason. `None` for an unused record, and for a number that is none.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let number = usize::try_from(self.verdict).ok().filter(|number| self.count > 0 && *number < COUNTERS)?;
        Verdict::COUNTED.get(number).copied().filter(|verdict| verdict.is_form_rejection())
    }
}

/// A sender as words: comparing bytes would call `bcmp`, which a BPF program does not have.
#[inline(always)]
const fn words(sender: &Sender) -> [u64; 3] {
    zerocopy::transmute!(*sender)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admit::Source;

    fn guest(last: u8) -> Sender {
        Sender::new(&Source::V4([192, 168, 122, last]), [0x52, 0x54, 0, 0, 0, last])
    }

    #[test]
    fn a_place_counts_for_one_sender_and_one_reason() {
        let mut place = Rejected::default();
        assert_eq!(place.verdict(), None);
        place.note(&guest(11), Verdict::Unsigned, 5);
        place.note(&guest(11), Verdict::Unsigned, 7);
        assert_eq!((place.sender(), place.verdict()), (guest(11), Some(Verdict::Unsigned)));
        assert_eq!((place.count, place.last_ns), (2, 7));
        place.note(&guest(12), Verdict::Unsigned, 8);
        assert_eq!((place.sender(), place.count), (guest(12), 1));
        place.note(&guest(12), Verdict::HashWeak, 9);
        assert_eq!((place.verdict(), place.count), (Some(Verdict::HashWeak), 1));
        // A number that no program writes is no reason.
        for verdict in [Verdict::Delivered as u32, u32::MAX] {
            assert_eq!(Rejected { verdict, ..place }.verdict(), None);
        }
    }

    #[test]
    fn neighbours_have_places_of_their_own_mostly() {
        let places: alloc::collections::BTreeSet<u32> =
            (1..=64).map(|last| Rejected::index(&guest(last), Verdict::Unsigned)).collect();
        assert!(places.len() > 10 && places.iter().all(|place| *place < 16), "{places:?}");
    }
}
