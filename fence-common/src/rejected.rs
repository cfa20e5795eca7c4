//! Who was refused last before any digest, and for what: that names a guest which is set up wrongly.
//!
//! A guest whose key file is missing sends requests without a digest, and nobody tells it. A counter alone does not say which
//! guest it is. So the last of them are remembered, in a few places that anybody may overwrite: nothing is decided by them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::rate_limit::Sender;
use crate::verdict::{COUNTERS, Verdict};

/// How many are remembered, for each CPU: a power of two.
pub const REJECTED_MAX: usize = 16;
const _: () = assert!(REJECTED_MAX == 1 << (u8::BITS - 4));

/// One of them. All zero: nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Rejected {
    /// The IP source address, as in [`Sender`].
    pub ip: [u8; 16],
    /// The Ethernet source address, as in [`Sender`].
    pub mac: [u8; 6],
    /// The IP version, as in [`Sender`].
    pub family: u16,
    /// When it was refused last, on the program's clock.
    pub last_ns: u64,
    /// How often it was refused for this, as long as it has this place.
    pub count: u64,
    /// For what: the number of a [`Verdict`].
    pub verdict: u32,
    /// Zero.
    pub reserved: u32,
}

impl Rejected {
    /// The place of a sender and a reason: less than [`REJECTED_MAX`].
    #[inline(always)]
    #[must_use]
    pub const fn index(sender: &Sender, verdict: Verdict) -> u32 {
        let [a, b, c] = words(sender);
        // The bytes that tell neighbours apart are anywhere in these words.
        let mixed = (a ^ b.rotate_left(17) ^ c.rotate_left(31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let [.., high] = (mixed ^ ((verdict as u64) << 60)).to_le_bytes();
        // Four bits, one of sixteen places.
        high as u32 >> 4
    }

    /// Notes a refusal in the sender's place.
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

    /// Who it was.
    #[inline(always)]
    #[must_use]
    pub const fn sender(&self) -> Sender {
        Sender { ip: self.ip, mac: self.mac, family: self.family }
    }

    /// For what it was refused; `None` where nobody has this place.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        let number = usize::try_from(self.verdict).ok().filter(|number| self.count > 0 && *number < COUNTERS)?;
        Verdict::COUNTED.get(number).copied().filter(|verdict| verdict.is_form_rejection())
    }
}

/// A sender in words: a comparison of bytes becomes a call of `bcmp`, which the kernel program has not.
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
        // What no program has written is nobody's.
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
