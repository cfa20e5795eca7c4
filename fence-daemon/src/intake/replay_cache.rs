//! The replay cache: datagrams that were accepted, here, in the kernel program and on disk. An
//! attacker may record a datagram and send it again; a restart of the daemon must not help it.
//!
//! The cache is one file in the state directory under `/run`, of at most [`REPLAY_CACHE_MAX`]
//! records; the oldest is overwritten. A record holds the time, the beginning of the digest, and
//! the sender. The time is on the monotonic clock, which counts from the host's boot, and `/run` is
//! empty then too.
//!
//! The file is no secret, but only root may write it: the daemon refuses each datagram in it and
//! trusts each sender in it. A damaged record only refuses a datagram that nobody will ever send.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fence_common::rate_limit::{REPLAY_CACHE_MAX, Sender};
use fence_common::replay_cache::{self, DatagramId};
use fence_common::sync::{lock, unpoisoned};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::kernel::Memory;
use super::senders::Senders;
use crate::clock::Moment;
use crate::state::file::Locked;

/// The datagrams that were accepted.
#[derive(Debug)]
pub struct ReplayCache {
    /// For how long, in nanoseconds.
    window: AtomicU64,
    replays: Mutex<replay_cache::ReplayCache>,
    senders: Mutex<Senders>,
    file: Option<Mutex<ReplayFile>>,
    /// The maps of each kernel program, once it is loaded.
    kernel: Mutex<Vec<Memory>>,
}

/// The file, and where the next record goes.
#[derive(Debug)]
struct ReplayFile {
    file: Locked,
    next: usize,
    complained: bool,
}

/// One datagram in the file. All zero is none.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReplayRecord {
    at: [u8; 8],
    datagram_id: DatagramId,
    sender: Sender,
}

fn nanos(window: Duration) -> u64 {
    u64::try_from(window.as_nanos()).unwrap_or(u64::MAX)
}

/// The length of a record.
const LEN: usize = size_of::<ReplayRecord>();

impl ReplayCache {
    /// Keeps nothing beyond the process.
    #[must_use]
    pub fn none(window: Duration) -> Self {
        Self {
            window: AtomicU64::new(nanos(window)),
            replays: Mutex::default(),
            senders: Mutex::default(),
            file: None,
            kernel: Mutex::default(),
        }
    }

    /// Opens the file in `directory`, creates both if need be, and reads an earlier daemon's
    /// records. If that fails, the cache logs it and lasts only as long as the process.
    #[must_use]
    pub fn open(directory: &Path, window: Duration) -> Self {
        let mut cache = Self::none(window);
        match open(directory) {
            Ok((file, found)) => {
                let next = cache.recall(&found, Moment::now());
                cache.file = Some(Mutex::new(ReplayFile { file, next, complained: false }));
                // Under the lock of the other file.
                match Senders::open(directory, Moment::now()) {
                    Ok(senders) => cache.senders = Mutex::new(senders),
                    Err(error) => {
                        tracing::warn!(%error, "trusted senders are not stored: the next daemon will not know them");
                    }
                }
            }
            Err(error) => {
                let directory = directory.display();
                tracing::warn!(%directory, %error, "the replay cache is not stored: the next daemon will accept replays of what this one accepted");
            }
        }
        cache
    }

    fn window(&self) -> u64 {
        self.window.load(Ordering::Relaxed)
    }

    /// Remembers datagrams for so long from now on.
    pub fn set_window(&self, window: Duration) {
        self.window.store(nanos(window), Ordering::Relaxed);
    }

    /// Takes over records of this boot that are not too old. Returns where the next record goes.
    fn recall(&mut self, found: &[ReplayRecord], now: Moment) -> usize {
        let is_good = |at: u64| at != 0 && at <= now.nanos() && now.nanos().saturating_sub(at) < self.window();
        let at = |record: &ReplayRecord| u64::from_le_bytes(record.at);
        let mut good: Vec<(usize, &ReplayRecord)> =
            found.iter().enumerate().filter(|(_, record)| is_good(at(record))).collect();
        good.sort_by_key(|(_, record)| at(record));
        let replays = unpoisoned(self.replays.get_mut());
        for (_, record) in &good {
            replays.note(record.datagram_id, at(record));
        }
        good.last().map_or(0, |(index, _)| index.saturating_add(1) % REPLAY_CACHE_MAX)
    }

    /// Records a datagram whose digest is right. Returns `false` if it was accepted before.
    /// `sender` is its sender, if known. `in_kernel` says that a kernel program has recorded it
    /// already.
    pub fn is_new(&self, datagram_id: DatagramId, sender: Option<Sender>, in_kernel: bool) -> bool {
        let now = Moment::now().nanos();
        if !lock(&self.replays).is_new(datagram_id, now, self.window()) {
            return false;
        }
        if let Some(file) = &self.file {
            if let Some(sender) = sender {
                lock(&self.senders).saw(sender, now);
            }
            let sender = sender.unwrap_or_else(Sender::new_zeroed);
            lock(file).write(&ReplayRecord { at: now.to_le_bytes(), datagram_id, sender });
        }
        let mut kernel = lock(&self.kernel);
        // The one that has recorded it is not known, so all others get it, and that one again.
        if !in_kernel || kernel.len() > 1 {
            kernel.iter_mut().for_each(|kernel| kernel.note(datagram_id, now));
        }
        true
    }

    /// The trusted senders, and when each one's digest was last right.
    #[must_use]
    pub fn senders(&self) -> Vec<(Sender, u64)> {
        lock(&self.senders).all()
    }

    /// When a datagram was accepted, on the monotonic clock.
    #[must_use]
    pub fn accepted_at(&self, datagram_id: &DatagramId) -> Option<u64> {
        lock(&self.replays).accepted_at(datagram_id)
    }

    /// Fills a kernel program's maps from this cache, and adds what is accepted elsewhere from now
    /// on.
    pub fn teach(&self, mut kernel: Memory) {
        // Held until the maps are in place: datagrams accepted meanwhile wait for it.
        let mut all = lock(&self.kernel);
        let known: Vec<(DatagramId, u64)> = lock(&self.replays).iter().collect();
        for (datagram_id, at) in known {
            kernel.note(datagram_id, at);
        }
        // The socket knows no Ethernet addresses, so the program would never find a record without
        // one.
        for (sender, at) in self.senders().iter().filter(|(sender, _)| sender.mac != [0; 6]) {
            kernel.trust(sender, *at);
        }
        all.push(kernel);
    }
}

impl ReplayFile {
    /// Writes a record over the oldest. A failure only loses the record: fencing goes on.
    fn write(&mut self, record: &ReplayRecord) {
        let at = self.next * LEN;
        self.next = (self.next + 1) % REPLAY_CACHE_MAX;
        if let Err(error) = self.file.write_at(record.as_bytes(), at)
            && !std::mem::replace(&mut self.complained, true)
        {
            tracing::warn!(%error, "a datagram is not stored in the replay cache: the next daemon will accept a replay of it");
        }
    }
}

fn open(directory: &Path) -> io::Result<(Locked, Vec<ReplayRecord>)> {
    let (file, bytes) = Locked::open(directory, "replays", REPLAY_CACHE_MAX * LEN)?;
    let (records, _) = bytes.as_chunks::<LEN>();
    Ok((file, records.iter().map(|record| zerocopy::transmute!(*record)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fence_common::rate_limit::TRUSTED_MAX;

    use std::fs;
    use tempfile::tempdir;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn datagram_id(n: usize) -> DatagramId {
        DatagramId { digest: u128::try_from(n + 1).unwrap().to_be_bytes() }
    }

    fn sender(last: u8) -> Sender {
        let mut ip = [0; 16];
        ip[..4].copy_from_slice(&[192, 168, 122, last]);
        Sender { ip, mac: [2, 0, 0, 0, 0, last], family: 2 }
    }

    #[test]
    fn the_next_daemon_knows_what_was_accepted() {
        let scratch = tempdir().unwrap();
        let first = ReplayCache::open(scratch.path(), DAY);
        assert!(
            first.is_new(datagram_id(1), Some(sender(7)), true) && !first.is_new(datagram_id(1), Some(sender(7)), true)
        );
        assert!(first.is_new(datagram_id(2), None, false));
        let second = ReplayCache::open(scratch.path(), DAY);
        assert!(second.is_new(datagram_id(1), None, false), "two daemons share one file");
        drop((first, second));

        let third = ReplayCache::open(scratch.path(), DAY);
        assert!(!third.is_new(datagram_id(1), None, false) && !third.is_new(datagram_id(2), None, false));
        assert_eq!(third.senders().into_iter().map(|(sender, _)| sender).collect::<Vec<_>>(), [sender(7)]);
        assert!(third.is_new(datagram_id(3), None, false));
        drop(third);
        // Its records did not overwrite those of the first one.
        let fourth = ReplayCache::open(scratch.path(), DAY);
        assert!((1..=3).all(|n| !fourth.is_new(datagram_id(n), None, false)));
        drop(fourth);
        assert_eq!(fs::metadata(scratch.path().join("replays")).unwrap().len(), 3 * LEN as u64);
    }

    #[test]
    fn records_that_are_old_or_of_another_boot_are_dropped() {
        let scratch = tempdir().unwrap();
        let now = Moment::now();
        let mut bytes = Vec::new();
        let times = [0, now.before(Duration::from_secs(90)).nanos(), now.plus(DAY).nanos(), now.nanos()];
        for (n, at) in times.into_iter().enumerate() {
            let record = ReplayRecord { at: at.to_le_bytes(), datagram_id: datagram_id(n), sender: sender(1) };
            bytes.extend_from_slice(record.as_bytes());
        }
        // And one that was cut off.
        bytes.extend_from_slice(&[7; LEN - 1]);
        fs::write(scratch.path().join("replays"), bytes).unwrap();
        let cache = ReplayCache::open(scratch.path(), Duration::from_secs(60));
        assert_eq!((0..4).filter(|&n| cache.accepted_at(&datagram_id(n)).is_some()).collect::<Vec<_>>(), [3]);
        assert!(cache.is_new(datagram_id(9), None, false));
        drop(cache);
        let cache = ReplayCache::open(scratch.path(), Duration::from_secs(60));
        assert!(!cache.is_new(datagram_id(9), None, false) && !cache.is_new(datagram_id(3), None, false));
    }

    #[test]
    fn a_damaged_file_is_read_and_stays_small() {
        let scratch = tempdir().unwrap();
        fs::write(scratch.path().join("replays"), vec![0xa5; (REPLAY_CACHE_MAX + 10) * LEN + 5]).unwrap();
        let cache = ReplayCache::open(scratch.path(), DAY);
        assert!((0..REPLAY_CACHE_MAX + 100).all(|n| cache.is_new(datagram_id(n), None, false)));
        drop(cache);
        let cache = ReplayCache::open(scratch.path(), DAY);
        assert!(
            !cache.is_new(datagram_id(REPLAY_CACHE_MAX + 99), None, false)
                && !cache.is_new(datagram_id(100), None, false)
        );
        assert!(cache.is_new(datagram_id(0), None, false), "the oldest was overwritten");
        assert!(
            fs::metadata(scratch.path().join("replays")).unwrap().len() <= (REPLAY_CACHE_MAX as u64 + 11) * LEN as u64
        );
    }

    /// A holder of the key can send valid requests from any address that it makes up.
    #[test]
    fn a_holder_of_the_key_cannot_push_out_another_sender() {
        let scratch = tempdir().unwrap();
        let cache = ReplayCache::open(scratch.path(), DAY);
        assert!(cache.is_new(datagram_id(0), Some(sender(7)), true));
        for n in 1..=REPLAY_CACHE_MAX {
            let mut made_up = sender(66);
            made_up.ip[..4].copy_from_slice(&u32::try_from(n).unwrap().to_be_bytes());
            assert!(cache.is_new(datagram_id(n), Some(made_up), true));
        }
        drop(cache);
        let next = ReplayCache::open(scratch.path(), DAY);
        assert!(next.senders().iter().any(|(known, _)| *known == sender(7)), "forgotten");
        assert!(next.senders().len() <= TRUSTED_MAX);
    }

    #[test]
    fn without_a_directory_the_cache_lasts_as_long_as_the_process() {
        let cache = ReplayCache::open(Path::new("/proc/nowhere"), DAY);
        assert!(cache.is_new(datagram_id(1), None, false) && !cache.is_new(datagram_id(1), None, false));
    }
}
