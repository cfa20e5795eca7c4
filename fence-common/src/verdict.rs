//! Every verdict on a frame, the action that follows from it, and its counter.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::admit::Rejection;

/// Makes verdicts, counters (one field each) and counter names from one list, so none is forgotten.
macro_rules! verdicts {
    ($($(#[doc = $doc:literal])+ $verdict:ident = $counter:ident,)+) => {
        /// The verdict on a frame.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[must_use = "a verdict that nothing follows from is a hole"]
        pub enum Verdict {
            $($(#[doc = $doc])+ $verdict,)+
            /// Other traffic. It is passed and not counted, as it must cost next to nothing. The
            /// interface's own counters tell how much it is.
            NotOurs,
        }

        impl Verdict {
            /// Every verdict that is counted, in the order of the counters.
            pub const COUNTED: [Self; COUNTERS] = [$(Self::$verdict,)+];
        }

        /// How often each verdict was given since the program was loaded. The map has one per CPU.
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
    /// Right in every respect. Delivered to the daemon by the ring buffer.
    Delivered = delivered,
    /// Right, but the ring buffer is full. The socket gets it.
    RingFull = pass_ring_full,
    /// Right, but the daemon's heartbeat is too old. The socket keeps it until the daemon is back.
    Stale = pass_stale,
    /// The run that this one interrupted uses the CPU's working memory. The socket judges.
    Busy = pass_busy,
    /// IPv4 options, to our group. The stack reads them and the socket judges.
    Options = pass_ip_options,
    /// A UDP fragment to our group. The stack reassembles it and the socket judges.
    Fragment = pass_fragment,
    /// IPv6 extension headers, to our group. The stack reads them and the socket judges.
    Extension = pass_ipv6_extension,
    /// To our group, but its lengths contradict each other or the frame. The stack judges.
    Malformed = pass_malformed,
    /// Several datagrams in one frame (UDP segmentation offload, GSO). The stack cuts it and the
    /// socket judges each.
    Gso = pass_gso,
    /// A source address that no network has (loopback, multicast, ...). The stack decides.
    Martian = pass_martian,
    /// Of another VLAN: its own listeners judge it.
    ForeignVlan = pass_foreign_vlan,
    /// The payload is neither 176 bytes nor a multiple of it.
    Length = drop_length,
    /// Unknown operation.
    Op = drop_operation,
    /// Unknown kind of digest.
    HashUnknown = drop_hash_unknown,
    /// No digest, where one is required.
    Unsigned = drop_unsigned,
    /// A weaker digest than the configured minimum.
    HashWeak = drop_hash_weak,
    /// The domain has no NUL.
    Domain = drop_domain,
    /// Callback port 0.
    Port = drop_port,
    /// Address family unknown or not the datagram's.
    Family = drop_family,
    /// A callback address that no host has.
    Address = drop_address,
    /// A loopback address as callback address, from elsewhere.
    Loopback = drop_loopback,
    /// The IPv4 callback address is not the datagram's source.
    Source = drop_source,
    /// Too many wrong digests of this sender. The digest is not checked.
    SourceLimit = drop_source_limit,
    /// Too many wrong digests of all untrusted senders. The digest is not checked.
    GlobalLimit = drop_global_limit,
    /// A replay: this datagram was accepted before.
    Replay = drop_replay,
    /// Wrong digest.
    Digest = drop_digest,
    /// Right, but the sender's request rate is exceeded.
    DeliveryLimit = drop_delivery_limit,
    /// Right, but the ring buffer is half full and the sender's share of the rest is used up.
    RingReserve = drop_ring_reserve,
}

/// What the program does with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The daemon gets it. The stack must not see it again.
    Deliver,
    /// Dropped.
    Drop,
    /// Passed: the stack gets it as without a program.
    Pass,
}

impl Verdict {
    /// The action that follows from the verdict.
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
            | Self::Loopback
            | Self::Source
            | Self::SourceLimit
            | Self::GlobalLimit
            | Self::Replay
            | Self::Digest
            | Self::DeliveryLimit
            | Self::RingReserve => Action::Drop,
        }
    }

    /// Whether the verdict rejects a request for its fields, before its digest is checked.
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
            | Self::Loopback
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

    /// The verdict on this segment. Nothing is dropped on another VLAN's.
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

    /// The likely cause in a guest whose requests are rejected for this. `None` if nobody needs to
    /// know: no client sends such requests.
    #[must_use]
    pub fn cause(self) -> Option<&'static str> {
        let causes = [
            (
                Self::Unsigned,
                "they have no digest, because the guest's key file /etc/cluster/fence_xvm.key is missing (fence_xvm does not say so), \
                 or because it asks with `-c none`",
            ),
            (Self::HashWeak, "their digest is weaker than `hash` demands, see `fence_xvm -c` there"),
            (
                Self::Loopback,
                "they ask to be called back at this host's own loopback address, where another client may wait: no guest may do so",
            ),
            (
                Self::Source,
                "they ask to be called back elsewhere than they come from; behind NAT that takes `strict_source = \"no\";`",
            ),
        ];
        causes.into_iter().find(|(verdict, _)| *verdict == self).map(|(_, cause)| cause)
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
            Rejection::Loopback => Self::Loopback,
            Rejection::Source => Self::Source,
            Rejection::Digest => Self::Digest,
        }
    }
}

impl Counters {
    /// Counts one verdict.
    #[inline(always)]
    pub fn count(&mut self, verdict: Verdict) {
        // By index: BPF has no jump tables. The macro gives field and verdict the same number.
        let all: &mut [u64; COUNTERS] = zerocopy::transmute_mut!(self);
        if let Some(counter) = all.get_mut(usize::from(verdict as u8)) {
            *counter = counter.wrapping_add(1);
        }
    }

    /// Names and values in the order of the fields.
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
        assert_eq!(COUNTERS, 28);
        assert_eq!(offset_of!(Counters, delivered), 0);
        assert_eq!(offset_of!(Counters, drop_ring_reserve), 27 * 8);
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
