//! Every way that a frame's judgement can end, what follows from it, and the counter of it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::admit::Rejection;

/// Makes the verdicts, the counters (one field for each) and the counters' names from one list, so that none can be forgotten.
macro_rules! verdicts {
    ($($(#[doc = $doc:literal])+ $verdict:ident = $counter:ident,)+) => {
        /// How the judgement of a frame ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[must_use = "a verdict that nothing follows from is a hole"]
        pub enum Verdict {
            $($(#[doc = $doc])+ $verdict,)+
            /// Not for us: other traffic, or nothing that we can see to be for us. Passed and not counted, as it must cost
            /// next to nothing; what the interface counts tells how much it is.
            NotOurs,
        }

        impl Verdict {
            /// Every verdict that is counted, in the order of the counters.
            pub const COUNTED: [Self; COUNTERS] = [$(Self::$verdict,)+];
        }

        /// How often each verdict was given, since the program was loaded. One per CPU in the map.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $counter: u64,)+
        }

        /// How many counters there are.
        pub const COUNTERS: usize = [$(stringify!($counter),)+].len();

        impl Counters {
            /// The counters' names, in their order.
            pub const NAMES: [&str; COUNTERS] = [$(stringify!($counter),)+];
        }
    };
}

verdicts! {
    /// Right in every respect and handed to the daemon through the ring buffer.
    Delivered = delivered,
    /// Right, but the ring buffer is full: the socket gets it.
    RingFull = pass_ring_full,
    /// Right, but the daemon has shown no sign of life for seconds: the socket keeps it for when it is back.
    Stale = pass_stale,
    /// The CPU's working memory is in use by a run of the program that this one interrupted: the socket judges.
    Busy = pass_busy,
    /// To our group, with IPv4 options: the stack reads them, the socket judges the rest.
    Options = pass_ip_options,
    /// UDP to our group in fragments: the stack puts it together, the socket judges it.
    Fragment = pass_fragment,
    /// To our group, with IPv6 extension headers: the stack reads them, the socket judges the rest.
    Extension = pass_ipv6_extension,
    /// To our group, but the lengths contradict each other or the frame: the stack judges.
    Malformed = pass_malformed,
    /// Several datagrams in one frame, as a guest's driver or a network card hands them over for the stack to cut apart (UDP segmentation
    /// offload): the stack cuts, the socket judges each.
    Gso = pass_gso,
    /// From an address that nobody sends from on a network (loopback, multicast, ...): the stack knows whether it wants such a thing.
    Martian = pass_martian,
    /// Would be dropped, but carries a VLAN tag: another daemon with another key may listen there.
    ForeignVlan = pass_foreign_vlan,
    /// The payload is not 176 bytes long, nor a multiple of it.
    Length = drop_length,
    /// Unknown operation.
    Op = drop_operation,
    /// Unknown kind of digest.
    HashUnknown = drop_hash_unknown,
    /// No digest at all, where one is demanded.
    Unsigned = drop_unsigned,
    /// A weaker digest than configured.
    HashWeak = drop_hash_weak,
    /// The domain has no NUL.
    Domain = drop_domain,
    /// Call-back port 0.
    Port = drop_port,
    /// Address family unknown or not the datagram's.
    Family = drop_family,
    /// Call-back address that no host has.
    Address = drop_address,
    /// IPv4 call-back address that is not the datagram's source.
    Source = drop_source,
    /// Too many wrong digests of this sender: not looked at.
    SourceLimit = drop_source_limit,
    /// Too many wrong digests of all senders together that were never right: not looked at.
    GlobalLimit = drop_global_limit,
    /// This very datagram was accepted before.
    Replay = drop_replay,
    /// Wrong digest.
    Digest = drop_digest,
    /// Right, but too many of this sender.
    DeliveryLimit = drop_delivery_limit,
    /// Right, but the ring buffer is half full, and most of it with this sender's.
    RingReserve = drop_ring_reserve,
}

/// What becomes of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The daemon owns it; the stack must not see it again.
    Deliver,
    /// Gone.
    Drop,
    /// The stack gets it as if there were no program.
    Pass,
}

impl Verdict {
    /// What follows from the verdict.
    #[inline(always)]
    #[must_use]
    pub const fn action(self) -> Action {
        match self {
            Self::Delivered => Action::Deliver,
            Self::RingFull
            | Self::Stale
            | Self::Busy
            | Self::Options
            | Self::Fragment
            | Self::Extension
            | Self::Malformed
            | Self::Gso
            | Self::Martian
            | Self::ForeignVlan
            | Self::NotOurs => Action::Pass,
            Self::Length
            | Self::Op
            | Self::HashUnknown
            | Self::Unsigned
            | Self::HashWeak
            | Self::Domain
            | Self::Port
            | Self::Family
            | Self::Address
            | Self::Source
            | Self::SourceLimit
            | Self::GlobalLimit
            | Self::Replay
            | Self::Digest
            | Self::DeliveryLimit
            | Self::RingReserve => Action::Drop,
        }
    }

    /// Whether a request was refused for what stands in it, before anybody looked at its digest.
    #[inline(always)]
    #[must_use]
    pub const fn is_form_rejection(self) -> bool {
        match self {
            Self::Op
            | Self::HashUnknown
            | Self::Unsigned
            | Self::HashWeak
            | Self::Domain
            | Self::Port
            | Self::Family
            | Self::Address
            | Self::Source => true,
            Self::Delivered
            | Self::RingFull
            | Self::Stale
            | Self::Busy
            | Self::Options
            | Self::Fragment
            | Self::Extension
            | Self::Malformed
            | Self::Gso
            | Self::Martian
            | Self::ForeignVlan
            | Self::Length
            | Self::SourceLimit
            | Self::GlobalLimit
            | Self::Replay
            | Self::Digest
            | Self::DeliveryLimit
            | Self::RingReserve
            | Self::NotOurs => false,
        }
    }

    /// The verdict where the frame came from: nothing is dropped on a segment that may be somebody else's.
    #[inline(always)]
    pub const fn on_segment(self, foreign: bool) -> Self {
        match self.action() {
            Action::Drop if foreign => Self::ForeignVlan,
            Action::Drop | Action::Deliver | Action::Pass => self,
        }
    }

    /// The name of the verdict's counter, if it is counted.
    #[must_use]
    pub fn counter_name(self) -> Option<&'static str> {
        Counters::NAMES.get(usize::from(self as u8)).copied()
    }

    /// What is wrong with a guest whose requests are refused for this; `None` where no client sends such a thing.
    #[must_use]
    pub const fn cause(self) -> Option<&'static str> {
        match self {
            Self::Unsigned => Some(
                "they have no digest, because the guest's key file /etc/cluster/fence_xvm.key is missing (fence_xvm does not say so), \
                 or because it asks with `-c none`",
            ),
            Self::HashWeak => Some("their digest is weaker than `hash` demands, see `fence_xvm -c` there"),
            Self::Source => Some(
                "they ask to be called back elsewhere than they come from; behind NAT that takes `strict_source = \"no\";`",
            ),
            Self::Op
            | Self::HashUnknown
            | Self::Domain
            | Self::Port
            | Self::Family
            | Self::Address
            | Self::Delivered
            | Self::RingFull
            | Self::Stale
            | Self::Busy
            | Self::Options
            | Self::Fragment
            | Self::Extension
            | Self::Malformed
            | Self::Gso
            | Self::Martian
            | Self::ForeignVlan
            | Self::Length
            | Self::SourceLimit
            | Self::GlobalLimit
            | Self::Replay
            | Self::Digest
            | Self::DeliveryLimit
            | Self::RingReserve
            | Self::NotOurs => None,
        }
    }
}

impl From<Rejection> for Verdict {
    #[inline(always)]
    fn from(refusal: Rejection) -> Self {
        match refusal {
            Rejection::Length => Self::Length,
            Rejection::Op => Self::Op,
            Rejection::HashUnknown => Self::HashUnknown,
            Rejection::Unsigned => Self::Unsigned,
            Rejection::HashWeak => Self::HashWeak,
            Rejection::Domain => Self::Domain,
            Rejection::Port => Self::Port,
            Rejection::Family => Self::Family,
            Rejection::Address => Self::Address,
            Rejection::Source => Self::Source,
            Rejection::Digest => Self::Digest,
        }
    }
}

impl Counters {
    /// Counts one verdict.
    #[inline(always)]
    pub fn count(&mut self, verdict: Verdict) {
        // By index, as BPF has no jump tables; the macro gives field and verdict the same number.
        let all: &mut [u64; COUNTERS] = zerocopy::transmute_mut!(self);
        if let Some(counter) = all.get_mut(usize::from(verdict as u8)) {
            *counter = counter.wrapping_add(1);
        }
    }

    /// Names and values, in the order of the fields.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        let all: [u64; COUNTERS] = zerocopy::transmute!(*self);
        Self::NAMES.into_iter().zip(all)
    }

    /// Adds another CPU's counters.
    pub fn add(&mut self, other: &Self) {
        let all: &mut [u64; COUNTERS] = zerocopy::transmute_mut!(self);
        for (sum, (_, value)) in all.iter_mut().zip(other.iter()) {
            *sum = sum.wrapping_add(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of, size_of};
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_verdict_counts_in_the_field_of_its_own() {
        assert_eq!((size_of::<Counters>(), align_of::<Counters>()), (COUNTERS * 8, 8));
        for (index, verdict) in Verdict::COUNTED.into_iter().enumerate() {
            assert_eq!(usize::from(verdict as u8), index);
            let mut counters = Counters::default();
            counters.count(verdict);
            let counted: std::vec::Vec<_> = counters.iter().filter(|(_, value)| *value != 0).collect();
            assert_eq!(counted, [(verdict.counter_name().unwrap(), 1)]);
        }
        let mut none = Counters::default();
        none.count(Verdict::NotOurs);
        assert_eq!(none, Counters::default());
        assert_eq!(Verdict::NotOurs.counter_name(), None);
    }

    #[test]
    fn the_ends_of_the_layout_are_pinned() {
        assert_eq!(COUNTERS, 27);
        assert_eq!(offset_of!(Counters, delivered), 0);
        assert_eq!(offset_of!(Counters, drop_ring_reserve), 26 * 8);
        assert_eq!(Counters::NAMES.into_iter().collect::<BTreeSet<_>>().len(), COUNTERS);
    }

    #[test]
    fn counters_say_what_happens() {
        for verdict in Verdict::COUNTED {
            let name = verdict.counter_name().unwrap();
            match verdict.action() {
                Action::Deliver => assert_eq!(name, "delivered"),
                Action::Drop => assert!(name.starts_with("drop_"), "{name}"),
                Action::Pass => assert!(name.starts_with("pass_"), "{name}"),
            }
        }
    }

    #[test]
    fn nothing_is_dropped_on_a_foreign_segment() {
        for verdict in Verdict::COUNTED.into_iter().chain([Verdict::NotOurs]) {
            assert_eq!(verdict.on_segment(false), verdict);
            assert_ne!(verdict.on_segment(true).action(), Action::Drop);
            if verdict.action() != Action::Drop {
                assert_eq!(verdict.on_segment(true), verdict);
            }
        }
    }

    #[test]
    fn sums_add_field_by_field() {
        let mut sum = Counters { delivered: 1, drop_digest: 2, ..Counters::default() };
        sum.add(&Counters { delivered: 10, drop_port: 5, ..Counters::default() });
        assert_eq!(sum, Counters { delivered: 11, drop_digest: 2, drop_port: 5, ..Counters::default() });
    }
}
