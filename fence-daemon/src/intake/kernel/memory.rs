//! The kernel program's maps that the daemon writes while it runs: what it is to know from before, and the sign of life.

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use fence_common::boundary::name;
use fence_common::rate_limit::{Sender, Trusted};
use fence_common::replay_cache::DatagramId;

use super::{Error, map_error};

type Words = [u64; size_of::<Trusted>() / 8];

/// What the program knows of datagrams and of their senders.
pub struct Memory {
    seen: HashMap<MapData, [u8; size_of::<DatagramId>()], u64>,
    trusted: HashMap<MapData, [u8; size_of::<Sender>()], Words>,
}

impl Memory {
    pub(super) fn new(seen: Map, trusted: Map) -> Result<Self, Error> {
        Ok(Self {
            seen: HashMap::try_from(seen).map_err(map_error(name::REPLAY))?,
            trusted: HashMap::try_from(trusted).map_err(map_error(name::TRUSTED))?,
        })
    }

    /// A datagram was accepted, at a time on the monotonic clock: the program is to drop its copies.
    pub fn note(&mut self, datagram_id: DatagramId, at: u64) {
        told(self.seen.insert(datagram_id.digest, at, 0));
    }

    /// A sender's digest was right at that time: the program is to look at it though strangers flood.
    pub fn trust(&mut self, sender: &Sender, at: u64) {
        let trusted = Trusted { last_right_ns: at, ..Trusted::default() };
        let (key, words): ([u8; size_of::<Sender>()], Words) =
            (zerocopy::transmute!(*sender), zerocopy::transmute!(trusted));
        told(self.trusted.insert(key, words, 0));
    }

    /// Whether the program knows the sender as one whose digest was right.
    #[must_use]
    pub fn trusts(&self, sender: &Sender) -> bool {
        let key: [u8; size_of::<Sender>()] = zerocopy::transmute!(*sender);
        self.trusted.get(&key, 0).is_ok()
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memory(..)")
    }
}

/// These maps make room by themselves, so an error is the kernel's want of memory. User space knows what the program was to know.
fn told(result: Result<(), MapError>) {
    if let Err(error) = result {
        tracing::debug!("a map of the kernel program cannot be written: {error}");
    }
}

/// The daemon's sign of life.
pub(super) struct Heart(Array<MapData, u64>);

impl Heart {
    pub(super) fn new(map: Map) -> Result<Self, Error> {
        Ok(Self(Array::try_from(map).map_err(map_error(name::HEARTBEAT))?))
    }

    /// The ring buffer is being read, at this time on the monotonic clock.
    pub(super) fn beat(&mut self, now: u64) {
        told(self.0.set(0, now, 0));
    }
}
