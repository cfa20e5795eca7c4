//! The maps that the daemon writes while the program runs: replay cache, trusted senders and
//! heartbeat.

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use fence_common::boundary::name;
use fence_common::rate_limit::{Sender, Trusted};
use fence_common::replay_cache::DatagramId;

use super::{Error, map_error};

type Words = [u64; size_of::<Trusted>() / 8];

/// The program's replay cache and its trusted senders.
pub struct Memory {
    replay_cache: HashMap<MapData, [u8; size_of::<DatagramId>()], u64>,
    trusted: HashMap<MapData, [u8; size_of::<Sender>()], Words>,
}

impl Memory {
    pub(super) fn new(replay_cache: Map, trusted: Map) -> Result<Self, Error> {
        Ok(Self {
            replay_cache: HashMap::try_from(replay_cache).map_err(map_error(name::REPLAY))?,
            trusted: HashMap::try_from(trusted).map_err(map_error(name::TRUSTED))?,
        })
    }

    /// Records a datagram as accepted, at a time on the monotonic clock. The program drops its
    /// copies.
    pub fn note(&mut self, datagram_id: DatagramId, at: u64) {
        told(self.replay_cache.insert(datagram_id.digest, at, 0));
    }

    /// Records that a sender's digest was right at that time. The program serves this sender even
    /// in a flood of unknown ones. What it knows of the sender already stays.
    pub fn trust(&mut self, sender: &Sender, at: u64) {
        let trusted = Trusted { last_right_ns: at, ..Trusted::default() };
        let (key, words): ([u8; size_of::<Sender>()], Words) =
            (zerocopy::transmute!(*sender), zerocopy::transmute!(trusted));
        // Programs of other listeners may use the map already.
        if self.trusted.get(&key, 0).is_err() {
            told(self.trusted.insert(key, words, 0));
        }
    }

    /// Whether the program trusts the sender.
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

/// These maps evict old elements, so an error means that the kernel lacks memory. User space keeps
/// its own record.
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

    /// Sends the heartbeat: the ring buffer is read, at this time on the monotonic clock.
    pub(super) fn beat(&mut self, now: u64) {
        told(self.0.set(0, now, 0));
    }
}
