//! The boundary between the kernel program and the daemon: names, version, and map layouts.
//!
//! Every type is made of fixed-size integers and byte arrays, without padding and without invalid
//! values. So each side may read what the other wrote.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::admit::{Rules, Source};
use crate::digest::{KeySlot, Scratch};
use crate::hash::HashKind;
use crate::rate_limit::{Limits, Sender};
use crate::wire::{FAMILY_V4, FAMILY_V6, Request};

/// The version of this module's layouts, of [`KeySlot`] and of [`crate::verdict::Counters`]. Every
/// change of a name, a layout or its meaning increments it.
///
/// The program passes every frame while [`Config::abi`] differs. Its own version is in each
/// [`Event`], and in the read-only map [`name::ABI`], which the daemon checks after load.
pub const ABI_VERSION: u32 = 6;

/// Names of programs, maps and the version's section. The kernel keeps 15 characters of a name.
pub mod name {
    /// The XDP program.
    pub const XDP: &str = "fence_xdp";
    /// The XDP program for drivers: it accepts frames in several pieces.
    pub const XDP_FRAGS: &str = "fence_xdp_frags";
    /// The tc program, attached by tcx. It judges as the XDP program does.
    pub const TC: &str = "fence_tc";
    /// Array of one [`Config`](super::Config).
    pub const CONFIG: &str = "fence_config";
    /// Array of [`KEY_SLOTS`](super::KEY_SLOTS) [`KeySlot`](super::KeySlot)s.
    pub const KEYS: &str = "fence_keys";
    /// Per-CPU array of one [`Counters`](crate::verdict::Counters).
    pub const COUNTERS: &str = "fence_counters";
    /// Ring buffer of [`Event`](super::Event)s.
    pub const REQUESTS: &str = "fence_requests";
    /// Per-CPU array of one [`Workspace`](super::Workspace): the program's working memory.
    pub const SCRATCH: &str = "fence_scratch";
    /// Hash of at most [`TRUSTED_MAX`](crate::rate_limit::TRUSTED_MAX)
    /// [`Trusted`](crate::rate_limit::Trusted) by [`Sender`](super::Sender).
    pub const TRUSTED: &str = "fence_trusted";
    /// Hash of at most [`FAILED_MAX`](crate::rate_limit::FAILED_MAX)
    /// [`Failed`](crate::rate_limit::Failed) by [`Sender`](super::Sender).
    pub const FAILED: &str = "fence_failed";
    /// Array of one [`Strangers`](crate::rate_limit::Strangers).
    pub const STRANGERS: &str = "fence_strangers";
    /// Hash of at most [`REPLAY_CACHE_MAX`](crate::rate_limit::REPLAY_CACHE_MAX) times (`u64`, on
    /// the program's clock) by [`DatagramId`](crate::replay_cache::DatagramId).
    pub const REPLAY: &str = "fence_replay";
    /// Array of one `u64`: the time of the daemon's last heartbeat, on the program's clock. 0:
    /// never.
    pub const HEARTBEAT: &str = "fence_heartbeat";
    /// Per-CPU array of [`REJECTED_MAX`](crate::rejected::REJECTED_MAX)
    /// [`Rejected`](crate::rejected::Rejected), by their
    /// [`index`](crate::rejected::Rejected::index).
    pub const REJECTED: &str = "fence_rejected";
    /// The object's section with the program's [`ABI_VERSION`](super::ABI_VERSION), a `u32`. It
    /// becomes a read-only map.
    pub const ABI: &str = ".rodata.abi";
    /// The maps that the program and the daemon share while it runs.
    pub const MAPS: [&str; 11] =
        [CONFIG, KEYS, COUNTERS, REQUESTS, SCRATCH, TRUSTED, FAILED, STRANGERS, REPLAY, HEARTBEAT, REJECTED];
}

/// The number of key slots: during a rotation requests are good with either key. A slot is written
/// twice, first with [`KeySlot::loaded`] 0 and then with 1, as the program may read it meanwhile.
pub const KEY_SLOTS: usize = 2;
/// The slot that is tried first. Outside a rotation no other slot is loaded.
pub const KEY_SLOT_ACTIVE: u32 = 0;
/// [`Event::slot`] of a request without a digest, which no key has verified.
pub const NO_KEY_SLOT: u32 = u32::MAX;

/// The ring buffer's size in bytes: a power of two and a multiple of every page size. It holds 1129
/// requests of 224 bytes, each with a record header of 8.
pub const RING_BYTES: usize = 256 * 1024;

/// Bit of [`Config::families`]: requests to [`Config::group_v4`] are ours.
pub const SERVE_V4: u8 = 1;
/// Bit of [`Config::families`]: requests to [`Config::group_v6`] are ours.
pub const SERVE_V6: u8 = 2;

/// The program's configuration. All zero, as in a fresh map, means: pass everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// The [`ABI_VERSION`] of the writer.
    pub abi: u32,
    /// 1: judge. Any other value: pass everything.
    pub enabled: u8,
    /// [`SERVE_V4`], [`SERVE_V6`] or both.
    pub families: u8,
    /// The weakest [`HashKind`] that is accepted, as on the wire.
    pub min_hash: u8,
    /// 1: an IPv4 callback address must be the datagram's source. 0: it need not be (guests behind
    /// NAT).
    pub strict_source: u8,
    /// The IPv4 group, network order.
    pub group_v4: [u8; 4],
    /// The UDP port in host byte order, so that bpftool shows it readably.
    pub port: u16,
    /// Zero.
    pub reserved: [u8; 2],
    /// The IPv6 group, network order.
    pub group_v6: [u8; 16],
    /// The rate limits.
    pub limits: Limits,
}

impl Config {
    /// The configuration for a listener.
    #[must_use]
    pub fn new(listener: &Listener) -> Self {
        Self {
            abi: ABI_VERSION,
            enabled: 1,
            families: (if listener.group_v4.is_some() { SERVE_V4 } else { 0 })
                | (if listener.group_v6.is_some() { SERVE_V6 } else { 0 }),
            min_hash: listener.rules.min_hash.to_wire(),
            strict_source: u8::from(listener.rules.strict_source),
            group_v4: listener.group_v4.unwrap_or_default(),
            port: listener.port,
            reserved: [0; 2],
            group_v6: listener.group_v6.unwrap_or_default(),
            limits: listener.limits,
        }
    }

    /// The rules for requests. `None` means "pass everything": another version, or not enabled.
    #[inline(always)]
    #[must_use]
    pub const fn rules(&self) -> Option<Rules> {
        if self.abi != ABI_VERSION || self.enabled != 1 {
            return None;
        }
        match HashKind::from_wire(self.min_hash) {
            Some(min_hash) => Some(Rules { min_hash, strict_source: self.strict_source != 0 }),
            None => None,
        }
    }
}

/// The multicast listener as configured: the source of [`Config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The IPv4 group, if IPv4 is served.
    pub group_v4: Option<[u8; 4]>,
    /// The IPv6 group, if IPv6 is served.
    pub group_v6: Option<[u8; 16]>,
    /// The UDP port.
    pub port: u16,
    /// The rules for requests.
    pub rules: Rules,
    /// The rate limits.
    pub limits: Limits,
}

/// The working memory of a run: one per CPU, for one run at a time.
///
/// "Per CPU" alone is not enough. With `PREEMPT_RT` two runs may alternate on one CPU, and an
/// interrupt may run another one amid a run in task context. A run that used another's state could
/// accept a forged request or drop a right one.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Workspace {
    /// 1 while a run uses it, else 0. Taken by an atomic exchange. A run that finds it taken gives
    /// [`Verdict::Busy`](crate::verdict::Verdict::Busy).
    pub in_use: u64,
    /// The run's data. Meaningless between runs.
    pub scratch: Scratch,
}

/// One verified request in the ring buffer.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Event {
    /// When the program saw the datagram: `bpf_ktime_get_ns`, which is `CLOCK_MONOTONIC` in
    /// nanoseconds.
    pub arrived_ns: u64,
    /// The program's [`ABI_VERSION`].
    pub abi: u32,
    /// The index of the interface that received the datagram.
    pub ifindex: u32,
    /// [`FAMILY_V4`] or [`FAMILY_V6`]: the datagram's IP version, and so the meaning of `source`.
    pub family: u32,
    /// The slot of the key that the digest is right with. [`NO_KEY_SLOT`] without a digest.
    pub slot: u32,
    /// The datagram's IP source address: IPv4 in the first 4 bytes, the rest zero; or IPv6.
    pub source: [u8; 16],
    /// The frame's Ethernet source address.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
    /// The datagram's payload.
    pub request: Request,
}

/// Why a ring buffer record is no event. Each reason is our mistake: program and daemon do not
/// match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(thiserror::Error))]
pub enum EventError {
    /// Not as long as an [`Event`].
    #[cfg_attr(feature = "user", error("a record of {0} bytes in the ring buffer is no request"))]
    Length(usize),
    /// Written by a program of another version.
    #[cfg_attr(
        feature = "user",
        error("the kernel program speaks version {0} of the boundary, not version {ABI_VERSION}")
    )]
    Abi(u32),
    /// Neither IPv4 nor IPv6.
    #[cfg_attr(feature = "user", error("a request of unknown address family {0} in the ring buffer"))]
    Family(u32),
}

impl Event {
    /// Decodes a ring buffer record.
    ///
    /// # Errors
    /// [`EventError`] if the record is no event of this version.
    pub fn decode(record: &[u8]) -> Result<Self, EventError> {
        let event = Self::read_from_bytes(record).map_err(|_| EventError::Length(record.len()))?;
        if event.abi != ABI_VERSION {
            return Err(EventError::Abi(event.abi));
        }
        match event.family {
            FAMILY_V4 | FAMILY_V6 => Ok(event),
            other => Err(EventError::Family(other)),
        }
    }

    /// The sender, as the rate limits know it.
    #[must_use]
    pub fn sender(&self) -> Sender {
        Sender::new(&self.source(), self.mac)
    }

    /// The datagram's IP source address.
    #[must_use]
    pub fn source(&self) -> Source {
        match self.family {
            FAMILY_V6 => Source::V6(self.source),
            _ => {
                let [a, b, c, d, ..] = self.source;
                Source::V4([a, b, c, d])
            }
        }
    }
}

/// A key slot without a key: it verifies nothing.
#[must_use]
pub fn empty_slot() -> KeySlot {
    KeySlot::new_zeroed()
}

#[cfg(test)]
mod tests {
    use core::mem::{align_of, offset_of, size_of};

    use super::*;
    use crate::rate_limit::{Failed, Trusted};

    #[test]
    fn layouts_are_pinned() {
        assert_eq!((size_of::<Config>(), align_of::<Config>()), (88, 8));
        assert_eq!(offset_of!(Config, limits), 32);
        assert_eq!((size_of::<Sender>(), align_of::<Sender>()), (24, 8));
        assert_eq!((size_of::<Limits>(), size_of::<Trusted>(), size_of::<Failed>()), (56, 40, 32));
        assert_eq!(offset_of!(Config, enabled), 4);
        assert_eq!(offset_of!(Config, families), 5);
        assert_eq!(offset_of!(Config, min_hash), 6);
        assert_eq!(offset_of!(Config, strict_source), 7);
        assert_eq!(offset_of!(Config, group_v4), 8);
        assert_eq!(offset_of!(Config, port), 12);
        assert_eq!(offset_of!(Config, group_v6), 16);

        assert_eq!((size_of::<Workspace>(), align_of::<Workspace>()), (1944, 8));
        assert_eq!(offset_of!(Workspace, in_use), 0);
        assert_eq!(offset_of!(Workspace, scratch), 8);

        assert_eq!((size_of::<Event>(), align_of::<Event>()), (224, 8));
        assert_eq!(offset_of!(Event, abi), 8);
        assert_eq!(offset_of!(Event, ifindex), 12);
        assert_eq!(offset_of!(Event, family), 16);
        assert_eq!(offset_of!(Event, slot), 20);
        assert_eq!(offset_of!(Event, source), 24);
        assert_eq!(offset_of!(Event, mac), 40);
        assert_eq!(offset_of!(Event, request), 48);
    }

    #[test]
    fn the_kernel_keeps_the_names_whole() {
        for name in [name::XDP, name::XDP_FRAGS, name::TC, name::ABI].into_iter().chain(name::MAPS) {
            assert!(name.len() <= 15, "{name}");
        }
        assert!(RING_BYTES.is_power_of_two());
    }

    #[test]
    fn an_empty_or_strange_configuration_judges_nothing() {
        let rules = Rules { min_hash: HashKind::Sha256, strict_source: true };
        let limits = Limits::default();
        let good =
            Config::new(&Listener { group_v4: Some([225, 0, 0, 12]), group_v6: None, port: 1229, rules, limits });
        assert_eq!(good.rules(), Some(rules));
        assert_eq!(good.families, SERVE_V4);
        assert_eq!(Config::new_zeroed().rules(), None);
        assert_eq!(Config { abi: ABI_VERSION + 1, ..good }.rules(), None);
        assert_eq!(Config { enabled: 0, ..good }.rules(), None);
        assert_eq!(Config { enabled: 2, ..good }.rules(), None);
        assert_eq!(Config { min_hash: 4, ..good }.rules(), None);
    }

    #[test]
    fn only_events_of_this_version_are_decoded() {
        let mut event = Event::new_zeroed();
        event.abi = ABI_VERSION;
        event.family = FAMILY_V4;
        event.source[..4].copy_from_slice(&[192, 168, 122, 11]);
        assert!(Event::decode(event.as_bytes()).is_ok_and(|same| same == event));
        assert_eq!(event.source(), Source::V4([192, 168, 122, 11]));
        assert_eq!(Event::decode(&event.as_bytes()[1..]).err(), Some(EventError::Length(223)));
        event.family = 3;
        assert_eq!(Event::decode(event.as_bytes()).err(), Some(EventError::Family(3)));
        event.abi = 7;
        assert_eq!(Event::decode(event.as_bytes()).err(), Some(EventError::Abi(7)));
    }
}
